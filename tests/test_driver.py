"""Launching a kernel again by the driver: what a driver that only listens gets to see."""

import ctypes
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_triton_mlp import MLPConfig, TritonMLP, driver
from hf_triton_mlp.driver import Driver, LaunchConfig, relauncher

FUNCTION = 0x7F00_1234_5678
SIGNATURE = {"x": "*fp16", "y": "*fp16", "none": "constexpr", "n": "i32", "big": "i64",
             "eps": "fp32", "BLOCK": "constexpr"}  # fmt: skip
VALUES = [0, 0x7F00_0000_2000, None, -5, 2**40, 1e-5, 64]
MOVED = [1, None, None, None, None, None, None]
SIZES = [8, 8, 4, 8, 4]


@dataclass
class Listener:
    """A driver that says how its kernel's parameters are laid out, and keeps what it is given."""

    sizes: list[int]
    errors: list[int] = field(default_factory=list)
    context: int | None = 0x77
    launches: list[dict[str, Any]] = field(default_factory=list)
    matrices: list[tuple[Any, ...]] = field(default_factory=list)

    def parameter(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        if index.value >= len(self.sizes):
            return 1
        ctypes.cast(size, ctypes.POINTER(ctypes.c_size_t))[0] = self.sizes[index.value]
        return 0

    def launch(self, config: Any, function: Any, parameters: Any, extra: Any) -> int:
        given = ctypes.cast(config, ctypes.POINTER(LaunchConfig))[0]
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        self.launches.append(
            {
                "grid": tuple(given.grid),
                "block": tuple(given.block),
                "shared": given.shared_bytes,
                "stream": given.stream,
                "attributes": [
                    (given.attributes[i].id, given.attributes[i].value[0])
                    for i in range(given.attribute_count)
                ],
                "function": function.value,
                "parameters": [
                    ctypes.string_at(pointers[i], size) for i, size in enumerate(self.sizes)
                ],
                "extra": extra,
            }
        )
        return self.errors.pop() if self.errors else 0

    def current_context(self, context: Any) -> int:
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = self.context
        return 0

    def use_context(self, context: Any) -> int:
        self.context = context.value
        return 0

    def encode_matrix(self, matrix: Any, kind: int, rank: int, base: Any, *rest: Any) -> int:
        """What is written here in the place of a description: the address alone."""
        ctypes.memmove(matrix, struct.pack("<Q", base.value), 8)
        assert matrix.value % 64 == 0
        sizes, steps, block, each, *constants = rest
        self.matrices.append((kind, [*sizes], [*steps][: rank - 1], [*block], [*each], *constants))
        return 0

    def move_matrix(self, matrix: Any, address: Any) -> int:
        ctypes.memmove(matrix, struct.pack("<Q", address.value), 8)
        return 0


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    found = Listener([*SIZES, 8, 8])
    listening = Driver(*(getattr(found, name) for name in Driver._fields))
    monkeypatch.setattr(driver, "cuda_driver", lambda: listening)
    yield found


def compiled(**metadata: Any) -> Any:
    values = {
        "num_ctas": 1,
        "num_warps": 8,
        "shared": 4096,
        "launch_cooperative_grid": False,
        "launch_pdl": True,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
    }
    return SimpleNamespace(
        src=SimpleNamespace(signature=SIGNATURE),
        metadata=SimpleNamespace(**{**values, **metadata}),
        function=FUNCTION,
        name="a_kernel",
    )


def test_what_the_driver_gets(listener: Listener) -> None:
    again = relauncher(compiled(), (7, 2, 1), VALUES, MOVED, 3)
    assert again is not None
    again(0, (11, 0x7F00_0000_1000, 13))
    again(99, (0, 0x7F00_0000_1010, 0))
    fixed = [struct.pack("<Q", VALUES[1]), struct.pack("<i", -5), struct.pack("<q", 2**40),
             struct.pack("<f", 1e-5), bytes(8), bytes(8)]  # fmt: skip
    for launched, stream, address in zip(
        listener.launches, (None, 99), (0x7F00_0000_1000, 0x7F00_0000_1010), strict=True
    ):
        assert launched == {
            "grid": (7, 2, 1),
            "block": (256, 1, 1),
            "shared": 4096,
            "stream": stream,
            "attributes": [(6, 1)],
            "function": FUNCTION,
            "parameters": [struct.pack("<Q", address), *fixed],
            "extra": None,
        }


def test_descriptions_of_matrices(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    x = TensorDescriptor(
        torch.zeros(6, 80, dtype=torch.bfloat16)[:, :64], [6, 64], [80, 1], [4, 32]
    )
    w = TensorDescriptor(torch.zeros(2, 8, 64, dtype=torch.float16), [2, 8, 64], [512, 64, 1],
                         [2, 8, 64])  # fmt: skip
    signature = {"x": "tensordesc<bf16[4, 32]>", "w": "tensordesc<fp16[2, 8, 64]>", "n": "i32"}
    blocks = [{"block_size": [4, 32], "swizzle": 2}, {"block_size": [2, 8, 64], "swizzle": 3}]
    kernel = compiled(tensordesc_meta=blocks)
    kernel.src.signature = signature
    listener.sizes = [128, 4, 4, 8, 8, 128, 4, 4, 4, 8, 8, 8, 4]
    again = relauncher(kernel, (1, 1, 1), [x, w, 7], [0, None, None], 1)
    assert again is not None
    # cuda.h's numbers of types; sizes, distances and blocks from the innermost dimension on.
    assert listener.matrices == [
        (9, [64, 6], [160], [32, 4], [1, 1], 0, 2, 2, 0),
        (6, [64, 8, 2], [128, 1024], [64, 8, 2], [1, 1, 1], 0, 3, 2, 0),
    ]
    for address in (0x7F00_0000_1000, 0x7F00_0000_2000):
        again(0, [address])
        found = listener.launches[-1]["parameters"]
        assert [struct.unpack("<Q", found[i][:8])[0] for i in (0, 5)] == [
            address,
            w.base.data_ptr(),
        ]
        numbers = [struct.unpack("<i" if len(p) == 4 else "<q", p)[0] for p in found if len(p) < 9]
        assert numbers == [6, 64, 80, 1, 2, 8, 64, 512, 64, 1, 7]
    # An error of the driver, or a kernel compiled without descriptions: Triton has to launch it.
    monkeypatch.setattr(listener, "encode_matrix", lambda *arguments: 1)
    driver_that_fails = Driver(*(getattr(listener, name) for name in Driver._fields))
    monkeypatch.setattr(driver, "cuda_driver", lambda: driver_that_fails)
    assert relauncher(kernel, (1, 1, 1), [x, w, 7], [0, None, None], 1) is None
    del kernel.metadata.tensordesc_meta
    assert relauncher(kernel, (1, 1, 1), [x, w, 7], [0, None, None], 1) is None


def test_no_attribute_without_programmatic_dependent_launch(listener: Listener) -> None:
    again = relauncher(compiled(launch_pdl=False), (1, 1, 1), VALUES, MOVED, 2)
    assert again is not None
    again(0, (1, 2))
    assert listener.launches[0]["attributes"] == []


def test_errors_are_raised(listener: Listener) -> None:
    listener.errors = [700]
    again = relauncher(compiled(), (1, 1, 1), VALUES, MOVED, 2)
    assert again is not None
    with pytest.raises(RuntimeError, match="CUDA error 700 when launching a_kernel"):
        again(0, (1, 2))


def test_a_thread_without_a_context_gets_the_kernels(listener: Listener) -> None:
    again = relauncher(compiled(), (1, 1, 1), VALUES, MOVED, 2)
    assert again is not None
    listener.context, listener.errors = None, [driver.INVALID_CONTEXT]
    again(0, (1, 2))
    assert listener.context == 0x77 and len(listener.launches) == 2
    listener.errors = [driver.INVALID_CONTEXT, driver.INVALID_CONTEXT]
    with pytest.raises(RuntimeError, match="CUDA error 201 when launching a_kernel"):
        again(0, (1, 2))


@pytest.mark.parametrize("scratch", [0, 1, 2])
def test_pointers_to_scratch_memory(listener: Listener, scratch: int) -> None:
    listener.sizes = [*SIZES, *scratch * [8]]
    assert relauncher(compiled(), (1, 1, 1), VALUES, MOVED, 2) is not None


@pytest.mark.parametrize("sizes", [SIZES[:-1], [8, 8, 8, 8, 4], [*SIZES, 8, 8, 8], [*SIZES, 4], []])
def test_a_kernel_with_other_parameters_is_left_to_triton(
    listener: Listener, sizes: list[int]
) -> None:
    listener.sizes = sizes
    assert relauncher(compiled(), (1, 1, 1), VALUES, MOVED, 2) is None


@pytest.mark.parametrize(
    "metadata",
    [
        {"num_ctas": 2},
        {"launch_cooperative_grid": True},
        {"global_scratch_size": 16},
        {"profile_scratch_size": 16},
    ],
)
def test_a_kernel_of_another_kind_is_left_to_triton(
    listener: Listener, metadata: dict[str, Any]
) -> None:
    kernel = compiled(**metadata)
    assert relauncher(kernel, (1, 1, 1), VALUES, MOVED, 2) is None
    del kernel.metadata.num_ctas
    assert relauncher(kernel, (1, 1, 1), VALUES, MOVED, 2) is None


def test_unknown_types_are_left_to_triton(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIGNATURE, "eps", "fp16")
    assert relauncher(compiled(), (1, 1, 1), VALUES, MOVED, 2) is None
    monkeypatch.setitem(SIGNATURE, "another", "constexpr")
    assert relauncher(compiled(), (1, 1, 1), VALUES, MOVED, 2) is None


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "cuda_driver", lambda: None)
    assert relauncher(compiled(), (1, 1, 1), VALUES, MOVED, 2) is None


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_same_bits_as_by_tritons_launcher(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = MLPConfig(hidden_size=768, intermediate_size=3072, norm="layer_norm", dtype=dtype)
    mlp = TritonMLP(config).cuda().eval()
    nn.init.normal_(mlp.inter_b)
    a, r = torch.randn(2, tokens, 768, device="cuda", dtype=dtype)
    with torch.no_grad():
        first = mlp(a, r)
        (bound,) = mlp._bound.launches._bound.values()
        assert all(hasattr(launch, "keep") for launch in bound.launches), "Triton launches"
        assert torch.equal(mlp(a, r), first)
        monkeypatch.setattr("hf_triton_mlp.bound.relauncher", lambda *arguments: None)
        mlp._bound = None
        assert torch.equal(mlp(a, r), first)
        (bound,) = mlp._bound.launches._bound.values()
        assert not any(hasattr(launch, "keep") for launch in bound.launches)
        assert torch.equal(mlp(a, r), first)


@pytest.mark.gpu
def test_the_first_use_of_cuda_in_a_thread() -> None:
    mlp = TritonMLP(MLPConfig(hidden_size=768, intermediate_size=3072)).cuda().eval()
    a, r = torch.randn(2, 1, 768, device="cuda")
    with torch.no_grad():
        first = mlp(a, r)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(torch.no_grad()(mlp), a, r).result()
    torch.cuda.synchronize()
    assert torch.equal(again, first)
