"""Measures the processor at hand.

The kernels of `kernels` are timed by themselves, for operations and memory; `runtime` times calls, threads
and onnxruntime's own operators.  Each figure is the least of several readings, which others on the machine
can only lengthen; one that is beyond belief is left at what the description says.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import math
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from apollo_fuse.calibration import kernels, runtime
from apollo_fuse.calibration.kernels import LANES, MANY, SHORT, STREAMS, Timeable
from apollo_fuse.codegen import c, link
from apollo_fuse.codegen.table import alone, tables
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.cpu import cpu_name
from apollo_fuse.descriptions import generic
from apollo_fuse.machine import ACROSS, Level, Machine, Unit

_READINGS = 7
_ROUNDS = 2
_READING = 15e-6  # seconds that one takes, about
_FACTOR = 20.0  # how far a figure may lie from the description
_TOGETHER = 2e-3  # seconds that threads read at once, about
_TRIES = 10  # in which all of them may find a processor free
_BUSY = 6.0  # the same of threads, which on a machine that is busy with others seem to take any time
_LARGE = 48 << 20  # bytes of the tensors that are to come from memory
_SMALL = 64 << 10
_ITEM = 4 * LANES  # bytes of an item of float32
_NEAREST = 4  # items that with their results stay in the nearest cache
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def measure(toolchain: Toolchain, cache: Path, threads: int) -> Machine:
    """Measures the machine; under a second, once the kernels are compiled. Raises CompilerError."""
    base = generic(toolchain.cpu, threads)
    with tempfile.TemporaryDirectory(prefix="apollo-fuse-") as folder:
        library = Path(folder, "calibration.so")
        _build(toolchain, cache, threads, library)
        partings = [runtime.parting(library, threads)] if threads > 1 else []
        calls = runtime.measure(library, base)
        loops = _Loops.of(library)
        seconds = _operations(loops, base)
        levels = _levels(loops, base, threads)
        hidden = _hidden(loops, seconds)
        loop, drain = _starts(loops, seconds, base)
        if threads > 1:  # others that take a processor meanwhile seldom do so twice
            partings.append(runtime.parting(library, threads))
    return replace(
        base,
        name=cpu_name(),
        source=f"measured, as code for {toolchain.cpu} with {threads} threads",
        levels=levels,
        seconds=seconds,
        hidden=hidden,
        loop=loop,
        drain=drain,
        node=believed(calls.node, base.node),
        argument=believed(calls.argument, base.argument),
        launch=bounded((launch for launch, _ in partings), base.launch),
        wake=bounded((wake for _, wake in partings), base.wake),
        runtime=calls.runtime,
    )


def believed(found: float, described: float) -> float:
    """What was found, unless it is further from what is described than machines differ."""
    return found if described / _FACTOR <= found <= described * _FACTOR else described


def bounded(found: Iterable[float], described: float) -> float:
    """The least that was found of what threads take, within what they take on one machine or another."""
    return max(described / _BUSY, min(min(found, default=described), described * _BUSY))


def _build(toolchain: Toolchain, cache: Path, threads: int, library: Path) -> None:
    """The kernels, what times them, and the probes that onnxruntime calls, as one library of ops."""
    reader = Path(str(importlib.resources.files("apollo_fuse.runtime")), "calibrate.c").read_text()
    probes = kernels.probes()
    sources = [c.emit(group, name, "what calibration calls") for name, group in probes.items()]
    objects = link.compile_objects([kernels.source(), reader, *sources], toolchain, cache, threads)
    nodes = [alone(name, len(group.inputs)) for name, group in probes.items()]
    link.link_library(objects, tables(nodes, [toolchain.cpu.level]), library, toolchain, cache)


@dataclass(frozen=True, slots=True)
class _Loops:
    """The kernels over tensors of their own, which stay in memory as long as this does."""

    call: Callable[..., float]
    timed: Timeable
    tensors: tuple[np.ndarray, ...]
    buffers: ctypes.Array[ctypes.c_void_p]
    extents: ctypes.Array[ctypes.c_int64]

    @classmethod
    def of(cls, library: Path) -> _Loops:
        run = ctypes.CDLL(str(library)).af_calibrate
        run.restype = ctypes.c_double
        integer, number, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
        run.argtypes = [number, pointer, pointer, integer, integer, number, number]
        timed = kernels.timeable()
        values = (*timed.group.inputs, *timed.group.outputs)
        tensors = tuple(
            _filled(value.dtype.numpy, _LARGE if value.name in ("in0", "out0") else _SMALL, place)
            for place, value in enumerate(values)
        )
        buffers = (pointer * len(tensors))(*(tensor.ctypes.data for tensor in tensors))
        return cls(run, timed, tensors, buffers, (integer * 1)(_LARGE // _ITEM))

    def seconds(self, name: str, items: int, first: int = 0, readings: int = _READINGS) -> float:
        """The least seconds of a run of so many items."""
        place = self.timed.place(name)
        once = self.call(place, self.buffers, self.extents, first, first + items, 1, 2)
        runs = max(1, round(_READING / max(once, 1e-9)))
        return self.call(place, self.buffers, self.extents, first, first + items, runs, readings)


def _filled(dtype: np.dtype[np.generic], size: int, place: int) -> np.ndarray:
    """A tensor of so many bytes, whose start lies apart from that of the others within a page."""
    apart = 64 * (2 * place + 1)
    whole = np.empty(size + 4096 + apart, np.uint8)
    start = -whole.ctypes.data % 4096 + apart
    tensor = whole[start : start + size].view(dtype)
    tensor[...] = 1 if dtype.kind in "iu" and dtype != np.uint16 else 0.9
    return tensor


def _operations(loops: _Loops, base: Machine) -> dict[tuple[Unit, int], float]:
    """Seconds of each unit on an element, from the nearest cache."""
    found = dict(base.seconds)

    def note(unit: Unit, size: int, seconds: float) -> None:
        found[unit, size] = believed(seconds, base.of(unit, size))

    items = {timed.kernel.name: _NEAREST for timed in loops.timed.units}
    items |= {"fill": _NEAREST, "fill_across": _NEAREST, "loads": 1, "loads_across": 1}
    least = dict.fromkeys(items, math.inf)
    for _ in range(_ROUNDS):  # what others do for a while meets one round, not the other
        for name, before in least.items():
            least[name] = min(before, loops.seconds(name, items[name]))
    for timed in loops.timed.units:
        each = least[timed.kernel.name] / (_NEAREST * LANES)
        simple = timed.simple * found[Unit.SIMPLE, timed.size] if timed.simple else 0.0
        note(timed.unit, timed.size, (each - simple) / timed.operations)
    stored = least["fill"] / (_NEAREST * LANES)
    note(Unit.STORE, 4, stored)
    note(Unit.STORE_ACROSS, 4, least["fill_across"] / (_NEAREST * LANES))
    for unit, name in ((Unit.LOAD, "loads"), (Unit.LOAD_ACROSS, "loads_across")):
        note(unit, 4, (least[name] / (LANES // 2) - stored) / STREAMS)
    parts = {
        Unit.STRIDED: "strided",
        Unit.GATHER: "gathered",
        Unit.SCATTER: "scattered",
        Unit.CLAMPED: "clamped",
    }
    for unit, name in parts.items():
        note(unit, 4, loops.seconds(name, _NEAREST) / (_NEAREST * LANES // 2))
    for unit, name in ((Unit.FAR_GATHER, "far_gathered"), (Unit.FAR_SCATTER, "far_scattered")):
        note(unit, 4, loops.seconds(name, 2 * _NEAREST) / (2 * _NEAREST * kernels.TILE))
    for unit in (*ACROSS, *ACROSS.values()):
        found |= {(unit, size): found[unit, 4] * size / 4 for size in (1, 2, 8)}
    for unit in (*parts, Unit.FAR_GATHER, Unit.FAR_SCATTER):
        found[unit, 8] = found[unit, 4]
    return found


def _hidden(loops: _Loops, seconds: Mapping[tuple[Unit, int], float]) -> float:
    """The share of the shorter one that does not show where arithmetic stands beside a division."""
    arithmetic, divider = MANY * seconds[Unit.SIMPLE, 4], seconds[Unit.DIVIDE, 4]
    both = loops.seconds("divided", _NEAREST) / (_NEAREST * LANES)
    shown = (both - max(arithmetic, divider)) / min(arithmetic, divider)
    return min(1.0, max(0.0, 1 - shown))


def _starts(loops: _Loops, seconds: Mapping[tuple[Unit, int], float], base: Machine) -> tuple[float, float]:
    """Seconds of starting a loop, and of one whose result is waited for."""
    copied = loops.seconds("copy", _NEAREST) / (_NEAREST * LANES)
    strip = loops.seconds("strips", _NEAREST) / _NEAREST - SHORT * copied
    loop = believed(max(strip - base.item, base.loop / 2), base.loop)
    short, long = (loops.seconds(f"rows_{turns}", _NEAREST) / _NEAREST for turns in (SHORT, 2 * SHORT))
    drain = believed((2 * short - long - loop - base.item) / 2, base.drain)
    return loop, drain


def _levels(loops: _Loops, base: Machine, threads: int) -> tuple[Level, ...]:
    """The levels of memory: their sizes as the system gives them, their bandwidth as loops find it."""
    sizes = cache_sizes()
    found: list[Level] = []
    for level in base.levels:
        size = None if level.size is None else sizes.get(level.name, level.size)
        nearer = found[-1] if found else None
        items = max(2, _within(size, None if nearer is None else nearer.size) // _ITEM)
        read = _ITEM * items / loops.seconds("chain_add_float", items, readings=3)
        half = items // 2  # of a copy, as much again is written
        writing = loops.seconds("copy", half, readings=3) - _ITEM * half / read
        write = _ITEM * half / max(writing, 1e-12)
        read, write = believed(read, level.read), believed(write, level.write)
        if nearer is not None:
            read, write = min(read, nearer.read), min(write, nearer.write)
        together = None
        if level.most is not None:
            rate = _together(loops, items, threads) if threads > 1 else read
            together = max(read, min(believed(rate, level.most), threads * read))
        found.append(Level(level.name, size, level.shared, read, write, together))
    return tuple(found)


def _within(size: int | None, nearer: int | None) -> int:
    """Bytes that lie well within a level, and well beyond the nearer one."""
    if size is None:
        return _LARGE
    return size // 4 if nearer is None else min(_LARGE, math.isqrt(size * nearer) // 2, size // 3)


def _together(loops: _Loops, items: int, threads: int) -> float:
    """Bytes a second that threads read at once, each a part of so many items."""
    each = max(1, items // threads)
    place = loops.timed.place("chain_add_float")
    runs = max(1, round(_TOGETHER / loops.seconds("chain_add_float", each, readings=1)))
    least = float("inf")
    for _ in range(_TRIES):
        readers = [
            threading.Thread(
                target=loops.call,
                args=(place, loops.buffers, loops.extents, n * each, (n + 1) * each, runs, 1),
            )
            for n in range(threads)
        ]
        start = perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        least = min(least, perf_counter() - start)
    return threads * each * runs * _ITEM / least


def cache_sizes() -> dict[str, int]:
    """Bytes of the caches of data by level, as Linux gives them; empty where it does not."""
    found: dict[str, int] = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        parsed = re.fullmatch(r"(\d+)([KM]?)", size)
        if kind != "Instruction" and parsed is not None:
            found[f"L{level}"] = int(parsed[1]) << {"": 0, "K": 10, "M": 20}[parsed[2]]
    return found
