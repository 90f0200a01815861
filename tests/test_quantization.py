"""Weights in 8 and 4 bits, on the CPU and the GPU alike."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_triton_mlp.quantization import (
    INT4_CODES,
    QuantizationConfig,
    QuantizedWeight,
    from_flat_groups,
    pack_int4,
    quantize,
    unpack_int4,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAMES = ["bloom", "gemma", "gpt2", "llama", "opt-post-norm", "opt-pre-norm"]
CONFIGS = {
    "int8": QuantizationConfig(format="int8"),
    "int8 in groups": QuantizationConfig(format="int8", group_size=48),
    "fp8": QuantizationConfig(format="fp8"),
    **{
        f"int4 {size}{'' if symmetric else ' asymmetric'}{' refined' if refine else ''}": (
            QuantizationConfig(format="int4", group_size=size, symmetric=symmetric, refine=refine)
        )
        for size, symmetric, refine in itertools.product((32, 128), (True, False), (True, False))
    },
}


def weights(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 301) -> Any:
    generator = torch.Generator().manual_seed(0)
    return (0.05 * torch.randn(37, size, generator=generator)).to(device, dtype)


def step_of(found: QuantizedWeight) -> torch.Tensor:
    """The distance of two codes next to each other, for each value."""
    return found._spread(found.scales.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 301])
def test_int4_words(device: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    codes = torch.randint(0, INT4_CODES, (5, size), generator=generator).to(device)
    words = pack_int4(codes)
    assert words.dtype == torch.int32 and words.shape == (5, -(-size // 8))
    assert torch.equal(unpack_int4(words, size).long(), codes)
    every = torch.arange(INT4_CODES, device=device).view(2, 8)
    assert torch.equal(unpack_int4(pack_int4(every), 8).long(), every)
    # One mask takes two neighbours out as the low bits of two halves.
    halves = (pack_int4(every) & 0x000F000F).view(torch.int16)
    assert torch.equal(halves.long(), every[:, :2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_value_is_off_by_more_than_half_a_step(
    device: str, dtype: torch.dtype, name: str
) -> None:
    config, weight = CONFIGS[name], weights(device, dtype)
    found = quantize(weight, config)
    error = (found.dequantize(torch.float32) - weight.float()).abs()
    step = step_of(found)
    assert found.format == config.format and found.shape == weight.shape
    if config.format == "fp8":  # relative: 3 bits behind the first, and the subnormal ones
        assert (error <= (weight.float().abs() * 2**-4).clamp(min=2**-10 * step)).all()
    elif not config.refine:
        # A scale rounded down by 2^-9 leaves the largest value a quarter of a step short.
        assert (error <= 0.5001 * step).all()
    assert found.dequantize(dtype).dtype == dtype
    bits = 8 * found.nbytes / weight.numel()
    assert bits < {"int8": 9, "fp8": 9, "int4": 4 + 48 / 32}[config.format]


@pytest.mark.parametrize("name", [name for name in CONFIGS if not CONFIGS[name].refine])
def test_quantizing_what_was_quantized_changes_nothing(name: str) -> None:
    """A refined scale is not that of its largest value."""
    config = CONFIGS[name]
    once = quantize(weights(), config).dequantize(torch.float32)
    twice = quantize(once, config).dequantize(torch.float32)
    torch.testing.assert_close(twice, once, rtol=2e-2 if config.group_size else 1e-6, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_zeros_and_scales_of_all_sizes(name: str) -> None:
    weight = weights(size=256)
    weight[0] = 0
    weight[1, :128] = 0
    weight[2] = 1e-30
    weight[3] = -1e30
    weight[4] = torch.linspace(3.0, 3.1, 256)
    found = quantize(weight, CONFIGS[name])
    again = found.dequantize(torch.float32)
    assert again.isfinite().all() and not again[0].any()
    if CONFIGS[name].group_size is not None and 128 % CONFIGS[name].group_size == 0:
        assert not again[1, :128].any()
    torch.testing.assert_close(again[2:5], weight[2:5], rtol=0.15, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    weight = weights(dtype=torch.float16)
    weight[3, 5] = value
    with pytest.raises(ValueError, match=r"1 of \d+ values are infinite or NaN"):
        quantize(weight, CONFIGS[name])


def test_rows_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("int8", "int4 128 asymmetric refined"):
        whole = quantize(weights(), CONFIGS[name])
        with monkeypatch.context() as patched:
            patched.setattr("hf_triton_mlp.quantization.CHUNK_BYTES", 5 * 301 * 4)
            parts = quantize(weights(), CONFIGS[name])
        for one, other in zip(whole, parts, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def norm_of_errors(weight: torch.Tensor, config: QuantizationConfig) -> float:
    error = quantize(weight, config).dequantize(torch.float32) - weight
    return error.abs().pow(0.7).sum().item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_refined_errors_of_trained_weights_are_smaller(name: str, symmetric: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    matrices = [p.data for n, p in model.named_parameters() if p.dim() == 2 and "emb" not in n]
    assert len(matrices) >= 8
    for matrix in matrices[:8]:
        rounded, refined = (
            norm_of_errors(
                matrix,
                QuantizationConfig(
                    format="int4", group_size=64, symmetric=symmetric, refine=refine
                ),
            )
            for refine in (False, True)
        )
        assert refined < rounded


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"format": "int3"}, "'int3', supported: int8, int4, fp8"),
        ({"format": "int4", "group_size": 48}, "48; int4 has groups"),
        ({"format": "int8", "group_size": 0}, "0, supported"),
        ({"format": "int8", "group_size": 64.0}, "64.0, supported"),
        ({"format": "fp8", "group_size": 64}, "64; fp8 has one scale for each row"),
        ({"format": "int8", "symmetric": False}, "int8 is symmetric"),
        ({"format": "fp8", "refine": True}, "fp8 is symmetric and rounds"),
        (
            {"format": "fp8", "activations": "int8"},
            "'int8' with format 'fp8', supported: None",
        ),
        ({"format": "int4", "activations": "fp8"}, "activations is 'fp8' with format 'int4', supp"),
    ],
)
def test_configs_that_are_refused(arguments: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        QuantizationConfig(**arguments)


def test_what_is_no_floating_matrix() -> None:
    for tensor in (torch.zeros(3), torch.zeros(3, 3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="expected a floating matrix, found torch"):
            quantize(tensor, CONFIGS["int8"])


# --- flat groups --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("merged", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 2, 8, 16, 32, 64])
def test_flat_groups(dim: int, merged: int, groups: int) -> None:
    """Against values that are multiplied part by part, before they are merged."""
    generator = torch.Generator().manual_seed(groups)
    shape = [16, 32]
    codes = [torch.randint(-127, 128, shape, generator=generator) for _ in range(merged)]
    scales = [torch.rand(groups, 1, generator=generator) for _ in range(merged)]
    expected = [
        (part.view(groups, -1) * scale).view(shape)
        for part, scale in zip(codes, scales, strict=True)
    ]
    found = from_flat_groups(
        torch.cat(codes, dim=dim).to(torch.int8),
        torch.cat(scales, dim=dim),
        groups=groups,
        merged=merged,
        dim=dim,
    )
    assert torch.equal(found.dequantize(torch.float32), torch.cat(expected, dim=dim))


def test_merged_columns_have_the_scales_that_deepspeed_finds() -> None:
    """Value by value, by the index that its dequantize_kernel computes for weights (in, out)."""
    groups, merge_count = 8, 1  # the logarithm, as its modules keep it
    out, size = 16, 64
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (out, size), generator=generator).to(torch.int8)
    scales = torch.rand(1, groups << merge_count, generator=generator)
    merge_hidden = size >> merge_count
    stride = merge_hidden * out // groups
    expected = torch.empty(out, size)
    for k in range(size):
        part = k // merge_hidden
        for n in range(out):
            group = (k - part * merge_hidden + n * merge_hidden) // stride
            expected[n, k] = scales[0, (group << merge_count) + part] * codes[n, k]
    found = from_flat_groups(codes, scales, groups=groups, merged=1 << merge_count, dim=1)
    assert torch.equal(found.dequantize(torch.float32), expected)


def test_flat_groups_that_are_refused() -> None:
    codes = torch.zeros(6, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="4 groups of a matrix 6 x 32 cover neither whole rows"):
        from_flat_groups(codes, torch.ones(4), groups=4)
    with pytest.raises(ValueError, match="5 groups of a matrix 6 x 32"):
        from_flat_groups(codes, torch.ones(5), groups=5)
    with pytest.raises(ValueError, match="found 3 scales, expected 2 for each of 2"):
        from_flat_groups(codes, torch.ones(3), groups=2, merged=2)
    with pytest.raises(ValueError, match="6 values do not make 4 equal parts"):
        from_flat_groups(codes, torch.ones(8), groups=2, merged=4)
    with pytest.raises(ValueError, match=r"found torch.float32"):
        from_flat_groups(codes.float(), torch.ones(2), groups=2)
