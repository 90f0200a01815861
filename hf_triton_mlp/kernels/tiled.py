"""Linear layers for many rows: tiles through the matrix units, with a fused epilogue."""

import triton
import triton.language as tl

from hf_triton_mlp.kernels.activations import INTERPRETED, activate


@triton.jit
def tiled_linear_kernel(
    x_ptr,
    add_ptr,
    add2_ptr,
    out_ptr,
    w_ptr,
    b_ptr,
    gate_w_ptr,
    gate_b_ptr,
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
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = act(x · Wᵀ + b) [∘ gate] + add + add2 + add_bias.

    x: (M, K); W, gate_W: (N, K) by strides; add, add2: (M, N); add_bias: (N,); out: (M, N),
    contiguous. Gated: out = act(gate) * up. A pointer may be None. Float32 products are IEEE,
    never TF32. Programs go through the tiles in groups of GROUP_M rows of tiles, for the L2.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    pid_m = first_m + (pid % (GROUP_M * tiles_n)) % group_m
    pid_n = (pid % (GROUP_M * tiles_n)) // group_m

    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_x + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    if gate_w_ptr is not None:
        g_ptrs = gate_w_ptr + offs_n[None, :] * stride_gn + offs_k[:, None] * stride_gk

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if gate_w_ptr is not None:
        gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = K - k
        x = tl.load(x_ptrs, mask=mask_m & (offs_k[None, :] < left), other=0.0)
        w = tl.load(w_ptrs, mask=mask_n & (offs_k[:, None] < left), other=0.0)
        if INTERPRETED:
            # The interpreter (3.6 … 3.9) multiplies the raw 16-bit integers of bfloat16 operands.
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if gate_w_ptr is not None:
            g = tl.load(g_ptrs, mask=mask_n & (offs_k[:, None] < left), other=0.0)
            if INTERPRETED:
                g = g.to(tl.float32)
            gate_acc = tl.dot(x, g, gate_acc, input_precision="ieee")
            g_ptrs += BLOCK_K * stride_gk
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk

    if b_ptr is not None:
        acc += tl.load(b_ptr + offs_n[None, :], mask=mask_n, other=0.0).to(tl.float32)
    if gate_w_ptr is not None:
        if gate_b_ptr is not None:
            gate_b = tl.load(gate_b_ptr + offs_n[None, :], mask=mask_n, other=0.0)
            gate_acc += gate_b.to(tl.float32)
        acc = activate(gate_acc, ACTIVATION, out_ptr.dtype.element_ty == tl.float32) * acc
    else:
        acc = activate(acc, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
    mask = mask_m & mask_n
    if add_ptr is not None:
        add = tl.load(add_ptr + offs_m[:, None] * stride_add + offs_n[None, :], mask=mask, other=0)
        acc += add.to(tl.float32)
    if add2_ptr is not None:
        add2 = tl.load(
            add2_ptr + offs_m[:, None] * stride_add2 + offs_n[None, :], mask=mask, other=0
        )
        acc += add2.to(tl.float32)
    if add_bias_ptr is not None:
        acc += tl.load(add_bias_ptr + offs_n[None, :], mask=mask_n, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + offs_m[:, None] * N + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask,
    )
