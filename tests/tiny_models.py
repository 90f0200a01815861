"""Tiny models of every type and variant, and how closely two of them must agree."""

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from hf_triton_mlp import TritonMLP, support

VOCABULARY = 97
HIDDEN = 32
INTERMEDIATE = 51
LAYERS = 3
HEADS = 4
HEAD_DIM = HIDDEN // HEADS

FAMILIES = ("gpt2", "bloom", "opt", "llama")
MLP_FAMILIES = ("gpt2", "bloom", "llama")  # OPT has no MLP module for depth="mlp"
DEPTHS = [(family, "layer") for family in FAMILIES] + [(family, "mlp") for family in MLP_FAMILIES]

#: What sizes are, by the names that configs have for them, where they are larger by default.
SIZES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    (HIDDEN, "hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_dim lru_width"),
    (HIDDEN, "hidden_size_global backbone_hidden_size output_channels"),
    (INTERMEDIATE, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size"),
    (INTERMEDIATE, "shared_intermediate_size dff mlp_dim"),
    (16, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    (16, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    (LAYERS, "num_hidden_layers num_layers n_layer n_layers num_blocks"),
    (LAYERS, "encoder_layers decoder_layers num_encoder_layers num_decoder_layers"),
    (HEADS, "num_attention_heads num_heads n_head n_heads attention_heads"),
    (HEADS, "encoder_attention_heads decoder_attention_heads"),
    (HEADS, "num_encoder_attention_heads num_decoder_attention_heads"),
    (HEADS, "linear_num_heads linear_num_value_heads mamba_n_heads mamba_num_heads"),
    (HEADS // 2, "num_key_value_heads num_kv_heads linear_num_key_heads index_n_heads"),
    (HEAD_DIM, "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim"),
    (HEAD_DIM, "linear_head_dim linear_key_head_dim linear_value_head_dim"),
    (HEAD_DIM, "q_lora_rank kv_lora_rank laurel_rank gated_norm_rank mamba_d_state"),
    (HEAD_DIM, "ssm_state_size hidden_size_per_layer_input"),
    (HEAD_DIM // 2, "rotary_dim sliding_window window_size attention_window_size patch_size"),
    (2 * HEAD_DIM, "mamba_head_dim"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length mamba_d_ssm"),
    (64, "max_source_positions max_target_positions"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_k moe_topk index_topk n_langs num_codebooks",
    ),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts num_expert_group"),
    (1, "n_group topk_group n_groups mamba_n_groups first_k_dense_replace num_dense_layers"),
    (16, "image_size nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel"),
)
SMALL = {name: size for size, names in SIZES for name in names.split()}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

#: What a type's config has besides: sizes that go by other rules, and a layer of every kind.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
SLIDING = {
    "num_hidden_layers": 4,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blenderbot": {"encoder_layers": 3},  # the size of the cache
    "bloom": {"n_layer": LAYERS},
    "cohere_compass_text": {
        "rope_parameters": {
            name: {**MROPE, "mrope_section": [1, 1, 2]}
            for name in ("full_attention", "sliding_attention")
        }
    },
    "cosmos3_edge_text": {"rope_parameters": MROPE},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_head_dim": 2 * HEAD_DIM,
        "swa_q_lora_rank": HEAD_DIM,
        "swa_kv_lora_rank": HEAD_DIM,
        "swa_qk_nope_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
    },
    "flint": {"mlp_only_layers": [0]},
    "fuyu": {"image_token_id": 96},
    "gemma3n_text": {
        **SLIDING,
        "num_kv_shared_layers": 2,
        "intermediate_size": 4 * [INTERMEDIATE],
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {**SLIDING, "global_head_dim": 2 * HEAD_DIM},
    "gemma4_unified_text": {**SLIDING, "global_head_dim": 2 * HEAD_DIM},
    "glm4v_text": {"rope_parameters": MROPE},
    "glm_image_text": {"rope_parameters": MROPE},
    "glm_ocr_text": {"rope_parameters": MROPE},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "hunyuan_vl_text": {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1, 0]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "intermediate_size": 56},
    "mamba2": {"num_heads": 2 * HEADS},
    "moshi": {"ffn_dim": 52},
    "moshi_depth": {"ffn_dim": 52},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "reformer": {"axial_pos_embds_dim": [16, 16]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


class Place(NamedTuple):
    """Where a family's parts are: `layers` from a causal LM, the others from a layer."""

    layers: str
    attention: str
    norms: tuple[str, str]
    projections: tuple[str, str]
    activation: str
    gate: str | None = None


PLACES = {
    "gpt2": Place("transformer.h", "attn", ("ln_1", "ln_2"), ("mlp.c_fc", "mlp.c_proj"), "mlp.act"),
    "bloom": Place(
        "transformer.h",
        "self_attention",
        ("input_layernorm", "post_attention_layernorm"),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "mlp.gelu_impl",
    ),
    "opt": Place(
        "model.decoder.layers",
        "self_attn",
        ("self_attn_layer_norm", "final_layer_norm"),
        ("fc1", "fc2"),
        "activation_fn",
    ),
    "llama": Place(
        "model.layers",
        "self_attn",
        ("input_layernorm", "post_attention_layernorm"),
        ("mlp.up_proj", "mlp.down_proj"),
        "mlp.act_fn",
        "mlp.gate_proj",
    ),
}

#: Every variant of a family, and what differs from the family's tiny config.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}),
    "gpt2-gelu": ("gpt2", {"activation_function": "gelu", "n_inner": 51}),
    "gpt2-gelu_pytorch_tanh": ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
    "gpt2-silu": ("gpt2", {"activation_function": "silu", "n_inner": 17}),
    "gpt2-quick_gelu": ("gpt2", {"activation_function": "quick_gelu"}),
    "gpt2-relu2": ("gpt2", {"activation_function": "relu2"}),
    "gpt2-scaled-attention": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-upcast-attention": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt2-epsilon": ("gpt2", {"layer_norm_epsilon": 0.1}),
    "bloom": ("bloom", {}),
    "bloom-residual-after-norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "bloom-tp": ("bloom", {"pretraining_tp": 2, "slow_but_exact": False}),
    "bloom-exact": ("bloom", {"pretraining_tp": 1, "slow_but_exact": True}),
    "opt": ("opt", {}),
    "opt-gelu": ("opt", {"activation_function": "gelu", "ffn_dim": 51}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-no-bias": ("opt", {"enable_bias": False}),
    "opt-no-affine": ("opt", {"layer_norm_elementwise_affine": False}),
    "opt-galactica": (
        "opt",
        {
            "activation_function": "gelu",
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
        },
    ),
    "opt-post-norm-plain": (
        "opt",
        {
            "do_layer_norm_before": False,
            "layer_norm_elementwise_affine": False,
            "enable_bias": False,
        },
    ),
    "opt-no-final-norm": ("opt", {"_remove_final_layer_norm": True}),
    "llama": ("llama", {}),
    "llama-gelu": ("llama", {"hidden_act": "gelu", "intermediate_size": 51}),
    "llama-bias": ("llama", {"mlp_bias": True, "attention_bias": True, "intermediate_size": 17}),
    "llama-epsilon": ("llama", {"rms_norm_eps": 0.1, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"intermediate_size": 51}),
    "smollm3": ("smollm3", {}),
    "gemma": ("gemma", {}),
    "granite": ("granite", {"residual_multiplier": 0.3, "mlp_bias": True}),
    "gemma2": ("gemma2", {"sliding_window": 4}),
    "olmo2": ("olmo2", {}),
}

MLP_VARIANTS = [name for name, (family, _) in VARIANTS.items() if family != "opt"]
VARIANT_DEPTHS = [(name, "layer") for name in VARIANTS] + [(name, "mlp") for name in MLP_VARIANTS]


def config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A model type's tiny config, without dropout unless `changes` names some.

    Of a config whose causal language model takes one of its parts, that part.
    """
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    default = support.default_config(model_type)
    if model_class(model_type).config_class in default.sub_configs.values():
        default = default.get_text_config(decoder=True)
    return shrunk(default, changes)


def model_class(model_type: str) -> Any:
    """The causal language model of a type, or the model without a head where it has none."""
    config_class = CONFIG_MAPPING[model_type]
    causal = config_class in MODEL_FOR_CAUSAL_LM_MAPPING
    return (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_MAPPING)[config_class]


def shrunk(default: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """A config with small sizes, one layer of every kind, and changes, also to its parts."""
    fields = vars(default)
    small = {
        name: size
        for name, size in SMALL.items()
        if name in fields and is_larger(fields[name], size, name in support.SIZES)
    }
    if fields.get("kv_lora_rank") is not None:
        small["num_key_value_heads"] = HEADS
    small |= {name: token for name, token in TOKENS.items() if name in fields}
    small |= {name: 0.0 for name in fields if "drop" in name and isinstance(fields[name], float)}
    needed = support.NEEDED.get(default.model_type, {})
    own = OWN.get(default.model_type, {})
    wanted = changes.get("num_hidden_layers")
    changes = copy.deepcopy({**needed, **small, **per_layer(default, wanted), **own, **changes})
    for name, part in fields.items():
        if isinstance(part, PretrainedConfig):
            of_part = changes.get(name, {})
            of_part.pop("model_type", None)
            changes[name] = shrunk(part, of_part)
    return type(default)(**changes)


def is_larger(value: Any, size: int, needed: bool) -> bool:
    """Whether a size of a config is to be another; needed: also where there is none."""
    return needed if value is None else isinstance(value, int) and value > size


def per_layer(default: PretrainedConfig, wanted: int | None) -> dict[str, Any]:
    """What a config says of its layers, if they differ: of `wanted`, or one of each and LAYERS."""
    count = vars(default).get("num_hidden_layers")
    lists = {
        name: values
        for name, values in vars(default).items()
        if isinstance(values, list) and len(values) == count
    }
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    if len(kinds) < 2:
        return {}
    number = wanted or max(len(kinds), LAYERS)
    layers = list(itertools.islice(itertools.cycle(kinds), number))
    columns = dict(zip(lists, map(list, zip(*layers, strict=True)), strict=True))
    return {**columns, "num_hidden_layers": len(layers)}


def layer_count(family: str, layers: int) -> dict[str, int]:
    """The change to a config that makes it so many layers."""
    return {"n_layer" if family in ("gpt2", "bloom") else "num_hidden_layers": layers}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with every parameter drawn anew: fresh models have zero biases and unit norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith("weight") and parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * drawn)
            else:
                parameter.copy_(0.25 * drawn)
    return model


def build(model_type: str, cls: type[PreTrainedModel] | None = None, **changes: Any) -> Any:
    """A randomized tiny model in eval mode: a causal LM, where there is one, or a `cls`."""
    made = config(model_type, **changes)
    return randomized((cls or model_class(model_type))(made)).eval()


def prove(model: nn.Module) -> Any:
    """Let a patched model run its short forwards, on the CPU too."""
    for module in model.modules():
        if isinstance(module, TritonMLP):
            module.proving = True
    return model


def build_variant(name: str, **changes: Any) -> Any:
    family, own = VARIANTS[name]
    return build(family, **own, **changes)


def decoder_layers(family: str, model: nn.Module) -> list[Any]:
    return list(model.get_submodule(PLACES[family].layers))


def batch(
    device: str = "cpu", rows: int = 2, length: int = 7, padding: str = "left"
) -> dict[str, Tensor]:
    """Token ids, padded in every row but the first."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        padded = slice(row + 1) if padding == "left" else slice(-row - 1, None)
        ids[row, padded], mask[row, padded] = 0, 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def reference_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The unpatched model in a wider type: what both sides are measured against."""
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False  # the same formula; upcasting is to float32
    return reference.to(torch.float64 if dtype == torch.float32 else torch.float32)


def logits(model: Any, device: str = "cpu") -> Tensor:
    """Of two texts, one of them padded."""
    with torch.no_grad():
        return model(**batch(device)).logits


def assert_as_accurate(patched: Tensor, original: Tensor, reference: Tensor) -> None:
    """RMS and maximum error at most twice the unpatched model's own, plus a floor of 8 eps.

    Errors are relative to the reference's RMS. The floor is for outputs where torch happens to
    round to nearly the exact value: a reordered sum of some tens of terms of unit size moves a
    value by a few eps, and its largest elements, of some 4 RMS, by as many eps of their own.
    """
    assert patched.shape == original.shape and patched.dtype == original.dtype
    reference = reference.double()
    scale = reference.square().mean().sqrt()
    own, found = (((tensor.double() - reference) / scale).abs() for tensor in (original, patched))
    floor = 8 * torch.finfo(patched.dtype).eps
    for name, measure in (("RMS", lambda e: e.square().mean().sqrt()), ("maximum", torch.max)):
        error, bound = measure(found).item(), 2 * measure(own).item() + floor
        assert error <= bound, f"{name} error {error:.3e}, bound {bound:.3e}"


def tree(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that a patch could leave behind: each module by identity, class and attributes."""
    return [
        (
            name,
            id(module),
            type(module),
            tuple(sorted(module.__dict__)),
            tuple((key, id(child)) for key, child in module._modules.items()),
            tuple((key, id(p), p is None or p.stride()) for key, p in module._parameters.items()),
            module.training,
        )
        for name, module in model.named_modules()
    ]


def tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of a model output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, (tuple, list)) or hasattr(output, "__iter__"):
        return [tensor for part in output for tensor in tensors(part)]
    return []
