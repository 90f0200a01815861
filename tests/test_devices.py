"""Models that accelerate has put on several devices, or offloaded, patched before it and after."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from accelerate import (
    cpu_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from tiny_models import logits
from torch import nn
from transformers import AutoModelForCausalLM

from hf_triton_mlp import TritonMLP, patch_model, patch_report, unpatch_model
from hf_triton_mlp.density import hidden_densities
from hf_triton_mlp.reading import only_moves_inputs, read_projection

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ORDERS = ["before", "after"]
CHECKPOINTS = Path(__file__).with_name("checkpoints")


def generated(model: Any, device: str = "cpu") -> torch.Tensor:
    return model.generate(**tiny.batch(device), max_new_tokens=5, do_sample=False)


def places(
    model: nn.Module, family: str, layers: tuple[Any, ...], others: Any = "cpu"
) -> dict[str, Any]:
    """A device map: each decoder layer's place, and one for all the rest."""
    path = tiny.PLACES[family].layers
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    found = {name: others for name in leaves if not name.startswith(f"{path}.")}
    return {**found, **{f"{path}.{i}": place for i, place in enumerate(layers)}}


def dispatched(model: Any, family: str, folder: Path) -> Any:
    """One layer on the disk, and the rest with hooks that have nothing to move."""
    device_map = places(model, family, ("cpu", "disk", "cpu"))
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


def moved_only(model: Any) -> Any:
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


# --- hooks that only move inputs ------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_hooks_that_only_move_inputs(family: str, depth: str, order: str) -> None:
    """Every part of a layer has one where a model lies on two devices: its weights are read."""
    model = tiny.build(family)
    expected = logits(model)
    if order == "before":
        model = patch_model(moved_only(model), depth=depth)
        assert {row.verified for row in patch_report(model).rows} == {"yes"}
    else:
        model = moved_only(patch_model(model, depth=depth))
    assert {row.reason for row in patch_report(model).rows} == {""}
    tiny.prove(model)  # an error where anything is called
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    twin = copy.deepcopy(model)
    tiny.randomized(twin, seed=8)
    assert not torch.allclose(logits(twin), expected, **CLOSE)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    unpatch_model(model)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_what_a_hook_must_not_do_to_be_passed_over() -> None:
    def hooked(hook: AlignDevicesHook | None = None) -> nn.Linear:
        linear = nn.Linear(3, 2)
        return add_hook_to_module(linear, hook or AlignDevicesHook("cpu"))

    class Subclass(AlignDevicesHook):
        pass

    again = hooked()
    add_hook_to_module(again, AlignDevicesHook("cpu"), append=True)
    ours, replaced = hooked(), hooked()
    ours.forward = lambda x: x
    replaced._old_forward = lambda x: x
    outside = hooked(AlignDevicesHook("cpu"))
    outside._hf_hook.no_grad = True
    for linear in (hooked(AlignDevicesHook("cpu", offload=True)), hooked(Subclass("cpu")), again):
        assert not only_moves_inputs(linear) and read_projection(linear) is None
    for linear in (ours, replaced, outside):
        assert not only_moves_inputs(linear) and read_projection(linear) is None
    assert only_moves_inputs(hooked()) and read_projection(hooked()) is not None
    assert not only_moves_inputs(nn.Linear(3, 2))


# --- offloaded layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_report_says_what_is_offloaded(family: str, order: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    expected = logits(model)
    if order == "before":
        model = patch_model(dispatched(model, family, tmp_path))
    else:
        model = dispatched(patch_model(model), family, tmp_path)
    first, second, third = patch_report(model).rows
    down = tiny.PLACES[family].projections[1].rpartition(".")[2]
    assert second.reason.startswith("not plain, so called:")
    assert f"{down} (offloaded)" in second.reason and second.device == "meta"
    assert (first.reason, third.reason) == ("", "")
    torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_load_checkpoint_and_dispatch(family: str, order: str, tmp_path: Path) -> None:
    source = tiny.build(family)
    source.save_pretrained(tmp_path / "saved")
    expected, tokens = logits(source), generated(source)
    with init_empty_weights():
        model = type(source)(source.config).eval()
    model.tie_weights()
    if order == "after":
        patch_model(model)
        assert {row.reason for row in patch_report(model).rows} == {"waits for weights"}
    model = load_checkpoint_and_dispatch(
        model,
        str(tmp_path / "saved"),
        device_map=places(model, family, ("cpu", "disk", "cpu")),
        offload_folder=str(tmp_path / "offloaded"),
    )
    if order == "before":
        patch_model(model)
    assert [row.reason == "" for row in patch_report(model).rows] == [True, False, True]
    assert sum(isinstance(module, TritonMLP) for module in model.modules()) == tiny.LAYERS
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert torch.equal(generated(model), tokens)
    unpatch_model(model)
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_densities_of_a_dispatched_model(tmp_path: Path) -> None:
    """As of the same model in one place; tokens go where its weights come to."""
    model = tiny.build("opt")
    expected, offloaded = (
        hidden_densities(each, {layer: part.fc2 for layer, part in enumerate(parts)})  # type: ignore[misc]
        for each in (model, cpu_offload(copy.deepcopy(model), torch.device("cpu")))
        if (parts := tiny.decoder_layers("opt", each))
    )
    assert len(expected) == tiny.LAYERS and offloaded == expected
    on_disk = dispatched(model, "opt", tmp_path)
    downs = {layer: part.fc2 for layer, part in enumerate(tiny.decoder_layers("opt", on_disk))}
    assert hidden_densities(on_disk, downs) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["moved", "offloaded"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hooked_layers_are_not_quantized(family: str, which: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    model = moved_only(model) if which == "moved" else cpu_offload(model, torch.device("cpu"))
    expected = logits(model)
    before = tiny.tree(model)
    with pytest.raises(ValueError, match=r"hooks|meta device"):
        patch_model(model, quantization="int8")
    assert tiny.tree(model) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_capture_of_offloaded_layers(family: str, tmp_path: Path, reasons: list[str]) -> None:
    model = tiny.build(family)
    expected = generated(model)
    patch_model(dispatched(model, family, tmp_path), cuda_graphs=True)
    assert torch.equal(generated(model), expected)
    (reason,) = reasons
    assert "without CUDA graphs: the model is on cpu, meta" in reason


# --- two GPUs -------------------------------------------------------------------------------------

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def tokens_and_logits(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    with torch.no_grad():
        found = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, disable_compile=True)
    return tokens, found


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_on_two_gpus(
    family: str, dtype: torch.dtype, order: str, cuda_graphs: bool, reasons: list[str]
) -> None:
    original = tiny.build(family).to(dtype)
    reference = tiny.reference_of(original, dtype)

    def dispatch(model: Any) -> Any:
        return dispatch_model(model, places(model, family, (0, 1, 1), others=0))

    inputs = tiny.batch("cuda:0")
    tokens, theirs = tokens_and_logits(dispatch(copy.deepcopy(original)), inputs)
    if order == "before":
        model = patch_model(dispatch(original), cuda_graphs=cuda_graphs)
    else:
        model = dispatch(patch_model(original, cuda_graphs=cuda_graphs))
    rows = patch_report(model).rows
    assert [row.device for row in rows] == ["cuda:0", "cuda:1", "cuda:1"]
    assert all(row.plan.startswith("decode: ") and row.reason == "" for row in rows), rows
    found, ours = tokens_and_logits(model, inputs)
    exact = logits(reference)
    there = exact.isfinite()  # in float64 transformers' bloom makes NaN of padded texts
    assert there[0].all()
    tiny.assert_as_accurate(ours.cpu()[there], theirs.cpu()[there], exact[there])
    assert torch.equal(found, tokens) or dtype != torch.float32
    mlps = [module for module in model.modules() if isinstance(module, TritonMLP)]
    assert [mlp._bound is not None for mlp in mlps] == 3 * [True], "launches on both GPUs"
    assert [mlp._bound.launches.device_index for mlp in mlps if mlp._bound] == [0, 1, 1]
    if cuda_graphs:
        assert any("the model is on cuda:0, cuda:1" in reason for reason in reasons), reasons
    else:
        assert reasons == []


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_layer_across_two_gpus(family: str) -> None:
    """Its parts are called, as kernels run on one GPU."""
    up, _ = tiny.PLACES[family].projections
    path = tiny.PLACES[family].layers
    norm = tiny.PLACES[family].norms[1]
    for away in ([up], [up, norm], [norm]):
        model = tiny.build(family)
        expected = logits(model)
        if up in away and family == "llama":  # what it computes with both is where both are
            away = [*away, tiny.PLACES[family].gate, "mlp.act_fn"]
        device_map = places(model, family, (0, 0, 0), others=0)
        del device_map[f"{path}.1"]
        for name, module in model.get_submodule(f"{path}.1").named_modules():
            if not list(module.children()):
                device_map[f"{path}.1.{name}"] = 1 if name in away else 0
        patch_model(dispatch_model(model, device_map))
        for _ in range(2):
            found = logits(model, "cuda:0")
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt-pre-norm", "llama"])
def test_device_map_over_two_gpus(name: str) -> None:
    """Trained, as from_pretrained spreads it."""
    folder, family = CHECKPOINTS / name, name.partition("-")[0]
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    count = len(tiny.decoder_layers(family, plain))
    device_map = places(plain, family, tuple(int(i >= count // 2) for i in range(count)), others=0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval()
    inputs = {"input_ids": torch.arange(3, 19, device="cuda:0").view(2, 8)}
    tokens, theirs = tokens_and_logits(model, inputs)
    found, ours = tokens_and_logits(patch_model(model), inputs)
    assert {row.device for row in patch_report(model).rows} == {"cuda:0", "cuda:1"}
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert torch.equal(found, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_gpu_and_offloaded_layers(family: str, tmp_path: Path) -> None:
    """What stays on the GPU runs kernels; what comes from the CPU and the disk is called."""
    model = tiny.build(family)
    expected = logits(model)
    device_map = places(model, family, (0, "cpu", "disk"), others=0)
    model = dispatch_model(model, device_map, main_device=0, offload_dir=str(tmp_path))
    rows = patch_report(patch_model(model)).rows
    assert [row.reason == "" for row in rows] == [True, False, False]
    assert rows[0].plan.startswith("decode: ") and {row.plan for row in rows[1:]} == {"PyTorch"}
    for _ in range(2):
        found = logits(model, "cuda:0")
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
