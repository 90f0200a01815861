"""One decode step of a model, captured in a CUDA graph, and the captures that a model keeps."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    StaticCache,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from hf_triton_mlp import attention
from hf_triton_mlp.choosing import CHOICES, Choice, Choosing
from hf_triton_mlp.fingerprint import fingerprint
from hf_triton_mlp.ranks import LostRankError, RankError, Ranks
from hf_triton_mlp.step_ops import DTYPES, StepOperations, choose_greedily

logger = logging.get_logger(__name__)

#: What transformers calls a model's cache.
CACHE = "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"

#: Steps before ways to take one are compared: what the next one looks at has to differ.
PROBES = 4

#: Captures that a model keeps; the one that was not used for longest goes first.
CAPTURES = 8

#: The part of a GPU's memory that they may have; a capture that is larger goes after its call.
SHARE = 1 / 8


class CannotCapture(Exception):
    """Why transformers' own loop has to run."""


class StepShape(NamedTuple):
    """What a captured step is for.

    capacity: tokens in its cache; greedy: it chooses the next token, and `ends` is how many tokens
    end a text; positions, logits_to_keep: which arguments the model is called with.
    """

    batch: int
    capacity: int
    greedy: bool
    ends: int
    positions: bool
    logits_to_keep: Any


class StaticLayer(CacheLayerMixin):
    """Keys and values (batch, heads, capacity, head size) of one layer; `length` is for all layers.

    transformers' static layers count each for itself, and those with a sliding window count on the
    host, which a graph does not replay; here the mask alone knows of windows.
    """

    is_compileable = True
    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, capacity: int, length: Tensor) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = length
        #: Whether the attention writes keys and values; those that it has still to write.
        self.deferred = False
        self.pending: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.keys, self.values = (
            torch.zeros((batch, heads, self.capacity, states.shape[-1]), dtype=self.dtype,
                        device=self.device)
            for states in (key_states, value_states)
        )  # fmt: skip
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.deferred:
            self.pending = key_states, value_states
            return self.keys, self.values
        place = self.length.view(1)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_seq_length(self) -> Any:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class DecodeCache(StaticCache):
    """The cache of a step; families look at the class of a cache to prepare masks."""

    def __init__(self, layers: int, capacity: int, length: Tensor) -> None:
        Cache.__init__(self, layers=[StaticLayer(capacity, length) for _ in range(layers)])


class Step:
    """From the last token to the next logits, or the next token, on tensors that stay in place."""

    # A user's inference mode must not make tensors that outlive it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any, shape: StepShape, layers: int) -> None:
        """Takes a few steps: the layers then know what their keys are, and have some to compare."""
        batch, capacity = shape.batch, shape.capacity
        self.shape = shape
        device = model.device
        #: How many tokens the cache holds, and where the next one goes.
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.token = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.token) if shape.positions else None
        #: 0 for padding; 1 also where there is no token yet, which the causal mask covers.
        self.mask = torch.ones((batch, capacity), dtype=torch.int64, device=device)
        self.cache: Any = DecodeCache(layers, capacity, self.length)
        self.operations = StepOperations()
        self.logits = torch.empty(0)
        self.pad = torch.zeros((), dtype=torch.int64, device=device)
        self.ends = torch.zeros(shape.ends, dtype=torch.int64, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        #: The next tokens, and which texts go on after them.
        self.report = torch.zeros((2, batch), dtype=torch.int64, device=device)
        #: What was captured to choose tokens, behind a step that does not; None where it cannot be.
        self.choices: OrderedDict[Any, Choice | None] = OrderedDict()
        self.graph: torch.cuda.CUDAGraph | None = None
        #: What capturing took: memory that the graphs of a pool did not have yet, and time.
        self.graph_bytes = 0
        self.seconds = 0.0
        #: The stream whose memory it has.
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        #: Whether the attention is ours, which writes the cache too.
        self.fused = False
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        for first in range(PROBES):  # another token for each text
            texts = torch.arange(first * batch, (first + 1) * batch, device=device)
            self.token.copy_((texts % vocabulary)[:, None])
            self.run(model)
        if not all(layer.is_initialized for layer in self.cache.layers):
            raise ValueError("the model keeps nothing in some layers of its cache")
        self._fuse(model)

    def _fuse(self, model: Any) -> None:
        """Let linear layers, norms and the attention be ours, where they compute the same."""

        def with_operations() -> Tensor:
            self.operations.ours = True
            self.run(model)
            return self.logits

        def with_attention() -> Tensor:
            self.fused = True
            self.run(model)
            return self.logits

        if model.dtype in DTYPES:
            try:
                self._compare(model, with_operations)
            except ValueError as reason:
                self.operations.ours = False
                logger.warning_once(f"generate() keeps PyTorch's linear layers: {reason}")
        if all(attention.fusible(layer.keys, layer.values) for layer in self.cache.layers):
            try:
                self._compare(model, with_attention)
            except (attention.CannotFuse, ValueError) as reason:
                self.fused = False
                logger.warning_once(f"generate() keeps transformers' attention: {reason}")

    def run(self, model: Any) -> None:
        """Take the step, launching its kernels one by one."""
        with self.operations, attention.in_step(model, self.cache) if self.fused else nullcontext():
            self._run(model)

    def _run(self, model: Any) -> None:
        arguments: dict[str, Any] = {CACHE: self.cache, "use_cache": True}
        if self.positions is not None:
            arguments["position_ids"] = self.positions
        if self.shape.logits_to_keep is not None:
            arguments["logits_to_keep"] = self.shape.logits_to_keep
        inputs = model.prepare_inputs_for_generation(
            self.token, next_sequence_length=1, attention_mask=self.mask, **arguments
        )
        self.logits = model(**inputs, return_dict=True).logits[:, -1]
        if self.shape.greedy:
            choose_greedily(
                self.logits,
                self.token,
                self.ends,
                self.pad,
                self.unfinished,
                self.report,
                self.length,
                self.positions,
            )
        else:
            self.length += 1
            if self.positions is not None:
                self.positions += 1

    def __call__(self, model: Any) -> None:
        """Take the step: replayed, if it was captured."""
        if self.graph is None:
            self.run(model)
        else:
            self.graph.replay()

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture(self, model: Any, pool: Any) -> None:
        """Capture the step in a graph; ValueError if that computes other logits than `run`."""
        device = model.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.run(model)  # what is done at a first or second call only is done now
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on to use the GPU meanwhile.
        mode = "thread_local"
        # cuBLAS keeps a workspace for each stream. The graph gets its own, in its own memory, so
        # that graphs of other models may run at the same time.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            reserved = torch.cuda.memory_reserved(device)
            self.run(model)
            self.graph_bytes = torch.cuda.memory_reserved(device) - reserved
        torch._C._cuda_clearCublasWorkspaces()
        logits = self.logits

        def replayed() -> Tensor:
            graph.replay()
            return logits

        self._compare(model, replayed)
        self.graph, self.logits = graph, logits

    def _compare(self, model: Any, take: Callable[[], Tensor]) -> None:
        """ValueError if the step, taken in another way, has other logits, but for rounding."""
        state = [self.length, self.token, self.unfinished]
        state += [] if self.positions is None else [self.positions]
        before = [tensor.clone() for tensor in state]
        self.run(model)
        expected = self.logits.float()
        torch._foreach_copy_(state, before)  # pyright: ignore[reportPrivateImportUsage]
        error, size = (take() - expected).norm(), expected.norm()
        if not (error <= torch.finfo(model.dtype).eps ** 0.5 * size).item():
            raise ValueError(f"it computes other logits (by {(error / size).item():.2g})")

    def load(
        self,
        source: Any,
        length: int,
        token: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        unfinished: Tensor,
    ) -> None:
        """Go on after `length` tokens, whose keys and values `source` has.

        token (batch, 1): the last one, which is not in `source`; mask (batch, length + 1) and
        positions (batch, …, the last one last): of all tokens, None where all are looked at, and
        where the model is called without; unfinished (batch,).
        """
        self._fill([(layer.keys, layer.values) for layer in source.layers], length)
        self.token.copy_(token)
        self.mask.fill_(1)
        if mask is not None:
            self.mask[:, : mask.shape[1]].copy_(mask)
        if self.positions is not None:
            assert positions is not None
            self.positions.copy_(positions[..., -1:])
        self.unfinished.copy_(unfinished)

    def end_with(self, ends: Tensor | None, pad: Tensor | None) -> None:
        """The tokens that end a text, as many as the shape says, and what follows them."""
        if self.shape.ends:
            assert ends is not None and pad is not None
            self.ends.copy_(ends)
            self.pad.copy_(pad)

    def go_on_from(self, other: "Step", length: int) -> None:
        """Take the place of a step with less capacity, after `length` tokens."""
        self._fill([(layer.keys, layer.values) for layer in other.cache.layers], length)
        self.mask.fill_(1)
        self.mask[:, : other.shape.capacity].copy_(other.mask)
        for name in ("token", "positions", "unfinished", "pad", "ends"):
            value = getattr(other, name)
            if value is not None:
                getattr(self, name).copy_(value)

    def _fill(self, states: list[tuple[Any, Any]], length: int) -> None:
        """Keep the last of `length` tokens that there are, and nothing of an earlier text.

        A number that is not finite would pass through the mask: its weight is 0, not its product.
        """
        self._keep_for_this_stream()
        self.length.fill_(length)
        places, sources, rest = [], [], []
        for layer, pair in zip(self.cache.layers, states, strict=True):
            for own, given in zip((layer.keys, layer.values), pair, strict=True):
                given = given[:, :, :length]
                start = length - given.shape[2]
                places.append(own[:, :, start:length])
                sources.append(given)
                rest += [own[:, :, :start], own[:, :, length:]]
        torch._foreach_copy_(places, sources)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_zero_([part for part in rest if part.numel()])  # pyright: ignore[reportPrivateImportUsage]

    def _keep_for_this_stream(self) -> None:
        """Once it is dropped, let its memory wait for what another stream still does with it."""
        stream = None if self.stream is None else torch.cuda.current_stream(self.stream.device)
        if stream is not None and stream != self.stream:
            choices = [vars(choice) for choice in self.choices.values() if choice is not None]
            values = [value for each in (vars(self), *choices) for value in each.values()]
            for value in (*values, *self._states()):
                if isinstance(value, Tensor):
                    value.record_stream(stream)

    def give_back(self, cache: Any, length: int) -> None:
        """Let `cache`, of the kind that was loaded, end after `length` tokens."""
        for own, layer in zip(self.cache.layers, cache.layers, strict=True):
            start = 0
            if isinstance(layer, DynamicSlidingWindowLayer):
                start = max(0, length - layer.sliding_window + 1)
                layer.cumulative_length = length
            layer.keys = own.keys[:, :, start:length].clone()
            layer.values = own.values[:, :, start:length].clone()

    @cached_property
    def nbytes(self) -> int:
        """Of the cache and of what else stays in place, without the graph's own memory."""
        return sum(tensor.nbytes for tensor in (*self._states(), self.mask))

    def _states(self) -> list[Tensor]:
        return [part for layer in self.cache.layers for part in (layer.keys, layer.values)]


class Captures:
    """The captured steps of one model. One thread at a time decodes with them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._fingerprint: Any = None
        self._steps: OrderedDict[StepShape, Step] = OrderedDict()
        self._pool: Any = None
        self._pool_bytes = 0
        self._ended: torch.cuda.Event | None = None

    @contextmanager
    def in_use(self, device: torch.device) -> Iterator[None]:
        """Wait until no other thread decodes; CannotCapture within a step of this thread.

        The device is the current one meanwhile. Its stream waits for what another one still does.
        """
        if self._owner == threading.get_ident():
            raise CannotCapture("this thread is in the middle of another generate()")
        on_gpu = device.type == "cuda"
        with self._lock, torch.cuda.device(device) if on_gpu else nullcontext():
            if self._ended is not None:
                torch.cuda.current_stream().wait_event(self._ended)
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
                self._trim(0, device)
                if on_gpu:
                    self._ended = torch.cuda.Event()
                    self._ended.record()

    def fit(self, model: nn.Module) -> bool:
        """Whether what is captured still is what the model computes."""
        return self._fingerprint == fingerprint(model)

    def step(self, model: Any, shape: StepShape, layers: int) -> Step:
        """The step of this shape, captured now if it was not yet; by all ranks, or by none."""
        ranks = ranks_of_model(model)
        if not self.fit(model):
            self._steps.clear()
        step = self._steps.get(shape)
        if ranks is not None and not ranks.everywhere(step is not None):
            step = None
        if step is None:
            if ranks is None:
                step = self._capture_with_room(model, shape, layers)
            else:
                step = self._capture_together(model, shape, layers, ranks)
            found = fingerprint(model)  # a first call may have set numbers
            if found != self._fingerprint:
                self._steps.clear()
            self._fingerprint, self._steps[shape] = found, step
        self._steps.move_to_end(shape)
        self._trim(1, model.device)
        return step

    def choice(self, step: Step, choosing: Choosing) -> Choice | None:
        """What chooses tokens behind a step, captured now if it was not yet; None if it cannot be.

        A capture changes the step's token and which texts are unfinished.
        """
        on_gpu = step.token.is_cuda
        if on_gpu and step.graph is None:
            return None
        if choosing.key not in step.choices:
            choice = None
            try:
                choice = Choice(step.token, step.unfinished, step.shape.capacity, choosing)
                if on_gpu:
                    choice.capture(step.logits, self._pool)
                    self._pool_bytes += choice.graph_bytes
            except Exception as error:
                choice = None
                logger.warning_once(f"generate() chooses tokens without CUDA graphs: {error}")
            step.choices[choosing.key] = choice
            if len(step.choices) > CHOICES:
                step.choices.popitem(last=False)
        step.choices.move_to_end(choosing.key)
        return step.choices[choosing.key]

    def _trim(self, least: int, device: torch.device) -> None:
        """Keep as many captures as there is room for, or so many if there is not."""
        while len(self._steps) > least and (
            len(self._steps) > CAPTURES or self.nbytes > most_bytes(device)
        ):
            self._steps.popitem(last=False)

    def _capture_with_room(self, model: Any, shape: StepShape, layers: int) -> Step:
        """A captured step; those that are kept make room for it, if they must."""
        if self._steps:
            try:
                return self._capture(model, shape, layers)
            except torch.cuda.OutOfMemoryError:
                self._steps.clear()
        # Out here, where the error keeps no tensor of the first try alive.
        try:
            return self._capture(model, shape, layers)
        except torch.cuda.OutOfMemoryError as error:
            raise CannotCapture(f"there is no memory for {shape}") from error

    def _capture_together(self, model: Any, shape: StepShape, layers: int, ranks: Ranks) -> Step:
        """A step that all ranks capture; what is kept makes room for the next call's, if it must.

        A rank that has no memory in the middle of a forward is waited for in vain.
        """
        try:
            with ranks.together("capturing a step"):
                return self._capture(model, shape, layers)
        except LostRankError:
            raise
        except (RankError, torch.cuda.OutOfMemoryError) as error:
            self._steps.clear()
            raise CannotCapture(str(error)) from error

    def _capture(self, model: Any, shape: StepShape, layers: int) -> Step:
        started = time.perf_counter()
        try:
            step = Step(model, shape, layers)
            if model.device.type == "cuda":
                if not self._steps:  # a pool ends with its last graph
                    self._pool, self._pool_bytes = torch.cuda.graph_pool_handle(), 0
                step.capture(model, self._pool)
                self._pool_bytes += step.graph_bytes
        except (torch.cuda.OutOfMemoryError, LostRankError):
            raise
        except Exception as error:
            raise CannotCapture(f"a step cannot be captured: {error}") from error
        step.seconds = time.perf_counter() - started
        return step

    @property
    def nbytes(self) -> int:
        """Of all that is captured, with the graphs' own memory, which they share."""
        steps = list(self._steps.values())
        return sum(step.nbytes for step in steps) + (self._pool_bytes if steps else 0)

    @property
    def seconds(self) -> float:
        """How long the captures took that are kept."""
        return sum(step.seconds for step in self._steps.values())

    def __str__(self) -> str:
        captured = list(self._steps.items())  # another thread may add to them
        if not captured:
            return "CUDA graphs: none captured yet"
        lines = [
            f"batch {shape.batch}, {shape.capacity} tokens"
            f"{', greedy' if shape.greedy else ''}: {step.nbytes / 2**20:.1f} MiB of cache, "
            f"captured in {step.seconds:.2f} s"
            for shape, step in captured
        ]
        lines.append(f"the graphs' own memory: {self._pool_bytes / 2**20:.1f} MiB")
        return "CUDA graphs: " + "; ".join(lines)


def most_bytes(device: torch.device) -> float:
    """How much memory of a device a model's captures may have once a call is over."""
    if device.type != "cuda":
        return float("inf")
    return SHARE * torch.cuda.get_device_properties(device).total_memory


_CAPTURES: WeakKeyDictionary[nn.Module, Captures] = WeakKeyDictionary()


def ranks_of_model(model: Any) -> Ranks | None:
    """Those that share weights of it, and so decode it together."""
    return vars(model).get("ranks_of_model")


def captures_of(model: nn.Module) -> Captures:
    """What is captured of a model, for as long as that lives."""
    return _CAPTURES.setdefault(model, Captures())


def forget(model: nn.Module) -> None:
    """Free what is captured of a model."""
    _CAPTURES.pop(model, None)


def drop_stale(model: nn.Module) -> None:
    """Free what is captured of a model that was moved, cast or changed otherwise since."""
    captures = _CAPTURES.get(model)
    if captures is not None:
        with as_decoding(model):
            fits = captures.fit(model)
        if not fits:
            forget(model)


def as_decoding(model: Any) -> AbstractContextManager[Any]:
    """transformers' context for steps, in which experts are computed as few tokens want it."""
    return getattr(model, "_optimize_model_for_decode", nullcontext)()
