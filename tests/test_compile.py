"""The kernels compile for GPUs that are not there: no error, no spilled register, memory that fits.

Triton needs no GPU to make machine code, and ptxas comes with it.
"""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_triton_mlp import autotune, launchers
from hf_triton_mlp.kernels import (
    INTERPRETED,
    quantized_linear_kernel,
    quantized_tiled_kernel,
)
from hf_triton_mlp.launchers import NO_SUMMANDS, Launch, Norm, Summands
from hf_triton_mlp.measure import CASES, Case
from hf_triton_mlp.peer_memory import PeerMemory
from hf_triton_mlp.quantization import QuantizationConfig, Weight, blank, stored_by_input
from hf_triton_mlp.tuning import PDL_CAPABILITY, Linear, Plan, choose

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
#: Shared memory that a block may have, by compute capability, in bytes: A100, RTX 30/40, H100.
SHARED = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton has no cuobjdump"),
]


def source(call: Launch) -> ASTSource:
    """What Triton's launcher would compile for this launch."""
    arguments = (*call.tensors, *call.scalars, *call.constants)
    kernel = call.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=True)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            dtype = TYPES[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{dtype}{value.block_shape}>"
        elif i >= len(arguments) - len(call.constants) or value is None or value == 1:
            signature[name] = "constexpr"
            constants[i,] = value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def instructions(cubin: bytes, folder: Path) -> list[tuple[int, str]]:
    """Addresses and texts of a kernel's machine code."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([CUOBJDUMP, "-sass", file], capture_output=True, text=True).stdout
    found = re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", text)
    return [(int(match[1], 16), match[2]) for match in found]


def check_compiles(call: Launch, capability: tuple[int, int], folder: Path) -> Any:
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
    options |= launchers.compile_options(call.pdl, call.registers)
    compiled = triton.compile(source(call), target=target, options=options)
    assert compiled.metadata.shared <= SHARED[capability]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    used = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", used)
    # Where registers are few, some of the prologue or epilogue may wait on the stack; no loop may.
    allowed = 0 if call.registers is None else 96
    assert found is not None and int(found[2]) <= allowed, f"registers spill to the stack: {used}"
    if int(found[2]) > 0:
        code = instructions(compiled.asm["cubin"], folder)
        loops = [
            (int(text.split()[-1], 16), address)
            for address, text in code
            if re.fullmatch(r"BRA(\.\w+)* 0x[0-9a-f]+", text)
        ]
        spills = [address for address, text in code if text.startswith(("STL", "LDL"))]
        assert spills and not any(a <= spill <= b for spill in spills for a, b in loops if a < b)
    return compiled


def launches(
    case: Case,
    M: int,
    dtype: torch.dtype,
    plans: tuple[Plan, Plan] | tuple[int, int],
    *,
    early: bool = True,
    config: QuantizationConfig | None = None,
) -> list[Launch]:
    """The launches of a layer half, on tensors without memory.

    plans: or the capability of a GPU, for what `choose` says. config: of quantized weights.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def vector(size: int, present: bool = True) -> torch.Tensor | None:
        return empty(size) if present else None

    def matrix(out: int, size: int) -> Weight:
        return empty(out, size) if config is None else blank((out, size), config, "meta")

    H, I = case.hidden, case.intermediate  # noqa: E741
    x, residual, carry, hidden, out = (
        empty(M, H),
        empty(M, H),
        empty(M, H),
        empty(M, I),
        empty(M, H),
    )
    up = matrix(I, H), vector(I, case.bias), (matrix(I, H) if case.gated else None, None)
    down = matrix(H, I), vector(H, case.bias), (None, None)
    up_plan, down_plan = (
        plan
        if isinstance(plan, Plan)
        else choose(launchers.linear_of(M, weight, gated, dtype), plans)
        for plan, weight, gated in zip(plans, (up[0], down[0]), (case.gated, False), strict=True)
    )
    norm = Norm(case.norm, vector(H), vector(H, case.norm == "layer_norm"), 1e-5, carry, False)
    found: list[Launch] = []
    before, summands = norm, Summands(residual)
    if not up_plan.fuses_norm:
        normed = empty(M, H)
        found.append(launchers.norm_launch(x, residual, None, norm, normed, pdl=up_plan.pdl))
        x, before, summands = normed, None, NO_SUMMANDS
    linears = (
        (up_plan, x, up, case.activation, before, summands, hidden, early),
        (down_plan, hidden, down, None, None, Summands(carry), out, True),
    )
    for plan, source, (weight, bias, gate), activation, norm_, adds, result, waited in linears:
        rest = (source, weight, bias, gate, activation, norm_, adds, result, waited)
        if plan.kernel == "library":
            continue
        if plan.splits == 1:
            found.append(launchers.linear_launch(plan, *rest))
        else:
            parts = launchers.split_parts(plan, result, gated=gate[0] is not None)
            found.extend(launchers.split_launches(plan, *rest, parts))
    return found


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("tokens", [1, 2, 16, 64])
@pytest.mark.parametrize("name", ["gpt2", "opt-1.3b", "llama-3.1-8b"])
def test_default_plans_compile(
    name: str, tokens: int, capability: tuple[int, int], tmp_path: Path
) -> None:
    case = CASES[name]
    up, down = autotune.linears(case, tokens, torch.float16)
    plans = choose(up, capability), choose(down, capability)
    for call in launches(case, tokens, torch.float16, plans):
        check_compiles(call, capability, tmp_path)


#: By what its kernels do: row scales, scales of sums and of weights, zeros of both.
QUANTIZED = {
    "int8": QuantizationConfig(format="int8"),
    "fp8": QuantizationConfig(format="fp8"),
    "int4": QuantizationConfig(),
    "int4 asymmetric": QuantizationConfig(symmetric=False),
    "int4 32 asymmetric": QuantizationConfig(group_size=32, symmetric=False),
}


@pytest.mark.parametrize(
    ("tokens", "name", "dtype", "capability"),
    [(2, "llama-3.1-8b", torch.float16, (9, 0)), (16, "opt-1.3b", torch.bfloat16, (8, 0))],
)
@pytest.mark.parametrize("config", QUANTIZED)
def test_default_plans_of_quantized_weights_compile(
    config: str,
    tokens: int,
    name: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tmp_path: Path,
) -> None:
    found = launches(CASES[name], tokens, dtype, capability, config=QUANTIZED[config])
    for call in found:
        compiled = check_compiles(call, capability, tmp_path)
        if call.kernel is quantized_linear_kernel and triton.__version__ < "3.7":
            # No value moves between threads, but for the sums of the warps.
            assert "local_alloc" not in compiled.asm["ttgir"]
            assert compiled.metadata.shared <= 32 * 1024


@pytest.mark.parametrize("config", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_kernels_of_quantized_weights_compile(
    config: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = QUANTIZED[config]
    weight = blank((4096, 1024), found, "meta")
    out = torch.empty((512, 1024), dtype=dtype, device="meta")
    calls = [launchers.dequantize_launch(weight, 512, out)]
    if dtype == torch.float32:
        calls += launches(CASES["opt-1.3b"], 4, dtype, (9, 0), config=found)
    for call in calls:
        check_compiles(call, (9, 0), tmp_path)


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_an_offset_norm_compiles(tokens: int, tmp_path: Path) -> None:
    case = replace(CASES["gpt2"], norm="rms_norm_offset", gated=True)
    plans = STREAMS["gpt2", 2] if tokens == 8 else None
    linears = autotune.linears(case, tokens, torch.float16)
    up, down = plans or (choose(linear, (9, 0)) for linear in linears)
    for call in launches(case, tokens, torch.float16, (up, down)):
        check_compiles(call, (9, 0), tmp_path)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize(
    ("N", "config"),
    [
        *((N, None) for N in (128, 768, 4096)),
        *((4096, QuantizationConfig(format=name)) for name in ("int8", "fp8", "int4")),
        (4096, QuantizationConfig(format="int4", symmetric=False)),
    ],
    ids=str,
)
def test_what_skips_zeros_compiles(
    N: int,
    config: QuantizationConfig | None,
    tokens: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tmp_path: Path,
) -> None:
    weight = torch.empty((4 * N, N), dtype=dtype, device="meta").t()
    if config is not None:
        weight = stored_by_input(blank((N, 4 * N), config, "meta"))
    x, out = (torch.empty((tokens, size), dtype=dtype, device="meta") for size in (4 * N, N))
    plan = choose(launchers.linear_of(tokens, weight, False, dtype, True), capability)
    parts = launchers.split_parts(plan, out, gated=False)
    rest = (x, weight, None, (None, None), None, None, NO_SUMMANDS, out, True, parts)
    first, second = launchers.split_launches(plan, *rest)
    assert plan.kernel == "sparse"
    for call in (first, second):
        check_compiles(call, capability, tmp_path)
    if config is not None:  # rows of prompts
        values = torch.empty((4 * N, 256), dtype=dtype, device="meta").t()
        check_compiles(launchers.dequantize_launch(weight, 128, values), capability, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [2, 8])
def test_sums_of_ranks_compile(ranks: int, dtype: torch.dtype, tmp_path: Path) -> None:
    memory = PeerMemory(1, [0] * ranks, 256, torch.device("meta"))
    call = memory.launch(torch.empty((4, 4096), dtype=dtype, device="meta"))
    check_compiles(call, (9, 0), tmp_path)


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [2048, 3584, 5376, 16384])
@pytest.mark.parametrize("normed", [True, False])
def test_branch_norms_compile(
    hidden: int, normed: bool, dtype: torch.dtype, capability: tuple[int, int], tmp_path: Path
) -> None:
    """One block or several; with the norm of the sum, as behind attention, and without."""
    x, residual, total, out = torch.empty(4, 3, hidden, dtype=dtype, device="meta")
    kind = "rms_norm_offset" if normed else "rms_norm"
    norm = launchers.BranchNorm(kind, 1e-6, x[0], total, *((x[0], out) if normed else ()))
    pdl = capability >= PDL_CAPABILITY
    call = launchers.norm_sum_launch(x, None, residual, norm, pdl=pdl)
    check_compiles(call, capability, tmp_path)


@pytest.mark.parametrize(
    ("kernel", "tokens"),
    [("skinny", 2), ("decode", 4), ("tiled", 16), ("persistent", 64), ("persistent", 2048)],
)
@pytest.mark.parametrize("name", ["opt-1.3b", "llama-3.1-8b"])
def test_candidates_compile(name: str, kernel: str, tokens: int, tmp_path: Path) -> None:
    """The first of each kernel, for Hopper, where all of them run."""

    def first(linear: Linear) -> Plan:
        found = autotune.candidates(linear, (9, 0), 132)
        return next(plan for plan in found if plan.kernel == kernel)

    up, down = autotune.linears(CASES[name], tokens, torch.float16)
    for call in launches(CASES[name], tokens, torch.float16, (first(up), first(down))):
        check_compiles(call, (9, 0), tmp_path)


@pytest.mark.parametrize(
    ("name", "tokens", "config"),
    [
        ("opt-1.3b", 1, "int8"),
        ("opt-1.3b", 1, "int4 asymmetric"),
        ("bloom-7b1", 4, "int4 asymmetric"),
        ("bloom-7b1", 16, "int8"),
        ("llama-3.1-8b", 4, "int4 32 asymmetric"),
    ],
)
def test_candidates_of_quantized_weights_compile(
    name: str, tokens: int, config: str, tmp_path: Path
) -> None:
    """The second and the last of each layer: the first is the default."""
    case = replace(CASES[name], quantization=QUANTIZED[config])
    found = [
        autotune.candidates(linear, (9, 0), 132)
        for linear in autotune.linears(case, tokens, torch.float16)
    ]
    for i in (1, -1):
        up, down = (plans[i] for plans in found)
        for call in launches(case, tokens, torch.float16, (up, down), config=case.quantization):
            check_compiles(call, (9, 0), tmp_path)


def streams(rows: int, up: dict[str, int], down: dict[str, int]) -> tuple[Plan, Plan]:
    return (
        Plan(kernel="stream", block_m=rows, pdl=True, **up),
        Plan(kernel="stream", block_m=rows, pdl=True, **down),
    )


#: Of the candidates, some for whole rows and for parts of them, one block or several.
STREAMS = {
    ("gpt2", 2): streams(
        8,
        {"block_n": 16, "block_k": 256, "num_warps": 8, "num_stages": 3},
        {"block_n": 8, "block_k": 512, "num_warps": 8, "num_stages": 6},
    ),
    ("gpt2-xl", 16): streams(
        16,
        {"block_n": 16, "block_k": 256, "num_warps": 8, "num_stages": 8, "programs": 100},
        {"block_n": 16, "block_k": 256, "num_warps": 8, "num_stages": 8},
    ),
}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(("name", "tokens"), STREAMS)
def test_streams_stay_in_registers(name: str, tokens: int, early: bool, tmp_path: Path) -> None:
    """Weights and rows are loaded as the matrix units want them: Triton converts nothing there."""
    found = launches(CASES[name], tokens, torch.float16, STREAMS[name, tokens], early=early)
    assert len(found) == 2
    for call in found:
        compiled = check_compiles(call, (9, 0), tmp_path)
        assert "local_alloc" not in compiled.asm["ttgir"]
        # The sums of the warps meet there, and the statistics.
        assert compiled.metadata.shared <= 16 * 1024


# --- products that are on their way --------------------------------------------------------------


def overwritten(code: list[tuple[int, str]]) -> list[str]:
    """Instructions that write what a product of the matrix units may still have to read."""
    wrong: list[str] = []
    # Of each product on its way: the first of four registers, and how many came after it.
    pending: list[list[int]] = []
    start = code[0][0]
    for address, text in code:
        name, *operands = re.split(r"[ ,]+", text)
        if name.startswith("HGMMA"):
            for product in pending:
                product[1] += 1
            if match := re.fullmatch(r"R(\d+)(?:\.\w+)*", operands[1]):
                pending.append([int(match[1]), 0])
        elif name == "WARPGROUP.DEPBAR.LE":
            most = int(operands[1], 16)
            pending = [product for product in pending if product[1] < most]
        elif name == "BRA" and pending and start <= int(operands[-1], 16) < address:
            wrong.append(f"{len(pending)} products on their way at {address:#x}: {text}")
        elif operands and not name.startswith(("ST", "RED", "BAR", "LDGSTS", "ATOM")):
            if match := re.fullmatch(r"R(\d+)", operands[0]):
                first = int(match[1])
                wide = re.search(r"\.(64|128|WIDE)", name)
                count = {None: 1, "64": 2, "WIDE": 2, "128": 4}[wide and wide[1]]
                for product in pending:
                    if product[0] < first + count and first < product[0] + 4:
                        wrong.append(f"{address:#x}: {text}")
    return wrong


@pytest.mark.parametrize("tile", [(128, 128, 64, 8), (256, 128, 64, 8), (64, 64, 64, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("name", ["bloom-7b1", "llama-3.1-8b"])
def test_products_keep_their_operands(
    name: str,
    format: str,
    dtype: torch.dtype,
    tile: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hopper's matrix units read registers that nothing writes until they are done."""
    if CASES[name].gated and tile[0] == 256:
        pytest.skip("sums of two such tiles are more than the registers")
    monkeypatch.setattr(launchers, "has_wgmma", lambda device: True)
    config = QuantizationConfig(format=format)
    block_m, block_n, block_k, warps = tile
    plan = Plan(
        kernel="tiled", block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps,
        num_stages=3, group_m=8, pdl=True,
    )  # fmt: skip
    calls = launches(CASES[name], 512, dtype, (plan, plan), config=config)
    call = next(call for call in calls if call.kernel is quantized_tiled_kernel)
    code = instructions(check_compiles(call, (9, 0), tmp_path).asm["cubin"], tmp_path)
    assert any(re.match(r"HGMMA\S* R\d+, R\d+", text) for _, text in code)
    assert not overwritten(code)


def test_overwritten_operands_are_found() -> None:
    product = (32, "HGMMA.64x128x16.F32 R24, R88, gdesc[UR8], R24, gsb0")
    store, load = (48, "STS.128 [R88], R90"), (64, "LDS.U16 R90, [R21+UR11]")
    wait, loop = (56, "WARPGROUP.DEPBAR.LE gsb0, 0x0"), (80, "BRA 0x20")
    assert overwritten([(0, "NOP"), product, store, load, wait]) == [
        "0x40: LDS.U16 R90, [R21+UR11]"
    ]
    assert overwritten([(0, "NOP"), product, (48, "MOV R100, R116"), loop])
    assert not overwritten([(0, "NOP"), product, store, wait, load, loop])
    later = (40, "HGMMA.64x128x16.F32 R24, R92, gdesc[UR8], R24, gsb0")
    most = (56, "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert not overwritten([(0, "NOP"), product, later, most, load])
    assert overwritten([(0, "NOP"), product, later, most, (64, "LDS.64 R94, [R21]")])
