"""Families whose up and gate projection are one: patches/packed.py."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hf_triton_mlp.patches.llama import FusedLlamaDecoderLayer
from hf_triton_mlp.patches.packed import FusedPhi3DecoderLayer
from peft import LoraConfig, get_peft_model
from test_llama import LAYER, body, module_of, named
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.moonshine import modeling_moonshine
from transformers.models.phi3 import modeling_phi3

from hf_triton_mlp import TritonMLP, patch_model, patch_report
from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec
from hf_triton_mlp.reading import split_packed
from hf_triton_mlp.specs import specs

PACKED = [spec for spec in specs() if spec.packed is not None]

#: What an MLP computes from its two halves, by its forward as `body` gives it.
MLPS = {
    "gate_up": {
        body(modeling_phi3.Phi3MLP),
        "x = self.input_linear(x)\n"
        "chunked_hidden_states = x.chunk(2, dim=-1)\n"
        "x = self.activation(chunked_hidden_states[0]) * chunked_hidden_states[1]\n"
        "x = self.output_linear(x)\n"
        "return x",
    },
    "up_gate": {body(modeling_moonshine.MoonshineDecoderMLP)},
}


def without_dropout(found: str) -> str:
    """Phi-3's layer's body without its two dropouts; attention's second result has a name there."""
    for name in ("resid_attn_dropout", "resid_mlp_dropout"):
        assert found.count(f" + self.{name}(x)") == 1
        found = found.replace(f" + self.{name}(x)", " + x")
    return found.replace("x, self_attn_weights = ", "x, _ = ")


#: What makes a layer's body Llama's, by the short forward that takes its place.
AS_LLAMAS: dict[type[FusedLayer], Callable[[str], bool]] = {
    FusedLlamaDecoderLayer: lambda found: found == LAYER,
    FusedPhi3DecoderLayer: lambda found: without_dropout(found) == LAYER,
}


@pytest.mark.parametrize("spec", PACKED, ids=lambda spec: spec.layer_class.split(".")[-1])
def test_the_classes_compute_this(spec: MLPSpec) -> None:
    """A release that changes one of them fails here, before it computes something else."""
    module = module_of(spec)
    layer, mlp = named(module, spec.layer_class), named(module, spec.mlp_class or "")
    assert spec.packed is not None and body(mlp) in MLPS[spec.packed]
    made = inspect.getsource(layer.__init__)
    assert f"self.{spec.mlp} = {mlp.__name__}(" in made
    if spec.fused_layer not in AS_LLAMAS:
        return  # its layer, if it has a short forward, is compared in test_sandwich.py
    norm = named(module, spec.norm_class)
    assert AS_LLAMAS[spec.fused_layer](body(layer))
    assert body(norm) == body(modeling_llama.LlamaRMSNorm)
    assert f"self.post_attention_layernorm = {norm.__name__}(" in made


def test_which_half_is_which() -> None:
    assert "gate, up_states = up_states.chunk(2, dim=-1)" in body(modeling_phi3.Phi3MLP)
    assert "x, gate = x.chunk(2, dim=-1)" in body(modeling_moonshine.MoonshineDecoderMLP)
    up, gate = split_packed("up_gate", torch.arange(6))
    assert (up.tolist(), gate.tolist()) == ([0, 1, 2], [3, 4, 5])
    gate, up = reversed(split_packed("gate_up", torch.arange(6)))
    assert (gate.tolist(), up.tolist()) == ([0, 1, 2], [3, 4, 5])


def mlps(model: nn.Module) -> list[TritonMLP]:
    return [module for module in model.modules() if isinstance(module, TritonMLP)]


def layers(family: str) -> Any:
    """Decoder layers of a family."""
    model = tiny.build(family)
    return model.model.layers if family == "phi3" else model.decoder.layers


@pytest.mark.parametrize("family", ["phi3", "moonshine"])
def test_halves_are_views(family: str, device: str) -> None:
    """Weights changed in place, or replaced, are what the next call reads."""
    found = layers(family).to(device)
    twin = copy.deepcopy(found)[0].mlp
    mlp = patch_model(found, depth="mlp")[0].mlp
    assert {row.verified for row in patch_report(found).rows} == {"yes"}
    names = {"phi3": ("gate_up_proj", "gate", "up"), "moonshine": ("fc1", "up", "gate")}
    name, first, second = names[family]
    inner = tiny.INTERMEDIATE
    weights, projection = mlp._weights(None, None), getattr(mlp, name)
    for half, rows in ((first, slice(inner)), (second, slice(inner, 2 * inner))):
        view = getattr(weights, half)
        assert view.data_ptr() == projection.weight[rows].data_ptr()
        assert torch.equal(view, projection.weight[rows])
        bias = getattr(weights, f"{half}_bias")
        assert bias is None if family == "phi3" else torch.equal(bias, projection.bias[rows])
    tiny.prove(found)
    x = torch.randn(2, 3, tiny.HIDDEN, generator=torch.Generator().manual_seed(0)).to(device)
    other = nn.Parameter(
        torch.randn(2 * inner, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    )
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), twin(x), rtol=1e-4, atol=1e-5)
        for each in (mlp, twin):
            getattr(each, name).weight[:7].mul_(2)
        torch.testing.assert_close(mlp(x), twin(x), rtol=1e-4, atol=1e-5)
        for each in (mlp, twin):
            getattr(each, name).weight = nn.Parameter(other.to(device))
        torch.testing.assert_close(mlp(x), twin(x), rtol=1e-4, atol=1e-5)


def with_lora(model: Any) -> Any:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["gate_up_proj"])
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # B starts at zero, which would change nothing
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("depth", ["layer", "mlp"])
def test_lora(depth: str, when: str, device: str) -> None:
    """The adapter is around the packed projection, which is called as it was."""
    model = tiny.build("phi3").to(device)
    inputs = tiny.batch(device)
    with torch.no_grad():
        plain = model(**inputs).logits
        expected = with_lora(copy.deepcopy(model))(**inputs).logits
        if when == "before":
            adapted = patch_model(with_lora(model), depth=depth)
        else:
            adapted = with_lora(patch_model(model, depth=depth))
        assert {mlp.mlp_config.intermediate_size for mlp in mlps(adapted)} == {tiny.INTERMEDIATE}
        assert all("gate_up_proj (Linear)" in row.reason for row in patch_report(adapted).rows)
        assert torch.equal(adapted(**inputs).logits, expected)
        assert not torch.allclose(plain, expected)
        merged = adapted.merge_and_unload()
        if when == "after":  # the layer that was patched is back, and read
            tiny.prove(merged)
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_parts_are_called(device: str) -> None:
    """Where gradients are needed, norm and projections are, the packed one once."""
    layer = patch_model(tiny.build("phi3").to(device)).model.layers[0]
    x, r = torch.randn(2, 2, 3, tiny.HIDDEN, generator=torch.Generator().manual_seed(0)).to(device)
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    calls: list[nn.Module] = []
    mlp.gate_up_proj.register_forward_hook(lambda module, args, output: calls.append(module))
    found = mlp(x, r, norm=norm)
    assert calls == [mlp.gate_up_proj] and found.requires_grad
    gate, up = mlp.gate_up_proj(norm(x + r)).chunk(2, dim=-1)
    expected = x + r + mlp.down_proj(mlp.activation_fn(gate) * up)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training(device: str) -> None:
    model = tiny.build("phi3", resid_pdrop=0.5).to(device)
    twin = tiny.prove(patch_model(copy.deepcopy(model)))
    for training in (True, False):
        if training:
            for mlp in mlps(twin):
                mlp.proving = False
        for each in (model, twin):
            each.eval()
            for layer in each.model.layers:
                layer.resid_mlp_dropout.train(training)
        found = []
        for each in (model, twin):
            torch.manual_seed(0)
            with torch.no_grad():
                found.append(each(**tiny.batch(device)).logits)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
