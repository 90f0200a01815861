"""MLPs whose weights the ranks of a group share, against unshared ones: gloo, and on GPUs NCCL."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import parallel_cases
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from parallel_cases import KINDS

from hf_triton_mlp import MLPConfig, TritonMLP
from hf_triton_mlp.kernels import INTERPRETED

pytestmark = pytest.mark.skipif(
    not dist.is_available() or INTERPRETED, reason="needs torch.distributed; starts interpreters"
)

#: Seconds for all cases of a kind; on GPUs most kernels are compiled first.
LIMIT, LIMIT_ON_GPUS = 280, 560


def run_ranks(kind: str, folder: Path) -> dict[str, str | None]:
    """Run all cases of a kind in as many processes, and tell what came of each."""
    size, _ = KINDS[kind]
    results = folder / "results"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if kind == "interpreted":
        environment["TRITON_INTERPRET"] = "1"
    logs = [(folder / f"rank{rank}").open("w") for rank in range(size)]
    processes = [
        subprocess.Popen(
            [sys.executable, parallel_cases.__file__, kind, str(rank), str(folder / "init"),
             str(results)],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    ends = time.monotonic() + (LIMIT_ON_GPUS if kind == "gpus" else LIMIT)
    try:
        for process in processes:
            process.wait(max(0.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    lines = results.read_text().splitlines() if results.exists() else []
    found = {line["case"]: line["error"] for line in map(json.loads, lines)}
    tails = "\n".join(Path(log.name).read_text()[-1500:] for log in logs)
    return {"": tails, **found}


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> "Results":
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have folders of their own below the one that they share.
    return Results(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


class Results:
    """What came of the cases, which run once for all workers, when the first is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, kind: str, case: str) -> None:
        folder = self.folder / f"ranks-{kind}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "found.json").exists():
                folder.mkdir()
                (folder / "found.json").write_text(json.dumps(run_ranks(kind, folder)))
        found = json.loads((folder / "found.json").read_text())
        assert case in found, f"not reached; the ranks said:\n{found['']}"
        assert found[case] is None, found[case]


@pytest.mark.parametrize("case", KINDS["two"][1])
def test_two_ranks(case: str, results: Results) -> None:
    results.check("two", case)


@pytest.mark.parametrize("case", KINDS["four"][1])
def test_four_ranks(case: str, results: Results) -> None:
    results.check("four", case)


@pytest.mark.parametrize("case", KINDS["interpreted"][1])
def test_interpreted_kernels(case: str, results: Results) -> None:
    results.check("interpreted", case)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", KINDS["gpus"][1])
def test_two_gpus(case: str, results: Results) -> None:
    results.check("gpus", case)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, "-m", "hf_triton_mlp", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
def test_validate_under_torchrun(tmp_path: Path) -> None:
    checkpoint = Path(__file__).parent / "checkpoints" / "opt-pre-norm"
    run = torchrun("validate", checkpoint, "--dtype", "float32", "--json", tmp_path / "out.json")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("validated:") == 1  # by the first process alone
    (report,) = json.loads((tmp_path / "out.json").read_text())
    assert not report["failures"] and report["cases"][0]["difference"] is None


def test_without_a_group() -> None:
    assert not dist.is_initialized()
    config = MLPConfig(hidden_size=8, intermediate_size=16, mp_size=2)
    with pytest.raises(ValueError, match=r"mp_size is 2, and there is no mp_group"):
        TritonMLP(config)
    with pytest.raises(ValueError, match=r"init_process_group"):
        TritonMLP(config, mp_group=object())
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()
