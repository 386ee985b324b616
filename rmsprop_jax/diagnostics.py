"""What the optimizer is doing, as scalars: pure functions of what a loop has anyway.

Nothing is kept in the optimizer's state for them. They read the average of squares nu
in any of its formats and on any mesh, and sort nothing: a median is found by halving.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rmsprop_jax import checks, storage
from rmsprop_jax.transform import RMSPropState

PyTree = Any


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
    """Return what the last step did, as one flat dict of scalars for a logger.

    For use under `jax.jit`, in the step itself, or after it. One call reads `nu` about
    35 times and, on a CPU, takes five times its memory for a while: call it every so
    many steps.

    Args:
      updates: what `update` returned; or parameters after the step less those before
        (of an NNX model, a copy: its state changes with it).
      state: what `update` returned, or whatever holds it: the state of a chain, an
        `nnx.Optimizer`, a linen `TrainState`.
      params: parameters, before or after the step.
      learning_rate: what `rmsprop` was given: a number, or a schedule, whose value for
        the last step is used. None leaves out what depends on it.
      eps: what `rmsprop` was given; of a preset, what its signature says.
      eps_in_sqrt: what `rmsprop` was given; False for `presets.torch`.
      per_layer: also for each array on its own, as `name/path/of/the/array`.

    Returns:
      float32 [] each, over the arrays that have a `nu`:
        step: steps taken; int32 [].
        learning_rate: of the last step.
        update_rms: root mean square of the updates; 0 or infinite where their squares
          are outside of float32.
        param_rms: root mean square of the parameters.
        update_ratio: update_rms / param_rms.
        effective_learning_rate_min, _median, _max: of what a gradient was multiplied
          by, over all coordinates: learning_rate / sqrt(nu + eps). Of two medians it is
          the higher. Momentum multiplies it by up to 1 / (1 - momentum), bias
          correction by sqrt(1 - decay^t); neither is in it.
        eps_share: share of coordinates in which eps is larger than what it is added to.
        nonfinite_updates, nonfinite_params, nonfinite_state: how many numbers are NaN
          or infinite.

    Raises:
      ValueError: if `state` holds no RMSPropState or several, if a number is not one,
        if two arrays have one path, or `per_layer` and the trees differ in paths.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> optimizer = rmsprop(0.1, decay=0.75)
      >>> updates, state = optimizer.update(params, optimizer.init(params))
      >>> found = diagnostics.metrics(updates, state, params, 0.1)
      >>> print(f"{found['update_rms']:.3f} {found['param_rms']:.3f}")
      0.200 3.536

    References:
      v and eps as in `rmsprop_jax.rule`.
    """
    state = find(state)
    if learning_rate is not None:
        learning_rate = _rate(learning_rate, state)
    forms = (_number("eps", eps), bool(eps_in_sqrt), bool(per_layer))
    return _metrics(updates, state, params, learning_rate, *forms)


def effective_learning_rate(
    state: Any,
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: ArrayLike = 1e-8,
    eps_in_sqrt: bool = True,
) -> PyTree:
    """Return what each coordinate of a gradient was multiplied by in the last step.

    Args:
      state: as in `metrics`, as for all arguments.
      learning_rate: a number or a schedule.
      eps: what `rmsprop` was given.
      eps_in_sqrt: what `rmsprop` was given.

    Returns:
      learning_rate / sqrt(nu + eps), or learning_rate / (sqrt(nu) + eps); float32, in
      the containers of `nu`: those of params. Of a complex `nu` (`presets.torch`), that
      of the real part and that of the imaginary part, as a complex number.

    Raises:
      ValueError: if `state` holds no RMSPropState or several, or a number is not one.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> gradients = jnp.array([1.0, 100.0])
      >>> optimizer = rmsprop(0.1, decay=0.75)
      >>> _, state = optimizer.update(gradients, optimizer.init(gradients))
      >>> print(diagnostics.effective_learning_rate(state, 0.1))
      [0.2   0.002]

    References:
      v and eps as in `rmsprop_jax.rule`.
    """
    state = find(state)
    lr, eps = _rate(learning_rate, state), _number("eps", eps)

    def rates(stored):
        parts = [lr * _factor(v, eps, eps_in_sqrt) for v in _average(stored)]
        return jax.lax.complex(*parts) if len(parts) == 2 else parts[0]

    tree = storage.structure(state.nu)
    return tree.unflatten(map(rates, storage.leaves(state.nu, tree)))


def histogram(state: Any) -> tuple[np.ndarray, jax.Array]:
    """Return how large the square roots of nu are, over all coordinates.

    Reads `nu` once for each edge; for a picture now and then, see `rmsprop_jax.plots`.

    Args:
      state: as in `metrics`.

    Returns:
      Edges in units of |g|: 0, and 1.8e-19 to 1e19, four a decade; float64 [153].
      Counts of lower edge <= sqrt(nu) < upper edge; float32 [152]. The first bin is in
      effect that of 0. NaN, infinity and what is above are in none.

    Raises:
      ValueError: if `state` holds no RMSPropState or several.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, scale_by_rms
      >>> optimizer = scale_by_rms(initial_scale=0.02)
      >>> edges, counts = diagnostics.histogram(optimizer.init(jnp.zeros(5)))
      >>> for low, high, count in zip(edges, edges[1:], counts):
      ...     if count:
      ...         print(f"{low:.2f} to {high:.2f}: {count:.0f}")
      0.10 to 0.18: 5

    References:
      v as in `rmsprop_jax.rule`, without bias correction.
    """
    edges = np.concatenate([[0.0], 10.0 ** (np.arange(-75, 77) / 4)])
    # Compared as squares; from float64, so that a power of 10 is rounded once.
    squares = jnp.asarray(np.square(edges).astype(np.float32))
    return edges, _histogram(find(state).nu, squares)


@jax.jit
def _histogram(nu, squares):
    stored = storage.leaves(nu, storage.structure(nu))

    def below(square):
        return sum((_count(v < square) for x in stored for v in _average(x)), 0.0)

    return jnp.diff(jax.lax.map(below, squares))


def find(tree: Any) -> RMSPropState:
    """Return the one RMSPropState that a tree holds."""
    is_state = lambda x: isinstance(x, RMSPropState)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state)
    found = [(jax.tree_util.keystr(path), x) for path, x in leaves if is_state(x)]
    if len(found) != 1:
        at = " at " + ", ".join(path for path, _ in found) if found else ""
        raise ValueError(
            f"state must hold one RMSPropState, got {len(found)}{at}, in a "
            f"{type(tree).__name__}. Pass the state of rmsprop, or what contains it; "
            "of several, one at a time."
        )
    return found[0][1]


def _rate(learning_rate, state):
    """Return the learning rate of the last step; float32 []."""
    if callable(learning_rate):
        (count,) = jax.tree.leaves(state.count)
        learning_rate = learning_rate(jnp.maximum(count - 1, 0))
    return _number("learning_rate", learning_rate)


def _number(name, value):
    return jnp.asarray(checks.number(name, value), jnp.float32)


@functools.partial(jax.jit, static_argnames=("eps_in_sqrt", "per_layer"))
def _metrics(updates, state, params, learning_rate, eps, eps_in_sqrt, per_layer):
    tree = storage.structure(state.nu)
    stored = storage.leaves(state.nu, tree)
    names = _named(tree.unflatten([0.0] * len(stored)))
    nu = {k: x for k, x in zip(names, stored, strict=True) if math.prod(x.shape)}
    updates, params = (
        # Without what another optimizer trains, or nothing does.
        {k: x[k] for k in nu} if nu.keys() <= x.keys() else x
        for x in (_named(updates), _named(params))
    )
    if not (nu and updates and params):
        raise ValueError("updates, state and params must hold numbers, got none.")

    # Names end with the path of their array; those of the whole tree with nothing.
    groups = {"": [list(x.values()) for x in (nu, updates, params)]}
    for name in nu if per_layer else ():
        if name not in updates or name not in params:
            raise ValueError(
                f"per_layer needs updates and params like those of init, got none at "
                f"{name}; updates are at {', '.join(updates)}, params at "
                f"{', '.join(params)}. Pass them in the same containers."
            )
        groups[f"/{name}"] = [[x[name]] for x in (nu, updates, params)]

    (count,) = jax.tree.leaves(state.count)
    found = {"step": count}
    if learning_rate is not None:
        found["learning_rate"] = learning_rate
    medians = _medians([group[0] for group in groups.values()])
    for (end, group), median in zip(groups.items(), medians, strict=True):
        averages = [v for x in group[0] for v in _average(x)]
        update_rms, param_rms = map(_rms, group[1:])
        found[f"update_rms{end}"] = update_rms
        found[f"param_rms{end}"] = param_rms
        found[f"update_ratio{end}"] = update_rms / param_rms
        below = eps if eps_in_sqrt else eps * eps
        share = sum(_count(v < below) for v in averages)
        found[f"eps_share{end}"] = share / float(sum(v.size for v in averages))
        if learning_rate is None:
            continue
        for name, v in (
            ("min", functools.reduce(jnp.maximum, map(jnp.max, averages))),
            ("median", median),
            ("max", functools.reduce(jnp.minimum, map(jnp.min, averages))),
        ):
            rate = learning_rate * _factor(v, eps, eps_in_sqrt)
            found[f"effective_learning_rate_{name}{end}"] = rate
    buffers = [x for b in state[1:] if b is not None for x in storage.leaves(b, tree)]
    for name, arrays in (
        ("updates", updates.values()),
        ("params", params.values()),
        ("state", map(storage.decode, buffers)),
    ):
        found[f"nonfinite_{name}"] = sum(_count(~jnp.isfinite(x)) for x in arrays)
    return found


def _named(tree):
    """Return the numbers of a tree by their paths: no integers, nothing of size 0."""
    named = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if path[-1:] == (jax.tree_util.GetAttrKey("value"),):
            path = path[:-1]  # A variable of NNX has one step more, to its value.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"two arrays have the path {name}. Rename one of them.")
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and np.size(x):
            named[name] = x
    return named


def _average(stored):
    """Return nu as real float32 arrays: one, or two of a complex one."""
    v = storage.decode(stored)
    parts = (v.real, v.imag) if jnp.iscomplexobj(v) else (v,)
    return [x.astype(jnp.float32) for x in parts]


def _factor(v, eps, eps_in_sqrt):
    return 1 / (jnp.sqrt(v + eps) if eps_in_sqrt else jnp.sqrt(v) + eps)


def _rms(arrays):
    squares = (jnp.square(jnp.abs(x).astype(jnp.float32)) for x in arrays)
    return jnp.sqrt(sum(map(jnp.sum, squares)) / float(sum(map(np.size, arrays))))


def _count(mask):
    """Return how many are True; float32 [], as more than int32 can hold may be."""
    last = tuple(range(mask.ndim))[-1:]
    return jnp.sum(jnp.sum(mask, axis=last, dtype=jnp.int32).astype(jnp.float32))


def _medians(groups):
    """Return the lower median of each group of stored averages; float32 [groups].

    That of numbers >= 0 is found bit by bit: it is the largest that fewer than half of
    them are below, and their order is that of their bits.
    """
    halves = jnp.array(
        [sum(v.size for x in group for v in _average(x)) / 2 for group in groups]
    )

    def below(group, guess):
        averages = (v for x in group for v in _average(x))
        bits = (jax.lax.bitcast_convert_type(v, jnp.int32) for v in averages)
        return sum(_count(x < guess) for x in bits)

    def add(i, bits):
        guess = bits | (1 << (30 - i))
        fewer = jnp.stack(list(map(below, groups, guess))) < halves
        return jnp.where(fewer, guess, bits)

    zero = jnp.zeros(len(groups), jnp.int32)
    # The first bit outside the loop: inside `jax.shard_map`, zeros are not like it.
    bits = jax.lax.fori_loop(1, 31, add, add(0, zero))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
