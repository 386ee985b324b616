"""Plots show the numbers that they are given, and label them."""

import csv

import pytest
from helpers import refusal
from matplotlib.figure import Figure

from rmsprop_jax import plots

# The last column of sgd is "", then None.
TABLE = """\
optimizer,epoch,step,loss,rate/a/kernel,rate/b
rmsprop,1,10,1,1,2
rmsprop,2,20,0.5,2,3
rmsprop,4,40,0.25,4,5
sgd,1,10,2,,
sgd,2,20,1,,
sgd,4,40,0.5
"""
ROWS = list(csv.DictReader(TABLE.splitlines()))


@pytest.fixture
def axes():
    return Figure().subplots()


def drawn(axes):
    return {x.get_label(): x.get_xydata().T.tolist() for x in axes.lines}


def test_training_curves_are_one_line_per_run(axes):
    plots.training_curves(axes, ROWS)
    assert drawn(axes) == {
        "rmsprop: 0.25": [[1, 2, 4], [1, 0.5, 0.25]],
        "sgd: 0.5": [[1, 2, 4], [2, 1, 0.5]],
    }
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
    assert len(axes.get_legend().get_texts()) == 2


def test_layers_are_one_line_each(axes):
    plots.per_layer(axes, ROWS, "rate")
    assert drawn(axes) == {
        "a/kernel": [[10, 20, 40], [1, 2, 4]],
        "b": [[10, 20, 40], [2, 3, 5]],
    }
    assert (axes.get_ylabel(), axes.get_yscale()) == ("rate", "log")


def test_lines_differ_without_color(axes):
    rows = [{"step": i, **{f"rate/{k}": i + k for k in range(20)}} for i in (1, 2)]
    plots.per_layer(axes, rows, "rate")
    assert len({(x.get_linestyle(), x.get_marker()) for x in axes.lines}) == 20


@pytest.mark.parametrize(("eps_in_sqrt", "x"), [(True, 1e-4), (False, 1e-8)])
def test_the_denominator_is_drawn_with_eps(axes, eps_in_sqrt, x):
    histogram = [0, 2**-6, 2**-5, 2, 4, 8], [1, 2, 0, 5, 0]
    plots.denominator(axes, histogram, eps_in_sqrt=eps_in_sqrt)
    shares, edges, _ = axes.patches[0].get_data()
    assert [*edges] == [2**-6, 2**-5, 2, 4, 8] and [*shares] == [25, 0, 62.5, 0]
    line, zero = axes.lines
    assert line.get_xdata()[0] == pytest.approx(x)
    assert zero.get_label() == "zero: 12.5 %"
    low, high = axes.get_xlim()
    assert low < x and high > 4


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_histogram_without_counts_can_be_drawn(axes, eps):
    plots.denominator(axes, ([0.0, 1.0, 2.0], [0, 0]), eps=eps)
    assert len(axes.lines) == (eps > 0)


def test_missing_values_are_named(axes):
    keys = "no row has epoch and accuracy; there are: optimizer, epoch, step, loss"
    with refusal(keys):
        plots.training_curves(axes, ROWS, "accuracy")
    with refusal("no row has step and lr/..."):
        plots.per_layer(axes, ROWS, "lr")
    with refusal("no rows"):
        plots.training_curves(axes, [])
