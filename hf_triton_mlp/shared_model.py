"""What a whole model adds where ranks share the weights of its MLPs: all ranks write one text.

Each computes attention and logits by itself, and PyTorch promises no equal bits on two GPUs: at a
tie ranks could choose different tokens, and add up from then on what they compute of different
texts. So logits are the first rank's, and generate() compares what the ranks call it with.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from hf_triton_mlp.mlp import StandIn, TritonMLP, set_kind
from hf_triton_mlp.peer_memory import gave_up
from hf_triton_mlp.ranks import RankError, Ranks


class SharedModel(StandIn):
    """What sharing adds to the class of the module whose generate() a model's is."""

    keeps_name = keeps_module = True
    ranks_of_model: Ranks

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__bases__[0] is SharedModel and cls.original_class is not None:
            cls.forward = _with_logits_of_first(cls.original_class.forward)  # pyright: ignore

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError, on all ranks, where one is called with something else."""
        ranks = self.ranks_of_model
        found = dict(_described(self, args, kwargs))
        if not ranks.same(repr(found)):
            ranks.agree(found, "comparing what generate() is called with")
        theirs: Any = super()
        try:
            return theirs.generate(*args, **kwargs)
        except RuntimeError as error:
            why = gave_up(ranks.group)
            if why and not isinstance(error, RankError):
                raise RankError(f"{ranks} lost the others in generate(): {why}") from error
            raise


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


def _with_logits_of_first(forward: Any) -> Any:
    """A model's forward, whose logits are the first rank's where nothing is trained by them."""

    @functools.wraps(forward)  # transformers looks at the arguments
    def shared(self: SharedModel, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        logits = getattr(outputs, "logits", None)
        if isinstance(logits, Tensor) and not logits.requires_grad:
            outputs.logits = self.ranks_of_model.first(logits)
        return outputs

    return shared


def _described(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Arguments of generate() that can be compared, and the random numbers that it draws.

    A streamer may be one rank's alone.
    """
    for name, value in {**dict(enumerate(args)), **kwargs}.items():
        if isinstance(value, Tensor):
            yield f"{name}", f"{tuple(value.shape)}, {value.dtype}, with checksum {_digest(value)}"
        elif isinstance(value, bool | int | float | str):
            yield f"{name}", repr(value)
    config = kwargs.get("generation_config") or model.generation_config
    for name, value in config.to_dict().items():
        yield f"generation_config.{name}", repr(value)
    samples = kwargs.get("do_sample")
    if config.do_sample if samples is None else samples:
        device = model.device
        drawn = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        yield "random numbers (torch.manual_seed)", f"with checksum {_digest(drawn)}"


def _digest(tensor: Tensor) -> str:
    """Of its bits."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
