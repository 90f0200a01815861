"""GPT-BigCode and GPT-Neo: GPT-2's layer around nn.Linear."""

from typing import Any

from torch import Tensor

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec


class FusedGPTBigCodeBlock(FusedLayer):
    """GPTBigCodeBlock whose attention residual, norm, MLP and residual are one TritonMLP call."""

    ln_1: Any
    attn: Any
    ln_2: Any

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Tensor:
        named = self.named(args, kwargs)
        named.pop("encoder_attention_mask", None)
        crossed = named.pop("encoder_hidden_states", None) is not None
        rest = None if crossed else self.mlp.fuse(hidden_states, self.ln_2)
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        attention, _ = self.attn(self.ln_1(hidden_states), **named)
        return rest(attention, hidden_states)


class FusedGPTNeoBlock(FusedLayer):
    """GPTNeoBlock whose attention residual, norm, MLP and residual are one TritonMLP call."""

    ln_1: Any
    attn: Any
    ln_2: Any

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        rest = self.mlp.fuse(hidden_states, self.ln_2)
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        attention, weights = self.attn(self.ln_1(hidden_states), **self.known(args, kwargs))
        return rest(attention, hidden_states), weights


def _spec(family: str, name: str, fused_layer: type[FusedLayer]) -> MLPSpec:
    module = f"transformers.models.{family}.modeling_{family}"
    return MLPSpec(
        family=family,
        layer_class=f"{module}.{name}Block",
        fused_layer=fused_layer,
        attention="attn",
        mlp="mlp",
        mlp_class=f"{module}.{name}MLP",
        up="c_fc",
        down="c_proj",
        activation="mlp.act",
        norm=lambda layer: "ln_2",
    )


SPECS = (
    _spec("gpt_bigcode", "GPTBigCode", FusedGPTBigCodeBlock),
    _spec("gpt_neo", "GPTNeo", FusedGPTNeoBlock),
)
