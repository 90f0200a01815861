"""OPT: fc1 and fc2 sit on the layer itself; pre-norm, and post-norm in the 350m model."""

from typing import Any

from torch import Tensor

from hf_triton_mlp.attention import attend, is_deferred
from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec
from hf_triton_mlp.reading import is_original

MODULE = "transformers.models.opt.modeling_opt"


class FusedOPTDecoderLayer(FusedLayer):
    """OPTDecoderLayer whose attention residual, norm, MLP and residual are one TritonMLP call.

    The last attention's: where there is an encoder, the one that looks at it.
    """

    self_attn_layer_norm: Any
    self_attn: Any
    encoder_attn_layer_norm: Any
    encoder_attn: Any
    final_layer_norm: Any
    fc1: Any
    fc2: Any
    activation_fn: Any
    do_layer_norm_before: bool

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = self.named(args, kwargs)
        named.pop("use_cache", None)
        encoded = named.pop("encoder_hidden_states", None)
        encoder_mask = named.pop("encoder_attention_mask", None)
        before = self.do_layer_norm_before
        last = self.self_attn_layer_norm if encoded is None else self.encoder_attn_layer_norm
        norm = self.final_layer_norm if before else last
        rest = None
        if self.mlp.has_activation(self.activation_fn):
            rest = self.mlp.fuse(hidden_states, norm, (self.fc1, None, self.fc2))
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        x = hidden_states
        normed = self.self_attn_layer_norm(x) if before else x
        cache = named.get("cache", named.get("past_key_values"))
        if is_deferred(cache) and is_original(self.self_attn, f"{MODULE}.OPTAttention"):
            attention = self.attend(normed, cache, named["attention_mask"])
        else:
            attention, _ = self.self_attn(hidden_states=normed, **named)
        if encoded is not None:
            x = x + attention if before else self.self_attn_layer_norm(x + attention)
            attention, _ = self.encoder_attn(
                hidden_states=self.encoder_attn_layer_norm(x) if before else x,
                key_value_states=encoded,
                **{**named, "attention_mask": encoder_mask},
            )
        output = rest(attention, x)
        return output if before else self.final_layer_norm(output)

    def attend(self, normed: Tensor, cache: Any, mask: Tensor) -> Tensor:
        """OPTAttention for one token in a captured step, which scales scores instead of queries."""
        module = self.self_attn
        query, key, value = (
            projection(normed).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        key, value = cache.update(key, value, module.layer_idx)
        heads, _ = attend(module, query, key, value, mask, scaling=module.scaling)
        return module.out_proj(heads.flatten(2))


SPECS = (
    MLPSpec(
        family="opt",
        layer_class=f"{MODULE}.OPTDecoderLayer",
        fused_layer=FusedOPTDecoderLayer,
        attention="self_attn",
        mlp=None,
        up="fc1",
        down="fc2",
        activation="activation_fn",
        norm=lambda layer: (
            "final_layer_norm" if layer.do_layer_norm_before else "self_attn_layer_norm"
        ),
        pre_norm=lambda layer: layer.do_layer_norm_before,
    ),
)
