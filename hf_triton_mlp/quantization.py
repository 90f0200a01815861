"""Weights in 8 and 4 bits: how they are quantized, packed and read back.

A weight (out, in) is codes, and for each group of `group_size` codes of a row a scale: the value
is (code - zero) * scale, where the zero is 0 unless the format is asymmetric. Groups never cross
rows; the last of a row may be shorter. What is quantized is divided by the scale as it is stored,
so that a scale's own rounding costs no accuracy.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

#: Largest code of each symmetric format. Int4's -8 stays unused, int8's -128 too.
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}

#: What codes are stored as, an int4's eight to a word.
CODES = {"int8": torch.int8, "int4": torch.int32, "fp8": torch.float8_e4m3fn}

#: Int4 codes are stored plus 8, asymmetric ones as they are: 0 to 15.
INT4_OFFSET = 8
INT4_CODES = 16

#: Int4 codes in one int32. Code 2i of a word is its bits 4i to 4i + 3, code 2i + 1 those 16 above:
#: one mask takes two neighbours out as the low bits of two halves.
INT4_PER_WORD = 8
INT4_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)

#: A row's only scale is float32; there are enough of groups' that their bytes count. Bfloat16 has
#: float32's range (a float16 model's scales would not all be normal float16), zeros are small.
ROW_SCALE, GROUP_SCALE, GROUP_ZERO = torch.float32, torch.bfloat16, torch.float16

#: Half-quadratic quantization's own constants: the exponent of its norm, the first weight of its
#: quadratic term, by what that grows, and how often it repeats.
HQQ_NORM, HQQ_BETA, HQQ_GROWTH, HQQ_STEPS = 0.7, 10.0, 1.01, 10

#: The parts of a group's range that refinement tries: what lies beyond is clipped, and the rest
#: finer.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)

#: Rows that are quantized at a time take about this much memory in float32.
CHUNK_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """What weights become.

    format: "int8", "int4" or "fp8" (e4m3fn).
    group_size: codes of a row that share a scale; None for the whole row, in int4 for 128. Int4 has
    32, 64 or 128, fp8 whole rows.
    symmetric: codes on both sides of 0; False, for int4, for a zero of each group.
    refine: choose int4's scale and zero of each group for the least squared error, without data:
    of some parts of its range, as GPTQ's quantizer searches (Frantar et al. 2022, "mse"), and of
    the zeros that half-quadratic quantization finds for each (Badri and Shaji 2023,
    https://mobiusml.github.io/hqq_blog/). False: the whole range, rounded to nearest.
    activations: "fp8", with format "fp8", for inputs that become fp8 too where patched layers
    multiply more than 128 rows (of prompts, say) at once, each row with a scale of its own. That
    takes float16 or bfloat16, sizes that are multiples of 16, and a GPU on which PyTorch multiplies
    fp8 by rows' scales (compute capability 8.9 or newer); all else is computed as with None.
    Raises ValueError for anything else.
    """

    format: Literal["int8", "int4", "fp8"] = "int4"
    group_size: int | None = None
    symmetric: bool = True
    refine: bool = False
    activations: Literal["fp8"] | None = None

    def __post_init__(self) -> None:
        if self.format not in LARGEST:
            raise ValueError(f"format is {self.format!r}, supported: {', '.join(LARGEST)}")
        if self.format == "int4" and self.group_size is None:
            object.__setattr__(self, "group_size", 128)
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"group_size is {size!r}, supported: None and positive integers")
        if self.format == "int4" and size not in (32, 64, 128):
            raise ValueError(f"group_size is {size!r}; int4 has groups of 32, 64 or 128")
        if self.format == "fp8" and size is not None:
            raise ValueError(f"group_size is {size}; fp8 has one scale for each row, so None")
        if self.format != "int4" and not (self.symmetric and not self.refine):
            raise ValueError(f"{self.format} is symmetric and rounds to nearest; int4 has more")
        if self.activations is not None and (self.format, self.activations) != ("fp8", "fp8"):
            raise ValueError(
                f"activations is {self.activations!r} with format {self.format!r}, supported: "
                "None, and 'fp8' with format 'fp8'"
            )


class QuantizedWeight(NamedTuple):
    """A weight (out, in) in the form that kernels read.

    codes: int8 or float8_e4m3fn (out, in), or int4 in words, int32 (out, ⌈in / 8⌉).
    scales: (out, groups), float32 for whole rows, else bfloat16; zeros: (out, groups), float16, or
    None. shape: (out, in); group_size: `in` for whole rows. activations: as in QuantizationConfig.
    Or, `stored_by_input`, all that one input multiplies lies together, and what zeros multiply need
    not be read: the same tensors with the strides of (in, out), but int4 codes in words of eight
    outputs, (⌈out / 8⌉, in).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group_size: int
    activations: Literal["fp8"] | None = None

    @property
    def format(self) -> str:
        """As in QuantizationConfig."""
        return next(name for name, dtype in CODES.items() if dtype == self.codes.dtype)

    @property
    def by_input(self) -> bool:
        """Whether all that one input multiplies lies together."""
        return self.codes.stride(1) != 1

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros) if t is not None)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.codes.device

    def chunk(self, chunks: int, dim: int = 0) -> list["QuantizedWeight"]:
        """Parts of its rows, views, as a tensor's; of columns there are none."""
        assert dim == 0
        tensors = (self.codes, self.scales, self.zeros)
        parts = [(None,) * chunks if t is None else t.chunk(chunks) for t in tensors]
        return [
            self._replace(
                codes=codes, scales=scales, zeros=zeros, shape=(len(codes), self.shape[1])
            )
            for codes, scales, zeros in zip(*parts, strict=True)
        ]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that it stands for, computed in float32."""
        values = self.codes.float() if self.format != "int4" else self._int4_values()
        scales, zeros = self.scales.float(), self.zeros
        if zeros is not None:
            values -= self._spread(zeros.float())
        return (values * self._spread(scales)).to(dtype)

    def _int4_values(self) -> Tensor:
        out, size = self.shape
        in_words = (self.codes.t(), out) if self.by_input else (self.codes, size)
        codes = unpack_int4(*in_words).float()
        codes = codes.t() if self.by_input else codes
        return codes if self.zeros is not None else codes - INT4_OFFSET

    def _spread(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]


#: A weight (out, in) as kernels read it.
Weight: TypeAlias = Tensor | QuantizedWeight


def same_format(one: Weight, other: Weight) -> bool:
    """Whether one kernel reads both: both plain, or of one format and with groups of one size.

    Rows that they are multiplied by become fp8 for both, or for none.
    """

    def format_of(weight: Weight) -> tuple[object, ...] | None:
        if isinstance(weight, Tensor):
            return None
        kind = weight.format, weight.activations
        return *kind, weight.group_size, weight.scales.dtype, weight.zeros is None

    return format_of(one) == format_of(other)


def blank(
    shape: tuple[int, int],
    config: QuantizationConfig,
    device: torch.device | str | None = None,
) -> QuantizedWeight:
    """A weight (out, in) in this format, whose tensors are all 0."""
    out, size = shape
    group = config.group_size or size
    groups = -(-size // group)
    codes = -(-size // INT4_PER_WORD) if config.format == "int4" else size
    scale = ROW_SCALE if config.group_size is None else GROUP_SCALE

    def tensor(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((out, columns), dtype=dtype, device=device)

    return QuantizedWeight(
        tensor(codes, CODES[config.format]),
        tensor(groups, scale),
        None if config.symmetric else tensor(groups, GROUP_ZERO),
        shape,
        group,
        config.activations,
    )


@torch.no_grad()
def quantize(weight: Tensor, config: QuantizationConfig) -> QuantizedWeight:
    """The weight (out, in), of any floating dtype, in another format; on its device.

    Rows are taken a few at a time, so that only these are ever there in float32.
    Raises ValueError for infinite and NaN values, and TypeError where it is not a floating matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise TypeError(f"expected a floating matrix, found {weight.dtype} {tuple(weight.shape)}")
    out, size = weight.shape
    rows = max(1, CHUNK_BYTES // (4 * max(size, 1)))
    parts = [_quantize_rows(part, config) for part in weight.split(rows)]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        (out, size),
        parts[0].group_size,
        config.activations,
    )


def _quantize_rows(weight: Tensor, config: QuantizationConfig) -> QuantizedWeight:
    out, size = weight.shape
    values = weight.float()
    if not values.isfinite().all():
        wrong = int((~values.isfinite()).sum())
        raise ValueError(f"{wrong} of {values.numel()} values are infinite or NaN")
    group = config.group_size or size
    groups = torch.nn.functional.pad(values, (0, -size % group)).view(out, -1, group)
    stored = ROW_SCALE if config.group_size is None else GROUP_SCALE
    quantizer = _asymmetric if not config.symmetric else _symmetric
    codes, scales, zeros = quantizer(groups, config, stored)
    codes = codes.view(out, -1)[:, :size]
    if config.format == "int4":
        codes = pack_int4(codes if zeros is not None else codes + INT4_OFFSET)
    else:
        codes = codes.to(CODES[config.format])
    return QuantizedWeight(codes, scales, zeros, (out, size), group)


def _symmetric(
    groups: Tensor, config: QuantizationConfig, stored: torch.dtype
) -> tuple[Tensor, Tensor, None]:
    """(codes, scales, no zeros) of groups (out, groups, size): value = code * scale."""
    largest = LARGEST[config.format]

    def codes_for(scales: Tensor) -> Tensor:
        codes = _divide(groups, scales[:, :, None]).clamp_(-largest, largest)
        return codes if config.format == "fp8" else codes.round_()

    widest = groups.abs().amax(-1) / largest
    tried = [(_as_stored(part * widest, stored),) for part in _ranges(config)]
    (scales,) = _best(groups, tried, lambda s: codes_for(s) * s[:, :, None])
    return codes_for(scales), scales.to(stored), None


def _asymmetric(
    groups: Tensor, config: QuantizationConfig, stored: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, zeros) of groups (out, groups, size): value = (code - zero) * scale.

    The range has 0 in it, so that a zero is a number between two codes.
    """
    most = INT4_CODES - 1.0
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)

    def codes_for(scales: Tensor, zeros: Tensor) -> Tensor:
        codes = _divide(groups, scales[:, :, None]) + zeros[:, :, None]
        return codes.round_().clamp_(0, most)

    def values(scales: Tensor, zeros: Tensor) -> Tensor:
        return (codes_for(scales, zeros) - zeros[:, :, None]) * scales[:, :, None]

    def tried() -> Iterator[tuple[Tensor, Tensor]]:
        for part in _ranges(config):
            scales = _as_stored(part * (high - low) / most, stored)
            zeros = _as_stored(_divide(-part * low, scales), GROUP_ZERO)
            yield scales, zeros
            beta = HQQ_BETA
            for _ in range(HQQ_STEPS if config.refine else 0):
                # The errors are split in few large ones, which are taken as they are, and the
                # rest, which the zeros are fitted to.
                errors = groups - values(scales, zeros)
                size = errors.abs()
                shrunk = (size - size.clamp(min=1e-8).pow(HQQ_NORM - 1) / beta).clamp_(min=0)
                target = groups - errors.sign() * shrunk
                fitted = codes_for(scales, zeros) - _divide(target, scales[:, :, None])
                zeros = _as_stored(fitted.mean(-1), GROUP_ZERO)
                beta *= HQQ_GROWTH
                yield scales, zeros

    scales, zeros = _best(groups, tried(), values)
    return codes_for(scales, zeros), scales.to(stored), zeros.to(GROUP_ZERO)


def fp8_rows(x: Tensor) -> Tensor:
    """What x (…, size) is, in its dtype, once its rows have become fp8, each with a scale."""
    values = x.float()
    scales = values.abs().amax(-1, keepdim=True) / LARGEST["fp8"]
    return (_divide(values, scales).to(CODES["fp8"]).float() * scales).to(x.dtype)


def _ranges(config: QuantizationConfig) -> tuple[float, ...]:
    return RANGES if config.refine else RANGES[:1]


def _best(
    groups: Tensor,
    tried: Iterable[tuple[Tensor, ...]],
    values: Callable[..., Tensor],
) -> tuple[Tensor, ...]:
    """For each group the parameters (out, groups) whose `values` have the least squared error."""
    best: tuple[Tensor, ...] = ()
    least = None
    for parameters in tried:
        error = (groups - values(*parameters)).square_().sum(-1)
        if least is None:
            best, least = parameters, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(torch.where(better, *pair) for pair in zip(parameters, best, strict=True))
    return best


def _divide(values: Tensor, by: Tensor) -> Tensor:
    """values / by, 0 where `by` is."""
    return torch.where(by == 0, 0.0, values / torch.where(by == 0, 1.0, by))


def _as_stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32, rounded to what can be stored."""
    return numbers.to(dtype).float()


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0 to 15 (out, in), of any dtype, in words (out, ⌈in / 8⌉); what is missing is 0."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % INT4_PER_WORD))
    words = padded.view(codes.shape[0], -1, INT4_PER_WORD).to(torch.int64)
    shifts = torch.tensor(INT4_SHIFTS, device=codes.device)
    # As unsigned numbers; the upper half of them are the negative ones of int32.
    packed = (words << shifts).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_int4(words: Tensor, size: int) -> Tensor:
    """The codes (out, size), uint8, of `pack_int4`'s words."""
    shifts = torch.tensor(INT4_SHIFTS, dtype=torch.int32, device=words.device)
    codes = (words[:, :, None] >> shifts) & (INT4_CODES - 1)
    return codes.view(words.shape[0], -1)[:, :size].to(torch.uint8)


def stored_by_input(weight: QuantizedWeight) -> QuantizedWeight:
    """A copy of a weight that was stored as it was quantized; out is whole words of int4."""
    assert not weight.by_input and weight.shape[0] % INT4_PER_WORD == 0
    return _stored(weight, weight.shape[1])


def stored_by_output(weight: QuantizedWeight) -> QuantizedWeight:
    """Undo `stored_by_input`."""
    assert weight.by_input
    return _stored(weight, weight.shape[0])


def _stored(weight: QuantizedWeight, size: int) -> QuantizedWeight:
    """A weight stored the other way; size: of what is in words now."""
    first = weight.codes.t() if weight.by_input else weight.codes
    if weight.format == "int4":
        # A code takes many bytes on the way, so that a few words of each row are taken at a time.
        count = max(1, CHUNK_BYTES // (64 * INT4_PER_WORD * len(first)))
        lengths = [min(count * INT4_PER_WORD, size - at) for at in range(0, size, count * 8)]
        parts = zip(first.split(count, dim=1), lengths, strict=True)
        codes = torch.cat([pack_int4(unpack_int4(words, n).t()) for words, n in parts])
    else:
        codes = first.t().contiguous()
    tensors = {"codes": codes if weight.by_input else codes.t()}
    for name in ("scales", "zeros"):
        tensor = getattr(weight, name)
        if tensor is not None:
            tensors[name] = tensor.contiguous() if weight.by_input else tensor.t().contiguous().t()
    return weight._replace(**tensors)


def from_flat_groups(
    codes: Tensor, scales: Tensor, *, groups: int, merged: int = 1, dim: int = 0
) -> QuantizedWeight:
    """Int8 codes (out, in) whose scales are for flat groups, as DeepSpeed's checkpoints have them.

    scales: any shape of merged * groups numbers. The matrix was put together from `merged` of
    equal size along `dim`, and the values of each of these, one row after the other, were in so
    many groups of equal size. DeepSpeed puts columns of scales together as it does matrices: for
    rows, dim 0, one part's scales follow the other's; for columns, dim 1, each group's follow each
    other, one of each part (its runtime/weight_quantizer.py and inference/csrc/dequantize.cu).
    Raises ValueError where a group covers neither whole rows nor an equal part of one, or where
    numbers do not fit.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"expected an int8 matrix, found {codes.dtype} {tuple(codes.shape)}")
    if scales.numel() != merged * groups:
        raise ValueError(
            f"found {scales.numel()} scales, expected {groups} for each of {merged} merged parts"
        )
    if codes.shape[dim] % merged:
        raise ValueError(f"{codes.shape[dim]} values do not make {merged} equal parts")
    parts = codes.chunk(merged, dim=dim)
    out, size = parts[0].shape
    length, rest = divmod(out * size, groups)
    if rest or (length % size and size % length):
        raise ValueError(
            f"{groups} groups of a matrix {out} x {size} cover neither whole rows nor equal parts "
            "of a row"
        )
    group = min(length, size)
    of_parts = scales.reshape(merged, groups) if dim == 0 else scales.reshape(groups, merged).t()
    spread = [part.float().repeat_interleave(length // group).view(out, -1) for part in of_parts]
    found = torch.cat(spread, dim=dim)
    whole_rows = found.shape[1] == 1
    return QuantizedWeight(
        codes,
        found.to(ROW_SCALE),
        None,
        (codes.shape[0], codes.shape[1]),
        codes.shape[1] if whole_rows else group,
    )
