"""Optimizer state from and to Optax: the part of `interop` that needs no lists."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import arrange, storage
from rmsprop_jax.transform import RMSPropState


def from_optax(opt_state: Any, *, count: int = 0) -> Any:
    """Go on here with a run of `optax.rmsprop`.

    Args:
      opt_state: state of `optax.rmsprop`, or of anything around it, such as a chain.
      count: steps taken, where the state does not hold it: without a schedule.

    Returns:
      An RMSPropState; or the state around it, with an RMSPropState in the place of each
      state of `optax.rmsprop`, `optax.scale_by_rms` or `optax.scale_by_stddev`. It is
      for `rmsprop` or `scale_by_rms` with the same arguments. A chain of the same three
      parts as `optax.rmsprop` is taken for it: convert its first element alone. Arrays
      that need no change are shared with `opt_state`.

    Raises:
      ValueError: if there is no such state; if a leaf is not finite or not of 32 or 64
        bits; if it is centered with bias_correction, which `rmsprop` refuses.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import interop
      >>> old = optax.chain(optax.clip(1.0), optax.rmsprop(0.1, momentum=0.9))
      >>> clip, state = interop.from_optax(old.init(jnp.ones(2)), count=100)
      >>> print(state.count, state.nu)
      100 [0. 0.]

    References:
      Optax 0.2.8, optax/_src/alias.py and optax/_src/transform.py.
    """
    _has_optax("opt_state", opt_state)

    def convert(path, x):
        if not _is_optax(x):
            return x
        at = f"opt_state{jax.tree_util.keystr(path)}"
        for keys, leaf in jax.tree_util.tree_leaves_with_path(x):
            if keys[-1] != jax.tree_util.GetAttrKey("count"):
                arrange.check(f"{at}{jax.tree_util.keystr(keys)}", leaf)
        # A restored state may be of NumPy arrays, which jax would share.
        x = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else jnp.array(a), x)
        fields = {k: part for state in _parts(x) for k, part in state._asdict().items()}
        nu, mu = jax.tree.map(jnp.real, fields["nu"]), fields.get("mu")
        if mu is not None:
            if "count" in _parts(x)[0]._fields:
                raise ValueError(
                    f"{at} is centered with bias_correction, which rmsprop refuses. "
                    "Start anew without one of the two."
                )
            nu = jax.tree.map(arrange.variance, nu, mu)
        trace = fields.get("trace")
        if trace is not None:
            trace = jax.tree.map(jnp.negative, trace)
        steps = fields.get("count", arrange.steps("count", count))
        return RMSPropState(jnp.asarray(steps, jnp.int32), nu, mu, trace)

    return jax.tree_util.tree_map_with_path(convert, opt_state, is_leaf=_is_optax)


def to_optax(state: Any, like: Any) -> Any:
    """Go on in `optax.rmsprop` with a run of `rmsprop`.

    Args:
      state: RMSPropState of `rmsprop`, or a state around it, as `from_optax` returns.
      like: what `init` of the Optax transformation returns; its values are not used.

    Returns:
      A state with the structure and the dtypes of `like`.

    Raises:
      ValueError: if the two do not fit; if `like` is of half precision.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import interop, rmsprop
      >>> state = rmsprop(0.1, initial_scale=1.0).init(jnp.ones(2))
      >>> print(interop.to_optax(state, optax.rmsprop(0.1).init(jnp.ones(2)))[0].nu)
      [1. 1.]

    References:
      Optax 0.2.8, optax/_src/alias.py and optax/_src/transform.py.
    """
    _has_optax("like", like)
    _fits("state", state, jax.tree.structure(like, is_leaf=_is_optax))

    def convert(path, old, new):
        if not _is_optax(old):
            return new
        at = f"state{jax.tree_util.keystr(path)}"
        wanted = {name for part in _parts(old) for name in part._fields} | {"count"}
        given = {k for k, x in getattr(new, "_asdict", dict)().items() if x is not None}
        if given | {"count"} != wanted:
            raise ValueError(
                f"{at} must be an RMSPropState with {sorted(wanted)} as like has, got "
                f"{sorted(given)}. Make like with the options of the run."
            )
        if any(map(jnp.iscomplexobj, jax.tree.leaves(new.nu))):
            raise ValueError(
                f"{at}.nu is complex, as presets.torch keeps it. Optax's is the sum of "
                "both parts, another algorithm."
            )
        new = storage.convert(new)
        fields = new._asdict()
        if new.mu is not None:
            fields["nu"] = jax.tree.map(arrange.second_moment, new.nu, new.mu)
        if new.trace is not None:
            fields["trace"] = jax.tree.map(jnp.negative, new.trace)
        filled = [
            part._replace(**{name: fields[name] for name in part._fields})
            for part in _parts(old)
        ]
        filled = tuple(filled) if type(old) is tuple else filled[0]
        _fits(at, filled, jax.tree.structure(old))
        return jax.tree_util.tree_map_with_path(
            lambda keys, x, y: _like(f"{at}{jax.tree_util.keystr(keys)}", x, y),
            filled,
            old,
        )

    return jax.tree_util.tree_map_with_path(convert, like, state, is_leaf=_is_optax)


def _parts(x) -> Any:
    """Return the parts of an Optax state: the three of optax.rmsprop, or one."""
    return x if type(x) is tuple and len(x) == 3 else (x,)


def _is_optax(x):
    """Say whether this is a state of optax.rmsprop, or of its first part alone."""
    scale, *rest = _parts(x)
    name = type(scale).__name__.removesuffix("State").removesuffix("WithCount")
    kinds = (
        (optax.EmptyState, optax.ScaleByScheduleState),
        (optax.EmptyState, optax.TraceState),
    )
    return name in ("ScaleByRms", "ScaleByRStdDev") and all(
        map(isinstance, rest, kinds)
    )


def _has_optax(at, tree):
    if not any(map(_is_optax, jax.tree.leaves(tree, is_leaf=_is_optax))):
        raise ValueError(
            f"{at} must hold a state of optax.rmsprop, got {jax.tree.structure(tree)}. "
            "Restore a checkpoint into what Optax's init returns."
        )


def _fits(at, tree, structure):
    """Refuse a tree of another structure than that of `like`."""
    try:
        structure.flatten_up_to(jax.tree.map(np.shape, tree))
    except ValueError as error:
        raise ValueError(
            f"{at} must have the structure of like. {error} Make like with the same "
            "parameters, and the Optax of the same program."
        ) from None


def _like(at, x, other):
    """Return x with the dtype of another leaf, which must have its shape."""
    if x.dtype != other.dtype:
        arrange.check(at.replace("state", "like", 1), other)
    if x.dtype != jnp.int32:
        arrange.check(at, x)
    if x.shape != other.shape:
        raise ValueError(
            f"{at} must have shape {other.shape} as in like, got {x.shape}. Make like "
            "with the same parameters."
        )
    return x.astype(other.dtype)
