"""BERT and others like it, whose MLP lies in two modules: patches/bert.py."""

import copy
import inspect
import re
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hf_triton_mlp.patches.bert import FusedBertLayer
from peft import LoraConfig, get_peft_model
from test_llama import body, module_of, named
from torch import Tensor, nn
from transformers import BertModel
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert

from hf_triton_mlp import patch_model, patch_report
from hf_triton_mlp.patching import MLPSpec
from hf_triton_mlp.specs import specs

SPECS = [
    spec for spec in specs() if spec.fused_layer and issubclass(spec.fused_layer, FusedBertLayer)
]

# What a layer's second half is, and its two modules.
CHUNK = """\
intermediate_output = self.intermediate(x)
layer_output = self.output(intermediate_output, x)
return layer_output"""
UP = """\
x = self.dense(x)
x = self.intermediate_act_fn(x)
return x"""
DOWN = """\
x = self.dense(x)
x = self.dropout(x)
x = self.LayerNorm(x + input_tensor)
return x"""

#: The same, by where the norm in front is.
BODIES: dict[str | None, tuple[str, str, str]] = {
    None: (CHUNK, UP, DOWN),
    "intermediate.LayerNorm": (
        CHUNK,
        f"x = self.LayerNorm(x)\n{UP}",
        DOWN.replace("self.LayerNorm(x + input_tensor)", "x + input_tensor"),
    ),
    "LayerNorm": (
        "intermediate_output = self.LayerNorm(x)\n"
        + CHUNK.replace("self.intermediate(x)", "self.intermediate(intermediate_output)"),
        UP,
        "x = self.dense(x)\nx = x + input_tensor\nreturn x",
    ),
    "ln": (
        "ln_output = self.ln(x)\n"
        + CHUNK.replace("self.intermediate(x)", "self.intermediate(ln_output)"),
        UP,
        "x = self.dense(x)\nx = self.dropout(x)\nreturn input_tensor + x",
    ),
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.layer_class.split(".")[-1])
def test_the_classes_compute_this(spec: MLPSpec) -> None:
    """A release that changes one of them fails here, before it computes something else."""
    module = module_of(spec)
    layer = named(module, spec.layer_class)
    made = inspect.getsource(layer.__init__)
    parts = [re.search(rf"self\.{name} = (\w+)\(", made) for name in ("intermediate", "output")]
    up, down = (getattr(module, found[1]) for found in parts if found is not None)
    assert spec.norm is not None
    chunk, *modules = BODIES[spec.norm(layer)]
    assert body(layer, "feed_forward_chunk") == chunk
    assert [body(up), body(down)] == modules
    forward = inspect.getsource(layer.forward)
    assert forward.count("self.feed_forward_chunk,") == 1
    assert not re.search(r"self\.(intermediate|output)\b", forward)


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch(padding="right"), **inputs).logits


def test_cross_attention() -> None:
    model = tiny.build("bert", is_decoder=True, add_cross_attention=True)
    generator = torch.Generator().manual_seed(2)
    inputs = {"encoder_hidden_states": torch.randn(2, 5, tiny.HIDDEN, generator=generator)}
    expected = logits(model, **inputs)
    assert not torch.allclose(logits(model), expected)
    tiny.prove(patch_model(model))
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_attentions() -> None:
    model = tiny.build("bert", BertModel, attn_implementation="eager")
    inputs = tiny.batch(padding="right")
    recorded = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model(**inputs, **recorded)
        tiny.prove(patch_model(model))
        found = model(**inputs, **recorded)
    assert found.keys() == expected.keys()
    for ours, theirs in zip(tiny.tensors(found), tiny.tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["intermediate", "output", "intermediate.intermediate_act_fn"])
def test_a_part_with_hooks_is_called(part: str) -> None:
    model = patch_model(tiny.build("bert"))
    plain = logits(model)
    module = model.bert.encoder.layer[1].get_submodule(part)
    module.register_forward_hook(lambda module, args, output: 2 * output)
    assert not torch.allclose(logits(model), plain)
    assert [row.reason for row in patch_report(model).rows] == [
        "",
        f"not plain, so called: {part} (hooks)",
        "",
    ]


@pytest.mark.parametrize("module", ["output", "output.dropout"])
def test_dropout_acts_in_training(module: str) -> None:
    model = tiny.build("bert", hidden_dropout_prob=0.5)
    twin = patch_model(copy.deepcopy(model))
    found = []
    for each in (model, twin):
        each.bert.encoder.layer[1].get_submodule(module).train()
        torch.manual_seed(0)
        found.append(logits(each))
    assert torch.equal(*found)
    assert not torch.allclose(found[0], logits(model))


def test_a_replaced_part_is_called() -> None:
    class Doubled(modeling_bert.BertOutput):
        def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states, input_tensor)

    model = tiny.build("bert")
    twin = patch_model(copy.deepcopy(model))
    for each in (model, twin):
        each.bert.encoder.layer[1].output.__class__ = Doubled
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when: str) -> None:
    model = tiny.build("bert")
    config = LoraConfig(target_modules=["output.dense"], init_lora_weights=False)

    def adapt(model: Any) -> Any:
        torch.manual_seed(0)
        return get_peft_model(model, config).eval()

    plain, expected = logits(model), logits(adapt(copy.deepcopy(model)))
    assert not torch.allclose(plain, expected)
    adapted = patch_model(adapt(model)) if when == "before" else adapt(patch_model(model))
    assert {row.reason for row in patch_report(adapted).rows} == {
        "not plain, so called: output.dense (Linear)"
    }
    assert torch.equal(logits(adapted), expected)


def test_compiled_in_one_graph() -> None:
    model = tiny.prove(patch_model(tiny.build("bert")))
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(model))


@pytest.mark.parametrize("changed", [modeling_bert.BertOutput, GELUActivation])
def test_look_alikes_are_refused(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters the MLP in the comparison is normed, so large enough to tell erf from tanh."""
    forwards = {
        modeling_bert.BertOutput: lambda self, x, input: 2 * self.LayerNorm(self.dense(x) + input),
        GELUActivation: lambda self, x: nn.functional.gelu(x, approximate="tanh"),
    }
    model = tiny.build("bert")
    before = tiny.tree(model)
    monkeypatch.setattr(changed, "forward", forwards[changed])
    with pytest.raises(ValueError, match=r"layer\.0: a BertLayer computes something else"):
        patch_model(model)
    assert tiny.tree(model) == before
