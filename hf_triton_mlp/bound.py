"""MLPs whose launches are bound: to addresses of weights, and to compiled kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from triton.knobs import runtime
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_triton_mlp.driver import relauncher
from hf_triton_mlp.kernels.activations import SPARSE
from hf_triton_mlp.launchers import (
    NO_SUMMANDS,
    BranchNorm,
    Launch,
    MLPWeights,
    Norm,
    Summands,
    branch_normed_mlp,
    executable,
    launch,
    linear_launch,
    mlp,
    norm_launch,
    norm_sum_launch,
    normed_mlp,
    on_device,
    plan_linear,
    scaled_add_launch,
    split_launches,
    split_parts,
)
from hf_triton_mlp.quantization import Weight
from hf_triton_mlp.reading import EPSILONS, is_quantized, runs_its_class
from hf_triton_mlp.tuning import DECODE_ROWS, Plan

#: How many numbers of rows (and kinds of calls) launches are bound for; older ones are dropped.
MOST_BOUND = 64


class BoundLaunches(NamedTuple):
    """What `BoundMLP` does for one number of rows, in work_bytes of memory of its own."""

    launches: tuple[Callable[..., None], ...]
    work_bytes: int
    offsets: tuple[int, ...]


#: What it does where a product is cuBLAS's: a function of rows (tokens, H) for input, residual and
#: normed, the weights and plans being known.
BoundCall = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


class BoundMLP:
    """An MLP as launches with everything bound but the addresses of the rows.

    What finding the plan, checking the tensors and looking the compiled kernels up costs the host
    is paid once for each number of rows; a call costs two allocations and a few launches. Numbers
    up to DECODE_ROWS are bound at once; others, of prompts or large batches, when they come again.
    It is for plain calls: no gradients, no tracing, tensors of the weights' dtype on their device,
    and weights that are where they were: their addresses are kept, not the tensors.
    """

    def __init__(self, up: Weight, dtype: torch.dtype) -> None:
        """up: the weight of this projection; dtype: what a call's tensors have."""
        self.intermediate, self.hidden = up.shape
        self.device_index, self.dtype = up.device.index, dtype
        #: None where the launches of every call have to do.
        self._bound: dict[tuple[int, bool, bool, bool], BoundLaunches | BoundCall | None] = {}
        self._seen: set[int] = set()

    def __call__(
        self, input: Tensor, residual: Tensor | None, early: bool, normed: Tensor | None = None
    ) -> Tensor | None:
        """The MLP of input (…, H), with a norm of input + residual, plus the residual.

        Given `normed`, the MLP of that, plus input and residual.

        None when no launches are bound for such a call: another number of rows, tensors that are
        not contiguous or not aligned, a profiler that wants to see launches. early: as in
        `TritonMLP.forward`.
        """
        if torch._C._cuda_getDevice() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(input, residual, early, normed)
        x = input.data_ptr()
        r = None if residual is None else residual.data_ptr()
        u = None if normed is None else normed.data_ptr()
        M = input.numel() // self.hidden
        bound = self._bound.get((M, r is None, u is None, early))
        if (
            bound is None
            or (x | (r or 0) | (u or 0)) % 16
            or not input.is_contiguous()
            or (residual is not None and not residual.is_contiguous())
            or (normed is not None and not normed.is_contiguous())
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
        ):
            return None
        if not isinstance(bound, BoundLaunches):
            given = (None if t is None else t.view(M, -1) for t in (residual, normed))
            return bound(input.view(M, -1), *given).view(input.shape)
        out = torch.empty_like(input)
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        # torch.cuda.caching_allocator_alloc without its checks: half the time of a tensor.
        work = torch._C._cuda_cudaCachingAllocator_raw_alloc(bound.work_bytes, stream)
        try:
            places = [work + offset for offset in bound.offsets]
            addresses = (x, r or 0, u or 0, out.data_ptr(), *places)
            for launch_again in bound.launches:
                launch_again(stream, addresses)
        finally:
            torch._C._cuda_cudaCachingAllocator_raw_delete(work)
        return out

    def bind(
        self,
        input: Tensor,
        residual: Tensor | None,
        normed: Tensor | None,
        weights: MLPWeights,
        *,
        activation: str,
        norm: str | None,
        norm_eps: float,
        pre_norm: bool = True,
        branch_scale: float = 1.0,
        branch_norm: str | None = None,
        carries: bool = True,
        early: bool,
    ) -> None:
        """Bind the launches for calls with as many rows as these tensors have, if it is time to.

        norm: in front of the MLP, None with `normed`; it, its eps, pre_norm, branch_scale and
        branch_norm are as in MLPConfig; carries: as in `MLPGemmOp`, without branch_norm, and what
        is added without a norm is left out too; early: as in `TritonMLP.forward`.
        """
        w = weights
        up, gate, down = (w.up, w.up_bias), (w.gate, w.gate_bias), (w.down, w.down_bias)
        M = input.numel() // self.hidden
        key = M, residual is None, normed is None, early
        if key in self._bound:
            return
        for tensor in (input, residual, normed):
            if tensor is not None and (tensor.data_ptr() % 16 or not tensor.is_contiguous()):
                return
        if M == 0 or (M > DECODE_ROWS and not self._came_before(M)):
            return
        while len(self._bound) >= MOST_BOUND:
            oldest, *_ = list(self._bound)  # a copy: other threads may bind meanwhile
            self._bound.pop(oldest, None)
        self._bound[key] = None
        x = input.view(M, self.hidden)
        r = None if residual is None else residual.view(M, self.hidden)
        u = None if normed is None else normed.view(M, self.hidden)
        with on_device(x):
            carry, norm_of_x, out = (torch.empty_like(x) for _ in range(3))
            hidden = x.new_empty((M, self.intermediate))
            work = [carry, norm_of_x, hidden]
            joined = Summands(x, r)  # whatever joins is laid out as these are
            up_plan = plan_linear(M, up[0], gated=gate[0] is not None, dtype=x.dtype)
            up_plan = executable(up_plan, x, up[0], gate[0], joined)
            down_plan = plan_linear(M, down[0], dtype=x.dtype, sparse=activation in SPARSE)
            down_plan = executable(down_plan, hidden, down[0], None, joined)
            if "library" in (up_plan.kernel, down_plan.kernel):

                def by_library(x: Tensor, r: Tensor | None, u: Tensor | None) -> Tensor:
                    kinds: Any = {"activation": activation, "norm_eps": norm_eps}
                    if branch_norm is not None:
                        kinds |= {"norm": norm, "branch_norm": branch_norm}
                        return branch_normed_mlp(x, r, None, weights, **kinds)
                    if norm is not None:
                        kinds |= {"norm": norm, "pre_norm": pre_norm, "branch_scale": branch_scale}
                        kinds["carries"] = carries
                        plans = up_plan, down_plan
                        return normed_mlp(x, r, None, weights, **kinds, plans=plans, early=early)
                    source, summands = (x, Summands(r)) if u is None else (u, Summands(x, r))
                    kinds = {"activation": activation}
                    kinds["summands"] = summands if carries else NO_SUMMANDS
                    return mlp(source, weights, **kinds, plans=(up_plan, down_plan), waited=early)

                self._bound[key] = by_library
                return
            calls: list[Launch] = []

            def add(
                plan: Plan,
                source: Tensor,
                linear: tuple[Weight, Tensor | None],
                gate: tuple[Weight | None, Tensor | None],
                activation: str | None,
                norm: Norm | None,
                summands: Summands,
                out: Tensor,
            ) -> None:
                rest = (gate, activation, norm, summands, out, early or bool(calls))
                if plan.splits == 1:
                    calls.append(linear_launch(plan, source, *linear, *rest))
                    return
                parts = split_parts(plan, out, gated=gate[0] is not None)
                work.append(parts)
                calls.extend(split_launches(plan, source, *linear, *rest, parts))

            source, before, summands, carried = x, None, NO_SUMMANDS, Summands(r)
            added, branch, output_norm = r, None, None
            if u is not None:
                source, carried = u, Summands(x, r)
            if branch_scale != 1.0:
                source, added, branch = torch.empty_like(x), None, torch.empty_like(x)
                work += [source, branch]
                calls.append(scaled_add_launch(r, x, None, branch_scale, source))
            if branch_norm is not None:
                kinds = branch_norm, norm_eps
                attention_norm = BranchNorm(*kinds, w.attention_norm_weight, carry)
                output_norm = BranchNorm(*kinds, w.output_norm_weight, out)
                source, branch = carry, torch.empty_like(x)
                work.append(branch)
                if norm is not None:
                    source = norm_of_x
                    next_norm = {"next_weight": w.norm_weight, "normed": source}
                    attention_norm = attention_norm._replace(**next_norm)
                calls.append(norm_sum_launch(x, None, r, attention_norm, pdl=up_plan.pdl))
            elif norm is not None:
                before = Norm(norm, w.norm_weight, w.norm_bias, norm_eps, carry, not pre_norm)
                summands, carried = Summands(added), Summands(carry)
                if not up_plan.fuses_norm:
                    total, source = source, norm_of_x if pre_norm else carry
                    calls.append(norm_launch(total, added, None, before, source, pdl=up_plan.pdl))
                    before, summands = None, NO_SUMMANDS
            add(up_plan, source, up, gate, activation, before, summands, hidden)
            if branch is None:
                carried = carried if carries else NO_SUMMANDS
                add(down_plan, hidden, down, (None, None), None, None, carried, out)
            else:  # with a norm, so that the residual is the carry
                add(down_plan, hidden, down, (None, None), None, None, NO_SUMMANDS, branch)
                if output_norm is None:
                    added = carry if carries else None
                    last = scaled_add_launch(added, branch, None, branch_scale, out)
                else:
                    last = norm_sum_launch(branch, None, carry, output_norm, pdl=down_plan.pdl)
                calls.append(last)
            offsets = [0]
            for tensor in work:
                offsets.append(offsets[-1] + -(-tensor.nbytes // 128) * 128)
            moving = (x, r, u, out, *work)
            launches = [bind(call, moving) for call in calls]
            if all(launches):
                self._bound[key] = BoundLaunches(
                    tuple(launches),  # pyright: ignore[reportArgumentType]
                    offsets.pop(),
                    tuple(offsets),
                )

    def _came_before(self, rows: int) -> bool:
        """Whether so many rows came before, as far as is known; they have come now."""
        before = rows in self._seen
        if len(self._seen) >= 1024:
            self._seen.clear()
        self._seen.add(rows)
        return before


def bind(call: Launch, moving: tuple[Tensor | None, ...]) -> Callable[..., None] | None:
    """Launch once; a function of (stream, addresses of the moving tensors) that launches again.

    None where only `launch` can: with matrices that TMA reads, and a driver that is not known.
    """
    compiled = launch(call)
    places = {id(tensor): i for i, tensor in enumerate(moving) if tensor is not None}
    arguments = (*call.tensors, *call.scalars, *call.constants)
    matrices = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
    moved = [places.get(id(matrix)) for matrix in matrices]
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    again = relauncher(compiled, call.grid, values, moved, len(moving))
    if again is None and not any(isinstance(a, TensorDescriptor) for a in arguments):
        again = _triton_relauncher(compiled, call.grid, values, moved)
    return again


def _triton_relauncher(
    compiled: Any, grid: tuple[int, int, int], values: list[Any], moved: list[int | None]
) -> Callable[..., None]:
    """`relauncher` by Triton's own launcher, which takes about three times as long."""

    def launch_again(stream: int, addresses: tuple[int, ...]) -> None:
        arguments = [
            value if place is None else addresses[place]
            for value, place in zip(values, moved, strict=True)
        ]
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(*grid, stream, function, metadata, None, None, None, *arguments)

    return launch_again


class BoundParts:
    """Bound launches, and the modules whose parameters and buffers they have the addresses of."""

    def __init__(
        self, mlp: nn.Module, parts: list[nn.Module | None], norm_eps: float, launches: BoundMLP
    ) -> None:
        """parts: what `mlp` calls or reads; its own tensors are looked at too."""
        self.launches = launches
        self.parts = parts
        modules = [part for part in parts if part is not None]
        self.modules = [(module, type(module), module.__dict__) for module in modules]
        self.values: list[tuple[dict[str, Any], str, object]] = []
        for module in modules:
            names = [name for name in EPSILONS if name in module.__dict__]
            self.values += [(module.__dict__, name, norm_eps) for name in names]
            if is_quantized(module):  # no tensor of it says what it computes in
                self.values.append((module.__dict__, "dtype", launches.dtype))
        named = [
            (tensors, name, tensor)
            for module in (mlp, *modules)
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
        ]
        self.tensors = [
            (tensors, name, t, t.data_ptr(), t.dtype, t.shape, t.stride())
            for tensors, name, t in named
            if t is not None
        ]
        self.absent = [(tensors, name) for tensors, name, t in named if t is None]

    def unchanged(self, parts: list[nn.Module | None]) -> bool:
        """Whether these are the same, plain modules with their tensors where they were.

        It takes the host two or three microseconds.
        """
        if parts != self.parts:
            return False
        for module, cls, state in self.modules:
            if (
                type(module) is not cls
                or state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or ("forward" in state and not runs_its_class(module))
            ):
                return False
        for tensors, name, t, address, dtype, shape, strides in self.tensors:
            if (
                tensors.get(name) is not t
                or t.data_ptr() != address
                or t.dtype is not dtype
                or t.shape != shape
                or t.stride() != strides
            ):
                return False
        for tensors, name in self.absent:
            if tensors[name] is not None:
                return False
        return all([state.get(name) == value for state, name, value in self.values])
