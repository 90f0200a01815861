"""generate() with its decode steps in CUDA graphs: `patch_model(model, cuda_graphs=True)`.

transformers prepares the call, runs the prompt and says what to return; ours is the loop in between
(`GenerationMixin._sample`). A step of it, from the last token to the next logits, and with plain
greedy decoding to the next token, is captured once for a batch size and a capacity of the cache
(`capture.Step`), then replayed, while the host reads the tokens of the steps before. Other ways to
choose a token are captured behind it (`choosing.Choice`), or run there by transformers' processors.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput
from transformers.utils import logging

from hf_triton_mlp.capture import (
    CACHE,
    CannotCapture,
    Step,
    StepShape,
    as_decoding,
    captures_of,
    drop_stale,
    forget,
    ranks_of_model,
)
from hf_triton_mlp.choosing import Choice, Choosing, ProcessorsByLength, draw
from hf_triton_mlp.fingerprint import modules_of
from hf_triton_mlp.mlp import StandIn, set_kind
from hf_triton_mlp.reading import has_own_forward, store_by_input, store_by_output
from hf_triton_mlp.step_ops import StepOperations

logger = logging.get_logger(__name__)

MASK = "attention_mask"

#: The model's arguments that a step has as its state. inputs_embeds are for the prompt alone, and
#: tokenizer is for stopping criteria; generate() hands it on nevertheless.
ARGUMENTS = (
    CACHE, MASK, "position_ids", "use_cache", "logits_to_keep", "inputs_embeds",
    "tokenizer",
)  # fmt: skip

#: Where transformers' hooks that record hidden states and attentions are from.
RECORDING = "transformers.utils.output_capturing"

#: Attention that takes a mask, and so can look at a cache that is not full.
ATTENTION = ("sdpa", "eager")

#: Capacities are powers of two from this on; the first has room for that many tokens after the
#: prompt, or as many as there may be.
LEAST_CAPACITY = 256

#: How many steps are launched before the tokens of one are read.
STEPS_AHEAD = 2

#: Run this loop, uncaptured, on the CPU too: for tests.
ON_CPU = False

#: What a captured step does itself.
IN_THE_STEP = (criteria.EosTokenCriteria, criteria.MaxLengthCriteria)

#: Processors and criteria of which no one sees that they ran for a step too many.
STATELESS = (
    *IN_THE_STEP,
    criteria.MaxTimeCriteria,
    criteria.StopStringCriteria,
    processors.EncoderNoRepeatNGramLogitsProcessor,
    processors.EncoderRepetitionPenaltyLogitsProcessor,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.ExponentialDecayLengthPenalty,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.MinPLogitsWarper,
    processors.NoBadWordsLogitsProcessor,
    processors.NoRepeatNGramLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.SequenceBiasLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
    processors.SuppressTokensLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.TypicalLogitsWarper,
)


class GraphDecoding(StandIn):
    """What `cuda_graphs=True` adds to a model's class: this loop, for greedy and sampling."""

    keeps_name = keeps_module = True

    def _sample(self, input_ids: Tensor, **arguments: Any) -> Any:
        theirs: Any = super()
        return _decode(self, theirs._sample, input_ids, **arguments)

    def _validate_generation_mode(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        if GENERATION_MODES_MAPPING[generation_mode] != "_sample":
            _say_why(f"this is {generation_mode.value}")
        theirs: Any = super()
        theirs._validate_generation_mode(generation_mode, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        applied = super()._apply(*args, **kwargs)
        drop_stale(self)
        return applied


def graph_decode(model: Any, input_ids: Tensor, **arguments: Any) -> Any:
    """Decode with CUDA graphs: `model.generate(..., custom_generate=graph_decode)`.

    The model need not be patched. transformers hands neither a streamer nor a tokenizer, which
    stop_strings need, to a custom_generate; with `patch_model(model, cuda_graphs=True)` there is no
    such limit, and nothing to pass.
    Raises ValueError for a generation mode that transformers keeps outside its package.
    """
    mode = arguments["generation_config"].get_generation_mode()
    method = GENERATION_MODES_MAPPING[mode]
    if "/" in method:
        raise ValueError(f"custom_generate=graph_decode does not know {mode.value}; leave it out")
    theirs = functools.partial(getattr(type(model), method), model)
    if method == "_sample":
        return _decode(model, theirs, input_ids, **arguments)
    _say_why(f"this is {mode.value}")
    return theirs(input_ids, **arguments)


def generating(model: nn.Module) -> nn.Module:
    """The module of a model whose generate() it is; ValueError where there is none."""
    for module in model.modules():
        if isinstance(module, GenerationMixin):
            return module
    raise ValueError(f"cuda_graphs needs a model with generate(), found {type(model).__name__}")


def enable(model: nn.Module) -> None:
    """Let generate() of a model decode with CUDA graphs."""
    module = generating(model)
    set_kind(module, GraphDecoding, True)
    names = [name for name, _ in module.named_modules()]
    module.__dict__.setdefault("stored_by_output", []).extend(store_by_output(module, names))


def is_enabled(model: nn.Module) -> bool:
    """Whether generate() of a model decodes with CUDA graphs where it can."""
    return any(isinstance(module, GraphDecoding) for module in model.modules())


def report(model: nn.Module) -> str:
    """What is captured of a model, in one line; "" where nothing is to be."""
    modules = [module for module in model.modules() if isinstance(module, GraphDecoding)]
    return "\n".join(str(captures_of(module)) for module in modules)


def disable(model: nn.Module) -> None:
    """Undo `enable`, and free what was captured."""
    for module in model.modules():
        if isinstance(module, GraphDecoding):
            store_by_input(module, module.__dict__.pop("stored_by_output"))
            set_kind(module, GraphDecoding, False)
        forget(module)  # graph_decode captures without `enable`


def _decode(model: Any, theirs: Callable[..., Any], input_ids: Tensor, **arguments: Any) -> Any:
    """`GenerationMixin._sample` with captured steps, and `theirs` where there cannot be any."""
    ranks = ranks_of_model(model)
    run, reason = None, ""
    try:
        run = _Run(model, input_ids, **arguments)
    except CannotCapture as error:
        reason = str(error)
    if ranks is not None and not ranks.everywhere(run is not None):
        run, reason = None, reason or "another rank cannot"
    if run is not None:
        try:
            with run.captures.in_use(model.device):
                # Before the prompt's forward, so that `theirs` can still start from the beginning.
                step = run.first_step()
                return run.generate(step)
        except CannotCapture as error:
            reason = str(error)
    _say_why(reason)
    drop_stale(model)
    return theirs(input_ids, **arguments)


def _say_why(reason: str) -> None:
    _say(f"generate() runs transformers' own loop, without CUDA graphs: {reason}")


def _say(message: str) -> None:
    logger.warning_once(message)


def obstacle(model: Any, input_ids: Tensor, config: Any, arguments: dict[str, Any]) -> str | None:
    """Why a call of `generate` is not decoded in captured steps; None if it may be."""
    cache = arguments.get(CACHE)
    modules = modules_of(model)
    places = {
        tensor.device
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }
    text = model.config.get_text_config(decoder=True)
    attention = text._attn_implementation
    given = [name for name, value in arguments.items() if value is not None]
    extra = [name for name in given if name not in ARGUMENTS]
    reasons = {
        "it is an encoder-decoder model": model.config.is_encoder_decoder,
        f"{type(model).__name__} has a loop, or methods, of its own": _has_own_methods(model),
        f"the model is on {', '.join(sorted(map(str, places)))}": len(places) != 1
        or not (model.device.type == "cuda" or (ON_CPU and model.device.type == "cpu")),
        f"the tokens are on {input_ids.device}": input_ids.device != model.device,
        f"attention is {attention!r}, supported: {', '.join(ATTENTION)}": attention
        not in ATTENTION,
        # They would look at places of the cache that have no token yet.
        "its texts look at tokens behind": not getattr(text, "is_causal", True)
        or getattr(text, "use_bidirectional_attention", None) in (True, "all"),
        "the model is in training mode": any(module.training for module in modules),
        "autocast is on": torch.is_autocast_enabled(model.device.type),
        "modules of the model have hooks, or forwards of their own, or are compiled": _has_hooks(
            modules
        ),
        "attentions or hidden states are asked for": config.output_attentions
        or config.output_hidden_states,
        "it drafts for another model": config.is_assistant,
        "compiling, or another cache, is asked for": config.compile_config is not None
        or config.cache_implementation not in (None, "dynamic"),
        "there is no cache": cache is None or not arguments.get("use_cache", True),
        f"the cache is a {type(cache).__name__} without layers, or with others than "
        "DynamicLayer and DynamicSlidingWindowLayer": not _is_dynamic(cache),
        f"the model takes {', '.join(extra)}": bool(extra),
        "position_ids has not two dimensions": getattr(arguments.get("position_ids"), "ndim", 2)
        != 2,
    }
    return next((reason for reason, found in reasons.items() if found), None)


def _has_hooks(modules: list[nn.Module]) -> bool:
    """Whether calls of modules run what a replayed step would not.

    transformers' own hooks, which a model keeps once it was asked for hidden states, do nothing
    unless it is asked again.
    """
    return bool(_global_forward_hooks or _global_forward_pre_hooks) or any(
        module._forward_pre_hooks
        or has_own_forward(module)
        or module._compiled_call_impl is not None
        or (module._forward_hooks and not _all_record(module._forward_hooks.values()))
        for module in modules
    )


def _all_record(hooks: Iterable[Any]) -> bool:
    return all(getattr(hook, "__module__", None) == RECORDING for hook in hooks)


def _has_own_methods(model: Any) -> bool:
    """Whether its class samples in its own way, or the instance prepares inputs in its own."""
    loops = {cls for cls in type(model).__mro__ if "_sample" in vars(cls)}
    names = (name for name in vars(GenerationMixin) if name in vars(model))
    return not loops <= {GenerationMixin, GraphDecoding} or any(
        getattr(getattr(model, name), "__func__", None) is not getattr(type(model), name)
        for name in names
    )


def _is_dynamic(cache: Any) -> bool:
    """Whether a cache has keys and values alone, of all tokens or of the last."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and len(cache.layers) > 0
        and all(type(layer) in kinds for layer in cache.layers)
    )


def _positions(model: Any) -> float:
    """How many positions a model surely has: a step too many must not ask for one more.

    Without a number in the config, any, unless it has embeddings beside those of tokens.
    """
    count = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if count is not None:
        return count
    tables = [module for module in modules_of(model) if isinstance(module, nn.Embedding)]
    return math.inf if len(tables) == 1 else 0


class _Run:
    """One call of generate(): what it asks for, and the tokens that came of it so far."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **arguments: Any,
    ) -> None:
        reason = obstacle(model, input_ids, generation_config, arguments)
        if synced_gpus:
            reason = "GPUs wait for each other after each token"
        if reason is not None:
            raise CannotCapture(reason)
        self.model, self.captures = model, captures_of(model)
        self.layers = len(arguments[CACHE].layers)
        self.input_ids, self.prompt = input_ids, input_ids.shape[1]
        self.processors: Any = logits_processor
        self.criteria: Any = stopping_criteria
        self.config, self.streamer, self.arguments = generation_config, streamer, arguments
        self.sample: bool = generation_config.do_sample

        each = (*logits_processor, *stopping_criteria)
        self.greedy = not self.sample and all(type(one) in IN_THE_STEP for one in each)
        self.more_criteria = any(type(one) not in IN_THE_STEP for one in stopping_criteria)
        in_advance = self.stateless = all(type(one) in STATELESS for one in each)
        #: Keeps what they make of Python's numbers, which a GPU has to wait for.
        self.constants = StepOperations() if in_advance else nullcontext()
        if self.sample and not input_ids.is_cuda:
            in_advance = False  # the CPU's random numbers cannot be given back
        self.ahead = STEPS_AHEAD if in_advance else 0
        limits = [one.max_length for one in each if type(one) is criteria.MaxLengthCriteria]
        #: How many new tokens there may be.
        self.limit = min(limits) - self.prompt if limits else None
        ends = [one.eos_token_id for one in each if type(one) is criteria.EosTokenCriteria]
        self.ends = (
            torch.cat([one.to(input_ids.device).flatten() for one in ends]) if ends else None
        )
        self.pad = generation_config._pad_token_tensor
        #: Whether a text that has ended goes on with padding.
        self.pads = any(hasattr(one, "eos_token_id") for one in stopping_criteria)
        if self.pads and self.pad is None:
            raise CannotCapture("there is no padding token")
        self.positions = _positions(model)
        #: How many tokens are in the cache after the prompt's forward.
        self.cached = 0
        #: What chooses the tokens behind a step at present; it has the texts then.
        self.choice: Choice | None = None

        self.unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        recorded = generation_config.return_dict_in_generate
        self.scores: list[Tensor] | None = (
            [] if recorded and generation_config.output_scores else None
        )
        self.logits: list[Tensor] | None = (
            [] if recorded and generation_config.output_logits else None
        )
        self.reports = _Reports()
        #: Of the new texts, as far as the host has read them: a token of each, step by step.
        self.tokens: list[list[int]] = []
        self.launched = 0
        self.random_offsets: list[int] = []

    # Both read small tensors, which greedy decoding does not wait for.
    @functools.cached_property
    def by_length(self) -> ProcessorsByLength:
        """The processors, as far as they can be captured."""
        return ProcessorsByLength(self.processors, self.input_ids.device)

    @functools.cached_property
    def choosing(self) -> Choosing:
        """How tokens are chosen, but for the processors."""
        ended = [] if self.ends is None else self.ends.tolist()
        return Choosing((), self.sample, tuple(ended), 0 if self.pad is None else int(self.pad))

    def first_step(self) -> Step:
        """The captured step to begin with."""
        room = LEAST_CAPACITY if self.limit is None else min(self.limit, LEAST_CAPACITY)
        self.cached = self.prompt_length()
        step = self.captured(self.cached + room)
        self.choice_behind(step, self.prompt + 1)
        return step

    def prompt_length(self) -> int:
        """How many tokens the cache will have after the prompt's forward, as `_prefill` sees it."""
        past, given = self.arguments[CACHE].get_seq_length(), self.input_ids.shape[1]
        embeddings, mask = (self.arguments.get(name) for name in ("inputs_embeds", MASK))
        if embeddings is not None:
            length = embeddings.shape[1]
        else:
            # Only a mask tells whether the tokens in the cache are given again.
            masked = getattr(self.config, "_mask_length", -1) if mask is None else mask.shape[1]
            length = given if given == masked else past + given
        if length <= past or (mask is not None and mask.shape[1] != length):
            raise CannotCapture("the attention mask is not one of all tokens")
        return length

    def shape(self, length: int) -> StepShape:
        """That of a step whose cache has room for `length` tokens."""
        return StepShape(
            batch=self.input_ids.shape[0],
            capacity=max(LEAST_CAPACITY, 1 << (length - 1).bit_length()),
            greedy=self.greedy,
            ends=0 if self.ends is None or not self.greedy else len(self.ends),
            positions=self.arguments.get("position_ids") is not None,
            logits_to_keep=self.arguments.get("logits_to_keep"),
        )

    def captured(self, length: int) -> Step:
        """The captured step of this shape; CannotCapture says why there is none."""
        with as_decoding(self.model):
            return self.captures.step(self.model, self.shape(length), self.layers)

    def choice_behind(self, step: Step, length: int) -> Choice | None:
        """What chooses tokens behind a step for texts of this length; None if it is not captured.

        A text that is longer than its part of the cache, since that began with embeddings, is not.
        """
        captured = self.stateless and not self.greedy and self.prompt <= self.cached
        processors = self.by_length(length) if captured else None
        if processors is None:
            return None
        return self.captures.choice(step, self.choosing._replace(processors=processors))

    def larger(self, step: Step, length: int) -> Step:
        """A step with more room, in the place of one whose cache is full of `length` tokens."""
        larger = None
        try:
            larger = self.captured(length + 1)
        except CannotCapture as reason:
            _say(f"generate() goes on without CUDA graphs: {reason}")
        if larger is None:  # out there, where the error keeps no tensor of the first try alive
            larger = Step(self.model, self.shape(length + 1), self.layers)
        larger.go_on_from(step, length)
        return larger

    def generate(self, step: Step) -> Any:
        """The prompt's forward, and steps until all texts end; returns what `_sample` does."""
        model = self.model
        outputs = model._prefill(
            self.input_ids, self.config, self.arguments, is_first_iteration=True
        )
        arguments = model._update_model_kwargs_for_generation(
            outputs, self.arguments, is_encoder_decoder=False
        )
        cache = arguments[CACHE]
        length = cached = cache.get_seq_length()
        kept = self.config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        logits = outputs.logits[:, -1].to(self.input_ids.device, torch.float32, copy=True)
        del outputs
        self.choose(logits)
        over = self.is_over(length)
        if not over:
            assert length < step.shape.capacity
            step.load(
                cache,
                length,
                self.input_ids[:, -1:],
                arguments.get(MASK),
                arguments.get("position_ids"),
                self.unfinished,
            )
            step.end_with(self.ends, self.pad)
            if not kept:
                cache.layers.clear()  # generate() refers to it too, and nobody reads it any more
        with as_decoding(self.model):
            while not over:
                if length == step.shape.capacity:
                    step = self.larger(step, length)
                step(model)
                length += 1
                if self.greedy:
                    self.record(step.logits)
                    self.send(step.report)
                else:
                    self.choose_behind(step)
                over = self.is_over(length)
        if self.streamer is not None:
            self.streamer.end()
        if kept and length > cached:
            step.give_back(cache, cached + len(self.tokens) - 1)
        sequences = self.input_ids[:, : self.prompt + len(self.tokens)].contiguous()
        if self.greedy or self.choice is not None:
            new = torch.tensor(self.tokens, device=sequences.device)
            sequences = torch.cat([sequences[:, : self.prompt], new.t()], dim=-1)
        if not self.config.return_dict_in_generate:
            return sequences
        scores, logits = (
            None if recorded is None else tuple(recorded[: len(self.tokens)])
            for recorded in (self.scores, self.logits)
        )
        output: Any = GenerateDecoderOnlyOutput
        return output(sequences=sequences, scores=scores, logits=logits, **{CACHE: cache})

    def choose_behind(self, step: Step) -> None:
        """Choose the next tokens for a step's logits, and send them."""
        length = self.prompt + self.launched
        if not self.goes_on(step, length):
            self.leave_choice(length)
            choice = self.choice_behind(step, length)
            if choice is not None:
                choice.load(self.input_ids, self.by_length.ignored, self.unfinished)
            self.choice = choice
        if self.choice is None:
            self.choose(step.logits.to(torch.float32, copy=True))
            step.token.copy_(self.input_ids[:, -1:])
            return
        choice = self.choice
        choice(step.logits)
        if self.sample:
            self.note_draw()
        for recorded, kept in ((self.scores, choice.scores), (self.logits, choice.logits)):
            if recorded is not None:
                recorded.append(kept.clone())
        if self.more_criteria:
            so_far = None if self.scores is None else tuple(self.scores)
            step.unfinished &= ~self.criteria(choice.texts(length + 1), so_far)
            choice.report[1].copy_(step.unfinished)
        self.send(choice.report)

    def goes_on(self, step: Step, length: int) -> bool:
        """Whether the same choice is behind this step for texts of this length too."""
        processors = None if self.choice is None else self.by_length(length)
        if self.choice is None or processors is None or self.choice.token is not step.token:
            return False
        return self.choice.choosing.key == self.choosing._replace(processors=processors).key

    def leave_choice(self, length: int) -> None:
        """Take the texts, which have this length, back from what chose their tokens."""
        if self.choice is not None:
            self.input_ids = self.choice.texts(length).clone()
            self.unfinished = self.choice.unfinished.clone()
            self.choice = None

    def choose(self, logits: Tensor) -> None:
        """Append the next tokens for logits (batch, vocabulary) in float32, and send them."""
        with self.constants:
            scores = self.processors(self.input_ids, logits)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if self.sample:
            numbers, right = draw(torch.softmax(scores, dim=-1))
            tokens = numbers.argmax(dim=-1)
            self.note_draw()
        else:
            tokens, right = scores.argmax(dim=-1), None
        if self.pads:
            tokens = torch.where(self.unfinished, tokens, self.pad)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        so_far = None if self.scores is None else tuple(self.scores)
        self.unfinished = self.unfinished & ~self.criteria(self.input_ids, so_far)
        report = [tokens, self.unfinished.long()]
        self.send(torch.stack(report if right is None else [*report, right.long()]))

    def note_draw(self) -> None:
        """Remember where the GPU's random numbers are after this one."""
        if self.ahead:
            self.random_offsets.append(_generator(self.input_ids.device).get_offset())

    def record(self, logits: Tensor) -> None:
        """Keep the logits of a step that chose the token itself, as raw logits and as scores."""
        kept = [recorded for recorded in (self.scores, self.logits) if recorded is not None]
        logits = logits.to(torch.float32, copy=True) if kept else logits
        for recorded in kept:
            recorded.append(logits)

    def send(self, report: Tensor) -> None:
        """Have a step's tokens, and which texts go on after them, (2, batch), read in time."""
        self.launched += 1
        self.reports.send(report)

    def is_over(self, length: int) -> bool:
        """Read the tokens of steps that lie far enough back; whether all texts have ended.

        length: of the cache, and so the position of the next step's token, if there is no padding.
        """
        full = self.limit is not None and self.launched >= self.limit
        ahead = self.ahead if not full and length < self.positions else 0
        while len(self.reports) > ahead:
            tokens, unfinished, *right = self.reports.receive()
            if not all(map(all, right)):
                raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
            self.tokens.append(tokens)
            if self.streamer is not None:
                self.streamer.put(torch.tensor(tokens))
            if not any(unfinished):
                self.undo_draws()
                return True
        return full

    def undo_draws(self) -> None:
        """Give back the random numbers of steps too many, unless others have drawn since."""
        if self.random_offsets[len(self.tokens) :]:
            generator = _generator(self.input_ids.device)
            if generator.get_offset() == self.random_offsets[-1]:
                generator.set_offset(self.random_offsets[len(self.tokens) - 1])


class _Reports:
    """What steps report, on its way to the host, in their order."""

    def __init__(self) -> None:
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, report: Tensor) -> None:
        """Copy a tensor of integers, without waiting for it."""
        if not report.is_cuda:
            self._sent.append((report.clone(), None))
            return
        host = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
        host.copy_(report, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent.append((host, event))

    def receive(self) -> list[list[int]]:
        """The first one, when it has arrived."""
        host, event = self._sent.popleft()
        if event is not None:
            event.synchronize()
        return host.tolist()


def _generator(device: torch.device) -> torch.Generator:
    """The one that a GPU's random numbers come from."""
    return torch.cuda.default_generators[device.index]
