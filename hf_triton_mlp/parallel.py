"""Projections of which each rank of a process group has a part: up by columns, down by rows.

As Megatron has it (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053): a rank computes a part
of the hidden values, and what its columns of the down projection make of them; the sum of all
ranks' results is the MLP's.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp.linear import STORED, QuantizedLinear
from hf_triton_mlp.mlp import StandIn, change_class, stand_in
from hf_triton_mlp.ops import part_product
from hf_triton_mlp.quantization import INT4_PER_WORD, QuantizationConfig
from hf_triton_mlp.ranks import Ranks
from hf_triton_mlp.reading import projection_weight


@dataclass(frozen=True)
class Part:
    """What a rank has of a projection (out, in): of its rows (dim 0) or of its columns (dim 1).

    blocks: of how many equal blocks it has the same part each; up and gate in one are two.
    """

    ranks: Ranks
    dim: int
    blocks: int = 1

    def take(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor along a dimension of it, in memory of its own."""
        if _is_transposed(whole):
            return self.take(whole.t(), 1 - dim).t()
        parts = whole.unflatten(dim, (self.blocks, self.ranks.size, -1))
        part = parts.select(dim + 1, self.ranks.rank).flatten(dim, dim + 1)
        return part.clone(memory_format=torch.contiguous_format)

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The opposite: the tensor of which each rank has a part, laid out as that is."""
        parts = [each.unflatten(dim, (self.blocks, -1)) for each in self.ranks.gather(part)]
        whole = torch.stack(parts, dim + 1).flatten(dim, dim + 2)
        return whole.t().contiguous().t() if _is_transposed(part) else whole

    def ranges(self, size: int) -> list[tuple[int, int]]:
        """(start, length) of each block's part of a dimension that has this size as a whole."""
        block, length = size // self.blocks, size // self.blocks // self.ranks.size
        return [(i * block + self.ranks.rank * length, length) for i in range(self.blocks)]


class Shard(StandIn):
    """A projection of which a rank has a part; the other modules see what they did.

    Called, it computes the rank's part of the results from the whole input (rows), or the whole
    results from the rank's part of the input (columns). The state_dict has whole tensors, which all
    ranks gather at the same time, and takes whole ones.
    """

    keeps_name = True
    part: Part
    #: The tensors of which the rank has a part, and along which of their dimensions.
    split: dict[str, int]
    bias: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.shard_of = cls.original_class  # which tells `reading` that it may be read like that

    def forward(self, input: Tensor) -> Tensor:
        weight = projection_weight(self)
        return part_product(input, weight, self.bias, self.part.ranks, self.part.dim)

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """As QuantizedLinear's, with the same part."""
        linear = super().dequantized(dtype)  # pyright: ignore[reportAttributeAccessIssue]
        _become(linear, self.part, _split(linear, self.part))
        return linear

    def extra_repr(self) -> str:
        of = "rows" if self.part.dim == 0 else "columns"
        return f"{super().extra_repr()}, {of} of {self.part.ranks}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, dim in self.split.items():
            tensor = destination[prefix + name].detach()
            destination[prefix + name] = self.part.gather(tensor, dim)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Any, prefix: str, *rest: Any
    ) -> None:
        *_, errors = rest
        with self.as_quantized() if isinstance(self, QuantizedLinear) else nullcontext():
            given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
            for name, dim in self.split.items():
                tensor, key = getattr(self, name), prefix + name
                whole = list(tensor.shape)
                whole[dim] *= self.part.ranks.size
                if key in given and list(given[key].shape) != whole:
                    errors.append(
                        f"size mismatch for {key}: {list(given[key].shape)}, whole {whole}"
                    )
                    given[key] = tensor
                elif key in given:
                    given[key] = self.part.take(given[key], dim)
            super()._load_from_state_dict(given, prefix, *rest)


def shard(linear: nn.Module, part: Part) -> None:
    """Leave this rank's part of a plain projection, which goes on to compute what it did.

    It is the same object, with the same parameters; what they had besides is freed.
    """
    split = _split(linear, part)
    with torch.inference_mode(False):
        # All, or none where there is no memory for one.
        taken = {name: part.take(getattr(linear, name).data, dim) for name, dim in split.items()}
        _give(linear, taken)
    _resize(linear, part, 1, part.ranks.size)
    _become(linear, part, split)


def unshard(linear: nn.Module) -> None:
    """Gather the parts of a projection, bit for bit; others than `shard` made stay as they are."""
    if not isinstance(linear, Shard):
        return
    part = linear.part
    assert linear.original_class is not None
    with torch.inference_mode(False):
        split = linear.split.items()
        gathered = {name: part.gather(getattr(linear, name).data, dim) for name, dim in split}
        _give(linear, gathered)
    _resize(linear, part, part.ranks.size, 1)
    del linear.part, linear.split
    change_class(linear, linear.original_class)


def parts(module: nn.Module) -> dict[str, list[tuple[int, int, int]]]:
    """What a rank has of whole tensors of a module, where that is a part.

    By the tensor's name (dim, start, length), in the tensor's own layout; of more than one, which
    are along one dimension, the parts follow each other. Empty for what is no part.
    """
    found = {}
    if isinstance(module, Shard):
        for name, dim in module.split.items():
            whole = getattr(module, name).shape[dim] * module.part.ranks.size
            found[name] = [(dim, *each) for each in module.part.ranges(whole)]
    return found


def check_parts(
    down: nn.Module, intermediate: int, ranks: int, config: QuantizationConfig | None
) -> None:
    """Raise ValueError unless so many ranks can share an MLP of this intermediate size.

    config: what its weights are going to be quantized to.
    """
    part, rest = divmod(intermediate, ranks)
    if rest:
        raise ValueError(
            f"its intermediate size {intermediate} is not a multiple of {ranks}, the ranks of "
            "mp_group"
        )
    if isinstance(down, QuantizedLinear):
        config = down.config
    if config is None:
        return
    group = config.group_size
    if group is not None and group < intermediate and part % group:
        raise ValueError(
            f"each of {ranks} ranks would have {part} columns of the down projection, which is "
            f"quantized in groups of {group}: they must not be cut"
        )
    if config.format == "int4" and part % INT4_PER_WORD:
        raise ValueError(
            f"each of {ranks} ranks would have {part} columns of the down projection, whose int4 "
            f"codes are stored {INT4_PER_WORD} to a word"
        )


def _is_transposed(tensor: Tensor) -> bool:
    """Whether a matrix is stored by the other dimension."""
    return tensor.dim() == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous()


def _split(linear: nn.Module, part: Part) -> dict[str, int]:
    quantized = isinstance(linear, QuantizedLinear)
    by_input = isinstance(linear, Conv1D)
    found = {name: part.dim for name in STORED} if quantized else {"weight": part.dim ^ by_input}
    if part.dim == 0:
        found["bias"] = 0
    elif quantized and linear.scales.shape[1] == 1:  # of whole rows, as each part's are
        del found["scales"], found["zeros"]
    return {name: dim for name, dim in found.items() if getattr(linear, name) is not None}


def _give(linear: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Other values of other sizes, which gradients so far do not have."""
    for name, tensor in tensors.items():
        held = getattr(linear, name)
        held.data = tensor
        held.grad = None


def _become(linear: Any, part: Part, split: dict[str, int]) -> None:
    change_class(linear, stand_in(Shard, type(linear)))
    linear.part, linear.split = part, split


def _resize(linear: nn.Module, part: Part, times: int, over: int) -> None:
    """What a quantized projection says of its sizes; others are known by their weights'."""
    if isinstance(linear, QuantizedLinear):
        name = "in_features" if part.dim else "out_features"
        setattr(linear, name, getattr(linear, name) * times // over)
        linear.group_size = linear.config.group_size or linear.in_features
