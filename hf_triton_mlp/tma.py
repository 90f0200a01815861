"""What the tensor memory accelerator is told about a matrix, and which matrices it can address.

Descriptors are made on the host and passed by value: made by the programs, they would need scratch
memory from an allocator that Triton has one of for the whole process, and a trip to the L2 and back
before the first load. A CUDA graph keeps them, with the addresses that it keeps anyway.
"""

from collections.abc import Iterable

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

#: Addresses, and distances between rows and between matrices, are multiples of so many bytes.
ALIGNMENT = 16

#: A distance takes 40 bits.
FARTHEST = 1 << 40


def addressable(
    x: Tensor, weight: Tensor, gate: Tensor | None = None, summands: Iterable[Tensor | None] = ()
) -> bool:
    """Whether TMA can read rows x (M, K) and weights (N, K), and write (M, N), all of 2 bytes.

    Summands (M, N), which TMA does not read, have to be aligned in the same way. A weight and its
    gate, which are read as one matrix of three dimensions, have to be whole rows apart: each
    dimension's distance is a multiple of the one before (CUDA driver API, cuTensorMapEncodeTiled).
    """
    read = [x, weight] if gate is None else [x, weight, gate]
    if gate is not None:
        distance, row = abs(gate.data_ptr() - weight.data_ptr()), weight.stride(0) * weight.itemsize
        if gate.stride() != weight.stride() or distance % row or not 0 < distance < FARTHEST:
            return False
    return (
        all(aligned(m) and m.shape[1] <= m.stride(0) < FARTHEST // m.itemsize for m in read)
        and all(aligned(m) for m in summands if m is not None)
        and weight.shape[0] * weight.itemsize % ALIGNMENT == 0
    )


def aligned(matrix: Tensor) -> bool:
    """Whether each row is 16-bit values in a row, and starts at a multiple of 16 bytes."""
    return (
        matrix.itemsize == 2
        and matrix.stride(1) == 1
        and matrix.stride(0) * matrix.itemsize % ALIGNMENT == 0
        and matrix.data_ptr() % ALIGNMENT == 0
    )


def describe(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A matrix in blocks of (rows, columns)."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def describe_weights(
    weight: Tensor, gate: Tensor | None, block_n: int, block_k: int
) -> tuple[TensorDescriptor, int | None]:
    """Weights (N, K) as (1, N, K), or with their gate's as (2, N, K); which of two is the gate.

    A block is (block_n, block_k) of both. Two matrices are one of three dimensions, as far apart
    as they are in memory, so the one at the lower address is number 0.
    """
    place, first, count, distance = None, weight, 1, weight.shape[0] * weight.stride(0)
    if gate is not None:
        place = int(gate.data_ptr() > weight.data_ptr())
        first = weight if place else gate
        distance = abs(gate.data_ptr() - weight.data_ptr()) // weight.itemsize
        count = 2
    shape, strides = [count, *weight.shape], [distance, *weight.stride()]
    return TensorDescriptor(first, shape, strides, [count, block_n, block_k]), place
