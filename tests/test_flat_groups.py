"""TritonMLP with int8 weights of its own, whose scales are of flat groups, as in DeepSpeed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_triton_mlp import MLPConfig, TritonMLP


def flat(codes: torch.Tensor, scales: torch.Tensor, merged: int, dim: int) -> torch.Tensor:
    """The weight of codes whose scales are of flat groups, part by part as before the merge."""
    parts = codes.double().chunk(merged, dim)
    # Merged columns have their scales side by side, too.
    groups = scales.double().view(merged, -1) if dim == 0 else scales.double().view(-1, merged).t()
    values = [
        (part.reshape(groups.shape[1], -1) * group[:, None]).view(part.shape)
        for part, group in zip(parts, groups, strict=True)
    ]
    return torch.cat(values, dim)


@pytest.mark.parametrize(
    ("q_groups", "merge_count", "extra"),
    [(1, 1, False), (1, 1, True), (4, 1, False), (8, 2, False), (2, 4, True), (64, 2, False)],
)
@pytest.mark.parametrize("norm", ["layer_norm", None])
def test_int8_with_flat_groups(
    norm: str | None, q_groups: int, merge_count: int, extra: bool, device: str
) -> None:
    hidden, intermediate = 16, 32
    count = merge_count * q_groups * (1 + extra)
    generator = torch.Generator().manual_seed(count)
    scales = 0.001 + 0.001 * torch.rand(4, count, generator=generator)
    config = MLPConfig(
        hidden_size=hidden, intermediate_size=intermediate, dtype=torch.int8, norm=norm
    )
    # DeepSpeed's tensor of a layer has four rows, which zeros fill up.
    given = torch.cat((scales, torch.zeros(4, 3)), dim=1)
    mlp = TritonMLP(
        config, q_scales=given, q_groups=q_groups, merge_count=merge_count, mlp_extra_grouping=extra
    )
    assert 2**mlp.merge_count == merge_count and mlp.q_groups == q_groups * (1 + extra)
    assert mlp.inter_w is not None and mlp.output_w is not None and mlp.output_b is not None
    assert mlp.inter_w.dtype == mlp.output_w.dtype == torch.int8
    assert mlp.output_b.dtype == torch.float16
    state = {
        name: torch.randint(-127, 128, value.shape, generator=generator).to(torch.int8)
        if value.dtype == torch.int8
        else torch.rand(value.shape, generator=generator)
        for name, value in mlp.state_dict().items()
    }
    assert state.keys() >= {"inter_w", "inter_b", "output_w", "output_b"}
    assert not any("scales" in name for name in state)
    mlp.load_state_dict(state)
    dense = {name: value.double() for name, value in mlp.state_dict().items()}
    dense["inter_w"] = flat(state["inter_w"], scales[2], merge_count, 0)
    dense["output_w"] = flat(state["output_w"], scales[3], merge_count, 1)
    reference = TritonMLP(replace(config, dtype=torch.float32)).double()
    reference.load_state_dict(dense)
    x, r = torch.randn(2, 3, hidden, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        exact = reference(x, r)
        for dtype, tolerance in ((torch.float16, 2e-3), (torch.float32, 1e-5)):
            mlp.to(device, dtype)
            assert mlp.inter_scales.dtype == torch.float32
            found = mlp(x.to(device, dtype), r.to(device, dtype))
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.double().cpu(), exact, rtol=tolerance, atol=tolerance * exact.abs().max()
            )
            with pytest.raises(TypeError, match="the weights are"):
                mlp(x.to(device, torch.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dtype": torch.float32, "q_scales": torch.ones(2, 1)}, "q_scales are for the dtype"),
        ({"q_scales": None}, "found torch.int8 without q_scales"),
        ({"dtype": torch.float32, "q_scales": None, "q_groups": 4}, "q_groups, merge_count and"),
        ({"q_scales": torch.ones(2, 3), "q_groups": 3}, "inter_w: 3 groups of a matrix 32 x 16"),
        ({"q_scales": torch.ones(2, 3)}, "inter_w: found 3 scales, expected 1 for each of 1"),
        ({"q_scales": torch.ones(2, 1), "q_groups": 2}, "inter_w: found 1 scales, expected 2"),
        ({"q_scales": torch.ones(2, 3), "merge_count": 3}, "merge_count is 3, supported: powers"),
        ({"q_scales": torch.full((2, 1), torch.nan)}, "inter_w: scales are infinite or NaN"),
        (
            {"q_scales": torch.ones(2, 2), "merge_count": 2, "gated": True},
            "merged checkpoints of a gated MLP",
        ),
    ],
)
def test_int8_that_is_refused(arguments: dict[str, Any], text: str) -> None:
    names = {"dtype", "gated"}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "dtype": torch.int8}
    config = MLPConfig(**{**sizes, **{k: v for k, v in arguments.items() if k in names}})
    with pytest.raises(ValueError, match=text):
        TritonMLP(config, **{k: v for k, v in arguments.items() if k not in names})


def test_a_gated_mlp_in_int8() -> None:
    config = MLPConfig(
        hidden_size=16, intermediate_size=32, dtype=torch.int8, gated=True, activation="silu",
        norm=None, up_bias=False, down_bias=False,
    )  # fmt: skip
    mlp = TritonMLP(config, q_scales=(torch.full((8,), 0.002), torch.full((8,), 0.001)), q_groups=8)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.random_(-127, 128)
        assert mlp.inter_w is not None and mlp.output_w is not None
        up, gate = (0.002 * mlp.inter_w.double()).chunk(2)
        x = torch.randn(3, 16)
        hidden = torch.nn.functional.silu(x.double() @ gate.t()) * (x.double() @ up.t())
        exact = hidden @ (0.001 * mlp.output_w.double()).t()
        torch.testing.assert_close(mlp(x.half()).double(), exact, rtol=1e-2, atol=1e-2)
