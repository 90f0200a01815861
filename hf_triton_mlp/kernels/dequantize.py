"""Codes of 8 and 4 bits to values, exactly and in registers."""

import triton
import triton.language as tl

from hf_triton_mlp.kernels.activations import INTERPRETED

#: Pairs of codes of a word, bits 0 to 3 and those 16 above, then 4 further up, and so on: how far
#: it is shifted right, which bits are the codes', a number into whose low digits they are put,
#: which adds them to it, and minus that number and 8. 0x6400 is 1024 in float16, whose last digit
#: is worth 1, and 0x5400 is 64, where this is bit 4; 0x4300 is 128 in bfloat16.
INT4_FLOAT16 = tuple(
    (shift, *place)
    for shift in (0, 8)
    for place in (
        ("0x000f000f", "0x64006400", "0xe408e408"),
        ("0x00f000f0", "0x54005400", "0xd480d480"),
    )
)
INT4_BFLOAT16 = tuple((4 * i, "0x000f000f", "0x43004300", "0xc308c308") for i in range(4))


def int4_asm(places: tuple[tuple[int, str, str, str], ...], minus: str) -> tl.constexpr:
    """PTX for two words, $8 and $9, to eight registers of two codes each, plus their numbers.

    minus: what takes these away again, and 8, an instruction on $ with minus both in b.
    """
    lines = "{ .reg .b32 t, b, unit; mov.b32 unit, 0x3f803f80;"
    for i in range(2):
        for j, (shift, mask, number, bias) in enumerate(places):
            register = f"${4 * i + j}"
            lines += f" shr.u32 t, ${8 + i}, {shift};"
            lines += f" lop3.b32 {register}, t, {mask}, {number}, 0xea;"
            if minus:
                lines += f" mov.b32 b, {bias}; " + minus.replace("$", register)
    return tl.constexpr(lines + " }")


INT4_TO_FLOAT16 = int4_asm(INT4_FLOAT16, "add.f16x2 $, $, b;")
INT4_TO_BFLOAT16 = int4_asm(INT4_BFLOAT16, "fma.rn.bf16x2 $, $, unit, b;")
#: Alone the digits are subnormal numbers in float16, which the matrix units multiply as others:
#: 2**-24 times the code, or 2**-20 times. (Sums of codes in 1024, less 1024 times those of x, have
#: errors that add up where x's mean is not 0.)
INT4_UNITS_IN_FLOAT16 = int4_asm(tuple((s, m, "0", "") for s, m, *_ in INT4_FLOAT16), "")
INT4_UNIT = tl.constexpr(2.0**-24)
INT4_IN_BFLOAT16 = int4_asm(INT4_BFLOAT16, "")

#: Four bytes, in $4, to four halves. Plus 128 they are 0 to 255; 0x6480 is 1152, 1024 and that 128.
INT8_TO_FLOAT16 = tl.constexpr(
    "{ .reg .b32 t, u, one, bias; mov.b32 one, 0x64646464; mov.b32 bias, 0xe480e480;"
    " xor.b32 t, $4, 0x80808080; prmt.b32 u, t, one, 0x4140; prmt.b32 t, t, one, 0x4342;"
    " add.f16x2 u, u, bias; add.f16x2 t, t, bias;"
    " mov.b32 {$0, $1}, u; mov.b32 {$2, $3}, t; }"
)

#: The low seven bits on 128, minus 128, or 256 where the sign bit is set.
INT8_TO_BFLOAT16 = tl.constexpr(
    "{ .reg .b32 t, u, one, unit; mov.b32 one, 0x43434343; mov.b32 unit, 0x3f803f80;"
    + "".join(
        f" prmt.b32 t, $4, one, {selector};"
        f" and.b32 u, t, 0xff7fff7f;"
        f" lop3.b32 t, t, 0xff80ff80, 0x80008000, 0x6a;"
        f" fma.rn.bf16x2 t, u, unit, t;"
        f" mov.b32 {{${2 * i}, ${2 * i + 1}}}, t;"
        for i, selector in enumerate(("0x4140", "0x4342"))
    )
    + " }"
)

#: Sign, exponent and digits of e4m3 where float16 has them, whose exponents mean 2**-8 times it.
FP8_TO_FLOAT16 = tl.constexpr(
    "{ .reg .b32 t, u, unit; mov.b32 unit, 0x5c005c00;"
    + "".join(
        f" prmt.b32 t, $4, 0, {selector};"
        f" shr.u32 u, t, 1; and.b32 u, u, 0x3f803f80;"
        f" lop3.b32 t, t, 0x80008000, u, 0xea;"
        f" mul.rn.f16x2 t, t, unit;"
        f" mov.b32 {{${2 * i}, ${2 * i + 1}}}, t;"
        for i, selector in enumerate(("0x1404", "0x3424"))
    )
    + " }"
)

#: The same where an instruction does that, from compute capability 8.9 on.
FP8_TO_FLOAT16_IN_HARDWARE = tl.constexpr(
    "{ .reg .b16 low, high; .reg .b32 t, u; mov.b32 {low, high}, $4;"
    " cvt.rn.f16x2.e4m3x2 t, low; cvt.rn.f16x2.e4m3x2 u, high;"
    " mov.b32 {$0, $1}, t; mov.b32 {$2, $3}, u; }"
)

#: Bfloat16's mean 2**-120 times it.
FP8_TO_BFLOAT16 = tl.constexpr(
    "{ .reg .b32 t, u, unit, zero; mov.b32 unit, 0x7b807b80; mov.b32 zero, 0x80008000;"
    + "".join(
        f" prmt.b32 t, $4, 0, {selector};"
        f" shr.u32 u, t, 4; and.b32 u, u, 0x07f007f0;"
        f" lop3.b32 t, t, zero, u, 0xea;"
        f" fma.rn.bf16x2 t, t, unit, zero;"
        f" mov.b32 {{${2 * i}, ${2 * i + 1}}}, t;"
        for i, selector in enumerate(("0x1404", "0x3424"))
    )
    + " }"
)


@triton.jit
def exact_float(number, OFFSET: tl.constexpr):
    """number - OFFSET in float32, for integers from 0 to 2**23 - 1.

    They are the low digits of 2**23, whose last is worth 1, and then that is subtracted too: a
    conversion takes as long as four other instructions.
    """
    return (number | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)


@triton.jit
def wide_fp8(codes):
    """Bytes of e4m3 in float32, whose exponents mean 2**-120 times these."""
    codes = codes.to(tl.int32)
    bits = ((codes & 127) << 20) | ((codes & 128) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def int4_registers(words, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """What `int4_asm` makes of words: 8 tensors of their shape.

    Of two neighbours, register i has codes 2 * i and 2 * i + 1 of the 16 in both. Triton takes them
    for what became of the one and of the other word.
    """
    CONSTRAINTS: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r"
    if DTYPE.is_fp16():
        ASM: tl.constexpr = INT4_TO_FLOAT16 if EXACT else INT4_UNITS_IN_FLOAT16
        return tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [words], dtype=(tl.float16,) * 8, is_pure=True, pack=2
        )
    else:
        ASM: tl.constexpr = INT4_TO_BFLOAT16 if EXACT else INT4_IN_BFLOAT16
        return tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [words], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2
        )


@triton.jit
def int4_values(words, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """Codes in words (rows, 4, n), n even, int32: (rows, 4, 8 * n), minus 8.

    EXACT: False for what takes fewer instructions, to be multiplied by `int4_factors`: in float16
    2**-24 times the code, and 2**-20 times by turns of two, in bfloat16 the code plus 128.
    """
    ROWS: tl.constexpr = words.shape[0]
    PAIRS: tl.constexpr = words.shape[2] // 2
    if INTERPRETED:
        shifts = tl.arange(0, 8)
        place = (shifts // 2 % 2)[None, None, None, :]
        shifts = shifts // 2 * 4 + shifts % 2 * 16
        codes = ((words[:, :, :, None] >> shifts[None, None, None, :]) & 15).to(tl.float32)
        if EXACT:
            codes -= 8.0
        elif DTYPE.is_fp16():
            codes *= tl.where(place == 0, 2.0**-24, 2.0**-20)
        else:
            codes += 128.0
        return tl.reshape(codes.to(DTYPE), (ROWS, 4, PAIRS * 16))
    else:
        a, b, c, d, e, f, g, h = int4_registers(words, DTYPE, EXACT)
        first = tl.join(tl.join(a, c), tl.join(b, d))
        second = tl.join(tl.join(e, g), tl.join(f, h))
        values = tl.reshape(tl.join(first, second), (ROWS, 4, PAIRS, 2, 2, 2, 2))
        return tl.reshape(tl.permute(values, (0, 1, 2, 6, 4, 5, 3)), (ROWS, 4, PAIRS * 16))


@triton.jit
def byte_registers(words, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The four int8 or fp8 codes of words in DTYPE: tensors of their shape."""
    if DTYPE.is_fp16():
        if FORMAT == "fp8 in hardware":
            ASM: tl.constexpr = FP8_TO_FLOAT16_IN_HARDWARE
        else:
            ASM: tl.constexpr = INT8_TO_FLOAT16 if FORMAT == "int8" else FP8_TO_FLOAT16
        return tl.inline_asm_elementwise(
            ASM, "=&h,=&h,=&h,=&h,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=1
        )
    else:
        ASM: tl.constexpr = INT8_TO_BFLOAT16 if FORMAT == "int8" else FP8_TO_BFLOAT16
        return tl.inline_asm_elementwise(
            ASM, "=&h,=&h,=&h,=&h,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=1
        )


@triton.jit
def byte_values(words, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The codes in words (rows, 4, n) of int8 or fp8: (rows, 4, 4 * n)."""
    if INTERPRETED:
        codes = words[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]
        codes = codes.to(tl.int8)
        values = (codes if FORMAT == "int8" else wide_fp8(codes)).to(DTYPE)
    else:
        a, b, c, d = byte_registers(words, FORMAT, DTYPE)
        values = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(values, (words.shape[0], 4, 4 * words.shape[2]))


def packed_asm(asm: tl.constexpr) -> tl.constexpr:
    """PTX from a register of four bytes, not to four halves but to two registers of two."""
    text = asm.value.replace("$4", "$2")
    for i in range(2):
        text = text.replace(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, ", f"mov.b32 ${i}, ")
    return tl.constexpr(text)


PACKED_INT8_TO_FLOAT16 = packed_asm(INT8_TO_FLOAT16)
PACKED_INT8_TO_BFLOAT16 = packed_asm(INT8_TO_BFLOAT16)
PACKED_FP8_TO_FLOAT16 = packed_asm(FP8_TO_FLOAT16)
PACKED_FP8_TO_BFLOAT16 = packed_asm(FP8_TO_BFLOAT16)


@triton.jit
def exact_values(codes, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes of int8 or fp8 in DTYPE, of their shape, in any layout of four or more a thread."""
    if INTERPRETED:  # which makes bfloat16 of float32 alone
        return (codes.to(tl.float32) if FORMAT == "int8" else wide_fp8(codes)).to(DTYPE)
    else:
        if DTYPE.is_fp16():
            ASM: tl.constexpr = (
                PACKED_INT8_TO_FLOAT16 if FORMAT == "int8" else PACKED_FP8_TO_FLOAT16
            )
            return tl.inline_asm_elementwise(
                ASM, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
            )
        else:
            ASM: tl.constexpr = (
                PACKED_INT8_TO_BFLOAT16 if FORMAT == "int8" else PACKED_FP8_TO_BFLOAT16
            )
            return tl.inline_asm_elementwise(
                ASM, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
            )


@triton.jit
def int4_factors(x):
    """x (rows, columns), where four and four columns meet a thread's codes: what is to multiply
    `int4_values` that are not EXACT.

    In float16 a sixteenth where these are 16 times as large. That is exact but for a subnormal
    result, whose error is half of 2**-24, that of any output which is as small.
    """
    if x.dtype == tl.float16:
        place = tl.arange(0, x.shape[1])[None, :] // 2 % 2
        return x * tl.where(place == 0, 1.0, 0.0625).to(tl.float16)
    else:
        return x


@triton.jit
def where_kept(kept, values):
    """values, 16 bits, where kept is -1 (int16), 0 where it is 0: one instruction for two."""
    if INTERPRETED:
        return tl.where(kept != 0, values, 0.0)
    else:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;",
            "=r,r,r",
            [values, kept],
            dtype=values.dtype,
            is_pure=True,
            pack=2,
        )
