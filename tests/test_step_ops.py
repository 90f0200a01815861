"""Linear layers, norms and the next token as a captured step computes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp import step_ops
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.step_ops import StepOperations, choose_greedily

DTYPES = (torch.float16, torch.bfloat16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNEL_DEVICES = DEVICES[:1] if INTERPRETED else DEVICES[1:]


class Recorded(TorchDispatchMode):
    """Which of PyTorch's own operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def ours() -> Iterator[Recorded]:
    operations = StepOperations()
    operations.ours = True
    with torch.no_grad(), operations, Recorded() as recorded:
        yield recorded


def modules(dtype: torch.dtype, device: str) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(40, 96)
    conv.weight.data = conv.weight.data.t().contiguous().t()
    found = {
        "aten.linear": torch.nn.Linear(96, 40),
        "aten.mm": torch.nn.Linear(96, 40, bias=False),
        "aten.addmm": conv,
        "aten.native_layer_norm": torch.nn.LayerNorm(96),
        "aten.rms_norm": torch.nn.RMSNorm(96, eps=1e-6),
    }
    for module in found.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    return {name: module.to(device, dtype) for name, module in found.items()}


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (16,)])
def test_modules(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for name, module in modules(dtype, device).items():
        x = torch.randn(*shape, 96).to(device, dtype)
        with torch.no_grad():
            original, exact = module(x), module.double()(x.double())
            module.to(dtype)
        with ours() as recorded:
            found = module(x)
        assert not any("mm" in each or "norm" in each for each in recorded.names), name
        tiny.assert_as_accurate(found, original, exact)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_left_to_pytorch(device: str) -> None:
    """Float32, many rows, weights of another type or layout, gradients, two normalized axes."""
    linear = torch.nn.Linear(96, 40).to(device, torch.float16)
    x = torch.randn(2, 96, device=device, dtype=torch.float16)
    by_input = Conv1D(40, 96).to(device, torch.float16)
    cases = {
        "float32": lambda: F.linear(x.float(), linear.weight.float()),
        "rows": lambda: linear(x.repeat(9, 1)),
        "layout": lambda: by_input(x),
        "axes": lambda: F.layer_norm(x, (2, 96)),
        "epsilon": lambda: F.rms_norm(x, (96,)),
        "bias": lambda: F.linear(x, linear.weight, x[0, :1]),
        "scaled": lambda: torch.addmm(by_input.bias, x, by_input.weight, alpha=2),
    }
    for name, case in cases.items():
        with ours() as recorded:
            found = case()
        theirs = ("mm", "norm", "rsqrt")
        assert any(word in each for word in theirs for each in recorded.names), name
        with torch.no_grad():
            assert torch.equal(found, case())
    with StepOperations() as operations:
        operations.ours = True
        linear(x).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_weights_computed_in_the_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those of the model may be read before the kernel in front has ended."""
    module = torch.nn.Linear(96, 40, bias=False).to(device, torch.float16)
    conv = modules(torch.float16, device)["aten.addmm"]
    x = torch.randn(2, 96, device=device, dtype=torch.float16)
    waited = []
    theirs = step_ops.linear

    def recorded(*args: Any, **options: Any) -> torch.Tensor:
        waited.append(options["waited"])
        return theirs(*args, **options)

    monkeypatch.setattr(step_ops, "linear", recorded)
    with ours():
        module(x)
        conv(x)
        F.linear(x, module.weight * 2)
    assert waited == [True, True, False]


def test_constants(device: str) -> None:
    with StepOperations():
        first, again = (torch.tensor([1.0, 2.0], device=device) for _ in range(2))
        other = torch.tensor([1.0, 3.0], device=device)
        first += 1  # what is made of the same numbers again stays what they are
        last = torch.tensor([1.0, 2.0], device=device)
    assert again.tolist() == last.tolist() == [1.0, 2.0] and other.tolist() == [1.0, 3.0]


def test_lists_in_an_index(device: str) -> None:
    """Python's lists are copied to the GPU, which a capture cannot do, at their first use alone."""
    x = torch.arange(24, device=device).view(2, 3, 4)
    indices = [[1], (..., [-2]), (slice(None), [0, 2], 1), (0, [True, False, True])]
    expected = [x[index] for index in indices]
    with StepOperations() as operations:
        first = [x[index] for index in indices]
        with Recorded() as recorded:
            again = [x[index] for index in indices]
        x[..., [-1]] = 0
    for one, two, three in zip(expected, first, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert not x[..., -1].any()
    assert len(operations._constants) == 5
    assert not any("copy" in name or "lift" in name for name in recorded.names)


def test_arrays_that_look_alike() -> None:
    one, other = np.arange(2000.0), np.arange(2000.0)
    other[1000] = -1
    assert repr(one) == repr(other)
    with StepOperations():
        assert not torch.equal(torch.tensor(one), torch.tensor(other))
        assert not torch.equal(torch.tensor([*one]), torch.tensor([*other]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("ends", [0, 1, 3])
@pytest.mark.parametrize("positions", [True, False])
def test_choose_greedily(device: str, dtype: torch.dtype, ends: int, positions: bool) -> None:
    vocabulary, batch = 5003, 5
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, 2, vocabulary, generator=generator).to(device, dtype)[:, -1]
    logits[0, [7, 2047, 2048, 5002]] = 9.0  # the first of equals
    logits[1, 5002] = 9.0
    logits[2] = -torch.inf
    logits[2, 4999] = -8.0
    logits[3, [5, 11, 40]] = torch.tensor([torch.inf, torch.nan, torch.inf]).to(device, dtype)
    expected = [7, 5002, 4999, 11, int(logits[4].argmax())]
    end_tokens = torch.tensor([expected[1], 4, expected[4]][:ends], device=device)
    pad = torch.tensor(3, device=device)
    unfinished = torch.tensor([True, True, False, True, True], device=device)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    report = torch.zeros(2, batch, dtype=torch.int64, device=device)
    length = torch.tensor(8, device=device)
    places = torch.arange(batch, device=device)[:, None] if positions else None
    choose_greedily(logits, token, end_tokens, pad, unfinished, report, length, places)
    if ends:
        expected[2] = 3
    goes_on = [True, ends < 1, False, True, ends < 3]
    assert token.flatten().tolist() == expected == report[0].tolist()
    assert unfinished.tolist() == goes_on and report[1].tolist() == [int(each) for each in goes_on]
    assert length.item() == 9
    if places is not None:
        assert places.flatten().tolist() == [1, 2, 3, 4, 5]
