"""A linear layer of rows that are mostly zeros: only the weights that something else multiplies are
read."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.dequantize import exact_float, exact_values
from hf_triton_mlp.kernels.quantized import multiply
from hf_triton_mlp.kernels.widen import widen


@triton.jit
def load_units(
    w_ptr,
    scale_ptr,
    zero_ptr,
    unit,
    there,
    first_unit,
    stride_wk,
    stride_sg,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is stored of units of columns of W, (n, BLOCK_N), 0 where not `there`: weights, and if
    they are in groups these' scales, and zeros if there are any, in float32."""
    n = tl.arange(0, BLOCK_N)[None, :]
    mask = there[:, None] & (n >= 0)
    w = tl.load(
        w_ptr + unit.to(tl.int64)[:, None] * stride_wk + n,
        mask=mask,
        other=0.0 if w_ptr.dtype.element_ty.is_floating() else 0,
        eviction_policy="evict_first",
    )
    if GROUP is None:
        return (w,)
    else:
        place = ((first_unit + unit) * UNIT // GROUP).to(tl.int64)[:, None] * stride_sg + n
        scale = tl.load(scale_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if zero_ptr is None:
            return w, scale
        else:
            return w, scale, tl.load(zero_ptr + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def column_codes(
    stored,
    J: tl.constexpr,
    FORMAT: tl.constexpr,
    ZEROS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Column J of units, of `load_units`, as what a scale multiplies: int4's less their zeros, in
    float32, others in DTYPE; weights that are not quantized as they are."""
    w = stored[0]
    if FORMAT is None:
        return w
    elif FORMAT == "int4":
        code = (w >> (J // 2 * 4 + J % 2 * 16)) & 15
        if ZEROS:
            return exact_float(code, 0) - stored[2]
        else:
            return exact_float(code, 8)
    else:
        return exact_values(w, FORMAT, DTYPE)


@triton.jit
def load_listed(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    list_ptr,
    first,
    total,
    listed,
    first_unit,
    M,
    stride_x,
    stride_wk,
    stride_sg,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`load_units` of BLOCK_K units from `first` on of a program's, of its list if any are listed,
    and what multiplies their columns; 0 beyond the last."""
    place = first + tl.arange(0, BLOCK_K)
    there = place < total
    unit = tl.load(list_ptr + place, mask=place < listed, other=0).to(tl.int32)
    unit = tl.where(listed > 0, unit, place)
    stored = load_units(
        w_ptr, scale_ptr, zero_ptr, unit, there, first_unit, stride_wk, stride_sg, GROUP, UNIT,
        BLOCK_N,
    )  # fmt: skip
    x = ()
    for j in tl.static_range(UNIT):
        if ROWS == 1:
            x += (tl.load(x_ptr + unit * UNIT + j, mask=there, other=0.0),)
        else:  # beyond the last row it is that one again
            row = tl.minimum(tl.arange(0, ROWS), M - 1)[:, None] * stride_x
            column = (unit * UNIT + j)[None, :]
            x += (tl.load(x_ptr + row + column, mask=there[None, :], other=0.0),)
    return stored, x


@triton.jit
def add_products(
    sums,
    stored,
    x,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sums (ROWS, BLOCK_N) + x · w by the matrix units; of one row its sums are in several, by FMA,
    so that threads need not exchange any."""
    DTYPE: tl.constexpr = x[0].dtype
    if ROWS == 1:
        codes = column_codes(stored, 0, FORMAT, ZEROS, DTYPE)
        products = widen(codes) * x[0].to(tl.float32)[:, None]
        for j in tl.static_range(1, UNIT):
            codes = column_codes(stored, j, FORMAT, ZEROS, DTYPE)
            products += widen(codes) * x[j].to(tl.float32)[:, None]
        if GROUP is not None:
            products *= stored[1]
        LANES: tl.constexpr = sums.shape[0]
        shape: tl.constexpr = (products.shape[0] // LANES, LANES, products.shape[1])
        return sums + tl.sum(tl.reshape(products, shape), axis=0)
    else:
        for j in tl.static_range(UNIT):
            values = column_codes(stored, j, FORMAT, ZEROS, DTYPE)
            if GROUP is not None:
                values = (widen(values) * stored[1]).to(DTYPE)
            sums = multiply(x[j], values, sums)
        return sums


@triton.jit
def sparse_linear_kernel(
    x_ptr,
    out_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    M,
    N,
    UNITS,
    stride_x,
    stride_wk,
    stride_sg,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Parts of x · Wᵀ for M <= ROWS rows x (M, K), of a W (N, K) whose columns lie together.

    W: 16-bit, or the codes of a QuantizedWeight; K is UNITS units of UNIT columns, 8 of int4's,
    which share words, else 1. GROUP: the size of its groups, None for whole rows.
    out: float32 (SPLITS, M, N); N is whole blocks of BLOCK_N. Program (block of N, part of CHUNK
    units of K). Units in which all rows are 0 are left out, exactly: that changes no sum of finite
    products. An infinite or NaN weight that only zeros would multiply gives nothing; 0 times it is
    NaN.

    A program lists the units that are left, in order, where its results will be (so CHUNK <= 2 *
    BLOCK_N), then reads BLOCK_K of these at a time, STAGES of them on their way. If few are not
    left it reads all instead, without a list. One row is multiplied by FMA, LANES units of a tile
    in different threads, several, 16, by the matrix units. How sums are ordered depends on nothing
    but which units are left.
    """
    pid_n = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    first_unit = split * CHUNK
    first_n = pid_n * BLOCK_N
    x_ptr += first_unit * UNIT
    w_ptr += tl.cast(first_unit, tl.int64) * stride_wk + first_n
    out_ptr += tl.cast(split, tl.int64) * M * N + first_n
    n = tl.arange(0, BLOCK_N)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    unit = tl.arange(0, CHUNK)
    column = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    inside = (unit < UNITS - first_unit)[:, None]
    there = column < 0
    for m in tl.static_range(ROWS):  # NaN is there, too
        row = x_ptr + tl.minimum(m, M - 1) * stride_x
        there = there | (tl.load(row + column, mask=inside, other=0.0) != 0.0)
    left = tl.max(there.to(tl.int32), axis=1)
    of_rows = 1.0
    if FORMAT is not None:
        if GROUP is None:
            of_rows = tl.load(scale_ptr + first_n + n)
        else:
            scale_ptr += first_n
            if zero_ptr is not None:
                zero_ptr += first_n
    place = tl.cumsum(left, 0) - 1
    total = tl.sum(left, axis=0)
    # What is read one after the other, not as listed, takes less time.
    listed = tl.where(total * 8 <= CHUNK * 7, total, 0)
    list_ptr = out_ptr.to(tl.pointer_type(tl.int16))
    tl.store(list_ptr + place, unit.to(tl.int16), mask=(left > 0) & (place < listed))
    total = tl.where(listed < total, tl.minimum(CHUNK, UNITS - first_unit), total)
    tl.debug_barrier()

    loaded = ()
    for s in tl.static_range(STAGES):
        loaded += (
            load_listed(
                x_ptr, w_ptr, scale_ptr, zero_ptr, list_ptr, s * BLOCK_K, total, listed,
                first_unit, M, stride_x, stride_wk, stride_sg, GROUP, UNIT, ROWS, BLOCK_N, BLOCK_K,
            ),
        )  # fmt: skip
    sums = tl.zeros((LANES if ROWS == 1 else ROWS, BLOCK_N), tl.float32)
    for first in range(0, total, STAGES * BLOCK_K):
        following = ()
        for s in tl.static_range(STAGES):
            stored, x = loaded[s]
            sums = add_products(sums, stored, x, FORMAT, GROUP, UNIT, zero_ptr is not None, ROWS)
            following += (
                load_listed(
                    x_ptr, w_ptr, scale_ptr, zero_ptr, list_ptr, first + (STAGES + s) * BLOCK_K,
                    total, listed, first_unit, M, stride_x, stride_wk, stride_sg, GROUP, UNIT,
                    ROWS, BLOCK_N, BLOCK_K,
                ),
            )  # fmt: skip
        loaded = following

    # All threads have read the list.
    tl.debug_barrier()
    if ROWS == 1:
        tl.store(out_ptr + n, tl.sum(sums, axis=0) * of_rows)
    else:
        row = tl.arange(0, ROWS)[:, None]
        mask = (row < M) & (n >= 0)[None, :]
        tl.store(out_ptr + row * N + n[None, :], sums * of_rows, mask=mask)


@triton.jit
def dequantize_columns_kernel(
    w_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    first_n,
    count,
    UNITS,
    stride_wk,
    stride_sg,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows first_n to first_n + count of a QuantizedWeight (N, K) whose columns lie together, as
    values: out (K, count), contiguous; N and count are whole blocks.

    Program (block of rows, block of units).
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    EXACT: tl.constexpr = DTYPE if DTYPE.primitive_bitwidth == 16 else tl.float16
    out_n = tl.program_id(0) * BLOCK_N
    unit = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    first_n += out_n
    w_ptr += first_n
    scale_ptr += first_n
    if zero_ptr is not None:
        zero_ptr += first_n
    stored = load_units(
        w_ptr, scale_ptr, zero_ptr, unit, unit < UNITS, 0, stride_wk, stride_sg, GROUP, UNIT,
        BLOCK_N,
    )  # fmt: skip
    scale = tl.load(scale_ptr + n)[None, :] if GROUP is None else stored[1]
    for j in tl.static_range(UNIT):
        codes = column_codes(stored, j, FORMAT, zero_ptr is not None, EXACT)
        place = out_n + (unit * UNIT + j).to(tl.int64)[:, None] * count + n[None, :]
        values = (widen(codes) * scale).to(DTYPE)
        tl.store(out_ptr + place, values, mask=(unit < UNITS)[:, None] & (n >= 0)[None, :])
