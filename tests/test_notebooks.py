"""Saved outputs of notebooks are from one run; the experiments of notebook 2 are right.

CI runs the notebooks in whole: `python tests/measure/notebooks.py`.
"""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import experiments
import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import optax
import pytest
import report
import tasks

import notebooks

ROOT = Path(__file__).parents[1]
SAVED = {
    name: nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    for name in notebooks.ALL
}
CODE = {
    name: [cell for cell in saved.cells if cell.cell_type == "code"]
    for name, saved in SAVED.items()
}
SETUP = CODE["1_quickstart"][0].source
EMPTY = tasks.Task(lambda key: jnp.ones(2), lambda data, key, step: None, None)


@pytest.mark.parametrize("name", notebooks.ALL)
def test_a_notebook_was_saved_as_it_ran(name):
    nbformat.validate(SAVED[name])
    code = CODE[name]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = {(x.output_type, x.get("name")) for cell in code for x in cell.outputs}
    assert not outputs & {("error", None), ("stream", "stderr")}


def test_all_notebooks_are_set_up_by_the_same_cell_from_one_repository():
    assert {code[0].source for code in CODE.values()} == {SETUP}
    project = (ROOT / "pyproject.toml").read_text()
    (repository,) = re.findall('"https://github.com/(.*)"', project)
    assert f'REPOSITORY = "https://github.com/{repository}"' in SETUP
    colab = f"https://colab.research.google.com/github/{repository}"
    for name, saved in SAVED.items():
        assert f"({colab}/blob/main/notebooks/{name}.ipynb)" in saved.cells[0].source


def test_tidy_keeps_titles_and_hidden_input_but_no_times():
    cell = nbformat.v4.new_code_cell(metadata={"cellView": "form", "execution": {}})
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebooks.tidy(notebook)
    assert notebook.cells[0].metadata == {"cellView": "form"}


@pytest.fixture
def set_up(monkeypatch):
    """Return a function that runs the cell where only some versions are installed.

    It returns the commands that the cell would run, or with which words it exits.
    """

    def run(folder, versions):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        def record(command):
            commands.append(command)
            return subprocess.CompletedProcess(command, 0)

        commands = []
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(subprocess, "run", record)
        monkeypatch.chdir(folder)
        try:
            exec(SETUP, {})
        except SystemExit as error:
            assert not commands
            return error.code
        return commands

    return run


RUNTIME = {"jax": "0.9.1", "jaxlib": "0.9.1", "numpy": "2.4.0", "optax": "0.2.6"}


def test_setting_up_installs_only_what_is_missing(set_up):
    needed = "rmsprop_jax flax matplotlib orbax-checkpoint scikit-learn tqdm".split()
    assert set_up(ROOT, dict.fromkeys(needed, "9")) == []
    assert Path.cwd() == ROOT / "notebooks"
    (command,) = set_up(ROOT / "notebooks", RUNTIME)
    keep = ["jax==0.9.1", "jaxlib==0.9.1", "numpy==2.4.0"]
    assert command[-4:] == [f"{ROOT}[demo]", *keep]


def test_setting_up_says_what_is_missing_before_it_installs(set_up, tmp_path):
    message = set_up(ROOT, RUNTIME | {"jax": "0.6.2"})
    assert "jax 0.6.2, rmsprop_jax needs jax>=" in message
    if "_OWNER_" in SETUP:
        assert "put the repository into this folder" in set_up(tmp_path, RUNTIME)


def test_every_run_has_its_own_rate_and_seed(lenient):
    task = EMPTY._replace(
        init=lambda key: jax.random.normal(key, (2,)),
        loss=lambda params, batch: (params**2).sum() / 2,
    )
    rates = np.array([[0.1, 0.1, 0.2], [0.01, 0.01, 0.01]])
    losses = experiments.train(task, [optax.sgd, optax.adam], rates, [0, 1, 1], 3)
    # Gradient descent shrinks parameters by 1 - rate a step.
    np.testing.assert_allclose(
        losses[0, :, 1] / losses[0, :, 0], [0.81, 0.81, 0.64], 1e-5
    )
    assert losses[1, 1, 0] == losses[1, 2, 0] != losses[1, 0, 0]
    assert losses[1, 1, 2] == losses[1, 2, 2]


def test_a_diverged_run_has_the_worst_loss(lenient):
    task = EMPTY._replace(loss=lambda params, batch: (params**2).sum())
    losses = experiments.train(task, [optax.sgd], [[1e30]], [0], 4)
    assert losses[0, 0, -1] == experiments.WORST


def test_compare_tunes_to_a_fifth_of_a_decade_and_reports_other_seeds(lenient):
    def sgd(rate):  # its loss is lowest at a rate of 0.03
        error = abs(jnp.log(rate / 0.03))
        return optax.stateless(lambda grads, params: jnp.full_like(params, error))

    task = EMPTY._replace(
        init=lambda key: jax.random.uniform(key, (2,)),
        loss=lambda params, batch: params.sum(),
    )
    runs = experiments.compare(task, {"SGD": sgd}, 2, last=1, tuned_on=1)["SGD"]
    assert abs(np.log10(runs.rate / 0.03)) <= 0.1
    tuned_on = experiments.train(task, [sgd], [[0.1]], [0], 1)
    assert runs.losses.shape == (8, 2) and tuned_on not in runs.losses[:, 0]


def test_turning_the_ravine_changes_nothing_for_gradient_descent(lenient):
    losses = [
        experiments.train(tasks.ravine(degrees), [optax.sgd], [[0.01]], [0], 20)
        for degrees in (0, 45)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_the_adding_problem_is_worth_a_sixth_without_a_signal(lenient):
    task = tasks.adding(20, size=4096)
    inputs, sums = jax.jit(task.batch)((), jax.random.key(0), 0)
    numbers, marks = np.moveaxis(inputs, -1, 0)
    assert (marks.sum(0) == 2).all() and (marks[:10].sum(0) == 1).all()
    np.testing.assert_allclose((numbers * marks).sum(0), sums, 1e-5)
    assert abs(((sums - 1) ** 2).mean() - 1 / 6) < 0.01


def test_labels_drift_at_each_phase_only(lenient):
    task = tasks.drifting(5)
    batch = jax.jit(task.batch)
    labels = [batch(task.data, jax.random.key(0), step)[1] for step in (0, 4, 5)]
    labels = np.asarray(labels)
    assert (labels[0] == labels[1]).all() and (labels[0] != labels[2]).any()


def test_holm_adjusts_as_in_its_definition():
    adjusted = report.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])
    twice = report.holm(np.repeat([0.01, 0.04, 0.03, 0.005], 2), repeats=2)
    np.testing.assert_allclose(twice, np.repeat(adjusted, 2))


def test_a_ratio_is_that_of_geometric_means_by_a_paired_test():
    log_ratios = np.array([0.1, 0.3, 0.2, 0.2])
    both = (np.arange(4.0) + log_ratios, np.arange(4.0))
    result = report.ratio(*(experiments.Runs(1.0, None, x) for x in both))
    # Mean 0.2, standard error 0.0408, and 3.182 of it.
    np.testing.assert_allclose(
        result[:3], np.exp([0.2, 0.2 - 0.1299, 0.2 + 0.1299]), rtol=1e-4
    )
    assert abs(result.p - 0.01628) < 1e-4
