"""Gemma 2, OLMo 2, GLM-4 and others, which normalize what attention and MLP add to the residual."""

from torch import Tensor

from .llama import FusedLlamaDecoderLayer, like_llama
from .packed import with_packed_mlp


class FusedGemma2DecoderLayer(FusedLlamaDecoderLayer):
    """Llama's layer with a norm behind its attention and one behind its MLP."""

    norm_name = "pre_feedforward_layernorm"
    branch_norm_names = "post_attention_layernorm", "post_feedforward_layernorm"


class FusedGlm4DecoderLayer(FusedLlamaDecoderLayer):
    """Gemma 2's layer, whose norms have other names."""

    norm_name = "post_attention_layernorm"
    branch_norm_names = "post_self_attn_layernorm", "post_mlp_layernorm"


class FusedOlmo2DecoderLayer(FusedLlamaDecoderLayer):
    """Gemma 2's layer without the norms in front of its attention and its MLP."""

    norm_name = None
    branch_norm_names = "post_attention_layernorm", "post_feedforward_layernorm"

    def normed(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


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


SPECS = (
    *(
        like_llama(*names, norm_kind="rms_norm_offset", fused_layer=FusedGemma2DecoderLayer)
        for names in GEMMAS
    ),
    *(with_packed_mlp(like_llama(*names, fused_layer=FusedGlm4DecoderLayer)) for names in GLMS),
    *(like_llama(*names, fused_layer=FusedOlmo2DecoderLayer) for names in OLMOS),
)
