"""Models that somebody else has sharded, by transformers' tp_plan or FSDP: refused, or right."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from rank_processes import RANKS, Case, run
from tiny_models import logits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_triton_mlp import TritonMLP, patch_model, patch_report

#: A float32 sum in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

PLANS: dict[str, Any] = {
    "llama": "auto",
    "opt": {"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"},
}
OPT_ATTENTION = {
    f"model.decoder.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"
}


def build(family: str) -> Any:
    """Of sizes that divide, as torch's own tensor parallelism needs them."""
    return tiny.build(
        family, **{"ffn_dim" if family == "opt" else "intermediate_size": 52}, vocab_size=98
    )


def loaded(family: str, folder: Path, plan: Any) -> Any:
    """A tiny checkpoint, as transformers shards it."""
    config = DistributedConfig(tp_size=RANKS, tp_plan=plan)
    path = folder / family
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config).eval()


def assert_refused(model: Any, named: str) -> None:
    """patch_model names what it found and leaves the model as it was, and right."""
    expected = logits(model)
    before = tiny.tree(model)
    with pytest.raises(ValueError, match="sharded") as error:
        patch_model(model)
    assert named in str(error.value), error.value
    assert tiny.tree(model) == before
    assert torch.equal(logits(model), expected)


def tp_plan(family: str, folder: Path) -> None:
    model = loaded(family, folder, PLANS[family])
    torch.testing.assert_close(logits(model), logits(build(family)), **CLOSE)
    name = next(name for name, _ in model.named_modules() if name.endswith("layers.0"))
    first = tiny.PLACES[family].gate or tiny.PLACES[family].projections[0]
    assert_refused(model, f"{name}: {first}.weight is a DTensor, S(0)")


def attention_alone(family: str, folder: Path) -> None:
    """The MLPs are whole, and patched as ever."""
    model = loaded(family, folder, OPT_ATTENTION)
    patch_model(model)
    assert {(row.verified, row.reason) for row in patch_report(model).rows} == {("yes", "")}
    torch.testing.assert_close(logits(model), logits(build(family)), **CLOSE)


def each_layer(family: str, model: Any) -> Any:
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in tiny.decoder_layers(family, model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(family: str, model: Any) -> Any:
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def first_fsdp(family: str, model: Any) -> Any:
    layers = {type(layer) for layer in tiny.decoder_layers(family, model)}
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(layers),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def torch_tp(family: str, model: Any) -> Any:
    """What torch itself has for tensor parallelism: forward hooks and DTensors."""
    up, down = tiny.PLACES[family].projections
    plan = {up: ColwiseParallel(), down: RowwiseParallel()}
    if tiny.PLACES[family].gate is not None:
        plan[tiny.PLACES[family].gate] = ColwiseParallel()
    for layer in tiny.decoder_layers(family, model):
        parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), plan)
    return model


SHARD = {"fsdp2": each_layer, "fsdp2-root": whole, "fsdp1": first_fsdp, "torch-tp": torch_tp}


def sharded_first(family: str, shard: str, folder: Path) -> None:
    model = SHARD[shard](family, build(family))
    assert_refused(model, "weight is ")
    torch.testing.assert_close(logits(model), logits(build(family)), **CLOSE)


def patched_first(family: str, shard: str, folder: Path) -> None:
    expected = logits(build(family))
    model = SHARD[shard](family, tiny.prove(patch_model(build(family))))
    mlps = [module for module in model.modules() if isinstance(module, TritonMLP)]
    assert len(mlps) == tiny.LAYERS
    if shard in ("torch-tp", "fsdp1"):  # their parts are called
        for mlp in mlps:
            mlp.proving = False
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, **CLOSE)


def views(family: str, folder: Path) -> None:
    """The first FSDP's weights are views of what it gathers, here one time, there another."""
    expected = logits(build(family))
    layers = {type(layer) for layer in tiny.decoder_layers(family, build(family))}
    model = FullyShardedDataParallel(
        patch_model(build(family)),
        auto_wrap_policy=ModuleWrapPolicy(layers),
        device_id=torch.device("cpu"),
    )
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    rows = patch_report(model).rows
    assert all(row.reason.startswith("not plain, so called") for row in rows), rows


def cases() -> dict[str, Case]:
    return {
        **{f"tp_plan-{family}": partial(tp_plan, family) for family in PLANS},
        "tp_plan-attention": partial(attention_alone, "opt"),
        **{
            f"{name}-{shard}-{family}": partial(case, family, shard)
            for name, case in (("sharded-first", sharded_first), ("patched-first", patched_first))
            for shard in SHARD
            for family in ("llama", "opt")
            if (name, shard) != ("sharded-first", "fsdp2-root")
        },
        "views": partial(views, "opt"),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("sharded")
    for family in PLANS:
        build(family).save_pretrained(folder / family)
    return run(cases, folder)


@pytest.mark.parametrize("case", cases())
def test_sharded_by_others(case: str, found: dict[str, list[str]]) -> None:
    assert found[case] == [""] * RANKS, "\n".join(found[case])
