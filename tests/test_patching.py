"""patch_model and its siblings: what they change, what they leave alone, what they refuse."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from tiny_models import logits, tree
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomBlock, BloomMLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from hf_triton_mlp import (
    TritonMLP,
    layers,
    patch_model,
    patch_report,
    patched,
    unpatch_model,
)
from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.specs import specs

LAST = tiny.LAYERS - 1
CLASSES: dict[str, tuple[type[nn.Module], ...]] = {
    "gpt2": (GPT2Block, GPT2MLP),
    "bloom": (BloomBlock, BloomMLP),
    "opt": (OPTDecoderLayer,),
    "llama": (LlamaDecoderLayer, LlamaMLP),
}


def patched_layers(model: nn.Module) -> list[int]:
    return [i for i, row in enumerate(patch_report(model).rows) if row.reason != "not patched"]


# --- what it changes --------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_patch_and_unpatch(family: str, depth: str) -> None:
    model = tiny.build(family)
    before, expected = tree(model), logits(model)
    assert patch_model(model, depth=depth) is model
    assert tree(model) != before
    assert sum(isinstance(module, TritonMLP) for module in model.modules()) == tiny.LAYERS
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert unpatch_model(model) is model
    assert tree(model) == before
    assert torch.equal(logits(model), expected)
    unpatch_model(model)
    assert tree(model) == before


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_the_depth_is_what_was_asked_for(family: str, depth: str) -> None:
    model = patch_model(tiny.build(family), depth=depth)
    base = CLASSES[family][0]
    for layer in tiny.decoder_layers(family, model):
        assert isinstance(layer, base) and (type(layer) is base) == (depth == "mlp")
        assert "forward" not in layer.__dict__
        assert isinstance(layer.mlp, TritonMLP)


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_patching_twice_is_a_no_op(family: str, depth: str) -> None:
    model = patch_model(tiny.build(family), depth=depth)
    once = tree(model)
    patch_model(model, depth=depth)
    assert tree(model) == once


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_parameters_are_the_same_objects_under_the_same_names(family: str, depth: str) -> None:
    model = tiny.build(family)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    patch_model(model, depth=depth)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    found = model.state_dict()
    assert list(found) == list(values)
    assert all(torch.equal(found[name], values[name]) for name in values)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("depth", ["layer", "mlp"])
def test_conv1d_weights_lie_as_the_kernels_read_them(depth: str, inference: bool) -> None:
    model = tiny.build("gpt2")
    expected = logits(model)
    mlp = model.transformer.h[0].mlp
    shared = mlp.c_proj.weight
    shared.data = torch.stack([shared.data, shared.data])[0]
    with torch.inference_mode(inference):
        patch_model(model, depth=depth)
    assert mlp.c_fc.weight.stride() == (1, tiny.HIDDEN)
    assert shared.stride() == (tiny.HIDDEN, 1)  # it does not own its memory
    assert not mlp.c_fc.weight.is_inference()
    assert torch.equal(logits(model), expected)
    with torch.inference_mode(inference):
        unpatch_model(model)
    assert mlp.c_fc.weight.is_contiguous() and not mlp.c_fc.weight.is_inference()


def test_saved_as_any_gpt2(tmp_path: Path) -> None:
    model = tiny.build("gpt2")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    patch_model(model).save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(value.is_contiguous() for value in found.values())


def test_no_memory_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("gpt2")
    before = tree(model)
    adopt, calls = TritonMLP.adopt.__func__, []

    def failing(cls: type, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        calls.append(module)
        if len(calls) == tiny.LAYERS:
            raise torch.OutOfMemoryError("no memory for one more weight")
        adopt(cls, module, *args, **kwargs)

    monkeypatch.setattr(TritonMLP, "adopt", classmethod(failing))
    with pytest.raises(torch.OutOfMemoryError):
        patch_model(model)
    assert len(calls) == tiny.LAYERS and tree(model) == before


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_only_this_instance(family: str, depth: str) -> None:
    classes = [cls for of_family in CLASSES.values() for cls in of_family]
    contents = [dict(vars(cls)) for cls in classes]
    before = tiny.build(family)
    untouched, expected = tree(before), logits(before)
    model = patch_model(tiny.build(family), depth=depth)
    after = tiny.build(family)
    for other in (before, after):
        assert [row[2] for row in tree(other)] == [row[2] for row in untouched]
        assert not any(isinstance(module, TritonMLP) for module in other.modules())
        assert torch.equal(logits(other), expected)
    assert tree(before) == untouched
    assert [dict(vars(cls)) for cls in classes] == contents
    unpatch_model(model)
    assert [dict(vars(cls)) for cls in classes] == contents


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_training_mode_is_kept(family: str) -> None:
    model = tiny.build(family).train()
    patch_model(model)
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    unpatch_model(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_load_state_dict_into_a_patched_model(family: str) -> None:
    source = tiny.randomized(tiny.build(family), seed=5)
    model = patch_model(tiny.build(family))
    assert not torch.allclose(logits(model), logits(source))
    for assign in (False, True):
        tiny.randomized(model, seed=6)
        result = model.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        model.tie_weights()
        assert not result.missing_keys and not result.unexpected_keys
        torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(unpatch_model(model)), logits(source))


# --- patched ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_context_manager(family: str) -> None:
    model = tiny.build(family)
    before = tree(model)
    with patched(model, include=[0]) as inside:
        assert inside is model and patched_layers(model) == [0]
    assert tree(model) == before


def test_context_manager_unpatches_after_an_exception() -> None:
    model = tiny.build("gpt2")
    before = tree(model)
    with pytest.raises(KeyError, match="inside"), patched(model):
        assert patched_layers(model) == [0, 1, 2]
        raise KeyError("inside")
    assert tree(model) == before


def test_context_manager_of_what_cannot_be_patched() -> None:
    model = tiny.build("gpt2", activation_function="tanh")
    before = tree(model)
    with pytest.raises(ValueError, match="Tanh"), patched(model):
        pytest.fail("the body ran")
    assert tree(model) == before


# --- include and exclude ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"include": [0]}, [0]),
        ({"include": [-1]}, [2]),
        ({"include": ["transformer.h.1"]}, [1]),
        ({"include": "transformer.h.1"}, [1]),
        ({"include": ["transformer.h.[02]"]}, [0, 2]),
        ({"include": ["*"], "exclude": [1]}, [0, 2]),
        ({"include": range(2)}, [0, 1]),
        ({"exclude": ["*.2"]}, [0, 1]),
        ({"exclude": [0, "*.1"]}, [2]),
        ({"exclude": []}, [0, 1, 2]),
        pytest.param({"include": iter([0, 2]), "exclude": iter([0])}, [2], id="iterators"),
    ],
    ids=str,
)
def test_selected_layers(arguments: dict[str, Any], expected: list[int]) -> None:
    model = patch_model(tiny.build("gpt2"), **arguments)
    assert patched_layers(model) == expected
    torch.testing.assert_close(logits(model), logits(tiny.build("gpt2")), rtol=1e-4, atol=1e-5)


def test_layers_patched_one_after_another() -> None:
    model = tiny.build("opt")
    before = tree(model)
    patch_model(model, include=[1])
    patch_model(model, include=["*.0"])
    assert patched_layers(model) == [0, 1]
    patch_model(model)
    assert patched_layers(model) == [0, 1, 2]
    assert tree(unpatch_model(model)) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"include": ["transformer.h.7"]}, "include.*'transformer.h.7'"),
        ({"include": [0, "nothing"]}, "include.*'nothing'"),
        ({"include": [3]}, "include.*3.*there are 3"),
        ({"include": [-4]}, "include.*-4"),
        ({"exclude": ["h.0"]}, "exclude.*'h.0'"),
        ({"exclude": [99]}, "exclude.*99"),
        ({"exclude": "*"}, "no layer"),
        ({"include": []}, "no layer"),
        ({"include": [0], "exclude": [0]}, "no layer"),
    ],
    ids=str,
)
def test_selectors_that_match_nothing(arguments: dict[str, Any], text: str) -> None:
    model = tiny.build("gpt2")
    before = tree(model)
    with pytest.raises(ValueError, match=text):
        patch_model(model, **arguments)
    assert tree(model) == before


def test_an_excluded_layer_may_be_unsupported() -> None:
    model = tiny.build("gpt2")
    model.transformer.h[1].mlp.act = nn.Tanh()
    expected = logits(model)
    patch_model(model, exclude=[1])
    assert patched_layers(model) == [0, 2]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


# --- refusals: each leaves the model exactly as it was ------------------------------------------


def assert_refused(model: nn.Module, text: str, **arguments: Any) -> None:
    before = tree(model)
    with pytest.raises(ValueError, match=text):
        patch_model(model, **arguments)
    assert tree(model) == before


@pytest.mark.parametrize("depth", ["", "block", "Layer", None, 1])
def test_wrong_depth(depth: Any) -> None:
    assert_refused(tiny.build("gpt2"), f'"layer" or "mlp".*{depth!r}', depth=depth)


def test_opt_has_no_mlp_module() -> None:
    assert_refused(tiny.build("opt"), r'OPTDecoderLayer.*inline.*depth="layer"', depth="mlp")


@pytest.mark.parametrize(("first", "second"), [("layer", "mlp"), ("mlp", "layer")])
def test_another_depth_needs_unpatching(first: str, second: str) -> None:
    model = patch_model(tiny.build("bloom"), depth=first)
    assert_refused(model, f"already patched.*'{first}'.*unpatch_model", depth=second)
    patch_model(unpatch_model(model), depth=second)


@pytest.mark.parametrize("model_of", [
    lambda: nn.Linear(3, 3),
    lambda: nn.ModuleList(),
    lambda: tiny.build("mvp"),
], ids=["Linear", "ModuleList", "MvpForCausalLM"])  # fmt: skip
def test_no_supported_layer(model_of: Callable[[], nn.Module], request: Any) -> None:
    model = model_of()
    assert_refused(model, rf"{request.node.callspec.id}.*bloom.*gpt2.*llama.*opt")
    before = tree(model)
    assert unpatch_model(model) is model
    assert tree(model) == before
    assert patch_report(model).rows == ()


@pytest.mark.parametrize("name", ["gelu_10", "mish", "tanh", "gelu_fast", "relu6"])
def test_unknown_activation(name: str) -> None:
    model = tiny.build("gpt2", activation_function=name)
    found = type(model.transformer.h[0].mlp.act).__name__
    assert_refused(model, rf"transformer\.h\.0.*{found}.*supported.*gelu_new")
    for depth in ("layer", "mlp"):
        assert_refused(model, found, depth=depth)
    assert_refused(tiny.build("opt", activation_function=name), found)


def test_bloom_in_slices_is_refused() -> None:
    model = tiny.build("bloom", pretraining_tp=2, slow_but_exact=True)
    for depth in ("layer", "mlp"):
        assert_refused(model, "slow_but_exact.*pretraining_tp.*slow_but_exact=False", depth=depth)


def replace_activation(family: str, layer: Any) -> str:
    owner, _, name = tiny.PLACES[family].activation.rpartition(".")
    setattr(layer.get_submodule(owner), name, nn.Hardtanh())
    return "Hardtanh"


def break_projection(which: int) -> Callable[[str, Any], str]:
    def change(family: str, layer: Any) -> str:
        projection = layer.get_submodule(tiny.PLACES[family].projections[which])
        projection.weight = nn.Parameter(projection.weight[:, :-1].contiguous())
        return "mismatched"

    return change


def break_norm(family: str, layer: Any) -> str:
    setattr(layer, tiny.PLACES[family].norms[1], nn.LayerNorm(tiny.HIDDEN + 1))
    return "mismatched.*norm"


def set_forward(family: str, layer: Any) -> str:
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return "forward of its own"


@pytest.mark.parametrize(
    "change",
    [replace_activation, break_projection(0), break_projection(1), break_norm, set_forward],
    ids=["activation", "up", "down", "norm", "forward"],
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_failure_half_way_changes_nothing(family: str, change: Callable[[str, Any], str]) -> None:
    model = tiny.build(family)
    text = change(family, tiny.decoder_layers(family, model)[LAST])
    assert_refused(model, rf"\.{LAST}\b.*{text}")
    patch_model(model, exclude=[LAST])
    assert patched_layers(model) == [0, 1]


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_a_failure_after_some_layers_are_patched_keeps_those(family: str, depth: str) -> None:
    model = patch_model(tiny.build(family), include=[0], depth=depth)
    replace_activation(family, tiny.decoder_layers(family, model)[LAST])
    assert_refused(model, "Hardtanh", depth=depth)
    assert patched_layers(model) == [0]


@pytest.mark.parametrize("depth", ["layer", "mlp"])
@pytest.mark.parametrize("family", tiny.MLP_FAMILIES)
def test_a_changed_mlp_is_refused(family: str, depth: str) -> None:
    base: Any = CLASSES[family][1]

    class ScaledMLP(base):
        def forward(self, *args: Any) -> torch.Tensor:
            return 2 * super().forward(*args)

    model = tiny.build(family)
    layer = tiny.decoder_layers(family, model)[LAST]
    layer.mlp.__class__ = ScaledMLP
    assert_refused(model, rf"\.{LAST}\.mlp.*ScaledMLP.*{base.__name__}", depth=depth)
    layer.mlp = nn.Identity()
    assert_refused(model, rf"\.{LAST}\.mlp.*Identity.*{base.__name__}", depth=depth)


@pytest.mark.parametrize("family", tiny.MLP_FAMILIES)
def test_a_forward_set_on_the_mlp_is_refused(family: str) -> None:
    model = tiny.build(family)
    mlp = tiny.decoder_layers(family, model)[LAST].mlp
    forward = mlp.forward
    mlp.forward = lambda *args: 2 * forward(*args)
    assert_refused(model, rf"\.{LAST}\.mlp.*forward of its own")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_subclassed_layer_is_refused(family: str) -> None:
    model = tiny.build(family)
    layer = tiny.decoder_layers(family, model)[LAST]
    base = type(layer)
    layer.__class__ = type("OwnLayer", (base,), {})
    assert_refused(model, f"OwnLayer.*{base.__name__}")


def test_a_family_without_a_fused_layer_has_its_mlps_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llama = next(spec for spec in specs() if spec.family == "llama")
    monkeypatch.setattr(layers, "specs", lambda: (replace(llama, fused_layer=None),))
    model = tiny.build("llama")
    before, expected = tree(model), logits(model)
    for depth in ("layer", "mlp"):
        patch_model(model, depth=depth)
        assert {row.replaced for row in patch_report(model).rows} == {"MLP"}
        assert not any(isinstance(module, FusedLayer) for module in model.modules())
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert tree(unpatch_model(model)) == before


# --- patch_report -------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_report(family: str, depth: str) -> None:
    model = tiny.build(family).to(torch.float16)
    names = [f"{tiny.PLACES[family].layers}.{i}" for i in range(tiny.LAYERS)]

    rows = patch_report(model).rows
    assert [row.layer for row in rows] == names
    assert {(row.replaced, row.plan, row.reason) for row in rows} == {("-", "-", "not patched")}

    patch_model(model, exclude=[1], depth=depth)
    report = patch_report(model)
    assert [row.layer for row in report.rows] == names
    assert [row.reason for row in report.rows] == ["", "not patched", ""]
    assert [row.verified for row in report.rows] == ["yes", "-", "yes"]
    assert {(row.dtype, row.device) for row in report.rows} == {("float16", "cpu")}
    assert ("norm" in report.rows[0].replaced) == (depth == "layer")

    lines = str(report).splitlines()
    assert len(lines) == 1 + tiny.LAYERS
    names = ["layer", "replaced", "dtype", "device", "plan", "verified", "reason"]
    assert lines[0].split() == names
    start = lines[0].index("dtype")
    assert all(line[start:].startswith("float16") for line in lines[1:])
    assert all(line == line.rstrip() for line in lines)

    unpatch_model(model)
    assert patch_report(model).rows == rows


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_report_names_the_plan_on_a_gpu(family: str) -> None:
    model = patch_model(tiny.build(family).cuda())
    for row in patch_report(model).rows:
        assert row.device.startswith("cuda") and row.plan.startswith("decode: ") and not row.reason


@pytest.mark.gpu
def test_a_gpu_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("gpt2").cuda()
    before = tree(model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(RuntimeError, match=r"7\.5.*8\.0"):
        patch_model(model)
    assert tree(model) == before
