"""A linear layer of rows that are mostly zeros: only the weights that something else multiplies are
read."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.quantized import multiply
from hf_triton_mlp.kernels.widen import widen


@triton.jit
def load_columns(x_ptr, k, there, M, stride_x, ROWS: tl.constexpr):
    """Columns k (n,) of x, (ROWS, n), or (n,) of one row; 0 where not `there`.

    What is beyond the last row is that one again.
    """
    if ROWS == 1:
        return tl.load(x_ptr + k, mask=there, other=0.0)
    else:
        row = tl.minimum(tl.arange(0, ROWS), M - 1)[:, None] * stride_x
        return tl.load(x_ptr + row + k[None, :], mask=there[None, :], other=0.0)


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
):
    """Weights (BLOCK_K, BLOCK_N) of the columns of K that the list has from `first` on, and what
    multiplies them, by `load_columns`; 0 beyond its end."""
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
    return w, load_columns(x_ptr, k, there, M, stride_x, ROWS)


@triton.jit
def add_products(sums, w, x, ROWS: tl.constexpr):
    """sums (ROWS, BLOCK_N) + x · w by the matrix units; of one row its sums are in several, by FMA,
    so that threads need not exchange any."""
    if ROWS == 1:
        products = widen(w) * x.to(tl.float32)[:, None]
        LANES: tl.constexpr = sums.shape[0]
        return sums + tl.sum(tl.reshape(products, (w.shape[0] // LANES, LANES, w.shape[1])), axis=0)
    else:
        return multiply(x, w, sums)


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
    BLOCK_N), then reads BLOCK_K of these at a time, STAGES of them on their way. One row is
    multiplied by FMA, LANES columns of a tile in different threads, several, 16, by the matrix
    units. How sums are ordered depends on nothing but which columns are left.
    """
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
    left = tl.load(x_ptr + k, mask=k < K - first_k, other=0.0) != 0.0  # NaN is, too
    for m in tl.static_range(1, ROWS):
        row = x_ptr + tl.minimum(m, M - 1) * stride_x
        left = left | (tl.load(row + k, mask=k < K - first_k, other=0.0) != 0.0)
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
                BLOCK_K,
            ),
        )  # fmt: skip
    sums = tl.zeros((LANES if ROWS == 1 else ROWS, BLOCK_N), tl.float32)
    for first in range(0, total, STAGES * BLOCK_K):
        following = ()
        for s in tl.static_range(STAGES):
            w, x = loaded[s]
            sums = add_products(sums, w, x, ROWS)
            following += (
                load_listed(
                    x_ptr, w_ptr, list_ptr, first + (STAGES + s) * BLOCK_K, total, M, stride_x,
                    stride_wk, ROWS, BLOCK_N, BLOCK_K,
                ),
            )  # fmt: skip
        loaded = following

    # All threads have read the list.
    tl.debug_barrier()
    n = tl.arange(0, BLOCK_N)
    if ROWS == 1:
        tl.store(out_ptr + n, tl.sum(sums, axis=0))
    else:
        row = tl.arange(0, ROWS)[:, None]
        tl.store(out_ptr + row * N + n[None, :], sums, mask=(row < M) & (n >= 0)[None, :])
