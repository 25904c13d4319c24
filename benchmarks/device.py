"""A GPU behind its driver, CUDA's or HIP's, by ctypes: memory, modules, launches and the time that they take.

Nothing but the driver is needed, neither a toolkit nor torch.  HIP has CUDA's functions under other names;
in what both differ stands in `_Cuda` and `_Hip`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apollo_fuse.codegen.triton.compile import Binary
from apollo_fuse.errors import ApolloFuseError
from apollo_fuse.gpu import KNOWN, GpuTarget

_MAJOR, _MINOR, _CLOCK_KHZ, _BUS_BITS = 75, 76, 36, 37  # what CUDA calls attributes of a device
_THIS_THREAD = 1  # whose launches a graph records
_DYNAMIC_SHARED = 8  # and one of a function
_FREE_SHARED = 48 * 1024  # bytes of a block that need no asking there
_PROPERTIES, _ARCHITECTURE = 1472, 1160  # of HIP: bytes of a device's properties, and where its name begins


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


class Device(ABC):
    """The first GPU of a driver, current in this thread.  Raises DeviceError where there is none."""

    _libraries: tuple[str, ...]
    _names: Mapping[str, str]  # the driver's functions by what they do

    def __init__(self) -> None:
        self._driver = self._loaded()
        self._call(self._names["start"], 0)
        self._make_current()
        self._stream = ctypes.c_void_p()
        self._call(self._names["stream"], ctypes.byref(self._stream), 0)
        self._taken: list[ctypes.c_void_p] = []
        self._graphs: list[tuple[str, ctypes.c_void_p]] = []
        self._modules: dict[bytes, ctypes.c_void_p] = {}

    @property
    @abstractmethod
    def name(self) -> str:
        """What it calls its architecture."""

    @property
    @abstractmethod
    def target(self) -> GpuTarget:
        """What kernels are compiled for.  Raises DeviceError where the device runs nothing that is known."""

    @property
    @abstractmethod
    def peak(self) -> float:
        """Bytes a second that memory delivers at best."""

    @abstractmethod
    def code_of(self, binary: Binary) -> bytes:
        """What the driver is given."""

    @abstractmethod
    def _make_current(self) -> None:
        """In this thread."""

    @abstractmethod
    def _allow_shared(self, function: ctypes.c_void_p, size: int) -> None:
        """Lets blocks of the function have so many bytes of shared memory."""

    def _loaded(self) -> ctypes.CDLL:
        problems: list[str] = []
        for library in self._libraries:
            try:
                return ctypes.CDLL(library)
            except OSError as error:
                problems.append(str(error))
        raise DeviceError(problems[-1])

    def array(self, size: int) -> ctypes.c_void_p:
        """Memory of so many bytes, until `free`."""
        pointer = ctypes.c_void_p()
        self._call(self._names["take"], ctypes.byref(pointer), ctypes.c_size_t(max(16, size)))
        self._taken.append(pointer)
        return pointer

    def write(self, pointer: ctypes.c_void_p, array: np.ndarray) -> None:
        own = np.ascontiguousarray(array)
        size = ctypes.c_size_t(own.nbytes)
        self._call(self._names["write"], pointer, ctypes.c_void_p(own.ctypes.data), size)

    def read(self, pointer: ctypes.c_void_p, array: np.ndarray) -> None:
        """Into the array, which lies in one piece."""
        size = ctypes.c_size_t(array.nbytes)
        self._call(self._names["read"], ctypes.c_void_p(array.ctypes.data), pointer, size)

    def free(self) -> None:
        """All memory that was taken, and what was recorded on it."""
        while self._graphs:
            name, graph = self._graphs.pop()
            self._call(self._names[name], graph)
        while self._taken:
            self._call(self._names["free"], self._taken.pop())

    def start(
        self,
        binary: Binary,
        name: str,
        programs: int,
        pointers: Sequence[ctypes.c_void_p],
        extents: Sequence[int],
    ) -> Started:
        """The kernel `name` of the binary with its arguments: tensors and scratch, then extents."""
        code = self.code_of(binary)
        if code not in self._modules:
            module = ctypes.c_void_p()
            self._call(self._names["load"], ctypes.byref(module), code)
            self._modules[code] = module
        function = ctypes.c_void_p()
        self._call(self._names["function"], ctypes.byref(function), self._modules[code], name.encode())
        self._allow_shared(function, binary.shared_bytes)
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
            rest = (x.binary.shared_bytes, self._stream, x.arguments, ctypes.c_void_p())
            self._call(self._names["launch"], x.function, *grid, *block, *rest)

    def recorded(self, kernels: Sequence[Started], times: int) -> Callable[[], None]:
        """Launches all of them so many times over, as one graph, for which Python takes no time."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call(self._names["record"], self._stream, _THIS_THREAD)
        for _ in range(times):
            self.launch(kernels)
        self._call(self._names["end record"], self._stream, ctypes.byref(graph))
        self._graphs.append(("drop graph", graph))
        self._call(self._names["make ready"], ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        self._graphs.append(("drop ready graph", ready))
        return lambda: self._call(self._names["play"], ready, self._stream)

    def wait(self) -> None:
        """Until all launches are done.  Raises DeviceError where one failed."""
        self._call(self._names["wait"], self._stream)

    def seconds(self, run: Callable[[], None]) -> float:
        """What the device takes for what `run` launches."""
        first, last, found = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (first, last):
            self._call(self._names["event"], ctypes.byref(event), 0)
        self._call(self._names["note"], first, self._stream)
        run()
        self._call(self._names["note"], last, self._stream)
        self._call(self._names["wait for event"], last)
        self._call(self._names["between"], ctypes.byref(found), first, last)
        for event in (first, last):
            self._call(self._names["drop event"], event)
        return found.value * 1e-3

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._driver, name)(*arguments)
        if result:
            word = ctypes.c_char_p()
            getattr(self._driver, self._names["error"])(result, ctypes.byref(word))
            raise DeviceError(f"{name} gave {(word.value or b'?').decode()} ({result})")


class _Cuda(Device):
    _libraries = ("libcuda.so.1",)
    _names = {
        "start": "cuInit",
        "error": "cuGetErrorName",
        "stream": "cuStreamCreate",
        "wait": "cuStreamSynchronize",
        "take": "cuMemAlloc_v2",
        "free": "cuMemFree_v2",
        "write": "cuMemcpyHtoD_v2",
        "read": "cuMemcpyDtoH_v2",
        "load": "cuModuleLoadData",
        "function": "cuModuleGetFunction",
        "launch": "cuLaunchKernel",
        "event": "cuEventCreate",
        "note": "cuEventRecord",
        "wait for event": "cuEventSynchronize",
        "between": "cuEventElapsedTime",
        "drop event": "cuEventDestroy_v2",
        "record": "cuStreamBeginCapture_v2",
        "end record": "cuStreamEndCapture",
        "make ready": "cuGraphInstantiateWithFlags",
        "play": "cuGraphLaunch",
        "drop graph": "cuGraphDestroy",
        "drop ready graph": "cuGraphExecDestroy",
    }

    @property
    def name(self) -> str:
        return f"compute capability {self._capability}"

    @property
    def target(self) -> GpuTarget:
        """The newest architecture that the device runs, as code or from PTX."""
        return cuda_target(self._capability)

    @property
    def peak(self) -> float:
        """Twice a clock, over the whole bus."""
        return 2e3 * self._attribute(_CLOCK_KHZ) * self._attribute(_BUS_BITS) / 8

    def code_of(self, binary: Binary) -> bytes:
        """Code where it is for the device's generation, else text that the driver compiles."""
        same = int(self.target.architecture) // 10 == self._capability // 10
        return binary.path.read_bytes() if same else binary.text.read_bytes() + b"\0"

    @property
    def _capability(self) -> int:
        return 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)

    def _make_current(self) -> None:
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxPushCurrent_v2", context)

    def _allow_shared(self, function: ctypes.c_void_p, size: int) -> None:
        if size > _FREE_SHARED:
            self._call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, size)

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        return value.value


class _Hip(Device):
    _libraries = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so")
    _names = {
        "start": "hipInit",
        "error": "hipDrvGetErrorName",
        "stream": "hipStreamCreateWithFlags",
        "wait": "hipStreamSynchronize",
        "take": "hipMalloc",
        "free": "hipFree",
        "write": "hipMemcpyHtoD",
        "read": "hipMemcpyDtoH",
        "load": "hipModuleLoadData",
        "function": "hipModuleGetFunction",
        "launch": "hipModuleLaunchKernel",
        "event": "hipEventCreateWithFlags",
        "note": "hipEventRecord",
        "wait for event": "hipEventSynchronize",
        "between": "hipEventElapsedTime",
        "drop event": "hipEventDestroy",
        "record": "hipStreamBeginCapture",
        "end record": "hipStreamEndCapture",
        "make ready": "hipGraphInstantiateWithFlags",
        "play": "hipGraphLaunch",
        "drop graph": "hipGraphDestroy",
        "drop ready graph": "hipGraphExecDestroy",
    }

    @property
    def name(self) -> str:
        properties = ctypes.create_string_buffer(_PROPERTIES)
        self._call("hipGetDevicePropertiesR0600", properties, 0)
        return properties.raw[_ARCHITECTURE:].partition(b"\0")[0].decode().partition(":")[0]

    @property
    def target(self) -> GpuTarget:
        """The device's own: code for another one does not run."""
        fitting = [gpu for gpu in KNOWN if gpu == GpuTarget("hip", self.name)]
        if not fitting:
            known = ", ".join(gpu.architecture for gpu in KNOWN if gpu.backend == "hip")
            raise DeviceError(f"the device is a {self.name}, expected {known}")
        return fitting[0]

    @property
    def peak(self) -> float:
        """As published: of what clock this driver tells is not the same for all devices."""
        peak = self.target.machine.levels[-1].most
        assert peak is not None, "all of a GPU share its memory"
        return peak

    def code_of(self, binary: Binary) -> bytes:
        return binary.path.read_bytes()

    def _make_current(self) -> None:
        self._call("hipSetDevice", 0)

    def _allow_shared(self, function: ctypes.c_void_p, size: int) -> None:
        """There without asking."""


def cuda_target(capability: int) -> GpuTarget:
    """The newest architecture of CUDA's that a device of this compute capability runs."""
    fitting = [gpu for gpu in KNOWN if gpu.backend == "cuda" and int(gpu.architecture) <= capability]
    if not fitting:
        raise DeviceError(f"the device has compute capability {capability}, expected 80 or newer")
    return max(fitting, key=lambda gpu: int(gpu.architecture))


def first_device() -> Device:
    """NVIDIA's or AMD's.  Raises DeviceError, which says why it is neither."""
    problems: list[str] = []
    for kind in (_Cuda, _Hip):
        try:
            return kind()
        except DeviceError as error:
            problems.append(str(error))
    raise DeviceError("; ".join(problems))
