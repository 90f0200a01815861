"""GPT-J and CodeGen: attention and MLP run beside each other, behind one norm."""

from typing import Any

from torch import Tensor

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec


class FusedGPTJBlock(FusedLayer):
    """GPTJBlock whose MLP, with attention and residual added, is one TritonMLP call."""

    ln_1: Any
    attn: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rest = self.mlp.fuse(hidden_states)
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        normed = self.ln_1(hidden_states)
        if "output_attentions" not in self.argument_names:
            attention, _ = self.attn(hidden_states=normed, **self.named(args, kwargs))
            return rest(attention, hidden_states, normed)
        # Older layers return the attention's weights too, and hand no other keywords on.
        attention, weights = self.attn(hidden_states=normed, **self.known(args, kwargs))
        return rest(attention, hidden_states, normed), weights


def _spec(family: str, name: str) -> MLPSpec:
    module = f"transformers.models.{family}.modeling_{family}"
    return MLPSpec(
        family=family,
        layer_class=f"{module}.{name}Block",
        fused_layer=FusedGPTJBlock,
        attention="attn",
        mlp="mlp",
        mlp_class=f"{module}.{name}MLP",
        up="fc_in",
        down="fc_out",
        activation="mlp.act",
    )


SPECS = (_spec("gptj", "GPTJ"), _spec("codegen", "CodeGen"))
