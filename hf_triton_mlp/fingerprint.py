"""What a captured step has taken in of a model, to be compared before it is replayed.

That is done on the host for each call of generate(), so modules are walked by hand.
"""

import weakref
from dataclasses import is_dataclass
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_triton_mlp.mlp import MLPConfig

#: What every module has. Parameters, buffers and children are looked at by themselves; where there
#: are hooks, or modules in training mode, no captured step is asked for.
OWN = frozenset(nn.Module().__dict__)

#: What is compared as it is.
PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, MLPConfig}
)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """A model and the modules in it, each once; `model.modules()` takes four times as long."""
    found, seen = [model], {model}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def fingerprint(model: nn.Module) -> list[Any]:
    """The modules of a model, the values and functions that they hold, where their tensors lie.

    Two are equal if a step captured at the first computes what the model does at the second; of
    other objects than configs and dataclasses, no attributes are looked at. It keeps neither
    tensors nor modules alive.
    """
    found: list[Any] = [torch.get_float32_matmul_precision(), torch.get_default_dtype()]
    seen: set[int] = set()
    for module in modules_of(model):
        cls, state = type(module), module.__dict__
        found += (cls, cls.forward, *map(id, state["_modules"].values()))
        for tensors in (state["_parameters"], state["_buffers"]):
            for name, tensor in tensors.items():
                found.append(name)
                _add(tensor, found, seen)
        for name, value in state.items():
            if name not in OWN:
                found.append(name)
                if type(value) in PLAIN:
                    found.append(value)
                else:
                    _add(value, found, seen)
    return found


def _add(value: Any, found: list[Any], seen: set[int]) -> None:
    """Extend a fingerprint by a value; seen: the ids of configs, which many modules share."""
    cls = type(value)  # isinstance would ask a config itself, which takes microseconds
    if cls in PLAIN:
        found.append(value)
    elif cls is nn.Parameter or cls is Tensor:
        found += (value.data_ptr(), value.dtype, value.shape, value.stride())
    elif id(value) in seen:
        found.append(id(value))
    elif issubclass(cls, dict):
        found.append(len(value))
        for key, item in value.items():
            found.append(key)
            _add(item, found, seen)
    elif issubclass(cls, (list, tuple, set, frozenset)):
        found.append(len(value))
        for item in value:
            _add(item, found, seen)
    elif issubclass(cls, Tensor):
        flatten: Any = getattr(value, "__tensor_flatten__", None)
        if flatten is None:
            found += (cls, value.data_ptr(), value.dtype, value.shape, value.stride())
        else:  # a subclass around other tensors, as quantized ones are
            for name in flatten()[0]:
                _add(getattr(value, name), found, seen)
    elif issubclass(cls, PretrainedConfig) or is_dataclass(cls):
        seen.add(id(value))
        found.append(id(value))
        _add(getattr(value, "__dict__", {}), found, seen)
    elif issubclass(cls, (Number, str, bytes, Enum)):  # NumPy's numbers too
        found.append(value)
    elif callable(value) and not issubclass(cls, nn.Module):
        try:
            found.append(weakref.ref(value))
        except TypeError:
            found.append(id(value))
