"""Runs the notebook and stores it with what it measured: ``python -m notebooks.run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  # a first import writes of its cache: not into the notebook
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from apollo_fuse.atomic import write_text

NOTEBOOK = Path(__file__).with_name("fused_vs_unfused.ipynb")
MODEL_SETS = ("small", "full")
PARAMETERS = "parameters"
"""The tag of the cell that chooses the set of models."""

_CELL_SECONDS = 1800
"""A cell that takes longer hangs."""


def execute(model_set: str) -> nbformat.NotebookNode:
    """The notebook with new outputs. Raises CellExecutionError with the traceback of a cell that fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", ()))
    parameters.source = f'MODEL_SET = "{model_set}"  # or {" or ".join(set(MODEL_SETS) - {model_set})}'
    client = NotebookClient(
        notebook,
        timeout=_CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute()
    return notebook


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m notebooks.run", description=__doc__)
    parser.add_argument("--set", choices=MODEL_SETS, default="full", help="the models to measure")
    parser.add_argument("--output", type=Path, default=NOTEBOOK, metavar="FILE", help="where to store it")
    chosen = parser.parse_args(arguments)
    try:
        notebook = execute(chosen.set)
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    write_text(chosen.output, nbformat.writes(notebook) + "\n")
    print(f"wrote {chosen.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
