"""The generate() benchmark, for real with tiny models, and what it shows of a record."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig
from typer.testing import CliRunner, Result

from hf_triton_mlp import bench, bench_generate, decoding, patch_model
from hf_triton_mlp.bench_generate import COMPILED, EAGER, MODELS, OURS, OURS_EAGER, WAYS, Way
from hf_triton_mlp.cli import app
from hf_triton_mlp.density import hidden_densities

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/results/bench-generate-h100.json"


def run(*arguments: object) -> Result:
    words = ["bench", "generate", *map(str, arguments)]
    return CliRunner().invoke(app, words, env={"COLUMNS": "100"})


def measured(
    monkeypatch: pytest.MonkeyPatch, ways: dict[str, Way], device: str = "cpu", **place: Any
) -> dict[str, Any]:
    """The one cell of a tiny GPT-2, with these contenders."""
    monkeypatch.setattr(bench_generate, "WAYS", ways)
    (usual,) = bench_generate.cells(["tiny"], ["float32"], [2], [5], [9])
    place = {**usual, **place}
    dtype = getattr(torch, place["dtype"])
    where = torch.device(device)
    record = bench_generate.bench_generate(
        [place], lambda *_: tiny.build("gpt2").to(where, dtype), device=where, rounds=2
    )
    (cell,) = record["cells"]
    return cell


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama, with heads that share keys, in a folder."""
    tiny.build("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(decoding, "ON_CPU", True)
    monkeypatch.chdir(model.parent)
    json_file, plot = tmp_path / "record.json", tmp_path / "plot.png"
    options = ("--prompt", 4, "--prompt", 7, "--new-tokens", 6, "--rounds", 3, "--device", "cpu")
    result = run("llama", "--batch", 2, *options, "--json", json_file, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert plot.stat().st_size > 10_000
    for text in ("hf_triton_mlp", "times transformers eager", "batch 2, 7 + 6 tokens", "captures"):
        assert text in result.output
    record = bench.read(json_file)
    assert record["device"] == "cpu" and not record["compiled"]
    assert [(cell["batch"], cell["prompt"]) for cell in record["cells"]] == [(2, 4), (2, 7)]
    for cell in record["cells"]:
        assert list(cell["contenders"]) == [EAGER, OURS_EAGER, OURS]
        for name, found in cell["contenders"].items():
            assert "failed" not in found
            rate = found["tokens_per_second"]
            least, most = rate["range"]
            assert 0 < least <= rate["quartiles"][0] <= rate["median"] <= most
            assert 0 < found["gap_ms"]["median"] <= found["gap_ms"]["p99"]
            assert found["first_token_ms"] > 0 and found["first_call_s"] > 0
            assert name == EAGER or found["equal_tokens"] == [6, 6]
        assert cell["contenders"][OURS]["capture_s"] > 0
        assert "batch 2, 256 tokens" in cell["contenders"][OURS]["graphs"]
        errors = cell["logits_error"]
        assert 0 < errors["transformers"] == errors["hf_triton_mlp"] < 1e-5
        assert cell["best_other"] in (EAGER, OURS_EAGER) and cell["speedup"]["median"] > 0

    result = run("llama", "--batch", 1, "--batch", 2, *options, "--json", json_file)
    assert result.exit_code == 0, result.output
    batches = [(cell["batch"], cell["run"]) for cell in bench.read(json_file)["cells"]]
    assert batches == [(1, 1), (1, 1), (2, 0), (2, 0)]
    assert bench.read(json_file)["cells"][2:] == record["cells"]
    result = run("llama", "--batch", 3, *options, "--json", json_file, "--seconds", -1)
    assert result.exit_code == 0 and "skipped for lack of time" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("no/such/folder",), "no/such/folder"),
        (("gpt2", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("gpt2", "--json", "no-such-folder/a.json"), "no-such-folder"),
        (("MODEL", "--prompt", 60, "--device", "cpu"), "64 positions, too few for a prompt of 60"),
    ],
)
def test_errors_take_one_line(model: Path, arguments: tuple[Any, ...], text: str) -> None:
    result = run(*(model if argument == "MODEL" else argument for argument in arguments))
    assert result.exit_code == 2
    assert text in " ".join(result.output.split()) and "Traceback" not in result.output


def test_records_of_other_benchmarks_are_refused() -> None:
    result = run("gpt2", "--json", ROOT / "benchmarks/results/mlp-h100.json", "--device", "cpu")
    assert result.exit_code == 2
    assert "benchmark None there, generate here" in " ".join(result.output.split())


def test_static_steps_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nothing has to be said for transformers to compile."""
    frames = []

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        assert options == {"mode": "reduce-overhead"}
        frames.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend)
    config._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    ways = {EAGER: WAYS[EAGER], OURS: WAYS[OURS]}
    ways["compiled"] = Way(options={**WAYS[COMPILED].options, "compile_config": config})
    cell = measured(monkeypatch, ways)
    assert frames and cell["contenders"]["compiled"]["equal_tokens"] == [9, 9]


def test_what_fails_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = bench_generate.Contender.generate

    def fail(self: Any, prompt: Any, tokens: int, streamer: Any = None) -> Any:
        if decoding.is_enabled(self.model):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, prompt, tokens, streamer)

    monkeypatch.setattr(bench_generate.Contender, "generate", fail)
    cell = measured(monkeypatch, {name: WAYS[name] for name in (EAGER, OURS_EAGER, OURS)})
    failed = cell["contenders"][OURS]
    assert failed == {"failed": "OutOfMemoryError: CUDA out of memory"}
    assert cell["speedup"] is None and cell["best_other"] in (EAGER, OURS_EAGER)
    record = {"cells": [cell]}
    (remark,) = bench_generate.remarks(record)
    assert remark.startswith(f"failed: {OURS}, tiny, float32, batch 2, 5 + 9 tokens: OutOf")
    assert bench_generate.markdown(record, "float32").endswith(" | - | - | - | - |")
    (table,) = bench_generate.tables(record)
    console = Console(width=100, record=True)
    console.print(table)
    assert re.search(r"tokens/s .* failed", console.export_text())


def test_quantized_contenders(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "ON_CPU", True)
    options = ("--prompt", 4, "--new-tokens", 6, "--rounds", 2, "--device", "cpu")
    formats = ("--quantization", "int8", "--quantization", "int4")
    result = run(model, *options, *formats, "--json", tmp_path / "record.json")
    assert result.exit_code == 0, result.output
    record = bench.read(tmp_path / "record.json")
    (cell,) = record["cells"]
    names = [EAGER, OURS_EAGER, OURS, f"{OURS} int8", f"{OURS} int4"]
    assert list(cell["contenders"]) == names and record["quantization"] == "int8, int4"
    assert cell["best_other"] in (EAGER, OURS_EAGER)
    whole = cell["bytes_per_step"]
    for name in names[3:]:
        found = cell["contenders"][name]
        assert "failed" not in found and "captured" in found["graphs"]
        assert found["bytes_per_step"]["weights"] < whole["weights"]
        assert found["bytes_per_step"]["keys_and_values"] == whole["keys_and_values"]
    assert f"| {names[3]} | {names[4]} |" in bench_generate.markdown(record, "float32")
    again = run(model, *options, "--json", tmp_path / "record.json")
    assert again.exit_code == 2 and "quantization int8, int4 there" in again.output


def test_where_texts_part(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Way(options={"repetition_penalty": 50.0})
    cell = measured(monkeypatch, {EAGER: WAYS[EAGER], "other": other, OURS: WAYS[OURS]}, prompt=9)
    found = cell["contenders"]["other"]
    assert cell["contenders"][OURS]["differences"] == [] and len(found["differences"]) == 2
    for each, equal in zip(found["differences"], found["equal_tokens"], strict=True):
        assert each["position"] == equal < 9
        assert each["margin"] > 0 and 0 < each["error"] < 1e-4
    assert cell["error_against"] == "float64"
    (remark,) = [each for each in bench_generate.remarks({"cells": [cell]}) if "part" in each]
    assert "2 of 2; at most by a margin of " in remark and "(against float64)" in remark


def test_a_failure_after_the_rounds_keeps_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(bench_generate.Contender, "gaps", fail)
    cell = measured(monkeypatch, {name: WAYS[name] for name in (EAGER, OURS)})
    assert all("no profiler" in found["failed"] for found in cell["contenders"].values())
    assert cell["best_other"] == EAGER and cell["speedup"]["median"] > 0
    (table,) = bench_generate.tables({"cells": [cell]})
    assert table.row_count == 5


def test_no_memory_for_a_wider_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any) -> Any:
        raise torch.OutOfMemoryError

    model = tiny.build("gpt2").half()
    patched = patch_model(bench_generate.twin(model))
    monkeypatch.setattr(bench_generate, "twin", full)
    judge = bench_generate.Judge(model, patched)
    tokens = torch.arange(4)[None]
    assert judge.against == "transformers" and judge.logits_errors(tokens) is None
    with torch.no_grad():
        parting = judge.parting(tokens, 3, 3)
    assert parting["margin"] == 0 and parting["error"] < 0.1


def test_sampled_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every contender has the same random numbers."""
    monkeypatch.setattr(decoding, "ON_CPU", True)
    ways = {name: WAYS[name] for name in (EAGER, OURS)}
    cells = [measured(monkeypatch, ways, sampled=sampled) for sampled in (False, True)]
    assert [cell["contenders"][OURS]["equal_tokens"] for cell in cells] == [[9, 9]] * 2
    assert "sampled" in bench_generate._title(cells[1])
    cell = cells[1]
    expected = [[3, 5], [4, 6]], [[3, 5], [4, 7]]
    different = bench_generate._compare(None, torch.zeros((2, 1), dtype=torch.int64), *expected)
    assert different == {"equal_tokens": [2, 1], "differences": [{"text": 1, "position": 1}]}
    assert bench_generate._partings(cell, different["differences"]) == "1 of 2"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bytes_per_step(family: str) -> None:
    model = tiny.build(family).half()
    place = {"batch": 3, "prompt": 10, "new_tokens": 4}
    with torch.no_grad():
        found = bench_generate.bytes_per_step(model, place)
    embeddings = {"gpt2": ["wpe"], "opt": ["embed_positions"], "llama": ["embed_tokens"]}
    only_indexed = [
        weight.nbytes
        for name, weight in model.named_parameters()
        if name.split(".")[-2] in embeddings.get(family, [])
    ]
    if model.config.tie_word_embeddings and family == "llama":
        only_indexed = []
    every = sum(weight.nbytes for weight in model.parameters())
    assert found["weights"] == every - sum(only_indexed)
    heads = getattr(model.config, "num_key_value_heads", None) or tiny.HEADS
    each = 2 * tiny.LAYERS * heads * tiny.HEAD_DIM * 2
    assert found["keys_and_values"] == 3 * 12 * each


def test_twins_share_weights() -> None:
    """Also with one that is patched, but for GPT-2's Conv1D, which patching lays out anew."""
    model = tiny.build("gpt2")
    before = {name: (w.data_ptr(), w.stride()) for name, w in model.named_parameters()}
    other = patch_model(bench_generate.twin(model), cuda_graphs=True)
    assert {name: (w.data_ptr(), w.stride()) for name, w in model.named_parameters()} == before
    own = {name for name, w in other.named_parameters() if w.data_ptr() != before[name][0]}
    assert all(".mlp." in name or ".attn." in name for name in own)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert type(model) is not type(other)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2", 124),
        ("opt-1.3b", 1315),
        ("opt-6.7b", 6658),
        ("bloom-7b1", 7069),
        ("llama-3.1-8b", 8030),
    ],
)
def test_published_configurations(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]))
    assert sum(weight.numel() for weight in model.parameters()) // 1_000_000 == millions
    assert len(MODELS) == 5


def test_random_model(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97}
    monkeypatch.setitem(MODELS, "small", small)
    model = bench_generate.random_model("small", "bfloat16", torch.device("cpu"))
    assert model.dtype == torch.bfloat16 and not model.training
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)


@pytest.mark.parametrize("zeros", [0.0, 0.95])
def test_random_model_with_zeros(zeros: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 256, "ffn_dim": 512, "word_embed_proj_dim": 256, "vocab_size": 97}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(MODELS, "small", {"model_type": "opt", **sizes})
    model = bench_generate.random_model("small", "float32", torch.device("cpu"), zeros)
    downs = {str(i): layer.fc2 for i, layer in enumerate(model.model.decoder.layers)}
    found = hidden_densities(model, downs)
    assert len(found) == 2
    assert all(each == pytest.approx(1 - zeros, abs=0.02) for each in found.values())
    result = run("small", "--zeros", zeros, "--rounds", 2, "--new-tokens", 3, "--device", "cpu")
    assert result.exit_code == 0 and "hf_triton_mlp dense" in " ".join(result.output.split())


def test_zeros_of_models_without() -> None:
    result = run("gpt2", "--zeros", 0.9, "--device", "cpu")
    assert result.exit_code == 2 and "gpt2 has no ReLU" in " ".join(result.output.split())


def test_readme_says_whether_there_is_a_record() -> None:
    """What its table shows, test_bench.py compares."""
    readme = (ROOT / "README.md").read_text()
    name = RECORD.relative_to(ROOT).as_posix()
    assert (f"<!-- {name}, float16 -->" in readme) == RECORD.exists()
    assert (f"`{name}` does not exist yet" in readme) != RECORD.exists()


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = measured(monkeypatch, WAYS, "cuda", dtype="float16")
    assert list(cell["contenders"]) == list(WAYS)
    for found in cell["contenders"].values():
        assert "failed" not in found
        assert found["peak_memory"] > 0 and found["of_limit"] > 0
        assert found["launches_per_step"] >= 1
    launches = [cell["contenders"][name]["launches_per_step"] for name in (EAGER, OURS_EAGER, OURS)]
    assert launches == sorted(launches, reverse=True)
    assert cell["contenders"][OURS]["capture_s"] > 0
    for each in cell["contenders"][OURS]["differences"]:
        assert each["margin"] <= 4 * each["error"]
