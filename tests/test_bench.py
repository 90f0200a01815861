"""The MLP benchmark: its peers compute the same thing, and its record says what was measured."""

import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from hf_triton_mlp import bench, bench_generate, peers
from hf_triton_mlp.measure import CASES, Case, Ceilings, Chain, random_layers
from hf_triton_mlp.ops import MLPGemmOp

ROOT = Path(__file__).parents[1]
SMALL = [
    Case("gpt2", 48, 96),
    Case("relu", 48, 96, "relu"),
    Case("gated", 48, 96, "silu", "rms_norm", gated=True, bias=False),
]


class FakeGemLite(ModuleType):
    """GemLite's 16-bit linear layer, as version 0.6.0 takes its arguments."""

    core = SimpleNamespace(TORCH_TO_DTYPE={torch.float32: "FP32"})

    class GemLiteLinear:
        def __init__(self, W_nbits: int, group_size: int, in_features: int, out_features: int,
                     input_dtype: str, output_dtype: str) -> None:  # fmt: skip
            assert W_nbits == 16 and group_size == in_features
            assert input_dtype == output_dtype == "FP32"
            self.shape = (out_features, in_features)

        def pack(self, W_q: Tensor, scales: None, zeros: None, bias: Tensor | None) -> Any:
            assert W_q.shape == self.shape and scales is zeros is None
            return lambda x: F.linear(x, W_q, bias)


class FakeLiger(ModuleType):
    """Liger's two functions, as version 0.8.5 takes and returns tensors."""

    class LigerFusedAddRMSNormFunction:
        @staticmethod
        def apply(X: Tensor, R: Tensor, W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
            return F.rms_norm(X + R, W.shape, W, eps), X + R

    class LigerSiLUMulFunction:
        @staticmethod
        def apply(a: Tensor, b: Tensor) -> Tensor:
            return F.silu(a) * b


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the wheels of other projects were installed."""
    gemlite, liger, ops = FakeGemLite("gemlite"), ModuleType("liger_kernel"), FakeLiger("ops")
    for name, module in (("gemlite", gemlite), ("liger_kernel", liger), ("liger_kernel.ops", ops)):
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("wheels")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_compute_the_same(case: Case) -> None:
    layers = random_layers(case, torch.float32, "cpu")[:3]
    chain = Chain(case, layers, 5)
    op = MLPGemmOp(activation=case.activation, norm=case.norm)
    expected = chain.first(lambda a, r, i: op.reference(a, layers[i], r))
    found = peers.peers(case, 1, torch.float16)
    with torch.no_grad():
        for name, build in found.items():
            if name not in ("torch.compile", "max-autotune"):
                # On the CPU _addmm_activation computes GELU by erf, on a GPU by tanh.
                atol = 1e-3 if name == "_addmm_activation" else 1e-5
                actual = chain.first(build(case, layers))
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)
    assert next(iter(found)) == peers.OURS
    assert {"torch eager", "torch.compile", "gemlite"} <= set(found)
    assert ("_addmm_activation" in found) != case.gated
    assert ("liger" in found) == case.gated
    assert ("transformers eager" in found) == (case.name == "gpt2")


def test_wheels_of_others_are_optional() -> None:
    for name in ("gemlite", "liger_kernel"):
        if not peers.installed(name):
            assert name not in bench.versions()
            assert not {"gemlite", "liger"} & set(peers.peers(SMALL[2], 1, torch.float16))


def test_layers_do_not_stay_in_the_l2() -> None:
    for case in CASES.values():
        layers = max(3, min(24, 300_000_000 // (2 * case.weights)))
        assert layers * 2 * case.weights > 2 * 50 * 2**20


def cell(case: str, M: int, ours: float, other: float) -> dict[str, Any]:
    def times(us: float) -> dict[str, Any]:
        return {"device_us": {"median": us, "least": us, "most": 1.02 * us}}

    eager = {**times(other), "host_us": 123.4}
    return {
        "dtype": "float16",
        "case": case,
        "M": M,
        "run": 0,
        "peers": {bench.OURS: times(ours), "transformers eager": eager, "x": {"failed": "no"}},
        "tb_s": 2.5,
        "tflop_s": 678.9,
        "of_read_ceiling": 0.83,
        "of_product_ceiling": 0.1 if M < 512 else 0.91,
        "best_other": "transformers eager",
        "speedup": other / ours,
        "error_over_torch": 0.9,
        "same_bits": True,
    }


RECORD = {
    "device": "a GPU",
    "versions": {"torch": "1"},
    "runs": [],
    "skipped": [],
    "cells": [
        cell("gpt2", 1, 5, 20),
        cell("gpt2", 64, 10, 20),
        cell("opt-30b", 1, 300, 300),
        cell("opt-30b", 8192, 9876, 12345),
    ],
}


def test_geometric_means() -> None:
    assert bench.geometric_means(RECORD) == {
        "M <= 16": 2.0,
        "M = 32-128": 2.0,
        "M >= 512": 1.25,
    }


def test_tables() -> None:
    shown = bench.markdown(RECORD, "float16").splitlines()
    assert shown[0] == "| rows | gpt2 | opt-30b |"
    assert shown[2] == "| 1 | 5.0 / 20.0 (4.00 ×) | 300 / 300 (1.00 ×) |"
    assert shown[3] == "| 64 | 10.0 / 20.0 (2.00 ×) | - |"
    tables = list(bench.tables(RECORD))
    assert [table.title for table in tables] == ["gpt2, float16", "opt-30b, float16"]
    console = Console(width=100, record=True)
    for table in tables:
        console.print(table)
    text = console.export_text()
    for expected in (
        "5.0 ±1.0%  transformers eager 20.0  4.00    2.50 TB/s   83%",
        "9876 ±1.0%  transformers eager 12345  1.25  679 TFLOP/s   91%",
        "- / 123",
    ):
        assert " ".join(expected.split()) in " ".join(text.split()), text
    assert "…" not in text
    assert bench.failures(RECORD)[0] == "failed: x, gpt2 float16 M=1: no"


def test_readme_shows_the_committed_record() -> None:
    """After `<!-- file, dtype -->` stands the table of that file."""
    readme = (ROOT / "README.md").read_text()
    tables = re.findall(r"<!-- (\S+\.json), (\w+) -->\n(.*?)\n<!-- end -->", readme, re.DOTALL)
    assert tables
    for file, dtype, table in tables:
        record = json.loads((ROOT / file).read_text())
        module = bench_generate if record.get("benchmark") == "generate" else bench
        assert table == module.markdown(record, dtype)


def test_continues_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only missing cells are measured; another device's record is refused."""
    measured = []

    def measure(case: Case, layers: Any, M: int, *_: Any) -> dict[str, Any]:
        measured.append((case.name, M))
        return {"speedup": 2.0, "peers": {}}

    monkeypatch.setattr(bench, "_cell", measure)
    monkeypatch.setattr(bench, "random_layers", lambda *_: [])
    monkeypatch.setattr(bench, "ceilings", lambda _: Ceilings(3.0, 700.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    file = tmp_path / "record.json"

    def run(rows: list[int], **options: Any) -> dict[str, Any]:
        kept = bench.read(file) if file.exists() else None
        save = lambda record: bench.write(record, file)  # noqa: E731
        return bench.bench_mlp(["opt-1.3b", "gpt2"], rows, ["float16"], kept=kept, save=save,
                               **options)  # fmt: skip

    run([1])
    assert [len(bench.read(file)[key]) for key in ("runs", "cells")] == [1, 2]
    assert run([1, 2], seconds=-1)["skipped"] == ["float16 opt-1.3b M=2", "float16 gpt2 M=2"]
    assert len(bench.read(file)["runs"]) == 1
    record = run([2, 1])
    assert bench.read(file) == {**record, "geometric_means": {"M <= 16": 2.0}}
    assert measured == [("opt-1.3b", 1), ("gpt2", 1), ("opt-1.3b", 2), ("gpt2", 2)]
    cells = [(c["case"], c["M"], c["run"]) for c in record["cells"]]
    assert cells == [("gpt2", 1, 0), ("gpt2", 2, 1), ("opt-1.3b", 1, 0), ("opt-1.3b", 2, 1)]
    assert [run["ceilings"]["float16"]["read_tb_s"] for run in record["runs"]] == [3.0, 3.0]
    assert run([1, 2]) == record and len(measured) == 4

    with pytest.raises(ValueError, match="compiled peers True there, False here"):
        run([4], compiled=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    with pytest.raises(ValueError, match="device a GPU there, another here"):
        run([4])
    file.write_text("{")
    with pytest.raises(ValueError, match=r"record\.json is no record"):
        run([4])


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
    saved, told = [], []
    record = bench.bench_mlp(
        ["gpt2", "gated"],
        [1, 40],
        ["float16"],
        compiled=False,
        progress=lambda *what: told.append(what),
        save=lambda record: saved.append(len(record["cells"])),
    )
    assert saved == [1, 2, 3, 4, 4] and told[3] == ("float16 gated M=40", 3, 4)
    for found in record["cells"]:
        by_name = found["peers"]
        assert not any("failed" in peer for peer in by_name.values())
        assert found["error_over_torch"] <= 2 and found["same_bits"]
        for peer in by_name.values():
            us = peer["device_us"]
            assert 0 < us["least"] <= us["median"] <= us["most"] < 10_000
        assert ("host_us" in by_name[bench.OURS]) == (found["M"] == 1)
        assert found["speedup"] == pytest.approx(
            by_name[found["best_other"]]["device_us"]["median"]
            / by_name[bench.OURS]["device_us"]["median"],
            abs=1e-3,
        )
    record = bench.bench_mlp(["relu"], [1, 2], ["float16"], compiled=False, seconds=0)
    assert record["skipped"] == ["float16 relu M=1", "float16 relu M=2"] and not record["cells"]
