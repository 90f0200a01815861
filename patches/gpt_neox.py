"""GPT-NeoX: two norms; the MLP runs beside the attention, or behind it."""

from typing import Any

from torch import Tensor

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec


class FusedGPTNeoXLayer(FusedLayer):
    """GPTNeoXLayer whose MLP, with attention and residual, is one TritonMLP call."""

    input_layernorm: Any
    attention: Any
    post_attention_layernorm: Any
    use_parallel_residual: bool

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parallel = self.use_parallel_residual
        rest = self.mlp.fuse(hidden_states, None if parallel else self.post_attention_layernorm)
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attention, _ = self.attention(normed, **self.named(args, kwargs))
        if not parallel:
            return rest(attention, hidden_states)
        return rest(attention, hidden_states, self.post_attention_layernorm(hidden_states))


def _norm(layer: Any) -> str | None:
    return None if layer.use_parallel_residual else "post_attention_layernorm"


MODULE = "transformers.models.gpt_neox.modeling_gpt_neox"
JAPANESE = "transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese"
SPECS = (
    MLPSpec(
        family="gpt_neox",
        layer_class=f"{MODULE}.GPTNeoXLayer",
        fused_layer=FusedGPTNeoXLayer,
        attention="attention",
        mlp="mlp",
        mlp_class=f"{MODULE}.GPTNeoXMLP",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="mlp.act",
        norm=_norm,
    ),
    MLPSpec(
        family="gpt_neox_japanese",
        layer_class=f"{JAPANESE}.GPTNeoXJapaneseLayer",
        mlp="mlp",
        mlp_class=f"{JAPANESE}.GPTNeoXJapaneseMLP",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="mlp.act",
    ),
)
