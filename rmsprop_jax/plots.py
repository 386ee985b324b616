"""Pictures of a run, each drawn on the matplotlib axes that it is given.

Lines differ in style as well as in colour, for print in black and white.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

STYLES, MARKERS = ("-", "--", "-.", ":"), "os^vD"


def training_curves(
    axes: Any,
    rows: Iterable[Mapping[str, Any]],
    value: str = "loss",
    *,
    x: str = "epoch",
    by: str = "optimizer",
) -> None:
    """Draw one value of a run against another, a line for each of several runs.

    Args:
      axes: matplotlib axes.
      rows: what was logged: a mapping for each time, as `csv.DictReader` reads them.
        Rows without the value are left out.
      value: key of what is drawn.
      x: key of what it is drawn against.
      by: key that tells runs apart; what it is and the last value are in the legend.

    Raises:
      ValueError: if no row has both keys.

    Example:
      >>> import matplotlib.figure
      >>> from rmsprop_jax import plots
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> rows = [{"epoch": i, "loss": 1 / i} for i in (1, 2, 4)]
      >>> plots.training_curves(axes, rows)
      >>> print(axes.get_ylabel(), axes.lines[0].get_ydata())
      loss [1.   0.5  0.25]

    References:
      `python -m rmsprop_jax` writes such rows into metrics.csv.
    """
    runs = {}
    for row in _with(rows, x, value):
        runs.setdefault(row.get(by, ""), []).append(row)
    for name, own in runs.items():
        last = f"{float(own[-1][value]):.3g}"
        _line(axes, own, x, value, f"{name}: {last}" if name else last)
    _finish(axes, x, value)


def per_layer(
    axes: Any,
    rows: Iterable[Mapping[str, Any]],
    value: str = "effective_learning_rate_median",
    *,
    x: str = "step",
) -> None:
    """Draw one of `diagnostics.metrics(..., per_layer=True)`, a line for each array.

    Args:
      axes: matplotlib axes.
      rows: what was logged, a mapping for each time.
      value: name without the path of an array.
      x: key of what it is drawn against.

    Raises:
      ValueError: if no row has the value of an array.

    Example:
      >>> import matplotlib.figure
      >>> from rmsprop_jax import plots
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> rows = [{"step": i, "update_rms/a/kernel": 0.1 * i} for i in (1, 2)]
      >>> plots.per_layer(axes, rows, "update_rms")
      >>> print(axes.get_legend_handles_labels()[1])
      ['a/kernel']

    References:
      `rmsprop_jax.diagnostics.metrics`.
    """
    rows = list(rows)
    start = f"{value}/"
    keys = dict.fromkeys(k for row in rows for k in row if k.startswith(start))
    for key in keys or [start + "..."]:
        _line(axes, _with(rows, x, key), x, key, key.removeprefix(start))
    axes.set_yscale("log")
    _finish(axes, x, value)


def denominator(
    axes: Any,
    histogram: tuple[ArrayLike, ArrayLike],
    *,
    eps: float = 1e-8,
    eps_in_sqrt: bool = True,
) -> None:
    """Draw how large the roots of nu are, and eps beside them.

    Left of the line eps is the larger part of the denominator: there, steps shrink with
    the gradient.

    Args:
      axes: matplotlib axes.
      histogram: what `diagnostics.histogram(state)` returned. NaN and infinity are not
        in it, and so not in the shares.
      eps: what `rmsprop` was given.
      eps_in_sqrt: what `rmsprop` was given.

    Raises:
      ValueError: if there is not one edge more than counts.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> from rmsprop_jax import diagnostics, plots, scale_by_rms
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> state = scale_by_rms(initial_scale=0.01).init(jnp.zeros(5))
      >>> plots.denominator(axes, diagnostics.histogram(state))
      >>> print(axes.get_xlabel())
      square root of nu [units of the gradient]

    References:
      v and eps as in `rmsprop_jax.rule`.
    """
    edges, counts = (np.asarray(x, float) for x in histogram)
    share = 100 * counts / max(counts.sum(), 1)
    # The first bin begins at 0, which no logarithmic axis has.
    axes.stairs(share[1:], edges[1:], fill=True, color="0.75", edgecolor="0.3")
    line = float(np.sqrt(eps) if eps_in_sqrt else eps)
    used = edges[1:][np.flatnonzero(share[1:])]
    if line > 0:
        name = "root of eps" if eps_in_sqrt else "eps"
        axes.axvline(line, color="black", linestyle="--", label=f"{name}: {line:.1g}")
        used = np.append(used, line)
    if used.size:
        axes.set_xscale("log")
        axes.set_xlim(used.min() / 10, used.max() * 10)
    if share[0]:
        axes.plot([], [], " ", label=f"exactly 0: {share[0]:.3g} %")
    axes.set(xlabel="square root of nu [units of the gradient]")
    axes.set(ylabel="coordinates [% a bin]")
    if axes.lines:
        axes.legend()


def _with(rows, x, value):
    """Return the rows that have both keys; an empty cell of a table counts as none."""
    rows = list(rows)
    there = lambda cell: cell is not None and str(cell) != ""  # noqa: E731
    found = [row for row in rows if there(row.get(x)) and there(row.get(value))]
    if not found:
        keys = ", ".join(dict.fromkeys(k for row in rows for k in row))
        raise ValueError(f"no row has {x} and {value}; there are: {keys or 'no rows'}.")
    return found


def _line(axes, rows, x, value, label):
    i = len(axes.lines)
    points = [(float(row[x]), float(row[value])) for row in rows]
    style = STYLES[i % len(STYLES)] + MARKERS[i % len(MARKERS)]
    axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)


def _finish(axes, x, value):
    axes.set(xlabel=x.replace("_", " "), ylabel=value.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
