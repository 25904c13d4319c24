"""Members of a stitch share launches on a GPU, in which each of them has a range of programs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from apollo_fuse import Options, fuse
from apollo_fuse.codegen.stitched import MEMBERS, WRITTEN, Run, runs, writer, writes
from apollo_fuse.codegen.triton.compile import Job, compile_kernels
from apollo_fuse.codegen.triton.emit import Launch, emit_stitched
from apollo_fuse.codegen.triton.stages import stages
from apollo_fuse.gpu import KNOWN, GpuTarget
from apollo_fuse.index import Index
from models import chains, memory_bound
from tests.fusing import reference_session
from tests.interpreted import candidates_of
from tests.stub import Launched, Pretended, Process, Ran, Stub, fused, run
from tests.test_launches import argument_bytes, check

Array = np.ndarray


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(tmp_path_factory.mktemp("stub"))
    yield started
    started.close()


def text_model(inputs: str, outputs: str, body: str) -> onnx.ModelProto:
    text = f"g ({inputs}) => ({outputs}) {{ {body} }}"
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')


def each(count: int, shape: str, body: str) -> onnx.ModelProto:
    """The body `count` times; it makes `z` of `x`, and # is the number of the copy."""
    inputs, outputs = (
        ", ".join(f"float[{shape.replace('#', str(k))}] {name}{k}" for k in range(count)) for name in "xz"
    )
    return text_model(inputs, outputs, " ".join(body.replace("#", str(k)) for k in range(count)))


def feeds_of(model: onnx.ModelProto, shape: Mapping[int, tuple[int, ...]]) -> dict[str, Array]:
    random = np.random.default_rng(0)
    return {
        value.name: random.standard_normal(shape[place]).astype(np.float32)
        for place, value in enumerate(model.graph.input)
    }


def launched(ran: Ran) -> dict[str, int]:
    """How often a kernel was launched: what writes tables, and the others."""
    writing = sum(count for start, count in ran.launched.items() if start.kernel == "write")
    return {"write": writing, "other": ran.launched.total() - writing}


CHAIN = "a# = Mul(x#, x#) b# = Exp(a#) c# = Add(b#, x#) z# = Sqrt(c#)"


def test_many_equal_members_are_one_launch(process: Process, tmp_path: Path) -> None:
    model = each(40, "3, 50", CHAIN)
    ran = check(process, model, feeds_of(model, dict.fromkeys(range(40), (3, 50))), tmp_path)
    assert launched(ran) == {"write": 1, "other": 1}
    assert ran.counts["blocks_given"] == 1


def test_more_members_than_a_launch_has_are_several(process: Process, tmp_path: Path) -> None:
    members = MEMBERS + 20
    model = each(members, "3", CHAIN)
    ran = process(run, model, feeds_of(model, dict.fromkeys(range(members), (3,))), tmp_path)
    assert ran.launched == ran.expected
    assert launched(ran) == {"write": -(-members * 4 // WRITTEN), "other": 2}
    for right, found in ran.outputs:
        np.testing.assert_allclose(found, right, rtol=1e-5)


def with_other_extents(
    stub: Stub, model: onnx.ModelProto, feeds: Mapping[str, Array], others: Mapping[str, Array], folder: Path
) -> tuple[list[Array], dict[str, int]]:
    """What the model, fused for the first feeds, makes of the others."""
    pretended = Pretended()

    def on_launch(what: Launched) -> int:
        pretended.run(what)
        return 0

    path, library, _ = fused(model, folder, feeds, pretended)
    stub.have(80)
    stub.call(on_launch)
    return stub.session(path, library).run(None, dict(others)), stub.counts()


@pytest.mark.parametrize("empty", [(0,), (1, 2), (5,), (0, 1, 2, 3, 4, 5)])
def test_members_of_other_extents_have_ranges_of_their_own(
    empty: tuple[int, ...], process: Process, tmp_path: Path
) -> None:
    model = each(6, "n#, 300", CHAIN)
    feeds = feeds_of(model, {k: (1 + 17 * k, 300) for k in range(6)})
    others = feeds_of(model, {k: (0 if k in empty else 40 - 7 * k, 300) for k in range(6)})
    found, counts = process(with_other_extents, model, feeds, others, tmp_path)
    for ours, right in zip(found, reference_session(model).run(None, others), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5)
    assert counts["launches"] == (1 if len(empty) == 6 else 2)


def test_members_with_scratch_have_their_own(process: Process, tmp_path: Path) -> None:
    body = (
        "m# = ReduceMean<axes=[1]>(x#) s# = Sub(x#, m#) q# = Mul(s#, s#) "
        "v# = ReduceMean<axes=[1]>(q#) r# = Sqrt(v#) z# = Div(s#, r#)"
    )
    model = each(3, "n#, k#", body)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", 13))
    check(process, model, feeds_of(model, {k: (2 + k, 2000 + 100 * k) for k in range(3)}), tmp_path)


def test_different_kernels_are_one_launch_and_keep_their_results(process: Process, tmp_path: Path) -> None:
    bodies = [
        CHAIN,
        "a# = Sigmoid(x#) z# = Mul(a#, x#)",
        "a# = Exp(x#) b# = Add(a#, a#) z# = Neg(b#)",
        "a# = ReduceSum<keepdims=1>(x#) b# = Exp(x#) z# = Div(b#, a#)",
    ]
    inputs, outputs = (", ".join(f"float[n{k}, 40] {name}{k}" for k in range(8)) for name in "xz")
    model = text_model(inputs, outputs, " ".join(bodies[k % 4].replace("#", str(k)) for k in range(8)))
    feeds = feeds_of(model, {k: (3 + k, 40) for k in range(8)})
    ran = check(process, model, feeds, tmp_path)
    kinds = {start.extents: start.module.count("    if kind == ") for start in ran.launched if start.extents}
    assert kinds == {
        (8,): 4,
        (2,): 1,
    }  # the sums of all elements, and with them what is ready; then what divides
    assert launched(ran) == {"write": 1, "other": 2}


JOINED = text_model(
    "float[n, 6] x, float[n, 40] y, float[n, 200] z, float[n, 63] w",
    "float[n, 309] all",
    "a = Exp(x) all = Concat <axis = 1> (a, y, z, w)",
)
"""Rows that four tensors are parts of, each of which a kernel writes."""


def test_kernels_of_one_op_that_write_parts_of_a_tensor_share_a_launch(
    process: Process, tmp_path: Path
) -> None:
    ran = check(process, JOINED, feeds_of(JOINED, {0: (5, 6), 1: (5, 40), 2: (5, 200), 3: (5, 63)}), tmp_path)
    assert launched(ran) == {"write": 1, "other": 1}


def test_kernels_wait_for_what_they_read_and_forms_for_each_other(tmp_path: Path) -> None:
    def found(model: onnx.ModelProto) -> list[tuple[int, ...]]:
        return [stages(candidate.group) for candidate in candidates_of(model, tmp_path)[1]]

    assert found(JOINED) == [(0, 0, 0, 0)]
    assert found(memory_bound.softmax(1, 500_000)) == [(0, 1, 2, 3)]
    assert found(chains.cross_entropy("rows", 1000)) == [(0, 1, 2, 3, 4)]  # two of one form, three of another


def launch(name: str, tensors: int, warps: int = 1, stage: int = 0, items: int = 100_000) -> Launch:
    own = tuple(f"in{k}" for k in range(tensors))
    return Launch(name, own, (), (), None, warps, 1, Index.of(items), 0, stage)


def test_kernels_of_a_stage_share_a_launch_where_their_blocks_are_as_large() -> None:
    launches = {
        "a": [launch("k0", 2), launch("k1", 1, stage=1)],
        "b": [launch("k0", 2)],
        "c": [launch("k0", 2, warps=4)],
    }
    ops = ["a", "b", "c", "a", "c", "b"]
    first = Run(((0, 0), (3, 0), (1, 0), (5, 0)), 1)
    assert runs(ops, launches) == (first, Run(((2, 0), (4, 0)), 4), Run(((0, 1), (3, 1)), 1))
    assert first.kinds(ops) == ((("a", 0), ("b", 0)), 1)


def test_kernels_of_few_programs_take_the_blocks_of_others() -> None:
    few = [launch("k0", 2, warps=4), launch("k1", 2, items=5), launch("k2", 2, warps=8, items=5)]
    assert runs(["a"], {"a": few}) == (Run(((0, 0), (0, 1), (0, 2)), 4),)
    assert runs(["a"], {"a": few[1:] * 2}) == (Run(((0, 0), (0, 1), (0, 2), (0, 3)), 8),)


def test_kernels_of_a_form_that_does_not_run_save_no_launch() -> None:
    one, *others = (launch(f"k{k}", 2) for k in range(3))
    launches = {"a": [one, *(replace(x, form=1) for x in others)]}
    assert all(len(run.members) == 1 for run in runs(["a"], launches))


def test_a_launch_has_so_many_members_at_most() -> None:
    found = runs(["a"] * (MEMBERS + 2), {"a": [launch("k0", 2)]})
    assert [len(run.members) for run in found] == [MEMBERS, 2]


def test_launches_are_shared_where_that_takes_fewer() -> None:
    launches = {"a": [launch("k0", 2)], "b": [launch("k0", 2), launch("k1", WRITTEN, stage=1)]}

    def alone(*ops: str) -> bool:
        return all(len(run.members) == 1 for run in runs(ops, launches))

    assert alone("a", "a")  # one, and one that writes the table
    assert not alone("a", "a", "a")
    assert alone("b", "b", "b")  # 2 launches in place of 6, and 4 for the table


def test_the_table_is_written_in_as_many_launches_as_its_values_take() -> None:
    launches = {"a": [launch("k0", 2)]}
    for members, count in ((120, 1), (121, 2)):
        ops = ["a"] * members
        assert writes(runs(ops, launches), ops, launches) == count


@pytest.mark.parametrize("target", KNOWN, ids=str)
def test_stitched_kernels_take_a_table(target: GpuTarget, tmp_path: Path) -> None:
    _, (candidate,) = candidates_of(memory_bound.softmax("rows", 64), tmp_path)
    program = emit_stitched([(candidate.name, candidate.group, 0)], 4)
    jobs = [Job(program.text, program.launches[0], {}), writer()]
    binary, table = compile_kernels(jobs, target, tmp_path, 2)
    if target.backend == "hip":
        assert argument_bytes(binary.path, "stitch") == 32  # with the room that a number of 32 bits leaves
        assert argument_bytes(table.path, "write") <= 4096
        return
    text = binary.text.read_text()
    assert re.findall(r"\.param (\.u\d+)", text) == [".u64", ".u32", ".u64", ".u64"]
    assert 8 * len(re.findall(r"\.param \.u64", table.text.read_text())) <= 4096
    assert "ld.global.v4" in text  # the tensors are known to be aligned


def test_the_report_counts_what_a_stitch_launches(tmp_path: Path) -> None:
    onnx.save(each(40, "3, 50", CHAIN), tmp_path / "net.onnx")
    options = Options(target="cpu,cuda:90", measure=False, fuse_all=True, cache_dir=tmp_path / "cache")
    options = replace(options, dump=tmp_path / "dump")
    report = fuse(tmp_path / "net.onnx", options=options)
    (stitch,) = [kernel for kernel in report.kernels if kernel.members]
    (member,) = [kernel for kernel in report.kernels if not kernel.members]
    together, alone = stitch.gpu["cuda:90"], member.gpu["cuda:90"]
    assert (together.launches, alone.launches) == (2, 1)
    assert together.compulsory_bytes == 40 * alone.compulsory_bytes
    assert alone.predicted_us < together.predicted_us < 5 * alone.predicted_us
    (written,) = (tmp_path / "dump").glob("Stitched_40_*.0.triton.py")
    assert "number, own, kind = af.member(members, count)" in written.read_text()
