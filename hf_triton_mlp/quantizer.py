"""Quantized MLPs in transformers: `from_pretrained(…, quantization_config=TritonMLPConfig(…))`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_triton_mlp.layers import mlp_projections
from hf_triton_mlp.linear import QuantizedLinear, dequantize_linears, quantized_linears
from hf_triton_mlp.ops import DTYPES
from hf_triton_mlp.quantization import LARGEST, QuantizationConfig
from hf_triton_mlp.reading import has_own_forward, read_projection

#: What config.json calls models that are quantized here.
METHOD = "hf_triton_mlp"


class TritonMLPConfig(QuantizationConfigMixin):
    """How transformers quantizes the MLPs of a model that it loads.

    bits: 4 or 8, for format "int4" or "int8"; or format: as in QuantizationConfig, as are
    group_size, symmetric (by default int4 is not), refine and activations.
    include, exclude: layers, as for patch_model. modules: the names of what is quantized, which a
    saved model has.
    Raises ValueError as QuantizationConfig does.
    """

    def __init__(
        self,
        bits: int | None = None,
        *,
        format: str | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        refine: bool = False,
        activations: str | None = None,
        include: Sequence[str | int] | None = None,
        exclude: Sequence[str | int] | None = None,
        modules: Sequence[str] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        of_bits = {None: None, 4: "int4", 8: "int8"}
        if bits not in of_bits:
            raise ValueError(f"bits is {bits!r}, supported: 4 and 8")
        if format is not None and bits is not None and format != of_bits[bits]:
            raise ValueError(f"format is {format!r} with bits={bits}; give one of them")
        self.quant_method: Any = quant_method
        self.format = format or of_bits[bits] or "int8"
        self.symmetric = self.format != "int4" if symmetric is None else symmetric
        self.refine, self.activations = refine, activations
        self.group_size = group_size
        self.group_size = self.quantization.group_size
        self.include, self.exclude, self.modules = include, exclude, modules

    @property
    def quantization(self) -> QuantizationConfig:
        """What each weight becomes."""
        return QuantizationConfig(
            format=self.format,  # pyright: ignore[reportArgumentType]
            group_size=self.group_size,
            symmetric=self.symmetric,
            refine=self.refine,
            activations=self.activations,  # pyright: ignore[reportArgumentType]
        )


class TritonMLPQuantizer(HfQuantizer):
    """Quantizes each MLP's weights as they are loaded, or loads quantized ones."""

    requires_calibration = False
    quantization_config: TritonMLPConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if not self.pre_quantized:
            names = mlp_projections(model, include=config.include, exclude=config.exclude)
            config.modules = names
            for name in names:  # or an error, before anything is loaded
                QuantizedLinear.from_linear(model.get_submodule(name), config.quantization)
        else:
            if not config.modules:
                raise ValueError("the checkpoint's quantization_config names no modules")
            known = {name for name, _ in model.named_modules()}
            missing = [name for name in config.modules if name not in known]
            if missing:
                raise ValueError(
                    f"the checkpoint's quantization_config names {', '.join(missing)}, which "
                    f"{type(model).__name__} does not have"
                )
            for name in config.modules:
                linear = model.get_submodule(name)
                model.set_submodule(name, QuantizedLinear.from_linear(linear, config.quantization))
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, _, parameter = param_name.rpartition(".")
        return parameter == "weight" and module in (self.quantization_config.modules or ())

    def get_quantize_ops(self) -> "QuantizeWeight":
        return QuantizeWeight(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in quantized_linears(model):
            module.check(name)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if not isinstance(dtype, torch.dtype):  # a name, as some configs have it
            dtype = model.dtype if dtype is None else getattr(torch, dtype)
        dequantize_linears(model, dtype)
        return model

    @property
    def is_trainable(self) -> Any:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, **kwargs: Any) -> Any:
        return True


# As decorators they would hide the signatures from type checkers.
register_quantization_config(METHOD)(TritonMLPConfig)
register_quantizer(METHOD)(TritonMLPQuantizer)


def quantization_of(quantization: str | QuantizationConfig) -> QuantizationConfig:
    """A format with TritonMLPConfig's other values, or what is all known already."""
    if isinstance(quantization, str):
        return TritonMLPConfig(format=quantization).quantization
    if not isinstance(quantization, QuantizationConfig):
        raise TypeError(
            f"quantization is a {type(quantization).__name__}; supported: {', '.join(LARGEST)} "
            "and QuantizationConfig"
        )
    return quantization


def check_quantizable(
    model: nn.Module, projections: Iterable[str], config: QuantizationConfig
) -> None:
    """Raise ValueError for what would keep a model's layers of these names from being quantized.

    Those that are, as the config says, are left alone.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, TritonMLPQuantizer):
        method = quantizer.quantization_config.quant_method
        # What a GGUF file's quantizer leaves packed is of another class, and refused below.
        if method != "gguf":
            raise ValueError(f"{type(model).__name__} is quantized already, by {method}")
    for name, linear in quantized_linears(model):
        if linear.config != config:
            raise ValueError(
                f"{name} is quantized already, {linear.config}; one model has one of these"
            )
    held: dict[int, list[nn.Module]] = defaultdict(list)
    parents: Counter[nn.Module | None] = Counter()
    for module in model.modules():
        parents.update(module._modules.values())
        for parameter in module._parameters.values():
            if type(parameter) is nn.Parameter and not parameter.is_meta:
                held[parameter.data_ptr()].append(module)
    for name in projections:
        linear = model.get_submodule(name)
        if isinstance(linear, QuantizedLinear):
            continue
        weight = getattr(linear, "weight", None)
        if isinstance(weight, Tensor) and weight.is_meta:
            raise ValueError(
                f"{name} has its weight on the meta device; from_pretrained(..., "
                f'quantization_config=TritonMLPConfig(format="{config.format}")) quantizes weights '
                "while it loads them"
            )
        read = None if has_own_forward(linear) else read_projection(linear)
        if read is None or not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
            raise ValueError(
                f"{name}, a {type(linear).__name__}, cannot be quantized; supported: plain Linear "
                "and Conv1D without hooks, adapters, offloading and quantized weights"
            )
        if parents[linear] > 1 or len(held[weight.data_ptr()]) > 1:
            raise ValueError(f"{name} has a weight that others share, so it cannot be quantized")
        if weight.dtype not in (*DTYPES, torch.float64):
            raise ValueError(f"{name} is {weight.dtype}, which is not quantized")
        if not all(value.float().isfinite() for value in weight.detach().aminmax()):
            raise ValueError(f"{name}.weight has values that are infinite or NaN")


def record(model: nn.Module) -> None:
    """Let a transformers model know what is quantized in it, which it saves; or that nothing is."""
    if not isinstance(model, PreTrainedModel):
        return
    owner: Any = model
    quantizer = getattr(model, "hf_quantizer", None)
    found = dict(quantized_linears(model))
    if not found:
        if isinstance(quantizer, TritonMLPQuantizer):
            for name in ("hf_quantizer", "is_quantized", "quantization_method"):
                owner.__dict__.pop(name, None)
            owner.config.__dict__.pop("quantization_config", None)
        return
    if not isinstance(quantizer, TritonMLPQuantizer):  # of a GGUF file, unpacked
        config = TritonMLPConfig(**asdict(next(iter(found.values())).config))
        owner.hf_quantizer = quantizer = TritonMLPQuantizer(config)
        owner.config.quantization_config = config
        owner.is_quantized, owner.quantization_method = True, METHOD
    quantizer.quantization_config.modules = list(found)


class QuantizeWeight(ConversionOps):
    """Puts a QuantizedLinear in the place of a linear layer as soon as its weight is read."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_dict: dict[str, Any],
        *,
        model: Any,
        full_layer_name: str,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Nothing is left to be loaded. Raises ValueError for weights that are not finite."""
        ((_, values),) = input_dict.items()
        weight = values[0] if isinstance(values, list) else values
        name = full_layer_name.removesuffix(".weight")
        config = self.hf_quantizer.quantization_config.quantization
        try:
            found = QuantizedLinear.from_linear(model.get_submodule(name), config, weight)
        except ValueError as error:
            raise ValueError(f"{full_layer_name}: {error}") from error
        for tensor in found.buffers():
            tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        model.set_submodule(name, found)
        missing_keys.discard(full_layer_name)
        return {}
