"""Quantized MLPs in transformers: loaded, saved, loaded again, patched and dequantized."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantization import CHECKPOINTS, NAMES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp import TritonMLPConfig, patch_model, patch_report, unpatch_model
from hf_triton_mlp.linear import QuantizedLinear, quantized_linears
from hf_triton_mlp.quantization import QuantizationConfig, quantize
from hf_triton_mlp.quantizer import METHOD

OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int8 in groups": {"bits": 8, "group_size": 64},
    "int4": {"bits": 4},
    "int4 symmetric": {"bits": 4, "group_size": 32, "symmetric": True, "refine": True},
    "fp8": {"format": "fp8"},
    "fp8 x fp8": {"format": "fp8", "activations": "fp8"},
}


def load(name: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = TritonMLPConfig(**options) if options else None
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINTS / name, dtype=dtype, **({"quantization_config": config} if config else {})
    )
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 33).view(2, 15)).logits


def saved(tmp_path: Path, **options: Any) -> Path:
    load("gpt2", **options).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_loaded_saved_and_loaded(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    plain, model = load(name), load(name, **options)
    config = TritonMLPConfig(**options).quantization
    found = dict(quantized_linears(model))
    per_layer = 3 if name in ("llama", "gemma") else 2
    assert len(found) == per_layer * plain.config.num_hidden_layers
    # What is quantized while loading is what `quantize` makes of the weights.
    expected, weights = copy.deepcopy(plain), 0
    for place, linear in found.items():
        original = expected.get_submodule(place)
        stored = original.weight.data.t() if type(original) is Conv1D else original.weight.data
        quantized = quantize(stored, config)
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(linear.quantized, quantized, strict=True)
        )
        weights += stored.nbytes - quantized.nbytes
        value = quantized.dequantize(torch.float32)
        original.weight.data = value.t().contiguous() if type(original) is Conv1D else value
    own = logits(model)
    torch.testing.assert_close(own, logits(expected), rtol=1e-4, atol=1e-4)
    assert model.get_memory_footprint() == plain.get_memory_footprint() - weights

    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), own)
    assert set(again.config.quantization_config.modules) == set(found)
    assert {linear.config for _, linear in quantized_linears(again)} == {config}
    assert again.state_dict().keys() == model.state_dict().keys()

    patch_model(again)
    torch.testing.assert_close(logits(again), own, rtol=1e-5, atol=1e-5)
    unpatch_model(again)
    assert torch.equal(logits(again), own)

    model = model.dequantize()
    assert not dict(quantized_linears(model)) and METHOD not in str(model.config.to_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(logits(model), own, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_half_precision_moves_and_copies() -> None:
    model = load("llama", torch.bfloat16, bits=4)
    own = logits(model)
    assert own.dtype == torch.bfloat16
    assert torch.equal(logits(copy.deepcopy(model)), own)
    with torch.no_grad():
        greedy = model.generate(torch.arange(3, 13)[None], max_new_tokens=8, do_sample=False)
        fixed = model.generate(
            torch.arange(3, 13)[None],
            max_new_tokens=8,
            do_sample=False,
            cache_implementation="static",
        )
    assert torch.equal(greedy, fixed)
    assert model.hf_quantizer.is_compileable
    model.to("meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_dtype_is_for_the_bias_alone(options: dict[str, Any]) -> None:
    config = TritonMLPConfig(**options).quantization
    layer = QuantizedLinear.from_linear(nn.Linear(70, 9), config)
    before = copy.deepcopy(layer.quantized)
    layer.half().bfloat16()
    for one, other in zip(before[:2], layer.quantized[:2], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert layer.bias is not None and layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert layer(torch.zeros(3, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_compiled_layer() -> None:
    linear = nn.Linear(70, 9)
    layer = QuantizedLinear.from_linear(linear, QuantizationConfig(format="int4", group_size=32))
    x = torch.randn(3, 70)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, linear.bias))


def test_some_layers() -> None:
    model = load("gpt2", bits=8, include=[0, "*.h.2"], exclude=[0])
    names = [name for name, _ in quantized_linears(model)]
    assert names == ["transformer.h.2.mlp.c_fc", "transformer.h.2.mlp.c_proj"]
    patch_model(model)
    rows = patch_report(model).rows
    assert [row.weights for row in rows] == ["", "", "int8, 0.52 -> 0.13 MB", ""]
    assert {row.reason for row in rows} == {""}
    with pytest.raises(ValueError, match="include names 7, which matches no layer"):
        load("gpt2", bits=8, include=[7])


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_file_without_a_tensor_is_refused(tmp_path: Path, part: str) -> None:
    file = saved(tmp_path, bits=8) / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"transformer.h.1.mlp.c_fc.{part}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"transformer\.h\.1\.mlp\.c_fc\.{part} is missing"):
        load(tmp_path)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, bits=4) / "model.safetensors"
    tensors, name = load_file(file), "transformer.h.1.mlp.c_fc"

    def refused(message: str, **changes: torch.Tensor) -> None:
        other = {f"{name}.{key}": value for key, value in changes.items()}
        save_file({**tensors, **other}, file, metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=message):
            load(tmp_path)

    scales = tensors[f"{name}.scales"]
    refused(rf"{name}\.scales has values that are", scales=torch.full_like(scales, torch.nan))
    refused(rf"{name}\.codes is torch\.int64", codes=tensors[f"{name}.codes"].long())
    # transformers refuses it itself, in newer versions: a log line says which.
    refused(r"ignore_mismatched_sizes|scales is .*, expected", scales=scales[:-1].clone())
    save_file(tensors, file, metadata={"format": "pt"})

    config = json.loads((tmp_path / "config.json").read_text())

    def with_config(**changes: Any) -> None:
        quantization = {**config["quantization_config"], **changes}
        text = json.dumps({**config, "quantization_config": quantization})
        (tmp_path / "config.json").write_text(text)

    with_config(modules=["transformer.h.9.mlp.c_fc"])
    with pytest.raises(ValueError, match=r"names transformer\.h\.9\.mlp\.c_fc, which GPT2LMHead"):
        load(tmp_path)
    with_config(modules=["transformer.h.1.ln_1"])
    with pytest.raises(ValueError, match="a LayerNorm cannot be quantized"):
        load(tmp_path)
    with_config(modules=None)
    with pytest.raises(ValueError, match="names no modules"):
        load(tmp_path)
    saved(tmp_path, bits=4, symmetric=True)
    with_config(symmetric=False)
    with pytest.raises(ValueError, match=r"c_fc\.zeros is missing"):
        load(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """transformers logs which, and QuantizeWeight's own message, before it raises."""
    model = load("gpt2")
    model.transformer.h[1].mlp.c_proj.weight.data[3, 5] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load(tmp_path, bits=8)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"bits": 3}, "bits is 3, supported: 4 and 8"),
        ({"bits": 8, "format": "int4"}, "'int4' with bits=8; give one"),
        ({"bits": 4, "group_size": 48}, "48; int4 has groups"),
        ({"format": "fp8", "group_size": 128}, "fp8 has one scale"),
        ({"bits": 8, "activations": "fp8"}, "'fp8' with format 'int8'"),
    ],
)
def test_configs_that_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        TritonMLPConfig(**options)


def test_a_model_without_an_mlp_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mamba", hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no decoder layer that hf_triton_mlp supports"):
        load(tmp_path, bits=8)
