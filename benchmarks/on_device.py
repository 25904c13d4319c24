"""Runs every kernel of the model set on the GPU at hand: ``python -m benchmarks.on_device``.

Each distinct kernel is compiled, launched through the driver on what the model gives it, held against what
onnxruntime computes, and timed by the device; then the chain of all kernels of the model.  Where torch is
installed it runs the same operators beside them, and where onnxruntime has a provider for the device, that
runs the whole model, as it is and fused.  Where there is no GPU, it says so and ends with status 77.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import models
from apollo_fuse import onnx_io
from apollo_fuse.capture import capture
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.symbolic import infer_shapes
from benchmarks.bench import keep
from benchmarks.device import Device, DeviceError, first_device
from benchmarks.device_rows import Row, rows_for, wanted
from benchmarks.device_table import Ran, to_json, to_markdown
from benchmarks.on_provider import Whole, provider_for, whole

NO_DEVICE = 77
"""The status that build systems take for a test that was skipped."""
_SECONDS = 400.0  # after which no further model is begun
_PROVIDER_SECONDS = 1.0  # of measuring a whole model both ways


def rows_of(name: str, device: Device, options: Options) -> list[Row]:
    """The kernels of a model of the set, worth it or not."""
    with tempfile.TemporaryDirectory() as folder:
        clean = onnx_io.load_clean(models.path(name), Path(folder))
        infer_shapes(clean)
        candidates = plan(clean, options).candidates
        arrays = capture(clean, wanted(candidates), models.feeds(name), 2).arrays
        return rows_for(name, candidates, arrays, device, options)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_device", description=__doc__)
    parser.add_argument("--only", action="append", choices=models.names(), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    try:
        device = first_device()
    except DeviceError as error:
        print(f"skipped, there is no GPU: {error}", file=sys.stderr)
        return NO_DEVICE
    start = time.monotonic()
    provider, threads = provider_for(device.target), os.cpu_count() or 1
    rows: list[Row] = []
    wholes: list[Whole] = []
    failed: dict[str, str] = {}
    # the chains that are all memory come first, should time run out
    waiting = sorted(
        chosen.only or models.names(), key=lambda name: not getattr(models.find(name), "memory_bound", False)
    )
    while waiting and time.monotonic() - start < _SECONDS:
        name = waiting.pop(0)
        try:
            rows += rows_of(name, device, Options())
            if provider is not None:
                found = whole(name, device.target, provider, seconds=_PROVIDER_SECONDS, threads=threads)
                wholes.append(found)
        except Exception as error:  # drivers, compilers, torch and onnxruntime raise classes of their own
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(f"{name}: {failed.get(name, f'{len(rows)} rows so far')}", file=sys.stderr, flush=True)
    facts = {
        "device": device.name,
        "compiled for": str(device.target),
        "peak GB/s": f"{device.peak / 1e9:.0f}",
        "onnxruntime": provider or "has no provider for it",
    }
    ran = Ran(rows, wholes, failed, waiting)
    markdown = to_markdown(ran, facts)
    keep(chosen, to_json(ran, facts), markdown)
    print(markdown)
    return 1 if failed or any(row.problem for row in (*rows, *wholes)) else 0


if __name__ == "__main__":
    sys.exit(main())
