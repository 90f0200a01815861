"""What people do with a model besides running it still works on a patched one, and both ways."""

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from tiny_models import logits
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.opt.modeling_opt import OPTDecoder

from hf_triton_mlp import TritonMLP, patch_model, patch_report, unpatch_model
from hf_triton_mlp.kernels import INTERPRETED

Change = Callable[[Any], Any]

#: A float32 sum in another order: some tens of eps after three layers, where values are around 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ORDERS = ["before", "after"]
CHECKPOINTS = Path(__file__).with_name("checkpoints")


def changed_and_patched(model: Any, change: Change, order: str) -> Any:
    """`model` with `change` made before or after patching it."""
    if order == "before":
        return patch_model(change(model))
    return change(patch_model(model))


def assert_changed_alike(model: Any, change: Change, order: str, device: str) -> Any:
    """`change` has an effect, and the same one on a patched model; returns that model."""
    base = logits(model, device)
    expected = logits(change(copy.deepcopy(model)), device)
    assert not torch.allclose(expected, base, **CLOSE), "the change has no effect to compare"
    changed = changed_and_patched(model, change, order)
    torch.testing.assert_close(logits(changed, device), expected, **CLOSE)
    return changed


def steps(model: Any, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step without an update."""
    inputs = tiny.batch()
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**inputs, use_cache=False).logits
    loss = F.cross_entropy(output[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "depth"), tiny.VARIANT_DEPTHS)
def test_gradients(variant: str, depth: str) -> None:
    model = tiny.build_variant(variant).train()
    loss, expected = steps(model)
    found_loss, found = steps(patch_model(model, depth=depth))
    torch.testing.assert_close(found_loss, loss, **CLOSE)
    assert expected
    assert_same_gradients(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_on_a_gpu(family: str, training: bool) -> None:
    model = tiny.build(family).cuda().train(training)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**tiny.batch("cuda"), use_cache=False).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    patch_model(model)
    assert_same_gradients(gradients(), expected)


DROPOUT = {
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.3),
    "bloom": dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.3),
    "opt": dict.fromkeys(("dropout", "attention_dropout"), 0.3),
    "llama": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_dropout(family: str, depth: str) -> None:
    model = tiny.build(family, **DROPOUT[family]).train()
    (loss, expected), (other_loss, _) = steps(model, seed=3), steps(model, seed=4)
    assert not torch.allclose(loss, other_loss)
    patch_model(model, depth=depth)
    for seed, value in ((3, loss), (4, other_loss), (3, loss)):
        found_loss, found = steps(model, seed)
        torch.testing.assert_close(found_loss, value, **CLOSE)
    assert_same_gradients(found, expected)
    model.eval()
    torch.testing.assert_close(logits(model), logits(unpatch_model(model)), **CLOSE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dropout_modules_switched_off(family: str, order: str) -> None:
    """Trainers switch dropout off by setting p of every nn.Dropout that they find."""

    def switch_off(model: Any) -> Any:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    model = tiny.build(family, **DROPOUT[family]).train()
    expected, _ = steps(switch_off(copy.deepcopy(model)))
    found, _ = steps(changed_and_patched(model, switch_off, order))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_checkpointing(family: str, order: str, reentrant: bool) -> None:
    def enable(model: Any) -> Any:
        arguments = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        return model

    model = tiny.build(family).train()
    loss, expected = steps(model)
    changed_and_patched(model, enable, order)
    calls: list[str] = []
    for layer in tiny.decoder_layers(family, model):
        attention = layer.get_submodule(tiny.PLACES[family].attention)
        attention.register_forward_pre_hook(lambda module, args: calls.append("attention"))
    found_loss, found = steps(model)
    torch.testing.assert_close(found_loss, loss, **CLOSE)
    assert_same_gradients(found, expected)
    assert len(calls) == 2 * tiny.LAYERS, "each layer runs once more in the backward pass"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_of_embeddings_through_frozen_weights(family: str) -> None:
    model = tiny.build(family).requires_grad_(False)
    embeddings = torch.randn(2, 5, tiny.HIDDEN, requires_grad=True)

    def gradient() -> torch.Tensor:
        embeddings.grad = None
        model(inputs_embeds=embeddings).logits.square().mean().backward()
        assert embeddings.grad is not None
        return embeddings.grad

    expected = gradient()
    patch_model(model)
    torch.testing.assert_close(gradient(), expected, **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_few_optimizer_steps(family: str) -> None:
    """An optimizer made before patching goes on, and its result outlives the patch."""
    pair = [tiny.build(family).train() for _ in range(2)]
    for model, is_patched in zip(pair, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if is_patched:
            patch_model(model)
        for _ in range(3):
            steps(model)
            optimizer.step()
    expected, found = (model.eval() for model in pair)
    assert not torch.allclose(logits(expected), logits(tiny.build(family)), **CLOSE)
    torch.testing.assert_close(logits(unpatch_model(found)), logits(expected), **CLOSE)


# --- forward and backward hooks -----------------------------------------------------------------


def places(family: str) -> list[str]:
    place = tiny.PLACES[family]
    mlp = ["mlp"] if family in tiny.MLP_FAMILIES else []
    dropout = ["mlp.dropout"] if family == "gpt2" else []
    gate = [] if place.gate is None else [place.gate]
    projections = [*place.projections, *gate]
    return [place.attention, *place.norms, *projections, place.activation, *mlp, *dropout]


HOOKED = [(family, path) for family in tiny.FAMILIES for path in places(family)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("family", "path"), HOOKED)
def test_a_hook_that_changes_an_output_acts(
    family: str, path: str, order: str, device: str
) -> None:
    """The effect is the unpatched model's, or the patch is refused; it is never dropped."""

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    def change(model: Any) -> Any:
        tiny.decoder_layers(family, model)[1].get_submodule(path).register_forward_hook(scale)
        return model

    model = tiny.build(family).to(device)
    try:
        assert_changed_alike(model, change, order, device)
    except ValueError as error:
        assert "hook" in str(error)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("family", "path"), HOOKED)
def test_a_hook_sees_what_it_saw(family: str, path: str, order: str) -> None:
    def record(model: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.extend(tensor.clone() for tensor in tiny.tensors((args, output)))

        tiny.decoder_layers(family, model)[1].get_submodule(path).register_forward_hook(hook)
        return seen

    model = tiny.build(family)
    original = copy.deepcopy(model)
    expected = record(original)
    logits(original)
    if order == "before":
        found = record(model)
        patch_model(model)
    else:
        found = record(patch_model(model))
    logits(model)
    assert len(found) == len(expected) > 0
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other, **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("use_cache", [False, True])
def test_attention_is_called_as_before(family: str, use_cache: bool, device: str) -> None:
    """A hook finds the same arguments under the same names."""
    seen: list[tuple[int, list[str]]] = []
    model = tiny.build(family).to(device)
    for layer in tiny.decoder_layers(family, model):
        layer.get_submodule(tiny.PLACES[family].attention).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((len(args), sorted(kwargs))), with_kwargs=True
        )
    with torch.no_grad():
        model(**tiny.batch(device), use_cache=use_cache)
        patch_model(model)(**tiny.batch(device), use_cache=use_cache)
    assert seen[: tiny.LAYERS] == seen[tiny.LAYERS :] and len(seen) == 2 * tiny.LAYERS


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("family", "path"), HOOKED)
def test_a_backward_hook_sees_what_it_saw(family: str, path: str, order: str) -> None:
    def record(model: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            grads = (*grad_input, *grad_output)
            seen.extend(grad.clone() for grad in grads if grad is not None)

        tiny.decoder_layers(family, model)[1].get_submodule(path).register_full_backward_hook(hook)
        return seen

    model = tiny.build(family).train()
    original = copy.deepcopy(model)
    expected = record(original)
    steps(original)
    if order == "before":
        found = record(model)
        patch_model(model)
    else:
        found = record(patch_model(model))
    steps(model)
    assert len(found) == len(expected) > 0
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other, **CLOSE)


@pytest.mark.parametrize("family", tiny.MLP_FAMILIES)
def test_hooks_on_the_mlp_outlive_the_patch(family: str) -> None:
    model = tiny.build(family)
    calls: list[type[nn.Module]] = []
    mlp = tiny.decoder_layers(family, model)[0].mlp
    early = mlp.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    patch_model(model)
    mlp.register_forward_pre_hook(lambda module, args: calls.append(type(module)))
    logits(model)
    assert len(calls) == 2 and all(issubclass(cls, TritonMLP) for cls in calls)
    unpatch_model(model)
    logits(model)
    assert calls[2:] == [type(mlp), type(mlp)] and not isinstance(mlp, TritonMLP)
    early.remove()
    logits(model)
    assert len(calls) == 5


def prune(module: nn.Module) -> None:
    weight = module.weight.detach().abs()  # l1_unstructured views a weight as one row: no Conv1D's
    torch.nn.utils.prune.custom_from_mask(module, "weight", weight > weight.median())


def parametrize(module: nn.Module) -> None:
    class Halved(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    torch.nn.utils.parametrize.register_parametrization(module, "weight", Halved())


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)  # type: ignore[method-assign]


def replace_weight(module: nn.Module) -> None:
    weight: Any = module.weight
    module.weight = nn.Parameter(weight.detach().t().contiguous().t() / 2)


def drop_bias(module: nn.Module) -> None:
    if type(module).__name__ == "Conv1D":
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    else:
        module.bias = None


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("which", [0, 1], ids=["up", "down"])
@pytest.mark.parametrize(
    "alter", [prune, parametrize, replace_forward, replace_weight, drop_bias],
    ids=lambda alter: alter.__name__,
)  # fmt: skip
def test_an_altered_projection_acts(
    family: str, which: int, alter: Callable[[nn.Module], None], order: str, device: str
) -> None:
    path = tiny.PLACES[family].projections[which]

    def change(model: Any) -> Any:
        alter(tiny.decoder_layers(family, model)[1].get_submodule(path))
        return model

    biases = {"mlp_bias": True} if family == "llama" else {}
    model = tiny.build(family, **biases).to(device)
    expected = logits(change(copy.deepcopy(model)), device)
    changed = assert_changed_alike(model, change, order, device)
    torch.testing.assert_close(logits(unpatch_model(changed), device), expected, **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_inference_mode(family: str, device: str) -> None:
    model = tiny.build(family).to(device)
    expected = logits(model, device)
    with torch.inference_mode():
        patch_model(model)
        found = model(**tiny.batch(device)).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(logits(model, device), expected, **CLOSE)


# --- accelerate ---------------------------------------------------------------------------------


class Scale(ModelHook):
    """Doubles what a module returns."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("family", "path"),
    [*HOOKED, *((family, "") for family in tiny.FAMILIES)],
)
def test_model_hooks_act(family: str, path: str, order: str, device: str) -> None:
    """A hook of accelerate's replaces the forward of one module, the layer itself included."""

    def change(model: Any) -> Any:
        layer = tiny.decoder_layers(family, model)[1]
        add_hook_to_module(layer.get_submodule(path), Scale())
        return model

    model = tiny.build(family).to(device)
    base, expected = logits(model, device), logits(change(copy.deepcopy(model)), device)
    changed = assert_changed_alike(model, change, order, device)
    torch.testing.assert_close(logits(unpatch_model(changed), device), expected, **CLOSE)
    remove_hook_from_module(changed, recurse=True)
    torch.testing.assert_close(logits(changed, device), base, **CLOSE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_model_hooks_removed_again(family: str, order: str) -> None:
    """Removing a hook leaves the bound forward on the instance; patch and unpatch cope with it."""

    def change(model: Any) -> Any:
        for module in model.modules():
            add_hook_to_module(module, Scale())
        remove_hook_from_module(model, recurse=True)
        return model

    model = tiny.build(family)
    base = logits(model)
    changed = changed_and_patched(model, change, order)
    assert patch_report(changed).rows[0].replaced != "-"
    torch.testing.assert_close(logits(changed), base, **CLOSE)
    torch.testing.assert_close(logits(unpatch_model(changed)), base, **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hooks_attached_before_and_removed_after_patching(family: str) -> None:
    model = tiny.build(family)
    base = logits(model)
    for layer in tiny.decoder_layers(family, model):
        add_hook_to_module(layer, Scale())
    patch_model(model)
    assert not torch.allclose(logits(model), base, **CLOSE)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(logits(model), base, **CLOSE)
    torch.testing.assert_close(logits(unpatch_model(model)), base, **CLOSE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cpu_offload(family: str, order: str, device: str) -> None:
    def offload(model: Any) -> Any:
        cpu_offload(model, execution_device=torch.device(device))
        return model

    def assert_offloaded() -> None:
        for layer in tiny.decoder_layers(family, model):
            assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}

    model = tiny.build(family)
    expected = logits(model)
    changed_and_patched(model, offload, order)
    assert_offloaded()
    places = tiny.PLACES[family]
    up = tiny.decoder_layers(family, model)[0].get_submodule(places.projections[0])
    seen: list[str] = []
    forward = up._old_forward
    up._old_forward = lambda x: seen.append(up.weight.device.type) or forward(x)
    torch.testing.assert_close(logits(model, device).cpu(), expected, **CLOSE)
    assert seen == [device], "the hook brings the weights in for the call"
    assert_offloaded()
    generated = model.generate(**tiny.batch(device), max_new_tokens=3, do_sample=False)
    up._old_forward = forward
    unpatch_model(model)
    assert_offloaded()
    torch.testing.assert_close(logits(model, device).cpu(), expected, **CLOSE)
    assert torch.equal(
        model.generate(**tiny.batch(device), max_new_tokens=3, do_sample=False), generated
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dispatch_to_cpu_and_disk(family: str, order: str, tmp_path: Path) -> None:
    layers = tiny.PLACES[family].layers

    def dispatch(model: Any) -> Any:
        names = [name for name, module in model.named_modules() if not list(module.children())]
        owned = {name: "cpu" for name in names if not name.startswith(f"{layers}.")}
        device_map = {**owned, **{f"{layers}.{i}": "cpu" for i in range(tiny.LAYERS)}}
        device_map[f"{layers}.1"] = "disk"
        return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path))

    model = tiny.build(family)
    expected = logits(model)
    model = changed_and_patched(model, dispatch, order)
    on_disk = tiny.decoder_layers(family, model)[1]
    for _ in range(2):
        assert {parameter.device.type for parameter in on_disk.parameters()} == {"meta"}
        torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_automatic_device_maps_keep_layers_whole(family: str) -> None:
    model = tiny.build(family)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = {0: size // 2, "cpu": 10 * size}

    def device_map() -> dict[str, Any]:
        unsplit = list(model._no_split_modules)
        return dict(infer_auto_device_map(model, memory, no_split_module_classes=unsplit))

    expected = device_map()
    assert set(expected.values()) == {0, "cpu"}
    patch_model(model)
    assert device_map() == expected


# --- LoRA ---------------------------------------------------------------------------------------


def with_lora(family: str, model: Any, which: str = "both") -> Any:
    paths, gate = tiny.PLACES[family].projections, tiny.PLACES[family].gate or ""
    chosen = {"both": paths, "up": paths[:1], "down": paths[1:], "gate": (gate,)}[which]
    config = LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=[path.rpartition(".")[2] for path in chosen],
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:  # B starts at zero, which would change nothing
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("family", "which"),
    [*((family, which) for family in tiny.FAMILIES for which in ("both", "up", "down")),
     ("llama", "gate")],
)  # fmt: skip
def test_lora(family: str, order: str, which: str, device: str) -> None:
    model = tiny.build(family).to(device)
    original = with_lora(family, copy.deepcopy(model), which).to(device)
    base, expected = logits(model, device), logits(original, device)
    assert not torch.allclose(base, expected, **CLOSE)
    adapted = changed_and_patched(model, lambda m: with_lora(family, m, which), order).to(device)
    assert len(patch_report(adapted).rows) == tiny.LAYERS
    torch.testing.assert_close(logits(adapted, device), expected, **CLOSE)
    assert list(adapted.state_dict()) == list(original.state_dict())
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, device), base, **CLOSE)
    torch.testing.assert_close(logits(unpatch_model(adapted), device), expected, **CLOSE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lora_merged_and_unloaded(family: str, order: str, device: str) -> None:
    model = tiny.build(family).to(device)
    keys = list(model.state_dict())
    base = logits(model, device)
    expected = logits(with_lora(family, copy.deepcopy(model)).to(device), device)
    adapted = changed_and_patched(model, lambda m: with_lora(family, m), order).to(device)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted, device), expected, **CLOSE)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(copy.deepcopy(adapted).unload(), device), base, **CLOSE)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, device), expected, **CLOSE)
    assert {row.reason for row in patch_report(merged).rows} == {""}
    assert list(merged.state_dict()) == keys
    torch.testing.assert_close(logits(unpatch_model(merged), device), expected, **CLOSE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lora_gradients(family: str, order: str) -> None:
    model = tiny.build(family).train()
    _, expected = steps(with_lora(family, copy.deepcopy(model)).train())
    adapted = changed_and_patched(model, lambda m: with_lora(family, m), order).train()
    _, found = steps(adapted)
    assert all("lora_" in name for name in expected)
    assert_same_gradients(found, expected)


# --- the same where the kernels run -------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively on this machine")
@pytest.mark.parametrize("which", ["lora", "model_hooks or cpu_offload", "hook_that or altered"])
def test_what_changes_a_layer_under_the_interpreter(which: str) -> None:
    """In PyTorch every part of a layer is called; only kernels could pass over a hook.

    For a layer with its projections on it, and a gated MLP; on a GPU for all families.
    """
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "-k",
         f"({which}) and (opt or llama) and not gradients", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_compile_without_graph_breaks(family: str, depth: str, device: str) -> None:
    model = patch_model(tiny.build(family).to(device), depth=depth)
    ids = tiny.batch(device)["input_ids"]
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_compiled_training(family: str, device: str) -> None:
    if family == "opt" and "self.training and self.layerdrop" not in inspect.getsource(OPTDecoder):
        pytest.skip("this transformers' own OPT cannot be traced in training (layerdrop)")
    model = tiny.build(family).to(device).train()
    ids = tiny.batch(device)["input_ids"]

    def gradients(call: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        call(ids, use_cache=False).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(patch_model(model), fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(compiled), expected)


# --- copies -------------------------------------------------------------------------------------


def reloaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Change] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(("family", "depth"), tiny.DEPTHS)
def test_copies_are_whole_and_independent(family: str, depth: str, way: str) -> None:
    model = patch_model(tiny.build(family), depth=depth)
    expected = logits(model)
    twin = COPIES[way](model)
    assert torch.equal(logits(twin), expected)
    assert {id(m) for m in twin.modules()}.isdisjoint(id(m) for m in model.modules())
    tiny.randomized(twin, seed=8)
    other = logits(twin)
    assert torch.equal(logits(model), expected) and not torch.allclose(other, expected, **CLOSE)
    unpatch_model(twin)
    torch.testing.assert_close(logits(twin), other, **CLOSE)
    assert not any(isinstance(module, TritonMLP) for module in twin.modules())
    assert torch.equal(logits(model), expected)
    assert all(row.reason != "not patched" for row in patch_report(model).rows)
    patch_model(twin, depth=depth)
    assert torch.equal(logits(twin), other)


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "bloom", "opt", "opt-post-norm", "opt-galactica"])
def test_a_patched_model_saves_a_plain_checkpoint(variant: str, tmp_path: Path) -> None:
    model = tiny.build_variant(variant)
    expected = logits(model)
    model.save_pretrained(tmp_path / "plain")
    patch_model(model).save_pretrained(tmp_path / "patched")
    plain, found = (
        sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir())
        for name in ("plain", "patched")
    )
    assert found == plain
    loaded, info = type(model).from_pretrained(tmp_path / "patched", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(patch_model(loaded)), expected, **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_meta_device(family: str) -> None:
    source = tiny.build(family)
    with torch.device("meta"):
        model = type(source)(source.config).eval()
    patch_model(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    (state,) = {(row.verified, row.reason) for row in patch_report(model).rows}
    assert state == ("no", "waits for weights")
    # Not saved, so not loaded either: buffers that a model computes when it is made.
    for (path, buffer), (_, value) in zip(
        model.named_buffers(), source.named_buffers(), strict=True
    ):
        owner, _, name = path.rpartition(".")
        assert buffer.is_meta
        model.get_submodule(owner)._buffers[name] = value.clone()
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    torch.testing.assert_close(logits(model), logits(source), **CLOSE)
    assert {row.reason for row in patch_report(model).rows} == {""}
    assert torch.equal(logits(unpatch_model(model)), logits(source))


@pytest.mark.parametrize(
    "name", ["gpt2", "bloom", "opt-pre-norm", "opt-post-norm", "llama", "gemma"]
)
def test_trained_checkpoints(name: str, tmp_path: Path, device: str) -> None:
    folder = CHECKPOINTS / name
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"tests/checkpoints/{name} is not there")
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = ["And the LORD said unto", "In the beginning", "Grace be unto you, and peace, from"]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(device)

    def outputs(model: Any) -> tuple[torch.Tensor, list[str]]:
        with torch.no_grad():
            found = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return found, tokenizer.batch_decode(tokens)

    expected, texts = outputs(model)
    found, found_texts = outputs(patch_model(model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert found_texts == texts
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(device)
    again, again_texts = outputs(plain)
    assert torch.equal(again, expected) and again_texts == texts
