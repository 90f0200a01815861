"""Fused Triton MLPs for Hugging Face Transformers models: `patch_model(model)`."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

if find_spec("triton") is None:
    raise ImportError(
        "hf_triton_mlp needs Triton >= 3.6, which is not installed: `pip install triton` "
        "(CUDA builds of PyTorch bring it along)"
    )

from hf_triton_mlp.decoding import graph_decode
from hf_triton_mlp.loading import load_sharded
from hf_triton_mlp.mlp import MLPConfig, TritonMLP
from hf_triton_mlp.ops import GELUGemmOp, MLPGemmOp, MLPWeights, ResidualAddOp, VectorMatMulOp
from hf_triton_mlp.patching import patch_model, patch_report, patched, unpatch_model
from hf_triton_mlp.quantization import QuantizationConfig
from hf_triton_mlp.quantizer import TritonMLPConfig
from hf_triton_mlp.validation import validate

try:
    __version__ = version("hf_triton_mlp")
except PackageNotFoundError:  # a checkout that is not installed: patch_model says what to do
    __version__ = "0+unknown"

__all__ = [
    "GELUGemmOp",
    "MLPConfig",
    "MLPGemmOp",
    "MLPWeights",
    "QuantizationConfig",
    "ResidualAddOp",
    "TritonMLP",
    "TritonMLPConfig",
    "VectorMatMulOp",
    "graph_decode",
    "load_sharded",
    "patch_model",
    "patch_report",
    "patched",
    "unpatch_model",
    "validate",
]
