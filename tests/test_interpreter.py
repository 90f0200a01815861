"""The kernels on the CPU: Triton's interpreter has to be on before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_triton_mlp.kernels import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the interpreter test starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively on this machine")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "files",
    [
        "test_ops.py",
        "test_mlp.py",
        "test_attention.py",
        "test_step_ops.py test_peer_memory.py",
        "test_quantized_kernels.py",
        "test_quantized_row.py",
        "test_sparse.py",
    ],
)
def test_kernels_under_the_interpreter(files: str) -> None:
    paths = [str(Path(__file__).with_name(file)) for file in files.split()]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "-m", "not gpu",
         "-k", "not opcheck", *paths],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
