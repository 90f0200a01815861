"""Triton kernels. Each file holds one kind of work; none of them knows about modules."""

import triton

from hf_triton_mlp.kernels.attention import combine_attention_kernel, decode_attention_kernel
from hf_triton_mlp.kernels.decode import decode_linear_kernel
from hf_triton_mlp.kernels.exchange import sum_ranks_kernel
from hf_triton_mlp.kernels.greedy import greatest_logits_kernel, next_token_kernel
from hf_triton_mlp.kernels.norm import norm_kernel, norm_sum_kernel, residual_add_kernel
from hf_triton_mlp.kernels.persistent import persistent_linear_kernel
from hf_triton_mlp.kernels.quantized import quantized_linear_kernel
from hf_triton_mlp.kernels.quantized_row import quantized_row_kernel
from hf_triton_mlp.kernels.quantized_tiled import (
    dequantize_kernel,
    quantize_rows_kernel,
    quantized_tiled_kernel,
)
from hf_triton_mlp.kernels.skinny import skinny_linear_kernel
from hf_triton_mlp.kernels.sparse import dequantize_columns_kernel, sparse_linear_kernel
from hf_triton_mlp.kernels.stream import stream_linear_kernel
from hf_triton_mlp.kernels.tiled import (
    activation_kernel,
    combine_splits_kernel,
    tiled_linear_kernel,
)

#: True under TRITON_INTERPRET=1: the kernels then run on the CPU, on CPU tensors.
INTERPRETED = not isinstance(norm_kernel, triton.runtime.JITFunction)

__all__ = [
    "INTERPRETED",
    "activation_kernel",
    "combine_attention_kernel",
    "combine_splits_kernel",
    "decode_attention_kernel",
    "decode_linear_kernel",
    "dequantize_columns_kernel",
    "dequantize_kernel",
    "greatest_logits_kernel",
    "next_token_kernel",
    "norm_kernel",
    "norm_sum_kernel",
    "persistent_linear_kernel",
    "quantize_rows_kernel",
    "quantized_linear_kernel",
    "quantized_row_kernel",
    "quantized_tiled_kernel",
    "residual_add_kernel",
    "skinny_linear_kernel",
    "sparse_linear_kernel",
    "stream_linear_kernel",
    "sum_ranks_kernel",
    "tiled_linear_kernel",
]
