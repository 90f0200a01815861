"""What a program may do before its predecessor has ended: ask the L2 for its weights."""

import triton
import triton.language as tl

from hf_triton_mlp.kernels.activations import INTERPRETED


@triton.jit
def prefetch(pointers):
    """Ask the L2 for the lines at these addresses."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_vector(ptr, first, N, BLOCK: tl.constexpr):
    """Ask the L2 for values first to first + BLOCK of a vector of N, where there is one."""
    if not INTERPRETED:
        if ptr is not None:
            lines: tl.constexpr = triton.cdiv(BLOCK, 64)
            prefetch(ptr + tl.minimum(first + tl.arange(0, lines) * 64, N - 1))


@triton.jit
def prefetch_weights(
    w_ptr,
    first_n,
    N,
    K,
    stride_n,
    stride_k,
    K_CONTIGUOUS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,
):
    """Ask the L2 for the start of W's rows first_n to first_n + BLOCK_N: LINES lines of each.

    Nothing is read into registers, so it is safe before gdc_wait: the L2 stays coherent.
    """
    if not INTERPRETED:
        if K_CONTIGUOUS:
            n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
            # 64 values of 16 bits are a line.
            k = tl.minimum(tl.arange(0, LINES) * 64, K - 1)
            lines = w_ptr + n[:, None] * stride_n + k[None, :]
        else:
            # A line holds BLOCK_N columns of one k, or more than these.
            k = tl.minimum(tl.arange(0, LINES * BLOCK_N), K - 1).to(tl.int64)
            lines = w_ptr + tl.minimum(first_n, N - 1).to(tl.int64) * stride_n + k * stride_k
        prefetch(lines)
