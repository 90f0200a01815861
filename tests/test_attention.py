"""The attention of captured steps: its kernels on a GPU or in the interpreter, and its place."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hf_triton_mlp.patches import llama
from test_compile import CUOBJDUMP, SHARED, check_compiles
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3 import modeling_qwen3

from hf_triton_mlp import attention, decoding, graph_decode, patch_model
from hf_triton_mlp.attention import CannotFuse, attention_launches, decode_attention
from hf_triton_mlp.capture import DecodeCache, captures_of
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.reading import is_original

DEVICE = "cpu" if INTERPRETED else "cuda"
#: The interpreter computes bfloat16 as float32, and rounds.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
ON_DEVICE = [] if INTERPRETED else [pytest.mark.gpu]
needs_kernels = pytest.mark.parametrize("device", [pytest.param(DEVICE, marks=ON_DEVICE)])

#: batch, heads, heads of keys, values of a head, capacity, length, rows of a chunk
SHAPES = [
    (2, 4, 4, 16, 64, 0, 512),
    (2, 4, 2, 24, 64, 40, 512),
    (3, 6, 1, 80, 256, 255, 64),
    (1, 8, 2, 128, 512, 200, 128),
    (2, 2, 2, 64, 1024, 1000, 512),
    (2, 2, 2, 64, 1024, 3, 256),
    (1, 2, 1, 8, 64, 63, 32),  # a tile has more rows than a chunk
]


#: Families that the interpreter would take too long for.
FURTHER = ["gpt2", "opt", "llama", "qwen3"]


def rotated(
    q: Tensor, k: Tensor, rotation: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    cos, sin = (x.to(dtype) for x in rotation)
    q, k = (x.to(dtype)[:, :, None] for x in (q, k))
    q, k = apply_rotary_pos_emb(q, k, cos[:, None], sin[:, None])
    return q[:, :, 0], k[:, :, 0]


def reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: int, mask: Tensor,
    bias: Tensor | None, rotation: tuple[Tensor, Tensor] | None, scale: float,
    softcap: float | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The formula in PyTorch, in `dtype`, with the softmax at least in float32."""
    if rotation is not None:
        q, k = rotated(q, k, rotation, dtype)
    group, rows = q.shape[1] // k.shape[1], slice(0, length + 1)
    keys, values = (
        torch.cat([x[:, :, :length], new[:, :, None]], 2).to(dtype).repeat_interleave(group, 1)
        for x, new in ((keys, k), (values, v))
    )
    scores = (q.to(dtype)[:, :, None] @ keys.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype).view(*q.shape[:2], 1, -1)[..., rows]
    scores = scores.masked_fill(~mask[:, None, None, rows], float("-inf"))
    return (scores.softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype) @ values)[
        :, :, 0
    ]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "extra"),
    [
        (shape, extra)
        for shape in SHAPES
        for extra in ("", "softcap", "bias", "rotation")
        if not (INTERPRETED and extra and shape[4] > 256)  # which takes its time
    ],
    ids=str,
)
def test_decode_attention(
    shape: tuple[int, ...], extra: str, dtype: torch.dtype, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    batch, heads, key_heads, D, capacity, length, chunk = shape
    monkeypatch.setattr(attention, "CHUNK", chunk)
    # As many texts would have it; the interpreter takes its time for many tiles.
    _, *tile = attention.TILES[0 if INTERPRETED and capacity > 64 else D % len(attention.TILES)]
    monkeypatch.setattr(attention, "TILES", ((math.inf, *tile),))
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    q = random(batch, D, heads).transpose(1, 2)  # as a view of what a projection gave may lie
    k, v = random(batch, key_heads, D), random(batch, key_heads, D)
    keys, values = (random(batch, key_heads, capacity, D) for _ in range(2))
    keys[:, :, length:] = values[:, :, length:] = torch.nan  # nothing there is read
    mask = torch.rand((batch, capacity), generator=generator).to(device) > 0.3
    mask[:, length], mask[:, length + 1 :] = True, False
    bias = random(batch * heads, capacity) if extra == "bias" else None
    rotation = None
    if extra == "rotation":
        angles = torch.rand(batch, D // 2, generator=generator).repeat(1, 2) * 6
        rotation = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    options = {"scale": 0.1, "softcap": 2.0 if extra == "softcap" else None}
    rest: list[Any] = [q, k, v, keys.clone(), values.clone(), length, mask, bias, rotation]
    rest += options.values()
    exact, own = reference(*rest, dtype=torch.float64), reference(*rest, dtype=dtype)
    place = torch.tensor(length, device=device)
    found = decode_attention(q, k, v, keys, values, place, mask, bias, rotation, **options)
    tiny.assert_as_accurate(found, own, exact)
    if rotation is None:
        assert torch.equal(keys[:, :, length], k)
    else:
        exact, own = (rotated(q, k, rotation, each)[1] for each in (torch.float64, dtype))
        tiny.assert_as_accurate(keys[:, :, length], own, exact)
    assert torch.equal(values[:, :, length], v)
    assert keys[:, :, length + 1 :].isnan().all()
    again = decode_attention(q, k, v, keys, values, place, mask, bias, rotation, **options)
    assert torch.equal(again, found)


@needs_kernels
def test_invisible_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts with padding up to a chunk's end and past it, of one mask and one rotation."""
    monkeypatch.setattr(attention, "CHUNK", 32)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 24).to(device) for _ in range(3))
    keys, values = (torch.randn(2, 2, 128, 24).to(device) for _ in range(2))
    angles = torch.rand(1, 12).repeat(1, 2).to(device)
    rotation = angles.cos(), angles.sin()
    for length, first in [(31, 31), (32, 32), (63, 32), (64, 33), (127, 96), (127, 127)]:
        mask = (torch.arange(128, device=device) >= first)[None]
        expected = reference(
            q, k, v, keys, values, length, mask.expand(2, -1), None, rotation, 0.2, None,
            torch.float64,
        )  # fmt: skip
        place = torch.tensor(length, device=device)
        found = decode_attention(
            q, k, v, keys.clone(), values.clone(), place, mask, None, rotation, scale=0.2
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def llama_step() -> tuple[Any, Any, list[Tensor]]:
    """An attention of Llama's, the cache of a step, and query, key and value as it has them."""
    module = tiny.build("llama").model.layers[0].self_attn
    cache: Any = DecodeCache(1, 16, torch.tensor(3))
    states = [torch.randn(1, heads, 1, 8) for heads in (4, 2, 2)]
    cache.layers[0].lazy_initialization(*states[1:])
    return module, cache, states


MASKS = {
    "added to the scores": torch.zeros(1, 1, 1, 16),
    "shorter than the cache": torch.ones(1, 1, 1, 4, dtype=torch.bool),
    "of each head": torch.ones(1, 4, 1, 16, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_of_other_kinds(mask: Tensor) -> None:
    module, cache, (query, key, value) = llama_step()
    with pytest.raises(CannotFuse, match="mask"), attention.in_step(module, cache):
        keys, values = cache.layers[0].update(key, value)
        attention.attend(module, query, keys, values, mask)


def visible(**changes: Any) -> Tensor:
    """What `decode_mask` lets a text of two look at from place 9 of 16, its first 3 padding."""
    padding = torch.ones(2, 16, dtype=torch.bool)
    padding[1, :3] = False
    options = {"batch_size": 2, "q_length": 1, "kv_length": 16, "q_offset": torch.tensor(9)}
    options |= {"attention_mask": padding, "allow_is_causal_skip": False, **changes}
    mask = attention.decode_mask(**options)
    assert mask is not None and mask.shape == (2, 1, 1, 16) and mask.dtype == torch.bool
    return mask[1, 0, 0, :10].nonzero().flatten()


def test_masks() -> None:
    def even(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return kv % 2 == 0

    window = sliding_window_causal_mask_function(4)
    assert visible().tolist() == [*range(3, 10)]
    assert visible(attention_mask=None).tolist() == [*range(10)]
    assert visible(mask_function=window, local_size=4).tolist() == [6, 7, 8, 9]
    assert visible(mask_function=and_masks(causal_mask_function, even)).tolist() == [4, 6, 8]
    assert visible(mask_function=or_masks(causal_mask_function, even)).tolist() == [*range(3, 10)]


def with_own_forward(cls: Any) -> Any:
    return type(cls.__name__, (cls,), {"forward": lambda self, x: x, "__module__": cls.__module__})


def test_attentions_like_llamas(monkeypatch: pytest.MonkeyPatch) -> None:
    like, its = llama._is_llamas, modeling_llama.LlamaAttention
    assert like(its) and like(modeling_qwen3.Qwen3Attention) and like(type("Mine", (its,), {}))
    assert not like(with_own_forward(its)) and not like(modeling_gemma2.Gemma2Attention)
    with monkeypatch.context() as patch:
        patch.setattr(its, "forward", lambda self, x: x)
        assert not like(its)
    for name in ("rotate_half", "apply_rotary_pos_emb"):
        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama, name, lambda *x: x)
            assert not like(its)
    assert like(its)


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_replaced_attentions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tiny.PLACES[family]
    module = tiny.build(family).get_submodule(f"{place.layers}.0.{place.attention}")
    cls = type(module)
    path = f"{cls.__module__}.{cls.__qualname__}"
    assert is_original(module, path)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", lambda self, x: x)
        assert not is_original(module, path)
    module.__class__ = type("Mine", (cls,), {})
    assert not is_original(module, path)


@needs_kernels
@pytest.mark.parametrize("family", ["bloom", *([] if INTERPRETED else FURTHER)])
def test_steps_attend_in_it(family: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "ON_CPU", True)
    model: Any = tiny.build(family).to(device)
    inputs = tiny.batch(device)
    options = {"max_new_tokens": 2, "do_sample": False}
    expected = model.generate(**inputs, **options)
    patch_model(model)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=graph_decode), expected)
    assert [step.fused for step in captures_of(model)._steps.values()] == [True]


def other_scale(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    return decode_attention(q, k, v, *rest, **{**options, "scale": 2 * options["scale"]})


def other_texts(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    return decode_attention(q, k, v.roll(1, 0), *rest, **options)


@needs_kernels
@pytest.mark.parametrize("wrong", [other_scale, other_texts])
def test_another_attention_is_not_taken(
    wrong: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "ON_CPU", True)
    model, inputs = tiny.build("gpt2").to(device), tiny.batch(device)
    options = {"max_new_tokens": 2, "do_sample": False}
    expected = model.generate(**inputs, **options)
    monkeypatch.setattr(attention, "decode_attention", wrong)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=graph_decode), expected)
    assert [step.fused for step in captures_of(model)._steps.values()] == [False]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton has no cuobjdump")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(
    ("heads", "key_heads", "D", "capacity", "dtype"),
    [
        (12, 12, 64, 256, torch.float16),
        (32, 8, 128, 2048, torch.bfloat16),
        (8, 1, 256, 2048, torch.bfloat16),
        (12, 12, 64, 256, torch.float32),
    ],
)
def test_it_compiles(
    heads: int, key_heads: int, D: int, capacity: int, dtype: torch.dtype,
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _, *tile = attention.TILES[(key_heads + D) % len(attention.TILES)]
    monkeypatch.setattr(attention, "TILES", ((math.inf, *tile),))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    k, keys = empty(1, key_heads, D), empty(1, key_heads, capacity, D)
    length, mask = empty(dtype=torch.int64), empty(1, capacity, dtype=torch.bool)
    rotation = empty(1, D), empty(1, D)
    for bias, turned, softcap in ((None, rotation, None), (empty(heads, capacity), None, 30.0)):
        tensors = (empty(1, heads, D), k, k, keys, keys, length, mask, bias, turned)
        pdl = capability >= (9, 0)
        for call in attention_launches(*tensors, 0.1, softcap, empty(1, heads, D), pdl):
            check_compiles(call, capability, tmp_path)
