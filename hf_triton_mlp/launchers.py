"""Host side of the kernels: shapes, strides, plans and outputs for each launch.

Tensors are rows (tokens, size); callers have checked shapes, dtypes and devices.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.knobs import runtime
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_triton_mlp import tuning
from hf_triton_mlp.kernels import (
    INTERPRETED,
    activation_kernel,
    combine_splits_kernel,
    decode_linear_kernel,
    dequantize_columns_kernel,
    dequantize_kernel,
    norm_kernel,
    norm_sum_kernel,
    persistent_linear_kernel,
    quantize_rows_kernel,
    quantized_linear_kernel,
    quantized_row_kernel,
    quantized_tiled_kernel,
    residual_add_kernel,
    skinny_linear_kernel,
    sparse_linear_kernel,
    stream_linear_kernel,
    tiled_linear_kernel,
)
from hf_triton_mlp.kernels.activations import SPARSE
from hf_triton_mlp.quantization import QuantizedWeight, Weight
from hf_triton_mlp.tma import addressable, describe, describe_weights
from hf_triton_mlp.tuning import Linear, Plan


@lru_cache
def gpu(device_index: int | None) -> tuple[str, tuple[int, int]]:
    """Name and compute capability."""
    if INTERPRETED:
        return "", (8, 0)
    properties = torch.cuda.get_device_properties(device_index)
    return properties.name, (properties.major, properties.minor)


def has_wgmma(device: torch.device) -> bool:
    """Whether it is a Hopper, whose matrix units work on while a program goes on."""
    return device.type == "cuda" and gpu(device.index)[1][0] == 9


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch._C._cuda_getDevice():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def rows(tensor: Tensor) -> Tensor:
    """(…, K) as (rows, K) with unit stride along K."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class MLPWeights(NamedTuple):
    """The tensors of one MLP. up, gate: (I, H); down: (H, I); biases and norm weights 1-D or None.

    Those three may be quantized.
    With a gate, the hidden activation is act(x·gateᵀ + gate_bias) * (x·upᵀ + up_bias).
    The last two are of the norms of what joins a residual (`branch_norm` of MLPConfig).
    """

    up: Weight
    down: Weight
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate: Weight | None = None
    gate_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    attention_norm_weight: Tensor | None = None
    output_norm_weight: Tensor | None = None

    @property
    def plain(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """up, down and gate, which must not be quantized."""
        matrices: Any = self.up, self.down, self.gate
        assert not any(isinstance(each, QuantizedWeight) for each in matrices)
        return matrices


class Norm(NamedTuple):
    """A norm in front of a linear layer, and the residual that it hands on through `carry`.

    carry = norm(s) if carry_normed else s, where s enters the norm. A kernel that fuses the norm
    does not add carry_bias to it, the norm's own does.
    """

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    carry: Tensor
    carry_normed: bool
    carry_bias: Tensor | None = None


class BranchNorm(NamedTuple):
    """An RMSNorm of what joins a residual, and the norm of their sum where there is one.

    total = residual + norm(x); where `normed` is given, normed = norm(total) with next_weight.
    """

    kind: str
    eps: float
    weight: Tensor | None
    total: Tensor
    next_weight: Tensor | None = None
    normed: Tensor | None = None


class Summands(NamedTuple):
    """What joins a linear layer: its output, or with a norm its input. Rows (tokens, size)."""

    add: Tensor | None = None
    add2: Tensor | None = None
    add_bias: Tensor | None = None


NO_SUMMANDS = Summands()
NO_NORM = (None, None, None, 0.0, None, False, None)

#: Compiled kernels by everything that Triton specialises on, and the values themselves: finding
#: one here costs the host a few microseconds, a launch through `kernel[grid](...)` about 25.
_compiled: dict[tuple[object, ...], Any] = {}
_COMPILED_LIMIT = 4096


#: Products and sums in one instruction, which Triton 3.10 no longer does unless it is told to.
OPTIONS = {"enable_fp_fusion": True}


#: Words in a vector of 16 bytes. Triton has to know that rows of codes start with one.
VECTOR = 4

#: What a part of a quantized weight may take as values, for cuBLAS; it stays in the L2 of an H100.
SLAB_BYTES = 1 << 25


class Launch(NamedTuple):
    """One kernel launch: kernel[grid](*tensors, *scalars, *constants), its options in `plan`.

    What a descriptor's blocks are is among the constants; the first tensor is none.
    """

    kernel: Any
    grid: tuple[int, int, int]
    tensors: tuple[Tensor | TensorDescriptor | None, ...]
    scalars: tuple[int | float, ...]
    constants: tuple[object, ...]
    num_warps: int
    num_stages: int
    pdl: bool = False
    #: How many a thread may have.
    registers: int | None = None


def compile_options(pdl: bool, registers: int | None) -> dict[str, Any]:
    """What Triton is told of a `Launch` besides warps and stages."""
    options: dict[str, Any] = dict(OPTIONS)
    if pdl:
        options["launch_pdl"] = True
    if registers is not None:
        options["maxnreg"] = registers
    return options


def launch(call: Launch) -> Any:
    """Launch on the current device; returns the compiled kernel."""
    kernel, grid, tensors, scalars, constants, num_warps, num_stages, pdl, registers = call
    key = (
        id(kernel),
        tensors[0].device.index,  # pyright: ignore
        scalars,
        constants,
        num_warps,
        num_stages,
        pdl,
        registers,
        *[
            None if t is None or isinstance(t, TensorDescriptor) else (t.dtype, t.data_ptr() % 16)
            for t in tensors
        ],
    )
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](
            *tensors, *scalars, *constants, num_warps=num_warps, num_stages=num_stages,
            **compile_options(pdl, registers),
        )  # fmt: skip
        if not INTERPRETED:
            if len(_compiled) >= _COMPILED_LIMIT:  # one entry for each number of rows, say
                _compiled.clear()
            _compiled[key] = compiled
    elif runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # a profiler's
        compiled[grid](*tensors, *scalars, *constants)
    else:
        stream = torch._C._cuda_getCurrentRawStream(key[1])
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(
            *grid, stream, function, metadata, None, None, None, *tensors, *scalars, *constants
        )
    return compiled


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    *,
    gate: tuple[Weight | None, Tensor | None] = (None, None),
    activation: str | None = None,
    norm: Norm | None = None,
    summands: Summands = NO_SUMMANDS,
    plan: Plan | None = None,
    waited: bool = False,
    sparse: bool = False,
) -> Tensor:
    """act(norm(x)·weightᵀ + bias) [gated] + summands for rows x (tokens, K), contiguous.

    One launch, or one more for a norm that the plan's kernel does not fuse, and one more when K
    is split.
    waited: whoever wrote the weights is done: the launch before this one is ours, say, and has
    itself waited. sparse: as for `plan_linear`.
    """
    M, N = x.shape[0], weight.shape[0]
    if M == 0:
        return x.new_empty((0, N))
    plan = plan or plan_linear(M, weight, gated=gate[0] is not None, dtype=x.dtype, sparse=sparse)
    if isinstance(weight, QuantizedWeight):  # what takes the place of a plan may fuse no norm
        plan = executable(plan, x, weight, gate[0], summands)
    if norm is not None and not plan.fuses_norm:
        x = normalize(x, summands.add, summands.add_bias, norm, pdl=plan.pdl)
        norm, summands, waited = None, NO_SUMMANDS, True
    plan = executable(plan, x, weight, gate[0], summands)
    if plan.kernel == "library":
        if multiplies_fp8(weight, M, x.dtype) and in_vectors(gate[0]):
            return fp8_linear(x, weight, bias, gate, activation, summands)
        return library_linear(x, weight, bias, gate, activation, summands)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if plan.splits == 1:
        launch(linear_launch(plan, x, weight, bias, gate, activation, norm, summands, out, waited))
        return out
    parts = split_parts(plan, out, gated=gate[0] is not None)
    rest = (gate, activation, norm, summands, out, waited)
    for call in split_launches(plan, x, weight, bias, *rest, parts):
        launch(call)
    return out


def mlp(
    x: Tensor,
    weights: MLPWeights,
    *,
    activation: str,
    summands: Summands = NO_SUMMANDS,
    plans: tuple[Plan | None, Plan | None] = (None, None),
    waited: bool = False,
) -> Tensor:
    """act(x·upᵀ) [gated]·downᵀ, with their biases, + summands, for rows x (tokens, H), contiguous.

    waited: as in `linear`.
    """
    w = weights
    if multiplies_both_fp8(w, x):
        return fp8_mlp(x, w, activation, summands)
    gate = w.gate, w.gate_bias
    hidden = linear(
        x, w.up, w.up_bias, gate=gate, activation=activation, plan=plans[0], waited=waited
    )
    return linear(
        hidden, w.down, w.down_bias, summands=summands, plan=plans[1], waited=True,
        sparse=activation in SPARSE,
    )  # fmt: skip


def normed_mlp(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weights: MLPWeights,
    *,
    activation: str,
    norm: str,
    norm_eps: float,
    pre_norm: bool,
    plans: tuple[Plan | None, Plan | None] = (None, None),
    early: bool = False,
    branch_scale: float = 1.0,
    carries: bool = True,
) -> Tensor:
    """MLP(norm(s)) + s, post-norm + norm(s), for s = x + residual + bias and rows x (tokens, H).

    early: as in `TritonMLP.forward`. branch_scale: pre-norm, the sums are `scaled_add`s. carries:
    as in `MLPGemmOp`.
    """
    w, scaled = weights, branch_scale != 1.0
    if scaled:
        x = scaled_add(residual, x, bias, branch_scale)
        residual, bias, early = None, None, True
    up_plan = plans[0] or plan_linear(x.shape[0], w.up, gated=w.gate is not None, dtype=x.dtype)
    sparse = activation in SPARSE
    down_plan = plans[1] or plan_linear(x.shape[0], w.down, dtype=x.dtype, sparse=sparse)
    # cuBLAS adds its product to a matrix in place: that matrix may as well have the bias.
    in_place = carries and down_plan.kernel == "library" and not up_plan.fuses_norm and not scaled
    in_place = in_place and not multiplies_fp8(w.down, x.shape[0], x.dtype)
    carry = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    before = Norm(
        kind=norm,
        weight=w.norm_weight,
        bias=w.norm_bias,
        eps=norm_eps,
        carry=carry,
        carry_normed=not pre_norm,
        carry_bias=w.down_bias if in_place else None,
    )
    if up_plan.kernel == down_plan.kernel == "library" and multiplies_both_fp8(w, x):
        u = normalize(x, residual, bias, before, pdl=up_plan.pdl)
        if scaled:
            branch = fp8_mlp(u, w, activation, NO_SUMMANDS)
            return scaled_add(carry if carries else None, branch, None, branch_scale)
        return fp8_mlp(u, w, activation, Summands(carry) if carries else NO_SUMMANDS)
    hidden = linear(
        x,
        w.up,
        w.up_bias,
        gate=(w.gate, w.gate_bias),
        activation=activation,
        norm=before,
        summands=Summands(add=residual, add_bias=bias),
        plan=up_plan,
        waited=early,
    )
    if in_place:
        # Post-norm without a bias, the carry is what the norm gave, and nothing reads it any more.
        if isinstance(w.down, QuantizedWeight):
            multiply_slabs(carry, hidden, w.down, beta=1.0)
            return carry
        return carry.addmm_(hidden, w.down.t())
    if scaled:
        branch = linear(hidden, w.down, w.down_bias, plan=down_plan, waited=True)
        return scaled_add(carry if carries else None, branch, None, branch_scale)
    summands = Summands(carry) if carries else NO_SUMMANDS
    return linear(hidden, w.down, w.down_bias, summands=summands, plan=down_plan, waited=True)


def branch_normed_mlp(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weights: MLPWeights,
    *,
    activation: str,
    norm: str | None,
    norm_eps: float,
    branch_norm: str,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """s + branch_norm(MLP(u)), for s = residual + branch_norm(x + bias) and u = norm(s), or s.

    x: rows (tokens, H). Four launches, or more where K is split. add_up: makes MLP(u) of what the
    weights, a part, give of it.
    """
    w = weights
    up_plan = plan_linear(x.shape[0], w.up, gated=w.gate is not None, dtype=x.dtype)
    sparse = activation in SPARSE
    down_plan = plan_linear(x.shape[0], w.down, dtype=x.dtype, sparse=sparse)
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    normed = None if norm is None else torch.empty_like(total)
    attention_norm = BranchNorm(
        branch_norm, norm_eps, w.attention_norm_weight, total, w.norm_weight, normed
    )
    norm_sum(x, bias, residual, attention_norm, pdl=up_plan.pdl)
    u, plans = total if normed is None else normed, (up_plan, down_plan)
    branch = mlp(u, w, activation=activation, plans=plans, waited=True)
    branch = branch if add_up is None else add_up(branch)
    output_norm = BranchNorm(branch_norm, norm_eps, w.output_norm_weight, out)
    norm_sum(branch, None, total, output_norm, pdl=down_plan.pdl)
    return out


def library_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    gate: tuple[Weight | None, Tensor | None],
    activation: str | None,
    summands: Summands,
) -> Tensor:
    """`linear` by cuBLAS, with what it cannot fuse in a kernel of ours."""
    if isinstance(weight, QuantizedWeight):
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
        multiply_slabs(out, x, weight, bias, gate, activation)
        return join(out, summands)
    assert not isinstance(gate[0], QuantizedWeight)
    tanh_gelu = activation in ("gelu_new", "gelu_pytorch_tanh")
    fused = tanh_gelu or activation == "relu"
    if fused and gate[0] is None and bias is not None and x.dtype != torch.float32:
        addmm = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
        out = addmm(bias, x, weight.t(), use_gelu=tanh_gelu)
    else:
        out = F.linear(x, weight, bias)
        gates = None if gate[0] is None else F.linear(x, gate[0], gate[1])
        if activation is not None:
            launch(activation_launch(out, gates, activation))
    return join(out, summands)


def multiplies_fp8(weight: Weight, M: int, dtype: torch.dtype) -> TypeGuard[QuantizedWeight]:
    """Whether M rows of this dtype become fp8, and are multiplied by the codes of the weight."""
    if not isinstance(weight, QuantizedWeight) or weight.activations is None:
        return False
    if M <= tuning.DEQUANTIZED_ROWS or INTERPRETED or not weight.codes.is_cuda:
        return False
    whole = weight.shape[0] % 16 == weight.shape[1] % 16 == 0 and in_vectors(weight)
    return whole and has_fp8_products(weight.device.index, dtype)


@lru_cache
def has_fp8_products(device_index: int | None, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies fp8 by rows' scales on this GPU, with results of this dtype.

    Which GPUs it is depends on PyTorch's and cuBLAS's versions, and on the dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    with torch.cuda.device(device_index):
        codes = torch.zeros((16, 16), dtype=torch.float8_e4m3fn, device="cuda")
        scales = torch.ones((16, 1), dtype=torch.float32, device="cuda")
        bias = torch.zeros(16, dtype=dtype, device="cuda")
        try:
            multiply_fp8(codes, scales, codes, scales, bias, dtype)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):
            return False
    return True


def multiply_fp8(
    x: Tensor,
    scales: Tensor,
    codes: Tensor,
    of_rows: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(scales * x)·(of_rows * codes)ᵀ + bias, in this dtype, for x and codes in fp8."""
    scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return scaled_mm(
        x,
        codes.t(),
        scale_a=scales,
        scale_b=of_rows.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )


def fp8_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    gate: tuple[Weight | None, Tensor | None],
    activation: str | None,
    summands: Summands,
) -> Tensor:
    """`library_linear` of rows that become fp8 too, each with a scale of its own."""
    out, gates = fp8_products(quantize_rows(x), weight, bias, gate, x.dtype)
    if activation is not None or gates is not None:
        launch(activation_launch(out, gates, activation))
    return join(out, summands)


def multiplies_both_fp8(w: MLPWeights, x: Tensor) -> bool:
    """Whether rows x become fp8 for all of these weights."""
    M, dtype = x.shape[0], x.dtype
    both = multiplies_fp8(w.up, M, dtype) and multiplies_fp8(w.down, M, dtype)
    return both and in_vectors(w.gate)


def fp8_mlp(x: Tensor, w: MLPWeights, activation: str, summands: Summands) -> Tensor:
    """`mlp` of rows that become fp8 in front of both products, activated on the way."""
    assert isinstance(w.up, QuantizedWeight) and isinstance(w.down, QuantizedWeight)
    gate = w.gate, w.gate_bias
    up, opened = fp8_products(quantize_rows(x), w.up, w.up_bias, gate, x.dtype)
    hidden = quantize_rows(up, opened, activation)
    out, _ = fp8_products(hidden, w.down, w.down_bias, (None, None), x.dtype)
    return join(out, summands)


def fp8_products(
    rows: tuple[Tensor, Tensor],
    weight: QuantizedWeight,
    bias: Tensor | None,
    gate: tuple[Weight | None, Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The products of `quantize_rows`'s rows with a weight and its gate, if it has one."""

    def product(weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        return multiply_fp8(*rows, weight.codes, weight.scales, bias, dtype)

    opened = product(gate[0], gate[1]) if isinstance(gate[0], QuantizedWeight) else None
    return product(weight, bias), opened


def quantize_rows(
    x: Tensor, gate: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rows act(x), or act(gate) * x, (tokens, K), in fp8, and their scales (tokens, 1)."""
    M, K = x.shape
    codes = torch.empty((M, K), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((M, 1), dtype=torch.float32, device=x.device)
    # 64 values a thread, or fewer: as a whole a row is read, and activated, once.
    block = triton.next_power_of_2(K)
    one_block = block <= 16384
    constants = (activation, block if one_block else 4096, one_block)
    scalars = K, x.stride(0), 0 if gate is None else gate.stride(0)
    tensors = x, gate, codes, scales
    launch(Launch(quantize_rows_kernel, (M, 1, 1), tensors, scalars, constants, 8, 1))
    return codes, scales


def join(out: Tensor, summands: Summands) -> Tensor:
    """out + summands, out itself if there are none."""
    add, add2, add_bias = summands
    if add is None and add2 is None and add_bias is None:
        return out
    return residual_add(out, add, add2, add_bias, None, 1.0, 1.0)


def multiply_slabs(
    out: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    gate: tuple[Weight | None, Tensor | None] = (None, None),
    activation: str | None = None,
    *,
    beta: float = 0.0,
) -> None:
    """out = beta * out + act(x·weightᵀ + bias) [gated], by cuBLAS, some columns after the others.

    The rows of the weight that give them become 16-bit values, or float32, in the L2, where cuBLAS
    finds them, stored as its codes are. beta, for neither a bias nor a gate nor an activation: 0 or
    1.
    """
    (N, K), gated = weight.shape, isinstance(gate[0], QuantizedWeight)
    count = min(N, max(SLAB_BYTES // (K * x.itemsize) // 128, 1) * 128)
    slab = torch.empty(count * K, dtype=x.dtype, device=x.device)
    gates = torch.empty((x.shape[0], count), dtype=x.dtype, device=x.device) if gated else None
    for first in range(0, N, count):
        last = min(first + count, N)
        columns = out[:, first:last]
        values = slab[: (last - first) * K]
        values = values.view(K, -1).t() if weight.by_input else values.view(-1, K)
        launch(dequantize_launch(weight, first, values))
        torch.addmm(columns, x, values.t(), beta=beta, out=columns)
        opened = None
        if isinstance(gate[0], QuantizedWeight) and gates is not None:
            opened = gates[:, : last - first]
            launch(dequantize_launch(gate[0], first, values))
            torch.mm(x, values.t(), out=opened)
        if bias is not None or activation is not None or opened is not None:
            biases = (None if b is None else b[first:last] for b in (bias, gate[1]))
            launch(activation_launch(columns, opened, activation, *biases))


def plan_linear(
    M: int,
    weight: Weight,
    *,
    gated: bool = False,
    dtype: torch.dtype | None = None,
    sparse: bool = False,
) -> Plan:
    """How M rows times weight (N, K) run on its device; dtype: of the rows, if not the weight's.

    sparse: many values of the rows are 0. Weights that are stored (in, out) are only read where
    something else multiplies them then.
    """
    linear = linear_of(M, weight, gated, dtype, sparse)
    name, capability = gpu(weight.device.index)
    if multiplies_fp8(weight, M, linear.dtype):  # plans are of rows that stay 16 bits
        return Plan(kernel="library", pdl=capability >= tuning.PDL_CAPABILITY)
    return tuning.plan(linear, name, capability)


def executable(
    plan: Plan, x: Tensor, weight: Weight, gate: Weight | None, summands: Summands
) -> Plan:
    """The plan, or another one where TMA cannot address these, or vectors cannot be loaded."""
    if isinstance(weight, QuantizedWeight):
        if weight.by_input:
            fits = plan.kernel == "library" or (plan.kernel == "sparse" and skippable(plan, weight))
            return plan if fits else Plan(kernel="library", pdl=plan.pdl)
        fits = plan.kernel not in ("quantized", "quantized_row")
        if fits or (in_vectors(weight) and in_vectors(gate)):
            return plan
        linear = linear_of(x.shape[0], weight, gate is not None, x.dtype)
        return tuning.choose_quantized_tiled(linear, plan.pdl)
    assert not isinstance(gate, QuantizedWeight)
    if plan.kernel == "sparse":
        if skippable(plan, weight):
            return plan
    elif plan.kernel != "persistent" or addressable(x, weight, gate, (summands.add, summands.add2)):
        return plan
    linear = linear_of(x.shape[0], weight, gate is not None, x.dtype)
    return tuning.choose(linear, gpu(weight.device.index)[1])


def skippable(plan: Plan, weight: Weight) -> bool:
    """Whether a plan of "sparse" can read this weight: whole blocks, in vectors of 16 bytes."""
    N, K = weight.shape
    matrix = weight.codes if isinstance(weight, QuantizedWeight) else weight
    in_vectors = matrix.stride(1) * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0
    whole = N % plan.block_n == 0 and chunk_of(plan, K) <= 2 * plan.block_n
    return matrix.stride(0) == 1 and in_vectors and whole


def chunk_of(plan: Plan, K: int) -> int:
    """How many columns of K a program of "sparse" looks at."""
    return triton.next_power_of_2(-(-K // plan.splits))


def in_vectors(weight: Weight | None) -> bool:
    """Whether each row of codes starts at a multiple of 16 bytes; None does."""
    if not isinstance(weight, QuantizedWeight):
        return True
    codes = weight.codes
    return codes.stride(0) * codes.itemsize % 16 == 0 and codes.data_ptr() % 16 == 0


def linear_of(
    M: int, weight: Weight, gated: bool, dtype: torch.dtype | None = None, sparse: bool = False
) -> Linear:
    N, K = weight.shape
    if isinstance(weight, QuantizedWeight):
        whole_rows = weight.scales.shape[1] == 1 and weight.format != "int4"
        group = 0 if whole_rows else weight.group_size
        found = weight.format, group, weight.zeros is not None
        dtype, by_output = dtype or torch.float16, not weight.by_input
        return Linear(M, N, K, dtype, by_output, gated, *found, sparse=not by_output)
    by_output = weight.stride(1) == 1
    return Linear(M, N, K, weight.dtype, by_output, gated, sparse=sparse and not by_output)


def linear_launch(
    plan: Plan,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    gate: tuple[Weight | None, Tensor | None],
    activation: str | None,
    norm: Norm | None,
    summands: Summands,
    out: Tensor,
    waited: bool,
) -> Launch:
    """The launch that computes `linear` into out (tokens, N); a norm has to be one it fuses.

    Where K is split, `out` is the parts, and the rest is left to the second launch.
    """
    (M, K), N = x.shape, weight.shape[0]
    gate_weight, gate_bias = gate
    add, add2, add_bias = summands
    if plan.kernel == "sparse":
        assert norm is None and bias is None and activation is None and gate_weight is None
        return sparse_launch(plan, x, weight, out)
    if isinstance(weight, QuantizedWeight):
        if plan.kernel == "quantized_row":
            rest = (bias, gate, activation, norm, summands, out, waited)
            return quantized_row_launch(plan, x, weight, *rest)
        rest = (bias, gate, activation, summands, out, waited)
        return quantized_launch(plan, x, weight, *rest)
    assert not isinstance(gate_weight, QuantizedWeight)
    blocks = -(-N // plan.block_n)
    scalars = (
        M,
        N,
        K,
        x.stride(0),
        0 if add is None else add.stride(0),
        0 if add2 is None else add2.stride(0),
        *weight.stride(),
        *((0, 0) if gate_weight is None else gate_weight.stride()),
    )
    options = plan.num_warps, plan.num_stages, plan.pdl
    k_contiguous = weight.stride(1) == 1
    kind, norm_weight, norm_bias, eps, carry, carry_normed, _ = norm or NO_NORM
    tensors = (
        x, add, add2, carry, out,
        weight, bias, gate_weight, gate_bias, norm_weight, norm_bias, add_bias,
    )  # fmt: skip
    if plan.kernel == "skinny":
        one_block = plan.block_k >= K
        shared = plan.programs if one_block and plan.programs < blocks else 0
        together = plan.block_m if one_block and plan.block_m >= M else 1
        constants = (
            kind,
            carry_normed,
            activation,
            # Weights are read once a step, unless programs of other rows find them in the L2.
            "evict_first" if together >= M else "",
            k_contiguous,
            together,
            plan.block_n,
            plan.block_k,
            plan.lines,
            one_block,
            shared,
            triton.next_power_of_2(-(-K // (shared or blocks))),
            plan.pdl,
            waited and plan.lines == 0,
        )
        grid = (-(-M // together) * (shared or blocks), 1, 1)
        return Launch(skinny_linear_kernel, grid, tensors, (*scalars, eps), constants, *options)
    if plan.kernel == "stream":
        programs = min(plan.programs or blocks, blocks)
        constants = (
            kind,
            carry_normed,
            activation,
            k_contiguous,
            plan.block_m,
            plan.block_n,
            plan.block_k,
            plan.num_warps,
            plan.num_stages,
            plan.lines,
            -(-K // plan.block_k),
            K // plan.block_k,
            -(-blocks // programs),
            triton.next_power_of_2(-(-K // programs)),
            plan.pdl,
            waited and plan.lines == 0,
        )
        grid = (programs, 1, 1)
        return Launch(stream_linear_kernel, grid, tensors, (*scalars, eps), constants, *options)
    if plan.kernel == "persistent":
        tile = plan.block_m, plan.block_n, plan.block_k
        # 32 results of each thread at a time, so that their epilogue fits its registers.
        parts = max(1, plan.block_m * plan.block_n // (1024 * plan.num_warps))
        weights, gate_place = describe_weights(weight, gate_weight, plan.block_n, plan.block_k)
        whole = plan.splits == 1
        tensors = (
            weight,
            gate_weight,
            describe(x, (plan.block_m, plan.block_k)),
            weights,
            describe(out, (plan.block_m, plan.block_n // parts)) if whole else None,
            None if whole else out,
            add, add2, bias, gate_bias, add_bias,
        )  # fmt: skip
        rest = plan.group_m, plan.splits, parts, plan.lines, plan.pdl
        constants = (activation, gate_place, *tile, *rest)
        strides = weight.stride(0), *scalars[4:6]
        tiles = -(-M // plan.block_m) * blocks * plan.splits
        grid = (min(tiles, plan.programs or tiles), 1, 1)
        return Launch(
            persistent_linear_kernel, grid, tensors, (M, N, K, *strides), constants, *options
        )
    tensors = (x, add, add2, out, weight, bias, gate_weight, gate_bias, add_bias)
    if plan.kernel == "decode":
        constants = (
            activation,
            k_contiguous,
            plan.block_m,
            plan.block_n,
            plan.block_k,
            plan.slices,
            plan.num_stages,
            plan.lines,
            plan.pdl,
        )
        return Launch(decode_linear_kernel, (blocks, 1, 1), tensors, scalars, constants, *options)
    depth = plan.splits * plan.block_k
    constants = (
        activation,
        plan.block_m,
        plan.block_n,
        plan.block_k,
        plan.group_m,
        plan.splits,
        plan.lines,
        K % depth == 0,
        k_contiguous,
        plan.pdl,
    )
    grid = (-(-M // plan.block_m) * blocks * plan.splits, 1, 1)
    return Launch(tiled_linear_kernel, grid, tensors, scalars, constants, *options)


def sparse_launch(plan: Plan, x: Tensor, weight: Weight, out: Tensor) -> Launch:
    """`linear_launch` of rows of which most values are 0, into parts of sums, out."""
    (M, K), N = x.shape, weight.shape[0]
    codes, scales, zeros = (
        stored(weight) if isinstance(weight, QuantizedWeight) else (weight, None, None)
    )
    tensors = x, out, codes, scales, zeros
    stride = 0 if scales is None else scales.stride(1)
    scalars = M, N, K, x.stride(0), codes.stride(1), stride
    # So many threads load what a vector each has of a column.
    vector = 16 * (8 if codes.dtype == torch.int32 else 1) // codes.itemsize
    constants = (
        *format_and_group(weight),
        plan.block_m,
        plan.block_n,
        plan.block_k,
        chunk_of(plan, K),
        plan.num_stages,
        plan.splits,
        min(max(32 * plan.num_warps * vector // plan.block_n, 1), plan.block_k),
        plan.pdl,
    )
    grid = (N // plan.block_n * plan.splits, 1, 1)
    # By itself ptxas takes so few on Ampere that some spill.
    options = plan.num_warps, 1, plan.pdl, None if plan.pdl else 255
    return Launch(sparse_linear_kernel, grid, tensors, scalars, constants, *options)


def format_and_group(weight: Weight) -> tuple[str | None, int | None]:
    """Of a QuantizedWeight, the group None for whole rows."""
    if not isinstance(weight, QuantizedWeight):
        return None, None
    whole_rows = weight.scales.shape[1] == 1 and weight.format != "int4"
    return weight.format, None if whole_rows else weight.group_size


def kernel_format(weight: QuantizedWeight, device: torch.device) -> str:
    """The weight's format, or "fp8 in hardware" where an instruction makes float16 of two fp8."""
    if weight.format == "fp8" and device.type == "cuda" and gpu(device.index)[1] >= (8, 9):
        return "fp8 in hardware"
    return weight.format


def scaled(weight: QuantizedWeight, depth: int) -> str:
    """What scales multiply: "result", if of whole rows, "sums" of `depth` values, or "weights"."""
    if weight.scales.shape[1] == 1 and weight.zeros is None:
        return "result"
    return "sums" if weight.group_size % depth == 0 else "weights"


def quantized_launch(
    plan: Plan,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    gate: tuple[Weight | None, Tensor | None],
    activation: str | None,
    summands: Summands,
    out: Tensor,
    waited: bool,
) -> Launch:
    """`linear_launch` of quantized weights."""
    (M, K), (N, _) = x.shape, weight.shape
    in_words = plan.kernel == "quantized"
    codes, scales, zeros = stored(weight, in_words=in_words)
    gate_codes, gate_scales, gate_zeros = stored(gate[0], in_words=in_words)
    add, add2, add_bias = summands
    tensors = (
        x, add, add2, out, codes, scales, zeros, bias,
        gate_codes, gate_scales, gate_zeros, gate[1], add_bias,
    )  # fmt: skip
    unit = VECTOR if in_words else 1
    scalars = (
        M,
        N,
        K,
        x.stride(0),
        0 if add is None else add.stride(0),
        0 if add2 is None else add2.stride(0),
        codes.stride(0) // unit,
        0 if gate_codes is None else gate_codes.stride(0) // unit,
        *scales.stride(),
    )
    tile = plan.block_m, plan.block_n, plan.block_k
    blocks = -(-N // plan.block_n)
    if plan.kernel == "tiled":
        units = scale_units(weight, plan.block_k)
        constants = (
            activation,
            weight.format,
            *units,
            *tile,
            plan.group_m,
            plan.splits,
            N % plan.block_n == 0 and K % plan.block_k == 0,
            plan.pdl,
            has_wgmma(x.device),
        )
        grid = (-(-M // plan.block_m) * blocks * plan.splits, 1, 1)
        options = plan.num_warps, plan.num_stages, plan.pdl
        return Launch(quantized_tiled_kernel, grid, tensors, scalars, constants, *options)
    constants = (
        activation,
        kernel_format(weight, x.device),
        weight.group_size,
        scaled(weight, plan.block_k // plan.slices),
        4 * tuning.QUANTIZED_VECTORS[weight.format],
        *tile,
        plan.num_warps,
        plan.slices,
        plan.num_stages,
        plan.splits,
        N % plan.block_n == 0,
        plan.pdl,
        waited and plan.lines == 0,
    )
    options = plan.num_warps, 1, plan.pdl
    grid = (blocks * plan.splits, 1, 1)
    return Launch(quantized_linear_kernel, grid, tensors, scalars, constants, *options)


def quantized_row_launch(
    plan: Plan,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    gate: tuple[Weight | None, Tensor | None],
    activation: str | None,
    norm: Norm | None,
    summands: Summands,
    out: Tensor,
    waited: bool,
) -> Launch:
    """`linear_launch` of quantized weights for one row."""
    N, K = weight.shape
    assert x.shape[0] == 1 and plan.block_k >= K
    codes, scales, zeros = stored(weight, in_words=True)
    gate_codes, gate_scales, gate_zeros = stored(gate[0], in_words=True)
    add, add2, add_bias = summands
    kind, norm_weight, norm_bias, eps, carry, carry_normed, _ = norm or NO_NORM
    tensors = (
        x, add, add2, carry, out, codes, scales, zeros, bias,
        gate_codes, gate_scales, gate_zeros, gate[1], norm_weight, norm_bias, add_bias,
    )  # fmt: skip
    blocks = -(-N // plan.block_n)
    programs = min(plan.programs or blocks, blocks)
    span = 4 * tuning.QUANTIZED_VECTORS[weight.format]
    part = 8 * span * plan.num_warps
    constants = (
        K,
        codes.stride(0) // VECTOR,
        0 if gate_codes is None else gate_codes.stride(0) // VECTOR,
        *scales.stride(),
        kind,
        carry_normed,
        activation,
        kernel_format(weight, x.device),
        weight.group_size,
        scaled(weight, span),
        span,
        plan.block_n,
        -(-K // part),
        N % plan.block_n == 0 and K % part == 0,
        programs,
        plan.num_stages if programs < blocks else 1,
        # A warp has 32 threads for them; what is beyond a program's blocks is beyond N.
        max(plan.block_n * triton.next_power_of_2(-(-blocks // programs)), 32),
        plan.num_warps,
        triton.next_power_of_2(-(-K // programs)),
        plan.pdl,
        waited and plan.lines == 0,
    )
    # Ptxas would take more where several blocks are on their way, which 16 warps could not have.
    options = plan.num_warps, 1, plan.pdl, 128
    grid = (programs, 1, 1)
    return Launch(quantized_row_kernel, grid, tensors, (N, eps), constants, *options)


def dequantize_launch(weight: QuantizedWeight, first: int, out: Tensor) -> Launch:
    """The launch that writes rows of a weight from number `first` on into out (rows, K)."""
    if weight.by_input:
        return dequantize_columns_launch(weight, first, out)
    K, block_k, rows = weight.shape[1], 1024, 8
    codes, scales, zeros = stored(weight)
    last = first + out.shape[0]
    scalars = (first, last, K, codes.stride(0), *scales.stride())
    constants = (weight.format, *scale_units(weight, block_k), rows, block_k)
    grid = (-(-K // block_k), -(-out.shape[0] // rows), 1)
    return Launch(dequantize_kernel, grid, (codes, scales, zeros, out), scalars, constants, 4, 1)


def dequantize_columns_launch(weight: QuantizedWeight, first: int, out: Tensor) -> Launch:
    """`dequantize_launch` of a weight that is stored by input, as out is then."""
    (rows, K), block_k = out.shape, 32
    codes, scales, zeros = stored(weight)
    scalars = first, rows, K, codes.stride(1), scales.stride(1)
    constants = (*format_and_group(weight), 128, block_k)
    grid = (rows // 128, -(-K // block_k), 1)
    tensors = codes, scales, zeros, out
    return Launch(dequantize_columns_kernel, grid, tensors, scalars, constants, 4, 1)


def scale_units(weight: QuantizedWeight, depth: int) -> tuple[int | None, int]:
    """The size of its groups, None for whole rows, and a power of two, up to depth, in it."""
    size = weight.group_size
    return (None, depth) if weight.scales.shape[1] == 1 else (size, min(size & -size, depth))


def stored(weight: Weight | None, *, in_words: bool = False) -> tuple[Any, Any, Any]:
    """Codes (int4 in words, others in bytes, or in words too), scales and zeros."""
    if weight is None:
        return None, None, None
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"the gate of a quantized weight is to be quantized, found {weight.dtype}")
    words = in_words or weight.format == "int4"
    return weight.codes.view(torch.int32 if words else torch.int8), weight.scales, weight.zeros


def split_parts(plan: Plan, out: Tensor, *, gated: bool) -> Tensor:
    """Memory for the products of `plan.splits` parts of K, of W and of its gate."""
    products = 2 * plan.splits if gated else plan.splits
    return torch.empty((products, *out.shape), dtype=torch.float32, device=out.device)


def split_launches(
    plan: Plan,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    gate: tuple[Weight | None, Tensor | None],
    activation: str | None,
    norm: Norm | None,
    summands: Summands,
    out: Tensor,
    waited: bool,
    parts: Tensor,
) -> tuple[Launch, Launch]:
    """The two launches that compute `linear` into out (tokens, N) with K split."""
    M, N = out.shape
    add, add2, add_bias = summands
    # Few outputs are shared among more programs, which have fewer parts to wait for.
    block = 512 if M * N > 128 * 512 else 128
    products = gate[0], None
    return (
        linear_launch(plan, x, weight, None, products, None, norm, NO_SUMMANDS, parts, waited),
        Launch(
            combine_splits_kernel,
            (M, -(-N // block), 1),
            (parts, add, add2, out, bias, gate[1], add_bias),
            (M, N, 0 if add is None else add.stride(0), 0 if add2 is None else add2.stride(0)),
            (activation, gate[0] is not None, plan.splits, block, plan.pdl),
            num_warps=block // 128,
            num_stages=1,
            pdl=plan.pdl,
        ),
    )


def activation_launch(
    up: Tensor,
    gate: Tensor | None,
    activation: str | None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Launch:
    """The launch that computes act(up), or act(gate) * up, in place of up: rows (M, N).

    The biases are added first.
    """
    M, N = up.shape
    block = min(triton.next_power_of_2(N), 1024)
    return Launch(
        activation_kernel,
        (M, -(-N // block), 1),
        (up, gate, up_bias, gate_bias),
        (N, up.stride(0), 0 if gate is None else gate.stride(0)),
        (activation, block),
        num_warps=4,
        num_stages=1,
    )


def normalize(
    x: Tensor, add: Tensor | None, add_bias: Tensor | None, norm: Norm, *, pdl: bool
) -> Tensor:
    """norm(x + add + add_bias), which is the carry itself where both are the same."""
    same = norm.carry_normed and norm.carry_bias is None
    out = norm.carry if same else torch.empty_like(norm.carry)
    launch(norm_launch(x, add, add_bias, norm, out, pdl=pdl))
    return out


def norm_launch(
    x: Tensor, add: Tensor | None, add_bias: Tensor | None, norm: Norm, out: Tensor, *, pdl: bool
) -> Launch:
    """The launch that computes `normalize` into out (tokens, K)."""
    M, K = x.shape
    carry = None if out is norm.carry else norm.carry
    block = min(triton.next_power_of_2(K), 8192)
    return Launch(
        norm_kernel,
        (M, 1, 1),
        (x, add, add_bias, norm.weight, norm.bias, norm.carry_bias, carry, out),
        (K, x.stride(0), 0 if add is None else add.stride(0), norm.eps),
        (norm.kind, norm.carry_normed, block, block >= K, pdl),
        num_warps=4 if block <= 2048 else 8,
        num_stages=1,
        pdl=pdl,
    )


def norm_sum(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, norm: BranchNorm, *, pdl: bool
) -> None:
    """norm.total = residual + norm(x + bias), and norm.normed, for rows x (tokens, K)."""
    if x.shape[0] > 0:
        launch(norm_sum_launch(x, bias, residual, norm, pdl=pdl))


def norm_sum_launch(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, norm: BranchNorm, *, pdl: bool
) -> Launch:
    """The launch that computes `norm_sum`."""
    M, K = x.shape
    block = min(triton.next_power_of_2(K), 8192)
    return Launch(
        norm_sum_kernel,
        (M, 1, 1),
        (x, bias, residual, norm.weight, norm.next_weight, norm.total, norm.normed),
        (K, x.stride(0), 0 if residual is None else residual.stride(0), norm.eps),
        (norm.kind, block, block >= K, pdl),
        num_warps=4 if block <= 2048 else 8,
        num_stages=1,
        pdl=pdl,
    )


def residual_add(
    hidden: Tensor,
    residual: Tensor | None,
    attention: Tensor | None,
    attention_bias: Tensor | None,
    final_bias: Tensor | None,
    share: float,
    attention_share: float,
) -> Tensor:
    """hidden + share * (residual + attention_bias + final_bias) + attention_share * attention."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if out.numel() > 0:
        summands = residual, attention, attention_bias, final_bias
        launch(residual_add_launch(hidden, *summands, share, attention_share, out))
    return out


def scaled_add(x: Tensor | None, branch: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """x + scale * (branch + bias)."""
    out = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    if out.numel() > 0:
        launch(scaled_add_launch(x, branch, bias, scale, out))
    return out


def scaled_add_launch(
    x: Tensor | None, branch: Tensor, bias: Tensor | None, scale: float, out: Tensor
) -> Launch:
    """The launch that computes `scaled_add` into out (tokens, K)."""
    if x is None:  # the kernel has one summand that it takes once
        return residual_add_launch(branch, None, branch, bias, None, scale, scale - 1.0, out)
    return residual_add_launch(x, None, branch, bias, None, scale, scale, out)


def residual_add_launch(
    hidden: Tensor,
    residual: Tensor | None,
    attention: Tensor | None,
    attention_bias: Tensor | None,
    final_bias: Tensor | None,
    share: float,
    attention_share: float,
    out: Tensor,
) -> Launch:
    """The launch that computes `residual_add` into out (tokens, K)."""
    M, K = hidden.shape
    block = min(triton.next_power_of_2(K), 1024)
    scalars = (
        K,
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        0 if attention is None else attention.stride(0),
        share,
        attention_share,
    )
    return Launch(
        residual_add_kernel,
        (M, -(-K // block), 1),
        (hidden, residual, attention, attention_bias, final_bias, out),
        scalars,
        (block,),
        num_warps=4,
        num_stages=1,
    )
