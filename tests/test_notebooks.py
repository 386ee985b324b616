"""Saved outputs of notebooks are from one run, from top to bottom.

CI runs them in whole: `python tests/measure/notebooks.py`.
"""

import nbformat
import pytest

import notebooks


@pytest.mark.parametrize("name", notebooks.ALL)
def test_a_notebook_was_saved_as_it_ran(name):
    notebook = nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = {(x.output_type, x.get("name")) for cell in code for x in cell.outputs}
    assert not outputs & {("error", None), ("stream", "stderr")}
