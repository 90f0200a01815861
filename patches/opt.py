"""OPT, BioGPT, XGLM: fc1 and fc2 sit on the layer itself; OPT-350m is post-norm."""

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
    do_layer_norm_before: bool = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = self.named(args, kwargs)
        named.pop("use_cache", None)
        named.pop("encoder_attention_mask", None)
        crossed = named.pop("encoder_hidden_states", None) is not None
        before = self.do_layer_norm_before
        norm = self.final_layer_norm if before else self.self_attn_layer_norm
        rest = None
        if not crossed and self.mlp.has_activation(self.activation_fn):
            rest = self.mlp.fuse(hidden_states, norm, (self.fc1, None, self.fc2))
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        attention, _ = self.self_attn(
            hidden_states=self.self_attn_layer_norm(hidden_states) if before else hidden_states,
            **named,
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
    *(
        MLPSpec(
            family=family,
            layer_class=f"transformers.models.{family}.modeling_{family}.{layer_class}",
            fused_layer=FusedOPTDecoderLayer,
            attention="self_attn",
            mlp=None,
            up="fc1",
            down="fc2",
            activation="activation_fn",
            norm=lambda layer: "final_layer_norm",
        )
        for family, layer_class in (("biogpt", "BioGptDecoderLayer"), ("xglm", "XGLMDecoderLayer"))
    ),
)
