"""What every rank does in test_parallel.py; as a program, one rank of a group.

python parallel_cases.py KIND RANK SIZE INIT RESULTS: runs the cases of a kind in their order, and
the first rank writes a line {"case": …, "error": …} for each of them.
"""

import copy
import io
import json
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
import torch.distributed as dist
from test_sparse import opt
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    GenerationConfig,
)

from hf_triton_mlp import (
    MLPConfig,
    QuantizationConfig,
    TritonMLP,
    decoding,
    launchers,
    load_sharded,
    ops,
    parallel,
    patch_model,
    patch_report,
    patched,
    patching,
    tuning,
    unpatch_model,
    validate,
)
from hf_triton_mlp.linear import QuantizedLinear, dequantize_linears, quantized_linears
from hf_triton_mlp.reading import is_shard

#: Instead of the odd size that tiny models have by default, one that 2 and 4 ranks divide.
INTERMEDIATE = 56
SIZE_NAMES = {"gpt2": "n_inner", "opt": "ffn_dim"}

#: Seconds that a rank waits for others.
PATIENCE = 120

#: Where this rank's models are.
DEVICE = "cpu"

#: Whatever the variants are not: up and gate in one projection, MLPs beside the attention, with
#: another class of linear layers, behind cross-attention, in the middle of a layer's classes.
MORE = {
    "bart": {}, "bert": {"is_decoder": True}, "cohere": {}, "falcon": {}, "gemma3_text": {},
    "glm": {}, "glm4": {}, "gptj": {}, "gpt_neox": {}, "mpt": {}, "openai-gpt": {}, "phi": {},
    "phi3": {}, "seed_oss": {}, "starcoder2": {},
}  # fmt: skip

FORMATS = {
    "int8": QuantizationConfig(format="int8"),
    "int8-groups": QuantizationConfig(format="int8", group_size=32),
    "int4": QuantizationConfig(format="int4", group_size=32),
    "int4-asymmetric": QuantizationConfig(format="int4", group_size=64, symmetric=False),
    "int4-one-group": QuantizationConfig(format="int4", group_size=128),
    "fp8": QuantizationConfig(format="fp8", activations="fp8"),
}
#: The up projection's inputs, and a rank's part of the down projection's, are whole groups.
QUANTIZED = {
    "gpt2": {"n_inner": 256},
    "opt": {"ffn_dim": 256},
    "llama": {"intermediate_size": 256, "mlp_bias": True},
    "phi3": {"intermediate_size": 256},
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Case = Callable[[], None]


def group() -> Any:
    return dist.group.WORLD


def build(variant: str, size: int = INTERMEDIATE, **changes: Any) -> Any:
    family, own = tiny.VARIANTS.get(variant, (variant, {}))
    name = SIZE_NAMES.get(family, "intermediate_size")
    sizes = {name: size} if name in own or family in SIZE_NAMES else {}
    tiny.SMALL.update({name: size for name, old in tiny.SMALL.items() if old == tiny.INTERMEDIATE})
    return tiny.build(family, **{**own, **sizes, **changes}).to(DEVICE)


def logits(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch(DEVICE, padding="right"), **arguments).logits


def tokens(model: Any, count: int = 8, **arguments: Any) -> Tensor:
    options = {"max_new_tokens": count, "do_sample": False, "no_repeat_ngram_size": 1}
    return model.generate(**tiny.batch(DEVICE), **options, **arguments)


def proving(model: Any, value: bool) -> Any:
    for module in model.modules():
        if isinstance(module, TritonMLP):
            module.proving = value
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


def raised(call: Callable[[], Any], *kinds: type[Exception]) -> str:
    try:
        call()
    except kinds as error:
        return str(error)
    raise AssertionError(f"no {kinds} was raised")


def same_as_unshared(model: Any, dtype: torch.dtype, **arguments: Any) -> None:
    """Logits within the bound, tokens and the state_dict equal, and the way back exact."""
    size, rank = dist.get_world_size(), dist.get_rank()
    model = model.to(dtype)
    exact = tiny.reference_of(model, dtype)
    reference, own, before, tree = logits(exact), logits(model), state(model), tiny.tree(model)
    generates = dtype is torch.float32 and hasattr(model, "lm_head")
    expected = tokens(model) if generates else None
    whole = sum(p.numel() for p in model.parameters())
    projections = sum(
        p.numel()
        for *_, layer, spec in patching.decoder_layers(model, search=True)
        for path in spec.paths
        for p in spec.owner(layer).get_submodule(path).parameters()
        if p.dim() == 2
    )
    patch_model(model, mp_group=group(), **arguments)
    shared = sum(p.numel() for p in model.parameters())
    assert whole - shared >= projections * (size - 1) // size > 0
    rows = patch_report(model).rows
    assert {row.part for row in rows if row.replaced != "-"} == {f"rank {rank} of {size}"}
    for _ in range(2 if DEVICE == "cpu" else 3):  # on a GPU the second are of bound launches
        tiny.assert_as_accurate(logits(model), own, reference)
    try:  # the sums that the kernels leave to the first rank
        tiny.assert_as_accurate(logits(proving(model, True)), own, reference)
    finally:
        proving(model, False)
    if expected is not None:
        assert torch.equal(tokens(model), expected)
    assert_equal_states(model.state_dict(), before)
    unpatch_model(model)
    assert tiny.tree(model) == tree
    assert_equal_states(state(model), before)


def family(name: str, depth: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    for dtype in dtypes if depth == "layer" else dtypes[:1]:
        same_as_unshared(build(name, **MORE.get(name, {})), dtype, depth=depth)


def quantized(name: str, form: str) -> None:
    """As the unshared model that is quantized in the same way, whose codes the checkpoint has."""
    config = FORMATS[form]
    model = tiny.build(name, **QUANTIZED[name]).to(DEVICE)
    expected = patch_model(copy.deepcopy(model), quantization=config)
    exact = copy.deepcopy(model)
    for path, linear in quantized_linears(expected):
        exact.set_submodule(path, copy.deepcopy(linear).dequantized(torch.float32))
    own = logits(exact)
    dequantize_linears(exact, torch.float64)
    patch_model(model, quantization=config, mp_group=group(), keep_originals=True)
    assert len(dict(quantized_linears(model))) == len(dict(quantized_linears(expected)))
    reference = logits(exact.double())
    tiny.assert_as_accurate(logits(model), own, reference)
    tiny.assert_as_accurate(logits(proving(model, True)), own, reference)
    proving(model, False)
    codes = [linear.quantized.nbytes for _, linear in quantized_linears(model)]
    of_all = [linear.quantized.nbytes for _, linear in quantized_linears(expected)]
    assert sum(codes) < 0.6 * sum(of_all) if dist.get_world_size() == 2 else True
    assert_equal_states(model.state_dict(), state(expected))
    assert torch.equal(tokens(model), tokens(expected))
    # Weights of the same parts, in float32 again.
    with_parts = copy.deepcopy(model)
    dequantize_linears(with_parts, torch.float32)
    tiny.assert_as_accurate(logits(with_parts), own, reference)
    assert not any(isinstance(m, QuantizedLinear) for m in with_parts.modules())
    assert any(map(is_shard, with_parts.modules()))
    unpatch_model(model)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def checkpoints() -> None:
    """What all ranks save is loaded by plain transformers, and weights of one are loaded."""
    folder = Path(dist_folder()) / "saved"
    for name in ("gpt2", "opt", "llama"):
        model = build(name)
        before, expected = state(model), tokens(model)
        patch_model(model, mp_group=group())
        model.save_pretrained(folder / name, is_main_process=dist.get_rank() == 0)
        dist.barrier()
        loaded = AutoModelForCausalLM.from_pretrained(folder / name).to(DEVICE)
        assert_equal_states(state(loaded), before)
        assert torch.equal(tokens(loaded), expected)
        other = tiny.randomized(copy.deepcopy(loaded), seed=3)
        expected = tokens(other)
        model.load_state_dict(other.state_dict())
        assert torch.equal(tokens(model), expected)
        assert_equal_states(model.state_dict(), state(other))
        model.load_state_dict(loaded.state_dict(), assign=True)
        assert_equal_states(state(unpatch_model(model)), before)
        patch_model(model, mp_group=group())
        narrow = {name: p.detach() for name, p in model.named_parameters()}
        assert "whole" in raised(partial(model.load_state_dict, narrow, False), RuntimeError)
        dist.barrier()


def dist_folder() -> str:
    found: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def gradients() -> None:
    """As unshared, of the inputs and of all parameters; a rank has its part of some."""
    for name in ("gpt2", "opt-post-norm", "llama-bias", "gemma2", "phi3", "bloom"):
        plain = build(name)
        inputs = tiny.batch(DEVICE, padding="right")
        plain(**inputs, labels=inputs["input_ids"]).loss.backward()
        model = build(name)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()  # gradients of whole sizes
        patch_model(model, mp_group=group())
        for training in (False, True):
            model.zero_grad()
            model.train(training)(**inputs, labels=inputs["input_ids"]).loss.backward()
            shards = {path: m for path, m in model.named_modules() if is_shard(m)}
            for (path, parameter), whole in zip(
                model.named_parameters(), plain.parameters(), strict=True
            ):
                owner, _, leaf = path.rpartition(".")
                expected = whole.grad
                if owner in shards and leaf in shards[owner].split:
                    shard = shards[owner]
                    expected = shard.part.take(expected, shard.split[leaf])
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)
        unpatch_model(model)(**inputs, labels=inputs["input_ids"]).loss.backward()  # again


H, I = 24, 64  # noqa: E741
FORMS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"pre_norm": False},
    "gated": {"norm": "rms_norm", "gated": True, "activation": "silu"},
    "scaled": {"branch_scale": 0.3},
    "branch norms": {"norm": "rms_norm", "branch_norm": "rms_norm"},
    "no norm": {"norm": None},
}


def own_weights() -> None:
    """A TritonMLP of its own, in all forms, and its gradients."""
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    for options in FORMS.values():
        config = MLPConfig(hidden_size=H, intermediate_size=I, **options)
        whole = TritonMLP(config).to(DEVICE).eval()
        shared = MLPConfig(hidden_size=H, intermediate_size=I, mp_size=size, **options)
        mlp = TritonMLP(shared, mp_group=group()).to(DEVICE).eval()
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                parameter.copy_(randn(*parameter.shape))
                blocks = 2 if config.gated and name.startswith("inter") else 1
                dim = {"inter_w": 0, "inter_b": 0, "output_w": 1}.get(name)
                part = parameter
                if dim is not None:
                    part = parallel.Part(mlp.ranks, dim, blocks).take(parameter, dim)
                getattr(mlp, name).copy_(part)
        assert mlp.inter_w.shape[0] == whole.inter_w.shape[0] // size
        a, r, u = randn(3, H), randn(3, H), randn(3, H)
        calls = [(a,), (a, r), (a, r, None, randn(H))]
        if config.norm is None:
            calls = [(a,), (a, r), (a, r, u), (a, r, u, randn(H)), (a, None, u)]
        for call in calls:
            with torch.no_grad():
                expected = whole(*call)
                for proves in (False, True):
                    mlp.proving = proves
                    torch.testing.assert_close(mlp(*call), expected, rtol=1e-4, atol=1e-4)
            mlp.proving = False
            given = [None if x is None else x.clone().requires_grad_() for x in call]
            theirs = [None if x is None else x.clone().requires_grad_() for x in call]
            mlp(*given).square().sum().backward()
            whole(*theirs).square().sum().backward()
            for found, expected in zip(given, theirs, strict=True):
                if found is not None:
                    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-2)
    wrong = MLPConfig(hidden_size=H, intermediate_size=I, mp_size=size + 1)
    assert f"{size} ranks" in raised(lambda: TritonMLP(wrong, mp_group=group()), ValueError)
    assert "no mp_group" in raised(lambda: TritonMLP(shared), ValueError)
    odd = MLPConfig(hidden_size=H, intermediate_size=I + 1, mp_size=size)
    assert "65" in raised(lambda: TritonMLP(odd, mp_group=group()), ValueError)
    assert rank == mlp.ranks.rank


def merged_checkpoints() -> None:
    """Each rank has a checkpoint's part with its scales; merged they are one MLP."""
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    groups, part = 4, I // size
    shapes = {"inter_w": (part, H), "output_w": (H, part)}
    codes = {
        name: torch.randint(-127, 128, (size, *shape), generator=generator, dtype=torch.int8)
        for name, shape in shapes.items()
    }
    scales = {name: torch.rand(size, groups, generator=generator) / 100 for name in shapes}
    vectors = {"inter_b": torch.randn(I, generator=generator).half()}
    vectors["output_b"] = torch.randn(H, generator=generator).half()
    options = {"hidden_size": H, "intermediate_size": I, "dtype": torch.int8, "norm": None}
    # DeepSpeed merges the scales of columns as it merges the columns.
    q_scales = [scales["inter_w"], scales["output_w"].t().contiguous()]
    whole = TritonMLP(MLPConfig(**options), None, q_scales, groups, merge_count=size).eval()
    own = [scales[name][rank] for name in shapes]
    config = MLPConfig(**options, mp_size=size)
    mlp = TritonMLP(config, group(), own, groups).eval()
    with torch.no_grad():
        for dim, name in enumerate(shapes):
            getattr(whole, name).copy_(torch.cat(list(codes[name]), dim))
            getattr(mlp, name).copy_(codes[name][rank])
        for name, vector in vectors.items():
            getattr(whole, name).copy_(vector)
        mlp.inter_b.copy_(vectors["inter_b"].chunk(size)[rank])
        mlp.output_b.copy_(vectors["output_b"])
        whole, mlp = whole.float().to(DEVICE), mlp.float().to(DEVICE)
        x, r = torch.randn(2, 3, H, generator=generator).to(DEVICE)
        torch.testing.assert_close(mlp(x, r), whole(x, r), rtol=1e-4, atol=1e-4)
        mlp.proving = True
        torch.testing.assert_close(mlp(x, r), whole(x, r), rtol=1e-4, atol=1e-4)


def copies() -> None:
    """Copies share the group and the parts; pickles are refused, and moves change nothing."""
    model = build("llama")
    expected, half = logits(model), logits(copy.deepcopy(model).half())
    patch_model(model, mp_group=group(), cuda_graphs=True)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert torch.equal(logits(twin), logits(model))
    torch.testing.assert_close(logits(twin), expected, rtol=1e-4, atol=1e-4)
    assert_equal_states(state(unpatch_model(twin)), state(model))
    for call in (partial(pickle.dumps, model), lambda: torch.save(model, io.BytesIO())):
        assert "unpatch_model" in raised(call, TypeError)
    torch.testing.assert_close(logits(model.half()), half, rtol=0.05, atol=0.05)
    assert "rows of rank" in repr(model) and "columns of rank" in repr(model)


def twice() -> None:
    """Patched again, for a while, without the group or with more than there can be."""
    model = build("opt")
    expected, before = tokens(model), tiny.tree(model)
    with patched(model, mp_group=group()):
        assert torch.equal(tokens(model), expected)
        assert patch_model(model, mp_group=group()) is model
        assert "already patched" in raised(lambda: patch_model(model), ValueError)
        quantized = partial(patch_model, model, mp_group=group(), quantization="int8")
        assert "unpatch_model first" in raised(quantized, ValueError)
    assert tiny.tree(model) == before
    patch_model(model)
    again = partial(patch_model, model, mp_group=group())
    assert "without an mp_group" in raised(again, ValueError)
    unpatch_model(model)
    patch_model(model, include=[0], mp_group=group())
    assert torch.equal(tokens(patch_model(model, include=[2], mp_group=group())), expected)
    assert [row.part != "" for row in patch_report(model).rows] == [True, False, True]
    assert tiny.tree(unpatch_model(model)) == before


def adapters() -> None:
    """Refused before, and never computed around."""
    from peft import LoraConfig, get_peft_model

    def adapted(model: Any) -> Any:
        return get_peft_model(model, LoraConfig(target_modules=["fc1", "up_proj", "down_proj"]))

    for name in ("opt", "llama"):
        call = partial(patch_model, adapted(build(name)), mp_group=group())
        assert "cannot be shared" in raised(call, ValueError)
        model = adapted(patch_model(build(name), mp_group=group()))
        raised(lambda m=model: logits(m), RuntimeError)
        raised(lambda m=model: logits(proving(m, True)), RuntimeError)


def meta() -> None:
    """Without weights a model is shared too, and says which parts of them a rank needs."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, conv in (("gpt2", True), ("llama", False), ("phi3", False)):
        whole = build(name)
        full = state(whole)
        model = build(name).to("meta")
        before = {name: p.shape for name, p in model.named_parameters()}
        patch_model(model, mp_group=group())
        seen = 0
        for path, module in model.named_modules():
            for leaf, pieces in parallel.parts(module).items():
                values = full[f"{path}.{leaf}"]
                part = torch.cat([values.narrow(*piece) for piece in pieces], pieces[0][0])
                assert part.shape == getattr(module, leaf).shape
                expected = module.part.take(values, module.split[leaf])
                assert torch.equal(part, expected)
                seen += 1
        assert seen > 0
        up = {"gpt2": "c_fc", "llama": "up_proj", "phi3": "gate_up_proj"}[name]
        linear = next(m for path, m in model.named_modules() if path.endswith(up))
        (weight, *more) = parallel.parts(linear)["weight"]
        length = whole.state_dict()[next(k for k in full if k.endswith(f"{up}.weight"))]
        length = length.shape[1 if conv else 0] // (1 + len(more)) // size
        assert weight == (int(conv), rank * length, length)
        assert len(more) == (name == "phi3")
        shapes = {k: t.shape for k, t in model.state_dict().items()}
        assert shapes == {k: t.shape for k, t in full.items()}
        unpatch_model(model)
        assert {name: p.shape for name, p in model.named_parameters()} == before


def captured_steps() -> None:
    """generate()'s own loop, which is a CUDA graph's on a GPU."""
    decoding.ON_CPU = True
    said: list[str] = []
    decoding._say = said.append  # type: ignore[assignment]
    for name in ("gpt2", "bloom", "opt", "llama", "phi3", "gemma2"):
        for dtype in (torch.float32,) if DEVICE == "cpu" else (torch.float32, torch.float16):
            model = build(name).to(dtype)
            greedy = {"max_new_tokens": 8, "do_sample": False}
            expected = tokens(model), model.generate(**tiny.batch(DEVICE), **greedy)
            patch_model(model, cuda_graphs=True, mp_group=group())
            found = tokens(model), model.generate(**tiny.batch(DEVICE), **greedy)
            again = tokens(model), model.generate(**tiny.batch(DEVICE), **greedy)
            assert all(map(torch.equal, found, again))
            if dtype is torch.float32:
                assert all(map(torch.equal, found, expected))
            if DEVICE != "cpu":
                assert "captured in" in patch_report(model).decoding
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, [each.tolist() for each in found])
            assert all(each == every[0] for each in every)
            unpatch_model(model)
    assert not said, said


def alike() -> None:
    """generate() is called with the same on all ranks, which choose the first one's tokens."""
    rank, size = dist.get_rank(), dist.get_world_size()
    decoding.ON_CPU = True
    model, batch = build("opt"), tiny.batch(DEVICE)
    before, cls = tiny.tree(model), type(model)

    def generated(count: int = 9, **arguments: Any) -> Tensor:
        sampled = {"max_new_tokens": count, "do_sample": True, "top_k": 20}
        return model.generate(**{**batch, **sampled, **arguments})

    torch.manual_seed(3)
    expected = generated(), generated()
    for graphs in (False, True):
        patch_model(model, mp_group=group(), cuda_graphs=graphs)
        assert type(model).__name__ == cls.__name__ and type(model).__module__ == cls.__module__
        torch.manual_seed(3)
        assert all(map(torch.equal, (generated(), generated()), expected))
        other = {"input_ids": batch["input_ids"].clone()}
        other["input_ids"][0, -1] += rank
        for arguments, said in (
            (other, "input_ids; there (2,"),
            ({"count": 9 + rank}, f"max_new_tokens; there {9 + 1}, on rank 0 9"),
            ({"repetition_penalty": 1.0 + rank}, "repetition_penalty"),
            ({"eos_token_id": [5, 6 + rank]}, "eos_token_id; there [5, 7], on rank 0 [5, 6]"),
            ({"generation_config": GenerationConfig(min_new_tokens=1 + rank)}, "min_new_tokens"),
        ):
            found = raised(partial(generated, **arguments), ValueError)
            assert "rank 1 differs" in found and said in found, found
        torch.manual_seed(rank)
        assert "manual_seed" in raised(generated, ValueError)
        model.generation_config.do_sample = True
        by_default = partial(model.generate, batch["input_ids"], GenerationConfig(max_new_tokens=3))
        assert "manual_seed" in raised(by_default, ValueError)
        model.generation_config.do_sample = None
        assert "own clock" in raised(partial(generated, max_time=9.0, do_sample=False), ValueError)
        torch.manual_seed(3)
        limits = {"max_time": 9.0} if rank > 0 else {}
        assert "max_time" in raised(partial(generated, **limits), ValueError)
        hook = model.lm_head.register_forward_hook(lambda *_: None) if rank == 0 else None
        torch.manual_seed(3)
        assert all(map(torch.equal, (generated(), generated()), expected))
        if hook is not None:
            hook.remove()
        torch.manual_seed(rank)
        with torch.no_grad():
            plain = model(**batch).logits
            assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, plain)
            long, bits = (
                torch.zeros(1, 1 << 14, tiny.HIDDEN, device=DEVICE),
                torch.eye(size, tiny.HIDDEN),
            )
            for inputs, said in (
                ({**batch, **other}, "input_ids; there (2,"),
                ({"input_ids": batch["input_ids"][:, rank:]}, "input_ids; there (2, "),
                ({**batch, "logits_to_keep": 1 + rank}, "logits_to_keep; there 2, on rank 0 1"),
                ({"inputs_embeds": long + bits[rank].to(DEVICE)}, "inputs_embeds"),  # same sum
            ):
                found = raised(lambda inputs=inputs: model(**inputs), ValueError)
                assert "what the model is called with" in found and said in found, found
            inner = partial(model.model.decoder, other["input_ids"])
            assert "input_ids; there (2," in raised(inner, ValueError)
            model.train(rank == 0)
            assert "training" in raised(partial(model, **batch), ValueError)
            model.eval()
            with torch.autocast(DEVICE.partition(":")[0], torch.bfloat16, enabled=rank == 0):
                assert "autocast" in raised(generated, ValueError)
        with torch.set_grad_enabled(rank == 0):
            assert "gradients" in raised(partial(model, **batch), ValueError)
        beams = {"num_beams": 2, "do_sample": False, "top_k": None}
        reader = Reader() if rank == 0 else None
        assert "streamer" in raised(partial(generated, streamer=reader, **beams), ValueError)
        generated(do_sample=False, top_k=None)  # draws nothing
        model.generate(
            **batch, max_new_tokens=3, streamer=Reader() if rank == 0 else None, do_sample=False
        )
        # Another one's last product is off, as it may be by rounding on another GPU.
        own = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(torch.randn_like(own) if rank > 0 else own.detach())
        for options in ({"do_sample": False, "top_k": None}, {}, {"repetition_penalty": 1.2}):
            torch.manual_seed(5)
            found = generated(**options)
            every: list[Any] = [None] * size
            dist.all_gather_object(every, found.tolist())
            assert all(each == every[0] for each in every)
        model.lm_head.weight = own
        torch.manual_seed(3)
        assert all(map(torch.equal, (generated(), generated()), expected))
        kept, expected_state = model.forward, state(model)
        ddp = partial(nn.parallel.DistributedDataParallel, model)
        assert "unpatch_model" in raised(ddp, ValueError)
        assert_equal_states(state(model), expected_state)
        unpatch_model(model)
        assert type(model) is cls and tiny.tree(model) == before
        assert "ranks_of_model" not in vars(model)
        with torch.no_grad():
            assert torch.equal(kept(**batch).logits, model(**batch).logits)
        torch.manual_seed(3)
        assert all(map(torch.equal, (generated(), generated()), expected))
        # Either may come first, and go first.
        patch_model(model, include=[0], cuda_graphs=True)
        with patched(model, include=[2], mp_group=group()):
            assert torch.equal(tokens(model), tokens(model))
        unpatch_model(model)
        assert type(model) is cls and tiny.tree(model) == before


def nested() -> None:
    """generate() of a model within another, which the other's calls."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**small, "intermediate_size": 16, "image_size": 8, "patch_size": 4},
        qformer_config={
            **small, "intermediate_size": 16, "encoder_hidden_size": 16, "vocab_size": 50
        },
        text_config={
            **small, "model_type": "opt", "ffn_dim": INTERMEDIATE, "word_embed_proj_dim": 16,
            "max_position_embeddings": 64, "vocab_size": 97,
        },
        num_query_tokens=2,
        image_token_index=96,
    )  # fmt: skip
    model = tiny.randomized(Blip2ForConditionalGeneration(config).eval()).to(DEVICE)
    ids = torch.tensor([[96, 96, 5, 6]], device=DEVICE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def generated() -> Tensor:
        pixels = torch.arange(192.0, device=DEVICE).view(1, 3, 8, 8) / 192
        lengths = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        return model.generate(pixel_values=pixels, **batch, **lengths)

    expected, classes = generated(), {type(m) for m in model.modules()}
    patch_model(model, mp_group=group())
    assert torch.equal(generated(), expected)
    head = model.language_model.lm_head
    head.weight = nn.Parameter(
        torch.randn_like(head.weight) if dist.get_rank() > 0 else head.weight.detach()
    )
    assert torch.equal(generated(), expected)
    unpatch_model(model)
    assert {type(m) for m in model.modules()} == classes


class Reader:
    """A streamer."""

    def put(self, value: Any) -> None:
        pass

    def end(self) -> None:
        pass


def compiled() -> None:
    """In one graph, with the sum of all ranks in it."""
    model = build("llama")
    expected = logits(model)
    patch_model(model, mp_group=group())
    torch.compiler.reset()
    found = logits(torch.compile(model, fullgraph=True, backend="aot_eager"), use_cache=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def validated() -> None:
    original = build("gpt2")
    model = patch_model(copy.deepcopy(original), mp_group=group())
    report = validate(original, model, {"padded": tiny.batch(DEVICE)}, max_new_tokens=6)
    assert report.passed, report.failures


# --- what is refused, and what fails ----------------------------------------------------------


def refused() -> None:
    """All ranks get an error that says which rank and what; the model stays as it was."""
    size, rank = dist.get_world_size(), dist.get_rank()

    def refuses(model: Any, *kinds: type[Exception], **arguments: Any) -> str:
        before, values = tiny.tree(model), state(model)
        message = raised(partial(patch_model, model, **{"mp_group": group(), **arguments}), *kinds)
        assert tiny.tree(model) == before
        assert_equal_states(state(model), values)
        return message

    odd = refuses(build("opt", size=51), ValueError)
    assert "51 is not a multiple" in odd and "decoder.layers.0" in odd, odd
    cut = refuses(build("opt", size=96), ValueError, quantization=FORMATS["int4-asymmetric"])
    assert "groups of 64" in cut, cut
    words = refuses(build("opt", size=8 + 16), ValueError, quantization=FORMATS["int4-one-group"])
    assert "int4" in words, words
    assert "ProcessGroup" in refuses(build("opt"), TypeError, mp_group="world")
    first = dist.new_group([0])
    if rank == 0:  # one rank alone: a plain patch
        model = patch_model(build("opt"), mp_group=first)
        assert {row.part for row in patch_report(model).rows} == {""}
        unpatch_model(model)
    else:
        assert "not in mp_group" in refuses(build("opt"), ValueError, mp_group=first)

    differs = build("opt")
    if rank == size - 1:
        with torch.no_grad():
            differs.lm_head.weight[3, 2] += 1e-3
    message = refuses(differs, ValueError)
    assert f"rank {size - 1} differs" in message and "weight" in message, message
    message = refuses(build("opt", num_hidden_layers=2 + rank), ValueError)
    assert "rank 1 differs" in message and "layers.2" in message, message
    message = refuses(build("opt"), ValueError, sparsity="off" if rank else "auto")
    assert "rank 1 differs" in message and "sparsity" in message, message

    broken = build("opt")
    if rank == 1:
        broken.model.decoder.layers[1].activation_fn = nn.Softplus()
    message = refuses(broken, RuntimeError, ValueError)
    assert "Softplus" in message and (rank == 1 or "rank 1" in message), message
    errors = patching.proof.errors
    if rank == 1:

        def out_of_memory(*given: Any) -> Any:
            raise RuntimeError("CUDA out of memory")

        patching.proof.errors = out_of_memory  # type: ignore[assignment]
    try:
        message = refuses(build("opt"), RuntimeError, ValueError)
    finally:
        patching.proof.errors = errors
    assert "out of memory" in message and (rank == 1 or "rank 1" in message), message
    shared = build("llama")
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    assert "another module" in refuses(shared, ValueError)


def interrupted() -> None:
    """One rank fails after it replaced some layers, or quantized some: all are as before."""
    rank = dist.get_rank()
    for name in ("gpt2", "opt", "phi3"):
        for arguments in ({}, {"quantization": "int8", "keep_originals": True}):
            model = build(name)
            expected, before, values = tokens(model), tiny.tree(model), state(model)
            install, quantize = patching._install, patching._quantize
            calls: list[int] = []

            def failing(function: Any, *given: Any, done: Any = calls) -> Any:
                done.append(1)
                if rank == 1 and len(done) == 2:
                    raise MemoryError("none left")
                return function(*given)

            changed = "_quantize" if arguments else "_install"
            setattr(patching, changed, partial(failing, quantize if arguments else install))
            try:
                patching_call = partial(
                    patch_model, model, mp_group=group(), verify=False, **arguments
                )
                message = raised(patching_call, MemoryError, RuntimeError)
            finally:
                patching._install, patching._quantize = install, quantize
            assert "none left" in message and (rank == 1 or "rank 1" in message)
            assert tiny.tree(model) == before
            assert_equal_states(state(model), values)
            assert torch.equal(tokens(model), expected)
            patch_model(model, mp_group=group())
            assert torch.equal(tokens(model), expected)


def stuck() -> None:
    """A rank that does not come is waited for as long as the group says."""
    waiting = dist.new_group(timeout=timedelta(seconds=2))
    model = patch_model(build("opt"), mp_group=waiting)
    if dist.get_rank() < dist.get_world_size() - 1:
        begun = time.monotonic()
        message = raised(lambda: tokens(model), RuntimeError)
        assert "lost the others while comparing" in message, message
        assert time.monotonic() - begun < 20
    dist.barrier()


def killed() -> None:
    """The last case: a rank that is gone ends the others' calls with an error."""
    model, size = patch_model(build("opt"), mp_group=group()), dist.get_world_size()
    config = MLPConfig(hidden_size=H, intermediate_size=I, mp_size=size)
    mlp = TritonMLP(config, mp_group=group()).eval()
    dist.barrier()
    if dist.get_rank() == size - 1:
        os._exit(3)
    message = raised(lambda: mlp(torch.ones(1, H)), RuntimeError)
    assert "lost the others while adding up" in message, message
    message = raised(lambda: tokens(model, 40), RuntimeError)
    assert "lost the others while comparing" in message, message
    message = raised(model.state_dict, RuntimeError)
    assert "lost the others while gathering" in message, message
    message = raised(lambda: patch_model(build("gpt2"), mp_group=group()), RuntimeError)
    assert "lost the others while" in message, message


# --- under the interpreter --------------------------------------------------------------------


def interpreted(name: str, **changes: Any) -> None:
    """The kernels compute it, in all ranks."""
    arguments = changes.pop("arguments", {})
    layers = tiny.layer_count(tiny.VARIANTS.get(name, (name,))[0], 1)
    launched: list[int] = []
    places = (ops, "mlp"), (launchers, "normed_mlp"), (launchers, "branch_normed_mlp")
    originals = {(m, n): getattr(m, n) for m, n in places}

    def counted(function: Any, *given: Any, **named: Any) -> Any:
        launched.append(1)
        return function(*given, **named)

    for dtype in (torch.float32, torch.float16):
        model = tiny.build(name, **{**layers, **changes}) if changes else build(name, **layers)
        model = model.to(dtype)
        exact = copy.deepcopy(model)
        if arguments:
            patch_model(exact, **arguments, verify=False)
            for path, linear in list(quantized_linears(exact)):
                exact.set_submodule(path, linear.dequantized(dtype))
            unpatch_model(exact)
        own = logits(exact)
        reference = logits(tiny.reference_of(exact, dtype))
        patch_model(model, mp_group=group(), verify=False, **arguments)
        try:
            for (module, attribute), function in originals.items():
                setattr(module, attribute, partial(counted, function))
            found = logits(model)
        finally:
            for (module, attribute), function in originals.items():
                setattr(module, attribute, function)
        assert launched
        tiny.assert_as_accurate(found, own, reference)


def zeros() -> None:
    """Each rank skips those of its part of the hidden values."""
    tuning.SPARSE_BYTES = dict.fromkeys(tuning.SPARSE_BYTES, 8_000)
    tuning.SPARSE_COST = dict.fromkeys(tuning.SPARSE_COST, 1)
    model = opt()
    exact, ids = copy.deepcopy(model).float(), torch.arange(6, device=DEVICE)[None]
    before, strides = state(model), [p.stride() for p in model.parameters()]
    with torch.no_grad():
        reference, own = exact(ids).logits, model(ids).logits
        patch_model(model, mp_group=group(), verify=False)
        first, second = model.model.decoder.layers
        hidden, part = first.fc2.weight.shape
        assert first.fc2.weight.stride() == (1, hidden) and second.fc2.weight.stride() == (part, 1)
        rows = patch_report(model).rows
        assert rows[0].density.endswith("%") and rows[1].density == ""
        tiny.assert_as_accurate(model(ids).logits, own, reference)
    assert_equal_states(model.state_dict(), before)
    unpatch_model(model)
    assert [p.stride() for p in model.parameters()] == strides
    assert_equal_states(state(model), before)
    folder = Path(dist_folder()) / "saved"
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    for sparsity in ("auto", "off"):
        model = load_sharded(folder, group(), device=DEVICE, sparsity=sparsity)
        found = [row.density for row in patch_report(model).rows]
        assert found == [rows[0].density if sparsity == "auto" else "", ""]
        with torch.no_grad():
            tiny.assert_as_accurate(model(ids).logits, own, reference)
    for form in ("int8", "int4"):
        whole = opt()
        model = copy.deepcopy(whole)
        patch_model(whole, quantization=form, sparsity="off", verify=False)
        patch_model(model, quantization=form, mp_group=group(), verify=False)
        down = model.model.decoder.layers[0].fc2
        assert down.quantized.by_input
        assert_equal_states(model.state_dict(), state(whole))
        plain = unpatch_model(copy.deepcopy(whole).dequantize())
        exact = copy.deepcopy(plain).float()
        with torch.no_grad():
            found = model(ids).logits
            tiny.assert_as_accurate(found, plain(ids).logits, exact(ids).logits)
            down.scales.zero_()
            model.load_state_dict(whole.state_dict())
            assert down.quantized.by_input and torch.equal(found, model(ids).logits)


def _families() -> dict[str, Case]:
    every = [*tiny.VARIANT_DEPTHS, *((name, "layer") for name in MORE)]
    return {f"{name}-{depth}": partial(family, name, depth) for name, depth in every}


def _quantized() -> dict[str, Case]:
    return {
        f"{name}-{form}": partial(quantized, name, form) for name in QUANTIZED for form in FORMATS
    }


#: The cases by the kind of group: its size, and whether kernels are interpreted.
KINDS: dict[str, tuple[int, dict[str, Case]]] = {
    "two": (
        2,
        {
            **_families(),
            **_quantized(),
            **{
                case.__name__: case
                for case in (
                    checkpoints, gradients, own_weights, merged_checkpoints, copies, twice,
                    adapters, meta, captured_steps, alike, nested, compiled, validated, refused,
                    interrupted, stuck, killed,
                )
            },
        },
    ),
    "four": (
        4,
        {
            **{
                name: partial(case, dtypes=DTYPES[:1])
                for name, case in _families().items()
                if name.endswith("-layer")
            },
            **{
                name: case
                for name, case in _families().items()
                if name.removesuffix("-layer") in (
                    "gpt2", "bloom", "opt", "opt-post-norm", "llama", "gemma2", "gptj", "phi3"
                )
            },
            **{
                name: case
                for name, case in _quantized().items()
                if name in ("opt-int8", "llama-int4", "gpt2-fp8", "phi3-int4-asymmetric")
            },
            **{
                case.__name__: case
                for case in (
                    checkpoints, own_weights, merged_checkpoints, meta, alike, refused, interrupted,
                    killed,
                )
            },
        },
    ),
    "gpus": (
        2,
        {
            **{
                name: case
                for name, case in _families().items()
                if name.removesuffix("-layer").removesuffix("-mlp")
                in (
                    "gpt2", "bloom", "bloom-residual-after-norm", "opt", "opt-post-norm", "llama",
                    "llama-bias", "granite", "gemma2", "gptj", "phi3", "bart", "bert",
                )
            },
            **_quantized(),
            **{
                case.__name__: case
                for case in (
                    captured_steps, alike, own_weights, merged_checkpoints, checkpoints, gradients,
                    copies, twice, compiled, validated, refused, interrupted, zeros,
                )
            },
        },
    ),
    "interpreted": (
        2,
        {
            "gpt2": partial(interpreted, "gpt2"),
            "opt": partial(interpreted, "opt"),
            "opt-post-norm": partial(interpreted, "opt-post-norm"),
            "bloom-residual-after-norm": partial(interpreted, "bloom-residual-after-norm"),
            "gptj": partial(interpreted, "gptj"),
            "llama": partial(interpreted, "llama-bias"),
            "phi3": partial(interpreted, "phi3"),
            "granite": partial(interpreted, "granite"),
            "gemma2": partial(interpreted, "gemma2"),
            "zeros": zeros,
            "opt-int8": partial(
                interpreted, "opt", ffn_dim=64, arguments={"quantization": FORMATS["int8"]}
            ),
            "opt-int4": partial(
                interpreted, "opt", ffn_dim=64, arguments={"quantization": FORMATS["int4"]}
            ),
        },
    ),
}  # fmt: skip


def main(kind: str, rank: int, init: str, results: str) -> None:
    global DEVICE
    size, cases = KINDS[kind]
    torch.set_num_threads(1)
    if kind == "gpus":
        torch.cuda.set_device(rank)
        DEVICE = f"cuda:{rank}"
    dist.init_process_group(
        "nccl" if kind == "gpus" else "gloo",
        init_method=f"file://{init}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    for name, case in cases.items():
        error = None
        try:
            torch.manual_seed(0)
            case()
        except Exception:
            error = traceback.format_exc()
        if name != "killed":
            errors: list[Any] = [None] * size
            dist.all_gather_object(errors, error)
            error = next((f"rank {i}: {e}" for i, e in enumerate(errors) if e is not None), None)
        if rank == 0:
            with Path(results).open("a") as file:
                file.write(json.dumps({"case": name, "error": error}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    kind, rank, init, results = sys.argv[1:]
    main(kind, int(rank), init, results)
