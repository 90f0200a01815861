"""Which causal language models of the installed transformers can be patched, and how, or why not.

Each model type is built from its config's defaults on the meta device, and looked at.
`python -m hf_triton_mlp.support README.md` writes the table in the README anew.
"""

import copy
import itertools
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp import layers, patching
from hf_triton_mlp.specs import activation_name

#: What a model type may be, the most first; "unknown" is one that could not be built.
KINDS = (
    "fused layer",
    "MLP",
    "by structure",
    "dense MLPs only",
    "mixture of experts",
    "unsupported activation",
    "refused",
    "MLP of another form",
    "MLP not in one module",
    "no MLP",
)

#: What configs leave out by default and their models need, where that is not about their MLPs.
SIZES = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
MUSICGEN = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {},
}
NEEDED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        }
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "musicgen": MUSICGEN,
    "musicgen_melody": MUSICGEN,
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True},
}


#: Projections as `explain` looks for them, subclasses too.
LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Support:
    """What patch_model does with a model type: one of KINDS, and the class that says so."""

    model_type: str
    kind: str
    detail: str = ""


def model_types() -> tuple[str, ...]:
    """The causal language models that the installed transformers knows."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


@lru_cache(maxsize=1)
def every_support() -> tuple[Support, ...]:
    """The support of every model type, in some 20 s."""
    return tuple(map(support, model_types()))


def support(model_type: str) -> Support:
    """Build a model type without weights and look; the kind is "unknown" where that fails."""
    try:
        model = build(model_type)
    except ValueError as error:
        return Support(model_type, "unknown", str(error))
    return Support(model_type, *classify(model))


def build(model_type: str) -> nn.Module:
    """A causal LM on the meta device, as its config is by default; ValueError with every reason."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    reasons, mapping = [], MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        for config_of in (default_config, _completed, _text):
            try:
                config = config_of(model_type)
                named = type(config) if type(config) in mapping else CONFIG_MAPPING[model_type]
                cls: Any = mapping[named]
                with torch.device("meta"), no_init_weights():
                    return cls(config)
            except Exception as error:  # a config that no one has tried has any error
                reasons.append(f"{type(error).__name__}: {error}")
    finally:
        transformers.logging.set_verbosity(level)
    raise ValueError("; ".join(dict.fromkeys(reasons)))


def default_config(model_type: str) -> PretrainedConfig:
    """A model type's config as it is by default, and with what it needs."""
    return CONFIG_MAPPING[model_type](**copy.deepcopy(NEEDED.get(model_type, {})))


def _completed(model_type: str) -> PretrainedConfig:
    config = default_config(model_type)
    for name, size in SIZES.items():
        if getattr(config, name, size) is None:
            setattr(config, name, size)
    return config


def _text(model_type: str) -> PretrainedConfig:
    config = default_config(model_type).get_text_config(decoder=True)
    return default_config(config.model_type) if config.model_type in NEEDED else config


def classify(model: nn.Module) -> tuple[str, str]:
    """One of KINDS, and the classes that say so."""
    found = list(layers.decoder_layers(model, search=True))
    experts = [name for _, layer, spec in found if (name := layers.experts_of(layer, spec))]
    dense = [row for row in found if layers.experts_of(*row[1:]) is None]
    if not dense:
        return ("mixture of experts", _names(experts)) if experts else explain(model)
    for name, layer, spec in dense:
        try:
            patching._check_layer(spec, name, layer, "layer")
        except ValueError as error:
            unknown = "unknown activation" in str(error)
            return "unsupported activation" if unknown else "refused", str(error)
    names = _names([type(layer).__name__ for _, layer, _ in dense])
    if experts:
        kinds = f"{len(dense)} of {len(found)}, {names}; not {_names(experts)}"
        return "dense MLPs only", kinds
    specs = [spec for _, _, spec in dense]
    if all(layers.by_structure(spec) for spec in specs):
        return "by structure", names
    return ("fused layer" if any(spec.fused_layer for spec in specs) else "MLP"), names


def explain(model: nn.Module) -> tuple[str, str]:
    """Why nothing in a model is supported: what its layers have instead of such an MLP."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = list(max(lists, key=len, default=[]))
    different = {type(layer): layer for layer in reversed(layers)}
    reasons = [_explain_layer(layer) for layer in reversed(different.values())]
    found = (reason for reason in reasons if reason[0] != "no MLP")
    return next(found, reasons[0] if reasons else ("no MLP", type(model).__name__))


def _explain_layer(layer: nn.Module) -> tuple[str, str]:
    linear: list[nn.Module] = []
    for name, module in layer.named_modules():
        children = list(module.children())
        if "attention" in name or "attn" in name or _mixes(children):
            continue
        linear += [child for child in children if isinstance(child, LINEAR)]
        if module is layer or not _expands(children):
            continue
        others = [child for child in children if not isinstance(child, (*LINEAR, nn.Dropout))]
        if len(others) == 1 and not module._parameters and activation_name(others[0]) is None:
            return "unsupported activation", type(others[0]).__name__
        return "MLP of another form", type(module).__name__
    return "MLP not in one module" if _expands(linear) else "no MLP", type(layer).__name__


def _mixes(modules: list[nn.Module]) -> bool:
    """Whether these are the parts of a state-space mixer or of a convolution along the text."""
    return any(isinstance(module, nn.Conv1d) for module in modules)


def _expands(modules: list[nn.Module]) -> bool:
    """Whether a projection among these leads to another size, and one back (from a part of it)."""
    shapes = [tuple(module.weight.shape) for module in modules if isinstance(module, LINEAR)]
    return any(
        a[0] != a[1] and b[0] == a[1] and a[0] % b[1] == 0
        for a, b in itertools.permutations(shapes, 2)
    )


def _names(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


#: Where a file has the table; the test of the README names the command that writes it.
MARKED = re.compile(r"(<!-- support: [^\n]* -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown() -> str:
    """The table of all model types, by kind."""
    every = every_support()
    lines = [
        f"| transformers {transformers.__version__} | of {len(every)} causal language models |",
        "|---|---|",
    ]
    for kind in (*KINDS, "unknown"):
        names = [each.model_type for each in every if each.kind == kind]
        if names:
            lines.append(f"| {kind} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def write(path: Path) -> None:
    """Put the table between the markers of a file; ValueError where it has none."""
    text = path.read_text()
    if MARKED.search(text) is None:
        raise ValueError(f"{path} has no `<!-- support: ... -->` before a `<!-- end -->`")
    path.write_text(MARKED.sub(lambda found: found[1] + markdown() + found[2], text))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
