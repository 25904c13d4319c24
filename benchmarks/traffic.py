"""Bytes that kernels move between memory and the caches, counted from the Kernel IR."""

from __future__ import annotations

from apollo_fuse.index import Index, Iterator, product
from apollo_fuse.kernel import Compute, Copy, Kernel, KernelGroup, Loop, Scope, Step, walk

CACHE_BYTES = 512 * 1024
"""What the work item's thread keeps near: a second level cache, as `MemoryStitching` assumes it."""

_Access = tuple[str, Index]


def compulsory_bytes(group: KernelGroup) -> int:
    """Each input read once and each output written once. The extents must be known."""
    return sum(_number(product(value.shape)) * value.dtype.size for value in (*group.inputs, *group.outputs))


def moved_bytes(group: KernelGroup) -> int:
    """What all kernels read and write, whatever the cache of a work item does not keep counted again.

    Where a work item's memory fits `CACHE_BYTES`, each of its elements counts once; else once for each of the
    outer loops that visit it. What a tensor smaller than the cache holds is fetched once a kernel.
    The extents must be known.
    """
    return sum(_moved(kernel) for kernel in group.kernels)


def _moved(kernel: Kernel) -> int:
    steps = [_accesses((step,)) for step in kernel.body]
    together = set().union(*steps)
    grid = frozenset(kernel.grid)
    near = _bytes(kernel, together, grid) + _number(kernel.shared_bytes) <= CACHE_BYTES
    groups = [together] if near else steps
    return sum(_bytes(kernel, accesses, frozenset()) for accesses in groups)


def _bytes(kernel: Kernel, accesses: set[_Access], fixed: frozenset[Iterator]) -> int:
    """Of the elements that the accesses reach while the iterators in `fixed` stand still."""
    reached: dict[str, int] = {}
    for name, offset in accesses:
        walked = offset.iterators() - fixed
        points = _number(product(i.extent for i in walked))
        reached[name] = max(reached.get(name, 0), points)
    sizes = {b.name: (_number(b.size), b.dtype.size) for b in kernel.buffers if b.scope is Scope.GLOBAL}
    return sum(min(points, sizes[n][0]) * sizes[n][1] for n, points in reached.items() if n in sizes)


def _accesses(steps: tuple[Step, ...]) -> set[_Access]:
    found: set[_Access] = set()
    for step in walk(steps):
        match step:
            case Compute(_, block, targets, _):
                found |= {(load.tensor, load.indices[0]) for load in block.loads}
                found |= {(target.buffer, target.offset) for target in targets}
            case Copy(source, target):
                found |= {(source.buffer, source.offset), (target.buffer, target.offset)}
            case _:
                assert isinstance(step, Loop) or step.target
    return found


def _number(index: Index) -> int:
    number = index.constant
    if number is None:
        raise ValueError(f"the extent {index} is not known; expected a model without open extents")
    return number
