"""The command line on the bundled checkpoints and on a model that must fail."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from hf_triton_mlp import cli
from hf_triton_mlp.autotune import Measured
from hf_triton_mlp.cli import app
from hf_triton_mlp.measure import Case
from hf_triton_mlp.quantizer import quantization_of
from hf_triton_mlp.specs import specs
from hf_triton_mlp.tuning import Plan

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAMES = ["bloom", "gemma", "gpt2", "llama", "opt-post-norm", "opt-pre-norm"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )


@pytest.mark.parametrize("name", NAMES)
def test_validate_each_checkpoint(name: str, tmp_path: Path) -> None:
    options = ("--text", CHECKPOINTS / "heldout.txt", "--json", tmp_path / "out.json")
    result = run("validate", CHECKPOINTS / name, *options)
    assert result.exit_code == 0, result.output
    assert "validated" in result.output and "left-padded" in result.output
    reports = json.loads((tmp_path / "out.json").read_text())
    assert reports[0]["dtype"] == "float32" and len(reports) >= 2
    assert 15 < reports[0]["perplexity_original"] < 40


@pytest.mark.parametrize("depth", ["layer", "mlp"])
def test_validate_fails_with_status_1(depth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_model = cli.patch_model

    def wrong_patch(model: Any, depth: str) -> Any:
        """What a patch of a look-alike architecture would do."""
        model.transformer.h[2].mlp.act = torch.nn.ReLU()
        return patch_model(model, depth=depth)

    monkeypatch.setattr(cli, "patch_model", wrong_patch)
    options = ("--dtype", "float32", "--depth", depth)
    result = run("validate", CHECKPOINTS / "gpt2", *options)
    assert result.exit_code == 1, result.output
    assert "failed" in result.output and "logits: RMS error" in result.output


def test_demo() -> None:
    result = run("demo", "gpt2", "opt-post-norm", "--checkpoints", CHECKPOINTS)
    assert result.exit_code == 0, result.output
    assert "original: In the beginning" in result.output
    assert "patched: In the beginning" in result.output
    assert "attention residual + norm + MLP + residual" in result.output


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0
    for text in (
        "gpt2",
        "bloom",
        "opt",
        "OPTDecoderLayer",
        "transformers",
        "device:",
        "quick_gelu",
    ):
        assert text in result.output


@pytest.mark.parametrize("name", ["opt-pre-norm", "opt-post-norm"])
def test_density(name: str) -> None:
    result = run("info", "--density", CHECKPOINTS / name, "--text", CHECKPOINTS / "heldout.txt")
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:] for line in result.output.splitlines() if "layers." in line]
    assert len(rows) == 4
    for _, one, four, sixteen, drawn, decode, _ in rows:
        parts = [float(part.strip(" %")) for part in (one, four, sixteen)]
        assert 0 < parts[0] < parts[1] < parts[2] < 100 and parts[0] < 50
        assert drawn.count("█") == round(0.4 * parts[0])
        assert "dense" in decode  # so small that it cannot pay


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("info", "--density", CHECKPOINTS / "gpt2"), "has no relu or relu2"),
        (("info", "--density", "no/such/folder"), "no/such/folder"),
        (("validate", "no/such/folder"), "no/such/folder"),
        (("validate", CHECKPOINTS / "gpt2", "--dtype", "int8"), "int8"),
        (("validate", CHECKPOINTS / "gpt2", "--depth", "deep"), "deep"),
        (("validate", CHECKPOINTS / "opt-pre-norm", "--depth", "mlp"), "inline"),
        (("validate", CHECKPOINTS / "gpt2", "--text", "no-such-file"), "no-such-file"),
        (("validate", "no [such] folder"), "no [such] folder"),
        (("validate", CHECKPOINTS / "gpt2", "--device", "cuda:99"), "cuda:99"),
        (("validate", CHECKPOINTS / "gpt2", "--device", "nonsense"), "nonsense"),
        (("validate", CHECKPOINTS / "gpt2", "--prompt", ""), "input_ids"),
        (("validate", CHECKPOINTS / "gpt2", "--max-new-tokens", "9999"), "9999 new tokens"),
        (("validate", CHECKPOINTS / "gpt2", "--json", "no-such-folder/a.json"), "no-such-folder"),
        (("demo", "--checkpoints", "no-such-folder"), "no-such-folder"),
        (("demo", "t5", "--checkpoints", CHECKPOINTS), "t5"),
        (("tune",), "name a model"),
        (("tune", "--case", "gpt3"), "unknown case 'gpt3'; there are gpt2,"),
        (("tune", "--case", "gpt2", "--kernel", "magic"), "unknown kernel 'magic'"),
        (("tune", "--case", "gpt2", "--quantization", "int3"), "unknown quantization 'int3'"),
        (("bench", "mlp", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("bench", "generate", "gpt2", "--quantization", "int3"), "unknown quantization 'int3'"),
        (("validate", CHECKPOINTS / "gpt2", "--quantization", "int3"), "format is 'int3'"),
    ],
)
def test_errors_take_one_line(arguments: tuple[object, ...], text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert text in result.output and "Traceback" not in result.output


def test_an_empty_text_is_not_the_default_one(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    options = ("--dtype", "float32", "--text", tmp_path / "empty.txt")
    result = run("validate", CHECKPOINTS / "gpt2", *options)
    assert result.exit_code == 2 and "two tokens" in result.output


def test_damaged_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / "gpt2", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    result = run("validate", tmp_path, "--dtype", "float32")
    assert result.exit_code == 2 and "cannot load" in result.output


def test_unsupported_model(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=1024, hidden_size=16, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / "gpt2" / file, tmp_path)
    result = run("validate", tmp_path, "--dtype", "float32")
    assert result.exit_code == 2
    for family in ("gpt2", "bloom", "opt"):
        assert family in result.output


def test_the_readme_names_every_family() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme[readme.index("| family | depths |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table]
    named = {(family, depths) for families, depths in rows for family in families.split(", ")}
    assert named == {(spec.family, ", ".join(spec.depths)) for spec in specs()}


@pytest.mark.parametrize("options", [("--format", "int8"), ("--format", "int4", "--refine")])
def test_quantize(options: tuple[str, ...], tmp_path: Path) -> None:
    place, report = tmp_path / "model", tmp_path / "report.json"
    text = "--text", CHECKPOINTS / "heldout.txt"
    result = run(
        "quantize", CHECKPOINTS / "llama", place, *options, *text, "--dtype", "float32",
        "--exclude", "model.layers.0", "--json", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output and "nats a token" in result.output
    assert "MB" in result.output and "ms a token" in result.output
    found = json.loads(report.read_text())
    ratio = found["perplexity_quantized"] / found["perplexity_original"]
    limit = {"int8": 1.01, "int4": 1.1}[options[1]]
    assert 1 / limit < ratio < limit and 0 < found["kl_divergence"] < limit - 1
    errors = found["weight_errors"]
    assert len(errors) == 9 and "model.layers.0.mlp.up_proj" not in errors
    assert all(0 < error < limit for error in errors.values())
    assert found["bytes_quantized"] < 0.75 * found["bytes_original"]
    assert found["ms_per_token_original"] > 0 and found["ms_per_token_quantized"] > 0
    # What is saved is a model like any, and validates as such.
    again = run("validate", place, *text, "--dtype", "float32")
    assert again.exit_code == 0, again.output
    refused = run("quantize", CHECKPOINTS / "llama", place)
    assert refused.exit_code == 2 and "is not empty" in refused.output


def test_validate_a_quantization(tmp_path: Path) -> None:
    result = run(
        "validate", CHECKPOINTS / "gpt2", "--quantization", "int4", "--dtype", "float32",
        "--text", CHECKPOINTS / "heldout.txt", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("validated", "int4, float32", "nats a token", "ms a token", "h.0.mlp.c_fc"):
        assert text in result.output
    (report,) = json.loads((tmp_path / "out.json").read_text())
    cost = report["quality"]
    assert report["perplexity_original"] > 1.01 * cost["perplexity_original"]
    assert cost["perplexity_quantized"] == pytest.approx(report["perplexity_patched"])


def test_tune_measures_the_formats_that_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Case] = []

    def tune(cases: list[Case], dtype: torch.dtype, path: Path, **options: Any) -> Any:
        seen.extend(cases)
        plan = Plan(kernel="library")
        return [(case, 64, Measured(plan, plan, 1.0, [])) for case in cases]

    monkeypatch.setattr(cli, "_need_gpu", lambda: None)
    monkeypatch.setattr(cli.autotune, "tune", tune)
    place = "tune", CHECKPOINTS / "llama", "--case", "gpt2", "--json", tmp_path / "plans.json"
    result = run(*place)
    assert result.exit_code == 0, result.output
    assert [case.quantization for case in seen] == [None, None] and "int8" not in result.output
    seen.clear()
    result = run(*place, "--quantization", "int8", "--quantization", "int4")
    assert result.exit_code == 0, result.output
    assert len(seen) == 4 and {case.gated for case in seen} == {True, False}
    # As patch_model(quantization=…) quantizes.
    formats = quantization_of("int8"), quantization_of("int4")
    assert [case.quantization for case in seen] == [*formats, *formats]
    assert "768, 3072, int8" in result.output and "768, 3072, int4" in result.output
    seen.clear()
    assert run(*place).exit_code == 0
    whole, seen[:] = seen.copy(), []
    assert run(*place, "--ranks", "2").exit_code == 0
    assert seen == [replace(case, intermediate=case.intermediate // 2) for case in whole]
    result = run(*place, "--ranks", "5")
    assert result.exit_code == 2 and "is not a multiple of 5" in result.output
