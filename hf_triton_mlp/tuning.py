"""Which kernel computes a linear layer, and with which tiles: one pure function."""

from dataclasses import dataclass
from functools import lru_cache

import torch

#: Kernels use tensor-core types and bfloat16, which Ampere introduced.
MINIMUM_CAPABILITY = (8, 0)

#: Up to this many rows the FMA kernel reads the weights once a row, mostly from the L2; the
#: matrix units want 16 rows, so beyond a few the padded tile is cheaper.
SKINNY_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one linear layer runs: the kernel ("skinny" or "tiled") and its launch parameters."""

    kernel: str
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    block_m: int = 1
    group_m: int = 1

    @property
    def blocks(self) -> tuple[int, ...]:
        """The block sizes as the kernel takes them."""
        if self.kernel == "skinny":
            return self.block_n, self.block_k
        return self.block_m, self.block_n, self.block_k, self.group_m

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
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
    if M <= SKINNY_ROWS:
        if not k_contiguous:
            # 16 columns of 2 bytes are one 32-byte sector of DRAM.
            return Plan(kernel="skinny", block_n=16, block_k=256, num_warps=8, num_stages=1)
        block_n = 4 if N <= 8192 else 8
        block_k = 1024 if K > 512 else 512
        return Plan(kernel="skinny", block_n=block_n, block_k=block_k, num_warps=4, num_stages=1)
    if M <= 16:
        block_k = 64 if dtype == torch.float32 else 128
        return Plan(
            kernel="tiled", block_m=16, block_n=32, block_k=block_k, num_warps=4, num_stages=3
        )
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
