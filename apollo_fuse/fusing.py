"""Fuses a model, or writes again what an earlier run of the same compilation came to.

The compiler takes a second to load: it is imported where there is something to compile.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from onnx import ModelProto

from apollo_fuse import onnx_files
from apollo_fuse.atomic import replacing, require_writable
from apollo_fuse.codegen import link
from apollo_fuse.codegen.toolchain import toolchains_for
from apollo_fuse.cpu import default_threads
from apollo_fuse.errors import CompilerError
from apollo_fuse.options import Options
from apollo_fuse.progress import Progress, SilentProgress
from apollo_fuse.remembered import Outcome, key_of, recall, remember
from apollo_fuse.report import CompileSeconds, Report


def fuse(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Report:
    """Fuses the model at `model`, and writes the result to `output` and its library beside that.

    `output` defaults to the model's path with the suffix ``.fused.onnx``. Where nothing wins, the model
    is written unchanged and the report's `library` is None, as it is where a layout alone wins. Raises an
    ApolloFuseError for whatever is wrong with the model, the options, the compiler or the output; nothing
    is left half-written.
    """
    start = perf_counter()
    path = Path(model)
    target = path.with_suffix(".fused.onnx") if output is None else Path(output)
    chosen, told = options or Options(), progress or SilentProgress()
    told.stage("recall", None)
    key = _key(path, chosen)
    again = chosen.remeasure or chosen.dump is not None
    outcome = None if key is None or again else recall(chosen.cache_dir, key)
    looked = perf_counter()
    if outcome is not None:
        told.stage("write", None)
        library = _write(outcome, path, target)
        end = perf_counter()
        seconds = CompileSeconds(end - start, load=looked - start, write=end - looked)
        return replace(
            outcome.report,
            model=path,
            output=target,
            library=library,
            remembered=True,
            compile_seconds=seconds,
        )
    from apollo_fuse import driver

    began = perf_counter()
    report = driver.fuse(path, target, chosen, told)
    done = perf_counter()
    if key is not None and (report.kernels or report.without_kernels):
        remember(chosen.cache_dir, key, report)
    spent = report.compile_seconds
    end = perf_counter()
    seconds = replace(
        spent,
        total=end - start,
        load=spent.load + began - start,
        write=spent.write + end - done,
    )
    return replace(report, compile_seconds=seconds)


def _key(path: Path, options: Options) -> str | None:
    """The name of this compilation's result; None where it cannot be told, and the compiler says why."""
    if options.inputs is not None and not options.inputs.is_file():
        return None
    try:
        toolchains = toolchains_for(options)
    except CompilerError:
        return None
    threads = options.threads or default_threads()
    compilers = (text for x in toolchains.values() for text in (x.identification, *x.command))
    return key_of(path, options, (str(threads), *map(str, toolchains), *compilers))


def _write(outcome: Outcome, path: Path, target: Path) -> Path | None:
    """Writes an outcome's files; the library's path where it has one."""
    require_writable(target)
    onnx_files.check_output(path, target)
    library = target.with_suffix(".so")
    if outcome.model is None:
        onnx_files.write_unchanged(path, target)
        link.remove_library(library)
        return None
    model = ModelProto.FromString(outcome.model)
    if outcome.library is None:
        onnx_files.write(model, onnx_files.file_of(path), target)
        link.remove_library(library)
        return None
    with replacing(library) as temporary:
        temporary.write_bytes(outcome.library)
        onnx_files.write(model, onnx_files.file_of(path), target)
    return library
