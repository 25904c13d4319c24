"""Members of a stitch share launches on a GPU: each kernel is one, and each member a range of programs."""

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
from apollo_fuse.codegen.stitched import MEMBERS, WRITTEN, runs, shares, writer, writes
from apollo_fuse.codegen.triton.compile import Job, compile_kernels
from apollo_fuse.codegen.triton.emit import Launch, Program, emit
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.index import ONE
from apollo_fuse.passes.parallelism_stitching import ParallelismStitching
from models import memory_bound
from tests.fusing import reference_session
from tests.interpreted import candidates_of
from tests.stub import Launched, Pretended, Process, Ran, Stub, fused, patched, run
from tests.test_launches import check

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


def run_wide(stub: Stub, model: onnx.ModelProto, feeds: Mapping[str, Array], folder: Path) -> Ran:
    """As `run`, with stitches of more tensors than there ever are."""
    with patched(ParallelismStitching.__init__, "__defaults__", (4 * MEMBERS,)):
        return run(stub, model, feeds, folder)


def test_more_members_than_a_launch_has_are_several(process: Process, tmp_path: Path) -> None:
    members = MEMBERS + 20
    model = each(members, "3", CHAIN)
    ran = process(run_wide, model, feeds_of(model, dict.fromkeys(range(members), (3,))), tmp_path)
    assert ran.launched == ran.expected
    assert launched(ran) == {"write": -(-members * 3 // WRITTEN), "other": 2}
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


def launch(name: str, tensors: int) -> Launch:
    return Launch(name, tuple(f"in{k}" for k in range(tensors)), (), (), None, 1, 1, ONE, 0)


def test_equal_ops_side_by_side_are_a_run() -> None:
    assert list(runs(["a", "a", "b", "a"])) == [("a", 2), ("b", 1), ("a", 1)]
    assert list(runs(["a"] * (MEMBERS + 2))) == [("a", MEMBERS), ("a", 2)]


def test_launches_are_shared_where_that_takes_fewer() -> None:
    launches = {"a": [launch("k0", 2)], "b": [launch("k0", 2), launch("k1", WRITTEN)]}
    assert not shares(["a", "a"], launches)  # one, and one that writes the table
    assert shares(["a", "a", "a"], launches)
    assert shares(["a"] * 160, launches) and writes(["a"] * 160, launches) == 1
    assert writes(["a"] * 161, launches) == 2
    assert not shares(["b", "b", "b"], launches)  # 2 launches in place of 6, and 4 for the table
    assert not shares(["a", "b"], launches)


def test_a_stitched_kernel_takes_a_table(tmp_path: Path) -> None:
    _, (candidate,) = candidates_of(memory_bound.softmax("rows", 64), tmp_path)
    program = emit(candidate.group, candidate.name, candidate.name, stitched=True)
    assert isinstance(program, Program)
    group = candidate.group
    job = Job(program.text, program.launches[0], {v.name: v.dtype for v in (*group.inputs, *group.outputs)})
    written = writer()
    (binary, table) = compile_kernels([job, written], GpuTarget("cuda", "90"), tmp_path, 2)
    kinds = re.findall(r"\.param (\.u\d+)", binary.text.read_text())
    assert kinds == [".u64", ".u32", ".u64", ".u64"]
    bytes_ = {".u64": 8, ".u32": 4}
    assert sum(bytes_[kind] for kind in re.findall(r"\.param (\.u\d+)", table.text.read_text())) <= 4096
    assert "ld.global.v4" in binary.text.read_text()  # rows that are a multiple of 16 bytes apart


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
    (written,) = (tmp_path / "dump").glob("*.stitched.triton.py")
    assert "number, own = af.member(members, count, " in written.read_text()
