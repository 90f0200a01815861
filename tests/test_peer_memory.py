"""The sum that GPUs write to each other's memory: ranks one after the other, in one memory each.

What each waits for is there already: the others' blocks and flags.
"""

import pytest
import torch
from torch import Tensor

from hf_triton_mlp import peer_memory
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.launchers import launch
from hf_triton_mlp.peer_memory import BLOCK_BYTES, PeerMemory

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.filterwarnings("default") if INTERPRETED else pytest.mark.gpu
BLOCKS = 4


class Ranks:
    """Memory of each of some ranks on one GPU."""

    def __init__(self, count: int) -> None:
        size = PeerMemory.size(count, BLOCKS)
        self.bytes = [torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(count)]
        addresses = [each.data_ptr() for each in self.bytes]
        self.memories = [PeerMemory(rank, addresses, BLOCKS, DEVICE) for rank in range(count)]

    def place(self, reader: int, writer: int, epoch: int) -> Tensor:
        """Where a rank finds what another wrote."""
        blocks = self.bytes[reader][: 2 * len(self.bytes) * BLOCKS * BLOCK_BYTES]
        return blocks.view(2, len(self.bytes), -1)[epoch % 2, writer]

    def flags(self, reader: int, writer: int) -> Tensor:
        flags = self.bytes[reader][2 * len(self.bytes) * BLOCKS * BLOCK_BYTES :]
        return flags.view(torch.int32).view(len(self.bytes), BLOCKS)[writer]

    def write(self, reader: int, writer: int, epoch: int, x: Tensor) -> None:
        """What another rank's kernel does."""
        self.place(reader, writer, epoch)[: x.nbytes] = x.view(torch.uint8)
        self.flags(reader, writer).fill_(epoch)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "size"), [(2, 96), (2, 4000), (3, 2049)])
def test_ranks_sum(count: int, size: int, dtype: torch.dtype, first: bool) -> None:
    """Or have what the first has."""
    ranks = Ranks(count)
    size = min(size, BLOCKS * BLOCK_BYTES // dtype.itemsize)
    for epoch in (1, 2, 3):
        parts = [torch.randn(size).to(DEVICE, dtype) for _ in range(count)]
        total = torch.zeros(size, device=DEVICE)
        for part in parts[:1] if first else parts:
            total += part.float()
        # The first finds all others' flags; each of the rest those of the ones before it.
        for rank in range(count):
            for other in range(rank + 1, count):
                ranks.write(rank, other, epoch, parts[other])
        for rank, part in enumerate(parts):
            found = part.clone()
            assert ranks.memories[rank].takes(found)
            launch(ranks.memories[rank].launch(found, first))
            cuts = INTERPRETED and dtype == torch.bfloat16 and not first
            rounding = 2**-7 if cuts else 0.0
            torch.testing.assert_close(found, total.to(dtype), rtol=rounding, atol=0.0)
            for other in set(range(count)) - {rank}:
                written = ranks.place(other, rank, epoch)[: part.nbytes].view(dtype)
                assert torch.equal(written, part) or (first and rank > 0)
                used = -(-part.nbytes // BLOCK_BYTES)
                assert ranks.flags(other, rank)[:used].tolist() == [epoch] * used


def test_epochs_wrap_around() -> None:
    ranks, most = Ranks(2), 2**31 - 1
    for memory in ranks.memories:
        memory.epochs.fill_(most - 1)
    for epoch, next_one in ((most, -(2**31)), (-(2**31), -(2**31) + 1), (1 - 2**31, 2 - 2**31)):
        parts = [torch.randn(96, device=DEVICE) for _ in range(2)]
        ranks.write(0, 1, epoch, parts[1])
        if epoch != most:  # the other is ahead, as it may be
            ranks.flags(0, 1).fill_(next_one)
        found = parts[0].clone()
        launch(ranks.memories[0].launch(found))
        torch.testing.assert_close(found, parts[0] + parts[1])
        assert ranks.memories[0].epochs[0].item() == epoch
        assert ranks.flags(1, 0)[0].item() == epoch


def test_what_is_summed_otherwise() -> None:
    memory, of_more = Ranks(2).memories[0], Ranks(3).memories[0]
    assert of_more.takes(torch.empty(BLOCKS * BLOCK_BYTES // 4))
    assert not of_more.takes(torch.empty(BLOCKS * BLOCK_BYTES // 4 + 1))
    assert memory.takes(torch.empty(BLOCKS * BLOCK_BYTES))
    assert not memory.takes(torch.empty(8, dtype=torch.float64))
    assert not memory.takes(torch.empty(4, 8).t())


def test_streams_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, tensor, done = Ranks(2).memories[0], torch.ones(8, device=DEVICE), []

    class Stream(str):
        def wait_stream(self, other: str) -> None:
            done.append(f"{self} after {other}")

    monkeypatch.setattr(peer_memory, "launch", lambda call: done.append("sum"))
    for stream, captured in (("a", 0), ("a", 0), ("b", 0), ("c", 1), ("b", 0), ("a", 0)):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda of=stream: Stream(of))
        capturing = lambda captured=captured: bool(captured)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
        memory.sum(tensor)
    assert done == ["sum", "sum", "b after a", "sum", "sum", "sum", "a after b", "sum"]


def test_what_is_larger_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, most = Ranks(2).memories[0], BLOCKS * BLOCK_BYTES // 4
    tensor = torch.arange(2.0 * most + 3, device=DEVICE).view(1, -1)
    parts: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(peer_memory, "launch", lambda call: parts.append(call.tensors[0]))
    memory.sum(tensor)
    assert [part.numel() for part in parts] == [most, most, 3]
    assert torch.equal(torch.cat(parts), tensor[0]) and parts[0].data_ptr() == tensor.data_ptr()


def test_who_waited_in_vain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel notes it where the host can read it, when CUDA says no more than an error."""
    group, memory = Group(), Ranks(2).memories[0]
    monkeypatch.setitem(peer_memory._memories, group, memory)
    assert peer_memory.gave_up(group) == "" and peer_memory.gave_up(Group()) == ""
    memory.gave_up.fill_(1)
    assert "for 600 s" in peer_memory.gave_up(group)


class Group:
    """A process group, as far as it is one here."""
