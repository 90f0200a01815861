"""Families that normalize what attention and MLP add to the residual: patches/sandwich.py."""

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hf_triton_mlp.patches.sandwich import (
    SPECS,
    FusedGemma2DecoderLayer,
    FusedGlm4DecoderLayer,
    FusedOlmo2DecoderLayer,
)
from test_llama import module_of, named
from test_packed import mlps
from test_plain_families import Formula, sorted_sums
from tiny_models import prove
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from hf_triton_mlp import (
    MLPConfig,
    MLPGemmOp,
    TritonMLP,
    layers,
    patch_model,
    patch_report,
    unpatch_model,
)
from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.ops import norm_function
from hf_triton_mlp.patching import MLPSpec, full_name

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: Language models alone, and the text models of others; test_llama.py has EXAONE 4.5's.
FAMILIES = ("exaone4", "gemma2", "gemma3_text", "glm4", "olmo2", "olmo3")
TEXT_MODELS = ("glm4v_text", "glm_image_text", "glm_ocr_text")
OF_EACH_LAYER = ("gemma2", "glm4", "olmo2")


def build(family: str, device: str = "cpu") -> Any:
    return tiny.build(family).to(device)


def spec_of(model: nn.Module) -> MLPSpec:
    layer: Any = model.model.layers[0]  # type: ignore[union-attr]
    return next(spec for spec in SPECS if spec.layer_class == full_name(type(layer)))


# --- what the installed transformers computes ---------------------------------------------------


def half(first: str, attention_norm: str, norm: str, output_norm: str) -> str:
    """A layer's formula, where norms without a name are not there."""

    def of(norm: str, x: str) -> str:
        return f"{norm}({x})" if norm else x

    s = of(attention_norm, f"self_attn({of(first, 'x')})") + " + x"
    return of(output_norm, f"mlp({of(norm, s)})") + f" + {s}"


FORMULAS: dict[Any, str] = {
    FusedGemma2DecoderLayer: half(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    FusedGlm4DecoderLayer: half(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
    FusedOlmo2DecoderLayer: half("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.layer_class.split(".")[-1])
def test_the_layers_compute_this(spec: MLPSpec) -> None:
    """A release that changes one of them fails here, before it computes something else."""
    module = module_of(spec)
    layer, norm = named(module, spec.layer_class), named(module, spec.norm_class)
    assert sorted_sums(Formula(layer).text) == sorted_sums(FORMULAS[spec.fused_layer])
    made = inspect.getsource(layer.__init__)
    assert spec.branch_norms is not None
    names = *spec.branch_norms, *(() if spec.norm is None else (spec.norm(None),))
    for name in names:
        assert f"self.{name} = {norm.__name__}(" in made
    used = set(re.findall(r"\w+norm(?=\()", FORMULAS[spec.fused_layer]))
    assert used - {"input_layernorm"} == set(names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.norm_class.split(".")[-1])
def test_the_norms_compute_this(spec: MLPSpec, dtype: torch.dtype) -> None:
    norm = tiny.randomized(named(module_of(spec), spec.norm_class)(32, eps=0.1)).to(dtype)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = norm_function(spec.norm_kind, norm.weight, None, 0.1)
    exact = norm_function(spec.norm_kind, norm.weight.double(), None, 0.1)
    assert ours is not None and exact is not None
    tiny.assert_as_accurate(ours(x), norm(x), exact(x.double()))


# --- patched against unpatched ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", ["layer", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_the_way_back(family: str, depth: str, dtype: torch.dtype, device: str) -> None:
    model = build(family, device).to(dtype)
    spec, fused = spec_of(model), depth == "layer"
    reference, inputs = tiny.reference_of(model, dtype), tiny.batch(device, padding="right")
    keys, before = list(model.state_dict()), tiny.tree(model)
    with torch.no_grad():
        exact, original = (m(**inputs).logits for m in (reference, model))
        patch_model(model, depth=depth)
        rows = patch_report(model).rows
        norm = "norm + " if spec.norm is not None else ""
        whole = f"norm + attention residual + {norm}MLP + norm + residual"
        assert {(row.verified, row.replaced) for row in rows} == {
            ("yes", whole if fused else "MLP")
        }
        assert list(model.state_dict()) == keys
        assert sum(isinstance(m, FusedLayer) for m in model.modules()) == fused * tiny.LAYERS
        kind = spec.norm_kind if fused else None
        configs = [mlp.mlp_config for mlp in mlps(model)]
        assert {config.branch_norm for config in configs} == {kind}
        assert {config.norm for config in configs} == {kind if spec.norm is not None else None}
        tiny.assert_as_accurate(model(**inputs).logits, original, exact)
        tiny.assert_as_accurate(prove(model)(**inputs).logits, original, exact)
    assert tiny.tree(unpatch_model(model)) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_a_padded_batch(family: str, device: str) -> None:
    model = build(family, device)
    arguments = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}
    expected = model.generate(**tiny.batch(device), **arguments)
    prove(patch_model(model))
    assert torch.equal(model.generate(**tiny.batch(device), **arguments), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions(family: str, device: str) -> None:
    model, inputs = build(family, device), tiny.batch(device, padding="right")
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True, output_attentions=True)
        prove(patch_model(model))
        found = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert found.keys() == expected.keys()
    for ours, theirs in zip(tiny.tensors(found), tiny.tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TEXT_MODELS)
def test_text_models(family: str, device: str) -> None:
    names = ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    sizes = tiny.config("llama").to_dict()
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = AutoConfig.for_model(
        family, **{name: sizes[name] for name in names}, hidden_size=32, head_dim=8,
        intermediate_size=51, rope_parameters={**rope, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = tiny.randomized(AutoModel.from_config(config)).eval().to(device)
    reference, inputs = tiny.reference_of(model, torch.float32), tiny.batch(device, padding="right")
    with torch.no_grad():
        exact, original = (m(**inputs).last_hidden_state for m in (reference, model))
        prove(patch_model(model))
        assert [row.verified for row in patch_report(model).rows] == ["yes"] * tiny.LAYERS
        tiny.assert_as_accurate(model(**inputs).last_hidden_state, original, exact)


@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_compiled_in_one_graph(family: str) -> None:
    model, inputs = prove(patch_model(build(family))), tiny.batch(padding="right")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_gradients_are_the_originals(family: str, device: str) -> None:
    model, inputs = build(family, device).train(), tiny.batch(device)
    twin = patch_model(copy.deepcopy(model))
    for each in (model, twin):
        each(**inputs).logits.square().sum().backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert theirs.grad is not None and ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


# --- what is called, not read -------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Layers run as on a GPU, if in PyTorch; which operations did is in the list."""
    calls: list[Any] = []
    call = MLPGemmOp.__call__

    def recorded(self: MLPGemmOp, *arguments: Any) -> Tensor:
        calls.append(self)
        return call(self, *arguments)

    monkeypatch.setattr("hf_triton_mlp.mlp.kernels_apply", lambda input: True)
    monkeypatch.setattr(MLPGemmOp, "__call__", recorded)
    return calls


def add_hook(norm: Any) -> None:
    norm.register_forward_hook(lambda module, args, output: 2 * output)


def change_epsilon(norm: Any) -> None:
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.5)


def subclass(norm: Any) -> None:
    cls = type(norm)
    norm.__class__ = type("Doubled", (cls,), {"forward": lambda self, x: 2 * cls.forward(self, x)})


def own_forward(norm: Any) -> None:
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)


def no_parameter(norm: Any) -> None:
    weight = norm.weight.detach() * 2
    del norm.weight
    norm.weight = weight.as_subclass(type("Subclass", (Tensor,), {}))


CHANGES = [add_hook, change_epsilon, subclass, own_forward, no_parameter]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_a_norm_that_is_not_plain_is_called(
    family: str, change: Callable[[Any], None], when: str, kernels: list[Any]
) -> None:
    model, inputs = build(family), tiny.batch()
    spec = spec_of(model)
    for name in spec.norms(model.model.layers[1]):
        changed, patched = copy.deepcopy(model), copy.deepcopy(model)
        norm = patched.model.layers[1].get_submodule(name)
        change(changed.model.layers[1].get_submodule(name))
        if when == "before":
            if change is change_epsilon and name == next(iter(spec.norms(model.model.layers[1]))):
                continue  # then it is the others' that differ, of which one is called below
            change(norm)
        patch_model(patched)
        if when == "after":
            change(norm)
        with torch.no_grad():
            original = model(**inputs).logits
            expected = changed(**inputs).logits.as_subclass(Tensor)
            kernels.clear()
            found = patched(**inputs).logits.as_subclass(Tensor)
        assert len(kernels) == tiny.LAYERS - 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, original, rtol=1e-2, atol=1e-2)
        rows = patch_report(patched).rows
        assert [name in row.reason for row in rows] == [False, True, False]
        if when == "before":
            assert [row.verified for row in rows] == ["yes", "no", "yes"]


@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_norms_of_different_epsilons_are_called(family: str, kernels: list[Any]) -> None:
    model, inputs = build(family), tiny.batch()
    first, *_, last = spec_of(model).norms(model.model.layers[0])
    for layer in model.model.layers:
        change_epsilon(layer.get_submodule(first))
    with torch.no_grad():
        expected = model(**inputs).logits
        patch_model(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not kernels
    rows = patch_report(model).rows
    assert all(row.verified == "no" and last in row.reason for row in rows)


@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_the_mlp_alone_has_no_norms(family: str, kernels: list[Any]) -> None:
    """As the original forward of a layer calls it."""
    layer = build(family).model.layers[0]
    x = torch.randn(2, 3, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer.mlp(x)
        (patched,) = patch_model(nn.ModuleList([layer]))
        kernels.clear()  # the proof's
        torch.testing.assert_close(patched.mlp(x), expected, rtol=1e-4, atol=1e-5)
    assert not kernels


@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_a_call_has_all_norms_or_none(family: str) -> None:
    spec, layer = spec_of(build(family)), build(family).model.layers[0]
    (layer,) = patch_model(nn.ModuleList([layer]))
    norms = list(spec.norms(layer).values())
    x, branch_norms = torch.randn(3, tiny.HIDDEN), tuple(norms[-2:])
    wrong = norms[0] if spec.norm is None else None
    for given in (
        {"norm": norms[0]},
        {"norm": wrong, "branch_norms": branch_norms},
    ):
        with pytest.raises(ValueError, match=f"norms.*{spec.norm_kind}"):
            layer.mlp(x, x, **given)
    config = replace(layer.mlp.mlp_config, branch_norm=None)
    plain = TritonMLP.inline(config)
    with pytest.raises(ValueError, match=r"norms.*None"):
        plain(x, x, branch_norms=branch_norms)


# --- the proof ----------------------------------------------------------------------------------


def identity(x: Tensor) -> Tensor:
    return x


Half = Callable[..., Tensor]

#: Second halves of layers: of attention's output a, the residual r, the MLP f and the norms.
HALVES: dict[str, Half] = {
    "swapped": lambda a, r, f, A, N, C: (s := r + C(a)) + A(f(N(s))),
    "no attention norm": lambda a, r, f, A, N, C: (s := r + a) + C(f(N(s))),
    "no output norm": lambda a, r, f, A, N, C: (s := r + A(a)) + f(N(s)),
    "no norm": lambda a, r, f, A, N, C: (s := r + A(a)) + C(f(s)),
    "no residual": lambda a, r, f, A, N, C: (s := A(a)) + C(f(N(s))),
    "no second residual": lambda a, r, f, A, N, C: C(f(N(r + A(a)))),
    "residual behind the norm": lambda a, r, f, A, N, C: (u := N(r + A(a))) + C(f(u)),
    "norm of the sum": lambda a, r, f, A, N, C: (s := A(a + r)) + C(f(N(s))),
    "norm before the MLP": lambda a, r, f, A, N, C: (s := r + A(a)) + f(C(N(s))),
    "another norm in front": lambda a, r, f, A, N, C: (s := r + A(a)) + C(f(A(s))),
    "halved": lambda a, r, f, A, N, C: (s := r + A(a)) + 0.5 * C(f(N(s))),
}
SAME: Half = lambda a, r, f, A, N, C: (s := r + A(a)) + C(f(N(s)))  # noqa: E731


def look_alike(family: str, half: Half, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model whose layers have another second half, and a spec that does not know it."""
    model = build(family)
    spec, cls = spec_of(model), type(model.model.layers[0])
    assert spec.branch_norms is not None
    attention_norm, output_norm = spec.branch_norms

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        normed = getattr(self, "input_layernorm", identity)(hidden_states)
        attention, _ = self.self_attn(hidden_states=normed, **kwargs)
        name = spec.norm_name(self)
        norm = identity if name is None else getattr(self, name)
        norms = getattr(self, attention_norm), norm, getattr(self, output_norm)
        return half(attention, hidden_states, self.mlp, *norms)

    other = type("LookAlike", (cls,), {"forward": forward, "__module__": __name__})
    for layer in model.model.layers:
        layer.__class__ = other
    monkeypatch.setattr(layers, "specs", lambda: (replace(spec, layer_class=full_name(other)),))
    return model


def assert_refused(model: nn.Module) -> None:
    before = tiny.tree(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0: .*computes something else"):
        patch_model(model)
    assert tiny.tree(model) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_a_layer_that_looks_like_one_of_these(
    family: str, name: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "olmo2" and name in ("no norm", "residual behind the norm"):
        pytest.skip("it has no norm there")
    assert_refused(look_alike(family, HALVES[name], monkeypatch).to(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_a_layer_that_is_written_otherwise(
    family: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch_model(look_alike(family, SAME, monkeypatch).to(device, dtype))
    assert {row.verified for row in patch_report(model).rows} == {"yes"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_a_norm_with_another_offset(
    family: str, place: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All norms are of one class, which computes another formula for one of them."""
    model = build(family)
    spec = spec_of(model)
    names = list(spec.norms(model.model.layers[0]))
    if place >= len(names):
        pytest.skip("it has two norms")
    cls = type(model.model.layers[0].get_submodule(names[0]))
    offset = -1 if spec.norm_kind == "rms_norm_offset" else 1

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.other:
            return cls.forward(self, x)
        wide = x.to(self.weight.dtype).float() if x.dtype != torch.float64 else x
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        weight = self.weight + (offset if spec.norm_kind == "rms_norm" else 0)
        return (wide * weight).to(x.dtype)

    other = type("OtherNorm", (cls,), {"forward": forward, "__module__": __name__})
    monkeypatch.setattr("test_sandwich.OtherNorm", other, raising=False)
    for layer in model.model.layers:
        for i, name in enumerate(names):
            norm = layer.get_submodule(name)
            norm.__class__, norm.other = other, i == place
    changed = replace(spec, norm_class=full_name(other))
    monkeypatch.setattr(layers, "specs", lambda: (changed,))
    assert_refused(model.to(device, dtype))


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rms_norm", "rms_norm_offset"])
@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
def test_bound_launches_with_branch_norms(tokens: int, front: bool, kind: str) -> None:
    config = MLPConfig(
        hidden_size=768, intermediate_size=3072, dtype=torch.float16, activation="silu",
        gated=True, norm=kind if front else None, branch_norm=kind, up_bias=False, down_bias=False,
    )  # fmt: skip
    mlp = TritonMLP(config).cuda()
    a, r = torch.randn(2, tokens, 768, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        for norm in (mlp.attn_nw, mlp.branch_nw):
            if norm is not None:
                norm.normal_(1.0, 0.3)
        exact = copy.deepcopy(mlp).float().cpu()(a.float().cpu(), r.float().cpu())
        rest = mlp.fuse(r)
        assert rest is not None
        first = rest(a, r)
        torch.testing.assert_close(first.float().cpu(), exact, rtol=1e-2, atol=1e-2)
        bound = mlp._bound
        assert bound is not None
        again = bound.launches(a, r, True)
        assert again is not None and torch.equal(again, first)
        rest = mlp.fuse(r)
        assert rest is not None and torch.equal(rest(a, r), first)


@pytest.mark.gpu
@pytest.mark.parametrize("family", OF_EACH_LAYER)
def test_a_layer_whose_norm_is_called_between_others(family: str) -> None:
    """Its MLP runs alone then, by other launches, and again with its norms."""
    model, inputs = build(family, "cuda"), tiny.batch("cuda")
    patched = patch_model(copy.deepcopy(model))
    hooked = patched.model.layers[0].get_submodule(spec_of(model).branch_norms[1])  # type: ignore[index]
    with torch.no_grad():
        expected = model(**inputs).logits
        for _ in range(2):
            for _ in range(3):
                torch.testing.assert_close(patched(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
            hook = hooked.register_forward_hook(lambda module, args, output: None)
            for _ in range(3):
                torch.testing.assert_close(patched(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
            hook.remove()
