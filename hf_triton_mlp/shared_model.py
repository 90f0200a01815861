"""What a whole model adds where ranks share the weights of its MLPs: all ranks compute one text.

Its calls compare what the ranks are called with, since what they compute of different texts would
be added up, and give the first rank's logits: each computes attention and logits by itself, and
PyTorch promises no equal bits on two GPUs, so that at a tie ranks could choose different tokens.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, MaxTimeCriteria, PreTrainedModel

from hf_triton_mlp.mlp import StandIn, TritonMLP, set_kind
from hf_triton_mlp.peer_memory import gave_up
from hf_triton_mlp.ranks import RankError, Ranks

#: Bytes of a tensor up to which its checksum is computed on the host, and of which parts above.
ON_THE_HOST, PART = 1 << 16, 1 << 22

#: Groups in a call that was compared: what it calls need not be.
_compared: WeakSet[Any] = WeakSet()


class SharedModel(StandIn):
    """What sharing adds to the class of a model of transformers, within others too.

    Calls raise ValueError, on all ranks, where one is called with something else, but where a graph
    is captured or compiled; generate() for max_time too, since each rank has its own clock.
    """

    keeps_name = keeps_module = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        original: Any = cls.original_class
        if cls.__bases__[0] is SharedModel and original is not None:
            cls.forward = _shared_forward(original.forward)
            if issubclass(original, GenerationMixin):
                cls.generate = _shared_generate(original.generate)  # pyright: ignore

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """What DistributedDataParallel asks for before it makes all ranks' weights the first's."""
        raise ValueError(
            f"ranks share the MLPs of this {type(self).__name__}, and DistributedDataParallel, or "
            "Trainer with it, would take their parts for copies; call unpatch_model first"
        )


def update(model: nn.Module) -> None:
    """Let models compute together exactly while ranks share MLPs of them."""
    for module in list(model.modules()):
        if isinstance(module, PreTrainedModel):
            ranks = next((m.ranks for m in module.modules() if _is_shared(m)), None)
            module.__dict__.pop("ranks_of_model", None)
            if ranks is not None:
                module.__dict__["ranks_of_model"] = ranks
            set_kind(module, SharedModel, ranks is not None)


def _is_shared(module: Any) -> bool:
    return isinstance(module, TritonMLP) and module.ranks is not None


def _shared_forward(forward: Any) -> Any:
    """A model's forward for all ranks; outputs.logits, if without gradients, are the first's."""

    @functools.wraps(forward)  # transformers looks at the arguments
    def shared(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ranks: Ranks | None = self.__dict__.get("ranks_of_model")
        if ranks is None:  # kept by a wrapper since
            return forward(self, *args, **kwargs)
        if torch.compiler.is_compiling() or ranks.group in _compared or _is_captured(self):
            outputs = forward(self, *args, **kwargs)
        else:
            given = _by_name(forward, (self, *args), kwargs)
            with _comparing(ranks, "the model", lambda: _modes(self) | _told_of(given)):
                outputs = forward(self, *args, **kwargs)
        logits = getattr(outputs, "logits", None)
        if isinstance(logits, Tensor) and not logits.requires_grad:
            outputs.logits = ranks.first(logits)
        return outputs

    return shared


def _shared_generate(generate: Any) -> Any:
    """A model's generate() for all ranks."""

    @functools.wraps(generate)
    def shared(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ranks: Ranks | None = self.__dict__.get("ranks_of_model")
        if ranks is None:
            return generate(self, *args, **kwargs)
        given = _by_name(generate, (self, *args), kwargs)
        with _comparing(ranks, "generate()", lambda: _modes(self) | _choosing(self, given)):
            _check_clock(self, given)
            try:
                return generate(self, *args, **kwargs)
            except RuntimeError as error:
                why = gave_up(ranks.group)
                if why and not isinstance(error, RankError):
                    raise RankError(f"{ranks} lost the others in generate(): {why}") from error
                raise

    return shared


def _is_captured(model: Any) -> bool:
    return model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def _comparing(ranks: Ranks, what: str, told: Callable[[], dict[str, str]]) -> Iterator[None]:
    """A call of all ranks, with the same arguments; one within another is not compared."""
    if ranks.group in _compared:
        yield
        return
    found = told()
    if not ranks.same(repr(found)):
        ranks.agree(found, f"comparing what {what} is called with")
    _compared.add(ranks.group)
    try:
        yield
    finally:
        _compared.discard(ranks.group)


# --- arguments --------------------------------------------------------------------------------


@functools.cache
def _names(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a function that has self as the first."""
    return dict(zip(_names(function), args, strict=False)) | kwargs


def _told_of(given: Mapping[str, Any]) -> dict[str, str]:
    """What is compared of arguments, by name. A streamer may be one rank's alone."""
    left_out = ("self", "streamer")
    return {k: _told(v) for k, v in given.items() if v is not None and k not in left_out}


def _told(value: Any) -> str:
    """Of a tensor a checksum, of an object what kind it is."""
    if isinstance(value, Tensor):
        values = "" if not _is_plain(value) else f", with checksum {_checksum(value)}"
        return f"{tuple(value.shape)}, {value.dtype}{values}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_told(each)}' for name, each in value.items())}}}"
    length = getattr(value, "get_seq_length", None)  # a cache's
    return type(value).__name__ + ("" if length is None else f" of {int(length())} tokens")


def _modes(model: Any) -> dict[str, str]:
    """What decides besides the arguments how a model computes."""
    kind = model.device.type
    found = {
        "training": f"{model.training}",
        "gradients": f"{torch.is_grad_enabled()}",
        "requires_grad": f"{any(weight.requires_grad for weight in model.parameters())}",
        "autocast": f"{torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)}",
    }
    return found | (_random_numbers(model) if model.training else {})


def _random_numbers(model: Any) -> dict[str, str]:
    device = model.device
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return {"random numbers (torch.manual_seed)": f"with checksum {_checksum(state)}"}


def _choosing(model: Any, given: Mapping[str, Any]) -> dict[str, str]:
    """What is compared of generate(): also how it chooses tokens, and the numbers it draws."""
    told = _told_of({name: v for name, v in given.items() if name != "generation_config"})
    for config in reversed(_configs(model, given)[1:]):
        told |= {f"generation_config.{k}": _told(v) for k, v in config.items() if v is not None}
    if given.get("streamer") is not None and (_setting(model, given, "num_beams") or 1) > 1:
        told["streamer"] = "with beams"  # which is an error, so it has to be all ranks'
    if _setting(model, given, "do_sample"):
        told |= _random_numbers(model)
    return told


def _check_clock(model: Any, given: Mapping[str, Any]) -> None:
    criteria = given.get("stopping_criteria") or ()
    timed = any(isinstance(each, MaxTimeCriteria) for each in criteria)
    if timed or _setting(model, given, "max_time") is not None:
        raise ValueError(
            "ranks that share weights stop together, and by max_time each stops by its own clock; "
            "supported: max_new_tokens, max_length, stop_strings, tokens that end a text"
        )


def _configs(model: Any, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where generate() looks for a setting, until it is not None."""
    configs = (given.get("generation_config"), model.generation_config)
    return [given, *(config.to_dict() for config in configs if config is not None)]


def _setting(model: Any, given: Mapping[str, Any], name: str) -> Any:
    values = (config.get(name) for config in _configs(model, given))
    return next((value for value in values if value is not None), None)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a plain tensor as integers, on its own memory."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integers[min(tensor.itemsize, 8)])


def _checksum(tensor: Tensor) -> str:
    """Of its bits and their order; of much of them on the tensor's device."""
    bits = bits_of(tensor.contiguous().view(-1))
    if bits.nbytes <= ON_THE_HOST:
        return hashlib.sha256(bits.cpu().numpy().tobytes()).hexdigest()[:16]
    total = bits.new_zeros((), dtype=torch.int64)
    places = torch.arange(1, PART + 1, device=bits.device)
    for part in bits.split(PART):
        total = 1_000_003 * total + (part * places[: len(part)]).sum()
    return f"{int(total):x}"
