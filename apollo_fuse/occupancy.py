"""How many threads of a GPU's multiprocessor a kernel keeps busy, from its compiled metadata.

The arithmetic is that of NVIDIA's occupancy calculator without its rounding of registers: whichever of
threads, blocks, registers and shared memory runs out first decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from apollo_fuse.machine import Gpu

HIDING = 0.5
"""The occupancy that hides the latency of memory: below it, bandwidth falls with the threads in flight.

As Volkov found for streams with some independent loads a thread ("Understanding Latency Hiding on GPUs",
2016).
"""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of threads as compiled: registers are those of one thread, shared those of the block.

    It computes `items` work items.
    """

    threads: int = 128
    registers: int = 32
    shared_bytes: int = 0
    items: int = 1


def blocks_at_once(gpu: Gpu, block: Block) -> int:
    """Blocks that one multiprocessor holds; 0 where not even one fits."""
    if block.threads > gpu.most_threads_a_block:
        return 0
    warps = -(-block.threads // gpu.warp) * gpu.warp
    limits = [gpu.most_blocks, gpu.most_threads // warps, gpu.registers // max(1, block.registers * warps)]
    if block.shared_bytes:
        limits.append(gpu.shared_bytes // block.shared_bytes)
    return min(limits)


def occupancy(gpu: Gpu, block: Block) -> float:
    """The share of a multiprocessor's threads that are in flight, 0 to 1."""
    return blocks_at_once(gpu, block) * block.threads / gpu.most_threads


def reached(gpu: Gpu, block: Block, blocks: int) -> float:
    """The share of the peak rates that so many blocks reach: by latency, and by the last wave of blocks."""
    at_once = blocks_at_once(gpu, block) * gpu.multiprocessors
    if not at_once or not blocks:
        return 0.0
    waves = -(-blocks // at_once)
    return min(1.0, blocks / (waves * at_once) * occupancy(gpu, block) / HIDING)
