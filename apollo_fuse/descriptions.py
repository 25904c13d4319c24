"""Machines that are not at hand: a processor of each level in general, and GPUs by their public figures.

A description is the same on every machine and in every run, so what is decided by one can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

from apollo_fuse.cpu import Cpu
from apollo_fuse.machine import ACROSS, FUNCTIONS, MOVES, Gpu, Level, Machine, Runtime, Unit

_KIB, _MIB = 1 << 10, 1 << 20
_GIGA = 1e9

_CYCLES = {
    Unit.SIMPLE: 0.7,
    Unit.BOUND: 1.1,
    Unit.EXTREME: 1.1,
    Unit.CHOOSE: 0.7,
    Unit.ROUND: 2.0,
    Unit.DIVIDE: 5.5,
    Unit.SQRT: 9.0,
    Unit.CONVERT: 2.5,
    Unit.EXP: 20.0,
    Unit.EXPM1: 16.0,
    Unit.LOG: 22.0,
    Unit.LOG1P: 25.0,
    Unit.TANH: 18.0,
    Unit.ERF: 25.0,
    Unit.SIGMOID: 25.0,
    Unit.SOFTPLUS: 50.0,
    Unit.SINE: 25.0,  # as a sigmoid, which it is with AVX2; not measured
    Unit.LOAD: 0.7,
    Unit.STORE: 1.5,
    Unit.CHAIN_ADD: 1.9,
    Unit.CHAIN_MAX: 4.5,
}
"""Cycles of one operation on a vector of float32 or float64, as written in `runtime/vmath.h`."""
_CYCLES_AN_ELEMENT = {
    Unit.POW: 26.0,
    Unit.REMAINDER: 6.0,
    Unit.LIBRARY: 35.0,
    Unit.STRIDED: 0.12,
    Unit.GATHER: 0.3,
    Unit.SCATTER: 0.8,
    Unit.FAR_GATHER: 2.2,
    Unit.FAR_SCATTER: 2.8,
    Unit.CLAMPED: 1.6,
}
"""The same of what is no operation on vectors, and of reads and writes that are apart."""
_DOUBLE_FUNCTION = 20.0  # cycles of a function of the C library in double precision
_WITHOUT_FUSED = 1.4  # how much longer polynomials take where multiply and add are two instructions

_ELEMENT_NS = {
    "": 0.5,
    "Abs": 0.075,
    "Add": 0.12,
    "ArgMax": 0.73,
    "AveragePool": 0.46,
    "BatchNormalization": 0.11,
    "Cast": 0.075,
    "Clip": 0.1,
    "Concat": 0.09,
    "Cos": 1.9,
    "Div": 0.17,
    "Equal": 0.15,
    "Erf": 0.5,
    "Exp": 0.17,
    "Expand": 0.2,
    "Floor": 0.27,
    "Gather": 0.11,
    "Gelu": 0.62,
    "GlobalAveragePool": 0.19,
    "GlobalMaxPool": 0.18,
    "Greater": 0.15,
    "HardSigmoid": 0.09,
    "IsNaN": 0.11,
    "LRN": 24.0,
    "LayerNormalization": 0.48,
    "LeakyRelu": 0.15,
    "Log": 1.7,
    "Max": 0.16,
    "MaxPool": 0.45,
    "Min": 0.16,
    "Mul": 0.12,
    "Neg": 0.075,
    "PRelu": 4.0,
    "Pad": 0.14,
    "Pow": 0.42,
    "Reciprocal": 0.2,
    "ReduceMax": 0.075,
    "ReduceMean": 0.08,
    "ReduceSum": 0.075,
    "ReduceSumSquare": 0.67,
    "Relu": 0.075,
    "Sigmoid": 0.28,
    "Sign": 1.0,
    "Sin": 1.9,
    "Slice": 0.11,
    "Softmax": 0.33,
    "Softplus": 11.0,
    "Sqrt": 0.33,
    "Sub": 0.09,
    "Tanh": 0.26,
    "Transpose": 0.5,
    "Where": 1.3,
}
"""onnxruntime's operators: nanoseconds of an element of float32, on one thread, from the second level.

As version 1.32 took them on x86-64-v4. Its operators are made for several processors too."""


@dataclass(frozen=True, slots=True)
class _Core:
    """What differs from one level to the next."""

    vector: int
    second_level: int
    fused: bool  # multiply and add in one instruction


_CORES = {
    "x86-64": _Core(16, 256 * _KIB, False),
    "x86-64-v2": _Core(16, 256 * _KIB, False),
    "x86-64-v3": _Core(32, 512 * _KIB, True),
    "x86-64-v4": _Core(64, 1 * _MIB, True),
    "aarch64": _Core(16, 1 * _MIB, True),
}
_CORE_COUNT = 4


def generic(cpu: Cpu, cores: int = _CORE_COUNT) -> Machine:
    """A server's processor of this level: 3 GHz, a memory channel's worth of bandwidth for each few cores.

    The cycles were measured on one processor with AVX-512 (AMD's Zen 4) and hold for others of the same
    width about; narrower vectors take as many cycles each, and so longer in all. Sizes and rates are those
    of common servers, rounded. A processor that is not known is taken for one of 16-byte vectors.
    """
    core = _CORES.get(str(cpu), _CORES["x86-64"])
    cycle = 1 / (3.0 * _GIGA)
    seconds: dict[tuple[Unit, int], float] = {}
    for unit, cycles in _CYCLES.items():
        slower = _WITHOUT_FUSED if unit in FUNCTIONS and not core.fused else 1.0
        # units for 64 bytes take two steps for what those for 16 and 32 do in one, and have half as many
        vector = min(core.vector, 32) * (1.0 if core.vector < 64 else 2.0)
        for size in (1, 2, 4, 8):
            seconds[unit, size] = slower * cycles * cycle * size / vector
    for unit, cycles in _CYCLES_AN_ELEMENT.items():
        seconds |= {(unit, size): cycles * cycle for size in (4, 8)}
    line = 64
    for within, across in ACROSS.items():  # moves twice what lies in two lines
        crossing = min(1.0, core.vector / line)
        seconds |= {(across, size): (1 + crossing) * seconds[within, size] for size in (1, 2, 4, 8)}
    seconds[Unit.CONVERT, 2] = 0.5 * cycle  # between float16 and float32, which takes many steps
    seconds |= {(unit, 8): _DOUBLE_FUNCTION * cycle for unit in FUNCTIONS}
    levels = (
        Level("L1", 32 * _KIB, False, 150 * _GIGA, 90 * _GIGA),
        Level("L2", core.second_level, False, 90 * _GIGA, 75 * _GIGA),
        Level("L3", 16 * _MIB, True, 50 * _GIGA, 50 * _GIGA, 25 * _GIGA * cores),
        Level("memory", None, True, 20 * _GIGA, 15 * _GIGA, max(20 * _GIGA, 8 * _GIGA * cores)),
    )
    elements = {name: nanoseconds * 1e-9 for name, nanoseconds in _ELEMENT_NS.items()}
    return Machine(
        name=str(cpu),
        source=f"a general description of {cpu}",
        cores=cores,
        vector=core.vector,
        line=line,
        ways=8,
        levels=levels,
        seconds=seconds,
        hidden=0.7,
        loop=2e-9,
        drain=20e-9,
        item=1.5e-9,
        node=0.25e-6,
        argument=0.08e-6,
        launch=3e-6,
        wake=10e-6,
        runtime=Runtime(node=0.25e-6, elements=elements, span=9e-9, parallel=20e-6),
    )


def _gpu(
    name: str,
    source: str,
    gpu: Gpu,
    clock: float,
    near: Level,
    levels: tuple[Level, ...],
) -> Machine:
    """Operations by their rates on all multiprocessors together; a division is several steps."""
    simple, special = 2 / gpu.flops, 1 / gpu.special
    costs = {Unit.DIVIDE: 8 * simple, Unit.REMAINDER: 16 * simple, Unit.SQRT: special, Unit.POW: 3 * special}
    costs |= dict.fromkeys((Unit.EXP, Unit.LOG, Unit.SINE), special + 2 * simple)
    costs |= dict.fromkeys(
        (Unit.EXPM1, Unit.LOG1P, Unit.TANH, Unit.ERF, Unit.SIGMOID, Unit.SOFTPLUS), special + 8 * simple
    )
    costs |= {Unit.LIBRARY: 30 * simple}
    total = near.most or near.read * gpu.multiprocessors
    seconds = {(unit, size): costs.get(unit, simple) * size / 4 for unit in Unit for size in (4, 8)}
    seconds |= {(unit, size): size / total for unit in MOVES for size in (4, 8)}
    seconds |= {(unit, 8): 16 * costs.get(unit, simple) for unit in FUNCTIONS}
    return Machine(
        name=name,
        source=source,
        cores=gpu.multiprocessors,
        vector=gpu.warp * 4,
        line=128,
        ways=1 << 20,
        levels=(near, *levels),
        seconds=seconds,
        hidden=0.0,
        loop=40 / clock / gpu.multiprocessors,
        drain=200 / clock / gpu.multiprocessors,
        item=0.0,
        node=gpu.launch,
        argument=0.0,
        launch=0.0,
        wake=0.0,
        gpu=gpu,
    )


def _shared(name: str, size: int | None, total: float, multiprocessors: int) -> Level:
    return Level(name, size, True, total / multiprocessors, total / multiprocessors, total)


def a100() -> Machine:
    """NVIDIA A100 80 GB SXM.

    Multiprocessors, clock, registers, shared memory, caches and the second level's 5,120 bytes a clock:
    NVIDIA A100 Tensor Core GPU Architecture (white paper, 2020). Bandwidth 2,039 GB/s: A100 80 GB data
    sheet. 16 special functions a clock: CUDA C++ Programming Guide, arithmetic throughput, capability 8.0.
    The time of a launch, 2 to 3 us on a stream, is a usual figure and no promise of the maker.
    """
    clock = 1.41e9
    gpu = Gpu(
        multiprocessors=108,
        warp=32,
        most_threads=2048,
        most_blocks=32,
        most_threads_a_block=1024,
        registers=65536,
        shared_bytes=164 * _KIB,
        flops=19.5e12,
        special=108 * 16 * clock,
        launch=2.5e-6,
    )
    near = Level("L1", 192 * _KIB, False, 128 * clock, 128 * clock, 108 * 128 * clock)
    levels = (_shared("L2", 40 * _MIB, 5120 * clock, 108), _shared("memory", None, 2.039e12, 108))
    return _gpu("a100", "NVIDIA's white paper and data sheet of the A100", gpu, clock, near, levels)


def h100() -> Machine:
    """NVIDIA H100 SXM5.

    Multiprocessors, registers, shared memory, caches: NVIDIA H100 Tensor Core GPU Architecture (white paper,
    2022). 3.35 TB/s and 67 TFLOPS of float32: H100 data sheet, from which the clock of 1.98 GHz follows. 16
    special functions a clock: CUDA C++ Programming Guide, capability 9.0. The second level's 5.6 TB/s was
    measured by Chips and Cheese ("Nvidia's H100: Microbenchmarks and SXM").
    """
    clock = 1.98e9
    gpu = Gpu(
        multiprocessors=132,
        warp=32,
        most_threads=2048,
        most_blocks=32,
        most_threads_a_block=1024,
        registers=65536,
        shared_bytes=228 * _KIB,
        flops=67e12,
        special=132 * 16 * clock,
        launch=2.5e-6,
    )
    near = Level("L1", 256 * _KIB, False, 128 * clock, 128 * clock, 132 * 128 * clock)
    levels = (_shared("L2", 50 * _MIB, 5.6e12, 132), _shared("memory", None, 3.35e12, 132))
    return _gpu("h100", "NVIDIA's white paper and data sheet of the H100", gpu, clock, near, levels)


def mi300x() -> Machine:
    """AMD Instinct MI300X.

    Compute units, clock, 163.4 TFLOPS of float32, 5.3 TB/s and the 256 MB of Infinity Cache at 17.2 TB/s:
    AMD Instinct MI300X data sheet and AMD CDNA 3 Architecture (white paper, 2023), which also have the
    second level's 4 MiB for each of 8 dies with 16 channels of 128 bytes a clock, the 64 KiB of local data
    share and the 512 KiB of vector registers of a unit. Transcendental functions at a quarter of the rate of
    64 lanes: CDNA3 instruction set guide. The time of a launch is a usual figure and no promise of the maker.
    """
    clock = 2.1e9
    gpu = Gpu(
        multiprocessors=304,
        warp=64,
        most_threads=2048,
        most_blocks=32,
        most_threads_a_block=1024,
        registers=131072,
        shared_bytes=64 * _KIB,
        flops=163.4e12,
        special=304 * 16 * clock,
        launch=5e-6,
    )
    near = Level("L1", 32 * _KIB, False, 64 * clock, 64 * clock, 304 * 64 * clock)
    levels = (
        _shared("L2", 32 * _MIB, 8 * 16 * 128 * clock, 304),
        _shared("Infinity Cache", 256 * _MIB, 17.2e12, 304),
        _shared("memory", None, 5.3e12, 304),
    )
    return _gpu("mi300x", "AMD's data sheet and white paper of the MI300X", gpu, clock, near, levels)
