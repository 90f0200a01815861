"""The decoder layers of a model that have an MLP which is known: found, and selected."""

import fnmatch
from collections.abc import Iterable, Iterator

from torch import nn

from hf_triton_mlp import structure
from hf_triton_mlp.specs import MLPSpec, full_name, short, specs


def decoder_layers(
    model: nn.Module, search: bool = False
) -> Iterator[tuple[str, nn.Module, MLPSpec]]:
    """Every layer of a supported class in `model`, patched or not, with its qualified name.

    Also every mixture-of-experts MLP, and every MLP that was found by its structure and patched.
    search: where no layer is of a supported class, find the others by their structure too.
    """
    by_class = {spec.layer_class: spec for spec in specs()}

    def of_family(module: nn.Module) -> MLPSpec | None:
        found = (by_class.get(full_name(cls)) for cls in type(module).__mro__)
        return next((spec for spec in found if spec is not None), None)

    search = search and all(of_family(module) is None for module in model.modules())
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        spec = of_family(module)
        if spec is None and isinstance(module, structure.FoundMLP):
            spec = module.spec
        if spec is None and structure.has_experts(module):
            spec = structure.experts_spec(module)
        if spec is None and search and "experts" not in name.split("."):
            spec = structure.read_mlp(module)
        if spec is not None:
            yield name, module, spec
            mlp = mlp_of(module, spec)
            inside.update(() if mlp is None else mlp.modules())


def supported_layers(model: nn.Module, search: bool = True) -> list[tuple[str, nn.Module, MLPSpec]]:
    """decoder_layers; ValueError when there is none that can be patched."""
    found = list(decoder_layers(model, search))
    if all(experts_of(layer, spec) for _, layer, spec in found):
        raise not_supported(model, found)
    return found


def not_supported(model: nn.Module, found: Iterable[tuple[str, nn.Module, MLPSpec]]) -> ValueError:
    experts = dict.fromkeys(experts_of(layer, spec) for _, layer, spec in found)
    names = ", ".join(name for name in experts if name is not None)
    reason = names and f"; mixture-of-experts MLPs ({names}) are not supported"
    supported = ", ".join(f"{spec.family} ({short(spec.layer_class)})" for spec in specs())
    return ValueError(
        f"{type(model).__name__} has no decoder layer that hf_triton_mlp supports{reason}; "
        f"supported: {supported}"
    )


def mlp_of(layer: nn.Module, spec: MLPSpec) -> nn.Module | None:
    """The MLP module of a layer; where it has none there is one only while it is patched."""
    return layer if spec.mlp == "" else layer._modules.get(spec.mlp or "mlp")


def experts_of(layer: nn.Module, spec: MLPSpec) -> str | None:
    """The class of a layer's mixture-of-experts MLP, which is left alone; None for another MLP."""
    mlp = mlp_of(layer, spec)
    return type(mlp).__name__ if mlp is not None and structure.has_experts(mlp) else None


def by_structure(spec: MLPSpec) -> bool:
    return spec.family == structure.BY_STRUCTURE


def select(
    names: list[str],
    include: Iterable[str | int] | None,
    exclude: Iterable[str | int] | None,
) -> set[str]:
    def matching(argument: str, selectors: Iterable[str | int]) -> set[str]:
        if isinstance(selectors, str):
            selectors = [selectors]
        matched: set[str] = set()
        for selector in selectors:
            if isinstance(selector, int):
                hits = names[selector : selector + 1 or None]
            else:
                hits = fnmatch.filter(names, selector)
            if not hits:
                raise ValueError(
                    f"{argument} names {selector!r}, which matches no layer; "
                    f"there are {len(names)}, from {names[0]!r} to {names[-1]!r}"
                )
            matched.update(hits)
        return matched

    chosen = set(names) if include is None else matching("include", include)
    if exclude is not None:
        chosen -= matching("exclude", exclude)
    if not chosen:
        raise ValueError("include and exclude leave no layer to patch")
    return chosen


def mlp_projections(
    model: nn.Module,
    *,
    include: Iterable[str | int] | None = None,
    exclude: Iterable[str | int] | None = None,
) -> list[str]:
    """The qualified names of the projections of MLPs, which may be on the meta device.

    include, exclude: layers, as for patch_model. Raises ValueError as patch_model does where there
    are none.
    """
    found = supported_layers(model)
    layers = select([name for name, _, _ in found], include, exclude)
    return projection_names(
        model, [each for each in found if each[0] in layers and experts_of(*each[1:]) is None]
    )


def projection_names(
    model: nn.Module, layers: Iterable[tuple[str, nn.Module, MLPSpec]]
) -> list[str]:
    """`mlp_projections` of these layers, in the order of the model's modules."""
    projections = {each for _, layer, spec in layers for each in spec.projections(layer)}
    return [name for name, module in model.named_modules() if module in projections]
