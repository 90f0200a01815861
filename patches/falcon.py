"""Falcon: the MLP beside the attention, behind its norm or one of its own, or after it."""

from typing import Any

from torch import Tensor

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec


def parallel(layer: Any) -> bool:
    """Whether a layer's MLP runs beside its attention."""
    return layer.config.new_decoder_architecture or layer.config.parallel_attn


class FusedFalconDecoderLayer(FusedLayer):
    """FalconDecoderLayer whose MLP, with attention and residual, is one TritonMLP call."""

    config: Any
    input_layernorm: Any
    ln_attn: Any
    ln_mlp: Any
    self_attention: Any
    post_attention_layernorm: Any

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        beside = parallel(self)
        rest = self.mlp.fuse(hidden_states, None if beside else self.post_attention_layernorm)
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        if self.config.new_decoder_architecture and self.config.num_ln_in_parallel_attn == 2:
            normed, for_mlp = self.ln_attn(hidden_states), self.ln_mlp(hidden_states)
        else:
            normed = for_mlp = self.input_layernorm(hidden_states)
        attention, weights = self.self_attention(normed, **self.known(args, kwargs))
        output = rest(attention, hidden_states, for_mlp if beside else None)
        return output, weights


MODULE = "transformers.models.falcon.modeling_falcon"
SPECS = (
    MLPSpec(
        family="falcon",
        layer_class=f"{MODULE}.FalconDecoderLayer",
        fused_layer=FusedFalconDecoderLayer,
        attention="self_attention",
        mlp="mlp",
        mlp_class=f"{MODULE}.FalconMLP",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="mlp.act",
        norm=lambda layer: None if parallel(layer) else "post_attention_layernorm",
    ),
)
