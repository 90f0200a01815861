"""What the MLP benchmark compares on the same values: ours, and what else PyTorch users can run."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from hf_triton_mlp.launchers import MLPWeights
from hf_triton_mlp.measure import Case, LayerHalf
from hf_triton_mlp.mlp import MLPConfig, TritonMLP
from hf_triton_mlp.ops import MLPGemmOp, compose, norm_function

OURS = "hf_triton_mlp"
COMPILED = ("torch.compile", "max-autotune", "gemlite")
#: What tunes itself takes up to a minute a cell, so it is measured for some, in float16.
MAX_AUTOTUNE_ROWS = (1, 128)
MAX_AUTOTUNE_CASES = ("gpt2", "opt-1.3b")
#: One for each of GemLite's kernels for few rows: matrix-vector, and split K.
GEMLITE_ROWS = (1, 16)

#: Builds a layer half of a case from its layers' weights.
Builder = Callable[[Case, list[MLPWeights]], LayerHalf]


def peers(case: Case, M: int, dtype: torch.dtype) -> dict[str, Builder]:
    """What computes a layer half of this case, by name; ours first."""
    found: dict[str, Builder] = {OURS: _ours, "torch eager": _torch_eager}
    if case.activation in ("gelu_new", "relu"):
        found["_addmm_activation"] = _addmm_activation
    if case.name == "gpt2":
        found["transformers eager"] = _transformers_eager
    if case.gated and installed("liger_kernel"):
        found["liger"] = _liger
    found["torch.compile"] = _torch_compile
    tunes = M in MAX_AUTOTUNE_ROWS and case.name in MAX_AUTOTUNE_CASES
    if tunes and dtype == torch.float16:
        found["max-autotune"] = partial(_torch_compile, mode="max-autotune-no-cudagraphs")
    if M in GEMLITE_ROWS and installed("gemlite"):
        found["gemlite"] = _gemlite
    return found


def installed(module: str) -> bool:
    """Whether a peer that is a wheel of its own is there."""
    return importlib.util.find_spec(module) is not None


def _ours(case: Case, layers: list[MLPWeights]) -> LayerHalf:
    mlps = [_triton_mlp(case, weights) for weights in layers]
    return lambda a, r, i: mlps[i](a, r, early=True)


def _triton_mlp(case: Case, weights: MLPWeights) -> TritonMLP:
    up, down, gate = weights.plain
    config = MLPConfig(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        dtype=up.dtype,
        activation=case.activation,
        gated=case.gated,
        norm=case.norm,
        up_bias=case.bias,
        down_bias=case.bias,
    )
    with torch.device("meta"):
        mlp = TritonMLP(config).eval()
    both = up if gate is None else torch.cat((up, gate))
    mlp.inter_w = nn.Parameter(both, requires_grad=False)
    mlp.inter_b, mlp.output_b = _parameter(weights.up_bias), _parameter(weights.down_bias)
    mlp.output_w = nn.Parameter(down, requires_grad=False)
    mlp.attn_nw, mlp.attn_nb = _parameter(weights.norm_weight), _parameter(weights.norm_bias)
    return mlp


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _torch_eager(case: Case, layers: list[MLPWeights]) -> LayerHalf:
    op = MLPGemmOp(activation=case.activation, norm=case.norm)
    return lambda a, r, i: op.compose(a, layers[i], r, None)


def _torch_compile(case: Case, layers: list[MLPWeights], mode: str | None = None) -> LayerHalf:
    op = MLPGemmOp(activation=case.activation, norm=case.norm)
    # Weights are arguments, so that one compiled function serves all layers.
    compiled = torch.compile(op.compose, dynamic=False, mode=mode)
    return lambda a, r, i: compiled(a, layers[i], r, None)


def _addmm_activation(case: Case, layers: list[MLPWeights]) -> LayerHalf:
    addmm = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
    gelu = case.activation != "relu"

    def half(a: Tensor, r: Tensor, i: int) -> Tensor:
        w = layers[i]
        s = r + a
        u = F.layer_norm(s, s.shape[-1:], w.norm_weight, w.norm_bias)
        up, down, _ = w.plain
        assert w.up_bias is not None
        return s + F.linear(addmm(w.up_bias, u, up.t(), use_gelu=gelu), down, w.down_bias)

    return half


def _transformers_eager(case: Case, layers: list[MLPWeights]) -> LayerHalf:
    modules = [_transformers_modules(case, weights) for weights in layers]

    def half(a: Tensor, r: Tensor, i: int) -> Tensor:
        norm, mlp = modules[i]
        s = r + a
        return s + mlp(norm(s))

    return half


def _transformers_modules(case: Case, w: MLPWeights) -> tuple[nn.LayerNorm, GPT2MLP]:
    """GPT-2's own modules, on the same values: (in, out) weights, `gelu_new` as it computes it."""
    with torch.device("meta"):
        norm = nn.LayerNorm(case.hidden)
        mlp = GPT2MLP(case.intermediate, GPT2Config(n_embd=case.hidden)).eval()
    up, down, _ = w.plain
    state = {
        "c_fc.weight": up.t().contiguous(),
        "c_fc.bias": w.up_bias,
        "c_proj.weight": down.t().contiguous(),
        "c_proj.bias": w.down_bias,
    }
    mlp.load_state_dict(state, assign=True)
    norm.load_state_dict({"weight": w.norm_weight, "bias": w.norm_bias}, assign=True)
    return norm, mlp


def _liger(case: Case, layers: list[MLPWeights]) -> LayerHalf:
    """Liger's fused add + RMSNorm and SwiGLU around PyTorch's products."""
    ops = importlib.import_module("liger_kernel.ops")
    add_norm = ops.LigerFusedAddRMSNormFunction.apply
    silu_mul = ops.LigerSiLUMulFunction.apply

    def half(a: Tensor, r: Tensor, i: int) -> Tensor:
        w = layers[i]
        u, s = add_norm(a, r, w.norm_weight, 1e-5)
        up, down, gate = w.plain
        assert gate is not None
        return s + F.linear(silu_mul(F.linear(u, gate), F.linear(u, up)), down)

    return half


def _gemlite(case: Case, layers: list[MLPWeights]) -> LayerHalf:
    """GemLite's linear layers on 16-bit weights, between PyTorch's operations."""
    gemlite = importlib.import_module("gemlite")

    def linear(weight: Tensor | None, bias: Tensor | None) -> Any:
        if weight is None:
            return None
        out, inp = weight.shape
        dtype = gemlite.core.TORCH_TO_DTYPE[weight.dtype]
        layer = gemlite.GemLiteLinear(
            16,
            group_size=inp,  # bounds its blocks of K; without one they would be 1 or 32 long
            in_features=inp,
            out_features=out,
            input_dtype=dtype,
            output_dtype=dtype,
        )
        return layer.pack(weight, None, None, bias)  # no scales, no zeros; shares the weight

    linears = []
    for w in layers:
        up, down, gate = w.plain
        linears.append(
            {
                "up": linear(up, w.up_bias),
                "gate": linear(gate, None),
                "down": linear(down, w.down_bias),
            }
        )
    norms = [norm_function(case.norm, w.norm_weight, w.norm_bias, 1e-5) for w in layers]
    return lambda a, r, i: compose(
        a, r, None, None, norm=norms[i], activation=case.activation, pre_norm=True, **linears[i]
    )
