"""Linear layers of quantized weights for up to 16 rows: codes go from memory through registers,
where they become 16-bit values, to the matrix units."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED
from hf_triton_mlp.kernels.dequantize import (
    INT4_UNIT,
    byte_values,
    int4_factors,
    int4_values,
    where_kept,
)
from hf_triton_mlp.kernels.prefetch import prefetch_vector
from hf_triton_mlp.kernels.skinny import finish, load_summands, load_vector

#: How Triton 3.6 lays operands out that were joined, as if of fewer than 16 bits; 3.9 does not.
#: With the wrong order values move between threads, and products are the same.
FOUR_IN_A_ROW = tl.constexpr(
    tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
)


@triton.jit
def code_indices(
    HIGH: tl.constexpr,
    CHUNKS: tl.constexpr,
    WARPS: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Row and place of what is stored of a tile's codes, (HIGH * CHUNKS * WARPS * 8, 1) and
    (…, WIDTH). A warp has 8 rows of one slice at a time: 4 threads a row, 16 bytes a thread.
    """
    i = tl.arange(0, HIGH * CHUNKS * WARPS * 8)[:, None]
    warp = i // 8 % WARPS
    row = (warp // SLICES * HIGH + i // (CHUNKS * WARPS * 8)) * 8 + i % 8
    chunk = warp % SLICES * CHUNKS + i // (WARPS * 8) % CHUNKS
    return row, chunk * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def row_indices(
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WARPS: tl.constexpr,
    SLICES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Row and k of the values of a tile of x as `as_fragment` wants them, and where k's vector is.

    A product of the matrix units has 8 columns (of the transposed output), which are 8 rows of x,
    or fewer, and then `CLASSES` times these: each class has the values of its own products, so
    that all threads have different ones.
    """
    COLUMNS: tl.constexpr = max(ROWS, 8)
    CLASSES: tl.constexpr = COLUMNS // ROWS
    OWN: tl.constexpr = CHUNKS * SPAN // 4 // CLASSES
    WIDTH: tl.constexpr = min(8, OWN)
    PARTS: tl.constexpr = OWN // WIDTH
    i = tl.arange(0, COLUMNS // 8 * PARTS * WARPS * 8)[:, None]
    column = i // (PARTS * WARPS * 8) * 8 + i % 8
    slice = i // 8 % SLICES
    # Of the values of a thread in a slice, which are SPAN / 4 in a row of each chunk.
    VECTORS: tl.constexpr = SPAN // 4 // WIDTH
    first = column // ROWS * PARTS + i // (WARPS * 8) % PARTS
    first_k = (slice * CHUNKS + first // VECTORS) * SPAN + first % VECTORS * WIDTH
    j = tl.arange(0, 4 * WIDTH)[None, :]
    first_k += j // WIDTH * (SPAN // 4)
    return column % ROWS, first_k + j % WIDTH, first_k


@triton.jit
def weight_values(
    codes,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    SPAN: tl.constexpr,
    EXACT: tl.constexpr,
):
    """A tile of codes as values in DTYPE, (HIGH * CHUNKS * WARPS * 8, 4, SPAN / 4).

    EXACT: False for int4's as `int4_values` has them sooner.
    """
    TILE: tl.constexpr = codes.shape[0]
    words = tl.reshape(codes, (TILE, 4, codes.shape[1] // 4))
    if FORMAT == "int4":
        return int4_values(words, DTYPE, EXACT)
    else:
        return byte_values(words, FORMAT, DTYPE)


@triton.jit
def as_matrix(
    values,
    HIGH: tl.constexpr,
    CHUNKS: tl.constexpr,
    WARPS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Values of `weight_values` as (WARPS, rows, depth), depth in the order of the fragments.

    A thread has two in a row there, and again for the same product; or FOUR_IN_A_ROW and again,
    two of these and two of those being of one product.
    """
    values = tl.reshape(values, (HIGH, CHUNKS, WARPS, 8, 4, SPAN // 32, 2, 2, 2))
    if FOUR_IN_A_ROW:
        values = tl.permute(values, (2, 0, 3, 1, 5, 7, 4, 6, 8))
    else:
        values = tl.permute(values, (2, 0, 3, 1, 5, 6, 7, 4, 8))
    return tl.reshape(values, (WARPS, HIGH * 8, CHUNKS * SPAN))


@triton.jit
def as_fragment(
    tile, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, SPAN: tl.constexpr
):
    """A tile of x as (WARPS, depth, columns), depth in the same order.

    Where there are several columns for a row, each has zeros where others have its values.
    """
    COLUMNS: tl.constexpr = max(ROWS, 8)
    CLASSES: tl.constexpr = COLUMNS // ROWS
    OWN: tl.constexpr = CHUNKS * SPAN // 4 // CLASSES
    WIDTH: tl.constexpr = min(8, OWN)
    PARTS: tl.constexpr = OWN // WIDTH
    STEPS: tl.constexpr = OWN // 4
    tile = tl.reshape(tile, (COLUMNS // 8, PARTS, WARPS, 8, 4, WIDTH // 4, 2, 2))
    tile = tl.permute(tile, (2, 1, 5, 6, 4, 7, 0, 3))
    tile = tl.reshape(tile, (WARPS, 1, STEPS, 2, 4, 2, COLUMNS))
    if CLASSES > 1:
        column = tl.arange(0, COLUMNS)[None, :]
        kept = tl.where(column // ROWS == tl.arange(0, CLASSES)[:, None], -1, 0).to(tl.int16)
        kept = tl.reshape(kept, (1, CLASSES, 1, 1, 1, 1, COLUMNS))
        shape: tl.constexpr = (WARPS, CLASSES, STEPS, 2, 4, 2, COLUMNS)
        tile = where_kept(tl.broadcast_to(kept, shape), tl.broadcast_to(tile, shape))
    if FOUR_IN_A_ROW:
        tile = tl.reshape(tile, (WARPS, CLASSES * STEPS // 2, 2, 2, 4, 2, COLUMNS))
        tile = tl.permute(tile, (0, 1, 3, 4, 2, 5, 6))
    return tl.reshape(tile, (WARPS, CHUNKS * SPAN, COLUMNS))


@triton.jit
def multiply(w, x, acc):
    """acc + w · x for each warp."""
    if INTERPRETED:
        # The interpreter (3.6 … 3.9) multiplies the raw 16-bit integers of bfloat16 operands.
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def spread_scales(scales, HIGH: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Scales (4, HIGH * WARPS * 8), alike in a column, as (WARPS, rows, COLUMNS) in float32.

    Each of the 4 threads of a row has loaded what it multiplies its sums by.
    """
    scales = tl.reshape(scales.to(tl.float32), (4, HIGH, WARPS, 8))
    scales = tl.reshape(tl.permute(scales, (2, 1, 3, 0)), (WARPS, HIGH * 8, 1, 4, 1))
    scales = tl.broadcast_to(scales, (WARPS, HIGH * 8, COLUMNS // 8, 4, 2))
    return tl.reshape(scales, (WARPS, HIGH * 8, COLUMNS))


@triton.jit
def sum_rows(x, DTYPE: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, SPAN: tl.constexpr):
    """Sums over the depth of x, of `int4_factors`, that take away what `weight_values` of int4 that
    are not EXACT add to codes, and 1 of each code: two of (warps, 8, columns), alike in a column.

    They are products with a tile of codes of 0 and one of 1, so that the matrix units put them into
    the threads that have the sums of other products.
    """
    i = tl.arange(0, 2 * CHUNKS * WARPS * 8)[:, None] + tl.zeros((1, SPAN // 8), tl.int32)
    words = tl.where(i < CHUNKS * WARPS * 8, 0, 0x11111111)
    w = as_matrix(weight_values(words, "int4", DTYPE, SPAN, False), 2, CHUNKS, WARPS, SPAN)
    sums = multiply(w, x, tl.zeros((WARPS, 16, x.shape[2]), tl.float32))
    sums = tl.reshape(sums, (WARPS, 2, 8, x.shape[2]))
    of_zeros, of_ones = tl.split(tl.permute(sums, (0, 2, 3, 1)))
    return of_zeros, of_ones - of_zeros


@triton.jit
def spread_sums(sums, ROWS: tl.constexpr):
    """`sum_rows`'s (warps, 8, columns) for all rows: (warps, ROWS, columns)."""
    WARPS: tl.constexpr = sums.shape[0]
    COLUMNS: tl.constexpr = sums.shape[2]
    sums = tl.broadcast_to(sums[:, None, :, :], (WARPS, ROWS // 8, 8, COLUMNS))
    return tl.reshape(sums, (WARPS, ROWS, COLUMNS))


@triton.jit
def multiply_tile(
    codes,
    groups,
    x,
    x_sums,
    acc,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    HIGH: tl.constexpr,
    CHUNKS: tl.constexpr,
    WARPS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """acc + W · x for each warp: (WARPS, rows, columns); x from `as_fragment`.

    groups: its scales, if these do not multiply the result, and zeros, if there are any. Where
    scales multiply int4's sums, zeros or 8 do: x is of `int4_factors` then, x_sums are its by
    `sum_rows`, empty if there are none yet, and in float16 acc is INT4_UNIT times as large. Returns
    x_sums too.
    """
    # The interpreter adds and multiplies the raw integers of bfloat16 too.
    DTYPE: tl.constexpr = tl.float32 if INTERPRETED and x.dtype == tl.bfloat16 else x.dtype
    INT4_SUMS: tl.constexpr = FORMAT == "int4" and SCALES == "sums"
    values = weight_values(codes, FORMAT, DTYPE, SPAN, not INT4_SUMS)
    if SCALES == "weights":
        if len(groups) > 1:
            # In two parts: what one rounds away would be wrong in the same way for a whole group.
            zero = tl.trans(groups[1])[:, :, None].to(tl.float32) - 8.0
            most = zero.to(DTYPE)
            values = values - most - (zero - most.to(tl.float32)).to(DTYPE)
        values = values * tl.trans(groups[0])[:, :, None].to(DTYPE)
    w = as_matrix(values, HIGH, CHUNKS, WARPS, SPAN)
    if SCALES == "sums":
        part = multiply(w, x, tl.zeros(acc.shape, tl.float32))
        if INT4_SUMS:
            if len(x_sums) == 0:
                x_sums = sum_rows(x, DTYPE, CHUNKS, WARPS, SPAN)
            if not DTYPE.is_fp16():
                part -= spread_sums(x_sums[0], acc.shape[1])
            if len(groups) > 1:
                zeros = spread_scales(groups[1], HIGH, WARPS, acc.shape[2])
                part -= spread_sums(x_sums[1], acc.shape[1]) * zeros
            else:
                part -= spread_sums(8.0 * x_sums[1], acc.shape[1])
        acc += part * spread_scales(groups[0], HIGH, WARPS, acc.shape[2])
    else:
        acc = multiply(w, x, acc)
    return acc, x_sums


@triton.jit
def sum_columns(acc, ROWS: tl.constexpr, SLICES: tl.constexpr):
    """The sums (ROWS, BLOCK_N) of all slices' and of all columns of a row."""
    PARTS: tl.constexpr = acc.shape[0] // SLICES
    acc = tl.sum(tl.reshape(acc, (PARTS, SLICES, acc.shape[1], acc.shape[2])), axis=1)
    y = tl.trans(tl.reshape(acc, (PARTS * acc.shape[1], acc.shape[2])))
    if y.shape[0] > ROWS:
        y = tl.sum(tl.reshape(y, (y.shape[0] // ROWS, ROWS, y.shape[1])), axis=0)
    return y


@triton.jit
def row_scales(ptr, offs, N, GROUPED: tl.constexpr):
    """What multiplies the results at `offs`."""
    if GROUPED:
        return tl.full(offs.shape, 1.0, tl.float32)
    else:
        return load_vector(ptr, offs, offs < N)


@triton.jit
def load_tile(matrix, offset, EVEN: tl.constexpr, EVICT: tl.constexpr):
    """A tile of stored codes or of x, `offset` columns on; 0 beyond the last row and column.

    matrix: pointers, whether a row is there, where vectors of columns start, and the number of
    columns, whole vectors. EVEN: all rows are there.
    """
    pointers, inside, vector, limit = matrix
    mask = vector < limit - offset
    if not EVEN:
        mask = mask & inside
    return tl.load(pointers + offset, mask=mask, other=0.0, eviction_policy=EVICT)


@triton.jit
def load_scales(matrix, offset, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """Scales or zeros of a tile, a multiple of BLOCK_K on, as `load_tile`."""
    pointers, inside, k, limit, stride_group = matrix
    if BLOCK_K % GROUP == 0:
        pointers += (k // GROUP).to(tl.int64) * stride_group
        pointers += tl.cast(offset // GROUP, tl.int64) * stride_group
    else:
        pointers += ((k + offset) // GROUP).to(tl.int64) * stride_group
    mask = k < limit - offset
    if not EVEN:
        mask = mask & inside
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_tiles(
    matrices,
    groups,
    t,
    BLOCK_K: tl.constexpr,
    STORED_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Tile t of each matrix, and of what its groups have."""
    loaded = ()
    for i in tl.static_range(len(matrices)):
        loaded += (load_tile(matrices[i], t * STORED_K, EVEN, "evict_first"),)
    for i in tl.static_range(len(groups)):
        loaded += (load_scales(groups[i], t * BLOCK_K, GROUP, BLOCK_K, EVEN),)
    return loaded


@triton.jit
def quantized_linear_kernel(
    x_ptr,
    add_ptr,
    add2_ptr,
    out_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    b_ptr,
    gate_w_ptr,
    gate_scale_ptr,
    gate_zero_ptr,
    gate_b_ptr,
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
    ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out = act(x · Wᵀ + b) [gated] + add + add2 + add_bias of a QuantizedWeight, M <= ROWS rows.

    x: (M, K); add, add2: (M, N), by row strides; biases: (N,); out: (M, N), contiguous.
    W: codes in int32 words of 8 or 4, (N, K / that), by row strides in vectors of 16 bytes; scales,
    zeros: (N, groups), by strides stride_sn and stride_sg. GROUP: values of a row that
    share one. SCALES says what these multiply: "result" (one for a row), "sums" of parts of groups,
    as far as they are in a tile's slice, or "weights".

    A program computes BLOCK_N outputs. SLICES of its WARPS (all there are) multiply each a part of
    every BLOCK_K of K, chunks of SPAN values: 16 bytes of codes in each of 4 threads. The others
    do so for other outputs, with the same values of x. As in `stream_linear_kernel` nothing moves
    between threads, since a sum over K may be taken in any order. W is the left operand here, so
    that a thread's codes and its sums are of the same outputs, as is the scale that it loads.
    STAGES tiles are on their way.

    SPLITS > 1: as many programs share each block, and out is (SPLITS, M, N), gated twice that, in
    float32 as in `tiled_linear_kernel`. PDL, EARLY: as in `stream`. EVEN: N is whole blocks.
    """
    HIGH: tl.constexpr = BLOCK_N * SLICES // (8 * WARPS)
    COLUMNS: tl.constexpr = max(ROWS, 8)
    CHUNKS: tl.constexpr = BLOCK_K // (SLICES * SPAN)
    # In a word.
    CODES: tl.constexpr = 8 if FORMAT == "int4" else 4
    STORED_K: tl.constexpr = BLOCK_K // CODES
    GATED: tl.constexpr = gate_w_ptr is not None
    GROUPED: tl.constexpr = SCALES != "result"
    ZEROS: tl.constexpr = zero_ptr is not None
    INT4_SUMS: tl.constexpr = FORMAT == "int4" and SCALES == "sums"
    MATRICES: tl.constexpr = 2 if GATED else 1
    pid = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    tiles = tl.cdiv(K, BLOCK_K * SPLITS)
    first_k = split * tiles * BLOCK_K
    left = tl.minimum(K - first_k, tiles * BLOCK_K)
    stored = left // CODES
    row, column = code_indices(HIGH, CHUNKS, WARPS, SLICES, SPAN // CODES)
    row += pid * BLOCK_N
    vector = column // 4 * 4
    inside = row < N
    pointers = w_ptr + (first_k // CODES) + row.to(tl.int64) * (stride_wn * 4) + column
    matrices = ((pointers, inside, vector, stored),)
    if GATED:
        pointers = gate_w_ptr + (first_k // CODES) + row.to(tl.int64) * (stride_gn * 4) + column
        matrices += ((pointers, inside, vector, stored),)
    # Sums are of whole slices, weights of threads.
    SCALED: tl.constexpr = CHUNKS if SCALES == "weights" else 1
    row_s, k_s = code_indices(HIGH, SCALED, WARPS, SLICES, 4)
    row_s = tl.trans(row_s) + pid * BLOCK_N
    k_s = tl.trans(k_s)
    if SCALES == "sums":
        k_s = k_s // 4 * 4
    k_s = k_s * (BLOCK_K // (SLICES * SCALED * 4)) + first_k
    place = row_s.to(tl.int64) * stride_sn
    last_k = first_k + left
    groups = ()
    if GROUPED:
        groups += ((scale_ptr + place, row_s < N, k_s, last_k, stride_sg),)
        if GATED:
            groups += ((gate_scale_ptr + place, row_s < N, k_s, last_k, stride_sg),)
        if ZEROS:
            groups += ((zero_ptr + place, row_s < N, k_s, last_k, stride_sg),)
            if GATED:
                groups += ((gate_zero_ptr + place, row_s < N, k_s, last_k, stride_sg),)
    row_x, k_x, vector_x = row_indices(ROWS, CHUNKS, WARPS, SLICES, SPAN)
    row_x = tl.minimum(row_x, M - 1)
    inputs = (x_ptr + first_k + row_x.to(tl.int64) * stride_x + k_x, row_x < M, vector_x, left)
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
            gdc_wait()
    loaded = ()
    for i in tl.static_range(STAGES):
        loaded += (load_tiles(matrices, groups, i, BLOCK_K, STORED_K, GROUP, EVEN),)
    offs = (pid * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    b = load_vector(b_ptr, offs, offs < N)
    gate_b = load_vector(gate_b_ptr, offs, offs < N)
    if PDL and EARLY:
        gdc_wait()
    if PDL and not EARLY:
        gdc_launch_dependents()

    acc = tl.zeros((WARPS, HIGH * 8, COLUMNS), tl.float32)
    gate_acc = acc
    for first in range(0, tiles, STAGES):
        following = ()
        x = ()
        for i in tl.static_range(STAGES):
            # It comes from the L2: what other warps do meanwhile hides that.
            x += (load_tile(inputs, (first + i) * BLOCK_K, True, ""),)
        for i in tl.static_range(STAGES):
            tile = int4_factors(x[i]) if INT4_SUMS else x[i]
            fragment = as_fragment(tile, ROWS, CHUNKS, WARPS, SPAN)
            of_groups = loaded[i][MATRICES:]
            acc, x_sums = multiply_tile(
                loaded[i][0],
                of_groups[0::MATRICES],
                fragment,
                (),
                acc,
                FORMAT,
                SCALES,
                HIGH,
                CHUNKS,
                WARPS,
                SPAN,
            )
            if GATED:
                gate_acc, x_sums = multiply_tile(
                    loaded[i][1],
                    of_groups[1::MATRICES],
                    fragment,
                    x_sums,
                    gate_acc,
                    FORMAT,
                    SCALES,
                    HIGH,
                    CHUNKS,
                    WARPS,
                    SPAN,
                )
            t = first + STAGES + i
            following += (load_tiles(matrices, groups, t, BLOCK_K, STORED_K, GROUP, EVEN),)
        loaded = following

    if INT4_SUMS and x_ptr.dtype.element_ty.is_fp16():
        acc *= 1.0 / INT4_UNIT
        gate_acc *= 1.0 / INT4_UNIT
    y = sum_columns(acc, ROWS, SLICES)
    gate = gate_b
    if GATED:
        gate += sum_columns(gate_acc, ROWS, SLICES) * row_scales(gate_scale_ptr, offs, N, GROUPED)
    y = y * row_scales(scale_ptr, offs, N, GROUPED) + b
    mask = mask_m & (offs < N)
    if SPLITS > 1:
        size = tl.cast(M, tl.int64) * N
        parts = out_ptr + split * size + rows * N + offs
        tl.store(parts, y, mask=mask)
        if GATED:
            tl.store(parts + SPLITS * size, gate, mask=mask)
    else:
        if add_ptr is not None:
            add_ptr += rows * stride_add
        if add2_ptr is not None:
            add2_ptr += rows * stride_add2
        summand = load_summands(add_ptr, add2_ptr, add_bias_ptr, offs, offs < N)
        finish(y, gate, summand, out_ptr + rows * N, offs, mask, GATED, ACTIVATION)
