"""Statistics and figures of notebook 2, from the runs of `experiments.py`."""

import itertools
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

plt.rcParams.update(
    {
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)


class Ratio(NamedTuple):
    """A ratio of geometric means of losses, with its 95 % interval and p-value."""

    value: float
    low: float
    high: float
    p: float

    def __str__(self):
        """Return the ratio and its interval."""
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def ratio(runs, others):
    """Compare two optimizers, by a paired t-test of their scores."""
    differences = runs.scores - others.scores
    mean, error = differences.mean(), stats.sem(differences)
    half = error * stats.t.ppf(0.975, len(differences) - 1)
    p = 2 * stats.t.sf(abs(mean) / error, len(differences) - 1) if error else 1.0
    return Ratio(*np.exp([mean, mean - half, mean + half]), p)


def all_pairs(book):
    """Return {(task, optimizer, other): Ratio with p adjusted for all, by Holm}."""
    pairs = {
        (task, a, b): ratio(results[a], results[b])
        for task, results in book.items()
        for a, b in itertools.permutations(results, 2)
    }
    # Each pair is here in both directions, which have the same p.
    adjusted = holm([pair.p for pair in pairs.values()], repeats=2)
    return {
        key: pair._replace(p=p)
        for (key, pair), p in zip(pairs.items(), adjusted, strict=True)
    }


def holm(p_values, repeats=1):
    """Return p-values adjusted for the number of them, each being there repeatedly."""
    p_values = np.asarray(p_values)
    order = np.argsort(p_values, kind="stable")
    count = len(p_values) // repeats
    factors = count - np.arange(len(p_values)) // repeats
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.minimum(1, factors * p_values[order]))
    return adjusted


def mean_and_interval(scores):
    """Return the geometric mean of losses and its 95 % interval, from scores [seed]."""
    half = stats.sem(scores) * stats.t.ppf(0.975, len(scores) - 1)
    return np.exp([scores.mean(), scores.mean() - half, scores.mean() + half])


def text(runs):
    """Return the geometric mean of an optimizer's losses, with its 95 % interval."""
    mean, low, high = mean_and_interval(runs.scores)
    return f"{mean:.4g} ({low:.4g} to {high:.4g})"


def draw_losses(axes, results, xlabel, title="", chance=None):
    """Draw each optimizer's loss as a point with its 95 % interval and its number."""
    for height, (name, runs) in enumerate(results.items()):
        mean, low, high = mean_and_interval(runs.scores)
        look = dict(color="black", marker="o", markersize=5, capsize=3)
        if not name.startswith("RMSProp"):
            look |= dict(color="0.5", mfc="white")
        axes.errorbar(mean, height, xerr=[[mean - low], [high - mean]], **look)
        where = dict(xytext=(6, 0), textcoords="offset points", va="center")
        axes.annotate(f"{mean:.2g}", (high, height), **where)
    if chance is not None:
        axes.axvline(chance, color="0.5", linestyle=":", zorder=0)
        axes.text(chance, -0.55, "chance", ha="center", va="bottom", color="0.4")
    axes.set_yticks(range(len(results)), results)
    axes.set(xscale="log", xlabel=xlabel, ylim=(len(results) - 0.5, -0.5))
    axes.set_title(title, pad=14 if chance is not None else 6)
    axes.margins(x=0.45)
    plain_ticks(axes.xaxis)


def plain_ticks(axis):
    """Label a logarithmic axis with plain numbers, as round as three ticks allow."""
    low, high = axis.get_view_interval()
    halves, tenths = np.arange(1, 10, 0.5), np.arange(1, 10, 0.1)
    for digits in ([1], [1, 3], [1, 2, 5], halves, tenths):
        places = [digit * 10.0**power for power in range(-8, 5) for digit in digits]
        places = [place for place in places if low <= place <= high]
        if len(places) > 2:
            break
    places = places[:: -(-len(places) // 5)]  # at most five
    axis.set_ticks(places, [f"{place:.3g}" for place in places])
    axis.set_ticks([], minor=True)


def draw_curves(axes, results, window, styles):
    """Draw losses of few optimizers: geometric means over seeds, 95 % intervals."""
    for name, look in styles.items():
        runs = results[name]
        count = runs.losses.shape[1] // window
        losses = runs.losses[:, : count * window].reshape(len(runs.losses), count, -1)
        scores = np.log(losses.mean(-1))
        mean, low, high = np.array([mean_and_interval(x) for x in scores.T]).T
        steps = window * (np.arange(count) + 0.5)
        axes.plot(steps, mean, label=name, **look)
        axes.fill_between(
            steps, low, high, color=look["color"], alpha=0.15, linewidth=0
        )
    axes.set(xlabel=f"step (means of {window})", yscale="log")
    plain_ticks(axes.yaxis)


def draw_path(axes, path, loss, title):
    """Draw the path [step, 2] of an optimizer over the contours of a loss."""
    x, y = np.meshgrid(np.linspace(-1.2, 1.2, 121), np.linspace(-1.2, 1.2, 121))
    heights = np.asarray(jax.vmap(jax.vmap(loss))(np.stack([x, y], -1)))
    levels = heights.max() * 10.0 ** np.arange(-4, 0.1, 0.5)
    axes.contour(x, y, heights, levels, colors="0.8", linewidths=0.8)
    axes.plot(*path.T, color="black", linewidth=1, marker=".", markersize=4)
    axes.plot(0, 0, color="black", marker="x")
    axes.set(title=title, aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
    axes.set(xticks=[], yticks=[])


def markdown(header, rows):
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
