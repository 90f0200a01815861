"""Linear layers for many rows: tiles through the matrix units, with a fused epilogue."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED, activate
from hf_triton_mlp.kernels.prefetch import prefetch_weights


@triton.jit
def load_columns(ptr, offs, mask):
    """A vector at offs in float32; zeros for None."""
    if ptr is None:
        return tl.zeros(offs.shape, tl.float32)
    else:
        return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    acc,
    gate_acc,
    out_ptr,
    biases,
    summands,
    offs_m,
    offs_n,
    sizes,
    strides,
    split,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The rest of `tiled_linear_kernel` for products (rows, columns), and those with the gate.

    biases: of both; summands: add, add2, add_bias; strides: of the first two; sizes: M, N.
    """
    M, N = sizes
    offs_m, offs_n = offs_m[:, None], offs_n[None, :]
    mask_n = offs_n < N
    mask = (offs_m < M) & mask_n
    PRECISE: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    if SPLITS > 1:
        size = tl.cast(M, tl.int64) * N
        parts = out_ptr + split * size + offs_m * N + offs_n
        tl.store(parts, acc, mask=mask)
        if GATED:
            tl.store(parts + SPLITS * size, gate_acc, mask=mask)
    else:
        acc += load_columns(biases[0], offs_n, mask_n)
        if GATED:
            gate_acc += load_columns(biases[1], offs_n, mask_n)
            acc = activate(gate_acc, ACTIVATION, PRECISE) * acc
        else:
            acc = activate(acc, ACTIVATION, PRECISE)
        for i in tl.static_range(2):
            if summands[i] is not None:
                add = tl.load(summands[i] + offs_m * strides[i] + offs_n, mask=mask, other=0.0)
                acc += add.to(tl.float32)
        acc += load_columns(summands[2], offs_n, mask_n)
        tl.store(out_ptr + offs_m * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    SPLITS: tl.constexpr,
    LINES: tl.constexpr,
    EVEN_K: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = act(x · Wᵀ + b) [∘ gate] + add + add2 + add_bias.

    x: (M, K); W, gate_W: (N, K) by strides; add, add2: (M, N); add_bias: (N,); out: (M, N),
    contiguous. Gated: out = act(gate) * up. A pointer may be None. Float32 products are IEEE,
    never TF32. Programs go through the tiles in groups of GROUP_M rows of tiles, for the L2.

    SPLITS > 1: as many programs share a tile, each takes a part of K; out is their products alone,
    float32 (SPLITS, M, N), gated (2 * SPLITS, M, N), for combine_splits_kernel. EVEN_K: every part
    is whole blocks. PDL: the program may start while its predecessor runs; until gdc_wait it only
    warms the L2 up.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0) % (tiles_m * tiles_n)
    split = tl.program_id(0) // (tiles_m * tiles_n)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    pid_m = first_m + (pid % (GROUP_M * tiles_n)) % group_m
    pid_n = (pid % (GROUP_M * tiles_n)) // group_m

    part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    first_k = split * part
    if PDL:
        if LINES > 0:
            first_n = pid_n * BLOCK_N
            start = tl.cast(tl.minimum(first_k, K - 1), tl.int64)
            prefetch_weights(
                w_ptr + start * stride_wk,
                first_n,
                N,
                K - start,
                stride_wn,
                stride_wk,
                K_CONTIGUOUS,
                BLOCK_N,
                LINES,
            )
            if gate_w_ptr is not None:
                prefetch_weights(
                    gate_w_ptr + start * stride_gk,
                    first_n,
                    N,
                    K - start,
                    stride_gn,
                    stride_gk,
                    K_CONTIGUOUS,
                    BLOCK_N,
                    LINES,
                )
        gdc_wait()
        gdc_launch_dependents()

    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_x + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    if gate_w_ptr is not None:
        g_ptrs = gate_w_ptr + offs_n[None, :] * stride_gn + offs_k[:, None] * stride_gk

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if gate_w_ptr is not None:
        gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, part, BLOCK_K):
        if EVEN_K:
            mask_x = mask_m
            mask_w = mask_n
        else:
            left = tl.minimum(part, K - first_k) - k
            mask_x = mask_m & (tl.arange(0, BLOCK_K)[None, :] < left)
            mask_w = mask_n & (tl.arange(0, BLOCK_K)[:, None] < left)
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        if INTERPRETED:
            # The interpreter (3.6 … 3.9) multiplies the raw 16-bit integers of bfloat16 operands.
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if gate_w_ptr is not None:
            g = tl.load(g_ptrs, mask=mask_w, other=0.0)
            if INTERPRETED:
                g = g.to(tl.float32)
            gate_acc = tl.dot(x, g, gate_acc, input_precision="ieee")
            g_ptrs += BLOCK_K * stride_gk
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk

    store_tile(
        acc,
        gate_acc if gate_w_ptr is not None else acc,
        out_ptr,
        (b_ptr, gate_b_ptr),
        (add_ptr, add2_ptr, add_bias_ptr),
        offs_m,
        offs_n,
        (M, N),
        (stride_add, stride_add2),
        split,
        gate_w_ptr is not None,
        ACTIVATION,
        SPLITS,
    )


@triton.jit
def combine_splits_kernel(
    parts_ptr,
    add_ptr,
    add2_ptr,
    out_ptr,
    b_ptr,
    gate_b_ptr,
    add_bias_ptr,
    M,
    N,
    stride_add,
    stride_add2,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """The rest of tiled_linear_kernel: the parts of each output are added in order, then as there.

    parts: float32 (SPLITS, M, N), gated (2 * SPLITS, M, N). Program (row, block of columns).
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < N
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    size = tl.cast(M, tl.int64) * N
    parts = parts_ptr + row * N + offs
    y = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.static_range(SPLITS):
        y += tl.load(parts + i * size, mask=mask, other=0.0)
    if b_ptr is not None:
        y += tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.zeros((BLOCK_N,), tl.float32)
        for i in tl.static_range(SPLITS):
            gate += tl.load(parts + (SPLITS + i) * size, mask=mask, other=0.0)
        if gate_b_ptr is not None:
            gate += tl.load(gate_b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = activate(gate, ACTIVATION, out_ptr.dtype.element_ty == tl.float32) * y
    else:
        y = activate(y, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
    if add_ptr is not None:
        y += tl.load(add_ptr + row * stride_add + offs, mask=mask, other=0.0).to(tl.float32)
    if add2_ptr is not None:
        y += tl.load(add2_ptr + row * stride_add2 + offs, mask=mask, other=0.0).to(tl.float32)
    if add_bias_ptr is not None:
        y += tl.load(add_bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_activated(up_ptr, gate_ptr, b_ptr, gate_b_ptr, offs, mask, ACTIVATION: tl.constexpr):
    """act(gate) * up, or act(up) without a gate, after the biases, at `offs` of a row, in its
    dtype."""
    y = load_columns(up_ptr, offs, mask) + load_columns(b_ptr, offs, mask)
    if gate_ptr is not None:
        gate = load_columns(gate_ptr, offs, mask) + load_columns(gate_b_ptr, offs, mask)
        y = activate(gate, ACTIVATION, up_ptr.dtype.element_ty == tl.float32) * y
    else:
        y = activate(y, ACTIVATION, up_ptr.dtype.element_ty == tl.float32)
    return y.to(up_ptr.dtype.element_ty)


@triton.jit
def activation_kernel(
    up_ptr,
    gate_ptr,
    b_ptr,
    gate_b_ptr,
    N,
    stride_up,
    stride_gate,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """up = act(gate) * up in place, or act(up) without a gate, after the biases. Rows (M, N).

    Program (row, block of columns).
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < N
    up_ptr += row * stride_up
    if gate_ptr is not None:
        gate_ptr += row * stride_gate
    y = load_activated(up_ptr, gate_ptr, b_ptr, gate_b_ptr, offs, mask, ACTIVATION)
    tl.store(up_ptr + offs, y, mask=mask)
