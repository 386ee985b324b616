"""Files of a run: metrics.csv and two figures."""

import csv
import io

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rmsprop_jax import plots
from rmsprop_jax.demo.cli import write_atomically


def read_metrics(out):
    """Read the rows of metrics.csv; return no rows if it does not exist."""
    path = out / "metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def write_metrics(out, rows):
    """Write metrics.csv."""
    table = io.StringIO()
    # Rows of RMSProp, which come first, have more columns.
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "metrics.csv", table.getvalue())


def draw_curves(out, rows):
    """Plot loss and held-out accuracy against epochs, with one line per optimizer."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        plots.training_curves(axes, rows, name)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.get_legend().set_title("final")
    loss.set(title="Training loss", ylabel="cross-entropy [nats]", yscale="log")
    accuracy.set(title="Held-out accuracy", ylabel="images read correctly")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.savefig(out / "curves.png", dpi=120)


def draw_diagnostics(out, rows, histogram, eps):
    """Plot effective learning rates and update ratios by layer, and denominators."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    rates, ratios, denominators = figure.subplots(1, 3)
    plots.per_layer(rates, rows)
    plots.per_layer(ratios, rows, "update_ratio")
    plots.denominator(denominators, histogram, eps=eps)
    rates.set(title="Effective learning rate: geometric mean", xlim=(0, None))
    ratios.set(title="RMS of the update / RMS of the array", xlim=(0, None))
    denominators.set(title="Denominators at the end")
    figure.savefig(out / "diagnostics.png", dpi=120)
