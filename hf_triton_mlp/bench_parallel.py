"""The benchmark of ranks that share an MLP: one layer half of a model, on one GPU and on all.

Every rank of a process group calls `bench_parallel`; what there is per token with more of them, and
what of a model fits, `scaling` computes.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from hf_triton_mlp.autotune import layer_half
from hf_triton_mlp.bench import WRONG, fill, new_run, versions
from hf_triton_mlp.launchers import MLPWeights, plan_linear
from hf_triton_mlp.measure import (
    CASES,
    Case,
    Chain,
    LayerHalf,
    Times,
    ceilings,
    device_times,
    random_layers,
)
from hf_triton_mlp.ranks import Ranks

SHAPES = {
    "bloom-7b1": CASES["bloom-7b1"],
    "opt-6.7b": Case("opt-6.7b", 4096, 16384, "relu"),
    "opt-30b": CASES["opt-30b"],
}
MEASURED = ("bloom-7b1", "opt-6.7b")
ROWS = (1, 4, 32, 2048)


# --- measuring --------------------------------------------------------------------------------


def bench_parallel(
    ranks: Ranks,
    cases: Iterable[str] = MEASURED,
    rows: Iterable[int] = ROWS,
    dtype: str = "float16",
    *,
    seconds: float = math.inf,
    kept: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda cell, done, total: None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any] | None:
    """Measure every cell (dtype, case, number of rows) on the current GPUs of these ranks.

    The first rank decides which cells are missing, has the record, and measures one GPU alone while
    the others wait; they return None. A time is that of the slowest rank. The rest is as for
    `bench_mlp`.
    """
    held = _Layers(ranks)
    with torch.no_grad():
        if ranks.rank > 0:
            while (place := ranks.exchange(None, "waiting for a cell")[0]) is not None:
                _cell(ranks, held, place)
            return None
        run: dict[str, Any] = {**new_run(), "ceilings": {}}
        record: dict[str, Any] = {
            "benchmark": "parallel",
            "device": f"{ranks.size} x {torch.cuda.get_device_name()}",
            "versions": versions(),
        }

        def measure(place: dict[str, Any]) -> dict[str, Any]:
            type_ = getattr(torch, place["dtype"])
            if place["dtype"] not in run["ceilings"]:
                run["ceilings"][place["dtype"]] = ceilings(type_)._asdict()
            ranks.exchange(place, "waiting for a cell")
            return _cell(ranks, held, place)

        asked = itertools.product(cases, rows)
        places = [{"dtype": dtype, "ranks": ranks.size, "case": c, "M": M} for c, M in asked]
        record = fill(
            record, run, places, measure, orders={"case": tuple(SHAPES)}, seconds=seconds,
            kept=kept, progress=progress, save=save,
        )  # fmt: skip
        ranks.exchange(None, "waiting for a cell")
    return record


class _Layers:
    """The random layers of one case, whole, and this rank's part of them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.held = ranks, ("", "")
        self.whole: list[MLPWeights] = []
        self.parts: list[MLPWeights] = []

    def hold(self, case: Case, dtype: str) -> None:
        if self.held == (case.name, dtype):
            return
        self.whole.clear()
        self.parts.clear()
        torch.cuda.empty_cache()
        type_ = getattr(torch, dtype)
        # So many that no part is in the L2 when its turn comes.
        self.whole += random_layers(case, type_, itemsize=type_.itemsize / self.ranks.size)
        self.parts += [part_of(layer, self.ranks) for layer in self.whole]
        self.held = case.name, dtype


def part_of(layer: MLPWeights, ranks: Ranks) -> MLPWeights:
    """A rank's part of plain weights: of up's and gate's rows, and of down's columns."""

    def mine(tensor: Any, dim: int) -> Any:
        if tensor is None:
            return None
        return tensor.chunk(ranks.size, dim)[ranks.rank].contiguous()

    rows = {name: mine(getattr(layer, name), 0) for name in ("up", "up_bias", "gate", "gate_bias")}
    bias = layer.down_bias if ranks.is_first else None
    return layer._replace(**rows, down=mine(layer.down, 1), down_bias=bias)


def _cell(ranks: Ranks, held: _Layers, place: dict[str, Any]) -> dict[str, Any]:
    """On every rank, at the same time; what the first returns is of all."""
    case, M = SHAPES[place["case"]], place["M"]
    held.hold(case, place["dtype"])
    chain = Chain(case, held.whole, M)
    part = layer_half(case, held.parts, (None, None), carries=ranks.is_first)
    buffers = [torch.zeros_like(attention) for attention in chain.attention]

    def library(tensor: Tensor) -> Tensor:
        """torch.distributed's all-reduce."""
        dist.all_reduce(tensor, group=ranks.group)
        return tensor

    halves: dict[str, LayerHalf] = {
        "sharded": lambda a, r, i: ranks.sum(part(a, r, i)),
        "part": part,
        "all_reduce": lambda a, r, i: ranks.sum(buffers[i]),
        "library": lambda a, r, i: library(buffers[i]),
    }
    graphs = {name: chain.capture(half) for name, half in halves.items()}
    together = device_times(graphs, chain.layers, agreed=lambda replays: _first(ranks, replays))
    error, own = chain.errors(case, held.whole[0], halves["sharded"])
    runs = [chain.run(halves["sharded"]) for _ in range(2)]
    slowest = _slowest(ranks, {"same_bits": torch.equal(*runs), "error": error / own, **together})
    if not slowest["error"] <= WRONG:
        raise ArithmeticError(f"relative error {slowest['error']:.2g} times PyTorch's own")
    times: dict[str, Times] = {name: slowest[name] for name in halves}
    alone = {}
    if ranks.is_first:
        whole = layer_half(case, held.whole, (None, None))
        alone = device_times({"whole": chain.capture(whole)}, chain.layers)
    ranks.exchange(None, "waiting for one GPU")
    down = held.parts[0].down
    sharded = times["sharded"].median
    return {
        "plan": str(plan_linear(M, down)),
        "device_us": {
            name: {k: round(v, 3) for k, v in each._asdict().items()}
            for name, each in {**alone, **times}.items()
        },
        "speedup": round(alone["whole"].median / sharded, 3) if alone else None,
        "all_reduce_share": round(times["all_reduce"].median / sharded, 3),
        "error_over_torch": round(slowest["error"], 2),
        "same_bits": slowest["same_bits"],
    }


def _first(ranks: Ranks, value: int) -> int:
    """The first rank's."""
    return ranks.exchange(value, "agreeing on how often")[0]


def _slowest(ranks: Ranks, found: dict[str, Any]) -> dict[str, Any]:
    """Of all ranks' times, errors and bits the worst."""
    each = ranks.exchange(found, "gathering times")
    worst: dict[str, Any] = {
        name: max((one[name] for one in each), key=lambda times: times.median)
        for name, value in found.items()
        if isinstance(value, Times)
    }
    worst["error"] = max(one["error"] for one in each)
    return {**worst, "same_bits": all(one["same_bits"] for one in each)}


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """For a terminal, one for each case."""
    for dtype, ranks, case in dict.fromkeys(
        (c["dtype"], c["ranks"], c["case"]) for c in record["cells"]
    ):
        title = f"{case}, {dtype}, {ranks} GPUs"
        shown = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
        for name in (
            "rows", "one GPU, µs", "shared, µs", "×", "its part, µs", "all-reduce, µs",
            "NCCL's", "share", "error /\ntorch's", "same\nbits",
        ):  # fmt: skip
            shown.add_column(name, justify="right", no_wrap=True)
        for cell in record["cells"]:
            if (cell["dtype"], cell["ranks"], cell["case"]) == (dtype, ranks, case):
                us = {name: f"{each['median']:.1f}" for name, each in cell["device_us"].items()}
                shown.add_row(
                    str(cell["M"]), us["whole"], us["sharded"], f"{cell['speedup']:.2f}",
                    us["part"], us["all_reduce"], us["library"], f"{cell['all_reduce_share']:.0%}",
                    f"{cell['error_over_torch']:.2f}", "yes" if cell["same_bits"] else "NO",
                )  # fmt: skip
        yield shown


# --- how it scales ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a decoder-only model's weights are; its embeddings are its head too."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int = 0

    @property
    def mlp(self) -> int:
        """Elements of the matrices of all MLPs."""
        return self.layers * 2 * self.hidden * self.intermediate

    @property
    def rest(self) -> int:
        """Those of attention and embeddings, which every rank has; vectors are left out."""
        return self.hidden * (4 * self.layers * self.hidden + self.vocabulary + self.positions)


MODELS = {
    "bloom-7b1": Model(layers=30, hidden=4096, intermediate=16384, vocabulary=250880),
    "opt-30b": Model(
        layers=48, hidden=7168, intermediate=28672, vocabulary=50272, positions=2050
    ),
    "BLOOM-176B": Model(layers=70, hidden=14336, intermediate=57344, vocabulary=250880),
    "OPT-175B": Model(
        layers=96, hidden=12288, intermediate=49152, vocabulary=50272, positions=2050
    ),
}  # fmt: skip

#: What an H100 reads, in TB/s (`ceilings`, measured), and what an "80 GB" GPU has for weights.
READ_TB_S = 2.94
GPU_BYTES = 80e9


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A model on so many GPUs: bytes on each, and microseconds that its MLPs take for one token."""

    model: str
    gpus: int
    mlp_bytes: float
    rest_bytes: float
    reading_us: float
    all_reduce_us: float | None

    @property
    def fits(self) -> bool:
        return self.mlp_bytes + self.rest_bytes <= GPU_BYTES


def scaling(
    all_reduce_us: Mapping[int, float],
    *,
    models: Mapping[str, Model] = MODELS,
    gpus: Iterable[int] = (1, 2, 4, 8),
    itemsize: float = 2.0,
    read_tb_s: float = READ_TB_S,
) -> list[Scaled]:
    """How models scale whose MLPs alone are shared: computed, not measured.

    For one token, with W the bytes of all MLPs: W / P / bandwidth + layers * all_reduce(P), the
    second for P > 1. all_reduce_us: what one of a row takes among so many GPUs, where it is known.
    itemsize: bytes of each weight of an MLP; attention and embeddings have 2.
    """
    found = []
    for name, model in models.items():
        for count in gpus:
            each = model.mlp * itemsize / count
            latency = 0.0 if count == 1 else all_reduce_us.get(count)
            found.append(
                Scaled(
                    model=name, gpus=count, mlp_bytes=each, rest_bytes=2.0 * model.rest,
                    reading_us=each / read_tb_s / 1e6,
                    all_reduce_us=None if latency is None else model.layers * latency,
                )
            )  # fmt: skip
    return found


def latencies(record: dict[str, Any]) -> dict[int, float]:
    """What an all-reduce of one row takes in a record, by the number of ranks: the longest."""
    found: dict[int, float] = {}
    for cell in record["cells"]:
        if cell["M"] == 1:
            us = cell["device_us"]["all_reduce"]["median"]
            found[cell["ranks"]] = max(us, found.get(cell["ranks"], 0.0))
    return found


def scaling_markdown(rows: Iterable[Scaled]) -> str:
    """For a README."""
    lines = [
        ["model", "GPUs", "MLP / GPU", "rest / GPU", "in 80 GB", "reading", "all-reduces", "sum"],
        ["---"] * 8,
    ]
    for row in rows:
        reduced = row.all_reduce_us
        lines.append(
            [
                row.model,
                str(row.gpus),
                f"{row.mlp_bytes / 1e9:.1f} GB",
                f"{row.rest_bytes / 1e9:.1f} GB",
                "fits" if row.fits else "no",
                f"{row.reading_us / 1e3:.2f} ms",
                "?" if reduced is None else f"{reduced / 1e3:.2f} ms",
                "?" if reduced is None else f"{(row.reading_us + reduced) / 1e3:.2f} ms",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
