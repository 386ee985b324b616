"""Diagnostics of training, computed from updates, optimizer state and parameters.

The functions are pure, under `jax.jit` or outside it, and the state stores nothing for
them. `metrics` reads a leaf at most twice, in any storage format; devices exchange only
sums and extrema. `nu`, not bias-corrected, and `eps` are those of `rmsprop_jax.rule`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rmsprop_jax import checks, reductions, storage
from rmsprop_jax.transform import PyTree, RMSPropState

__all__ = ["effective_learning_rate", "histogram", "metrics"]


def metrics(
    updates: PyTree,
    state: Any,
    params: PyTree,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    eps: ArrayLike = 1e-8,
    eps_in_sqrt: bool = True,
    per_layer: bool = False,
) -> dict[str, jax.Array]:
    """Summarize the last step as a flat dict of float32 scalars for a logger.

    Args:
      updates: the updates that `update` returned, or parameters after the step minus
        parameters before it. NNX changes them in place: copy them before the step.
      state: the state that `update` returned, or anything that holds it: the state of
        `optax.chain`, an `nnx.Optimizer`, a linen `TrainState`.
      params: the parameters, before or after the step.
      learning_rate: number, or schedule to evaluate for the last step. None omits the
        metrics of the learning rate.
      eps: the `eps` of the optimizer; each preset has its own default.
      eps_in_sqrt: the `eps_in_sqrt` of the optimizer; False for `presets.torch`, and
        for `presets.keras_legacy` without momentum.
      per_layer: also return each metric of each leaf, as `metric/path/of/the/leaf`.

    Returns:
      Over all leaves that have a `nu`, or, if some of these have no counterpart in
      `updates` and `params`, over all leaves of each tree:
        step: number of steps taken; int32.
        learning_rate: of the last step.
        update_rms, param_rms: root mean square of the updates and of the parameters.
        update_ratio: update_rms / param_rms.
        effective_learning_rate_min, _mean, _max: over all coordinates; the mean is
          geometric. See `effective_learning_rate`.
        eps_share: fraction of coordinates in which eps exceeds the term that it is
          added to.
        nonfinite_updates, nonfinite_params, nonfinite_state: number of NaN and infinite
          elements; not per leaf.

    Raises:
      ValueError: if `state` does not hold exactly one RMSPropState, a number is
        invalid, two leaves have the same path, or trees differ with `per_layer`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> optimizer = rmsprop(0.1, decay=0.75)
      >>> updates, state = optimizer.update(params, optimizer.init(params))
      >>> found = diagnostics.metrics(updates, state, params, learning_rate=0.1)
      >>> print(f"{found['update_rms']:.3f} {found['param_rms']:.3f}")
      0.200 3.536
    """
    state, treedef, stored = _find(state)
    rate = None if learning_rate is None else _rate(learning_rate, state)
    eps = _float32("eps", eps, 0)
    paths = _by_path(treedef.unflatten([0.0] * len(stored)))
    nu = {k: x for k, x in zip(paths, stored, strict=True) if math.prod(x.shape)}
    trees, alike = dict(updates=_by_path(updates), params=_by_path(params)), True
    for name, tree in trees.items():
        for path, x in nu.items():
            fits = path in tree and np.shape(tree[path]) == x.shape
            if per_layer and not fits:
                raise ValueError(
                    f"per_layer needs {name} like those of init, got none of shape "
                    f"{x.shape} at {path}; {name} are at {', '.join(tree)}."
                )
            alike &= fits
    if not (nu and all(trees.values())):
        raise ValueError("updates, state and params must hold numbers, got none.")
    if alike:  # Leave out what this optimizer does not train.
        trees = {name: {k: tree[k] for k in nu} for name, tree in trees.items()}

    vectors = {k: [*map(_summarize, tree.values())] for k, tree in trees.items()}
    vectors["nu"] = [_summarize_nu(x, eps, bool(eps_in_sqrt)) for x in nu.values()]
    others = [_summarize(x) for x in jax.tree.leaves((state.mu, state.trace))]
    (step,) = jax.tree.leaves(state.count)
    found, layers = _combine(**vectors, others=others, lr=rate, per_layer=per_layer)
    for name, values in jax.tree.map(jax.jit(list), layers).items():
        found |= {f"{name}/{k}": x for k, x in zip(nu, values, strict=True)}
    return {"step": step} | found


def effective_learning_rate(
    state: Any,
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: ArrayLike = 1e-8,
    eps_in_sqrt: bool = True,
) -> PyTree:
    """Compute the factor by which the last step multiplied each gradient coordinate.

    It does not include momentum, which multiplies it by up to 1 / (1 - momentum), or
    bias correction, which multiplies it by sqrt(1 - decay^t).

    Args:
      state: as in `metrics`.
      learning_rate: as in `metrics`, but not None.
      eps: as in `metrics`.
      eps_in_sqrt: as in `metrics`.

    Returns:
      learning_rate / sqrt(nu + eps), or learning_rate / (sqrt(nu) + eps); float32, like
      params.

    Raises:
      ValueError: as in `metrics`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> gradients = jnp.array([1.0, 100.0])
      >>> optimizer = rmsprop(0.1, decay=0.75)
      >>> _, state = optimizer.update(gradients, optimizer.init(gradients))
      >>> print(diagnostics.effective_learning_rate(state, 0.1))
      [0.2   0.002]
    """
    state, treedef, stored = _find(state)
    rate, eps = _rate(learning_rate, state), _float32("eps", eps, 0)
    return treedef.unflatten(
        rate / _denominator(_values(x), eps, eps_in_sqrt) for x in stored
    )


def histogram(state: Any) -> tuple[np.ndarray, jax.Array]:
    """Count the coordinates of all leaves by sqrt(nu), in bins of a factor of two.

    Args:
      state: as in `metrics`.

    Returns:
      Bin edges in units of |g|: 0, then the powers of two from 2^-63 to 2^64; float64
      [129]. Counts of lower edge <= sqrt(nu) < upper edge; float32 [128]. Zeros are in
      the first bin; NaN and infinity are in none.

    Raises:
      ValueError: if `state` does not hold exactly one RMSPropState.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, scale_by_rms
      >>> optimizer = scale_by_rms(initial_scale=0.02)
      >>> edges, counts = diagnostics.histogram(optimizer.init(jnp.zeros(5)))
      >>> print(edges[:-1][counts > 0], counts[counts > 0])
      [0.125] [5.]
    """
    _, _, stored = _find(state)
    return np.concatenate([[0.0], 2.0 ** np.arange(-63, 65)]), _histogram(stored)


# The elements of the vectors that hold the statistics of a leaf. Thousands of scalars
# would take seconds to compile.
_STATISTICS = ("finite", "nonfinite", "squares")
_NU_STATISTICS = ("finite", "nonfinite", "lowest", "highest", "logs", "below_eps")


# Jitted for each leaf, so that leaves of the same shape are compiled only once.
@jax.jit
def _summarize(x):
    squares = jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32)))
    # The terms of a finite sum are finite, and need not be counted.
    known = dict(finite=0 * squares + float(x.size), nonfinite=0 * squares)
    is_known = jnp.isfinite(squares)
    found = jax.lax.cond(is_known, lambda _: known, reductions.reduce, x)
    found["squares"] = squares
    return jnp.stack([found[name] for name in _STATISTICS])


@functools.partial(jax.jit, static_argnums=2)
def _summarize_nu(stored, eps, eps_in_sqrt):
    nu = _values(stored)
    # Both doubled, because XLA on CPU fills an array with an eps that is used twice.
    below_eps = 2 * nu < 2 * (eps if eps_in_sqrt else eps * eps)
    logs = jnp.log(_denominator(nu, eps, eps_in_sqrt))
    found = reductions.reduce(nu, lowest=nu, highest=nu, logs=logs, below_eps=below_eps)
    for name in ("lowest", "highest"):
        found[name] = _denominator(found[name], eps, eps_in_sqrt)
    return jnp.stack([found[name] for name in _NU_STATISTICS])


@functools.partial(jax.jit, static_argnames="per_layer")
def _combine(updates, params, nu, others, lr, per_layer):
    """Compute the metrics of all leaves, and vectors of those of each."""
    leaves: dict[str, Any] = dict(nu=_columns(_NU_STATISTICS, nu))
    leaves |= dict(updates=_columns(_STATISTICS, updates))
    leaves |= dict(params=_columns(_STATISTICS, params))
    total = {name: reductions.merge(columns) for name, columns in leaves.items()}
    found = _describe(**total, lr=lr)
    if lr is not None:
        found["learning_rate"] = lr
    found["nonfinite_updates"] = total["updates"]["nonfinite"]
    found["nonfinite_params"] = total["params"]["nonfinite"]
    found["nonfinite_state"] = total["nu"]["nonfinite"]
    if others:
        found["nonfinite_state"] += _columns(_STATISTICS, others)["nonfinite"].sum()
    return found, _describe(**leaves, lr=lr) if per_layer else {}


def _columns(names, vectors):
    return dict(zip(names, jnp.stack(vectors, 1), strict=True))


def _describe(updates, params, nu, lr):
    """Compute the metrics of a leaf, or of all, from the statistics of each tree."""
    update_rms = jnp.sqrt(_mean(updates, "squares"))
    param_rms = jnp.sqrt(_mean(params, "squares"))
    # 0 where parameters that are 0 did not move.
    ratio = jnp.where(update_rms == 0, 0, update_rms / param_rms)
    found = dict(update_rms=update_rms, param_rms=param_rms, update_ratio=ratio)
    found["eps_share"] = _mean(nu, "below_eps")
    if lr is not None:
        mean = jnp.exp(_mean(nu, "logs"))
        found["effective_learning_rate_min"] = lr / nu["highest"]
        found["effective_learning_rate_mean"] = lr / mean
        found["effective_learning_rate_max"] = lr / nu["lowest"]
    return found


def _mean(sums, name):
    return sums[name] / (sums["finite"] + sums["nonfinite"])


def _values(stored):
    return storage.decode(stored).astype(jnp.float32)


def _denominator(nu, eps, eps_in_sqrt):
    return jnp.sqrt(nu + eps) if eps_in_sqrt else jnp.sqrt(nu) + eps


@jax.jit
def _histogram(stored):
    counts = (reductions.histogram(storage.decode(x)) for x in stored)
    return sum(counts, start=jnp.zeros(128, jnp.float32))


def _find(tree):
    """Return the only RMSPropState in a tree, and the treedef and leaves of its nu."""
    found = optax.tree_utils.tree_get_all_with_path(
        tree, "RMSPropState", lambda _, x: isinstance(x, RMSPropState)
    )
    if len(found) != 1:
        at = ", ".join(jax.tree_util.keystr(path) for path, _ in found)
        raise ValueError(
            f"state must hold one RMSPropState, got {len(found)}{at and ' at ' + at}, "
            f"in a {type(tree).__name__}. Pass the state of rmsprop, or a tree that "
            "contains it and no other."
        )
    state = found[0][1]
    treedef = storage.params_treedef(state.nu)
    return state, treedef, storage.leaves(state.nu, treedef)


def _rate(learning_rate, state):
    """Return the learning rate of the last step; float32 []."""
    if callable(learning_rate):
        (count,) = jax.tree.leaves(state.count)
        learning_rate = learning_rate(jnp.maximum(count - 1, 0))
    return _float32("learning_rate", learning_rate)


def _float32(name, value, *domain):
    return jnp.asarray(checks.scalar(name, value, *domain), jnp.float32)


def _by_path(tree):
    """Map paths to the floating-point and complex leaves that are not empty."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if path[-1:] == (jax.tree_util.GetAttrKey("value"),):
            path = path[:-1]  # An nnx.Variable holds its array in this attribute.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in found:
            raise ValueError(f"two leaves have the path {name}. Rename one of them.")
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and np.size(x):
            found[name] = x
    return found
