"""What tuning and benchmarks share: MLP shapes, layers that do not stay in the L2, device time."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_triton_mlp.launchers import MLPWeights
from hf_triton_mlp.ops import MLPGemmOp
from hf_triton_mlp.quantization import (
    INT4_CODES,
    QuantizationConfig,
    QuantizedWeight,
    Weight,
    blank,
)

#: Weights of this many bytes are read in turn; no GPU's L2 holds a quarter of it.
ROTATED_BYTES = 300_000_000


@dataclass(frozen=True)
class Case:
    """The MLP of a model: sizes, what stands around the products, and what its matrices are."""

    name: str
    hidden: int
    intermediate: int
    activation: str = "gelu_new"
    norm: str = "layer_norm"
    gated: bool = False
    bias: bool = True
    quantization: QuantizationConfig | None = None

    @property
    def weights(self) -> int:
        """Elements of its matrices, which are also its multiply-adds for one row."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate


CASES = {
    case.name: case
    for case in (
        Case("gpt2", 768, 3072),
        Case("gpt2-xl", 1600, 6400),
        Case("opt-1.3b", 2048, 8192, "relu"),
        Case("bloom-7b1", 4096, 16384),
        Case("opt-30b", 7168, 28672, "relu"),
        Case("llama-3.1-8b", 4096, 14336, "silu", "rms_norm", gated=True, bias=False),
    )
}


def random_layers(
    case: Case, dtype: torch.dtype, device: str = "cuda", itemsize: float | None = None
) -> list[MLPWeights]:
    """At least three layers, and enough that none is in the L2 when its turn comes.

    itemsize: how many bytes of each weight are going to be read, if fewer than it has.
    """
    generator = torch.Generator(device).manual_seed(0)
    if case.quantization is not None:
        itemsize = 0.5 if case.quantization.format == "int4" else 1.0

    def matrix(out: int, inp: int) -> Weight:
        if case.quantization is not None:
            return random_weight((out, inp), case.quantization, generator)
        values = torch.randn(out, inp, generator=generator, device=device, dtype=dtype)
        return values.div_(inp**0.5)

    def vector(size: int, present: bool = True, around: float = 0.0) -> Tensor | None:
        values = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return around + 0.1 * values if present else None

    H, I = case.hidden, case.intermediate  # noqa: E741
    layers = max(3, min(24, int(ROTATED_BYTES // (case.weights * (itemsize or dtype.itemsize)))))
    return [
        MLPWeights(
            matrix(I, H),
            matrix(H, I),
            vector(I, case.bias),
            vector(H, case.bias),
            matrix(I, H) if case.gated else None,
            None,
            vector(H, around=1.0),
            vector(H, case.norm == "layer_norm"),
        )
        for _ in range(layers)
    ]


def random_weight(
    shape: tuple[int, int], config: QuantizationConfig, generator: torch.Generator
) -> QuantizedWeight:
    """Random codes, and scales that give values of the size that `random_layers` has."""
    weight = blank(shape, config, generator.device)
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    if config.format == "int4":
        codes.random_(-(2**31), 2**31, generator=generator)
        size = INT4_CODES / 12**0.5
    elif config.format == "int8":
        codes.random_(-127, 128, generator=generator)
        size = 254 / 12**0.5
    else:
        codes.copy_(torch.randn(shape, generator=generator, device=codes.device))
        size = 1.0
    scales.uniform_(0.5, 1.5, generator=generator).div_(size * shape[1] ** 0.5)
    if zeros is not None:
        zeros.uniform_(INT4_CODES / 2 - 1, INT4_CODES / 2, generator=generator)
    return weight


#: One layer's half: (attention's output, residual, layer's number) to residual + attention + MLP.
LayerHalf = Callable[[Tensor, Tensor, int], Tensor]


class Chain:
    """Layer halves one after the other, each on the output of the one before, as in a model."""

    def __init__(self, case: Case, layers: list[MLPWeights], M: int) -> None:
        like = layers[0].norm_weight
        assert like is not None
        generator = torch.Generator(like.device).manual_seed(M)
        shape = (M, case.hidden)
        self.layers = len(layers)
        self.residual, *self.attention = (
            torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
            for _ in range(self.layers + 1)
        )

    def run(self, half: LayerHalf) -> Tensor:
        """The last layer's output."""
        x = self.residual
        for i, attention in enumerate(self.attention):
            x = half(attention, x, i)
        return x

    def first(self, half: LayerHalf) -> Tensor:
        """The first layer's output."""
        return half(self.attention[0], self.residual, 0)

    def capture(self, half: LayerHalf) -> torch.cuda.CUDAGraph:
        """`run` in a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run(half)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(half)
        return graph

    def errors(self, case: Case, weights: MLPWeights, half: LayerHalf) -> tuple[float, float]:
        """RMS error of the first layer against float32, relative: of `half`, and of PyTorch's ops.

        Looks at the first 256 rows.
        """
        op = MLPGemmOp(activation=case.activation, norm=case.norm)
        a, r = self.attention[0][:256], self.residual[:256]
        reference = op.reference(a, weights, r)
        own = op.compose(a, weights, r, None)
        found = self.first(half)[:256]
        error, torch_error = (
            ((y.float() - reference).norm() / reference.norm()).item() for y in (found, own)
        )
        return error, torch_error


class Times(NamedTuple):
    """Microseconds of one layer half."""

    median: float
    least: float
    most: float


def device_times(
    graphs: dict[str, torch.cuda.CUDAGraph],
    layers: int,
    *,
    rounds: int = 5,
    milliseconds: float = 10.0,
    agreed: Callable[[int], int] = lambda replays: replays,
) -> dict[str, Times]:
    """Device time of graphs of `layers` layer halves, measured in turn, round by round.

    A round of a graph takes about so many milliseconds; the first does not count. agreed: how often
    processes replay graphs that wait for each other's, given how often this one would.
    """

    def measure(graph: torch.cuda.CUDAGraph, replays: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / replays

    replays = {}
    for name, graph in graphs.items():
        graph.replay()
        replays[name] = agreed(max(1, min(200, int(milliseconds / measure(graph, 1)))))
    measured: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            measured[name].append(measure(graph, replays[name]) / layers * 1e3)
    return {name: Times(statistics.median(us), min(us), max(us)) for name, us in measured.items()}


class Ceilings(NamedTuple):
    """What this machine can do: bytes read in TB/s, a square 16-bit product in TFLOP/s."""

    read_tb_s: float
    product_tflop_s: float


def ceilings(dtype: torch.dtype) -> Ceilings:
    """Measured now: the sum of 2 GB, and 8192 x 8192 x 8192 in dtype."""
    values = torch.ones(1_000_000_000, dtype=torch.float16, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))

    def best(work: Callable[[], object], times: Iterable[int] = range(8)) -> float:
        work()
        events = []
        for _ in times:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return min(start.elapsed_time(end) for start, end in events) * 1e-3

    read = values.nbytes / best(lambda: values.view(torch.int32).sum(dtype=torch.int32)) / 1e12
    return Ceilings(read, 2 * 8192**3 / best(lambda: F.linear(a, b)) / 1e12)
