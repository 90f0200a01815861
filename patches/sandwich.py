"""Gemma 2, OLMo 2, GLM-4 and others, which normalize what attention and MLP add to the residual."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec

from .llama import FusedLlamaDecoderLayer, like_llama
from .packed import with_packed_mlp


class FusedGemma2DecoderLayer(FusedLlamaDecoderLayer):
    """Llama's layer with a norm behind its attention and one behind its MLP."""

    post_attention_layernorm: Any
    pre_feedforward_layernorm: Any
    post_feedforward_layernorm: Any

    norm_name = "pre_feedforward_layernorm"

    def rest(self, hidden_states: Tensor) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        branch_norms = self.post_attention_layernorm, self.post_feedforward_layernorm
        norm = self.pre_feedforward_layernorm
        return self.mlp.fuse(hidden_states, norm, branch_norms=branch_norms)


class FusedGlm4DecoderLayer(FusedLlamaDecoderLayer):
    """Gemma 2's layer, whose norms have other names."""

    post_self_attn_layernorm: Any
    post_attention_layernorm: Any
    post_mlp_layernorm: Any

    def rest(self, hidden_states: Tensor) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        branch_norms = self.post_self_attn_layernorm, self.post_mlp_layernorm
        norm = self.post_attention_layernorm
        return self.mlp.fuse(hidden_states, norm, branch_norms=branch_norms)


class FusedOlmo2DecoderLayer(FusedLayer):
    """Gemma 2's layer without the norms in front of its attention and its MLP."""

    self_attn: Any
    post_attention_layernorm: Any
    post_feedforward_layernorm: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        branch_norms = self.post_attention_layernorm, self.post_feedforward_layernorm
        rest = self.mlp.fuse(hidden_states, branch_norms=branch_norms)
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        attention, _ = self.self_attn(hidden_states=hidden_states, **self.named(args, kwargs))
        return rest(attention, hidden_states)


#: What Gemma 2 and OLMo 2 call the norms behind attention and MLP, and what GLM-4 does.
BRANCH_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
GLM4_BRANCH_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")

#: Families with the layers above: (family, layer, MLP, norm).
GEMMAS = (
    ("gemma2", "Gemma2DecoderLayer", "Gemma2MLP", "Gemma2RMSNorm"),
    ("gemma3", "Gemma3DecoderLayer", "Gemma3MLP", "Gemma3RMSNorm"),
)
GLMS = (
    ("glm4", "Glm4DecoderLayer", "Glm4MLP", "Glm4RMSNorm"),
    ("glm4v", "Glm4vTextDecoderLayer", "Glm4vTextMLP", "Glm4vRMSNorm"),
    ("glm_image", "GlmImageTextDecoderLayer", "GlmImageTextMLP", "GlmImageRMSNorm"),
    ("glm_ocr", "GlmOcrTextDecoderLayer", "GlmOcrTextMLP", "GlmOcrRMSNorm"),
)
OLMOS = (
    ("exaone4", "Exaone4DecoderLayer", "Exaone4MLP", "Exaone4RMSNorm"),
    ("exaone4_5", "Exaone4_5_DecoderLayer", "Exaone4_5_MLP", "Exaone4_5_RMSNorm"),
    ("olmo2", "Olmo2DecoderLayer", "Olmo2MLP", "Olmo2RMSNorm"),
    ("olmo3", "Olmo3DecoderLayer", "Olmo3MLP", "Olmo3RMSNorm"),
)


def like_olmo2(family: str, layer: str, mlp: str, norm: str) -> MLPSpec:
    """The spec of a family with OLMo 2's layer."""
    spec = like_llama(family, layer, mlp)
    return replace(
        spec,
        fused_layer=FusedOlmo2DecoderLayer,
        attention="self_attn",
        norm_kind="rms_norm",
        norm_class=f"{spec.layer_class.rpartition('.')[0]}.{norm}",
        branch_norms=BRANCH_NORMS,
    )


SPECS = (
    *(
        replace(
            like_llama(*names, norm_kind="rms_norm_offset", fused_layer=FusedGemma2DecoderLayer),
            branch_norms=BRANCH_NORMS,
        )
        for names in GEMMAS
    ),
    *(
        with_packed_mlp(
            like_llama(*names, fused_layer=FusedGlm4DecoderLayer), branch_norms=GLM4_BRANCH_NORMS
        )
        for names in GLMS
    ),
    *(like_olmo2(*names) for names in OLMOS),
)
