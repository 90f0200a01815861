"""MLPs that no spec names, found by their children and by what they compute; and those of experts.

A module is read as an MLP only if a copy with small random weights computes the formula, in
float64, at sizes of activations from a thousandth to a million: a limit on them would show.
"""

import copy
import inspect
import itertools
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp.mlp import MLPConfig, TritonMLP
from hf_triton_mlp.reading import has_own_forward, is_plain, read_projection
from hf_triton_mlp.specs import MLPSpec, activation_name, full_name

#: The family of a spec that was made for one MLP.
BY_STRUCTURE = "by structure"

#: Sizes of the small copy, and what it is called with.
HIDDEN, INTERMEDIATE = 6, 10
SHAPES = ((1, 1), (2, 3), (5,))
SCALES = (2.0**-10, 1.0, 2.0**10, 2.0**20)

#: Allows a formula to compute in float32, as the kernels do, and no less.
TOLERANCE = 1e-6

#: The classes of MLPs with a gate or a router that hold their experts otherwise ("JetMoeMoE").
EXPERTS = re.compile(r"(Moe|MoE)(Block|Layer)?$|Sparse(MLP|Moe)")


class FoundMLP(TritonMLP):
    """A TritonMLP that takes the place of an MLP found by structure; `spec` says how."""

    spec: MLPSpec

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args: Tensor, **named: Tensor
    ) -> Tensor:
        """MLP(x), called as the original may be: its argument has a name that is not known here."""
        (input,) = (*args, *named.values())
        return super().forward(input)

    def release(self) -> None:
        self.__dict__.pop("spec", None)
        super().release()


def has_experts(module: nn.Module) -> bool:
    """Whether this is a mixture-of-experts MLP; a layer or an attention with experts is not."""
    names, cls = module._modules.keys(), type(module).__name__
    if "Attention" in cls or any("attn" in name or "attention" in name for name in names):
        return False
    routed = any("gate" in name or "router" in name for name in names)
    return "experts" in names or (routed and EXPERTS.search(cls) is not None)


def experts_spec(module: nn.Module) -> MLPSpec:
    """A spec that says where a mixture-of-experts MLP is, and no more."""
    return MLPSpec(
        family=BY_STRUCTURE,
        layer_class=full_name(type(module)),
        mlp="",
        up="",
        down="",
        activation="",
    )


def read_mlp(module: nn.Module) -> MLPSpec | None:
    """The spec of a module that computes down(act(up(x))) or down(act(gate(x)) * up(x)), or None.

    Its children are two or three plain projections, one activation that is known, and dropout; it
    has no parameters of its own, and its forward takes one tensor.
    """
    parts = _parts(module)
    if parts is None:
        return None
    projections, activation = parts
    for up, gate, down in _roles(projections):
        if _computes(module, up, gate, down, activation):
            cls = full_name(type(module))
            return MLPSpec(
                family=BY_STRUCTURE,
                layer_class=cls,
                mlp="",
                mlp_class=cls,
                up=up,
                gate=gate,
                down=down,
                activation=activation,
            )
    return None


def _parts(module: nn.Module) -> tuple[dict[str, nn.Module], str] | None:
    """The projections of what may be an MLP, and the name of its activation."""
    if not 3 <= len(module._modules) <= 8 or not _takes_one_tensor(module):
        return None
    if next(module.parameters(recurse=False), None) is not None or module._buffers:
        return None
    if has_own_forward(module) or any(hasattr(module, name) for name in _own_names()):
        return None
    projections: dict[str, nn.Module] = {}
    activations: list[str] = []
    for name, child in module._modules.items():
        if child is None or is_plain(child, nn.Dropout, nn.Identity):
            continue
        if read_projection(child) is not None:
            projections[name] = child
        elif activation_name(child) is not None and is_plain(child, type(child)):
            activations.append(name)
        else:
            return None
    if len(activations) != 1:
        return None
    return projections, activations[0]


def _takes_one_tensor(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@lru_cache(maxsize=1)
def _own_names() -> frozenset[str]:
    """What a TritonMLP adds to a module: none of it may be there already."""
    mlp = TritonMLP.inline(MLPConfig(hidden_size=1, intermediate_size=1))
    names = {name for cls in (FoundMLP, TritonMLP) for name in vars(cls)} | vars(mlp).keys()
    names = {name for name in names | {"spec"} if not name.startswith("__")}
    return frozenset(names - vars(nn.Module()).keys() - vars(nn.Module).keys())


def _roles(projections: dict[str, nn.Module]) -> Iterator[tuple[str, str | None, str]]:
    """Which projections may be (up, gate, down): sizes H -> I -> H, and biases alike."""
    shapes, biased = {}, {}
    for name, projection in projections.items():
        weight, bias = read_projection(projection) or (None, None)
        assert weight is not None
        shapes[name], biased[name] = tuple(weight.shape), bias is not None
    if len(projections) == 2:
        for up, down in itertools.permutations(projections):
            if shapes[up] == shapes[down][::-1]:
                yield up, None, down
    elif len(projections) == 3:
        for up, gate, down in itertools.permutations(projections):
            alike = shapes[up] == shapes[gate] and biased[up] == biased[gate]
            if alike and shapes[up] == shapes[down][::-1]:
                yield up, gate, down


@torch.inference_mode(False)
@torch.no_grad()
def _computes(module: nn.Module, up: str, gate: str | None, down: str, activation: str) -> bool:
    """Whether a small random copy of a module computes the formula with these roles."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        twin: Any = copy.copy(module)
        twin.__dict__["_modules"] = {
            name: child and copy.copy(child) for name, child in module._modules.items()
        }
        for name in (up, gate, down):
            if name is not None:
                twin._modules[name] = _small(getattr(module, name), name == down, generator)
        twin.eval()
        for shape, scale in itertools.product(SHAPES, SCALES):
            x = scale * torch.randn(
                (*shape, HIDDEN), generator=generator, device="cpu", dtype=torch.float64
            )
            given = x.clone()
            try:
                with torch.autocast("cpu", enabled=False):
                    found = twin.forward(given)
            except Exception:  # whatever a stranger's code raises: it is not this formula
                return False
            act = getattr(twin, activation)
            inner = getattr(twin, up)(x)
            inner = act(inner) if gate is None else act(getattr(twin, gate)(x)) * inner
            expected = getattr(twin, down)(inner)
            if type(found) is not Tensor or found.shape != expected.shape:
                return False
            if found.dtype != expected.dtype or not torch.equal(given, x):
                return False
            if not (found - expected).norm() <= TOLERANCE * expected.norm():
                return False
    return True


def _small(projection: nn.Module, is_down: bool, generator: torch.Generator) -> nn.Module:
    """A projection of the same class, small and random, in float64 on the CPU."""
    size = (INTERMEDIATE, HIDDEN) if is_down else (HIDDEN, INTERMEDIATE)
    read = read_projection(projection)
    assert read is not None
    if type(projection) is Conv1D:
        made = Conv1D(size[1], size[0])
        shapes = {"weight": size, "bias": size[1:]}
    else:
        made = nn.Linear(*size, bias=read[1] is not None, device="meta")
        shapes = {"weight": size[::-1], "bias": size[1:]}
    for name, shape in shapes.items():
        if getattr(made, name) is not None:
            drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
            setattr(made, name, nn.Parameter(drawn, requires_grad=False))
    return made.train(False)
