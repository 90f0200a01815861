"""The benchmark of ranks that share an MLP, small, with times that nobody measured; how it scales.

On two GPUs it is for real.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models as tiny
import torch
import torch.distributed as dist
from rank_processes import RANKS, Case, run
from rich.console import Console
from typer.testing import CliRunner

from hf_triton_mlp import bench_generate, bench_parallel, measure
from hf_triton_mlp.bench_generate import ALONE, OURS
from hf_triton_mlp.bench_parallel import MODELS, SHAPES, latencies, scaling, scaling_markdown
from hf_triton_mlp.cli import app
from hf_triton_mlp.measure import Ceilings, Chain, Times
from hf_triton_mlp.ranks import Ranks

SMALL = measure.Case("small", 64, 128, "relu")
GATED = measure.Case("gated", 64, 128, "silu", "rms_norm", gated=True, bias=False)
NAMES = ["small", "gated"]
ROWS = [1, 4]


def torch_half(case: Any, layers: Any, plans: Any, carries: bool = True) -> Any:
    """On the CPU PyTorch computes what the kernels would."""
    op = measure.MLPGemmOp(activation=case.activation, norm=case.norm)
    return lambda a, r, i: op.compose(a, layers[i], r, None, carries)


def times(graphs: dict[str, Any], layers: int, agreed: Any = None) -> dict[str, Times]:
    """The second rank's are longer; a number of replays is agreed on, as it must be."""
    if agreed is not None:
        assert agreed(3 + dist.get_rank()) == 3
    known = {"whole": 12.0, "sharded": 8.0, "part": 6.0, "all_reduce": 2.0, "library": 4.0}
    return {name: Times(*3 * (known[name] + dist.get_rank(),)) for name in graphs}


def measured(folder: Path) -> None:
    ranks, whole = Ranks(dist.group.WORLD), measure.random_layers
    with (
        mock.patch.multiple(
            bench_parallel,
            random_layers=lambda case, dtype, itemsize: whole(case, dtype, "cpu")[:2],
            layer_half=torch_half,
            device_times=times,
            ceilings=lambda dtype: Ceilings(1.0, 1.0),
            plan_linear=lambda *_: "a plan",
        ),
        mock.patch.dict(SHAPES, {"small": SMALL, "gated": GATED}),
        mock.patch.multiple(torch.cuda, get_device_name=lambda: "a GPU", empty_cache=lambda: None),
        mock.patch.object(Chain, "capture", lambda chain, half: chain.run(half)),
    ):
        record = bench_parallel.bench_parallel(ranks, NAMES, ROWS, "float16")
        assert (record is None) == (ranks.rank > 0)
        again = bench_parallel.bench_parallel(ranks, NAMES, ROWS, "float16", kept=record)
        if record is None or again is None:
            return
        assert len(again["cells"]) == len(record["cells"]), "none is measured twice"
        (folder / "record.json").write_text(json.dumps(record))


def generated(folder: Path) -> None:
    """Ours shared and unshared, in one run, with the same tokens; one way fails on one rank."""
    (place,) = bench_generate.cells(["tiny"], ["float32"], [2], [5], [9])
    options = {"nothing": 1} if dist.get_rank() == 1 else {}
    broken = bench_generate.Way(options=options)
    with mock.patch.dict(bench_generate.WAYS, {"broken": broken}):
        record = bench_generate.bench_generate(
            [place],
            lambda name, dtype: tiny.build("opt", ffn_dim=52),
            device=torch.device("cpu"),
            rounds=2,
            mp_group=dist.group.WORLD,
        )
    (cell,) = record["cells"]
    contenders = cell["contenders"]
    failed = [name for name in contenders if "failed" in contenders[name]]
    assert failed == ["broken"] and "nothing" in contenders["broken"]["failed"]
    for name in (OURS, ALONE):
        assert contenders[name]["equal_tokens"] == [9, 9]
        assert contenders[name]["same_on_all_ranks"] is True
    assert contenders[OURS]["speedup_over_unshared"]["median"] > 0
    assert "speedup_over_unshared" not in contenders[ALONE]
    assert cell["best_other"] not in (OURS, ALONE) and record["ranks"] == str(RANKS)
    console = Console(width=140, record=True, quiet=False)
    console.print(*bench_generate.tables(record))
    text = console.export_text()
    assert "times unshared" in text and "same on all ranks" in text


def cases() -> dict[str, Case]:
    return {"measured": measured, "generated": generated}


def check(record: dict[str, Any], names: list[str], rows: list[int]) -> None:
    assert [(cell["case"], cell["M"]) for cell in record["cells"]] == [
        (name, M) for name in names for M in rows
    ]
    for cell in record["cells"]:
        assert cell["ranks"] == RANKS and cell["same_bits"]
        assert cell["error_over_torch"] <= 2
        assert set(cell["device_us"]) == {"whole", "sharded", "part", "all_reduce", "library"}


def test_what_is_measured_and_shown(tmp_path: Path) -> None:
    for said in run(cases, tmp_path).values():
        assert said == [""] * RANKS, "\n".join(said)
    record = json.loads((tmp_path / "record.json").read_text())
    check(record, NAMES, ROWS)
    for cell in record["cells"]:
        medians = {name: each["median"] for name, each in cell["device_us"].items()}
        assert medians == {
            "whole": 12.0,
            "sharded": 9.0,
            "part": 7.0,
            "all_reduce": 3.0,
            "library": 5.0,
        }
        assert cell["speedup"] == pytest.approx(12 / 9, abs=1e-3)
        assert cell["all_reduce_share"] == pytest.approx(3 / 9, abs=1e-3)
    assert latencies(record) == {RANKS: 3.0}
    console = Console(width=110, record=True)
    for table in bench_parallel.tables(record):
        console.print(table)
    shown = console.export_text()
    assert "2 GPUs" in shown and "1.33" in shown and "33%" in shown


def test_models_are_as_large_as_they_are_called() -> None:
    sizes = {"bloom-7b1": 7.07e9, "opt-30b": 30.0e9, "BLOOM-176B": 176.2e9, "OPT-175B": 174.6e9}
    assert sizes.keys() == MODELS.keys()
    for name, size in sizes.items():
        model = MODELS[name]
        assert model.mlp + model.rest == pytest.approx(size, rel=0.005)


def test_how_models_scale() -> None:
    rows = scaling({2: 10.0, 4: 12.0}, read_tb_s=2.0)
    found = {(row.model, row.gpus): row for row in rows}
    assert len(found) == len(rows) == 4 * len(MODELS)
    one, two, four, eight = (found["bloom-7b1", gpus] for gpus in (1, 2, 4, 8))
    assert one.mlp_bytes == 2 * 30 * 2 * 4096 * 16384 == 4 * four.mlp_bytes
    assert {row.rest_bytes for row in (one, two, four, eight)} == {one.rest_bytes}
    assert one.reading_us == pytest.approx(one.mlp_bytes / 2e12 * 1e6)
    assert [row.all_reduce_us for row in (one, two, four, eight)] == [0.0, 300.0, 360.0, None]
    # Attention and embeddings, which every GPU has, are too large by themselves.
    assert not any(row.fits for row in rows if row.model in ("BLOOM-176B", "OPT-175B"))
    assert all(row.fits for row in rows if row.model == "bloom-7b1")
    lines = scaling_markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert sum("?" in line for line in lines) == len(MODELS)
    half = scaling({}, itemsize=1.0)[0]
    assert math.isclose(half.mlp_bytes, one.mlp_bytes / 2) and half.rest_bytes == one.rest_bytes


def test_the_notes_have_what_is_computed() -> None:
    notes = (Path(__file__).parents[1] / "benchmarks" / "NOTES.md").read_text()
    for line in scaling_markdown(scaling({})).splitlines()[2:]:
        computed = " | ".join(line.split(" | ")[:6])  # up to what is measured
        assert computed in notes, f"{computed}: run `hf-triton-mlp bench parallel --table`"


def test_the_command(tmp_path: Path) -> None:
    """How models scale is told anywhere, with all-reduces from a record or an option."""
    us = {"all_reduce": {"median": 10.0}}
    record = {"cells": [{"M": 1, "ranks": 2, "device_us": us}]}
    record |= {"device": "", "versions": {}, "runs": []}
    (tmp_path / "record.json").write_text(json.dumps(record))
    options = ["bench", "parallel", "--table", "--json", str(tmp_path / "record.json")]
    for given, all_reduces in (((), {2: 10.0}), (("--all-reduce-us", "7"), {2: 10.0, 4: 7, 8: 7})):
        result = CliRunner().invoke(app, [*options, *given])
        assert result.exit_code == 0, result.output
        assert result.output.strip() == scaling_markdown(scaling(all_reduces))
    alone = CliRunner().invoke(app, ["bench", "parallel"])
    assert alone.exit_code == 2 and "torchrun --nproc-per-node 2" in " ".join(alone.output.split())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
def test_on_two_gpus(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "-m",
         "hf_triton_mlp", "bench", "parallel", "--case", "bloom-7b1", "--rows", "1", "--rows",
         "32", "--json", str(path)],
        check=True,
        timeout=300,
    )  # fmt: skip
    check(json.loads(path.read_text()), ["bloom-7b1"], [1, 32])
