"""The MLP benchmark: one layer half of a model, ours against what else a PyTorch user can run."""

import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from rich.box import SIMPLE
from rich.table import Table

import hf_triton_mlp
from hf_triton_mlp.launchers import MLPWeights, plan_linear
from hf_triton_mlp.measure import (
    CASES,
    Case,
    Chain,
    LayerHalf,
    ceilings,
    device_times,
    random_layers,
)
from hf_triton_mlp.peers import COMPILED, OURS, installed, peers

DTYPES = ("float16", "bfloat16")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
#: Calls of so few rows may be bound by the host, so what a call costs it is measured too.
HOST_ROWS = 16
#: A peer whose error is this many times PyTorch's own computes something else.
WRONG = 10


# --- measuring --------------------------------------------------------------------------------


def bench_mlp(
    cases: Iterable[str] = tuple(CASES),
    rows: Iterable[int] = ROWS,
    dtypes: Iterable[str] = DTYPES,
    *,
    compiled: bool = True,
    seconds: float = math.inf,
    kept: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda cell, done, total: None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure every cell (dtype, case, number of rows) on the current GPU.

    compiled: also the peers that compile or tune themselves, which take most of the time. After
    so many seconds the remaining cells are listed as skipped. kept: a record of the same device
    and versions, whose cells are not measured again; ValueError when it is of others. `progress`
    is told each cell before it is measured, `save` gets the record after it. Times are in
    microseconds.
    """
    run: dict[str, Any] = {**new_run(), "ceilings": {}}
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "layer half": "a + r; norm; MLP; + (a + r), rotated over layers past the L2",
        "compiled peers": compiled,
    }
    layers: list[MLPWeights] = []
    held = None

    def measure(place: dict[str, Any]) -> dict[str, Any]:
        nonlocal held
        dtype, case = place["dtype"], place["case"]
        if dtype not in run["ceilings"]:
            run["ceilings"][dtype] = ceilings(getattr(torch, dtype))._asdict()
        if held != (dtype, case):
            layers.clear()
            gc.collect()
            torch.cuda.empty_cache()
            layers.extend(random_layers(CASES[case], getattr(torch, dtype)))
            held = dtype, case
        return _cell(CASES[case], layers, place["M"], compiled, run["ceilings"][dtype])

    asked = itertools.product(dtypes, cases, rows)
    places = [{"dtype": dtype, "case": case, "M": M} for dtype, case, M in asked]
    orders = {"dtype": DTYPES, "case": tuple(CASES)}
    with torch.no_grad():
        return fill(
            record, run, places, measure, orders=orders, seconds=seconds, kept=kept,
            progress=progress, save=save,
        )  # fmt: skip


def fill(
    record: dict[str, Any],
    run: dict[str, Any],
    places: Iterable[dict[str, Any]],
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    orders: Mapping[str, Sequence[str]],
    seconds: float,
    kept: dict[str, Any] | None,
    progress: Callable[[str, int, int], None],
    save: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Add the cells of these places that `kept` lacks to its own, in a record of one setting.

    record: the setting, by which both must agree, or ValueError. run: what the new cells have in
    common. orders: of values in a place, where it is not their own. clock: seconds. The rest is as
    for `bench_mlp`.
    """
    started = clock()
    record = {**record, "runs": [], "skipped": [], "cells": []}
    if kept is not None:
        _check_same(kept, record)
        record["runs"], record["cells"] = kept["runs"], kept["cells"]
    runs, cells = record["runs"], record["cells"]
    places = list(places)
    missing = [
        place for place in places if not any(place.items() <= cell.items() for cell in cells)
    ]

    def order(cell: dict[str, Any]) -> list[tuple[int, Any]]:
        known = [(cell[key], orders.get(key, ())) for key in places[0]]
        return [(names.index(v) if v in names else len(names), v) for v, names in known]

    for number, place in enumerate(missing):
        name = _name(place)
        if clock() - started > seconds:
            record["skipped"].append(name)
            continue
        progress(name, number, len(missing))
        cells.append({**place, "run": len(runs), **measure(place)})
        cells.sort(key=order)
        run["seconds"] = round(clock() - started, 1)
        record["runs"] = [*runs, run]
        save(record)
    save(record)
    return record


def _name(place: dict[str, Any]) -> str:
    """float16 gpt2 M=1: words, and numbers with what they are of."""
    return " ".join(v if isinstance(v, str) else f"{k}={v}" for k, v in place.items())


def new_run() -> dict[str, Any]:
    """What was called, and when."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    shared = f"torchrun --nproc-per-node {ranks} -m hf_triton_mlp"
    return {
        "command": " ".join([shared if ranks > 1 else "hf-triton-mlp", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of all that computes, by package; those of peers that are wheels of their own if present."""
    packages = {module.__name__: module for module in (hf_triton_mlp, torch, triton, transformers)}
    return {
        "python": platform.python_version(),
        **{name: module.__version__ for name, module in packages.items()},
        **{
            name: importlib.metadata.version(name)
            for name in ("bitsandbytes", "gemlite", "liger_kernel", "torchao")
            if installed(name)
        },
    }


def _check_same(kept: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise ValueError unless both records are of one device, one set of versions and peers."""

    def setting(of: dict[str, Any]) -> dict[str, Any]:
        plain = {k: v for k, v in of.items() if isinstance(v, (str, bool))}
        return {**plain, **of.get("versions", {})}

    there, here = setting(kept), setting(record)
    differ = [
        f"{key} {there.get(key)} there, {here.get(key)} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]
    if differ:
        raise ValueError(f"the record cannot be continued: {'; '.join(differ)}")


def _cell(
    case: Case, layers: list[MLPWeights], M: int, compiled: bool, ceiling: dict[str, float]
) -> dict[str, Any]:
    torch._dynamo.reset()
    chain = Chain(case, layers, M)
    # A graph keeps no tensors alive, and some peers have weights of their own.
    halves: list[LayerHalf] = []
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    found: dict[str, dict[str, Any]] = {}
    same_bits = False
    for name, build in peers(case, M, layers[0].plain[0].dtype).items():
        if name in COMPILED and not compiled:
            continue
        before = time.monotonic()
        try:
            half = build(case, layers)
            chain.first(half)
            found[name] = {"first_call_s": round(time.monotonic() - before, 3)}
            error, own = chain.errors(case, layers[0], half)
            found[name]["error_over_torch"] = round(error / own, 2)
            if not error <= WRONG * own:
                raise ArithmeticError(f"relative error {error:.2g}, PyTorch's own {own:.2g}")
            if M <= HOST_ROWS:
                found[name].update(_host(chain, half))
            if name == OURS:
                same_bits = torch.equal(chain.run(half), chain.run(half))
            graphs[name] = chain.capture(half)
            halves.append(half)
        except Exception as error:  # a peer that cannot run this is a result too
            if name == OURS:
                raise
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
    for name, times in device_times(graphs, chain.layers).items():
        found[name]["device_us"] = {k: round(v, 3) for k, v in times._asdict().items()}
    us = found[OURS]["device_us"]["median"]
    others = {name: peer for name, peer in found.items() if "device_us" in peer and name != OURS}
    best = min(others, key=lambda name: others[name]["device_us"]["median"])
    # Weights once; the rows in, out and between.
    values = case.weights + M * (3 * case.hidden + 2 * case.intermediate)
    tb_s = values * layers[0].plain[0].itemsize / us / 1e6
    tflop_s = 2 * case.weights * M / us / 1e6
    return {
        "peers": found,
        "plans": [
            str(plan_linear(M, layers[0].up, gated=case.gated)),
            str(plan_linear(M, layers[0].down)),
        ],
        "tb_s": round(tb_s, 3),
        "tflop_s": round(tflop_s, 1),
        "of_read_ceiling": round(tb_s / ceiling["read_tb_s"], 3),
        "of_product_ceiling": round(tflop_s / ceiling["product_tflop_s"], 3),
        "best_other": best,
        "speedup": round(others[best]["device_us"]["median"] / us, 3),
        "error_over_torch": found[OURS]["error_over_torch"],
        "same_bits": same_bits,
    }


def _host(chain: Chain, half: LayerHalf) -> dict[str, float]:
    """What one eager call costs the host, and how long it takes in all, in microseconds."""
    host, wall = [], []
    # So few that the queue of launches does not fill up, which would make the host wait.
    calls = max(1, 60 // chain.layers)
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            chain.run(half)
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
    each = 1e6 / (calls * chain.layers)
    return {
        "host_us": round(statistics.median(host) * each, 2),
        "wall_us": round(statistics.median(wall) * each, 2),
    }


# --- showing ----------------------------------------------------------------------------------


def geometric_means(record: dict[str, Any]) -> dict[str, float]:
    """Speedups over the best other, by numbers of rows."""
    groups = {"M <= 16": (1, 16), "M = 32-128": (32, 128), "M >= 512": (512, 2**30)}
    means = {}
    for name, (least, most) in groups.items():
        speedups = [c["speedup"] for c in record["cells"] if least <= c["M"] <= most]
        if speedups:
            means[name] = round(statistics.geometric_mean(speedups), 3)
    return means


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """For a terminal of 100 columns, one for each dtype and case."""
    columns = (
        "rows",
        "ours, µs",
        "best other, µs",
        "ratio",
        "reached",
        "share",
        "host µs,\nboth",
        "error /\ntorch's",
        "same\nbits",
    )
    groups = dict.fromkeys((cell["dtype"], cell["case"]) for cell in record["cells"])
    for dtype, case in groups:
        shown = Table(title=f"{case}, {dtype}", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in columns:
            shown.add_column(name, justify="right", no_wrap=True)
        for cell in record["cells"]:
            if (cell["dtype"], cell["case"]) == (dtype, case):
                shown.add_row(*_row(cell))
        yield shown


def _row(cell: dict[str, Any]) -> list[str]:
    ours, best = cell["peers"][OURS], cell["peers"][cell["best_other"]]
    median, least, most = (ours["device_us"][key] for key in ("median", "least", "most"))
    reads, computes = cell["of_read_ceiling"], cell["of_product_ceiling"]
    memory = reads >= computes
    hosts = [f"{peer['host_us']:.0f}" if "host_us" in peer else "-" for peer in (ours, best)]
    return [
        str(cell["M"]),
        f"{_us(median)} ±{(most - least) / 2 / median:.1%}",
        f"{cell['best_other'].strip('_')} {_us(best['device_us']['median'])}",
        f"{cell['speedup']:.2f}",
        f"{cell['tb_s']:.2f} TB/s" if memory else f"{cell['tflop_s']:.0f} TFLOP/s",
        f"{max(reads, computes):.0%}",
        " / ".join(hosts),
        f"{cell['error_over_torch']:.2f}",
        "yes" if cell["same_bits"] else "NO",
    ]


def failures(record: dict[str, Any]) -> list[str]:
    """Which peers failed where, and why."""
    keys = ("case", "format", "dtype", "M")
    return [
        f"failed: {name}, {_name({k: cell[k] for k in keys if k in cell})}: {peer['failed']}"
        for cell in record["cells"]
        for name, peer in cell["peers"].items()
        if "failed" in peer
    ]


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def markdown(record: dict[str, Any], dtype: str) -> str:
    """For a README, all cases: µs of ours / of the best other, and how many times faster."""
    cells = {(c["case"], c["M"]): c for c in record["cells"] if c["dtype"] == dtype}
    cases = list(dict.fromkeys(case for case, _ in cells))
    lines = [["rows", *cases], ["---"] * (1 + len(cases))]
    for M in sorted({M for _, M in cells}):
        line = [str(M)]
        for case in cases:
            cell = cells.get((case, M))
            if cell is None:
                line.append("-")
                continue
            ours, best = (
                _us(cell["peers"][name]["device_us"]["median"])
                for name in (OURS, cell["best_other"])
            )
            line.append(f"{ours} / {best} ({cell['speedup']:.2f} ×)")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(record: dict[str, Any], path: Path, dtype: str) -> None:
    """Speedup of ours over every peer, per case, against the number of rows."""
    from matplotlib.figure import Figure

    cells = [c for c in record["cells"] if c["dtype"] == dtype]
    cases = list(dict.fromkeys(c["case"] for c in cells))
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 7), 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    names = list(dict.fromkeys(name for c in cells for name in c["peers"] if name != OURS))
    for case, axis in zip(cases, axes, strict=False):
        for i, name in enumerate(names):
            points = [
                (c["M"], c["peers"][name]["device_us"]["median"])
                for c in cells
                if c["case"] == case and "device_us" in c["peers"].get(name, {})
            ]
            ours = {
                c["M"]: c["peers"][OURS]["device_us"]["median"] for c in cells if c["case"] == case
            }
            if points:
                axis.plot([M for M, _ in points], [us / ours[M] for M, us in points], "o-",
                          color=f"C{i}", label=name.strip("_"), markersize=3)  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=case, xscale="log", xlabel="rows (tokens)")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    for axis in list(axes)[len(cases) :]:
        axis.set_visible(False)
    figure.supylabel("time of others / ours")
    figure.legend(*_legend(figure), loc="outside lower center", ncols=2 * columns + 1)
    figure.suptitle(f"{record['device']}, {dtype}: residual + norm + MLP + residual")
    figure.savefig(path, dpi=130)


def _legend(figure: Any) -> tuple[list[Any], list[str]]:
    entries = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)


def read(path: Path) -> dict[str, Any]:
    """A record that `write` wrote; ValueError when it is something else."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no record of this benchmark: {error}") from error
    if not isinstance(record, dict) or not {"device", "versions", "runs", "cells"} <= set(record):
        raise ValueError(f"{path} is no record that this benchmark can continue")
    return record


def write(record: dict[str, Any], path: Path) -> None:
    """The record, and the means of its speedups."""
    write_lines({**record, "geometric_means": geometric_means(record)}, path)


def write_lines(record: dict[str, Any], path: Path) -> None:
    """One cell a line, so that a diff shows which changed. The file is whole at every moment."""
    head = {key: value for key, value in record.items() if key != "cells"}
    lines = ",\n".join("  " + json.dumps(cell) for cell in record["cells"])
    text = json.dumps(head, indent=1)
    part = path.with_name(f"{path.name}.part")
    part.write_text(f'{text[:-2]},\n "cells": [\n{lines}\n ]\n}}\n')
    part.replace(path)
