"""Run the notebooks from top to bottom; with --write, save their outputs.

`python tests/measure/notebooks.py` runs all of them, or those named after it; with
`--quick` they are smaller and take seconds.
"""

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
ALL = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def tidy(notebook):
    """Remove what differs from run to run: execution times, the kernel's name."""
    notebook.metadata = dict(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"),
        language_info=dict(name="python"),
    )
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata.pop("execution", None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=ALL, metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    flags = parser.parse_args()
    # Notebooks read QUICK in their first code cell; "" means no.
    os.environ["QUICK"] = "1" if flags.quick else ""
    for name in flags.names:
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(FOLDER)}}
        options = dict(timeout=1800, coalesce_streams=True)  # of a bar the last line
        NotebookClient(notebook, resources=resources, **options).execute()
        print(f"{name}: {len(notebook.cells)} cells ran", flush=True)
        if flags.write:
            tidy(notebook)
            nbformat.write(notebook, path)
