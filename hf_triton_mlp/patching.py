"""patch_model: find the MLP of every decoder layer, check them all, then replace them all."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging

from hf_triton_mlp import decoding, parallel, proof, shared_model, structure
from hf_triton_mlp.density import hidden_densities
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.kernels.activations import ACTIVATIONS, SPARSE
from hf_triton_mlp.launchers import linear_of, plan_linear
from hf_triton_mlp.layers import (
    by_structure,
    decoder_layers,
    experts_of,
    mlp_of,
    not_supported,
    projection_names,
    select,
    supported_layers,
)
from hf_triton_mlp.linear import QuantizedLinear, quantized_linears
from hf_triton_mlp.mlp import (
    FusedLayer,
    MLPConfig,
    TritonMLP,
    change_class,
    check_projections,
    stand_in,
)
from hf_triton_mlp.ops import DTYPES
from hf_triton_mlp.quantization import QuantizationConfig, same_format
from hf_triton_mlp.quantizer import check_quantizable, quantization_of, record
from hf_triton_mlp.ranks import RankError, Ranks, ranks_of, together
from hf_triton_mlp.reading import (
    has_own_forward,
    is_offloaded,
    is_plain,
    is_shard,
    read_branch_norm,
    read_epsilon,
    read_norm,
    read_place,
    read_projection,
    split_packed,
    store_as_before,
)
from hf_triton_mlp.specs import MLPSpec, activation_name, full_name, short
from hf_triton_mlp.tuning import Linear, check_capability, pays_to_skip

Model = TypeVar("Model", bound=nn.Module)

#: What holds a part of a tensor; by name, since not all builds of PyTorch have it.
DTENSOR = "torch.distributed.tensor.DTensor"

#: How PyTorch, Triton and cuBLAS say that a GPU is full.
NO_MEMORY = ("out of memory", "ALLOC_FAILED")

VERIFYING = "verifying the patch"


@dataclass(frozen=True)
class PatchRow:
    """One decoder layer in a PatchReport; `reason` says why it was not replaced or not fused.

    In a model of which no spec names a layer it is the MLP itself, found by its structure.

    verified: "yes", "yes, by structure", or "no" where nothing was compared: without verify, on the
    meta device, where parts are called, not read, and where there was no memory for a wider copy.
    weights: the format of quantized ones (and of rows that become fp8 too), their bytes as they
    were and as they are; else "".
    density: what part of the MLP's hidden values was not 0, where those that are get skipped.
    part: whose part of the weights these are, where ranks share them.
    """

    layer: str
    replaced: str
    dtype: str
    device: str
    plan: str
    verified: str
    reason: str
    weights: str = ""
    density: str = ""
    part: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What is patched in a model, layer by layer, and how generate() decodes."""

    rows: tuple[PatchRow, ...]
    decoding: str = ""

    def __str__(self) -> str:
        header = ("layer", "replaced", "dtype", "device", "plan", "verified", "reason")
        if any(row.weights for row in self.rows):
            header = (*header[:3], "weights", *header[3:])
        if any(row.density for row in self.rows):
            header = (*header[:-2], "density", *header[-2:])
        if any(row.part for row in self.rows):
            header = (*header[:2], "part", *header[2:])
        table = [header, *(tuple(getattr(row, name) for name in header) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table)
        return "\n".join((*(line.rstrip() for line in lines), *filter(None, [self.decoding])))


@dataclass(frozen=True)
class _Swap:
    """One checked replacement: nothing in the model has changed yet."""

    spec: MLPSpec
    name: str
    layer: nn.Module
    config: MLPConfig
    depth: str
    quantization: QuantizationConfig | None = None
    density: float | None = None
    ranks: Ranks | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What layers have in common of which one stands for all."""
        projections = self.spec.projections(self.layer)
        formats = [p.config if isinstance(p, QuantizedLinear) else None for p in projections]
        return self.spec, self.config, self.quantization, self.density is None, *formats


def patch_model(
    model: Model,
    *,
    include: Iterable[str | int] | None = None,
    exclude: Iterable[str | int] | None = None,
    depth: str = "layer",
    verify: bool = True,
    cuda_graphs: bool = False,
    quantization: str | QuantizationConfig | None = None,
    keep_originals: bool = False,
    sparsity: str = "auto",
    mp_group: Any = None,
) -> Model:
    """Replace the MLP of every supported decoder layer by TritonMLP, in place; returns `model`.

    include, exclude: layers by position or by qualified name ("transformer.h.0"; fnmatch patterns).
    depth: "layer" fuses attention residual, norm, MLP and residual into one call, where the family
    has such a layer (`patch_report` says it); "mlp" replaces the MLP module alone.
    verify: compare one layer of each kind with the original first, on a random token: a copy of it
    without its attention, in the model's dtype and in a wider one. In a model of which no family's
    spec names a layer, the MLPs found by their structure are replaced if they pass, and only then.
    cuda_graphs: let `model.generate()` replay its decode steps from CUDA graphs, with transformers'
    own results; what cannot be captured runs transformers' loop, and a log line says why.
    quantization: quantize the projections, "int8", "int4" and "fp8" with TritonMLPConfig's other
    values: one after the other on its device, with a progress bar of transformers' kind. The model
    is then as one that was loaded with a TritonMLPConfig. verify compares with what the quantized
    weights stand for; where rows become fp8 too, with rows that are rounded alike.
    keep_originals: keep what is quantized on the CPU, so that unpatch_model can put it back.
    sparsity: "auto": where the activation is ReLU or its square, exact zeros are not multiplied in
    decode steps, and the weights that they would multiply not read, in those layers where that is
    faster: the model computes a few random tokens first, and tells how many values are zeros. Their
    down projections lie in memory as (in, out) then, as they do not with "off".
    mp_group: a torch.distributed.ProcessGroup whose ranks share the weights of the MLPs: each keeps
    a part of the intermediate size, and all results are added up once a layer. The rest of the
    model, and what it computes, is the same on each rank. All ranks call this with the same
    arguments, and so they do with whatever runs the model, and with unpatch_model, state_dict and
    save_pretrained, which gather the weights. Ranks whose models or arguments differ are refused,
    an error on one is an error on all, and a rank that dies ends the others' calls with an error:
    with gloo at once, else after the group's timeout.

    Weights are moved, not copied; state_dict keys stay as they are, but for quantized weights.
    Every layer is checked before any is replaced, so that an error leaves the model as it was;
    where it comes while weights are quantized (an interrupt, say), those that are stay so, unless
    originals are kept. Layers that are already patched stay as they are, but for their weights,
    which nothing is compared with then, and so do mixture-of-experts MLPs.

    Raises ValueError when no layer is supported, or a layer cannot be patched faithfully (when
    verified, with more than twice torch's own error) or not quantized (weights that are not finite,
    shared, adapted, offloaded or on the meta device) or not shared by ranks (sizes that they do not
    divide, adapted, offloaded), and RuntimeError for a GPU older than compute capability 8.0 and
    for an error on another rank.
    """
    ranks = ranks_of(mp_group)
    with together(ranks, "checking the model"):
        config = None if quantization is None else quantization_of(quantization)
        if depth not in ("layer", "mlp"):
            raise ValueError(f'depth must be "layer" or "mlp", found {depth!r}')
        if sparsity not in ("auto", "off"):
            raise ValueError(f'sparsity must be "auto" or "off", found {sparsity!r}')
        if cuda_graphs:
            decoding.generating(model)  # or an error, before anything is replaced
        found = supported_layers(model, search=verify)
        names = select([name for name, _, _ in found], include, exclude)
        chosen = [each for each in found if each[0] in names and experts_of(*each[1:]) is None]
        if not chosen:
            raise ValueError(
                "include and exclude leave no layer to patch: mixture-of-experts MLPs are not "
                "supported"
            )
        if config is not None:
            check_quantizable(model, projection_names(model, chosen), config)
        swaps = [
            _check_layer(spec, name, layer, depth, config)
            for name, layer, spec in chosen
            if not _is_patched(name, layer, spec, depth, ranks, config)
        ]
        if ranks is not None:
            swaps = [_shared(model, swap, ranks) for swap in swaps]
    if ranks is not None:
        kinds = {swap.name: f"{swap.spec.layer_class}, {swap.config}" for swap in swaps}
        arguments = {
            "depth": depth,
            "verify": verify,
            "cuda_graphs": cuda_graphs,
            "quantization": str(config),
            "keep_originals": keep_originals,
            "sparsity": sparsity,
        }
        ranks.agree({**arguments, **kinds, **_checksums(model)}, "comparing the models")
    if sparsity == "auto":
        swaps = _skipping_zeros(model, swaps, ranks)
    verified = _verify(swaps, ranks) if verify else set()
    proven = [swap for swap in swaps if swap.name in verified or not by_structure(swap.spec)]
    if not proven and len(swaps) == len(chosen):
        raise not_supported(model, found)
    unproven = {swap.name for swap in swaps} - {swap.name for swap in proven}
    swaps = proven
    layers = [(layer, spec) for name, layer, spec in chosen if name not in unproven]
    kept = {layer: {} for layer, _ in layers}
    all_quantized = False
    try:
        with together(ranks, "quantizing the weights"):
            if config is not None:
                for layer, spec in logging.tqdm(layers, desc="Quantizing MLPs", disable=None):
                    _quantize(layer, spec, config, kept[layer], keep_originals)
        all_quantized = True
        with together(ranks, "replacing the MLPs"):
            for swap in swaps:
                _install(swap).verified = swap.name in verified
    except BaseException:  # no memory for one weight, or interrupted
        if all_quantized:  # else no rank has come to where it keeps a part
            for swap in swaps:
                _gather(swap)
        for layer, spec in layers:
            _restore(spec.owner(layer), kept[layer])
        for swap in swaps:
            _uninstall(swap.layer, swap.spec)
        record(model)
        raise
    new = {swap.layer for swap in swaps}
    for layer, spec in layers:
        mlp = _triton_mlp(layer, spec)
        assert mlp is not None
        mlp.originals = {**mlp.originals, **kept[layer]}
        if kept[layer] and layer not in new:  # what was compared has other weights
            mlp.verified = False
    if config is not None:
        record(model)
    shared_model.update(model)
    if cuda_graphs:
        decoding.enable(model)
    return model


def skip_zeros(model: nn.Module) -> None:
    """Do what `sparsity="auto"` says in layers that were patched before they had weights.

    All ranks that share them call it.
    """
    patched = {
        name: (_Swap(spec, name, layer, mlp.mlp_config, "", ranks=mlp.ranks), mlp)
        for name, layer, spec in decoder_layers(model)
        if (mlp := _triton_mlp(layer, spec)) is not None and mlp.density is None
    }
    ranks = next((swap.ranks for swap, _ in patched.values()), None)
    for swap in _skipping_zeros(model, [swap for swap, _ in patched.values()], ranks):
        if swap.density is not None:
            _, mlp = patched[swap.name]
            mlp.skip_zeros(swap.spec.projections(swap.layer)[2], swap.density)


def unpatch_model(model: Model) -> Model:
    """Put the original modules and classes back, the same objects; returns `model`.

    Layers that were quantized before they were patched stay quantized. Raises ValueError, and
    changes nothing, where patch_model has quantized weights and not kept them; after
    `model.dequantize()` the layers have those that the quantized ones stood for.
    """
    found = list(decoder_layers(model))
    gone = [name for name, layer, spec in found if _originals_gone(layer, spec)]
    if gone:
        raise ValueError(
            f"the weights of {', '.join(gone)} were quantized by patch_model and not kept, for "
            "which there is keep_originals=True; model.dequantize() gives layers of the weights "
            "that the quantized ones stand for, and unpatch_model the rest"
        )
    for _, layer, spec in found:
        _uninstall(layer, spec)
    record(model)
    decoding.disable(model)
    shared_model.update(model)
    return model


@contextmanager
def patched(
    model: Model,
    *,
    include: Iterable[str | int] | None = None,
    exclude: Iterable[str | int] | None = None,
    depth: str = "layer",
    verify: bool = True,
    cuda_graphs: bool = False,
    quantization: str | QuantizationConfig | None = None,
    sparsity: str = "auto",
    mp_group: Any = None,
) -> Iterator[Model]:
    """Patch `model` for a with block, and leave it as it was; arguments as for patch_model."""
    before = {
        layer: dict(mlp.originals)
        for _, layer, spec in decoder_layers(model)
        if (mlp := _triton_mlp(layer, spec)) is not None
    }
    enabled = decoding.is_enabled(model)
    patch_model(
        model,
        include=include,
        exclude=exclude,
        depth=depth,
        verify=verify,
        cuda_graphs=cuda_graphs,
        quantization=quantization,
        keep_originals=True,
        sparsity=sparsity,
        mp_group=mp_group,
    )
    try:
        yield model
    finally:
        if not enabled:
            decoding.disable(model)
        for _, layer, spec in list(decoder_layers(model)):
            mlp = _triton_mlp(layer, spec)
            if layer not in before:
                _uninstall(layer, spec)
            elif mlp is not None:
                added = mlp.originals.keys() - before[layer].keys()
                _restore(spec.owner(layer), {path: mlp.originals.pop(path) for path in added})
        record(model)
        shared_model.update(model)


def patch_report(model: nn.Module) -> PatchReport:
    """What is replaced in `model` right now, and why the rest is not."""
    rows = tuple(_row(*found) for found in decoder_layers(model, search=True))
    return PatchReport(rows, decoding.report(model))


def mlp_configs(model: nn.Module) -> list[MLPConfig]:
    """The different MLPs of an unpatched model; raises ValueError as patch_model does."""
    swaps = [
        _check_layer(spec, name, layer, "layer")
        for name, layer, spec in supported_layers(model)
        if experts_of(layer, spec) is None
    ]
    return list(dict.fromkeys(swap.config for swap in swaps))


def relu_projections(model: nn.Module) -> dict[str, nn.Module]:
    """The down projections behind ReLU, or its square, in an unpatched model, by layer.

    Raises ValueError as patch_model does.
    """
    swaps = [
        _check_layer(spec, name, layer, "layer")
        for name, layer, spec in supported_layers(model)
        if experts_of(layer, spec) is None
    ]
    return {
        swap.name: swap.spec.projections(swap.layer)[2]
        for swap in swaps
        if swap.config.activation in SPARSE
    }


# --- check ------------------------------------------------------------------------------------


def _triton_mlp(layer: nn.Module, spec: MLPSpec) -> TritonMLP | None:
    mlp = mlp_of(layer, spec)
    return mlp if isinstance(mlp, TritonMLP) else None


def _depth(spec: MLPSpec, wanted: str) -> str:
    return "mlp" if spec.fused_layer is None else wanted


def _is_patched(
    name: str,
    layer: nn.Module,
    spec: MLPSpec,
    depth: str,
    ranks: Ranks | None,
    quantization: QuantizationConfig | None,
) -> bool:
    mlp = _triton_mlp(layer, spec)
    if mlp is None:
        return False
    if mlp.ranks != ranks:
        group = "without an mp_group" if mlp.ranks is None else "with another mp_group, or with one"
        raise ValueError(f"{name} is already patched, {group}; call unpatch_model first")
    if ranks is not None and quantization is not None:
        raise ValueError(
            f"{name} is already patched, and its weights are shared by {ranks.size} ranks; call "
            "unpatch_model first to quantize them"
        )
    present = "layer" if isinstance(layer, FusedLayer) else "mlp"
    if present != _depth(spec, depth):
        raise ValueError(
            f"{name} is already patched with depth={present!r}; call unpatch_model first to use "
            f"depth={depth!r}"
        )
    return True


def _check_layer(
    spec: MLPSpec,
    name: str,
    layer: nn.Module,
    depth: str,
    quantization: QuantizationConfig | None = None,
) -> _Swap:
    """Everything that could go wrong with a layer goes wrong here, before any is changed."""
    depth = _depth(spec, depth)
    _check_whole(spec, name, layer)
    if depth == "mlp" and spec.mlp is None:
        raise ValueError(
            f"{name}: {short(spec.layer_class)} computes its MLP inline, so there is no module "
            f'to replace; use depth="layer"'
        )
    if full_name(type(layer)) != spec.layer_class:
        raise ValueError(
            f"{name} is a {type(layer).__name__}, a subclass of {short(spec.layer_class)} whose "
            "forward may differ; supported is the class itself"
        )
    reason = spec.refuse(layer)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    _check_forward(name, layer)
    if spec.mlp is not None:
        mlp = layer.get_submodule(spec.mlp)
        if full_name(type(mlp)) != spec.mlp_class:
            raise ValueError(
                f"{name}.{spec.mlp} is a {type(mlp).__name__}; "
                f"supported: {short(spec.mlp_class or '')}"
            )
        _check_forward(f"{name}.{spec.mlp}", mlp)

    up, gate, down = spec.projections(layer)
    fused = depth == "layer"
    norms = spec.norms(layer) if fused else {}
    hidden, intermediate = _sizes(name, up, down, norms, packed=spec.packed is not None)
    epsilon = next(map(read_epsilon, norms.values()), None)
    dtype, device = read_place(up) or (torch.float32, torch.device("cpu"))
    if device.type == "cuda":
        check_capability(torch.cuda.get_device_capability(device))
    config = MLPConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        dtype=dtype if dtype in DTYPES else torch.float32,
        activation=_activation_name(spec, name, layer),
        gated=gate is not None or spec.packed is not None,
        norm=spec.norm_kind if fused and spec.norm_name(layer) is not None else None,
        norm_eps=1e-5 if epsilon is None else epsilon,
        pre_norm=spec.pre_norm(layer),
        branch_scale=spec.branch_scale(layer) if fused else 1.0,
        branch_norm=spec.norm_kind if fused and spec.branch_norms is not None else None,
        up_bias=getattr(up, "bias", None) is not None,
        down_bias=getattr(down, "bias", None) is not None,
    )
    try:
        check_projections(config, (up, gate, down), spec.packed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if quantization is None and gate is not None:
        up_read, gate_read = read_projection(up), read_projection(gate)
        if up_read and gate_read and not same_format(up_read[0], gate_read[0]):
            raise ValueError(
                f"{name}: {spec.up} and {spec.gate} are not quantized alike; patch_model(…, "
                "quantization=…) quantizes both"
            )
    return _Swap(spec, name, layer, config, depth, quantization)


def _shared(model: nn.Module, swap: _Swap, ranks: Ranks) -> _Swap:
    """The swap for ranks that share its weights; ValueError where they cannot."""
    spec, name = swap.spec, swap.name
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for path in spec.paths:
        projection = spec.owner(swap.layer).get_submodule(path)
        if read_projection(projection) is None:
            raise ValueError(
                f"{name}: {path}, a {type(projection).__name__}, cannot be shared by ranks; "
                "supported: plain Linear, Conv1D and QuantizedLinear without hooks and adapters"
            )
        if any(holders[id(p)] > 1 for p in projection._parameters.values() if p is not None):
            raise ValueError(f"{name}: {path} has a weight that is another module's too")
    down = spec.projections(swap.layer)[2]
    try:
        parallel.check_parts(down, swap.config.intermediate_size, ranks.size, swap.quantization)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return replace(swap, ranks=ranks)


def _checksums(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """What tells one model's parameters and buffers from another's, but for shared ones."""
    found = {}
    for prefix, module in model.named_modules():
        if is_shard(module):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                values = str(tensor.dtype), tuple(tensor.shape), _checksum(tensor)
                found[f"{prefix}.{name}"] = values
    return found


def _checksum(tensor: torch.Tensor) -> int:
    """The sum of a plain tensor's bits, taken as integers, in any order."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    if tensor.is_meta or not plain:
        return 0
    return int(shared_model.bits_of(tensor).sum(dtype=torch.int64))


def _called_norms(spec: MLPSpec, layer: nn.Module, config: MLPConfig) -> list[str]:
    """The norms of a fused layer that the kernels do not read."""
    cls, found = _norm_class(spec) or nn.Module, []
    for name, norm in spec.norms(layer).items():
        read = read_branch_norm if name in (spec.branch_norms or ()) else read_norm
        if read(norm, cls, config.norm_eps) is None:
            found.append(f"{name} ({'offloaded' if is_offloaded(norm) else type(norm).__name__})")
    return found


def _norm_class(spec: MLPSpec) -> type[nn.Module] | None:
    """spec.norm_class, which is loaded where its family is; None if it is not."""
    module, _, name = spec.norm_class.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _check_whole(spec: MLPSpec, name: str, layer: nn.Module) -> None:
    """Refuse weights of which this process holds a part, by somebody else's rules."""
    for path, parameter in layer.named_parameters():
        outside = spec.attention is None or not path.startswith(f"{spec.attention}.")
        if outside and full_name(type(parameter)) == DTENSOR:
            tensor: Any = parameter
            placed = " ".join(map(str, tensor.placements))
            raise _sharded(f"{name}: {path} is a DTensor, {placed}")


def _sharded(found: str) -> ValueError:
    return ValueError(
        f"{found}: the model is sharded, by transformers (tp_plan) or FSDP, say; supported are "
        "whole weights, which patch_model(..., mp_group=...) shards, and FSDP around a model that "
        "is patched already"
    )


def _check_forward(name: str, module: nn.Module) -> None:
    """A forward replaced on the instance would be lost; accelerate's hooks keep theirs."""
    if has_own_forward(module) and not hasattr(module, "_hf_hook"):
        raise ValueError(
            f"{name} has a forward of its own, set on the instance, which a patch would bypass; "
            "remove it first"
        )


def _sizes(
    name: str, up: nn.Module, down: nn.Module, norms: dict[str, nn.Module], *, packed: bool
) -> tuple[int, int]:
    """(hidden, intermediate) from the plain projections, or from what wrappers tell."""
    up_read, down_read = read_projection(up), read_projection(down)
    if up_read is not None:
        if len(up_read[0].shape) != 2:  # of the first FSDP, with use_orig_params
            raise _sharded(f"{name}: a weight is {tuple(up_read[0].shape)}, not a matrix")
        intermediate, hidden = up_read[0].shape
        intermediate //= 1 + packed
    elif down_read is not None:
        hidden, intermediate = down_read[0].shape
    else:
        hidden = getattr(up, "in_features", getattr(up, "nx", None))
        intermediate = getattr(up, "out_features", getattr(up, "nf", None))
        if isinstance(intermediate, int):
            intermediate //= 1 + packed
    if not isinstance(hidden, int) or not isinstance(intermediate, int):
        raise ValueError(
            f"{name}: the sizes of the up projection ({type(up).__name__}) are unknown; "
            "supported: Linear, Conv1D and wrappers with in_features and out_features"
        )
    for norm in norms.values():
        shape = getattr(getattr(norm, "weight", None), "shape", (hidden,))
        normalized = getattr(norm, "normalized_shape", shape)
        if tuple(normalized) != (hidden,):
            raise ValueError(
                f"{name}: mismatched shapes: the norm has {tuple(normalized)}, "
                f"the up projection takes {hidden}"
            )
    return hidden, intermediate


def _activation_name(spec: MLPSpec, name: str, layer: nn.Module) -> str:
    activation = _get(layer, spec.activation)
    known = activation_name(activation, spec.activations)
    if known is None:
        raise ValueError(
            f"{name}: unknown activation {type(activation).__name__}; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    return known


def _get(layer: nn.Module, path: str) -> Any:
    value = layer
    for part in path.split("."):
        value = getattr(value, part)
    return value


# --- verify -----------------------------------------------------------------------------------


def _verify(swaps: list[_Swap], ranks: Ranks | None) -> set[str]:
    """The layers whose patch computes what they do, shown by the first of each kind.

    Those that cannot be shown are left out; ValueError for one that computes something else, unless
    it was a guess, by structure.
    """
    readable = [swap for swap in swaps if _readable(swap)]
    first: dict[Any, _Swap] = {}
    for swap in readable:
        first.setdefault(swap.kind, swap)
    proven = set()
    for kind, swap in first.items():
        try:
            with together(ranks, VERIFYING):
                shown = _prove(swap)
            if ranks is None or all(ranks.exchange(shown, VERIFYING)):
                proven |= {kind} if shown else set()
        except (ValueError, RankError):
            if not by_structure(swap.spec):
                raise
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the copies may have been large
    return {swap.name for swap in readable if swap.kind in proven}


def _readable(swap: _Swap) -> bool:
    """Whether the kernels would read this layer's weights, and a copy of it may be called."""
    spec, layer = swap.spec, swap.layer
    for projection in spec.projections(layer):
        if projection is None:
            continue
        dtype, device = read_place(projection) or (None, None)
        read = read_projection(projection)
        if read is None or dtype is not swap.config.dtype or device == torch.device("meta"):
            return False
    if swap.depth == "mlp":
        return proof.can_run(layer.get_submodule(spec.mlp or ""), None)
    if _called_norms(spec, layer, swap.config):
        return False
    return proof.can_run(layer, spec.attention)


def _quantized(swap: _Swap) -> dict[nn.Module, nn.Module]:
    """What the projections of a layer are going to be replaced by."""
    if swap.quantization is None:
        return {}
    return {
        projection: QuantizedLinear.from_linear(projection, swap.quantization)
        for projection in swap.spec.projections(swap.layer)
        if projection is not None and not isinstance(projection, QuantizedLinear)
    }


def _prove(swap: _Swap) -> bool:
    """Whether a patched copy of a layer computes what the layer does; False: cannot be told.

    ValueError when it computes something else. Weights may be anything before they are loaded:
    where the layer itself returns NaN or infinity nothing can be told.
    """
    spec, layer, name, dtype = swap.spec, swap.layer, swap.name, swap.config.dtype
    place = read_place(spec.projections(layer)[0])
    assert place is not None
    like = torch.empty((0, swap.config.hidden_size), dtype=place[0], device=place[1])
    quantized = _quantized(swap)
    try:
        if swap.depth == "layer":
            module, attention = layer, spec.attention
            install = lambda twin: _install(replace(swap, layer=twin))  # noqa: E731
            unpatch = lambda twin: _uninstall(twin, spec)  # noqa: E731
        else:
            module, attention = layer.get_submodule(spec.mlp or ""), None
            install = lambda twin: _adopt(swap, twin)  # noqa: E731
            unpatch = lambda twin: _release(twin, spec)  # noqa: E731
        normed = swap.config.branch_norm is not None
        scales = proof.NORMED_SCALES if normed else proof.SCALES
        in_codes = quantized or any(
            isinstance(each, QuantizedLinear) for each in spec.projections(layer)
        )
        rows = proof.QUANTIZED_ROWS if in_codes else (1,)

        def patch(twin: nn.Module) -> TritonMLP:
            mlp = install(twin)
            if swap.ranks is not None:
                swap.ranks.meet(VERIFYING)  # before they add up what they compute
            return mlp

        errors = proof.errors(module, attention, like, patch, unpatch, scales, quantized, rows)
    except RankError:
        raise
    except Exception as error:
        if swap.ranks is None and any(text in str(error) for text in NO_MEMORY):
            return False
        raise ValueError(
            f"{name}: a copy of it cannot be run to verify its patch ({type(error).__name__}: "
            f"{error}); verify=False leaves that out"
        ) from error
    if not all(math.isfinite(own) for _, own, _ in errors):
        return False
    for found, own, rounding in errors:
        if not proof.within_bound(found, own, dtype, rounding):
            raise ValueError(
                f"{name}: a {type(module).__name__} computes something else than TritonMLP would: "
                f"on random tokens the error is {found:.2e}, that of torch in {dtype} is {own:.2e}"
            )
    return True


def _skipping_zeros(model: nn.Module, swaps: list[_Swap], ranks: Ranks | None) -> list[_Swap]:
    """The swaps, with the densities of those whose zeros it pays to skip; alike on all ranks."""

    def down_of(swap: _Swap) -> tuple[nn.Module, Linear | None]:
        """The down projection, and what it is for one row; None where nothing can be skipped."""
        down = swap.spec.projections(swap.layer)[2]
        read = read_projection(down)
        if read is None or read[0].device.type != ("cpu" if INTERPRETED else "cuda"):
            return down, None
        linear, config = linear_of(1, read[0], False, swap.config.dtype), swap.quantization
        if ranks is not None and not is_shard(down):
            linear = linear._replace(K=linear.K // ranks.size)
        if isinstance(down, QuantizedLinear):
            config = down.config
        if config is not None:
            linear = linear._replace(format=config.format)
        return down, None if config is not None and config.activations else linear

    could = {
        swap.name: (down, linear)
        for swap in swaps
        if swap.config.activation in SPARSE
        for down, linear in [down_of(swap)]
        if linear is not None and pays_to_skip(linear, 0.0)
    }
    downs = {name: down for name, (down, _) in could.items()}
    densities = hidden_densities(model, downs) if could else {}
    if ranks is not None:  # of the part that each has, where they have parts
        each = ranks.exchange(densities, "counting zeros")
        known = [name for name in densities if all(name in one for one in each)]
        densities = {name: sum(one[name] for one in each) / ranks.size for name in known}
    found = {
        name: density
        for name, density in densities.items()
        if pays_to_skip(could[name][1], density)
    }
    return [replace(swap, density=found.get(swap.name)) for swap in swaps]


# --- replace, and the way back ----------------------------------------------------------------


def _install(swap: _Swap) -> TritonMLP:
    layer, spec = swap.layer, swap.spec
    if spec.mlp is None:
        activation = _get(layer, spec.activation)
        mlp = TritonMLP.inline(swap.config, activation, _norm_class(spec))
        layer.add_module("mlp", mlp.train(layer.training))
        _share(swap, layer, mlp)
        if swap.density is not None:
            mlp.skip_zeros(spec.projections(layer)[2], swap.density)
    else:
        mlp = _adopt(swap, layer.get_submodule(spec.mlp))
    if swap.depth == "layer":
        assert spec.fused_layer is not None
        change_class(layer, stand_in(spec.fused_layer, type(layer)))
    return mlp


def _adopt(swap: _Swap, mlp: Any) -> TritonMLP:
    """Turn the MLP module of a layer into a TritonMLP."""
    spec = swap.spec
    norm_class = _norm_class(spec) if swap.depth == "layer" else None
    names = {"up": spec.up, "gate": spec.gate, "down": spec.down, "packed": spec.packed}
    kind = structure.FoundMLP if by_structure(spec) else TritonMLP
    stand_in(kind, type(mlp)).adopt(mlp, swap.config, **names, norm_class=norm_class)
    if isinstance(mlp, structure.FoundMLP):
        mlp.spec = spec
    _share(swap, mlp, mlp)
    if swap.density is not None:
        mlp.skip_zeros(mlp.get_submodule(spec.down), swap.density)
    return mlp


def _share(swap: _Swap, owner: nn.Module, mlp: TritonMLP) -> None:
    """Leave this rank's part of the projections of an MLP."""
    ranks, spec = swap.ranks, swap.spec
    if ranks is None:
        return
    mlp.ranks = ranks
    for path in spec.paths:
        projection = owner.get_submodule(path)
        if not is_shard(projection):
            blocks = 1 if spec.packed is None or path == spec.down else 2
            parallel.shard(projection, parallel.Part(ranks, int(path == spec.down), blocks))


def _gather(swap: _Swap) -> None:
    """Have the whole projections again, also where not all ranks have come to `_share` them."""
    spec, owner = swap.spec, swap.spec.owner(swap.layer)
    mlp = _triton_mlp(swap.layer, spec)
    if swap.ranks is not None:
        _share(swap, owner, TritonMLP.inline(swap.config) if mlp is None else mlp)
    for path in spec.paths:
        parallel.unshard(owner.get_submodule(path))


def _release(mlp: TritonMLP, spec: MLPSpec) -> None:
    """Undo `_adopt`."""
    for path in spec.paths:
        parallel.unshard(mlp.get_submodule(path))
    mlp.release()


def _uninstall(layer: nn.Module, spec: MLPSpec) -> None:
    mlp = _triton_mlp(layer, spec)
    if mlp is None:
        return
    for path in spec.paths:
        parallel.unshard(spec.owner(layer).get_submodule(path))
    _restore(spec.owner(layer), mlp.originals)
    if spec.mlp is None:
        if mlp.density is not None:
            store_as_before(spec.projections(layer)[2])
        delattr(layer, "mlp")
    else:
        mlp.release()
    if isinstance(layer, FusedLayer):
        assert layer.original_class is not None
        change_class(layer, layer.original_class)


# --- quantize, and the way back ---------------------------------------------------------------


@torch.inference_mode(False)
def _quantize(
    layer: nn.Module,
    spec: MLPSpec,
    config: QuantizationConfig,
    originals: dict[str, nn.Module | None],
    keep: bool,
) -> None:
    """Quantize the projections of a layer; `originals` gets them by path, None unless kept.

    The weight of one is freed, or moved to the CPU, before the next is quantized.
    """
    owner = spec.owner(layer)
    for path in spec.paths:
        original: Any = owner.get_submodule(path)
        if isinstance(original, QuantizedLinear):
            continue
        quantized = QuantizedLinear.from_linear(original, config)
        if keep:
            original.weight.data = original.weight.data.cpu()
        owner.set_submodule(path, quantized)
        originals[path] = original if keep else None


def _restore(owner: nn.Module, originals: dict[str, nn.Module | None]) -> None:
    """Put kept projections in the places of those that are still quantized."""
    original: Any
    for path, original in originals.items():
        quantized = owner.get_submodule(path)
        if original is None or not isinstance(quantized, QuantizedLinear):
            continue
        with torch.inference_mode(False):
            data = original.weight.data
            original.weight.data = data.to(quantized.codes.device, quantized.dtype)
        original.bias = quantized.bias
        owner.set_submodule(path, original.train(quantized.training))


def _originals_gone(layer: nn.Module, spec: MLPSpec) -> bool:
    """Whether weights of a layer that patch_model has quantized are lost, and still quantized."""
    mlp = _triton_mlp(layer, spec)
    return mlp is not None and any(
        original is None and next(quantized_linears(spec.owner(layer).get_submodule(path)), None)
        for path, original in mlp.originals.items()
    )


# --- report -----------------------------------------------------------------------------------


def _row(name: str, layer: nn.Module, spec: MLPSpec) -> PatchRow:
    experts = experts_of(layer, spec)
    up, gate, down = (None, None, None) if experts else spec.projections(layer)
    owner = mlp_of(layer, spec) if up is None else up
    place = None if up is None else read_place(up)
    weight = None if owner is None else next(owner.parameters(), None)
    if place is None and weight is not None:
        place = weight.dtype, weight.device
    dtype = "-" if place is None else str(place[0]).removeprefix("torch.")
    device = "-" if place is None else str(place[1])
    weights = _quantized_bytes([up, gate, down])
    mlp = _triton_mlp(layer, spec)
    part = "" if mlp is None or mlp.ranks is None else str(mlp.ranks)
    if mlp is None or up is None or down is None:
        reason = f"mixture of experts ({experts})" if experts else "not patched"
        return PatchRow(name, "-", dtype, device, "-", "-", reason, weights)
    down_read, density = read_projection(down), ""
    if mlp.density is not None and down_read is not None:
        if linear_of(1, down_read[0], False, sparse=True).sparse:  # it may have been quantized
            density = f"{100 * mlp.density:.1f} %"
    rest = weights, density, part
    verified = "yes" if mlp.verified else "no"
    if by_structure(spec):
        verified += ", by structure"
    fused = isinstance(layer, FusedLayer)
    replaced = _half(spec, layer) if isinstance(layer, FusedLayer) else "MLP"
    read = read_projection(up)
    called = [
        f"{path} ({'offloaded' if is_offloaded(module) else type(module).__name__})"
        for path, module in ((spec.up, up), (spec.gate, gate), (spec.down, down))
        if module is not None and read_projection(module) is None
    ]
    called += _called_norms(spec, layer, mlp.mlp_config) if fused else []
    around = {path.rpartition(".")[0] for path in (spec.up, spec.down)} - {""}
    parts = {path: _get(layer, path) for path in (spec.activation, *sorted(around))} | {"mlp": mlp}
    called += [
        f"{path} (hooks)" for path, module in parts.items() if not is_plain(module, type(module))
    ]
    if called or read is None:
        reason = f"not plain, so called: {', '.join(called)}"
        plan = "PyTorch"
        return PatchRow(name, replaced, dtype, device, plan, verified, reason, *rest)
    weight = read[0]
    if weight.device.type != "cuda":
        plan, reason = "PyTorch", ""
        if weight.device.type == "meta":
            plan, reason = "-", "waits for weights"
        return PatchRow(name, replaced, dtype, device, plan, verified, reason, *rest)
    if spec.packed is not None:
        weight, _ = split_packed(spec.packed, weight)
    rows_dtype = None if place is None else place[0]
    up_plan = plan_linear(1, weight, gated=mlp.mlp_config.gated, dtype=rows_dtype)
    sparse = mlp.mlp_config.activation in SPARSE
    down_plan = plan_linear(1, (down_read or read)[0], dtype=rows_dtype, sparse=sparse)
    plan = f"decode: {up_plan}; {down_plan}"
    return PatchRow(name, replaced, dtype, device, plan, verified, "", *rest)


def _quantized_bytes(projections: Iterable[nn.Module | None]) -> str:
    """What a PatchRow says of weights."""
    found = [each for each in projections if isinstance(each, QuantizedLinear)]
    if not found:
        return ""
    config = found[0].config
    group = "" if config.group_size is None else f" g{config.group_size}"
    before = sum(each.in_features * each.out_features * each.dtype.itemsize for each in found)
    after = sum(each.quantized.nbytes for each in found)
    rows = "" if config.activations is None else f" x {config.activations}"
    return f"{config.format}{group}{rows}, {before / 1e6:.2f} -> {after / 1e6:.2f} MB"


def _half(spec: MLPSpec, layer: FusedLayer) -> str:
    """What a fused layer leaves to its TritonMLP."""
    branch = "norm + " if spec.branch_norms is not None else ""
    before = "attention residual + " if spec.norms(layer) else "attention + "
    norm = "norm + " if spec.norm_name(layer) is not None else ""
    return f"{branch}{before if layer.joins_attention else ''}{norm}MLP + {branch}residual"
