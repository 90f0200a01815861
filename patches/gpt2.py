"""GPT-2: pre-norm, Conv1D projections, stored (in, out)."""

import inspect
from typing import Any

from torch import Tensor

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec


class FusedGPT2Block(FusedLayer):
    """GPT2Block whose attention residual, norm, MLP and residual are one TritonMLP call."""

    ln_1: Any
    attn: Any
    ln_2: Any

    #: The name of the argument with the cache; transformers 5.24 changed it.
    cache_name: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert cls.original_class is not None
        cls.cache_name = list(inspect.signature(cls.original_class.forward).parameters)[2]

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
        kwargs.setdefault(self.cache_name, cache)
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


MODULE = "transformers.models.gpt2.modeling_gpt2"
SPECS = (
    MLPSpec(
        family="gpt2",
        layer_class=f"{MODULE}.GPT2Block",
        fused_layer=FusedGPT2Block,
        attention="attn",
        mlp="mlp",
        mlp_class=f"{MODULE}.GPT2MLP",
        up="c_fc",
        down="c_proj",
        activation="mlp.act",
        norm=lambda layer: "ln_2",
    ),
)
