"""Every type of causal language model of the installed transformers, patched against unpatched."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import transformers
from torch import Tensor, nn

from hf_triton_mlp import TritonMLP, patch_model, patch_report, support, unpatch_model
from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.specs import full_name, specs

#: What the report says of the comparison before patching, by the kind of a type's support.
VERIFIED = {
    "fused layer": {"yes"},
    "MLP": {"yes"},
    "by structure": {"yes, by structure"},
    "dense MLPs only": {"yes", "yes, by structure"},
}
#: What patch_model says of the other kinds.
REFUSALS = {
    "mixture of experts": r"mixture-of-experts MLPs \(\w+\) are not supported",
    "refused": "has parameters of its own, which no kernel reads",
    "MLP of another form": "has no decoder layer that hf_triton_mlp supports; supported",
    "MLP not in one module": "has no decoder layer that hf_triton_mlp supports; supported",
    "no MLP": "has no decoder layer that hf_triton_mlp supports; supported",
}

#: What no tiny config builds, or runs, and why.
NOT_BUILT = {"gemma3n": "its vision model needs timm; gemma3n_text is its language model"}
NOT_GENERATED = {
    "blt": "its config has no number of layers, which generate() asks for",
    "gemma4_assistant": "it guesses tokens for another model, from that one's keys and values",
    "gemma4_unified_assistant": "it guesses tokens for another model",
    "musicgen": "its tokens are of audio, in several codebooks",
}
#: Types whose masks are not for float64, which are their own reference.
NOT_WIDE = {"prophetnet": "it adds two masks that overflow", "xglm": "its mask overflows"}

#: Other types whose language models have spec'd layers.
FURTHER = (
    "cosmos3_edge_text", "eurobert", "exaone4_5", "glm4v_text", "glm_image_text", "glm_ocr_text",
    "granite_docling_text", "hunyuan_vl_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_text",
    "ultrabert",
)  # fmt: skip
#: Other configs than the default: (type, what is different).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus-relu2": ("apertus", {"hidden_act": "relu2"}),
    "apertus1p5-relu2": ("apertus1p5_text", {"hidden_act": "relu2"}),
    "arcee-bias": ("arcee", {"mlp_bias": True}),
    "bert-chunked": ("bert", {"chunk_size_feed_forward": 1}),
    "bert-decoder": ("bert", {"is_decoder": True}),
    "falcon-alibi": ("falcon", {"alibi": True, "parallel_attn": False}),
    "falcon-bias": ("falcon", {"bias": True}),
    "falcon-sequential": ("falcon", {"parallel_attn": False}),
    "falcon-two-norms": ("falcon", {"bias": True, "new_decoder_architecture": True}),
    "falcon-one-norm": (
        "falcon",
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "granite-multiplied": ("granite", {"residual_multiplier": 0.3, "mlp_bias": True}),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        {"num_local_experts": 0, "residual_multiplier": 0.3},
    ),
    "nemotron-bias": ("nemotron", {"mlp_bias": True}),
    "starcoder2-no-bias": ("starcoder2", {"use_bias": False, "hidden_act": "silu"}),
}
TYPES = {name: (name, {}) for name in (*support.model_types(), *FURTHER)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {**TYPES, **VARIANTS}

README = Path(__file__).parents[1] / "README.md"
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
SPECS = {spec.layer_class: spec for spec in specs()}


def published() -> dict[str, str]:
    """The kind of every type as the README says it, where that is of the installed transformers."""
    text = README.read_text()
    if f"| transformers {transformers.__version__} |" not in text:
        return {}
    rows = re.findall(r"^\| ([\w ]+) \(\d+\) \| (.*) \|$", text, re.MULTILINE)
    return {name: kind for kind, names in rows for name in names.split(", ")}


PUBLISHED = published()


def musicgen_inputs(model: Any) -> dict[str, Any]:
    """Tokens of every codebook."""
    padded = tiny.batch(model.device, rows=2 * model.config.num_codebooks)
    return {"input_ids": padded["input_ids"]}


def assistant_inputs(model: Any) -> dict[str, Any]:
    """A token's states, and keys and values, as of the model that it guesses for."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator).to(model.device, model.dtype)

    heads = {layer.self_attn.layer_type: layer.self_attn.head_dim for layer in model.model.layers}
    return {
        "inputs_embeds": random(1, 2 * model.config.backbone_hidden_size),
        "shared_kv_states": {
            name: (random(tiny.HEADS // 2, 7, size), random(tiny.HEADS // 2, 7, size))
            for name, size in heads.items()
        },
    }


def uncached_inputs(model: Any) -> dict[str, Any]:
    return {**tiny.batch(model.device, padding="right"), "use_cache": False}


#: What a type's model is called with, where it is not tokens and their mask.
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "blt": uncached_inputs,
    "gemma4_assistant": assistant_inputs,
    "gemma4_unified_assistant": assistant_inputs,
    "musicgen": musicgen_inputs,
}


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Of a model without a head its last hidden states."""
    with torch.no_grad():
        return next(iter(model(**inputs).values()))


def tokens(model: Any) -> Tensor | None:
    """Greedy tokens of a left-padded batch."""
    if not model.can_generate():
        return None
    # Random models repeat one token for ever unless they are kept from it.
    arguments = {"max_new_tokens": 5, "do_sample": False, "no_repeat_ngram_size": 1}
    return model.generate(**tiny.batch(model.device), **arguments)


@contextmanager
def recorded_calls() -> Iterator[set[TritonMLP]]:
    """Which MLPs compute something meanwhile."""
    called: set[TritonMLP] = set()
    forward = TritonMLP.forward

    def recorded(self: TritonMLP, *args: Any, **kwargs: Any) -> Tensor:
        called.add(self)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonMLP, "forward", recorded)
        yield called


def depths(model: nn.Module) -> tuple[str, ...]:
    """The depths that differ: where no layer is fused "layer" is "mlp", and OPT has no MLP."""
    found = (SPECS.get(full_name(type(module))) for module in model.modules())
    both = any(spec is not None and len(spec.depths) == 2 for spec in found)
    return ("layer", "mlp") if both else ("layer",)


@pytest.mark.parametrize("name", CASES)
def test_every_type(name: str, device: str) -> None:
    if name in NOT_BUILT:
        pytest.skip(NOT_BUILT[name])
    model_type, changes = CASES[name]
    model = tiny.build(model_type, experts_implementation="eager", **changes)
    kind, _ = support.classify(model)
    assert kind == PUBLISHED.get(name, kind)
    if kind in REFUSALS:
        before = tiny.tree(model)
        with pytest.raises(ValueError, match=REFUSALS[kind]):
            patch_model(model)
        assert tiny.tree(model) == before
        return
    for dtype in DTYPES[device]:
        assert_same(name, kind, copy.deepcopy(model).to(device, dtype))


def assert_same(name: str, kind: str, model: Any) -> None:
    """Whether a model, patched, is the same to whoever calls it; on the CPU also to the last bit.

    There the original forwards run; the short ones do, too, where they are being proven.
    """
    if name in NOT_WIDE:
        wide = copy.deepcopy(model).to("cpu", torch.float32)
    else:
        wide = tiny.reference_of(model, model.dtype)
    given = INPUTS.get(name, lambda model: tiny.batch(model.device, padding="right"))
    original = logits(model, given(model))
    exact = logits(wide, given(wide)).to(original.device)
    assert original.isfinite().all()
    # In 16 bits the two best tokens of a random model are the same one too often.
    generated = name not in NOT_GENERATED and model.dtype == torch.float32
    expected = tokens(model) if generated else None
    keys, before = list(model.state_dict()), tiny.tree(model)  # BigBird's changed when it ran

    def assert_tokens() -> None:
        assert expected is None or torch.equal(tokens(model), expected)

    for depth in depths(model):
        patch_model(model, depth=depth)
        rows = [row for row in patch_report(model).rows if "experts" not in row.reason]
        assert {row.verified for row in rows} <= VERIFIED[kind]
        assert {row.reason for row in rows} == {""}
        fused = [module for module in model.modules() if isinstance(module, FusedLayer)]
        assert bool(fused) is (kind == "fused layer" and depth == "layer")
        assert list(model.state_dict()) == keys
        if model.device.type == "cpu":
            assert torch.equal(logits(model, given(model)), original)
            assert_tokens()
            tiny.prove(model)
        with recorded_calls() as called:
            tiny.assert_as_accurate(logits(model, given(model)), original, exact)
        inside = {module for layer in fused for module in layer.modules()}
        assert called and {each for each in inside if isinstance(each, TritonMLP)} <= called
        assert_tokens()
        assert tiny.tree(unpatch_model(model)) == before
        assert torch.equal(logits(model, given(model)), original)
