"""Quantized MLPs in transformers: `from_pretrained(…, quantization_config=TritonMLPConfig(…))`."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_triton_mlp.patching import mlp_projections
from hf_triton_mlp.quantization import (
    CODES,
    GROUP_SCALE,
    GROUP_ZERO,
    INT4_PER_WORD,
    ROW_SCALE,
    QuantizationConfig,
    QuantizedWeight,
    quantize,
)
from hf_triton_mlp.reading import read_projection

#: What config.json calls models that are quantized here.
METHOD = "hf_triton_mlp"

STORED = ("codes", "scales", "zeros")


class QuantizedLinear(nn.Module):
    """A linear layer whose weight (out, in) is quantized, in the place of an nn.Linear or Conv1D.

    Buffers: `codes`, `scales`, `zeros`, as in QuantizedWeight; the bias is a parameter as it was.
    It computes with the weight that they stand for, which is made for each call and gone after it.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QuantizationConfig,
        *,
        device: torch.device | str | None = None,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        original: type[nn.Module] = nn.Linear,
    ) -> None:
        """dtype, original: the weight's, and the layer's class, that `dequantized` gives back."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.config, self.original, self.dtype = config, original, dtype
        self.group_size = config.group_size or in_features
        words = -(-in_features // INT4_PER_WORD) if config.format == "int4" else in_features
        groups = out_features, -(-in_features // self.group_size)
        scale = ROW_SCALE if config.group_size is None else GROUP_SCALE
        shapes = {
            "codes": ((out_features, words), CODES[config.format]),
            "scales": (groups, scale),
            "zeros": None if config.symmetric else (groups, GROUP_ZERO),
        }
        for name, wanted in shapes.items():
            empty = None
            if wanted is not None:
                empty = torch.zeros(wanted[0], dtype=wanted[1], device=device)
            self.register_buffer(name, empty)
        self.bias = bias

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: QuantizationConfig, weight: Tensor | None = None
    ) -> "QuantizedLinear":
        """A plain nn.Linear or Conv1D, with its bias, quantized; or its quantized place.

        weight: what it has, or is going to have, in its layout. Without one, and with its own on
        the meta device, nothing is quantized yet.
        Raises ValueError for other layers and for weights that are not finite.
        """
        read = read_projection(linear)
        if read is None:
            raise ValueError(
                f"a {type(linear).__name__} cannot be quantized; supported: plain Linear, Conv1D"
            )
        out_features, in_features = read[0].shape
        values = read[0] if weight is None else weight.t() if type(linear) is Conv1D else weight
        found = cls(
            in_features,
            out_features,
            config,
            device="meta",
            bias=read[1],  # pyright: ignore[reportArgumentType]
            dtype=read[0].dtype,
            original=type(linear),
        )
        if not values.is_meta:
            quantized = quantize(values, config)
            for name in STORED:
                setattr(found, name, getattr(quantized, name))
        return found.train(linear.training)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as kernels read it."""
        shape = self.out_features, self.in_features
        return QuantizedWeight(self.codes, self.scales, self.zeros, shape, self.group_size)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that it stands for, made anew."""
        return self.quantized.dequantize(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """The nn.Linear or Conv1D of this weight, in this dtype."""
        weight = self.quantized.dequantize(dtype)
        with torch.device("meta"):
            if self.original is Conv1D:
                linear, weight = Conv1D(*weight.shape), weight.t().contiguous()
            else:
                bias = self.bias is not None
                linear = self.original(self.in_features, self.out_features, bias=bias)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.data.to(dtype), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """input · weightᵀ + bias; (…, in) to (…, out)."""
        return F.linear(input, self.quantized.dequantize(input.dtype), self.bias)

    def check(self, name: str) -> None:
        """Raise ValueError where a file had not what this needs."""
        expected = QuantizedLinear(self.in_features, self.out_features, self.config, device="meta")
        for buffer in STORED:
            found, wanted = getattr(self, buffer), getattr(expected, buffer)
            if found is None or found.is_meta:  # or offloaded to a disk
                continue
            if not getattr(found, "_is_hf_initialized", False):
                raise ValueError(f"{name}.{buffer} is missing in the checkpoint")
            if found.dtype != wanted.dtype or found.shape != wanted.shape:
                raise ValueError(
                    f"{name}.{buffer} is {found.dtype} {tuple(found.shape)}, expected "
                    f"{wanted.dtype} {tuple(wanted.shape)}"
                )
            if buffer != "codes" and not found.isfinite().all():
                raise ValueError(f"{name}.{buffer} has values that are infinite or NaN")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What moves to another device or memory moves; only the bias takes another dtype."""
        kept = {name: getattr(self, name) for name in STORED}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            if before is not None and now.dtype != before.dtype:
                setattr(self, name, before.to(now.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.config.format}, "
            f"group_size={self.group_size}"
        )


class TritonMLPConfig(QuantizationConfigMixin):
    """How transformers quantizes the MLPs of a model that it loads.

    bits: 4 or 8, for format "int4" or "int8"; or format: as in QuantizationConfig, as are
    group_size, symmetric (by default int4 is not) and refine.
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
        self.refine = refine
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
        for name, module in list(quantized_linears(model)):
            model.set_submodule(name, module.dequantized(dtype))
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


def quantized_linears(model: nn.Module) -> Iterable[tuple[str, QuantizedLinear]]:
    """The quantized layers of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module
