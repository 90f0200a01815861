"""Models of which each rank reads its part from the files, against those that are loaded whole."""

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models as tiny
import torch
import torch.distributed as dist
from rank_processes import RANKS, Case, run
from safetensors.torch import load_file, save_file
from tiny_models import logits
from transformers import AutoModelForCausalLM

from hf_triton_mlp import (
    TritonMLP,
    TritonMLPConfig,
    load_sharded,
    loading,
    patch_model,
    patch_report,
    unpatch_model,
)
from hf_triton_mlp.linear import quantized_linears
from hf_triton_mlp.parallel import Shard, parts
from hf_triton_mlp.quantization import QuantizationConfig

CHECKPOINTS = Path(__file__).with_name("checkpoints")
TRAINED = ("bloom", "gemma", "gpt2", "llama", "opt-post-norm", "opt-pre-norm")

#: Of sizes that divide, and what their configs say besides.
BUILT: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 52},
    "bloom": {},
    "opt": {"ffn_dim": 52, "enable_bias": False},
    "llama": {"intermediate_size": 52, "mlp_bias": True},
    "phi3": {"intermediate_size": 52},
}


def group() -> Any:
    return dist.group.WORLD


class Counted:
    """A file that counts the bytes that are read of each tensor."""

    def __init__(self, opened: Any, read: Counter[str]) -> None:
        self.opened, self.read = opened, read

    def __enter__(self) -> "Counted":
        self.file = self.opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.opened.__exit__(*error)

    def keys(self) -> list[str]:
        return self.file.keys()

    def get_slice(self, key: str) -> Any:
        stored, read = self.file.get_slice(key), self.read

        class Slice:
            get_shape = stored.get_shape

            def __getitem__(self, index: Any) -> torch.Tensor:
                found = stored[index]
                read[key] += found.nbytes
                return found

        return Slice()


def loaded(path: Path, **options: Any) -> tuple[Any, Counter[str]]:
    read: Counter[str] = Counter()
    opened = loading._opened
    with mock.patch.object(loading, "_opened", lambda file: Counted(opened(file), read)):
        return load_sharded(path, group(), **options), read


def assert_as_loaded_whole(path: Path, dtype: torch.dtype | None = None) -> None:
    """The same bits, and of a part no byte more is read than it has."""
    model, read = loaded(path, **({} if dtype is None else {"dtype": dtype}))
    whole: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto").eval()
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.generation_config == whole.generation_config and not model.training
    expected, sizes = whole.state_dict(), {}
    patch_model(whole, mp_group=group())
    assert {row.reason for row in patch_report(model).rows} == {""}
    assert torch.equal(logits(model), logits(whole))
    for name, module in model.named_modules():
        for key, tensor in module._parameters.items():
            other = whole.get_submodule(name)._parameters[key]
            assert (tensor is None) == (other is None)
            if tensor is not None:
                assert torch.equal(tensor, other) and tensor.stride() == other.stride()
                sizes[f"{name}.{key}"] = tensor.numel(), key in parts(module)
    assert sum(part for _, part in sizes.values()) >= 2 * len(patch_report(model).rows)
    for key, count in read.items():
        name = key if key in sizes else f"{model.base_model_prefix}.{key}"
        if name in sizes:
            stored = expected[name].nbytes // expected[name].numel()
            itemsize = 4 if dtype is not None else stored  # as it is in the file
            assert count == sizes[name][0] * itemsize, key
    unpatch_model(model)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(isinstance(module, (Shard, TritonMLP)) for module in model.modules())


def quantized(name: str, folder: Path) -> None:
    """Codes and scales are read, of each rank its part."""
    model, read = loaded(folder / name)
    whole: Any = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    expected = whole.state_dict()
    assert model.config.to_dict() == whole.config.to_dict() and model.is_quantized
    patch_model(whole, mp_group=group())
    rows = patch_report(model).rows
    assert all(row.weights and row.part for row in rows)
    assert torch.equal(logits(model), logits(whole))
    layers = dict(quantized_linears(model))
    assert len(layers) == 2 * len(rows) == len(dict(quantized_linears(whole)))
    for path, layer in layers.items():
        key = next(key for key in read if f"{path}.codes".endswith(key))
        assert read[key] == layer.codes.nbytes
    unpatch_model(model)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def trained(name: str, folder: Path) -> None:
    assert_as_loaded_whole(CHECKPOINTS / name)


def built(name: str, folder: Path) -> None:
    assert_as_loaded_whole(folder / name)


def in_another_dtype(folder: Path) -> None:
    assert_as_loaded_whole(folder / "gpt2", torch.bfloat16)
    assert load_sharded(folder / "gpt2", group(), dtype="auto").dtype == torch.float32


def in_several_files(folder: Path) -> None:
    assert len(list((folder / "llama-split").glob("*.safetensors"))) > 2
    assert_as_loaded_whole(folder / "llama-split")


def of_the_base_model(folder: Path) -> None:
    """Without a prefix before its keys, as GPT-2's and BLOOM's files have them."""
    for name in ("gpt2", "bloom"):
        assert "wte.weight" in load_file(folder / "gpt2-base" / "model.safetensors")
        assert_as_loaded_whole(folder / f"{name}-base")


def with_cuda_graphs_and_depth(folder: Path) -> None:
    model, _ = loaded(folder / "gpt2", depth="mlp", include=[0, 2], cuda_graphs=True)
    rows = patch_report(model).rows
    assert [row.replaced for row in rows] == ["MLP", "-", "MLP"]
    whole = AutoModelForCausalLM.from_pretrained(folder / "gpt2")
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-4, atol=1e-4)


def refused(name: str, text: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=text):
        load_sharded(folder / name, group())


def not_quantized_meanwhile(folder: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"meta device"):
        load_sharded(folder / "llama", group(), quantization="int8")


REFUSED = {
    "no-such-weight": r"the checkpoint has no model\.layers\.1\.mlp\.down_proj\.weight$",
    "another-shape": r"mlp\.up_proj\.weight is \[52, 16\] in the checkpoint, and \[52, 32\]",
    "not-tied": r"transformer\.wte\.weight and lm_head\.weight are one by the config, and differ",
    "another-quantizer": r"is quantized by fp8; supported: plain weights and ",
    "no-codes": r"the checkpoint has no transformer\.h\.0\.mlp\.c_fc\.codes$",
    "no-files": r"has neither model\.safetensors nor model\.safetensors\.index\.json",
}


def cases() -> dict[str, Case]:
    return {
        **{f"trained-{name}": partial(trained, name) for name in TRAINED},
        **{f"built-{name}": partial(built, name) for name in BUILT},
        "another-dtype": in_another_dtype,
        "several-files": in_several_files,
        "base-model": of_the_base_model,
        "cuda-graphs-and-depth": with_cuda_graphs_and_depth,
        **{name: partial(quantized, name) for name in ("int8", "int4")},
        "no-quantization": not_quantized_meanwhile,
        **{name: partial(refused, name, text) for name, text in REFUSED.items()},
    }


def write(folder: Path) -> None:
    """The checkpoints of these cases."""
    for name, changes in BUILT.items():
        tiny.build(name, **changes).save_pretrained(folder / name)
    llama = tiny.build("llama", **BUILT["llama"])
    llama.save_pretrained(folder / "llama-split", max_shard_size="40KB")
    for name in ("gpt2", "bloom"):
        tiny.build(name, **BUILT[name]).transformer.save_pretrained(folder / f"{name}-base")
    llama.model.layers[1].mlp.down_proj.weight = None
    llama.save_pretrained(folder / "no-such-weight")
    tiny.build("llama", **BUILT["llama"]).save_pretrained(folder / "another-shape")
    tiny.build("gpt2", **BUILT["gpt2"]).save_pretrained(folder / "not-tied")
    tiny.build("opt", **BUILT["opt"]).config.save_pretrained(folder / "no-files")
    path = folder / "another-shape" / "model.safetensors"
    tensors = load_file(path)
    up = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, up: tensors[up][:, :16].contiguous()}, path, {"format": "pt"})
    path = folder / "not-tied" / "model.safetensors"
    tensors = load_file(path)
    head = {"lm_head.weight": tensors["transformer.wte.weight"] + 1}
    save_file({**tensors, **head}, path, {"format": "pt"})
    for form in (QuantizationConfig(format="int8"), QuantizationConfig(group_size=32)):
        model = patch_model(tiny.build("gpt2", n_inner=128), quantization=form)
        assert isinstance(model.config.quantization_config, TritonMLPConfig)
        model.save_pretrained(folder / form.format)
    for name in ("no-codes", "another-quantizer"):
        shutil.copytree(folder / "int8", folder / name)
    path = folder / "no-codes" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("transformer.h.0.mlp.c_fc.codes")
    save_file(tensors, path, {"format": "pt"})
    path = folder / "another-quantizer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("loading")
    write(folder)
    return run(cases, folder)


@pytest.mark.parametrize("case", cases())
def test_each_rank_reads_its_part(case: str, found: dict[str, list[str]]) -> None:
    assert found[case] == [""] * RANKS, "\n".join(found[case])
