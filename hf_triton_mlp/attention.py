"""Attention in a captured step: one launch, or two for long texts, which writes the cache too.

transformers' attention modules look their function up by the name that their config has. While a
step runs, that name is ours in its thread (`in_step`); cache layers then do not write what they are
given, but leave it to the function, which gets the same tensors.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hf_triton_mlp.kernels import INTERPRETED, combine_attention_kernel, decode_attention_kernel
from hf_triton_mlp.launchers import Launch, gpu, launch, on_device
from hf_triton_mlp.tuning import BUSY_PROGRAMS, PDL_CAPABILITY

#: What transformers calls our attention.
NAME = "hf_triton_mlp"

#: Up to so many programs: elements of a tile of keys, and as many of values, and warps. That is 64
#: registers a thread, or 32, and as many for the next tile, on its way meanwhile. Few programs, one
#: on each multiprocessor, want to be done in one tile; many want to be there at once.
TILES = ((BUSY_PROGRAMS, 8192, 8), (4 * BUSY_PROGRAMS, 4096, 4), (math.inf, 2048, 2))

#: Rows of a cache for one program; a longer cache is for several, and for a second launch.
CHUNK = 512

#: The most values of a head.
MOST_VALUES = 256

#: Arguments of attention functions that do not change what is computed here: the mask has windows
#: and causality, the rest is for the layers around.
IGNORED = {
    "cache", "cache_position", "is_causal", "logits_to_keep", "output_attentions",
    "output_hidden_states", "past_key_values", "position_embeddings", "position_ids",
    "return_dict", "sliding_window", "use_cache",
}  # fmt: skip


class CannotFuse(Exception):
    """Why a step has to be computed by transformers' attention."""


_state = threading.local()

#: Held by the one thread whose step has our attention: models may share configs.
_lock = threading.RLock()


class _Name(str):
    """The name of an attention, which equals NAME instead for a thread within a step.

    Some families compare names themselves: other threads have to find what they always do.
    """

    def __eq__(self, other: object) -> bool:
        return _now(self) == other

    def __ne__(self, other: object) -> bool:
        return _now(self) != other

    def __hash__(self) -> int:
        return hash(_now(self))


def _now(name: _Name) -> str:
    return NAME if getattr(_state, "layers", None) else str(name)


@contextmanager
def in_step(model: Any, cache: Any) -> Iterator[None]:
    """Let the attention of a model be `attend` with a cache, in this thread.

    Raises CannotFuse unless `attend` computed every attention that wrote to the cache.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    with _lock:
        names = [
            (config, config._attn_implementation_internal)
            for config in configs.values()
            if isinstance(config, PretrainedConfig) and config._attn_implementation_internal
        ]
        _state.layers = {id(layer.keys): layer for layer in cache.layers}
        for layer in cache.layers:
            layer.deferred = True
        try:
            for config, name in names:
                config._attn_implementation_internal = _Name(name)
            yield
            if any(layer.pending is not None for layer in cache.layers):
                raise CannotFuse("an attention is not computed by transformers' AttentionInterface")
        finally:
            for config, name in names:
                config._attn_implementation_internal = name
            for layer in cache.layers:
                layer.deferred, layer.pending = False, None
            _state.layers = {}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for one token: query (batch, heads, 1, D), within a step.

    key and value are those that the cache's `update` gave; bias (batch * heads, 1, capacity) joins
    the scores; by the rotation, cos and sin (batch, 1, D), queries and new keys are rotated as
    Llama's are. Returns (batch, 1, heads, D).
    """
    layer = getattr(_state, "layers", {}).get(id(key))
    given = [name for name, value in arguments.items() if value is not None]
    unknown = [name for name in given if name not in IGNORED]
    if layer is None or value is not layer.values or layer.pending is None:
        raise CannotFuse("an attention changes its keys or values after they are cached")
    if unknown or dropout:
        raise CannotFuse(f"an attention takes {', '.join(unknown) or 'dropout'}")
    if attention_mask is None or attention_mask.shape[1:] != (1, 1, key.shape[2]):
        raise CannotFuse("an attention has a mask of its own for each head")
    if attention_mask.dtype != torch.bool:
        raise CannotFuse("an attention has a mask that joins its scores")
    k, v = layer.pending
    layer.pending = None
    out = decode_attention(
        query[:, :, 0],
        k[:, :, 0],
        v[:, :, 0],
        layer.keys,
        layer.values,
        layer.length,
        attention_mask[:, 0, 0],
        None if bias is None else bias[:, 0],
        None if rotation is None else (rotation[0][:, 0], rotation[1][:, 0]),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
    )
    return out[:, None], None


def is_deferred(cache: Any) -> bool:
    """Whether this is the cache of a step whose attention has to be `attend`."""
    layers = getattr(_state, "layers", {})
    return bool(layers) and cache is not None and id(cache.layers[0].keys) in layers


def decode_mask(
    *args: Any,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask (batch, 1, 1, capacity) for `attend`, which is causal by itself."""
    causal = mask_function is causal_mask_function and local_size is None and not args
    if causal and attention_mask is not None and attention_mask.shape[-1] == kv_length:
        return attention_mask[:, None, None]
    return sdpa_mask(
        *args,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, decode_mask)


def fusible(keys: Tensor, values: Tensor) -> bool:
    """Whether `decode_attention` takes caches like these."""
    return (
        (keys.is_cuda or INTERPRETED)
        and keys.shape == values.shape
        and keys.shape[-1] <= MOST_VALUES
        and keys.dtype in (torch.float16, torch.bfloat16, torch.float32)
    )


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale * q·Kᵀ + bias where mask)·V for a new token of each text, whose k and v join.

    q: (batch, heads, D); k, v: (batch, heads of keys, D); keys, values: (batch, heads of keys,
    capacity, D), contiguous, with `length` (one int64) rows before the new ones; mask: (batch,
    capacity), True where a row is visible, which the new one must be; bias: (batch * heads,
    capacity); rotation: cos and sin (batch or 1, D), by which q and k are rotated first, x becoming
    x * cos + rotate_half(x) * sin as Llama's do. Given softcap, scores s become
    softcap * tanh(s / softcap) before the bias. Returns (batch, heads, D), computed in float32.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    mask = mask.expand(q.shape[0], -1)
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    bias = bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()
    if rotation is not None:
        cos, sin = (x.expand(q.shape[0], -1) for x in rotation)
        same = cos.stride() == sin.stride() and cos.stride(1) == 1
        rotation = (cos, sin) if same else (cos.contiguous(), sin.contiguous())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    pdl = gpu(q.device.index)[1] >= PDL_CAPABILITY
    with on_device(q):
        for call in attention_launches(
            q, k, v, keys, values, length, mask, bias, rotation, scale, softcap, out, pdl
        ):
            launch(call)
    return out


def attention_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
    scale: float,
    softcap: float | None,
    out: Tensor,
    pdl: bool,
) -> list[Launch]:
    """The launches of `decode_attention` into out (batch, heads, D)."""
    batch, heads, D = q.shape
    capacity = keys.shape[2]
    block_d = triton.next_power_of_2(D)
    chunks = -(-capacity // CHUNK)
    parts = None
    if chunks > 1:
        parts = torch.empty(
            (chunks, batch, heads, block_d + 2), dtype=torch.float32, device=q.device
        )
    programs = heads * batch * chunks
    tile, warps = next((tile, warps) for most, tile, warps in TILES if programs <= most)
    cos, sin = rotation or (None, None)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    calls = [
        Launch(
            decode_attention_kernel,
            (heads, batch, chunks),
            (q, k, v, keys, values, length, mask, bias, cos, sin, out, parts),
            (
                D,
                capacity,
                heads // keys.shape[1],
                *strides,
                mask.stride(0),
                0 if bias is None else bias.stride(0),
                0 if cos is None else cos.stride(0),
                scale,
                softcap or 0.0,
            ),
            (bool(softcap), min(tile // block_d, CHUNK), block_d, CHUNK, pdl),
            num_warps=warps,
            num_stages=1,
            pdl=pdl,
        )
    ]
    if parts is not None:
        calls.append(
            Launch(
                combine_attention_kernel,
                (batch * heads, 1, 1),
                (parts, out),
                (D,),
                (chunks, triton.next_power_of_2(chunks), block_d, pdl),
                num_warps=4,
                num_stages=1,
                pdl=pdl,
            )
        )
    return calls
