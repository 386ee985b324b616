"""Output of a run: metrics.csv and two figures."""

import csv
import os
import warnings

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rmsprop_jax import plots


def read_metrics(out):
    """Read the rows of metrics.csv; return no rows if it does not exist."""
    path = out / "metrics.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def write_metrics(out, rows):
    """Write metrics.csv atomically: a kill leaves the old file or the new one."""
    temporary = out / "metrics.csv.tmp"
    with temporary.open("w", newline="") as file:
        names = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, out / "metrics.csv")


def draw_curves(out):
    """Plot loss and held-out accuracy against epochs, with one line per optimizer."""
    rows = read_metrics(out)
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = both = figure.subplots(1, 2)
    plots.training_curves(loss, rows, "loss")
    plots.training_curves(accuracy, rows, "accuracy")
    loss.set(ylabel="training loss [nats]", yscale="log")
    accuracy.set(ylabel="held-out accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in both:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("A GRU reading handwritten digits row by row")
    figure.savefig(out / "curves.png", dpi=120)


def draw_diagnostics(out, rows, histogram, eps):
    """Plot effective learning rates and update ratios by layer, and denominators."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    rates, ratios, denominators = figure.subplots(1, 3)
    # With a learning rate of 0, the logarithmic axes are empty.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        plots.per_layer(rates, rows)
        plots.per_layer(ratios, rows, "update_ratio")
    ratios.set(ylabel="RMS of the update / RMS of the array")
    plots.denominator(denominators, histogram, eps=eps)
    for axes in (rates, ratios):
        axes.set_xlim(left=0)
    figure.suptitle("What RMSProp did")
    figure.savefig(out / "diagnostics.png", dpi=120)
