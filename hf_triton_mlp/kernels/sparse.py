"""A linear layer of rows that are mostly zeros: only the weights that something else multiplies are
read."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.widen import widen


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
    """Weights (BLOCK_K, BLOCK_N) of what is in the list from `first` on, and ROWS times the values
    (BLOCK_K,) that multiply them; 0 beyond its end."""
    place = first + tl.arange(0, BLOCK_K)
    there = place < total
    k = tl.load(list_ptr + place, mask=there, other=0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    w = tl.load(
        w_ptr + k[:, None] * stride_wk + offs_n,
        mask=there[:, None] & (offs_n >= 0),
        other=0.0,
        eviction_policy="evict_first",
    )
    tile = (w,)
    for m in tl.static_range(ROWS):
        # What is beyond the last row computes that one again, and is not stored.
        row = x_ptr + tl.minimum(m, M - 1) * stride_x
        tile += (tl.load(row + k, mask=there, other=0.0),)
    return tile


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
    """Parts of x · Wᵀ for M <= ROWS rows x (M, K), of which W (N, K) has columns together.

    out: float32 (SPLITS, M, N); N is whole blocks of BLOCK_N. Program (block of N, part of CHUNK
    columns of K). What is 0 in all rows is left out, exactly: that changes no finite sum, and an
    infinite or NaN weight that only zeros would multiply gives nothing, where 0 times it is NaN.

    A program lists the columns that are left, in order, where its results will be (so CHUNK <= 2 *
    BLOCK_N), then reads BLOCK_K of them at a time, STAGES of these on their way. LANES rows of such
    a tile are in different threads. The order of sums depends on which columns are left, alone.
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

    offs_k = tl.arange(0, CHUNK)
    left = tl.zeros((CHUNK,), tl.int32)
    for m in tl.static_range(ROWS):
        row = x_ptr + tl.minimum(m, M - 1) * stride_x
        # NaN is unequal, too.
        left |= (tl.load(row + offs_k, mask=offs_k < K - first_k, other=0.0) != 0.0).to(tl.int32)
    place = tl.cumsum(left, 0) - 1
    total = tl.sum(left, axis=0)
    list_ptr = out_ptr.to(tl.pointer_type(tl.int16))
    tl.store(list_ptr + place, offs_k.to(tl.int16), mask=left != 0)
    tl.debug_barrier()

    loaded = ()
    for s in tl.static_range(STAGES):
        loaded += (
            load_listed(
                x_ptr, w_ptr, list_ptr, s * BLOCK_K, total, M, stride_x, stride_wk, ROWS, BLOCK_N,
                BLOCK_K,
            ),
        )  # fmt: skip
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((LANES, BLOCK_N), tl.float32),)
    for first in range(0, total, STAGES * BLOCK_K):
        following = ()
        for s in tl.static_range(STAGES):
            w = widen(loaded[s][0])
            added = ()
            for m in tl.static_range(ROWS):
                products = w * loaded[s][1 + m].to(tl.float32)[:, None]
                products = tl.reshape(products, (BLOCK_K // LANES, LANES, BLOCK_N))
                added += (sums[m] + tl.sum(products, axis=0),)
            sums = added
            following += (
                load_listed(
                    x_ptr, w_ptr, list_ptr, first + (STAGES + s) * BLOCK_K, total, M, stride_x,
                    stride_wk, ROWS, BLOCK_N, BLOCK_K,
                ),
            )  # fmt: skip
        loaded = following

    # The list has been read by all threads.
    tl.debug_barrier()
    offs_n = tl.arange(0, BLOCK_N)
    for m in tl.static_range(ROWS):
        tl.store(out_ptr + m * N + offs_n, tl.sum(sums[m], axis=0), mask=offs_n < (M - m) * BLOCK_N)
