"""The benchmark of quantized MLPs: what is shown of a record; on a GPU, a small one."""

from typing import Any

import pytest
from rich.console import Console

from hf_triton_mlp import bench, bench_quantized
from hf_triton_mlp.bench_quantized import OURS, PLAIN


def cell(**changes: Any) -> dict[str, Any]:
    def times(median: float) -> dict[str, Any]:
        return {"device_us": {"median": median, "least": median, "most": median}}

    return {
        "dtype": "float16",
        "case": "gpt2",
        "format": "int4",
        "M": 4,
        "peers": {
            PLAIN: times(60.0),
            OURS: times(20.0),
            "torchao": times(30.0),
            "gemlite": {"failed": "ValueError: no"},
        },
        "limit_us": 15.0,
        "over_16_bits": 3.0,
        "best_other": "torchao",
        "speedup": 1.5,
        "error_over_torch": 0.9,
        "same_bits": True,
        **changes,
    }


def test_what_is_shown() -> None:
    record = {"cells": [cell(), cell(M=16, best_other=None, speedup=None, same_bits=False)]}
    console = Console(width=100, record=True)
    for table in bench_quantized.tables(record):
        console.print(table)
    text = console.export_text()
    for part in ("gpt2, int4 weights", "torchao 30.0", "1.50", "3.00", "NO"):
        assert part in text
    *_, first, second = bench_quantized.markdown(record).splitlines()
    assert first == "| gpt2 | int4 | 4 | 20.0 | 3.00 | 1.50 (torchao 30.0) |"
    assert second == "| gpt2 | int4 | 16 | 20.0 | 3.00 | - |"
    failed = "failed: gemlite, gpt2 int4 float16 M=4: ValueError: no"
    assert bench.failures(record)[0] == failed


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    formats = tuple(bench_quantized.FORMATS)
    record = bench_quantized.bench_quantized(("gpt2",), formats, (1, 16, 600), peers=False)
    assert len(record["cells"]) == 3 * len(formats)
    for found in record["cells"]:
        rounds = found["format"] == "fp8 x fp8" and found["M"] > 128
        assert found["same_bits"] and (rounds or found["error_over_torch"] <= 2)
        error = found["peers"][OURS]["error_of_format"]
        assert error < (0.2 if found["format"].startswith("int4") else 0.1 if rounds else 0.05)
