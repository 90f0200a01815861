"""load_sharded: a model of whose MLPs each rank reads its part alone."""

import os
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from hf_triton_mlp.parallel import parts
from hf_triton_mlp.patching import patch_model, skip_zeros
from hf_triton_mlp.quantizer import METHOD, TritonMLPConfig, TritonMLPQuantizer
from hf_triton_mlp.ranks import ranks_of, together

#: What a rank has of a tensor: (dim, start, length) of each block, as `parallel.parts` says it.
Ranges = list[tuple[int, int, int]]


def load_sharded(
    path_or_name: str | os.PathLike[str],
    mp_group: Any,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **patch: Any,
) -> Any:
    """`patch_model(from_pretrained(path_or_name), mp_group=mp_group, **patch)`, without the whole.

    Each rank of the group reads its part of the MLPs' weights from the safetensors files, and all
    the rest, one tensor after the other, straight to its device; so a model may be larger than one
    device, and than the memory of the machine. All ranks call it, with the same arguments.

    path_or_name: a folder, or a name on the model hub, of a causal language model. dtype: by
    default, and with "auto", the config's, or that of the checkpoint. device: by default this
    process's GPU, if any.
    Checkpoints that TritonMLPConfig has quantized are read as they are, parts of codes and scales.
    Nothing is compared, for there are no whole weights.
    Raises ValueError for missing weights and other shapes than the config's, by name, for
    checkpoints of other quantizers, and for quantization, which needs whole weights, and as
    patch_model does.
    """
    ranks = ranks_of(mp_group)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as stack:
        with together(ranks, f"building {path_or_name}"):
            files = [stack.enter_context(_opened(file)) for file in _files(path_or_name)]
            where = {key: file for file in files for key in file.keys()}  # noqa: SIM118
            model = _without_weights(path_or_name, dtype, where)
        patch_model(model, mp_group=mp_group, **patch)
        with together(ranks, f"loading {path_or_name}"):
            _load(model, where, 1 if ranks is None else ranks.size, torch.device(device))
            if getattr(model, "is_quantized", False):
                model.hf_quantizer.postprocess_model(model)
    if patch.get("sparsity", "auto") == "auto":
        skip_zeros(model)
    return model


def _opened(file: str) -> Any:
    return safe_open(file, framework="pt")


def _files(path_or_name: str | os.PathLike[str]) -> list[str]:
    """The safetensors files of a checkpoint; ValueError where there are none."""
    optional: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(path_or_name, SAFE_WEIGHTS_NAME, **optional)
    if file is not None:
        return [file]
    index = cached_file(path_or_name, SAFE_WEIGHTS_INDEX_NAME, **optional)
    if index is None:
        raise ValueError(
            f"{path_or_name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, of "
            "which parts can be read; from_pretrained and save_pretrained write such files"
        )
    found: Any = get_checkpoint_shard_files(path_or_name, index)
    return found[0]


def _without_weights(
    path_or_name: str | os.PathLike[str], dtype: torch.dtype | str | None, where: dict[str, Any]
) -> Any:
    """The model as from_pretrained makes it, its parameters on the meta device."""
    config = transformers.AutoConfig.from_pretrained(path_or_name)
    quantizer = _quantizer(path_or_name, config)
    found = (None if dtype == "auto" else dtype) or config.dtype or _floating(where)
    found = getattr(torch, found) if isinstance(found, str) else found
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=found)
        if quantizer is not None:
            quantizer.preprocess_model(model)
            model.hf_quantizer = quantizer
    model.tie_weights()
    if any(getattr(model, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict")):
        raise ValueError(f"{type(model).__name__} keeps some weights in float32 by their names")
    model.config.name_or_path = model.name_or_path = str(path_or_name)
    if model.can_generate():
        try:
            generation = transformers.GenerationConfig.from_pretrained(path_or_name)
        except OSError:  # there is none, and the config says what there is to say
            options: dict[str, Any] = {"_from_model_config": True}
            name = "config.json"
            generation = transformers.GenerationConfig.from_pretrained(
                path_or_name, name, **options
            )
        model.generation_config = generation
    return model.eval()


def _quantizer(path_or_name: str | os.PathLike[str], config: Any) -> TritonMLPQuantizer | None:
    """What reads a quantized checkpoint; ValueError for another quantizer's."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    given = found if isinstance(found, dict) else found.to_dict()
    if given.get("quant_method") != METHOD:
        raise ValueError(
            f"{path_or_name} is quantized by {given.get('quant_method')}; supported: plain weights "
            f"and {METHOD}"
        )
    quantization: Any = TritonMLPConfig.from_dict(given)
    return TritonMLPQuantizer(quantization, pre_quantized=True)


def _floating(where: dict[str, Any]) -> torch.dtype:
    """The dtype of a checkpoint's first floating-point tensor."""
    for key, file in where.items():
        dtype = file.get_slice(key)[:0].dtype
        if dtype.is_floating_point:
            return dtype
    return torch.float32


def _load(model: Any, where: dict[str, Any], count: int, device: torch.device) -> None:
    """Read all parameters, and the buffers that a checkpoint has; of parts, one of `count`."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                key = f"{prefix}.{name}" if prefix else name
                holders[id(tensor)].append((key, module, name))
    keys = _keys(model, where)
    absent = [
        names[0][0]
        for names in holders.values()
        if getattr(names[0][1], names[0][2]).is_meta and not any(key in keys for key, _, _ in names)
    ]
    if absent:
        more = f" and {len(absent) - 5} more" if absent[5:] else ""
        raise ValueError(f"the checkpoint has no {', '.join(absent[:5])}{more}")
    with torch.no_grad():
        for names in holders.values():
            stored = [key for key, _, _ in names if key in keys]
            _, module, name = names[0]
            tensor: Any = getattr(module, name)
            if not stored:
                module._buffers[name] = tensor.to(device)
                continue
            part = tensor, parts(module).get(name, []), count, device
            found: Any
            found, *others = (_read(where[keys[key]], keys[key], *part) for key in stored)
            if any(not torch.equal(found, other) for other in others):
                raise ValueError(
                    f"{' and '.join(stored)} are one by the config, and differ in the checkpoint"
                )
            found._is_hf_initialized = True
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, tensor.requires_grad)
            for _, owner, own_name in names:
                of: Any = owner._parameters if own_name in owner._parameters else owner._buffers
                of[own_name] = found


def _keys(model: Any, where: dict[str, Any]) -> dict[str, str]:
    """The checkpoint's key for each of the model's that is there.

    As from_pretrained does, with or without the base model's prefix.
    """
    prefix = f"{model.base_model_prefix}."
    names = {*dict(model.named_parameters(remove_duplicate=False))}
    names |= {*dict(model.named_buffers(remove_duplicate=False))}
    found = {}
    for key in where:
        for name in (key, prefix + key, key.removeprefix(prefix)):
            if name in names:
                found.setdefault(name, key)
                break
    return found


def _read(file: Any, key: str, like: Tensor, ranges: Ranges, count: int, device: Any) -> Tensor:
    """What one of `count` ranks has of a checkpoint's tensor, laid out as the model has it."""
    stored = file.get_slice(key)
    found, whole = list(stored.get_shape()), list(like.shape)
    for dim in {dim for dim, _, _ in ranges}:
        whole[dim] *= count
    if found != whole:
        raise ValueError(f"{key} is {found} in the checkpoint, and {whole} by the config")
    tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    place = 0
    for dim, start, length in ranges:
        here = (*dim * (slice(None),), slice(start, start + length))
        tensor.narrow(dim, place, length).copy_(stored[here])
        place += length
    return tensor if ranges else tensor.copy_(stored[...])
