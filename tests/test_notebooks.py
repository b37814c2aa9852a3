"""The notebooks run in a fresh kernel from first to last cell, and their committed outputs are those of such a run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs/notebooks").glob("*.ipynb"))


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def accuracies(notebook: NotebookNode) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^([\w-]+): ([\d.]+)%$", printed(notebook), re.M)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_the_outputs_of_one_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert "Warning" not in printed(notebook)
    assert path.stat().st_size < 300_000
    for cell in notebook.cells:
        for target in re.findall(r"\]\(([^)#:]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert (path.parent / target).exists(), target


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = NOTEBOOKS
    committed, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # with networks this small, threads wait for each other
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(path.parent)}}).execute()
    found, shown = accuracies(notebook), accuracies(committed)
    assert found["pre-trained"] > found["untrained"] + 3
    assert found == pytest.approx(shown, abs=4)
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 1
    assert float(re.findall(r"largest difference: (.*)", printed(notebook))[0]) < 1e-4
    first, *_, last = map(float, re.findall(r"step \d+: loss ([\d.]+)", printed(notebook)))
    assert last < first
