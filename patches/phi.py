"""Phi and Cohere: attention and MLP run beside each other, behind one norm."""

from typing import Any

from torch import Tensor

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec


class FusedPhiDecoderLayer(FusedLayer):
    """PhiDecoderLayer whose MLP, with attention and residual added, is one TritonMLP call."""

    input_layernorm: Any
    self_attn: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rest = self.mlp.fuse(hidden_states)
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attention, _ = self.self_attn(hidden_states=normed, **self.named(args, kwargs))
        return rest(attention, hidden_states, normed)


def _spec(family: str, name: str, **parts: Any) -> MLPSpec:
    module = f"transformers.models.{family}.modeling_{family}"
    return MLPSpec(
        family=family,
        layer_class=f"{module}.{name}DecoderLayer",
        fused_layer=FusedPhiDecoderLayer,
        attention="self_attn",
        mlp="mlp",
        mlp_class=f"{module}.{name}MLP",
        **parts,
    )


GATED = {
    "up": "up_proj",
    "gate": "gate_proj",
    "down": "down_proj",
    "activation": "mlp.act_fn",
}
SPECS = (
    _spec("phi", "Phi", up="fc1", down="fc2", activation="mlp.activation_fn"),
    _spec("cohere", "Cohere", **GATED),
    _spec("cohere2", "Cohere2", **GATED),
)
