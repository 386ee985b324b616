"""The README does what it says."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same

from rmsprop_jax import presets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_examples_run_in_order(lenient):
    names = {}
    for code in blocks("python"):
        exec(code, names)
    np.testing.assert_allclose(names["params"]["w"], [1, -2, 3], atol=0.05)
    np.testing.assert_allclose(names["params"]["b"], 4, atol=0.05)


def test_a_torch_run_resumes(lenient):
    pytest.importorskip("torch")
    (code,), names = blocks("python torch"), {}
    exec(code, names)
    saved = names["torch_optimizer"].state_dict()["state"].values()
    weight, bias = (x["square_avg"].numpy() for x in saved)
    assert_same(names["state"].nu, dict(kernel=weight.T, bias=bias))


def test_there_are_two_commands_of_one_line_each():
    command = re.compile(r"python3 -m venv \.venv && .*\n")
    assert [bool(command.fullmatch(x)) for x in blocks("sh")] == [True, True]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_module_preset_and_notebook_is_mentioned():
    folder = ROOT / "rmsprop_jax"
    modules = [*folder.glob("*.py"), *(x.parent for x in folder.glob("*/__init__.py"))]
    for path in (*modules, *ROOT.glob("notebooks/*.ipynb")):
        assert f"({path.relative_to(ROOT)})" in README
    for name in presets.__all__:
        assert f"presets.{name}(" in README
