"""A model's modules, read instead of called: which may be, and what they hold."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp.quantization import (
    INT4_PER_WORD,
    QuantizedWeight,
    Weight,
    stored_by_input,
    stored_by_output,
)

#: What norms name the number that they add to the variance.
EPSILONS = ("eps", "variance_epsilon")

#: Subclasses of nn.Linear that compute what it does; by name, so that no family is imported.
LINEARS = ("transformers.models.falcon.modeling_falcon.FalconLinear",)

#: What accelerate gives modules to move their inputs to their device, and offloaded weights too.
ALIGN_DEVICES = "accelerate.hooks.AlignDevicesHook"

#: Our layer of a quantized weight; by name, since its operation is made of what is read here.
QUANTIZED = "hf_triton_mlp.linear.QuantizedLinear"


#: What is split: a weight, a bias or results.
Both = TypeVar("Both", bound=Weight)


def full_name(cls: type) -> str:
    """The name of a class with its module's."""
    return f"{cls.__module__}.{cls.__qualname__}"


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance's forward is not its class's (a monkeypatch, or accelerate's hooks).

    Removing an accelerate hook leaves the class's forward, bound, on the instance.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def only_moves_inputs(module: nn.Module) -> bool:
    """Whether the instance's forward is its class's, behind a hook of accelerate that moves what
    it is given to the module's device: what dispatch_model gives to parts that stay on theirs."""
    hook: Any = module.__dict__.get("_hf_hook")
    forward = module.__dict__.get("forward")
    return (
        full_name(type(hook)) == ALIGN_DEVICES
        and not (hook.offload or hook.no_grad)
        and isinstance(forward, functools.partial)
        and forward.func.__module__ == type(hook).__module__
        and getattr(module.__dict__.get("_old_forward"), "__func__", None) is type(module).forward
    )


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate brings the module's weights in for each call."""
    hook: Any = module.__dict__.get("_hf_hook")
    hooks: Any = getattr(hook, "hooks", (hook,))
    return any(full_name(type(each)) == ALIGN_DEVICES and each.offload for each in hooks)


def runs_its_class(module: nn.Module) -> bool:
    """Whether nothing but its class's forward computes what the module returns, hooks aside."""
    return not has_own_forward(module) or only_moves_inputs(module)


def computes_the_same(function: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether the bodies of two functions are the same, under decorators and but for docstrings.

    What their globals are is not compared.
    """
    function, other = inspect.unwrap(function), inspect.unwrap(other)

    def body(of: Any) -> Any:
        code = of.__code__
        constants = tuple(each for each in code.co_consts if each is not of.__doc__)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        defaults = of.__defaults__, of.__kwdefaults__
        return code.co_code, code.co_names, constants, names, defaults

    return body(function) == body(other)


def is_from(function: Callable[..., Any], module: Any) -> bool:
    """Whether a function is in a module's file, under decorators; not so if it was replaced."""
    return inspect.unwrap(function).__code__.co_filename == module.__file__


def is_original(module: nn.Module, path: str) -> bool:
    """Whether a module is of the class at this path, whose forward nobody has replaced."""
    cls = type(module)
    return full_name(cls) == path and is_from(cls.forward, sys.modules[cls.__module__])


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling `module` does what its class says, so that its weights may be read instead.

    Not so for another class (LoRA wrappers, quantized layers, parametrizations), for a module
    with hooks, and for one whose forward was replaced on the instance, but by accelerate, to move
    inputs: what reads it has to ask whether they are on its device. Backward hooks do not matter:
    the kernels run only where nothing needs a gradient.
    """
    return (
        type(module) in classes
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and runs_its_class(module)
    )


def read_parameters(module: nn.Module) -> tuple[Tensor | None, Tensor | None] | None:
    """(weight, bias) of a module, None if either must not be read.

    A tensor subclass (quantized, distributed), or no parameter or buffer: FSDP's views of what it
    has gathered for a call are attributes.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    plain = (nn.Parameter, Tensor, type(None))
    if type(weight) not in plain or type(bias) not in plain:
        return None
    if any(isinstance(module.__dict__.get(name), Tensor) for name in ("weight", "bias")):
        return None
    return weight, bias  # pyright: ignore[reportReturnType]


def is_shard(module: nn.Module) -> bool:
    """Whether a projection is the part of one that a rank has (`parallel.Shard`)."""
    return hasattr(type(module), "shard_of")


def projection_class(module: nn.Module) -> type:
    """The class of a projection; of a part of one, that of the whole."""
    return getattr(type(module), "shard_of", type(module))


def is_quantized(module: nn.Module) -> bool:
    """Whether this is our layer of a quantized weight, or of a part of one."""
    return full_name(projection_class(module)) == QUANTIZED


def read_projection(module: nn.Module) -> tuple[Weight, Tensor | None] | None:
    """(weight as (out, in), bias) of a plain Linear, Conv1D or QuantizedLinear, or a part of one.

    None if it must be called.
    """
    cls = projection_class(module)
    name = None if cls in (nn.Linear, Conv1D) else full_name(cls)
    known = name is None or name == QUANTIZED or name in LINEARS
    if not known or not is_plain(module, type(module)):
        return None
    if name != QUANTIZED:
        read = read_parameters(module)
        if read is None or read[0] is None:
            return None
    return projection_weight(module), module.bias  # pyright: ignore[reportReturnType]


def projection_weight(module: Any) -> Weight:
    """The weight (out, in) of a layer of one of these classes."""
    if is_quantized(module):
        return module.quantized
    return module.weight.t() if projection_class(module) is Conv1D else module.weight


def read_place(module: nn.Module) -> tuple[torch.dtype, torch.device] | None:
    """What a projection, also a wrapped one, computes in, and where; None if that is unknown."""
    if is_quantized(module):
        return module.dtype, module.codes.device  # pyright: ignore[reportReturnType]
    weight = getattr(module, "weight", None)
    return (weight.dtype, weight.device) if isinstance(weight, Tensor) else None


def split_packed(packed: str, both: Both, dim: int = 0) -> tuple[Both, Both]:
    """The up and the gate half, views, of what a projection has of both: rows or results.

    packed: which comes first, "gate_up" or "up_gate".
    """
    halves: Any = both.chunk(2, dim)
    first, second = halves
    return (second, first) if packed == "gate_up" else (first, second)


def read_epsilon(norm: nn.Module) -> float | None:
    """What a norm adds to the variance: torch's classes name it eps, most RMSNorms otherwise."""
    for name in EPSILONS:
        if name in norm.__dict__:
            return norm.__dict__[name]
    return None


def read_norm(
    norm: nn.Module, cls: type[nn.Module], epsilon: float
) -> tuple[Tensor | None, Tensor | None] | None:
    """(weight, bias) of a plain norm of this class and epsilon; None if it must be called."""
    if not is_plain(norm, cls) or read_epsilon(norm) != epsilon:
        return None
    return read_parameters(norm)


def read_branch_norm(norm: nn.Module, cls: type[nn.Module], epsilon: float) -> Tensor | None:
    """The weight of a norm as `read_norm`, which has no bias; None if it must be called."""
    weight, bias = read_norm(norm, cls, epsilon) or (None, None)
    return weight if bias is None else None


def store_by_output(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Give the weights (in, out) of Conv1Ds strides (1, in); returns which of the names these are.

    Left as they are: other layers, those that must be called, weights that share their memory.
    """
    stored = []
    for name in names:
        child = module.get_submodule(name)
        if type(child) is not Conv1D or read_projection(child) is None:
            continue
        weight = child.weight
        if weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes:
            with torch.inference_mode(False):
                weight.data = weight.data.t().contiguous().t()
            stored.append(name)
    return stored


@torch.inference_mode(False)
def store_for_zeros(linear: nn.Module) -> bool:
    """Give the weight of a plain Linear, Conv1D or QuantizedLinear the strides of (in, out),
    contiguous, so that what one input is multiplied by lies together; its values and shape stay.

    False, and left as it is: another layer, one that must be called, a weight that shares memory,
    and one with infinite or NaN values, which multiply even zeros.
    """
    read = read_projection(linear)
    if read is None or full_name(projection_class(linear)) in LINEARS:
        return False
    weight, module = read[0], cast(Any, linear)
    if isinstance(weight, QuantizedWeight):
        if weight.activations is not None or weight.shape[0] % INT4_PER_WORD:
            return False  # its products are of rows of codes, or its words not of whole outputs
        module.store(stored_by_input(weight))
        return True
    if weight.untyped_storage().nbytes() != weight.nbytes or not weight.isfinite().all():
        return False
    by_input = weight.data.t().contiguous()
    module.weight.data = by_input if projection_class(linear) is Conv1D else by_input.t()
    return True


@torch.inference_mode(False)
def store_as_before(linear: Any) -> None:
    """Undo `store_for_zeros`, if the weight is still there."""
    if is_quantized(linear):
        if linear.quantized.by_input:
            linear.store(stored_by_output(linear.quantized))
        return
    weight = linear._parameters.get("weight")
    if weight is not None and not weight.is_contiguous():
        weight.data = weight.data.contiguous()


def store_by_input(module: nn.Module, names: list[str]) -> None:
    """Undo `store_by_output`, for those that are still there."""
    modules = dict(module.named_modules())
    for name in names:
        weight = getattr(modules.get(name), "_parameters", {}).get("weight")
        if isinstance(weight, Tensor) and not weight.is_contiguous():
            with torch.inference_mode(False):
                weight.data = weight.data.contiguous()
