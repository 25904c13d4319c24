"""The cost model: what is counted exactly, what can only grow, and what it makes of --no-measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from apollo_fuse import InputShape, Options, cli, driver, onnx_io
from apollo_fuse.cost import bound, cost_of, cost_of_stitch
from apollo_fuse.cpu import KNOWN, Cpu
from apollo_fuse.descriptions import a100, generic, h100, mi300x
from apollo_fuse.index import ONE, ZERO, Index, Symbol
from apollo_fuse.kernel import KernelGroup, Scope
from apollo_fuse.machine import FUNCTIONS, Level, Machine, MachineError, Unit
from apollo_fuse.occupancy import Block, blocks_at_once, occupancy, reached
from apollo_fuse.partition import plan
from apollo_fuse.report import Report
from apollo_fuse.scop import Extent
from apollo_fuse.symbolic import infer_shapes
from apollo_fuse.work import Work, work_of
from models import memory_bound
from tests.test_end_to_end import normal, text_model

CPU = generic(Cpu("x86-64", 4), cores=8)
GPUS = (a100(), h100(), mi300x())


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Callable[[onnx.ModelProto], KernelGroup]:
    """The only kernel group of a model."""

    def run(model: onnx.ModelProto) -> KernelGroup:
        folder = tmp_path_factory.mktemp("net")
        onnx.save(model, folder / "net.onnx")
        clean = onnx_io.load_clean(folder / "net.onnx", folder)
        infer_shapes(clean)
        (candidate,) = plan(clean, Options(fuse_all=True)).candidates
        return candidate.group

    return run


@pytest.fixture(scope="module")
def softmax(lower: Callable[[onnx.ModelProto], KernelGroup]) -> KernelGroup:
    return lower(memory_bound.softmax("rows", 1024))


@pytest.fixture(scope="module")
def chain(lower: Callable[[onnx.ModelProto], KernelGroup]) -> KernelGroup:
    return lower(
        text_model("g (float[a, b] x) => (float[a, b] y) { t = Exp(x) u = Mul(t, x) y = Add(u, t) }")
    )


def works(group: KernelGroup, sizes: Mapping[Symbol, int], machine: Machine = CPU) -> list[Work]:
    return [work_of(kernel, sizes, machine) for kernel in group.kernels]


def sized(group: KernelGroup, *shape: int) -> dict[Symbol, int]:
    return bound(group, [shape] * len(group.inputs), {})


# -- counting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_a_softmax_moves_its_input_and_its_output_once(softmax: KernelGroup, rows: int) -> None:
    (work,) = works(softmax, sized(softmax, rows, 1024))
    assert work.items == rows
    assert work.compulsory == 2 * rows * 1024 * 4


def test_a_softmax_reads_its_row_twice_from_the_nearest_cache(softmax: KernelGroup) -> None:
    (work,) = works(softmax, sized(softmax, 512, 1024))
    accessed = {(t.scope, t.is_write): t.accessed for t in work.traffic}
    assert accessed[Scope.GLOBAL, False] == 2 * 512 * 1024 * 4
    assert accessed[Scope.GLOBAL, True] == 512 * 1024 * 4
    shared = sum(t.touched for t in work.traffic if t.scope is Scope.SHARED and not t.is_write)
    assert shared == work.item_bytes - 2 * 4 == 1024 * 4  # the row, beside a maximum and a sum


def test_a_softmax_has_one_exponential_an_element(softmax: KernelGroup) -> None:
    (work,) = works(softmax, sized(softmax, 512, 1024))
    exponentials = sum(s.turns * s.operations.get((Unit.EXP, 4), 0) for s in work.stretches)
    assert exponentials == 512 * 1024


def test_what_a_row_is_divided_by_is_computed_once_a_row(softmax: KernelGroup) -> None:
    (work,) = works(softmax, sized(softmax, 512, 1024))
    assert not any((Unit.DIVIDE, 4) in s.operations for s in work.stretches if s.is_loop)


def test_a_ragged_tile_counts_the_elements_that_there_are(chain: KernelGroup) -> None:
    (work,) = works(chain, sized(chain, 3, 1111))
    assert sum(s.turns for s in work.stretches if s.is_loop) == pytest.approx(3 * 1111)
    assert work.compulsory == 2 * 3 * 1111 * 4


def test_only_c_has_a_last_vector_that_starts_early(
    lower: Callable[[onnx.ModelProto], KernelGroup],
) -> None:
    group = lower(text_model("g (float[a, 30] x) => (float[a, 30] y) { y = Softmax(x) }"))
    on_cpus, on_gpus = works(group, {}), works(group, {}, GPUS[0])
    assert any(s.is_covered for work in on_cpus for s in work.stretches)
    assert not any(s.is_covered for work in on_gpus for s in work.stretches)


def test_a_broadcast_operand_is_touched_once_and_read_by_every_row(
    lower: Callable[[onnx.ModelProto], KernelGroup],
) -> None:
    group = lower(
        text_model("g (float[64, 96] x) => (float[64, 96] y) { t = Add(x, w) y = Tanh(t) }", w=normal(96))
    )
    shapes = [(64, 96) if len(value.shape) == 2 else (96,) for value in group.inputs]
    (work,) = works(group, bound(group, shapes, {}))
    (operand,) = (t for t in work.traffic if t.touched == 96 * 4)
    assert operand.accessed == 64 * 96 * 4
    assert work.compulsory == (2 * 64 * 96 + 96) * 4


def test_every_second_column_moves_whole_lines(lower: Callable[[onnx.ModelProto], KernelGroup]) -> None:
    text = """g (float[64, 128] x) => (float[64, 64] y) {
        start = Constant<value_ints = [0]>() end = Constant<value_ints = [128]>()
        axis = Constant<value_ints = [1]>() step = Constant<value_ints = [2]>()
        t = Slice(x, start, end, axis, step) y = Tanh(t) }"""
    (work,) = works(lower(text_model(text)), {})
    (read,) = (t for t in work.traffic if not t.is_write)
    assert (read.touched, read.lines) == (64 * 64 * 4, 64 * 64 * 8)


def test_a_gather_touches_no_more_rows_than_there_are(
    lower: Callable[[onnx.ModelProto], KernelGroup],
) -> None:
    text = "g (float[10, 32] table, int64[n] ids) => (float[n, 32] y) { t = Gather(table, ids) y = Tanh(t) }"
    group = lower(text_model(text))
    (place,) = (p for p, v in enumerate(group.inputs) if len(v.shape) == 1)
    shapes = [(10, 32), (10, 32)]
    shapes[place] = (100,)  # type: ignore[call-overload]
    (work,) = works(group, bound(group, shapes, {}))
    (table,) = (t for t in work.traffic if not t.is_write and t.buffer != f"in{place}")
    assert table.touched == 10 * 32 * 4
    assert table.accessed == 100 * 32 * 4


@pytest.mark.parametrize(
    ("apart", "unit"), [(1, Unit.LOAD), (2, Unit.STRIDED), (4, Unit.STRIDED), (5, Unit.GATHER)]
)
def test_elements_near_each_other_are_shuffled_out_of_vectors(
    lower: Callable[[onnx.ModelProto], KernelGroup], apart: int, unit: Unit
) -> None:
    group = lower(
        text_model(
            f"""g (float[a, 640] x) => (float[a, {640 // apart}] y)
            <int64[1] a = {{0}}, int64[1] b = {{640}}, int64[1] c = {{1}}, int64[1] d = {{{apart}}}>
            {{ s = Slice(x, a, b, c, d) y = Exp(s) }}"""
        )
    )
    (stretch,) = (s for work in works(group, sized(group, 4, 640)) for s in work.stretches if s.is_loop)
    assert (unit, 4) in stretch.operations


@pytest.mark.parametrize(
    ("extent", "lanes", "halves"),
    [
        ("32", 32, 4),
        ("16", 16, 2),
        ("14", 14, 2),
        ("24", 24, 3),
        ("17", 17, 3),
        ("c", 14, 1 + 6),
        ("c", 7, 7),
    ],
)
def test_rows_that_fill_no_vector_take_what_compilers_make_of_them(
    lower: Callable[[onnx.ModelProto], KernelGroup], extent: str, lanes: int, halves: int
) -> None:
    """Whole vectors, halves and single elements, of which each takes half as long as a vector of 16.

    A half that starts early does what is left behind 8 lanes and more.
    """
    steps = " ".join(f"t{n + 1} = {'Mul' if n % 2 else 'Add'}(t{n}, b)" for n in range(1, 11))
    group = lower(
        text_model(
            f"g (float[a, 2, {extent}] x, float[2, 1] b) => (float[a, 2, {extent}] y) "
            f"{{ t1 = Add(x, b) {steps} y = Add(t11, b) }}"
        )
    )
    cost = cost_of(group, bound(group, [(64, 2, lanes), (2, 1)], {}), CPU, 1)
    assert cost.core == pytest.approx(64 * 2 * 8 * halves * 12 * CPU.of(Unit.SIMPLE, 4), rel=0.02)


# -- what can only grow ------------------------------------------------------------------------------

EXTENT = st.integers(1, 4096)


@given(rows=EXTENT, more=st.integers(0, 4096), threads=st.integers(1, 8))
def test_more_rows_are_never_cheaper(softmax: KernelGroup, rows: int, more: int, threads: int) -> None:
    few, many = (cost_of(softmax, sized(softmax, n, 1024), CPU, threads) for n in (rows, rows + more))
    assert many.core >= few.core and many.compulsory >= few.compulsory
    assert all(many.moved[level] >= few.moved[level] for level in few.moved)
    if threads == 1:
        assert many.seconds >= few.seconds


@given(rows=EXTENT, columns=EXTENT)
def test_more_columns_are_never_cheaper_by_whole_vectors(chain: KernelGroup, rows: int, columns: int) -> None:
    few, many = (cost_of(chain, sized(chain, rows, 16 * n), CPU, 1).seconds for n in (columns, columns + 1))
    assert many >= few * (1 - 1e-9)


@given(rows=EXTENT, count=st.integers(1, 64))
def test_sharing_a_launch_moves_no_more(chain: KernelGroup, rows: int, count: int) -> None:
    """However much all of them touch: between the runs of one by itself the others come as well."""
    sizes = sized(chain, rows, 1024)
    alone, together = cost_of(chain, sizes, CPU, 1), cost_of_stitch([(chain, sizes)] * count, CPU, 1)
    assert together.elapsed == pytest.approx(count * alone.elapsed, rel=1e-3)


@given(rows=EXTENT, columns=EXTENT, threads=st.integers(1, 7))
def test_another_thread_is_worth_no_more_than_it_takes_to_have_it(
    chain: KernelGroup, rows: int, columns: int, threads: int
) -> None:
    few, many = (cost_of(chain, sized(chain, rows, columns), CPU, n).seconds for n in (threads, threads + 1))
    assert many <= few + CPU.launch + 1e-12


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_twice_the_threads_are_faster_where_there_is_work_for_all(softmax: KernelGroup, threads: int) -> None:
    sizes = sized(softmax, 4096, 1024)
    few, many = (cost_of(softmax, sizes, CPU, n).seconds for n in (threads, 2 * threads))
    assert many < few


@given(rows=EXTENT, columns=EXTENT, factor=st.floats(1, 100))
def test_slower_memory_is_never_faster(chain: KernelGroup, rows: int, columns: int, factor: float) -> None:
    levels = tuple(
        replace(x, read=x.read / factor, write=x.write / factor, most=x.most and x.most / factor)
        for x in CPU.levels
    )
    sizes = sized(chain, rows, columns)
    slow, fast = (cost_of(chain, sizes, m, 1).seconds for m in (replace(CPU, levels=levels), CPU))
    assert slow >= fast * (1 - 1e-12)


def test_neither_the_core_nor_memory_hides_all_of_the_other(chain: KernelGroup) -> None:
    cost = cost_of(chain, sized(chain, 4096, 1024), CPU, 1)
    longest = max(cost.core, *cost.memory.values())
    assert longest + cost.starts < cost.elapsed <= 2**0.25 * longest + cost.starts


@pytest.mark.parametrize(("hidden", "beside"), [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)])
def test_a_division_hides_so_much_of_what_is_beside_it(
    lower: Callable[[onnx.ModelProto], KernelGroup], hidden: float, beside: float
) -> None:
    group = lower(
        text_model("g (float[a, b] x) => (float[a, b] y) { t = Div(x, x) u = Add(t, x) y = Mul(u, x) }")
    )
    machine = replace(CPU, hidden=hidden)
    cost = cost_of(group, sized(group, 16, 1024), machine, 1)
    each = CPU.of(Unit.DIVIDE, 4) + beside * 2 * CPU.of(Unit.SIMPLE, 4)
    assert cost.core == pytest.approx(16 * 1024 * each)


@given(rows=EXTENT, factor=st.floats(1, 100), unit=st.sampled_from(sorted(Unit, key=lambda u: u.value)))
def test_a_slower_operation_is_never_faster(
    softmax: KernelGroup, rows: int, factor: float, unit: Unit
) -> None:
    seconds = {key: value * (factor if key[0] is unit else 1.0) for key, value in CPU.seconds.items()}
    sizes = sized(softmax, rows, 1024)
    slow, fast = (cost_of(softmax, sizes, m, 2).seconds for m in (replace(CPU, seconds=seconds), CPU))
    assert slow >= fast * (1 - 1e-12)


def test_nothing_to_do_costs_the_call(softmax: KernelGroup) -> None:
    cost = cost_of(softmax, sized(softmax, 0, 1024), CPU)
    assert cost.elapsed == pytest.approx(0.0, abs=1e-12)
    assert cost.seconds == CPU.node + 2 * CPU.argument


def test_a_cost_says_what_it_is_bound_by(softmax: KernelGroup, chain: KernelGroup) -> None:
    functions = cost_of(softmax, sized(softmax, 512, 1024), CPU, 1)
    assert functions.bound_by == "operations"
    slow = Level("memory", None, True, 1e9, 1e9, 1e9)
    stream = cost_of(chain, sized(chain, 8192, 4096), replace(CPU, levels=(*CPU.levels[:-1], slow)), 1)
    assert stream.bound_by == "memory" and "bound by memory" in str(stream)
    assert cost_of(chain, sized(chain, 1, 8), CPU, 1).bound_by == "the call"


# -- machines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [*map(generic, KNOWN), *GPUS], ids=lambda machine: machine.name)
def test_a_description_is_whole_and_plausible(machine: Machine) -> None:
    for unit in Unit:
        for size in (1, 2, 4, 8):
            assert 0 < machine.of(unit, size) < 1e-7
    for nearer, further in zip(machine.levels, machine.levels[1:], strict=False):
        assert nearer.bandwidth(nearer.read, machine.cores) >= further.bandwidth(further.read, machine.cores)
    assert machine.source
    assert all(machine.of(unit, 4) >= machine.of(Unit.SIMPLE, 4) for unit in FUNCTIONS)


@given(st.sampled_from([(2, 1), (3, 2), (4, 3)]))
def test_a_higher_level_computes_faster(levels: tuple[int, int]) -> None:
    higher, lower = (generic(Cpu("x86-64", level)) for level in levels)
    assert all(higher.of(unit, 4) <= lower.of(unit, 4) for unit in Unit)


@pytest.mark.parametrize(
    ("machine", "lanes", "clock", "bandwidth"),
    [(a100(), 64, 1.41e9, 2.039e12), (h100(), 128, 1.98e9, 3.35e12), (mi300x(), 128, 2.1e9, 5.3e12)],
    ids=lambda value: value.name if isinstance(value, Machine) else None,
)
def test_the_figures_of_a_gpu_agree_with_each_other(
    machine: Machine, lanes: int, clock: float, bandwidth: float
) -> None:
    gpu = machine.gpu
    assert gpu is not None
    assert gpu.multiprocessors * lanes * 2 * clock == pytest.approx(gpu.flops, rel=0.01)
    assert machine.levels[-1].most == bandwidth
    assert gpu.flops / bandwidth > 5  # far more operations than bytes: elementwise kernels wait for memory


def test_newer_gpus_run_a_stream_faster(chain: KernelGroup) -> None:
    sizes = sized(chain, 16384, 16384)
    times = [cost_of(chain, sizes, machine).elapsed for machine in GPUS]
    assert times == sorted(times, reverse=True)
    assert all(cost_of(chain, sizes, machine).bound_by == "memory" for machine in GPUS)


def test_a_stream_on_a_gpu_takes_its_bytes_over_the_bandwidth(chain: KernelGroup) -> None:
    cost = cost_of(chain, sized(chain, 16384, 16384), a100())
    assert cost.elapsed == pytest.approx(2 * 16384 * 16384 * 4 / 2.039e12, rel=0.05)


@pytest.mark.parametrize(
    ("block", "blocks", "share"),
    [
        (Block(128, 32), 16, 1.0),
        (Block(128, 255), 2, 0.125),
        (Block(1024, 64), 1, 0.5),
        (Block(128, 32, 100 << 10), 1, 0.0625),
        (Block(2048, 16), 0, 0.0),
    ],
)
def test_the_occupancy_is_that_of_whatever_runs_out_first(block: Block, blocks: int, share: float) -> None:
    gpu = a100().gpu
    assert gpu is not None
    assert blocks_at_once(gpu, block) == blocks
    assert occupancy(gpu, block) == share


def test_one_block_reaches_a_small_part_of_a_gpu_and_many_reach_all() -> None:
    gpu = a100().gpu
    assert gpu is not None
    assert reached(gpu, Block(), 1) < 1 / 500
    assert reached(gpu, Block(), 16 * 108 * 10) == 1.0
    assert reached(gpu, Block(), 0) == 0.0


@pytest.mark.parametrize("sizes", [(None, 1), (8, 4, None), (4, 8)])
def test_levels_that_do_not_grow_are_refused(sizes: tuple[int | None, ...]) -> None:
    levels = tuple(Level("any", size, False, 1e9, 1e9) for size in sizes)
    with pytest.raises(MachineError, match="levels of memory"):
        replace(CPU, levels=levels)


# -- deciding without measuring ----------------------------------------------------------------------


@pytest.fixture
def loser(tmp_path: Path) -> Path:
    """What onnxruntime runs as one operator of its own, on next to nothing."""
    onnx.save(memory_bound.rmsnorm("rows", 48, True), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def decided(path: Path, cache: Path, **choices: object) -> Report:
    settings = {"measure": False, "threads": 2, "cache_dir": cache, "shapes": (InputShape("x", (8, 48)),)}
    return driver.fuse(path, options=Options(**(settings | choices)))  # type: ignore[arg-type]


def test_a_kernel_that_is_predicted_to_lose_is_left_out_with_both_figures(
    loser: Path, tmp_path: Path
) -> None:
    report = decided(loser, tmp_path / "cache")
    (kernel,) = report.kernels
    assert report.library is None and not kernel.accepted
    assert kernel.predicted_us is not None and kernel.predicted_unfused_us is not None
    assert kernel.predicted_us >= kernel.predicted_unfused_us > 0
    assert kernel.reason == (
        f"predicted to take {kernel.predicted_us:.1f} us, and onnxruntime "
        f"{kernel.predicted_unfused_us:.1f} us without it"
    )
    assert kernel.fused_us is None


def test_where_everything_is_to_be_fused_predictions_decide_nothing(loser: Path, tmp_path: Path) -> None:
    report = decided(loser, tmp_path / "cache", fuse_all=True)
    assert report.library is not None and all(kernel.accepted for kernel in report.kernels)


def test_a_kernel_that_is_predicted_to_win_stays(tmp_path: Path) -> None:
    onnx.save(memory_bound.mish(64, 256), tmp_path / "net.onnx")
    (kernel,) = decided(tmp_path / "net.onnx", tmp_path / "cache", shapes=()).kernels
    assert kernel.accepted and "predicted to be" in kernel.reason


def test_what_is_decided_without_measuring_is_the_same_again(tmp_path: Path) -> None:
    onnx.save(memory_bound.rmsnorm("rows", 256), tmp_path / "net.onnx")
    written: list[tuple[bytes, object]] = []
    for turn in ("one", "two"):
        report = decided(tmp_path / "net.onnx", tmp_path / turn, shapes=(InputShape("x", (64, 256)),))
        assert not (tmp_path / turn / "machines").exists()  # no calibration: it differs from run to run
        kernels = report.to_json()["kernels"]
        written.append((report.output.read_bytes(), kernels))
    assert written[0] == written[1]


def test_the_command_explains_predictions_beside_measurements(tmp_path: Path, cache: Path) -> None:
    onnx.save(memory_bound.mish(64, 256), tmp_path / "net.onnx")
    arguments = [tmp_path / "net.onnx", "--cache-dir", cache, "--explain", "--json", tmp_path / "report.json"]
    result = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    (kernel,) = json.loads((tmp_path / "report.json").read_text())["kernels"]
    assert kernel["predicted_us"] > 0 and kernel["predicted_unfused_us"] > 0
    line = f"predicted {kernel['predicted_unfused_us']:.1f} us -> {kernel['predicted_us']:.1f} us"
    assert line in result.output


def test_extents_that_a_tensor_holds_are_read_from_it(chain: KernelGroup) -> None:
    read = Extent(Symbol("n0"), 1, 2, ONE, ZERO, is_element=True)
    half = Extent(Symbol("n1"), 0, 1, Index.of(2), ONE)
    group = replace(chain, extents=(read, half))
    assert bound(group, [(3, 9), (3,)], {1: [7, 8, 5]}) == {Symbol("n0"): 5, Symbol("n1"): 4}
    assert bound(group, [(3, 9), (3,)], {}) == {Symbol("n1"): 4}
