"""The benchmark of exact zeros: one layer half of a ReLU model, dense and with what zeros would
multiply left out, in one process."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from hf_triton_mlp.autotune import layer_half
from hf_triton_mlp.bench import fill, new_run, versions
from hf_triton_mlp.bench_quantized import FORMATS, dequantized_layer, quantized_layer
from hf_triton_mlp.launchers import MLPWeights, linear_of, plan_linear
from hf_triton_mlp.measure import CASES, Case, Chain, ceilings, device_times, random_layers
from hf_triton_mlp.quantization import QuantizedWeight, Weight, stored_by_input
from hf_triton_mlp.tuning import pays_to_skip

#: Of opt-6.7b, whose MLP has the size of bloom-7b1's, and opt-30b.
SHAPES = {
    "opt-1.3b": CASES["opt-1.3b"],
    "opt-6.7b": Case("opt-6.7b", 4096, 16384, "relu"),
    "opt-30b": CASES["opt-30b"],
}
#: Parts of the hidden values that are 0 in all rows.
ZEROS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97)
ROWS = (1, 4, 16)
#: Weights as they were.
PLAIN = "16 bits"


def bench_sparse(
    cases: Iterable[str] = tuple(SHAPES),
    zeros: Iterable[float] = ZEROS,
    rows: Iterable[int] = ROWS,
    dtype: str = "float16",
    formats: Iterable[str] = (PLAIN,),
    *,
    seconds: float = math.inf,
    kept: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda cell, done, total: None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure every cell (dtype, case, format, number of rows, zeros) on the current GPU.

    zeros: what part of the hidden values is 0 in all rows; a bias makes them so. formats: PLAIN, or
    as of `bench_quantized`. The rest is as for `bench_mlp`.
    """
    run: dict[str, Any] = {**new_run(), "ceilings": {}}
    record: dict[str, Any] = {
        "benchmark": "sparse",
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
    }
    plain: list[MLPWeights] = []
    layers: list[MLPWeights] = []
    held = "", ""

    def measure(place: dict[str, Any]) -> dict[str, Any]:
        nonlocal held
        case, form, type_ = SHAPES[place["case"]], place["format"], getattr(torch, place["dtype"])
        if place["dtype"] not in run["ceilings"]:
            run["ceilings"][place["dtype"]] = ceilings(type_)._asdict()
        if held[0] != case.name:
            plain.clear()
            layers.clear()
            torch.cuda.empty_cache()
            plain.extend(random_layers(case, type_, itemsize=0.5))
        if held != (case.name, form):
            layers.clear()
            config = FORMATS.get(form)
            layers.extend(
                each if config is None else quantized_layer(each, config) for each in plain
            )
            held = case.name, form
        return _cell(case, layers, place["M"], place["zeros"])

    asked = itertools.product(cases, formats, rows, zeros)
    places = [{"dtype": dtype, "case": c, "format": f, "M": M, "zeros": z} for c, f, M, z in asked]
    orders = {"case": tuple(SHAPES), "format": (PLAIN, *FORMATS)}
    with torch.no_grad():
        return fill(
            record, run, places, measure, orders=orders, seconds=seconds, kept=kept,
            progress=progress, save=save,
        )  # fmt: skip


def _cell(case: Case, layers: list[MLPWeights], M: int, zeros: float) -> dict[str, Any]:
    chain = Chain(case, layers, M)
    dtype = chain.residual.dtype
    first = dequantized_layer(layers[0], dtype)._replace(up_bias=None)
    shift = _quantile(_hidden(case, chain, first, None), zeros)
    bias = torch.full((case.intermediate,), -shift, dtype=dtype, device=chain.residual.device)
    first = first._replace(up_bias=bias)
    dense = [layer._replace(up_bias=bias) for layer in layers]
    skipping = [layer._replace(down=by_input(layer.down)) for layer in dense]
    down = skipping[0].down
    left = (_hidden(case, chain, first, bias) > 0).any(0).float().mean().item()
    halves = {
        "dense": layer_half(case, dense, (None, None)),
        "skipping": layer_half(case, skipping, (None, None)),
    }
    graphs = {name: chain.capture(half) for name, half in halves.items()}
    times = device_times(graphs, chain.layers)
    error, own = chain.errors(case, dense[0], halves["skipping"])
    return {
        "not_zero": round(left, 4),
        "plan": str(plan_linear(M, down, dtype=dtype, sparse=True)),
        "device_us": {
            name: {k: round(v, 3) for k, v in each._asdict().items()}
            for name, each in times.items()
        },
        "speedup": round(times["dense"].median / times["skipping"].median, 3),
        "pays": pays_to_skip(linear_of(M, down, False, dtype), left),
        "error_over_torch": round(error / own, 2),
        "same_bits": torch.equal(chain.run(halves["skipping"]), chain.run(halves["skipping"])),
    }


def by_input(weight: Weight) -> Weight:
    """A copy of a weight (out, in) that is stored (in, out)."""
    quantized = isinstance(weight, QuantizedWeight)
    return stored_by_input(weight) if quantized else weight.t().contiguous().t()


def _hidden(case: Case, chain: Chain, layer: MLPWeights, bias: Tensor | None) -> Tensor:
    """What enters the first layer's activation, (M, intermediate), in float32."""
    total = (chain.attention[0] + chain.residual).float()
    assert layer.norm_weight is not None and layer.norm_bias is not None
    norm = layer.norm_weight.float(), layer.norm_bias.float()
    return F.linear(
        F.layer_norm(total, (case.hidden,), *norm), layer.plain[0].float(),
        None if bias is None else bias.float(),
    )  # fmt: skip


def _quantile(hidden: Tensor, zeros: float) -> float:
    """The number that so many of the hidden values do not exceed in any row; far below for 0."""
    if zeros == 0.0:
        return hidden.min().item() - 1.0
    return torch.quantile(hidden.amax(0), zeros).item()


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """For a terminal, one for each case."""
    for key in dict.fromkeys((c["dtype"], c["case"], c["format"]) for c in record["cells"]):
        dtype, case, form = key
        of_weights = "" if form == PLAIN else f", {form} weights"
        shown = Table(title=f"{case}, {dtype}{of_weights}", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in ("rows", "not 0", "dense, µs", "skipping, µs", "×", "error /\ntorch's", "auto"):
            shown.add_column(name, justify="right", no_wrap=True)
        for cell in record["cells"]:
            if (cell["dtype"], cell["case"], cell["format"]) == key:
                us = [f"{cell['device_us'][name]['median']:.1f}" for name in ("dense", "skipping")]
                shown.add_row(
                    str(cell["M"]), f"{cell['not_zero']:.1%}", *us, f"{cell['speedup']:.2f}",
                    f"{cell['error_over_torch']:.2f}", "skips" if cell["pays"] else "dense",
                )  # fmt: skip
        yield shown
