"""Sums of what the GPUs of one host have, by a kernel that writes to the others' memory.

NCCL's all-reduce of a row takes twice as long, and adds in 16 bits.
"""

import logging
import socket
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from hf_triton_mlp import tuning
from hf_triton_mlp.kernels import sum_ranks_kernel
from hf_triton_mlp.launchers import Launch, gpu, launch, on_device

logger = logging.getLogger(__name__)

#: What a program sums.
BLOCK_BYTES = 4096

#: What one launch sums of two GPUs' tensors, and the largest tensor of more. Each GPU writes all of
#: it to each other one, which of two is what any algorithm does; of more it is for a few rows,
#: whose latency counts.
LIMIT_OF_TWO, LIMIT = 1 << 24, 1 << 19

#: Nanoseconds that a program waits for another GPU by default.
PATIENCE = 600 * 10**9

#: What it adds.
SUMMED = (torch.float16, torch.bfloat16, torch.float32)

_memories: WeakKeyDictionary[Any, "PeerMemory | None"] = WeakKeyDictionary()


class PeerMemory:
    """Memory of each rank's GPU that the others write to, and what sums through it.

    All ranks make it, and call it, in the same order, and one sum ends before the next begins.
    """

    def __init__(
        self,
        rank: int,
        addresses: list[int],
        blocks: int,
        device: torch.device,
        patience: int = PATIENCE,
    ) -> None:
        """addresses: of `size` bytes of each rank, 0 to begin with, this device can write to.

        patience: nanoseconds that a GPU waits for another before it ends its process's use of CUDA.
        """
        self.rank, self.blocks, self.patience = rank, blocks, patience
        self.ranks = len(addresses)
        #: Whether a program gave up, which the host can read when CUDA says no more than an error.
        self.gave_up = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        places = [*addresses, self.gave_up.data_ptr()]
        self.bases = torch.tensor(places, dtype=torch.int64, device=device)
        self.epochs = torch.zeros(blocks, dtype=torch.int32, device=device)
        #: What keeps the memory.
        self.kept: Any = None
        #: Where it summed last, but in graphs.
        self.stream: torch.cuda.Stream | None = None

    @staticmethod
    def size(ranks: int, blocks: int) -> int:
        """Bytes of each rank's memory: two turns of everybody's blocks, and their flags."""
        return ranks * blocks * (2 * BLOCK_BYTES + 4)

    def takes(self, tensor: Tensor) -> bool:
        """Whether it sums a tensor of this size, dtype and layout."""
        fits = self.ranks == 2 or tensor.nbytes <= self.blocks * BLOCK_BYTES
        return tensor.dtype in SUMMED and tensor.is_contiguous() and fits

    def sum(self, tensor: Tensor, first: bool = False) -> None:
        """The sum of all ranks' tensors, in place, the same bits on all: added in float32.

        first: the first rank's tensor instead.
        One after the other, also on several streams; whoever replays graphs meanwhile sees to that.
        """
        with on_device(tensor):
            if not torch.cuda.is_current_stream_capturing():
                stream = torch.cuda.current_stream()
                if self.stream is not None and self.stream != stream:
                    stream.wait_stream(self.stream)
                self.stream = stream
            most = self.blocks * BLOCK_BYTES
            fits = tensor.nbytes <= most
            for part in (tensor,) if fits else tensor.view(-1).split(most // tensor.itemsize):
                launch(self.launch(part, first))

    def launch(self, tensor: Tensor, first: bool = False) -> Launch:
        """The launch that computes `sum`."""
        block, size = BLOCK_BYTES // tensor.itemsize, tensor.numel()
        pdl = tensor.is_cuda and gpu(tensor.device.index)[1] >= tuning.PDL_CAPABILITY
        constants = self.rank, self.ranks, block, self.blocks, first, self.patience, pdl
        tensors = tensor, self.bases, self.epochs
        grid = (-(-size // block), 1, 1)
        return Launch(sum_ranks_kernel, grid, tensors, (size,), constants, 4, 1, pdl)


def peer_memory(group: Any, tensor: Tensor) -> PeerMemory | None:
    """A group's memory, made at the first call for a GPU that is not capturing; None for none.

    The same on all ranks, whose GPUs are different ones of one host, and reach each other.
    """
    if not tensor.is_cuda:
        return None
    if group not in _memories:
        if torch.cuda.is_current_stream_capturing():
            return None
        _memories[group] = _make(group, tensor.device)
    return _memories[group]


def _make(group: Any, device: torch.device) -> PeerMemory | None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, (socket.gethostname(), device.index), group=group)
    hosts, devices = zip(*found, strict=True)
    reachable = len(set(hosts)) == 1 and len(set(devices)) == ranks and all(
        index == device.index
        or (index < torch.cuda.device_count() and torch.cuda.can_device_access_peer(device, index))
        for index in devices
    )  # fmt: skip
    dist.all_gather_object(found, reachable, group=group)
    if not all(found):
        logger.info(
            "%d ranks sum by %s: %s", ranks, dist.get_backend(group), "their GPUs are apart"
        )
        return None
    memory = error = None
    try:
        symmetric = import_module("torch.distributed._symmetric_memory")
        blocks = (LIMIT_OF_TWO if ranks == 2 else LIMIT) // BLOCK_BYTES
        size = PeerMemory.size(ranks, blocks)
        with torch.inference_mode(False):
            buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
            handle = symmetric.rendezvous(buffer, group)
            buffer.zero_()
            offset = buffer.data_ptr() - handle.buffer_ptrs[rank]
            addresses = [each + offset for each in handle.buffer_ptrs]
            memory = PeerMemory(rank, addresses, blocks, device, _patience(group, device))
        memory.kept = buffer, handle
        torch.cuda.synchronize(device)
    except Exception as found_error:  # or the others would wait for this rank
        error = found_error
    dist.all_gather_object(found, error and str(error), group=group)
    failed = next((each for each in found if each is not None), None)
    if failed is not None:
        logger.info("%d ranks sum by %s: %s", ranks, dist.get_backend(group), failed)
        return None
    return memory


def _patience(group: Any, device: torch.device) -> int:
    """A group's timeout in nanoseconds."""
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return PATIENCE if timeout is None else int(timeout.total_seconds() * 1e9)


def gave_up(group: Any) -> str:
    """What is known of a sum that this GPU gave up; "" where it has not."""
    memory = _memories.get(group)
    if memory is None or not memory.gave_up.item():
        return ""
    return f"this GPU waited for another's part of a sum for {memory.patience / 1e9:g} s"
