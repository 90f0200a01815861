"""A linear layer of rows that are mostly zeros: only the weights that something else multiplies are
read."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.dequantize import exact_values, int4_values
from hf_triton_mlp.kernels.quantized import multiply
from hf_triton_mlp.kernels.widen import widen


@triton.jit
def load_columns(
    w_ptr,
    scale_ptr,
    zero_ptr,
    k,
    there,
    first_k,
    stride_wk,
    stride_sg,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is stored of BLOCK_N weights of each column first_k + k, w_ptr being at first_k: a tuple
    of these, or their codes, (columns, BLOCK_N), int4 in words, and of their groups' scales and
    zeros, if there are any. 0 where not `there`."""
    STORED: tl.constexpr = BLOCK_N // 8 if FORMAT == "int4" else BLOCK_N
    place = k.to(tl.int64)[:, None] * stride_wk + tl.arange(0, STORED)[None, :]
    w = tl.load(
        w_ptr + place,
        mask=there[:, None] & (place >= 0),
        other=0.0 if w_ptr.dtype.element_ty.is_floating() else 0,
        eviction_policy="evict_first",
    )
    if GROUP is None:
        return (w,)
    else:
        group = ((first_k + k) // GROUP).to(tl.int64)[:, None]
        place = group * stride_sg + tl.arange(0, BLOCK_N)[None, :]
        mask = there[:, None] & (place >= 0)
        scale = tl.load(scale_ptr + place, mask=mask, other=0.0)
        if zero_ptr is None:
            return w, scale
        else:
            return w, scale, tl.load(zero_ptr + place, mask=mask, other=0.0)


@triton.jit
def column_values(
    stored, FORMAT: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, DTYPE: tl.constexpr
):
    """The weights of `load_columns`, (columns, BLOCK_N): in float32 where they are in groups, else
    in DTYPE, and of codes not scaled."""
    if FORMAT is None:
        return stored[0]
    else:
        COLUMNS: tl.constexpr = stored[0].shape[0]
        WIDTH: tl.constexpr = stored[0].shape[1]
        if FORMAT == "int4":
            words = tl.reshape(stored[0], (COLUMNS, 4, WIDTH // 4))
            values = tl.reshape(int4_values(words, DTYPE, True), (COLUMNS, 8 * WIDTH))
        else:
            values = exact_values(stored[0], FORMAT, DTYPE)
        if GROUP is None:
            return values
        else:
            values = widen(values)
            if ZEROS:  # int4_values takes 8 away
                values -= stored[2].to(tl.float32) - 8.0
            return values * stored[1].to(tl.float32)


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
    first_k,
    M,
    stride_x,
    stride_wk,
    stride_sg,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`load_columns` of BLOCK_K columns from `first` on of a program's, of its list if any are
    listed, and what multiplies them, (ROWS, BLOCK_K), of one row (BLOCK_K,); 0 beyond the last."""
    place = first + tl.arange(0, BLOCK_K)
    there = place < total
    k = tl.load(list_ptr + place, mask=place < listed, other=0).to(tl.int32)
    k = tl.where(listed > 0, k, place)
    stored = load_columns(
        w_ptr, scale_ptr, zero_ptr, k, there, first_k, stride_wk, stride_sg, FORMAT, GROUP, BLOCK_N
    )
    if ROWS == 1:
        x = tl.load(x_ptr + k, mask=there, other=0.0)
    else:  # beyond the last row it is that one again
        row = tl.minimum(tl.arange(0, ROWS), M - 1)[:, None] * stride_x
        x = tl.load(x_ptr + row + k[None, :], mask=there[None, :], other=0.0)
    return stored, x


@triton.jit
def add_products(sums, w, x, ROWS: tl.constexpr):
    """sums (ROWS, BLOCK_N) + x · w by the matrix units; of one row its sums are in several, by FMA,
    so that threads need not exchange any."""
    if ROWS == 1:
        products = widen(w) * x.to(tl.float32)[:, None]
        LANES: tl.constexpr = sums.shape[0]
        return sums + tl.sum(tl.reshape(products, (w.shape[0] // LANES, LANES, w.shape[1])), axis=0)
    else:
        return multiply(x, w.to(x.dtype), sums)


@triton.jit
def sparse_linear_kernel(
    x_ptr,
    out_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    M,
    N,
    K,
    stride_x,
    stride_wk,
    stride_sg,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
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

    W: 16-bit, or a QuantizedWeight's codes by input; GROUP: the size of its groups, None for whole
    rows. out: float32 (SPLITS, M, N); N is whole blocks of BLOCK_N. Program (block of N, part of
    CHUNK columns of K). What is 0 in all rows is left out, exactly: that changes no sum of finite
    products. An infinite or NaN weight that only zeros would multiply gives nothing; 0 times it is
    NaN.

    A program lists the columns that are left, in order, where its results will be (so CHUNK <= 2 *
    BLOCK_N), then reads BLOCK_K of these at a time, STAGES of them on their way. Where nearly all
    are left it reads all, without a list. One row is multiplied by FMA, LANES columns of a tile in
    different threads, several, 16, by the matrix units. How sums are ordered depends on nothing but
    which columns are left.
    """
    pid_n = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    first_k = split * CHUNK
    first_n = pid_n * BLOCK_N
    x_ptr += first_k
    w_ptr += tl.cast(first_k, tl.int64) * stride_wk + first_n // (8 if FORMAT == "int4" else 1)
    out_ptr += tl.cast(split, tl.int64) * M * N + first_n
    n = tl.arange(0, BLOCK_N)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    k = tl.arange(0, CHUNK)
    left = tl.load(x_ptr + k, mask=k < K - first_k, other=0.0) != 0.0  # NaN is, too
    for m in tl.static_range(1, ROWS):
        row = x_ptr + tl.minimum(m, M - 1) * stride_x
        left = left | (tl.load(row + k, mask=k < K - first_k, other=0.0) != 0.0)
    of_rows = 1.0
    if GROUP is not None:
        scale_ptr += first_n
        if zero_ptr is not None:
            zero_ptr += first_n
    elif FORMAT is not None:
        of_rows = tl.load(scale_ptr + first_n + n)
    place = tl.cumsum(left.to(tl.int32), 0) - 1
    total = tl.sum(left.to(tl.int32), axis=0)
    # What is read one after the other, not as listed, takes less time.
    listed = tl.where(total * 8 <= CHUNK * 7, total, 0)
    list_ptr = out_ptr.to(tl.pointer_type(tl.int16))
    tl.store(list_ptr + place, k.to(tl.int16), mask=left & (place < listed))
    total = tl.where(listed < total, tl.minimum(CHUNK, K - first_k), total)
    tl.debug_barrier()

    loaded = ()
    for s in tl.static_range(STAGES):
        loaded += (
            load_listed(
                x_ptr, w_ptr, scale_ptr, zero_ptr, list_ptr, s * BLOCK_K, total, listed, first_k, M,
                stride_x, stride_wk, stride_sg, FORMAT, GROUP, ROWS, BLOCK_N, BLOCK_K,
            ),
        )  # fmt: skip
    sums = tl.zeros((LANES if ROWS == 1 else ROWS, BLOCK_N), tl.float32)
    for first in range(0, total, STAGES * BLOCK_K):
        following = ()
        for s in tl.static_range(STAGES):
            stored, x = loaded[s]
            w = column_values(stored, FORMAT, GROUP, zero_ptr is not None, x_ptr.dtype.element_ty)
            sums = add_products(sums, w, x, ROWS)
            following += (
                load_listed(
                    x_ptr, w_ptr, scale_ptr, zero_ptr, list_ptr, first + (STAGES + s) * BLOCK_K,
                    total, listed, first_k, M, stride_x, stride_wk, stride_sg, FORMAT, GROUP, ROWS,
                    BLOCK_N, BLOCK_K,
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
    K,
    stride_wk,
    stride_sg,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows first_n to first_n + count of a QuantizedWeight (N, K) by input, as values: out (K,
    count), contiguous; N and count are whole blocks. Program (block of rows, block of columns)."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    EXACT: tl.constexpr = DTYPE if DTYPE.primitive_bitwidth == 16 else tl.float16
    out_n = tl.program_id(0) * BLOCK_N
    first_n += out_n
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    w_ptr += first_n // (8 if FORMAT == "int4" else 1)
    scale_ptr += first_n
    if zero_ptr is not None:
        zero_ptr += first_n
    stored = load_columns(
        w_ptr, scale_ptr, zero_ptr, k, k < K, 0, stride_wk, stride_sg, FORMAT, GROUP, BLOCK_N
    )
    values = column_values(stored, FORMAT, GROUP, zero_ptr is not None, EXACT)
    if GROUP is None:
        values = widen(values) * tl.load(scale_ptr + n)[None, :]
    place = out_n + k.to(tl.int64)[:, None] * count + n[None, :]
    tl.store(out_ptr + place, values.to(DTYPE), mask=(k < K)[:, None] & (n >= 0)[None, :])
