"""What a whole model adds where ranks share the weights of its MLPs: all ranks compute one text.

Its calls compare what the ranks are called with, since what they compute of different texts would
be added up, and give the first rank's logits: each computes attention and logits by itself, and
PyTorch promises no equal bits on two GPUs, so that at a tie ranks could choose different tokens.
"""

import functools
import hashlib
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from hf_triton_mlp.mlp import StandIn, TritonMLP, set_kind
from hf_triton_mlp.peer_memory import gave_up
from hf_triton_mlp.ranks import RankError, Ranks

#: Bytes of a tensor up to which its checksum is computed on the host.
ON_THE_HOST = 1 << 16

#: Models in a generate() that all ranks have called alike, whose steps need not be compared.
_generating: WeakSet[nn.Module] = WeakSet()


class SharedModel(StandIn):
    """What sharing adds to the class of the module whose generate() a model's is.

    Calls raise ValueError, on all ranks, where one is called with something else, but where a graph
    is captured or compiled.
    """

    keeps_name = keeps_module = True
    ranks_of_model: Ranks

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__bases__[0] is SharedModel and cls.original_class is not None:
            cls.forward = _shared(cls.original_class.forward)  # pyright: ignore

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        ranks = self.ranks_of_model
        _compare(ranks, _described(args, kwargs) | _choice(self, kwargs), "generate()")
        theirs: Any = super()
        _generating.add(self)
        try:
            return theirs.generate(*args, **kwargs)
        except RuntimeError as error:
            why = gave_up(ranks.group)
            if why and not isinstance(error, RankError):
                raise RankError(f"{ranks} lost the others in generate(): {why}") from error
            raise
        finally:
            _generating.discard(self)


def update(model: nn.Module) -> None:
    """Let generate() of a model be that of a shared one exactly while ranks share MLPs of it."""
    for module in model.modules():
        if isinstance(module, GenerationMixin):
            ranks = next((m.ranks for m in module.modules() if _is_shared(m)), None)
            module.__dict__.pop("ranks_of_model", None)
            if ranks is not None:
                module.__dict__["ranks_of_model"] = ranks
            set_kind(module, SharedModel, ranks is not None)
            return


def _is_shared(module: Any) -> bool:
    return isinstance(module, TritonMLP) and module.ranks is not None


def _shared(forward: Any) -> Any:
    """A model's forward for all ranks; where nothing is trained by the logits, the first rank's."""

    @functools.wraps(forward)  # transformers looks at the arguments
    def shared(self: SharedModel, *args: Any, **kwargs: Any) -> Any:
        ranks = self.ranks_of_model
        if not (torch.compiler.is_compiling() or self in _generating or _is_captured(self)):
            _compare(ranks, _described(args, kwargs), "the model")
        outputs = forward(self, *args, **kwargs)
        logits = getattr(outputs, "logits", None)
        if isinstance(logits, Tensor) and not logits.requires_grad:
            outputs.logits = ranks.first(logits)
        return outputs

    return shared


def _is_captured(model: Any) -> bool:
    return model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _compare(ranks: Ranks, found: dict[str, str], what: str) -> None:
    if not ranks.same(repr(found)):
        ranks.agree(found, f"comparing what {what} is called with")


def _described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """Those arguments that can be compared. A streamer may be one rank's alone."""
    found = {}
    for name, value in {**dict(enumerate(args)), **kwargs}.items():
        if isinstance(value, Tensor):
            values = "" if value.is_meta else f", with checksum {_checksum(value)}"
            found[f"{name}"] = f"{tuple(value.shape)}, {value.dtype}{values}"
        elif isinstance(value, bool | int | float | str):
            found[f"{name}"] = repr(value)
    return found


def _choice(model: Any, kwargs: dict[str, Any]) -> dict[str, str]:
    """How generate() chooses tokens, and the random numbers that it draws."""
    config = kwargs.get("generation_config") or model.generation_config
    found = {f"generation_config.{name}": repr(v) for name, v in config.to_dict().items()}
    samples = kwargs.get("do_sample")
    if config.do_sample if samples is None else samples:
        device = model.device
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        found["random numbers (torch.manual_seed)"] = f"with checksum {_checksum(state)}"
    return found


def _checksum(tensor: Tensor) -> str:
    """Of its bits and their order; of much of them on the tensor's device."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    bits = tensor.detach().contiguous().view(-1).view(integers)
    if bits.nbytes > ON_THE_HOST:
        return f"{int((bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum()):x}"
    return hashlib.sha256(bits.cpu().numpy().tobytes()).hexdigest()[:16]
