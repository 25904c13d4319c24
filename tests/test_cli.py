"""The command line: what it hands to the driver, where it prints, and how it fails."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click.testing
import jsonschema
import pytest

from apollo_fuse import cli
from apollo_fuse.cpu import Cpu, CpuTargets
from apollo_fuse.errors import ApolloFuseError, ModelError, UsageError, VerificationError
from apollo_fuse.options import InputShape, Options
from apollo_fuse.progress import Progress
from apollo_fuse.report import Report
from tests.sample_report import FUSED, UNCHANGED

SCHEMA = json.loads(Path(cli.__file__).with_name("report.schema.json").read_text())


class StubDriver(types.ModuleType):
    """Stands for `apollo_fuse.fusing`: keeps what it was called with, and answers with a given result."""

    def __init__(self) -> None:
        super().__init__("apollo_fuse.fusing")
        self.calls: list[tuple[Path, Path, Options]] = []
        self.result: Report | Exception = FUSED

    def fuse(self, model: Path, output: Path, options: Options, progress: Progress) -> Report:
        self.calls.append((model, output, options))
        progress.stage("cc", 2)
        progress.advance()
        progress.advance()
        progress.stage("verify", None)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> StubDriver:
    stub = StubDriver()
    monkeypatch.setitem(sys.modules, "apollo_fuse.fusing", stub)
    return stub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"")
    return path


def run(*arguments: str | Path) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def assert_one_line_error(result: click.testing.Result, status: int, *words: str) -> None:
    assert result.exit_code == status
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("apollo-fuse: error: ")]
    assert errors == result.stderr.splitlines()[-1:]
    for word in words:
        assert word in errors[0]


def test_version_and_help_exit_with_success() -> None:
    assert run("--version").stdout == "apollo-fuse 0.1.0\n"
    shown = run("--help")
    assert shown.exit_code == 0
    for option in (
        "--output",
        "--shape",
        "--inputs",
        "--target",
        "--cpu",
        "--explain",
        "--json",
        "--dump",
        "--no-measure",
    ):
        assert option in shown.stdout


def test_the_default_output_lies_beside_the_model(driver: StubDriver, model: Path) -> None:
    assert run(model).exit_code == 0
    assert driver.calls == [(model, model.with_name("net.fused.onnx"), Options())]


def test_every_option_reaches_the_driver(driver: StubDriver, model: Path, tmp_path: Path) -> None:
    out, cache, dump = tmp_path / "out.onnx", tmp_path / "cache", tmp_path / "new" / "dump"
    arguments = f"-o {out} --shape x:0:1,128 --shape y:7 --inputs x.npz --target cpu --no-measure --strict"
    arguments += " --threads 3 --cpu x86-64-v3,x86-64-v2"
    result = run(model, *arguments.split(), "--cache-dir", cache, "--dump", dump)
    assert result.exit_code == 0
    shapes = (InputShape("x:0", (1, 128)), InputShape("y", (7,)))
    options = Options(
        shapes=shapes,
        inputs=Path("x.npz"),
        target="cpu",
        cpu=CpuTargets((Cpu("x86-64", 2), Cpu("x86-64", 3))),
        measure=False,
        strict=True,
        cache_dir=cache,
        threads=3,
        dump=dump,
    )
    assert driver.calls == [(model, out, options)]
    assert dump.is_dir()
    assert cache.stat().st_mode & 0o077 == 0, "the cache is executed, so it is for this user alone"


def test_the_environment_gives_cache_and_compiler(
    driver: StubDriver, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APOLLO_FUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "ccache gcc")
    run(model)
    (_, _, options) = driver.calls[0]
    assert (options.cache_dir, options.compiler) == (tmp_path / "cache", "ccache gcc")


@pytest.mark.usefixtures("driver")
def test_results_go_to_stdout_and_progress_and_warnings_to_stderr(model: Path) -> None:
    result = run(model)
    assert "latency" in result.stdout and "1.60x" in result.stdout
    assert "warning" not in result.stdout and "verify" not in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0].startswith("cc: 2/2 ") and lines[1].startswith("verify: ")
    assert lines[2] == "apollo-fuse: warning: kernel [sin] failed verification and was dropped"
    assert len(lines) == 3


@pytest.mark.usefixtures("driver")
def test_a_pipe_gets_no_colour_codes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    result = run(model, "--explain", "--verbose")
    assert "Kernels" in result.stdout and "Compiled in" in result.stdout
    assert "\x1b" not in result.output


@pytest.mark.usefixtures("driver")
def test_quiet_prints_nothing(model: Path) -> None:
    result = run(model, "-q")
    assert (result.exit_code, result.output) == (0, "")


def test_quiet_still_prints_errors(driver: StubDriver, model: Path) -> None:
    driver.result = ModelError("net.onnx is not a model; export it again")
    result = run(model, "-q")
    assert result.stderr == "apollo-fuse: error: net.onnx is not a model; export it again\n"


def test_an_unchanged_model_is_success_and_said_plainly(driver: StubDriver, model: Path) -> None:
    driver.result = UNCHANGED
    result = run(model)
    assert result.exit_code == 0
    assert "written unchanged" in result.stdout


@pytest.mark.usefixtures("driver")
def test_json_keeps_to_the_schema_and_leaves_nothing_else_behind(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert run(model, "--json", report).exit_code == 0
    jsonschema.validate(json.loads(report.read_text()), SCHEMA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "report.json"]


@pytest.mark.usefixtures("driver")
def test_json_on_stdout_is_alone_there(model: Path) -> None:
    result = run(model, "--json", "-")
    jsonschema.validate(json.loads(result.stdout), SCHEMA)
    assert "latency" in result.stderr


def test_a_failure_keeps_an_earlier_json_report(driver: StubDriver, model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("earlier")
    driver.result = VerificationError("kernel k differs")
    assert run(model, "--json", report).exit_code == 1
    assert report.read_text() == "earlier"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument 'MODEL'"),
        (["{model}", "--nonsense"], "--nonsense"),
        (["{model}", "--target", "gpu"], "'gpu' is no target"),
        (["{model}", "--cpu", "x86-64-v9"], "x86-64-v2, x86-64-v3, x86-64-v4, aarch64"),
        (["{model}", "--cpu", "x86-64,aarch64"], "different architectures"),
        (["{model}", "--threads", "0"], "--threads"),
        (["{model}", "--threads", "5000"], "--threads"),
        (["{model}", "--shape", "x"], "NAME:1,128"),
        (["{model}", "--shape", ":1,128"], "NAME:1,128"),
        (["{model}", "--shape", "x:1,b"], "'1,b'"),
        (["{model}", "--shape", "x:1,0"], "1 or more"),
        (["{model}", "--shape", "x:"], "NAME:1,128"),
        (["{model}", "--shape", "x:1", "--shape", "x:2"], "two shapes"),
        (["{model}", "-q", "-v"], "--verbose"),
        (["{model}", "-q", "--explain"], "--explain"),
        (["{model}.missing"], "does not exist"),
        (["{folder}"], "is a folder"),
        (["{model}", "-o", "{model}"], "same file"),
        (["{model}", "-o", "{folder}/./net.onnx"], "same file"),
        (["{model}", "-o", "{folder}/net.so"], "same file"),
        (["{model}", "--json", "{folder}/net.fused.onnx"], "same file"),
        (["{model}", "--json", "{model}"], "same file"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    driver: StubDriver, model: Path, arguments: list[str], words: str
) -> None:
    result = run(*(text.format(model=model, folder=model.parent) for text in arguments))
    assert_one_line_error(result, 2, words)
    assert driver.calls == []


def test_an_output_that_links_to_the_model_is_refused(driver: StubDriver, model: Path) -> None:
    link = model.with_name("link.onnx")
    link.symlink_to(model)
    assert_one_line_error(run(model, "-o", link), 2, "same file")
    assert driver.calls == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "{folder}/none/out.onnx"], "does not exist"),
        (["-o", "{folder}"], "is a folder"),
        (["-o", "{model}/out.onnx"], "cannot write"),
        (["-o", "/proc/out.onnx"], "cannot write"),
        (["--json", "{folder}/none/report.json"], "does not exist"),
        (["--dump", "{model}"], "cannot make the folder"),
        (["--cache-dir", "{model}/cache"], "cannot make the folder"),
    ],
)
def test_an_unwritable_place_is_found_before_the_work_starts(
    driver: StubDriver, model: Path, arguments: list[str], words: str
) -> None:
    result = run(model, *(text.format(model=model, folder=model.parent) for text in arguments))
    assert_one_line_error(result, 1, words)
    assert driver.calls == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelError("net.onnx is cut short\nat byte 12; export it again"), 1),
        (UsageError("the model has no input named x"), 2),
        (OSError(28, "No space left on device", "net.fused.onnx"), 1),
        (KeyError("lost"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_is_one_line_and_a_traceback_only_with_debug(
    driver: StubDriver, model: Path, error: Exception, status: int
) -> None:
    driver.result = error
    result = run(model)
    assert_one_line_error(result, status)
    assert "Traceback" not in result.stderr
    debugged = run(model, "--debug")
    assert "Traceback" in debugged.stderr
    assert_one_line_error(debugged, status)


def test_a_defect_asks_to_be_reported(driver: StubDriver, model: Path) -> None:
    driver.result = KeyError("lost")
    assert_one_line_error(run(model), 1, "KeyError: 'lost'", "please report it", "--debug")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Options(target="gpu"),
        lambda: Options(threads=0),
        lambda: Options(threads=5000),
        lambda: Options(max_area_operators=0),
        lambda: Options(measure_seconds=0.0),
        lambda: Options(shapes=(InputShape("x", (1,)), InputShape("x", (2,)))),
        lambda: InputShape("", (1,)),
        lambda: InputShape("x", ()),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ApolloFuseError):
        make()
