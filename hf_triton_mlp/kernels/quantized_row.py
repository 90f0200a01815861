"""Linear layers of quantized weights for one row: codes stream through registers once, where they
are the digits of float32 numbers; products by FMA."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.norm import add_pairs, apply_affine, load_affine, load_sum, normalize
from hf_triton_mlp.kernels.prefetch import prefetch_vector
from hf_triton_mlp.kernels.skinny import finish, load_summands, load_vector
from hf_triton_mlp.kernels.widen import widen

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
    """Words (BLOCK_N * CHUNKS, 4), and scales and zeros of each four where groups have them.

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
        scale_ptr += first_n * stride_sn
        if WHOLE and EVEN:
            scales = tl.load(scale_ptr + places)
        else:
            scales = tl.load(scale_ptr + places, mask=mask, other=0.0)
        if zero_ptr is not None:
            zero_ptr += first_n * stride_sn
            if WHOLE and EVEN:
                zeros = tl.load(zero_ptr + places)
            else:
                zeros = tl.load(zero_ptr + places, mask=mask, other=0.0)
    return words, scales, zeros


@triton.jit
def row_products(
    words,
    scales,
    zeros,
    x,
    x_sums,
    FORMAT: tl.constexpr,
    GROUPED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """Sums (1, BLOCK_N) of SUM_UNIT * W · x; without groups row scales are not in them yet.

    x: for each code of a chunk (1, CHUNKS), `unit_of` times as large; x_sums: SUM_UNIT times the
    sum of each chunk.
    """
    words = split_last(words)
    CODES: tl.constexpr = len(x) // 4
    CHUNKS: tl.constexpr = x_sums.shape[1]
    shape: tl.constexpr = (words[0].shape[0] // CHUNKS, CHUNKS)
    if ASYMMETRIC:
        acc = x_sums * -tl.reshape(zeros, shape).to(tl.float32)
    elif FORMAT == "fp8":
        acc = tl.zeros(shape, tl.float32)
    else:
        acc = tl.broadcast_to(x_sums * (-8.0 if FORMAT == "int4" else -128.0), shape)
    for j in tl.static_range(4):
        word = tl.reshape(words[j], shape)
        for i in tl.static_range(CODES):
            acc += code_value(word, i, FORMAT) * x[j * CODES + i]
    if GROUPED:
        acc *= tl.reshape(scales, shape).to(tl.float32)
    return tl.sum(acc, axis=1)[None, :]


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
    CARRY_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What `skinny_linear_kernel` computes, of a QuantizedWeight, for one row.

    W: codes (N, K) in int32 words, by a row stride in vectors of 16 bytes; scales, zeros:
    (N, groups), by strides stride_sn and stride_sg. GROUP: values of a row that share one, a
    multiple of CHUNK, the codes in 16 bytes; 0 for whole rows, whose scales multiply the results.

    BLOCK_K >= K: the row is in registers as a whole, in float32, and each thread has the values
    that its codes are multiplied by. WHOLE: they are equal. A program computes BLOCK_N outputs;
    PROGRAMS > 0 share the blocks of W. PDL, EARLY: as in `skinny_linear_kernel`, without lines.
    """
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    TILES: tl.constexpr = CHUNK // 8
    CODES: tl.constexpr = CHUNK // 4
    GROUPED: tl.constexpr = GROUP > 0
    ASYMMETRIC: tl.constexpr = zero_ptr is not None
    gated: tl.constexpr = gate_w_ptr is not None
    # As in `skinny_linear_kernel`: the norm's weights wait in registers, which long rows need.
    SHORT: tl.constexpr = BLOCK_K <= 2048
    # For a fourth program on the multiprocessor they come after the statistics: 119 registers for
    # int8 and a LayerNorm of 4096 instead of 142; int4 has 118 as it is.
    LATE: tl.constexpr = not SHORT and FORMAT != "int4"
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
    w, s, z = load_block(
        w_ptr, scale_ptr, zero_ptr, pid * BLOCK_N, N, K,
        stride_wn, stride_sn, stride_sg, CHUNK, GROUP, BLOCK_N, CHUNKS, WHOLE, EVEN,
    )  # fmt: skip
    if gated:
        gate_w, gate_s, gate_z = load_block(
            gate_w_ptr, gate_scale_ptr, gate_zero_ptr, pid * BLOCK_N, N, K,
            stride_gn, stride_sn, stride_sg, CHUNK, GROUP, BLOCK_N, CHUNKS, WHOLE, EVEN,
        )  # fmt: skip
    offs = (pid * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    b = load_vector(b_ptr, offs, offs < N)
    gate_b = load_vector(gate_b_ptr, offs, offs < N)
    if not GROUPED:
        row_scale = load_vector(scale_ptr, offs, offs < N)
        gate_row_scale = load_vector(gate_scale_ptr, offs, offs < N)
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
    summand = tl.zeros((1, BLOCK_N), tl.float32)
    if NORM is None:
        summand += load_summands(add_ptr, add2_ptr, add_bias_ptr, offs, offs < N)

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
        if LATE:
            for t in tl.static_range(TILES):
                affine += (load_affine(norm_w_ptr, norm_b_ptr, in_row + 8 * t, mask_k, NORM),)
        normed = ()
        for t in tl.static_range(TILES):
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
    for block in range(pid, blocks, PROGRAMS if PROGRAMS > 0 else blocks):
        offs = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        if PROGRAMS > 0:
            # The next weights are on their way while these are multiplied.
            next_n = block * BLOCK_N + PROGRAMS * BLOCK_N
            next_w, next_s, next_z = w, s, z
            if gated:
                next_gate_w, next_gate_s, next_gate_z = gate_w, gate_s, gate_z
            if next_n < N:
                next_w, next_s, next_z = load_block(
                    w_ptr, scale_ptr, zero_ptr, next_n, N, K,
                    stride_wn, stride_sn, stride_sg, CHUNK, GROUP, BLOCK_N, CHUNKS, WHOLE, EVEN,
                )  # fmt: skip
                if gated:
                    next_gate_w, next_gate_s, next_gate_z = load_block(
                        gate_w_ptr, gate_scale_ptr, gate_zero_ptr, next_n, N, K,
                        stride_gn, stride_sn, stride_sg, CHUNK, GROUP, BLOCK_N, CHUNKS, WHOLE, EVEN,
                    )  # fmt: skip
            next_offs = (next_n + tl.arange(0, BLOCK_N))[None, :]
            next_b = load_vector(b_ptr, next_offs, next_offs < N)
            next_gate_b = load_vector(gate_b_ptr, next_offs, next_offs < N)
            if not GROUPED:
                next_row_scale = load_vector(scale_ptr, next_offs, next_offs < N)
                next_gate_row_scale = load_vector(gate_scale_ptr, next_offs, next_offs < N)
        gate = gate_b
        if gated:
            gate_y = row_products(gate_w, gate_s, gate_z, x, x_sums, FORMAT, GROUPED, ASYMMETRIC)
            gate_y *= TO_RESULT
            gate += gate_y if GROUPED else gate_y * gate_row_scale
        y = row_products(w, s, z, x, x_sums, FORMAT, GROUPED, ASYMMETRIC) * TO_RESULT
        if not GROUPED:
            y *= row_scale
        finish(y + b, gate, summand, out_ptr, offs, offs < N, gated, ACTIVATION)
        if PROGRAMS > 0:
            w = next_w
            s = next_s
            z = next_z
            if gated:
                gate_w = next_gate_w
                gate_s = next_gate_s
                gate_z = next_gate_z
            b = next_b
            gate_b = next_gate_b
            if not GROUPED:
                row_scale = next_row_scale
                gate_row_scale = next_gate_row_scale
            if NORM is None:
                summand = load_summands(add_ptr, add2_ptr, add_bias_ptr, next_offs, next_offs < N)
