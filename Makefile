PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1

.PHONY: demo test check wheel
demo: $(VENV)/installed
	$(VENV)/bin/hf-triton-mlp demo

test: $(VENV)/installed
	$(RUN) pytest

check: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright --pythonpath $(VENV)/bin/python

wheel: $(VENV)/installed
	rm -rf build dist
	$(RUN) pip wheel . --no-deps --wheel-dir dist

# A $(PYTHON) that has torch (a CUDA build, perhaps without network) lends all its packages. A .pth file
# does that also where $(PYTHON) is itself in a virtual environment; --system-site-packages does not.
ifeq ($(shell $(PYTHON) -c "import torch; print('yes')" 2>/dev/null),yes)
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PYTHON) -c "import sys; [print(f'import site; site.addsitedir({p!r})') for p in sys.path if p.endswith('-packages')]" \
	    > "$$($(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/lent.pth"
	for packages in '-e .[dev]' '-e .[test]' '-e .' '--no-deps -e .'; do \
	    $(RUN) pip install --no-build-isolation $$packages && break; \
	done
	touch $@
else
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) pip install --constraint constraints.txt -e ".[dev]"
	touch $@
endif
