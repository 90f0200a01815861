"""From 16 bits to float32, without the registers that the compiler spends on bfloat16."""

import triton
import triton.language as tl

from hf_triton_mlp.kernels.activations import INTERPRETED


@triton.jit
def widen(x):
    """x in float32.

    An instruction takes either half of a register as float16, but not as bfloat16: those the
    compiler (3.6, ptxas of CUDA 12.8) unpacks as soon as they arrive, in two instructions a value,
    and waits for them there, before it asks for what is loaded next. Here a pair stays in its
    register until it is used, and takes one instruction a value: a shift, and a mask.
    """
    if x.dtype == tl.bfloat16 and x.shape[-1] > 1 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; shl.b32 low, $2, 16; and.b32 high, $2, 0xffff0000; "
            "mov.b32 $0, low; mov.b32 $1, high; }",
            "=f,=f,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def load_apart(pointers, mask):
    """Values for `apart`, 0 where mask is false.

    Ptxas packs two of 16 bits into a register as soon as they arrive, and waits for them there.
    """
    DTYPE: tl.constexpr = pointers.dtype.element_ty
    if INTERPRETED or DTYPE.primitive_bitwidth != 16:
        return tl.load(pointers, mask=mask, other=0.0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u16 $0, [$1]; }",
            "=r,l,r",
            [pointers.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def apart(bits, DTYPE: tl.constexpr):
    """What `load_apart` has loaded from pointers to DTYPE, in float32; float32 stays as it is."""
    if INTERPRETED or bits.dtype != tl.uint32:
        return bits.to(tl.float32)
    elif DTYPE.is_bf16():
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
