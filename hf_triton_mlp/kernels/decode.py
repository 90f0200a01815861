"""Linear layers for up to 16 rows of 16-bit values: as fast as their weights can be read."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED, activate
from hf_triton_mlp.kernels.prefetch import prefetch_weights


@triton.jit
def decode_linear_kernel(
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
    K_CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = act(x · Wᵀ + b) [∘ gate] + add + add2 + add_bias.

    x: (M, K), M <= ROWS; W, gate_W: (N, K) by strides; add, add2: (M, N); add_bias: (N,);
    out: (M, N), contiguous. Gated: out = act(gate) * up. A pointer may be None.

    A program computes BLOCK_N columns of all rows. Its warps split K into SLICES, so that each has
    matrix products of its own to issue; their sums are added in a fixed order at the end. With PDL
    the program may start while its predecessor runs: until gdc_wait it only warms the L2 up.
    """
    pid = tl.program_id(0)
    if PDL:
        first_n = pid * BLOCK_N
        if LINES > 0:
            prefetch_weights(
                w_ptr, first_n, N, K, stride_wn, stride_wk, K_CONTIGUOUS, BLOCK_N, LINES
            )
            if gate_w_ptr is not None:
                prefetch_weights(
                    gate_w_ptr, first_n, N, K, stride_gn, stride_gk, K_CONTIGUOUS, BLOCK_N, LINES
                )
        gdc_wait()
        gdc_launch_dependents()

    rows = tl.arange(0, ROWS)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (rows[:, None] < M) & mask_n[None, :]
    # What the epilogue adds is asked for now, so that it is there in time.
    b = tl.zeros((BLOCK_N,), tl.float32)
    if b_ptr is not None:
        b += tl.load(b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    gate_b = tl.zeros((BLOCK_N,), tl.float32)
    if gate_b_ptr is not None:
        gate_b += tl.load(gate_b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    summand = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if add_ptr is not None:
        add_ptrs = add_ptr + rows[:, None] * stride_add + offs_n[None, :]
        summand += tl.load(add_ptrs, mask=mask, other=0.0).to(tl.float32)
    if add2_ptr is not None:
        add2_ptrs = add2_ptr + rows[:, None] * stride_add2 + offs_n[None, :]
        summand += tl.load(add2_ptrs, mask=mask, other=0.0).to(tl.float32)
    if add_bias_ptr is not None:
        add_bias = tl.load(add_bias_ptr + offs_n, mask=mask_n, other=0.0)
        summand += add_bias.to(tl.float32)[None, :]

    x_rows = rows[None, :, None]
    columns = offs_n[None, None, :].to(tl.int64)
    slices = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((SLICES, ROWS, BLOCK_N), tl.float32)
    gate_acc = tl.zeros((SLICES, ROWS, BLOCK_N), tl.float32)
    for k in tl.range(0, K, SLICES * BLOCK_K, num_stages=STAGES):
        offs_k = k + slices
        offs_x = offs_k[:, None, :]
        offs_w = offs_k[:, :, None].to(tl.int64)
        mask_w = mask_n[None, None, :] & (offs_w < K)
        x = tl.load(x_ptr + x_rows * stride_x + offs_x, mask=(x_rows < M) & (offs_x < K), other=0.0)
        w = tl.load(w_ptr + columns * stride_wn + offs_w * stride_wk, mask=mask_w, other=0.0)
        if INTERPRETED:
            # The interpreter (3.6 … 3.9) multiplies the raw 16-bit integers of bfloat16 operands.
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc)
        if gate_w_ptr is not None:
            g = tl.load(
                gate_w_ptr + columns * stride_gn + offs_w * stride_gk, mask=mask_w, other=0.0
            )
            if INTERPRETED:
                g = g.to(tl.float32)
            gate_acc = tl.dot(x, g, gate_acc)

    y = tl.sum(acc, axis=0) + b[None, :]
    if gate_w_ptr is not None:
        y = activate(tl.sum(gate_acc, axis=0) + gate_b[None, :], ACTIVATION, False) * y
    else:
        y = activate(y, ACTIVATION, False)
    y += summand
    out_ptrs = out_ptr + rows[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
