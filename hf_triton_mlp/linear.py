"""QuantizedLinear: a linear layer whose weight is in 8 or 4 bits."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp.quantization import (
    QuantizationConfig,
    QuantizedWeight,
    blank,
    quantize,
    stored_by_input,
    stored_by_output,
)
from hf_triton_mlp.reading import read_projection

#: The tensors of a QuantizedWeight, as QuantizedLinear names them.
STORED = ("codes", "scales", "zeros")


@contextmanager
def keeping_dtypes(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Give tensors of a module that another dtype is given meanwhile their own again."""
    kept = {name: getattr(module, name) for name in names}
    yield
    for name, before in kept.items():
        now = getattr(module, name)
        if before is not None and now.dtype != before.dtype:
            setattr(module, name, before.to(now.device))


class QuantizedLinear(nn.Module):
    """A linear layer whose weight (out, in) is quantized, in the place of an nn.Linear or Conv1D.

    Buffers: `codes`, `scales`, `zeros`, as in QuantizedWeight; the bias is a parameter as it was.
    Patched layers run kernels that read them, once these are proven on their GPU. Called by itself
    it computes with the weight that they stand for, which is made for each call and gone after it.
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
        weight = blank((out_features, in_features), config, device)
        self.group_size = weight.group_size
        for name in STORED:
            self.register_buffer(name, getattr(weight, name))
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
        if read is None or isinstance(read[0], QuantizedWeight):
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
            found.store(quantize(values, config))
        return found.train(linear.training)

    def store(self, weight: QuantizedWeight) -> None:
        """Hold the tensors of this weight."""
        for name in STORED:
            setattr(self, name, getattr(weight, name))

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as kernels read it."""
        shape = self.out_features, self.in_features
        rest = shape, self.group_size, self.config.activations
        return QuantizedWeight(self.codes, self.scales, self.zeros, *rest)

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
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        with keeping_dtypes(self, STORED):
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A checkpoint has the weight as it was quantized."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quantized.by_input:
            weight = stored_by_output(self.quantized)
            for name in STORED:
                if getattr(weight, name) is not None:
                    destination[prefix + name] = getattr(weight, name)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self.as_quantized():
            super()._load_from_state_dict(*args, **kwargs)

    @contextmanager
    def as_quantized(self) -> Iterator[None]:
        """Have the weight stored as it was quantized meanwhile, as checkpoints have it."""
        by_input = self.quantized.by_input
        if by_input:
            self.store(stored_by_output(self.quantized))
        yield
        if by_input:
            self.store(stored_by_input(self.quantized))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.config.format}, "
            f"group_size={self.group_size}"
            + (f", activations={self.config.activations}" if self.config.activations else "")
        )


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantized layers of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Put plain layers of this dtype in the places of the quantized ones."""
    for name, module in list(quantized_linears(model)):
        model.set_submodule(name, module.dequantized(dtype))
