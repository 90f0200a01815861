"""Patched against original: logits, hidden states, perplexity and greedy tokens."""

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_triton_mlp.linear import dequantize_linears, quantized_linears
from hf_triton_mlp.mlp import TritonMLP

#: Genesis 1:1-13 in the King James Version (public domain): enough text for a perplexity.
DEFAULT_TEXT = """\
In the beginning God created the heaven and the earth.
And the earth was without form, and void; and darkness was upon the face of the deep. And the \
Spirit of God moved upon the face of the waters.
And God said, Let there be light: and there was light.
And God saw the light, that it was good: and God divided the light from the darkness.
And God called the light Day, and the darkness he called Night. And the evening and the morning \
were the first day.
And God said, Let there be a firmament in the midst of the waters, and let it divide the waters \
from the waters.
And God made the firmament, and divided the waters which were under the firmament from the waters \
which were above the firmament: and it was so.
And God called the firmament Heaven. And the evening and the morning were the second day.
And God said, Let the waters under the heaven be gathered together unto one place, and let the dry \
land appear: and it was so.
And God called the dry land Earth; and the gathering together of the waters called he Seas: and \
God saw that it was good.
And God said, Let the earth bring forth grass, the herb yielding seed, and the fruit tree yielding \
fruit after his kind, whose seed is in itself, upon the earth: and it was so.
And the earth brought forth grass, and herb yielding seed after his kind, and the tree yielding \
fruit, whose seed was in itself, after his kind: and God saw that it was good.
And the evening and the morning were the third day.
"""

#: The patched error may be this many times torch's own error in the same dtype.
ERROR_RATIO = 2.0

#: Losses of one text in two half-precision computations differ by about 1e-4.
PERPLEXITY_TOLERANCE = 0.01


@dataclass(frozen=True)
class Errors:
    """Maximum and RMS distance from the reference, of torch and of the patched model.

    rms_floor, max_floor: one rounding of a value as large as the reference's RMS and its
    largest, below which no ratio counts.
    """

    torch_max: float
    torch_rms: float
    patched_max: float
    patched_rms: float
    rms_floor: float
    max_floor: float

    @property
    def ratio(self) -> float:
        """Patched RMS error over torch's own; 1 where both are exact."""
        if self.patched_rms == self.torch_rms:
            return 1.0
        return self.patched_rms / self.torch_rms if self.torch_rms else math.inf

    @property
    def rms_within_bound(self) -> bool:
        """Whether the RMS error is at most ERROR_RATIO times torch's; NaN is not."""
        return self.patched_rms <= max(ERROR_RATIO * self.torch_rms, self.rms_floor)

    @property
    def max_within_bound(self) -> bool:
        """Whether the maximum error is at most ERROR_RATIO times torch's; NaN is not."""
        return self.patched_max <= max(ERROR_RATIO * self.torch_max, self.max_floor)


@dataclass(frozen=True)
class TokenDifference:
    """The first greedy token that differs: its row and position after the prompt.

    margin: the original's best logit minus its second best there, in logits.
    """

    row: int
    position: int
    margin: float


@dataclass(frozen=True)
class CaseReport:
    """One batch of prompts: logits and each hidden state (embeddings first), greedy tokens.

    Errors of a hidden state are in units of its RMS at each position, which the next norm divides
    by: the rounding of one value far larger than all others would otherwise be the whole error.
    """

    case: str
    logits: Errors
    hidden_states: tuple[Errors, ...]
    new_tokens: int
    difference: TokenDifference | None


@dataclass(frozen=True)
class ValidationReport:
    """What `validate` found; `failures` says what is out of bounds, empty when all is well."""

    dtype: str
    device: str
    cases: tuple[CaseReport, ...]
    perplexity_original: float | None
    perplexity_patched: float | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the patched model may stand in for the original."""
        return not self.failures


@torch.no_grad()
def validate(
    original: Any,
    patched: Any,
    inputs: Mapping[str, Any],
    *,
    text: Tensor | None = None,
    max_new_tokens: int = 32,
) -> ValidationReport:
    """Compare a patched causal language model with the original, two models of the same weights.

    inputs: tensors for the models (input_ids, attention_mask), or such mappings by case name.
    text: token ids (tokens,) for perplexity. Padded positions do not count.

    The reference is the original in float32, or in float64 when the dtype is float32 (whose own
    error would otherwise be nothing); both are of what quantized weights stand for. It passes when,
    in every case, maximum and RMS error of the logits and RMS error of each hidden state (relative
    to its size at each position) are at most ERROR_RATIO times torch's own, or within one rounding,
    the perplexities agree within PERPLEXITY_TOLERANCE and, in float32, all greedy tokens are equal;
    in half precision a different token is reported with the original's logit margin there. Where
    rows become fp8 (`activations` of QuantizationConfig), that rounding counts as an error.
    Raises ValueError when both models are one object, when the original is a patched model, and
    when the inputs hold no prompts that leave room for the new tokens.
    """
    if original is patched:
        raise ValueError("validate needs two models: the original, and a patched copy of it")
    if any(isinstance(module, TritonMLP) for module in original.modules()):
        raise ValueError("the original is a patched model: call validate(original, patched, …)")
    cases = _cases(inputs, original, max_new_tokens)
    training = original.training, patched.training
    try:
        return _validate(original.eval(), patched.eval(), cases, text, max_new_tokens)
    finally:
        original.train(training[0])
        patched.train(training[1])


def _validate(
    original: Any,
    patched: Any,
    cases: dict[str, dict[str, Tensor]],
    text: Tensor | None,
    max_new_tokens: int,
) -> ValidationReport:
    dtype = original.dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    reference = copy.deepcopy(original)
    dequantize_linears(reference, wide)
    reference = reference.to(wide)
    expected = {name: _reference_outputs(reference, case) for name, case in cases.items()}
    del reference
    if next(quantized_linears(original), None) is not None:  # on a GPU kernels would read it
        original = copy.deepcopy(original)
        dequantize_linears(original, dtype)

    failures: list[str] = []
    reports = []
    for name, case in cases.items():
        report = _validate_case(
            name, case, original, patched, expected[name], dtype, max_new_tokens
        )
        reports.append(report)
        failures += _failures(report, exact=dtype == torch.float32)
    before = after = None
    if text is not None:
        before, after = (perplexity(model, text) for model in (original, patched))
        if not abs(after - before) <= PERPLEXITY_TOLERANCE * before:
            failures.append(f"perplexity {after:.4f}, the original's is {before:.4f}")
    return ValidationReport(
        str(dtype).removeprefix("torch."), str(original.device), tuple(reports), before, after,
        tuple(failures),
    )  # fmt: skip


def _cases(
    inputs: Mapping[str, Any], model: Any, max_new_tokens: int
) -> dict[str, dict[str, Tensor]]:
    """The inputs by case name, on the model's device."""
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError(
            "inputs must be a mapping with input_ids, or such mappings by case name, found "
            f"{inputs if isinstance(inputs, Mapping) else type(inputs).__name__}"
        )
    cases = {"inputs": inputs} if "input_ids" in inputs else inputs
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    for name, case in cases.items():
        ids = case.get("input_ids") if isinstance(case, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
            raise ValueError(f"{name}: needs input_ids of shape (batch, positions), none empty")
        if not case.get("attention_mask", ids.new_ones(ids.shape)).any(-1).all():
            raise ValueError(f"{name}: a prompt without a token")
        if ids.shape[1] + max_new_tokens > limit:
            raise ValueError(
                f"{name}: {ids.shape[1]} positions and {max_new_tokens} new tokens do not fit the "
                f"model's {limit}"
            )
    return {
        name: {key: value.to(model.device) for key, value in case.items()}
        for name, case in cases.items()
    }


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, *, window: int = 1024) -> float:
    """exp of the mean next-token loss over consecutive windows of the model's context length."""
    total = count = 0.0
    for part in windows(model, tokens, window):
        logits = model(part[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
        count += len(part) - 1
    return math.exp(min(total / count, 700.0))


def windows(model: Any, tokens: Tensor, size: int = 1024) -> list[Tensor]:
    """Consecutive parts of tokens (length,) on the model's device, no longer than its context.

    Raises ValueError where none has two tokens.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or size
    parts = [part for part in tokens.to(model.device).split(min(size, limit)) if len(part) > 1]
    if not parts:
        raise ValueError("perplexity needs a text of at least two tokens")
    return parts


def _outputs(model: Any, case: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Logits, then hidden states, at the positions that are not padding: (positions, size).

    Positions count from the first token that is not padding, as generate() counts them.
    """
    mask = case.get("attention_mask", torch.ones_like(case["input_ids"]))
    if "position_ids" in inspect.signature(model.forward).parameters:
        case = {**case, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    output = model(**case, output_hidden_states=True, use_cache=False)
    return tuple(tensor[mask.bool()] for tensor in (output.logits, *output.hidden_states))


def _reference_outputs(model: Any, case: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """_outputs row by row without the padding, which must not matter.

    (BLOOM's float32 softmax turns float64's mask value into -inf, and padded rows into NaN.)
    """
    mask = case.get("attention_mask", torch.ones_like(case["input_ids"])).bool()
    rows = [
        _outputs(model, {"input_ids": ids[keep][None]})
        for ids, keep in zip(case["input_ids"], mask, strict=True)
    ]
    return tuple(torch.cat(tensors) for tensors in zip(*rows, strict=True))


def _errors(
    original: Tensor, patched: Tensor, expected: Tensor, dtype: torch.dtype, *, relative: bool
) -> Errors:
    """Where torch's own value is NaN or infinite there is nothing to compare with.

    relative: in units of the RMS of the reference's row.
    """
    finite = original.isfinite() & expected.isfinite()
    if patched.shape != original.shape or not finite.any():
        return Errors(math.nan, math.nan, math.inf, math.inf, 0.0, 0.0)
    if relative:
        size = expected.double().nan_to_num(0, 0, 0).square().mean(-1, keepdim=True).sqrt()
        size = size.clamp(min=torch.finfo(dtype).tiny)
        original, patched, expected = original / size, patched / size, expected / size
    original, patched, expected = original[finite], patched[finite], expected[finite]

    def distance(found: Tensor) -> tuple[float, float]:
        difference = found.double() - expected.double()
        return difference.abs().max().item(), difference.square().mean().sqrt().item()

    eps, wide = torch.finfo(dtype).eps, expected.double()
    floors = (eps * wide.square().mean().sqrt().item(), eps * wide.abs().max().item())
    return Errors(*distance(original), *distance(patched), *floors)


def _validate_case(
    name: str,
    case: Mapping[str, Tensor],
    original: Any,
    patched: Any,
    expected: tuple[Tensor, ...],
    dtype: torch.dtype,
    max_new_tokens: int,
) -> CaseReport:
    found, own = _outputs(patched, case), _outputs(original, case)
    if len(found) != len(own):
        raise ValueError(
            f"{name}: the patched model returns {len(found) - 1} hidden states, "
            f"the original {len(own) - 1}"
        )
    logits, *hidden = (
        _errors(*tensors, dtype, relative=index > 0)
        for index, tensors in enumerate(zip(own, found, expected, strict=True))
    )
    greedy = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": False}
    tokens = [
        model.generate(**case, max_new_tokens=max_new_tokens, **greedy)
        for model in (original, patched)
    ]
    prompt = case["input_ids"].shape[1]
    difference = _first_difference(original, case, tokens[0], tokens[1])
    return CaseReport(name, logits, tuple(hidden), tokens[0].shape[1] - prompt, difference)


def _first_difference(
    model: Any, case: Mapping[str, Tensor], original: Tensor, patched: Tensor
) -> TokenDifference | None:
    prompt = case["input_ids"].shape[1]
    length = min(original.shape[1], patched.shape[1])
    differs = (original[:, :length] != patched[:, :length]).nonzero()
    if len(differs):
        row, column = min(differs.tolist(), key=lambda place: place[1])
    elif original.shape[1] != patched.shape[1]:
        row, column = 0, length
    else:
        return None
    tokens = original[row : row + 1, :column]
    mask = case.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(case["input_ids"])
    generated = torch.ones_like(tokens[:, prompt:])
    mask = torch.cat([mask[row : row + 1], generated], dim=1)
    best = model(input_ids=tokens, attention_mask=mask).logits[0, -1].float().topk(2).values
    return TokenDifference(row, column - prompt, (best[0] - best[1]).item())


def _failures(report: CaseReport, *, exact: bool) -> list[str]:
    failures = []
    layers = (("logits", report.logits), *(
        (f"hidden state {index}", errors) for index, errors in enumerate(report.hidden_states)
    ))  # fmt: skip
    for what, errors in layers:
        # A layer's largest error is that of one element; what it leads to shows in the logits.
        if not errors.rms_within_bound or (what == "logits" and not errors.max_within_bound):
            failures.append(
                f"{report.case}: {what}: RMS error {errors.patched_rms:.3g} and maximum "
                f"{errors.patched_max:.3g}, torch's own {errors.torch_rms:.3g} and "
                f"{errors.torch_max:.3g}"
            )
    if exact and report.difference is not None:
        place = report.difference
        failures.append(
            f"{report.case}: greedy token {place.position} of row {place.row} differs, where the "
            f"original's margin is {place.margin:.3g}"
        )
    return failures
