"""BLOOM: pre-norm; its attention adds the residual itself, its MLP takes the residual along."""

from typing import Any

from torch import Tensor, nn

from hf_triton_mlp import attention
from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec
from hf_triton_mlp.reading import is_original

MODULE = "transformers.models.bloom.modeling_bloom"


class FusedBloomBlock(FusedLayer):
    """BloomBlock whose second norm, MLP and residual are one TritonMLP call."""

    input_layernorm: Any
    self_attention: Any
    post_attention_layernorm: Any
    apply_residual_connection_post_layernorm: bool

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        rest = self.mlp.fuse(hidden_states, self.post_attention_layernorm)
        if rest is None:
            return super().forward(
                hidden_states,
                alibi,
                attention_mask,
                layer_past=layer_past,
                use_cache=use_cache,
                output_attentions=output_attentions,
                **kwargs,
            )
        normed = self.input_layernorm(hidden_states)
        residual = normed if self.apply_residual_connection_post_layernorm else hidden_states
        in_step = attention.is_deferred(layer_past)
        if in_step and is_original(self.self_attention, f"{MODULE}.BloomAttention"):
            return rest(self.attend(normed, layer_past, attention_mask, alibi), residual), None
        attended, weights = self.self_attention(
            normed,
            residual,
            layer_past=layer_past,
            attention_mask=attention_mask,
            alibi=alibi,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        return rest(attended, None), weights

    def attend(self, normed: Tensor, cache: Any, mask: Tensor, alibi: Tensor) -> Tensor:
        """BloomAttention for one token, but for the residual, in a captured step."""
        module = self.self_attention
        query, key, value = module._reshape(module.query_key_value(normed))
        key, value = cache.update(key, value, module.layer_idx)
        scaling = module.inv_norm_factor
        heads, _ = attention.attend(module, query, key, value, mask, scaling=scaling, bias=alibi)
        return module.dense(heads.flatten(2))


def _refuse(layer: nn.Module) -> str | None:
    mlp = layer.get_submodule("mlp")
    if getattr(mlp, "slow_but_exact", False) and getattr(mlp, "pretraining_tp", 1) > 1:
        return (
            "slow_but_exact with pretraining_tp > 1 sums the down projection in slices and leaves "
            "its bias out, which TritonMLP does not reproduce; load with slow_but_exact=False"
        )
    return None


SPECS = (
    MLPSpec(
        family="bloom",
        layer_class=f"{MODULE}.BloomBlock",
        fused_layer=FusedBloomBlock,
        attention="self_attention",
        mlp="mlp",
        mlp_class=f"{MODULE}.BloomMLP",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="mlp.gelu_impl",
        activations=((f"{MODULE}.BloomGelu", "gelu_new"),),
        norm=lambda layer: "post_attention_layernorm",
        pre_norm=lambda layer: not layer.apply_residual_connection_post_layernorm,
        refuse=_refuse,
    ),
)
