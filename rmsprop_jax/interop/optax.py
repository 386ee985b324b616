"""Convert state from and to `optax.rmsprop`, alone or inside other transformations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from rmsprop_jax import storage
from rmsprop_jax.interop import arrange
from rmsprop_jax.transform import RMSPropState

DTYPES = ("float32", "float64", "complex64", "complex128")
# Matched by name, because Optax exports only the types without a count.
CORES = ("ScaleByRmsState", "ScaleByRmsWithCountState")
CORES += ("ScaleByRStdDevState", "ScaleByRStdDevWithCountState")


def from_optax(opt_state: Any, *, count: int = 0) -> Any:
    """Convert the state of `optax.rmsprop` to resume its run with `rmsprop`.

    Args:
      opt_state: state of `optax.rmsprop`, or of a chain or wrapper that contains it.
      count: number of steps taken, used if the state has none (neither a
        schedule nor `bias_correction`).

    Returns:
      The same state, with an RMSPropState in place of each state of `optax.rmsprop`,
      `optax.scale_by_rms` and `optax.scale_by_stddev`, for `rmsprop` or `scale_by_rms`
      with the same arguments. A chain of the same three parts is taken for
      `optax.rmsprop`; convert only its first element. Arrays that need no change are
      shared with `opt_state`.

    Raises:
      ValueError: if there is no such state, an array is not finite or of half
        precision, or centered is combined with bias_correction, which `rmsprop`
        rejects.

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
    count = arrange.step_count("count", count)
    leaves, treedef = _flatten("opt_state", opt_state)
    return treedef.unflatten(
        _convert(f"opt_state{keystr(path)}", x, count) if _is_rmsprop(x) else x
        for path, x in leaves
    )


def to_optax(state: Any, like: Any) -> Any:
    """Convert the state of `rmsprop` to resume its run with `optax.rmsprop`.

    Args:
      state: RMSPropState, or a state that contains it, as `from_optax` returns.
      like: result of `init` of the Optax transformation; its values are not used.

    Returns:
      A state with the structure and dtypes of `like`.

    Raises:
      ValueError: if the two do not match, an array of either is of half precision, or
        one of `state` is not finite.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import interop, rmsprop
      >>> state = rmsprop(0.1, initial_scale=1.0).init(jnp.ones(2))
      >>> print(interop.to_optax(state, optax.rmsprop(0.1).init(jnp.ones(2)))[0].nu)
      [1. 1.]

    References:
      Optax 0.2.8, optax/_src/alias.py and optax/_src/transform.py.
    """
    leaves, treedef = _flatten("like", like)
    rows = zip(leaves, _match("state", state, treedef), strict=True)
    return treedef.unflatten(
        _convert_back(keystr(path), new, old) if _is_rmsprop(old) else new
        for (path, old), new in rows
    )


def _flatten(name, tree):
    """Flatten a tree with paths, keeping each state of optax.rmsprop as a leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_rmsprop)
    if not any(_is_rmsprop(x) for _, x in leaves):
        raise ValueError(
            f"{name} must contain a state of optax.rmsprop, got {treedef}. Restore a "
            "checkpoint into the result of Optax's init; an RMSPropState is converted."
        )
    return leaves, treedef


def _parts(x) -> Any:
    """Split a state of optax.rmsprop into three parts; others are a single part."""
    return x if type(x) is tuple and len(x) == 3 else (x,)


def _is_rmsprop(x):
    """Return whether x is a state of optax.rmsprop, or of its first part alone."""
    core, *rest = _parts(x)
    none, lr, trace = optax.EmptyState, optax.ScaleByScheduleState, optax.TraceState
    return type(core).__name__ in CORES and all(
        map(isinstance, rest, ((none, lr), (none, trace)))
    )


def _convert(at, x, count):
    """Convert an Optax state to an RMSPropState; `count` is used if it has none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if path[-1] != jax.tree_util.GetAttrKey("count"):
            arrange.check_dtype(at + keystr(path), leaf, DTYPES)
            arrange.check_finite(at + keystr(path), leaf)
    # Copied, because JAX would share memory with a NumPy array.
    x = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else jnp.array(a), x)
    fields = {k: part for state in _parts(x) for k, part in state._asdict().items()}
    nu, mu = optax.tree_utils.tree_real(fields["nu"]), fields.get("mu")
    if mu is not None:
        if "count" in _parts(x)[0]._fields:
            raise ValueError(
                f"{at} is centered with bias_correction, which rmsprop refuses. Start "
                "from init, without one of the two."
            )
        nu = arrange.variance(nu, mu)
    trace = jax.tree.map(jnp.negative, fields.get("trace"))
    count = jnp.asarray(fields.get("count", count), jnp.int32)
    return RMSPropState(count, nu, mu, trace)


def _convert_back(path, state, like):
    """Convert an RMSPropState to an Optax state."""
    wanted = {name for part in _parts(like) for name in part._fields} | {"count"}
    given = {k for k, x in getattr(state, "_asdict", dict)().items() if x is not None}
    if given | {"count"} != wanted:
        raise ValueError(
            f"state{path} must be an RMSPropState with {sorted(wanted)} as in like, "
            f"got {sorted(given)}. Make like with the options of the run."
        )
    fields = storage.convert(state)._asdict()
    if state.mu is not None:
        fields["nu"] = arrange.second_moment(fields["nu"], fields["mu"])
    fields["trace"] = jax.tree.map(jnp.negative, fields["trace"])
    parts = [x._replace(**{k: fields[k] for k in x._fields}) for x in _parts(like)]
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    new = tuple(parts) if type(like) is tuple else parts[0]
    new = _match(f"state{path}", new, treedef)
    return treedef.unflatten(
        _cast(path + keystr(keys), x, old)
        for (keys, old), x in zip(leaves, new, strict=True)
    )


def _match(at, tree, treedef):
    """Return the part of a tree at each leaf of `like`."""
    try:
        # An error prints the tree, so replace values by shapes.
        treedef.flatten_up_to(jax.tree.map(np.shape, tree))
    except ValueError as error:
        raise ValueError(
            f"{at} must have the tree structure of like. {error} Make like with the "
            "parameters of the run, and with the same chain."
        ) from None
    return treedef.flatten_up_to(tree)


def _cast(path, x, like):
    """Cast x to the dtype of a leaf of `like`, whose shape it must have."""
    if like.dtype != jnp.int32:
        arrange.check_dtype(f"like{path}", like, DTYPES)
        arrange.check_dtype(f"state{path}", x, DTYPES)
        arrange.check_finite(f"state{path}", x)
    is_wider = jnp.iscomplexobj(x) and not jnp.iscomplexobj(like)
    if x.shape != like.shape or is_wider:
        raise ValueError(
            f"state{path} must be {like.dtype}{list(like.shape)} as in like, got "
            f"{x.dtype}{list(x.shape)}. Make like with the parameters of the run."
        )
    return x.astype(like.dtype)
