"""Every notebook runs from top to bottom, and the README leads to it."""

import os
from pathlib import Path

import nbformat
import pytest

import notebooks

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("name", notebooks.ALL)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    # As a user's kernel has it: JAX's own defaults, and as many devices as there are.
    monkeypatch.delenv("XLA_FLAGS")
    notebooks.run(name, quick=True, folder=tmp_path)
    assert os.environ["QUICK"] == "1"


@pytest.mark.parametrize("name", notebooks.ALL)
def test_a_notebook_was_kept_as_it_ran(name):
    notebook = nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {x.get("output_type") for cell in code for x in cell.outputs}
    assert kinds <= {"display_data", "execute_result", "stream"}
    streams = [x for cell in code for x in cell.outputs if "name" in x]
    assert not [x.text for x in streams if x.name == "stderr"]
    assert f"notebooks/{name}.ipynb" in README


def test_there_are_notebooks():
    assert 1 <= len(notebooks.ALL) <= 4
