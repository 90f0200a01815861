"""Zeros that are skipped: the kernel, on a GPU or where the interpreter runs this file, and models
that are patched so."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from test_ops import _poison, assert_accurate  # noqa: F401
from torch import Tensor, nn
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp import (
    GELUGemmOp,
    launchers,
    patch_model,
    patch_report,
    patched,
    tuning,
    unpatch_model,
)
from hf_triton_mlp.density import densities, hidden_densities
from hf_triton_mlp.kernels import INTERPRETED, sparse_linear_kernel
from hf_triton_mlp.launchers import MLPWeights, Summands, linear, plan_linear
from hf_triton_mlp.linear import QuantizedLinear
from hf_triton_mlp.quantization import QuantizationConfig, QuantizedWeight
from hf_triton_mlp.reading import store_as_before, store_for_zeros

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEVICE = "cpu" if INTERPRETED else "cuda"
with_kernels = pytest.mark.filterwarnings("default") if INTERPRETED else pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16]
#: Outputs and depth: a part of a chunk, and on a GPU those of a model too.
SIZES = [(128, 300)] if INTERPRETED else [(128, 300), (768, 3072), (4096, 16384)]


def sparse_rows(M: int, K: int, density: float, dtype: torch.dtype) -> Tensor:
    x = torch.randn(M, K).abs() * (torch.rand(M, K) < density)
    return x.to(DEVICE, dtype)


def by_input(N: int, K: int, dtype: torch.dtype) -> Tensor:
    """A weight (N, K) that is stored (K, N)."""
    return (torch.randn(K, N) / K**0.5).to(DEVICE, dtype).t()


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 3, 16] if INTERPRETED else [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("N", "K"), SIZES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.6, 1.0])
def test_zeros_are_skipped(density: float, N: int, K: int, M: int, dtype: torch.dtype) -> None:
    x, weight = sparse_rows(M, K, density, dtype), by_input(N, K, dtype)
    bias, add = torch.randn(N).to(DEVICE, dtype), torch.randn(M, N).to(DEVICE, dtype)
    assert plan_linear(M, weight, sparse=True).kernel == "sparse"
    actual = linear(x, weight, bias, summands=Summands(add), sparse=True)
    expected = F.linear(x.double(), weight.double(), bias.double()) + add.double()
    assert_accurate(actual, F.linear(x, weight, bias) + add, expected)
    assert torch.equal(actual, linear(x, weight, bias, summands=Summands(add), sparse=True))
    # What is skipped does not even have to be a number.
    unused = (x == 0).all(0)
    if (x != 0).any(0).float().mean() > 0.8:  # few: all are read
        return
    other = weight.t().clone()
    other[unused] = float("nan")
    again = linear(x, other.t(), bias, summands=Summands(add), sparse=True)
    assert torch.equal(actual, again)


FORMATS = [
    QuantizationConfig(format="int8"),
    QuantizationConfig(format="int8", group_size=96),
    QuantizationConfig(format="fp8"),
    QuantizationConfig(format="int4", group_size=32),
    QuantizationConfig(format="int4", symmetric=False),
]


def quantized_by_input(
    N: int, K: int, config: QuantizationConfig, dtype: torch.dtype
) -> QuantizedWeight:
    layer = nn.Linear(K, N, bias=False, device=DEVICE, dtype=dtype)
    layer = QuantizedLinear.from_linear(layer, config)
    assert store_for_zeros(layer) and layer.quantized.by_input
    return layer.quantized


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES[: 1 if INTERPRETED else 2])
@pytest.mark.parametrize("M", [3] if INTERPRETED else [1, 3, 16])
@pytest.mark.parametrize(("N", "K"), [(128, 304), *SIZES[1:]])
@pytest.mark.parametrize(
    "config", FORMATS, ids=lambda c: f"{c.format}-{c.group_size}-{c.symmetric}"
)
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_zeros_are_skipped_in_quantized_weights(
    density: float, config: QuantizationConfig, N: int, K: int, M: int, dtype: torch.dtype
) -> None:
    x, weight = sparse_rows(M, K, density, dtype), quantized_by_input(N, K, config, dtype)
    bias, add = torch.randn(N).to(DEVICE, dtype), torch.randn(M, N).to(DEVICE, dtype)
    assert plan_linear(M, weight, dtype=dtype, sparse=True).kernel == "sparse"
    actual = linear(x, weight, bias, summands=Summands(add), sparse=True)
    values = weight.dequantize(torch.float32)
    expected = F.linear(x.double(), values.double(), bias.double()) + add.double()
    assert_accurate(actual, F.linear(x, values.to(dtype), bias) + add, expected)
    assert torch.equal(actual, linear(x, weight, bias, summands=Summands(add), sparse=True))


@with_kernels
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize(
    "config", FORMATS, ids=lambda c: f"{c.format}-{c.group_size}-{c.symmetric}"
)
def test_prompts_read_quantized_weights_by_input(
    config: QuantizationConfig, dtype: torch.dtype
) -> None:
    """Their values are made as they are of weights by output, in slabs of rows of W."""
    weight = quantized_by_input(384, 304, config, dtype)
    x = sparse_rows(17, 304, 0.5, dtype)
    bias = torch.randn(384).to(DEVICE, dtype)
    assert plan_linear(17, weight, dtype=dtype).kernel == "library"
    made = torch.empty((304, 128), device=DEVICE, dtype=dtype).t()
    launchers.launch(launchers.dequantize_launch(weight, 256, made))
    # The interpreter does not round to bfloat16, it cuts.
    rounding = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(made, weight.dequantize(dtype)[256:], rtol=rounding, atol=0.0)
    if DEVICE == "cuda":  # cuBLAS's products
        values = weight.dequantize(torch.float32)
        expected = F.linear(x.double(), values.double(), bias.double())
        actual = linear(x, weight, bias)
        assert_accurate(actual, F.linear(x, values.to(dtype), bias), expected)


@with_kernels
@pytest.mark.parametrize("M", [3] if INTERPRETED else [1, 3])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_gated_mlps_skip_zeros(activation: str, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate's zeros are the products' too; other activations read everything."""
    dtype, launched = torch.float16, []
    up, gate = (torch.randn(2, 512, 128) / 128**0.5).to(DEVICE, dtype)
    weights = MLPWeights(up, by_input(128, 512, dtype), gate=gate)
    x = torch.randn(M, 128).to(DEVICE, dtype)
    launch = launchers.launch
    record = lambda call: launched.append(call.kernel) or launch(call)  # noqa: E731
    monkeypatch.setattr(launchers, "launch", record)
    op = GELUGemmOp(activation=activation)
    actual = launchers.mlp(x, weights, activation=activation)
    assert sparse_linear_kernel in launched
    assert_accurate(actual, op.compose(x, weights), op.reference(x, weights))
    launched.clear()
    launchers.mlp(x, weights, activation="silu")
    assert sparse_linear_kernel not in launched


@with_kernels
@pytest.mark.parametrize("M", [1, 3, 16])
def test_infinite_and_nan_inputs(M: int) -> None:
    """They are what they are in other kernels."""
    x, weight = sparse_rows(M, 512, 0.1, torch.float16), by_input(256, 512, torch.float16)
    x[0, 5], x[M - 1, 300] = float("inf"), float("nan")
    actual = linear(x, weight, None, sparse=True)
    dense = linear(x, weight.contiguous(), None)
    assert torch.equal(actual.isnan(), dense.isnan())
    assert torch.equal(actual.isinf(), dense.isinf())


@with_kernels
def test_what_cannot_be_skipped() -> None:
    """Other kernels compute it: other sizes, dtypes, numbers of rows, places in memory."""
    x, weight = sparse_rows(17, 512, 0.1, torch.float16), by_input(512, 512, torch.float16)
    halves = weight.t().clone()[:, 4:260].t()
    narrow = by_input(264, 512, torch.float16)
    for rows, w in (
        (x, weight),
        (x[:2], weight.contiguous()),
        (x[:2], halves),
        (x[:2], narrow),
        (x[:2].float(), weight.float()),
    ):
        expected = F.linear(rows.double(), w.double())
        assert_accurate(linear(rows, w, None, sparse=True), F.linear(rows, w), expected)


def test_weights_are_stored_for_zeros_and_back() -> None:
    for layer in (nn.Linear(24, 40), Conv1D(40, 24)):
        state = copy.deepcopy(layer.state_dict())
        assert store_for_zeros(layer)
        weight: Any = layer.weight
        read = weight if isinstance(layer, nn.Linear) else weight.t()
        assert read.shape == (40, 24) and read.stride() == (1, 40)
        assert all(torch.equal(layer.state_dict()[name], state[name]) for name in state)
        store_as_before(layer)
        assert weight.is_contiguous() and torch.equal(weight, state["weight"])
    infinite, shared, hooked = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 8)
    infinite.weight.data[3, 2] = float("inf")
    shared.weight.data = torch.empty(16, 4)[:8]
    hooked.register_forward_hook(lambda *_: None)
    codes = QuantizedLinear.from_linear(
        nn.Linear(32, 16), QuantizationConfig(format="fp8", activations="fp8")
    )
    assert not store_for_zeros(codes) and codes.codes.is_contiguous()
    for layer in (infinite, shared, hooked, nn.LayerNorm(8)):
        strides = layer.weight.stride()
        assert not store_for_zeros(layer) and layer.weight.stride() == strides


def pays_from(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let small layers skip zeros, from so many bytes on that need not be read."""
    monkeypatch.setattr(tuning, "SPARSE_BYTES", dict.fromkeys(tuning.SPARSE_BYTES, size))
    monkeypatch.setattr(tuning, "SPARSE_COST", dict.fromkeys(tuning.SPARSE_COST, 1))


def opt(**changes: Any) -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=128, hidden_size=256, ffn_dim=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=256, **changes,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    layers = model.model.decoder.layers
    nn.init.constant_(layers[0].fc1.bias, -0.5)  # many zeros, and none
    nn.init.constant_(layers[1].fc1.bias, 9.0)
    return model.to(DEVICE if torch.cuda.is_available() else "cpu", torch.float16).eval()


def test_densities_are_those_of_the_hidden_values() -> None:
    model = opt().float()
    downs = {f"{i}": layer.fc2 for i, layer in enumerate(model.model.decoder.layers)}
    ids = torch.randint(128, (4, 12), generator=torch.Generator().manual_seed(1))
    found = densities(model, downs, ids, (1, 4))
    seen: list[Tensor] = []
    handle = downs["0"].register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    model(ids.to(model.device))
    handle.remove()
    there = (seen[0] != 0).reshape(4, 12, 512)
    assert found["0"][1] == pytest.approx(there.float().mean().item())
    assert found["0"][4] == pytest.approx(there.any(0).float().mean().item())
    assert found["1"] == {1: 1.0, 4: 1.0}
    assert hidden_densities(model, downs)["0"] == hidden_densities(model, downs)["0"] < 0.5
    assert not any(layer._forward_pre_hooks for layer in downs.values())


def test_densities_of_what_computes_none(caplog: pytest.LogCaptureFixture) -> None:
    model = opt()
    downs = {"0": model.model.decoder.layers[0].fc2}
    assert hidden_densities(model.train(), downs) == {}
    model.eval().model.decoder.layers[1].fc1 = nn.Linear(3, 3)
    assert hidden_densities(model, downs) == {} and "no zeros are skipped" in caplog.text
    assert not downs["0"]._forward_pre_hooks


@with_kernels
@pytest.mark.parametrize("before", [False] if INTERPRETED else [True, False])
@torch.no_grad()
def test_patched_models_skip_zeros(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pays_from(monkeypatch, 40_000)
    model = opt(do_layer_norm_before=before)
    original, ids = copy.deepcopy(model), torch.arange(6, device=model.device)[None]
    state = copy.deepcopy(model.state_dict())
    strides = [p.stride() for p in model.parameters()]
    expected = model(ids).logits.float()
    exact = copy.deepcopy(original).float()(ids).logits
    patch_model(model)
    first, second = model.model.decoder.layers
    assert first.fc2.weight.stride() == (1, 256) and second.fc2.weight.stride() == (512, 1)
    rows = patch_report(model).rows
    assert rows[0].density.endswith("%") and rows[1].density == ""
    assert rows[0].verified == rows[1].verified == "yes"
    if DEVICE == "cuda":
        assert "; sparse" in rows[0].plan and "sparse" not in rows[1].plan
    assert "density" in str(patch_report(model))
    actual = model(ids).logits.float()
    assert (actual - exact).norm() <= 2 * (expected - exact).norm() + 2e-3 * exact.norm()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    length = 1 if INTERPRETED else 2
    texts = [
        each.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        for each in (model, original)
    ]
    assert torch.equal(*texts)
    unpatch_model(model)
    assert [p.stride() for p in model.parameters()] == strides
    assert torch.equal(model(ids).logits.float(), expected)
    patch_model(model, sparsity="off")
    assert [p.stride() for p in model.parameters()] == strides
    assert all(row.density == "" for row in patch_report(model).rows)


@with_kernels
@pytest.mark.parametrize("name", ["opt-pre-norm", "opt-post-norm"][: 1 if INTERPRETED else 2])
def test_trained_models_write_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pays_from(monkeypatch, 0)
    model = OPTForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float16)
    model = model.to(DEVICE).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    ids = tokenizer("And the LORD said unto Moses", return_tensors="pt").input_ids.to(DEVICE)
    length = 1 if INTERPRETED else 60
    with patched(model, sparsity="off", verify=False):
        expected = model.generate(ids, max_new_tokens=length, do_sample=False)
    patch_model(model, verify=not INTERPRETED)
    assert all(row.density for row in patch_report(model).rows)
    assert torch.equal(model.generate(ids, max_new_tokens=length, do_sample=False), expected)


@with_kernels
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_quantized_models_skip_zeros(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pays_from(monkeypatch, 8_000)
    model, ids = opt(), torch.arange(6)[None]
    ids = ids.to(model.device)
    patch_model(model, quantization=quantization, sparsity="off", verify=False, keep_originals=True)
    assert not any(row.density for row in patch_report(model).rows)
    state = copy.deepcopy(model.state_dict())
    plain = unpatch_model(copy.deepcopy(model).dequantize())
    exact = copy.deepcopy(plain).float()
    unpatch_model(model)
    strides = [p.stride() for p in model.parameters()]
    patch_model(model, quantization=quantization, verify=not INTERPRETED, keep_originals=True)
    first, second = model.model.decoder.layers
    assert first.fc2.quantized.by_input and not second.fc2.quantized.by_input
    rows = patch_report(model).rows
    assert rows[0].density.endswith("%") and rows[1].density == ""
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for tokens in (ids, ids[:, :1]):
        found, own, reference = (each(tokens).logits for each in (model, plain, exact))
        tiny.assert_as_accurate(found, own, reference)
    unpatch_model(model)
    assert [p.stride() for p in model.parameters()] == strides


@with_kernels
def test_quantizing_what_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is quantized after it was patched reads all its weights."""
    pays_from(monkeypatch, 40_000)
    model = opt()
    strides = [p.stride() for p in model.parameters()]
    patch_model(model, verify=not INTERPRETED)
    assert patch_report(model).rows[0].density
    patch_model(model, quantization="int8", keep_originals=True)
    assert not any(row.density for row in patch_report(model).rows)
    unpatch_model(model)
    assert [p.stride() for p in model.parameters()] == strides


def test_models_that_skip_are_saved_as_others(tmp_path: Path) -> None:
    model = opt()
    assert all(store_for_zeros(layer.fc2) for layer in model.model.decoder.layers)
    model.save_pretrained(tmp_path)
    again = OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    state = model.cpu().state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert all(p.is_contiguous() for p in again.parameters())


def test_an_unknown_sparsity() -> None:
    with pytest.raises(ValueError, match="sparsity must be"):
        patch_model(opt(), sparsity="some")
