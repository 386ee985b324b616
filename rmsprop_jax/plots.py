"""Plots of a training run, each drawn on matplotlib axes that the caller creates.

Lines differ in style and marker as well as color, for black-and-white printing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

__all__ = ["denominator", "per_layer", "training_curves"]

STYLES, MARKERS = ("-", "--", "-.", ":"), "os^vD"


def training_curves(
    axes: Any,
    rows: Iterable[Mapping[str, Any]],
    value: str = "loss",
    *,
    x: str = "epoch",
    by: str = "optimizer",
) -> None:
    """Plot a logged value over time, one line per run, with last values in the legend.

    Args:
      axes: matplotlib axes.
      rows: one mapping per step, as from `csv.DictReader`; values may be missing.
      value: key of the y-axis.
      x: key of the x-axis.
      by: key of the name of the run.

    Raises:
      ValueError: if no row has both keys.

    Example:
      >>> import matplotlib.figure
      >>> from rmsprop_jax import plots
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> plots.training_curves(axes, [{"epoch": i, "loss": 1 / i} for i in (1, 2, 4)])
      >>> print(axes.get_ylabel(), axes.lines[0].get_ydata())
      loss [1.   0.5  0.25]
    """
    runs, lines = {}, {}
    for row in _complete(rows, x, value):
        runs.setdefault(row.get(by, ""), []).append(row)
    for name, run in runs.items():
        last = f"{float(run[-1][value]):.3g}"
        lines[f"{name}: {last}" if name else last] = run, value
    _draw(axes, lines, x, value)


def per_layer(
    axes: Any,
    rows: Iterable[Mapping[str, Any]],
    value: str = "effective_learning_rate_mean",
    *,
    x: str = "step",
) -> None:
    """Plot a metric of `diagnostics.metrics(..., per_layer=True)`, one line per leaf.

    Args:
      axes: matplotlib axes; the y-axis becomes logarithmic.
      rows: logged metrics, one mapping per step.
      value: name of the metric, without the path of a leaf.
      x: key of the x-axis.

    Raises:
      ValueError: if no row has the metric of a leaf.

    Example:
      >>> import matplotlib.figure
      >>> from rmsprop_jax import plots
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> rows = [{"step": i, "update_rms/a/kernel": 0.1 * i} for i in (1, 2)]
      >>> plots.per_layer(axes, rows, "update_rms")
      >>> print(axes.get_legend_handles_labels()[1])
      ['a/kernel']
    """
    rows, prefix, lines = list(rows), f"{value}/", {}
    keys = dict.fromkeys(k for row in rows for k in row if k.startswith(prefix))
    for key in keys or [f"{prefix}..."]:
        lines[key.removeprefix(prefix)] = _complete(rows, x, key), key
    _draw(axes, lines, x, value)
    axes.set_yscale("log")


def denominator(
    axes: Any,
    histogram: tuple[ArrayLike, ArrayLike],
    *,
    eps: float = 1e-8,
    eps_in_sqrt: bool = True,
) -> None:
    """Plot a histogram of sqrt(nu), and a line at eps, left of which eps dominates.

    Args:
      axes: matplotlib axes; the x-axis becomes logarithmic.
      histogram: edges and counts from `diagnostics.histogram(state)`.
      eps: the `eps` of the optimizer.
      eps_in_sqrt: the `eps_in_sqrt` of the optimizer.

    Raises:
      ValueError: if there is not exactly one more edge than counts.

    Example:
      >>> import matplotlib.figure
      >>> from rmsprop_jax import plots
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> plots.denominator(axes, histogram=([0.0, 0.5, 1.0], [1, 3]))
      >>> print(axes.get_xlabel())
      square root of nu [units of the gradient]
    """
    edges, counts = (np.asarray(x, float) for x in histogram)
    share = 100 * counts / max(counts.sum(), 1)
    # The first bin begins at 0, which a logarithmic axis cannot show.
    axes.stairs(share[1:], edges[1:], fill=True, color="0.75", edgecolor="0.3")
    used = edges[1:-1][share[1:] > 0]
    line = float(np.sqrt(eps) if eps_in_sqrt else eps)
    if line > 0:
        used = np.append(used, line)
        name = "sqrt(eps)" if eps_in_sqrt else "eps"
        axes.axvline(line, color="black", linestyle="--", label=f"{name}: {line:.1g}")
    if used.size:
        axes.set(xscale="log", xlim=(used.min() / 10, used.max() * 10))
    if share[0]:
        axes.plot([], [], " ", label=f"zero: {share[0]:.3g} %")
    axes.set_xlabel("square root of nu [units of the gradient]")
    axes.set_ylabel("coordinates [% per bin]")
    if axes.lines:
        axes.legend()


def _complete(rows, x, value):
    """Return the rows that have both keys; an empty table cell counts as missing."""
    rows = list(rows)
    has = lambda row, key: str(row.get(key, "")) not in ("", "None")
    found = [row for row in rows if has(row, x) and has(row, value)]
    if not found:
        keys = ", ".join(dict.fromkeys(k for row in rows for k in row))
        raise ValueError(f"no row has {x} and {value}; there are: {keys or 'no rows'}.")
    return found


def _draw(axes, lines, x, ylabel):
    """Draw lines, given as {label: (rows, key of the y-axis)}."""
    for label, (rows, key) in lines.items():
        i = len(axes.lines)
        style = STYLES[i % len(STYLES)] + MARKERS[i % len(MARKERS)]
        points = ([float(row[k]) for row in rows] for k in (x, key))
        axes.plot(*points, style, label=label, markersize=3)
    axes.set(xlabel=x.replace("_", " "), ylabel=ylabel.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
