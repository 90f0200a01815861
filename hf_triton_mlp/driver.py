"""Launching a compiled kernel again by the CUDA driver alone, with its parameters already in place.

Triton's launcher takes a kernel's arguments, forty for ours, through Python at every launch. Here
they are written once as the driver wants them, and a launch writes the addresses that moved.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

#: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h.
PROGRAMMATIC_STREAM_SERIALIZATION = 6

#: CUDA_ERROR_INVALID_CONTEXT of cuda.h.
INVALID_CONTEXT = 201

#: CUtensorMapDataType, and CU_TENSOR_MAP_L2_PROMOTION_L2_128B, of cuda.h.
MATRIX_TYPES = {torch.float16: 6, torch.bfloat16: 9}
L2_PROMOTION = 2

#: sizeof(CUtensorMap) of cuda.h, and what its address is a multiple of.
MATRIX_BYTES = 128
MATRIX_ALIGNMENT = 64

#: How Triton's types of numbers are written, and how many bytes they take as parameters.
SCALARS = {"i32": ("q", 4), "u32": ("q", 4), "i64": ("q", 8), "u64": ("Q", 8), "fp32": ("f", 4)}


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint64 * 8))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Driver(NamedTuple):
    """The functions of the CUDA driver that are called here."""

    launch: Callable[..., int]
    parameter: Callable[..., int]
    current_context: Callable[..., int]
    use_context: Callable[..., int]
    encode_matrix: Callable[..., int]
    move_matrix: Callable[..., int]


@cache
def cuda_driver() -> Driver | None:
    """The driver; None where it is another system's, or older than CUDA 12.4."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        return Driver(
            library.cuLaunchKernelEx,
            library.cuFuncGetParamInfo,
            library.cuCtxGetCurrent,
            library.cuCtxSetCurrent,
            library.cuTensorMapEncodeTiled,
            library.cuTensorMapReplaceAddress,
        )
    except (OSError, AttributeError):
        return None


def parameter_sizes(driver: Driver, function: ctypes.c_void_p) -> list[int]:
    """Bytes of each parameter of a loaded kernel."""
    sizes: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while not driver.parameter(
        function, ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)
    ):
        sizes.append(size.value)
    return sizes


def is_plain_kernel(metadata: Any) -> bool:
    """Whether it is known to need neither clusters nor a cooperative launch nor scratch memory."""
    try:
        return metadata.num_ctas == 1 and not (
            metadata.launch_cooperative_grid
            or metadata.global_scratch_size
            or metadata.profile_scratch_size
        )
    except AttributeError:  # another version of Triton
        return False


class Matrix:
    """What the tensor memory accelerator is told about a matrix, as a kernel's parameter.

    `describe` in tma.py says what a descriptor is; Triton, which of its blocks are copied, and how
    they lie in shared memory (`tensordesc_meta` of a compiled kernel).
    """

    def __init__(self, driver: Driver, descriptor: TensorDescriptor, blocks: Any) -> None:
        """Raises ValueError where the driver refuses it."""
        base, rank = descriptor.base, len(descriptor.shape)
        self._memory = (ctypes.c_uint8 * (MATRIX_BYTES + MATRIX_ALIGNMENT))()
        start = ctypes.addressof(self._memory)
        self.address = start + -start % MATRIX_ALIGNMENT
        self._pointer, self._move = ctypes.c_void_p(self.address), driver.move_matrix
        steps = [base.element_size() * stride for stride in descriptor.strides[-2::-1]]
        error = driver.encode_matrix(
            self._pointer,
            MATRIX_TYPES[base.dtype],
            rank,
            ctypes.c_void_p(base.data_ptr()),
            (ctypes.c_uint64 * rank)(*reversed(descriptor.shape)),
            (ctypes.c_uint64 * rank)(*steps),
            (ctypes.c_uint32 * rank)(*reversed(blocks["block_size"])),
            (ctypes.c_uint32 * rank)(*rank * [1]),
            0,  # not interleaved
            blocks["swizzle"],
            L2_PROMOTION,
            0,  # zeros out of bounds
        )
        if error:
            raise ValueError(f"CUDA error {error} when describing a matrix")

    def move(self, address: int) -> int:
        """Let the matrix be at another address; CUDA's error."""
        return self._move(self._pointer, ctypes.c_void_p(address))


class Parameter(NamedTuple):
    """What a kernel is given: a number (of this form, so many bytes), an address, or a matrix.

    place: its index among the addresses that move; None if it stays.
    """

    form: str
    size: int
    value: Any
    place: int | None = None


def parameters_of(
    driver: Driver, compiled: Any, values: Sequence[Any], moved: Sequence[int | None]
) -> list[Parameter] | None:
    """A kernel's parameters in order, as `relauncher` is given its arguments; None if unknown."""
    matrices = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    found: list[Parameter] = []
    types = compiled.src.signature.values()
    for kind, value, place in zip(types, values, moved, strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            found.append(Parameter("Q", 8, value, place))
        elif kind in SCALARS:
            found.append(Parameter(*SCALARS[kind], value, place))
        elif kind.startswith("tensordesc"):
            blocks = next(matrices, None)
            if blocks is None:
                return None
            try:
                matrix = Matrix(driver, value, blocks)
            except (KeyError, ValueError):
                return None
            found.append(Parameter("", MATRIX_BYTES, matrix, place))
            found += [Parameter("q", 4, size) for size in value.shape]
            found += [Parameter("q", 8, stride) for stride in value.strides]
        else:
            return None
    return found


def relauncher(
    compiled: Any,
    grid: Sequence[int],
    values: Sequence[Any],
    moved: Sequence[int | None],
    addresses: int,
) -> Callable[[int, Sequence[int]], None] | None:
    """A function of (stream, so many addresses) that launches a compiled kernel again.

    values: the kernel's arguments in order, tensors as addresses; moved: for each its index among
    the addresses, None if it stays. None when this kernel takes anything but pointers, plain
    numbers and descriptors of matrices, or other parameters than its signature says: then Triton's
    launcher has to do it. The current context has to be the kernel's.
    """
    driver, metadata = cuda_driver(), compiled.metadata
    if (
        driver is None
        or len(compiled.src.signature) != len(values)
        or not is_plain_kernel(metadata)
    ):
        return None
    wanted = parameters_of(driver, compiled, values, moved)
    if wanted is None:
        return None
    function = ctypes.c_void_p(compiled.function)
    sizes, found = [each.size for each in wanted], parameter_sizes(driver, function)
    # Triton adds pointers to scratch memory, which there is none of: null.
    scratch = len(found) - len(sizes)
    if scratch not in (0, 1, 2) or found != sizes + scratch * [8]:
        return None
    wanted += scratch * [Parameter("Q", 8, 0)]

    cells = (ctypes.c_uint64 * (addresses + len(wanted)))()
    start = ctypes.addressof(cells)
    parameters = (ctypes.c_void_p * len(wanted))()
    moving_matrices: list[tuple[Callable[[int], int], int]] = []
    for i, (form, _, value, place) in enumerate(wanted):
        if isinstance(value, Matrix):
            parameters[i] = value.address
            if place is not None:
                moving_matrices.append((value.move, place))
        elif place is not None:
            parameters[i] = start + 8 * place
        else:
            parameters[i] = start + 8 * (addresses + i)
            struct.pack_into(form, cells, 8 * (addresses + i), value)
    config = LaunchConfig(tuple(grid), (32 * metadata.num_warps, 1, 1), metadata.shared)
    attribute = LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))
    config.attributes = ctypes.pointer(attribute)
    config.attribute_count = int(metadata.launch_pdl)
    write = struct.Struct(f"{addresses}Q").pack_into
    lock = threading.Lock()
    arguments = (
        ctypes.c_void_p(ctypes.addressof(config)),
        function,
        ctypes.c_void_p(ctypes.addressof(parameters)),
        None,
    )
    context = ctypes.c_void_p()
    driver.current_context(ctypes.byref(context))
    launch, use_context, name = driver.launch, driver.use_context, compiled.name

    def attempt(moving: Sequence[int]) -> int:
        for move, place in moving_matrices:
            error = move(moving[place])
            if error:
                return error
        return launch(*arguments)

    def launch_again(stream: int, moving: Sequence[int]) -> None:
        with lock:
            write(cells, 0, *moving)
            config.stream = stream
            error = attempt(moving)
            if error == INVALID_CONTEXT:  # the first use of CUDA in this thread
                use_context(context)
                error = attempt(moving)
        if error:
            raise RuntimeError(f"CUDA error {error} when launching {name}")

    # What is pointed to lives as long: the kernel in its module, the memory of the parameters.
    launch_again.keep = compiled, parameters, wanted  # pyright: ignore[reportFunctionMemberAccess]
    return launch_again
