"""The processes that share the weights of MLPs, and what they do together."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_triton_mlp.peer_memory import gave_up, peer_memory

#: Not in all builds of PyTorch.
functional: Any = (
    import_module("torch.distributed._functional_collectives") if dist.is_available() else None
)


class RankError(RuntimeError):
    """An error of another rank, or the loss of one: nobody has to be told of it."""


class LostRankError(RankError):
    """The loss of another rank, after which nothing can be done together."""


class Ranks:
    """A process group, this process's rank in it, and their number.

    What is called here is called by all ranks, in the same order. A rank that dies ends the call on
    the others with a RankError: gloo's at once, else when the group's timeout has passed.
    """

    def __init__(self, group: Any) -> None:
        """Raises TypeError for what is no process group, and ValueError outside of it."""
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "mp_group needs torch.distributed: call torch.distributed.init_process_group on "
                "each rank first"
            )
        if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"rank {dist.get_rank()} is not in mp_group: only its members call this with it"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"mp_group is a {type(group).__name__}; supported: a "
                "torch.distributed.ProcessGroup, torch.distributed.group.WORLD, say"
            )
        try:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        except ValueError as error:
            raise ValueError(f"mp_group is no group of this process any more: {error}") from error
        self.group: dist.ProcessGroup = group

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranks) and other.group is self.group

    def __hash__(self) -> int:
        return hash(self.group)

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "an MLP whose weights are shared by the ranks of a process group cannot be pickled; "
            "unpatch_model gathers them, and so does state_dict"
        )

    @property
    def is_first(self) -> bool:
        """Whether this rank adds what joins the sum of all ranks' results once."""
        return self.rank == 0

    def sum(self, tensor: Tensor, doing: str = "adding up what they computed of an MLP") -> Tensor:
        """The sum of all ranks' tensors, in place; a new one under torch.compile."""
        if torch.compiler.is_compiling():
            return functional.all_reduce(tensor, "sum", self.group)
        if tensor.numel() and not tensor.is_meta:
            with self._losing(doing):
                memory = peer_memory(self.group, tensor)
                if memory is not None and memory.takes(tensor):
                    memory.sum(tensor)
                else:
                    dist.all_reduce(tensor, group=self.group)
        return tensor

    def first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, in place if it is contiguous; a new one under torch.compile."""
        if torch.compiler.is_compiling():
            return self.sum(tensor if self.is_first else torch.zeros_like(tensor))
        tensor = tensor.contiguous()
        if tensor.numel() and not tensor.is_meta:
            with self._losing("taking what the first computed"):
                memory = peer_memory(self.group, tensor)
                if memory is not None and memory.takes(tensor):
                    memory.sum(tensor, first=True)
                else:
                    dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)
        return tensor

    def summed(self, part: Tensor) -> Tensor:
        """`sum` of a tensor that nobody else has, with a gradient for each rank's."""
        return _Sum.apply(part, self) if _has_grad(part) else self.sum(part.contiguous())

    def copied(self, whole: Tensor) -> Tensor:
        """A tensor that each rank has, whose gradient is the sum of all ranks'."""
        return _Copy.apply(whole, self) if _has_grad(whole) else whole

    def gather(self, part: Tensor) -> list[Tensor]:
        """All ranks' tensors of this shape and dtype, bit for bit."""
        if part.is_meta:
            return [torch.empty_like(part) for _ in range(self.size)]
        flat = part.detach().contiguous().view(-1).view(torch.uint8)
        found = flat.new_empty((self.size, flat.numel()))
        with self._losing("gathering what each has"):
            dist.all_gather(list(found.unbind()), flat, group=self.group)
        return [each.view(part.dtype).view(part.shape) for each in found]

    def exchange(self, value: Any, doing: str) -> list[Any]:
        """What each rank has, objects that can be pickled."""
        found: list[Any] = [None] * self.size
        with self._losing(doing):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def same(self, text: str) -> bool:
        """Whether all ranks have this text; cheaper than `exchange`."""
        first, *others = self._gather_bytes(hashlib.sha256(text.encode()).digest())
        return all(other == first for other in others)

    def everywhere(self, value: bool) -> bool:
        """Whether it is true on all ranks; cheaper than `exchange`."""
        return all(each == b"\1" for each in self._gather_bytes(bytes([value])))

    def _gather_bytes(self, value: bytes) -> list[bytes]:
        device = "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"
        each = torch.zeros((self.size, len(value)))
        each[self.rank] = torch.tensor(list(value))
        doing = "comparing what each has"
        with self._losing(doing):
            return [bytes(map(int, row)) for row in self.sum(each.to(device), doing).tolist()]

    def agree(self, found: Mapping[str, Any], doing: str) -> None:
        """Raise ValueError, on all ranks, where one has something else than the first."""
        first, *others = self.exchange(dict(found), doing)
        for rank, other in enumerate(others, 1):
            names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
            if names:
                rest = f" and {len(names) - 1} more" if names[1:] else ""
                raise ValueError(
                    f"rank {rank} differs from rank 0 while {doing}: {names[0]}{rest}; there "
                    f"{other.get(names[0])}, on rank 0 {first.get(names[0])}"
                )

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """What all ranks get through, or none: an error on one is raised on the others too."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            with suppress(RankError):  # the others may be gone: this one says more
                self.exchange(f"{type(error).__name__}: {error}", doing)
            raise
        self.meet(doing)

    def meet(self, doing: str) -> None:
        """Wait for all ranks; RankError where one has left `together` with an error."""
        for rank, error in enumerate(self.exchange(None, doing)):
            if error is not None:
                raise RankError(f"rank {rank} of {self.size} failed while {doing}: {error}")

    @contextmanager
    def _losing(self, doing: str) -> Iterator[None]:
        """A LostRankError for what torch.distributed and CUDA raise."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            why = gave_up(self.group) or error
            raise LostRankError(f"{self} lost the others while {doing}: {why}") from error


def ranks_of(group: Any) -> Ranks | None:
    """The ranks of a group; None for no group, and where there is one rank alone."""
    if group is None:
        return None
    ranks = Ranks(group)
    return None if ranks.size == 1 else ranks


def together(ranks: Ranks | None, doing: str) -> Any:
    """`Ranks.together`, if there are others."""
    return nullcontext() if ranks is None else ranks.together(doing)


def _has_grad(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


class _Copy(torch.autograd.Function):
    """Each rank computes with what all have; what that changes adds up."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: Ranks) -> Tensor:  # pyright: ignore
        ctx.ranks = ranks
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return ctx.ranks.sum(gradient.clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    """Each rank adds its part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:  # pyright: ignore
        return ranks.sum(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return gradient, None
