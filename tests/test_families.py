"""Every variant of every family, patched against unpatched."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BloomForQuestionAnswering,
    BloomForSequenceClassification,
    BloomForTokenClassification,
    BloomModel,
    EncoderDecoderModel,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaModel,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
    PreTrainedModel,
    Qwen2ForSequenceClassification,
)

from hf_triton_mlp import launchers, ops, patch_model, patch_report
from hf_triton_mlp.kernels import INTERPRETED

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def outputs_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        return model(**inputs, use_cache=False, output_hidden_states=True, output_attentions=True)


def assert_same_outputs(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> None:
    """Logits, hidden states and attentions of `model` before and after patching it.

    Inputs must not be padded on the left: a row that attends to nothing is NaN in float64, whose
    mask overflows in the softmax, which transformers computes in float32.
    """
    model = model.to(dtype)
    exact = tiny.reference_of(model, dtype)
    wide = next(exact.parameters()).dtype
    reference = outputs_of(
        exact, {k: v.to(wide) if v.is_floating_point() else v for k, v in inputs.items()}
    )
    original = outputs_of(model, inputs)
    found = outputs_of(patch_model(model, **arguments), inputs)
    assert found.keys() == original.keys()
    assert len(found.hidden_states) == len(original.hidden_states) > 1
    assert len(found.attentions) == len(original.attentions) > 0
    groups = [tiny.tensors(output) for output in (found, original, reference)]
    for triple in zip(*groups, strict=True):
        tiny.assert_as_accurate(*triple)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_logits_hidden_states_and_attentions(variant: str, dtype: torch.dtype, device: str) -> None:
    model = tiny.build_variant(variant, attn_implementation="eager").to(device)
    assert_same_outputs(model, tiny.batch(device, padding="right"), dtype)


@pytest.mark.parametrize("variant", tiny.MLP_VARIANTS)
def test_depth_mlp(variant: str, device: str) -> None:
    model = tiny.build_variant(variant, attn_implementation="eager").to(device)
    assert_same_outputs(model, tiny.batch(device, padding="right"), depth="mlp")


@pytest.mark.parametrize("tokens", [(1, 1), (1, 7), (5, 40)], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_token_counts(family: str, tokens: tuple[int, int], device: str) -> None:
    model = tiny.build(family, attn_implementation="eager").to(device)
    assert_same_outputs(model, tiny.batch(device, *tokens, padding="right"))


@pytest.mark.parametrize(("variant", "depth"), tiny.VARIANT_DEPTHS)
def test_greedy_tokens(variant: str, depth: str, device: str) -> None:
    model = tiny.build_variant(variant).to(device)
    padded = tiny.batch(device)
    single = {name: tensor[:1] for name, tensor in padded.items()}
    # Random models repeat one token for ever unless they are kept from it.
    arguments = {"max_new_tokens": 10, "do_sample": False, "no_repeat_ngram_size": 1}

    def generated() -> list[list[int]]:
        return [
            model.generate(**inputs, use_cache=use_cache, **arguments).tolist()
            for inputs in (single, padded)
            for use_cache in (True, False)
        ]

    expected = generated()
    patch_model(model, depth=depth)
    assert generated() == expected


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_left_padding_changes_nothing(family: str, device: str) -> None:
    model = patch_model(tiny.build(family).to(device))
    padded = tiny.batch(device)
    start = int((padded["attention_mask"][1] == 0).sum())
    with torch.no_grad():
        alone = model(padded["input_ids"][1:, start:]).logits
        if family == "gpt2":  # the only one that does not count its positions from the mask
            padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        together = model(**padded).logits[1:, start:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hidden_states_are_not_overwritten(family: str, device: str) -> None:
    """Each state that comes back is what its layer saw when it ran, not what later layers made."""
    model = patch_model(tiny.build(family).to(device))
    seen: list[torch.Tensor] = []
    for layer in tiny.decoder_layers(family, model):
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        states = model(**tiny.batch(device), output_hidden_states=True).hidden_states
    assert len(states) == len(seen) + 1
    for state, copied in zip(states, seen, strict=False):
        assert torch.equal(state, copied)
    assert len({state.data_ptr() for state in states}) == len(states)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_steps_equal_one_pass(family: str, device: str) -> None:
    model = patch_model(tiny.build(family).to(device))
    ids = tiny.batch(device, 1, 9)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        prefix = model(ids[:, :5], use_cache=True)
        steps, cache = [prefix.logits], prefix.past_key_values
        for position in range(5, 9):
            step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
            cache = step.past_key_values
    # Sums over one token and over nine run in different orders: some tens of eps.
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


HEADS: list[tuple[str, type[PreTrainedModel]]] = [
    ("gpt2", GPT2Model),
    ("gpt2", GPT2LMHeadModel),
    ("gpt2", GPT2DoubleHeadsModel),
    ("gpt2", GPT2ForSequenceClassification),
    ("gpt2", GPT2ForTokenClassification),
    ("gpt2", GPT2ForQuestionAnswering),
    ("bloom", BloomModel),
    ("bloom", BloomForSequenceClassification),
    ("bloom", BloomForTokenClassification),
    ("bloom", BloomForQuestionAnswering),
    ("opt", OPTModel),
    ("opt", OPTForSequenceClassification),
    ("opt", OPTForQuestionAnswering),
    ("llama", LlamaModel),
    ("qwen2", Qwen2ForSequenceClassification),
]


@pytest.mark.parametrize(("family", "cls"), HEADS, ids=lambda value: getattr(value, "__name__", ""))
def test_heads(family: str, cls: type[PreTrainedModel], device: str) -> None:
    # num_labels is also the width of GPT2DoubleHeadsModel's score of one choice.
    model = tiny.build(family, cls, num_labels=1 if cls is GPT2DoubleHeadsModel else 3).to(device)
    inputs = tiny.batch(device, padding="right")
    if cls is GPT2DoubleHeadsModel:
        inputs = {name: tensor.repeat(3, 1, 1) for name, tensor in inputs.items()}
        inputs["mc_token_ids"] = torch.full((3, 2), 6, device=device)
    with torch.no_grad():
        reference = tiny.reference_of(model, torch.float32)(**inputs, use_cache=False)
        original = model(**inputs, use_cache=False)
        found = patch_model(model)(**inputs, use_cache=False)
    assert found.keys() == original.keys()
    groups = [tiny.tensors(output) for output in (found, original, reference)]
    for triple in zip(*groups, strict=True):
        tiny.assert_as_accurate(*triple)
    assert {row.reason for row in patch_report(model).rows} <= {""}


def test_cross_attention(device: str) -> None:
    model = tiny.build("gpt2", add_cross_attention=True, attn_implementation="eager").to(device)
    encoded = torch.randn(2, 5, tiny.HIDDEN, generator=torch.Generator().manual_seed(2)).to(device)
    inputs = tiny.batch(device, padding="right")
    with torch.no_grad():
        plain = model(**inputs).logits
        crossed = model(**inputs, encoder_hidden_states=encoded).logits
    assert not torch.allclose(plain, crossed)
    assert_same_outputs(copy.deepcopy(model), {**inputs, "encoder_hidden_states": encoded})
    assert_same_outputs(model, inputs)


def test_encoder_decoder_model(device: str) -> None:
    encoder = BertModel(
        BertConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=tiny.HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
        )
    )
    decoder = GPT2LMHeadModel(tiny.config("gpt2", is_decoder=True, add_cross_attention=True))
    model = tiny.randomized(EncoderDecoderModel(encoder=encoder, decoder=decoder)).eval().to(device)
    inputs = tiny.batch(device, padding="right")
    inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    reference = tiny.reference_of(model, torch.float32)
    with torch.no_grad():
        exact, original = reference(**inputs).logits, model(**inputs).logits
        tiny.assert_as_accurate(patch_model(model)(**inputs).logits, original, exact)
    assert len(patch_report(model).rows) == 1 + tiny.LAYERS


def test_two_architectures_in_one_module(device: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = tiny.build("gpt2", GPT2Model)
            self.head = nn.Linear(tiny.HIDDEN, tiny.HIDDEN)
            self.second = tiny.build("opt", OPTModel)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states = self.first(input_ids, attention_mask=attention_mask).last_hidden_state
            return self.second(
                inputs_embeds=self.head(states), attention_mask=attention_mask
            ).last_hidden_state

    model = Pair().to(device)
    reference = tiny.reference_of(model, torch.float32)
    inputs = tiny.batch(device, padding="right")
    with torch.no_grad():
        exact, original = reference(**inputs), model(**inputs)
        tiny.assert_as_accurate(patch_model(model)(**inputs), original, exact)
    names = [row.layer for row in patch_report(model).rows]
    assert names == [f"first.h.{i}" for i in range(3)] + [
        f"second.decoder.layers.{i}" for i in range(3)
    ]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_another_dtype_after_patching(family: str, device: str) -> None:
    model = tiny.build(family).to(device)
    expected = copy.deepcopy(model).to(torch.float16)
    reference = copy.deepcopy(expected).float()
    model = patch_model(model).to(torch.float16)
    inputs = tiny.batch(device)
    with torch.no_grad():
        tiny.assert_as_accurate(*(m(**inputs).logits for m in (model, expected, reference)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_float64_runs_as_before(family: str) -> None:
    model, inputs = tiny.build(family).double(), tiny.batch(padding="right")
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(patch_model(model)(**inputs).logits, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_autocast(family: str, device: str) -> None:
    model, inputs = tiny.build(family).to(device), tiny.batch(device)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        exact = reference(**inputs).logits
        with torch.autocast(device, torch.bfloat16):
            original = model(**inputs).logits
            found = patch_model(model)(**inputs).logits
    # Under autocast the logits may come out as float32 with bfloat16's errors inside.
    tiny.assert_as_accurate(*(tensor.bfloat16() for tensor in (found, original)), exact)
    assert found.dtype == original.dtype


class Launches:
    """Counts the linear layers that the operations launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module, name, linears in (
            (ops, "linear", 1),
            (launchers, "normed_mlp", 2),
            (launchers, "branch_normed_mlp", 2),
        ):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name), linears))

    def counted(self, launch: Callable[..., torch.Tensor], linears: int) -> Any:
        def call(*arguments: Any, **keywords: Any) -> torch.Tensor:
            self.count += linears
            return launch(*arguments, **keywords)

        return call


@pytest.mark.gpu
@pytest.mark.parametrize(
    "variant", ["gpt2", "bloom", "opt", "opt-post-norm", "llama", "gemma", "gemma2", "olmo2"]
)
def test_the_kernels_run_on_a_gpu(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    model = patch_model(tiny.build_variant(variant).cuda(), verify=False)
    with torch.no_grad():
        model(**tiny.batch("cuda"))
    assert launches.count == 2 * tiny.LAYERS


# --- under the interpreter --------------------------------------------------------------------

INTERPRETED_VARIANTS = ["gpt2", "bloom", "bloom-residual-after-norm", "opt", "opt-post-norm"]
INTERPRETED_VARIANTS += ["llama-gelu", "llama-bias", "qwen2", "gemma2", "olmo2"]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", INTERPRETED_VARIANTS)
def test_interpreted_outputs(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _ = tiny.VARIANTS[variant]
    sizes = {"gpt2": {"n_inner": 56}, "opt": {"ffn_dim": 56}}.get(family, {})
    sizes = {**sizes, **tiny.layer_count(family, 2)}
    model = tiny.build_variant(variant, attn_implementation="eager", **sizes)
    launches = Launches(monkeypatch)
    assert_same_outputs(model, tiny.batch(padding="right"), dtype, verify=False)
    assert launches.count == 2 * 2


@needs_interpreter
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_interpreted_greedy_tokens(family: str) -> None:
    # The interpreter takes seconds for a gated MLP of two rows.
    sizes = {"intermediate_size": 16} if family == "llama" else {}
    model = tiny.build(family, **tiny.layer_count(family, 2), **sizes)
    arguments = {"max_new_tokens": 3, "do_sample": False, "no_repeat_ngram_size": 1}
    expected = model.generate(**tiny.batch(), **arguments)
    assert torch.equal(patch_model(model).generate(**tiny.batch(), **arguments), expected)


@needs_interpreter
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_interpreted_weights_of_a_tensor_subclass_are_called(family: str) -> None:
    """Quantized and sharded weights are tensor subclasses inside a plain Linear: never read raw."""

    class Doubled(torch.Tensor):
        """Stores a weight and computes with twice that."""

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            def plain(value: Any) -> Any:
                return 2 * value.as_subclass(torch.Tensor) if isinstance(value, cls) else value

            if func in (torch.nn.functional.linear, torch.addmm):
                return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})
            return super().__torch_function__(func, types, args, kwargs)

    model = tiny.build(family, **tiny.layer_count(family, 1))
    with torch.no_grad():
        base = model(**tiny.batch()).logits
        (layer,) = tiny.decoder_layers(family, model)
        up = layer.get_submodule(tiny.PLACES[family].projections[0])
        up.weight = nn.Parameter(up.weight.detach().as_subclass(Doubled), requires_grad=False)
        expected = model(**tiny.batch()).logits
        assert not torch.allclose(base, expected)
        found = patch_model(model)(**tiny.batch()).logits
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively on this machine")
def test_families_under_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted",
         __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
