"""What patches/llama.py says about the installed transformers, and layers called by hand."""

import ast
import copy
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hf_triton_mlp.patches.llama import (
    FusedGraniteDecoderLayer,
    FusedLlamaDecoderLayer,
    FusedVaultGemmaDecoderLayer,
)
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama

from hf_triton_mlp import patch_model
from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec
from hf_triton_mlp.specs import specs

LLAMA_SHAPED = [spec for spec in specs() if spec.gate == "gate_proj"]
LLAMA = next(spec for spec in LLAMA_SHAPED if spec.family == "llama")


def module_of(spec: MLPSpec) -> ModuleType:
    name = spec.layer_class.rpartition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        pytest.skip(f"this transformers has no {spec.family}")


def named(module: ModuleType, full_name: str) -> Any:
    owner, _, name = full_name.rpartition(".")
    assert owner == module.__name__
    return getattr(module, name)


def body(cls: Any, method: str = "forward") -> str:
    """What a class's forward does: without signature, comments and the name of its argument."""
    source = inspect.getsource(inspect.unwrap(getattr(cls, method)))
    forward: Any = ast.parse(textwrap.dedent(source)).body[0]
    first = forward.args.args[1].arg
    for node in ast.walk(forward):
        if isinstance(node, ast.Name) and node.id == first:
            node.id = "x"
    statements = forward.body
    if isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant):
        del statements[0]
    return "\n".join(map(ast.unparse, statements)).replace("down_proj = ", "return ")


def without_arguments(layer: str) -> str:
    """A layer's body without what it hands to its attention."""
    return re.sub(r"self\.self_attn\(.*\)", "self.self_attn()", layer)


MLP = body(modeling_llama.LlamaMLP).removesuffix("\nreturn down_proj")
LAYER = body(modeling_llama.LlamaDecoderLayer)
MULTIPLIED = " + x * self.residual_multiplier"

#: What makes a layer's body Llama's, by the short forward that takes its place.
AS_LLAMAS: dict[type[FusedLayer], Callable[[str], bool]] = {
    FusedLlamaDecoderLayer: lambda found: found == LAYER,
    FusedGraniteDecoderLayer: lambda found: (
        found.count(MULTIPLIED) == 2 and found.replace(MULTIPLIED, " + x") == LAYER
    ),
    FusedVaultGemmaDecoderLayer: lambda found: (
        without_arguments(found).replace("pre_feedforward_layernorm", "post_attention_layernorm")
        == without_arguments(LAYER)
    ),
}
NORMS = {"rms_norm": modeling_llama.LlamaRMSNorm, "rms_norm_offset": modeling_gemma.GemmaRMSNorm}


@pytest.mark.parametrize("spec", LLAMA_SHAPED, ids=lambda spec: spec.layer_class.split(".")[-1])
def test_the_classes_are_llamas(spec: MLPSpec) -> None:
    """A release that changes one of them fails here, before it computes something else."""
    module = module_of(spec)
    layer, mlp = named(module, spec.layer_class), named(module, spec.mlp_class or "")
    assert body(mlp).removesuffix("\nreturn down_proj") == MLP
    made = inspect.getsource(layer.__init__)
    assert f"self.mlp = {mlp.__name__}(" in made
    if spec.fused_layer not in AS_LLAMAS:
        return  # its layer, if it has a short forward, is compared in test_sandwich.py
    norm = named(module, spec.norm_class)
    assert AS_LLAMAS[spec.fused_layer](body(layer))
    like = NORMS[spec.norm_kind]
    assert body(norm) == body(like)
    if hasattr(like, "_norm"):
        assert inspect.getsource(norm._norm) == inspect.getsource(like._norm)
    assert spec.norm is not None
    assert f"self.{spec.norm(layer)} = {norm.__name__}(" in made


def test_arguments_by_position_and_by_name() -> None:
    model = tiny.build("llama")
    layer = tiny.decoder_layers("llama", model)[0]
    x = torch.randn(1, 5, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]
    angles = model.model.rotary_emb(x, positions)
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    calls: dict[str, Any] = {
        "by position": lambda: layer(x, mask, positions, None, False, angles),
        "both": lambda: layer(x, mask, position_ids=positions, position_embeddings=angles),
        "by name": lambda: layer(
            position_embeddings=angles, attention_mask=mask, hidden_states=x, output_attentions=True
        ),
        "without a mask": lambda: layer(x, position_embeddings=angles),
    }
    with torch.no_grad():
        expected = {name: call() for name, call in calls.items()}
        patch_model(model)
        layer.mlp.proving = True  # the short forward, on the CPU too
        for name, call in calls.items():
            torch.testing.assert_close(call(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_another_multiplier_than_there_was_is_seen() -> None:
    model = tiny.build_variant("granite")
    other = copy.deepcopy(model)
    layers = tiny.decoder_layers("llama", patch_model(model))
    for layer in layers:
        assert layer.mlp.mlp_config.branch_scale == 0.3
        layer.mlp.proving = True  # the short forward, on the CPU too
    for layer in (*layers, *tiny.decoder_layers("llama", other)):
        layer.residual_multiplier = 0.7
    with torch.no_grad():
        found, expected = (each(**tiny.batch()).logits for each in (model, other))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
