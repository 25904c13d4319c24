"""`apollo_fuse.feeds`: the shapes and values of made-up inputs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_fuse.errors import NoFeedsError, UsageError
from apollo_fuse.feeds import Dimension, Input, inputs_of, make_feeds, resolve_shapes, runnable_feeds

FLOAT = np.dtype(np.float32)


def value(name: str, *shape: Dimension, dtype: np.dtype[np.generic] = FLOAT) -> Input:
    return Input(name, dtype, shape)


def model_of(signature: str, body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g {signature} {{ {body} }}')


def test_a_model_and_its_session_have_the_same_inputs() -> None:
    model = model_of(
        "(float[N, 3, ?] x, int64[N] ids, bool b, bfloat16[2] h) "
        "=> (float[N, 3, ?] y, int64[N] i, bool c, bfloat16[2] k)",
        "y = Relu(x) i = Identity(ids) c = Identity(b) k = Identity(h)",
    )
    found = inputs_of(model)
    assert [(each.name, each.dtype) for each in found] == [
        ("x", FLOAT),
        ("ids", np.dtype(np.int64)),
        ("b", np.dtype(np.bool_)),
        ("h", np.dtype(ml_dtypes.bfloat16)),
    ]
    assert found[0].shape == ("N", 3, None)
    session = inputs_of(ort.InferenceSession(model.SerializeToString()))
    assert session == (*found[:2], Input("b", np.dtype(np.bool_), None), found[3])


def test_an_initialiser_is_no_input() -> None:
    model = model_of("(float[2] x, float[2] w) => (float[2] y)", "y = Add(x, w)")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    assert [each.name for each in inputs_of(model)] == ["x"]


def test_an_input_of_strings_is_refused_by_name() -> None:
    model = model_of("(string[2] text) => (string[2] y)", "y = Identity(text)")
    for source in (model, ort.InferenceSession(model.SerializeToString())):
        with pytest.raises(UsageError, match="'text' is of type .*string"):
            inputs_of(source)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("N", 3, "H", "W"), (1, 3, 224, 224)),
        ((None, None, None, 3), (1, 224, 224, 3)),
        ((None, 512, None, None), (1, 512, 64, 64)),
        (("batch", "sequence"), (1, 64)),
        ((2, "batch", 128), (2, 64, 128)),
        ((), ()),
    ],
)
def test_defaults(shape: tuple[Dimension, ...], expected: tuple[int, ...]) -> None:
    assert resolve_shapes([value("x", *shape)], {}) == {"x": expected}


def test_a_name_that_is_a_batch_anywhere_is_a_batch_everywhere() -> None:
    inputs = [value("state", 2, "batch", 128), value("input", "batch", "samples")]
    for order in (inputs, inputs[::-1]):
        assert resolve_shapes(order, {}) == {"state": (2, 1, 128), "input": (1, 64)}


def test_a_given_shape_sets_equal_names_of_other_inputs() -> None:
    inputs = [value("mask", "batch", "sequence"), value("ids", "batch", "sequence"), value("z", None)]
    resolved = resolve_shapes(inputs, {"ids": (8, 128)})
    assert resolved == {"mask": (8, 128), "ids": (8, 128), "z": (1,)}


def test_an_empty_dimension_can_be_given() -> None:
    assert make_feeds([value("x", "N", 3)], {"x": (0, 3)})["x"].shape == (0, 3)


def test_unknown_ranks_and_question_marks_bind_nothing() -> None:
    model = model_of("(float[?, ?] x) => (float[?, ?] y)", "y = Relu(x)")
    for dimension in model.graph.input[0].type.tensor_type.shape.dim:
        dimension.dim_param = "?"
    assert make_feeds(model, {"x": (48, 192)})["x"].shape == (48, 192)
    assert resolve_shapes([Input("x", FLOAT, None)], {"x": (4, 5, 6)}) == {"x": (4, 5, 6)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"nothing": (1,)}, r"'nothing', which is no input; the model's inputs: x \(float32\[N, 3\]\), y"),
        ({"x": (1, 2, 3)}, r"input 'x': shape 1x2x3 has rank 3; expected rank 2: x \(float32\[N, 3\]\)"),
        ({"x": (1, 4)}, r"input 'x': shape 1x4 has 4 at dimension 1; the model fixes it to 3"),
        ({"x": (2, 3), "y": (5, 5)}, r"input 'y': .* 5 at dimension 0 \(N\); expected 2, as input 'x' has"),
        ({"y": (5, 6)}, r"input 'y': .* 6 at dimension 1 \(N\); expected 5, as another dimension of it"),
        ({"x": (-1, 3)}, r"input 'x': shape -1x3 has a negative extent"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_feeds([value("x", "N", 3), value("y", "N", "N")], shapes)


def test_values_depend_on_the_seed_and_the_name_alone() -> None:
    both = make_feeds([value("x", 5), value("y", 5)], seed=3)
    again = make_feeds([value("y", 5)], seed=3)
    np.testing.assert_array_equal(both["y"], again["y"])
    assert not np.array_equal(both["x"], both["y"])
    assert not np.array_equal(both["y"], make_feeds([value("y", 5)], seed=4)["y"])


def test_integers_suit_what_they_stand_for() -> None:
    inputs = [
        value("input_ids", 1000, dtype=np.dtype(np.int64)),
        value("attention_mask", 1000, dtype=np.dtype(np.int64)),
        value("token_type_ids", 1000, dtype=np.dtype(np.int32)),
        value("picture", 5000, dtype=np.dtype(np.uint8)),
        value("flag", 1000, dtype=np.dtype(np.bool_)),
    ]
    feeds = make_feeds(inputs)
    assert set(feeds["input_ids"].tolist()) == set(range(8))
    assert set(feeds["attention_mask"].tolist()) == {0, 1}
    assert set(feeds["token_type_ids"].tolist()) == {0, 1}
    assert (feeds["picture"].min(), feeds["picture"].max()) == (0, 255)
    assert set(feeds["flag"].tolist()) == {False, True}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_edge_values_hold_what_breaks_careless_arithmetic(dtype: type[np.generic]) -> None:
    found = make_feeds([value("x", 2000, dtype=np.dtype(dtype))], kind="edge")["x"]
    limits = ml_dtypes.finfo(dtype)
    assert found.dtype == dtype
    wide = found.astype(np.float64)
    assert np.isnan(wide).any() and np.isposinf(wide).any() and np.isneginf(wide).any()
    assert (np.signbit(wide) & (wide == 0)).any()
    assert ((wide != 0) & (np.abs(wide) < float(limits.tiny))).any()
    assert (wide == float(limits.max)).any()
    assert 0.5 < np.isfinite(wide).mean() < 1.0


@settings(deadline=None)
@given(
    shape=st.lists(st.one_of(st.integers(0, 4), st.sampled_from(["a", "b"]), st.none()), max_size=4),
    dtype=st.sampled_from([np.float32, np.float16, np.int64, np.int8, np.uint8, np.bool_]),
    kind=st.sampled_from(["random", "edge", "zeros", "ones"]),
)
def test_every_array_has_the_resolved_shape_and_the_type(shape, dtype, kind) -> None:  # type: ignore[no-untyped-def]
    given_value = value("x", *[2 if size is None else size for size in shape], dtype=np.dtype(dtype))
    found = make_feeds([given_value], kind=kind)["x"]
    assert found.dtype == dtype
    assert found.shape == resolve_shapes([given_value], {})["x"]
    if kind in ("zeros", "ones"):
        assert (found == (kind == "ones")).all()


def test_what_runs_on_no_made_up_inputs_is_refused_with_the_extents_that_were_tried() -> None:
    model = model_of(
        "(float[N, M] x, int64 rate) => (float[K, L] y, int64 r)",
        'pads = Constant <value_ints=[0, 96, 0, 0]> () y = Pad <mode="reflect"> (x, pads) r = Identity(rate)',
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(NoFeedsError, match="no inputs made up for x:1,64, rate:scalar .*96"):
        runnable_feeds(session, {}, 0)
    assert runnable_feeds(session, {"x": (2, 100)}, 0)["x"].shape == (2, 100)
