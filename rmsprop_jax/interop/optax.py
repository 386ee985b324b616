"""Convert state from and to `optax.rmsprop`, alone or inside other transformations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from rmsprop_jax import checks, storage
from rmsprop_jax.interop import arrange
from rmsprop_jax.transform import RMSPropState

DTYPES = (*arrange.REAL, "complex64", "complex128")


def from_optax(opt_state: Any, *, count: int = 0) -> Any:
    """Convert the state of `optax.rmsprop` to resume its run with `rmsprop`.

    Args:
      opt_state: state of `optax.rmsprop`, or of a chain or wrapper that contains it.
      count: number of steps taken, used if the state does not contain it.

    Returns:
      The same state, with an RMSPropState in place of each state of `optax.rmsprop`,
      `optax.scale_by_rms` and `optax.scale_by_stddev`, for `rmsprop` or `scale_by_rms`
      with the same arguments. A chain of the same three parts is taken for
      `optax.rmsprop`; convert only its first element. Unchanged arrays are shared.

    Raises:
      ValueError: if there is no such state, an array is not finite or of half
        precision, or bias_correction is combined with centered.

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
    _check_contains_rmsprop("opt_state", opt_state)
    convert = partial(_convert, arrange.step_count("count", count))
    return jax.tree_util.tree_map_with_path(convert, opt_state, is_leaf=_is_rmsprop)


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
    _check_contains_rmsprop("like", like)
    return _map_like(_convert_back, (), like, state, _is_rmsprop)


def _check_contains_rmsprop(name, tree):
    """Raise ValueError if a tree contains no state of optax.rmsprop."""
    if not any(map(_is_rmsprop, jax.tree.leaves(tree, is_leaf=_is_rmsprop))):
        raise ValueError(
            f"{name} must contain a state of optax.rmsprop, got "
            f"{jax.tree.structure(tree)}. Restore a checkpoint into the result of "
            "Optax's init; an RMSPropState is converted."
        )


def _parts(x) -> Any:
    """Split a state of optax.rmsprop into three parts; others are a single part."""
    return x if type(x) is tuple and len(x) == 3 else (x,)


def _is_rmsprop(x):
    """Return whether x is a state of optax.rmsprop, or of its first part alone."""
    core, *rest = _parts(x)
    none, lr, trace = optax.EmptyState, optax.ScaleByScheduleState, optax.TraceState
    # Matched by name, because Optax exports only the types without a count.
    return type(core).__name__.startswith(("ScaleByRms", "ScaleByRStdDev")) and all(
        map(isinstance, rest, ((none, lr), (none, trace)))
    )


def _convert(count, path, x):
    """Convert an Optax state to an RMSPropState; `count` is used if it has none."""
    if not _is_rmsprop(x):
        return x
    at = f"opt_state{keystr(path)}"

    def check(path, leaf):
        if path[-1] != jax.tree_util.GetAttrKey("count"):
            arrange.check_array(at + keystr(path), leaf, DTYPES)
        # Copied, because JAX would share memory with a NumPy array.
        return leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)

    parts = _parts(jax.tree_util.tree_map_with_path(check, x))
    fields = {k: part for state in parts for k, part in state._asdict().items()}
    nu, mu = optax.tree_utils.tree_real(fields["nu"]), fields.get("mu")
    if mu is not None:
        if "count" in parts[0]._fields:
            raise ValueError(
                f"{at} is centered with bias_correction, which rmsprop refuses. Start "
                "from init, without one of the two."
            )
        nu = arrange.variance(nu, mu)
    trace = jax.tree.map(jnp.negative, fields.get("trace"))
    count = jnp.asarray(fields.get("count", count), jnp.int32)
    return RMSPropState(count, nu, mu, trace)


def _convert_back(path, like, state):
    """Convert an RMSPropState to an Optax state; others pass through."""
    if not _is_rmsprop(like):
        return state
    names = {name for part in _parts(like) for name in part._fields}
    checks.state(state, "mu" in names, "trace" in names)
    fields = storage.convert(state)._asdict()
    if state.mu is not None:
        fields["nu"] = arrange.second_moment(fields["nu"], fields["mu"])
    fields["trace"] = jax.tree.map(jnp.negative, fields["trace"])
    parts = [x._replace(**{k: fields[k] for k in x._fields}) for x in _parts(like)]
    return _map_like(_cast, path, like, tuple(parts) if len(parts) > 1 else parts[0])


def _map_like(function, path, like, tree, is_leaf=None):
    """Map function(path, leaf, part of tree) over `like`, which is at `path`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf)
    # An error prints the tree, so replace values by shapes.
    shapes = jax.tree.map(lambda x: str(np.shape(x)), tree)
    checks.flatten_like(f"state{keystr(path)}", shapes, treedef)
    rows = zip(leaves, treedef.flatten_up_to(tree), strict=True)
    return treedef.unflatten(function((*path, *keys), x, y) for (keys, x), y in rows)


def _cast(path, like, x):
    """Cast x to the dtype of a leaf of `like`, whose shape it must have."""
    at = keystr(path)
    if like.dtype != jnp.int32:
        arrange.check_dtype(f"like{at}", like, DTYPES)
        arrange.check_array(f"state{at}", x, DTYPES)
    is_wider = jnp.iscomplexobj(x) and not jnp.iscomplexobj(like)
    if x.shape != like.shape or is_wider:
        raise ValueError(
            f"state{at} must be {like.dtype}{list(like.shape)} as in like, got "
            f"{x.dtype}{list(x.shape)}. Make like with the parameters of the run."
        )
    return x.astype(like.dtype)
