"""Linear layers of quantized weights for one row, which stays in registers: codes stream through
registers once, where they become 16-bit values, to the matrix units."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED
from hf_triton_mlp.kernels.dequantize import INT4_UNIT, int4_factors
from hf_triton_mlp.kernels.norm import add_pairs, apply_affine, load_affine, load_sum, normalize
from hf_triton_mlp.kernels.prefetch import prefetch_vector
from hf_triton_mlp.kernels.quantized import (
    as_fragment,
    as_matrix,
    multiply,
    multiply_tile,
    spread_sums,
    sum_rows,
    weight_values,
)
from hf_triton_mlp.kernels.skinny import finish
from hf_triton_mlp.kernels.widen import apart, load_apart


@triton.jit
def load_outputs(ptr, offs, N):
    """A vector of N at `offs` by `load_apart`; zeros where there is no pointer."""
    if ptr is None:
        return tl.zeros(offs.shape, tl.float32)
    else:
        return load_apart(ptr + offs, offs < N)


@triton.jit
def load_codes(
    ptr,
    first_n,
    N,
    STRIDE: tl.constexpr,
    STORED_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Codes of BLOCK_N rows from `first_n` on, int32: TILES times (BLOCK_N * WARPS * 8, WIDTH).

    Of each row a warp has 8 slices at a time, one after the other; of each slice 4 threads have 16
    bytes, WIDTH words together. STRIDE: of rows, in vectors of 16 bytes; STORED_K: words of a row.
    """
    i = tl.arange(0, BLOCK_N * WARPS * 8)[:, None]
    n = i // (WARPS * 8)
    first = i % (WARPS * 8) * WIDTH
    j = tl.arange(0, WIDTH)[None, :]
    # Of a block 32 bits are enough, and they stay the same.
    first_n = tl.cast(first_n, tl.int64)
    ptr += first_n * (STRIDE * 4)
    places = n * (STRIDE * 4) + first + j
    tiles = ()
    for t in tl.static_range(TILES):
        place = t * (WARPS * 8 * WIDTH)
        if EVEN:
            words = tl.load(ptr + places + place, eviction_policy="evict_first")
        else:
            mask = (n < N - first_n) & (first + j // 4 * 4 < STORED_K - place)
            words = tl.load(ptr + places + place, mask=mask, other=0, eviction_policy="evict_first")
        tiles += (words,)
    return tiles


@triton.jit
def load_groups(
    ptr,
    first_n,
    N,
    K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_G: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Scales or zeros for `load_codes`'s, TILES times (BLOCK_N * WARPS * 8, 4), by `load_apart`.

    Each of a slice's four threads has that of the slice, or of its own codes. None without a
    pointer, or where scales are of whole rows.
    """
    i = tl.arange(0, BLOCK_N * WARPS * 8)[:, None]
    thread = tl.arange(0, 4)[None, :]
    n = i // (WARPS * 8)
    k = i % (WARPS * 8) * SPAN + thread * (SPAN // 4 if SCALES == "weights" else 0)
    first_n = tl.cast(first_n, tl.int64)
    PART: tl.constexpr = WARPS * 8 * SPAN
    tiles = ()
    if ptr is not None and SCALES != "result":
        ptr += first_n * STRIDE_N
        for t in tl.static_range(TILES):
            if PART % GROUP == 0:
                group = k // GROUP + t * (PART // GROUP)
            else:
                group = (k + t * PART) // GROUP
            mask = i >= 0
            if not EVEN:
                mask = (n < N - first_n) & (k < K - t * PART)
            tiles += (load_apart(ptr + n * STRIDE_N + group * STRIDE_G, mask),)
    return tiles


@triton.jit
def load_matrix(
    w_ptr,
    scale_ptr,
    zero_ptr,
    first_n,
    N,
    K: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_SN: tl.constexpr,
    STRIDE_SG: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Codes, scales and zeros of a block of W; empty without a pointer."""
    block = ()
    if w_ptr is not None:
        block += (
            load_codes(
                w_ptr, first_n, N, STRIDE_WN, K * WIDTH // SPAN, WIDTH, BLOCK_N, TILES, WARPS, EVEN
            ),
            load_groups(
                scale_ptr, first_n, N, K, STRIDE_SN, STRIDE_SG, GROUP, SCALES, SPAN, BLOCK_N, TILES,
                WARPS, EVEN,
            ),
            load_groups(
                zero_ptr, first_n, N, K, STRIDE_SN, STRIDE_SG, GROUP, SCALES, SPAN, BLOCK_N, TILES,
                WARPS, EVEN,
            ),
        )  # fmt: skip
    return block


@triton.jit
def own_columns(sums):
    """Of sums (warps, rows, 8) those of each row's own column, row % 8: (warps, rows, 4).

    They are in the thread of four that has the column; in others there is something else.
    """
    even, odd = tl.split(tl.reshape(sums, (sums.shape[0], sums.shape[1], 4, 2)))
    row = tl.arange(0, sums.shape[1])[None, :, None]
    return tl.where(row % 2 == 0, even, odd)


@triton.jit
def for_rows(values, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """What `load_groups` has loaded, in float32, (BLOCK_N * WARPS * 8, 4), for `own_columns`'s."""
    values = tl.permute(tl.reshape(values, (BLOCK_N, WARPS, 8, 4)), (1, 0, 2, 3))
    return tl.reshape(values, (WARPS, BLOCK_N * 8, 4))


@triton.jit
def multiply_block(
    block,
    x,
    x_sums,
    TYPES: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Each warp's sums of W · x, (WARPS,) for each row of `load_matrix`; scales of whole rows are
    not in them.

    x: by `as_fragment`, with slices for rows; x_sums: `sum_rows`'s of each, if it is of
    `int4_factors`, their own columns, times 8 if there are no zeros to multiply them.
    A product of the matrix units has the 8 slices of two rows of W and, as columns, those of x:
    what a slice gives with its own column is used. TYPES: of scales and zeros.
    """
    # The interpreter adds and multiplies the raw integers of bfloat16 too.
    DTYPE: tl.constexpr = tl.float32 if INTERPRETED and x[0].dtype == tl.bfloat16 else x[0].dtype
    codes, scales, zeros = block
    shape: tl.constexpr = (WARPS, BLOCK_N * 8, 8)
    products = tl.zeros(shape, tl.float32)
    acc = tl.zeros((WARPS, BLOCK_N * 8, 4), tl.float32)
    for t in tl.static_range(len(codes)):
        if SCALES == "sums":
            values = weight_values(codes[t], FORMAT, DTYPE, SPAN, FORMAT != "int4")
            w = as_matrix(values, BLOCK_N, 1, WARPS, SPAN)
            part = own_columns(multiply(w, x[t], tl.zeros(shape, tl.float32)))
            if FORMAT == "int4":
                if not DTYPE.is_fp16():
                    part -= spread_sums(x_sums[t][0], BLOCK_N * 8)
                minus = spread_sums(x_sums[t][1], BLOCK_N * 8)
                if len(zeros) > 0:
                    minus *= for_rows(apart(zeros[t], TYPES[1]), BLOCK_N, WARPS)
                part -= minus
            acc += part * for_rows(apart(scales[t], TYPES[0]), BLOCK_N, WARPS)
        else:
            groups = ()
            if SCALES == "weights":
                groups += (tl.trans(apart(scales[t], TYPES[0])),)
                if len(zeros) > 0:
                    groups += (tl.trans(apart(zeros[t], TYPES[1])),)
            products, _ = multiply_tile(
                codes[t], groups, x[t], (), products, FORMAT, SCALES, BLOCK_N, 1, WARPS, SPAN
            )
    if SCALES != "sums":
        acc = own_columns(products)
    row = tl.arange(0, BLOCK_N * 8)[None, :, None]
    acc = tl.where(tl.arange(0, 4)[None, None, :] == row % 8 // 2, acc, 0.0)
    acc = tl.reshape(acc, (WARPS, BLOCK_N, 8, 4))
    return split_rows(tl.trans(tl.sum(tl.sum(acc, axis=3), axis=2)))


@triton.jit
def split_rows(values):
    """values (n, WARPS) as so many tensors (WARPS,)."""
    if values.shape[0] == 1:
        return (tl.reshape(values, (values.shape[1],)),)
    else:
        parts = tl.reshape(values, (2, values.shape[0] // 2, values.shape[1]))
        first, second = tl.split(tl.permute(parts, (1, 2, 0)))
        return split_rows(first) + split_rows(second)


@triton.jit
def keep_sums(kept, sums, block):
    """kept (parts, WARPS, 32) with `multiply_block`'s sums as those of a program's block.

    An output is of a part and a lane, so that a lane keeps few of those that all lanes of a warp
    have; sums of warps are added up once, in the end.
    """
    ROWS: tl.constexpr = len(sums)
    lane = tl.arange(0, 32)[None, None, :]
    values = tl.zeros((1, kept.shape[1], 32), tl.float32)
    for i in tl.static_range(ROWS):
        values = tl.where(lane % ROWS == i, sums[i][None, :, None], values)
    output = tl.arange(0, kept.shape[0])[:, None, None] * 32 + lane
    return tl.where(output // ROWS == block, values, kept)


@triton.jit
def statistics_of_tiles(tiles, masks, first, K, eps, NORM: tl.constexpr, AT_ONCE: tl.constexpr):
    """`statistics_of_values`, or `_at_once`, of a row in tiles (n, 32): (1, 1) each."""
    total = tl.zeros(tiles[0].shape, tl.float32)
    squares = total
    if AT_ONCE:
        for i in tl.static_range(len(tiles)):
            d = tl.where(masks[i], tiles[i] - first, 0.0)
            total += d
            squares += d * d
        both = tl.sum(total, axis=1, keep_dims=True), tl.sum(squares, axis=1, keep_dims=True)
        total, squares = tl.reduce(both, 0, add_pairs, keep_dims=True)
        shifted = total / K
        variance = tl.maximum(squares / K - shifted * shifted, 0.0)
        return first + shifted, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    else:
        if NORM == "layer_norm":
            for i in tl.static_range(len(tiles)):
                total += tiles[i]
        mean = tl.sum(tl.sum(total, axis=1, keep_dims=True), axis=0, keep_dims=True) / K
        for i in tl.static_range(len(tiles)):
            centred = tl.where(masks[i], tiles[i] - mean, 0.0)
            squares += centred * centred
        squares = tl.sum(tl.sum(squares, axis=1, keep_dims=True), axis=0, keep_dims=True)
        return mean, tl.div_rn(1.0, tl.sqrt_rn(squares / K + eps))


@triton.jit
def quantized_row_kernel(
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
    N,
    eps,
    K: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_GN: tl.constexpr,
    STRIDE_SN: tl.constexpr,
    STRIDE_SG: tl.constexpr,
    NORM: tl.constexpr,
    CARRY_NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    EVEN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WARPS: tl.constexpr,
    CARRY_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What `skinny_linear_kernel` computes, of a QuantizedWeight, for one row.

    W: codes (N, K) in int32 words, by a row stride in vectors of 16 bytes; scales, zeros:
    (N, groups), by their strides. GROUP: values of a row that share one. SCALES, SPAN: as in
    `quantized_linear_kernel`, for slices of SPAN values.

    The row is in registers as a whole, rounded to 16 bits after the norm as PyTorch's is: TILES
    times 8 slices for each of all WARPS, and each thread has the values that its codes are
    multiplied by. PROGRAMS share the blocks of BLOCK_N outputs; STAGES blocks of each are on their
    way, and it has up to OUTPUTS outputs, a multiple of 32. Warps wait for each other only in the
    end, when their sums are added up. EVEN: N is whole blocks, and K whole tiles. PDL, EARLY: as in
    `skinny_linear_kernel`, without lines.
    """
    WIDTH: tl.constexpr = SPAN // 8 if FORMAT == "int4" else SPAN // 4
    PART: tl.constexpr = WARPS * 8 * SPAN
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    VALUES: tl.constexpr = tl.float32 if INTERPRETED and DTYPE.is_bf16() else DTYPE
    INT4_SUMS: tl.constexpr = FORMAT == "int4" and SCALES == "sums"
    GROUPED: tl.constexpr = SCALES != "result"
    GATED: tl.constexpr = gate_w_ptr is not None
    TYPES: tl.constexpr = (
        scale_ptr.dtype.element_ty,
        zero_ptr.dtype.element_ty if zero_ptr is not None else tl.float32,
        b_ptr.dtype.element_ty if b_ptr is not None else tl.float32,
        add_ptr.dtype.element_ty if add_ptr is not None else tl.float32,
        add2_ptr.dtype.element_ty if add2_ptr is not None else tl.float32,
        add_bias_ptr.dtype.element_ty if add_bias_ptr is not None else tl.float32,
    )
    # As in `skinny_linear_kernel`: the norm's weights wait in registers. Longer rows' would spill.
    SHORT: tl.constexpr = TILES * PART <= 2048
    pid = tl.program_id(0)
    # Where the row's values are as `as_fragment` wants them, with slices for rows.
    i = tl.arange(0, SPAN // 32 * WARPS * 8)[:, None]
    j = tl.arange(0, 32)[None, :]
    vector = i % (WARPS * 8) * SPAN + i // (WARPS * 8) * 8 + j // 8 * (SPAN // 4)
    in_row = vector + j % 8

    if PDL:
        if EARLY:
            # The next kernel may load its weights too.
            gdc_launch_dependents()
        else:
            prefetch_vector(b_ptr, pid * BLOCK_N, N, BLOCK_N)
        if NORM is not None and not (EARLY and SHORT):
            # Every program reads all of these: one asks for them.
            if pid == 0:
                prefetch_vector(norm_w_ptr, 0, K, TILES * PART)
                prefetch_vector(norm_b_ptr, 0, K, TILES * PART)
        if not EARLY:
            gdc_wait()
    loaded = ()
    gate_loaded = ()
    for s in tl.static_range(STAGES):
        first_n = (pid + s * PROGRAMS) * BLOCK_N
        loaded += (
            load_matrix(
                w_ptr, scale_ptr, zero_ptr, first_n, N, K, STRIDE_WN, STRIDE_SN, STRIDE_SG,
                GROUP, SCALES, SPAN, WIDTH, BLOCK_N, TILES, WARPS, EVEN and s == 0,
            ),
        )  # fmt: skip
        gate_loaded += (
            load_matrix(
                gate_w_ptr, gate_scale_ptr, gate_zero_ptr, first_n, N, K, STRIDE_GN, STRIDE_SN,
                STRIDE_SG, GROUP, SCALES, SPAN, WIDTH, BLOCK_N, TILES, WARPS, EVEN and s == 0,
            ),
        )  # fmt: skip
    # Of each block that this program computes.
    output = tl.arange(0, OUTPUTS)
    offs = (pid + output // BLOCK_N * PROGRAMS) * BLOCK_N + output % BLOCK_N
    b = load_outputs(b_ptr, offs, N)
    gate_b = load_outputs(gate_b_ptr, offs, N)
    row_scale = load_outputs(None if GROUPED else scale_ptr, offs, N)
    gate_row_scale = load_outputs(None if GROUPED else gate_scale_ptr, offs, N)
    affine = ()
    if SHORT and NORM is not None:
        for t in tl.static_range(TILES):
            mask = vector < K - t * PART
            affine += (load_affine(norm_w_ptr, norm_b_ptr, in_row + t * PART, mask, NORM),)
    if PDL:
        if EARLY:
            gdc_wait()
        else:
            gdc_launch_dependents()

    # What the epilogue adds is asked for now, so that it is there in time.
    add = load_outputs(add_ptr if NORM is None else None, offs, N)
    add2 = load_outputs(add2_ptr if NORM is None else None, offs, N)
    add_bias = load_outputs(add_bias_ptr if NORM is None else None, offs, N)

    tiles = ()
    masks = ()
    for t in tl.static_range(TILES):
        mask = vector < K - t * PART
        if NORM is None:
            tiles += (tl.load(x_ptr + in_row + t * PART, mask=mask, other=0.0),)
        else:
            tiles += (load_sum(x_ptr, add_ptr, add_bias_ptr, in_row + t * PART, mask),)
        masks += (mask,)
    if NORM is not None:
        # Every program writes a few columns of the carry; CARRY_BLOCK is K over programs.
        offs_carry = (pid * CARRY_BLOCK + tl.arange(0, CARRY_BLOCK))[None, :]
        mask_carry = offs_carry < K
        carry = load_sum(x_ptr, add_ptr, add_bias_ptr, offs_carry, mask_carry)
        AT_ONCE: tl.constexpr = SHORT and NORM == "layer_norm"
        first = tl.zeros((1, 1), tl.float32)
        if AT_ONCE:
            begin = tl.zeros((1, 1), tl.int32)
            first = load_sum(x_ptr, add_ptr, add_bias_ptr, begin, begin < K)
        mean, rstd = statistics_of_tiles(tiles, masks, first, K, eps, NORM, AT_ONCE)
        normed = ()
        for t in tl.static_range(TILES):
            if not SHORT:
                affine += (load_affine(norm_w_ptr, norm_b_ptr, in_row + t * PART, masks[t], NORM),)
            u = apply_affine((tiles[t] - mean) * rstd, affine[t][0], affine[t][1], NORM)
            normed += (tl.where(masks[t], u, 0.0).to(DTYPE),)
        tiles = normed
        if CARRY_NORMED:
            carry = normalize(
                carry, mean, rstd, norm_w_ptr, norm_b_ptr, offs_carry, mask_carry, NORM
            )
        tl.store(carry_ptr + offs_carry, carry.to(carry_ptr.dtype.element_ty), mask=mask_carry)
    x = ()
    x_sums = ()
    for t in tl.static_range(TILES):
        tile = int4_factors(tiles[t]) if INT4_SUMS else tiles[t]
        fragment = as_fragment(tile, 8, 1, WARPS, SPAN)
        x += (fragment,)
        if INT4_SUMS:
            of_zeros, of_ones = sum_rows(fragment, VALUES, 1, WARPS, SPAN)
            if zero_ptr is None:
                of_ones *= 8.0
            x_sums += ((own_columns(of_zeros), own_columns(of_ones)),)

    kept = tl.zeros((OUTPUTS // 32, WARPS, 32), tl.float32)
    gate_kept = kept
    for block in range(pid, tl.cdiv(N, BLOCK_N), STAGES * PROGRAMS):
        following = ()
        gate_following = ()
        for s in tl.static_range(STAGES):
            place = block // PROGRAMS + s
            now = loaded[s]
            gate_now = gate_loaded[s]
            sums = multiply_block(now, x, x_sums, TYPES, FORMAT, SCALES, SPAN, BLOCK_N, WARPS)
            kept = keep_sums(kept, sums, place)
            if GATED:
                sums = multiply_block(
                    gate_now, x, x_sums, TYPES, FORMAT, SCALES, SPAN, BLOCK_N, WARPS
                )
                gate_kept = keep_sums(gate_kept, sums, place)
            # The next weights are on their way while others are multiplied.
            next_n = (block + (STAGES + s) * PROGRAMS) * BLOCK_N
            if next_n < N:
                now = load_matrix(
                    w_ptr, scale_ptr, zero_ptr, next_n, N, K, STRIDE_WN, STRIDE_SN, STRIDE_SG,
                    GROUP, SCALES, SPAN, WIDTH, BLOCK_N, TILES, WARPS, EVEN,
                )  # fmt: skip
                gate_now = load_matrix(
                    gate_w_ptr, gate_scale_ptr, gate_zero_ptr, next_n, N, K, STRIDE_GN, STRIDE_SN,
                    STRIDE_SG, GROUP, SCALES, SPAN, WIDTH, BLOCK_N, TILES, WARPS, EVEN,
                )  # fmt: skip
            following += (now,)
            gate_following += (gate_now,)
        loaded = following
        gate_loaded = gate_following

    y = tl.reshape(tl.sum(kept, axis=1), (OUTPUTS,))
    gate = tl.reshape(tl.sum(gate_kept, axis=1), (OUTPUTS,))
    if INT4_SUMS and DTYPE.is_fp16():
        y *= 1.0 / INT4_UNIT
        gate *= 1.0 / INT4_UNIT
    if not GROUPED:
        y *= apart(row_scale, TYPES[0])
        gate *= apart(gate_row_scale, TYPES[0])
    gate += apart(gate_b, TYPES[2])
    y += apart(b, TYPES[2])
    summand = apart(add, TYPES[3]) + apart(add2, TYPES[4]) + apart(add_bias, TYPES[5])
    finish(y, gate, summand, out_ptr, offs, offs < N, GATED, ACTIVATION)
