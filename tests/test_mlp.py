"""TritonMLP alone: built from a config, and around a model's own projections."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, MoonshineConfig, Phi3Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.moonshine.modeling_moonshine import MoonshineDecoderMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp import MLPConfig, TritonMLP
from hf_triton_mlp.bound import MOST_BOUND, BoundMLP, BoundParts
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.kernels.activations import ACTIVATIONS
from hf_triton_mlp.launchers import Launch, launch
from hf_triton_mlp.mlp import StandIn, set_kind, stand_in
from hf_triton_mlp.tuning import DECODE_ROWS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
H, I = 24, 56  # noqa: E741

#: Float32 results of another summation order: a few hundred eps after two matrix products.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def randomized(mlp: TritonMLP) -> TritonMLP:
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(0.1, 0.4)
    return mlp.eval()


def expected(
    mlp: TritonMLP,
    a: torch.Tensor,
    r: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    b_a: torch.Tensor | None,
) -> torch.Tensor:
    """The table of cases, written out once more, in float64."""
    p = {name: parameter.detach().double() for name, parameter in mlp.named_parameters()}
    a, r, residual_norm, b_a = (
        None if t is None else t.double() for t in (a, r, residual_norm, b_a)
    )
    acts = {
        "relu": lambda x: x.clamp(min=0),
        "relu2": lambda x: x.clamp(min=0) ** 2,
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    }
    for name in ("gelu_new", "gelu_pytorch_tanh"):
        acts[name] = lambda x: (
            0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        )
    act = acts[mlp.mlp_config.activation]

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        h = x @ p["inter_w"].t() + p.get("inter_b", 0)
        if mlp.mlp_config.gated:
            up, gate = (
                h[..., : mlp.mlp_config.intermediate_size],
                h[..., mlp.mlp_config.intermediate_size :],
            )
            h = act(gate) * up
        else:
            h = act(h)
        return h @ p["output_w"].t() + p.get("output_b", 0)

    def add(*terms: torch.Tensor | None) -> torch.Tensor:
        return sum(t for t in terms if t is not None)  # type: ignore[return-value]

    if mlp.mlp_config.branch_norm is not None:
        norm_a, norm_c = p.get("branch_nw", torch.ones(2, 1, device=a.device).double())

        def rms_norm(x: torch.Tensor, weight: torch.Tensor | int) -> torch.Tensor:
            offset = mlp.mlp_config.branch_norm == "rms_norm_offset" and mlp.branch_nw is not None
            rms = (x.square().mean(-1, keepdim=True) + mlp.mlp_config.norm_eps).sqrt()
            return x / rms * (weight + offset)

        s = add(rms_norm(add(a, b_a), norm_a), r)
        u = s if mlp.mlp_config.norm is None else rms_norm(s, p.get("attn_nw", 1))
        return rms_norm(feed_forward(u), norm_c) + s
    if mlp.mlp_config.norm is not None:
        s = add(a, b_a, r)
        if mlp.mlp_config.norm == "layer_norm":
            u = (s - s.mean(-1, keepdim=True)) / (
                s.var(-1, keepdim=True, correction=0) + mlp.mlp_config.norm_eps
            ).sqrt()
        else:
            u = s / (s.square().mean(-1, keepdim=True) + mlp.mlp_config.norm_eps).sqrt()
        u = u * p.get("attn_nw", 1) + p.get("attn_nb", 0)
        return feed_forward(u) + (s if mlp.mlp_config.pre_norm else u)
    if residual_norm is not None:
        return feed_forward(residual_norm) + add(a, b_a, r)
    return add(feed_forward(a), r)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [(1, 1), (2, 13)])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_norm_cases(device: str, tokens: tuple[int, int], norm: str, pre_norm: bool) -> None:
    torch.manual_seed(0)
    cases = list(itertools.product([True, False], repeat=3))
    for gated, bias, affine in cases[1::3] if INTERPRETED else cases:
        config = MLPConfig(
            hidden_size=H, intermediate_size=I, activation="silu", gated=gated, norm=norm,
            norm_affine=affine, pre_norm=pre_norm, up_bias=bias, down_bias=bias,
        )  # fmt: skip
        mlp = randomized(TritonMLP(config)).to(device)
        a, r = (torch.randn(*tokens, H, device=device) for _ in range(2))
        b_a = torch.randn(H, device=device)
        for residual, attention_bias in itertools.product((None, r), (None, b_a)):
            with torch.no_grad():
                out = mlp(a, residual=residual, bias=attention_bias)
            torch.testing.assert_close(
                out.double(), expected(mlp, a, residual, None, attention_bias), **CLOSE
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [(1, 1), (2, 13)])
@pytest.mark.parametrize("norm", [True, False])
def test_branch_norm_cases(device: str, tokens: tuple[int, int], norm: bool) -> None:
    torch.manual_seed(0)
    a, r = (torch.randn(*tokens, H, device=device) for _ in range(2))
    b_a = torch.randn(H, device=device)
    for kind, gated, affine, residual, attention_bias in (
        ("rms_norm", True, True, r, None),
        ("rms_norm_offset", False, True, None, b_a),
        ("rms_norm_offset", False, False, r, b_a),
    ):
        config = MLPConfig(
            hidden_size=H, intermediate_size=I, activation="silu", gated=gated, branch_norm=kind,
            norm=kind if norm else None, norm_affine=affine, norm_eps=0.1, up_bias=not gated,
            down_bias=not gated,
        )  # fmt: skip
        mlp = randomized(TritonMLP(config)).to(device)
        with torch.no_grad():
            out = mlp(a, residual=residual, bias=attention_bias)
        exact = expected(mlp, a, residual, None, attention_bias)
        torch.testing.assert_close(out.double(), exact, **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 20])
def test_cases_without_norm(device: str, tokens: int) -> None:
    torch.manual_seed(0)
    config = MLPConfig(hidden_size=H, intermediate_size=I, norm=None)
    mlp = randomized(TritonMLP(config)).to(device)
    a, r, n = (torch.randn(tokens, H, device=device) for _ in range(3))
    b_a = torch.randn(H, device=device)
    for args in ((a,), (a, r), (a, r, n), (a, None, n), (a, r, n, b_a), (a, None, n, b_a)):
        with torch.no_grad():
            out = mlp(*args)
        full = (*args, *(None,) * (4 - len(args)))
        torch.testing.assert_close(out.double(), expected(mlp, *full), **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device: str, activation: str) -> None:
    torch.manual_seed(0)
    config = MLPConfig(hidden_size=H, intermediate_size=I, activation=activation)
    mlp = randomized(TritonMLP(config)).to(device)
    a = torch.randn(3, H, device=device)
    with torch.no_grad():
        torch.testing.assert_close(mlp(a).double(), expected(mlp, a, None, None, None), **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_not_modified_and_the_output_is_fresh(device: str) -> None:
    mlp = randomized(TritonMLP(MLPConfig(hidden_size=H, intermediate_size=I))).to(device)
    a, r = torch.randn(2, H, device=device), torch.randn(2, H, device=device)
    copies = a.clone(), r.clone()
    with torch.no_grad():
        out = mlp(a, r)
    assert torch.equal(a, copies[0]) and torch.equal(r, copies[1])
    assert out.data_ptr() not in (a.data_ptr(), r.data_ptr())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_from_projections(device: str, kind: str) -> None:
    torch.manual_seed(0)
    up: nn.Module = nn.Linear(H, I) if kind == "linear" else Conv1D(I, H)
    down: nn.Module = nn.Linear(I, H) if kind == "linear" else Conv1D(H, I)
    norm = nn.LayerNorm(H, eps=1e-5)
    config = MLPConfig(hidden_size=H, intermediate_size=I, activation="gelu", norm="layer_norm")
    mlp = TritonMLP.from_projections(config, up=("c_fc", up), down=("c_proj", down)).to(device)
    norm.to(device)
    assert mlp.c_fc is up and mlp.c_proj is down
    assert set(mlp.state_dict()) == {"c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"}
    a, r = torch.randn(5, H, device=device), torch.randn(5, H, device=device)
    with torch.no_grad():
        torch.testing.assert_close(mlp(a), down(F.gelu(up(a))), **CLOSE)
        torch.testing.assert_close(mlp(a, r), down(F.gelu(up(a))) + r, **CLOSE)
        s = a + r
        torch.testing.assert_close(mlp(a, r, norm=norm), down(F.gelu(up(norm(s)))) + s, **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_a_part_that_is_not_plain_is_called(device: str) -> None:
    up, down, norm = nn.Linear(H, I), nn.Linear(I, H), nn.LayerNorm(H)
    config = MLPConfig(hidden_size=H, intermediate_size=I, activation="relu")
    mlp = TritonMLP.from_projections(config, up=("up", up), down=("down", down)).to(device)
    norm.to(device)
    a = torch.randn(2, H, device=device)

    def plain() -> torch.Tensor:
        return down(F.relu(up(norm(a)))) + a

    with torch.no_grad():
        base = plain()
        for part in (up, down, norm):
            handle = part.register_forward_hook(lambda module, args, output: 2 * output)
            changed = plain()
            assert not torch.allclose(changed, base)
            torch.testing.assert_close(mlp(a, norm=norm), changed, **CLOSE)
            handle.remove()
        torch.testing.assert_close(mlp(a, norm=norm), base, **CLOSE)
        torch.nn.utils.parametrizations.weight_norm(up)
        up.parametrizations.weight.original0.mul_(3)
        torch.testing.assert_close(mlp(a, norm=norm), plain(), **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_an_offset_norm_starts_as_the_identity(device: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": I}
    mlp = TritonMLP(MLPConfig(**sizes, norm="rms_norm_offset")).to(device)
    like = TritonMLP(MLPConfig(**sizes, norm="rms_norm")).to(device)
    assert mlp.attn_nw is not None and not mlp.attn_nw.any()
    a = torch.randn(3, H, device=device)
    with torch.no_grad():
        nn.init.normal_(mlp.attn_nw)
        like.load_state_dict({**mlp.state_dict(), "attn_nw": 1 + mlp.attn_nw})
        torch.testing.assert_close(mlp(a), like(a), **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gated_mlp_with_an_rms_norm(device: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": I, "num_attention_heads": 4}
    mlp = LlamaMLP(LlamaConfig(**sizes, mlp_bias=True)).to(device).eval()
    norm = LlamaRMSNorm(H, eps=1e-3).to(device)
    nn.init.normal_(norm.weight)
    a, r = torch.randn(2, 3, 5, H, device=device)
    config = MLPConfig(
        hidden_size=H,
        intermediate_size=I,
        activation="silu",
        gated=True,
        norm="rms_norm",
        norm_eps=1e-3,
    )
    with torch.no_grad():
        expected = mlp(norm(a + r)) + a + r
        names = {"up": "up_proj", "down": "down_proj", "gate": "gate_proj"}
        stand_in(TritonMLP, LlamaMLP).adopt(mlp, config, **names, norm_class=LlamaRMSNorm)
        assert isinstance(mlp, TritonMLP)
        weights = mlp._weights(norm, None)
        assert weights is not None
        assert weights.gate is mlp.gate_proj.weight and weights.gate_bias is mlp.gate_proj.bias
        assert weights.norm_weight is norm.weight and weights.norm_bias is None
        torch.testing.assert_close(mlp(a, r, norm=norm), expected, **CLOSE)
        torch.testing.assert_close(mlp._mlp_gemm(a, weights, r), expected, **CLOSE)
        norm.variance_epsilon = 0.5
        assert mlp._weights(norm, None) is None
        torch.testing.assert_close(mlp(a, r, norm=norm), mlp(norm(a + r)) + a + r, **CLOSE)
    mlp.release()
    assert type(mlp) is LlamaMLP and set(vars(mlp)) == set(vars(LlamaMLP(LlamaConfig(**sizes))))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cls", [Phi3MLP, MoonshineDecoderMLP], ids=lambda cls: cls.__name__)
def test_a_projection_with_the_rows_of_two(cls: type[nn.Module], device: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": I}
    if cls is Phi3MLP:
        mlp, names = cls(Phi3Config(**sizes, pad_token_id=0)), ("gate_up_proj", "down_proj")
    else:
        mlp, names = cls(MoonshineConfig(**sizes), "silu"), ("fc1", "fc2")
    mlp = mlp.to(device).eval()
    x, r = torch.randn(2, 3, H, device=device)
    bias = cls is not Phi3MLP
    config = MLPConfig(**sizes, activation="silu", gated=True, norm=None, up_bias=bias)
    packed = "up_gate" if bias else "gate_up"
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(0, 0.4)
        expected = mlp(x)
        stand_in(TritonMLP, cls).adopt(mlp, config, up=names[0], down=names[1], packed=packed)
        weights = mlp._weights(None, None)
        assert weights.up.shape == weights.gate.shape == (I, H)
        torch.testing.assert_close(mlp(x), expected, **CLOSE)
        torch.testing.assert_close(mlp(x, residual_norm=r), mlp(r) + x, **CLOSE)
    mlp.release()
    assert type(mlp) is cls and "packed" not in vars(mlp)


@pytest.mark.parametrize("other", [GemmaRMSNorm, nn.RMSNorm, nn.LayerNorm])
def test_a_norm_of_another_class_is_called(other: type[nn.Module]) -> None:
    """Gemma's has a weight and an eps too, and multiplies by 1 + weight."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=4)).eval()
    norm = other(H, eps=1e-6)
    config = MLPConfig(
        hidden_size=H,
        intermediate_size=I,
        activation="silu",
        gated=True,
        norm="rms_norm",
        norm_eps=1e-6,
    )
    names = {"up": "up_proj", "down": "down_proj", "gate": "gate_proj"}
    stand_in(TritonMLP, LlamaMLP).adopt(mlp, config, **names, norm_class=LlamaRMSNorm)
    assert mlp._weights(norm, None) is None
    a = torch.randn(3, H)
    with torch.no_grad():
        torch.testing.assert_close(mlp(a, norm=norm), mlp(norm(a)) + a, **CLOSE)


def test_one_stand_in_for_each_class() -> None:
    cls = stand_in(TritonMLP, LlamaMLP)
    assert cls is stand_in(TritonMLP, LlamaMLP) and cls is not stand_in(TritonMLP, nn.Linear)
    assert issubclass(cls, TritonMLP) and issubclass(cls, LlamaMLP)
    assert cls.__name__ == "TritonLlamaMLP" and cls.original_class is LlamaMLP


def test_kinds_of_one_module_come_and_go_in_any_order() -> None:
    class One(StandIn):
        pass

    class Other(StandIn):
        pass

    for first, second in ((One, Other), (Other, One)):
        module = nn.Linear(2, 2)
        for kind in (first, second, first):
            set_kind(module, kind, True)
        assert isinstance(module, One) and isinstance(module, Other)
        for gone, left in ((first, second), (second, nn.Linear), (second, nn.Linear)):
            set_kind(module, gone, False)
            assert isinstance(module, left) and not isinstance(module, gone)
        assert type(module) is nn.Linear


def test_a_class_that_others_derived_stays_under_a_kind_that_is_added() -> None:
    class One(StandIn):
        pass

    class Other(StandIn):
        pass

    module = nn.Linear(2, 2)
    set_kind(module, One, True)
    derived = type("Derived", (type(module),), {})
    module.__class__ = derived
    set_kind(module, One, True)
    assert type(module) is derived
    set_kind(module, Other, True)
    assert isinstance(module, derived)
    set_kind(module, Other, False)
    assert type(module) is derived
    set_kind(module, One, False)
    assert type(module) is nn.Linear


@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device: str) -> None:
    torch.manual_seed(0)
    mlp = randomized(TritonMLP(MLPConfig(hidden_size=H, intermediate_size=I))).to(device)
    a = torch.randn(3, H, device=device, requires_grad=True)
    mlp(a).square().sum().backward()
    assert a.grad is not None and all(p.grad is not None for p in mlp.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_compile_pickle_deepcopy(device: str) -> None:
    mlp = randomized(TritonMLP(MLPConfig(hidden_size=H, intermediate_size=I))).to(device)
    a = torch.randn(2, 3, H, device=device)
    with torch.no_grad():
        out = mlp(a, a)
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(a, a), out, **CLOSE)
        for twin in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
            assert torch.equal(twin(a, a), out)


# --- launches bound to the weights ------------------------------------------------------------


class InModel:
    """A TritonMLP around a model's layers, and what those compute without it."""

    def __init__(self, hidden: int, intermediate: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        place = {"device": device, "dtype": dtype}
        self.up = nn.Linear(hidden, intermediate, **place)
        self.down = nn.Linear(intermediate, hidden, **place)
        self.norm = nn.LayerNorm(hidden, **place)
        config = MLPConfig(
            hidden_size=hidden, intermediate_size=intermediate, activation="relu", dtype=dtype
        )
        self.mlp = TritonMLP.from_projections(
            config, up=("up", self.up), down=("down", self.down)
        ).eval()

    def __call__(self, a: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return self.mlp(a, r, norm=self.norm)

    def plain(self, a: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(self.norm(a + r)))) + (a + r)


def shorten(layers: InModel) -> None:
    """As pruning by hand does it: fewer rows, where they were."""
    layers.up.weight.data = layers.up.weight.data[: I // 2]
    layers.up.bias.data = layers.up.bias.data[: I // 2]
    layers.down.weight.data = layers.down.weight.data[:, : I // 2]


def own_forward(layers: InModel) -> None:
    forward = layers.up.forward
    layers.up.forward = lambda x: forward(2 * x)


CHANGES = {
    "hook": lambda m: m.up.register_forward_hook(lambda module, args, output: 2 * output),
    "pre-hook": lambda m: m.norm.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "forward": own_forward,
    "parametrization": lambda m: torch.nn.utils.parametrizations.weight_norm(m.down),
    "parameter": lambda m: setattr(m.up, "weight", nn.Parameter(m.up.weight.detach() * 2)),
    "data": lambda m: setattr(m.up.bias, "data", m.up.bias.data * 2),
    "strides": lambda m: setattr(m.up.weight, "data", m.up.weight.data.t().contiguous().t()),
    "no bias": lambda m: setattr(m.down, "bias", None),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "dtype": lambda m: (m.mlp.double(), m.norm.double()),
    "shape": shorten,
}


@pytest.mark.parametrize("name", CHANGES)
def test_bound_launches_notice_changes(name: str) -> None:
    layers = InModel(H, I, "cpu", torch.float32)

    def parts() -> list[nn.Module | None]:
        return layers.mlp._parts(layers.norm, None)

    bound = BoundParts(
        layers.mlp, parts(), layers.norm.eps, BoundMLP(layers.up.weight, torch.float32)
    )
    assert bound.unchanged(parts())
    with torch.no_grad():
        layers.up.weight.mul_(2)  # read by its address
    assert bound.unchanged(parts())
    CHANGES[name](layers)
    assert not bound.unchanged(parts())


def test_bound_launches_notice_another_epsilon_of_an_rms_norm() -> None:
    layers, norm = InModel(H, I, "cpu", torch.float32), LlamaRMSNorm(H, eps=1e-5)
    parts = layers.mlp._parts(norm, None)
    bound = BoundParts(layers.mlp, parts, 1e-5, BoundMLP(layers.up.weight, torch.float32))
    assert bound.unchanged(parts)
    norm.variance_epsilon = 1e-6
    assert not bound.unchanged(parts)


def test_another_norm_than_the_one_bound() -> None:
    layers = InModel(H, I, "cpu", torch.float32)
    bound = BoundParts(
        layers.mlp,
        layers.mlp._parts(layers.norm, None),
        1e-5,
        BoundMLP(layers.up.weight, torch.float32),
    )
    assert not bound.unchanged(layers.mlp._parts(nn.LayerNorm(H), None))
    assert not bound.unchanged(layers.mlp._parts(None, None))


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(set(CHANGES) - {"shape", "dtype"}))
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_changes_between_calls(name: str, tokens: int) -> None:
    layers = InModel(H, I, "cuda", torch.float32)
    a, r = torch.randn(2, tokens, H, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(layers(a, r), layers.plain(a, r), **CLOSE)
        assert layers.mlp._bound is not None
        layers.up.weight.mul_(2)
        torch.testing.assert_close(layers(a, r), layers.plain(a, r), **CLOSE)
        CHANGES[name](layers)
        for _ in range(3):
            torch.testing.assert_close(layers(a, r), layers.plain(a, r), **CLOSE)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_launches_that_are_bound_beside_an_attention(
    tokens: int, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches alone: on the CPU there is nothing to bind."""
    moving: list[torch.Tensor | None] = []

    def launch_once(call: Launch, tensors: tuple[torch.Tensor | None, ...]) -> None:
        launch(call)
        moving[:] = tensors

    monkeypatch.setattr("hf_triton_mlp.bound.bind", launch_once)
    mlp = TritonMLP(MLPConfig(hidden_size=64, intermediate_size=96, norm=None, gated=gated))
    w = mlp._own_weights()
    attention, residual, normed = torch.randn(3, tokens, 64)
    with torch.no_grad():
        BoundMLP(w.up, w.up.dtype).bind(
            attention, residual, normed, w,
            activation=mlp.mlp_config.activation, norm=None, norm_eps=1e-5, early=True,
        )  # fmt: skip
        exact = expected(mlp, attention, residual, normed, None)
        torch.testing.assert_close(moving[3].double(), exact, **CLOSE)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(("norm", "summand"), [("rms_norm", True), (None, True), (None, False)])
def test_launches_that_are_bound_with_branch_norms(
    norm: str | None, summand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Launch] = []
    monkeypatch.setattr(
        "hf_triton_mlp.bound.bind", lambda call, moving: calls.append(call) or launch(call)
    )
    config = MLPConfig(
        hidden_size=H, intermediate_size=I, norm=norm, branch_norm="rms_norm", gated=True
    )
    mlp = randomized(TritonMLP(config))
    mlp._bound = BoundParts(
        mlp, mlp._parts(None, None), 1e-5, BoundMLP(mlp._own_weights().up, torch.float32)
    )
    attention, r = torch.randn(2, 3, H)
    residual = r if summand else None
    with torch.no_grad():
        mlp._bind(attention, residual, None, mlp._own_weights(), None, None, None, True)
        exact = expected(mlp, attention, residual, None, None)
    assert len(calls) == 4
    torch.testing.assert_close(calls[-1].tensors[-2].double(), exact, **CLOSE)  # type: ignore[union-attr]


def test_a_call_without_the_norm_of_the_config_binds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the original forward of a layer calls its MLP, which the layer normed itself."""
    layers = InModel(H, I, "cpu", torch.float32)
    weights = layers.mlp._weights(layers.norm, None)
    assert weights is not None
    found: list[object] = []

    def bind(self: BoundMLP, x: Any, r: Any, u: Any, w: Any, *, norm: Any, **named: Any) -> None:
        found.append(norm and (norm, w.norm_weight, w.norm_bias, named["norm_eps"]))

    monkeypatch.setattr(BoundMLP, "bind", bind)
    x = torch.randn(1, H)
    layers.mlp._bind(x, x, None, weights, layers.norm, None, None, False)
    layers.mlp._bind(x, None, None, weights, None, None, None, False)
    assert found == [("layer_norm", layers.norm.weight, layers.norm.bias, 1e-5), None]


@pytest.mark.gpu
def test_calls_with_and_without_the_norm_of_the_config() -> None:
    layers = InModel(H, I, "cuda", torch.float32)
    a, r = torch.randn(2, 1, H, device="cuda")
    with torch.no_grad():
        alone = layers.down(F.relu(layers.up(a)))
        for _ in range(3):
            torch.testing.assert_close(layers(a, r), layers.plain(a, r), **CLOSE)
        for _ in range(3):
            torch.testing.assert_close(layers.mlp(a), alone, **CLOSE)
        torch.testing.assert_close(layers(a, r), layers.plain(a, r), **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        *itertools.product((1, 2, 4, 8, 16), (torch.float16, torch.float32)),
        *itertools.product((17, 32, 100, 200, 500), (torch.float16, torch.bfloat16)),
    ],
)
def test_bound_launches_compute_the_same_bits(tokens: int, dtype: torch.dtype) -> None:
    layers = InModel(768, 3072, "cuda", dtype)
    a, r = torch.randn(2, tokens, 768, device="cuda", dtype=dtype)
    odd = torch.empty(tokens * 768 + 1, device="cuda", dtype=dtype)[1:].view(tokens, 768).copy_(a)
    with torch.no_grad():
        first = layers(a, r)
        bound = layers.mlp._bound
        assert bound is not None
        if tokens > DECODE_ROWS:  # bound when it comes again
            assert bound.launches(a, r, False) is None
            assert torch.equal(layers(a, r), first)
        assert bound.launches(a, r, False) is not None
        assert torch.equal(layers(a, r), first)
        # Rows elsewhere, and the memory of what is between as the caching allocator gives it.
        others = [torch.randn_like(a) for _ in range(3)]
        expected = [
            layers.mlp._mlp_gemm(b, layers.mlp._weights(layers.norm, None), r) for b in others
        ]
        held = [torch.empty(1000, device="cuda") for _ in range(3)]
        assert all(torch.equal(layers(b, r), e) for b, e in zip(others, expected, strict=True))
        del held
        # Where they do not apply, the launches of every call do.
        assert bound.launches(odd, r, False) is None
        torch.testing.assert_close(layers(odd, r), first, rtol=1e-2, atol=1e-2)
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            again = layers(a, r)
        other.synchronize()
        assert torch.equal(again, first)
        # As a layer calls it, whose kernels in front do not write weights.
        assert bound.launches(a, r, True) is None
        for _ in range(3):
            rest = layers.mlp.fuse(r, layers.norm)
            assert rest is not None and torch.equal(rest(a, r), first)
        assert bound.launches(a, r, True) is not None


@pytest.mark.gpu
def test_numbers_of_rows_that_launches_are_bound_for() -> None:
    layers = InModel(768, 3072, "cuda", torch.float16)
    with torch.no_grad():
        for tokens in range(17, 37 + MOST_BOUND):
            for _ in range(2):
                layers(*torch.randn(2, tokens, 768, device="cuda", dtype=torch.float16))
    bound = layers.mlp._bound
    assert bound is not None and len(bound.launches._bound) == MOST_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("graph", [False, True])
def test_weights_written_just_before_a_launch(tokens: int, graph: bool) -> None:
    """Programs that start early may not read what the launch before them writes."""
    layers = InModel(1024, 4096, "cuda", torch.float16)
    a, r = torch.randn(2, tokens, 1024, device="cuda", dtype=torch.float16)
    targets = [layers.norm.weight, layers.up.weight, layers.up.bias, layers.down.weight]
    versions = [[p.detach() * factor for p in targets] for factor in (1.0, 0.5, -1.0)]

    def run() -> list[torch.Tensor]:
        outs = []
        for version in versions:
            for changed in range(len(targets)):  # the last one written is another each time
                for i in range(len(targets)):
                    p = targets[(i + changed) % len(targets)]
                    p.copy_(version[(i + changed) % len(targets)])
                # Twice: the first up-projection starts behind a copy, the second behind ours.
                outs.append(layers(layers(a, r), r))
        return outs

    with torch.no_grad():
        expected = []
        for version in versions:
            for p, value in zip(targets, version, strict=True):
                p.copy_(value)
            torch.cuda.synchronize()
            out = layers(a, r)
            torch.cuda.synchronize()
            expected += [layers(out, r)] * len(targets)
            torch.cuda.synchronize()
        if graph:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                outs = run()
        for _ in range(20):
            if graph:
                recorded.replay()
            else:
                outs = run()
            assert all(torch.equal(x, y) for x, y in zip(outs, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
class TestBadInput:
    def mlp(self, device: str) -> TritonMLP:
        return TritonMLP(MLPConfig(hidden_size=8, intermediate_size=16)).to(device)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_not_floating(self, device: str, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
            self.mlp(device)(torch.ones(2, 8, device=device).to(dtype))

    def test_other_dtype(self, device: str) -> None:
        with pytest.raises(TypeError, match=r"float16.*float32"):
            self.mlp(device)(torch.ones(2, 8, device=device, dtype=torch.float16))

    def test_other_device(self, device: str) -> None:
        with pytest.raises(ValueError, match=r"meta.*" + device):
            self.mlp(device)(torch.ones(2, 8, device="meta"))

    def test_hidden_size(self, device: str) -> None:
        with pytest.raises(ValueError, match=r"7.*8"):
            self.mlp(device)(torch.ones(2, 7, device=device))

    def test_arguments_of_no_case(self, device: str) -> None:
        x = torch.ones(2, 8, device=device)
        with pytest.raises(ValueError, match="residual_norm"):
            self.mlp(device)(x, residual_norm=x)
        bare = TritonMLP(MLPConfig(hidden_size=8, intermediate_size=16, norm=None)).to(device)
        with pytest.raises(ValueError, match="bias"):
            bare(x, bias=x[0])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size"),
        ({"hidden_size": -3}, ValueError, "hidden_size"),
        ({"intermediate_size": 0}, ValueError, "intermediate_size"),
        ({"intermediate_size": 2.5}, TypeError, "intermediate_size"),
        ({"mp_size": 0}, ValueError, "mp_size"),
        ({"activation": "mish"}, ValueError, "mish.*supported.*gelu_new"),
        ({"norm": "batch_norm"}, ValueError, "batch_norm.*supported.*rms_norm"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps"),
        ({"branch_scale": 0.5, "norm": None}, ValueError, "branch_scale 0.5.*norm"),
        ({"branch_scale": 0.5, "pre_norm": False}, ValueError, "branch_scale 0.5.*pre_norm"),
        ({"branch_norm": "layer_norm"}, ValueError, "layer_norm.*supported.*rms_norm"),
        ({"branch_norm": "rms_norm"}, ValueError, "branch_norm 'rms_norm'.*found 'layer_norm'"),
        (
            {"branch_norm": "rms_norm", "norm": "rms_norm", "pre_norm": False},
            ValueError,
            "pre_norm.*False",
        ),
        (
            {"branch_norm": "rms_norm", "norm": "rms_norm", "branch_scale": 0.5},
            ValueError,
            "branch_scale.*0.5",
        ),
        ({"dtype": torch.float64}, ValueError, "float64.*supported"),
        ({"dtype": torch.uint8}, ValueError, "uint8.*supported"),
    ],
)
def test_bad_config(change: dict[str, object], error: type[Exception], text: str) -> None:
    values: dict[str, object] = {"hidden_size": 8, "intermediate_size": 16, **change}
    with pytest.raises(error, match=text):
        MLPConfig(**values)  # type: ignore[arg-type]


def test_mismatched_projections() -> None:
    config = MLPConfig(hidden_size=8, intermediate_size=16)
    with pytest.raises(ValueError, match=r"down projection.*\(8, 15\).*\(8, 16\)"):
        TritonMLP.from_projections(config, up=("u", nn.Linear(8, 16)), down=("d", nn.Linear(15, 8)))
