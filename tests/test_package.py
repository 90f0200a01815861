"""What importing does, what is said when something is missing, and the choice of plans."""

import subprocess
import sys

import pytest
import torch

from hf_triton_mlp.tuning import Linear, choose


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_import_creates_no_cuda_context_and_needs_no_patches() -> None:
    result = run(
        "import sys, torch, hf_triton_mlp\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'hf_triton_mlp.patches' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


def test_families_that_are_not_loaded_stay_so() -> None:
    result = run(
        "import sys\n"
        "from hf_triton_mlp.patching import patch_report\n"
        "from hf_triton_mlp.specs import specs\n"
        "from torch.nn import Linear\n"
        "assert specs() and not patch_report(Linear(2, 2)).rows\n"
        "models = [name for name in sys.modules if name.startswith('transformers.models.')]\n"
        "assert not [name for name in models if '.modeling_' in name]"
    )
    assert result.returncode == 0, result.stderr


def test_without_triton() -> None:
    result = run(
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import hf_triton_mlp"
    )
    assert result.returncode == 1
    assert "needs Triton >= 3.6" in result.stderr and "pip install triton" in result.stderr


def test_a_checkout_that_is_not_installed() -> None:
    result = run(
        "import sys; sys.modules['hf_triton_mlp.patches'] = None\n"
        "import torch, hf_triton_mlp\n"
        "hf_triton_mlp.patch_model(torch.nn.Linear(2, 2))"
    )
    assert result.returncode == 1 and "pip install -e ." in result.stderr


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_old_gpu(capability: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match=rf"{capability[0]}\.{capability[1]}.*8\.0"):
        choose(Linear(1, 768, 768, torch.float16), capability)
