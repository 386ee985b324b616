"""Diagnostics of training, computed from updates, optimizer state and parameters.

The functions are pure, and the state stores nothing for them. `metrics` reads a leaf at
most twice, in any storage format; devices exchange only sums and extrema. Outside `jit`
leaves of one shape are compiled once, inside it one by one. `nu`, not bias-corrected,
and `eps` are those of `rmsprop_jax.rule`.
"""

import functools
import itertools
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
    """Summarize the last step as a flat dict of scalars for a logger, mostly float32.

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
          geometric, the others constants in derivatives by `nu`.
        eps_share: fraction of coordinates in which eps exceeds the term that it is
          added to.
        nonfinite_updates, nonfinite_params, nonfinite_state: number of NaN and infinite
          elements.

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
    eps_in_sqrt = checks.flag("eps_in_sqrt", eps_in_sqrt)
    per_layer = checks.flag("per_layer", per_layer)
    state, treedef, stored = _find(state)
    rate = None if learning_rate is None else _rate(learning_rate, state)
    eps = jnp.float32(checks.scalar("eps", eps, 0))
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

    columns = *trees.values(), _by_path(state.mu), _by_path(state.trace), nu
    if alike:  # Leave out what this optimizer does not train.
        rows = [[column.get(path) for column in columns] for path in nu]
    else:
        rows = itertools.zip_longest(*(column.values() for column in columns))
    leaves = [_summarize(*row, eps=eps, eps_in_sqrt=eps_in_sqrt) for row in rows]
    found = _describe(functools.reduce(_merge, leaves), rate)
    # Copied, because the caller may donate the state.
    found["step"] = jnp.copy(*jax.tree.leaves(state.count))
    if rate is not None:
        found["learning_rate"] = jnp.copy(rate)
    for path, leaf in zip(nu, leaves, strict=True) if per_layer else ():
        found |= {f"{k}/{path}": x for k, x in _describe(leaf, rate).items()}
    return found


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
    eps_in_sqrt = checks.flag("eps_in_sqrt", eps_in_sqrt)
    state, treedef, stored = _find(state)
    rate, eps = _rate(learning_rate, state), jnp.float32(checks.scalar("eps", eps, 0))
    denominators = (_denominator(storage.decode(x), eps, eps_in_sqrt) for x in stored)
    return treedef.unflatten(rate / x.astype(jnp.float32) for x in denominators)


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


@functools.partial(jax.jit, static_argnames="eps_in_sqrt")
def _summarize(updates, params, mu, trace, nu, eps, eps_in_sqrt):
    """Return statistics of a leaf's arrays, each float32 []; arrays may be None."""
    signed = dict(updates=updates, params=params, mu=mu, trace=trace)
    signed = {name: x for name, x in signed.items() if x is not None}
    square = lambda x: jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32)))
    squares = jax.tree.map(square, signed)
    # The terms of a finite sum are finite: there is nothing to count.
    nonfinite = jax.lax.cond(
        jnp.isfinite(sum(squares.values())),
        lambda: jax.tree.map(lambda x: 0 * x, squares),
        lambda: jax.tree.map(reductions.count_nonfinite, signed),
    )
    found = {f"{name}_squares": x for name, x in squares.items()}
    found |= {f"{name}_nonfinite": x for name, x in nonfinite.items()}
    found |= {f"{name}_size": jnp.float32(x.size) for name, x in signed.items()}
    if nu is not None:
        nu = storage.decode(nu)
        moments = reductions.reduce(
            nonfinite=~jnp.isfinite(nu),
            lowest=nu,
            highest=nu,
            logs=jnp.log(_denominator(nu, eps, eps_in_sqrt)),
            # Scaled: XLA on CPU would store a root, or an array of eps, used twice.
            below_eps=(2 * nu if eps_in_sqrt else jnp.sqrt(4 * nu))
            < (2 * eps).astype(nu.dtype),
        )
        for name in ("lowest", "highest"):
            moments[name] = _denominator(moments[name], eps, eps_in_sqrt)
        moments["size"] = jnp.float32(nu.size)
        found |= {f"nu_{k}": x.astype(jnp.float32) for k, x in moments.items()}
    return found


@jax.jit
def _merge(one, other):
    """Return the statistics of the leaves that are in either."""
    merges = dict(nu_lowest=jnp.minimum, nu_highest=jnp.maximum)
    both = [k for k in one if k in other]
    return one | other | {k: merges.get(k, jnp.add)(one[k], other[k]) for k in both}


@jax.jit
def _describe(x, lr):
    """Compute the metrics of a leaf, or of all, from its statistics."""
    update_rms = jnp.sqrt(x["updates_squares"] / x["updates_size"])
    param_rms = jnp.sqrt(x["params_squares"] / x["params_size"])
    # 0 where parameters that are 0 did not move.
    ratio = jnp.where(update_rms == 0, 0, update_rms / param_rms)
    found = dict(update_rms=update_rms, param_rms=param_rms, update_ratio=ratio)
    found["eps_share"] = x["nu_below_eps"] / x["nu_size"]
    if lr is not None:
        mean = jnp.exp(x["nu_logs"] / x["nu_size"])
        found["effective_learning_rate_min"] = lr / x["nu_highest"]
        found["effective_learning_rate_mean"] = lr / mean
        found["effective_learning_rate_max"] = lr / x["nu_lowest"]
    found |= {f"nonfinite_{k}": x[f"{k}_nonfinite"] for k in ("updates", "params")}
    signed = x.get("mu_nonfinite", 0) + x.get("trace_nonfinite", 0)
    found["nonfinite_state"] = x["nu_nonfinite"] + signed
    return found


def _denominator(nu, eps, eps_in_sqrt):
    eps = eps.astype(nu.dtype)
    return jnp.sqrt(nu + eps) if eps_in_sqrt else _sqrt(nu) + eps


# The slope of sqrt is infinite at 0: take 0.
_sqrt = jax.custom_jvp(jnp.sqrt)
_sqrt.defjvps(lambda dx, root, x: dx * (0.5 / jnp.where(x == 0, jnp.inf, root)))


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
    if not callable(learning_rate):
        return jnp.float32(checks.scalar("learning_rate", learning_rate))
    (count,) = jax.tree.leaves(state.count)
    rate = learning_rate(jnp.maximum(count - 1, 0))
    # Reading it would wait for the step.
    rate = checks.scalar("learning_rate(count)", rate, read_arrays=False)
    return jnp.float32(rate)


def _by_path(tree):
    """Map paths to the floating-point and complex leaves that are not empty."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if path[-1:] == (jax.tree_util.GetAttrKey("value"),):
            path = path[:-1]  # An nnx.Variable holds its array in this attribute.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in found:
            raise ValueError(f"two leaves have the path {name}. Rename one of them.")
        if jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.inexact) and np.size(x):
            found[name] = x
    return found
