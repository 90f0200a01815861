"""Llama, and the families whose decoder layers or MLPs are Llama's under other names."""

import importlib
import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_triton_mlp.attention import attend, is_deferred
from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec
from hf_triton_mlp.reading import computes_the_same, is_from
from hf_triton_mlp.step_ops import normed


class FusedLlamaDecoderLayer(FusedLayer):
    """LlamaDecoderLayer whose attention residual, norm, MLP and residual are one TritonMLP call."""

    input_layernorm: Any
    self_attn: Any

    #: The norm in front of the MLP.
    norm_name: str | None = "post_attention_layernorm"
    #: The norms behind the attention and behind the MLP.
    branch_norm_names: tuple[str, str] | None = None

    def rest(self, hidden_states: Tensor) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """What follows the attention, as `TritonMLP.fuse` returns it."""
        norm = None if self.norm_name is None else getattr(self, self.norm_name)
        return self.mlp.fuse(hidden_states, norm, branch_norms=self.branch_norms())

    def branch_norms(self) -> tuple[Any, Any] | None:
        """The modules of branch_norm_names."""
        names = self.branch_norm_names
        return None if names is None else (getattr(self, names[0]), getattr(self, names[1]))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rest = self.rest(hidden_states)
        if rest is None:
            return super().forward(hidden_states, *args, **kwargs)
        named = self.named(args, kwargs)
        normed = self.normed(hidden_states)
        cache = named.get("cache", named.get("past_key_values"))
        if is_deferred(cache) and _is_llamas(type(self.self_attn)):
            step = cache, named["attention_mask"], named["position_embeddings"]
            return rest(self.attend(normed, *step), hidden_states)
        attention, _ = self.self_attn(hidden_states=normed, **named)
        return rest(attention, hidden_states)

    def normed(self, hidden_states: Tensor) -> Tensor:
        """What the attention takes."""
        return self.norm(self.input_layernorm, hidden_states)

    def norm(self, module: Any, states: Tensor) -> Tensor:
        """module(states), an RMSNorm of the family."""
        config = self.mlp.mlp_config
        return normed(module, states, config.norm or config.branch_norm, self.mlp.norm_class)

    def attend(
        self, normed: Tensor, cache: Any, mask: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """LlamaAttention for one token in a captured step, where the kernel rotates it."""
        module = self.self_attn
        query, key, value = (
            projection(normed).unflatten(-1, (-1, module.head_dim))
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        if _norms_heads(type(module)):
            query = self.norm(module.q_norm, query)
            key = self.norm(module.k_norm, key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        key, value = cache.update(key, value, module.layer_idx)
        scaling = module.scaling
        heads, _ = attend(module, query, key, value, mask, scaling=scaling, rotation=rotation)
        return module.o_proj(heads.flatten(2))


class FusedVaultGemmaDecoderLayer(FusedLlamaDecoderLayer):
    """Llama's layer, whose second norm has another name."""

    norm_name = "pre_feedforward_layernorm"


class FusedGraniteDecoderLayer(FusedLlamaDecoderLayer):
    """Llama's layer, whose attention and MLP are multiplied before they join the residual."""

    residual_multiplier: float

    def rest(self, hidden_states: Tensor) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        if self.residual_multiplier != self.mlp.mlp_config.branch_scale:  # changed since the patch
            return None
        return super().rest(hidden_states)


def _is_llamas(attention: type[Any]) -> bool:
    """Whether an attention computes what Llama's does, but for windows, which are the mask's."""
    llama, mistral, qwen2 = (
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        for name in ("llama", "mistral", "qwen2")
    )
    names = inspect.unwrap(attention.forward).__globals__
    rotate = names.get("apply_rotary_pos_emb")
    return (
        rotate is not None
        and _computes(rotate, llama, "apply_rotary_pos_emb")
        and _computes(inspect.unwrap(rotate).__globals__["rotate_half"], llama, "rotate_half")
        and (
            _computes(attention.forward, llama, "LlamaAttention.forward")
            or _computes(attention.forward, mistral, "MistralAttention.forward")
            or _computes(attention.forward, qwen2, "Qwen2Attention.forward")
            or _norms_heads(attention)
        )
    )


def _norms_heads(attention: type[Any]) -> bool:
    """Whether it is as Qwen3's, which normalizes queries and keys before it rotates them."""
    qwen3 = importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    return _computes(attention.forward, qwen3, "Qwen3Attention.forward")


def _computes(function: Callable[..., Any], module: Any, name: str) -> bool:
    """Whether a function computes what a module's does, unless that one was replaced."""
    theirs = operator.attrgetter(name)(module)
    return is_from(theirs, module) and computes_the_same(function, theirs)


#: Families with Llama's layer, MLP and RMSNorm: (family, layer, MLP, norm).
LAYERS = (
    ("csm", "CsmDecoderLayer", "CsmMLP", "CsmRMSNorm"),
    ("cwm", "CwmDecoderLayer", "CwmMLP", "CwmRMSNorm"),
    ("diffllama", "DiffLlamaDecoderLayer", "DiffLlamaMLP", "DiffLlamaRMSNorm"),
    ("ernie4_5", "Ernie4_5DecoderLayer", "Ernie4_5MLP", "Ernie4_5RMSNorm"),
    ("eurobert", "EuroBertDecoderLayer", "EuroBertMLP", "EuroBertRMSNorm"),
    (
        "hunyuan_v1_dense",
        "HunYuanDenseV1DecoderLayer",
        "HunYuanDenseV1MLP",
        "HunYuanDenseV1RMSNorm",
    ),
    ("hunyuan_vl", "HunYuanVLDenseV1DecoderLayer", "HunYuanVLMLP", "HunYuanVLRMSNorm"),
    ("llama", "LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm"),
    ("ministral", "MinistralDecoderLayer", "MinistralMLP", "MinistralRMSNorm"),
    ("ministral3", "Ministral3DecoderLayer", "Ministral3MLP", "Ministral3RMSNorm"),
    ("mistral", "MistralDecoderLayer", "MistralMLP", "MistralRMSNorm"),
    ("paddleocr_vl", "PaddleOCRDecoderLayer", "PaddleOCRMLP", "PaddleOCRRMSNorm"),
    ("qwen2", "Qwen2DecoderLayer", "Qwen2MLP", "Qwen2RMSNorm"),
    ("qwen2_5_omni", "Qwen2_5OmniDecoderLayer", "Qwen2MLP", "Qwen2_5OmniRMSNorm"),
    ("qwen2_5_vl", "Qwen2_5_VLDecoderLayer", "Qwen2MLP", "Qwen2_5_VLRMSNorm"),
    ("qwen2_vl", "Qwen2VLDecoderLayer", "Qwen2MLP", "Qwen2VLRMSNorm"),
    ("qwen3", "Qwen3DecoderLayer", "Qwen3MLP", "Qwen3RMSNorm"),
    ("qwen3_vl", "Qwen3VLTextDecoderLayer", "Qwen3VLTextMLP", "Qwen3VLTextRMSNorm"),
    ("smollm3", "SmolLM3DecoderLayer", "SmolLM3MLP", "SmolLM3RMSNorm"),
    ("ultrabert", "UltrabertDecoderLayer", "UltrabertMLP", "UltrabertRMSNorm"),
    ("youtu", "YoutuDecoderLayer", "YoutuMLP", "YoutuRMSNorm"),
)

#: Families with Granite's layer: Llama's but for a multiplier of what joins the residual.
GRANITES = (
    ("granite", "GraniteDecoderLayer", "GraniteMLP", "GraniteRMSNorm"),
    (
        "granite4_vision",
        "Granite4VisionTextDecoderLayer",
        "Granite4VisionTextMLP",
        "Granite4VisionTextRMSNorm",
    ),
    (
        "granite_docling",
        "GraniteDoclingTextDecoderLayer",
        "GraniteDoclingTextMLP",
        "GraniteDoclingTextRMSNorm",
    ),
    ("granite_swa", "GraniteSWADecoderLayer", "GraniteSWAMLP", "GraniteSWARMSNorm"),
)

#: Families with Llama's MLP in a layer, or behind a norm, of their own: (family, layer, MLP).
MLPS = (
    ("blt", "BltTransformerLayer", "BltMLP"),
    ("chameleon", "ChameleonDecoderLayer", "ChameleonMLP"),
    ("chameleon", "ChameleonSwinDecoderLayer", "ChameleonMLP"),
    ("cohere_compass", "CohereCompassDecoderLayer", "CohereCompassMLP"),
    ("emu3", "Emu3DecoderLayer", "Emu3MLP"),
    ("evolla", "EvollaDecoderLayer", "EvollaMLP"),
    ("helium", "HeliumDecoderLayer", "HeliumMLP"),
    ("hrm_text", "HrmTextDecoderLayer", "HrmTextMLP"),
    ("hyperclovax", "HyperCLOVAXDecoderLayer", "HyperCLOVAXMLP"),
    ("minicpm3", "MiniCPM3DecoderLayer", "MiniCPM3MLP"),
    ("mllama", "MllamaCrossAttentionDecoderLayer", "MllamaTextMLP"),
    ("mllama", "MllamaSelfAttentionDecoderLayer", "MllamaTextMLP"),
    ("olmo", "OlmoDecoderLayer", "OlmoMLP"),
    ("qwen3_5", "Qwen3_5DecoderLayer", "Qwen3_5MLP"),
    ("stablelm", "StableLmDecoderLayer", "StableLmMLP"),
)


def like_llama(
    family: str,
    layer: str,
    mlp: str,
    norm: str | None = None,
    *,
    norm_kind: str = "rms_norm",
    fused_layer: type[FusedLlamaDecoderLayer] = FusedLlamaDecoderLayer,
) -> MLPSpec:
    """The spec of a family with Llama's MLP, and with a norm its layer, or one like it."""
    module = f"transformers.models.{family}.modeling_{family}"
    fused: dict[str, Any] = {}
    if norm is not None:
        fused = {
            "fused_layer": fused_layer,
            "attention": "self_attn",
            "norm": None if fused_layer.norm_name is None else lambda layer: fused_layer.norm_name,
            "norm_kind": norm_kind,
            "norm_class": f"{module}.{norm}",
            "branch_norms": fused_layer.branch_norm_names,
        }
    if fused_layer is FusedGraniteDecoderLayer:
        fused["branch_scale"] = lambda layer: layer.residual_multiplier
    return MLPSpec(
        family=family,
        layer_class=f"{module}.{layer}",
        mlp="mlp",
        mlp_class=f"{module}.{mlp}",
        up="up_proj",
        gate="gate_proj",
        down="down_proj",
        activation="mlp.act_fn",
        **fused,
    )


#: Gemma's layer is Llama's with RMSNorms that multiply by 1 + weight.
GEMMAS = (
    like_llama(
        "gemma", "GemmaDecoderLayer", "GemmaMLP", "GemmaRMSNorm", norm_kind="rms_norm_offset"
    ),
    like_llama(
        "vaultgemma",
        "VaultGemmaDecoderLayer",
        "VaultGemmaMLP",
        "VaultGemmaRMSNorm",
        norm_kind="rms_norm_offset",
        fused_layer=FusedVaultGemmaDecoderLayer,
    ),
)

SPECS = (
    *(like_llama(*names) for names in (*LAYERS, *MLPS)),
    *GEMMAS,
    *(like_llama(*names, fused_layer=FusedGraniteDecoderLayer) for names in GRANITES),
)
