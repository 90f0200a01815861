"""Which kernel computes a linear layer, and with which tiles.

A plan comes from, in this order: the user's table (written by `hf-triton-mlp tune`), the measured
table of the GPU's kind in plans/, and `choose`, a pure function that fits every GPU.
"""

import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

logger = logging.getLogger(__name__)

#: Kernels use tensor-core types and bfloat16, which Ampere introduced.
MINIMUM_CAPABILITY = (8, 0)

#: Up to this many rows a linear layer takes the time of reading its weights once.
DECODE_ROWS = 16

#: Up to this many rows the FMA units may keep up with the memory. Float32, which has no matrix
#: unit (TF32 is not IEEE), is multiplied by them; more rows would be bound by them.
SKINNY_ROWS = 4

#: Of a weight's code.
FORMAT_BITS = {"int4": 4, "int8": 8, "fp8": 8}

#: How deep a tile of "quantized" is for each slice, at least.
QUANTIZED_DEPTH = 128

#: Values of a row that a thread of "quantized" has from one group.
QUANTIZED_VECTORS = {"int4": 32, "int8": 16, "fp8": 16}

#: The longest row that "quantized_row" holds in registers, in those of 16 warps.
QUANTIZED_ROW = 32768

#: With more rows quantized weights are dequantized once, for cuBLAS, and rows that are to become
#: fp8 do.
DEQUANTIZED_ROWS = 128

#: On Hopper they are dequantized once with more rows than that, if rows do not become fp8.
HOPPER_DEQUANTIZED_ROWS = {"int8": 512, "fp8": 512, "int4": 256}

#: From this many rows on a plan that nobody measured leaves the products to cuBLAS.
LIBRARY_ROWS = 129

#: A program may start before its predecessor has ended (programmatic dependent launch).
PDL_CAPABILITY = (9, 0)

#: The tensor memory accelerator, and the matrix units that it feeds.
TMA_CAPABILITY = (9, 0)

#: Programs that keep the multiprocessors of a data-centre GPU busy (A100 108, H100 132).
BUSY_PROGRAMS = 128

#: Version of the tables' format; others are not read.
FORMAT = 1

#: Names a file to read plans from, instead of the one in the Hugging Face cache.
PLANS_VARIABLE = "HF_TRITON_MLP_PLANS"

#: Which file of plans/ was measured on GPUs whose name contains a key.
MEASURED = {"H100": "h100.json", "H200": "h100.json"}

#: As many bytes, the same matrix units: a plan for the one will do for the other.
SAME_SPEED = {torch.float16: (torch.bfloat16,), torch.bfloat16: (torch.float16,)}

#: Skipping zeros: what a column that is read costs, over what it costs where all are, and how many
#: bytes that leaves have to be saved. On an H100 lists, and parts of sums, take as long as 30, 24
#: and 12 MB; rather more, since several texts have fewer zeros in common.
SPARSE_COST = {None: 1, "int8": 2, "fp8": 2, "int4": 8}
SPARSE_BYTES = {None: 40_000_000, "int8": 30_000_000, "fp8": 30_000_000, "int4": 15_000_000}

KERNELS = (
    "skinny",
    "stream",
    "decode",
    "tiled",
    "persistent",
    "library",
    "sparse",
    "quantized",
    "quantized_row",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one linear layer runs: the kernel and its launch parameters.

    kernel: "skinny" (up to four rows: together if block_m says so and K is one block, else each on
    its own), "stream" and "decode" (16-bit, up to 16 rows), "tiled", "persistent" (16-bit, more
    rows, Hopper, where TMA can address the matrices), "library" (more rows, by cuBLAS, which
    takes no parameters), or "sparse" (up to 16 rows of which most values are 0, weights stored (in,
    out)). For quantized weights: "quantized_row" (one row, which block_k holds as a whole),
    "quantized" (up to 16 rows), "sparse", "tiled" and "library".
    block_m, block_n, block_k: rows, columns and depth of a program's tile; "decode" reads
    `slices` such depths side by side, "quantized" shares a tile's depth among so many warps;
    "stream" keeps `num_stages` tiles of weights on their way, and its warps share a tile's depth;
    "tiled" gives each tile to `splits` programs; "sparse" each block of columns, `num_stages` tiles
    of whose weights are on their way; "skinny", if K is one block, "stream" and
    "quantized_row" share the columns among `programs`, 0 for one block each, "quantized_row" with
    `num_stages` blocks on their way; "persistent" shares `splits` parts of each tile among
    `programs`.
    pdl: whether it is launched while its predecessor runs; until that has ended it asks the L2
    for `lines` lines of each weight row. With none "skinny" and "stream" load their first weights
    into registers instead, where nobody may still be writing them.
    """

    kernel: str
    block_m: int = 1
    block_n: int = 1
    block_k: int = 1
    num_warps: int = 4
    num_stages: int = 1
    group_m: int = 1
    slices: int = 1
    splits: int = 1
    programs: int = 0
    lines: int = 0
    pdl: bool = False

    @property
    def fuses_norm(self) -> bool:
        """Whether the kernel computes the norm in front of the linear layer too."""
        return self.kernel in ("skinny", "stream", "quantized_row")

    def __str__(self) -> str:
        if self.kernel == "library":
            return self.kernel
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        shared = "".join(f"x{n}" for n in (self.slices, self.splits, self.programs) if n > 1)
        return f"{self.kernel} {tile}{shared}, {self.num_warps} warps"

    def check(self, M: int, dtype: torch.dtype) -> None:
        """Raise ValueError unless this can compute M rows of dtype."""
        bounds = {
            "splits": (1, 64),
            "programs": (0, 65536),
            "lines": (0, 1024),
            "num_stages": (1, 8),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("kernel", "pdl", *bounds) and (
                type(value) is not int or value < 1 or value & (value - 1)
            ):
                raise ValueError(f"{field.name} must be a power of two, found {value!r}")
        if type(self.pdl) is not bool:
            raise ValueError(f"pdl must be true or false, found {self.pdl!r}")
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, found {value!r}")
        fewest, most = {
            "skinny": (1, SKINNY_ROWS if self.block_m == 1 else min(self.block_m, SKINNY_ROWS)),
            "stream": (1, 0 if dtype == torch.float32 else min(self.block_m, DECODE_ROWS)),
            "decode": (1, 0 if dtype == torch.float32 else min(self.block_m, DECODE_ROWS)),
            "quantized": (1, 0 if dtype == torch.float32 else min(self.block_m, DECODE_ROWS)),
            "quantized_row": (1, 0 if dtype == torch.float32 else 1),
            "sparse": (1, 0 if dtype == torch.float32 else min(self.block_m, DECODE_ROWS)),
            "persistent": (DECODE_ROWS + 1, 0 if dtype == torch.float32 else M),
            # A decode step is launched by address, without the host work of PyTorch's operations.
            "library": (DECODE_ROWS + 1, M),
        }.get(self.kernel, (1, M))
        if self.kernel == "quantized_row" and self.block_n < 2:
            raise ValueError("'quantized_row' has blocks of 2 rows or more")
        if self.kernel not in KERNELS or not fewest <= M <= most:
            raise ValueError(f"{self.kernel!r} is no kernel for {M} rows of {dtype}")
        if self.kernel == "sparse" and (self.block_m not in (1, DECODE_ROWS) or self.splits == 1):
            raise ValueError(f"'sparse' has 1 or {DECODE_ROWS} rows, and splits, found {self}")
        if self.kernel == "sparse" and (self.block_n < 128 or self.block_k < 16):
            raise ValueError(f"'sparse' has tiles of 128 columns, 16 deep, or more, found {self}")
        if self.kernel == "stream":
            # What a warp multiplies at once: 8 rows, 8 columns, 32 deep.
            least_of = {"block_m": 8, "block_n": 8, "block_k": 32 * self.num_warps}
            for name, least in least_of.items():
                if getattr(self, name) < least:
                    raise ValueError(f"{name} must be at least {least} for {self}")
        if self.kernel == "quantized":
            least_of = {
                "block_n": 16 * max(self.num_warps // self.slices, 1),
                "block_k": QUANTIZED_DEPTH * self.slices,
                "num_warps": self.slices,
            }
            for name, least in least_of.items():
                if getattr(self, name) < least:
                    raise ValueError(f"{name} must be at least {least} for {self}")


class Linear(NamedTuple):
    """What a plan is for: rows x (M, K) times W (N, K), all in one dtype.

    k_contiguous: W is stored (out, in), as nn.Linear does; False for Conv1D's (in, out).
    gated: a second weight gates the result.
    format, group, zeros: of a QuantizedWeight; None, 0 for whole rows, and whether it has any.
    sparse: most values of the rows are 0, and W is stored for that, (in, out).
    """

    M: int
    N: int
    K: int
    dtype: torch.dtype
    k_contiguous: bool = True
    gated: bool = False
    format: str | None = None
    group: int = 0
    zeros: bool = False
    sparse: bool = False

    @property
    def key(self) -> str:
        """Its name in a table, where numbers of rows are powers of two up to 8192."""
        rows = min(1 << (self.M - 1).bit_length(), 8192)
        dtype = str(self.dtype).removeprefix("torch.")
        kind = ("" if self.k_contiguous else " conv1d") + (" gated" if self.gated else "")
        kind += " sparse" if self.sparse else ""
        if self.format is not None:
            groups = (f"g{self.group}" if self.group else "") + ("z" if self.zeros else "")
            kind = f" {self.format}{groups}{kind}"
        return f"{dtype} {self.N}x{self.K}{kind} M={rows}"


def check_capability(capability: tuple[int, int]) -> None:
    """Raise RuntimeError for a GPU that is too old for the kernels."""
    if capability < MINIMUM_CAPABILITY:
        raise RuntimeError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}; hf_triton_mlp's "
            f"kernels need {MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]} (Ampere) or newer"
        )


# --- the plan of a GPU that nobody measured ---------------------------------------------------


@lru_cache(maxsize=4096)
def choose(linear: Linear, capability: tuple[int, int]) -> Plan:
    """A plan from the sizes alone.

    Raises RuntimeError when the GPU's `capability` (major, minor) is below 8.0.
    """
    check_capability(capability)
    pdl = capability >= PDL_CAPABILITY
    if linear.sparse and skips_zeros(linear):
        return _choose_sparse(linear, pdl)
    if linear.format is not None and not linear.k_contiguous:
        return Plan(kernel="library", pdl=pdl)
    if linear.format is not None:
        most = 0
        if capability[0] == TMA_CAPABILITY[0] and linear.dtype != torch.float32:
            most = HOPPER_DEQUANTIZED_ROWS[linear.format]
        if DEQUANTIZED_ROWS < linear.M <= most:
            return _choose_quantized_high(linear)
        return _choose_quantized(linear, pdl)
    if linear.dtype == torch.float32:
        if linear.M <= SKINNY_ROWS:
            return _choose_skinny(linear, pdl)
        if linear.M <= DECODE_ROWS:
            return _choose_float32(linear, pdl)
        return Plan(kernel="library", pdl=pdl)
    if linear.M == 1:
        return _choose_skinny(linear, pdl)
    if linear.M <= DECODE_ROWS:
        return _choose_decode(linear, pdl)
    if linear.M < LIBRARY_ROWS:
        return _choose_tiled(linear, pdl)
    return Plan(kernel="library", pdl=pdl)


def _choose_skinny(linear: Linear, pdl: bool) -> Plan:
    """Rows of weights in long runs, enough programs to keep every multiprocessor reading."""
    if not linear.k_contiguous:
        # 16 columns of 2 bytes are one 32-byte sector of DRAM.
        return Plan(kernel="skinny", block_n=16, block_k=512, num_warps=4, pdl=pdl)
    # A row in registers as a whole spares loops, and a second pass for the norm's statistics.
    depth = max(triton.next_power_of_2(linear.K), 256)
    warps = 4 if depth <= 4096 else 8
    if linear.N <= linear.K and depth <= 16384:
        outputs = 1 if linear.gated else 2
        return Plan(kernel="skinny", block_n=outputs, block_k=depth, num_warps=warps, pdl=pdl)
    if depth > 8192:
        return Plan(kernel="skinny", block_n=1, block_k=4096, num_warps=8, pdl=pdl)
    if linear.gated:
        return Plan(kernel="skinny", block_n=1, block_k=min(depth, 4096), num_warps=8, pdl=pdl)
    return Plan(
        kernel="skinny",
        block_n=max(2, min(8, 8192 // depth)),
        block_k=depth,
        num_warps=warps,
        programs=4 * BUSY_PROGRAMS if depth > 4096 else 0,
        pdl=pdl,
    )


def skips_zeros(linear: Linear) -> bool:
    """Whether "sparse" can compute this, if W is stored (in, out)."""
    block, chunk = _sparse_tile(linear)
    whole = linear.N % block == 0 and not linear.gated
    few = linear.M <= DECODE_ROWS and -(-linear.K // chunk) <= 64
    return whole and few and linear.dtype != torch.float32


def pays_to_skip(linear: Linear, density: float) -> bool:
    """Whether leaving zeros out takes less time than reading all weights, for so many others."""
    bits = linear.dtype.itemsize * 8 if linear.format is None else FORMAT_BITS[linear.format]
    weights = linear.N * linear.K * bits // 8
    saved = (1 - SPARSE_COST[linear.format] * density) * weights
    return skips_zeros(linear) and saved > SPARSE_BYTES[linear.format]


def _sparse_tile(linear: Linear) -> tuple[int, int]:
    """Columns of N and of K of a program: few, so that there are many programs, but a list of its
    columns of K has its place where its results will be."""
    deep = 64 * (512 if linear.format is None else 256)
    most = 512 if _by_fma(linear) or deep < linear.K else 256
    block = next((n for n in (512, 256) if n <= most and linear.N % n == 0), 128)
    chunk = max(triton.next_power_of_2(-(-linear.K // 32)), 256)
    return block, min(chunk, 2 * block)


def _by_fma(linear: Linear) -> bool:
    """Whether "sparse" multiplies one row by FMA: codes are worth more work than that."""
    return linear.M == 1 and linear.format is None


def _choose_sparse(linear: Linear, pdl: bool) -> Plan:
    (block, chunk), one, int4 = _sparse_tile(linear), _by_fma(linear), linear.format == "int4"
    return Plan(
        kernel="sparse",
        block_m=1 if one else DECODE_ROWS,
        block_n=block,
        block_k=32 if one else 16,
        num_warps=8 if int4 and block == 512 else 4,
        num_stages=1 if one or int4 else 2,
        splits=max(-(-linear.K // chunk), 2),
        pdl=pdl,
    )


def _choose_decode(linear: Linear, pdl: bool) -> Plan:
    """Columns so few that the multiprocessors are busy, rows padded to a power of two."""
    wide = linear.N > linear.K
    if linear.N <= 2048 or linear.gated:
        block_n = 8
    else:
        block_n = 32 if wide and 3072 < linear.N <= 8192 else 16
    return Plan(
        kernel="decode",
        block_m=1 << (linear.M - 1).bit_length(),
        block_n=block_n if linear.k_contiguous else max(16, block_n),
        block_k=64 if wide or linear.gated else 128,
        slices=4,
        num_stages=3,
        pdl=pdl,
    )


def _choose_quantized(linear: Linear, pdl: bool) -> Plan:
    """Codes through registers, and K split until the multiprocessors are busy."""
    depth = QUANTIZED_VECTORS[linear.format or ""]
    if linear.M > DEQUANTIZED_ROWS:
        return Plan(kernel="library", pdl=pdl)
    if (
        linear.M > DECODE_ROWS
        or linear.dtype == torch.float32
        or linear.K % 32
        or linear.group % depth
    ):
        return choose_quantized_tiled(linear, pdl)
    if linear.M == 1 and linear.K <= QUANTIZED_ROW:
        return _choose_quantized_row(linear, pdl)
    # Scales of weights take more registers than those of sums.
    small = 0 < linear.group < QUANTIZED_DEPTH
    int4, wide = linear.format == "int4", linear.N > 32 * BUSY_PROGRAMS
    if linear.M > 4:
        # x is read again for each block of columns: these are as many as registers allow.
        high = linear.N >= 4096 and not (linear.gated or small)
        block_n, slices, warps, stages = (64 if high else 32), 4, 4, 1
    elif linear.gated or small or not wide:
        block_n, slices, warps, stages = 16, 8, 8, (2 if int4 or linear.gated else 4)
    elif int4:
        block_n, slices, warps, stages = 64, 4, 8, 1
    else:
        block_n, slices, warps, stages = 32, 4, 4, 2
    depth = slices * QUANTIZED_DEPTH
    splits = _splits(-(-linear.N // block_n), 2 * BUSY_PROGRAMS)
    return Plan(
        kernel="quantized",
        block_m=1 << (linear.M - 1).bit_length(),
        block_n=block_n,
        block_k=depth,
        num_warps=warps,
        slices=slices,
        num_stages=stages,
        splits=min(splits, _floor_power_of_2(linear.K // depth)),
        pdl=pdl,
    )


def _choose_quantized_row(linear: Linear, pdl: bool) -> Plan:
    """32 values of x a thread, or 64, and 64 bytes of codes: 16 warps of 128 registers at a time.

    Where one wave of programs cannot have all rows, each goes on to its next rows, and has those
    after them on their way: bytes need more of that than int4, whose scales count too.
    """
    span = 4 * QUANTIZED_VECTORS[linear.format or ""]
    depth = triton.next_power_of_2(linear.K)
    warps = min(max(depth // 1024, 1), 16)
    programs = BUSY_PROGRAMS * 16 // warps
    tiles = -(-linear.K // (8 * span * warps))
    int4 = linear.format == "int4"
    # With more, an up projection of bytes with its norm spills in bfloat16.
    few = int4 or warps == 16 or linear.dtype == torch.bfloat16
    block_n = max((4 if few else 8) // tiles // (2 if linear.gated else 1), 2)
    # Registers of codes, of a block and of all that are on their way.
    block = 4 * block_n * tiles * (2 if linear.gated else 1)
    if int4:
        ahead = 48 if warps == 16 and tiles == 1 else 32
        if linear.group % span != 0:  # scales of weights take registers too
            ahead = 16
    else:
        ahead = 32 if few and warps < 16 else 64
    blocks = -(-linear.N // block_n)
    return Plan(
        kernel="quantized_row",
        block_n=block_n,
        block_k=depth,
        num_warps=warps,
        # Two blocks of a program are both loaded at once, or one after the other.
        num_stages=max(ahead // block, 1) if blocks > 2 * programs else 1,
        programs=programs if programs < blocks else 0,
        pdl=pdl,
    )


def choose_quantized_tiled(linear: Linear, pdl: bool) -> Plan:
    """A plan for all formats and sizes, up to DEQUANTIZED_ROWS rows."""
    float32 = linear.dtype == torch.float32
    block_m = 16 if float32 else max(16, min(128, 1 << (linear.M - 1).bit_length()))
    block_n = 32 if float32 else 64
    tiles = -(-linear.M // block_m) * -(-linear.N // block_n)
    return Plan(
        kernel="tiled",
        block_m=block_m,
        block_n=block_n,
        block_k=64,
        num_stages=3,
        group_m=8,
        splits=min(_splits(tiles, 2 * BUSY_PROGRAMS), _floor_power_of_2(linear.K // 64)),
        pdl=pdl,
    )


def _choose_quantized_high(linear: Linear) -> Plan:
    """Tiles so high that a weight's value, once made, has many products."""
    block_m = 128 if linear.gated else 256
    tiles = -(-linear.M // block_m) * -(-linear.N // 128)
    return Plan(
        kernel="tiled",
        block_m=block_m,
        block_n=128,
        block_k=64,
        num_warps=8,
        num_stages=3,
        group_m=8,
        splits=min(_splits(tiles, BUSY_PROGRAMS), _floor_power_of_2(linear.K // 64)),
        pdl=True,
    )


def _choose_tiled(linear: Linear, pdl: bool) -> Plan:
    """Weights through the pipeline, and K split until the multiprocessors are busy."""
    if linear.M > 64 and (linear.gated or linear.N > linear.K):
        return Plan(kernel="library", pdl=pdl)
    deep = linear.M <= 64 and not linear.gated
    tiles = -(-linear.M // 64) * -(-linear.N // 64)
    splits = _splits(tiles, BUSY_PROGRAMS * (1 if deep else 2))
    # Three stages of 32 KiB, or four of up to 24, are what a GPU with 99 KiB a block holds.
    return Plan(
        kernel="tiled",
        block_m=64,
        block_n=64,
        block_k=128 if deep else 64,
        num_stages=3 if deep else 4,
        group_m=8,
        splits=splits,
        pdl=pdl,
    )


def _choose_float32(linear: Linear, pdl: bool) -> Plan:
    """IEEE products run on the FMA units: a small tile keeps the accumulator in registers.

    Parts of K add up with smaller errors than one sum over all of it, too.
    """
    depth = 64
    splits = min(_splits(-(-linear.N // 32), BUSY_PROGRAMS), _floor_power_of_2(linear.K // depth))
    return Plan(
        kernel="tiled",
        block_m=16,
        block_n=32,
        block_k=depth,
        num_stages=3,
        splits=splits,
        pdl=pdl,
    )


def _splits(tiles: int, programs: int) -> int:
    """In how many parts, up to 8, so many programs can share each tile's depth."""
    return min(8, _floor_power_of_2(programs // tiles))


def _floor_power_of_2(number: int) -> int:
    """The largest power of two up to number; 1 for 0."""
    return 1 << max(number.bit_length() - 1, 0)


# --- measured plans ---------------------------------------------------------------------------


@cache
def plan(linear: Linear, device: str, capability: tuple[int, int]) -> Plan:
    """The measured plan for a GPU of this name if there is one, else `choose`'s."""
    table = _table(device)
    for dtype in (linear.dtype, *SAME_SPEED.get(linear.dtype, ())):
        found = table.get(linear._replace(dtype=dtype).key)
        if found is not None:
            return found
    return choose(linear, capability)


def user_file() -> Path:
    """Where `hf-triton-mlp tune` keeps what it measured."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(PLANS_VARIABLE) or Path(HF_HOME, "hf_triton_mlp", "plans.json"))


def forget() -> None:
    """Read the tables again at the next call."""
    plan.cache_clear()
    _table.cache_clear()


@cache
def _table(device: str) -> dict[str, Plan]:
    """Plans by `Linear.key`: measured by the user on this GPU, or by us on one of its kind."""
    path = user_file()
    user: dict[str, Plan] = {}
    if path.exists():
        try:
            user = parse(json.loads(path.read_text()), device)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s is ignored: %s", path, error)
    kind = next((name for key, name in MEASURED.items() if key in device), None)
    if kind is not None:
        measured = json.loads(Path(__file__).with_name("plans").joinpath(kind).read_text())
        (only,) = measured["devices"]
        return {**parse(measured, only, any_triton=True), **user}
    if not user and device:
        logger.warning(
            "no plans were measured on %s, so defaults are used; `hf-triton-mlp tune` measures it",
            device,
        )
    return user


def parse(content: Any, device: str, *, any_triton: bool = False) -> dict[str, Plan]:
    """The plans for a GPU in a table's JSON.

    Raises ValueError (or what a malformed structure makes Python raise) when the content is not a
    table of this format, or not for this GPU and Triton.
    """
    if content["format"] != FORMAT:
        raise ValueError(f"it has format {content['format']!r}, not {FORMAT}")
    devices = content["devices"]
    if device not in devices:
        raise ValueError(f"it is for {', '.join(devices)}, not {device}")
    measured = devices[device]
    if measured["triton"] != triton.__version__ and not any_triton:
        raise ValueError(f"it is for Triton {measured['triton']}, not {triton.__version__}")
    plans: dict[str, Plan] = {}
    for key, values in measured["plans"].items():
        plan = Plan(**values)
        dtype, M = key.split()[0], int(key.rpartition("M=")[2])
        plan.check(M, getattr(torch, dtype))
        plans[key] = plan
    return plans


def save(path: Path, device: str, plans: dict[str, Plan]) -> None:
    """Add plans for a GPU to a table, in one step: a reader sees the old file or the new one.

    What the file had for another version of Triton is dropped, and so is a damaged file.
    """
    kept: dict[str, Plan] = {}
    devices: dict[str, Any] = {}
    try:
        content = json.loads(path.read_text())
        devices = dict(content["devices"]) if content["format"] == FORMAT else {}
        kept = parse(content, device)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    defaults = {field.name: field.default for field in fields(Plan)}
    devices[device] = {
        "triton": triton.__version__,
        "plans": {
            key: {name: v for name, v in asdict(plan).items() if v != defaults[name]}
            for key, plan in sorted({**kept, **plans}.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"format": FORMAT, "devices": devices}, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    forget()
