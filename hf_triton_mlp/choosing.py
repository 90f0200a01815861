"""The next tokens by logits processors and by chance, captured in a graph behind a step.

A step's graph ends with logits where more than greedy decoding is asked for. What makes tokens of
them is captured apart, since it depends on a call's numbers (a temperature, say) and is soon
captured: transformers' own processors, called once.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import logits_process as processors

from hf_triton_mlp.step_ops import StepOperations, choose_greedily

#: Choices that are kept behind a step.
CHOICES = 8

#: Processors that make other scores by their numbers alone, whatever a text is.
BY_NUMBERS = (
    processors.EpsilonLogitsWarper,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.MinPLogitsWarper,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.TypicalLogitsWarper,
)

#: Processors that do something at some lengths of a text only, and whether they do.
BY_LENGTH: dict[type, Callable[[Any, int], bool]] = {
    processors.ExponentialDecayLengthPenalty: lambda p, length: length > p.regulation_start,
    processors.ForcedBOSTokenLogitsProcessor: lambda p, length: length == 1,
    processors.ForcedEOSTokenLogitsProcessor: lambda p, length: length == p.max_length - 1,
    processors.MinLengthLogitsProcessor: lambda p, length: length < p.min_length,
    processors.MinNewTokensLengthLogitsProcessor: lambda p, length: (
        length - p.prompt_length_to_skip < p.min_new_tokens
    ),
    processors.SuppressTokensAtBeginLogitsProcessor: lambda p, length: length == p.begin_index,
}

#: Those of them, and others, that only forbid tokens, and how they name these.
FORBIDDING = {
    processors.MinLengthLogitsProcessor: "eos_token_id",
    processors.MinNewTokensLengthLogitsProcessor: "eos_token_id",
    processors.SuppressTokensLogitsProcessor: "suppress_tokens",
}

#: It makes other scores by what tokens a text has, however often and where.
REPETITION = processors.RepetitionPenaltyLogitsProcessor


class Choosing(NamedTuple):
    """How tokens are chosen.

    processors: each with what tells it from others; sample: by chance; ends: tokens that end a
    text; pad: what follows them.
    """

    processors: tuple[tuple[Any, Callable[[Tensor, Tensor], Tensor]], ...]
    sample: bool
    ends: tuple[int, ...]
    pad: int

    @property
    def key(self) -> Any:
        """Two that have the same choose the same."""
        return (tuple(name for name, _ in self.processors), *self[1:])


class Forbidden:
    """Scores of tokens become -inf."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens.flatten()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # torch.isin waits for how many of many tokens are different.
        vocabulary = torch.arange(scores.shape[-1], device=scores.device)
        forbidden = (vocabulary[:, None] == self.tokens).any(dim=-1)
        return torch.where(forbidden, -torch.inf, scores)


class ProcessorsByLength:
    """The processors of a call as they can be captured, for each length of its texts.

    ignored: how many tokens at the beginning of a text a repetition penalty leaves out, () or
    (batch,), if there is one.
    """

    def __init__(self, each: Sequence[Any], device: torch.device) -> None:
        """Reads small tensors that processors have on the device."""
        self._each = [(BY_LENGTH.get(type(one)), one, _captured_form(one, device)) for one in each]
        penalties = [one for one in each if type(one) is REPETITION]
        self._one_penalty = len(penalties) <= 1
        left_out = getattr(penalties[0], "prompt_ignore_length", None) if penalties else None
        self.ignored = torch.as_tensor(0 if left_out is None else left_out, device=device)
        self._longest_ignored = 0 if left_out is None else int(self.ignored.max())

    def __call__(self, length: int) -> tuple[Any, ...] | None:
        """Those that do something at this length, as in Choosing; None if one is not captured."""
        if not self._one_penalty or self._longest_ignored >= length:
            return None
        found = [
            form
            for applies, processor, form in self._each
            if applies is None or applies(processor, length)
        ]
        return None if None in found else tuple(found)


def _captured_form(
    processor: Any, device: torch.device
) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]] | None:
    """A processor, or what does the same while it does something, with a name; None for others."""
    kind = type(processor)
    if kind in FORBIDDING:
        forbidden = Forbidden(getattr(processor, FORBIDDING[kind]).to(device))
        return (Forbidden, tuple(forbidden.tokens.tolist())), forbidden
    if kind is REPETITION:  # what it ignores differs from call to call
        processor = copy.copy(processor)
        processor.prompt_ignore_length = None
    elif kind not in BY_NUMBERS:
        return None
    return (kind, repr(vars(processor))), processor


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Numbers, the greatest of which is what torch.multinomial draws, and whether it could draw.

    They are computed as there, from the same random numbers; but torch.multinomial waits until it
    can look at the probabilities (batch, vocabulary), and raises an error where we hand one on.
    """
    noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
    least, most = probabilities.aminmax(dim=-1)
    return probabilities / noise, (least >= 0) & (most < torch.inf)


class Choice:
    """From the logits of a step to its next tokens, on tensors that stay in place."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, token: Tensor, unfinished: Tensor, capacity: int, choosing: Choosing
    ) -> None:
        """token (batch, 1), unfinished (batch,): the step's, whose cache has this capacity."""
        batch, device = token.shape[0], token.device
        self.token, self.unfinished, self.choosing = token, unfinished, choosing
        #: The texts, and their tokens for a repetition penalty: it does not matter to it that one
        #: of them is in the place of all that it ignores, and beyond the end.
        self.ids = torch.zeros((2, batch, capacity + 1), dtype=torch.int64, device=device)
        #: Where their last tokens are.
        self.last = torch.zeros((), dtype=torch.int64, device=device)
        self.ends = torch.tensor(choosing.ends, dtype=torch.int64, device=device)
        self.pad = torch.tensor(choosing.pad, dtype=torch.int64, device=device)
        #: The next tokens, which texts go on after them, and if sampled, which could be drawn.
        self.report = torch.zeros((2 + choosing.sample, batch), dtype=torch.int64, device=device)
        #: The step's logits in float32, and what the processors make of them.
        self.logits = self.scores = torch.empty(0)
        self.constants = StepOperations()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_bytes = 0

    def load(self, input_ids: Tensor, ignored: Tensor, unfinished: Tensor) -> None:
        """Go on after texts (batch, length); ignored: as in ProcessorsByLength, below length."""
        length = input_ids.shape[1]
        self.ids.copy_(input_ids[:, -1:].expand_as(self.ids))
        self.ids[0, :, :length].copy_(input_ids)
        penalized = torch.arange(length, device=input_ids.device) >= ignored.view(-1, 1)
        last = input_ids[:, -1:].expand_as(input_ids)
        self.ids[1, :, :length].copy_(torch.where(penalized, input_ids, last))
        self.last.fill_(length - 1)
        self.unfinished.copy_(unfinished)

    def run(self, logits: Tensor, generator: torch.Generator | None = None) -> None:
        """Choose for the step's logits, launching kernels one by one."""
        self.logits = scores = logits.to(torch.float32, copy=True)
        with self.constants:
            for _, process in self.choosing.processors:
                scores = process(self.ids[1], scores)
        self.scores = scores
        if self.choosing.sample:
            scores, right = draw(torch.softmax(scores, dim=-1), generator)
            self.report[2].copy_(right)
        choose_greedily(
            scores, self.token, self.ends, self.pad, self.unfinished, self.report, self.last, None
        )
        self.ids.index_copy_(2, self.last.view(1), self.token.expand(2, -1, -1))

    def __call__(self, logits: Tensor) -> None:
        """Choose: replayed, if it was captured, for the logits that it was captured for."""
        if self.graph is None:
            self.run(logits)
        else:
            self.graph.replay()

    def texts(self, length: int) -> Tensor:
        """The texts, which have this length, a view."""
        return self.ids[0, :, :length]

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture(self, logits: Tensor, pool: Any) -> None:
        """Capture it in a graph, for logits that stay in place.

        A replay draws what PyTorch's generator would have drawn.
        """
        device = self.ids.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.run(
                logits, torch.Generator(device)
            )  # what is done at a first call only is done now
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            reserved = torch.cuda.memory_reserved(device)
            self.run(logits)
            self.graph_bytes = torch.cuda.memory_reserved(device) - reserved
        self.graph = graph
