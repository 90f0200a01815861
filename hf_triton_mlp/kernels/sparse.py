"""A linear layer of rows that are mostly zeros: only the weights that something else multiplies are
read."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.quantized import multiply
from hf_triton_mlp.kernels.widen import widen


@triton.jit
def load_rows(x_ptr, k, there, M, stride_x, ROWS: tl.constexpr, MATRIX: tl.constexpr):
    """Columns k (n,) of the rows: one tensor (ROWS, n), or ROWS of (n,); 0 where not `there`.

    What is beyond the last row is that one again.
    """
    if MATRIX:
        row = tl.minimum(tl.arange(0, ROWS), M - 1)[:, None] * stride_x
        return (tl.load(x_ptr + row + k[None, :], mask=there[None, :], other=0.0),)
    else:
        rows = ()
        for m in tl.static_range(ROWS):
            row = tl.minimum(m, M - 1) * stride_x
            rows += (tl.load(x_ptr + row + k, mask=there, other=0.0),)
        return rows


@triton.jit
def load_listed(
    x_ptr,
    w_ptr,
    list_ptr,
    first,
    total,
    M,
    stride_x,
    stride_wk,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Weights (BLOCK_K, BLOCK_N) of the columns of K that the list has from `first` on, and what
    multiplies them, by `load_rows`; 0 beyond its end."""
    place = first + tl.arange(0, BLOCK_K)
    there = place < total
    k = tl.load(list_ptr + place, mask=there, other=0).to(tl.int32)
    n = tl.arange(0, BLOCK_N)[None, :]
    w = tl.load(
        w_ptr + k.to(tl.int64)[:, None] * stride_wk + n,
        mask=there[:, None] & (n >= 0),
        other=0.0,
        eviction_policy="evict_first",
    )
    return w, load_rows(x_ptr, k, there, M, stride_x, ROWS, MATRIX)


@triton.jit
def add_products(sums, w, x, LANES: tl.constexpr, MATRIX: tl.constexpr):
    """sums + x · w: of a matrix x (ROWS, BLOCK_N), of each of several rows (LANES, BLOCK_N)."""
    if MATRIX:
        return (multiply(x[0], w, sums[0]),)
    else:
        wide = widen(w)
        added = ()
        for m in tl.static_range(len(x)):
            products = wide * x[m].to(tl.float32)[:, None]
            products = tl.reshape(products, (w.shape[0] // LANES, LANES, w.shape[1]))
            added += (sums[m] + tl.sum(products, axis=0),)
        return added


@triton.jit
def sparse_linear_kernel(
    x_ptr,
    out_ptr,
    w_ptr,
    M,
    N,
    K,
    stride_x,
    stride_wk,
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

    out: float32 (SPLITS, M, N); N is whole blocks of BLOCK_N. Program (block of N, part of CHUNK
    columns of K). What is 0 in all rows is left out, exactly: that changes no sum of finite
    products. An infinite or NaN weight that only zeros would multiply gives nothing; 0 times it is
    NaN.

    A program lists the columns that are left, in order, where its results will be (so CHUNK <= 2 *
    BLOCK_N), then reads BLOCK_K of these at a time, STAGES of them on their way. Up to four rows
    are multiplied by FMA, LANES columns of a tile in different threads, 16 by the matrix units. How
    sums are ordered depends on nothing but which columns are left.
    """
    MATRIX: tl.constexpr = ROWS > 4
    pid_n = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    first_k = split * CHUNK
    x_ptr += first_k
    w_ptr += tl.cast(first_k, tl.int64) * stride_wk + pid_n * BLOCK_N
    out_ptr += tl.cast(split, tl.int64) * M * N + pid_n * BLOCK_N
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    k = tl.arange(0, CHUNK)
    rows = load_rows(x_ptr, k, k < K - first_k, M, stride_x, ROWS, False)
    left = rows[0] != 0.0
    for m in tl.static_range(1, ROWS):
        left = left | (rows[m] != 0.0)  # NaN is unequal, too
    place = tl.cumsum(left.to(tl.int32), 0) - 1
    total = tl.sum(left.to(tl.int32), axis=0)
    list_ptr = out_ptr.to(tl.pointer_type(tl.int16))
    tl.store(list_ptr + place, k.to(tl.int16), mask=left)
    tl.debug_barrier()

    loaded = ()
    for s in tl.static_range(STAGES):
        loaded += (
            load_listed(
                x_ptr, w_ptr, list_ptr, s * BLOCK_K, total, M, stride_x, stride_wk, ROWS, BLOCK_N,
                BLOCK_K, MATRIX,
            ),
        )  # fmt: skip
    sums = ()
    if MATRIX:
        sums += (tl.zeros((ROWS, BLOCK_N), tl.float32),)
    else:
        for _ in tl.static_range(ROWS):
            sums += (tl.zeros((LANES, BLOCK_N), tl.float32),)
    for first in range(0, total, STAGES * BLOCK_K):
        following = ()
        for s in tl.static_range(STAGES):
            w, x = loaded[s]
            sums = add_products(sums, w, x, LANES, MATRIX)
            following += (
                load_listed(
                    x_ptr, w_ptr, list_ptr, first + (STAGES + s) * BLOCK_K, total, M, stride_x,
                    stride_wk, ROWS, BLOCK_N, BLOCK_K, MATRIX,
                ),
            )  # fmt: skip
        loaded = following

    # All threads have read the list.
    tl.debug_barrier()
    n = tl.arange(0, BLOCK_N)
    if MATRIX:
        row = tl.arange(0, ROWS)[:, None]
        tl.store(out_ptr + row * N + n[None, :], sums[0], mask=(row < M) & (n >= 0)[None, :])
    else:
        for m in tl.static_range(ROWS):
            tl.store(out_ptr + m * N + n, tl.sum(sums[m], axis=0), mask=n < (M - m) * BLOCK_N)
