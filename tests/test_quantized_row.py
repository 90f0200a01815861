"""One row times quantized weights: on a GPU, or where the interpreter runs this file.

Errors are against float64 products of what the weights stand for in float32.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import triton
from test_compile import CUOBJDUMP, TYPES, check_compiles
from torch import Tensor

from hf_triton_mlp import launchers
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.launchers import NO_SUMMANDS, Norm, Summands, linear, plan_linear
from hf_triton_mlp.quantization import CODES, QuantizationConfig, QuantizedWeight, quantize
from hf_triton_mlp.tuning import PDL_CAPABILITY, Linear, Plan, choose

DEVICE = "cpu" if INTERPRETED else "cuda"

CONFIGS = {
    "int8": QuantizationConfig(format="int8"),
    "int8 48": QuantizationConfig(format="int8", group_size=48),
    "fp8": QuantizationConfig(format="fp8"),
    "int4 128": QuantizationConfig(group_size=128),
    "int4 32 asymmetric": QuantizationConfig(group_size=32, symmetric=False),
}
#: Outputs and depth: not whole blocks, and on a GPU those of models too.
SIZES = [(13, 352)] if INTERPRETED else [(45, 352), (4090, 4128), (3072, 768), (1024, 28672)]
DTYPES = [torch.float16, torch.bfloat16]


def plan_of(
    out: int, size: int, *, programs: int = 0, block_n: int = 4, num_stages: int = 1
) -> Plan:
    depth = max(triton.next_power_of_2(size), 1024)
    pdl = not INTERPRETED and torch.cuda.get_device_capability() >= PDL_CAPABILITY
    return Plan(
        kernel="quantized_row",
        block_n=block_n if depth <= 4096 else 2,
        block_k=depth,
        num_warps=min(max(depth // 1024, 1), 16),
        num_stages=num_stages,
        programs=programs,
        pdl=pdl,
    )


def random_weight(out: int, size: int, config: QuantizationConfig) -> QuantizedWeight:
    """Groups that are all zeros have a scale of zero."""
    weight = torch.randn(out, size, device=DEVICE) / size**0.5
    weight[1, : size // 2] = 0
    weight[2] = 0
    return quantize(weight, config)


def vector(size: int, dtype: torch.dtype, around: float = 0.0) -> Tensor:
    return (around + 0.3 * torch.randn(size)).to(DEVICE, dtype)


def check(y: Tensor, exact: Tensor, theirs: Tensor) -> None:
    """The error is at most twice that of torch in y's dtype."""
    assert y.isfinite().all()
    ours, others = ((v.double() - exact).norm() / exact.norm() for v in (y, theirs))
    assert ours <= 2 * others + 1e-6, f"error {ours:.2e}, torch's {others:.2e}"


on_device = pytest.mark.gpu if not INTERPRETED else pytest.mark.filterwarnings("default")


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "size"), SIZES)
@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_row_of_every_format(
    name: str, num_stages: int, out: int, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = random_weight(out, size, CONFIGS[name]), vector(out, dtype)
    x, add, add2 = vector(size, dtype, 1.0)[None], vector(out, dtype)[None], vector(out, dtype)
    plan = plan_of(out, size, programs=2 if INTERPRETED else 200, num_stages=num_stages)
    summands = Summands(add, None, add2)
    y = linear(x, weight, bias, summands=summands, plan=plan, waited=True)

    def reference(kind: torch.dtype) -> Tensor:
        values = weight.dequantize(torch.float32).to(kind)
        return F.linear(x.to(kind), values, bias.to(kind)) + add.to(kind) + add2.to(kind)

    check(y, reference(torch.float64), reference(dtype))
    assert torch.equal(y, linear(x, weight, bias, summands=summands, plan=plan, waited=True))


@on_device
@pytest.mark.parametrize(
    ("name", "kind", "programs"),
    [
        ("int4 128", "layer_norm", 0),
        ("int4 128", "rms_norm", 3),
        ("int4 32 asymmetric", "layer_norm", 3),
        ("int8 48", "rms_norm_offset", 0),
        ("fp8", "layer_norm", 3),
    ],
)
@pytest.mark.parametrize(("out", "size"), SIZES[:2])
def test_norm_and_gate(out: int, size: int, name: str, programs: int, kind: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float16 if programs else torch.bfloat16
    weight, gate = (random_weight(out, size, CONFIGS[name]) for _ in range(2))
    bias, gate_bias = vector(out, dtype), vector(out, dtype)
    x, add, add_bias = (
        vector(size, dtype, 1.0)[None],
        vector(size, dtype)[None],
        vector(size, dtype),
    )
    scale, shift = vector(size, dtype, 1.0), vector(size, dtype)
    carry = torch.full_like(x, float("nan"))
    norm = Norm(kind, scale, shift if kind == "layer_norm" else None, 1e-5, carry, programs > 0)
    stages = 2 if kind == "layer_norm" else 1
    plan = plan_of(out, size, programs=programs, block_n=2, num_stages=stages)
    rest = {"gate": (gate, gate_bias), "activation": "silu", "plan": plan, "norm": norm}
    y = linear(x, weight, bias, summands=Summands(add, None, add_bias), **rest)

    def reference(kind_: torch.dtype) -> tuple[Tensor, Tensor]:
        s = x.to(kind_) + add.to(kind_) + add_bias.to(kind_)
        if kind == "layer_norm":
            u = F.layer_norm(s, (size,), scale.to(kind_), shift.to(kind_), 1e-5)
        else:
            factor = scale.to(kind_) + (1 if kind == "rms_norm_offset" else 0)
            u = F.rms_norm(s, (size,), factor, 1e-5)
        up, opened = (
            F.linear(u, w.dequantize(torch.float32).to(kind_), b.to(kind_))
            for w, b in ((weight, bias), (gate, gate_bias))
        )
        return F.silu(opened) * up, u if norm.carry_normed else s

    (exact, exact_carry), (theirs, their_carry) = reference(torch.float64), reference(dtype)
    check(y, exact, theirs)
    check(carry, exact_carry, their_carry)


@on_device
@pytest.mark.parametrize("name", ["int4 128", "int8", "fp8"])
def test_sums_beyond_float16(name: str) -> None:
    """Products of large values and codes are not summed in 16 bits."""
    torch.manual_seed(0)
    weight = quantize(torch.randn(32, 512, device=DEVICE) / 500, CONFIGS[name])
    x = torch.full((1, 512), 60000.0, dtype=torch.float16, device=DEVICE)
    x[:, ::2] *= -1
    y = linear(x, weight, None, plan=plan_of(32, 512))
    exact = F.linear(x.double(), weight.dequantize(torch.float32).double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=0.5)


@on_device
@pytest.mark.parametrize(("out", "size"), [(45, 203), (64, 104)])
def test_rows_that_are_no_vectors_have_another_plan(out: int, size: int) -> None:
    weight = random_weight(out, size, CONFIGS["int4 128"])
    assert plan_linear(1, weight).kernel == "tiled"
    x = vector(size, torch.float16)[None]
    plan = launchers.executable(plan_of(out, size), x, weight, None, NO_SUMMANDS)
    assert plan.kernel == "tiled"


@pytest.mark.parametrize(
    ("out", "size"), [(16384, 4096), (4096, 16384), (8192, 2048), (28672, 7168), (768, 3072)]
)
@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_one_row_is_planned_for_it(name: str, out: int, size: int) -> None:
    found = Linear(1, out, size, torch.float16, True, False, name, 128 if name == "int4" else 0)
    plan = choose(found, (9, 0))
    assert plan.kernel == "quantized_row" and plan.fuses_norm and plan.block_k >= size
    plan.check(1, torch.float16)
    with pytest.raises(ValueError, match="no kernel for 2 rows"):
        plan.check(2, torch.float16)
    assert choose(found._replace(M=2), (9, 0)).kernel == "quantized"
    assert choose(found._replace(dtype=torch.float32), (9, 0)).kernel == "tiled"


def empty_weight(out: int, size: int, name: str) -> QuantizedWeight:
    config = CONFIGS[name]
    group = config.group_size or size
    width = -(-size // 8) if config.format == "int4" else size
    groups = torch.bfloat16 if config.group_size else torch.float32
    shape = out, -(-size // group)
    return QuantizedWeight(
        torch.empty((out, width), dtype=CODES[config.format], device="meta"),
        torch.empty(shape, dtype=groups, device="meta"),
        None if config.symmetric else torch.empty(shape, dtype=torch.float16, device="meta"),
        (out, size),
        group,
    )


@pytest.mark.skipif(INTERPRETED or not CUOBJDUMP.exists(), reason="nothing compiles here")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out", "size", "name", "normed", "gated"),
    [
        (16384, 4096, "int4 128", True, False),
        (16384, 4096, "int4 32 asymmetric", True, False),
        (4096, 16384, "int4 128", False, False),
        (16384, 4096, "int8", True, False),
        (4096, 16384, "int8", False, False),
        (4096, 16384, "fp8", False, False),
        (7168, 28672, "int4 128", False, False),
        (28672, 7168, "int4 128", True, False),
        (8192, 2048, "int4 128", True, False),
        (2048, 8192, "int8", False, False),
        (14336, 4096, "int4 128", True, True),
    ],
)
def test_default_plans_stay_in_registers(
    out: int,
    size: int,
    name: str,
    normed: bool,
    gated: bool,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stored, pointer in ((torch.int32, "*i32"), (torch.int8, "*i8")):
        monkeypatch.setitem(TYPES, stored, pointer)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = empty_weight(out, size, name)
    plan = choose(launchers.linear_of(1, weight, gated, dtype), capability)
    x, y = empty(1, size), empty(1, out)
    norm = Norm("layer_norm", empty(size), empty(size), 1e-5, empty(1, size), False)
    before, adds = (norm, Summands(x)) if normed else (None, Summands(y))
    gates = (weight if gated else None, None)
    activation = "silu" if gated else "gelu_new" if normed else None
    call = launchers.linear_launch(
        replace(plan, pdl=capability >= PDL_CAPABILITY),
        x, weight, empty(out), gates, activation, before, adds, y, True,
    )  # fmt: skip
    if weight.format == "fp8" and dtype == torch.float16 and capability >= (8, 9):
        at = call.constants.index("fp8")
        constants = (*call.constants[:at], "fp8 in hardware", *call.constants[at + 1 :])
        compiled = check_compiles(call._replace(constants=constants), capability, tmp_path)
        assert "cvt.rn.f16x2.e4m3x2" in compiled.asm["ptx"]
    compiled = check_compiles(call, capability, tmp_path)
    assert "cvt.rn.f16x2.e4m3x2" not in compiled.asm["ptx"]
    # Sums of each warp meet there, and nothing else does.
    blocks = -(-out // plan.block_n)
    outputs = plan.block_n * triton.next_power_of_2(-(-blocks // (plan.programs or blocks)))
    assert compiled.metadata.shared <= max(4 * plan.num_warps * outputs, 1024)
