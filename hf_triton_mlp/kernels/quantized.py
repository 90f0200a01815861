"""Linear layers of quantized weights for up to 16 rows: codes go from memory through registers,
where they become 16-bit values, to the matrix units."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED
from hf_triton_mlp.kernels.dequantize import (
    byte_values,
    int4_values,
    ones_like,
    where_kept,
)
from hf_triton_mlp.kernels.norm import apply_affine, load_sum, normalize
from hf_triton_mlp.kernels.prefetch import prefetch_vector
from hf_triton_mlp.kernels.skinny import finish, load_summands, load_vector


@triton.jit
def code_indices(
    HIGH: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr
):
    """Row and place of what is stored of a tile's codes, (HIGH * CHUNKS * SLICES * 8, 1) and
    (…, WIDTH). A warp has 8 rows of one slice: 4 threads a row, 16 bytes a thread.
    """
    i = tl.arange(0, HIGH * CHUNKS * SLICES * 8)[:, None]
    row = i // (CHUNKS * SLICES * 8) * 8 + i % 8
    chunk = i // 8 % SLICES * CHUNKS + i // (SLICES * 8) % CHUNKS
    return row, chunk * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def row_indices(ROWS: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr, SPAN: tl.constexpr):
    """Row and k of the values of a tile of x as `as_fragment` wants them.

    A product of the matrix units has 8 columns (of the transposed output), which are 8 rows of x,
    or fewer, and then `CLASSES` times these: each class has the values of its own products, so
    that all threads have different ones.
    """
    COLUMNS: tl.constexpr = max(ROWS, 8)
    CLASSES: tl.constexpr = COLUMNS // ROWS
    OWN: tl.constexpr = CHUNKS * SPAN // 4 // CLASSES
    WIDTH: tl.constexpr = min(8, OWN)
    PARTS: tl.constexpr = OWN // WIDTH
    i = tl.arange(0, COLUMNS // 8 * PARTS * SLICES * 8)[:, None]
    column = i // (PARTS * SLICES * 8) * 8 + i % 8
    slice = i // 8 % SLICES
    # Of the values of a thread in a slice, which are SPAN / 4 in a row of each chunk.
    VECTORS: tl.constexpr = SPAN // 4 // WIDTH
    first = column // ROWS * PARTS + i // (SLICES * 8) % PARTS
    first_k = (slice * CHUNKS + first // VECTORS) * SPAN + first % VECTORS * WIDTH
    j = tl.arange(0, 4 * WIDTH)[None, :]
    return column % ROWS, first_k + j // WIDTH * (SPAN // 4) + j % WIDTH


@triton.jit
def weight_values(
    codes,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """A tile of codes as values in DTYPE, (HIGH * CHUNKS * SLICES * 8, 4, SPAN / 4)."""
    TILE: tl.constexpr = codes.shape[0]
    if FORMAT == "int4":
        return int4_values(tl.reshape(codes, (TILE, 4, SPAN // 32)), DTYPE)
    else:
        return tl.reshape(byte_values(codes, FORMAT, DTYPE), (TILE, 4, SPAN // 4))


@triton.jit
def as_matrix(
    values,
    HIGH: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLICES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Values of `weight_values` as (SLICES, rows, depth), depth in the order of the fragments.

    Where Triton finds that less than 16 bits were loaded, a thread has four in a row there, and
    again; two of these and two of those go into one product.
    """
    values = tl.reshape(values, (HIGH, CHUNKS, SLICES, 8, 4, SPAN // 32, 2, 2, 2))
    values = tl.permute(values, (2, 0, 3, 1, 5, 7, 4, 6, 8))
    return tl.reshape(values, (SLICES, HIGH * 8, CHUNKS * SPAN))


@triton.jit
def as_fragment(
    tile, ROWS: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr, SPAN: tl.constexpr
):
    """A tile of x as (SLICES, depth, columns), depth in the same order.

    Where there are several columns for a row, each has zeros where others have its values.
    """
    COLUMNS: tl.constexpr = max(ROWS, 8)
    CLASSES: tl.constexpr = COLUMNS // ROWS
    OWN: tl.constexpr = CHUNKS * SPAN // 4 // CLASSES
    WIDTH: tl.constexpr = min(8, OWN)
    PARTS: tl.constexpr = OWN // WIDTH
    STEPS: tl.constexpr = OWN // 4
    tile = tl.reshape(tile, (COLUMNS // 8, PARTS, SLICES, 8, 4, WIDTH // 4, 2, 2))
    tile = tl.permute(tile, (2, 1, 5, 6, 4, 7, 0, 3))
    tile = tl.reshape(tile, (SLICES, 1, STEPS, 2, 4, 2, COLUMNS))
    if CLASSES > 1:
        column = tl.arange(0, COLUMNS)[None, :]
        kept = tl.where(column // ROWS == tl.arange(0, CLASSES)[:, None], -1, 0).to(tl.int16)
        kept = tl.reshape(kept, (1, CLASSES, 1, 1, 1, 1, COLUMNS))
        shape: tl.constexpr = (SLICES, CLASSES, STEPS, 2, 4, 2, COLUMNS)
        tile = where_kept(tl.broadcast_to(kept, shape), tl.broadcast_to(tile, shape))
    tile = tl.reshape(tile, (SLICES, CLASSES * STEPS // 2, 2, 2, 4, 2, COLUMNS))
    tile = tl.permute(tile, (0, 1, 3, 4, 2, 5, 6))
    return tl.reshape(tile, (SLICES, CHUNKS * SPAN, COLUMNS))


@triton.jit
def by_rows(tile, ROWS: tl.constexpr):
    """A tile of `row_indices` as (rows / 8 or 1, …, up to 8 rows, …)."""
    HIGH: tl.constexpr = max(ROWS, 8) // 8
    LOW: tl.constexpr = min(ROWS, 8)
    return tl.reshape(tile, (HIGH, tile.shape[0] // (HIGH * LOW), LOW, tile.shape[1]))


@triton.jit
def multiply(w, x, acc):
    """acc + w · x for each slice of K."""
    if INTERPRETED:
        # The interpreter (3.6 … 3.9) multiplies the raw 16-bit integers of bfloat16 operands.
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def spread_scales(scales, HIGH: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr):
    """Scales (4, HIGH * SLICES * 8), alike in a column, as (SLICES, rows, COLUMNS) in float32.

    Each of the 4 threads of a row has loaded what it multiplies its sums by.
    """
    scales = tl.reshape(scales.to(tl.float32), (4, HIGH, SLICES, 8))
    scales = tl.reshape(tl.permute(scales, (2, 1, 3, 0)), (SLICES, HIGH * 8, 1, 4, 1))
    scales = tl.broadcast_to(scales, (SLICES, HIGH * 8, COLUMNS // 8, 4, 2))
    return tl.reshape(scales, (SLICES, HIGH * 8, COLUMNS))


@triton.jit
def first_rows(w, ROWS: tl.constexpr):
    """The first ROWS of the rows of w (slices, rows, depth)."""
    if w.shape[1] == ROWS:
        return w
    else:
        parts = tl.reshape(w, (w.shape[0], 2, w.shape[1] // 2, w.shape[2]))
        first, _ = tl.split(tl.permute(parts, (0, 2, 3, 1)))
        return first_rows(first, ROWS)


@triton.jit
def sum_rows(w, x):
    """Sums over the depth of x, (SLICES, rows of w, columns), alike in a column.

    The matrix units put them into the threads that have the sums of products; ones made from 16
    rows of w have its layout.
    """
    SLICES: tl.constexpr = w.shape[0]
    COLUMNS: tl.constexpr = x.shape[2]
    ones = ones_like(first_rows(w, 16))
    sums = multiply(ones, x, tl.zeros((SLICES, 16, COLUMNS), tl.float32))
    sums = tl.reshape(sums, (SLICES, 1, 16, COLUMNS))
    sums = tl.broadcast_to(sums, (SLICES, w.shape[1] // 16, 16, COLUMNS))
    return tl.reshape(sums, (SLICES, w.shape[1], COLUMNS))


@triton.jit
def multiply_tile(
    codes,
    scales,
    zeros,
    t: tl.constexpr,
    x,
    x_sums,
    acc,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    HIGH: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLICES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """acc + W · x for each slice of K: (SLICES, BLOCK_N, columns); x from `as_fragment`.

    scales, zeros: of all tiles, of which this is number t; they may be empty. Where scales multiply
    sums, zeros do: x_sums are x's of this tile, empty if there are none yet. Returns them too.
    """
    # The interpreter adds and multiplies the raw integers of bfloat16 too.
    DTYPE: tl.constexpr = tl.float32 if INTERPRETED and x.dtype == tl.bfloat16 else x.dtype
    values = weight_values(codes, FORMAT, DTYPE, SPAN)
    if SCALES == "weights":
        if len(zeros) > 0:
            # In two parts: what one rounds away would be wrong in the same way for a whole group.
            zero = tl.trans(zeros[t])[:, :, None].to(tl.float32) - 8.0
            most = zero.to(DTYPE)
            values = values - most - (zero - most.to(tl.float32)).to(DTYPE)
        values = values * tl.trans(scales[t])[:, :, None].to(DTYPE)
    w = as_matrix(values, HIGH, CHUNKS, SLICES, SPAN)
    if SCALES == "sums":
        part = multiply(w, x, tl.zeros(acc.shape, tl.float32))
        if len(zeros) > 0:
            if len(x_sums) == 0:
                x_sums = (sum_rows(w, x),)
            part -= x_sums[0] * (spread_scales(zeros[t], HIGH, SLICES, acc.shape[2]) - 8.0)
        acc += part * spread_scales(scales[t], HIGH, SLICES, acc.shape[2])
    else:
        acc = multiply(w, x, acc)
    return acc, x_sums


@triton.jit
def sum_columns(acc, ROWS: tl.constexpr):
    """The sums (ROWS, BLOCK_N) of all slices' and of all columns of a row."""
    y = tl.trans(tl.sum(acc, axis=0))
    if y.shape[0] > ROWS:
        y = tl.sum(tl.reshape(y, (y.shape[0] // ROWS, ROWS, y.shape[1])), axis=0)
    return y


@triton.jit
def load_tiles(
    matrix,
    K,
    first: tl.constexpr,
    last: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The tiles `first` to `last`, not included, as load_tiles of stream.py; strides along K are 1.

    EVEN: no row of theirs is beyond the last, so that nothing is masked but what is beyond K.
    """
    pointers, row, k, stride_row, limit, apart = matrix
    tiles = ()
    for t in tl.static_range(first, last):
        next_row = t // TILES * apart
        next_k = t % TILES * BLOCK_K
        place = pointers + (tl.cast(next_row, tl.int64) * stride_row + next_k)
        if t % TILES >= WHOLE:
            mask = (row < limit - next_row) & (k < K - next_k)
            tiles += (tl.load(place, mask=mask, other=0.0, eviction_policy=EVICT),)
        elif EVEN:
            tiles += (tl.load(place, eviction_policy=EVICT),)
        else:
            mask = row < limit - next_row
            tiles += (tl.load(place, mask=mask, other=0.0, eviction_policy=EVICT),)
    return tiles


@triton.jit
def load_scales(
    matrix,
    K,
    first: tl.constexpr,
    last: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`load_tiles` of scales or zeros: their rows, and k, whose groups they are."""
    ptr, row, k, stride_row, stride_group, limit, apart = matrix
    tiles = ()
    for t in tl.static_range(first, last):
        next_row = t // TILES * apart
        next_k = t % TILES * BLOCK_K
        place = ptr + row.to(tl.int64) * stride_row
        offset = tl.cast(next_row, tl.int64) * stride_row
        if BLOCK_K % GROUP == 0:
            place += (k // GROUP).to(tl.int64) * stride_group
            offset += tl.cast(next_k // GROUP, tl.int64) * stride_group
        else:
            place += ((k + next_k) // GROUP).to(tl.int64) * stride_group
        place += offset
        if t % TILES >= WHOLE:
            mask = (row < limit - next_row) & (k < K - next_k)
            tiles += (tl.load(place, mask=mask, other=0.0),)
        elif EVEN:
            tiles += (tl.load(place),)
        else:
            tiles += (tl.load(place, mask=row < limit - next_row, other=0.0),)
    return tiles


@triton.jit
def load_vector_tiles(ptr, k, K, default: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr):
    """A vector of K values at k of each tile; the default for None."""
    tiles = ()
    for i in tl.static_range(TILES):
        if ptr is None:
            tiles += (tl.full(k.shape, default, tl.float32),)
        else:
            tiles += (tl.load(ptr + i * BLOCK_K + k, mask=k < K - i * BLOCK_K, other=0.0),)
    return tiles


@triton.jit
def norm_of_tiles(
    x,
    add,
    add_bias,
    affine,
    k,
    K,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):
    """norm(x + add + add_bias) in tiles of x's dtype, and the rows' mean and 1 / deviation.

    x, add, add_bias: tiles of whole rows, as `row_indices` has them, k the first one's; affine: of
    the norm's weights, then of its biases. add and add_bias may be empty.
    """
    TILES: tl.constexpr = len(x)
    sums = ()
    valid = ()
    for i in tl.static_range(TILES):
        s = by_rows(x[i], ROWS).to(tl.float32)
        if len(add) > 0:
            s += by_rows(add[i], ROWS).to(tl.float32)
        if len(add_bias) > 0:
            s += by_rows(add_bias[i], ROWS).to(tl.float32)
        sums += (s,)
        valid += (by_rows(k < K - i * BLOCK_K, ROWS),)
    total = tl.zeros(sums[0].shape, tl.float32)
    if NORM == "layer_norm":
        for i in tl.static_range(TILES):
            total += sums[i]
    mean = tl.sum(tl.sum(total, axis=3), axis=1) / K
    squares = tl.zeros(total.shape, tl.float32)
    for i in tl.static_range(TILES):
        centred = tl.where(valid[i], sums[i] - mean[:, None, :, None], 0.0)
        squares += centred * centred
    squares = tl.sum(tl.sum(squares, axis=3), axis=1)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / K + eps))
    tiles = ()
    for i in tl.static_range(TILES):
        u = (sums[i] - mean[:, None, :, None]) * rstd[:, None, :, None]
        u = apply_affine(u, by_rows(affine[i], ROWS), by_rows(affine[TILES + i], ROWS), NORM)
        u = tl.where(valid[i], u, 0.0).to(x[i].dtype)
        tiles += (tl.reshape(u, k.shape),)
    return tiles, mean, rstd


@triton.jit
def quantized_linear_kernel(
    x_ptr,
    add_ptr,
    add2_ptr,
    carry_ptr,
    out_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    b_ptr,
    gate_w_ptr,
    gate_scale_ptr,
    gate_zero_ptr,
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
    stride_gn,
    stride_sn,
    stride_sg,
    eps,
    NORM: tl.constexpr,
    CARRY_NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    CARRY_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What `stream_linear_kernel` computes, of a QuantizedWeight, for M <= ROWS rows.

    W: codes (N, K), int4 in words of 8, by row stride; scales, zeros: (N, groups), by strides
    stride_sn and stride_sg. GROUP: values of a row that share one. SCALES says what these multiply:
    "result" (one for a row), "sums" of parts of groups, as far as they are in a tile's slice, or
    "weights".

    A program computes BLOCKS blocks of BLOCK_N outputs. Each of SLICES warps (all there are)
    multiplies its part of every BLOCK_K of K, chunks of SPAN values: 16 bytes of codes in each of
    4 threads. As in `stream_linear_kernel` nothing moves between threads, since a sum over K may be
    taken in any order. W is the left operand here, so that a thread's codes and its sums are of
    the same outputs, as is the scale that it loads.

    With a NORM the rows, at most 8, are loaded and normed as such, and go through shared memory.
    SPLITS > 1: as many programs share each block, and out is (SPLITS, M, N), gated twice that, in
    float32 as in `tiled_linear_kernel`. STAGES, TILES, WHOLE, PDL, EARLY: as in `stream`.
    """
    HIGH: tl.constexpr = BLOCK_N // 8
    COLUMNS: tl.constexpr = max(ROWS, 8)
    CHUNKS: tl.constexpr = BLOCK_K // (SLICES * SPAN)
    WIDTH: tl.constexpr = SPAN // 8 if FORMAT == "int4" else SPAN
    STORED_K: tl.constexpr = BLOCK_K // SPAN * WIDTH
    STEPS: tl.constexpr = BLOCKS * TILES
    AHEAD: tl.constexpr = min(STAGES, STEPS)
    AHEAD_X: tl.constexpr = TILES if NORM is not None else min(STAGES, TILES)
    ADDED: tl.constexpr = TILES if NORM is not None and add_ptr is not None else 0
    NO_SCALE: tl.constexpr = 0.0 if NORM == "rms_norm_offset" else 1.0
    gated: tl.constexpr = gate_w_ptr is not None
    GROUPED: tl.constexpr = SCALES != "result"
    asymmetric: tl.constexpr = zero_ptr is not None
    AHEAD_GATES: tl.constexpr = AHEAD if gated else 0
    AHEAD_SCALES: tl.constexpr = AHEAD if GROUPED else 0
    AHEAD_GATE_SCALES: tl.constexpr = AHEAD if GROUPED and gated else 0
    AHEAD_ZEROS: tl.constexpr = AHEAD if asymmetric else 0
    AHEAD_GATE_ZEROS: tl.constexpr = AHEAD if asymmetric and gated else 0
    pid = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    first_k = split * (TILES * BLOCK_K)
    apart = tl.num_programs(0) // SPLITS * BLOCK_N
    row, place = code_indices(HIGH, CHUNKS, SLICES, WIDTH)
    row += pid * BLOCK_N
    place += split * (TILES * STORED_K)
    stored = K
    if FORMAT == "int4":
        stored = tl.cdiv(K, 8)
    weights = (w_ptr + row.to(tl.int64) * stride_wn + place, row, place, stride_wn, N, apart)
    gates = weights
    if gated:
        pointers = gate_w_ptr + row.to(tl.int64) * stride_gn + place
        gates = (pointers, row, place, stride_gn, N, apart)
    row_x, k_x = row_indices(ROWS, CHUNKS, SLICES, SPAN)
    row_x = tl.minimum(row_x, M - 1)
    k_x += first_k
    inputs = (x_ptr + row_x.to(tl.int64) * stride_x + k_x, row_x, k_x, stride_x, M, 0)
    added = inputs
    if ADDED > 0:
        added = (add_ptr + row_x.to(tl.int64) * stride_add + k_x, row_x, k_x, stride_add, M, 0)
    # Sums are of whole slices, weights of threads.
    SCALED: tl.constexpr = CHUNKS if SCALES == "weights" else 1
    row_s, k_s = code_indices(HIGH, SCALED, SLICES, 4)
    row_s = tl.trans(row_s) + pid * BLOCK_N
    k_s = tl.trans(k_s)
    if SCALES == "sums":
        k_s = k_s // 4 * 4
    k_s = k_s * (BLOCK_K // (SLICES * SCALED * 4)) + first_k
    scales_of = (scale_ptr, row_s, k_s, stride_sn, stride_sg, N, apart)
    zeros_of = (zero_ptr, row_s, k_s, stride_sn, stride_sg, N, apart)
    gate_scales_of = (gate_scale_ptr, row_s, k_s, stride_sn, stride_sg, N, apart)
    gate_zeros_of = (gate_zero_ptr, row_s, k_s, stride_sn, stride_sg, N, apart)
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
        if NORM is not None:
            # Every program reads all of these: one asks for them.
            if pid == 0:
                for i in tl.static_range(TILES):
                    prefetch_vector(norm_w_ptr, i * BLOCK_K, K, BLOCK_K)
                    prefetch_vector(norm_b_ptr, i * BLOCK_K, K, BLOCK_K)
    if PDL and not EARLY:
        gdc_wait()
    if not (PDL and EARLY):
        x = load_tiles(inputs, K, 0, AHEAD_X, TILES, BLOCK_K, WHOLE, True, "")
        add = load_tiles(added, K, 0, ADDED, TILES, BLOCK_K, WHOLE, True, "")
    w = load_tiles(weights, stored, 0, AHEAD, TILES, STORED_K, WHOLE, EVEN, "evict_first")
    g = load_tiles(gates, stored, 0, AHEAD_GATES, TILES, STORED_K, WHOLE, EVEN, "evict_first")
    s = load_scales(scales_of, K, 0, AHEAD_SCALES, TILES, BLOCK_K, GROUP, WHOLE, EVEN)
    gs = load_scales(gate_scales_of, K, 0, AHEAD_GATE_SCALES, TILES, BLOCK_K, GROUP, WHOLE, EVEN)
    z = load_scales(zeros_of, K, 0, AHEAD_ZEROS, TILES, BLOCK_K, GROUP, WHOLE, EVEN)
    gz = load_scales(gate_zeros_of, K, 0, AHEAD_GATE_ZEROS, TILES, BLOCK_K, GROUP, WHOLE, EVEN)
    offs = (pid * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    b = load_vector(b_ptr, offs, offs < N)
    gate_b = load_vector(gate_b_ptr, offs, offs < N)
    if not GROUPED:
        row_scale = load_vector(scale_ptr, offs, offs < N)
        gate_row_scale = load_vector(gate_scale_ptr, offs, offs < N)
    affine = ()
    add_bias = ()
    if NORM is not None:
        affine += load_vector_tiles(norm_w_ptr, k_x, K, NO_SCALE, TILES, BLOCK_K)
        affine += load_vector_tiles(norm_b_ptr, k_x, K, 0.0, TILES, BLOCK_K)
        if add_bias_ptr is not None:
            add_bias += load_vector_tiles(add_bias_ptr, k_x, K, 0.0, TILES, BLOCK_K)
    if PDL and EARLY:
        gdc_wait()
        x = load_tiles(inputs, K, 0, AHEAD_X, TILES, BLOCK_K, WHOLE, True, "")
        add = load_tiles(added, K, 0, ADDED, TILES, BLOCK_K, WHOLE, True, "")
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
            x, add, add_bias, affine, k_x, K, eps, NORM, ROWS, BLOCK_K, SLICES
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

    acc = tl.zeros((SLICES, BLOCK_N, COLUMNS), tl.float32)
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
                if not GROUPED:
                    next_row_scale = load_vector(scale_ptr, next_offs, next_offs < N)
                    next_gate_row_scale = load_vector(gate_scale_ptr, next_offs, next_offs < N)
            acc = tl.zeros((SLICES, BLOCK_N, COLUMNS), tl.float32)
            gate_acc = acc
        fragment = as_fragment(x[t % TILES], ROWS, CHUNKS, SLICES, SPAN)
        acc, x_sums = multiply_tile(
            w[t], s, z, t, fragment, (), acc, FORMAT, SCALES, HIGH, CHUNKS, SLICES, SPAN
        )
        if gated:
            gate_acc, x_sums = multiply_tile(
                g[t],
                gs,
                gz,
                t,
                fragment,
                x_sums,
                gate_acc,
                FORMAT,
                SCALES,
                HIGH,
                CHUNKS,
                SLICES,
                SPAN,
            )
        if t + AHEAD < STEPS:
            w += load_tiles(
                weights,
                stored,
                t + AHEAD,
                t + AHEAD + 1,
                TILES,
                STORED_K,
                WHOLE,
                EVEN,
                "evict_first",
            )
            if gated:
                g += load_tiles(
                    gates,
                    stored,
                    t + AHEAD,
                    t + AHEAD + 1,
                    TILES,
                    STORED_K,
                    WHOLE,
                    EVEN,
                    "evict_first",
                )
            if GROUPED:
                s += load_scales(
                    scales_of, K, t + AHEAD, t + AHEAD + 1, TILES, BLOCK_K, GROUP, WHOLE, EVEN
                )
            if asymmetric:
                z += load_scales(
                    zeros_of, K, t + AHEAD, t + AHEAD + 1, TILES, BLOCK_K, GROUP, WHOLE, EVEN
                )
            if gated and GROUPED:
                gs += load_scales(
                    gate_scales_of, K, t + AHEAD, t + AHEAD + 1, TILES, BLOCK_K, GROUP, WHOLE, EVEN
                )
            if gated and asymmetric:
                gz += load_scales(
                    gate_zeros_of, K, t + AHEAD, t + AHEAD + 1, TILES, BLOCK_K, GROUP, WHOLE, EVEN
                )
            if NORM is None and t + AHEAD >= AHEAD_X and t + AHEAD < TILES:
                x += load_tiles(
                    inputs, K, t + AHEAD, t + AHEAD + 1, TILES, BLOCK_K, WHOLE, True, ""
                )
        if t % TILES == TILES - 1:
            y = sum_columns(acc, ROWS)
            gate = gate_b
            if not GROUPED:
                y *= row_scale
            y += b
            if gated:
                gate_y = sum_columns(gate_acc, ROWS)
                if not GROUPED:
                    gate_y *= gate_row_scale
                gate += gate_y
            mask = mask_m & (offs < N)
            if SPLITS > 1:
                size = tl.cast(M, tl.int64) * N
                parts = out_ptr + split * size + rows * N + offs
                tl.store(parts, y, mask=mask)
                if gated:
                    tl.store(parts + SPLITS * size, gate, mask=mask)
            else:
                finish(y, gate, summand, out_ptr + rows * N, offs, mask, gated, ACTIVATION)
            offs = next_offs
            if t + 1 < STEPS:
                b = next_b
                gate_b = next_gate_b
                summand = next_summand
                if not GROUPED:
                    row_scale = next_row_scale
                    gate_row_scale = next_gate_row_scale
