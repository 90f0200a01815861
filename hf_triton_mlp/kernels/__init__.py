"""Triton kernels. Each file holds one kind of work; none of them knows about modules."""

try:
    import triton
except ImportError as error:  # pragma: no cover - exercised in a subprocess
    raise ImportError(
        "hf_triton_mlp needs Triton >= 3.6, which is not installed: `pip install triton` "
        "(CUDA builds of PyTorch bring it along)"
    ) from error

from hf_triton_mlp.kernels.norm import norm_kernel, residual_add_kernel
from hf_triton_mlp.kernels.skinny import skinny_linear_kernel
from hf_triton_mlp.kernels.tiled import tiled_linear_kernel

#: True under TRITON_INTERPRET=1: the kernels then run on the CPU, on CPU tensors.
INTERPRETED = not isinstance(norm_kernel, triton.runtime.JITFunction)

__all__ = [
    "INTERPRETED",
    "norm_kernel",
    "residual_add_kernel",
    "skinny_linear_kernel",
    "tiled_linear_kernel",
]
