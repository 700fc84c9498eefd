"""docs/quickstart.ipynb, as a reader runs it: from top to bottom, in a kernel of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

INTERRUPTED = """import os
import signal


class Interrupt(Observer):
    def after_step(self, trainer, line):
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)  # what the button for it does


interrupted = qlora.train(**settings, data=train_rows, output_dir=work / "interrupted", observers=[Interrupt()])
interrupted.stopped, interrupted.generate("3 lamps, please.", max_new_tokens=2)"""

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The code of each cell -> its outputs; an error in a cell is raised."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("IPYTHONDIR", str(folder / "ipython"))
        environment.setenv("OMP_NUM_THREADS", "1")
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells.insert(-1, nbformat.v4.new_code_cell(INTERRUPTED))
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    return {cell.source: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def outputs_of(cells: dict[str, Any], start: str) -> Any:
    return next(outputs for source, outputs in cells.items() if start in source)


def texts(outputs: Any, stream: str) -> str:
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == stream)


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(
        not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code"
    )


@pytest.mark.slow
def test_it_runs_and_shows_its_results(cells: dict[str, Any]) -> None:
    assert len(cells) == 13
    frame = outputs_of(cells, "to_pandas")[0].data
    assert "learning_rate" in frame["text/html"]
    picture = outputs_of(cells, "run.plot()")
    assert [set(output.data) >= {"image/png"} for output in picture] == [True]
    assert "stopped after step" in outputs_of(cells, "StopWhenGood")[-1].data["text/plain"]
    assert outputs_of(cells, "run.merge")[-1].data["text/plain"]


@pytest.mark.slow
def test_progress_is_shown_as_lines(cells: dict[str, Any]) -> None:
    """A bar that moves would come as escape codes or a picture of nothing: a notebook is no terminal."""
    outputs = outputs_of(cells, "eval_data=test_rows")
    said = texts(outputs, "stdout")
    assert len(re.findall(r"^step +\d+/24  loss \d+\.\d{4} .* tokens/s", said, re.MULTILINE)) == 24
    assert "step    24/24  held-out loss" in said and "sample 1  prompt" in said
    assert "\x1b" not in said and "\r" not in said
    shown = [output for output in outputs if output.output_type != "stream"]
    assert [output.output_type for output in shown] == ["execute_result"]
    assert re.search(r"<Run in .*: 24 steps, loss \d", shown[0].data["text/plain"])


@pytest.mark.slow
def test_interrupting_the_kernel_returns_the_run_so_far(cells: dict[str, Any]) -> None:
    shown = outputs_of(cells, "class Interrupt")[-1].data["text/plain"]
    assert "stopped after step 3 of 24 (SIGINT); --resume auto goes on from there" in shown
