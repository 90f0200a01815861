"""The activations, each by its exact formula, on float32 values in registers."""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

#: transformers' names; gelu_new and gelu_pytorch_tanh are two names of one formula.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu2", "quick_gelu")


@triton.jit
def sigmoid(x, PRECISE: tl.constexpr):
    """1 / (1 + exp(-x)); PRECISE for float32 results, to an ulp or two instead of about eight."""
    if PRECISE and not INTERPRETED:
        return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))
    else:
        return tl.sigmoid(x)


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
        return x * sigmoid(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x), PRECISE)
    elif ACTIVATION == "silu":
        return x * sigmoid(x, PRECISE)
    else:
        tl.static_assert(ACTIVATION == "quick_gelu", "unknown activation")
        return x * sigmoid(1.702 * x, PRECISE)
