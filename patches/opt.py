"""OPT: fc1 and fc2 sit on the layer itself; pre-norm, and post-norm in the 350m model."""

from typing import Any

from torch import Tensor

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec


class FusedOPTDecoderLayer(FusedLayer):
    """OPTDecoderLayer whose attention residual, norm, MLP and residual are one TritonMLP call."""

    self_attn_layer_norm: Any
    self_attn: Any
    final_layer_norm: Any
    fc1: Any
    fc2: Any
    activation_fn: Any
    do_layer_norm_before: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> Tensor:
        before = self.do_layer_norm_before
        norm = self.final_layer_norm if before else self.self_attn_layer_norm
        rest = None
        if not others and self.mlp.has_activation(self.activation_fn):
            rest = self.mlp.fuse(hidden_states, norm, (self.fc1, None, self.fc2))
        if rest is None:
            return super().forward(hidden_states, attention_mask, *others, **kwargs)
        kwargs.pop("use_cache", None)
        attention, _ = self.self_attn(
            hidden_states=self.self_attn_layer_norm(hidden_states) if before else hidden_states,
            attention_mask=attention_mask,
            **kwargs,
        )
        output = rest(attention, hidden_states)
        return output if before else self.final_layer_norm(output)


SPECS = (
    MLPSpec(
        family="opt",
        layer_class="transformers.models.opt.modeling_opt.OPTDecoderLayer",
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
