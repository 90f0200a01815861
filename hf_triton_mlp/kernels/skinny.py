"""Linear layers for very few rows: the weights stream through registers once, products by FMA."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import activate
from hf_triton_mlp.kernels.norm import (
    apply_affine,
    load_affine,
    load_sum,
    normalize,
    statistics_at_once,
    statistics_of_row,
    statistics_of_values,
)
from hf_triton_mlp.kernels.prefetch import prefetch_vector, prefetch_weights
from hf_triton_mlp.kernels.widen import widen


@triton.jit
def load_weights(w_rows, offs_k, stride_wk, mask_n, K, EVICT: tl.constexpr):
    """(BLOCK_N, BLOCK_K) weights of rows w_rows."""
    return tl.load(
        w_rows[:, None] + offs_k.to(tl.int64)[None, :] * stride_wk,
        mask=mask_n[:, None] & (offs_k < K)[None, :],
        other=0.0,
        eviction_policy=EVICT,
    )


@triton.jit
def load_vector(ptr, offs, mask):
    """Values at `offs` in float32; zeros where there is no pointer."""
    if ptr is None:
        return tl.zeros(offs.shape, tl.float32)
    else:
        return widen(tl.load(ptr + offs, mask=mask, other=0.0))


@triton.jit
def load_summands(add_ptr, add2_ptr, add_bias_ptr, offs, mask):
    """add + add2 + add_bias at `offs` in float32; each may be None."""
    both = load_vector(add_ptr, offs, mask) + load_vector(add2_ptr, offs, mask)
    return both + load_vector(add_bias_ptr, offs, mask)


@triton.jit
def products(x, w, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """x · wᵀ (ROWS, BLOCK_N) for x (ROWS, BLOCK_K), w (BLOCK_N, BLOCK_K), row by row of x."""
    rows = tl.arange(0, ROWS)[:, None]
    y = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for row in tl.static_range(ROWS):
        # Threads hold columns of x, all rows of them: this picks registers.
        x_row = tl.sum(tl.where(rows == row, x, 0.0), axis=0)
        y_row = tl.sum(widen(w) * x_row[None, :], axis=1)
        y = tl.where(rows == row, y_row[None, :], y)
    return y


@triton.jit
def finish(y, gate, summand, out_ptr, offs, mask, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """Store act(y) + summand, gated act(gate) * y + summand, at `offs` of rows of the output."""
    if GATED:
        y = activate(gate, ACTIVATION, out_ptr.dtype.element_ty == tl.float32) * y
    else:
        y = activate(y, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
    tl.store(out_ptr + offs, (y + summand).to(out_ptr.dtype.element_ty), mask=mask)


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
    K_CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINES: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CARRY_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Without NORM: out = act(x · Wᵀ + b) [∘ gate] + add + add2 + add_bias.
    With NORM: s = x + add + add_bias; u = norm(s); out = act(u · Wᵀ + b) [∘ gate];
    carry = u if CARRY_NORMED else s, the residual for the next linear layer.

    x: (M, K); W, gate_W: (N, K) by strides; add, add2: (M, N), or (M, K) with NORM;
    carry: (M, K) and out: (M, N), contiguous. Gated: out = act(gate) * up. A pointer may be None.
    One program computes BLOCK_N outputs of ROWS rows: of all, ROWS >= M, or of one. In that case
    the programs of one block of W lie next to each other in launch order, so that rows after the
    first find it in the L2.

    ONE_BLOCK, which several ROWS need: K <= BLOCK_K, so that a row is in registers as a whole;
    PROGRAMS > 0 then share the blocks of W, and each computes the norm once. PDL: the program may
    start while its predecessor runs. Until that has ended it asks the L2 for LINES lines of each
    weight row or, if EARLY, loads its first weights: whoever may have written them must be done.
    """
    tl.static_assert(ROWS == 1 or ONE_BLOCK)
    pid_n = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    if ROWS == 1:
        rows += pid_n % M
        pid_n = pid_n // M
    mask_m = (rows < M)[:, None]
    # What is beyond the last row computes that one again, and is not stored.
    rows = tl.minimum(rows, M - 1).to(tl.int64)[:, None]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + offs_n.to(tl.int64) * stride_wn
    x_ptr += rows * stride_x
    if add_ptr is not None:
        add_ptr += rows * stride_add
    if add2_ptr is not None:
        add2_ptr += rows * stride_add2
    out_ptr += rows * N

    # Latency decides for short rows: the norm's weights wait in registers, which long rows need.
    SHORT: tl.constexpr = ONE_BLOCK and BLOCK_K <= 2048
    if PDL:
        if EARLY:
            # The next kernel may load its weights too.
            gdc_launch_dependents()
        if ONE_BLOCK and NORM is not None and not (EARLY and SHORT):
            # Every program reads all of these: one asks for them.
            if pid_n == 0:
                prefetch_vector(norm_w_ptr, 0, K, BLOCK_K)
                prefetch_vector(norm_b_ptr, 0, K, BLOCK_K)
    if PDL and not EARLY:
        prefetch_vector(b_ptr, pid_n * BLOCK_N, N, BLOCK_N)
        if LINES > 0:
            first_n = pid_n * BLOCK_N
            prefetch_weights(
                w_ptr, first_n, N, K, stride_wn, stride_wk, K_CONTIGUOUS, BLOCK_N, LINES
            )
            if gate_w_ptr is not None:
                prefetch_weights(
                    gate_w_ptr, first_n, N, K, stride_gn, stride_gk, K_CONTIGUOUS, BLOCK_N, LINES
                )
        gdc_wait()
    w = load_weights(w_rows, offs_k, stride_wk, mask_n, K, EVICT)
    if gate_w_ptr is not None:
        g_rows = gate_w_ptr + offs_n.to(tl.int64) * stride_gn
        g = load_weights(g_rows, offs_k, stride_gk, mask_n, K, EVICT)
    offs = offs_n[None, :]
    mask = offs < N
    b = load_vector(b_ptr, offs, mask)
    gate_b = load_vector(gate_b_ptr, offs, mask)
    in_row = offs_k[None, :]
    mask_k = in_row < K
    if SHORT and NORM is not None:
        scale, shift = load_affine(norm_w_ptr, norm_b_ptr, in_row, mask_k, NORM)
    if PDL:
        if EARLY:
            gdc_wait()
        else:
            gdc_launch_dependents()

    # What the epilogue adds is asked for now, so that it is there in time.
    summand = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if NORM is None:
        summand += load_summands(add_ptr, add2_ptr, add_bias_ptr, offs, mask)

    if NORM is not None:
        # Every program writes a few columns of the carry; CARRY_BLOCK is K over programs.
        offs_c = (pid_n * CARRY_BLOCK + tl.arange(0, CARRY_BLOCK))[None, :]
        mask_c = offs_c < K
        carry = load_sum(x_ptr, add_ptr, add_bias_ptr, offs_c, mask_c)
        if ONE_BLOCK:
            s = load_sum(x_ptr, add_ptr, add_bias_ptr, in_row, mask_k)
            if not SHORT:
                scale, shift = load_affine(norm_w_ptr, norm_b_ptr, in_row, mask_k, NORM)
            if SHORT and NORM == "layer_norm" and out_ptr.dtype.element_ty != tl.float32:
                begin = tl.zeros((1, 1), tl.int32)
                first = load_sum(x_ptr, add_ptr, add_bias_ptr, begin, begin < K)
                mean, rstd = statistics_at_once(s, first, mask_k, K, eps)
            else:
                mean, rstd = statistics_of_values(s, mask_k, K, eps, NORM)
            x = apply_affine((s - mean) * rstd, scale, shift, NORM)
            x = tl.where(mask_k, x, 0.0)
        else:
            mean, rstd = statistics_of_row(x_ptr, add_ptr, add_bias_ptr, K, eps, NORM, BLOCK_K)
        if CARRY_NORMED:
            carry = normalize(carry, mean, rstd, norm_w_ptr, norm_b_ptr, offs_c, mask_c, NORM)
        tl.store(
            carry_ptr + rows * K + offs_c,
            carry.to(carry_ptr.dtype.element_ty),
            mask=mask_m & mask_c,
        )
    elif ONE_BLOCK:
        x = widen(tl.load(x_ptr + in_row, mask=mask_k, other=0.0))

    gated: tl.constexpr = gate_w_ptr is not None
    if ONE_BLOCK:
        blocks = tl.cdiv(N, BLOCK_N)
        for block in range(pid_n, blocks, PROGRAMS if PROGRAMS > 0 else blocks):
            offs = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
            if PROGRAMS > 0:
                # The next weights are on their way while these are multiplied.
                next_n = block * BLOCK_N + PROGRAMS * BLOCK_N + tl.arange(0, BLOCK_N)
                next_rows = w_ptr + next_n.to(tl.int64) * stride_wn
                next_w = load_weights(next_rows, offs_k, stride_wk, next_n < N, K, EVICT)
                if gated:
                    next_rows = gate_w_ptr + next_n.to(tl.int64) * stride_gn
                    next_g = load_weights(next_rows, offs_k, stride_gk, next_n < N, K, EVICT)
                next_offs = next_n[None, :]
                next_mask = next_offs < N
                next_b = load_vector(b_ptr, next_offs, next_mask)
                next_gate_b = load_vector(gate_b_ptr, next_offs, next_mask)
            gate = gate_b
            if gated:
                gate += products(x, g, ROWS, BLOCK_N)
            y = products(x, w, ROWS, BLOCK_N) + b
            finish(y, gate, summand, out_ptr, offs, mask_m & (offs < N), gated, ACTIVATION)
            if PROGRAMS > 0:
                w = next_w
                if gated:
                    g = next_g
                b = next_b
                gate_b = next_gate_b
                if NORM is None:
                    summand = load_summands(add_ptr, add2_ptr, add_bias_ptr, next_offs, next_mask)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        gate_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for k in range(0, K, BLOCK_K):
            in_row = k + offs_k[None, :]
            mask_k = in_row < K
            # The next weights are on their way while these are multiplied.
            next_k = k + BLOCK_K + offs_k
            next_w = load_weights(w_rows, next_k, stride_wk, mask_n, K, EVICT)
            if NORM is not None:
                s_k = load_sum(x_ptr, add_ptr, add_bias_ptr, in_row, mask_k)
                x_k = normalize(s_k, mean, rstd, norm_w_ptr, norm_b_ptr, in_row, mask_k, NORM)
                x_k = tl.where(mask_k, x_k, 0.0)
            else:
                x_k = widen(tl.load(x_ptr + in_row, mask=mask_k, other=0.0))
            acc += widen(w) * x_k
            w = next_w
            if gated:
                next_g = load_weights(g_rows, next_k, stride_gk, mask_n, K, EVICT)
                gate_acc += widen(g) * x_k
                g = next_g
        y = tl.sum(acc, axis=1)[None, :] + b
        gate = gate_b
        if gated:
            gate += tl.sum(gate_acc, axis=1)[None, :]
        finish(y, gate, summand, out_ptr, offs, mask_m & mask, gated, ACTIVATION)
