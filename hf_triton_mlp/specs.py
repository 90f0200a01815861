"""What is known of MLPs: the specs of the families, and the activations by class."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
)

from hf_triton_mlp.mlp import FusedLayer, Projections
from hf_triton_mlp.reading import full_name

#: The activation that a module computes, by its exact class. Patch modules add their own.
ACTIVATION_CLASSES: dict[type[nn.Module], str] = {
    GELUActivation: "gelu",
    GELUTanh: "gelu_pytorch_tanh",
    NewGELUActivation: "gelu_new",
    QuickGELUActivation: "quick_gelu",
    ReLUSquaredActivation: "relu2",
    SiLUActivation: "silu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


def activation_name(activation: Any, own: Iterable[tuple[str, str]] = ()) -> str | None:
    """What an activation module computes, None if that is unknown; own: as in MLPSpec."""
    cls = type(activation)
    if cls is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    return ACTIVATION_CLASSES.get(cls) or dict(own).get(full_name(cls))


def short(name: str) -> str:
    """The class alone of a full name."""
    return name.rpartition(".")[2]


# The defaults of MLPSpec have names, so that a spec can be pickled with an MLP that it describes.


def _pre_norm(layer: nn.Module) -> bool:
    return True


def _unscaled(layer: nn.Module) -> float:
    return 1.0


def _supported(layer: nn.Module) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """Where a family's MLP is and what it computes; every path is relative to a decoder layer.

    Classes are full names ("transformers.models.gpt2.modeling_gpt2.GPT2Block"), so that a family
    whose module nobody imported costs nothing.

    family: the name in reports (transformers' model_type).
    layer_class: the decoder layer.
    fused_layer: its short forward; None when only the MLP module is replaced.
    attention: the module that a fused layer calls before its MLP.
    mlp, mlp_class: the MLP module ("": the layer is one); None when the layer computes its MLP
        inline, and then up and down are children of the layer, not of the MLP.
    gate: the projection that the activation takes in a gated MLP.
    packed: "gate_up" or "up_gate" where `up` has the rows of both, in this order, and gate is None.
    activation: the activation module, a path from the layer.
    activations: the family's own activation classes, by the name that they compute.
    norm: the norm in front of the MLP, given the layer (post-norm layers take another one); None
        where a fused layer calls its norms itself.
    norm_kind, norm_class: what that norm computes, as in MLPConfig, and the class which does.
    pre_norm: whether the residual is what enters that norm, given the layer.
    branch_scale: what a fused layer multiplies attention and MLP by, given the layer.
    branch_norms: the norms of what the attention and of what the MLP adds to the residual, paths;
        they are RMSNorms of norm_class too.
    refuse: the reason why this layer cannot be patched, or None.
    """

    family: str
    layer_class: str
    fused_layer: type[FusedLayer] | None = None
    attention: str | None = None
    mlp: str | None
    mlp_class: str | None = None
    up: str
    down: str
    gate: str | None = None
    packed: str | None = None
    activation: str
    activations: tuple[tuple[str, str], ...] = ()
    norm: Callable[[Any], str | None] | None = None
    norm_kind: str = "layer_norm"
    norm_class: str = "torch.nn.modules.normalization.LayerNorm"
    pre_norm: Callable[[Any], bool] = _pre_norm
    branch_scale: Callable[[Any], float] = _unscaled
    branch_norms: tuple[str, str] | None = None
    refuse: Callable[[Any], str | None] = _supported

    def owner(self, layer: nn.Module) -> nn.Module:
        """The module that the paths of projections are relative to."""
        return layer if self.mlp is None else layer.get_submodule(self.mlp)

    def projections(self, layer: nn.Module) -> Projections:
        """The up, gate and down projection of a layer, patched or not."""
        owner = self.owner(layer)
        gate = None if self.gate is None else owner.get_submodule(self.gate)
        return owner.get_submodule(self.up), gate, owner.get_submodule(self.down)

    @property
    def paths(self) -> list[str]:
        """Of up, gate if there is one, and down."""
        return [path for path in (self.up, self.gate, self.down) if path is not None]

    def norm_name(self, layer: nn.Module) -> str | None:
        """The norm in front of the MLP that a fused layer leaves to its TritonMLP."""
        return None if self.norm is None else self.norm(layer)

    def norms(self, layer: nn.Module) -> dict[str, nn.Module]:
        """All norms that a fused layer leaves to its TritonMLP."""
        names = self.norm_name(layer), *(self.branch_norms or ())
        return {name: layer.get_submodule(name) for name in names if name is not None}

    @property
    def depths(self) -> tuple[str, ...]:
        """How much of a layer can be replaced, the most first."""
        layer = () if self.fused_layer is None else ("layer",)
        return layer if self.mlp is None else (*layer, "mlp")


@lru_cache(maxsize=1)
def specs() -> tuple[MLPSpec, ...]:
    """The specs of all supported families, from the modules of hf_triton_mlp.patches."""
    try:
        package = importlib.import_module("hf_triton_mlp.patches")
    except ModuleNotFoundError as error:
        raise ImportError(
            "hf_triton_mlp.patches is missing: this checkout is not installed; "
            "run `pip install -e .` in it"
        ) from error
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return tuple(spec for module in modules for spec in module.SPECS)
