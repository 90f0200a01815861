"""What is said of every causal language model of the installed transformers."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import transformers
from test_cli import run

from hf_triton_mlp import support
from hf_triton_mlp.support import KINDS, every_support

README = Path(__file__).parents[1] / "README.md"
COMMAND = "python -m hf_triton_mlp.support README.md"


def test_every_model_type_is_classified() -> None:
    """One that cannot be built as its config is by default wants an entry in support.NEEDED."""
    every = every_support()
    assert [each.model_type for each in every] == list(support.model_types())
    unknown = [each for each in every if each.kind not in KINDS]
    assert not unknown, f"say in support.NEEDED what these need: {unknown}"
    assert all(each.detail for each in every)


@pytest.mark.parametrize(
    ("model_type", "kind", "detail"),
    [
        ("gpt2", "fused layer", "GPT2Block"),
        ("llama", "fused layer", "LlamaDecoderLayer"),
        ("exaone4", "fused layer", "Exaone4DecoderLayer"),
        ("emu3", "MLP", "Emu3DecoderLayer"),
        ("xlm", "by structure", "TransformerFFN"),
        ("deepseek_v3", "dense MLPs only", "3 of 61, DeepseekV3MLP; not DeepseekV3MoE"),
        ("mixtral", "mixture of experts", "MixtralSparseMoeBlock"),
        ("deepseek_v4", "mixture of experts", "DeepseekV4SparseMoeBlock"),
        (
            "apertus",
            "refused",
            "model.layers.0: its activation XIELUActivation has parameters of its own, which no "
            "kernel reads",
        ),
        ("bitnet", "MLP of another form", "BitNetMLP"),
        ("mvp", "MLP not in one module", "MvpDecoderLayer"),
        ("mamba", "no MLP", "MambaBlock"),
    ],
)
def test_support(model_type: str, kind: str, detail: str) -> None:
    [found] = [each for each in every_support() if each.model_type == model_type]
    assert (found.kind, found.detail) == (kind, detail)


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("gpt2", {"activation_function": "tanh"}, "unsupported activation"),
        ("bloom", {"pretraining_tp": 2, "slow_but_exact": True}, "refused"),
        ("opt", {}, "fused layer"),
        ("olmo2", {}, "fused layer"),
    ],
)
def test_other_configs(family: str, changes: dict[str, Any], kind: str) -> None:
    assert support.classify(tiny.build(family, **changes))[0] == kind


def test_what_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.NEEDED, "gpt2", {"n_head": 5})
    found = support.support("gpt2")
    assert found.kind == "unknown" and "ValueError" in found.detail


def test_the_readme_has_the_table() -> None:
    found = support.MARKED.search(README.read_text())
    assert found is not None, f"no table in the README: run `{COMMAND}`"
    assert COMMAND in found[1]
    table = found[0].removeprefix(found[1]).removesuffix(found[2])
    version = re.search(r"transformers ([\w.]+)", table)
    if version is not None and version[1] != transformers.__version__:
        pytest.skip(f"the table is of transformers {version[1]}")
    assert table == support.markdown(), f"the README's table is out of date: run `{COMMAND}`"


def test_the_table_is_written_between_its_markers(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(
        "before\n<!-- support: x -->\nold\n<!-- end -->\n<!-- other -->\n<!-- end -->\n"
    )
    for _ in range(2):
        support.write(file)
        start, rest = file.read_text().split("<!-- support: x -->\n")
        table, end = rest.split("<!-- end -->", 1)
        assert start == "before\n" and end == "\n<!-- other -->\n<!-- end -->\n"
        assert table == support.markdown()
    file.write_text("nothing")
    with pytest.raises(ValueError, match="support"):
        support.write(file)


def test_info_lists_every_model_type() -> None:
    result = run("info")
    assert result.exit_code == 0
    rows = [
        re.split(r"\s*[│┃]\s*", line)[1:3] for line in result.output.splitlines() if "│" in line
    ]
    every = every_support()
    listed = {tuple(row) for row in rows}
    assert {(each.model_type, each.kind) for each in every} <= listed
    for kind, count in Counter(each.kind for each in every).items():
        assert f"{kind}: {count} of {len(every)}" in result.output
