"""Runs emitted Triton programs in Triton's interpreter, which needs no GPU.

Triton asks once, as it is imported, whether to interpret: so programs run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from apollo_fuse.codegen.triton.emit import Program
from apollo_fuse.cost import bound
from apollo_fuse.dtypes import DType
from apollo_fuse.extents import evaluate
from apollo_fuse.index import Index, Symbol
from apollo_fuse.kernel import KernelGroup
from tests.worker import Worker

Array = np.ndarray
_MARGIN = 64  # bytes around each tensor that nothing may write
_FILL = 0xA5


@dataclass(frozen=True, slots=True)
class _Start:
    """A launch with the numbers of one run."""

    kernel: str
    tensors: tuple[str, ...]
    scratch: tuple[tuple[DType, int], ...]
    extents: tuple[int, ...]
    block: int | None
    programs: int


class Interpreter:
    """A process that runs one program after the other."""

    def __init__(self) -> None:
        self._worker = Worker(_begin)

    def close(self) -> None:
        self._worker.close()

    def run(
        self, program: Program, group: KernelGroup, inputs: Sequence[Array], block: int | None = None
    ) -> list[Array]:
        """What the program makes of the inputs; `block` is another length of BLOCK."""
        elements = {place: array.reshape(-1).tolist() for place, array in enumerate(inputs) if array.ndim < 2}
        sizes = bound(group, [array.shape for array in inputs], elements)

        def number(index: Index) -> int:
            found = evaluate(index, sizes)
            assert found is not None, index
            return found

        form = next(
            (n for n, c in enumerate(group.forms) if number(c.value) <= c.limit),
            len(group.forms),
        )
        starts = [
            _Start(
                launch.kernel,
                launch.tensors,
                tuple((b.dtype.compute, number(launch.items * b.size)) for b in launch.scratch),
                tuple(sizes[Symbol(name)] for name in launch.extents),
                launch.block if launch.block is None or block is None else block,
                -(-number(launch.items) // launch.rows),
            )
            for launch in program.launches
            if launch.form == form or not group.forms
        ]
        made = {
            value.name: (value.dtype, tuple(number(extent) for extent in value.shape))
            for value in (*group.outputs, *group.temporaries)
        }
        given = {value.name: array for value, array in zip(group.inputs, inputs, strict=True)}
        found = self._worker(_run, program.text, starts, given, made)
        return [found[value.name] for value in group.outputs]


class _Tensor:
    """What Triton asks of a tensor: its memory and its type. The interpreter's copies of it are itself."""

    def __init__(self, array: Array, kind: str) -> None:
        self.array, self.dtype = array, kind

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def untyped_storage(self) -> _Tensor:
        return self

    def cpu(self) -> _Tensor:
        return self

    def new_empty(self, *_: object, **__: object) -> _Tensor:
        return _Tensor(self.array, self.dtype)

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def set_(self, storage: _Tensor, *_: object) -> None:
        self.array = storage.array

    def copy_(self, _: _Tensor) -> None:
        pass


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import ReduceOps

    from apollo_fuse.codegen.triton import device

    extremes = {device.maximum: np.max, device.minimum: np.min}  # which pass NaNs on, too
    generic = ReduceOps.generic_reduce

    def reduce(self: Any, blocks: Any) -> Any:
        """The interpreter calls a function of ours for each element, one after the other."""
        if self.combine_fn not in extremes:
            return generic(self, blocks)
        found = extremes[self.combine_fn](blocks[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(found, blocks[0].dtype)]

    ReduceOps.generic_reduce = reduce
    for name, function in {
        "acos": np.arccos, "acosh": np.arccosh, "asin": np.arcsin, "asinh": np.arcsinh, "atan": np.arctan,
        "atanh": np.arctanh, "cosh": np.cosh, "expm1": np.expm1, "fmod": np.fmod, "log1p": np.log1p,
        "pow": _power, "rint": np.rint, "sinh": np.sinh, "tan": np.tan, "tanh": np.tanh,
    }.items():  # fmt: skip
        setattr(libdevice, name, _interpreted(function))


def _power(base: Array, exponent: Array) -> Array:
    """For one exponent of 0.5, numpy takes the square root, which is another of -inf."""
    return np.asarray(np.power(*(np.array(x) for x in np.broadcast_arrays(base, exponent))))


def _interpreted(function: Any) -> Any:
    """The interpreter has no libdevice: its functions are numpy's here."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def call(*arguments: Any) -> Any:
        shaped = max(arguments, key=lambda x: x.handle.data.size)
        found = function(*(x.handle.data for x in arguments)).astype(shaped.handle.data.dtype)
        return tl.tensor(TensorHandle(found, shaped.handle.dtype), shaped.type)

    return call


def _run(
    text: str,
    starts: Sequence[_Start],
    given: Mapping[str, Array],
    made: Mapping[str, tuple[DType, tuple[int, ...]]],
) -> dict[str, Array]:
    memory = {name: _memory(array.dtype, array.size) for name, array in given.items()}
    for name, array in given.items():
        _inside(memory[name])[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    memory |= {name: _memory(dtype.numpy, int(np.prod(shape))) for name, (dtype, shape) in made.items()}
    kinds = {name: _kind(array.dtype) for name, array in given.items()}
    kinds |= {name: _kind(dtype.numpy) for name, (dtype, _) in made.items()}
    tensors = {name: _Tensor(_inside(memory[name]), kind) for name, kind in kinds.items()}
    with np.errstate(all="ignore"):
        module = _module(text)
        for start in starts:
            if start.programs:
                scratch = [
                    _Tensor(np.empty(max(1, size), dtype.numpy), _kind(dtype.numpy))
                    for dtype, size in start.scratch
                ]
                constants = {} if start.block is None else {"BLOCK": start.block}
                arguments = (*(tensors[name] for name in start.tensors), *scratch, *start.extents)
                getattr(module, start.kernel)[start.programs,](*arguments, **constants)
    for name, whole in memory.items():
        assert (whole[:_MARGIN] == _FILL).all() and (whole[-_MARGIN:] == _FILL).all(), f"outside of {name}"
    for name, array in given.items():
        unchanged = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        assert np.array_equal(_inside(memory[name]), unchanged), f"{name} was written"
    return {
        name: _inside(memory[name]).view(dtype.numpy).reshape(shape) for name, (dtype, shape) in made.items()
    }


def _memory(dtype: np.dtype[Any], size: int) -> Array:
    return np.full(2 * _MARGIN + size * dtype.itemsize, _FILL, np.uint8)


def _inside(memory: Array) -> Array:
    return memory[_MARGIN:-_MARGIN]


def _kind(dtype: np.dtype[Any]) -> str:
    return "uint8" if dtype == np.bool_ else dtype.name


def _module(text: str) -> ModuleType:
    """Triton reads the source of a kernel from its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("program", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
