"""Linear layers for up to 16 rows of 16-bit values: weights go from memory to the matrix units
through registers, where they may be before the predecessor has ended."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED
from hf_triton_mlp.kernels.norm import apply_affine, load_sum, normalize
from hf_triton_mlp.kernels.prefetch import prefetch_vector, prefetch_weights
from hf_triton_mlp.kernels.skinny import finish, load_summands, load_vector


@triton.jit
def tile_indices(HIGH: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr):
    """Row and k of the values of a tile, (HIGH * CHUNKS * SLICES * 8, 1) and (…, 32).

    In this order Triton gives a warp 8 rows of one slice: 4 threads a row, 16 bytes a thread.
    """
    i = tl.arange(0, HIGH * CHUNKS * SLICES * 8)[:, None]
    row = i // (CHUNKS * SLICES * 8) * 8 + i % 8
    chunk = i // 8 % SLICES * CHUNKS + i // (SLICES * 8) % CHUNKS
    return row, chunk * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def load_tiles(
    matrix,
    K,
    first: tl.constexpr,
    last: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The tiles `first` to `last`, not included, of those that a program reads of a matrix.

    matrix: pointers to, rows of and k of the first tile's values; strides; the number of rows; how
    many rows the next block is on. A block has TILES tiles, WHOLE of them without a k beyond K.
    """
    pointers, row, k, stride_row, stride_k, limit, apart = matrix
    tiles = ()
    for t in tl.static_range(first, last):
        next_row = t // TILES * apart
        next_k = t % TILES * BLOCK_K
        mask = row < limit - next_row
        if t % TILES >= WHOLE:
            mask = mask & (k < K - next_k)
        offset = tl.cast(next_row, tl.int64) * stride_row + tl.cast(next_k, tl.int64) * stride_k
        tiles += (tl.load(pointers + offset, mask=mask, other=0.0, eviction_policy=EVICT),)
    return tiles


@triton.jit
def as_tile(values, HIGH: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr):
    """A loaded tile as (HIGH, CHUNKS, SLICES, 8, 32); row = high * 8 + low."""
    return tl.reshape(values, (HIGH, CHUNKS, SLICES, 8, 32))


@triton.jit
def as_rows(tile, HIGH: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr):
    """A tile as (SLICES, rows, depth), depth in the order of the matrix units' fragments."""
    tile = tl.reshape(tile, (HIGH, CHUNKS, SLICES, 8, 4, 2, 2, 2))
    tile = tl.permute(tile, (2, 0, 3, 1, 5, 6, 4, 7))
    return tl.reshape(tile, (SLICES, HIGH * 8, CHUNKS * 32))


@triton.jit
def as_columns(tile, HIGH: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr):
    """A tile as (SLICES, depth, rows), depth in the same order."""
    tile = tl.reshape(tile, (HIGH, CHUNKS, SLICES, 8, 4, 2, 2, 2))
    tile = tl.permute(tile, (2, 1, 5, 6, 4, 7, 0, 3))
    return tl.reshape(tile, (SLICES, CHUNKS * 32, HIGH * 8))


@triton.jit
def multiply(x, w, acc, HIGH: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr):
    """acc + x · wᵀ for each slice of K: (SLICES, ROWS, BLOCK_N); x from `as_rows`, w a tile."""
    w = as_columns(w, HIGH, CHUNKS, SLICES)
    if INTERPRETED:
        # The interpreter (3.6 … 3.9) multiplies the raw 16-bit integers of bfloat16 operands.
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc)
    else:
        return tl.dot(x, w, acc)


@triton.jit
def sum_in_slice(tile):
    """Sums over a slice of K: (HIGH, SLICES, 8)."""
    return tl.sum(tl.sum(tile, axis=4), axis=1)


@triton.jit
def merge_moments(mean, squares, count, other_mean, other_squares, other_count):
    """Mean, sum of squares about it and number of the values of two sets (Chan et al., 1979)."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    apart = other_mean - mean
    return mean + apart * share, squares + other_squares + apart * apart * count * share, total


@triton.jit
def statistics_of_tiles(
    tiles,
    valid,
    K,
    eps,
    NORM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """statistics_of_values (norm.py) of rows in tiles (HIGH, CHUNKS, SLICES, 8, 32): (HIGH, 8).

    Each slice has its own mean, so that the warps meet once: their moments are merged in pairs.
    """
    TILES: tl.constexpr = len(tiles)
    mean = tl.zeros(tiles[0].shape, tl.float32)
    if NORM == "layer_norm":
        for i in tl.static_range(TILES):
            mean += tiles[i]
        mean = sum_in_slice(mean)
        depth: tl.constexpr = BLOCK_K // SLICES
        first = tl.arange(0, SLICES)[None, :, None] * depth
        count = tl.zeros(mean.shape, tl.float32)
        count += WHOLE * depth
        for i in tl.static_range(WHOLE, TILES):
            left = tl.minimum(tl.maximum(K - i * BLOCK_K - first, 0), depth)
            count += left.to(tl.float32)
        mean = mean / tl.maximum(count, 1.0)
    squares = tl.zeros(tiles[0].shape, tl.float32)
    for i in tl.static_range(TILES):
        centred = tiles[i]
        if NORM == "layer_norm":
            centred -= mean[:, None, :, :, None]
            if i >= WHOLE:
                centred = tl.where(valid[i - WHOLE], centred, 0.0)
        squares += centred * centred
    squares = sum_in_slice(squares)
    if NORM == "layer_norm":
        mean, squares, _ = tl.reduce((mean, squares, count), 1, merge_moments)
    else:
        squares = tl.sum(squares, axis=1)
        mean = tl.zeros(squares.shape, tl.float32)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(squares / K + eps))


@triton.jit
def load_vector_tiles(
    ptr,
    K,
    default: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """A vector of K values in TILES tiles of 8 equal rows; the default for None.

    8 rows of pointers, so that every thread loads what it is to multiply.
    """
    k = tile_indices(1, CHUNKS, SLICES)[1]
    tiles = ()
    for i in tl.static_range(TILES):
        first_k = i * CHUNKS * SLICES * 32
        if ptr is None:
            values = tl.full(k.shape, default, tl.float32)
        else:
            values = tl.load(ptr + first_k + k, mask=k < K - first_k, other=0.0)
        tiles += (as_tile(values, 1, CHUNKS, SLICES),)
    return tiles


@triton.jit
def norm_of_tiles(
    x,
    add,
    add_bias_ptr,
    affine,
    norm_w_ptr,
    norm_b_ptr,
    K,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """norm(x + add + add_bias) in tiles of x's dtype, and the rows' mean and 1 / deviation.

    x, add: loaded tiles of whole rows; affine: tiles of the norm's weights, then of its biases.
    add and affine may be empty, a pointer None.
    """
    HIGH: tl.constexpr = ROWS // 8
    CHUNKS: tl.constexpr = BLOCK_K // (SLICES * 32)
    TILES: tl.constexpr = len(x)
    NO_SCALE: tl.constexpr = 0.0 if NORM == "rms_norm_offset" else 1.0
    k = tile_indices(1, CHUNKS, SLICES)[1]
    s = ()
    valid = ()
    if add_bias_ptr is not None:
        add_bias = load_vector_tiles(add_bias_ptr, K, 0.0, TILES, CHUNKS, SLICES)
    for i in tl.static_range(TILES):
        total = as_tile(x[i].to(tl.float32), HIGH, CHUNKS, SLICES)
        if len(add) > 0:
            total += as_tile(add[i].to(tl.float32), HIGH, CHUNKS, SLICES)
        if add_bias_ptr is not None:
            total += add_bias[i].to(tl.float32)
        s += (total,)
        if i >= WHOLE:
            valid += (as_tile(k < K - i * BLOCK_K, 1, CHUNKS, SLICES),)
    mean, rstd = statistics_of_tiles(s, valid, K, eps, NORM, BLOCK_K, SLICES, WHOLE)
    if len(affine) == 0:
        affine = load_vector_tiles(norm_w_ptr, K, NO_SCALE, TILES, CHUNKS, SLICES)
        affine += load_vector_tiles(norm_b_ptr, K, 0.0, TILES, CHUNKS, SLICES)
    tiles = ()
    for i in tl.static_range(TILES):
        u = (s[i] - mean[:, None, None, :, None]) * rstd[:, None, None, :, None]
        u = apply_affine(u, affine[i], affine[TILES + i], NORM)
        if i >= WHOLE:
            u = tl.where(valid[i - WHOLE], u, 0.0)
        tiles += (u.to(x[0].dtype),)
    return tiles, mean, rstd


@triton.jit
def stream_linear_kernel(
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
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CARRY_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What `skinny_linear_kernel` computes, for M <= ROWS (8 or 16) rows at once by tl.dot.

    A program computes BLOCKS blocks of BLOCK_N outputs. Each of SLICES warps (all there are)
    multiplies its part of every BLOCK_K of K; their sums are added in a fixed order. A thread loads
    8 values along K, 16 bytes. The matrix units want other values of K in a thread (mma.m16n8k16 of
    the PTX ISA), but a sum over K may be taken in any order: `as_rows` and `as_columns` call what a
    thread has what they want, for x and W alike, so that nothing moves between threads.

    The weights come in BLOCKS * TILES tiles, TILES times BLOCK_K for each block; STAGES of them
    are on their way. All is unrolled: 16-bit values that a loop carries would be unpacked when they
    arrive, and take twice the registers. With a NORM the rows stay in registers as a whole, and
    TILES * BLOCK_K >= K must be few. PDL, EARLY: as there.
    """
    HIGH: tl.constexpr = BLOCK_N // 8
    HIGH_X: tl.constexpr = ROWS // 8
    CHUNKS: tl.constexpr = BLOCK_K // (SLICES * 32)
    STEPS: tl.constexpr = BLOCKS * TILES
    AHEAD: tl.constexpr = min(STAGES, STEPS)
    # Tiles of x that are asked for at once. They stay for all blocks.
    AHEAD_X: tl.constexpr = TILES if NORM is not None else min(STAGES, TILES)
    ADDED: tl.constexpr = TILES if NORM is not None and add_ptr is not None else 0
    gated: tl.constexpr = gate_w_ptr is not None
    AHEAD_GATES: tl.constexpr = AHEAD if gated else 0
    # Latency decides for short rows: the norm's weights wait in registers, which long rows need.
    SHORT: tl.constexpr = TILES * BLOCK_K <= 1024 and ROWS * TILES * BLOCK_K <= 2048 * SLICES
    KEPT: tl.constexpr = NORM is not None and SHORT
    NO_SCALE: tl.constexpr = 0.0 if NORM == "rms_norm_offset" else 1.0
    pid = tl.program_id(0)
    apart = tl.num_programs(0) * BLOCK_N
    row, k = tile_indices(HIGH, CHUNKS, SLICES)
    row += pid * BLOCK_N
    row_x, k_x = tile_indices(HIGH_X, CHUNKS, SLICES)
    pointers = w_ptr + row.to(tl.int64) * stride_wn + k.to(tl.int64) * stride_wk
    weights = (pointers, row, k, stride_wn, stride_wk, N, apart)
    gates = weights
    if gated:
        pointers = gate_w_ptr + row.to(tl.int64) * stride_gn + k.to(tl.int64) * stride_gk
        gates = (pointers, row, k, stride_gn, stride_gk, N, apart)
    pointers = x_ptr + row_x.to(tl.int64) * stride_x + k_x
    inputs = (pointers, row_x, k_x, stride_x, 1, M, 0)
    added = inputs
    if ADDED > 0:
        pointers = add_ptr + row_x.to(tl.int64) * stride_add + k_x
        added = (pointers, row_x, k_x, stride_add, 1, M, 0)
    rows = tl.arange(0, ROWS)[:, None]
    mask_m = rows < M
    # What is beyond the last row computes something that is not stored.
    rows = tl.minimum(rows, M - 1).to(tl.int64)

    if PDL:
        if EARLY:
            # The next kernel may load its weights too.
            gdc_launch_dependents()
        else:
            prefetch_vector(b_ptr, pid * BLOCK_N, N, BLOCK_N)
        if NORM is not None and not (EARLY and KEPT):
            # Every program reads all of these: one asks for them.
            if pid == 0:
                for i in tl.static_range(TILES):
                    prefetch_vector(norm_w_ptr, i * BLOCK_K, K, BLOCK_K)
                    prefetch_vector(norm_b_ptr, i * BLOCK_K, K, BLOCK_K)
    if PDL and not EARLY:
        if LINES > 0:
            first_n = pid * BLOCK_N
            prefetch_weights(
                w_ptr, first_n, N, K, stride_wn, stride_wk, K_CONTIGUOUS, BLOCK_N, LINES
            )
            if gated:
                prefetch_weights(
                    gate_w_ptr, first_n, N, K, stride_gn, stride_gk, K_CONTIGUOUS, BLOCK_N, LINES
                )
        gdc_wait()
    if not (PDL and EARLY):
        x = load_tiles(inputs, K, 0, AHEAD_X, TILES, BLOCK_K, WHOLE, "")
        add = load_tiles(added, K, 0, ADDED, TILES, BLOCK_K, WHOLE, "")
    w = load_tiles(weights, K, 0, AHEAD, TILES, BLOCK_K, WHOLE, "evict_first")
    g = load_tiles(gates, K, 0, AHEAD_GATES, TILES, BLOCK_K, WHOLE, "evict_first")
    offs = (pid * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    b = load_vector(b_ptr, offs, offs < N)
    gate_b = load_vector(gate_b_ptr, offs, offs < N)
    affine = ()
    if KEPT:
        affine += load_vector_tiles(norm_w_ptr, K, NO_SCALE, TILES, CHUNKS, SLICES)
        affine += load_vector_tiles(norm_b_ptr, K, 0.0, TILES, CHUNKS, SLICES)
    if PDL and EARLY:
        gdc_wait()
        x = load_tiles(inputs, K, 0, AHEAD_X, TILES, BLOCK_K, WHOLE, "")
        add = load_tiles(added, K, 0, ADDED, TILES, BLOCK_K, WHOLE, "")
    # What the epilogue adds is asked for now, so that it is there in time.
    if add_ptr is not None:
        add_ptr += rows * stride_add
    if add2_ptr is not None:
        add2_ptr += rows * stride_add2
    summand = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if NORM is None:
        summand += load_summands(add_ptr, add2_ptr, add_bias_ptr, offs, offs < N)
    if PDL:
        # Without this ptxas moves each load of x to its product, where its latency shows every
        # time; where the first call is above, this one has no other effect.
        gdc_launch_dependents()

    if NORM is not None:
        # Every program writes a few columns of the carry; CARRY_BLOCK is K over programs.
        offs_c = (pid * CARRY_BLOCK + tl.arange(0, CARRY_BLOCK))[None, :]
        mask_c = offs_c < K
        carry = load_sum(x_ptr + rows * stride_x, add_ptr, add_bias_ptr, offs_c, mask_c)
        x, mean, rstd = norm_of_tiles(
            x,
            add,
            add_bias_ptr,
            affine,
            norm_w_ptr,
            norm_b_ptr,
            K,
            eps,
            NORM,
            ROWS,
            BLOCK_K,
            SLICES,
            WHOLE,
        )
        if CARRY_NORMED:
            mean = tl.reshape(mean, (ROWS, 1))
            rstd = tl.reshape(rstd, (ROWS, 1))
            carry = normalize(carry, mean, rstd, norm_w_ptr, norm_b_ptr, offs_c, mask_c, NORM)
        tl.store(
            carry_ptr + rows * K + offs_c,
            carry.to(carry_ptr.dtype.element_ty),
            mask=mask_m & mask_c,
        )

    acc = tl.zeros((SLICES, ROWS, BLOCK_N), tl.float32)
    gate_acc = acc
    for t in tl.static_range(STEPS):
        if t % TILES == 0:
            next_offs = offs + apart
            if t + TILES < STEPS:
                next_b = load_vector(b_ptr, next_offs, next_offs < N)
                next_gate_b = load_vector(gate_b_ptr, next_offs, next_offs < N)
                next_summand = tl.zeros((ROWS, BLOCK_N), tl.float32)
                if NORM is None:
                    next_summand += load_summands(
                        add_ptr, add2_ptr, add_bias_ptr, next_offs, next_offs < N
                    )
            acc = tl.zeros((SLICES, ROWS, BLOCK_N), tl.float32)
            gate_acc = acc
        fragment = as_rows(x[t % TILES], HIGH_X, CHUNKS, SLICES)
        acc = multiply(fragment, w[t], acc, HIGH, CHUNKS, SLICES)
        if gated:
            gate_acc = multiply(fragment, g[t], gate_acc, HIGH, CHUNKS, SLICES)
        if t + AHEAD < STEPS:
            w += load_tiles(
                weights, K, t + AHEAD, t + AHEAD + 1, TILES, BLOCK_K, WHOLE, "evict_first"
            )
            if gated:
                g += load_tiles(
                    gates, K, t + AHEAD, t + AHEAD + 1, TILES, BLOCK_K, WHOLE, "evict_first"
                )
            if t + AHEAD >= AHEAD_X and t + AHEAD < TILES:
                x += load_tiles(inputs, K, t + AHEAD, t + AHEAD + 1, TILES, BLOCK_K, WHOLE, "")
        if t % TILES == TILES - 1:
            y = tl.sum(acc, axis=0) + b
            gate = gate_b
            if gated:
                gate += tl.sum(gate_acc, axis=0)
            mask = mask_m & (offs < N)
            finish(y, gate, summand, out_ptr + rows * N, offs, mask, gated, ACTIVATION)
            offs = next_offs
            if t + 1 < STEPS:
                b = next_b
                gate_b = next_gate_b
                summand = next_summand
