"""Host side of the kernels: shapes, strides, plans and outputs for each launch.

Tensors are rows (tokens, size); callers have checked shapes, dtypes and devices.
"""

# Pyright does not model `kernel[grid](..., num_warps=...)`.
# pyright: reportCallIssue=false

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

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
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def rows(tensor: Tensor) -> Tensor:
    """(…, K) as (rows, K) with unit stride along K."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm in front of a linear layer, and the residual that it hands on through `carry`."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    carry: Tensor
    carry_normed: bool


@dataclass(frozen=True, kw_only=True)
class Summands:
    """What joins a linear layer: its output, or with a norm its input. Rows (tokens, size)."""

    add: Tensor | None = None
    add2: Tensor | None = None
    add_bias: Tensor | None = None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gate: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str | None = None,
    norm: Norm | None = None,
    summands: Summands | None = None,
) -> Tensor:
    """act(norm(x)·weightᵀ + bias) [gated] + summands for rows x (tokens, K), in one launch.

    With a norm and more rows than the skinny kernel takes, the norm is a launch of its own.
    """
    (M, K), N = x.shape, weight.shape[0]
    gate_weight, gate_bias = gate
    add, add2, add_bias = (
        (None, None, None) if summands is None else (summands.add, summands.add2, summands.add_bias)
    )
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    plan = choose(
        M,
        N,
        K,
        x.dtype,
        capability(x.device.index),
        k_contiguous=weight.stride(1) == 1,
        gated=gate_weight is not None,
    )
    strides = (
        x.stride(0),
        0 if add is None else add.stride(0),
        0 if add2 is None else add2.stride(0),
        *weight.stride(),
        *((0, 0) if gate_weight is None else gate_weight.stride()),
    )
    if plan.kernel == "skinny":
        skinny_linear_kernel[(M * triton.cdiv(N, plan.block_n),)](
            x,
            weight,
            bias,
            gate_weight,
            gate_bias,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            add,
            add2,
            add_bias,
            None if norm is None else norm.carry,
            out,
            M,
            N,
            K,
            *strides,
            0.0 if norm is None else norm.eps,
            NORM=None if norm is None else norm.kind,
            CARRY_NORMED=norm is not None and norm.carry_normed,
            ACTIVATION=activation,
            # A weight is read once a step; with several rows the others find it in the L2.
            EVICT="evict_first" if M == 1 else "",
            BLOCK_N=plan.block_n,
            BLOCK_K=plan.block_k,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )
        return out
    if norm is not None:
        x = normalize(x, add, add_bias, norm)
        add = add_bias = None
    tiled_linear_kernel[(triton.cdiv(M, plan.block_m) * triton.cdiv(N, plan.block_n),)](
        x,
        weight,
        bias,
        gate_weight,
        gate_bias,
        add,
        add2,
        add_bias,
        out,
        M,
        N,
        K,
        x.stride(0),
        *strides[1:],
        ACTIVATION=activation,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        GROUP_M=plan.group_m,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out


def normalize(x: Tensor, add: Tensor | None, add_bias: Tensor | None, norm: Norm) -> Tensor:
    """norm(x + add + add_bias), which is the carry itself when the normed value is carried on."""
    M, K = x.shape
    out = norm.carry if norm.carry_normed else torch.empty_like(norm.carry)
    norm_kernel[(M,)](
        x,
        add,
        add_bias,
        norm.weight,
        norm.bias,
        None if norm.carry_normed else norm.carry,
        out,
        K,
        x.stride(0),
        0 if add is None else add.stride(0),
        norm.eps,
        NORM=norm.kind,
        BLOCK_K=min(triton.next_power_of_2(K), 4096),
        num_warps=4,
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
    residual_add_kernel[(M, triton.cdiv(K, block))](
        hidden,
        residual,
        attention,
        attention_bias,
        final_bias,
        out,
        K,
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        0 if attention is None else attention.stride(0),
        share,
        attention_share,
        BLOCK_K=block,
        num_warps=4,
    )
    return out
