"""Linear layers for a few rows: the weights stream through registers once, products by FMA."""

import triton
import triton.language as tl

from hf_triton_mlp.kernels.activations import activate
from hf_triton_mlp.kernels.norm import load_sum, normalize, row_statistics


@triton.jit
def skinny_linear_kernel(
    x_ptr,
    add_ptr,
    add2_ptr,
    carry_ptr,
    out_ptr,
    w_ptr,
    b_ptr,
    gate_w_ptr,
    gate_b_ptr,
    norm_w_ptr,
    norm_b_ptr,
    add_bias_ptr,
    M,
    N,
    K,
    stride_x,
    stride_add,
    stride_add2,
    stride_wn,
    stride_wk,
    stride_gn,
    stride_gk,
    eps,
    NORM: tl.constexpr,
    CARRY_NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Without NORM: out = act(x · Wᵀ + b) [∘ gate] + add + add2 + add_bias.
    With NORM: s = x + add + add_bias; u = norm(s); out = act(u · Wᵀ + b) [∘ gate];
    carry = u if CARRY_NORMED else s, the residual for the next linear layer.

    x: (M, K); W, gate_W: (N, K) by strides; add, add2: (M, N), or (M, K) with NORM;
    carry: (M, K) and out: (M, N), contiguous. Gated: out = act(gate) * up. A pointer may be None.
    One program computes BLOCK_N outputs of one row; the programs of one block of W lie next to
    each other in launch order, so that rows after the first find it in the L2.
    """
    pid = tl.program_id(0)
    row = (pid % M).to(tl.int64)
    pid_n = pid // M
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    w_rows = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn
    x_ptr += row * stride_x
    if add_ptr is not None:
        add_ptr += row * stride_add
    if add2_ptr is not None:
        add2_ptr += row * stride_add2

    mean = 0.0
    rstd = 1.0
    if NORM is not None:
        mean, rstd = row_statistics(x_ptr, add_ptr, add_bias_ptr, K, eps, NORM, BLOCK_K)

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    gate_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = mask_n[:, None] & mask_k[None, :]
        w_cols = offs_k.to(tl.int64)[None, :]
        w = tl.load(w_rows + w_cols * stride_wk, mask=mask, other=0.0, eviction_policy=EVICT)
        if NORM is not None:
            s = load_sum(x_ptr, add_ptr, add_bias_ptr, offs_k, mask_k)
            x = normalize(s, mean, rstd, norm_w_ptr, norm_b_ptr, offs_k, mask_k)
            if carry_ptr is not None:
                if pid_n == 0:
                    carry = x if CARRY_NORMED else s
                    tl.store(
                        carry_ptr + row * K + offs_k,
                        carry.to(carry_ptr.dtype.element_ty),
                        mask=mask_k,
                    )
            x = tl.where(mask_k, x, 0.0)
        else:
            x = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        if gate_w_ptr is not None:
            g = tl.load(
                gate_w_ptr + offs_n.to(tl.int64)[:, None] * stride_gn + w_cols * stride_gk,
                mask=mask,
                other=0.0,
                eviction_policy=EVICT,
            )
            gate_acc += g.to(tl.float32) * x[None, :]

    y = tl.sum(acc, axis=1)
    if b_ptr is not None:
        y += tl.load(b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if gate_w_ptr is not None:
        gate = tl.sum(gate_acc, axis=1)
        if gate_b_ptr is not None:
            gate += tl.load(gate_b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y = activate(gate, ACTIVATION, out_ptr.dtype.element_ty == tl.float32) * y
    else:
        y = activate(y, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
    if NORM is None:
        if add_ptr is not None:
            y += tl.load(add_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if add2_ptr is not None:
            y += tl.load(add2_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if add_bias_ptr is not None:
            y += tl.load(add_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask_n)
