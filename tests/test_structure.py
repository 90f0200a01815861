"""MLPs that no spec names: found by structure, or left alone; and mixtures of experts."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tiny
import torch
from tiny_models import logits, tree
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.activations import ACT2FN
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.falcon_h1 import FalconH1Config
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.gemma3n import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.lfm2 import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp import TritonMLP, patch_model, patch_report, patched, unpatch_model
from hf_triton_mlp.patching import mlp_configs
from hf_triton_mlp.structure import FoundMLP, read_mlp

HIDDEN, INTERMEDIATE = 12, 20


class PlainMLP(nn.Module):
    def __init__(self, activation: str = "gelu_new", bias: bool = True) -> None:
        super().__init__()
        self.wide = nn.Linear(HIDDEN, INTERMEDIATE, bias=bias)
        self.act = ACT2FN[activation]
        self.narrow = nn.Linear(INTERMEDIATE, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.wide(x)))


class DropoutMLP(PlainMLP):
    def __init__(self) -> None:
        super().__init__("relu")
        self.inner_dropout, self.dropout = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.narrow(self.inner_dropout(self.act(self.wide(x)))))


class ConvMLP(PlainMLP):
    def __init__(self) -> None:
        super().__init__("quick_gelu")
        self.wide, self.narrow = Conv1D(INTERMEDIATE, HIDDEN), Conv1D(HIDDEN, INTERMEDIATE)


class SquareMLP(PlainMLP):
    """The sizes do not say which projection is the first, and it is not the first child."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.act(self.narrow(x)))


class GatedMLP(PlainMLP):
    def __init__(self, activation: str = "silu") -> None:
        super().__init__(activation, bias=False)
        self.other = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.wide(x)) * self.other(x))


class OtherGateMLP(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x) * self.act(self.other(x)))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(HIDDEN, INTERMEDIATE), nn.GELU(), nn.Linear(INTERMEDIATE, HIDDEN)
    )


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.ffn = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class Stack(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], layers: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(make()) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build(make: Callable[[], nn.Module]) -> Any:
    return tiny.randomized(Stack(make)).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(3)))


def prove(model: nn.Module) -> int:
    """Compute from the weights as read on the CPU too; how many MLPs do so."""
    found = [module for module in model.modules() if isinstance(module, TritonMLP)]
    for mlp in found:
        mlp.proving = True
    return len(found)


def summary(model: nn.Module) -> list[tuple[str, str, str]]:
    return [(row.layer, row.verified, row.reason) for row in patch_report(model).rows]


# --- what is found ------------------------------------------------------------------------------

MLPS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str | None, str]]] = {
    "plain": (PlainMLP, ("wide", None, "narrow")),
    "without biases": (lambda: PlainMLP("relu", bias=False), ("wide", None, "narrow")),
    "dropout": (DropoutMLP, ("wide", None, "narrow")),
    "Conv1D": (ConvMLP, ("wide", None, "narrow")),
    "square": (SquareMLP, ("narrow", None, "wide")),
    "Sequential": (sequential, ("0", None, "2")),
    "gated": (GatedMLP, ("other", "wide", "narrow")),
    "gated by the other": (OtherGateMLP, ("wide", "other", "narrow")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MLPS)
def test_an_mlp_by_structure(name: str, dtype: torch.dtype) -> None:
    make, roles = MLPS[name]
    model = build(make).to(dtype)
    before, keys, state = tree(model), list(model.state_dict()), torch.get_rng_state()
    spec = read_mlp(model.blocks[0].ffn)
    assert spec is not None and (spec.up, spec.gate, spec.down) == roles
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    reference = copy.deepcopy(model).double()
    with torch.no_grad():
        exact, expected = reference(x.double()), model(x)
        assert patch_model(model) is model
        names = [f"blocks.{i}.ffn" for i in range(3)]
        assert summary(model) == [(name, "yes, by structure", "") for name in names]
        assert {row.replaced for row in patch_report(model).rows} == {"MLP"}
        assert prove(model) == 3
        tiny.assert_as_accurate(model(x), expected, exact)
    assert list(model.state_dict()) == keys
    unpatch_model(model)
    assert tree(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert summary(model) == [(name, "-", "not patched") for name in names]


@pytest.mark.parametrize("name", MLPS)
def test_copies_and_pickles(name: str) -> None:
    model = patch_model(build(MLPS[name][0]))
    expected, report = output(model), patch_report(model)
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        assert patch_report(twin) == report and torch.equal(output(twin), expected)
        unpatch_model(twin)
        assert not any(isinstance(module, TritonMLP) for module in twin.modules())
    assert prove(model) == 3


def test_a_pickle_is_patched_too() -> None:
    model = patch_model(build(GatedMLP))
    twin = pickle.loads(pickle.dumps(model))
    assert patch_report(twin) == patch_report(model)
    assert torch.equal(output(unpatch_model(twin)), output(model))
    assert {type(block.ffn) for block in twin.blocks} == {GatedMLP}


def test_patched_again_selected_and_for_a_while() -> None:
    model = build(PlainMLP)
    before = tree(model)
    with patched(model, include=["*.1.ffn"]):
        once = tree(model)
        assert [row.reason for row in patch_report(model).rows] == [
            "not patched",
            "",
            "not patched",
        ]
        patch_model(model, include=[1], depth="mlp")
        assert tree(model) == once
        with patched(model):
            assert {row.reason for row in patch_report(model).rows} == {""}
        assert tree(model) == once
    assert tree(model) == before


def test_called_by_name() -> None:
    model = build(PlainMLP)
    x = torch.ones(1, HIDDEN)
    with torch.no_grad():
        expected = model.blocks[0].ffn(x=x)
        patch_model(model)
        assert torch.equal(model.blocks[0].ffn(x=x), expected)
        with pytest.raises(ValueError):
            model.blocks[0].ffn(x, x)


def test_dropout_acts_in_training() -> None:
    model = build(DropoutMLP)
    twin = patch_model(copy.deepcopy(model))
    found = []
    for each in (model, twin):
        torch.manual_seed(0)
        found.append(output(each.train()))
    assert torch.equal(*found)


def test_compiled() -> None:
    model = patch_model(build(GatedMLP))
    expected = output(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(output(compiled), expected)


def test_a_replaced_activation_is_called() -> None:
    model = patch_model(build(PlainMLP))
    model.blocks[0].ffn.act = nn.Tanh()
    expected = output(unpatch_model(copy.deepcopy(model)))
    torch.testing.assert_close(output(model), expected)


def test_configs_are_read_without_weights() -> None:
    with torch.device("meta"):
        model = Stack(GatedMLP)
    [config] = mlp_configs(model)
    assert (config.hidden_size, config.intermediate_size) == (HIDDEN, INTERMEDIATE)
    assert config.gated and config.activation == "silu" and config.norm is None


# --- what only looks like one -------------------------------------------------------------------


class DoubledMLP(PlainMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ResidualMLP(PlainMLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class LimitedMLP(GatedMLP):
    """As in DeepSeek-V4: usual activations do not come near the limit."""

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.wide(x).clamp(max=1e4)) * self.other(x))


class ActivatedTwiceMLP(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.wide(x)) * self.act(self.other(x)))


class ProductMLP(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.wide(x) * self.other(x)))


class MixingMLP(PlainMLP):
    """Differs from the formula only where there is more than one token."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.dim() < 3 else x.mean(1, keepdim=True).expand_as(x))


class FlatMLP(PlainMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1]))


class RoundingMLP(PlainMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16).to(x.dtype))


class TupleMLP(PlainMLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class TwoTensorsMLP(PlainMLP):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x) if y is None else super().forward(x) + y


class OverwritingMLP(PlainMLP):
    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        x.zero_()
        return found


class RaisingMLP(PlainMLP):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs a printer")


class ScaledMLP(PlainMLP):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class NormedMLP(PlainMLP):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(INTERMEDIATE)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.norm(self.act(self.wide(x))))


class NameTakenMLP(PlainMLP):
    def fuse(self) -> None:
        """TritonMLP has a method of this name."""


class SubclassedLinear(nn.Linear):
    pass


class SubclassMLP(PlainMLP):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = SubclassedLinear(INTERMEDIATE, HIDDEN)


def unequal() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 20), nn.GELU(), nn.Linear(20, HIDDEN + 1))


LOOK_ALIKES = [
    DoubledMLP, ResidualMLP, LimitedMLP, ActivatedTwiceMLP, ProductMLP, MixingMLP, FlatMLP,
    RoundingMLP, TupleMLP, TwoTensorsMLP, OverwritingMLP, RaisingMLP, ScaledMLP, NormedMLP,
    NameTakenMLP, SubclassMLP, unequal, lambda: PlainMLP("tanh"),
]  # fmt: skip


def assert_nothing_found(model: nn.Module, **arguments: Any) -> None:
    before = tree(model)
    with pytest.raises(
        ValueError, match=r"has no decoder layer that hf_triton_mlp supports.*llama"
    ):
        patch_model(model, **arguments)
    assert tree(model) == before


@pytest.mark.parametrize("make", LOOK_ALIKES, ids=lambda make: make.__name__)
def test_look_alikes(make: Callable[[], nn.Module]) -> None:
    model = Stack(make)
    assert_nothing_found(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # whatever it computes is the same then
    assert_nothing_found(model)
    assert patch_report(model).rows == ()


def test_each_mlp_is_looked_at() -> None:
    """A layer may differ from its like by an attribute."""

    class SometimesDoubled(PlainMLP):
        factor = 1

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * super().forward(x)

    model = build(SometimesDoubled)
    model.blocks[1].ffn.factor = 2
    expected = output(model)
    patch_model(model)
    assert [row.layer for row in patch_report(model).rows] == ["blocks.0.ffn", "blocks.2.ffn"]
    prove(model)
    torch.testing.assert_close(output(model), expected)


def test_without_the_comparison_nothing_is_found() -> None:
    assert_nothing_found(build(PlainMLP), verify=False)


def test_what_cannot_be_compared_is_not_patched() -> None:
    with torch.device("meta"):
        assert_nothing_found(Stack(PlainMLP))
    broken = build(PlainMLP)
    for block in broken.blocks:
        nn.init.constant_(block.ffn.wide.weight, torch.nan)
    assert_nothing_found(broken)
    mixed = build(PlainMLP)
    for block in mixed.blocks:
        block.ffn.narrow.half()
    assert_nothing_found(mixed)


@pytest.mark.parametrize("part", ["wide", "act"])
def test_a_part_with_hooks(part: str) -> None:
    model = build(PlainMLP)
    module = model.blocks[0].ffn.get_submodule(part)
    module.register_forward_hook(lambda *args: pytest.fail("the hook saw a probe"))
    patch_model(model)
    assert [row.layer for row in patch_report(model).rows] == ["blocks.1.ffn", "blocks.2.ffn"]


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_triton_mlp.proof.errors", lambda *arguments: [(1.0, 1e-8, 0.0)])
    assert_nothing_found(build(PlainMLP))


# --- transformers' models -----------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SMALL, "image_size": 8, "patch_size": 4}
IDS = torch.arange(3, 10)[None]
IMAGE = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


def t5(act: str) -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"d_model": HIDDEN, "d_ff": INTERMEDIATE, "d_kv": 3, "num_heads": 4, "num_layers": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=97, feed_forward_proj=act, **sizes))
    return model, {"input_ids": IDS, "decoder_input_ids": IDS}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    return ViTModel(ViTConfig(**VISION)), {"pixel_values": IMAGE}


def clip() -> tuple[nn.Module, dict[str, Any]]:
    config = CLIPConfig(text_config={**SMALL, "vocab_size": 97}, vision_config=VISION)
    return CLIPModel(config), {"input_ids": IDS, "pixel_values": IMAGE}


MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "t5": (lambda: t5("relu"), 4),
    "t5, gated": (lambda: t5("gated-gelu"), 4),
    "vit": (vit, 2),
    "clip": (clip, 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str) -> None:
    make, count = MODELS[name]
    model, inputs = make()
    model = tiny.randomized(model).eval()
    reference = copy.deepcopy(model).double()
    exact_inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    before = tree(model)
    with torch.no_grad():
        exact, expected = reference(**exact_inputs)[0], model(**inputs)[0]
        patch_model(model)
        assert prove(model) == count
        assert {row.verified for row in patch_report(model).rows} == {"yes, by structure"}
        tiny.assert_as_accurate(model(**inputs)[0], expected, exact)
    assert tree(unpatch_model(model)) == before


def test_a_vision_model_beside_a_supported_family_stays() -> None:
    text = tiny.config("llama", vocab_size=97).to_dict()
    config = LlavaConfig(
        text_config=text,
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_id=96,
    )
    model = patch_model(tiny.randomized(LlavaForConditionalGeneration(config)).eval())
    rows = patch_report(model).rows
    assert len(rows) == tiny.LAYERS and all("language_model.layers" in row.layer for row in rows)
    assert {row.verified for row in rows} == {"yes"}
    assert not any(isinstance(module, FoundMLP) for module in model.modules())
    tower: Any = model.get_submodule("model.vision_tower")
    patch_model(tower)
    assert {row.verified for row in patch_report(model).rows} == {"yes", "yes, by structure"}
    unpatch_model(model)
    assert not any(isinstance(module, TritonMLP) for module in model.modules())


# --- mixtures of experts ------------------------------------------------------------------------


def qwen2_moe(**changes: Any) -> Any:
    config = Qwen2MoeConfig(
        vocab_size=tiny.VOCABULARY,
        num_key_value_heads=2,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        pad_token_id=0,
        **{**SMALL, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 3, **changes},
    )
    return tiny.randomized(Qwen2MoeForCausalLM(config)).eval()


@pytest.mark.parametrize("depth", ["layer", "mlp"])
def test_experts_in_some_layers_of_a_family(depth: str) -> None:
    model, other = tiny.build("llama"), qwen2_moe()
    model.model.layers[1].mlp = other.model.layers[1].mlp
    before, expected = tree(model), logits(model)
    patch_model(model, depth=depth)
    assert summary(model) == [
        ("model.layers.0", "yes", ""),
        ("model.layers.1", "-", "mixture of experts (Qwen2MoeSparseMoeBlock)"),
        ("model.layers.2", "yes", ""),
    ]
    assert type(model.model.layers[1].mlp) is Qwen2MoeSparseMoeBlock
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert tree(unpatch_model(model)) == before
    with pytest.raises(ValueError, match="mixture-of-experts MLPs are not supported"):
        patch_model(model, include=[1])
    for i in (0, 2):
        model.model.layers[i].mlp = other.model.layers[i].mlp
    with pytest.raises(
        ValueError, match=r"mixture-of-experts.*Qwen2MoeSparseMoeBlock.*are not sup"
    ):
        patch_model(model)


def test_experts_in_some_layers_by_structure() -> None:
    model = qwen2_moe(mlp_only_layers=[1])
    before, expected = tree(model), logits(model)
    patch_model(model)
    moe = ("-", "mixture of experts (Qwen2MoeSparseMoeBlock)")
    assert summary(model) == [
        ("model.layers.0.mlp", *moe),
        ("model.layers.1.mlp", "yes, by structure", ""),
        ("model.layers.2.mlp", *moe),
    ]
    assert prove(model) == 1
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert tree(unpatch_model(model)) == before
    assert_nothing_found(model, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_experts_alone(verify: bool) -> None:
    sizes = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 97}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    before = tree(model)
    text = (
        r"mixture-of-experts MLPs \(MixtralSparseMoeBlock\) are not supported.*supported: .*llama"
    )
    with pytest.raises(ValueError, match=text):
        patch_model(model, verify=verify)
    assert tree(model) == before
    reason = "mixture of experts (MixtralSparseMoeBlock)"
    assert summary(model) == [(f"model.layers.{i}.mlp", "-", reason) for i in range(2)]


# --- known look-alikes of transformers ---------------------------------------------------------


def falcon_h1(*multipliers: float) -> nn.Module:
    config = FalconH1Config(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, mlp_multipliers=list(multipliers)
    )
    return FalconH1MLP(config)


def gemma3n(sparsity: float) -> nn.Module:
    config = Gemma3nTextConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=2,
        num_hidden_layers=1,
        activation_sparsity_pattern=[sparsity],
    )
    return Gemma3nTextMLP(config)


def lfm2() -> nn.Module:
    return Lfm2MLP(Lfm2Config(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE))


@pytest.mark.parametrize(
    ("mlp", "roles"),
    [
        (lambda: falcon_h1(1.0, 1.0), ("up_proj", "gate_proj", "down_proj")),
        (lambda: falcon_h1(0.5, 1.0), None),
        (lambda: falcon_h1(1.0, 2.0), None),
        (lambda: gemma3n(0.0), ("up_proj", "gate_proj", "down_proj")),
        (lambda: gemma3n(0.95), None),
        (lfm2, None),  # its activation is no module
    ],
    ids=["falcon_h1", "falcon_h1 gate", "falcon_h1 down", "gemma3n", "gemma3n top-k", "lfm2"],
)
def test_look_alikes_of_transformers(
    mlp: Callable[[], nn.Module], roles: tuple[str, ...] | None
) -> None:
    spec = read_mlp(mlp().eval())
    assert (None if spec is None else (spec.up, spec.gate, spec.down)) == roles
