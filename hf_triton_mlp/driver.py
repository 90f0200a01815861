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

#: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h.
PROGRAMMATIC_STREAM_SERIALIZATION = 6

#: CUDA_ERROR_INVALID_CONTEXT of cuda.h.
INVALID_CONTEXT = 201

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


def relauncher(
    compiled: Any,
    grid: Sequence[int],
    values: Sequence[Any],
    moved: Sequence[int | None],
    addresses: int,
) -> Callable[[int, Sequence[int]], None] | None:
    """A function of (stream, so many addresses) that launches a compiled kernel again.

    values: the kernel's arguments in order, tensors as addresses; moved: for each its index among
    the addresses, None if it stays. None when this kernel takes anything but pointers and plain
    numbers, or other parameters than its signature says: then Triton's launcher has to do it.
    The current context has to be the kernel's.
    """
    driver, metadata = cuda_driver(), compiled.metadata
    types = tuple(compiled.src.signature.values())
    if driver is None or len(types) != len(values) or not is_plain_kernel(metadata):
        return None
    cells = (ctypes.c_uint64 * (addresses + len(values) + 1))()
    places: list[int] = []
    sizes: list[int] = []
    for i, (kind, value, place) in enumerate(zip(types, values, moved, strict=True)):
        if kind == "constexpr":
            continue
        form, size = ("Q", 8) if kind.startswith("*") else SCALARS.get(kind, ("", 0))
        if not form:
            return None
        if place is None:
            place = addresses + i
            struct.pack_into(form, cells, 8 * place, value)
        places.append(place)
        sizes.append(size)
    function = ctypes.c_void_p(compiled.function)
    found = parameter_sizes(driver, function)
    # Triton adds pointers to scratch memory, which there is none of: the last cell is null.
    scratch = len(found) - len(sizes)
    if scratch not in (0, 1, 2) or found != sizes + scratch * [8]:
        return None
    places += scratch * [len(cells) - 1]

    start = ctypes.addressof(cells)
    parameters = (ctypes.c_void_p * len(places))(*[start + 8 * place for place in places])
    config = LaunchConfig(tuple(grid), (32 * metadata.num_warps, 1, 1), metadata.shared)
    attribute = LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))
    config.attributes = ctypes.pointer(attribute)
    config.attribute_count = int(metadata.launch_pdl)
    write = struct.Struct(f"{addresses}Q").pack_into
    launch, lock = driver.launch, threading.Lock()
    arguments = (
        ctypes.c_void_p(ctypes.addressof(config)),
        function,
        ctypes.c_void_p(ctypes.addressof(parameters)),
        None,
    )
    context = ctypes.c_void_p()
    driver.current_context(ctypes.byref(context))
    use_context, name = driver.use_context, compiled.name

    def launch_again(stream: int, moving: Sequence[int]) -> None:
        with lock:
            write(cells, 0, *moving)
            config.stream = stream
            error = launch(*arguments)
            if error == INVALID_CONTEXT:  # the first use of CUDA in this thread
                use_context(context)
                error = launch(*arguments)
        if error:
            raise RuntimeError(f"CUDA error {error} when launching {name}")

    # What is pointed to lives as long: the kernel in its module, the memory of the parameters.
    launch_again.keep = compiled, parameters  # pyright: ignore[reportFunctionMemberAccess]
    return launch_again
