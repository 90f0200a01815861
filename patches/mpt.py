"""MPT: pre-norm, no biases; its MLP takes the residual along, as BLOOM's does."""

from typing import Any

from torch import Tensor

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec


class FusedMptBlock(FusedLayer):
    """MptBlock whose attention residual, norm, MLP and residual are one TritonMLP call."""

    norm_1: Any
    attn: Any
    norm_2: Any
    ffn: Any

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        rest = self.ffn.fuse(hidden_states, self.norm_2)
        if rest is None:
            return super().forward(
                hidden_states, position_bias, attention_mask, layer_past=layer_past, **kwargs
            )
        normed = self.norm_1(hidden_states)
        attention, weights = self.attn(normed, position_bias, layer_past, attention_mask)
        return rest(attention, hidden_states), weights


MODULE = "transformers.models.mpt.modeling_mpt"
SPECS = (
    MLPSpec(
        family="mpt",
        layer_class=f"{MODULE}.MptBlock",
        fused_layer=FusedMptBlock,
        attention="attn",
        mlp="ffn",
        mlp_class=f"{MODULE}.MptMLP",
        up="up_proj",
        down="down_proj",
        activation="ffn.act",
        norm=lambda layer: "norm_2",
    ),
)
