"""A patch is compared with the original before it is made: look-alikes are refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from tiny_models import tree
from torch import nn
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
)

from hf_triton_mlp import layers, patch_model, patch_report, patching, proof
from hf_triton_mlp.patching import MLPSpec, full_name
from hf_triton_mlp.specs import specs

LLAMA = next(spec for spec in specs() if spec.family == "llama")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class DoubledMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class SwappedMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class OtherActivationMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.relu(self.gate_proj(x)) * self.up_proj(x))


class DropoutMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5)


class ClampedMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(max=0.5))


class OffsetNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * (1 + 1 / self.weight)


class ScaledAttentionLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        residual = hidden_states
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        residual = residual + 0.7 * attention
        return residual + self.mlp(self.post_attention_layernorm(residual))


class PostNormLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        normed = self.post_attention_layernorm(hidden_states + attention)
        return normed + self.mlp(normed)


MLPS = [DoubledMLP, SwappedMLP, OtherActivationMLP, DropoutMLP, ClampedMLP]


def register(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """One more family: Llama but for `changes`, which names its classes."""
    names = {name: full_name(c) if isinstance(c, type) else c for name, c in changes.items()}
    found = (*specs(), replace(LLAMA, family="look-alike", **names))
    if "layer_class" not in names:
        found = tuple(spec for spec in found if spec is not LLAMA)
    monkeypatch.setattr(layers, "specs", lambda: found)


def assert_refused(model: nn.Module, text: str, **arguments: Any) -> None:
    before = tree(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    number = r"\d\.\d\de[+-]\d\d"
    with pytest.raises(ValueError, match=rf"layers\.0\b.*{text}.*{number}.*torch.*{number}"):
        patch_model(model, **arguments)
    assert tree(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def changed(cls: type[nn.Module], path: str = "mlp") -> Any:
    """A tiny Llama whose layers have a module of a subclass."""
    model = tiny.build("llama")
    for layer in tiny.decoder_layers("llama", model):
        layer.get_submodule(path).__class__ = cls
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", ["layer", "mlp"])
@pytest.mark.parametrize("cls", MLPS, ids=lambda cls: cls.__name__)
def test_an_mlp_that_looks_like_llamas(
    cls: type[nn.Module],
    depth: str,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, mlp_class=cls)
    name = "LlamaDecoderLayer" if depth == "layer" else cls.__name__
    assert_refused(changed(cls).to(device, dtype), name, depth=depth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [ScaledAttentionLayer, PostNormLayer], ids=lambda c: c.__name__)
def test_a_layer_that_looks_like_llamas(
    cls: type[nn.Module], dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, layer_class=cls)
    model = changed(cls, "").to(device, dtype)
    assert_refused(model, cls.__name__)
    patch_model(model, depth="mlp")
    assert {row.verified for row in patch_report(model).rows} == {"yes"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_that_looks_like_llamas(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, norm_class=OffsetNorm)
    model = changed(OffsetNorm, "post_attention_layernorm").to(device, dtype)
    assert_refused(model, "LlamaDecoderLayer")


def like_llama(config_class: Any, model_class: Any, **changes: Any) -> Any:
    llama = tiny.config("llama").to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip
    config = config_class(**{name: llama[name] for name in sizes}, pad_token_id=0, **changes)
    return tiny.randomized(model_class(config)).eval()


GRANITE = lambda: like_llama(GraniteConfig, GraniteForCausalLM, residual_multiplier=0.3)  # noqa: E731
BITNET = lambda: like_llama(BitNetConfig, BitNetForCausalLM, hidden_act="silu")  # noqa: E731
SEED_OSS = lambda: like_llama(SeedOssConfig, SeedOssForCausalLM, residual_dropout=0.5)  # noqa: E731
GEMMA = lambda: tiny.build("gemma")  # noqa: E731


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [GRANITE, BITNET, GEMMA], ids=["granite", "bitnet", "gemma"])
def test_families_that_look_like_llama(
    build: Callable[[], Any], dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residual multipliers, a norm before the down projection, a norm's weight offset by 1."""
    model = build().to(device, dtype)
    layer = model.model.layers[0]
    monkeypatch.setattr(layers, "specs", lambda: (spec_of(layer),))
    assert_refused(model, type(layer).__name__)


def spec_of(layer: Any) -> MLPSpec:
    """Llama's spec with a layer's classes."""
    names = {
        "layer_class": full_name(type(layer)),
        "mlp_class": full_name(type(layer.mlp)),
        "norm_class": full_name(type(layer.post_attention_layernorm)),
    }
    return replace(LLAMA, family="look-alike", **names)


def test_dropout_acts_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed-OSS's MLP is Llama's but for dropout, which its own forward does while training."""
    model = SEED_OSS()
    layer = model.model.layers[0]
    monkeypatch.setattr(layers, "specs", lambda: (spec_of(layer),))
    inputs = tiny.batch()
    twin = patch_model(copy.deepcopy(model))
    assert {row.verified for row in patch_report(twin).rows} == {"yes"}
    for training in (True, False):
        found = []
        for each in (model, twin):
            torch.manual_seed(0)
            with torch.no_grad():
                found.append(each.train(training)(**inputs).logits)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# --- what is compared, and what is not ----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("variant", "depth"), tiny.VARIANT_DEPTHS)
def test_every_variant_is_verified(
    variant: str, depth: str, dtype: torch.dtype, device: str
) -> None:
    model = patch_model(tiny.build_variant(variant).to(device, dtype), depth=depth)
    assert {row.verified for row in patch_report(model).rows} == {"yes"}


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_one_layer_of_each_kind(family: str, depth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    errors = proof.errors

    def counted(module: nn.Module, *arguments: Any) -> list[tuple[float, float, float]]:
        seen.append(module)
        return errors(module, *arguments)

    monkeypatch.setattr(proof, "errors", counted)
    model = tiny.build(family)
    layers = tiny.decoder_layers(family, model)
    owner, _, name = tiny.PLACES[family].activation.rpartition(".")
    setattr(layers[1].get_submodule(owner), name, nn.SiLU())
    kinds = [layers[0]] if family == "llama" else layers[:2]
    patch_model(model, depth=depth)
    assert seen == (kinds if depth == "layer" else [layer.mlp for layer in kinds])
    assert {row.verified for row in patch_report(model).rows} == {"yes"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_probe_leaves_no_trace(family: str) -> None:
    model = tiny.build(family).train()
    before, values = tree(model), copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    name, layer, spec = layers.supported_layers(model)[0]
    assert patching._prove(patching._check_layer(spec, name, layer, "layer"))
    assert tree(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def assert_not_verified(model: nn.Module, layers: list[int], **arguments: Any) -> None:
    patch_model(model, **arguments)
    found = [i for i, row in enumerate(patch_report(model).rows) if row.verified == "no"]
    assert found == layers


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_verify_false(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "errors", lambda *arguments: pytest.fail("a probe was run"))
    assert_not_verified(tiny.build(family), [0, 1, 2], verify=False)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("which", ["layer", "input norm", "norm", "projection", "activation"])
def test_hooks_see_no_probe(family: str, which: str) -> None:
    model, place = tiny.build(family), tiny.PLACES[family]
    path = {
        "layer": "",
        "input norm": place.norms[0],
        "norm": place.norms[1],
        "projection": place.projections[0],
        "activation": place.activation,
    }[which]
    layer = tiny.decoder_layers(family, model)[0]
    layer.get_submodule(path).register_forward_hook(
        lambda module, args, output: pytest.fail("the hook saw a probe")
    )
    assert_not_verified(model, [] if which == "layer" else [0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_verified_after_its_outputs_were_captured(family: str) -> None:
    """transformers leaves hooks on the layers whose outputs it was asked for."""
    model = tiny.build(family)
    with torch.no_grad():
        model(**tiny.batch(), output_hidden_states=True, output_attentions=True)
    assert_not_verified(model, [])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_is_not_called(family: str) -> None:
    """Nor copied: its hooks, adapters and quantized weights do not matter."""
    model, path = tiny.build(family), tiny.PLACES[family].attention

    class Attention(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            pytest.fail("the attention was copied")

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            pytest.fail("the attention was called")

    for layer in tiny.decoder_layers(family, model):
        setattr(layer, path, Attention())
        layer.get_submodule(path).register_forward_hook(lambda module, args, output: None)
    assert_not_verified(model, [])


def test_weights_that_are_not_numbers() -> None:
    """Nothing can be told before weights are loaded; the patch is right for those that will be."""
    model = tiny.build("llama")
    nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, torch.nan)
    assert_not_verified(model, [0, 1, 2])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_no_memory_for_a_copy(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def errors(*arguments: Any) -> list[tuple[float, float, float]]:
        raise error

    monkeypatch.setattr(proof, "errors", errors)
    model = patch_model(tiny.build("llama"))
    assert {row.verified for row in patch_report(model).rows} == {"no"}


def test_a_layer_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("needs a printer")

    model = tiny.build("llama")
    before = tree(model)
    monkeypatch.setattr(LlamaMLP, "forward", broken)
    with pytest.raises(ValueError, match=r"layers\.0: .*needs a printer.*verify=False"):
        patch_model(model)
    assert tree(model) == before
    patch_model(model, verify=False)


def test_a_copy_is_as_verified_as_its_original() -> None:
    model = patch_model(LlamaForCausalLM(tiny.config("llama")))
    assert {row.verified for row in patch_report(copy.deepcopy(model)).rows} == {"yes"}
