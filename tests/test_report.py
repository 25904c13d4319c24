"""The report: its JSON keeps to the shipped schema, and its text tells a person what happened."""

import dataclasses
import io
import json
from collections.abc import Callable
from importlib import resources

import jsonschema
import pytest
from rich.console import Console

from apollo_fuse.render import render_compile_seconds, render_explanation, render_summary
from apollo_fuse.report import RefusedReport, Report
from tests.sample_report import FUSED, UNCHANGED

SCHEMA = json.loads(resources.files("apollo_fuse").joinpath("report.schema.json").read_text())


def rendered(render: Callable[[Report, Console], None], report: Report) -> str:
    out = io.StringIO()
    render(report, Console(file=out, width=100, emoji=False))
    return out.getvalue()


def test_the_schema_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("report", [FUSED, UNCHANGED], ids=["fused", "unchanged"])
def test_json_keeps_to_the_schema(report: Report) -> None:
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    jsonschema.validate(written, SCHEMA, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("key", SCHEMA["required"])
def test_the_schema_refuses_a_report_without_a_required_key(key: str) -> None:
    written = FUSED.to_json()
    del written[key]
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(written, SCHEMA)


def test_every_object_of_the_schema_requires_all_its_keys_and_allows_no_others() -> None:
    objects = [SCHEMA, *(part for part in SCHEMA["$defs"].values() if part["type"] == "object")]
    assert len(objects) == 9
    for part in objects:
        assert set(part["required"]) == set(part["properties"])
        assert part["additionalProperties"] is False


def test_json_has_the_values_of_the_report() -> None:
    written = FUSED.to_json()
    assert written["schema_version"] == 1
    assert written["library"] == "net.fused.so"
    assert UNCHANGED.to_json()["library"] is None
    kernels = written["kernels"]
    assert isinstance(kernels, list) and isinstance(kernels[0], dict)
    assert kernels[0]["ops"] == ["Mul", "Add", "Relu"]
    assert written["feedback_rounds"] == [
        {
            "round": 1,
            "forbidden_edges": [["mul_0", "odd[0]"]],
            "regrouped": ["mul_0, odd[0]: isl ran into its limit"],
            "refused": {
                "nodes": ["mul_0", "odd[0]"],
                "rule": "loop_fusion",
                "reason": "isl ran into its limit",
                "evidence": "5 at most",
            },
        }
    ]


def test_numbers_that_json_lacks_become_null() -> None:
    verification = FUSED.to_json()["verification"]
    assert verification == {"passed": True, "cases": 8, "max_abs_error": 1e-6, "max_rel_error": None}


def test_a_value_that_json_lacks_is_an_error() -> None:
    refusal = RefusedReport((), "rule", "reason", evidence=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="object"):
        dataclasses.replace(FUSED, refused=(refusal,)).to_json()


def test_bytes_count_every_place_of_an_accepted_kernel() -> None:
    assert (FUSED.bytes_before, FUSED.bytes_after) == (12 * 6144, 12 * 2048)
    assert (UNCHANGED.bytes_before, UNCHANGED.bytes_after) == (0, 0)


def test_the_summary_of_a_fused_model() -> None:
    lines = [line.split() for line in rendered(render_summary, FUSED).splitlines()]
    assert ["nodes", "60", "36"] in lines
    assert "operators run by onnxruntime 60 24".split() in lines
    assert "fused nodes 0 12 1 distinct kernel".split() in lines
    assert "bytes moved by the fused part 72.0 KiB 24.0 KiB -67 %".split() in lines
    assert "latency 2.000 ms 1.250 ms 1.60x".split() in lines
    assert "2 Conv stays with onnxruntime conv_0, conv_1".split() in lines
    assert "1 isl ran into its limit 5 operations at most (1)".split() in lines
    assert ["Wrote", "net.fused.onnx"] in lines and ["net.fused.so"] in lines


def test_the_summary_says_plainly_that_a_model_was_left_unchanged() -> None:
    text = rendered(render_summary, UNCHANGED)
    assert "the model was written unchanged to net.fused.onnx" in text
    assert "net.fused.so" not in text


def test_the_summary_of_a_model_that_could_not_be_tried_does_not_say_that_nothing_can_be_won() -> None:
    untried = dataclasses.replace(UNCHANGED, kernels=(), warnings=("no inputs",))
    text = rendered(render_summary, untried)
    assert "The model was written unchanged to net.fused.onnx" in text
    assert "won" not in text


def test_the_summary_says_which_layout_was_taken_and_what_the_model_is_bound_to() -> None:
    text = rendered(render_summary, FUSED)
    assert "Layout ort was taken (portable 1.500 ms, ort 1.250 ms)" in text
    assert "made for onnxruntime 1.32.0 and processors with blocks of 16 channels; keep the original" in text
    assert "--layout auto" not in text


def test_the_summary_of_a_portable_model_says_where_another_layout_may_gain() -> None:
    portable = dataclasses.replace(FUSED, layout="portable", made_for=None, layouts=())
    text = rendered(render_summary, portable)
    assert "Kernels beside convolutions were tried in 4 places; --layout auto may gain more there" in text


@pytest.mark.parametrize(
    ("made_for", "gains"), [("onnxruntime 1.32.0", "its layout"), (None, "other operators")]
)
def test_the_summary_of_a_model_that_gains_with_no_kernel(made_for: str | None, gains: str) -> None:
    alone = dataclasses.replace(UNCHANGED, made_for=made_for, without_kernels=True)
    text = rendered(render_summary, alone)
    assert f"Wrote net.fused.onnx, which gains by {gains} alone; it has no library" in text
    assert "unchanged" not in text


def test_the_summary_cuts_long_evidence_that_the_explanation_gives_whole() -> None:
    evidence = f"cannot prove that {' + '.join(f'floor(s{n} / 2)' for n in range(40))} and 1 are equal"
    report = dataclasses.replace(FUSED, refused=(RefusedReport(("n",), "rule", "reason", evidence),))
    assert "s39" not in rendered(render_summary, report)
    assert "... (1)" in rendered(render_summary, report)
    assert evidence in rendered(render_explanation, report)


def test_the_summary_shows_the_largest_refused_groups_first_and_counts_the_rest() -> None:
    refused = tuple(RefusedReport(("n",) * size, "rule", f"reason {size}") for size in range(1, 9))
    text = rendered(render_summary, dataclasses.replace(FUSED, refused=refused))
    assert text.index("reason 8") < text.index("reason 7") < text.index("reason 4")
    assert "reason 3" not in text
    assert "6 3 more reasons --explain lists them".split() in [x.split() for x in text.splitlines()]


def test_the_explanation_gives_kernels_refusals_with_evidence_and_feedback() -> None:
    assert rendered(render_explanation, FUSED) == (
        "Kernels\n"
        "  mul_add_relu: accepted, in 12 places: measured 3.12x as fast as onnxruntime\n"
        "    fuses Mul Add Relu (elementwise, layer I)\n"
        "    x: float32[b, 128], w: float32[128] -> y: float32[b, 128]\n"
        "    moves 6.0 KiB -> 2.0 KiB; takes 12.5 us -> 4.0 us; predicted 11.0 us -> 3.5 us\n"
        "    cuda:90, compiled and not run: predicted 5.2 us, 2 launches, 2.0 KiB from and to memory of "
        "2.0 KiB; 4 warps of 40 registers a thread, 16 B spilled, occupancy 75%\n"
        "  exp: left out: measured slower than onnxruntime\n"
        "    fuses Exp (elementwise, layer I)\n"
        "    x: float32[b, 128], w: float32[128] -> y: float32[b, 128]\n"
        "    moves 6.0 KiB -> 2.0 KiB; takes 3.0 us -> 3.5 us; predicted 11.0 us -> 3.5 us\n"
        "Refused\n"
        "  extract_clusters: Conv stays with onnxruntime (2 nodes)\n"
        "    conv_0, conv_1\n"
        "  loop_fusion: isl ran into its limit (1 node)\n"
        "    5 operations at most: odd[0]\n"
        "Feedback\n"
        "  round 1: loop_fusion: isl ran into its limit (5 at most)\n"
        "    grouped anew: mul_0, odd[0]; not together: mul_0 -> odd[0]\n"
    )


def test_the_explanation_of_a_shared_launch_counts_its_kernels() -> None:
    kernel = dataclasses.replace(
        FUSED.kernels[0], name="Stitched_3_0", layer=3, members=("exp", "mul", "exp"), apart_us=5.0, gpu={}
    )
    text = rendered(render_explanation, dataclasses.replace(FUSED, kernels=(kernel,)))
    assert "    one launch (layer III) of 2 x exp, 1 x mul\n" in text
    assert "takes 12.5 us -> 4.0 us, 5.0 us one by one; predicted" in text and "fuses" not in text


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    refused = (RefusedReport(("[bold]a[/bold]",), "[red]", "[/]:smile:"),)
    odd = dataclasses.replace(FUSED, refused=refused)
    assert "[/]:smile:" in rendered(render_summary, odd)
    assert "[red]" in rendered(render_explanation, odd)
    assert "[/]:smile:" in rendered(render_explanation, odd)
    assert "[bold]a[/bold]" in rendered(render_explanation, odd)


def test_the_compile_time_is_told_by_part() -> None:
    text = rendered(render_compile_seconds, FUSED)
    assert (
        "Compiled in 4.00 s: load 0.25, shapes 0.00, partition 0.25, isl 0.50, codegen 0.25, inputs 0.00, "
        "cc 1.00, gpu 0.00, judge 0.25, verify 0.50, measure 1.00, write 0.00" in text
    )
    assert "apollo-fuse 0.1.0, onnxruntime 1.32.0" in text
    assert "For x86-64-v2, x86-64-v4; verified as code for x86-64-v4" in text
