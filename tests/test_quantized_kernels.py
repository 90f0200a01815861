"""Linear layers and MLPs of quantized weights: on a GPU, or where the interpreter runs this file.

Errors are against float64 products of what the weights stand for in float32.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_ops import DTYPES, _poison, assert_accurate  # noqa: F401
from torch import Tensor

from hf_triton_mlp import launchers, tuning
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.launchers import (
    MLPWeights,
    Summands,
    activation_launch,
    branch_normed_mlp,
    dequantize_launch,
    executable,
    launch,
    linear,
    mlp,
    normed_mlp,
    plan_linear,
    quantize_rows,
)
from hf_triton_mlp.quantization import (
    QuantizationConfig,
    QuantizedWeight,
    fp8_rows,
    from_flat_groups,
    quantize,
)
from hf_triton_mlp.tuning import PDL_CAPABILITY, Plan

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

CONFIGS = {
    "int8": QuantizationConfig(format="int8"),
    "int8 128": QuantizationConfig(format="int8", group_size=128),
    "int8 48": QuantizationConfig(format="int8", group_size=48),
    "fp8": QuantizationConfig(format="fp8"),
    "int4 128": QuantizationConfig(group_size=128),
    "int4 32": QuantizationConfig(group_size=32),
    "int4 128 asymmetric": QuantizationConfig(group_size=128, symmetric=False),
    "int4 64 asymmetric": QuantizationConfig(group_size=64, symmetric=False),
}
#: Groups that no vector of codes is a part of.
ODD = {**CONFIGS, "int8 17": QuantizationConfig(format="int8", group_size=17)}
if INTERPRETED:
    ODD = {name: ODD[name] for name in ("int8 17", "fp8", "int4 64 asymmetric")}

#: Of each kind one, where the interpreter takes its time.
SOME = ["int8", "fp8", "int4 32", "int4 128 asymmetric"] if INTERPRETED else list(CONFIGS)

#: Outputs and depth: not whole blocks, and on a GPU those of a model too.
SIZES = [(40, 352)] if INTERPRETED else [(40, 352), (4090, 4128)]
ODD_SIZES = [(45, 203)] if INTERPRETED else [(45, 203), (1001, 4099)]

FEW = Plan(kernel="quantized", block_n=16, block_k=256, num_warps=2, slices=2, num_stages=2)
#: Rows up to which each goes, and its parameters.
FEW_PLANS = {
    "a row": (1, FEW),
    "three rows, more stages than tiles": (3, replace(FEW, block_m=4, num_stages=4)),
    "eight rows, two warps a slice, three splits": (
        8,
        replace(FEW, block_m=8, block_n=64, num_warps=4, splits=3),
    ),
    "16 rows, a warp": (16, replace(FEW, block_m=16, block_k=128, num_warps=1, slices=1)),
}
if INTERPRETED:
    del FEW_PLANS["a row"], FEW_PLANS["16 rows, a warp"]


def native(plan: Plan) -> Plan:
    pdl = not INTERPRETED and torch.cuda.get_device_capability() >= PDL_CAPABILITY
    return replace(plan, pdl=pdl)


def quantized(out: int, size: int, config: QuantizationConfig) -> QuantizedWeight:
    """Groups that are all zeros have a scale of zero."""
    weight = torch.randn(out, size, device=DEVICE) / size**0.5
    weight[1, : size // 2] = 0
    weight[2] = 0
    return quantize(weight, config)


def vector(size: int, dtype: torch.dtype, around: float = 0.0) -> Tensor:
    return (around + 0.3 * torch.randn(size)).to(DEVICE, dtype)


def values(weight: QuantizedWeight | None, dtype: torch.dtype) -> Tensor | None:
    """What torch multiplies, float64 being the reference."""
    if weight is None:
        return None
    wide = dtype == torch.float64
    return weight.dequantize(torch.float32 if wide else dtype).to(dtype)


def check_linear(
    config: QuantizationConfig,
    rows: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    plan: Plan | None = None,
    *,
    gated: bool = False,
    activation: str | None = None,
    summands: bool = True,
) -> None:
    out, depth = size
    weight = quantized(out, depth, config)
    gate = quantized(out, depth, config) if gated else None
    # What adds up in all groups of a row shows where errors do.
    x = (1 + torch.randn(rows, depth + 3)).to(DEVICE, dtype)[:, :depth]
    add, add2 = torch.randn(2, rows, out + 1).to(DEVICE, dtype)[..., :out]
    bias, gate_bias, add_bias = (vector(out, dtype) for _ in range(3))
    joined = Summands(add, add2, add_bias) if summands else launchers.NO_SUMMANDS

    def formula(dtype: torch.dtype) -> Tensor:
        def product(w: QuantizedWeight, b: Tensor) -> Tensor:
            return F.linear(x.to(dtype), values(w, dtype), b.to(dtype))

        y = product(weight, bias)
        if gate is not None:
            y = F.silu(product(gate, gate_bias)) * y
        elif activation is not None:
            y = F.silu(y)
        return y + (add + add2 + add_bias).to(dtype) if summands else y

    def compute() -> Tensor:
        opened = (gate, gate_bias if gated else None)
        return linear(
            x, weight, bias, gate=opened, activation=activation, summands=joined, plan=plan
        )

    actual = compute()
    assert actual.dtype == dtype
    assert_accurate(actual, formula(dtype), formula(torch.float64))
    if not INTERPRETED:
        assert torch.equal(actual, compute())


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FEW_PLANS)
@pytest.mark.parametrize("config", SOME)
def test_few_rows(config: str, name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    rows, plan = FEW_PLANS[name]
    plan = native(plan)
    gated = rows in (1, 8)
    check_linear(
        CONFIGS[config], rows, size, dtype, plan, gated=gated, activation="silu" if gated else None
    )


TILED = Plan(kernel="tiled", block_m=16, block_n=32, block_k=64, num_stages=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("config", ODD)
def test_any_format_and_size(config: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    check_linear(ODD[config], 1, size, dtype, native(replace(TILED, splits=3)))
    check_linear(ODD[config], 20, size, dtype, native(TILED), activation="silu", summands=False)


@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES)
@pytest.mark.parametrize("kernel", ["tiled", "splits", "library"])
@pytest.mark.parametrize("gated", [True] if INTERPRETED else [True, False])
def test_many_rows(
    kernel: str, gated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "SLAB_BYTES", 1 << 10)  # slabs of 128 rows
    plans = {"tiled": TILED, "splits": replace(TILED, splits=2), "library": Plan(kernel="library")}
    config = CONFIGS["int4 64 asymmetric" if gated else "int8"]
    for activation, summands in (("silu", True), ("silu" if gated else None, False)):
        check_linear(
            config,
            20,
            (136, 96 if INTERPRETED else 203),
            dtype,
            native(plans[kernel]),
            gated=gated,
            activation=activation,
            summands=summands,
        )


@pytest.mark.skipif(INTERPRETED, reason="takes a GPU's time")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 64, 100, 300])
@pytest.mark.parametrize("config", ODD)
def test_default_plans(config: str, rows: int, dtype: torch.dtype) -> None:
    for size, gated in (((4096, 1024), True), ((1024, 11008), False), ((1001, 4099), False)):
        check_linear(
            ODD[config], rows, size, dtype, gated=gated, activation="silu" if gated else None
        )


def compose(
    x: Tensor,
    residual: Tensor,
    bias: Tensor,
    w: MLPWeights,
    dtype: torch.dtype,
    *,
    norm: str,
    pre_norm: bool = True,
    branch: bool = False,
) -> Tensor:
    """`normed_mlp`, or `branch_normed_mlp`, in PyTorch, in dtype."""
    x, residual, bias = x.to(dtype), residual.to(dtype), bias.to(dtype)
    rest = [None if v is None or isinstance(v, QuantizedWeight) else v.to(dtype) for v in w]
    _, _, up_bias, down_bias, _, _, weight, norm_bias, attention_weight, output_weight = rest

    def normed(v: Tensor, weight: Tensor | None) -> Tensor:
        if norm == "layer_norm":
            return F.layer_norm(v, v.shape[-1:], weight, norm_bias, 1e-5)
        return F.rms_norm(v, v.shape[-1:], weight, 1e-5)

    s = residual + (normed(x + bias, attention_weight) if branch else x + bias)
    u = normed(s, weight)
    hidden = F.linear(u, values(w.up, dtype), up_bias)
    if w.gate is None:
        hidden = F.gelu(hidden, approximate="tanh")
    else:
        gate = F.linear(u, values(w.gate, dtype))
        hidden = F.gelu(gate, approximate="tanh") * hidden
    y = F.linear(hidden, values(w.down, dtype), down_bias)
    return s + normed(y, output_weight) if branch else y + (s if pre_norm else u)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2] if INTERPRETED else [1, 2, 5, 20, 200])
@pytest.mark.parametrize(
    "config", ["int4 128 asymmetric"] if INTERPRETED else ["int4 128 asymmetric", "int8", "fp8"]
)
def test_mlps(config: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if rows == 20:
        library = Plan(kernel="library")
        monkeypatch.setattr(tuning, "plan", lambda *arguments: library)
    elif INTERPRETED and dtype != torch.float32:  # which takes its time for large tiles
        small = replace(FEW, block_m=2, block_k=128, num_warps=1, slices=1)
        monkeypatch.setattr(tuning, "plan", lambda *arguments: small)
    hidden, intermediate = (96, 64) if INTERPRETED else (1024, 2080)
    for gated, norm, pre_norm, bias in (
        (False, "layer_norm", True, True),
        (True, "rms_norm", False, False),
    ):
        c = CONFIGS[config]
        w = MLPWeights(
            quantized(intermediate, hidden, c),
            quantized(hidden, intermediate, c),
            vector(intermediate, dtype) if bias else None,
            vector(hidden, dtype) if bias else None,
            quantized(intermediate, hidden, c) if gated else None,
            None,
            vector(hidden, dtype, 1.0),
            vector(hidden, dtype) if norm == "layer_norm" else None,
        )
        x, residual = torch.randn(2, rows, hidden).to(DEVICE, dtype)
        b = vector(hidden, dtype)
        options = {"norm": norm, "pre_norm": pre_norm}
        actual = normed_mlp(x, residual, b, w, activation="gelu_new", norm_eps=1e-5, **options)
        assert_accurate(
            actual,
            compose(x, residual, b, w, dtype, **options),
            compose(x, residual, b, w, torch.float64, **options),
        )
    outer = [vector(hidden, dtype, 1.0) for _ in range(2)]
    w = w._replace(attention_norm_weight=outer[0], output_norm_weight=outer[1])
    actual = branch_normed_mlp(
        x, residual, b, w, activation="gelu_new", norm=norm, norm_eps=1e-5, branch_norm=norm
    )
    assert_accurate(
        actual,
        compose(x, residual, b, w, dtype, norm=norm, branch=True),
        compose(x, residual, b, w, torch.float64, norm=norm, branch=True),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", ODD)
def test_slabs_are_what_the_weight_stands_for(config: str, dtype: torch.dtype) -> None:
    weight = quantized(45, 1203, ODD[config])
    out = torch.empty(13, 1203, dtype=dtype, device=DEVICE)
    launch(dequantize_launch(weight, 30, out))
    expected = weight.dequantize(dtype)[30:43]
    assert torch.equal(out, expected)


def test_a_plain_gate_of_a_quantized_weight_is_refused() -> None:
    weight = quantized(16, 64, CONFIGS["int8"])
    x = torch.randn(3, 64).to(DEVICE, torch.float16)
    with pytest.raises(TypeError, match="gate of a quantized weight"):
        linear(x, weight, None, gate=(weight.dequantize(torch.float16), None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [17, 5000])
def test_rows_in_fp8(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, size + 1).to(DEVICE, dtype)[:, :size]
    x[1] *= 1e-3
    x[2] = 0
    codes, scales = quantize_rows(x)
    largest = x.float().abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales, largest / 448, rtol=1e-6, atol=0)
    assert codes[2].float().eq(0).all()
    if INTERPRETED:  # it rounds to fp8 wrongly
        return
    # Three digits after the first: half of 2**-3 of a number, or of the least normal one.
    wrong = (codes.float() * scales - x.float()).abs()
    assert (wrong <= x.float().abs() / 16 * 1.001 + scales * 2**-10).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [17, 344, 20000])
@pytest.mark.parametrize("gated", [True, False])
def test_activated_rows_in_fp8(gated: bool, size: int, dtype: torch.dtype) -> None:
    """The same bits as of rows that are activated first."""
    both = torch.randn(3, 2 * size).to(DEVICE, dtype)
    x, gate = both[:, :size], both[:, size:] if gated else None
    codes, scales = quantize_rows(x, gate, "silu")
    launch(activation_launch(x, gate, "silu"))  # in place
    expected = quantize_rows(x)
    assert torch.equal(scales, expected[1])
    assert torch.equal(codes.view(torch.int8), expected[0].view(torch.int8))


def check_fp8_products(dtype: torch.dtype) -> None:
    """Skip on a GPU without them; Hopper has them in both dtypes."""
    if not launchers.has_fp8_products(torch.cuda.current_device(), dtype):
        assert torch.cuda.get_device_capability()[0] != 9
        pytest.skip("needs a GPU on which PyTorch multiplies fp8")


@pytest.mark.skipif(INTERPRETED, reason="cuBLAS multiplies them")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_products_in_fp8(gated: bool, dtype: torch.dtype) -> None:
    config = QuantizationConfig(format="fp8", activations="fp8")
    weight = quantized(1024, 2048, config)
    gate = quantized(1024, 2048, config) if gated else None
    check_fp8_products(dtype)
    assert launchers.multiplies_fp8(weight, 300, dtype)
    assert not launchers.multiplies_fp8(weight, 128, dtype)
    assert not launchers.multiplies_fp8(weight, 300, torch.float32)
    assert not launchers.multiplies_fp8(quantized(1024, 2056, config), 300, dtype)
    x, bias = torch.randn(300, 2048).to(DEVICE, dtype), vector(1024, dtype)
    options = {"gate": (gate, bias if gated else None), "activation": "silu" if gated else None}
    x[7] = 0
    actual = linear(x, weight, bias, **options)
    codes, scales = quantize_rows(x)
    same = (codes.float() * scales).to(torch.float64)
    torch.testing.assert_close(fp8_rows(x.float()).double(), same, rtol=2**-3, atol=0.01)
    products = (
        F.linear(same, values(w, torch.float64), bias.double()) for w in (weight, gate or weight)
    )
    up, opened = products
    expected = F.silu(opened) * up if gated else up
    # The matrix units add with fewer digits than float32's.
    assert ((actual.double() - expected).norm() / expected.norm()).item() < 5e-3
    if gate is not None:
        options["gate"] = (gate._replace(activations=None), bias)
    exact = linear(x, weight._replace(activations=None), bias, **options)
    assert 1e-3 < ((actual - exact).double().norm() / expected.norm()).item() < 0.1


@pytest.mark.skipif(INTERPRETED, reason="cuBLAS multiplies them")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_mlps_in_fp8(gated: bool, pre_norm: bool, dtype: torch.dtype) -> None:
    """Nothing of it is added in place: the carry is what the norm gave. The same bits come of
    linear layers that know nothing of each other."""
    config = QuantizationConfig(format="fp8", activations="fp8")
    up, down = quantized(1024, 512, config), quantized(512, 1024, config)
    gate = quantized(1024, 512, config) if gated else None
    check_fp8_products(dtype)
    assert launchers.multiplies_fp8(up, 300, dtype) and launchers.multiplies_fp8(down, 300, dtype)
    x, residual = torch.randn(2, 300, 512).to(DEVICE, dtype)
    vectors = [vector(size, dtype) for size in (1024, 512)]
    weights = MLPWeights(up, down, *vectors, gate, norm_weight=vector(512, dtype, 1.0))
    hidden = linear(x, up, vectors[0], gate=(gate, None), activation="silu")
    alone = linear(hidden, down, vectors[1], summands=Summands(residual))
    assert torch.equal(mlp(x, weights, activation="silu", summands=Summands(residual)), alone)
    options = {"activation": "relu", "norm": "rms_norm", "norm_eps": 1e-5, "pre_norm": pre_norm}
    actual = normed_mlp(x, residual, None, weights, **options)
    matrices = {"up": up, "down": down, "gate": gate}
    plain = weights._replace(
        **{name: w._replace(activations=None) for name, w in matrices.items() if w is not None}
    )
    exact = normed_mlp(x, residual, None, plain, **options)
    assert 1e-3 < ((actual - exact).double().norm() / exact.double().norm()).item() < 0.1


def test_scales_of_a_merged_checkpoint() -> None:
    """Groups of any size have float32 scales there."""
    codes = torch.randint(-127, 128, (24, 96), dtype=torch.int8)
    for groups, kernel in ((48, "quantized"), (96, "tiled"), (12, "quantized")):
        scales = (0.5 + torch.rand(groups)) / 1000
        weight = from_flat_groups(codes, scales, groups=groups)
        weight = weight._replace(codes=codes.to(DEVICE), scales=weight.scales.to(DEVICE))
        x = torch.randn(3, 96).to(DEVICE, torch.float16)
        assert plan_linear(3, weight, dtype=x.dtype).kernel == kernel
        expected = F.linear(x.double(), values(weight, torch.float64))
        own = F.linear(x, values(weight, torch.float16))
        assert_accurate(linear(x, weight, None), own, expected)


def test_what_vectors_cannot_be_loaded_from() -> None:
    """Other kernels compute it, whatever the plan says."""
    whole = quantized(16, 256, CONFIGS["int8"])
    codes = torch.zeros(16 * 256 + 1, dtype=torch.int8, device=DEVICE)
    shifted = whole._replace(codes=codes[1:].view(16, 256))
    shifted.codes.copy_(whole.codes)
    x = torch.randn(3, 256).to(DEVICE, torch.float16)
    plan = plan_linear(3, whole, dtype=torch.float16)
    assert plan.kernel == "quantized"
    assert executable(plan, x, whole, whole, Summands()) == plan
    for weight, gate in ((shifted, None), (whole, shifted)):
        assert executable(plan, x, weight, gate, Summands()).kernel == "tiled"
    torch.testing.assert_close(
        linear(x, shifted, None), linear(x, whole, None), rtol=2e-3, atol=2e-3
    )
