"""What a user is promised of a fused model, tested on small models from the file that goes in to the run."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper, parser

import apollo_fuse
from apollo_fuse import driver
from apollo_fuse.errors import ApolloFuseError, ModelError, OutputError, UsageError
from apollo_fuse.feeds import make_feeds
from apollo_fuse.options import InputShape, Options
from apollo_fuse.report import Report
from models import memory_bound, networks

Feeds = Mapping[str, np.ndarray]

# Runs in a process that has nothing of ours: argv is the model, the library or "", the inputs, the outputs.
PLAIN = """
import json, sys
import numpy, onnxruntime
model, library, feeds, results = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.enable_profiling = True
options.profile_file_prefix = results
if library:
    options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
outputs = session.run(None, dict(numpy.load(feeds)))
numpy.savez(results, *outputs)
with open(session.end_profiling()) as profile:
    events = json.load(profile)
print(json.dumps([event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})]))
assert "apollo_fuse" not in sys.modules
"""

COMMAND = "from apollo_fuse.cli import main; main(prog_name='apollo-fuse')"

SMALL: dict[str, tuple[Callable[[], onnx.ModelProto], dict[str, tuple[int, ...]]]] = {
    "chain": (lambda: memory_bound.chain20(8, 48), {}),
    "softmax": (lambda: memory_bound.softmax("rows", 48), {"x": (8, 48)}),
    "rmsnorm_divided": (lambda: memory_bound.rmsnorm("rows", 48, True), {"x": (8, 48)}),
    "rmsnorm": (lambda: memory_bound.rmsnorm("rows", 48), {"x": (8, 48)}),
    "gelu_erf": (lambda: memory_bound.gelu_erf("rows", 48), {"x": (8, 48)}),
    "gelu_tanh": (lambda: memory_bound.gelu_tanh(8, 48), {}),
    "mish": (lambda: memory_bound.mish(8, 48), {}),
    "image": (lambda: memory_bound.image_preprocessing("h", "w"), {"image": (12, 20, 3)}),
    "wide_deep": (lambda: memory_bound.wide_deep("rows", 4), {"feature_0": (40, 1)}),
    "adam": (lambda: memory_bound.adam(3, 8), {}),
    "bert": (lambda: networks.bert_layer(hidden=48, heads=4), {"hidden_states": (2, 10, 48)}),
    "mbconv": (lambda: networks.mbconv(channels=8, size=14, expansion=2), {}),
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def fuse(cache: Path, tmp_path: Path) -> Callable[..., Report]:
    """Saves a model and fuses it without measuring, so that what is fused does not depend on the machine."""

    def run(model: onnx.ModelProto | Path, name: str = "net", **choices: object) -> Report:
        path = model if isinstance(model, Path) else tmp_path / f"{name}.onnx"
        if not isinstance(model, Path):
            onnx.save(model, path)
        return driver.fuse(path, options=options_for(cache, **choices))

    return run


def options_for(cache: Path, **choices: object) -> Options:
    settings: dict[str, object] = {"measure": False, "strict": True, "threads": 2, "cache_dir": cache}
    return Options(**(settings | choices))  # type: ignore[arg-type]


def shapes_of(sizes: Mapping[str, tuple[int, ...]]) -> tuple[InputShape, ...]:
    return tuple(InputShape(name, dims) for name, dims in sizes.items())


def run(path: Path, feeds: Feeds, library: Path | None = None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5)


def assert_equivalent(report: Report, feeds: Feeds) -> None:
    """The written model gives the original's results, with its library and without."""
    expected = run(report.model, feeds)
    assert_same(run(report.output, feeds), expected)
    if report.library is not None:
        assert_same(run(report.output, feeds, report.library), expected)


def plain_run(
    model: Path, library: Path | None, feeds: Feeds, folder: Path
) -> tuple[list[str], list[np.ndarray]]:
    """The op types that ran, and the outputs, in a process with onnxruntime and numpy alone."""
    np.savez(folder / "feeds.npz", **feeds)
    arguments = [str(model), str(library or ""), str(folder / "feeds.npz"), str(folder / "results.npz")]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = np.load(folder / "results.npz")
    return json.loads(done.stdout), [results[f"arr_{number}"] for number in range(len(results.files))]


def text_model(text: str, opset: int = 18, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from onnx's own text form, with these initialisers."""
    version = 8 if opset <= 18 else 10
    model = parser.parse_model(f'<ir_version: {version}, opset_import: ["": {opset}]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def fused_ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node if node.domain == "apollo_fuse"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what every fused model is ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_fused_model_is_the_original_with_and_without_its_library(
    name: str, fuse: Callable[..., Report], tmp_path: Path
) -> None:
    build, sizes = SMALL[name]
    model = build()
    report = fuse(model, shapes=shapes_of(sizes), fuse_all=True)
    assert report.library == tmp_path / "net.fused.so"
    assert report.fused_nodes == len(fused_ops(report.output)) > 0
    assert report.verification.passed and report.verification.cases > 0
    onnx.checker.check_model(str(report.output), full_check=True)
    feeds = make_feeds(model, sizes, seed=3)
    for key, value in feeds.items():
        if key.startswith("second_") or key in ("step", "learning_rate"):
            feeds[key] = np.asarray(np.abs(value) + 1)  # Adam's second moments and its step are not negative
    assert_equivalent(report, feeds)


def test_the_library_serves_a_process_that_has_nothing_of_ours(
    fuse: Callable[..., Report], tmp_path: Path
) -> None:
    report = fuse(memory_bound.gelu_tanh("rows", 48), shapes=shapes_of({"x": (8, 48)}))
    feeds = {"x": normal(8, 48)}
    expected = run(report.model, feeds)
    ran, outputs = plain_run(report.output, report.library, feeds, tmp_path)
    assert set(fused_ops(report.output)) <= set(ran)
    assert_same(outputs, expected)
    ran, outputs = plain_run(report.output, None, feeds, tmp_path)
    assert "Tanh" in ran and not set(fused_ops(report.output)) & set(ran)
    assert_same(outputs, expected)


def test_the_session_of_the_package_finds_the_library_beside_the_model(fuse: Callable[..., Report]) -> None:
    report = fuse(memory_bound.mish(8, 48))
    feeds = {"x": normal(8, 48)}
    assert_same(apollo_fuse.session(report.output).run(None, feeds), run(report.model, feeds))


def test_shapes_stay_known(fuse: Callable[..., Report]) -> None:
    report = fuse(networks.bert_layer(hidden=48, heads=4), shapes=shapes_of({"hidden_states": (2, 10, 48)}))
    fused = onnx.load(report.output)
    original = onnx.load(report.model)
    assert list(fused.graph.output) == list(original.graph.output)
    assert list(fused.graph.input) == list(original.graph.input)
    inferred = onnx.shape_inference.infer_shapes(fused, strict_mode=True, data_prop=True)
    known = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    for node in fused.graph.node:
        if node.domain == "apollo_fuse":
            for name in set(node.output) - {value.name for value in fused.graph.output}:
                assert known[name].elem_type and known[name].HasField("shape"), name


def test_a_fused_result_can_be_what_another_is_resized_to(fuse: Callable[..., Report]) -> None:
    """Onnxruntime wants to know of how many axes, when it loads the model."""
    model = text_model(
        """g (float[N, 8, H, W] x, float[N, 8, h, w] z) => (float[N, 8, H, W] y) {
          a = HardSigmoid(x) b = Mul(a, x) s = Shape(b)
          y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric"> (z, none, none, s)
        }""",
        none=np.zeros(0, np.float32),
    )
    report = fuse(model, shapes=shapes_of({"x": (2, 8, 12, 6), "z": (2, 8, 4, 3)}))
    fused = onnx.load(report.output)
    (kernel,) = (node for node in fused.graph.node if node.domain == "apollo_fuse")
    (stated,) = (value for value in fused.graph.value_info if value.name == kernel.output[0])
    assert [dim.dim_value for dim in stated.type.tensor_type.shape.dim] == [0, 8, 0, 0]
    assert_equivalent(report, {"x": normal(1, 8, 10, 4), "z": normal(1, 8, 5, 4)})


def test_one_kernel_serves_every_batch_and_sequence(fuse: Callable[..., Report]) -> None:
    model = networks.bert_layer(hidden=48, heads=4)
    report = fuse(model, shapes=shapes_of({"hidden_states": (2, 10, 48)}))
    for batch, sequence in ((1, 1), (3, 7), (5, 33), (2, 10)):
        sizes = {"hidden_states": (batch, sequence, 48), "attention_mask": (batch, sequence)}
        assert_equivalent(report, make_feeds(model, sizes))


def test_an_empty_batch_gives_an_empty_result(fuse: Callable[..., Report]) -> None:
    report = fuse(memory_bound.gelu_erf("rows", 48), shapes=shapes_of({"x": (8, 48)}))
    assert_equivalent(report, {"x": np.zeros((0, 48), np.float32)})


def test_two_runs_write_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(networks.bert_layer(hidden=48, heads=4), path)
    written = []
    for name, own in (("a", tmp_path / "cache_a"), ("b", tmp_path / "cache_b")):
        folder = tmp_path / name
        folder.mkdir()
        report = driver.fuse(path, folder / "out.onnx", options_for(own))
        assert report.library is not None
        written.append((report.output.read_bytes(), report.library.read_bytes()))
    assert written[0][0] == written[1][0]
    assert written[0][1] == written[1][1]


def test_one_thread_is_enough(fuse: Callable[..., Report]) -> None:
    report = fuse(memory_bound.softmax("rows", 48), shapes=shapes_of({"x": (8, 48)}), threads=1)
    assert report.latency.threads == 1
    assert_equivalent(report, {"x": normal(5, 48)})


def test_paths_may_hold_spaces_and_any_letter(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mein Ordner" / "日本 'é'"
    folder.mkdir(parents=True)
    path = folder / "a model – v1.2.onnx"
    onnx.save(memory_bound.mish(8, 48), path)
    report = driver.fuse(path, options=options_for(folder / "the cache"))
    assert report.output == folder / "a model – v1.2.fused.onnx"
    assert report.library == folder / "a model – v1.2.fused.so"
    feeds = {"x": normal(8, 48)}
    assert_same(apollo_fuse.session(report.output).run(None, feeds), run(path, feeds))


def test_measuring_keeps_what_wins_and_reports_the_figures(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(memory_bound.chain20(64, 64), path)
    report = driver.fuse(path, options=options_for(cache, measure=True, measure_seconds=0.01, feedback=False))
    (kernel,) = report.kernels
    assert kernel.unfused_us is not None and kernel.fused_us is not None
    assert report.latency.unfused_ms is not None and report.latency.runs > 0
    assert (report.library is None) == (report.fused_nodes == 0) == (not kernel.accepted)
    assert_equivalent(report, make_feeds(onnx.load(path)))


# -- models of every kind go through ------------------------------------------------------------------


def test_a_model_with_nothing_to_fuse_is_written_unchanged(
    fuse: Callable[..., Report], tmp_path: Path
) -> None:
    model = text_model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=normal(4, 3))
    report = fuse(model)
    assert report.library is None and report.fused_nodes == 0 and report.kernels == ()
    assert report.nodes_before == report.nodes_after == 1
    assert report.output.read_bytes() == report.model.read_bytes()
    assert files(tmp_path) == ["net.fused.onnx", "net.onnx"]


def test_a_library_from_an_earlier_run_does_not_stay_beside_an_unchanged_model(
    fuse: Callable[..., Report], tmp_path: Path
) -> None:
    assert fuse(memory_bound.mish(8, 48)).library is not None
    fuse(text_model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=normal(4, 3)))
    assert files(tmp_path) == ["net.fused.onnx", "net.onnx"]


CHAIN = "t = Mul(x, scale) u = Add(t, shift) v = Tanh(u) y = Mul(v, x)"
SCALARS = {"scale": np.float32(2), "shift": np.float32(3)}

ODD = {
    "an output that is used inside": text_model(
        f"g (float[N, 64] x) => (float[N, 64] t, float[N, 64] v, float[N, 64] y) {{ {CHAIN} }}", **SCALARS
    ),
    "an input that is an output": text_model(
        "g (float[N, 64] x, float[3] z) => (float[N, 64] y, float[3] z2, float[3] z) "
        f"{{ {CHAIN} z2 = Identity(z) }}",
        **SCALARS,
    ),
    "duplicated inputs": text_model(
        "g (float[N, 64] x) => (float[N, 64] y) { t = Mul(x, x) u = Add(t, t) y = Sub(u, x) }"
    ),
    "a result that nothing uses": text_model(
        f"g (float[N, 64] x) => (float[N, 64] y) {{ {CHAIN} unused = Exp(v) }}", **SCALARS
    ),
    "an output of a node that nothing uses": text_model(
        f"g (float[N, 64] x) => (float[N, 1] w) {{ {CHAIN} w, places = TopK(y, one) }}",
        **SCALARS,
        one=np.array([1], np.int64),
    ),
    "an optional input left out": text_model(
        "g (float[N, 64] x, float top) => (float[N, 64] y) { t = Clip(x, , top) u = Exp(t) y = Mul(u, x) }"
    ),
    "a branch that reads what is fused": text_model(
        f"g (float[N, 64] x, bool c) => (float[N, 64] y, float[N, 64] w) {{ {CHAIN} "
        "w = If (c) <then_branch = a () => (float[N, 64] p) { p = Add(v, t) }, "
        "else_branch = b () => (float[N, 64] q) { r = Mul(x, u) q = Sub(r, u) }> }",
        **SCALARS,
    ),
    "a loop around a chain": text_model(
        f"g (float[N, 64] x, int64 n, bool c) => (float[N, 64] w) {{ {CHAIN} "
        "w = Loop (n, c, y) <body = b (int64 i, bool go, float[N, 64] s) => (bool more, float[N, 64] r) "
        "{ more = Identity(go) a = Mul(s, x) d = Tanh(a) r = Add(d, t) }> }",
        **SCALARS,
    ),
    "strings": text_model(
        f"g (float[N, 64] x) => (float[N, 64] y, string[1] label) {{ {CHAIN} label = Identity(name) }}",
        **SCALARS,
        name=np.array(["a name"], object),
    ),
    "a sequence": text_model(
        f"g (float[N, 64] x) => (float[M, 64] w) {{ {CHAIN} s = SequenceConstruct(y, t, y) "
        "w = ConcatFromSequence <axis: int = 0> (s) }",
        **SCALARS,
    ),
    "double precision": text_model(
        "g (double[N, 64] x) => (double[N, 64] y) { t = Mul(x, x) u = Exp(t) y = Add(u, x) }"
    ),
    "no shapes at all": text_model("g (float[] x) => (float[] y) { t = Mul(x, x) y = Add(t, x) }"),
    "names that C and isl know": text_model(
        "g (float[int, 64] for, float[int, 64] x_y) => (float[int, 64] main) "
        "{ while = Mul(for, x_y) return = Add(while, for) main = Tanh(return) }"
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models_go_through(name: str, fuse: Callable[..., Report]) -> None:
    model = ODD[name]
    report = fuse(model)
    if name != "no shapes at all":  # the checker wants an output to have one
        onnx.checker.check_model(str(report.output), full_check=True)
    sizes = {value.name: (5, 64) for value in model.graph.input if len(value.type.tensor_type.shape.dim) == 2}
    feeds = make_feeds(model, sizes)
    if "n" in feeds:
        feeds["n"], feeds["c"] = np.array(3), np.array(True)
    expected = run(report.model, feeds)
    for library in (None, report.library):
        for a, b in zip(run(report.output, feeds, library), expected, strict=True):
            if a.dtype == object:
                assert a.tolist() == b.tolist()
            else:
                np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5)


def test_an_initialiser_that_is_an_input_can_be_overridden_still(fuse: Callable[..., Report]) -> None:
    model = text_model(
        f"g (float[N, 64] x, float scale) => (float[N, 64] y) {{ {CHAIN} }}",
        **SCALARS,
    )
    report = fuse(model)
    feeds = {"x": normal(5, 64)}
    assert_equivalent(report, feeds)
    assert_equivalent(report, feeds | {"scale": np.array(-7, np.float32)})


def test_weights_beside_the_model_are_found(cache: Path, tmp_path: Path) -> None:
    model = networks.bert_layer(hidden=48, heads=4)
    path = tmp_path / "in" / "net.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="net.weights", size_threshold=1024)
    (tmp_path / "out").mkdir()
    sizes = {"hidden_states": (2, 10, 48)}
    report = driver.fuse(path, tmp_path / "out" / "net.onnx", options_for(cache, shapes=shapes_of(sizes)))
    assert report.library is not None
    assert_equivalent(report, make_feeds(model, sizes))


def test_a_model_with_weights_beside_it_stays_whole_when_nothing_is_fused(
    cache: Path, tmp_path: Path
) -> None:
    model = text_model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=normal(4, 3))
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = tmp_path / "in" / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="net.weights", size_threshold=0)
    report = driver.fuse(path, tmp_path / "out" / "net.onnx", options_for(cache))
    assert report.library is None
    assert_equivalent(report, {"x": normal(5, 4)})


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 15, 17, 18, 19, 20, 21, 22, 23])
def test_every_opset_goes_through(opset: int, fuse: Callable[..., Report]) -> None:
    axes = "<axes: ints = [-1]> (t)" if opset < 18 else "(t, axes)"
    weights = SCALARS | ({"axes": np.array([-1], np.int64)} if opset >= 18 else {})
    report = fuse(
        text_model(
            "g (float[N, 64] x) => (float[N, 64] y) "
            f"{{ t = Mul(x, scale) m = ReduceMean {axes} s = Sub(t, m) e = Tanh(s) y = Add(e, shift) }}",
            opset,
            **weights,
        )
    )
    assert report.library is not None
    onnx.checker.check_model(str(report.output), full_check=True)
    assert_equivalent(report, {"x": normal(5, 64)})


def test_a_fused_model_can_be_fused_again(fuse: Callable[..., Report], tmp_path: Path) -> None:
    once = fuse(memory_bound.softmax("rows", 48), shapes=shapes_of({"x": (8, 48)}))
    twice = fuse(once.output, shapes=shapes_of({"x": (8, 48)}))
    assert twice.output == tmp_path / "net.fused.fused.onnx"
    onnx.checker.check_model(str(twice.output), full_check=True)
    assert twice.library is not None, "the functions of the first are inlined and fused as the original was"
    assert len(fused_ops(twice.output)) == len(fused_ops(once.output)) == 1
    assert_equivalent(twice, {"x": normal(5, 48)})


def test_metadata_stays(fuse: Callable[..., Report]) -> None:
    model = memory_bound.mish(8, 48)
    model.doc_string, model.graph.doc_string, model.model_version = "the model", "the graph", 7
    model.producer_name, model.producer_version = "someone", "1.2"
    helper.set_model_props(model, {"labels": "a,b", "author": "é"})
    fused = onnx.load(fuse(model).output)
    assert (fused.producer_name, fused.producer_version) == ("someone", "1.2")
    assert (fused.doc_string, fused.graph.doc_string) == ("the model", "the graph")
    assert fused.model_version == 7
    assert {entry.key: entry.value for entry in fused.metadata_props} == {"labels": "a,b", "author": "é"}


NEEDY = text_model(
    f"g (float[N, 64] x, int64[1] shape) => (float[A] w) {{ {CHAIN} w = Reshape(y, shape) }}", **SCALARS
)
"""Runs with a shape that fits alone, which no made-up input does."""


def test_a_model_that_runs_on_no_input_that_is_made_up_goes_through_unfused(
    fuse: Callable[..., Report],
) -> None:
    report = fuse(NEEDY, shapes=shapes_of({"x": (7, 64)}))
    assert report.library is None and report.fused_nodes == 0
    assert report.output.read_bytes() == report.model.read_bytes()
    (warning,) = report.warnings
    assert "Reshape node" in warning and "--inputs" in warning


def test_inputs_of_the_user_make_it_fused(fuse: Callable[..., Report], tmp_path: Path) -> None:
    feeds = {"shape": np.array([-1])}
    np.savez(tmp_path / "own.npz", **feeds)
    report = fuse(NEEDY, shapes=shapes_of({"x": (7, 64)}), inputs=tmp_path / "own.npz")
    assert report.library is not None and not report.warnings
    assert_equivalent(report, feeds | {"x": normal(5, 64)})


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": normal(8, 48)}, "'z', which is no input"),
        ({"x": normal(8, 48).astype(np.float64)}, "float64"),
        ({"x": normal(8, 47)}, "fixes it to 48"),
        (b"no archive", "no .npz file"),
        (b"", "no .npz file"),
        (b"PK\x03\x04 cut off", "no .npz file"),
    ],
)
def test_wrong_inputs_are_wrong_usage(
    arrays: dict[str, np.ndarray] | bytes, words: str, fuse: Callable[..., Report], tmp_path: Path
) -> None:
    path = tmp_path / "own.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    else:
        np.savez(path, **arrays)
    with pytest.raises(UsageError, match=words):
        fuse(memory_bound.mish(8, 48), inputs=path)


# -- what goes wrong leaves everything as it was ------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A model with the results of an earlier run beside it."""
    path = tmp_path / "net.onnx"
    onnx.save(memory_bound.mish(8, 48), path)
    for suffix in (".fused.onnx", ".fused.so"):
        path.with_suffix(suffix).write_text(f"earlier {suffix}")
    return path


def assert_untouched(model: Path) -> None:
    for suffix in (".fused.onnx", ".fused.so"):
        assert model.with_suffix(suffix).read_text() == f"earlier {suffix}"
    assert files(model.parent) == ["net.fused.onnx", "net.fused.so", "net.onnx"]


def test_a_failure_leaves_the_files_of_an_earlier_run(
    earlier: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModelError("the last step fails")

    monkeypatch.setattr("apollo_fuse.onnx_io.write", fail)
    with pytest.raises(ModelError):
        driver.fuse(earlier, options=options_for(cache))
    assert_untouched(earlier)


def test_success_replaces_the_files_of_an_earlier_run(earlier: Path, cache: Path) -> None:
    report = driver.fuse(earlier, options=options_for(cache))
    assert files(earlier.parent) == ["net.fused.onnx", "net.fused.so", "net.onnx"]
    assert_equivalent(report, {"x": normal(8, 48)})


def test_a_full_disk_is_one_line_and_leaves_the_files_of_an_earlier_run(earlier: Path, cache: Path) -> None:
    done = command(
        earlier, "--cache-dir", cache, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    )
    assert_one_line(done, 1, "File")
    assert_untouched(earlier)


def command(
    *arguments: str | Path, limit: Callable[[], None] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command itself, without measuring."""
    words = [sys.executable, "-c", COMMAND, "--no-measure", *map(str, arguments)]
    settings = {key: value for key, value in os.environ.items() if key != "CC"} | environment
    return subprocess.run(words, capture_output=True, text=True, preexec_fn=limit, env=settings)


def assert_one_line(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr and "defect" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert line == done.stderr.splitlines()[-1]
    for word in words:
        assert word in line


GOOD = memory_bound.mish(8, 48).SerializeToString()


@pytest.mark.parametrize("length", [0, 1, 2, 10, 100, len(GOOD) // 2, len(GOOD) - 1])
def test_a_model_that_was_cut_short_is_told(length: int, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(GOOD[:length])
    with pytest.raises(ModelError, match=r"net\.onnx"):
        driver.fuse(path, options=options_for(cache))
    assert files(tmp_path) == ["net.onnx"]


BROKEN = {
    "random bytes": np.random.default_rng(0).bytes(4096),
    "text": b"#!/bin/sh\necho a script\n",
    "a cycle": text_model(
        "g (float[4] x) => (float[4] y) { a = Add(x, b) b = Mul(a, x) y = Neg(b) }"
    ).SerializeToString(),
    "an input that nothing makes": text_model(
        "g (float[4] x) => (float[4] y) { y = Add(x, nowhere) }"
    ).SerializeToString(),
    "an output that nothing makes": text_model(
        "g (float[4] x) => (float[4] z) { y = Add(x, x) }"
    ).SerializeToString(),
    "types that do not fit": text_model(
        "g (float[4] x, int64[4] i) => (float[4] y) { y = Add(x, i) }"
    ).SerializeToString(),
    "shapes that do not fit": text_model(
        "g (float[4] x, float[5] z) => (float[4] y) { y = Add(x, z) }"
    ).SerializeToString(),
    "an unknown operator": text_model(
        "g (float[4] x) => (float[4] y) { y = Frobnicate(x) }"
    ).SerializeToString(),
    "an unknown domain": text_model(
        "g (float[4] x) => (float[4] y) { y = nowhere.Op(x) }"
    ).SerializeToString(),
    "a value that is made twice": text_model(
        "g (float[4] x) => (float[4] y) { y = Neg(x) y = Abs(x) }"
    ).SerializeToString(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_invalid_model_is_told_with_its_path(name: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(BROKEN[name])
    with pytest.raises(ModelError, match=r"net\.onnx"):
        driver.fuse(path, options=options_for(cache))
    assert files(tmp_path) == ["net.onnx"]


def test_weights_that_are_missing_are_told(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(
        networks.bert_layer(hidden=48, heads=4),
        path,
        save_as_external_data=True,
        location="net.weights",
        size_threshold=0,
    )
    (tmp_path / "net.weights").unlink()
    with pytest.raises(ModelError, match=r"net\.weights"):
        driver.fuse(path, options=options_for(cache))
    assert files(tmp_path) == ["net.onnx"]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (InputShape("y", (8, 48)), "is no input"),
        (InputShape("x", (8, 48, 1)), "rank 3"),
        (InputShape("x", (8, 47)), "fixes it to 48"),
    ],
)
def test_a_wrong_shape_is_wrong_usage(shape: InputShape, words: str, earlier: Path, cache: Path) -> None:
    with pytest.raises(UsageError, match=words):
        driver.fuse(earlier, options=options_for(cache, shapes=(shape,)))
    assert_untouched(earlier)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CC": "no-such-compiler"}, "'no-such-compiler'"),
        ({"CC": "false"}, "false"),
        ({"CC": "true"}, "CC"),
    ],
)
def test_a_compiler_that_fails_is_one_line(
    environment: dict[str, str], words: str, earlier: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    done = command(earlier, "--cache-dir", tmp_path_factory.mktemp("cold"), **environment)
    assert_one_line(done, 1, words)
    assert_untouched(earlier)


def test_no_compiler_is_one_line_that_says_how_to_get_one(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ApolloFuseError, match=r"no C compiler was found; install gcc"):
        driver.fuse(earlier, options=options_for(tmp_path.parent / "cold", compiler=None))
    assert_untouched(earlier)


def test_an_output_that_cannot_be_written_is_told_before_the_work_starts(earlier: Path, cache: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        driver.fuse(earlier, earlier.parent / "none" / "out.onnx", options_for(cache))
    with pytest.raises(OutputError, match="is a folder"):
        driver.fuse(earlier, earlier.parent, options_for(cache))
    assert_untouched(earlier)


def test_the_command_writes_the_files_and_says_so(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(memory_bound.mish(8, 48), path)
    done = command(path, "--cache-dir", cache, "--json", tmp_path / "net.json")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "net.fused.onnx") in done.stdout
    assert json.loads((tmp_path / "net.json").read_text())["fused_nodes"] == 1
    assert files(tmp_path) == ["net.fused.onnx", "net.fused.so", "net.json", "net.onnx"]


def test_the_command_says_plainly_that_nothing_was_fused(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(text_model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=normal(4, 3)), path)
    done = command(path, "--cache-dir", cache, "--json", tmp_path / "net.json")
    assert done.returncode == 0, done.stderr
    assert "nothing was fused" in done.stdout and "written unchanged" in done.stdout
    assert json.loads((tmp_path / "net.json").read_text())["library"] is None
