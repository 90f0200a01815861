"""The four operations against float32 (float64 for float32) references.

On the CPU the public operations run PyTorch; the kernels themselves are tested here natively under
the marker `gpu`, and by tests/test_interpreter.py, which runs this file with TRITON_INTERPRET=1.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from hf_triton_mlp import bound, tuning
from hf_triton_mlp.kernels import INTERPRETED
from hf_triton_mlp.kernels.activations import ACTIVATIONS
from hf_triton_mlp.launchers import (
    NO_SUMMANDS,
    BranchNorm,
    Launch,
    Norm,
    Summands,
    launch,
    linear,
    linear_launch,
    norm_sum,
)
from hf_triton_mlp.ops import (
    BRANCH_NORMS,
    NORMS,
    GELUGemmOp,
    MLPGemmOp,
    MLPWeights,
    ResidualAddOp,
    VectorMatMulOp,
    norm_function,
)
from hf_triton_mlp.tma import addressable
from hf_triton_mlp.tuning import PDL_CAPABILITY, TMA_CAPABILITY, Plan

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
if INTERPRETED:
    # The interpreter truncates when it stores bfloat16 where a GPU rounds to nearest, so an error
    # of up to twice torch's means nothing there.
    DTYPES = [torch.float32, torch.float16]

#: tokens: one, the FMA kernel's most, one row over it, the padded 16, tiles and a remainder.
TOKENS = [1, 4, 5, 17, 70]


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS error relative to the reference's RMS; NaN never compares as small."""
    assert actual.shape == reference.shape
    return ((actual.double() - reference.double()).norm() / reference.double().norm()).item()


def assert_accurate(
    actual: torch.Tensor, torch_path: torch.Tensor, reference: torch.Tensor
) -> None:
    """At most twice torch's own error; torch is sometimes exact to a bit or two, so 2 eps more.

    2 eps of the dtype is one rounding of the output and one of a summand.
    """
    bound = 2 * error(torch_path, reference) + 2 * torch.finfo(actual.dtype).eps
    measured = error(actual, reference)
    assert measured <= bound, f"relative RMS error {measured:.3e}, bound {bound:.3e}"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element that no kernel writes is found."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.manual_seed(0)


def projection(out: int, inp: int, dtype: torch.dtype, device: str, conv1d: bool) -> torch.Tensor:
    """(out, in), stored that way or, as Conv1D does, (in, out)."""
    weight = torch.randn(inp, out) if conv1d else torch.randn(out, inp)
    weight = (weight / inp**0.5).to(device, dtype)
    return weight.t() if conv1d else weight


def mlp_weights(
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    device: str,
    *,
    conv1d: bool = False,
    gated: bool = False,
    bias: bool = True,
    affine: bool = True,
) -> MLPWeights:
    def vector(size: int, present: bool = True, around: float = 0.0) -> torch.Tensor | None:
        return (around + 0.3 * torch.randn(size)).to(device, dtype) if present else None

    up = projection(intermediate, hidden, dtype, device, conv1d)
    gate = projection(intermediate, hidden, dtype, device, conv1d) if gated else None
    if gate is not None and not conv1d:  # one matrix, as in TritonMLP.inter_w
        up, gate = torch.cat((up, gate)).chunk(2)
    return MLPWeights(
        up,
        projection(hidden, intermediate, dtype, device, conv1d),
        vector(intermediate, bias),
        vector(hidden, bias),
        gate,
        vector(intermediate, gated and bias),
        vector(hidden, affine, around=1.0),
        vector(hidden, affine),
    )


def wide(tensors: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def check_mlp_gemm(op: MLPGemmOp, weights: MLPWeights, tokens: int, **options: bool) -> None:
    hidden, like = weights.up.shape[1], weights.up
    x = torch.randn(tokens, hidden).to(like)
    residual = torch.randn(tokens, hidden).to(like) if options.get("residual", True) else None
    bias = torch.randn(hidden).to(like) if options.get("bias", True) else None
    with torch.no_grad():
        actual = op(x, weights, residual, bias)
        torch_path = op.compose(x, weights, residual, bias)
        if like.dtype == torch.float32:
            w64 = MLPWeights(*wide(weights))  # type: ignore[arg-type]
            reference = op.compose(x.double(), w64, *wide((residual, bias)))
        else:
            reference = op.reference(x, weights, residual, bias)
    assert actual.dtype == like.dtype and actual.device == like.device
    assert_accurate(actual, torch_path, reference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("conv1d", [False, True])
def test_mlp_gemm_sizes(device: str, dtype: torch.dtype, tokens: int, conv1d: bool) -> None:
    for hidden, intermediate in ((17, 33), (64, 100)):
        weights = mlp_weights(hidden, intermediate, dtype, device, conv1d=conv1d)
        check_mlp_gemm(MLPGemmOp(activation="gelu_new"), weights, tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [2, 19])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_gemm_activations(device: str, tokens: int, gated: bool, activation: str) -> None:
    weights = mlp_weights(40, 72, torch.float16, device, gated=gated)
    check_mlp_gemm(MLPGemmOp(activation=activation), weights, tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pre_norm", [True, False])
def test_mlp_gemm_options(device: str, tokens: int, norm: str, pre_norm: bool) -> None:
    op = MLPGemmOp(activation="gelu", norm=norm, norm_eps=1e-3, pre_norm=pre_norm)
    for residual, bias, weight_bias, affine in itertools.product([True, False], repeat=4):
        weights = mlp_weights(33, 65, torch.float32, device, bias=weight_bias, affine=affine)
        check_mlp_gemm(op, weights, tokens, residual=residual, bias=bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 3, 19])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_an_offset_norm_is_gemmas(device: str, tokens: int, pre_norm: bool) -> None:
    weights = mlp_weights(48, 72, torch.float16, device, gated=True, bias=False)
    weights = weights._replace(norm_weight=weights.norm_weight - 1, norm_bias=None)
    norm = GemmaRMSNorm(48, eps=1e-3).to(device, torch.float16)
    norm.weight.data.copy_(weights.norm_weight)
    options = {"activation": "gelu_pytorch_tanh", "norm_eps": 1e-3, "pre_norm": pre_norm}
    op = MLPGemmOp(norm="rms_norm_offset", **options)
    check_mlp_gemm(op, weights, tokens, bias=False)
    x = torch.randn(tokens, 48).to(weights.up)
    with torch.no_grad():
        own = norm(x)
        ours = norm_function("rms_norm_offset", weights.norm_weight, None, 1e-3)(x)
        assert torch.equal(ours, own)
        absent = weights._replace(norm_weight=None)
        plain = MLPGemmOp(norm="rms_norm", **options)(x, absent)
        torch.testing.assert_close(op(x, absent), plain, rtol=0, atol=0)
        torch.testing.assert_close(op.compose(x, absent, None, None), plain, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 19])
def test_what_joins_a_residual_may_be_scaled(device: str, dtype: torch.dtype, tokens: int) -> None:
    for gated, summand in ((True, True), (False, False)):
        weights = mlp_weights(40, 48, dtype, device, gated=gated)
        op = MLPGemmOp(activation="silu", norm="rms_norm", branch_scale=0.3)
        check_mlp_gemm(op, weights, tokens, residual=summand, bias=not summand)
    x = torch.randn(tokens, 40).to(weights.up)
    with torch.no_grad():
        expected = MLPGemmOp(activation="silu", norm="rms_norm", norm_eps=1e-5 / 0.3**2)(x, weights)
        torch.testing.assert_close(op(x, weights), 0.3 * expected, rtol=5e-3, atol=5e-3)
    with pytest.raises(ValueError, match=r"0\.3.*pre-norm"):
        MLPGemmOp(activation="silu", pre_norm=False, branch_scale=0.3)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the proof of each patch runs them")
@pytest.mark.parametrize("name", ["skinny", "tiled"])
@pytest.mark.parametrize("residual", [True, False])
def test_bound_launches_scale_it_too(
    name: str, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"skinny": Plan(kernel="skinny", block_n=4, block_k=64), "tiled": PLANS["three splits"]}
    monkeypatch.setattr(tuning, "plan", lambda *arguments: plan[name])
    calls: list[Launch] = []
    monkeypatch.setattr(bound, "bind", lambda call, moving: calls.append(call) or launch(call))
    weights = mlp_weights(40, 48, torch.float16, "cpu", gated=True, bias=False)
    x, r = torch.randn(2, 2, 40).to(weights.up)
    summand = r if residual else None
    bound.BoundMLP(weights.up, weights.up.dtype).bind(
        x,
        summand,
        None,
        weights._replace(norm_bias=None),
        activation="silu",
        norm="rms_norm",
        norm_eps=1e-5,
        branch_scale=0.3,
        early=False,
    )
    op = MLPGemmOp(activation="silu", norm="rms_norm", branch_scale=0.3)
    weights = weights._replace(norm_bias=None)
    assert torch.equal(calls[-1].tensors[-1], op(x, weights, summand))


FORMS = {"pre-norm": {}, "post-norm": {"pre_norm": False}, "scaled": {"branch_scale": 0.3}}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 19])
@pytest.mark.parametrize("form", FORMS)
def test_the_carry_may_be_left_out(form: str, tokens: int, device: str) -> None:
    """As all but one of the processes do that share the weights: the sum has it once."""
    weights = mlp_weights(40, 48, torch.float32, device, gated=True)
    op = MLPGemmOp(activation="silu", norm="layer_norm", **FORMS[form])
    x, r = torch.randn(2, tokens, 40).to(weights.up)
    halves = []
    for first, half in ((True, slice(24)), (False, slice(24, 48))):
        part = weights._replace(
            up=weights.up[half],
            down=weights.down[:, half].contiguous(),
            up_bias=weights.up_bias[half],
            down_bias=weights.down_bias if first else None,
            gate=weights.gate[half],
            gate_bias=weights.gate_bias[half],
        )
        halves.append(op(x, part, r, carries=first))
    with torch.no_grad():
        torch.testing.assert_close(sum(halves), op(x, weights, r), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"whole"):
        MLPGemmOp(activation="silu", norm=None, branch_norm="rms_norm")(
            x, weights._replace(norm_weight=None, norm_bias=None), carries=False
        )


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the proof of each patch runs them")
@pytest.mark.parametrize("form", [*FORMS, "parallel", "alone"])
def test_bound_launches_leave_it_out_too(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moving: list[torch.Tensor | None] = []

    def launch_once(call: Launch, tensors: tuple[torch.Tensor | None, ...]) -> None:
        launch(call)
        moving[:] = tensors

    monkeypatch.setattr(bound, "bind", launch_once)
    weights = mlp_weights(40, 48, torch.float32, "cpu", gated=True)._replace(down_bias=None)
    x, r, u = torch.randn(3, 2, 40)
    given = {"parallel": (x, r, u), "alone": (x, r, None)}.get(form, (x, r, None))
    norm = "layer_norm" if form in FORMS else None
    options = FORMS.get(form, {})
    for carries in (True, False):
        bound.BoundMLP(weights.up, torch.float32).bind(
            *given,
            weights,
            activation="silu",
            norm=norm,
            norm_eps=1e-5,
            **options,
            carries=carries,
            early=False,
        )
        with torch.no_grad():
            if norm is not None:
                op = MLPGemmOp(activation="silu", norm=norm, **options)
                expected = op.compose(x, weights, r, None, carries)
            else:
                summands = () if not carries else (x, r) if form == "parallel" else (r,)
                source = u if form == "parallel" else x
                expected = GELUGemmOp(activation="silu").compose(source, weights, *summands)
        torch.testing.assert_close(moving[3], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 19])
def test_what_joins_a_residual_may_be_normed(device: str, dtype: torch.dtype, tokens: int) -> None:
    for kind, front, hidden, gated, summand, affine in (
        ("rms_norm_offset", True, 17, True, True, True),
        ("rms_norm", False, 24, True, True, True),
        ("rms_norm", True, 40, False, False, False),
    ):
        norm, offset = kind if front else None, float(kind == "rms_norm_offset")
        weights = mlp_weights(hidden, 33, dtype, device, gated=gated, bias=gated, affine=affine)
        weights = weights._replace(norm_bias=None)
        if affine:
            attention, output = (1 - offset + 0.3 * torch.randn(2, hidden)).to(weights.up)
            weights = weights._replace(
                norm_weight=weights.norm_weight - offset,
                attention_norm_weight=attention,
                output_norm_weight=output,
            )
        op = MLPGemmOp(activation="silu", norm=norm, norm_eps=1e-3, branch_norm=kind)
        check_mlp_gemm(op, weights, tokens, residual=summand, bias=not summand)


@pytest.mark.parametrize("device", DEVICES[:1] if INTERPRETED else DEVICES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [17, 768, 8209])
@pytest.mark.parametrize("kind", BRANCH_NORMS)
def test_a_sum_of_a_norm_and_its_norm(
    device: str, dtype: torch.dtype, hidden: int, kind: str
) -> None:
    """Rows that are a part of longer ones; the longest are more than one block."""
    x, residual = torch.randn(2, 3, hidden + 8).to(device, dtype)[..., 8:]
    weight, next_weight = (0.5 + 0.3 * torch.randn(2, hidden)).to(x)
    bias = torch.randn(hidden).to(x)
    pdl = device == "cuda" and torch.cuda.get_device_capability() >= PDL_CAPABILITY
    for r, b, w, normed in (
        (residual, bias, weight, True),
        (residual, None, None, True),
        (None, None, weight, False),
    ):
        total, out = torch.empty(2, 3, hidden).to(x)
        found = BranchNorm(kind, 1e-3, w, total, next_weight, out if normed else None)
        norm_sum(x, b, r, found, pdl=pdl)

        def formula(
            x: torch.Tensor, r: torch.Tensor | None, b: torch.Tensor | None, *w: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            branch, norm = (norm_function(kind, each, None, 1e-3) for each in w)
            s = branch(x if b is None else x + b)
            s = s if r is None else r + s
            return s, norm(s)

        plain = formula(x, r, b, w, next_weight)
        exact = formula(*wide((x, r, b, w, next_weight)))
        assert_accurate(total, plain[0], exact[0])
        if normed:
            assert_accurate(out, plain[1], exact[1])
        else:
            assert out.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("row", ["shifted", "first is all", "last is all", "constant"])
def test_norms_of_rows_that_cancel(device: str, dtype: torch.dtype, tokens: int, row: str) -> None:
    weights = mlp_weights(768, 48, dtype, device)
    x = torch.randn(tokens, 768)
    if row == "shifted":
        x += 50
    elif row == "constant":
        x[:] = 3
    else:
        x[:, 0 if row == "first is all" else -1] = 3000
    x = x.to(weights.up)
    op = MLPGemmOp(activation="gelu_new", pre_norm=False)
    with torch.no_grad():
        reference = op.reference(x, weights)
        if dtype == torch.float32:
            reference = op.compose(x.double(), MLPWeights(*wide(weights)), None, None)  # type: ignore[arg-type]
        assert_accurate(op(x, weights), op.compose(x, weights, None, None), reference)


TILE = {"block_m": 16, "block_n": 32, "block_k": 32}
PLANS = {
    "tiled": Plan(kernel="tiled", **TILE, num_stages=2),
    "three splits": Plan(kernel="tiled", **TILE, splits=3, lines=1),
    "two even splits": Plan(kernel="tiled", **TILE, splits=2),
    "more splits than depth": Plan(kernel="tiled", **TILE, splits=8, lines=1),
    "library": Plan(kernel="library"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_way_to_multiply_many_rows(
    device: str, dtype: torch.dtype, name: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = PLANS[name]
    if device == "cuda":
        chosen = replace(chosen, pdl=torch.cuda.get_device_capability() >= PDL_CAPABILITY)
    monkeypatch.setattr(tuning, "plan", lambda *arguments: chosen)
    for activation, pre_norm, bias in (("gelu_new", True, True), ("silu", False, False)):
        for hidden, intermediate in ((64, 192), (40, 72)):
            weights = mlp_weights(hidden, intermediate, dtype, device, gated=gated, bias=bias)
            op = MLPGemmOp(activation=activation, pre_norm=pre_norm)
            check_mlp_gemm(op, weights, 21, residual=bias, bias=bias)
    x, add, add2 = torch.randn(3, 19, 40).to(weights.up)
    op, add_bias = GELUGemmOp(activation="relu"), torch.randn(40).to(x)
    with torch.no_grad():
        assert_accurate(
            op(x, weights, add, add2, add_bias),
            op.compose(x, weights, add, add2, add_bias),
            op.reference(x, weights, add, add2, add_bias),
        )


PERSISTENT = Plan(
    kernel="persistent", block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3, group_m=2
)
PERSISTENT_PLANS = {
    "a program a tile": (PERSISTENT, 63),
    "three programs": (replace(PERSISTENT, programs=3, num_warps=1), 130),
    "depth of two, four parts": (replace(PERSISTENT, block_n=128, block_k=128, num_warps=2), 17),
    "three splits": (replace(PERSISTENT, splits=3, programs=2, lines=2), 63),
    "more splits than depth": (replace(PERSISTENT, splits=5, num_warps=1), 17),
}


def needs_tma(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < TMA_CAPABILITY:
        pytest.skip("needs a GPU with a tensor memory accelerator")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("name", PERSISTENT_PLANS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_way_to_share_tiles_among_programs(
    device: str, dtype: torch.dtype, name: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_tma(device)
    chosen, tokens = PERSISTENT_PLANS[name]
    chosen = replace(chosen, pdl=device == "cuda")
    monkeypatch.setattr(tuning, "plan", lambda *arguments: chosen)
    # Rows are whole multiples of 16 bytes and nothing is whole blocks.
    for activation, bias in (("gelu_new", True), ("silu", False)):
        weights = mlp_weights(136, 200, dtype, device, gated=gated, bias=bias)
        check_mlp_gemm(MLPGemmOp(activation=activation), weights, tokens, residual=bias, bias=bias)
    x, add, add2 = torch.randn(3, tokens, 136).to(weights.up)
    op, add_bias = GELUGemmOp(activation="relu"), torch.randn(136).to(x)
    with torch.no_grad():
        assert_accurate(
            op(x, weights, add, add2, add_bias),
            op.compose(x, weights, add, add2, add_bias),
            op.reference(x, weights, add, add2, add_bias),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_persistent_activations(
    device: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_tma(device)
    monkeypatch.setattr(tuning, "plan", lambda *arguments: PERSISTENT)
    check_mlp_gemm(MLPGemmOp(activation=activation), mlp_weights(64, 72, torch.float16, device), 19)
    gated = mlp_weights(64, 72, torch.float16, device, gated=True)
    # One of the two has the gate at the higher address.
    for weights in (gated, gated._replace(up=gated.gate, gate=gated.up)):
        check_mlp_gemm(MLPGemmOp(activation=activation), weights, 19)


@pytest.mark.parametrize("device", DEVICES)
def test_what_tma_cannot_address(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kernels compute it, whatever the plan says."""
    needs_tma(device)
    like = torch.empty(0, dtype=torch.float16, device=device)
    (whole, gate), broad = torch.randn(2, 72, 64).to(like), torch.randn(72, 80).to(like)
    apart = torch.randn(2 * 73 * 64 + 8).to(like).as_strided((2, 73, 64), (73 * 64 + 8, 64, 1))
    x = torch.randn(20, 81).to(like)
    assert addressable(x[:, :64].contiguous(), whole, gate)
    assert addressable(torch.randn(20, 80).to(like)[:, 8:72], broad[:, :64])
    cases = (
        (x[:, :64], whole, None, None),  # rows of 162 bytes
        (torch.randn(20, 80).to(like)[:, 1:65], whole, None, None),  # an address that is odd
        (x[:1, :64].expand(20, 64), whole, None, None),  # one row 20 times
        (x[:, :64].contiguous(), whole[:70], None, None),  # rows of the result
        (x[:, :33].contiguous(), torch.randn(72, 33).to(like), None, None),
        (x[:, :64].contiguous(), torch.randn(64, 72).to(like).t(), None, None),
        (x[:, :64].contiguous(), whole, broad[:, :64], None),
        (x[:, :64].contiguous(), whole, whole, None),
        (x[:, :64].contiguous(), apart[0, :72], apart[1, :72], None),  # not by whole rows
        (x[:, :64].contiguous(), whole, None, x[:, 9:]),
    )
    monkeypatch.setattr(tuning, "plan", lambda *arguments: PERSISTENT)
    for rows, weight, gate_weight, add in cases:
        assert not addressable(rows, weight, gate_weight, (None, add))
        if device == "cpu" and not INTERPRETED:
            continue
        with torch.no_grad():
            actual = linear(
                rows,
                weight,
                None,
                gate=(gate_weight, None),
                activation="silu",
                summands=Summands(add=add),
            )
            own, reference = (
                torch.nn.functional.silu(r @ (w if g is None else g).t())
                * (1 if g is None else r @ w.t())
                + (0 if a is None else a)
                for r, w, g, a in (
                    (rows, weight, gate_weight, add),
                    wide((rows, weight, gate_weight, add)),
                )
            )
        assert_accurate(actual, own, reference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block_k", "programs", "lines"), [(16, 0, 1), (16, 0, 0), (64, 0, 0), (64, 1, 1), (64, 3, 0)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_every_way_to_multiply_very_few_rows(
    device: str,
    dtype: torch.dtype,
    block_k: int,
    programs: int,
    lines: int,
    gated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lines == 0 and block_k == 16 and device == "cpu":
        pytest.skip("what is loaded early shows on a GPU only")
    chosen = Plan(kernel="skinny", block_n=4, block_k=block_k, programs=programs, lines=lines)
    if device == "cuda":
        chosen = replace(chosen, pdl=torch.cuda.get_device_capability() >= PDL_CAPABILITY)
    for tokens, together, norm, pre_norm, bias in (
        (1, 1, "layer_norm", True, True),
        (3, 1, "rms_norm_offset", False, False),
        (3, 4, "layer_norm", True, True),
        (2, 2, "layer_norm", False, False),
    ):
        plan = replace(chosen, block_m=together)
        monkeypatch.setattr(tuning, "plan", lambda *arguments, plan=plan: plan)
        weights = mlp_weights(24, 45, dtype, device, gated=gated, bias=bias)
        op = MLPGemmOp(activation="silu", norm=norm, pre_norm=pre_norm)
        check_mlp_gemm(op, weights, tokens, residual=bias, bias=bias)


#: Warps and depth share K; the programs share the columns.
STREAMS = {
    "a block for each program": Plan(kernel="stream", block_n=8, block_k=32, num_warps=1),
    "rows wait for nothing": Plan(
        kernel="stream", block_n=8, block_k=128, num_warps=2, num_stages=8, programs=2
    ),
    "one program": Plan(
        kernel="stream", block_n=16, block_k=64, num_warps=2, num_stages=3, programs=1, lines=1
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_way_to_multiply_few_rows(
    device: str, dtype: torch.dtype, name: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = STREAMS[name]
    if device == "cuda":
        chosen = replace(chosen, pdl=torch.cuda.get_device_capability() >= PDL_CAPABILITY)
    for tokens, hidden, norm, pre_norm, bias, conv1d in (
        (1, 40, "layer_norm", True, True, False),
        (3, 64, "rms_norm", False, True, False),
        (8, 45, "layer_norm", False, False, True),
        (9, 64, "rms_norm_offset", True, False, False),
        (2, 45, "rms_norm_offset", False, True, False),
        (16, 45, "layer_norm", True, True, False),
    ):
        plan = replace(chosen, block_m=8 if tokens <= 8 else 16)
        plan.check(tokens, dtype)
        monkeypatch.setattr(tuning, "plan", lambda *arguments, plan=plan: plan)
        weights = mlp_weights(
            hidden, 72, dtype, device, conv1d=conv1d, gated=gated, bias=bias, affine=bias
        )
        op = MLPGemmOp(activation="silu", norm=norm, pre_norm=pre_norm)
        check_mlp_gemm(op, weights, tokens, residual=bias, bias=bias)


@pytest.mark.parametrize("device", DEVICES[:1] if INTERPRETED else DEVICES[1:])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_rows_beyond_the_last_are_not_stored(device: str, tokens: int) -> None:
    plan = Plan(kernel="stream", block_m=16, block_n=8, block_k=32, num_warps=1)
    weight = projection(20, 40, torch.float16, device, False)
    x = torch.randn(tokens, 40).to(weight)
    out, carry = torch.empty(17, 20).to(weight), torch.empty(17, 40).to(weight)
    norm = Norm("layer_norm", None, None, 1e-5, carry[:tokens], False)
    launch(
        linear_launch(
            plan, x, weight, None, (None, None), None, norm, NO_SUMMANDS, out[:tokens], False
        )
    )
    assert torch.equal(carry[:tokens], x) and not out[:tokens].isnan().any()
    assert out[tokens:].isnan().all() and carry[tokens:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 511])
@pytest.mark.parametrize("conv1d", [False, True])
def test_mlp_gemm_model_sizes(dtype: torch.dtype, tokens: int, conv1d: bool) -> None:
    weights = mlp_weights(768, 3072, dtype, "cuda", conv1d=conv1d)
    check_mlp_gemm(MLPGemmOp(activation="gelu_new"), weights, tokens)
    gated = mlp_weights(511, 1400, dtype, "cuda", conv1d=conv1d, gated=True, bias=False)
    check_mlp_gemm(MLPGemmOp(activation="silu", norm="rms_norm"), gated, tokens)


@pytest.mark.gpu
def test_large_mean_does_not_cancel() -> None:
    """A row with mean 1000 and deviation 1: E[x²] - E[x]² would lose every digit in float32."""
    weights = mlp_weights(512, 64, torch.float32, "cuda")
    x = torch.randn(3, 512, device="cuda") + 1000
    op = MLPGemmOp(activation="relu")
    with torch.no_grad():
        w64 = MLPWeights(*wide(weights))  # type: ignore[arg-type]
        reference = op.compose(x.double(), w64, None, None) - x.double()
        actual, torch_path = op(x, weights) - x, op.compose(x, weights, None, None) - x
    assert_accurate(actual, torch_path, reference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 18])
def test_gelu_gemm(device: str, dtype: torch.dtype, tokens: int) -> None:
    op = GELUGemmOp(activation="gelu_new")
    weights = mlp_weights(33, 70, dtype, device)
    x, add, add2 = (torch.randn(tokens, 33).to(device, dtype) for _ in range(3))
    bias = torch.randn(33).to(device, dtype)
    for summands in ((), (add,), (add, add2), (add, add2, bias), (None, None, bias)):
        with torch.no_grad():
            actual = op(x, weights, *summands)
            torch_path = op.compose(x, weights, *summands)
            w64 = MLPWeights(*wide(weights))  # type: ignore[arg-type]
            assert_accurate(actual, torch_path, op.compose(x.double(), w64, *wide(summands)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv1d", [False, True])
def test_vector_matmul(device: str, dtype: torch.dtype, conv1d: bool) -> None:
    op = VectorMatMulOp()
    weight = projection(65, 129, dtype, device, conv1d)
    for shape, with_bias in (
        ((129,), True),
        ((2, 129), False),
        ((2, 3, 129), True),
        ((20, 129), False),
    ):
        x = torch.randn(shape).to(device, dtype)
        bias = torch.randn(65).to(device, dtype) if with_bias else None
        with torch.no_grad():
            actual = op(x, weight, bias)
            torch_path = torch.nn.functional.linear(x, weight, bias)
            reference = torch.nn.functional.linear(*wide((x, weight, bias)))  # type: ignore[arg-type]
        assert_accurate(actual, torch_path, reference)
        assert error(op.reference(x, weight, bias), reference) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_add(device: str, dtype: torch.dtype) -> None:
    op = ResidualAddOp()
    hidden, residual, attention = (torch.randn(5, 33).to(device, dtype) for _ in range(3))
    biases = [torch.randn(33).to(device, dtype) for _ in range(2)]
    copies = [t.clone() for t in (hidden, residual, attention)]
    for ranks in (1, 2, 3):
        serial = op(hidden, residual, attention, *biases, mp_size=ranks)
        summands = residual.double() + attention.double() + biases[0].double() + biases[1].double()
        reference = hidden.double() + summands / ranks
        torch_path = op.compose(hidden, residual, attention, *biases, 1 / ranks, 1 / ranks)
        assert_accurate(serial, torch_path, reference)
        parallel = op(hidden, residual, attention, *biases, mp_size=ranks, mlp_after_attn=False)
        reference += attention.double() * (1 - 1 / ranks)
        assert_accurate(parallel, torch_path, reference)
    assert torch.equal(op(hidden), hidden) and op(hidden).data_ptr() != hidden.data_ptr()
    for tensor, copy in zip((hidden, residual, attention), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_ranks_add_up_to_the_whole() -> None:
    """P ranks' results sum to the unsharded one: residual and biases enter exactly once."""
    op = ResidualAddOp()
    parts = [torch.randn(4, 16) for _ in range(4)]
    residual, attention, bias = torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)
    total = sum(op(p, residual, attention, bias, bias, mp_size=4) for p in parts)
    torch.testing.assert_close(total, op(sum(parts), residual, attention, bias, bias))


@pytest.mark.parametrize("device", DEVICES)
def test_empty_and_leading_dimensions(device: str) -> None:
    weights = mlp_weights(24, 40, torch.float32, device)
    op, gelu = MLPGemmOp(activation="relu"), GELUGemmOp(activation="relu")
    branch = MLPGemmOp(activation="relu", norm=None, branch_norm="rms_norm")
    for shape in ((0, 24), (2, 0, 24), (24,), (2, 3, 24), (1, 2, 3, 24)):
        x = torch.randn(shape).to(device)
        with torch.no_grad():
            assert op(x, weights, x).shape == x.shape
            assert branch(x, weights._replace(norm_bias=None), x).shape == x.shape
            assert gelu(x, weights).shape == x.shape
            assert VectorMatMulOp()(x, weights.up).shape == (*shape[:-1], 40)
            assert ResidualAddOp()(x, x).shape == x.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [3, 21])
def test_strided_inputs(device: str, tokens: int) -> None:
    weights = mlp_weights(24, 40, torch.float32, device)
    op = MLPGemmOp(activation="relu")
    base = torch.randn(tokens, 100).to(device)
    sliced, transposed = base[:, 30:54], torch.randn(24, tokens).to(device).t()
    spaced = torch.randn(tokens, 48).to(device)[:, ::2]
    with torch.no_grad():
        for x, residual in ((sliced, transposed), (transposed, spaced), (spaced, sliced)):
            before = x.clone(), residual.clone()
            expected = op(x.contiguous(), weights, residual.contiguous())
            assert torch.equal(op(x, weights, residual), expected)
            assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_same_bits_every_run(device: str, tokens: int) -> None:
    weights = mlp_weights(130, 300, torch.float16, device)
    x = torch.randn(tokens, 130).to(device, torch.float16)
    op = MLPGemmOp(activation="gelu")
    with torch.no_grad():
        first = op(x, weights, x)
        assert all(torch.equal(op(x, weights, x), first) for _ in range(2 if INTERPRETED else 5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_through(device: str, tokens: int, activation: str) -> None:
    weights = mlp_weights(24, 40, torch.float32, device)
    x = torch.randn(tokens, 24).to(device)
    x[0, 3] = float("nan")
    with torch.no_grad():
        out = GELUGemmOp(activation=activation)(x, weights)
    assert out[0].isnan().all() and not out[1:].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device: str) -> None:
    weights = mlp_weights(12, 20, torch.float32, device, gated=True)
    tensors = [t.detach().requires_grad_() for t in weights if t is not None]
    x = torch.randn(3, 12, device=device, requires_grad=True)
    op = MLPGemmOp(activation="silu")
    out = op(x, MLPWeights(*tensors), x)
    grads = torch.autograd.grad(out.square().sum(), [x, *tensors])
    w64 = [t.detach().double().requires_grad_() for t in tensors]
    x64 = x.detach().double().requires_grad_()
    out64 = op.compose(x64, MLPWeights(*w64), x64, None)
    for grad, expected in zip(
        grads, torch.autograd.grad(out64.square().sum(), [x64, *w64]), strict=True
    ):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares with its own torch.empty
    weights = mlp_weights(16, 24, torch.float32, device)
    x, bias = torch.randn(2, 3, 16).to(device), torch.randn(16).to(device)
    normed = weights._replace(norm_bias=None, attention_norm_weight=bias, output_norm_weight=bias)
    ops = torch.ops.hf_triton_mlp
    for op, args in (
        (ops.mlp_gemm, (x, x, bias, *weights, [], [], [], "relu", "layer_norm", 1e-5, True)),
        (
            ops.mlp_gemm,
            (x, x, bias, *normed, [], [], [], "relu", "rms_norm", 1e-5, True, 1.0, "rms_norm"),
        ),
        (
            ops.mlp_gemm,
            (x, None, None, *normed, [], [], [], "relu", None, 1e-5, True, 1.0, "rms_norm"),
        ),
        (ops.gelu_gemm, (x, *weights[:6], x, None, bias, [], [], [], "gelu")),
        (ops.vector_matmul, (x, weights.up, weights.up_bias)),
        (ops.residual_add, (x, x, None, bias, None, 1.0, 1.0)),
    ):
        torch.library.opcheck(op, args)


def test_backward_through_a_raw_op_raises() -> None:
    """The custom op has no gradient formula; it must say so rather than give none."""
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4)
    out = torch.ops.hf_triton_mlp.vector_matmul(x, weight, None)
    with pytest.raises(RuntimeError):
        out.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
class TestBadInput:
    def weights(self, device: str) -> MLPWeights:
        return mlp_weights(8, 16, torch.float32, device)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_dtype(self, device: str, dtype: torch.dtype) -> None:
        x = torch.ones(2, 8, device=device).to(dtype)
        weights = self.weights(device)
        for call in (
            lambda: MLPGemmOp(activation="relu")(x, weights),
            lambda: GELUGemmOp(activation="relu")(x, weights),
            lambda: VectorMatMulOp()(x, weights.up),
            lambda: ResidualAddOp()(x),
        ):
            with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
                call()

    def test_hidden_size(self, device: str) -> None:
        x = torch.ones(2, 9, device=device)
        with pytest.raises((ValueError, RuntimeError)), torch.no_grad():
            MLPGemmOp(activation="relu")(x, self.weights(device))

    def test_summand_shape(self, device: str) -> None:
        x = torch.ones(2, 8, device=device)
        with pytest.raises(ValueError, match="summand"):
            ResidualAddOp()(x, x[:1])
        with pytest.raises(ValueError, match="final_bias"):
            ResidualAddOp()(x, final_bias=torch.ones(7, device=device))

    def test_names(self, device: str) -> None:
        with pytest.raises(ValueError, match=r"mish.*supported.*gelu_new"):
            MLPGemmOp(activation="mish")
        with pytest.raises(ValueError, match=r"batch.*supported.*rms_norm"):
            MLPGemmOp(activation="relu", norm="batch")
        with pytest.raises(ValueError, match=r"None.*supported.*rms_norm"):
            MLPGemmOp(activation="relu", norm=None)
        with pytest.raises(ValueError, match=r"norm_bias"):
            op = MLPGemmOp(activation="relu", norm=None, branch_norm="rms_norm")
            op(torch.ones(2, 8, device=device), self.weights(device))


@pytest.mark.gpu
def test_bad_input_on_the_gpu() -> None:
    weights = mlp_weights(8, 16, torch.float32, "cuda")
    op = MLPGemmOp(activation="relu")
    x = torch.ones(2, 8, device="cuda")
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"summand"):
            op(x, weights, x[:1])
        with pytest.raises(TypeError, match=r"float16.*float32"):
            op(x.half(), weights)
        with pytest.raises(TypeError, match=r"float64"):
            op(x.double(), MLPWeights(*wide(weights)))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"cuda.*cpu"):
            op(x, MLPWeights(*(None if t is None else t.cpu() for t in weights)))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"mismatched projections"):
            op(x, weights._replace(down=weights.down[:, :-1]))
        with pytest.raises(ValueError, match=r"norm_weight"):
            op(x, weights._replace(norm_weight=torch.ones(9, device="cuda")))
