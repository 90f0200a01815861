"""The marker `gpu`, one thread, no terminal's width, the device of a test, and what is logged."""

import os

import pytest
import torch

from hf_triton_mlp import decoding

# The models here are tiny: a second thread costs more than it computes, in other processes too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# rich reads these once, where it is imported: how wide a terminal is must not decide a test.
for size in ("COLUMNS", "LINES"):
    os.environ.pop(size, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs: in PyTorch on the CPU, or in the kernels on a GPU."""
    return request.param


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What generate() logs of captured steps; the loop is ours on the CPU too."""
    said: list[str] = []
    monkeypatch.setattr(decoding, "ON_CPU", True)
    monkeypatch.setattr(decoding, "_say", said.append)
    return said
