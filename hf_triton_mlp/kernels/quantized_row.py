"""Linear layers of quantized weights for one row: codes stream through registers once, where they
are the digits of float32 numbers; products by FMA."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.norm import add_pairs, apply_affine, load_affine, load_sum, normalize
from hf_triton_mlp.kernels.prefetch import prefetch_vector
from hf_triton_mlp.kernels.skinny import finish
from hf_triton_mlp.kernels.widen import apart, load_apart, widen

#: Digits below a float32's exponent are a subnormal number, 2**-149 times what they are as an
#: integer, and an FMA takes it as fast as any other. So one AND makes a float of a code. To keep
#: its products from being subnormal too, x is 2**90 times as large, less what the code's place is
#: worth (up to 2**37 it stays finite); what is left, 2**-59, the sums of a row are divided by.
PLACE_0 = tl.constexpr(2.0**90)
#: E4m3's exponent and digits where float32 has them mean 2**-120 times these.
FP8_UNIT = tl.constexpr(2.0**61)
SUM_UNIT = tl.constexpr(2.0**-59)
TO_RESULT = tl.constexpr(2.0**59)


@triton.jit
def code_value(words, i: tl.constexpr, FORMAT: tl.constexpr):
    """Code i of int32 words as float32: times 2**-149 and its place, or 2**-120 for fp8.

    Int4's are 0 to 15; int8's are 128 more than they were, 0 to 255.
    """
    if FORMAT == "int4":
        BIT: tl.constexpr = i // 2 * 4 + i % 2 * 16
        bits = (words >> 12) & (15 << (BIT - 12)) if BIT > 16 else words & (15 << BIT)
    elif FORMAT == "int8":
        HALF: tl.constexpr = i // 2 * 16
        bits = ((words >> HALF) & (255 << i % 2 * 8)) ^ (128 << i % 2 * 8)
    else:
        # The arithmetic shift copies the sign to where float32 has the rest of its exponent.
        bits = ((words << (24 - 8 * i)) >> 4) & -0x78100000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unit_of(i: tl.constexpr, FORMAT: tl.constexpr):
    """What x is multiplied by for code i of a word."""
    if FORMAT == "int4":
        BIT: tl.constexpr = i // 2 * 4 + i % 2 * 16
        return PLACE_0 / (1 << (BIT - 12 if BIT > 16 else BIT))
    elif FORMAT == "int8":
        return PLACE_0 / (1 << i % 2 * 8)
    else:
        return FP8_UNIT


@triton.jit
def split_last(values):
    """values (n, 4) or (n, 8) as so many tensors (n,)."""
    if values.shape[1] == 4:
        even, odd = tl.split(tl.reshape(values, (values.shape[0], 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d
    else:
        even, odd = tl.split(tl.reshape(values, (values.shape[0], 4, 2)))
        a, c, e, g = split_last(even)
        b, d, f, h = split_last(odd)
        return a, b, c, d, e, f, g, h


@triton.jit
def load_outputs(ptr, offs, N):
    """A vector of N at `offs` by `load_apart`; zeros where there is no pointer."""
    if ptr is None:
        return tl.zeros(offs.shape, tl.float32)
    else:
        return load_apart(ptr + offs, offs < N)


@triton.jit
def load_block(
    w_ptr,
    scale_ptr,
    zero_ptr,
    first_n,
    N,
    K,
    stride_wn,
    stride_sn,
    stride_sg,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Words (BLOCK_N * CHUNKS, 4), and by `load_apart` scales and zeros of each four where groups
    have them.

    One axis for rows and chunks, since of two Triton may deal either to the threads first. Nobody
    looks at words beyond the last row, and those beyond the last chunk meet zeros of x.
    """
    i = tl.arange(0, BLOCK_N * CHUNKS)
    n = i // CHUNKS
    c = i % CHUNKS
    # Of a block 32 bits are enough, and they stay the same.
    first_n = tl.cast(first_n, tl.int64)
    w_ptr += first_n * (stride_wn * 4)
    places = (n * (stride_wn * 4) + c * 4)[:, None] + tl.arange(0, 4)[None, :]
    mask = i >= 0
    if not EVEN:
        mask = mask & (n < N - first_n)
    if not WHOLE:
        mask = mask & (c < K // CHUNK)
    if WHOLE and EVEN:
        words = tl.load(w_ptr + places, eviction_policy="evict_first")
    else:
        words = tl.load(w_ptr + places, mask=mask[:, None], eviction_policy="evict_first")
    scales = tl.zeros((1,), tl.float32)
    zeros = scales
    if GROUP > 0:
        places = n * stride_sn + c * CHUNK // GROUP * stride_sg
        scales = load_apart(scale_ptr + first_n * stride_sn + places, mask)
        if zero_ptr is not None:
            zeros = load_apart(zero_ptr + first_n * stride_sn + places, mask)
    return words, scales, zeros


@triton.jit
def load_blocks(
    w_ptr,
    scale_ptr,
    zero_ptr,
    gate_w_ptr,
    gate_scale_ptr,
    gate_zero_ptr,
    first_n,
    N,
    K,
    stride_wn,
    stride_gn,
    stride_sn,
    stride_sg,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`load_block` of W, and of the gate if there is one."""
    blocks = (
        load_block(
            w_ptr, scale_ptr, zero_ptr, first_n, N, K, stride_wn, stride_sn, stride_sg,
            CHUNK, GROUP, BLOCK_N, CHUNKS, WHOLE, EVEN,
        ),
    )  # fmt: skip
    if gate_w_ptr is not None:
        blocks += (
            load_block(
                gate_w_ptr, gate_scale_ptr, gate_zero_ptr, first_n, N, K, stride_gn, stride_sn,
                stride_sg, CHUNK, GROUP, BLOCK_N, CHUNKS, WHOLE, EVEN,
            ),
        )  # fmt: skip
    return blocks


@triton.jit
def row_products(
    block,
    x,
    x_sums,
    TYPES: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUPED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Each warp's sums of SUM_UNIT * W · x, (WARPS,) for each row of `load_block`; scales of whole
    rows are not in them yet.

    x: for each code of a chunk (1, CHUNKS), `unit_of` times as large; x_sums: SUM_UNIT times the
    sum of each chunk. TYPES: of scales and zeros.
    """
    words, scales, zeros = block
    words = split_last(words)
    CODES: tl.constexpr = len(x) // 4
    CHUNKS: tl.constexpr = x_sums.shape[1]
    shape: tl.constexpr = (words[0].shape[0] // CHUNKS, CHUNKS)
    if ASYMMETRIC:
        acc = x_sums * -tl.reshape(apart(zeros, TYPES[1]), shape)
    elif FORMAT == "fp8":
        acc = tl.zeros(shape, tl.float32)
    else:
        acc = tl.broadcast_to(x_sums * (-8.0 if FORMAT == "int4" else -128.0), shape)
    for j in tl.static_range(4):
        word = tl.reshape(words[j], shape)
        for i in tl.static_range(CODES):
            acc += code_value(word, i, FORMAT) * x[j * CODES + i]
    if GROUPED:
        acc *= tl.reshape(apart(scales, TYPES[0]), shape)
    # Threads have their chunks one after the other.
    LANES: tl.constexpr = min(CHUNKS // WARPS, 32)
    acc = tl.reshape(acc, (shape[0], CHUNKS // (WARPS * LANES), WARPS, LANES))
    return split_rows(tl.sum(tl.sum(acc, axis=1), axis=2))


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
def keep_sums(kept, sums, first):
    """kept (parts, WARPS, LANES) with `row_products`'s sums as outputs from number `first` on.

    An output is of a part and a lane, so that a lane keeps few of those that all lanes of a warp
    have; sums of warps are added up once, in the end.
    """
    PARTS: tl.constexpr = kept.shape[0]
    LANES: tl.constexpr = kept.shape[2]
    output = tl.arange(0, PARTS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    for i in tl.static_range(len(sums)):
        kept = tl.where(output == first + i, sums[i][None, :, None], kept)
    return kept


@triton.jit
def statistics_of_tiles(tiles, valid, first, K, eps, NORM: tl.constexpr, AT_ONCE: tl.constexpr):
    """`statistics_of_values`, or `_at_once`, of a row in tiles (CHUNKS, 8): (1, 1) each."""
    total = tl.zeros(tiles[0].shape, tl.float32)
    squares = total
    if AT_ONCE:
        for i in tl.static_range(len(tiles)):
            d = tl.where(valid, tiles[i] - first, 0.0)
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
            centred = tl.where(valid, tiles[i] - mean, 0.0)
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
    K,
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
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
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
    (N, groups), by strides stride_sn and stride_sg. GROUP: values of a row that share one, a
    multiple of CHUNK, the codes in 16 bytes; 0 for whole rows, whose scales multiply the results.

    BLOCK_K >= K: the row is in registers as a whole, in float32, and each thread has the values
    that its codes are multiplied by. WHOLE: they are equal. A program computes BLOCK_N outputs, or
    PROGRAMS > 0 share the blocks of W; STAGES of its blocks are on their way, and a program has up
    to OUTPUTS outputs. WARPS: all there are. They wait for each other only in the end, when their
    sums are added up: with a reduction of each block they took a quarter longer. PDL, EARLY: as in
    `skinny_linear_kernel`, without lines.
    """
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    TILES: tl.constexpr = CHUNK // 8
    CODES: tl.constexpr = CHUNK // 4
    GROUPED: tl.constexpr = GROUP > 0
    ASYMMETRIC: tl.constexpr = zero_ptr is not None
    gated: tl.constexpr = gate_w_ptr is not None
    TYPES: tl.constexpr = (
        scale_ptr.dtype.element_ty,
        zero_ptr.dtype.element_ty if ASYMMETRIC else tl.float32,
        b_ptr.dtype.element_ty if b_ptr is not None else tl.float32,
        add_ptr.dtype.element_ty if add_ptr is not None else tl.float32,
        add2_ptr.dtype.element_ty if add2_ptr is not None else tl.float32,
        add_bias_ptr.dtype.element_ty if add_bias_ptr is not None else tl.float32,
    )
    # As in `skinny_linear_kernel`: the norm's weights wait in registers, which long rows need.
    SHORT: tl.constexpr = BLOCK_K <= 2048
    # For a fourth program on the multiprocessor they come after the statistics: with a LayerNorm of
    # 4096 int8 has 122 registers then, and else spills; int4 has 123 unless two blocks are loaded.
    LATE: tl.constexpr = not SHORT and (FORMAT != "int4" or STAGES > 1)
    pid = tl.program_id(0)
    offs_c = tl.arange(0, CHUNKS)
    in_row = (offs_c * CHUNK)[:, None] + tl.arange(0, 8)[None, :]
    mask_k = (offs_c < (CHUNKS if WHOLE else K // CHUNK))[:, None]

    if PDL:
        if EARLY:
            # The next kernel may load its weights too.
            gdc_launch_dependents()
        else:
            prefetch_vector(b_ptr, pid * BLOCK_N, N, BLOCK_N)
        if NORM is not None and not (EARLY and SHORT):
            # Every program reads all of these: one asks for them.
            if pid == 0:
                prefetch_vector(norm_w_ptr, 0, K, BLOCK_K)
                prefetch_vector(norm_b_ptr, 0, K, BLOCK_K)
        if not EARLY:
            gdc_wait()
    loaded = ()
    for i in tl.static_range(STAGES):
        loaded += (
            load_blocks(
                w_ptr, scale_ptr, zero_ptr, gate_w_ptr, gate_scale_ptr, gate_zero_ptr,
                (pid + i * PROGRAMS) * BLOCK_N, N, K, stride_wn, stride_gn, stride_sn, stride_sg,
                CHUNK, GROUP, BLOCK_N, CHUNKS, WHOLE, EVEN and i == 0,
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
            affine += (load_affine(norm_w_ptr, norm_b_ptr, in_row + 8 * t, mask_k, NORM),)
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
    for t in tl.static_range(TILES):
        if NORM is None:
            tiles += (widen(tl.load(x_ptr + in_row + 8 * t, mask=mask_k, other=0.0)),)
        else:
            tiles += (load_sum(x_ptr, add_ptr, add_bias_ptr, in_row + 8 * t, mask_k),)
    if NORM is not None:
        # Every program writes a few columns of the carry; CARRY_BLOCK is K over programs.
        offs_carry = (pid * CARRY_BLOCK + tl.arange(0, CARRY_BLOCK))[None, :]
        mask_carry = offs_carry < K
        carry = load_sum(x_ptr, add_ptr, add_bias_ptr, offs_carry, mask_carry)
        if not SHORT and not LATE:
            for t in tl.static_range(TILES):
                affine += (load_affine(norm_w_ptr, norm_b_ptr, in_row + 8 * t, mask_k, NORM),)
        AT_ONCE: tl.constexpr = SHORT and NORM == "layer_norm"
        first = tl.zeros((1, 1), tl.float32)
        if AT_ONCE:
            begin = tl.zeros((1, 1), tl.int32)
            first = load_sum(x_ptr, add_ptr, add_bias_ptr, begin, begin < K)
        mean, rstd = statistics_of_tiles(tiles, mask_k, first, K, eps, NORM, AT_ONCE)
        normed = ()
        for t in tl.static_range(TILES):
            if LATE:
                affine += (load_affine(norm_w_ptr, norm_b_ptr, in_row + 8 * t, mask_k, NORM),)
            u = apply_affine((tiles[t] - mean) * rstd, affine[t][0], affine[t][1], NORM)
            normed += (u if WHOLE else tl.where(mask_k, u, 0.0),)
        tiles = normed
        if CARRY_NORMED:
            carry = normalize(
                carry, mean, rstd, norm_w_ptr, norm_b_ptr, offs_carry, mask_carry, NORM
            )
        tl.store(carry_ptr + offs_carry, carry.to(carry_ptr.dtype.element_ty), mask=mask_carry)
    x_sums = tl.zeros((1, CHUNKS), tl.float32)
    x = ()
    for t in tl.static_range(TILES):
        x_sums += tl.sum(tiles[t], axis=1)[None, :]
        parts = split_last(tiles[t])
        for i in tl.static_range(8):
            x += ((parts[i] * unit_of((8 * t + i) % CODES, FORMAT))[None, :],)
    x_sums *= SUM_UNIT

    blocks = tl.cdiv(N, BLOCK_N)
    LANES: tl.constexpr = min(OUTPUTS, 32)
    kept = tl.zeros((OUTPUTS // LANES, WARPS, LANES), tl.float32)
    gate_kept = kept
    for block in range(pid, blocks, STAGES * PROGRAMS if PROGRAMS > 0 else blocks):
        following = ()
        for i in tl.static_range(STAGES):
            place = 0 if PROGRAMS == 0 else (block // PROGRAMS + i) * BLOCK_N
            now = loaded[i]
            sums = row_products(now[0], x, x_sums, TYPES, FORMAT, GROUPED, ASYMMETRIC, WARPS)
            kept = keep_sums(kept, sums, place)
            if gated:
                sums = row_products(now[1], x, x_sums, TYPES, FORMAT, GROUPED, ASYMMETRIC, WARPS)
                gate_kept = keep_sums(gate_kept, sums, place)
            if PROGRAMS > 0:
                # The next weights are on their way while others are multiplied.
                next_n = (block + (STAGES + i) * PROGRAMS) * BLOCK_N
                if next_n < N:
                    now = load_blocks(
                        w_ptr, scale_ptr, zero_ptr, gate_w_ptr, gate_scale_ptr, gate_zero_ptr,
                        next_n, N, K, stride_wn, stride_gn, stride_sn, stride_sg,
                        CHUNK, GROUP, BLOCK_N, CHUNKS, WHOLE, EVEN,
                    )  # fmt: skip
                following += (now,)
        if PROGRAMS > 0:
            loaded = following

    y = tl.reshape(tl.sum(kept, axis=1), (OUTPUTS,)) * TO_RESULT
    gate = tl.reshape(tl.sum(gate_kept, axis=1), (OUTPUTS,)) * TO_RESULT
    if not GROUPED:
        y *= apart(row_scale, TYPES[0])
        gate *= apart(gate_row_scale, TYPES[0])
    gate += apart(gate_b, TYPES[2])
    y += apart(b, TYPES[2])
    summand = apart(add, TYPES[3]) + apart(add2, TYPES[4]) + apart(add_bias, TYPES[5])
    finish(y, gate, summand, out_ptr, offs, offs < N, gated, ACTIVATION)
