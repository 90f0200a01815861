"""Plans: what is chosen without measurements, what tables may say, and how a GPU is measured."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as tiny
import torch
import triton

from hf_triton_mlp import autotune, launchers, patch_model, patch_report, tuning
from hf_triton_mlp.autotune import Measured, candidates, cases_of, linears
from hf_triton_mlp.launchers import NO_SUMMANDS, linear_of
from hf_triton_mlp.measure import CASES, Case, random_layers
from hf_triton_mlp.proof import QUANTIZED_ROWS
from hf_triton_mlp.quantization import (
    QuantizationConfig,
    QuantizedWeight,
    blank,
    quantize,
    stored_by_input,
)
from hf_triton_mlp.quantizer import quantization_of
from hf_triton_mlp.tuning import Linear, Plan, choose, parse, save

HALF = torch.float16
AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)
GPU = "NVIDIA GeForce RTX 4090"
A_LINEAR = Linear(1, 3072, 768, HALF)
A_PLAN = Plan(kernel="skinny", block_n=4, block_k=512, num_warps=8)

#: Sizes of many shapes: tiny, odd, the cases', very wide.
SIZES = [(17, 33), (768, 768), (3072, 768), (768, 3072), (16384, 4096), (4096, 16384), (50272, 512)]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the user's table is looked for; there is none yet."""
    path = tmp_path / "plans.json"
    monkeypatch.setenv(tuning.PLANS_VARIABLE, str(path))
    tuning.forget()
    yield path
    tuning.forget()


def linear_layers() -> list[Linear]:
    return [
        Linear(M, N, K, dtype, k_contiguous, gated)
        for M in (1, 2, 4, 5, 16, 17, 64, 65, 128, 129, 8192)
        for N, K in SIZES
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for k_contiguous in (True, False)
        for gated in (True, False)
    ]


# --- without measurements ---------------------------------------------------------------------


@pytest.mark.parametrize("capability", [AMPERE, ADA, HOPPER])
def test_every_size_has_a_plan_that_fits(capability: tuple[int, int]) -> None:
    for linear in linear_layers():
        plan = choose(linear, capability)
        plan.check(linear.M, linear.dtype)
        assert plan.pdl == (capability == HOPPER)
        assert plan == choose(linear, capability)
        # Ampere without a data-centre part has 99 KiB of shared memory a block.
        size, weights = linear.dtype.itemsize, plan.block_n * (2 if linear.gated else 1)
        if plan.kernel in ("tiled", "decode"):
            stage = plan.slices * plan.block_k * (plan.block_m + weights) * size
            assert stage * plan.num_stages <= 99 * 1024, (linear, plan)
        if plan.kernel == "skinny":
            # More than 128 weights a thread would not stay in registers.
            assert weights * plan.block_k <= 128 * 32 * plan.num_warps, (linear, plan)


def test_decode_needs_few_launches() -> None:
    for linear in linear_layers():
        if linear.M <= tuning.DECODE_ROWS:
            plan = choose(linear, HOPPER)
            assert plan.kernel != "library"
            # Float32's parts of K have smaller errors, and keep more programs busy.
            more_rows = linear.dtype == torch.float32 and linear.M > tuning.SKINNY_ROWS
            assert plan.splits == 1 or more_rows


@pytest.mark.parametrize(
    ("change", "rows", "text"),
    [
        ({"kernel": "magic"}, 1, "'magic' is no kernel for 1 rows"),
        ({"kernel": "skinny"}, 5, "'skinny' is no kernel for 5 rows"),
        ({"kernel": "skinny", "block_m": 2}, 3, "'skinny' is no kernel for 3 rows"),
        ({"kernel": "decode", "block_m": 4}, 8, "'decode' is no kernel for 8 rows"),
        ({"kernel": "stream", "block_m": 8}, 9, "'stream' is no kernel for 9 rows"),
        ({"kernel": "stream", "block_m": 4}, 1, "block_m must be at least 8 for stream 4x4x512"),
        ({"kernel": "stream", "block_m": 8}, 1, "block_n must be at least 8 for stream 8x4x512"),
        (
            {"kernel": "stream", "block_m": 8, "block_n": 8, "num_warps": 32},
            1,
            "block_k must be at least 1024 for stream",
        ),
        ({"kernel": "persistent"}, 16, "'persistent' is no kernel for 16 rows"),
        ({"kernel": "library"}, 16, "'library' is no kernel for 16 rows"),
        ({"block_n": 3}, 1, "block_n must be a power of two, found 3"),
        ({"block_k": 64.0}, 1, "block_k must be a power of two, found 64.0"),
        ({"num_warps": 0}, 1, "num_warps must be a power of two, found 0"),
        ({"lines": -1}, 1, "lines must be from 0 to 1024, found -1"),
        ({"splits": 65}, 1, "splits must be from 1 to 64, found 65"),
        ({"kernel": "sparse", "block_m": 8, "splits": 2}, 8, "'sparse' has 1 or 16 rows"),
        ({"kernel": "sparse", "block_m": 16}, 4, "and splits, found sparse"),
        ({"kernel": "sparse", "splits": 2}, 2, "'sparse' is no kernel for 2 rows"),
        ({"kernel": "sparse", "splits": 2, "block_n": 64}, 1, "tiles of 128 columns"),
        ({"kernel": "sparse", "splits": 2, "block_n": 128, "block_k": 8}, 1, "16 deep"),
        ({"pdl": 1}, 1, "pdl must be true or false, found 1"),
    ],
)
def test_a_plan_that_cannot_run(change: dict[str, Any], rows: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(A_PLAN, **change).check(rows, HALF)


@pytest.mark.parametrize(
    ("N", "K"), [(768, 3072), (2048, 8192), (4096, 16384), (7168, 28672), (9216, 36864), (128, 300)]
)
@pytest.mark.parametrize("format", [None, "int8", "fp8", "int4"])
def test_plans_that_skip_zeros(format: str | None, N: int, K: int) -> None:
    for M in range(1, 18):
        linear = Linear(M, N, K, HALF, k_contiguous=False, format=format, sparse=True)
        plan = choose(linear, HOPPER)
        assert (plan.kernel == "sparse") == (M <= 16)
        for other in (
            linear._replace(sparse=False),
            linear._replace(dtype=torch.float32),
            linear._replace(N=N + 8),
        ):
            assert choose(other, HOPPER).kernel != "sparse"
        if M <= 16:
            plan.check(M, HALF)
            weight = torch.empty((K, N), dtype=HALF, device="meta").t()
            if format is not None:
                config = QuantizationConfig(format=format)  # pyright: ignore
                weight = stored_by_input(blank((N, K), config, "meta"))
            assert launchers.skippable(plan, weight)
            assert launchers.chunk_of(plan, K) * (plan.splits - 1) < K
            assert " sparse " in linear.key


def test_when_it_pays_to_skip_zeros() -> None:
    """Not for small weights, nor for few zeros."""
    for N, K, most, format in (
        (768, 3072, 0.0, None),
        (2048, 8192, 0.0, None),
        (4096, 16384, 0.70, None),
        (4096, 16384, 0.27, "int8"),
        (4096, 16384, 0.06, "int4"),
        (7168, 28672, 0.10, "int4"),
    ):
        linear = Linear(1, N, K, HALF, format=format)
        assert not tuning.pays_to_skip(linear, 1.0)
        assert not tuning.pays_to_skip(linear, most + 0.01)
        assert most == 0.0 or tuning.pays_to_skip(linear, most - 0.01)


@pytest.mark.parametrize("kernel", ["stream", "decode"])
def test_decode_is_not_for_float32(kernel: str) -> None:
    with pytest.raises(ValueError, match="no kernel for 2 rows"):
        Plan(kernel=kernel, block_m=16, block_n=16, block_k=256).check(2, torch.float32)


def test_tma_is_not_for_float32() -> None:
    with pytest.raises(ValueError, match="no kernel for 64 rows"):
        Plan(kernel="persistent", block_m=64, block_n=64, block_k=64).check(64, torch.float32)


# --- tables -----------------------------------------------------------------------------------


def test_a_saved_plan_is_used(table: Path) -> None:
    assert tuning.plan(A_LINEAR, GPU, ADA) == choose(A_LINEAR, ADA) != A_PLAN
    save(table, GPU, {A_LINEAR.key: A_PLAN})
    assert tuning.plan(A_LINEAR, GPU, ADA) == A_PLAN
    assert tuning.plan(A_LINEAR._replace(dtype=torch.bfloat16), GPU, ADA) == A_PLAN
    for other in (
        A_LINEAR._replace(M=2),
        A_LINEAR._replace(N=3073),
        A_LINEAR._replace(gated=True),
        A_LINEAR._replace(k_contiguous=False),
        A_LINEAR._replace(dtype=torch.float32),
    ):
        assert tuning.plan(other, GPU, ADA) == choose(other, ADA)
    assert tuning.plan(A_LINEAR, "NVIDIA A100", AMPERE) == choose(A_LINEAR, AMPERE)


def test_rows_between_take_the_next_larger_plan(table: Path) -> None:
    tiled = Plan(kernel="tiled", block_m=64, block_n=64, block_k=64)
    save(table, GPU, {A_LINEAR._replace(M=64).key: tiled})
    for M in (33, 50, 64):
        assert tuning.plan(A_LINEAR._replace(M=M), GPU, ADA) == tiled
    assert tuning.plan(A_LINEAR._replace(M=65), GPU, ADA) != tiled


def test_tables_are_merged(table: Path) -> None:
    other = A_LINEAR._replace(M=2)
    decode = Plan(kernel="decode", block_m=2, block_n=16, block_k=64)
    save(table, "NVIDIA A100", {A_LINEAR.key: A_PLAN})
    save(table, GPU, {A_LINEAR.key: A_PLAN})
    save(table, GPU, {other.key: decode})
    assert parse(json.loads(table.read_text()), GPU) == {A_LINEAR.key: A_PLAN, other.key: decode}
    assert parse(json.loads(table.read_text()), "NVIDIA A100") == {A_LINEAR.key: A_PLAN}
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_a_table_is_replaced_in_one_step(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(table, GPU, {A_LINEAR.key: A_PLAN})
    before = table.read_text()

    def fails(*arguments: object, **options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", fails)
    with pytest.raises(OSError, match="no space"):
        save(table, GPU, {A_LINEAR._replace(M=4).key: A_PLAN})
    assert table.read_text() == before
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def damaged(content: dict[str, Any]) -> dict[str, Any]:
    content["devices"][GPU]["plans"][A_LINEAR.key]["block_n"] = "four"
    return content


def other_format(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "format": 99}


def other_triton(content: dict[str, Any]) -> dict[str, Any]:
    content["devices"][GPU]["triton"] = "2.0.0"
    return content


def other_gpu(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "devices": {"NVIDIA A100": content["devices"][GPU]}}


def unknown_field(content: dict[str, Any]) -> dict[str, Any]:
    content["devices"][GPU]["plans"][A_LINEAR.key]["colour"] = "red"
    return content


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (damaged, "block_n must be a power of two, found 'four'"),
        (other_format, "format 99, not 1"),
        (other_triton, f"for Triton 2.0.0, not {triton.__version__}"),
        (other_gpu, f"for NVIDIA A100, not {GPU}"),
        (unknown_field, "colour"),
        (lambda content: [1, 2], "list indices"),
        (lambda content: {"format": 1}, "devices"),
        (None, "Expecting value"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_table_that_does_not_fit_is_ignored_with_one_warning(
    table: Path, change: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(table, GPU, {A_LINEAR.key: A_PLAN})
    content = json.loads(table.read_text())
    table.write_text("" if change is None else json.dumps(change(content)))
    with caplog.at_level(logging.WARNING):
        for M in (1, 2, 3):
            linear = A_LINEAR._replace(M=M)
            assert tuning.plan(linear, GPU, ADA) == choose(linear, ADA)
    ignored = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert len(ignored) == 1 and str(table) in ignored[0] and text in ignored[0]
    save(table, GPU, {A_LINEAR.key: A_PLAN})  # and tuning again repairs it
    assert tuning.plan(A_LINEAR, GPU, ADA) == A_PLAN


def test_one_hint_for_a_gpu_that_nobody_measured(
    table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for M in (1, 2, 3):
            tuning.plan(A_LINEAR._replace(M=M), GPU, ADA)
    (record,) = caplog.records
    assert "hf-triton-mlp tune" in record.getMessage() and GPU in record.getMessage()


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H100 PCIe"])
def test_the_measured_table(table: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    found = 0
    for case in CASES.values():
        for M in autotune.ROWS:
            for linear in linears(case, M, HALF):
                plan = tuning.plan(linear, name, HOPPER)
                plan.check(M, HALF)
                found += plan != choose(linear, HOPPER)
    assert found > 50 and not caplog.records
    save(table, name, {A_LINEAR.key: A_PLAN})  # what the user measured comes first
    assert tuning.plan(A_LINEAR, name, HOPPER) == A_PLAN


# --- measuring --------------------------------------------------------------------------------


def test_candidates_can_run() -> None:
    for case in (*CASES.values(), Case("odd", 33, 100), Case("gated", 100, 33, gated=True)):
        for M in autotune.ROWS:
            for linear in linears(case, M, HALF):
                for capability, processors in ((AMPERE, 108), (HOPPER, 132)):
                    plans = candidates(linear, capability, processors)
                    assert len(set(plans)) == len(plans) <= 160
                    for plan in plans:
                        plan.check(M, HALF)
                        assert plan.pdl == (capability == HOPPER)


def test_the_plan_in_use_is_tried_too(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name=GPU, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    linear = Linear(2, 2048, 8192, HALF)
    in_use = replace(choose(linear, HOPPER), block_n=64)
    save(table, GPU, {linear.key: in_use})
    tried = autotune.tried_plans(linear, ("skinny",))
    assert tried[0] == in_use and len(tried) > 10
    assert {plan.kernel for plan in tried[1:]} == {"skinny"}
    assert set(tried[1:]) < set(autotune.tried_plans(linear, tuning.KERNELS))


def test_persistent_candidates_fit_hopper() -> None:
    seen = 0
    for case in CASES.values():
        for M in autotune.ROWS:
            for linear in linears(case, M, HALF):
                gates = 2 if linear.gated else 1
                plans = [p for p in candidates(linear, HOPPER, 132) if p.kernel == "persistent"]
                assert (4 if M >= 32 else 0) <= len(plans) <= (12 if M >= 32 else 0)
                assert not [p for p in candidates(linear, AMPERE, 108) if p.kernel == "persistent"]
                for plan in plans:
                    # What two programs have of 228 KiB each; 32 float32 results of each thread
                    # change their layout, or wait as 16-bit values, beside the pipeline.
                    columns, together = plan.block_n * gates, plan.programs // 132
                    stage = (plan.block_m + columns) * plan.block_k * 2
                    used = stage * plan.num_stages + 4096 * plan.num_warps + 1536
                    assert used <= 228 * 1024 // together, plan
                    # wgmma takes 64 rows; the accumulator may take half a thread's registers.
                    assert plan.block_m >= 64
                    assert plan.block_m * columns <= 128 * 32 * plan.num_warps
                    assert plan.splits * plan.block_k <= linear.K
                seen += len(plans)
    assert seen
    (odd, _), (other, _) = linears(Case("odd", 33, 96), 64, HALF), linears(CASES["gpt2"], 64, HALF)
    for linear, whole in ((odd, False), (other, True)):
        assert whole == any(p.kernel == "persistent" for p in candidates(linear, HOPPER, 132))


def test_cases_of_a_model() -> None:
    with torch.device("meta"):
        model = tiny.build("gpt2")
    (case,) = cases_of(model, "tiny")
    intermediate = model.transformer.h[0].mlp.c_fc.nf
    assert (case.hidden, case.intermediate, case.bias) == (tiny.HIDDEN, intermediate, True)
    layer = random_layers(case, torch.float32, "cpu")[0]
    assert layer.up.shape == (intermediate, tiny.HIDDEN) and layer.gate is None
    (case,) = cases_of(tiny.build("opt"), "tiny")
    assert case.activation == "relu" and case.norm == "layer_norm"
    with pytest.raises(ValueError, match="no decoder layer"):
        cases_of(torch.nn.Linear(2, 2), "not a model")


@pytest.mark.gpu
def test_tune(table: Path) -> None:
    case, rows = Case("small", 256, 512), (1, 4, 32)
    seen: list[str] = []
    found = autotune.tune(
        [case], HALF, table, rows=rows, processes=4, progress=lambda what, *_: seen.append(what)
    )
    assert {"compiling kernels", "measuring"} == set(seen)
    plans = parse(json.loads(table.read_text()), torch.cuda.get_device_name())
    assert len(found) == len(rows) and len(plans) == 2 * len(rows)
    for case, M, measured in found:
        up, down = linears(case, M, HALF)
        assert plans[up.key] == measured.up and plans[down.key] == measured.down
        assert 0 < measured.us < 1000
        # Every candidate runs; none is wrong.
        assert {what for what, _, _ in measured.tried} == {"up", "down"}
        assert tuning.plan(up, torch.cuda.get_device_name(), HOPPER) == measured.up


@pytest.mark.gpu
def test_patched_models_use_the_table(table: Path) -> None:
    model = patch_model(tiny.build("opt").half().cuda())
    up = model.model.decoder.layers[0].fc1.weight
    plan = Plan(kernel="skinny", block_n=1, block_k=16, num_warps=1)
    save(table, torch.cuda.get_device_name(), {Linear(1, *up.shape, HALF).key: plan})
    assert "skinny 1x1x16, 1 warps" in str(patch_report(model))


# --- quantized layers -------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("form", "group"), [("int4", 128), ("int8", 0), ("int8", 17)])
@pytest.mark.parametrize("rows", [1, 4, 12, 16, 17, 64, 300, 2048])
def test_candidates_of_quantized_weights(rows: int, form: str, group: int, gated: bool) -> None:
    for N, K in ((16384, 4096), (4096, 16384), (7168, 28672), (1001, 4099)):
        linear = Linear(rows, N, K, torch.float16, True, gated, form, group)
        for capability, processors in ((AMPERE, 108), (HOPPER, 132)):
            found = candidates(linear, capability, processors)
            assert 0 < len(found) <= (18 if rows <= tuning.DECODE_ROWS else 60)
            assert found[0] == choose(linear, capability)
            for plan in found:
                plan.check(rows, torch.float16)
                assert plan.pdl == (capability == HOPPER)
                in_words = plan.kernel in ("quantized", "quantized_row")
                assert not in_words or (K % 32 == 0 and group != 17)
                assert plan.kernel != "quantized_row" or (rows == 1 and plan.block_k >= K)
                assert plan.splits == 1 or plan.splits * plan.block_k <= K


#: Rows, outputs, and what was the fastest on an H100: blocks of 8 outputs, warps, slices, stages
#: and splits.
FASTEST = {
    "int4": [
        (4, 16384, (4, 8, 4, 1, 1)),
        (4, 4096, (2, 8, 8, 2, 1)),
        (8, 16384, (8, 4, 4, 1, 1)),
        (16, 4096, (8, 4, 4, 1, 4)),
    ],
    "int8": [
        (4, 16384, (4, 4, 4, 2, 1)),
        (4, 4096, (2, 8, 8, 4, 1)),
        (16, 16384, (8, 4, 4, 1, 1)),
        (16, 4096, (4, 4, 4, 2, 2)),
    ],
}


@pytest.mark.parametrize("form", FASTEST)
def test_what_was_the_fastest_is_a_candidate(form: str) -> None:
    up_and_down = {16384: 4096, 4096: 16384}
    for rows, N, (high, warps, slices, stages, splits) in FASTEST[form]:
        group = 128 if form == "int4" else 0
        linear = Linear(rows, N, up_and_down[N], HALF, format=form, group=group)
        plan = Plan(
            kernel="quantized",
            block_m=rows,
            block_n=8 * high * warps // slices,
            block_k=slices * tuning.QUANTIZED_DEPTH,
            num_warps=warps,
            slices=slices,
            num_stages=stages,
            splits=splits,
            pdl=True,
        )
        assert plan in candidates(linear, HOPPER, 132)


@pytest.mark.parametrize(("form", "most"), [("int8", 512), ("int4", 256), ("fp8", 512)])
def test_tiles_of_prompts_are_for_hopper(form: str, most: int) -> None:
    """Others have too little shared memory for them, or nobody measured them there."""
    for gated in (False, True):
        linear = Linear(most, 4096, 16384, HALF, gated=gated, format=form, group=0)
        plan = choose(linear, HOPPER)
        assert plan.kernel == "tiled" and plan.block_m == (128 if gated else 256) and plan.pdl
        assert choose(linear._replace(M=most + 1), HOPPER).kernel == "library"
        assert choose(linear._replace(dtype=torch.float32), HOPPER).kernel == "library"
        for capability in (AMPERE, (10, 0), (12, 0)):
            assert choose(linear, capability).kernel == "library"


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_every_kind_of_plan_is_compared_before_patching(
    form: str, capability: tuple[int, int]
) -> None:
    group = 128 if form == "int4" else 0
    for N, K in ((16384, 4096), (4096, 16384)):

        def kind(rows: int, N: int = N, K: int = K) -> tuple[str, int]:
            plan = choose(Linear(rows, N, K, HALF, format=form, group=group), capability)
            return plan.kernel, plan.num_warps if plan.kernel == "tiled" else 0

        assert {kind(rows) for rows in QUANTIZED_ROWS} == {kind(rows) for rows in range(1, 2049)}


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_random_codes(form: str) -> None:
    """They have the keys of a patched model's, and values as large as those that are not codes."""
    config = quantization_of(form)
    case = Case("small", 96, 320, "silu", gated=True, quantization=config)
    layer = random_layers(case, HALF, "cpu")[0]
    for weight in (layer.up, layer.gate, layer.down):
        assert isinstance(weight, QuantizedWeight)
        real = quantize(torch.randn(weight.shape), config)
        assert weight[3:] == real[3:]
        for found, expected in zip(weight[:3], real[:3], strict=True):
            assert (found is None) == (expected is None)
            if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
                assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        values = weight.dequantize(torch.float32) * weight.shape[1] ** 0.5
        assert 0.9 < values.std() < 1.1 and abs(values.mean()) < 0.2 and values.abs().max() < 9
    for M in (1, 4, 64):
        up, down = linears(case, M, HALF)
        assert up == linear_of(M, layer.up, True, HALF) and up.format == form and up.gated
        assert down == linear_of(M, layer.down, False, HALF) and down.format == form


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_measured_plans_of_quantized_layers_are_used(
    form: str, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `tune`, whose measurements are made up here, to what runs."""
    gpu = SimpleNamespace(name=GPU, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(launchers, "gpu", lambda index: (GPU, HOPPER))
    monkeypatch.setattr(autotune, "compile_kernels", lambda *rest: [(1, 1)])
    monkeypatch.setattr(
        autotune, "random_layers", lambda case, dtype: random_layers(case, dtype, "cpu")
    )

    def measure(case: Case, layers: list[Any], M: int, *, kernels: Any) -> Measured:
        up, down = (autotune.tried_plans(linear, kernels)[-1] for linear in linears(case, M, HALF))
        return Measured(up, down, 1.0, [])

    monkeypatch.setattr(autotune, "measure", measure)
    case = Case("small", 2048, 1024, "silu", gated=True, quantization=quantization_of(form))
    found = autotune.tune([case], HALF, table, rows=(1, 4, 16, 128, 1024))
    layer = random_layers(case, HALF, "cpu")[0]
    kernels = set()
    for _, M, measured in found:
        for weight, gate, plan in (
            (layer.up, layer.gate, measured.up),
            (layer.down, None, measured.down),
        ):
            gated, N, K = gate is not None, *weight.shape
            default = choose(linear_of(M, weight, gated, HALF), HOPPER)
            assert plan != default or M > 512
            for dtype in (torch.float16, torch.bfloat16):
                assert launchers.plan_linear(M, weight, gated=gated, dtype=dtype) == plan
                x = torch.empty(M, K, dtype=dtype)
                assert launchers.executable(plan, x, weight, gate, NO_SUMMANDS) == plan
            # Nobody measured these.
            other = launchers.plan_linear(M, weight, gated=gated, dtype=torch.float32)
            assert other == choose(linear_of(M, weight, gated, torch.float32), HOPPER)
            plain = Linear(M, N, K, HALF, gated=gated)
            assert tuning.plan(plain, GPU, HOPPER) == choose(plain, HOPPER)
            kernels.add(plan.kernel)
    assert kernels == {"quantized_row", "quantized", "tiled", "library"}
    assert len(parse(json.loads(table.read_text()), GPU)) == 2 * len(found)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_tune_quantized_layers(form: str, table: Path) -> None:
    case, rows = Case("small", 512, 1024, quantization=quantization_of(form)), (1, 4, 32)
    found = autotune.tune([case], HALF, table, rows=rows, processes=4)
    plans = parse(json.loads(table.read_text()), torch.cuda.get_device_name())
    assert len(found) == len(rows) and len(plans) == 2 * len(rows)
    for _, M, measured in found:
        up, down = linears(case, M, HALF)
        assert plans[up.key] == measured.up and plans[down.key] == measured.down
        # Every candidate runs; none is wrong.
        assert {what for what, _, _ in measured.tried} == {"up", "down"}
