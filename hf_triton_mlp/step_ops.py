"""What a captured step computes by our kernels besides attention and MLPs.

Linear layers and norms of few rows, wherever the model has them: PyTorch's functions are
intercepted while the step runs. And the next token.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_triton_mlp.kernels import greatest_logits_kernel, next_token_kernel
from hf_triton_mlp.launchers import (
    Launch,
    Norm,
    gpu,
    launch,
    linear,
    normalize,
    on_device,
    rows,
)
from hf_triton_mlp.ops import kernels_apply, needs_grad
from hf_triton_mlp.reading import read_epsilon, read_norm
from hf_triton_mlp.tuning import DECODE_ROWS, PDL_CAPABILITY

#: Float32 is left to PyTorch: no text then depends on whether it was made in captured steps.
DTYPES = (torch.float16, torch.bfloat16)

#: Rows that are normalized by our kernel: one of each head, say.
MOST_NORMS = 2048

#: Logits that one program looks through.
BLOCK = 2048

INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


_state = threading.local()


class StepOperations(TorchFunctionMode):
    """Within it, PyTorch's functions are computed as a captured step wants them.

    Tensors made of Python's numbers, and of lists of them in an index, are made once, since a
    capture cannot copy them (BLOOM's and Falcon's ALiBi start from such a number, Falcon's keys
    from such a list). With `ours`, linear layers and norms are our kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ours = False
        self._constants: dict[str, Tensor] = {}

    def __enter__(self) -> "StepOperations":
        _state.ours = self.ours
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        _state.ours = False
        super().__exit__(*raised)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and args and _are_numbers(args[0]):
            return self._constant(*args, **kwargs).clone()  # which may be written
        if function in INDEXING and isinstance(args[1], (list, tuple)):
            args = args[0], self._index(args[1], args[0].device), *args[2:]
        compute = OURS.get(function) if self.ours else None
        found = None if compute is None else compute(*args, **kwargs)
        return function(*args, **kwargs) if found is None else found

    def _constant(self, *args: Any, **kwargs: Any) -> Tensor:
        key = repr((args, sorted(kwargs.items())))
        if key not in self._constants:
            self._constants[key] = torch.tensor(*args, **kwargs)
        return self._constants[key]

    def _index(self, index: Any, device: torch.device) -> Any:
        """The index, with tensors instead of lists of numbers."""
        if isinstance(index, list):
            known = len(index) > 0 and _are_numbers(index)
            return self._constant(index, device=device) if known else index
        return tuple(self._index(e, device) if isinstance(e, list) else e for e in index)


def _are_numbers(data: Any) -> bool:
    """Whether `repr` says all of it, as it does not of large tensors and arrays."""
    numbers = data if isinstance(data, (list, tuple)) else [data]
    return all(isinstance(number, (int, float)) for number in numbers)


def normed(norm: nn.Module, input: Tensor, kind: str | None, cls: type[nn.Module]) -> Tensor:
    """norm(input); by our kernel in a captured step, where `norm` is a plain one of this class.

    kind: what the class computes, as in MLPConfig. PyTorch's own classes need no call of this.
    """
    epsilon = read_epsilon(norm)
    if getattr(_state, "ours", False) and kind is not None and epsilon is not None:
        read = read_norm(norm, cls, epsilon)
        found = None if read is None else _norm(kind, input, input.shape[-1:], *read, epsilon)
        if found is not None:
            return found
    return norm(input)


def _applies(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, most: int = DECODE_ROWS
) -> bool:
    """Whether there are few rows of 16 bits, and parameters of that type in one piece."""
    return (
        all(type(t) in (Tensor, nn.Parameter, type(None)) for t in (input, weight, bias))
        and kernels_apply(input)
        and input.dtype in DTYPES
        and all(t is None or t.dtype == input.dtype for t in (weight, bias))
        and (bias is None or bias.is_contiguous())
        and 0 < input.numel() // input.shape[-1] <= most
        and not needs_grad(input, weight, bias)
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """F.linear, or None to leave it to PyTorch."""
    return _product(input, weight, bias, stored=type(weight) is nn.Parameter)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None, *, stored: bool) -> Tensor | None:
    """input·weightᵀ + bias, or None; stored: no step computes the weight, which is the model's."""
    if not _applies(input, weight, bias) or weight.dim() != 2 or weight.stride(1) != 1:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    # The step began with kernels of PyTorch's, which had waited for all in front of them: nobody
    # is still writing what is stored.
    with on_device(input):
        out = linear(rows(input), weight, bias, waited=stored)
    return out.view(*input.shape[:-1], weight.shape[0])


def _addmm(bias: Tensor, input: Tensor, weight: Tensor, **scales: Any) -> Tensor | None:
    """torch.addmm as Conv1D calls it, or None."""
    if scales:
        return None
    return _product(input, weight.t(), bias, stored=type(weight) is nn.Parameter)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """F.layer_norm, or None."""
    return _norm("layer_norm", input, normalized_shape, weight, bias, eps)


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    """F.rms_norm, or None."""
    return None if eps is None else _norm("rms_norm", input, normalized_shape, weight, None, eps)


def _norm(
    kind: str,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    if tuple(normalized_shape) != input.shape[-1:] or not _applies(input, weight, bias, MOST_NORMS):
        return None
    if any(t is not None and t.shape != input.shape[-1:] for t in (weight, bias)):
        return None
    if weight is not None and not weight.is_contiguous():
        return None
    x = rows(input)
    norm = Norm(kind, weight, bias, eps, carry=torch.empty_like(x), carry_normed=True)
    with on_device(input):
        return normalize(x, None, None, norm, pdl=_pdl(input)).view(input.shape)


#: PyTorch's functions, and what computes them, which returns None where they are to be called.
OURS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}


def _pdl(tensor: Tensor) -> bool:
    return gpu(tensor.device.index)[1] >= PDL_CAPABILITY


def choose_greedily(
    logits: Tensor,
    token: Tensor,
    ends: Tensor,
    pad: Tensor,
    unfinished: Tensor,
    report: Tensor,
    length: Tensor,
    positions: Tensor | None,
) -> None:
    """Write the next tokens, for logits (batch, vocabulary), where the next step looks for them.

    token (batch, 1): the first of the greatest logits, or `pad` for a text that has ended;
    unfinished (batch,): False from when it is one of `ends` on, if there are any; report (2,
    batch): both of them; length () and positions (batch, 1) go up by one. Two launches.
    """
    if not kernels_apply(logits) or logits.stride(-1) != 1:
        tokens = logits.argmax(dim=-1)
        if ends.numel():
            tokens = torch.where(unfinished, tokens, pad)
            unfinished &= (tokens[:, None] != ends).all(dim=-1)
        token.copy_(tokens[:, None])
        report[0].copy_(tokens)
        report[1].copy_(unfinished)
        length += 1
        if positions is not None:
            positions += 1
        return
    batch, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, BLOCK)
    values = torch.empty((batch, chunks), dtype=torch.float32, device=logits.device)
    places = torch.empty((batch, chunks), dtype=torch.int32, device=logits.device)
    pdl = _pdl(logits)
    with on_device(logits):
        launch(
            Launch(
                greatest_logits_kernel,
                (chunks, batch, 1),
                (logits, values, places),
                (vocabulary, logits.stride(0)),
                (BLOCK, pdl),
                num_warps=4,
                num_stages=1,
                pdl=pdl,
            )
        )
        launch(
            Launch(
                next_token_kernel,
                (batch, 1, 1),
                (values, places, ends, pad, token, unfinished, report, length, positions),
                (chunks, ends.numel()),
                (
                    triton.next_power_of_2(chunks),
                    triton.next_power_of_2(ends.numel()) if ends.numel() else 0,
                    pdl,
                ),
                num_warps=4,
                num_stages=1,
                pdl=pdl,
            )
        )
