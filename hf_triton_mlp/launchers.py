"""Host side of the kernels: shapes, strides, plans and outputs for each launch.

Tensors are rows (tokens, size); callers have checked shapes, dtypes and devices.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.knobs import runtime

from hf_triton_mlp.kernels import (
    INTERPRETED,
    norm_kernel,
    residual_add_kernel,
    skinny_linear_kernel,
    tiled_linear_kernel,
)
from hf_triton_mlp.tuning import choose


@lru_cache
def capability(device_index: int | None) -> tuple[int, int]:
    return (8, 0) if INTERPRETED else torch.cuda.get_device_capability(device_index)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch._C._cuda_getDevice():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def rows(tensor: Tensor) -> Tensor:
    """(…, K) as (rows, K) with unit stride along K."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class Norm(NamedTuple):
    """A norm in front of a linear layer, and the residual that it hands on through `carry`."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    carry: Tensor
    carry_normed: bool


class Summands(NamedTuple):
    """What joins a linear layer: its output, or with a norm its input. Rows (tokens, size)."""

    add: Tensor | None = None
    add2: Tensor | None = None
    add_bias: Tensor | None = None


NO_SUMMANDS = Summands()

#: Compiled kernels by everything that Triton specialises on, and the values themselves: finding
#: one here costs the host a few microseconds, a launch through `kernel[grid](...)` about 25.
_compiled: dict[tuple[object, ...], Any] = {}
_COMPILED_LIMIT = 4096


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[int | float, ...],
    constants: tuple[object, ...],
    num_warps: int,
    num_stages: int,
) -> None:
    """Launch kernel(*tensors, *scalars, *constants) on the current device."""
    key = (
        id(kernel),
        tensors[0].device.index,  # pyright: ignore[reportOptionalMemberAccess]
        scalars,
        constants,
        num_warps,
        num_stages,
        *[None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors],
    )
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](
            *tensors, *scalars, *constants, num_warps=num_warps, num_stages=num_stages
        )
        if not INTERPRETED:
            if len(_compiled) >= _COMPILED_LIMIT:  # one entry for each number of rows, say
                _compiled.clear()
            _compiled[key] = compiled
    elif runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # a profiler's
        compiled[grid](*tensors, *scalars, *constants)
    else:
        stream = torch._C._cuda_getCurrentRawStream(key[1])
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(
            *grid, stream, function, metadata, None, None, None, *tensors, *scalars, *constants
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gate: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str | None = None,
    norm: Norm | None = None,
    summands: Summands = NO_SUMMANDS,
) -> Tensor:
    """act(norm(x)·weightᵀ + bias) [gated] + summands for rows x (tokens, K), in one launch.

    With a norm and more rows than the skinny kernel takes, the norm is a launch of its own.
    """
    (M, K), N = x.shape, weight.shape[0]
    gate_weight, gate_bias = gate
    add, add2, add_bias = summands
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    weight_strides = weight.stride()
    plan = choose(
        M,
        N,
        K,
        x.dtype,
        capability(x.device.index),
        k_contiguous=weight_strides[1] == 1,
        gated=gate_weight is not None,
    )
    if norm is not None and plan.kernel != "skinny":
        x = normalize(x, add, add_bias, norm)
        norm, add, add_bias = None, None, None
    scalars = (
        M,
        N,
        K,
        x.stride(0),
        0 if add is None else add.stride(0),
        0 if add2 is None else add2.stride(0),
        *weight_strides,
        *((0, 0) if gate_weight is None else gate_weight.stride()),
    )
    blocks = -(-N // plan.block_n)
    if plan.kernel == "skinny":
        kind, norm_weight, norm_bias, eps, carry, carry_normed = norm or (
            None,
            None,
            None,
            0.0,
            None,
            False,
        )
        launch(
            skinny_linear_kernel,
            (M * blocks, 1, 1),
            (
                x,
                weight,
                bias,
                gate_weight,
                gate_bias,
                norm_weight,
                norm_bias,
                add,
                add2,
                add_bias,
                carry,
                out,
            ),
            (*scalars, eps),
            # Weights are read once a step; with several rows, the later ones find them in the L2.
            (kind, carry_normed, activation, "evict_first" if M == 1 else "", *plan.blocks),
            plan.num_warps,
            plan.num_stages,
        )
    else:
        launch(
            tiled_linear_kernel,
            (-(-M // plan.block_m) * blocks, 1, 1),
            (x, weight, bias, gate_weight, gate_bias, add, add2, add_bias, out),
            scalars,
            (activation, *plan.blocks),
            plan.num_warps,
            plan.num_stages,
        )
    return out


def normalize(x: Tensor, add: Tensor | None, add_bias: Tensor | None, norm: Norm) -> Tensor:
    """norm(x + add + add_bias), which is the carry itself when the normed value is carried on."""
    M, K = x.shape
    out = norm.carry if norm.carry_normed else torch.empty_like(norm.carry)
    sums = None if norm.carry_normed else norm.carry
    launch(
        norm_kernel,
        (M, 1, 1),
        (x, add, add_bias, norm.weight, norm.bias, sums, out),
        (K, x.stride(0), 0 if add is None else add.stride(0), norm.eps),
        (norm.kind, min(triton.next_power_of_2(K), 4096)),
        4,
        1,
    )
    return out


def residual_add(
    hidden: Tensor,
    residual: Tensor | None,
    attention: Tensor | None,
    attention_bias: Tensor | None,
    final_bias: Tensor | None,
    share: float,
    attention_share: float,
) -> Tensor:
    """hidden + share * (residual + attention_bias + final_bias) + attention_share * attention."""
    M, K = hidden.shape
    out = torch.empty((M, K), dtype=hidden.dtype, device=hidden.device)
    if M == 0:
        return out
    block = min(triton.next_power_of_2(K), 1024)
    launch(
        residual_add_kernel,
        (M, -(-K // block), 1),
        (hidden, residual, attention, attention_bias, final_bias, out),
        (
            K,
            hidden.stride(0),
            0 if residual is None else residual.stride(0),
            0 if attention is None else attention.stride(0),
            share,
            attention_share,
        ),
        (block,),
        4,
        1,
    )
    return out
