"""Families whose MLP has no gate, or runs beside the attention: their classes, and encoders."""

import ast
import copy
import importlib
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from hf_triton_mlp import MLPConfig, TritonMLP, patch_model, patch_report
from hf_triton_mlp.patching import MLPSpec

bart: Any = importlib.import_module("hf_triton_mlp.patches.bart")

#: Families with an encoder, whose decoders are patched.
ENCODED = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart",
    "musicgen", "pegasus", "pegasus_x", "plbart", "speech_to_text", "whisper",
)  # fmt: skip
#: What these tests are of.
MODULES = (
    "bart", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "llama_plain", "mpt", "openai", "phi",
)  # fmt: skip
PATCHES: list[Any] = [importlib.import_module(f"hf_triton_mlp.patches.{name}") for name in MODULES]
SPECS = [spec for module in PATCHES for spec in module.SPECS]


def from_config(family: str, auto: Any, **changes: Any) -> Any:
    """A tiny model of another class than the causal LM's."""
    return tiny.randomized(auto.from_config(tiny.config(family, **changes))).eval()


DROPOUTS = {
    "biogpt": ("biogpt", {"hidden_dropout_prob": 0.5}),
    "falcon": ("falcon", {"hidden_dropout": 0.5}),
    "falcon-sequential": (
        "falcon",
        {"hidden_dropout": 0.5, "attention_dropout": 0.5, "parallel_attn": False},
    ),
    "gpt_neox": ("gpt_neox", {"hidden_dropout": 0.5}),
    "gptj": ("gptj", {"resid_pdrop": 0.5}),
    "persimmon": ("persimmon", {"hidden_dropout": 0.5}),
    "phi": ("phi", {"resid_pdrop": 0.5}),
    "starcoder2": ("starcoder2", {"residual_dropout": 0.5}),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_training_runs_the_original(name: str) -> None:
    family, dropout = DROPOUTS[name]
    model = tiny.build(family, **dropout).train()
    inputs = tiny.batch()

    def run() -> Tensor:
        torch.manual_seed(0)
        return model(**inputs).logits

    expected = run()
    model.eval()
    assert not torch.allclose(run(), expected)
    patch_model(model).train()
    assert torch.equal(run(), expected)


def test_hidden_states_and_attentions() -> None:
    """Layers return what transformers records, also from their short forward."""
    for name in ("falcon", "gptj", "gpt_neo", "gpt_bigcode", "mpt", "phi", "xglm"):
        model = tiny.build(name, attn_implementation="eager")
        inputs = tiny.batch(padding="right")
        with torch.no_grad():
            expected = model(**inputs, output_hidden_states=True, output_attentions=True)
            tiny.prove(patch_model(model))
            found = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert found.keys() == expected.keys()
        for ours, theirs in zip(tiny.tensors(found), tiny.tensors(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


def encoded_model(family: str) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model with an encoder, or with states in place of one, and what to generate from."""
    states = torch.randn(2, 5, tiny.HIDDEN, generator=torch.Generator().manual_seed(2))
    if family == "xglm":
        model = tiny.build("xglm", add_cross_attention=True)
        return model, {**tiny.batch(), "encoder_hidden_states": states}
    if family == "musicgen":
        model = tiny.build("musicgen")
        ids = tiny.batch(rows=2 * model.config.num_codebooks)["input_ids"]
        return model, {"input_ids": ids, "encoder_hidden_states": states}
    tokens: dict[str, Any] = {"decoder_start_token_id": 3, "forced_eos_token_id": None}
    if family in ("speech_to_text", "whisper"):
        audio = torch.randn(2, 80, 16, generator=torch.Generator().manual_seed(1))
        heard = {"max_source_positions": 8, "num_mel_bins": 80}
        if family == "speech_to_text":
            audio, heard = audio.mT, {**heard, "conv_kernel_sizes": (5, 5), "conv_channels": 16}
        model = from_config(family, AutoModelForSpeechSeq2Seq, **tokens, **heard)
        return model, {"input_features": audio}
    extra = {"attention_type": "original_full"} if family == "bigbird_pegasus" else {}
    model = from_config(family, AutoModelForSeq2SeqLM, **tokens, **extra)
    return model, tiny.batch(padding="right")


@pytest.mark.parametrize("family", [*ENCODED, "xglm"])
def test_decoders_that_look_at_an_encoder(family: str, device: str) -> None:
    model, inputs = encoded_model(family)
    model, inputs = model.to(device), {name: value.to(device) for name, value in inputs.items()}
    arguments = {"max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}
    decoded = {}
    if "encoder_hidden_states" not in inputs:
        decoded = {"decoder_input_ids": tiny.batch(device)["input_ids"]}

    def run() -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            generated = model.generate(**inputs, **arguments) if decoded else None
            return model(**inputs, **decoded).logits, generated

    original, expected = run()
    patch_model(model)
    rows = patch_report(model).rows
    assert len(rows) == tiny.LAYERS and {row.verified for row in rows} == {"yes"}
    for short in (False, True):
        if short:
            tiny.prove(model)
        logits, tokens = run()
        torch.testing.assert_close(logits, original, rtol=1e-4, atol=1e-4)
        assert expected is None or torch.equal(tokens, expected)


@pytest.mark.parametrize("name", ["phi", "falcon", "bart"])
def test_compiled_in_one_graph(name: str) -> None:
    model = tiny.prove(patch_model(tiny.build(name)))
    inputs = tiny.batch(padding="right")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
def test_bound_launches_beside_the_attention(tokens: int, gated: bool) -> None:
    config = MLPConfig(
        hidden_size=768, intermediate_size=3072, dtype=torch.float16, norm=None, gated=gated
    )
    mlp = TritonMLP(config).cuda()
    a, r, u = torch.randn(3, tokens, 768, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        wide = copy.deepcopy(mlp).float().cpu()
        exact = wide(a.float().cpu(), r.float().cpu(), u.float().cpu())
        rest = mlp.fuse(r)
        assert rest is not None
        first = rest(a, r, u)
        torch.testing.assert_close(first.float().cpu(), exact, rtol=1e-2, atol=1e-2)
        bound = mlp._bound
        assert bound is not None
        again = bound.launches(a, r, True, u)
        assert again is not None and torch.equal(again, first)
        rest = mlp.fuse(r)
        assert rest is not None and torch.equal(rest(a, r, u), first)
        # The same MLP alone: other launches.
        assert bound.launches(a, r, True) is None
        alone = exact - (a + r).float().cpu()
        torch.testing.assert_close(mlp(u).float().cpu(), alone, rtol=1e-2, atol=2e-2)


# --- what the installed transformers computes --------------------------------------------------


class Formula:
    """A forward as one expression of x, its first argument, in eval mode.

    Of an attention's arguments only the first is shown, dropout and tuples not at all. `inner`
    adds its second argument, as MPT's MLP does.
    """

    def __init__(self, cls: Any, layer: Any = None, inner: str = "") -> None:
        self.layer, self.inner = layer, inner
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
        function: Any = ast.parse(source).body[0]
        first, *others = [argument.arg for argument in function.args.args[1:]]
        self.values = {first: "x", **{name: name for name in others}}
        self.text = ""
        self.run(function.body)

    def run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.Assign):
                (target,) = statement.targets
                name = target.elts[0] if isinstance(target, ast.Tuple) else target
                self.values[ast.unparse(name)] = self.expression(statement.value)
            elif isinstance(statement, ast.AugAssign):
                assert isinstance(statement.op, ast.Add)
                name, added = ast.unparse(statement.target), self.expression(statement.value)
                self.values[name] = f"{self.values[name]} + {added}"
            elif isinstance(statement, ast.If):
                encoded = getattr(self.layer, "encoder", None)
                known = {"self": self.layer, "encoder_hidden_states": encoded}
                taken = eval(ast.unparse(statement.test), known)
                self.run(statement.body if taken else statement.orelse)
            elif isinstance(statement, ast.Return):
                value = statement.value
                first = value.elts[0] if isinstance(value, ast.Tuple) else value
                assert first is not None
                self.text = self.expression(first)
            else:  # a docstring
                assert isinstance(statement, ast.Expr)

    def expression(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return self.values[node.id]
        if isinstance(node, ast.BinOp):
            assert isinstance(node.op, ast.Add)
            return f"{self.expression(node.left)} + {self.expression(node.right)}"
        assert isinstance(node, ast.Call), ast.unparse(node)
        name = ast.unparse(node.func).removeprefix("self.")
        given = [*node.args, *(k.value for k in node.keywords if k.arg == "hidden_states")]
        if name == "dropout_add":
            return f"{self.expression(given[1])} + {self.expression(given[0])}"
        if "dropout" in name:
            return self.expression(given[0])
        shown, *rest = [self.expression(argument) for argument in given[: 1 + (name == self.inner)]]
        return " + ".join([f"{name}({shown})", *rest])


def terms(text: str) -> list[str]:
    """The terms of a sum, whose order is free: its rounding is within the bound of a patch."""
    found, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and text.startswith(" + ", i):
            found.append(text[start:i])
            start = i + 3
    return sorted([*found, text[start:]])


def class_named(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), cls)
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {module}")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.layer_class.split(".")[-1])
def test_the_mlps_are_what_the_specs_say(spec: MLPSpec) -> None:
    """A release that changes one of them fails here, before it computes something else."""
    layer = class_named(spec.layer_class)
    if spec.mlp is None:
        return  # its layer is compared below
    mlp = class_named(spec.mlp_class or "")
    assert f"self.{spec.mlp} = {mlp.__name__}(" in inspect.getsource(layer.__init__)
    if spec.gate is not None:
        return  # Cohere's is Llama's
    activation = spec.activation.rpartition(".")[2]
    expected = f"{spec.down}({activation}({spec.up}(x)))"
    added = ["residual"] if spec.family == "mpt" else []
    assert terms(Formula(mlp).text) == sorted([expected, *added])


def behind(norm: str, mlp: str, attention: str, first: str) -> str:
    """A layer whose MLP runs after its attention."""
    s = f"{attention}({first}(x)) + x"
    return f"{mlp}({norm}({s})) + {s}"


def beside(norm: str, attention: str, first: str) -> str:
    """A layer whose MLP runs beside its attention."""
    return f"mlp({norm}(x)) + {attention}({first}(x)) + x"


def falcon(new: bool, parallel: bool, norms: int | None) -> Any:
    config = {"new_decoder_architecture": new, "parallel_attn": parallel}
    return SimpleNamespace(config=SimpleNamespace(**config, num_ln_in_parallel_attn=norms))


OF_LLAMA = behind("post_attention_layernorm", "mlp", "self_attn", "input_layernorm")
OF_GPT2 = behind("ln_2", "mlp", "attn", "ln_1")


def of_opt(s: str) -> str:
    """A layer with its MLP inline, behind a norm of s."""
    return f"fc2(activation_fn(fc1(final_layer_norm({s})))) + {s}"


def of_bart(u: str) -> str:
    """A layer with its MLP inline, between norms."""
    return f"final_layer_norm(fc2(activation_fn(fc1({u}))) + {u})"


ENCODER = SimpleNamespace(encoder=True)
PRE_SUM = "self_attn(self_attn_layer_norm(x)) + x"
OF_OPT = of_opt(PRE_SUM)
CROSSED_OPT = of_opt(f"encoder_attn(encoder_attn_layer_norm({PRE_SUM})) + {PRE_SUM}")
POST_SUM = "self_attn_layer_norm(self_attn(x) + x)"
OF_BART = of_bart(POST_SUM)
CROSSED_BART = of_bart(f"encoder_attn_layer_norm(encoder_attn({POST_SUM}) + {POST_SUM})")
OF_PHI = beside("input_layernorm", "self_attn", "input_layernorm")
OF_FALCON = beside("input_layernorm", "self_attention", "input_layernorm")

#: (family, the layer's attributes that its forward asks for, its formula)
LAYERS: list[tuple[str, Any, str]] = [
    ("arcee", None, OF_LLAMA),
    *((family, None, OF_OPT) for family, _ in bart.PRE_NORM),
    *((family, None, OF_BART) for family, _ in bart.POST_NORM),
    *((family, ENCODER, CROSSED_OPT) for family, _ in bart.PRE_NORM if family != "biogpt"),
    *((family, ENCODER, CROSSED_BART) for family, _ in bart.POST_NORM),
    ("codegen", None, beside("ln_1", "attn", "ln_1")),
    ("cohere", None, OF_PHI),
    ("cohere2", None, OF_PHI),
    ("cosmos3_edge", None, OF_LLAMA),
    ("falcon", falcon(False, True, None), OF_FALCON),
    ("falcon", falcon(True, True, 1), OF_FALCON),
    ("falcon", falcon(True, True, 2), beside("ln_mlp", "self_attention", "ln_attn")),
    (
        "falcon",
        falcon(False, False, None),
        behind("post_attention_layernorm", "mlp", "self_attention", "input_layernorm"),
    ),
    ("gpt_bigcode", None, OF_GPT2),
    ("gpt_neo", None, OF_GPT2),
    (
        "gpt_neox",
        SimpleNamespace(use_parallel_residual=True),
        beside("post_attention_layernorm", "attention", "input_layernorm"),
    ),
    (
        "gpt_neox",
        SimpleNamespace(use_parallel_residual=False),
        behind("post_attention_layernorm", "mlp", "attention", "input_layernorm"),
    ),
    ("gptj", None, beside("ln_1", "attn", "ln_1")),
    ("jais2", None, OF_LLAMA),
    ("mpt", None, behind("norm_2", "ffn", "attn", "norm_1")),
    ("nanochat", None, OF_LLAMA),
    ("persimmon", None, OF_LLAMA),
    ("phi", None, OF_PHI),
    ("starcoder2", None, OF_LLAMA),
]


def sorted_sums(text: str) -> Any:
    """A formula with the terms of every sum in it in one order."""
    parts = terms(text)
    if len(parts) > 1:
        return sorted(map(sorted_sums, parts), key=str)
    name, bracket, rest = text.partition("(")
    return [name, sorted_sums(rest[:-1])] if bracket else name


@pytest.mark.parametrize(("family", "layer", "formula"), LAYERS, ids=lambda value: str(value)[:40])
def test_the_layers_are_what_their_short_forwards_do(family: str, layer: Any, formula: str) -> None:
    spec = next(spec for spec in SPECS if spec.family == family)
    found = Formula(class_named(spec.layer_class), layer, inner="ffn").text
    assert sorted_sums(found) == sorted_sums(formula)


def test_every_fused_layer_has_a_formula() -> None:
    fused = {spec.family for spec in SPECS if spec.fused_layer is not None}
    assert fused == {family for family, _, _ in LAYERS}


@pytest.mark.parametrize("name", ["arcee", "cosmos3_edge", "nanochat"])
def test_the_rms_norms(name: str) -> None:
    """Each is `rms_norm` of ops.py: in float32, with the weight, if any, outside."""
    spec = next(spec for spec in SPECS if spec.family == name)
    cls = class_named(spec.norm_class)
    norm = cls(eps=0.1) if name == "nanochat" else cls(32, eps=0.1)
    tiny.randomized(norm)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.rms_norm(x, (32,), getattr(norm, "weight", None), 0.1)
    torch.testing.assert_close(norm(x), expected)
