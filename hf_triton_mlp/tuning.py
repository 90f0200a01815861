"""Which kernel computes a linear layer, and with which tiles: one pure function."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

#: Kernels use tensor-core types and bfloat16, which Ampere introduced.
MINIMUM_CAPABILITY = (8, 0)

#: Up to this many rows a linear layer takes the time of reading its weights once.
DECODE_ROWS = 16

#: Float32 has no matrix unit (TF32 is not IEEE): up to this many rows the FMA kernel reads the
#: weights once a row, mostly from the L2.
SKINNY_ROWS = 4

#: A program may start before its predecessor has ended (programmatic dependent launch).
PDL_CAPABILITY = (9, 0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one linear layer runs: the kernel and its launch parameters.

    kernel: "skinny" (one row; float32, up to four), "decode" (16-bit, up to 16 rows) or "tiled".
    block_m, block_n, block_k: rows, columns and depth of a program's tile; "decode" reads
    `slices` such depths side by side. pdl: whether it is launched while its predecessor runs;
    until that has ended it asks the L2 for `lines` lines of each weight row.
    """

    kernel: str
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    block_m: int = 1
    group_m: int = 1
    slices: int = 1
    lines: int = 0
    pdl: bool = False

    @property
    def fuses_norm(self) -> bool:
        """Whether the kernel computes the norm in front of the linear layer too."""
        return self.kernel == "skinny"

    @property
    def blocks(self) -> tuple[int, ...]:
        """The block sizes as the kernel takes them."""
        if self.kernel == "skinny":
            return self.block_n, self.block_k, self.lines
        if self.kernel == "decode":
            return (
                self.block_m,
                self.block_n,
                self.block_k,
                self.slices,
                self.num_stages,
                self.lines,
            )
        return self.block_m, self.block_n, self.block_k, self.group_m

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        if self.slices > 1:
            tile += f"x{self.slices}"
        return f"{self.kernel} {tile}, {self.num_warps} warps"


def check_capability(capability: tuple[int, int]) -> None:
    """Raise RuntimeError for a GPU that is too old for the kernels."""
    if capability < MINIMUM_CAPABILITY:
        raise RuntimeError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}; hf_triton_mlp's "
            f"kernels need {MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]} (Ampere) or newer"
        )


@lru_cache(maxsize=4096)
def choose(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    k_contiguous: bool = True,
    gated: bool = False,
) -> Plan:
    """The plan for x (M, K) times W (N, K).

    k_contiguous: W is stored (out, in), as nn.Linear does; False for GPT-2's Conv1D.
    Raises RuntimeError when the GPU's `capability` (major, minor) is below 8.0.
    """
    check_capability(capability)
    if M == 1 or (M <= SKINNY_ROWS and dtype == torch.float32):
        return _choose_skinny(N, K, capability, k_contiguous=k_contiguous, gated=gated)
    if M <= DECODE_ROWS and dtype != torch.float32:
        return _choose_decode(M, N, K, capability, k_contiguous=k_contiguous, gated=gated)
    if M <= 16:
        return Plan(kernel="tiled", block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=3)
    if M <= 64 or dtype == torch.float32:
        # IEEE float32 products run on the FMA units: a small tile keeps the accumulator there.
        return Plan(
            kernel="tiled",
            block_m=32 if M <= 32 else 64,
            block_n=64,
            block_k=32 if dtype == torch.float32 else 64,
            num_warps=4,
            num_stages=3,
            group_m=8,
        )
    return Plan(
        kernel="tiled",
        block_m=128,
        block_n=64 if gated else 128,
        block_k=64,
        num_warps=8,
        num_stages=3,
        group_m=8,
    )


def _choose_skinny(
    N: int, K: int, capability: tuple[int, int], *, k_contiguous: bool, gated: bool
) -> Plan:
    """Enough programs to keep every multiprocessor reading, enough loads in flight in each."""
    pdl = capability >= PDL_CAPABILITY
    if not k_contiguous:
        # 16 columns of 2 bytes are one 32-byte sector of DRAM.
        return Plan(kernel="skinny", block_n=16, block_k=256, num_warps=8, num_stages=1, pdl=pdl)
    block_k = min(triton.next_power_of_2(K), 1024 if N > K else 2048)
    block_n = 4 if N > 2048 and not gated else 2
    return Plan(
        kernel="skinny", block_n=block_n, block_k=block_k, num_warps=4, num_stages=1, pdl=pdl
    )


def _choose_decode(
    M: int, N: int, K: int, capability: tuple[int, int], *, k_contiguous: bool, gated: bool
) -> Plan:
    """Columns so few that the multiprocessors are busy, rows padded to a power of two."""
    rows = 1 << (M - 1).bit_length()
    if N <= 1024 and k_contiguous:
        block_n = 8
    elif N <= 4096 or gated:
        block_n = 16
    else:
        block_n = 32
    return Plan(
        kernel="decode",
        block_m=rows,
        block_n=block_n,
        block_k=64,
        slices=4,
        num_warps=4,
        num_stages=4,
        pdl=capability >= PDL_CAPABILITY,
    )
