"""The benchmark of quantized MLPs: one layer half, our 16 bits, our codes, everyone else's codes.

Everyone quantizes the same weights in their own way, so the errors that are compared are those of
the arithmetic: ours against the weights that our codes stand for.
"""

import gc
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn

from hf_triton_mlp import launchers
from hf_triton_mlp.bench import fill, new_run, versions
from hf_triton_mlp.launchers import MLPWeights
from hf_triton_mlp.measure import (
    CASES,
    Case,
    Chain,
    LayerHalf,
    ceilings,
    device_times,
    random_layers,
)
from hf_triton_mlp.ops import MLPGemmOp, compose, norm_function
from hf_triton_mlp.peers import OURS, installed
from hf_triton_mlp.quantization import (
    QuantizationConfig,
    QuantizedWeight,
    quantize,
    unpack_int4,
)

#: What is measured, by name. GemLite and PyTorch have asymmetric int4, as ours is by default.
FORMATS = {
    "int8": QuantizationConfig(format="int8"),
    "int4": QuantizationConfig(format="int4", group_size=128, symmetric=False),
    "int4 symmetric": QuantizationConfig(format="int4", group_size=128),
    "fp8": QuantizationConfig(format="fp8"),
    "fp8 x fp8": QuantizationConfig(format="fp8", activations="fp8"),
}
CASES_OF_BARS = ("opt-1.3b", "bloom-7b1", "opt-30b")
ROWS = (1, 2, 4, 8, 16, 512, 2048, 4096)
#: Our MLP with the weights as they were.
PLAIN = f"{OURS} 16 bits"
#: An error this large, relative to the MLP of the weights as they were, is no rounding to 4 bits.
WRONG = 0.5
#: The most rows that a peer's kernel for few rows is measured for; more would only be tuned.
GEMLITE_ROWS = 16

#: Makes a linear layer, a function of rows, from a weight (out, in) and a bias.
MakeLinear = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]


def bench_quantized(
    cases: Iterable[str] = CASES_OF_BARS,
    formats: Iterable[str] = tuple(FORMATS),
    rows: Iterable[int] = ROWS,
    dtype: str = "float16",
    *,
    peers: bool = True,
    seconds: float = math.inf,
    kept: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda cell, done, total: None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure every cell (dtype, case, format, number of rows) on the current GPU.

    peers: also other libraries that are installed. The rest is as for `bench_mlp`.
    """
    run: dict[str, Any] = {**new_run(), "ceilings": {}}
    record: dict[str, Any] = {
        "benchmark": "quantized",
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "peers": peers,
    }
    layers: list[MLPWeights] = []
    halves: dict[str, LayerHalf] = {}
    failed: dict[str, str] = {}
    held: tuple[str, str] | None = None

    def measure(place: dict[str, Any]) -> dict[str, Any]:
        nonlocal held
        case, form = CASES[place["case"]], place["format"]
        type_ = getattr(torch, place["dtype"])
        if place["dtype"] not in run["ceilings"]:
            run["ceilings"][place["dtype"]] = ceilings(type_)._asdict()
        if held is None or held[0] != case.name:
            halves.clear()
            layers.clear()
            _free()
            layers.extend(random_layers(case, type_, itemsize=0.5))
        if held != (case.name, form):
            halves.clear()
            failed.clear()
            _free()
            _build(case, form, layers, peers, halves, failed)
            held = case.name, form
        read = run["ceilings"][place["dtype"]]["read_tb_s"]
        return _cell(case, form, layers, halves, failed, place["M"], read)

    asked = itertools.product(cases, formats, rows)
    places = [{"dtype": dtype, "case": c, "format": f, "M": M} for c, f, M in asked]
    orders = {"case": tuple(CASES), "format": tuple(FORMATS)}
    with torch.no_grad():
        return fill(
            record, run, places, measure, orders=orders, seconds=seconds, kept=kept,
            progress=progress, save=save,
        )  # fmt: skip


def quantized_layer(weights: MLPWeights, config: QuantizationConfig) -> MLPWeights:
    """The same layer with its matrices quantized."""
    matrices = {name: getattr(weights, name) for name in ("up", "down", "gate")}
    found: dict[str, Any] = {
        name: None if matrix is None else quantize(matrix, config)
        for name, matrix in matrices.items()
    }
    return weights._replace(**found)


def dequantized_layer(weights: MLPWeights, dtype: torch.dtype) -> MLPWeights:
    """The same layer with the matrices that its codes stand for."""
    matrices: dict[str, Any] = {
        name: value.dequantize(dtype)
        for name, value in weights._asdict().items()
        if isinstance(value, QuantizedWeight)
    }
    return weights._replace(**matrices)


def _ours(case: Case, layers: list[MLPWeights]) -> LayerHalf:
    def half(a: Tensor, r: Tensor, i: int) -> Tensor:
        return launchers.normed_mlp(
            a, r, None, layers[i], activation=case.activation, norm=case.norm, norm_eps=1e-5,
            pre_norm=True, early=True,
        )  # fmt: skip

    return half


def _build(
    case: Case,
    form: str,
    layers: list[MLPWeights],
    peers: bool,
    halves: dict[str, LayerHalf],
    failed: dict[str, str],
) -> None:
    halves[PLAIN] = _ours(case, layers)
    halves[OURS] = _ours(case, [quantized_layer(each, FORMATS[form]) for each in layers])
    for name, make in _peers(form).items() if peers else ():
        try:
            halves[name] = _with_linears(case, layers, make)
        except Exception as error:  # a peer that cannot do this is a result too
            failed[name] = f"{type(error).__name__}: {error}"[:200]


def _cell(
    case: Case,
    form: str,
    layers: list[MLPWeights],
    halves: dict[str, LayerHalf],
    failed: dict[str, str],
    M: int,
    read_tb_s: float,
) -> dict[str, Any]:
    torch._dynamo.reset()  # after eight shapes it would stop compiling
    chain = Chain(case, layers, M)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    found: dict[str, dict[str, Any]] = {name: {"failed": why} for name, why in failed.items()}
    plain = chain.first(halves[PLAIN]).float()
    for name, half in halves.items():
        if name.startswith("gemlite") and M > GEMLITE_ROWS:
            continue
        try:
            error = ((chain.first(half).float() - plain).norm() / plain.norm()).item()
            if not error <= WRONG:
                raise ArithmeticError(f"relative error {error:.2g}")
            found[name] = {"error_of_format": round(error, 5)}
            graphs[name] = chain.capture(half)
        except Exception as error:
            if name in (OURS, PLAIN):
                raise
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
    for name, times in device_times(graphs, chain.layers).items():
        found[name]["device_us"] = {k: round(v, 3) for k, v in times._asdict().items()}
    us = {name: of["device_us"]["median"] for name, of in found.items() if "device_us" in of}
    quantized = quantized_layer(layers[0], FORMATS[form])
    others = [name for name in us if name not in (OURS, PLAIN)]
    best = min(others, key=lambda name: us[name], default=None)
    size = sum(v.nbytes for v in quantized[:6] if v is not None)
    return {
        "peers": found,
        "bytes": size,
        "limit_us": round(size / read_tb_s / 1e6, 2),
        "over_16_bits": round(us[PLAIN] / us[OURS], 3),
        "best_other": best,
        "speedup": None if best is None else round(us[best] / us[OURS], 3),
        "error_over_torch": _error_over_torch(case, quantized, chain, halves[OURS]),
        "same_bits": torch.equal(chain.run(halves[OURS]), chain.run(halves[OURS])),
    }


def _error_over_torch(case: Case, layer: MLPWeights, chain: Chain, half: LayerHalf) -> float:
    """Our error against float32 with the weights that codes stand for, over PyTorch's own.

    Neither of these rounds rows to fp8.
    """
    plain = dequantized_layer(layer, torch.float32)
    op = MLPGemmOp(activation=case.activation, norm=case.norm)
    a, r = chain.attention[0][:256], chain.residual[:256]
    reference = op.reference(a, plain, r)
    rounded = dequantized_layer(layer, a.dtype)
    own = (op.compose(a, rounded, r, None).float() - reference).norm()
    return round(((chain.first(half)[:256].float() - reference).norm() / own).item(), 2)


# --- everyone else's --------------------------------------------------------------------------


def _peers(form: str) -> dict[str, MakeLinear]:
    found: dict[str, MakeLinear] = {}
    symmetric = form == "int4 symmetric"
    if installed("torchao") and not symmetric:
        found["torchao"] = partial(_torchao, form)
    if form == "int4":
        found["tinygemm (bfloat16)"] = _tinygemm
    if installed("gemlite") and not symmetric and form != "fp8 x fp8":
        found["gemlite"] = partial(_gemlite, form)
    if installed("bitsandbytes") and form in ("int8", "int4"):
        found["bitsandbytes"] = partial(_bitsandbytes, form)
    return found


def _with_linears(case: Case, layers: list[MLPWeights], make: MakeLinear) -> LayerHalf:
    """A layer half of PyTorch's operations around these linear layers."""
    linears: list[dict[str, Any]] = []
    for w in layers:
        up, down, gate = w.plain
        linears.append(
            {
                "up": make(up, w.up_bias),
                "gate": None if gate is None else make(gate, w.gate_bias),
                "down": make(down, w.down_bias),
            }
        )
    norms = [norm_function(case.norm, w.norm_weight, w.norm_bias, 1e-5) for w in layers]
    return lambda a, r, i: compose(
        a, r, None, None, norm=norms[i], activation=case.activation, pre_norm=True, **linears[i]
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, size = weight.shape
    linear = nn.Linear(size, out, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _torchao(form: str, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Compiled, as its documentation wants it."""
    ao = importlib.import_module("torchao.quantization")
    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4": lambda: ao.Int4WeightOnlyConfig(
            group_size=128, int4_packing_format="tile_packed_to_4d"
        ),
        "fp8": lambda: ao.Float8WeightOnlyConfig(),
        "fp8 x fp8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    }
    linear = _linear(weight, bias)
    if form in ("int4", "fp8 x fp8"):  # these kernels take bfloat16 alone
        linear = linear.to(torch.bfloat16)
    holder = nn.Sequential(linear)
    ao.quantize_(holder, configs[form]())
    quantized, dtype, product = holder[0], linear.weight.dtype, _compiled_linear(weight.shape)
    return lambda x: product(x.to(dtype), quantized.weight, quantized.bias).to(x.dtype)


@cache
def _compiled_linear(shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """F.linear for weights of one shape, which are arguments: one compilation for all layers."""
    return torch.compile(lambda x, weight, bias: F.linear(x, weight, bias), dynamic=False)


def _tinygemm(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """PyTorch's own int4 product, in bfloat16, which is all that it takes."""
    quantized = quantize(weight, FORMATS["int4"])
    assert quantized.zeros is not None
    codes = unpack_int4(quantized.codes, weight.shape[1])
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    scales, zeros = quantized.scales.float(), quantized.zeros.float()
    # It adds its zero, in the weight's unit, to (code - 8) * scale.
    both = torch.stack((scales, (8 - zeros) * scales), dim=-1).transpose(0, 1)
    both = both.contiguous().to(torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm(x.to(torch.bfloat16), packed, 128, both)
        return (y if bias is None else y + bias).to(x.dtype)

    return product


def _gemlite(form: str, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    helper = importlib.import_module("gemlite.helper")
    place = {"device": str(weight.device), "dtype": weight.dtype}
    if form != "int4":
        kind = helper.A16W8_INT8 if form == "int8" else helper.A16W8_FP8
        return kind(**place).from_weights(weight, bias)
    quantized = quantize(weight, FORMATS["int4"])
    codes = unpack_int4(quantized.codes, weight.shape[1])
    assert quantized.zeros is not None
    scales, zeros = (t.to(weight.dtype).view(-1, 1) for t in (quantized.scales, quantized.zeros))
    return helper.A16W4_HQQ_INT(**place).from_weights(codes, scales, zeros, bias)


def _bitsandbytes(form: str, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Its 8 bits are those of LLM.int8(), which quantizes the rows too; its 4 bits are NF4."""
    bnb = importlib.import_module("bitsandbytes")
    out, size = weight.shape
    rest: dict[str, Any] = {"bias": bias is not None, "device": "meta"}
    if form == "int8":
        linear = bnb.nn.Linear8bitLt(size, out, has_fp16_weights=False, threshold=0.0, **rest)
        linear.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        linear = bnb.nn.Linear4bit(size, out, compute_dtype=weight.dtype, quant_type="nf4", **rest)
        linear.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.to(weight.device).eval()


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# --- showing ----------------------------------------------------------------------------------


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """For a terminal of 100 columns, one for each case and format."""
    groups = dict.fromkeys((c["dtype"], c["case"], c["format"]) for c in record["cells"])
    columns = ("rows", "ours, µs", "bytes / bandwidth", "16 bits, µs", "×", "best other, µs", "×")
    for group in groups:
        dtype, case, form = group
        shown = Table(title=f"{case}, {form} weights, {dtype}", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in (*columns, "error /\ntorch's", "same\nbits"):
            shown.add_column(name, justify="right", no_wrap=True)
        for cell in record["cells"]:
            if (cell["dtype"], cell["case"], cell["format"]) == group:
                shown.add_row(*_row(cell))
        yield shown


def _us(cell: dict[str, Any], name: str | None) -> str:
    return "-" if name is None else f"{cell['peers'][name]['device_us']['median']:.1f}"


def _row(cell: dict[str, Any]) -> list[str]:
    best, speedup = cell["best_other"], cell["speedup"]
    return [
        str(cell["M"]),
        _us(cell, OURS),
        f"{cell['limit_us']:.1f}",
        _us(cell, PLAIN),
        f"{cell['over_16_bits']:.2f}",
        "-" if best is None else f"{best} {_us(cell, best)}",
        "-" if speedup is None else f"{speedup:.2f}",
        f"{cell['error_over_torch']:.2f}",
        "yes" if cell["same_bits"] else "NO",
    ]


def markdown(record: dict[str, Any]) -> str:
    """For a README: µs of ours, how many times faster than our 16 bits, and than the best other."""
    lines = [["MLP", "weights", "rows", "µs", "× 16 bits", "× the fastest other"], ["---"] * 6]
    for cell in record["cells"]:
        best = cell["best_other"]
        other = "-" if best is None else f"{cell['speedup']:.2f} ({best} {_us(cell, best)})"
        place = [cell["case"], cell["format"], str(cell["M"])]
        lines.append([*place, _us(cell, OURS), f"{cell['over_16_bits']:.2f}", other])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
