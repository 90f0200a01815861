"""Llama's decoder layer around a plain MLP, with its own kind of norm or a LayerNorm."""

from typing import Any

from hf_triton_mlp.patching import MLPSpec

from .llama import FusedLlamaDecoderLayer

PROJ = {"up": "up_proj", "down": "down_proj", "activation": "mlp.act_fn"}
C_FC = {"up": "c_fc", "down": "c_proj", "activation": "mlp.act"}
DENSE = {"up": "dense_h_to_4h", "down": "dense_4h_to_h", "activation": "mlp.act"}
FC = {"up": "fc1", "down": "fc2", "activation": "mlp.activation_fn"}


def _spec(family: str, name: str, parts: dict[str, str], norm: str | None = None) -> MLPSpec:
    """norm: the family's RMSNorm; torch's LayerNorm without."""
    module = f"transformers.models.{family}.modeling_{family}"
    kind: dict[str, Any] = {}
    if norm is not None:
        kind = {"norm_kind": "rms_norm", "norm_class": f"{module}.{norm}"}
    return MLPSpec(
        family=family,
        layer_class=f"{module}.{name}DecoderLayer",
        fused_layer=FusedLlamaDecoderLayer,
        attention="self_attn",
        mlp="mlp",
        mlp_class=f"{module}.{name}MLP",
        **parts,
        norm=lambda layer: "post_attention_layernorm",
        **kind,
    )


def _mlp_spec(family: str, name: str, **rest: Any) -> MLPSpec:
    """The norm and the residuals stay the model's."""
    module = f"transformers.models.{family}.modeling_{family}"
    return MLPSpec(
        family=family,
        layer_class=f"{module}.{name}DecoderLayer",
        mlp="mlp",
        mlp_class=f"{module}.{name}MLP",
        **PROJ,
        **rest,
    )


def _refuse(layer: Any) -> str | None:
    activation = type(getattr(layer.mlp, "act_fn", None)).__name__
    if activation == "XIELUActivation":
        return f"its activation {activation} has parameters of its own, which no kernel reads"
    return None


SPECS = (
    _spec("arcee", "Arcee", PROJ, "ArceeRMSNorm"),
    _spec("cosmos3_edge", "Cosmos3EdgeText", FC, "Cosmos3EdgeTextRMSNorm"),
    _spec("jais2", "Jais2", PROJ),
    _spec("nanochat", "NanoChat", FC, "NanoChatRMSNorm"),
    _spec("persimmon", "Persimmon", DENSE),
    _spec("starcoder2", "Starcoder2", C_FC),
    _mlp_spec("apertus", "Apertus", refuse=_refuse),
    _mlp_spec("apertus1p5", "Apertus1p5Text", refuse=_refuse),
    _mlp_spec("nemotron", "Nemotron"),
)
