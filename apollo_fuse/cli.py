"""The command `apollo-fuse`: it reads the command line, calls the driver, and prints what came of it.

Results go to stdout; progress, warnings and errors to stderr. An error is one line that says what was found
and what to do; the exit status is 0 for success, 1 for a failure, 2 for wrong usage.
"""

import io
import json
import sys
import traceback
from pathlib import Path
from typing import IO

import click
from rich.console import Console

from apollo_fuse._version import __version__
from apollo_fuse.atomic import require_writable, write_text
from apollo_fuse.cpu import NATIVE, CpuTargets
from apollo_fuse.errors import ApolloFuseError, OutputError, UsageError
from apollo_fuse.options import LAYERS, LAYOUTS, MOST_THREADS, InputShape, Options, default_cache_dir
from apollo_fuse.progress import SilentProgress, TerminalProgress
from apollo_fuse.render import render_compile_seconds, render_explanation, render_summary
from apollo_fuse.report import Report

_OF_THE_SYSTEM = "see that there is room and may be written; --cache-dir and TMPDIR move working files"


class OneLineError(click.ClickException):
    """A failure, shown as one line on stderr whatever its message holds."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def show(self, file: IO[str] | None = None) -> None:
        """Print the line."""
        click.echo(f"apollo-fuse: error: {self.message}", file=file or sys.stderr)


class OneLineUsageError(OneLineError):
    """The same for wrong usage."""

    exit_code = 2


class OneLineErrorCommand(click.Command):
    """A command whose every failure ends as a OneLineError, with --debug after its traceback."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        """Parse the command line."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            message = error.format_message().rstrip(".")
            raise OneLineUsageError(f"{message}; see apollo-fuse --help") from error
        except UsageError as error:
            raise OneLineUsageError(str(error)) from error

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                traceback.print_exc(file=sys.stderr)
            match error:
                case UsageError():
                    raise OneLineUsageError(str(error)) from error
                case ApolloFuseError():
                    raise OneLineError(str(error)) from error
                case OSError(strerror=why, filename=str(path)) if why:
                    raise OneLineError(f"{path}: {why}; {_OF_THE_SYSTEM}") from error
                case OSError():
                    raise OneLineError(f"{error}; {_OF_THE_SYSTEM}") from error
            raise OneLineError(
                f"{type(error).__name__}: {error} (a defect of apollo-fuse: please report it, "
                "with the traceback that --debug prints)"
            ) from error


def _read_shapes(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[InputShape, ...]:
    return tuple(InputShape.parse(value) for value in values)


def _examine(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print what the machine has and exit: 0 where it can fuse models, else 1."""
    if not value or ctx.resilient_parsing:
        return
    from apollo_fuse.doctor import examine, lines

    diagnosis = examine(Options())
    click.echo("\n".join(lines(diagnosis)))
    ctx.exit(0 if diagnosis.is_ready else 1)


def _read_cpus(ctx: click.Context, param: click.Parameter, value: str) -> CpuTargets:
    return CpuTargets.parse(value)


@click.command(cls=OneLineErrorCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="The fused model; its library lies beside it with the suffix .so.  [default: MODEL.fused.onnx]",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=_read_shapes,
    metavar="NAME:1,128",
    help="Extents for an input with open dimensions, to measure and verify with. May be repeated.",
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A .npz file with arrays for inputs by name, to measure and verify with; others are made up.",
)
@click.option(
    "--target",
    default="auto",
    show_default=True,
    metavar="cpu,GPU,...",
    help="cpu makes the library. GPUs may follow: for cuda:80, cuda:90 and hip:gfx942 it holds kernels too, "
    "which no GPU has run yet. --json and --explain tell what they take.",
)
@click.option(
    "--cpu",
    default=NATIVE,
    show_default=True,
    callback=_read_cpus,
    metavar="NAME,...",
    help="The processors that the library is for: this machine's, x86-64, x86-64-v2, x86-64-v3 and x86-64-v4 "
    "in one, or aarch64.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="portable",
    show_default=True,
    help="portable runs anywhere; ort keeps onnxruntime's layout of convolutions, for machines like this one "
    "alone; auto takes what is faster.",
)
@click.option(
    "--layers",
    type=click.Choice(LAYERS),
    default=LAYERS[-1],
    show_default=True,
    help="Layers of fusion: I loops, II stitching through caches, III shared launches; to see each gain.",
)
@click.option(
    "--no-feedback", is_flag=True, help="Leave what is refused unfused instead of grouping it anew."
)
@click.option("--explain", is_flag=True, help="Print each kernel and each refusal, with their figures.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write the report as JSON; - writes it to stdout, and the text to stderr.",
)
@click.option(
    "--dump",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write every intermediate form there as text.",
)
@click.option("--no-measure", is_flag=True, help="Decide by the cost model alone, as for another machine.")
@click.option(
    "--remeasure", is_flag=True, help="Verify and measure anew what an earlier run of the same kind decided."
)
@click.option(
    "--strict", is_flag=True, help="Fail where a kernel fails verification, instead of dropping it."
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where compiled kernels are kept.  [default: $APOLLO_FUSE_CACHE_DIR, else the user's cache]",
)
@click.option(
    "--threads",
    type=click.IntRange(1, MOST_THREADS),
    metavar="N",
    help="Threads to use.  [default: all cores]",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Print where the time went, and the versions, too.")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.option(
    "--doctor",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_examine,
    help="Print what this machine has, and what is missing for which target, and exit.",
)
@click.version_option(__version__, prog_name="apollo-fuse", message="%(prog)s %(version)s")
def main(
    model: Path,
    output: Path | None,
    shapes: tuple[InputShape, ...],
    inputs: Path | None,
    target: str,
    cpu: CpuTargets,
    layout: str,
    layers: str,
    no_feedback: bool,
    explain: bool,
    json_file: Path | None,
    dump: Path | None,
    no_measure: bool,
    remeasure: bool,
    strict: bool,
    cache_dir: Path | None,
    threads: int | None,
    quiet: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Fuse the operators of MODEL into kernels that onnxruntime runs as custom ops."""
    if quiet and (verbose or explain):
        raise UsageError(
            f"--quiet and --{'verbose' if verbose else 'explain'} contradict each other; give one"
        )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may hold letters that the terminal lacks
    options = Options(
        shapes=shapes,
        inputs=inputs,
        target=target,
        cpu=cpu,
        layout=layout,
        layers=layers,
        feedback=not no_feedback,
        measure=not no_measure,
        remeasure=remeasure,
        strict=strict,
        cache_dir=cache_dir or default_cache_dir(),
        threads=threads,
        dump=dump,
    )
    json_to_stdout = json_file == Path("-")
    output = output or model.with_suffix(".fused.onnx")
    _check_paths(model, output, None if json_to_stdout else json_file)
    if dump is not None:
        _make_folder(dump, mode=0o777)
    if cache_dir is not None:
        # What lies in the cache gets executed, so a new one belongs to this user alone.
        _make_folder(cache_dir, mode=0o700)

    diagnostics = Console(stderr=True, emoji=False)
    report = _fuse(model, output, options, None if quiet else diagnostics)
    if json_file is not None:
        text = json.dumps(report.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        if json_to_stdout:
            click.echo(text.encode(), nl=False)
        else:
            write_text(json_file, text)
    if quiet:
        return
    results = diagnostics if json_to_stdout else Console(emoji=False)
    if explain:
        render_explanation(report, results)
    render_summary(report, results)
    if verbose:
        render_compile_seconds(report, results)
    for warning in report.warnings:
        click.echo(f"apollo-fuse: warning: {warning}", err=True)


def _fuse(model: Path, output: Path, options: Options, console: Console | None) -> Report:
    # Imported when the command line is known to be right.
    from apollo_fuse.fusing import fuse

    if console is None:
        return fuse(model, output, options, SilentProgress())
    with TerminalProgress(console) as progress:
        return fuse(model, output, options, progress)


def _check_paths(model: Path, output: Path, json_file: Path | None) -> None:
    """Find out before the work starts that it can be read and written, and that nothing would be lost."""
    if not model.exists():
        raise UsageError(f"{model} does not exist; give the path of an ONNX model")
    if model.is_dir():
        raise UsageError(f"{model} is a folder; give the path of an ONNX model")
    taken = {model.resolve(): "the model"}
    written = [("the output", output), ("its library", output.with_suffix(".so"))]
    if json_file is not None:
        written.append(("the JSON report", json_file))
    for what, path in written:
        other = taken.setdefault(path.resolve(), what)
        if other != what:
            raise UsageError(f"{what} and {other} would be the same file, {path}; give another path")
        require_writable(path)


def _make_folder(folder: Path, mode: int) -> None:
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise OutputError(f"cannot make the folder {folder}: {why}; choose another") from error
