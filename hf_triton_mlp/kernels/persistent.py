"""Linear layers for many rows on Hopper: tiles by TMA, programs that stay, a fused epilogue."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED, activate
from hf_triton_mlp.kernels.prefetch import prefetch_weights


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile, in groups of GROUP_M rows of tiles, for the L2."""
    group = tile // (GROUP_M * tiles_n)
    group_m = min(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return group * GROUP_M + within % group_m, within // group_m


@triton.jit
def columns(tile, part: tl.constexpr, PARTS: tl.constexpr):
    """One of 1, 2, 4 … parts of a tile's columns; in an accumulator's layout nothing moves."""
    if PARTS == 1:
        return tile
    else:
        M: tl.constexpr = tile.shape[0]
        N: tl.constexpr = tile.shape[1]
        left, right = tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))
        side = left if part < PARTS // 2 else right
        return columns(side, part % (PARTS // 2), PARTS // 2)


@triton.jit
def load_row(ptr, first, N, BLOCK: tl.constexpr):
    """Values first to first + BLOCK of a vector of N, as (1, BLOCK)."""
    offs = first + tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + offs, mask=offs < N, other=0.0)


@triton.jit
def load_tile(ptr, offs_m, first_n, M, N, stride, BLOCK: tl.constexpr):
    """Columns first_n to first_n + BLOCK of rows offs_m (BLOCK_M, 1) of a matrix (M, N)."""
    offs_n = first_n + tl.arange(0, BLOCK)[None, :]
    mask = (offs_m < M) & (offs_n < N)
    return tl.load(ptr + offs_m * stride + offs_n, mask=mask, other=0.0)


@triton.jit
def persistent_linear_kernel(
    w_ptr,
    gate_w_ptr,
    x,
    w,
    out,
    parts_ptr,
    add_ptr,
    add2_ptr,
    b_ptr,
    gate_b_ptr,
    add_bias_ptr,
    M,
    N,
    K,
    stride_w,
    stride_add,
    stride_add2,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = act(x · Wᵀ + b) [∘ gate] + add + add2 + add_bias, for 16-bit values.

    x, w, out: descriptors of (M, K), (weights, N, K) and (M, N) in blocks (BLOCK_M, BLOCK_K),
    (weights, BLOCK_N, BLOCK_K) and (BLOCK_M, BLOCK_N / PARTS); what is beyond their edges is read
    as zero and not written. add, add2: (M, N) by row strides; add_bias: (N,). A pointer may be
    None. Gated: out = act(gate) * up; weights is 2, the gate's is number GATE (0 or 1); without a
    gate (None) it is 1.

    Each program takes every num_programs-th tile. One product for W and the gate: two, whose
    accumulators are cleared tile by tile, would be issued one at a time by ptxas (C7515).

    SPLITS > 1: the tiles of as many parts of K follow each other; out is None and the products
    alone go to parts, float32 (SPLITS, M, N), gated (2 * SPLITS, M, N), for combine_splits_kernel.
    PDL: the program may start while its predecessor runs; until gdc_wait it only asks the L2 for
    LINES lines of each weight row of its first tile (w_ptr, gate_w_ptr, rows stride_w apart).
    """
    WEIGHTS: tl.constexpr = 1 if GATE is None else 2
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    # Rows are multiples of 16 bytes: said this way, the compiler knows it where they are not of 32,
    # and does not load the summands one by one, in a layout that shared memory has no room for.
    N = N // 8 * 8
    stride_add = stride_add // 8 * 8
    stride_add2 = stride_add2 // 8 * 8
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    tl.assume(steps > 0)
    if PDL:
        if LINES > 0:
            _, pid_n = place(first % tiles, tiles_m, tiles_n, GROUP_M)
            k = tl.minimum(first // tiles * steps * BLOCK_K, K - 1)
            prefetch_weights(
                w_ptr + k, pid_n * BLOCK_N, N, K - k, stride_w, 1, True, BLOCK_N, LINES
            )
            if GATE is not None:
                prefetch_weights(
                    gate_w_ptr + k, pid_n * BLOCK_N, N, K - k, stride_w, 1, True, BLOCK_N, LINES
                )
        gdc_wait()
        gdc_launch_dependents()

    # Flattened into one loop over steps, so that a tile's loads run during the epilogue before;
    # the epilogue has a counter of its own, because the loop's is already the next tile's.
    done = first - programs
    for tile in tl.range(first, tiles * SPLITS, programs, flatten=True):
        pid_m, pid_n = place(tile % tiles, tiles_m, tiles_n, GROUP_M)
        start = tile // tiles * steps
        acc = tl.zeros((BLOCK_M, WEIGHTS * BLOCK_N), tl.float32)
        for step in range(steps):
            k = (start + step) * BLOCK_K
            x_tile = x.load([pid_m * BLOCK_M, k])
            w_tile = w.load([0, pid_n * BLOCK_N, k]).reshape(WEIGHTS * BLOCK_N, BLOCK_K)
            if INTERPRETED:
                # The interpreter (3.6 … 3.9) multiplies the raw 16-bit integers of bfloat16.
                x_tile = x_tile.to(tl.float32)
                w_tile = w_tile.to(tl.float32)
            acc = tl.dot(x_tile, w_tile.T, acc)

        done += programs
        pid_m, pid_n = place(done % tiles, tiles_m, tiles_n, GROUP_M)
        first_n = pid_n * BLOCK_N
        offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        if b_ptr is not None:
            b = load_row(b_ptr, first_n, N, BLOCK_N)
        if gate_b_ptr is not None:
            gate_b = load_row(gate_b_ptr, first_n, N, BLOCK_N)
        if add_bias_ptr is not None:
            add_bias = load_row(add_bias_ptr, first_n, N, BLOCK_N)
        if add_ptr is not None:
            next_add = load_tile(add_ptr, offs_m, first_n, M, N, stride_add, WIDTH)
        up = acc
        if GATE is not None:
            up = columns(acc, 1 - GATE, 2)
            gates = columns(acc, GATE, 2)
        # Part by part, because a part waits in shared memory until it is written.
        for i in tl.static_range(PARTS):
            part_n = first_n + i * WIDTH
            y = columns(up, i, PARTS)
            if GATE is not None:
                gate = columns(gates, i, PARTS)
            if SPLITS > 1:
                offs_n = part_n + tl.arange(0, WIDTH)[None, :]
                mask = (offs_m < M) & (offs_n < N)
                size = tl.cast(M, tl.int64) * N
                parts = parts_ptr + done // tiles * size + offs_m * N + offs_n
                tl.store(parts, y, mask=mask)
                if GATE is not None:
                    tl.store(parts + SPLITS * size, gate, mask=mask)
            else:
                if b_ptr is not None:
                    y += columns(b, i, PARTS).to(tl.float32)
                if GATE is not None:
                    if gate_b_ptr is not None:
                        gate += columns(gate_b, i, PARTS).to(tl.float32)
                    y = activate(gate, ACTIVATION, False) * y
                else:
                    y = activate(y, ACTIVATION, False)
                if add_ptr is not None:
                    add = next_add
                    if i + 1 < PARTS:
                        next_n = part_n + WIDTH
                        next_add = load_tile(add_ptr, offs_m, next_n, M, N, stride_add, WIDTH)
                    y += add.to(tl.float32)
                if add2_ptr is not None:
                    y += load_tile(add2_ptr, offs_m, part_n, M, N, stride_add2, WIDTH).to(
                        tl.float32
                    )
                if add_bias_ptr is not None:
                    y += columns(add_bias, i, PARTS).to(tl.float32)
                out.store([pid_m * BLOCK_M, part_n], y.to(out.dtype))
