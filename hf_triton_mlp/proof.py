"""One layer's second half on a random probe: as its class computes it, and as patched."""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hf_triton_mlp.launchers import multiplies_fp8
from hf_triton_mlp.linear import quantized_linears
from hf_triton_mlp.mlp import TritonMLP
from hf_triton_mlp.quantization import QuantizedWeight, fp8_rows
from hf_triton_mlp.reading import is_plain, runs_its_class, split_packed

#: What attention returns.
ATTENTION_SCALE = 1 / 32

#: What enters a layer is so small that it hides nothing which the MLP, behind a norm, adds to it.
SCALES = (1 / 32,)

#: Where a norm enlarges what attention returns, that must not hide what enters the layer either.
NORMED_SCALES = (1 / 32, 1.0)

#: Numbers of tokens for which quantized weights are multiplied in other ways each.
QUANTIZED_ROWS = (1, 3, 16, 40, 136, 520)

#: As in the tests of the kernels: torch's own error may be nothing, by chance.
ERROR_RATIO = 2
FLOOR_EPS = 2

#: What the rounding of rows to fp8 may be taken to change: one step of its numbers.
LARGEST_ROUNDING = torch.finfo(torch.float8_e4m3fn).eps


class _Attention(nn.Module):
    """Stands where a layer's attention was, and returns the same `rows` for all inputs."""

    output: Tensor

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.register_buffer("output", output)
        self.rows = output.shape[1]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.output[:, : self.rows], None


def can_run(module: nn.Module, attention: str | None) -> bool:
    """Whether `errors` may run a copy: no hooks, no other forwards, outside the attention.

    Hooks on `module` itself see what it is called with, and go on to; the copy is not called.
    """
    parts = (
        part
        for name, part in module.named_modules()
        if name and not (attention is not None and f"{name}.".startswith(f"{attention}."))
    )
    return runs_its_class(module) and all(is_plain(part, type(part)) for part in parts)


@torch.inference_mode(False)
@torch.no_grad()
def errors(
    module: nn.Module,
    attention: str | None,
    like: Tensor,
    patch: Callable[[nn.Module], TritonMLP],
    unpatch: Callable[[nn.Module], None],
    scales: Sequence[float] = SCALES,
    quantized: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
    rows: Sequence[int] = (1,),
) -> list[tuple[float, float, float]]:
    """(error of `module` patched, torch's own), relative to the same in a wider dtype; and what
    rounding rows to fp8 changes there.

    module: a decoder layer, whose attention is left out, or (attention None) an MLP. like: a
    weight (…, H), whose dtype and device the probe has. scales: of what enters the layer, each
    gives errors. quantized: what takes the places of some of its linear layers first.
    rows: how many tokens, each number with errors of its own.
    A copy is run, without the attention's weights: by its own class, patched, and in float32, or
    float64 where it is float32. On a GPU the patched copy runs the kernels, elsewhere PyTorch on
    the tensors that they would read. Only patched it has quantized weights, else what they stand
    for, multiplied by rows that are rounded to fp8 where the kernels make fp8 of them.
    """
    generator = torch.Generator().manual_seed(0)
    dtype, device = like.dtype, like.device

    def random() -> Tensor:
        shape = 1, max(rows), like.shape[-1]
        return torch.randn(shape, generator=generator).to(device, dtype)

    memo: dict[int, Any] = {id(old): copy.deepcopy(new) for old, new in quantized.items()}
    hooks = (part.__dict__.get("_hf_hook") for part in module.modules())
    memo |= {id(hook): hook for hook in hooks if hook is not None}  # they know of tied weights
    parameters = list(inspect.signature(module.forward).parameters.values())
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    stand_in = None
    if attention is None:
        probes = [[random() for _ in required]]
    else:
        stand_in = _Attention(ATTENTION_SCALE * random())
        memo[id(module.get_submodule(attention))] = stand_in
        x, others = random(), [None] * (len(required) - 1)
        probes = [[scale * x, *others] for scale in scales]

    twin = copy.deepcopy(module, memo).eval()

    def run(dtype: torch.dtype) -> list[Tensor]:
        outputs = []
        with torch.autocast(device.type, enabled=False):
            for inputs, count in itertools.product(probes, rows):
                if stand_in is not None:
                    stand_in.rows = count
                given = [None if x is None else x[:, :count].to(dtype) for x in inputs]
                output = twin.forward(*given)
                outputs.append(output if isinstance(output, Tensor) else output[0])
        return outputs

    layers = dict(quantized_linears(twin))
    mlp = patch(twin)
    mlp.proving = True
    # On a GPU the first call binds launches, which compute the second, as they do a decode step.
    found = run(dtype), run(dtype)
    read = {name: layer.quantized for name, layer in layers.items()}
    if mlp.packed is not None and mlp.projection_names is not None:
        up = mlp.get_submodule(mlp.projection_names[0] or "")
        of_both = [name for name, layer in layers.items() if layer is up]
        read |= {name: split_packed(mlp.packed, read[name])[0] for name in of_both}
    unpatch(twin)

    def dequantize(to: torch.dtype, *, rounded: bool = True) -> None:
        for name, layer in layers.items():
            plain = layer.dequantized(to)
            if rounded:
                plain.register_forward_pre_hook(_rounding(read[name], dtype))
            twin.set_submodule(name, plain)

    dequantize(dtype)
    own = run(dtype)
    wide = torch.float64 if dtype is torch.float32 else torch.float32
    dequantize(wide)
    twin.to(wide)
    exact = unrounded = run(wide)
    if any(weight.activations is not None for weight in read.values()):
        dequantize(wide, rounded=False)
        unrounded = run(wide)

    def error(*outputs: list[Tensor]) -> list[float]:
        """For each probe the greatest of some outputs; NaN if one has it."""
        greatest = []
        for of_probe, right in zip(zip(*outputs, strict=True), exact, strict=True):
            distance = torch.stack([(each.double() - right).norm() for each in of_probe]).amax()
            size = right.double().norm()
            greatest.append((distance / size if size > 0 else distance).item())
        return greatest

    return list(zip(error(*found), error(own), error(unrounded), strict=True))


def _rounding(weight: QuantizedWeight, dtype: torch.dtype) -> Callable[..., Any]:
    """A hook that rounds a linear layer's rows as `linear` does for this weight, in this dtype."""

    def hook(linear: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = given
        return (fp8_rows(x),) if multiplies_fp8(weight, x.shape[:-1].numel(), dtype) else given

    return hook


def within_bound(found: float, own: float, dtype: torch.dtype, rounding: float = 0.0) -> bool:
    """Whether the patched error is at most twice torch's own and two roundings; NaN is not.

    Nor is one that leaves less than half of the digits: torch's own is as large where a layer is
    random. Where rows become fp8, what that rounding changes is allowed on top: matrix units add
    fp8 products with fewer digits than float32's, and by how many differs from GPU to GPU.
    """
    eps = torch.finfo(dtype).eps
    bound = min(ERROR_RATIO * own + FLOOR_EPS * eps, math.sqrt(eps))
    return found <= bound + min(rounding, LARGEST_ROUNDING)
