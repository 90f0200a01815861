"""Linear layers for up to 16 rows of 16-bit values: as fast as their weights can be read."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED, activate


@triton.jit
def prefetch_weights(
    w_ptr,
    first_n,
    N,
    K,
    stride_n,
    stride_k,
    K_CONTIGUOUS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,
):
    """Ask the L2 for the start of W's rows first_n to first_n + BLOCK_N: LINES lines of each.

    Nothing is read into registers, so it is safe before gdc_wait: the L2 stays coherent.
    """
    if not INTERPRETED:
        if K_CONTIGUOUS:
            n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
            # 64 values of 16 bits are a line.
            k = tl.minimum(tl.arange(0, LINES) * 64, K - 1)
            lines = w_ptr + n[:, None] * stride_n + k[None, :]
        else:
            # A line holds BLOCK_N columns of one k, or more than these.
            k = tl.minimum(tl.arange(0, LINES * BLOCK_N), K - 1).to(tl.int64)
            lines = w_ptr + tl.minimum(first_n, N - 1).to(tl.int64) * stride_n + k * stride_k
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [lines.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_rows(x_ptr, add_ptr, add_bias_ptr, rows, offs, stride_x, stride_add, mask, mask_k):
    """x + add + add_bias in float32 at (rows, offs); add and add_bias may be None."""
    s = tl.load(x_ptr + rows * stride_x + offs, mask=mask, other=0.0).to(tl.float32)
    if add_ptr is not None:
        add = tl.load(add_ptr + rows * stride_add + offs, mask=mask, other=0.0)
        s += add.to(tl.float32)
    if add_bias_ptr is not None:
        s += tl.load(add_bias_ptr + offs, mask=mask_k, other=0.0).to(tl.float32)
    return s


@triton.jit
def rows_statistics(
    x_ptr,
    add_ptr,
    add_bias_ptr,
    M,
    K,
    stride_x,
    stride_add,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(mean, 1 / sqrt(variance + eps)), each (ROWS,), of s = x + add + add_bias over K columns.

    "layer_norm" merges the means and squared deviations of blocks (Chan, Golub and LeVeque 1983),
    so that one pass is enough and nothing cancels. "rms_norm": the mean is 0.
    """
    rows = tl.arange(0, ROWS)[:, None]
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for k in range(0, K, BLOCK):
        offs = k + tl.arange(0, BLOCK)[None, :]
        mask_k = offs < K
        mask = (rows < M) & mask_k
        s = load_rows(x_ptr, add_ptr, add_bias_ptr, rows, offs, stride_x, stride_add, mask, mask_k)
        if NORM == "layer_norm":
            count = tl.minimum(K - k, BLOCK).to(tl.float32)
            block_mean = tl.sum(s, axis=1) / count
            centred = tl.where(mask_k, s - block_mean[:, None], 0.0)
            delta = block_mean - mean
            total = k + count
            squares += tl.sum(centred * centred, axis=1) + delta * delta * (k * count / total)
            mean += delta * (count / total)
        else:
            squares += tl.sum(s * s, axis=1)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(squares / K + eps))


@triton.jit
def decode_linear_kernel(
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
    K_CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    CARRY_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Without NORM: out = act(x · Wᵀ + b) [∘ gate] + add + add2 + add_bias.
    With NORM: s = x + add + add_bias; u = norm(s); out = act(u · Wᵀ + b) [∘ gate];
    carry = u if CARRY_NORMED else s, the residual for the next linear layer.

    x: (M, K), M <= ROWS; W, gate_W: (N, K) by strides; add, add2: (M, N), or (M, K) with NORM;
    carry: (M, K) and out: (M, N), contiguous. Gated: out = act(gate) * up. A pointer may be None.

    A program computes BLOCK_N columns of all rows. Its warps split K into SLICES, so that each has
    matrix products of its own to issue; their sums are added in a fixed order at the end. With PDL
    the program may start while its predecessor runs: until gdc_wait it only warms the L2 up.
    """
    pid = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        first_n = pid * BLOCK_N
        prefetch_weights(w_ptr, first_n, N, K, stride_wn, stride_wk, K_CONTIGUOUS, BLOCK_N, LINES)
        if gate_w_ptr is not None:
            prefetch_weights(
                gate_w_ptr, first_n, N, K, stride_gn, stride_gk, K_CONTIGUOUS, BLOCK_N, LINES
            )
        gdc_wait()

    rows = tl.arange(0, ROWS)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if NORM is not None:
        mean, rstd = rows_statistics(
            x_ptr, add_ptr, add_bias_ptr, M, K, stride_x, stride_add, eps, NORM, ROWS,
            SLICES * BLOCK_K,
        )  # fmt: skip

    x_rows = rows[None, :, None]
    mask_m = x_rows < M
    slices = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    columns = offs_n[None, None, :].to(tl.int64)
    acc = tl.zeros((SLICES, ROWS, BLOCK_N), tl.float32)
    gate_acc = tl.zeros((SLICES, ROWS, BLOCK_N), tl.float32)
    for k in tl.range(0, K, SLICES * BLOCK_K, num_stages=STAGES):
        offs_k = k + slices
        offs_x = offs_k[:, None, :]
        offs_w = offs_k[:, :, None]
        mask_x = offs_x < K
        mask_w = mask_n[None, None, :] & (offs_w < K)
        w = tl.load(
            w_ptr + columns * stride_wn + offs_w.to(tl.int64) * stride_wk, mask=mask_w, other=0.0
        )
        if NORM is not None:
            s = load_rows(
                x_ptr, add_ptr, add_bias_ptr, x_rows, offs_x, stride_x, stride_add,
                mask_m & mask_x, mask_x,
            )  # fmt: skip
            u = (s - mean[None, :, None]) * rstd[None, :, None]
            if norm_w_ptr is not None:
                u = u * tl.load(norm_w_ptr + offs_x, mask=mask_x, other=0.0).to(tl.float32)
            if norm_b_ptr is not None:
                u += tl.load(norm_b_ptr + offs_x, mask=mask_x, other=0.0).to(tl.float32)
            x = tl.where(mask_x, u, 0.0).to(w.dtype)
        else:
            x = tl.load(x_ptr + x_rows * stride_x + offs_x, mask=mask_m & mask_x, other=0.0)
        if INTERPRETED:
            # The interpreter (3.6 … 3.9) multiplies the raw 16-bit integers of bfloat16 operands.
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc)
        if gate_w_ptr is not None:
            g = tl.load(
                gate_w_ptr + columns * stride_gn + offs_w.to(tl.int64) * stride_gk,
                mask=mask_w,
                other=0.0,
            )
            if INTERPRETED:
                g = g.to(tl.float32)
            gate_acc = tl.dot(x, g, gate_acc)

    if NORM is not None:
        # Every program writes a few columns of the carry; CARRY_BLOCK is K over programs.
        offs = pid * CARRY_BLOCK + tl.arange(0, CARRY_BLOCK)[None, :]
        mask_k = offs < K
        mask_c = (rows[:, None] < M) & mask_k
        carry = load_rows(
            x_ptr, add_ptr, add_bias_ptr, rows[:, None], offs, stride_x, stride_add, mask_c, mask_k
        )
        if CARRY_NORMED:
            carry = (carry - mean[:, None]) * rstd[:, None]
            if norm_w_ptr is not None:
                carry = carry * tl.load(norm_w_ptr + offs, mask=mask_k, other=0.0).to(tl.float32)
            if norm_b_ptr is not None:
                carry += tl.load(norm_b_ptr + offs, mask=mask_k, other=0.0).to(tl.float32)
        tl.store(
            carry_ptr + rows[:, None] * K + offs,
            carry.to(carry_ptr.dtype.element_ty),
            mask=mask_c,
        )

    y = tl.sum(acc, axis=0)
    columns_2d = offs_n[None, :]
    mask = (rows[:, None] < M) & mask_n[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + columns_2d, mask=mask_n[None, :], other=0.0).to(tl.float32)
    if gate_w_ptr is not None:
        gate = tl.sum(gate_acc, axis=0)
        if gate_b_ptr is not None:
            gate_b = tl.load(gate_b_ptr + columns_2d, mask=mask_n[None, :], other=0.0)
            gate += gate_b.to(tl.float32)
        y = activate(gate, ACTIVATION, False) * y
    else:
        y = activate(y, ACTIVATION, False)
    if NORM is None:
        if add_ptr is not None:
            add = tl.load(add_ptr + rows[:, None] * stride_add + columns_2d, mask=mask, other=0.0)
            y += add.to(tl.float32)
        if add2_ptr is not None:
            add2 = tl.load(
                add2_ptr + rows[:, None] * stride_add2 + columns_2d, mask=mask, other=0.0
            )
            y += add2.to(tl.float32)
        if add_bias_ptr is not None:
            add_bias = tl.load(add_bias_ptr + columns_2d, mask=mask_n[None, :], other=0.0)
            y += add_bias.to(tl.float32)
    tl.store(out_ptr + rows[:, None] * N + columns_2d, y.to(out_ptr.dtype.element_ty), mask=mask)
