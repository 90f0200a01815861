"""The MLP benchmark: its peers compute the same thing, and its record says what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_triton_mlp import bench
from hf_triton_mlp.measure import CASES, Case, Chain, random_layers
from hf_triton_mlp.ops import MLPGemmOp

SMALL = [
    Case("gpt2", 48, 96),
    Case("relu", 48, 96, "relu"),
    Case("gated", 48, 96, "silu", "rms_norm", gated=True, bias=False),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_compute_the_same(case: Case) -> None:
    layers = random_layers(case, torch.float32, "cpu")[:3]
    chain = Chain(case, layers, 5)
    op = MLPGemmOp(activation=case.activation, norm=case.norm)
    expected = chain.first(lambda a, r, i: op.reference(a, layers[i], r))
    names = []
    with torch.no_grad():
        for name, half in bench.peers(case, layers, 5):
            names.append(name)
            if name not in bench.COMPILED and name != "liger":
                # On the CPU _addmm_activation computes GELU by erf, on a GPU by tanh.
                atol = 1e-3 if name == "_addmm_activation" else 1e-5
                torch.testing.assert_close(chain.first(half), expected, rtol=1e-5, atol=atol)
    assert names[0] == bench.OURS and {"torch eager", "torch.compile"} <= set(names)
    assert ("_addmm_activation" in names) != case.gated
    assert ("transformers eager" in names) == (case.name == "gpt2")


def test_layers_do_not_stay_in_the_l2() -> None:
    for case in CASES.values():
        layers = max(3, min(24, 300_000_000 // (2 * case.weights)))
        assert layers * 2 * case.weights > 2 * 50 * 2**20


def cell(case: str, M: int, ours: float, other: float) -> dict[str, Any]:
    def times(us: float) -> dict[str, Any]:
        return {"device_us": {"median": us, "least": us, "most": us}}

    return {
        "dtype": "float16",
        "case": case,
        "M": M,
        "peers": {bench.OURS: times(ours), "torch eager": times(other), "x": {"failed": "no"}},
        "best_other": "torch eager",
        "speedup": other / ours,
    }


RECORD = {
    "device": "a GPU",
    "cells": [cell("gpt2", 1, 5, 20), cell("gpt2", 64, 10, 20), cell("opt-30b", 1, 300, 300)],
    "skipped": [],
}


def test_geometric_means() -> None:
    assert bench.geometric_means(RECORD) == {"M <= 16": 2.0, "M = 32-128": 2.0}


def test_tables() -> None:
    shown = bench.markdown(RECORD, "float16").splitlines()
    assert shown[0] == "| rows | gpt2 | opt-30b |"
    assert shown[2] == "| 1 | 5 / 20 (4.00 x) | 300 / 300 (1.00 x) |"
    assert shown[3] == "| 64 | 10 / 20 (2.00 x) | - |"
    assert bench.table(RECORD, "float16").row_count == 2


def test_plot_and_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench.plot(RECORD, tmp_path / "plot.png", "float16")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    bench.write(RECORD, tmp_path / "record.json")
    read = json.loads((tmp_path / "record.json").read_text())
    assert read == {**RECORD, "geometric_means": bench.geometric_means(RECORD)}


@pytest.mark.gpu
def test_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", {case.name: case for case in SMALL})
    saved, cells = [], []
    record = bench.bench_mlp(
        ["gpt2", "gated"],
        [1, 40],
        ["float16"],
        compiled=False,
        progress=cells.append,
        save=lambda record: saved.append(len(record["cells"])),
    )
    assert len(record["cells"]) == len(cells) == 4 and saved == [1, 2, 3, 4, 4]
    for found in record["cells"]:
        peers = found["peers"]
        assert not any("failed" in peer for peer in peers.values())
        assert found["error_over_torch"] <= 2 and found["same_bits"]
        for peer in peers.values():
            us = peer["device_us"]
            assert 0 < us["least"] <= us["median"] <= us["most"] < 10_000
        assert ("host_us" in peers[bench.OURS]) == (found["M"] == 1)
        assert found["speedup"] == pytest.approx(
            peers[found["best_other"]]["device_us"]["median"]
            / peers[bench.OURS]["device_us"]["median"],
            abs=1e-3,
        )
    record = bench.bench_mlp(["relu"], [1, 2], ["float16"], compiled=False, seconds=0)
    assert record["skipped"] == ["float16 relu M=1", "float16 relu M=2"] and not record["cells"]
