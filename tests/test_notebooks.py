"""Notebooks run from top to bottom, and their saved outputs are from such a run."""

import nbformat
import pytest

import notebooks

each = pytest.mark.parametrize("name", notebooks.ALL)


@each
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    # As in a user's kernel: JAX's own defaults, and as many devices as there are.
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("QUICK", "")
    notebooks.run(name, quick=True, folder=tmp_path)


@each
def test_a_notebook_was_saved_as_it_ran(name):
    notebook = nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = {(x.output_type, x.get("name")) for cell in code for x in cell.outputs}
    assert not outputs & {("error", None), ("stream", "stderr")}
