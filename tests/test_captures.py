"""What becomes of captured steps: how many are kept, and what makes them give way."""

import gc
import weakref
from typing import Any

import pytest
import tiny_models as tiny
import torch
from test_decoding import assert_same, generate, text_model

from hf_triton_mlp import capture, decoding, patch_model, patch_report, unpatch_model
from hf_triton_mlp.capture import Captures, Step, captures_of

pytestmark = pytest.mark.usefixtures("reasons")


def steps_of(model: Any) -> list[Step]:
    return list(captures_of(model)._steps.values())


def memory(device: str) -> int:
    """What tensors have on the GPU, 0 on the CPU."""
    gc.collect()
    if device == "cpu":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


# --- how many are kept --------------------------------------------------------------------------


@pytest.fixture
def room(device: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Memory for captures: as much as the caches of three texts need, and graphs have none."""
    model = text_model(device=device)
    generate(model, tiny.batch(device, rows=1), ours=True, max_new_tokens=2)
    [step] = steps_of(model)
    assert captures_of(model).nbytes == step.nbytes + step.graph_bytes
    monkeypatch.setattr(capture, "most_bytes", lambda device: 3 * step.nbytes)
    caches = property(lambda captures: sum(step.nbytes for step in captures._steps.values()))
    monkeypatch.setattr(Captures, "nbytes", caches)
    return 3 * step.nbytes


def test_captures_have_a_part_of_the_memory(device: str, room: int, reasons: list[str]) -> None:
    model = text_model(device=device)
    for rows in (1, 2, 1, 2):
        assert_same(model, tiny.batch(device, rows=rows), reasons, max_new_tokens=3)
    assert [step.shape.batch for step in steps_of(model)] == [1, 2]
    assert captures_of(model).nbytes <= room
    generate(model, tiny.batch(device, rows=2), ours=True, max_new_tokens=3, do_sample=True)
    assert [step.shape.greedy for step in steps_of(model)] == [False]


def test_one_that_is_too_large_goes_after_its_call(
    device: str, room: int, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    monkeypatch.setattr(decoding, "LEAST_CAPACITY", 16)
    monkeypatch.setattr(capture, "most_bytes", lambda device: room // 12)
    model = text_model(device=device)
    for _ in range(2):
        assert_same(model, tiny.batch(device), reasons, max_new_tokens=40)
        assert steps_of(model) == []


def test_the_report_says_what_memory_there_is(device: str) -> None:
    model = patch_model(text_model(device=device), cuda_graphs=True)
    generate(model, tiny.batch(device), ours=False)
    [step] = steps_of(model)
    said = patch_report(model).decoding
    assert f"{step.nbytes / 2**20:.1f} MiB of cache" in said
    assert f"the graphs' own memory: {step.graph_bytes / 2**20:.1f} MiB" in said
    assert (step.graph_bytes > 0) == (device == "cuda")


@pytest.mark.parametrize("fails", [1, 2])
def test_captures_make_room(
    fails: int, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    """Where there is no memory for one more, the others go; only then is there none."""
    model = text_model()
    generate(model, tiny.batch(rows=1), ours=True)
    [before] = steps_of(model)
    expected = generate(model, tiny.batch(), ours=False)
    left = [fails]
    run = Step.run

    def scarce(self: Step, *args: Any) -> None:
        if self is not before and left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError("full")
        run(self, *args)

    monkeypatch.setattr(Step, "run", scarce)
    assert torch.equal(generate(model, tiny.batch(), ours=True), expected)
    assert [step.shape.batch for step in steps_of(model)] == [2] * (fails == 1)
    assert len(reasons) == (fails == 2)


# --- and what frees them ------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
def test_unpatching_frees_captures(enabled: bool, device: str, reasons: list[str]) -> None:
    model = patch_model(text_model(device=device), cuda_graphs=enabled)
    unpatch_model(model)
    inputs = tiny.batch(device)
    expected = generate(model, inputs, ours=False)
    before = memory(device)
    patch_model(model, cuda_graphs=enabled)
    assert torch.equal(generate(model, inputs, ours=not enabled), expected) and reasons == []
    step = weakref.ref(steps_of(model)[0])
    unpatch_model(model)
    assert memory(device) == before and step() is None


def test_a_deleted_model_frees_captures(device: str) -> None:
    before = memory(device)
    model = patch_model(text_model(device=device), cuda_graphs=True)
    inputs = tiny.batch(device)
    generate(model, inputs, ours=False)
    step = weakref.ref(steps_of(model)[0])
    del model, inputs
    assert memory(device) == before and step() is None
