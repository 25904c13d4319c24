"""The notebook runs from its first cell to its last; the stored one was run so, and reads well anywhere."""

from __future__ import annotations

import base64
import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

for package in ("ipykernel", "matplotlib", "nbclient", "networkx"):
    pytest.importorskip(package, reason="the notebook extra is not installed")

import nbformat

import apollo_fuse
import models
from notebooks import graphs, run

ROOT = Path(__file__).parents[1]
FIGURES = 6
FEWEST_TABLES = 7
LARGEST = 1_500_000
"""Bytes of the stored notebook."""
WIDEST = 1_200
"""Pixels of a figure: what a page shows without shrinking it much."""
MACHINE_PATH = re.compile(r"/(home|root|tmp|Users|mnt|opt|var|usr)/\w|/site-packages/")

Node = nbformat.NotebookNode


@pytest.fixture(scope="module", params=["small set", "stored"])
def notebook(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Node:
    """The small set as it runs now, in a folder of its own, and the stored notebook."""
    if request.param == "stored":
        return nbformat.read(run.NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    stored = run.NOTEBOOK.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("APOLLO_FUSE_CACHE_DIR", str(folder / "cache"))
        assert run.main(["--set", "small", "--output", str(folder / "small.ipynb")]) == 0
    assert run.NOTEBOOK.read_bytes() == stored
    return nbformat.read(folder / "small.ipynb", as_version=4)


def code_cells(notebook: Node) -> list[Node]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Node) -> Iterator[Node]:
    for cell in code_cells(notebook):
        yield from cell.outputs


def markdown(notebook: Node) -> list[str]:
    return [o.data["text/markdown"] for o in outputs(notebook) if "text/markdown" in o.get("data", {})]


def test_it_is_a_valid_notebook(notebook: Node) -> None:
    nbformat.validate(notebook)


def test_every_cell_ran_in_order_and_shows_something(notebook: Node) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    silent = [cell for cell in cells if not cell.outputs]
    assert [cell.metadata.get("tags") for cell in silent] == [[run.PARAMETERS]]


def test_no_cell_errs_or_warns(notebook: Node) -> None:
    assert {output.output_type for output in outputs(notebook)} <= {
        "display_data",
        "execute_result",
        "stream",
    }
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []


def test_it_has_all_figures_at_a_sensible_size(notebook: Node) -> None:
    images = [o.data["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert len(images) == FIGURES
    for image in images:
        content = io.BytesIO(base64.b64decode(image))
        assert content.read(16)[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content.read(8))
        assert 300 < width <= WIDEST and 200 < height <= 2 * WIDEST


def test_its_tables_are_markdown_with_as_many_cells_in_each_row(notebook: Node) -> None:
    tables = [text for text in markdown(notebook) if "| --- |" in text]
    assert len(tables) >= FEWEST_TABLES
    for table in tables:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len(rows) >= 3 and len({row.count("|") for row in rows}) == 1, table


def test_it_shows_nothing_that_a_static_page_cannot(notebook: Node) -> None:
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    assert kinds <= {"text/plain", "text/markdown", "image/png"}


def test_it_names_no_path_of_a_machine(notebook: Node) -> None:
    texts = [cell.source for cell in notebook.cells]
    texts += [output.get("text", "") for output in outputs(notebook)]
    texts += [text for o in outputs(notebook) for kind, text in o.get("data", {}).items() if "text" in kind]
    for text in texts:
        assert not MACHINE_PATH.search(text) and str(ROOT) not in text and str(Path.home()) not in text


def test_its_models_are_verified_against_the_original(notebook: Node) -> None:
    (printed,) = [output.text for output in outputs(notebook) if output.output_type == "stream"]
    differences = re.findall(r"largest difference from the original (\S+)", printed)
    assert len(differences) == 2 and all(float(difference) < 1e-3 for difference in differences)


def test_the_stored_notebook_is_the_full_one_and_of_a_reasonable_size() -> None:
    stored = nbformat.read(run.NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in code_cells(stored) if run.PARAMETERS in cell.metadata.get("tags", [])]
    assert parameters.source.startswith('MODEL_SET = "full"')
    assert run.NOTEBOOK.stat().st_size < LARGEST


def test_a_cell_that_fails_ends_the_run_and_nothing_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [nbformat.v4.new_code_cell("MODEL_SET = ''"), nbformat.v4.new_code_cell("1 / 0")]
    cells[0].metadata["tags"] = [run.PARAMETERS]
    monkeypatch.setattr(run, "NOTEBOOK", tmp_path / "failing.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=cells), run.NOTEBOOK)
    assert run.main(["--set", "small", "--output", str(tmp_path / "out.ipynb")]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "out.ipynb").exists()


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> onnx.ModelProto:
    """A network with kernels between its convolutions."""
    folder = tmp_path_factory.mktemp("graphs")
    onnx.save(models.BUILDERS["hardswish_se_net"].function(size=14, blocks=1), folder / "model.onnx")
    options = apollo_fuse.Options(measure=False, fuse_all=True, cache_dir=cache)
    apollo_fuse.fuse(folder / "model.onnx", folder / "fused.onnx", options)
    return onnx.load(folder / "fused.onnx")


def test_the_part_around_a_kernel_is_what_the_kernel_stands_for(fused: onnx.ModelProto) -> None:
    call = next(node for node in fused.graph.node if node.domain == graphs.DOMAIN)
    function = next(function for function in fused.functions if function.name == call.op_type)
    before, after = graphs.around(fused, call.op_type)
    kept = [node.op_type for node in after.nodes if node.op_type != call.op_type]
    inside = [node.op_type for node in function.node if node.op_type != "Constant"]
    assert sorted(node.op_type for node in before.nodes) == sorted([*kept, *inside])
    assert len(before.levels) > len(after.levels) >= 2


def test_all_nodes_are_counted_by_operator(fused: onnx.ModelProto) -> None:
    counts = graphs.operators(fused)
    assert counts["fused kernel"] == sum(node.domain == graphs.DOMAIN for node in fused.graph.node) > 0
    assert counts.total() == sum(node.op_type != "Constant" for node in fused.graph.node)


def test_tensors_have_the_size_of_their_shape_and_type() -> None:
    sizes = graphs.tensor_bytes(models.BUILDERS["rmsnorm"].function(rows=8, columns=32))
    assert sizes["x"] == sizes["out"] == 8 * 32 * 4
    assert sorted(set(sizes.values())) == [8 * 4, 8 * 32 * 4]
