"""GPT-2: pre-norm, Conv1D projections, stored (in, out)."""

import inspect
from typing import Any

from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block

from hf_triton_mlp.mlp import TritonMLP
from hf_triton_mlp.patching import MLPSpec

#: The name of the argument with the cache; transformers 5.24 changed it.
CACHE = list(inspect.signature(GPT2Block.forward).parameters)[2]


class TritonGPT2MLP(TritonMLP, GPT2MLP):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GPT2MLP that is a TritonMLP."""

    original_class = GPT2MLP


class TritonGPT2Block(GPT2Block):
    """GPT2Block whose attention residual, norm, MLP and residual are one TritonMLP call."""

    mlp: TritonGPT2MLP

    def forward(
        self,
        hidden_states: Any,
        cache: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        kwargs.setdefault(CACHE, cache)
        rest = None
        if encoder_hidden_states is None:
            rest = self.mlp.fuse(hidden_states, self.ln_2)
        if rest is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        attention, _ = self.attn(
            self.ln_1(hidden_states),
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return rest(attention, hidden_states)


# Device maps and FSDP's wrapping policies find decoder layers by this name.
TritonGPT2Block.__name__ = GPT2Block.__name__

SPEC = MLPSpec(
    family="gpt2",
    layer_class=GPT2Block,
    fused_layer=TritonGPT2Block,
    mlp="mlp",
    mlp_class=TritonGPT2MLP,
    up="c_fc",
    down="c_proj",
    activation="mlp.act",
    norm=lambda layer: "ln_2",
)
