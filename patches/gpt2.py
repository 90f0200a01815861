"""GPT-2: pre-norm, Conv1D projections, stored (in, out)."""

from typing import Any

from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block

from hf_triton_mlp.patching import MLPSpec, can_fuse


class TritonGPT2Block(GPT2Block):
    """GPT2Block whose attention residual, norm, MLP and residual are one TritonMLP call."""

    def forward(
        self,
        hidden_states: Any,
        past_key_values: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or not can_fuse(self.mlp):
            return super().forward(
                hidden_states,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        attention, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return self.mlp(attention, residual=hidden_states, norm=self.ln_2)


SPEC = MLPSpec(
    family="gpt2",
    layer_class=GPT2Block,
    fused_layer=TritonGPT2Block,
    mlp="mlp",
    mlp_class=GPT2MLP,
    up="c_fc",
    down="c_proj",
    activation="mlp.act",
    dropout="mlp.dropout",
    norm=lambda layer: "ln_2",
)
