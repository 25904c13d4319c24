"""Kernels as Triton: one module for each kernel group, written to be read.

A work item becomes a program, and its lane loops blocks (see `blocks`).  A reduction over an axis that takes
several blocks keeps an accumulator for each lane, and combines them behind the loop.  Where a program reads
what its threads have left in memory, they wait for each other first.

Kernels of a stitch that share a launch are functions of one module.  Each member has a range of programs; a
program looks up which member it is of and calls that one's kernel, which finds its arguments in a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from apollo_fuse.codegen.triton import expressions as t
from apollo_fuse.codegen.triton.blocks import BLOCK, local_values, rows_for, warps_for, with_folds_in_lanes
from apollo_fuse.codegen.triton.stages import stages
from apollo_fuse.codegen.triton.writer import NotEmitted, Writer
from apollo_fuse.graph import Refused
from apollo_fuse.index import ONE, Index
from apollo_fuse.kernel import Buffer, Kernel, KernelGroup, Scope, buffers_of

RULE = "codegen.triton"
_ARGUMENTS = 512  # that fill the 4 KiB of a launch on any GPU
_LARGE = 1 << 31  # elements from which on 32 bits hold no offset
_HEAD = '''"""{comment}"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from apollo_fuse.codegen.triton import device as af
'''


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is started, for all its `items`, in the runs that take `form` of the group.

    A program computes `rows` items, the last one maybe fewer.
    Its arguments are the addresses of `tensors` and of `scratch`, which has room for each program, then the
    `extents` as 64-bit integers. `block` is the length of BLOCK, None where the kernel has none.
    Kernels of a group that have one `stage` can run side by side, behind those of the stages before.
    Where `stitched`, they lie in a table, and the arguments are its address and the number of members; the
    launches of those alone tell the rest.
    """

    kernel: str
    tensors: tuple[str, ...]
    scratch: tuple[Buffer, ...]
    extents: tuple[str, ...]
    block: int | None
    warps: int
    rows: int
    items: Index
    form: int
    stage: int = 0
    stitched: bool = False

    @property
    def width(self) -> int:
        """Arguments of a member, 64 bits each."""
        return len(self.tensors) + len(self.scratch) + len(self.extents)


@dataclass(frozen=True, slots=True)
class Program:
    """A module's text, and the kernels in order."""

    text: str
    launches: tuple[Launch, ...]


def emit(group: KernelGroup, name: str, comment: str) -> Program | Refused:
    """The module for a group; `comment` says what it computes."""
    parts = [_HEAD.format(comment=comment)]
    launches: list[Launch] = []
    for kernel, stage in zip(group.kernels, stages(group), strict=True):
        try:
            text, launch = _kernel(group, kernel)
        except NotEmitted as problem:
            return Refused((name,), RULE, problem.args[0], problem.args[1])
        parts.append(text)
        launches.append(replace(launch, stage=stage))
    return Program("\n\n".join(parts), tuple(launches))


def emit_stitched(kernels: Sequence[tuple[str, KernelGroup, int]], warps: int) -> Program:
    """The module for members of a stitch: of each kind its group by name, and which kernel of that."""
    parts = [_HEAD.format(comment=f"Of a stitch: {', '.join(name for name, _, _ in kernels)}")]
    lines = [
        "@triton.jit",
        "def stitch(members, count):",
        "    number, own, kind = af.member(members, count)",
    ]
    for kind, (name, group, place) in enumerate(kernels):
        function = f"{name}_{group.kernels[place].name}".lower()
        text, launch = _kernel(group, group.kernels[place], function, warps)
        parts.append(text)
        block = "" if launch.block is None else f", {launch.block}"
        lines += [f"    if kind == {kind}:", f"        {function}(number, own{block})"]
    parts.append("\n".join(lines) + "\n")
    shared = Launch("stitch", (), (), (), None, warps, 1, ONE, 0, stitched=True)
    return Program("\n\n".join(parts), (shared,))


def _kernel(
    group: KernelGroup, kernel: Kernel, function: str = "", warps: int | None = None
) -> tuple[str, Launch]:
    """The text of a kernel, or of a `function` for members of a stitch, and how a kernel is launched.

    warps: those that its longest block suggests, unless given.
    """
    kernel = with_folds_in_lanes(kernel)
    known = kernel.items.constant
    if known is not None and known >= _LARGE:
        raise NotEmitted("more programs than a grid has", f"{known} work items in {kernel.name}")
    values = local_values(kernel)
    owners = {b.name: _owner(kernel, b, values) for b in kernel.buffers if b.name not in values}
    scratch = tuple(b for b in kernel.buffers if b.scope is not Scope.GLOBAL and owners.get(b.name) == b.name)
    writer = Writer(kernel, values, owners, _is_wide(kernel, scratch))
    rows = rows_for(kernel) if not scratch else 1
    program = writer.program(rows, "number" if function else "tl.program_id(0)")
    for buffer in scratch:
        writer.place(buffer, f"{buffer.name} + {program} * {writer.factor(buffer.size)}")
    for buffer in kernel.buffers:
        if buffer.name in owners and buffer.host is not None and buffer not in scratch:
            _place_in_host(writer, kernel, buffer)
    writer.steps(kernel.body)
    used = {owners[name] for name in buffers_of(kernel.body) if name in owners}
    every = (*group.inputs, *group.outputs, *group.temporaries)
    tensors = tuple(v.name for v in every if v.name in used)
    extents = tuple(e.symbol.name for e in group.extents if e.symbol.name in writer.extents)
    block = BLOCK if writer.has_block else None
    warps = warps or warps_for(kernel, rows)
    launch = Launch(kernel.name, tensors, scratch, extents, block, warps, rows, kernel.items, kernel.form)
    if not function and launch.width > _ARGUMENTS:
        raise NotEmitted(
            "more arguments than a launch has room for",
            f"{launch.width} in {kernel.name}, at most {_ARGUMENTS}",
        )
    own = ("number", "own") if function else (*tensors, *(b.name for b in scratch), *extents)
    parameters = ", ".join((*own, *(() if block is None else ("BLOCK: tl.constexpr",))))
    head = f"@triton.jit\ndef {function or kernel.name}({parameters}):\n"
    lines = [f'    """{_taken(group, kernel, launch)}"""']
    lines += [f"    {line}" for line in _arguments(group, launch)] if function else []
    return head + "\n".join([*lines, *writer.lines]) + "\n", launch


def _arguments(group: KernelGroup, launch: Launch) -> list[str]:
    """Reads the arguments of a member."""
    types = {v.name: v.dtype for v in (*group.inputs, *group.outputs, *group.temporaries)}
    pointers = {name: t.STORAGE[types[name]] for name in launch.tensors}
    pointers |= {buffer.name: t.STORAGE[buffer.dtype.compute] for buffer in launch.scratch}
    lines = [
        f"{name} = af.tensor(own + {place}, {dtype})" for place, (name, dtype) in enumerate(pointers.items())
    ]
    lines += [f"{name} = tl.load(own + {len(pointers) + k})" for k, name in enumerate(launch.extents)]
    return lines


def _place_in_host(writer: Writer, kernel: Kernel, buffer: Buffer) -> None:
    if buffer.name in writer.places or buffer.host is None:
        return
    host = kernel.buffer(buffer.host)
    if host.host is not None:
        _place_in_host(writer, kernel, host)
    base = "" if buffer.base.is_zero else f" + {writer.index(buffer.base)}"
    writer.place(buffer, writer.places.get(host.name, host.name) + base)


def _taken(group: KernelGroup, kernel: Kernel, launch: Launch) -> str:
    """How many items there are, in which runs, and how they are launched."""
    conditions = [f"not {condition}" for condition in group.forms[: kernel.form]]
    conditions += [str(condition) for condition in group.forms[kernel.form : kernel.form + 1]]
    where = f", where {' and '.join(conditions)}" if conditions else ""
    warps = f"{launch.warps} warp{'' if launch.warps == 1 else 's'}"
    block = "" if launch.block is None else f" and a BLOCK of {launch.block}"
    return f"Items: {kernel.items}{where}; {launch.rows} in each program of {warps}{block}."


def _owner(kernel: Kernel, buffer: Buffer, values: frozenset[str]) -> str:
    """The tensor or scratch that the buffer lies in."""
    if buffer.host is None or buffer.host in values:
        return buffer.name
    host = kernel.buffer(buffer.host)
    return host.name if host.scope is Scope.GLOBAL else _owner(kernel, host, values)


def _is_wide(kernel: Kernel, scratch: Sequence[Buffer]) -> bool:
    """Whether some offset may not fit into 32 bits."""
    sizes = [b.size for b in kernel.buffers if b.scope is Scope.GLOBAL]
    sizes += [kernel.items, *(kernel.items * b.size for b in scratch)]
    return any(size.constant is None or size.constant >= _LARGE for size in sizes)
