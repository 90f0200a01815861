"""Host side of the kernels: shapes, strides, plans and outputs for each launch.

Tensors are rows (tokens, size); callers have checked shapes, dtypes and devices.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.knobs import runtime

from hf_triton_mlp.kernels import (
    INTERPRETED,
    decode_linear_kernel,
    norm_kernel,
    residual_add_kernel,
    skinny_linear_kernel,
    tiled_linear_kernel,
)
from hf_triton_mlp.tuning import DECODE_ROWS, Plan, choose


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
NO_NORM = (None, None, None, 0.0, None, False)

#: Compiled kernels by everything that Triton specialises on, and the values themselves: finding
#: one here costs the host a few microseconds, a launch through `kernel[grid](...)` about 25.
_compiled: dict[tuple[object, ...], Any] = {}
_COMPILED_LIMIT = 4096


class Launch(NamedTuple):
    """One kernel launch: kernel[grid](*tensors, *scalars, *constants), its options in `plan`."""

    kernel: Any
    grid: tuple[int, int, int]
    tensors: tuple[Tensor | None, ...]
    scalars: tuple[int | float, ...]
    constants: tuple[object, ...]
    num_warps: int
    num_stages: int
    pdl: bool = False


def launch(call: Launch) -> Any:
    """Launch on the current device; returns the compiled kernel."""
    kernel, grid, tensors, scalars, constants, num_warps, num_stages, pdl = call
    key = (
        id(kernel),
        tensors[0].device.index,  # pyright: ignore[reportOptionalMemberAccess]
        scalars,
        constants,
        num_warps,
        num_stages,
        pdl,
        *[None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors],
    )
    compiled = _compiled.get(key)
    if compiled is None:
        options = {"launch_pdl": True} if pdl else {}
        compiled = kernel[grid](
            *tensors, *scalars, *constants, num_warps=num_warps, num_stages=num_stages, **options
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
    return compiled


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gate: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str | None = None,
    norm: Norm | None = None,
    summands: Summands = NO_SUMMANDS,
    plan: Plan | None = None,
) -> Tensor:
    """act(norm(x)·weightᵀ + bias) [gated] + summands for rows x (tokens, K), in one launch.

    With a norm that the plan's kernel does not fuse, the norm is a launch of its own.
    """
    M, N = x.shape[0], weight.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    plan = plan or plan_linear(x, weight, gated=gate[0] is not None)
    if norm is not None and not plan.fuses_norm:
        x = normalize(x, summands.add, summands.add_bias, norm)
        norm, summands = None, NO_SUMMANDS
    launch(linear_launch(plan, x, weight, bias, gate, activation, norm, summands, out))
    return out


def plan_linear(x: Tensor, weight: Tensor, *, gated: bool) -> Plan:
    """How rows x (tokens, K) times weight (N, K) runs on x's device."""
    return choose(
        x.shape[0],
        *weight.shape,
        x.dtype,
        capability(x.device.index),
        k_contiguous=weight.stride(1) == 1,
        gated=gated,
    )


def linear_launch(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: tuple[Tensor | None, Tensor | None],
    activation: str | None,
    norm: Norm | None,
    summands: Summands,
    out: Tensor,
) -> Launch:
    """The launch that computes `linear` into out (tokens, N).

    The kernels that fuse a norm take x, add, add2, carry and out first: see `DecodeMLP`.
    """
    (M, K), N = x.shape, weight.shape[0]
    gate_weight, gate_bias = gate
    add, add2, add_bias = summands
    scalars = (
        M,
        N,
        K,
        x.stride(0),
        0 if add is None else add.stride(0),
        0 if add2 is None else add2.stride(0),
        *weight.stride(),
        *((0, 0) if gate_weight is None else gate_weight.stride()),
    )
    blocks = -(-N // plan.block_n)
    options = plan.num_warps, plan.num_stages, plan.pdl
    if not plan.fuses_norm:
        tensors = (x, weight, bias, gate_weight, gate_bias, add, add2, add_bias, out)
        grid = (-(-M // plan.block_m) * blocks, 1, 1)
        constants = (activation, *plan.blocks)
        return Launch(tiled_linear_kernel, grid, tensors, scalars, constants, *options)
    kind, norm_weight, norm_bias, eps, carry, carry_normed = norm or NO_NORM
    tensors = (
        x, add, add2, carry, out,
        weight, bias, gate_weight, gate_bias, norm_weight, norm_bias, add_bias,
    )  # fmt: skip
    scalars = (*scalars, eps)
    constants = (kind, carry_normed, activation)
    if plan.kernel == "decode":
        constants += (
            weight.stride(1) == 1,
            *plan.blocks,
            triton.next_power_of_2(-(-K // blocks)),
            plan.pdl,
        )
        return Launch(decode_linear_kernel, (blocks, 1, 1), tensors, scalars, constants, *options)
    # Weights are read once a step; with several rows, the later ones find them in the L2.
    constants += ("evict_first" if M == 1 else "", *plan.blocks)
    return Launch(skinny_linear_kernel, (M * blocks, 1, 1), tensors, scalars, constants, *options)


def normalize(x: Tensor, add: Tensor | None, add_bias: Tensor | None, norm: Norm) -> Tensor:
    """norm(x + add + add_bias), which is the carry itself when the normed value is carried on."""
    M, K = x.shape
    out = norm.carry if norm.carry_normed else torch.empty_like(norm.carry)
    sums = None if norm.carry_normed else norm.carry
    launch(
        Launch(
            norm_kernel,
            (M, 1, 1),
            (x, add, add_bias, norm.weight, norm.bias, sums, out),
            (K, x.stride(0), 0 if add is None else add.stride(0), norm.eps),
            (norm.kind, min(triton.next_power_of_2(K), 4096)),
            num_warps=4,
            num_stages=1,
        )
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
    scalars = (
        K,
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        0 if attention is None else attention.stride(0),
        share,
        attention_share,
    )
    launch(
        Launch(
            residual_add_kernel,
            (M, -(-K // block), 1),
            (hidden, residual, attention, attention_bias, final_bias, out),
            scalars,
            (block,),
            num_warps=4,
            num_stages=1,
        )
    )
    return out


class DecodeMLP:
    """An MLP for a few rows as two launches with everything bound but the caller's tensors.

    What finding the plan, checking the tensors and looking the compiled kernels up costs the host
    is paid once for each number of rows; a call costs two allocations and two launches. It is for
    plain calls: no gradients, no tracing, tensors of the weights' dtype on their device, and
    weights that are where they were: their addresses are kept, not the tensors.
    """

    def __init__(self, up: Tensor) -> None:
        self.intermediate, self.hidden = up.shape
        self.device, self.dtype = up.device, up.dtype
        self._bound: dict[tuple[int, bool], Bound] = {}

    def __call__(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        """The MLP of input (…, H), with a norm of input + residual, plus the residual.

        None when no launches are bound for such a call: another number of rows, tensors that are
        not contiguous or not aligned, another current device, a profiler that wants to see
        launches.
        """
        x = input.data_ptr()
        r = None if residual is None else residual.data_ptr()
        bound = self._bound.get((input.numel() // self.hidden, r is None))
        if (
            bound is None
            or (x | (r or 0)) % 16
            or not input.is_contiguous()
            or (residual is not None and not residual.is_contiguous())
            or torch._C._cuda_getDevice() != self.device.index
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
        ):
            return None
        out = torch.empty_like(input)
        work = torch.empty(bound.work_bytes, dtype=torch.uint8, device=self.device)
        carry = work.data_ptr()
        hidden = carry + bound.carry_bytes
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        if bound.carry_bytes:
            bound.up(stream, x, r, None, carry, hidden)
            bound.down(stream, hidden, carry, None, None, out.data_ptr())
        else:
            bound.up(stream, x, None, None, None, hidden)
            bound.down(stream, hidden, r, None, None, out.data_ptr())
        return out

    def bind(
        self,
        input: Tensor,
        residual: Tensor | None,
        up: tuple[Tensor, Tensor | None],
        gate: tuple[Tensor | None, Tensor | None],
        down: tuple[Tensor, Tensor | None],
        *,
        activation: str,
        norm: tuple[str, Tensor | None, Tensor | None, float] | None,
        carry_normed: bool,
    ) -> None:
        """Bind the launches for calls with as many rows as these tensors have, if there are such.

        norm: (kind, weight, bias, eps) in front of the MLP or None; carry_normed as in `Norm`.
        """
        M = input.numel() // self.hidden
        if not 0 < M <= DECODE_ROWS or input.data_ptr() % 16 or not input.is_contiguous():
            return
        x = input.view(M, self.hidden)
        r = None if residual is None else rows(residual)
        if r is not None and (r.data_ptr() % 16 or not r.is_contiguous()):
            return
        with on_device(x):
            hidden = x.new_empty((M, self.intermediate))
            up_plan = plan_linear(x, up[0], gated=gate[0] is not None)
            down_plan = plan_linear(hidden, down[0], gated=False)
            if not (up_plan.fuses_norm and down_plan.fuses_norm):
                return
            carry, before, summands, carry_bytes = r, None, NO_SUMMANDS, 0
            if norm is not None:
                carry, summands = torch.empty_like(x), Summands(add=r)
                before = Norm(*norm, carry, carry_normed)
                carry_bytes = -(-x.nbytes // 256) * 256
            calls = (
                linear_launch(up_plan, x, *up, gate, activation, before, summands, hidden),
                linear_launch(
                    down_plan, hidden, *down, (None, None), None, None, Summands(add=carry),
                    torch.empty_like(x),
                ),
            )  # fmt: skip
            work_bytes = carry_bytes + hidden.nbytes
            up_again, down_again = map(bind, calls)
            self._bound[M, r is None] = Bound(up_again, down_again, carry_bytes, work_bytes)


class Bound(NamedTuple):
    """Both launches of an MLP as functions, bytes of the carry and of carry and hidden together."""

    up: Callable[..., None]
    down: Callable[..., None]
    carry_bytes: int
    work_bytes: int


def bind(call: Launch) -> Callable[..., None]:
    """Launch once; a function of (stream, x, add, add2, carry, out) that launches again."""
    compiled = launch(call)
    fixed = [None if tensor is None else tensor.data_ptr() for tensor in call.tensors[5:]]
    fixed += [*call.scalars, *call.constants]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    width = call.grid[0]

    def launch_again(stream: int, *pointers: int | None) -> None:
        run(width, 1, 1, stream, function, metadata, None, None, None, *pointers, *fixed)

    return launch_again
