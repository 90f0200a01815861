"""TritonMLP: an MLP, alone or in a model's layer, with its norm and residuals in fused kernels."""

import inspect
import math
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from hf_triton_mlp.bound import BoundMLP, BoundParts
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.linear import keeping_dtypes
from hf_triton_mlp.ops import (
    DTYPES,
    NORMS,
    GELUGemmOp,
    MLPGemmOp,
    MLPWeights,
    activation_function,
    check_branch_norm,
    check_floating,
    compose,
    kernels_apply,
    needs_grad,
    norm_function,
    projection_functions,
)
from hf_triton_mlp.quantization import QuantizedWeight, from_flat_groups, same_format
from hf_triton_mlp.ranks import Ranks, ranks_of
from hf_triton_mlp.reading import (
    has_own_forward,
    is_plain,
    is_shard,
    read_branch_norm,
    read_norm,
    read_place,
    read_projection,
    split_packed,
    store_as_before,
    store_by_input,
    store_by_output,
    store_for_zeros,
)

Projections: TypeAlias = tuple[nn.Module, nn.Module | None, nn.Module]
BranchNorms: TypeAlias = tuple[nn.Module, nn.Module]

#: The modules that compute the norms of an MLPConfig; a model's family may have its own class.
NORM_CLASSES: dict[str, type[nn.Module]] = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """What an MLP computes. Sizes count elements; nothing is inferred from 4 * hidden.

    norm: "layer_norm", "rms_norm", "rms_norm_offset" (Gemma's, which multiplies by 1 + weight) or
    None (no norm in front). pre_norm: the residual is what enters the norm; post-norm: what leaves
    it. branch_scale: what is added to a residual, in front of the norm and after the MLP, is
    multiplied by it. branch_norm: it is normalized, by an RMSNorm of this kind with the same
    epsilon; `norm` is of the same kind or None. mp_size: ranks that share the weights, in a
    TritonMLP built from the config; intermediate_size is that of all of them. dtype: of the
    weights; those of a TritonMLP built from the config may be int8, and the rest is float16.
    Raises ValueError or TypeError for a value that is not supported.
    """

    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype = torch.float32
    activation: str = "gelu_new"
    gated: bool = False
    norm: str | None = "layer_norm"
    norm_eps: float = 1e-5
    norm_affine: bool = True
    pre_norm: bool = True
    branch_scale: float = 1.0
    branch_norm: str | None = None
    up_bias: bool = True
    down_bias: bool = True
    mp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "mp_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, found {value!r}")
            if value <= 0:
                raise ValueError(f"{name} must be positive, found {value}")
        activation_function(self.activation)
        if self.norm is not None and self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; supported: {', '.join(NORMS)}, None")
        if self.branch_scale != 1.0 and (self.norm is None or not self.pre_norm):
            raise ValueError(f"branch_scale {self.branch_scale} needs a norm, and pre_norm")
        check_branch_norm(self.branch_norm, self.norm, self.pre_norm, self.branch_scale)
        if self.norm_eps < 0:
            raise ValueError(f"norm_eps must not be negative, found {self.norm_eps}")
        supported = (*DTYPES, torch.int8)
        if self.dtype not in supported:
            raise ValueError(f"dtype {self.dtype} is not supported; supported: {supported}")


class StandIn(nn.Module):
    """What a subclass that `stand_in` makes adds to a model's class: a forward that uses it."""

    #: The class that it stands in for; its forward runs where the kernels do not.
    original_class: type[nn.Module] | None = None
    #: Whether the subclass has the original's name, by which others know layers and models.
    keeps_name = False
    #: Whether it has the original's module too, whose source transformers reads for a model's.
    keeps_module = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.keeps_module and cls.original_class is not None:
            cls.__module__ = cls.original_class.__module__

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles make the class again: no module holds it under a name."""
        reduced = super().__reduce_ex__(protocol)
        if "original_class" not in vars(type(self)) or self.original_class is None:
            return reduced
        return (_new_stand_in, _kinds_of(type(self)), *reduced[2:])


class FusedLayer(StandIn):
    """A decoder layer with a short forward: its second half is one TritonMLP call."""

    keeps_name = True
    mlp: Any

    #: The original's arguments after hidden_states: which there are depends on the version.
    argument_names: tuple[str, ...] = ()

    #: Whether that call adds the attention's output to the residual.
    joins_attention = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.original_class is not None:
            parameters = list(inspect.signature(cls.original_class.forward).parameters.values())
            named = [p.name for p in parameters[2:] if p.kind is p.POSITIONAL_OR_KEYWORD]
            cls.argument_names = tuple(named)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments after hidden_states by name, and an attention mask in any case."""
        by_name = dict(zip(self.argument_names, args, strict=False))
        return {"attention_mask": None, **by_name, **kwargs}

    def known(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """`named`, for an original that takes more keywords than it hands on."""
        named = self.named(args, kwargs)
        return {name: named[name] for name in self.argument_names if name in named}


@cache
def stand_in(kind: type[StandIn], original: type[nn.Module]) -> type[Any]:
    """The subclass of `original` with the methods of `kind`, one for each pair.

    Device maps and FSDP's policies find layers by their name, and configs name the model's class.
    """
    name = original.__name__ if kind.keeps_name else f"Triton{original.__name__}"
    doc = f"{original.__name__} as a {kind.__name__}."
    body = {"original_class": original, "__module__": kind.__module__, "__doc__": doc}
    return type(name, (kind, original), body)


def _new_stand_in(kinds: list[type[StandIn]], original: type[nn.Module]) -> nn.Module:
    return object.__new__(_stood_in(kinds, original))


def _stood_in(kinds: list[type[StandIn]], original: type[nn.Module]) -> type[Any]:
    for kind in kinds:
        original = stand_in(kind, original)
    return original


def _kinds_of(cls: type[Any]) -> tuple[list[type[StandIn]], type[nn.Module]]:
    """The kinds of stand-ins that a class is, in the order in which they came; the original."""
    kinds: list[type[StandIn]] = []
    while _is_stand_in(cls):
        kinds.insert(0, cls.__bases__[0])
        cls = cls.original_class
    return kinds, cls


def _is_stand_in(cls: type[Any]) -> bool:
    """Whether `stand_in` made it, no other class of it."""
    return vars(cls).get("original_class") is not None


class TritonMLP(StandIn):
    """An MLP with the norm in front and the residuals around it.

    Built from a config it owns its parameters: attn_nw, attn_nb (norm, H), inter_w (I, H) and
    inter_b (up; a gated MLP has the gate's rows below the up rows: (2 I, H)), output_w (H, I) and
    output_b (down), and branch_nw (norms of attention's and of the MLP's output, (2, H)). With the
    dtype int8, inter_w and output_w are codes, 0 until they are loaded, and have scales. With an
    mp_group, whose ranks share the weights, I is this rank's part of the intermediate size, norms
    and output_b are the same on all, and all add up their results, at the same time.

    Inside a model it is made by `from_projections` and holds the model's own projections under
    their own names, so that state_dict keys and adapters stay as they were.

    On a GPU, without gradients, it runs fused Triton kernels. On the CPU, under autocast, when
    gradients are needed, in a model that is being trained, or when a part is not a plain layer
    any more, it calls its parts as the original did.
    """

    inter_scales: Tensor
    output_scales: Tensor

    def __init__(
        self,
        config: MLPConfig,
        mp_group: Any = None,
        q_scales: Sequence[Tensor] | Tensor | None = None,
        q_groups: int = 1,
        merge_count: int = 1,
        mlp_extra_grouping: bool = False,
    ) -> None:
        """mp_group: the torch.distributed.ProcessGroup of config.mp_size ranks, where it is not 1.

        For int8, as in DeepSpeed: value = code * scale, scales are of flat groups. Of an mp_group,
        each rank has a checkpoint's part, with scales of its own.
        q_scales: the last two are up's and down's; zeros may follow their numbers. A checkpoint's
        part of a matrix, row by row, is in q_groups groups of equal size, or with
        mlp_extra_grouping in twice as many. merge_count: how many checkpoints of a tensor-parallel
        model were merged, a power of two, whose exponent is the attribute of this name: their rows
        of inter_w and their columns of output_w. Scales are in the order of `from_flat_groups`:
        up's one checkpoint's after the other's, down's one group's after the other's.
        Raises ValueError where groups cover neither whole rows nor equal parts of one, and where
        numbers do not fit.
        """
        super().__init__()
        ranks = ranks_of(mp_group)
        size = 1 if ranks is None else ranks.size
        if config.mp_size != size:
            found = "there is no mp_group" if mp_group is None else f"mp_group has {size} ranks"
            raise ValueError(f"mp_size is {config.mp_size}, and {found}")
        if config.intermediate_size % size:
            raise ValueError(
                f"the intermediate size {config.intermediate_size} is not a multiple of the {size} "
                "ranks of mp_group"
            )
        quantized = config.dtype is torch.int8
        if quantized != (q_scales is not None):
            raise ValueError(
                f"q_scales are for the dtype torch.int8, which needs them; found {config.dtype} "
                f"with{'out' if q_scales is None else ''} q_scales"
            )
        if not quantized and (q_groups, merge_count, mlp_extra_grouping) != (1, 1, False):
            raise ValueError(
                "q_groups, merge_count and mlp_extra_grouping are for the dtype torch.int8, found "
                f"{config.dtype}"
            )
        self._configure(config)
        self.ranks = ranks
        H, I = config.hidden_size, config.intermediate_size // size  # noqa: E741
        dtype = torch.float16 if quantized else config.dtype

        def parameter(present: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, dtype=dtype)) if present else None

        def matrix(*shape: int) -> nn.Parameter:
            empty = torch.empty(shape, dtype=config.dtype)
            return nn.Parameter(empty, requires_grad=not quantized)

        affine = config.norm is not None and config.norm_affine
        rows = 2 * I if config.gated else I
        self.attn_nw = parameter(affine, H)
        self.attn_nb = parameter(affine and config.norm == "layer_norm", H)
        self.branch_nw = parameter(config.norm_affine and config.branch_norm is not None, 2, H)
        self.inter_w = matrix(rows, H)
        self.inter_b = parameter(config.up_bias, rows)
        self.output_w = matrix(H, I)
        self.output_b = parameter(config.down_bias, H)
        if q_scales is not None:
            if merge_count < 1 or merge_count & (merge_count - 1):
                raise ValueError(f"merge_count is {merge_count}, supported: powers of two")
            if config.gated and merge_count > 1:
                raise ValueError("merged checkpoints of a gated MLP are not supported")
            self.q_groups = q_groups * 2 if mlp_extra_grouping else q_groups
            self.merge_count = merge_count.bit_length() - 1
            self._group(*q_scales[-2:])
        self.reset_parameters()

    def _group(self, *flat: Tensor) -> None:
        """Give inter_w and output_w the scales of their flat groups, in the form kernels read."""
        merged, group_sizes = 2**self.merge_count, []
        for dim, (name, scales) in enumerate(zip(("inter", "output"), flat, strict=True)):
            codes, count = getattr(self, f"{name}_w"), merged * self.q_groups
            numbers = scales.detach().flatten()
            if numbers[count:].any():
                raise ValueError(
                    f"{name}_w: found {numbers.numel()} scales, expected {self.q_groups} for each "
                    f"of {merged} merged parts"
                )
            try:
                weight = from_flat_groups(
                    codes.detach(), numbers[:count], groups=self.q_groups, merged=merged, dim=dim
                )
            except ValueError as error:
                raise ValueError(f"{name}_w: {error}") from error
            if not weight.scales.isfinite().all():
                raise ValueError(f"{name}_w: scales are infinite or NaN")
            self.register_buffer(f"{name}_scales", weight.scales, persistent=False)
            group_sizes.append(weight.group_size)
        self.group_sizes = tuple(group_sizes)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Scales of its own keep their dtype, as codes do."""
        with keeping_dtypes(self, self._buffers.keys() & {"inter_scales", "output_scales"}):
            return super()._apply(fn, recurse)

    @classmethod
    def from_projections(
        cls,
        config: MLPConfig,
        *,
        up: tuple[str, nn.Module],
        down: tuple[str, nn.Module],
        gate: tuple[str, nn.Module] | None = None,
    ) -> "TritonMLP":
        """A TritonMLP around existing projections, each given as (child name, module).

        Nothing is copied. Raises ValueError when the shapes of plain projections do not fit.
        """
        mlp = cls.inline(config)
        named = (up, gate, down)
        mlp.projection_names = tuple(None if item is None else item[0] for item in named)
        for item in named:
            if item is not None:
                mlp.add_module(*item)
        check_projections(config, (up[1], None if gate is None else gate[1], down[1]))
        return mlp

    @classmethod
    def inline(
        cls,
        config: MLPConfig,
        activation: nn.Module | None = None,
        norm_class: type[nn.Module] | None = None,
    ) -> "TritonMLP":
        """A TritonMLP without parameters, for a layer that passes its projections to each call.

        activation: the layer's, which the layer may check with `has_activation`.
        norm_class: as for `adopt`.
        """
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        mlp._configure(config, norm_class)
        if activation is not None:
            mlp._adopted = {"activation": type(activation)}
        return mlp

    def has_activation(self, activation: nn.Module) -> bool:
        """Whether this is, plain, the activation that `inline` was given."""
        return is_plain(activation, self._adopted["activation"])

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        config: MLPConfig,
        *,
        up: str,
        down: str,
        gate: str | None = None,
        packed: str | None = None,
        norm_class: type[nn.Module] | None = None,
    ) -> None:
        """Turn an `original_class` module into this subclass: same object, children and hooks.

        Conv1D weights (in, out) keep their values and shape, but lie in memory as nn.Linear's do:
        each output's weights together, which is how the kernels read fastest.
        packed: "gate_up" or "up_gate" where `up` has the rows of both, in this order.
        norm_class: what computes config.norm; a norm of another class is called, never read.
        """
        names = [name for name in (up, gate, down) if name is not None]
        stored = store_by_output(module, names)
        change_class(module, cls)
        assert isinstance(module, TritonMLP)
        module._configure(config, norm_class)
        module.projection_names, module.packed = (up, gate, down), packed
        module._adopted = {
            name: type(child) for name, child in module._modules.items() if name not in names
        }
        module._stored_by_output = stored

    def release(self) -> None:
        """Undo `adopt`."""
        assert self.original_class is not None
        if self.density is not None and self.projection_names is not None:
            store_as_before(self.get_submodule(self.projection_names[2] or ""))
        store_by_input(self, self._stored_by_output)
        for name in (
            "mlp_config",
            "norm_class",
            "ranks",
            "proving",
            "verified",
            "originals",
            "density",
            "projection_names",
            "packed",
            "_gelu_gemm",
            "_mlp_gemm",
            "_bound",
            "_adopted",
            "_stored_by_output",
        ):
            delattr(self, name)
        change_class(self, self.original_class)

    def skip_zeros(self, down: nn.Module, density: float) -> None:
        """Store the down projection so that what zeros multiply need not be read, if that is
        possible; density: what part of them is something else."""
        if store_for_zeros(down):
            self.density = density

    def _configure(self, config: MLPConfig, norm_class: type[nn.Module] | None = None) -> None:
        self.mlp_config = config  # `config` is the model's, in most families' MLPs
        # Torch has no class for some: a norm whose family names none is called, never read.
        self.norm_class = norm_class or NORM_CLASSES.get(config.norm or "layer_norm", nn.Module)
        #: Who shares the weights, of which this module has a part then.
        self.ranks: Ranks | None = None
        #: Compute from the weights as read on any device, where there is no kernel in PyTorch.
        self.proving = False
        #: Whether a patch of this kind of layer was compared with the original when it was made.
        self.verified = False
        #: The projections in whose places patch_model put quantized ones, by path; None: not kept.
        self.originals: dict[str, nn.Module | None] = {}
        #: What part of the hidden values is not 0, where the others are skipped.
        self.density: float | None = None
        self._bound: BoundParts | None = None
        self._adopted: dict[str, type] = {}
        self._stored_by_output: list[str] = []
        self.projection_names: tuple[str | None, ...] | None = None
        self.packed: str | None = None
        self._gelu_gemm = GELUGemmOp(activation=config.activation)
        self._mlp_gemm = MLPGemmOp(
            activation=config.activation,
            norm=config.norm or (None if config.branch_norm else "layer_norm"),
            norm_eps=config.norm_eps,
            pre_norm=config.pre_norm,
            branch_scale=config.branch_scale,
            branch_norm=config.branch_norm,
        )

    @property
    def owns_weights(self) -> bool:
        """Whether the weights are this module's own parameters (built from a config)."""
        return "inter_w" in self._parameters

    def reset_parameters(self) -> None:
        """Initialise own parameters as nn.Linear does, norms to the identity."""
        for weight, bias in ((self.inter_w, self.inter_b), (self.output_w, self.output_b)):
            assert weight is not None
            bound = 1 / math.sqrt(weight.shape[1])
            for parameter in (weight, bias):
                if parameter is not None and parameter.is_floating_point():
                    nn.init.uniform_(parameter, -bound, bound)
                elif parameter is not None:
                    nn.init.zeros_(parameter)
        offset = "rms_norm_offset" in (self.mlp_config.norm, self.mlp_config.branch_norm)
        for norm in (self.attn_nw, self.branch_nw):
            if norm is not None:
                nn.init.constant_(norm, 0.0 if offset else 1.0)
        if self.attn_nb is not None:
            nn.init.zeros_(self.attn_nb)

    def extra_repr(self) -> str:
        c = self.mlp_config
        return (
            f"hidden={c.hidden_size}, intermediate={c.intermediate_size}, "
            f"activation={c.activation}, norm={c.norm}, pre_norm={c.pre_norm}"
            + ("" if self.ranks is None else f", {self.ranks}")
        )

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        residual_norm: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        norm: nn.Module | None = None,
        projections: Projections | None = None,
        branch_norms: BranchNorms | None = None,
        early: bool = False,
    ) -> Tensor:
        """One of five sums; a = input, r = residual, b_a = bias, all (…, H), fresh output.

        - no norm, residual_norm given: MLP(residual_norm) + a + b_a + r
        - norm, pre-norm: s = a + b_a + r; MLP(norm(s)) + s
        - norm, post-norm: u = norm(a + b_a + r); MLP(u) + u
        - branch norms: s = norm_a(a + b_a) + r; norm_c(MLP(u)) + s, where u = norm(s), or s
        - no norm: MLP(a) + r

        `norm` is the layer's norm module (instead of attn_nw, attn_nb), `branch_norms` are its
        norm_a and norm_c (instead of branch_nw), `projections` the layer's (up, gate, down) where
        this module does not hold them. `early` promises that the kernel launched last does not
        write weights (it computed the input, say), so that they may be read before it has ended.
        Raises TypeError for integer or complex inputs and other dtypes than the weights', and
        ValueError for another hidden size or device than the weights', and for norms that are not
        the config's.
        """
        if not torch.compiler.is_compiling() and bias is None:
            output = None
            if self._is_bound(input, norm, projections, branch_norms):
                output = self._decode(input, residual, residual_norm, early)
            if output is not None:
                return output
        check_floating(input)
        hidden = self.mlp_config.hidden_size
        if input.shape[-1] != hidden:
            raise ValueError(f"input has hidden size {input.shape[-1]}, this MLP has {hidden}")
        normed = self._has_norms(norm, branch_norms)
        if normed and residual_norm is not None:
            raise ValueError("residual_norm is for an MLP without a norm of its own")
        if not normed and residual_norm is None and bias is not None:
            raise ValueError("bias needs a norm or residual_norm: without, there is no sum for it")

        weights = self._weights_for(input, norm, projections, branch_norms)
        parts = norm, projections, branch_norms
        if weights is not None:
            self._check_place(input, projections)
        if (
            weights is None
            or not self._kernels_apply(input)
            or (residual is not None and residual.dtype != input.dtype)
        ):
            return self._call_parts(input, residual, residual_norm, bias, *parts)
        if needs_grad(input, residual, residual_norm, bias, *weights):
            if not self.training and not torch.compiler.is_compiling():
                warnings.warn(
                    "gradients are enabled, so TritonMLP runs in PyTorch; its kernels run under "
                    "torch.no_grad(), torch.inference_mode() and in model.generate()",
                    stacklevel=2,
                )
            return self._call_parts(input, residual, residual_norm, bias, *parts)
        if normed and self.ranks is not None and self.mlp_config.branch_norm is not None:
            return self._branch_normed(input, weights, residual, bias)
        carries = self.ranks is None or self.ranks.is_first
        if not carries:
            weights = weights._replace(down_bias=None)
        if normed:
            output = self._mlp_gemm(input, weights, residual, bias, carries)
        elif residual_norm is None:
            output = self._gelu_gemm(input, weights, residual if carries else None)
        else:
            summands = (input, residual, bias) if carries else ()
            output = self._gelu_gemm(residual_norm, weights, *summands)
        if (
            bias is None
            and not torch.compiler.is_compiling()
            and input.is_cuda
            and not INTERPRETED
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch.cuda.is_current_stream_capturing()
        ):
            self._bind(input, residual, residual_norm, weights, *parts, early)
        return output if self.ranks is None else self.ranks.sum(output)

    def _branch_normed(
        self, input: Tensor, weights: MLPWeights, residual: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """With branch norms: what the last one takes is the sum of all ranks' results."""
        assert self.ranks is not None
        if not self.ranks.is_first:
            weights = weights._replace(down_bias=None)
        if kernels_apply(input) and not torch.compiler.is_compiling():
            return self._mlp_gemm.added_up(input, weights, residual, bias, self.ranks.sum)
        config = self.mlp_config
        attention_norm, output_norm, norm = (
            norm_function(kind, weight, None, config.norm_eps)
            for kind, weight in (
                (config.branch_norm, weights.attention_norm_weight),
                (config.branch_norm, weights.output_norm_weight),
                (config.norm, weights.norm_weight),
            )
        )
        assert attention_norm is not None and output_norm is not None
        total = attention_norm(input if bias is None else input + bias)
        total = total if residual is None else residual + total
        branch = self._gelu_gemm(total if norm is None else norm(total), weights)
        return total + output_norm(self.ranks.sum(branch))

    def fuse(
        self,
        input: Tensor,
        norm: nn.Module | None = None,
        projections: Projections | None = None,
        branch_norms: BranchNorms | None = None,
    ) -> Callable[..., Tensor] | None:
        """The rest of a layer as a function of (attention's output, residual) like this input.

        Without norms, of (attention's output, residual, normed): MLP(normed) + both, for a layer
        whose MLP runs beside its attention, and which calls its norms itself.
        A layer asks before its attention, whose kernels then lie between these and whoever wrote
        the weights. None: the layer has to run its original forward, as on the CPU, in training,
        with gradients, and where hooks or adapters expect to see the layer's parts called.
        """
        if not is_plain(self, type(self)) or not self._kernels_apply(input):
            assert not self.proving, "only what is read can be proven"
            return None
        bound = not torch.compiler.is_compiling() and self._is_bound(
            input, norm, projections, branch_norms
        )
        if not bound:
            weights = self._weights_for(input, norm, projections, branch_norms)
            if weights is None or needs_grad(input, *weights):
                assert not self.proving, "only what is read can be proven"
                return None

        def finish(
            attention: Tensor, residual: Tensor | None, normed: Tensor | None = None
        ) -> Tensor:
            output = self._decode(attention, residual, normed, True) if bound else None
            if output is None:
                rest = {"norm": norm, "projections": projections, "branch_norms": branch_norms}
                return self(attention, residual, normed, **rest, early=True)
            return output

        return finish

    def _has_norms(self, norm: nn.Module | None, branch_norms: BranchNorms | None) -> bool:
        """Whether a call has norms: a layer's, or this module's own."""
        if self.owns_weights:
            return self.mlp_config.norm is not None or self.mlp_config.branch_norm is not None
        return norm is not None or branch_norms is not None

    def _is_bound(
        self,
        input: Tensor,
        norm: nn.Module | None,
        projections: Projections | None,
        branch_norms: BranchNorms | None,
    ) -> bool:
        """Whether bound launches compute this: on their GPU, no gradients, no tracing or hooks.

        This skips no check, it only asks whether something changed since the checks were made.
        """
        bound = self._bound
        return (
            bound is not None
            and input.get_device() == bound.launches.device_index
            and not torch.is_grad_enabled()
            and not (self.training and not self.owns_weights)
            and not torch._C._is_any_autocast_enabled()
            and torch._C._len_torch_dispatch_stack() == 0
            and not _global_forward_hooks
            and not _global_forward_pre_hooks
            and bound.unchanged(self._parts(norm, projections, branch_norms))
        )

    def _parts(
        self,
        norm: nn.Module | None,
        projections: Projections | None,
        branch_norms: BranchNorms | None = None,
    ) -> list[nn.Module | None]:
        parts = [*self._modules.values(), norm, *(projections or ())]
        if branch_norms is not None:
            parts += branch_norms
        return parts

    def _decode(
        self, input: Tensor, residual: Tensor | None, residual_norm: Tensor | None, early: bool
    ) -> Tensor | None:
        """The output by bound launches, which `_is_bound`; None if there are none for this call."""
        assert self._bound is not None
        launches = self._bound.launches
        for tensor in (input, residual, residual_norm):
            if tensor is not None and (
                type(tensor) is not Tensor
                or tensor.dtype is not launches.dtype
                or tensor.shape != input.shape
                or tensor.get_device() != launches.device_index
            ):
                return None
        if input.shape[-1] != launches.hidden:
            return None
        output = launches(input, residual, early, residual_norm)
        return output if output is None or self.ranks is None else self.ranks.sum(output)

    def _bind(
        self,
        input: Tensor,
        residual: Tensor | None,
        residual_norm: Tensor | None,
        weights: MLPWeights,
        norm: nn.Module | None,
        projections: Projections | None,
        branch_norms: BranchNorms | None,
        early: bool,
    ) -> None:
        """Bind launches for this number of rows to these weights, which are known to fit."""
        config, parts = self.mlp_config, self._parts(norm, projections, branch_norms)
        if self._bound is None or not self._bound.unchanged(parts):
            launches = BoundMLP(weights.up, input.dtype)
            self._bound = BoundParts(self, parts, config.norm_eps, launches)
        normed = self._has_norms(norm, branch_norms)
        self._bound.launches.bind(
            input,
            residual,
            residual_norm,
            weights,
            activation=config.activation,
            norm=self._mlp_gemm.norm if normed else None,
            norm_eps=config.norm_eps,
            pre_norm=config.pre_norm,
            branch_scale=config.branch_scale,
            branch_norm=config.branch_norm if normed else None,
            carries=self.ranks is None or self.ranks.is_first,
            early=early,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles bind launches of their own."""
        return {**self.__dict__, "_bound": None}

    def _kernels_apply(self, input: Tensor) -> bool:
        in_training = self.training and not self.owns_weights
        apply = self.proving or kernels_apply(input)
        return apply and input.dtype in DTYPES and not in_training

    def _projections(self, given: Projections | None) -> Projections:
        if given is not None:
            return given
        assert self.projection_names is not None, "an inline TritonMLP is called with projections"
        up, gate, down = self.projection_names
        assert up is not None and down is not None
        return getattr(self, up), None if gate is None else getattr(self, gate), getattr(self, down)

    def _weights_for(
        self,
        input: Tensor,
        norm: nn.Module | None,
        projections: Projections | None,
        branch_norms: BranchNorms | None,
    ) -> MLPWeights | None:
        """`_weights`; None too where a part would move this input to another device."""
        found = self._weights(norm, projections, branch_norms)
        parts = self._parts(norm, projections, branch_norms)
        if found is not None and any(part is not None and has_own_forward(part) for part in parts):
            if {tensor.device for tensor in found if tensor is not None} != {input.device}:
                return None
        return found

    def _weights(
        self,
        norm: nn.Module | None,
        projections: Projections | None,
        branch_norms: BranchNorms | None = None,
    ) -> MLPWeights | None:
        """The tensors that the kernels may read; None when a part has to be called."""
        config = self.mlp_config
        if self.owns_weights:
            if norm is not None or branch_norms is not None:
                raise ValueError("this TritonMLP has its own norm weights; `norm` is for models")
            return self._own_weights()
        kinds = config.norm, config.branch_norm
        if branch_norms is not None or (norm is not None and config.branch_norm is not None):
            if [norm is None, branch_norms is None] != [kind is None for kind in kinds]:
                raise ValueError(
                    f"a call has the config's norms or none: norm, branch_norm {kinds}"
                )
        for name, child in self._modules.items():
            if child is None or name in (self.projection_names or ()):
                continue
            if not is_plain(child, self._adopted.get(name, type(child))):
                return None  # another activation than there was, or hooks on it, say
        up, gate, down = self._projections(projections)
        if self.ranks is not None:
            for each in (up, gate, down):
                if each is not None and not is_shard(each):
                    raise RuntimeError(
                        f"a projection of an MLP that ranks share is a {type(each).__name__}: "
                        "unpatch_model, which gathers the weights, comes before adapters and other "
                        "changes of layers"
                    )
        up_read, down_read = read_projection(up), read_projection(down)
        gate_read = (None, None) if gate is None else read_projection(gate)
        if up_read is None or down_read is None or gate_read is None:
            return None
        if gate_read[0] is not None and not same_format(up_read[0], gate_read[0]):
            return None
        if self.packed is not None:
            weights, biases = split_packed(self.packed, up_read[0]), (None, None)
            if up_read[1] is not None:
                biases = split_packed(self.packed, up_read[1])
            up_read, gate_read = zip(weights, biases, strict=True)
        norm_read = None, None
        if norm is not None:
            norm_read = read_norm(norm, self.norm_class, config.norm_eps)
            if norm_read is None or (branch_norms is not None and norm_read[1] is not None):
                return None
        attention_norm_weight = output_norm_weight = None
        if branch_norms is not None:
            attention_norm_weight, output_norm_weight = (
                read_branch_norm(each, self.norm_class, config.norm_eps) for each in branch_norms
            )
            if attention_norm_weight is None or output_norm_weight is None:
                return None
        return MLPWeights(
            up_read[0],
            down_read[0],
            up_read[1],
            down_read[1],
            *gate_read,
            *norm_read,
            attention_norm_weight,
            output_norm_weight,
        )

    def _own_weights(self) -> MLPWeights:
        up, gate, down = self.inter_w, None, self.output_w
        up_bias, gate_bias = self.inter_b, None
        assert up is not None and down is not None
        if self.mlp_config.dtype is torch.int8:
            up, down = (
                QuantizedWeight(codes, scales, None, (codes.shape[0], codes.shape[1]), size)
                for codes, scales, size in (
                    (up, self.inter_scales, self.group_sizes[0]),
                    (down, self.output_scales, self.group_sizes[1]),
                )
            )
        if self.mlp_config.gated:
            up, gate = up.chunk(2)
            if up_bias is not None:
                up_bias, gate_bias = up_bias.chunk(2)
        branch_weights = (None, None) if self.branch_nw is None else self.branch_nw.unbind()
        projections = up, down, up_bias, self.output_b, gate, gate_bias
        return MLPWeights(*projections, self.attn_nw, self.attn_nb, *branch_weights)

    def _own_place(self) -> tuple[torch.dtype, torch.device]:
        """Of its parameters but codes, where there are others, float16 is what these stand for."""
        assert self.inter_w is not None
        floating = (p for p in self._parameters.values() if p is not None and p.is_floating_point())
        dtype = next((parameter.dtype for parameter in floating), torch.float16)
        return dtype, self.inter_w.device

    def _check_place(self, input: Tensor, projections: Projections | None) -> None:
        if self.owns_weights:
            place = self._own_place()
        else:
            place = read_place(self._projections(projections)[0])
            assert place is not None, "it was read"
        dtype, device = place
        if input.device != device:
            raise ValueError(f"input is on {input.device}, the weights are on {device}")
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"input is {input.dtype}, the weights are {dtype}")

    def _call_parts(
        self,
        input: Tensor,
        residual: Tensor | None,
        residual_norm: Tensor | None,
        bias: Tensor | None,
        norm: nn.Module | None,
        projections: Projections | None,
        branch_norms: BranchNorms | None,
    ) -> Tensor:
        """The original computation: norms and projections are called."""
        assert not self.proving, "only what is read can be proven"
        config = self.mlp_config
        normed = self._has_norms(norm, branch_norms) or residual_norm is not None
        if self.original_class is not None and not normed:
            arguments = (input,) if residual is None else (input, residual)
            return self.original_class.forward(self, *arguments)
        parts: dict[str, Callable[[Tensor], Tensor] | None]
        if self.owns_weights:
            w, eps, kind = self._own_weights(), config.norm_eps, config.branch_norm
            parts = projection_functions(w, self.ranks)
            parts["norm"] = norm_function(config.norm, w.norm_weight, w.norm_bias, eps)
            parts["attention_norm"] = norm_function(kind, w.attention_norm_weight, None, eps)
            parts["output_norm"] = norm_function(kind, w.output_norm_weight, None, eps)
        else:
            up, gate, down = self._projections(projections)
            parts = {"norm": norm, "up": up, "gate": gate, "down": down}
            parts["attention_norm"], parts["output_norm"] = branch_norms or (None, None)
        return compose(
            input,
            residual,
            residual_norm,
            bias,
            **parts,  # pyright: ignore[reportArgumentType]
            activation=config.activation,
            pre_norm=config.pre_norm,
            branch_scale=config.branch_scale,
            packed=self.packed,
        )


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of one module, and the bound forward that an accelerate hook keeps."""
    if not has_own_forward(module):
        module.__dict__.pop("forward", None)
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module)


def set_kind(module: nn.Module, kind: type[StandIn], wanted: bool) -> None:
    """Let a module's class have what a kind of stand-in adds, or not; other kinds stay.

    A class that others have derived since, FSDP say, stays when a kind is added alone.
    """
    cls: Any = type(module)
    if wanted == issubclass(cls, kind):
        return
    if wanted:
        change_class(module, stand_in(kind, cls))
        return
    kinds, original = _kinds_of(next(each for each in cls.__mro__ if _is_stand_in(each)))
    change_class(module, _stood_in([each for each in kinds if each is not kind], original))


def check_projections(
    config: MLPConfig, projections: Projections, packed: str | None = None
) -> None:
    """Raise ValueError unless the plain projections fit each other and the config's sizes."""
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    up, gate, down = projections
    for name, module, expected in (
        ("up", up, (I if packed is None else 2 * I, H)),
        ("gate", gate, (I, H)),
        ("down", down, (H, I)),
    ):
        read = None if module is None else read_projection(module)
        if read is not None and tuple(read[0].shape) != expected:
            raise ValueError(
                f"mismatched projections: the {name} projection is (out, in) = "
                f"{tuple(read[0].shape)}, expected {expected}"
            )
