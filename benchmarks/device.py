"""A GPU behind NVIDIA's driver, by ctypes: memory, modules, launches and the time that they take.

Nothing but the driver is needed, neither CUDA's toolkit nor torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from apollo_fuse.codegen.triton.compile import Binary
from apollo_fuse.errors import ApolloFuseError

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR, _CLOCK_KHZ, _BUS_BITS = 75, 76, 36, 37  # what attributes of a device are called
_DYNAMIC_SHARED = 8  # an attribute of a function
_FREE_SHARED = 48 * 1024  # bytes of a block that need no asking


class DeviceError(ApolloFuseError):
    """A function of the driver failed."""


@dataclass(frozen=True, slots=True)
class Started:
    """A kernel with the arguments that it is launched with, as often as one likes."""

    function: ctypes.c_void_p
    programs: int
    binary: Binary
    arguments: ctypes.Array[ctypes.c_void_p]
    values: Sequence[ctypes.c_void_p | ctypes.c_int64]  # that the arguments point to


class Device:
    """The first GPU, its primary context current in this thread.  Raises DeviceError where there is none."""

    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise DeviceError(f"no driver of NVIDIA can be loaded: {error}") from None
        self._call("cuInit", 0)
        context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxPushCurrent_v2", context)
        self._call("cuStreamCreate", ctypes.byref(self._stream), 0)
        self._taken: list[ctypes.c_void_p] = []
        self._modules: dict[bytes, ctypes.c_void_p] = {}

    @property
    def architecture(self) -> int:
        """The compute capability, such as 90."""
        return 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)

    @property
    def peak(self) -> float:
        """Bytes a second that memory delivers at best: twice a clock, over the whole bus."""
        return 2e3 * self._attribute(_CLOCK_KHZ) * self._attribute(_BUS_BITS) / 8

    def array(self, size: int) -> ctypes.c_void_p:
        """Memory of so many bytes, until `free`."""
        pointer = ctypes.c_void_p()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(16, size)))
        self._taken.append(pointer)
        return pointer

    def write(self, pointer: ctypes.c_void_p, array: np.ndarray) -> None:
        own = np.ascontiguousarray(array)
        self._call("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(own.ctypes.data), ctypes.c_size_t(own.nbytes))

    def read(self, pointer: ctypes.c_void_p, array: np.ndarray) -> None:
        """Into the array, which lies in one piece."""
        self._call(
            "cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), pointer, ctypes.c_size_t(array.nbytes)
        )

    def free(self) -> None:
        """All memory that was taken."""
        while self._taken:
            self._call("cuMemFree_v2", self._taken.pop())

    def start(
        self,
        binary: Binary,
        code: bytes,
        name: str,
        programs: int,
        pointers: Sequence[ctypes.c_void_p],
        extents: Sequence[int],
    ) -> Started:
        """The kernel called `name` in `code`, with its tensors and scratch, and its extents, as arguments."""
        if code not in self._modules:
            module = ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), code)
            self._modules[code] = module
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._modules[code], name.encode())
        if binary.shared_bytes > _FREE_SHARED:
            self._call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, binary.shared_bytes)
        # behind a kernel's own arguments Triton has two for memory that ours do not need
        numbers = [ctypes.c_int64(extent) for extent in extents]
        values: list[ctypes.c_void_p | ctypes.c_int64] = [*pointers, *numbers]
        values += [ctypes.c_void_p(), ctypes.c_void_p()]
        places = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
        return Started(function, programs, binary, (ctypes.c_void_p * len(places))(*places), values)

    def launch(self, kernels: Sequence[Started]) -> None:
        """One after the other; returns before they are done."""
        for x in kernels:
            grid, block = (x.programs, 1, 1), (x.binary.threads, 1, 1)
            shared = x.binary.shared_bytes
            self._call(
                "cuLaunchKernel",
                x.function,
                *grid,
                *block,
                shared,
                self._stream,
                x.arguments,
                ctypes.c_void_p(),
            )

    def wait(self) -> None:
        """Until all launches are done.  Raises DeviceError where one failed."""
        self._call("cuStreamSynchronize", self._stream)

    def seconds(self, run: Callable[[], None]) -> float:
        """What the device takes for what `run` launches."""
        first, last, found = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (first, last):
            self._call("cuEventCreate", ctypes.byref(event), 0)
        self._call("cuEventRecord", first, self._stream)
        run()
        self._call("cuEventRecord", last, self._stream)
        self._call("cuEventSynchronize", last)
        self._call("cuEventElapsedTime", ctypes.byref(found), first, last)
        for event in (first, last):
            self._call("cuEventDestroy_v2", event)
        return found.value * 1e-3

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        return value.value

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._driver, name)(*arguments)
        if result:
            word = ctypes.c_char_p()
            self._driver.cuGetErrorName(result, ctypes.byref(word))
            raise DeviceError(f"{name} gave {(word.value or b'?').decode()} ({result})")
