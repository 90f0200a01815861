"""Attention of one new token for each text to a cache that the token joins."""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.activations import INTERPRETED, sigmoid
from hf_triton_mlp.kernels.widen import widen

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """exp(x); PRECISE for float32 results, where the instruction for 2^x is not enough."""
    if PRECISE and not INTERPRETED:
        return libdevice.exp(x)
    else:
        return tl.exp2(x * LOG2_E)


@triton.jit
def load_states(keys_ptr, values_ptr, offs_n, offs_d, seen, D):
    """Rows offs_n of keys and values (capacity, D), 0 where they are not seen."""
    offs = offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
    mask = seen[:, None] & (offs_d < D)[None, :]
    keys = tl.load(keys_ptr + offs, mask=mask, other=0.0)
    values = tl.load(values_ptr + offs, mask=mask, other=0.0)
    return keys, values


@triton.jit
def load_rotated(ptr, cos, sin, offs_d, D):
    """x * cos + rotate_half(x) * sin of one head in float32, where rotate_half is Llama's."""
    mask_d = offs_d < D
    half = D // 2
    x = widen(tl.load(ptr + offs_d, mask=mask_d, other=0.0))
    first = offs_d < half
    offs = tl.where(first, offs_d + half, offs_d - half)
    turned = widen(tl.load(ptr + offs, mask=mask_d, other=0.0))
    return x * cos + tl.where(first, -turned, turned) * sin


@triton.jit
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    length_ptr,
    mask_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    parts_ptr,
    D,
    capacity,
    group,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_mask,
    stride_bias,
    stride_cos,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = softmax(scale * q·Kᵀ + bias where mask)·V, for K and V with k and v in row `length`.

    q: (batch, heads, D); k, v: (batch, heads / group, D), strides over batch and heads; keys,
    values: (batch, heads / group, capacity, D), contiguous, where k and v are written to; length:
    one int64; mask: (batch, capacity) booleans; bias: (batch * heads, capacity) or None; cos, sin:
    (batch, D) or None, by which q and k are rotated first; out: (batch, heads, D), contiguous.
    CAPPED: scores s become softcap * tanh(s / softcap) before the bias.
    Program (head, text, chunk of CHUNK rows). Given parts (chunks, batch, heads, BLOCK_D + 2) in
    float32, it writes its weighted sum there, the total of its weights, and the greatest score.
    """
    head, text, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, texts = tl.num_programs(0), tl.num_programs(1)
    state_head = head // group
    states = (text * (heads // group) + state_head).to(tl.int64) * capacity * D
    keys_ptr += states
    values_ptr += states
    row = text * heads + head
    mask_ptr += text.to(tl.int64) * stride_mask
    if bias_ptr is not None:
        bias_ptr += row.to(tl.int64) * stride_bias
    PRECISE: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    first = chunk * CHUNK
    offs_n = first + tl.arange(0, BLOCK_N)

    # What earlier steps wrote may be read before the launch in front of this one has ended.
    length = tl.load(length_ptr).to(tl.int32)
    keys, values = load_states(keys_ptr, values_ptr, offs_n, offs_d, offs_n < length, D)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    q_ptr += text * stride_qb + head * stride_qh
    k_ptr += text * stride_kb + state_head * stride_kh
    if cos_ptr is not None:
        cos = widen(tl.load(cos_ptr + text * stride_cos + offs_d, mask=mask_d, other=0.0))
        sin = widen(tl.load(sin_ptr + text * stride_cos + offs_d, mask=mask_d, other=0.0))
        q = load_rotated(q_ptr, cos, sin, offs_d, D)
        k = load_rotated(k_ptr, cos, sin, offs_d, D).to(keys_ptr.dtype.element_ty)
    else:
        q = widen(tl.load(q_ptr + offs_d, mask=mask_d, other=0.0))
        k = tl.load(k_ptr + offs_d, mask=mask_d, other=0.0)
    v = tl.load(v_ptr + text * stride_vb + state_head * stride_vh + offs_d, mask=mask_d, other=0.0)
    if head % group == 0 and first <= length and length < first + CHUNK:
        tl.store(keys_ptr + length.to(tl.int64) * D + offs_d, k, mask=mask_d)
        tl.store(values_ptr + length.to(tl.int64) * D + offs_d, v, mask=mask_d)

    greatest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for n in range(first, tl.minimum(first + CHUNK, length + 1), BLOCK_N):
        offs = n + tl.arange(0, BLOCK_N)
        visible = offs <= length
        visible &= tl.load(mask_ptr + offs, mask=visible, other=0) != 0
        later = offs + BLOCK_N
        in_chunk = (later < first + CHUNK) & (later < length)
        next_keys, next_values = load_states(keys_ptr, values_ptr, later, offs_d, in_chunk, D)
        new = (offs == length)[:, None]
        keys = tl.where(new, k[None, :], keys)
        values = tl.where(new, v[None, :], values)
        scores = tl.sum(widen(keys) * q[None, :], axis=1) * scale
        if CAPPED:
            scores = softcap * (2.0 * sigmoid(2.0 * scores / softcap, True) - 1.0)
        if bias_ptr is not None:
            scores += widen(tl.load(bias_ptr + offs, mask=visible, other=0.0))
        scores = tl.where(visible, scores, float("-inf"))
        before = greatest
        greatest = tl.maximum(greatest, tl.max(scores, axis=0))
        # All of them invisible so far: any finite number in place of -inf gives weights of 0.
        origin = tl.where(greatest == float("-inf"), 0.0, greatest)
        weights = exp(scores - origin, PRECISE)
        kept = exp(before - origin, PRECISE)
        total = total * kept + tl.sum(weights, axis=0)
        sums = sums * kept + tl.sum(weights[:, None] * widen(values), axis=0)
        keys, values = next_keys, next_values

    if parts_ptr is None:
        out = (sums / total).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row.to(tl.int64) * D + offs_d, out, mask=mask_d)
    else:
        parts_ptr += (chunk * texts * heads + row).to(tl.int64) * (BLOCK_D + 2)
        tl.store(parts_ptr + offs_d, sums)
        tl.store(parts_ptr + BLOCK_D, total)
        tl.store(parts_ptr + BLOCK_D + 1, greatest)


@triton.jit
def combine_attention_kernel(
    parts_ptr,
    out_ptr,
    D,
    CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """out (rows, D) from the parts (CHUNKS, rows, BLOCK_D + 2) of decode_attention_kernel.

    Program (row).
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    offs_c = tl.arange(0, BLOCK_CHUNKS)
    offs_d = tl.arange(0, BLOCK_D)
    mask_c = offs_c < CHUNKS
    parts = parts_ptr + (offs_c * rows + row) * (BLOCK_D + 2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sums = tl.load(parts[:, None] + offs_d[None, :], mask=mask_c[:, None], other=0.0)
    totals = tl.load(parts + BLOCK_D, mask=mask_c, other=0.0)
    greatest = tl.load(parts + BLOCK_D + 1, mask=mask_c, other=float("-inf"))
    # The chunk with the new token has a finite score.
    weights = exp(greatest - tl.max(greatest, axis=0), True)
    out = tl.sum(sums * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
