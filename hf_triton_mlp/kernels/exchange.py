"""The sum of what the GPUs of one host have, which write to each other's memory."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from hf_triton_mlp.kernels.activations import INTERPRETED

#: How often a flag is looked at between two looks at the clock, which take longer.
LOOKS = tl.constexpr(1024)


@triton.jit
def wait_for(flag_ptr, epoch, gave_up, PATIENCE: tl.constexpr):
    """Until another GPU has raised a flag to this epoch; after PATIENCE ns a note, and a trap.

    gave_up: the address of the note, which is not 0 then.
    """
    looks = 0
    begun = tl.full((), 0, tl.int64)
    waited = tl.full((), 0, tl.int64)
    # Epochs wrap around.
    while (tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") - epoch < 0) & (
        waited < PATIENCE
    ):
        looks += 1
        if not INTERPRETED:
            if looks % LOOKS == 0:
                now = globaltimer()
                begun = tl.where(begun == 0, now, begun)
                waited = now - begun
    if not INTERPRETED:
        if waited >= PATIENCE:  # by each thread's own look at the clock
            tl.inline_asm_elementwise(
                "st.relaxed.sys.global.b32 [$1], $2; membar.sys; trap; mov.b32 $0, 0;",
                "=r,l,r",
                [gave_up, waited.to(tl.int32) | 1],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def sum_ranks_kernel(
    x_ptr,
    bases_ptr,
    epochs_ptr,
    N,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    PATIENCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """x (N,) in place: the sum of all ranks' x, added in float32 in the order of ranks.

    FIRST: the first rank's x instead.

    bases: int64, where each rank's GPU has memory that all may write to: of 2 turns, of each rank
    that writes, BLOCKS blocks; then int32 flags, of each rank BLOCKS; and behind these addresses
    where the host reads that this GPU has given up (int32). epochs: int32, how often this rank has
    summed each block. Program (block).

    A program writes its block to all others, raises its flag there, and adds what they have written
    once theirs are raised here. Turns alternate: who writes a block for the next time but one has
    seen a flag that was raised after the reader was done with the last.
    """
    pid = tl.program_id(0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    TURN: tl.constexpr = RANKS * BLOCKS * BLOCK
    FLAGS: tl.constexpr = 2 * TURN * (DTYPE.primitive_bitwidth // 8)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    epoch = tl.load(epochs_ptr + pid) + 1
    turn = (epoch & 1) * TURN
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    for rank in tl.static_range(RANKS):
        if rank != RANK and (RANK == 0 or not FIRST):
            there = tl.load(bases_ptr + rank).to(tl.pointer_type(DTYPE))
            there = tl.multiple_of(there, 16) + turn + RANK * BLOCKS * BLOCK
            tl.store(there + offs, x, mask=mask)
    tl.debug_barrier()
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            flags = (tl.load(bases_ptr + rank) + FLAGS).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + RANK * BLOCKS + pid, epoch, sem="release", scope="sys")
    base = tl.load(bases_ptr + RANK)
    flags = (base + FLAGS).to(tl.pointer_type(tl.int32))
    gave_up = tl.load(bases_ptr + RANKS)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            wait_for(flags + rank * BLOCKS + pid, epoch, gave_up, PATIENCE)
        if rank == 0 or not FIRST:
            if rank == RANK:
                total += x.to(tl.float32)
            else:
                here = tl.multiple_of(base.to(tl.pointer_type(DTYPE)), 16)
                here += turn + rank * BLOCKS * BLOCK
                total += tl.load(here + offs, mask=mask, other=0.0, volatile=True).to(tl.float32)
    tl.store(x_ptr + offs, total.to(DTYPE), mask=mask)
    tl.store(epochs_ptr + pid, epoch)
