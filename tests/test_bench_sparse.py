"""The benchmark of exact zeros, small, with times that nobody measured; on a GPU, for real."""

from typing import Any

import pytest
import torch
from rich.console import Console

from hf_triton_mlp import bench_sparse, measure
from hf_triton_mlp.bench_sparse import SHAPES
from hf_triton_mlp.measure import Case, Ceilings, Chain, Times

SMALL = Case("small", 256, 512, "relu")


def check(record: dict[str, Any], zeros: list[float]) -> None:
    assert [cell["zeros"] for cell in record["cells"]] == 2 * zeros
    for cell in record["cells"]:
        assert cell["not_zero"] == pytest.approx(1 - cell["zeros"], abs=0.02)
        assert cell["same_bits"] and cell["error_over_torch"] <= 2
        assert cell["plan"].startswith("sparse") and not cell["pays"]


def test_what_is_measured_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = measure.random_layers(SMALL, torch.float16, "cpu")[:2]
    monkeypatch.setitem(SHAPES, "small", SMALL)
    monkeypatch.setattr(bench_sparse, "random_layers", lambda *_, **__: layers)
    monkeypatch.setattr(bench_sparse, "ceilings", lambda dtype: Ceilings(1.0, 1.0))
    monkeypatch.setattr(bench_sparse, "versions", dict)
    times = {"dense": Times(3.0, 3.0, 3.0), "skipping": Times(2.0, 2.0, 2.0)}
    monkeypatch.setattr(bench_sparse, "device_times", lambda graphs, layers: times)
    monkeypatch.setattr(bench_sparse, "plan_linear", lambda *_, **__: "sparse, a plan")
    monkeypatch.setattr(Chain, "capture", lambda chain, half: None)
    # On the CPU PyTorch computes what the kernels would.
    monkeypatch.setattr(bench_sparse, "layer_half", torch_half)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    record = bench_sparse.bench_sparse(["small"], [0.0, 0.9], [1, 4])
    check(record, [0.0, 0.9])
    console = Console(width=100, record=True)
    for table in bench_sparse.tables(record):
        console.print(table)
    assert "1.50" in console.export_text()


def torch_half(case: Case, layers: Any, plans: Any) -> Any:
    op = measure.MLPGemmOp(activation=case.activation, norm=case.norm)
    return lambda a, r, i: op.compose(a, layers[i], r, None)


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    check(bench_sparse.bench_sparse(["small"], [0.0, 0.9], [1, 4]), [0.0, 0.9])
