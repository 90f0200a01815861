"""validate: what passes, what must not, and what it says about it."""

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_triton_mlp import patch_model, validate
from hf_triton_mlp.validation import Errors, _errors, perplexity


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=61, n_positions=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three prompts of 7, 4 and 1 tokens, padded on the left."""
    ids = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 6 + [1]])
    return {"input_ids": ids * mask, "attention_mask": mask}


TEXT = torch.arange(3, 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_good_patch_passes(
    model: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    model.to(dtype)
    single = {"input_ids": batch["input_ids"][:1]}
    report = validate(
        model, patch_model(copy.deepcopy(model)), {"single": single, "batch": batch}, text=TEXT
    )
    assert report.passed, report.failures
    assert [case.case for case in report.cases] == ["single", "batch"]
    assert all(len(case.hidden_states) == 3 for case in report.cases)
    assert all(case.logits.torch_rms > 0 for case in report.cases)
    assert report.perplexity_original == pytest.approx(report.perplexity_patched, rel=1e-2)
    json.dumps(dataclasses.asdict(report))


def broken(model: Any, how: str) -> Any:
    other = patch_model(copy.deepcopy(model))
    projection = other.transformer.h[1].mlp.c_proj
    with torch.no_grad():
        if how == "weights":
            projection.weight[3, 5] += 0.5
        elif how == "bias":
            projection.bias[::2] += 0.05
        elif how == "nan":
            projection.bias[0] = math.nan
        elif how == "activation":
            other.transformer.h[0].mlp.act = torch.nn.ReLU()
    return other


@pytest.mark.parametrize("how", ["weights", "bias", "nan", "activation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_broken_model_fails(
    model: Any, batch: dict[str, torch.Tensor], how: str, dtype: torch.dtype
) -> None:
    model.to(dtype)
    report = validate(model, broken(model, how), batch)
    assert not report.passed
    assert any("logits: RMS error" in failure for failure in report.failures)


def test_one_large_value_hides_nothing(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Its rounding is larger than all the other errors, which matter at other positions."""
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = 33333.3
    model.to(torch.bfloat16)
    other = patch_model(copy.deepcopy(model))
    report = validate(model, other, batch)
    assert report.passed, report.failures
    with torch.no_grad():
        other.transformer.h[0].mlp.c_proj.bias += 0.2
    report = validate(model, other, batch)
    assert any("hidden state 1: RMS error" in failure for failure in report.failures)


def test_padding_does_not_count(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """A model that is wrong at padded positions only is as good as the original."""

    class WrongAtPadding(GPT2LMHeadModel):
        def forward(self, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any):
            output = super().forward(
                attention_mask=attention_mask, position_ids=position_ids, **kwargs
            )
            mask = attention_mask[:, -output.logits.shape[1] :, None].bool()
            output.logits = torch.where(mask, output.logits, math.nan)
            return output

    other = copy.deepcopy(model)
    other.__class__ = WrongAtPadding
    report = validate(model, other, batch, max_new_tokens=2)
    assert report.passed, report.failures


def test_the_first_difference_and_its_margin(model: Any) -> None:
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        first = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        logits = model(torch.cat([first], dim=1)).logits[0, -1]
    best = logits.topk(2)

    class OtherSecondToken(GPT2LMHeadModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            past = kwargs.get("cache", kwargs.get("past_key_values"))
            if past is not None and past.get_seq_length() == first.shape[1]:
                output.logits[..., best.indices[1]] += 100
            return output

    other = copy.deepcopy(model)
    other.__class__ = OtherSecondToken
    report = validate(model, other, inputs, max_new_tokens=4)
    difference = report.cases[0].difference
    assert difference is not None and (difference.row, difference.position) == (0, 1)
    expected = (best.values[0] - best.values[1]).item()
    assert difference.margin == pytest.approx(expected, rel=1e-4)
    assert any("greedy token 1 of row 0" in failure for failure in report.failures)


def test_perplexity_is_exp_of_the_mean_loss(model: Any) -> None:
    loss = model(TEXT[None], labels=TEXT[None]).loss.item()
    assert perplexity(model, TEXT) == pytest.approx(math.exp(loss), rel=1e-4)
    halves = [model(part[None], labels=part[None]).loss.item() for part in TEXT[:56].split(28)]
    expected = math.exp(sum(halves) / 2)
    assert perplexity(model, TEXT[:56], window=28) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, TEXT[:1])


def test_two_models_are_needed(model: Any, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="two models"):
        validate(model, model, batch)


IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "mapping with input_ids"),
        ([{"input_ids": IDS}], "found list"),
        ({"case": IDS}, "case: needs input_ids"),
        ({"input_ids": IDS[0]}, "inputs: needs input_ids"),
        ({"input_ids": IDS[:, :0]}, "inputs: needs input_ids"),
        ({"input_ids": IDS.repeat(1, 20)}, "60 positions and 32 new tokens do not fit .* 64"),
        (
            {"one": {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}},
            "one: a prompt without a token",
        ),
    ],
)
def test_inputs_that_cannot_be_compared(model: Any, inputs: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        validate(model, patch_model(copy.deepcopy(model)), inputs)


def test_the_original_comes_first(model: Any, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="the original is a patched model"):
        validate(patch_model(copy.deepcopy(model)), model, batch)


def test_training_mode_comes_back_after_an_error(model: Any) -> None:
    other = patch_model(copy.deepcopy(model))
    model.train()
    with pytest.raises(IndexError):
        validate(model, other, {"input_ids": IDS + 1000})
    assert model.training and not other.training


def test_greedy_whatever_the_generation_config_says(
    model: Any, batch: dict[str, torch.Tensor]
) -> None:
    expected = validate(model, patch_model(copy.deepcopy(model)), batch)
    model.generation_config.update(do_sample=True, num_beams=2, return_dict_in_generate=True)
    found = validate(model, patch_model(copy.deepcopy(model)), batch)
    assert expected.passed and found.cases == expected.cases


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_values_that_are_not_finite(value: float) -> None:
    expected, own = torch.zeros(2, 4), torch.tensor([[0.5] * 4, [value] * 4])
    dtype = torch.float32
    worse = own.clone()
    worse[0, 0] = value
    for patched, passes in ((own, True), (torch.full((2, 4), 0.5), True), (worse, False)):
        errors = _errors(own, patched, expected, dtype, relative=False)
        assert errors.rms_within_bound == errors.max_within_bound == passes
        assert errors.torch_rms == 0.5
    nothing = torch.full((2, 4), value)
    assert not _errors(nothing, nothing, expected, dtype, relative=False).rms_within_bound


def test_nan_is_never_within_the_bound() -> None:
    def within(*errors: float) -> tuple[bool, bool]:
        found = Errors(*errors, 0.0, 0.0)
        return found.max_within_bound, found.rms_within_bound

    assert within(1.0, 1.0, 2.0, 2.0) == (True, True)
    assert within(1.0, 1.0, 2.1, 2.0) == (False, True)
    assert within(1.0, 1.0, 2.0, 2.1) == (True, False)
    assert within(1.0, 1.0, math.nan, math.nan) == (False, False)
    assert within(0.0, 0.0, 0.0, 0.0) == (True, True)
    assert within(0.0, 0.0, 1e-9, 1e-9) == (False, False)
    assert Errors(0.0, 0.0, 2.0, 1.0, 1.0, 2.0).max_within_bound
    assert not Errors(0.0, 0.0, 2.1, 1.1, 1.0, 2.0).rms_within_bound
