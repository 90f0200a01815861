"""The four operations of an MLP: PyTorch reference, custom op (+ fake), public class.

Every operation takes any number of leading dimensions and treats its input as (tokens, hidden).
Tensors on a GPU run the Triton kernels through a `torch.library` custom op; CPU tensors, autocast
and calls that need gradients run the same formula in PyTorch, which is also the reference.
Weights are (out, in) with any strides, so that a Conv1D weight enters as `weight.t()`; or they are
quantized, and PyTorch then computes with what they stand for in the input's dtype.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_triton_mlp import launchers
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.kernels.activations import ACTIVATIONS
from hf_triton_mlp.launchers import MLPWeights, Summands, linear, mlp, on_device, rows
from hf_triton_mlp.quantization import QuantizedWeight, Weight, same_format
from hf_triton_mlp.ranks import Ranks
from hf_triton_mlp.reading import split_packed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMS = ("layer_norm", "rms_norm", "rms_norm_offset")
BRANCH_NORMS = NORMS[1:]


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The PyTorch function of an activation; ValueError when the name is not supported."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_new": partial(F.gelu, approximate="tanh"),
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "relu2": lambda x: F.relu(x).square(),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
    if name not in functions:
        raise ValueError(f"unknown activation {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return functions[name]


def compose(
    input: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    bias: Tensor | None,
    *,
    norm: Callable[[Tensor], Tensor] | None,
    up: Callable[[Tensor], Tensor],
    gate: Callable[[Tensor], Tensor] | None,
    down: Callable[[Tensor], Tensor],
    activation: str,
    pre_norm: bool,
    branch_scale: float = 1.0,
    attention_norm: Callable[[Tensor], Tensor] | None = None,
    output_norm: Callable[[Tensor], Tensor] | None = None,
    packed: str | None = None,
    carries: bool = True,
) -> Tensor:
    """The MLP of DESIGN §3 in PyTorch, differentiable, from callables for its parts.

    With `norm`: s = input + bias + residual, u = norm(s), MLP(u) + (s if pre_norm else u).
    With `residual_norm`: MLP(residual_norm) + input + bias + residual.
    With neither: MLP(input) + residual.
    branch_scale multiplies what joins a residual: input + bias, and the MLP.
    With attention_norm and output_norm (pre-norm): s = attention_norm(input + bias) + residual,
    u = norm(s), or s without `norm`, output_norm(MLP(u)) + s.
    packed: `up` computes the gate too, in this order (`split_packed`).
    carries: whether the last summand joins, as in `MLPGemmOp`.
    """
    total = input
    if norm is not None or residual_norm is not None or attention_norm is not None:
        if bias is not None:
            total = total + bias
        if branch_scale != 1.0:
            total = total * branch_scale
        if attention_norm is not None:
            total = attention_norm(total)
        if residual is not None:
            total = residual + total
    x, carry = input, residual
    if norm is not None:
        x = norm(total)
        carry = total if pre_norm else x
    elif residual_norm is not None:
        x, carry = residual_norm, total
    elif attention_norm is not None:
        x = carry = total
    act = activation_function(activation)
    if packed is not None:
        values, gates = split_packed(packed, up(x), dim=-1)
        hidden = act(gates) * values
    else:
        hidden = act(up(x)) if gate is None else act(gate(x)) * up(x)
    output = down(hidden)
    if branch_scale != 1.0:
        output = output * branch_scale
    if output_norm is not None:
        output = output_norm(output)
    return carry + output if carries and carry is not None else output


def check_branch_norm(
    branch_norm: str | None, norm: str | None, pre_norm: bool, branch_scale: float
) -> None:
    """Raise ValueError unless a kernel computes norms of what joins a residual beside the rest."""
    if branch_norm is None:
        return
    if branch_norm not in BRANCH_NORMS:
        raise ValueError(
            f"unknown branch_norm {branch_norm!r}; supported: {', '.join(BRANCH_NORMS)}, None"
        )
    if norm not in (None, branch_norm) or not pre_norm or branch_scale != 1.0:
        raise ValueError(
            f"branch_norm {branch_norm!r} needs the same norm or none, pre_norm and no "
            f"branch_scale; found {norm!r}, {pre_norm} and {branch_scale}"
        )


def rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: bool = False
) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight + bias over the last dimension, computed in float32.

    offset: weight + 1 in place of weight, as Gemma stores it.
    """
    wide = x.float() if x.dtype in DTYPES else x
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * (1.0 + weight.to(wide.dtype) if offset else weight)
    return (wide if bias is None else wide + bias).to(x.dtype)


def norm_function(
    norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Callable[[Tensor], Tensor] | None:
    """One of NORMS over the last dimension, as a function of x; None for none."""
    if norm is None:
        return None
    if norm in ("rms_norm", "rms_norm_offset"):
        return lambda x: rms_norm(x, weight, bias, eps, offset=norm == "rms_norm_offset")
    return lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias in PyTorch, differentiable."""
    values = weight if isinstance(weight, Tensor) else weight.dequantize(x.dtype)
    return F.linear(x, values, bias)


def part_product(x: Tensor, weight: Weight, bias: Tensor | None, ranks: Ranks, dim: int) -> Tensor:
    """`product`, for ranks with a part each of the weight: of its rows (0) or its columns (1).

    Of its rows: the whole x to this rank's part of the results. Of its columns: this rank's part of
    x to the whole results.
    """
    if dim == 0:
        return product(ranks.copied(x), weight, bias)
    output = ranks.summed(product(x, weight, None))
    return output if bias is None else output + bias


def projection_functions(
    weights: MLPWeights, ranks: Ranks | None = None
) -> dict[str, Callable[[Tensor], Tensor] | None]:
    """up, gate and down as functions of x; ranks: who has the other parts of these weights."""

    def function(weight: Weight, bias: Tensor | None, dim: int) -> Callable[[Tensor], Tensor]:
        if ranks is None:
            return lambda x: product(x, weight, bias)
        return partial(part_product, weight=weight, bias=bias, ranks=ranks, dim=dim)

    w = weights
    return {
        "up": function(w.up, w.up_bias, 0),
        "gate": None if w.gate is None else function(w.gate, w.gate_bias, 0),
        "down": function(w.down, w.down_bias, 1),
    }


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _float_weights(weights: MLPWeights) -> MLPWeights:
    """In float32; quantized ones are what they are."""
    wide = (w if isinstance(w, QuantizedWeight) else _float(w) for w in weights)
    return MLPWeights(*wide)  # pyright: ignore[reportArgumentType]


# --- when the kernels run ---------------------------------------------------------------------


def kernels_apply(input: Tensor) -> bool:
    """Whether the Triton kernels compute on this input: on a GPU, outside autocast."""
    return (input.is_cuda or INTERPRETED) and not torch.is_autocast_enabled(input.device.type)


def needs_grad(*tensors: Weight | None) -> bool:
    """Whether autograd wants to see this computation; quantized weights have no gradients."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def check_tensors(input: Tensor, weight: Weight, *same_shape: Tensor | None) -> None:
    """Raise a clear error unless `input` fits `weight` (out, in) and the others fit `input`."""
    check_floating(input)
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input has hidden size {input.shape[-1]}, the weights have {weight.shape[1]}"
        )
    if input.device != weight.device:
        raise ValueError(f"input is on {input.device}, the weights are on {weight.device}")
    if isinstance(weight, Tensor) and input.dtype != weight.dtype:
        raise TypeError(f"input is {input.dtype}, the weights are {weight.dtype}")
    if input.dtype not in DTYPES:
        raise TypeError(f"{input.dtype} is not supported by the kernels; supported: {DTYPES}")
    for other in same_shape:
        if other is not None and (other.shape != input.shape or other.device != input.device):
            raise ValueError(
                f"a summand has shape {tuple(other.shape)} on {other.device}, "
                f"the input {tuple(input.shape)} on {input.device}"
            )


def check_floating(input: Tensor) -> None:
    """Raise TypeError for integer, boolean and complex inputs."""
    if not input.is_floating_point():
        raise TypeError(f"input is {input.dtype}; an MLP needs a floating-point input")


def _check_vector(name: str, vector: Tensor | None, size: int, like: Tensor) -> None:
    if vector is not None and (vector.shape != (size,) or vector.device != like.device):
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)} on {vector.device}, "
            f"expected ({size},) on {like.device}"
        )


def _check_weights(weights: MLPWeights, input: Tensor) -> None:
    """The rest of `check_tensors(input, weights.up)`."""
    intermediate, hidden = weights.up.shape
    if weights.down.shape != (hidden, intermediate):
        raise ValueError(
            f"mismatched projections: up is (out, in) = {tuple(weights.up.shape)}, so down must be "
            f"({hidden}, {intermediate}), found {tuple(weights.down.shape)}"
        )
    if weights.gate is not None and weights.gate.shape != weights.up.shape:
        raise ValueError(
            f"mismatched projections: up is {tuple(weights.up.shape)}, "
            f"gate is {tuple(weights.gate.shape)}"
        )
    if weights.gate is not None and not same_format(weights.up, weights.gate):
        raise TypeError("projections differ: up and gate are not quantized alike")
    for other in (weights.down, weights.gate):
        if other is None:
            continue
        dtype = other.dtype if isinstance(other, Tensor) else input.dtype
        if (dtype, other.device) != (input.dtype, input.device):
            raise TypeError(
                f"projections differ: {input.dtype} on {input.device}, {dtype} on {other.device}"
            )
    for name, size in (
        ("up_bias", intermediate),
        ("gate_bias", intermediate),
        ("down_bias", hidden),
        ("norm_weight", hidden),
        ("norm_bias", hidden),
        ("attention_norm_weight", hidden),
        ("output_norm_weight", hidden),
    ):
        _check_vector(name, getattr(weights, name), size, input)


# --- custom ops -------------------------------------------------------------------------------


class Carried(NamedTuple):
    """MLPWeights as custom ops take them: in tensors and numbers alone.

    weights: with the codes of quantized ones. scales: the scales and zeros of up, down and gate, in
    turn; group_sizes: theirs, 0 where one is not quantized; fp8_rows: whether theirs is "fp8" for
    `activations`. All three are empty where none is.
    """

    weights: MLPWeights
    scales: Sequence[Tensor | None] = ()
    group_sizes: Sequence[int] = ()
    fp8_rows: Sequence[bool] = ()


def carried(weights: MLPWeights) -> Carried:
    """The opposite of `_unpacked`."""
    projections = weights.up, weights.down, weights.gate
    if not any(isinstance(weight, QuantizedWeight) for weight in projections):
        return Carried(weights)
    codes, scales, group_sizes, fp8_rows = [], [], [], []
    for weight in projections:
        quantized = isinstance(weight, QuantizedWeight)
        codes.append(weight.codes if quantized else weight)
        scales += (weight.scales, weight.zeros) if quantized else (None, None)
        group_sizes.append(weight.group_size if quantized else 0)
        fp8_rows.append(quantized and weight.activations is not None)
    up, down, gate = codes
    return Carried(weights._replace(up=up, down=down, gate=gate), scales, group_sizes, fp8_rows)


def _unpacked(
    weights: MLPWeights,
    scales: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    fp8_rows: Sequence[bool],
    hidden: int,
) -> MLPWeights:
    """The weights of an MLP of this hidden size, as they were before `carried`."""
    if not group_sizes:
        return weights
    intermediate = weights.up.shape[0]
    up, down, gate = (
        _quantized(codes, scales[2 * i], scales[2 * i + 1], size, group_sizes[i], fp8_rows[i])
        for i, (codes, size) in enumerate(
            ((weights.up, hidden), (weights.down, intermediate), (weights.gate, hidden))
        )
    )
    return weights._replace(up=up, down=down, gate=gate)


def _quantized(
    codes: Any,
    scales: Tensor | None,
    zeros: Tensor | None,
    size: int,
    group_size: int,
    fp8_rows: bool,
) -> Any:
    """The weight (out, size) of these tensors; a plain one, or None, has no scales."""
    if scales is None:
        return codes
    activations = "fp8" if fp8_rows else None
    return QuantizedWeight(codes, scales, zeros, (len(scales), size), group_size, activations)


def _mlp_gemm(
    input: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    attention_norm_weight: Tensor | None,
    output_norm_weight: Tensor | None,
    scales: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    fp8_rows: Sequence[bool],
    activation: str,
    norm: str | None,
    norm_eps: float,
    pre_norm: bool,
    branch_scale: float = 1.0,
    branch_norm: str | None = None,
    carries: bool = True,
) -> Tensor:
    weights = MLPWeights(
        up,
        down,
        up_bias,
        down_bias,
        gate,
        gate_bias,
        norm_weight,
        norm_bias,
        attention_norm_weight,
        output_norm_weight,
    )
    weights = _unpacked(weights, scales, group_sizes, fp8_rows, input.shape[-1])
    if not kernels_apply(input):
        op = MLPGemmOp(
            activation=activation,
            norm=norm,
            norm_eps=norm_eps,
            pre_norm=pre_norm,
            branch_scale=branch_scale,
            branch_norm=branch_norm,
        )
        return op.compose(input, weights, residual, bias, carries)
    x, summand = rows(input), None if residual is None else rows(residual)
    with on_device(input):
        if branch_norm is not None:
            out = launchers.branch_normed_mlp(
                x,
                summand,
                bias,
                weights,
                activation=activation,
                norm=norm,
                norm_eps=norm_eps,
                branch_norm=branch_norm,
            )
        else:
            assert norm is not None
            out = launchers.normed_mlp(
                x,
                summand,
                bias,
                weights,
                activation=activation,
                norm=norm,
                norm_eps=norm_eps,
                pre_norm=pre_norm,
                branch_scale=branch_scale,
                carries=carries,
            )
    return out.view(input.shape)


def _gelu_gemm(
    input: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    add: Tensor | None,
    add2: Tensor | None,
    add_bias: Tensor | None,
    scales: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    fp8_rows: Sequence[bool],
    activation: str,
) -> Tensor:
    w = MLPWeights(up, down, up_bias, down_bias, gate, gate_bias)
    w = _unpacked(w, scales, group_sizes, fp8_rows, input.shape[-1])
    if not kernels_apply(input):
        return GELUGemmOp(activation=activation).compose(input, w, add, add2, add_bias)
    with on_device(input):
        summands = Summands(
            add=None if add is None else rows(add),
            add2=None if add2 is None else rows(add2),
            add_bias=add_bias,
        )
        out = mlp(rows(input), w, activation=activation, summands=summands)
    return out.view(input.shape)


def _vector_matmul(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    group_size: int = 0,
    fp8_rows: bool = False,
) -> Tensor:
    matrix = _quantized(weight, scales, zeros, input.shape[-1], group_size, fp8_rows)
    if not kernels_apply(input):
        return product(input, matrix, bias)
    with on_device(input):
        return linear(rows(input), matrix, bias).view(*input.shape[:-1], matrix.shape[0])


def _residual_add(
    hidden: Tensor,
    residual: Tensor | None,
    attention: Tensor | None,
    attention_bias: Tensor | None,
    final_bias: Tensor | None,
    share: float,
    attention_share: float,
) -> Tensor:
    if not kernels_apply(hidden):
        op = ResidualAddOp()
        return op.compose(
            hidden, residual, attention, attention_bias, final_bias, share, attention_share
        )
    with on_device(hidden):
        out = launchers.residual_add(
            rows(hidden),
            None if residual is None else rows(residual),
            None if attention is None else rows(attention),
            attention_bias,
            final_bias,
            share,
            attention_share,
        )
    return out.view(hidden.shape)


def _operation(
    function: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Register `function` as custom op hf_triton_mlp::<name>; returns what the public classes call.

    Tracers and dispatch modes have to see the op; plain eager calls skip it, because the
    dispatcher's way through a Python op costs more host time than the launches themselves.
    """
    name = function.__name__.removeprefix("_")
    torch.library.custom_op(f"hf_triton_mlp::{name}", function, mutates_args=()).register_fake(fake)
    op = getattr(torch.ops.hf_triton_mlp, name).default

    def call(input: Tensor, *arguments: object) -> Tensor:
        traced = (
            torch.compiler.is_compiling()
            or type(input) not in (Tensor, torch.nn.Parameter)
            or torch._C._len_torch_dispatch_stack() > 0
        )
        return op(input, *arguments) if traced else function(input, *arguments)

    return call


def _like_input(input: Tensor, *arguments: object) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def _like_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Tensor | None = None,
    *arguments: object,
) -> Tensor:
    outputs = len(weight if scales is None else scales)
    return input.new_empty((*input.shape[:-1], outputs))


_run_mlp_gemm = _operation(_mlp_gemm, _like_input)
_run_gelu_gemm = _operation(_gelu_gemm, _like_input)
_run_vector_matmul = _operation(_vector_matmul, _like_product)
_run_residual_add = _operation(_residual_add, _like_input)


# --- the public operations --------------------------------------------------------------------


class MLPGemmOp:
    """Residual add + norm + GEMM + bias + activation [* gate] + GEMM + bias + residual.

    s = input + bias + residual; u = norm(s); act(u·upᵀ + up_bias)·downᵀ + down_bias + carry, where
    carry is s with `pre_norm` and u without. Two kernels for one token, three for more.
    branch_scale, which needs pre_norm, multiplies input + bias and the second product with its
    bias; other than 1 it takes two kernels more.
    branch_norm, an RMSNorm, is applied to the same two: s = branch_norm(input + bias) + residual,
    branch_norm(act(u·upᵀ + up_bias)·downᵀ + down_bias) + s, where u is s if norm is None. Four
    kernels.
    """

    def __init__(
        self,
        *,
        activation: str,
        norm: str | None = "layer_norm",
        norm_eps: float = 1e-5,
        pre_norm: bool = True,
        branch_scale: float = 1.0,
        branch_norm: str | None = None,
    ) -> None:
        activation_function(activation)
        if norm not in NORMS and (norm is not None or branch_norm is None):
            raise ValueError(f"unknown norm {norm!r}; supported: {', '.join(NORMS)}")
        self.activation = activation
        self.norm = norm
        self.norm_eps = norm_eps
        if branch_scale != 1.0 and not pre_norm:
            raise ValueError(f"branch_scale {branch_scale} needs a pre-norm MLP")
        check_branch_norm(branch_norm, norm, pre_norm, branch_scale)
        self.pre_norm = pre_norm
        self.branch_scale = branch_scale
        self.branch_norm = branch_norm

    def __call__(
        self,
        input: Tensor,
        weights: MLPWeights,
        residual: Tensor | None = None,
        bias: Tensor | None = None,
        carries: bool = True,
    ) -> Tensor:
        """input, residual: (…, H); bias: (H,); returns (…, H) in the input's dtype.

        carries: False leaves the carry out of the sum: where the weights are shared by processes,
        whose results add up to the MLP's, one adds it (and has the down projection's bias).
        Raises TypeError for dtypes and ValueError for shapes or devices that do not fit, and for
        norms behind what would not be the whole sum.
        """
        if self.branch_norm is not None and not carries:
            raise ValueError("with branch_norm the sum is normalized, so it has to be whole")
        if self.branch_norm is not None and weights.norm_bias is not None:
            raise ValueError("with branch_norm the norms have no biases, found a norm_bias")
        if not kernels_apply(input) or needs_grad(input, residual, bias, *weights):
            check_floating(input)
            return self.compose(input, weights, residual, bias, carries)
        check_tensors(input, weights.up, residual)
        _check_weights(weights, input)
        _check_vector("bias", bias, input.shape[-1], input)
        tensors, *rest = carried(weights)
        return _run_mlp_gemm(
            input,
            residual,
            bias,
            *tensors,
            *rest,
            self.activation,
            self.norm,
            self.norm_eps,
            self.pre_norm,
            self.branch_scale,
            self.branch_norm,
            carries,
        )

    def added_up(
        self,
        input: Tensor,
        weights: MLPWeights,
        residual: Tensor | None,
        bias: Tensor | None,
        add_up: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """With branch_norm, by kernels: add_up makes the MLP's results of those of its part here.

        Arguments, and what is raised, as for a call; not to be compiled.
        """
        assert self.branch_norm is not None
        check_tensors(input, weights.up, residual)
        _check_weights(weights, input)
        _check_vector("bias", bias, input.shape[-1], input)
        with on_device(input):
            out = launchers.branch_normed_mlp(
                rows(input),
                None if residual is None else rows(residual),
                bias,
                weights,
                activation=self.activation,
                norm=self.norm,
                norm_eps=self.norm_eps,
                branch_norm=self.branch_norm,
                add_up=add_up,
            )
        return out.view(input.shape)

    def compose(
        self,
        input: Tensor,
        weights: MLPWeights,
        residual: Tensor | None,
        bias: Tensor | None,
        carries: bool = True,
    ) -> Tensor:
        """The same in PyTorch operations, in the input's dtype, differentiable."""
        w, eps = weights, self.norm_eps
        return compose(
            input,
            residual,
            None,
            bias,
            norm=norm_function(self.norm, w.norm_weight, w.norm_bias, eps),
            attention_norm=norm_function(self.branch_norm, w.attention_norm_weight, None, eps),
            output_norm=norm_function(self.branch_norm, w.output_norm_weight, None, eps),
            **projection_functions(weights),  # pyright: ignore[reportArgumentType]
            activation=self.activation,
            pre_norm=self.pre_norm,
            branch_scale=self.branch_scale,
            carries=carries,
        )

    def reference(
        self,
        input: Tensor,
        weights: MLPWeights,
        residual: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The same in PyTorch operations, in float32."""
        return self.compose(input.float(), _float_weights(weights), _float(residual), _float(bias))


class GELUGemmOp:
    """GEMM + bias + activation [* gate] + GEMM + bias, plus up to two residuals and a bias."""

    def __init__(self, *, activation: str = "gelu_new") -> None:
        activation_function(activation)
        self.activation = activation

    def __call__(
        self,
        input: Tensor,
        weights: MLPWeights,
        add: Tensor | None = None,
        add2: Tensor | None = None,
        add_bias: Tensor | None = None,
    ) -> Tensor:
        """input, add, add2: (…, H); add_bias: (H,); returns (…, H) in the input's dtype."""
        if not kernels_apply(input) or needs_grad(input, add, add2, add_bias, *weights):
            check_floating(input)
            return self.compose(input, weights, add, add2, add_bias)
        check_tensors(input, weights.up, add, add2)
        _check_weights(weights, input)
        _check_vector("add_bias", add_bias, input.shape[-1], input)
        tensors, *rest = carried(weights)
        summands = add, add2, add_bias
        return _run_gelu_gemm(input, *tensors[:6], *summands, *rest, self.activation)

    def compose(
        self,
        input: Tensor,
        weights: MLPWeights,
        add: Tensor | None = None,
        add2: Tensor | None = None,
        add_bias: Tensor | None = None,
    ) -> Tensor:
        """The same in PyTorch operations, in the input's dtype, differentiable."""
        output = compose(
            input,
            None,
            None,
            None,
            norm=None,
            **projection_functions(weights),  # pyright: ignore[reportArgumentType]
            activation=self.activation,
            pre_norm=True,
        )
        for summand in (add, add2, add_bias):
            output = output if summand is None else output + summand
        return output

    def reference(
        self,
        input: Tensor,
        weights: MLPWeights,
        add: Tensor | None = None,
        add2: Tensor | None = None,
        add_bias: Tensor | None = None,
    ) -> Tensor:
        """The same in PyTorch operations, in float32."""
        summands = (_float(add), _float(add2), _float(add_bias))
        return self.compose(input.float(), _float_weights(weights), *summands)


class VectorMatMulOp:
    """input · weightᵀ + bias: one linear layer."""

    def __call__(self, input: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """input: (…, K); weight: (N, K), any strides, or quantized; bias: (N,); returns (…, N)."""
        if not kernels_apply(input) or needs_grad(input, weight, bias):
            check_floating(input)
            return product(input, weight, bias)
        check_tensors(input, weight)
        _check_vector("bias", bias, weight.shape[0], input)
        if isinstance(weight, Tensor):
            return _run_vector_matmul(input, weight, bias)
        codes, scales, zeros, _, *rest, activations = weight
        return _run_vector_matmul(input, codes, bias, scales, zeros, *rest, activations is not None)

    @staticmethod
    def reference(input: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """The same in PyTorch, in float32."""
        wide = weight.float() if isinstance(weight, Tensor) else weight
        return product(input.float(), wide, _float(bias))


class ResidualAddOp:
    """The residual sums around an MLP whose weights are split over `mp_size` ranks.

    hidden is this rank's part of the down projection; all ranks' results are added up afterwards,
    so residual and biases enter with 1 / mp_size. `attention` enters likewise when it is complete
    (MLP after attention), and whole when it too is this rank's part (parallel attention).
    Pre-norm passes the sum in front of the norm as `residual`, or its terms; post-norm passes
    what the norm returns.
    """

    def __call__(
        self,
        hidden: Tensor,
        residual: Tensor | None = None,
        attention: Tensor | None = None,
        attention_bias: Tensor | None = None,
        final_bias: Tensor | None = None,
        *,
        mp_size: int = 1,
        mlp_after_attn: bool = True,
    ) -> Tensor:
        """hidden, residual, attention: (…, H); biases: (H,); returns a fresh (…, H)."""
        share = 1.0 / mp_size
        attention_share = share if mlp_after_attn else 1.0
        tensors = (hidden, residual, attention, attention_bias, final_bias)
        check_floating(hidden)
        for other in (residual, attention):
            if other is not None and other.shape != hidden.shape:
                raise ValueError(
                    f"a summand has shape {tuple(other.shape)}, hidden {tuple(hidden.shape)}"
                )
        _check_vector("attention_bias", attention_bias, hidden.shape[-1], hidden)
        _check_vector("final_bias", final_bias, hidden.shape[-1], hidden)
        if not kernels_apply(hidden) or hidden.dtype not in DTYPES or needs_grad(*tensors):
            return self.compose(*tensors, share, attention_share)
        return _run_residual_add(*tensors, share, attention_share)

    @staticmethod
    def compose(
        hidden: Tensor,
        residual: Tensor | None,
        attention: Tensor | None,
        attention_bias: Tensor | None,
        final_bias: Tensor | None,
        share: float,
        attention_share: float,
    ) -> Tensor:
        """The same in PyTorch operations, differentiable."""
        out = hidden.clone()
        for summand in (residual, attention_bias, final_bias):
            out = out if summand is None else out + share * summand
        return out if attention is None else out + attention_share * attention

    @classmethod
    def reference(
        cls,
        hidden: Tensor,
        residual: Tensor | None = None,
        attention: Tensor | None = None,
        attention_bias: Tensor | None = None,
        final_bias: Tensor | None = None,
        *,
        mp_size: int = 1,
        mlp_after_attn: bool = True,
    ) -> Tensor:
        """The same in PyTorch operations, in float32."""
        share = 1.0 / mp_size
        return cls.compose(
            hidden.float(),
            _float(residual),
            _float(attention),
            _float(attention_bias),
            _float(final_bias),
            share,
            share if mlp_after_attn else 1.0,
        )
