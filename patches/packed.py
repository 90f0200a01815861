"""Phi-3, GLM and others whose up and gate projection are one, with the rows of both."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hf_triton_mlp.patching import MLPSpec
from hf_triton_mlp.reading import is_plain

from .llama import FusedLlamaDecoderLayer, like_llama


class FusedPhi3DecoderLayer(FusedLlamaDecoderLayer):
    """Llama's layer with dropout of what joins the residual, which acts in training."""

    resid_attn_dropout: Any
    resid_mlp_dropout: Any

    def rest(self, hidden_states: Tensor) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        for dropout in (self.resid_attn_dropout, self.resid_mlp_dropout):
            if dropout.training or not is_plain(dropout, nn.Dropout):
                return None
        return super().rest(hidden_states)


#: Families with Phi-3's MLP in Llama's layer, and in Phi-3's: (family, layer, MLP, norm).
LAYERS = (("glm", "GlmDecoderLayer", "GlmMLP", "GlmRMSNorm"),)
PHI3_LAYERS = (
    ("phi3", "Phi3DecoderLayer", "Phi3MLP", "Phi3RMSNorm"),
    (
        "phi4_multimodal",
        "Phi4MultimodalDecoderLayer",
        "Phi4MultimodalMLP",
        "Phi4MultimodalRMSNorm",
    ),
)

#: Families with Phi-3's MLP in a layer of their own: (family, layer, MLP).
MLPS = (
    ("dia", "DiaDecoderLayer", "DiaMLP"),
    ("dia", "DiaEncoderLayer", "DiaMLP"),
)

#: The same, up first: (family, layer, MLP).
MOONSHINES = (
    ("moonshine", "MoonshineDecoderLayer", "MoonshineDecoderMLP"),
    ("moonshine_streaming", "MoonshineStreamingDecoderLayer", "MoonshineStreamingDecoderMLP"),
)


def with_packed_mlp(spec: MLPSpec, **changes: Any) -> MLPSpec:
    """A spec with Phi-3's MLP but for `changes`."""
    phi3 = {"up": "gate_up_proj", "gate": None, "packed": "gate_up"}
    return replace(spec, **{**phi3, "activation": "mlp.activation_fn", **changes})


SPECS = (
    *(with_packed_mlp(like_llama(*names)) for names in (*LAYERS, *MLPS)),
    *(
        with_packed_mlp(like_llama(*names, fused_layer=FusedPhi3DecoderLayer))
        for names in PHI3_LAYERS
    ),
    *(
        with_packed_mlp(like_llama(*names), up="fc1", packed="up_gate", down="fc2")
        for names in MOONSHINES
    ),
    with_packed_mlp(
        like_llama("granitemoehybrid", "GraniteMoeHybridDecoderLayer", "GraniteMoeHybridMLP"),
        mlp="shared_mlp",
        up="input_linear",
        down="output_linear",
        activation="shared_mlp.activation",
    ),
)
