"""Row-wise work: the sum that feeds a norm, its statistics, the norm itself, residual sums."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_triton_mlp.kernels.prefetch import prefetch_vector
from hf_triton_mlp.kernels.widen import widen


@triton.jit
def load_sum(x_ptr, add_ptr, add_bias_ptr, offs, mask):
    """x + add + add_bias at `offs` of one row, in float32; add and add_bias may be None."""
    s = widen(tl.load(x_ptr + offs, mask=mask, other=0.0))
    if add_ptr is not None:
        s += widen(tl.load(add_ptr + offs, mask=mask, other=0.0))
    if add_bias_ptr is not None:
        s += widen(tl.load(add_bias_ptr + offs, mask=mask, other=0.0))
    return s


@triton.jit
def statistics_of_values(s, mask, K, eps, NORM: tl.constexpr):
    """(mean, 1 / sqrt(variance + eps)) of the K values of each row of s where mask; 0 elsewhere.

    s: (rows, BLOCK_K); the result: (rows, 1).
    NORM "layer_norm": two passes, so that the variance does not cancel. RMSNorms: mean is 0.
    """
    mean = 0.0
    if NORM == "layer_norm":
        mean = tl.sum(s, axis=1, keep_dims=True) / K
    centred = tl.where(mask, s - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / K
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def add_pairs(a, b, c, d):
    """(a + c, b + d), to reduce two sums at once."""
    return a + c, b + d


@triton.jit
def statistics_at_once(s, first, mask, K, eps):
    """LayerNorm's statistics_of_values for short rows of 16-bit values, by one reduction, not two.

    first: (rows, 1), the first value of each row; d = s - first; variance = mean(d²) - mean(d)².
    mean(d)² is at most K times the variance, since the first value is one of the K, so that this
    is exact to K units in float32's last place: for 2048 values to a quarter of float16's.
    """
    d = tl.where(mask, s - first, 0.0)
    total, squares = tl.reduce((d, d * d), 1, add_pairs, keep_dims=True)
    shifted = total / K
    variance = tl.maximum(squares / K - shifted * shifted, 0.0)
    return first + shifted, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def statistics_of_row(
    x_ptr, add_ptr, add_bias_ptr, K, eps, NORM: tl.constexpr, BLOCK_K: tl.constexpr
):
    """statistics_of_values of one row (1, K) of s = x + add + add_bias, for any K."""
    mean = 0.0
    if NORM == "layer_norm":
        total = tl.zeros((1, BLOCK_K), tl.float32)
        for k in range(0, K, BLOCK_K):
            offs = k + tl.arange(0, BLOCK_K)[None, :]
            total += load_sum(x_ptr, add_ptr, add_bias_ptr, offs, offs < K)
        mean = tl.sum(total, axis=1, keep_dims=True) / K
    squares = tl.zeros((1, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs = k + tl.arange(0, BLOCK_K)[None, :]
        s = load_sum(x_ptr, add_ptr, add_bias_ptr, offs, offs < K)
        centred = tl.where(offs < K, s - mean, 0.0)
        squares += centred * centred
    variance = tl.sum(squares, axis=1, keep_dims=True) / K
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def load_affine(norm_w_ptr, norm_b_ptr, offs, mask, NORM: tl.constexpr):
    """(norm_w, norm_b) at `offs` as they are stored; what changes nothing for None."""
    scale = tl.full(offs.shape, 0.0 if NORM == "rms_norm_offset" else 1.0, tl.float32)
    shift = tl.zeros(offs.shape, tl.float32)
    if norm_w_ptr is not None:
        scale = tl.load(norm_w_ptr + offs, mask=mask, other=0.0)
    if norm_b_ptr is not None:
        shift = tl.load(norm_b_ptr + offs, mask=mask, other=0.0)
    return scale, shift


@triton.jit
def apply_affine(u, scale, shift, NORM: tl.constexpr):
    """u * scale + shift in float32, of stored weights; "rms_norm_offset": u * (1 + scale) + shift.

    The sum is not stored: in 16 bits it would have lost the weight's last digits.
    """
    scale = widen(scale)
    if NORM == "rms_norm_offset":
        scale += 1.0
    return u * scale + widen(shift)


@triton.jit
def normalize(s, mean, rstd, norm_w_ptr, norm_b_ptr, offs, mask, NORM: tl.constexpr):
    """(s - mean) * rstd * norm_w + norm_b as `apply_affine`; norm_w and norm_b may be None."""
    scale, shift = load_affine(norm_w_ptr, norm_b_ptr, offs, mask, NORM)
    return apply_affine((s - mean) * rstd, scale, shift, NORM)


@triton.jit
def store_carry(carry_ptr, carry_bias_ptr, carried, offs, mask):
    """carry = carried + carry_bias at `offs` of one row; carry_bias may be None."""
    if carry_bias_ptr is not None:
        carried += tl.load(carry_bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(carry_ptr + offs, carried.to(carry_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_kernel(
    x_ptr,
    add_ptr,
    add_bias_ptr,
    norm_w_ptr,
    norm_b_ptr,
    carry_bias_ptr,
    carry_ptr,
    out_ptr,
    K,
    stride_x,
    stride_add,
    eps,
    NORM: tl.constexpr,
    CARRY_NORMED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """s = x + add + add_bias; out = norm(s); where carry_ptr is given, the residual for the next
    linear layer too: carry = (norm(s) if CARRY_NORMED else s) + carry_bias.

    x, add: (M, K), row strides stride_x, stride_add; carry, out: (M, K), contiguous.
    One program a row. ONE_BLOCK: K <= BLOCK_K, so that the row is read once. PDL: the program may
    start while its predecessor runs.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    if add_ptr is not None:
        add_ptr += row * stride_add
    if PDL:
        if ONE_BLOCK and row == 0:
            prefetch_vector(norm_w_ptr, 0, K, BLOCK_K)
            prefetch_vector(norm_b_ptr, 0, K, BLOCK_K)
        gdc_wait()
        gdc_launch_dependents()
    if ONE_BLOCK:
        offs = tl.arange(0, BLOCK_K)[None, :]
        mask = offs < K
        s = load_sum(x_ptr, add_ptr, add_bias_ptr, offs, mask)
        scale, shift = load_affine(norm_w_ptr, norm_b_ptr, offs, mask, NORM)
        mean, rstd = statistics_of_values(s, mask, K, eps, NORM)
        u = apply_affine((s - mean) * rstd, scale, shift, NORM)
        tl.store(out_ptr + row * K + offs, u.to(out_ptr.dtype.element_ty), mask=mask)
        if carry_ptr is not None:
            carried = u if CARRY_NORMED else s
            store_carry(carry_ptr + row * K, carry_bias_ptr, carried, offs, mask)
    else:
        mean, rstd = statistics_of_row(x_ptr, add_ptr, add_bias_ptr, K, eps, NORM, BLOCK_K)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)[None, :]
            mask_k = offs_k < K
            s_k = load_sum(x_ptr, add_ptr, add_bias_ptr, offs_k, mask_k)
            u_k = normalize(s_k, mean, rstd, norm_w_ptr, norm_b_ptr, offs_k, mask_k, NORM)
            tl.store(out_ptr + row * K + offs_k, u_k.to(out_ptr.dtype.element_ty), mask=mask_k)
            if carry_ptr is not None:
                carried_k = u_k if CARRY_NORMED else s_k
                store_carry(carry_ptr + row * K, carry_bias_ptr, carried_k, offs_k, mask_k)


@triton.jit
def load_normed_sum(
    x_ptr, x_bias_ptr, residual_ptr, branch_w_ptr, mean, rstd, offs, mask, NORM: tl.constexpr
):
    """residual + the norm of x + x_bias at `offs` of one row, in float32."""
    x = load_sum(x_ptr, None, x_bias_ptr, offs, mask)
    s = normalize(x, mean, rstd, branch_w_ptr, None, offs, mask, NORM)
    if residual_ptr is not None:
        s += widen(tl.load(residual_ptr + offs, mask=mask, other=0.0))
    return s


@triton.jit
def norm_sum_kernel(
    x_ptr,
    x_bias_ptr,
    residual_ptr,
    branch_w_ptr,
    norm_w_ptr,
    sum_ptr,
    out_ptr,
    K,
    stride_x,
    stride_residual,
    eps,
    NORM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """sum = residual + norm(x + x_bias) with branch_w; where out_ptr is given, also
    out = norm(sum) with norm_w. NORM is an RMSNorm.

    x, residual: (M, K), row strides stride_x, stride_residual; sum, out: (M, K), contiguous.
    x_bias, residual and the norms' weights may be None. One program a row; ONE_BLOCK and PDL as
    in `norm_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    if residual_ptr is not None:
        residual_ptr += row * stride_residual
    sum_ptr += row * K
    if out_ptr is not None:
        out_ptr += row * K
    if PDL:
        if ONE_BLOCK and row == 0:
            prefetch_vector(branch_w_ptr, 0, K, BLOCK_K)
            prefetch_vector(norm_w_ptr, 0, K, BLOCK_K)
        gdc_wait()
        gdc_launch_dependents()
    if ONE_BLOCK:
        offs = tl.arange(0, BLOCK_K)[None, :]
        mask = offs < K
        x = load_sum(x_ptr, None, x_bias_ptr, offs, mask)
        residual = tl.zeros((1, BLOCK_K), tl.float32)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
        branch_w, shift = load_affine(branch_w_ptr, None, offs, mask, NORM)
        norm_w, shift = load_affine(norm_w_ptr, None, offs, mask, NORM)
        mean, rstd = statistics_of_values(x, mask, K, eps, NORM)
        s = apply_affine((x - mean) * rstd, branch_w, shift, NORM) + widen(residual)
        tl.store(sum_ptr + offs, s.to(sum_ptr.dtype.element_ty), mask=mask)
        if out_ptr is not None:
            mean_s, rstd_s = statistics_of_values(s, mask, K, eps, NORM)
            u = apply_affine((s - mean_s) * rstd_s, norm_w, shift, NORM)
            tl.store(out_ptr + offs, u.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mean, rstd = statistics_of_row(x_ptr, None, x_bias_ptr, K, eps, NORM, BLOCK_K)
        squares = tl.zeros((1, BLOCK_K), tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)[None, :]
            mask_k = offs_k < K
            s_k = load_normed_sum(
                x_ptr, x_bias_ptr, residual_ptr, branch_w_ptr, mean, rstd, offs_k, mask_k, NORM
            )
            squares += s_k * s_k
            tl.store(sum_ptr + offs_k, s_k.to(sum_ptr.dtype.element_ty), mask=mask_k)
        if out_ptr is not None:
            variance = tl.sum(squares, axis=1, keep_dims=True) / K
            rstd_s = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
            for k in range(0, K, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)[None, :]
                mask_k = offs_k < K
                s_k = load_normed_sum(
                    x_ptr, x_bias_ptr, residual_ptr, branch_w_ptr, mean, rstd, offs_k, mask_k, NORM
                )
                u_k = normalize(s_k, 0.0, rstd_s, norm_w_ptr, None, offs_k, mask_k, NORM)
                tl.store(out_ptr + offs_k, u_k.to(out_ptr.dtype.element_ty), mask=mask_k)


@triton.jit
def residual_add_kernel(
    x_ptr,
    residual_ptr,
    attention_ptr,
    attention_bias_ptr,
    final_bias_ptr,
    out_ptr,
    K,
    stride_x,
    stride_residual,
    stride_attention,
    share,
    attention_share,
    BLOCK_K: tl.constexpr,
):
    """out = x + share * (residual + attention_bias + final_bias) + attention_share * attention.

    x, residual, attention: (M, K) with row strides; the biases: (K,); out: (M, K), contiguous.
    Any summand but x may be None. Program (row, block of columns).
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs < K
    shared = tl.zeros((BLOCK_K,), tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * stride_residual + offs, mask=mask, other=0.0)
        shared += residual.to(tl.float32)
    if attention_bias_ptr is not None:
        shared += tl.load(attention_bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if final_bias_ptr is not None:
        shared += tl.load(final_bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0).to(tl.float32)
    out += share * shared
    if attention_ptr is not None:
        attention = tl.load(attention_ptr + row * stride_attention + offs, mask=mask, other=0.0)
        out += attention_share * attention.to(tl.float32)
    tl.store(out_ptr + row * K + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
