"""Tiny models of every family and variant, and how closely two of them must agree."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCABULARY = 97
HIDDEN = 24
LAYERS = 3

FAMILIES = ("gpt2", "bloom", "opt", "llama")
MLP_FAMILIES = ("gpt2", "bloom", "llama")  # OPT has no MLP module for depth="mlp"
DEPTHS = [(family, "layer") for family in FAMILIES] + [(family, "mlp") for family in MLP_FAMILIES]
CAUSAL: dict[str, type[PreTrainedModel]] = {
    "gpt2": GPT2LMHeadModel,
    "bloom": BloomForCausalLM,
    "opt": OPTForCausalLM,
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "smollm3": SmolLM3ForCausalLM,
    "gemma": GemmaForCausalLM,
    "granite": GraniteForCausalLM,
    "gemma2": Gemma2ForCausalLM,
    "olmo2": Olmo2ForCausalLM,
}

#: The families of `VARIANTS` with Llama's layer, or one that differs by its norms.
LLAMA_SHAPED: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "smollm3": SmolLM3Config,
    "gemma": GemmaConfig,
    "granite": GraniteConfig,
    "gemma2": Gemma2Config,
    "olmo2": Olmo2Config,
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


def config(family: str, **changes: Any) -> PretrainedConfig:
    """A tiny config, without dropout unless `changes` names some."""
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"n_positions": 64, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4}
        return GPT2Config(**{**common, **sizes, **dropout, **changes})
    if family == "bloom":
        dropout = dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0)
        sizes = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4}
        return BloomConfig(**{**common, **sizes, **dropout, **changes})
    if family in LLAMA_SHAPED:
        sizes = {
            "max_position_embeddings": 64,
            "hidden_size": HIDDEN,
            "intermediate_size": 80,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
        }
        return LLAMA_SHAPED[family](**{**common, **sizes, **changes})
    dropout = dict.fromkeys(("dropout", "attention_dropout"), 0.0)
    sizes = {
        "max_position_embeddings": 64,
        "hidden_size": HIDDEN,
        "ffn_dim": 80,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "word_embed_proj_dim": HIDDEN,
    }
    return OPTConfig(**{**common, **sizes, **dropout, **changes})


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


def build(family: str, cls: type[PreTrainedModel] | None = None, **changes: Any) -> Any:
    """A randomized tiny model in eval mode: a causal LM unless `cls` is another class."""
    model = (cls or CAUSAL[family])(config(family, **changes))
    return randomized(model).eval()


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
