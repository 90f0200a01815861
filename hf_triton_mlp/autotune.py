"""Measure the plans that could be the fastest on this GPU, for the shapes of a model."""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn

from hf_triton_mlp import tuning
from hf_triton_mlp.launchers import MLPWeights, linear_of, normed_mlp, plan_linear
from hf_triton_mlp.measure import Case, Chain, LayerHalf, device_times, random_layers
from hf_triton_mlp.patching import mlp_configs
from hf_triton_mlp.quantization import blank
from hf_triton_mlp.tuning import (
    DECODE_ROWS,
    DEQUANTIZED_ROWS,
    KERNELS,
    PDL_CAPABILITY,
    QUANTIZED_DEPTH,
    SKINNY_ROWS,
    TMA_CAPABILITY,
    Linear,
    Plan,
    choose,
    save,
)

#: The numbers of rows that have plans of their own; the ones between take the next larger one's,
#: and more rows the last one's.
ROWS = tuple(1 << i for i in range(14))

#: With more rows cuBLAS beat every plan of "tiled" that was tried on an H100.
TILED_ROWS = 256

#: What a Hopper multiprocessor does in a microsecond, for the order of candidates only: 16-bit
#: operations (760 TFLOP/s by 132), bytes from the L2 (9 TB/s by 132; torch.compile's 693 TFLOP/s
#: with tiles of 128 x 256 were 8), and results of an epilogue with tanh GELU (14 instructions and
#: 2 of the special function unit for each).
OPERATIONS, L2_BYTES, RESULTS = 5.76e6, 68e3, 11e3

#: Bytes from the memory in a microsecond, and what a second launch and its ramp take.
BYTES, LAUNCH = 3.0e6, 2.5


def candidates(linear: Linear, capability: tuple[int, int], processors: int) -> list[Plan]:
    """The plans to measure for weights stored (out, in), few enough to try them all.

    They are of 16 bits, or quantized. processors: how many multiprocessors the GPU has.
    """
    pdl = capability >= PDL_CAPABILITY
    gates = 2 if linear.gated else 1
    if linear.format is not None:
        found = _quantized(linear, pdl, gates, processors)
        return list(dict.fromkeys((choose(linear, capability), *found)))
    plans: list[Plan] = []
    if linear.M <= SKINNY_ROWS:
        plans += _skinny(linear, pdl, gates, processors)
    # One row is bound by latency, to which alone "stream" may add something, only if it is small.
    if linear.M <= DECODE_ROWS and (linear.M > 1 or linear.N * linear.K * gates <= 2**24):
        plans += _stream(linear, pdl, gates, processors)
    if 1 < linear.M <= DECODE_ROWS:
        plans += _decode(linear, pdl, gates)
    if linear.M > DECODE_ROWS:
        plans += [Plan(kernel="library", pdl=pdl)]
    if 8 <= linear.M <= TILED_ROWS:
        plans += _tiled(linear, pdl, gates)
    whole = linear.N % 8 == linear.K % 8 == 0  # rows of 16 bytes, which TMA can address
    if linear.M >= 32 and whole and capability[0] == TMA_CAPABILITY[0]:
        plans += _persistent(linear, pdl, gates, processors)
    return list(dict.fromkeys(plans))


#: Tiles of "quantized": blocks of 8 outputs that a warp has, warps, slices, stages.
QUANTIZED = (
    (2, 8, 8, 1),
    (2, 8, 8, 2),
    (2, 8, 8, 4),
    (4, 4, 4, 1),
    (4, 4, 4, 2),
    (4, 8, 4, 1),
    (4, 8, 8, 1),
    (8, 4, 4, 1),
    (8, 8, 8, 1),
)


def _quantized(linear: Linear, pdl: bool, gates: int, processors: int) -> Iterator[Plan]:
    """Codes through registers for few rows; tiles, and values for cuBLAS, for more."""
    if linear.M > DECODE_ROWS:
        yield from _quantized_tiled(linear, pdl, gates, processors)
        return
    default = choose(linear, PDL_CAPABILITY)
    if default.kernel == "quantized_row":
        yield from _quantized_row(linear, replace(default, pdl=pdl), processors)
    if default.kernel != "quantized":
        return
    rows = triton.next_power_of_2(linear.M)
    # Scales of sums are of one group; those of whole rows let a warp read on in a row.
    depths = (1, 2) if linear.format != "int4" and not linear.group else (1,)
    for (high, warps, slices, stages), deep in itertools.product(QUANTIZED, depths):
        # Of a Hopper thread: what is loaded at a time, 16 bytes of codes or two of these, and rows
        # of x. With twice as much ptxas spilled; up to here it took 64 to 200 registers of 255,
        # but for int4 with a gate and 16 rows 254.
        loads = stages * high * gates * deep
        of_rows = stages * deep * (rows // 8)
        if loads < 4 or loads + of_rows > (10 if linear.format == "int4" else 12):
            continue
        n, k = 8 * high * warps // slices, QUANTIZED_DEPTH * slices * deep
        blocks, most = -(-linear.N // n), linear.K // k
        # Two programs a multiprocessor, or four of few warps.
        ways = [s for s in (1, 2, 4, 8) if s == 1 or (s * blocks <= 2 * processors and s <= most)]
        splits = {ways[-1]}
        if warps == 4 and ways[-1] < 8 and 2 * ways[-1] <= most:
            if 2 * ways[-1] * blocks <= 4 * processors:
                splits.add(2 * ways[-1])
        for parts in sorted(splits):
            if parts * blocks < processors // 2:
                continue
            yield Plan(
                kernel="quantized",
                block_m=rows,
                block_n=n,
                block_k=k,
                num_warps=warps,
                slices=slices,
                num_stages=stages,
                splits=parts,
                pdl=pdl,
            )


def _quantized_row(linear: Linear, default: Plan, processors: int) -> Iterator[Plan]:
    """As many programs as run here, of as many threads as the default's, or twice as many; codes of
    one block to four on their way, in blocks of several sizes."""
    n, warps = default.block_n, default.num_warps
    for block_n, count in ((n, warps), (n // 2, warps), (2 * n, warps), (n, 2 * warps)):
        if block_n < 2 or count > 16:
            continue
        programs = processors * 16 // count
        shared = block_n * programs < linear.N
        plan = replace(default, block_n=block_n, num_warps=count, num_stages=1)
        yield replace(plan, programs=programs if shared else 0)
        stages = (2, 3, 4) if block_n <= n else (2,)
        for num_stages in stages if shared and count == warps else ():
            yield replace(plan, programs=programs, num_stages=num_stages)


def _quantized_tiled(linear: Linear, pdl: bool, gates: int, processors: int) -> Iterator[Plan]:
    M, N = linear.M, linear.N
    yield Plan(kernel="library", pdl=pdl)
    tiles = itertools.product((16, 32, 64, 128, 256), (64, 128), (64, 128), (1, 2, 4))
    for m, n, k, splits in tiles if M <= 4 * DEQUANTIZED_ROWS else ():
        programs = -(-M // m) * -(-N // n) * splits
        few = m < min(M, 64) or m > max(16, 2 * M) or programs < processors // 2
        if few or (splits > 1 and programs > 4 * processors):
            continue
        # Sums of half a tile, or of a whole one, fill the registers of its warps.
        if m * n * gates > (32768 if n == 128 and k == 64 else 16384):
            continue
        yield Plan(
            kernel="tiled",
            block_m=m,
            block_n=n,
            block_k=k,
            num_warps=4 if n == 64 else 8,
            num_stages=3,
            group_m=8,
            splits=splits,
            pdl=pdl,
        )


def _skinny(linear: Linear, pdl: bool, gates: int, processors: int) -> Iterator[Plan]:
    wide, depth = linear.N > linear.K, triton.next_power_of_2(linear.K)
    rows = triton.next_power_of_2(linear.M)
    # Asking the L2 for every weight early pays where the launch before takes as long.
    small = pdl and wide and linear.N * linear.K * gates <= 2**24
    depths = {depth} if depth <= 16384 else set()
    if rows == 1:
        depths |= {min(k, depth) for k in (1024, 2048, 4096)}
    for n, k, warps in itertools.product((1, 2, 4, 8, 16), sorted(depths), (4, 8, 16)):
        # Of a thread. One row takes as many registers as there are, several must leave room.
        weights, held = (count * k // (32 * warps) for count in (n * gates, rows))
        if (not wide and n > 8) or (warps == 16 and k < 8192) or (rows > 1 and held > 64):
            continue
        for programs in (0, *(processors * i for i in (1, 2, 3, 4, 6))) if k == depth else (0,):
            # The next weights wait beside the ones that are multiplied.
            if not 16 <= weights <= (64 if programs else 128):
                continue
            for lines in (0, depth // 64) if small else (0,):
                yield Plan(
                    kernel="skinny",
                    block_m=rows,
                    block_n=n,
                    block_k=k,
                    num_warps=warps,
                    programs=programs,
                    lines=lines,
                    pdl=pdl,
                )


def _stream(linear: Linear, pdl: bool, gates: int, processors: int) -> list[Plan]:
    """The dozen that a model of an H100 gives the least time."""
    M, N, K, wide = linear.M, linear.N, linear.K, linear.N > linear.K
    rows = 8 if M <= 8 else 16
    times: dict[Plan, float] = {}
    for n, warps, chunks, resident in itertools.product((8, 16, 32), (4, 8, 16), (1, 2), (1, 2, 3)):
        threads, k = 32 * warps, 32 * warps * chunks
        blocks, tiles = -(-N // n), -(-K // k)
        # Behind a norm, programs share the blocks, so that fewer compute it: as many to each.
        rounds = -(-blocks // (resident * processors)) if wide else 1
        programs = -(-blocks // rounds)
        if programs <= (resident - 1) * processors or rounds * tiles > 64:
            continue
        # Registers of a thread, by what ptxas made of some: addresses and the like, of which it
        # can do with fewer where it must; accumulators; rows that wait for their statistics in
        # float32. Then tiles of weights, and of rows.
        kept = 72 if wide and resident > 1 else 40
        kept += n * gates // 2 + (rows * tiles * k // threads if wide else 0)
        stage = (n * gates + (0 if wide else rows)) * k // (2 * threads)
        registers = min(255, 65536 // (resident * threads))
        stages = min(8, rounds * tiles, (registers - kept) // stage)
        if stages < min(2, rounds * tiles):
            continue
        # Every program reads all rows from the L2, and with a norm the residual too. 4.2 MB on
        # their way keep the memory busy.
        running = min(programs, resident * processors)
        weights, inputs = 2 * N * K * gates, 2 * M * K * programs * (2 if wide else 1)
        busy = min(1.0, running / processors)
        flight = min(2 * n * k * gates * stages * running, weights)
        time = max(weights / 3.0e12, (weights + inputs) / (5.5e12 * busy))
        time *= max(1.0, 4.2e6 / flight) * -(-programs // running) * running / programs
        plan = Plan(
            kernel="stream",
            block_m=rows,
            block_n=n,
            block_k=k,
            num_warps=warps,
            num_stages=stages,
            programs=programs if rounds > 1 else 0,
            pdl=pdl,
        )
        times.setdefault(plan, time)
    plans = sorted(times, key=lambda plan: times[plan])[:12]
    if pdl and wide and N * K * gates <= 2**24:
        lines = triton.next_power_of_2(K) // 64
        plans += [replace(plan, lines=lines) for plan in plans[:8]]
    return plans


def _decode(linear: Linear, pdl: bool, gates: int) -> Iterator[Plan]:
    shapes = ((64, 4, 3), (64, 4, 4), (128, 4, 3), (64, 8, 3))
    for n, (k, slices, stages) in itertools.product((8, 16, 32, 64), shapes):
        stage = slices * k * (n * gates + linear.M) * 2
        if stage * stages > 200 * 1024 or -(-linear.N // n) < 48:
            continue
        for lines in (0, 16) if pdl else (0,):
            yield Plan(
                kernel="decode",
                block_m=linear.M,
                block_n=n,
                block_k=k,
                slices=slices,
                num_warps=slices,
                num_stages=stages,
                lines=min(lines, triton.next_power_of_2(linear.K) // 64),
                pdl=pdl,
            )


def _tiled(linear: Linear, pdl: bool, gates: int) -> Iterator[Plan]:
    shapes = (
        (16, 32, 256, 4, 5),
        (16, 64, 128, 4, 5),
        (16, 128, 128, 4, 4),
        (32, 64, 128, 4, 5),
        (32, 128, 128, 4, 4),
        (64, 32, 128, 4, 4),
        (64, 64, 64, 4, 5),
        (64, 64, 128, 4, 4),
        (64, 64, 256, 4, 3),
        (64, 128, 64, 4, 4),
        (64, 128, 128, 4, 4),
        (64, 128, 128, 8, 4),
        (64, 256, 64, 8, 5),
        (128, 64, 64, 4, 4),
        (128, 64, 128, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 3),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
    )
    for m, n, k, warps, stages in shapes:
        if (m + n * gates) * k * 2 * stages > 220 * 1024 or m * n * gates > 128 * 256:
            continue
        if (
            (m < 64 and m < linear.M)
            or (m == 64 and linear.M > 512)
            or (m == 128 and linear.M <= 64)
        ):
            continue
        tiles = -(-linear.M // m) * -(-linear.N // n)
        for splits in (1, 2, 4, 8):
            # About one wave, unless K is whole.
            if splits > 1 and not (64 <= tiles * splits <= 288 and 4 * k * splits <= linear.K):
                continue
            if splits == 1 and tiles < 40:
                continue
            yield Plan(
                kernel="tiled",
                block_m=m,
                block_n=n,
                block_k=k,
                num_warps=warps,
                num_stages=stages,
                group_m=8,
                splits=splits,
                pdl=pdl,
            )


#: Tiles of the persistent kernel: rows, columns (of W and its gate together), depth, warps, stages,
#: programs a multiprocessor. wgmma takes 64 rows a warp group. Two programs hide each other's
#: epilogues; one has tiles twice as wide, so that it asks the L2 for three quarters of the bytes.
PERSISTENT = (
    (64, 128, 128, 4, 4, 1),
    (64, 256, 64, 8, 4, 1),
    (64, 64, 128, 4, 6, 1),
    (64, 128, 64, 4, 4, 2),
    (128, 128, 64, 8, 6, 1),
    (128, 64, 128, 8, 4, 1),
    (128, 256, 64, 8, 4, 1),
    (128, 128, 64, 4, 3, 2),
    (256, 128, 64, 8, 4, 1),
)


def _persistent(linear: Linear, pdl: bool, gates: int, processors: int) -> list[Plan]:
    """The dozen that promise most: tiles no higher than M, each with its two best splits of K."""
    found: list[tuple[float, Plan]] = []
    for m, columns, k, warps, stages, together in PERSISTENT:
        if m > max(64, linear.M) or (m == 64 and linear.M > 64):
            continue
        if m * columns < min(16384, 32 * linear.M):  # narrow tiles are for few rows
            continue
        tiles = -(-linear.M // m) * -(-linear.N // (columns // gates))
        ways: list[tuple[float, Plan]] = []
        for splits in (1, 2, 4, 8):
            if splits > 1 and (2 * k * splits > linear.K or tiles * splits > 2 * processors):
                continue
            plan = Plan(
                kernel="persistent",
                block_m=m,
                block_n=columns // gates,
                block_k=k,
                num_warps=warps,
                num_stages=stages,
                # About as many columns as rows of the matrices in a wave.
                group_m=2048 // m,
                splits=splits,
                programs=processors * together,
                # What the pipeline holds at most, while the launch before takes its time.
                lines=8 if pdl and linear.M <= 128 and linear.K >= 512 else 0,
                pdl=pdl,
            )
            ways.append((expected_us(linear, plan, processors), plan))
        found += sorted(ways, key=lambda way: way[0])[:2]
    return [plan for _, plan in sorted(found, key=lambda way: way[0])[:12]]


def expected_us(linear: Linear, plan: Plan, processors: int) -> float:
    """What a persistent plan takes if arithmetic, the L2 and the memory are all busy."""
    gates = 2 if linear.gated else 1
    columns, depth = plan.block_n * gates, linear.K / plan.splits
    together = plan.programs // processors
    steps = max(
        2 * plan.block_m * columns * depth / OPERATIONS,
        2 * (plan.block_m + columns) * depth / L2_BYTES,
    )
    epilogue = plan.block_m * columns / RESULTS if together == 1 else 0.0
    tiles = -(-linear.M // plan.block_m) * -(-linear.N // plan.block_n) * plan.splits
    waves = -(-tiles // plan.programs) * together
    us = max(waves * (steps + epilogue), 2 * linear.N * linear.K * gates / BYTES)
    if plan.splits > 1:
        # Parts are written and read in float32.
        us += LAUNCH + 8 * plan.splits * linear.M * linear.N * gates / (L2_BYTES * processors)
    return us


class Measured(NamedTuple):
    """The fastest plans of one MLP for one number of rows, and what everything took in µs."""

    up: Plan
    down: Plan
    us: float
    tried: list[tuple[str, Plan, float]]


def layer_half(
    case: Case,
    layers: list[MLPWeights],
    plans: tuple[Plan | None, Plan | None],
    carries: bool = True,
) -> LayerHalf:
    """carries: as in `MLPGemmOp`."""

    def half(attention: Tensor, residual: Tensor, layer: int) -> Tensor:
        return normed_mlp(
            attention,
            residual,
            None,
            layers[layer],
            activation=case.activation,
            norm=case.norm,
            norm_eps=1e-5,
            pre_norm=True,
            plans=plans,
            early=True,
            carries=carries,
        )

    return half


def linears(case: Case, M: int, dtype: torch.dtype) -> tuple[Linear, Linear]:
    """The two linear layers (up with its gate, down)."""
    H, I, config = case.hidden, case.intermediate, case.quantization  # noqa: E741
    if config is not None:
        up, down = (blank(shape, config, "meta") for shape in ((I, H), (H, I)))
        return linear_of(M, up, case.gated, dtype), linear_of(M, down, False, dtype)
    return Linear(M, I, H, dtype, gated=case.gated), Linear(M, H, I, dtype)


def tried_plans(linear: Linear, kernels: Collection[str]) -> list[Plan]:
    """The plan that the current GPU has for this, and the candidates of these kernels."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = gpu.major, gpu.minor
    found = candidates(linear, capability, gpu.multi_processor_count)
    chosen = [plan for plan in found if plan.kernel in kernels]
    return list(dict.fromkeys([tuning.plan(linear, gpu.name, capability), *chosen]))


def compile_kernels(
    cases: Iterable[Case],
    rows: Iterable[int],
    dtype: torch.dtype,
    processes: int,
    kernels: Collection[str] = KERNELS,
) -> Iterator[tuple[int, int]]:
    """Compile what `measure` will launch into Triton's cache, several at a time.

    Yields (done, all). A kernel that cannot be compiled shows when it is measured.
    """
    jobs: dict[tuple[object, ...], tuple[Case, int, int, Plan]] = {}
    for case, M in itertools.product(cases, rows):
        for i, linear in enumerate(linears(case, M, dtype)):
            for plan in tried_plans(linear, kernels):
                aligned = linear.K % (plan.splits * plan.block_k) == 0
                # Where groups are whole rows, kernels depend on their size.
                whole = plan.fuses_norm or linear.format is not None
                shape = linear._replace(M=min(M, 17)) if whole else min(M, 17)
                key = (i, case.activation, case.norm, case.gated, aligned, shape, plan)
                jobs.setdefault(key, (case, M, i, plan))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = [pool.submit(_compile, *job, dtype) for job in jobs.values()]
        for done, _ in enumerate(as_completed(futures), 1):
            yield done, len(futures)


def _compile(case: Case, M: int, which: int, plan: Plan, dtype: torch.dtype) -> None:
    # A few tiles of weights are enough, where the kernel does not depend on their number, but at
    # most on whether they are whole ones.
    columns = ("intermediate", "hidden")[which]
    part = 256 + getattr(case, columns) % 128
    few = case if plan.fuses_norm else replace(case, **{columns: part})
    weights = random_layers(few, dtype)[:1]
    other = Plan(kernel="library", pdl=plan.pdl)
    half = layer_half(few, weights, (plan, other) if which == 0 else (other, plan))
    try:
        Chain(few, weights, M).first(half)
    except Exception:  # measure() reports it
        return


def measure(
    case: Case,
    layers: list[MLPWeights],
    M: int,
    *,
    kernels: Collection[str] = KERNELS,
    milliseconds: float = 4.0,
) -> Measured:
    """Try the plans in use and the candidates in chains in CUDA graphs, for up, then for down.

    Each starts while the other runs: if down then has another plan than up was tried with, up is
    tried again, and so once more down. A plan that does not compile, or whose error exceeds twice
    torch's own, does not count.
    """
    chain = Chain(case, layers, M)
    dtype = chain.residual.dtype
    tried: list[tuple[str, Plan, float]] = []
    unfit: set[Plan] = set()
    in_use = (
        plan_linear(M, layers[0].up, gated=case.gated, dtype=dtype),
        plan_linear(M, layers[0].down, dtype=dtype),
    )
    found = [*in_use]
    both = linears(case, M, dtype)
    tried_with: list[Plan | None] = [None, None]
    for i in (0, 1, 0, 1):
        if tried_with[i] == found[1 - i]:
            break
        tried_with[i], linear = found[1 - i], both[i]
        us: dict[Plan, float] = {}
        for plan in tried_plans(linear, kernels):
            plans = (plan, found[1]) if i == 0 else (found[0], plan)
            half = layer_half(case, layers, plans)
            try:
                graph = chain.capture(half)
            except (RuntimeError, triton.TritonError) as error:
                tried.append((f"{'up' if i == 0 else 'down'}: {error}"[:120], plan, float("inf")))
                unfit.add(plan)
                continue
            time = device_times({"": graph}, chain.layers, rounds=3, milliseconds=milliseconds)
            us[plan] = time[""].median
            tried.append((("up", "down")[i], plan, us[plan]))
        for plan in sorted(us, key=lambda plan: us[plan]):
            plans = (plan, found[1]) if i == 0 else (found[0], plan)
            error, own = chain.errors(case, layers[0], layer_half(case, layers, plans))
            if error <= 2 * own + torch.finfo(dtype).eps:
                found[i] = plan
                break
            tried.append((f"{('up', 'down')[i]}: error {error:.1e}, torch {own:.1e}", plan, 0.0))
            unfit.add(plan)
    pairs = {"found": (found[0], found[1])}
    if unfit.isdisjoint(in_use):
        # Of dozens the fastest is so by chance too: what is in use stays unless the pair beats it.
        pairs["in use"] = in_use
    graphs = {name: chain.capture(layer_half(case, layers, pair)) for name, pair in pairs.items()}
    times = device_times(graphs, chain.layers, milliseconds=milliseconds)
    best = min(times, key=lambda name: times[name].median)
    return Measured(*pairs[best], times[best].median, tried)


def cases_of(model: nn.Module, name: str) -> list[Case]:
    """The different MLPs of a model (weights may be on the meta device)."""
    return [
        Case(
            name,
            config.hidden_size,
            config.intermediate_size,
            config.activation,
            config.norm or "layer_norm",
            config.gated,
            config.up_bias,
        )
        for config in mlp_configs(model)
    ]


def tune(
    cases: list[Case],
    dtype: torch.dtype,
    path: Path,
    *,
    rows: Iterable[int] = ROWS,
    kernels: Collection[str] = KERNELS,
    processes: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[tuple[Case, int, Measured]]:
    """Measure the current GPU for these MLPs and add the fastest plans to the table at `path`.

    Only candidates of these kernels are tried, beside the plans that are in use. `progress` is told
    (what, done, of how many). The table is written after each case.
    """
    rows = tuple(rows)
    processes = processes or max(1, min(14, (os.cpu_count() or 2) - 2))
    for done, total in compile_kernels(cases, rows, dtype, processes, kernels):
        progress("compiling kernels", done, total)
    found: list[tuple[Case, int, Measured]] = []
    with torch.no_grad():
        for case in cases:
            plans: dict[str, Plan] = {}
            layers = random_layers(case, dtype)
            for M in rows:
                measured = measure(case, layers, M, kernels=kernels)
                found.append((case, M, measured))
                for linear, plan in zip(linears(case, M, dtype), measured[:2], strict=True):
                    plans[linear.key] = plan
                progress("measuring", len(found), len(cases) * len(rows))
            save(path, torch.cuda.get_device_name(), plans)
    return found
