"""Tiles of quantized weights as values, for the matrix units or cuBLAS: every format and size."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED
from hf_triton_mlp.kernels.dequantize import exact_float, exact_values, wide_fp8
from hf_triton_mlp.kernels.tiled import load_activated, store_tile


@triton.jit
def nibbles(words, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    """Codes in bits SHIFT to SHIFT + 3 of int4 words, minus OFFSET."""
    return exact_float((words >> SHIFT) & 15, OFFSET)


@triton.jit
def load_stored(
    ptr,
    row,
    first_k,
    N,
    K,
    stride,
    FORMAT: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """What is stored of the codes of rows `row` (ROWS,) from first_k on: (ROWS, DEPTH), of int4 as
    many words as that takes. EVEN: all of these are there.
    """
    if FORMAT == "int4":
        k = first_k // 8 + tl.arange(0, DEPTH // 8)
        size = tl.cdiv(K, 8)
    else:
        k = first_k + tl.arange(0, DEPTH)
        size = K
    place = ptr + row.to(tl.int64)[:, None] * stride + k[None, :]
    if EVEN:
        return tl.load(place)
    else:
        return tl.load(place, mask=(row < N)[:, None] & (k < size)[None, :], other=0)


@triton.jit
def code_values(
    codes,
    FORMAT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Codes by `load_stored` in float32, (ROWS, DEPTH); int4's minus OFFSET."""
    if FORMAT == "int4":
        # Code 2i is bits 4i to 4i + 3, code 2i + 1 those 16 above.
        even = tl.join(
            tl.join(nibbles(codes, 0, OFFSET), nibbles(codes, 8, OFFSET)),
            tl.join(nibbles(codes, 4, OFFSET), nibbles(codes, 12, OFFSET)),
        )
        odd = tl.join(
            tl.join(nibbles(codes, 16, OFFSET), nibbles(codes, 24, OFFSET)),
            tl.join(nibbles(codes, 20, OFFSET), nibbles(codes, 28, OFFSET)),
        )
        return tl.reshape(tl.join(even, odd), (ROWS, DEPTH))
    elif FORMAT == "int8":
        return exact_float((codes.to(tl.int32) & 255) ^ 128, 128)
    else:
        return wide_fp8(codes)


@triton.jit
def load_groups(
    ptr,
    row,
    first_k,
    N,
    K,
    stride_n,
    stride_g,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Scales or zeros of `load_codes`'s codes, float32. GROUP: None for one a row.

    UNIT: a power of two that divides GROUP; DEPTH if there is none.
    """
    k = first_k + tl.arange(0, DEPTH // UNIT) * UNIT
    group = k * 0 if GROUP is None else k // GROUP
    place = ptr + row.to(tl.int64)[:, None] * stride_n + group.to(tl.int64)[None, :] * stride_g
    if EVEN:
        found = tl.load(place)
    else:
        found = tl.load(place, mask=(row < N)[:, None] & (k < K)[None, :], other=0.0)
    found = tl.broadcast_to(found.to(tl.float32)[:, :, None], (ROWS, DEPTH // UNIT, UNIT))
    return tl.reshape(found, (ROWS, DEPTH))


@triton.jit
def load_values(
    w_ptr,
    scale_ptr,
    zero_ptr,
    row,
    first_k,
    N,
    K,
    stride_wn,
    stride_sn,
    stride_sg,
    EXACT: tl.constexpr,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """(code - zero) * scale of rows `row` from first_k on, (ROWS, DEPTH) in DTYPE, finite.

    EXACT: codes alone, of bytes, in 16 bits.
    """
    codes = load_stored(w_ptr, row, first_k, N, K, stride_wn, FORMAT, EVEN, ROWS, DEPTH)
    if EXACT:
        return exact_values(codes, FORMAT, DTYPE)
    else:
        OFFSET: tl.constexpr = 8 if zero_ptr is None else 0
        values = code_values(codes, FORMAT, OFFSET, ROWS, DEPTH)
        strides = (stride_sn, stride_sg)
        if zero_ptr is not None:
            values -= load_groups(
                zero_ptr, row, first_k, N, K, *strides, GROUP, UNIT, EVEN, ROWS, DEPTH
            )
        values *= load_groups(
            scale_ptr, row, first_k, N, K, *strides, GROUP, UNIT, EVEN, ROWS, DEPTH
        )
        return values.to(DTYPE)


@triton.jit
def dequantize_kernel(
    w_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    first_row,
    N,
    K,
    stride_wn,
    stride_sn,
    stride_sg,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows first_row to N - 1 of a QuantizedWeight as values: out (rows, K), contiguous.

    Program (block of columns, block of ROWS rows), one row after the other.
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    EXACT: tl.constexpr = GROUP is None and zero_ptr is None and DTYPE.primitive_bitwidth == 16
    first_k = tl.program_id(0) * BLOCK_K
    for i in tl.static_range(ROWS):
        place = tl.program_id(1) * ROWS + i
        row = first_row + place + tl.arange(0, 1)
        values = load_values(
            w_ptr, scale_ptr, zero_ptr, row, first_k, N, K, stride_wn, stride_sn, stride_sg,
            EXACT, DTYPE, FORMAT, GROUP, UNIT, False, 1, BLOCK_K,
        )  # fmt: skip
        if EXACT:
            scale = tl.load(scale_ptr + row.to(tl.int64) * stride_sn, mask=row < N, other=0.0)
            values = values.to(tl.float32) * scale.to(tl.float32)[:, None]
        k = first_k + tl.arange(0, BLOCK_K)[None, :]
        tl.store(
            out_ptr + tl.cast(place, tl.int64) * K + k,
            values.to(DTYPE),
            mask=(row < N)[:, None] & (k < K),
        )


@triton.jit
def add_product(acc, w, x, none):
    """acc + w · x; in float32 sums of tiles are added up, which errs less than one long sum."""
    if x.dtype == tl.float32:
        return acc + tl.dot(w, x, none, input_precision="ieee")
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def wait_for_products():
    """Wait until Hopper's matrix units have read all operands.

    Triton (3.6 to 3.9) leaves three products on their way at the end of a loop's body, and ptxas
    gives the registers of their left operands away: results were wrong.
    """
    tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0;",
        "=r,r",
        [tl.zeros((1,), tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def quantized_tiled_kernel(
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
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    WGMMA: tl.constexpr,
):
    """What `tiled_linear_kernel` computes, of a QuantizedWeight; its parameters and those of
    `load_values`.

    W is the left operand, which the matrix units take from registers, where its values are made.
    EVEN: its rows and columns are whole blocks. WGMMA: the GPU is a Hopper.
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
        gdc_wait()
        gdc_launch_dependents()

    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[None, :] * stride_x + (first_k + offs_k)[:, None]
    mask_m = offs_m[None, :] < M
    DTYPE: tl.constexpr = tl.float32 if INTERPRETED else x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    gate_acc = acc
    # Scales of whole rows multiply the results, and codes are exact in 16 bits.
    IN_16_BITS: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    RESULTS: tl.constexpr = GROUP is None and zero_ptr is None and IN_16_BITS
    # Zeros that Triton does not know to be any: it would add each product to the sum so far.
    none = tl.full((BLOCK_N, BLOCK_M), (first_k < 0).to(tl.float32), tl.float32)
    for k in range(first_k, tl.minimum(first_k + part, K), BLOCK_K):
        mask = mask_m if EVEN else mask_m & (offs_k < K - k)[:, None]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(DTYPE)
        w = load_values(
            w_ptr, scale_ptr, zero_ptr, offs_n, k, N, K, stride_wn, stride_sn, stride_sg,
            RESULTS, x_ptr.dtype.element_ty, FORMAT, GROUP, UNIT, EVEN, BLOCK_N, BLOCK_K,
        ).to(DTYPE)  # fmt: skip
        acc = add_product(acc, w, x, none)
        if gate_w_ptr is not None:
            g = load_values(
                gate_w_ptr, gate_scale_ptr, gate_zero_ptr, offs_n, k, N, K, stride_gn, stride_sn,
                stride_sg, RESULTS, x_ptr.dtype.element_ty, FORMAT, GROUP, UNIT, EVEN, BLOCK_N,
                BLOCK_K,
            ).to(DTYPE)  # fmt: skip
            gate_acc = add_product(gate_acc, g, x, none)
        if WGMMA:
            wait_for_products()
        x_ptrs += BLOCK_K
    if RESULTS:
        offs_s = offs_n.to(tl.int64) * stride_sn
        acc *= tl.load(scale_ptr + offs_s, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
        if gate_w_ptr is not None:
            scale = tl.load(gate_scale_ptr + offs_s, mask=offs_n < N, other=0.0)
            gate_acc *= scale.to(tl.float32)[:, None]
    store_tile(
        tl.trans(acc),
        tl.trans(gate_acc),
        out_ptr,
        (b_ptr, gate_b_ptr),
        (add_ptr, add2_ptr, add_bias_ptr),
        offs_m,
        offs_n.to(tl.int64),
        (M, N),
        (stride_add, stride_add2),
        split,
        gate_w_ptr is not None,
        ACTIVATION,
        SPLITS,
    )


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    gate_ptr,
    out_ptr,
    scale_ptr,
    K,
    stride_x,
    stride_gate,
    ACTIVATION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """A row of act(x), or of act(gate) * x, rounded to their dtype as if it were stored between, in
    e4m3: codes (rows, K), contiguous, and scales (rows,), float32.

    x, gate: by row strides. value = code * scale, the largest code being 448. ONE_BLOCK: K <=
    BLOCK_K, so that the row is in registers as a whole.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    if gate_ptr is not None:
        gate_ptr += row * stride_gate
    out_ptr += row * K
    offs = tl.arange(0, BLOCK_K)
    if ONE_BLOCK:
        mask = offs < K
        x = load_activated(x_ptr, gate_ptr, None, None, offs, mask, ACTIVATION).to(tl.float32)
        scale = tl.max(tl.where(mask, tl.abs(x), 0.0), axis=0) / 448.0
        tl.store(out_ptr + offs, fp8_codes(x, scale), mask=mask)
    else:
        largest = tl.zeros((BLOCK_K,), tl.float32)
        for k in range(0, K, BLOCK_K):
            mask = offs < K - k
            x = load_activated(x_ptr, gate_ptr, None, None, k + offs, mask, ACTIVATION)
            largest = tl.maximum(largest, tl.where(mask, tl.abs(x.to(tl.float32)), 0.0))
        scale = tl.max(largest, axis=0) / 448.0
        for k in range(0, K, BLOCK_K):
            mask = offs < K - k
            x = load_activated(x_ptr, gate_ptr, None, None, k + offs, mask, ACTIVATION)
            tl.store(out_ptr + k + offs, fp8_codes(x.to(tl.float32), scale), mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def fp8_codes(x, scale):
    """x / scale in e4m3; 0 where the scale is."""
    inverse = 1.0 / tl.where(scale == 0.0, 1.0, scale)
    return tl.clamp(x * inverse, -448.0, 448.0).to(tl.float8e4nv)
