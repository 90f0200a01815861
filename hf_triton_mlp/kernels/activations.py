"""The activations, each by its exact formula, on float32 values in registers."""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

#: transformers' names; gelu_new and gelu_pytorch_tanh are two names of one formula.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu2", "quick_gelu")

#: Those that give exact zeros for half of the numbers, so that what follows need not be read.
SPARSE = ("relu", "relu2")


@triton.jit
def sigmoid(x, PRECISE: tl.constexpr):
    """1 / (1 + exp(-x)); PRECISE for float32 results, to an ulp or two instead of about eight.

    Without it 5 instructions, 6 fewer than tl.sigmoid, which scales denormals and divisors too:
    a tile of 128 x 256 has 32768 of these, while the matrix units wait.
    """
    if INTERPRETED:
        return tl.sigmoid(x)
    elif PRECISE:
        return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))
    else:
        exp = approximate(x * -1.4426950408889634, "ex2.approx.ftz.f32 $0, $1;")
        return approximate(1.0 + exp, "rcp.approx.ftz.f32 $0, $1;")


@triton.jit
def approximate(x, INSTRUCTION: tl.constexpr):
    """One instruction of the special function unit, to an ulp or two; denormals are zero."""
    return tl.inline_asm_elementwise(
        INSTRUCTION, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr):
    """act(x) for float32 x; ACTIVATION is one of ACTIVATIONS or None for the identity.

    tanh GELU uses 0.5 * (1 + tanh(z)) = sigmoid(2z), which keeps its relative accuracy for
    large negative z. Comparisons are written so that NaN passes through.
    """
    if ACTIVATION is None:
        return x
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        r = tl.where(x <= 0.0, 0.0, x)
        return r * r
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_new" or ACTIVATION == "gelu_pytorch_tanh":
        # 2 * sqrt(2 / pi) * (x + 0.044715 * x**3), in three instructions.
        return x * sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * (x * x)), PRECISE)
    elif ACTIVATION == "silu":
        return x * sigmoid(x, PRECISE)
    else:
        tl.static_assert(ACTIVATION == "quick_gelu", "unknown activation")
        return x * sigmoid(1.702 * x, PRECISE)
