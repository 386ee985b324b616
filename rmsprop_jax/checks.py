"""Validation of arguments, gradients and state."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from rmsprop_jax import rule, storage

FLAGS = ("eps_in_sqrt", "nesterov", "bias_correction", "lr_in_momentum")


def hyperparameters(initial_scale, centered, mask, options):
    """Validate hyperparameters and split `options` into numbers and flags.

    Args:
      initial_scale: initial value of `nu`.
      centered: whether `nu` is centered.
      mask: weight decay mask, or None.
      options: arguments of `rule.step`; an optional number that is None is off.

    Returns:
      The initial scale; a dict of the numbers that are not None and `one_minus_decay`;
      a tuple of flags as (name, bool). Python and NumPy numbers become floats.
    """
    flags = tuple((name, bool(options[name])) for name in FLAGS if name in options)
    numbers: dict[str, Any] = dict(
        decay=scalar("decay", options["decay"], 0, 1),
        eps=scalar("eps", options["eps"], 0),
    )
    decay = numbers["decay"]
    if isinstance(decay, jax.Array):
        decay = decay.astype(rule.at_least_float32(decay.dtype))
    numbers["one_minus_decay"] = 1 - decay
    if "lr" in options:
        lr = options["lr"]
        numbers["lr"] = lr if callable(lr) else scalar("learning_rate", lr)
    for name, high in (("momentum", 1), ("l2", math.inf), ("weight_decay", math.inf)):
        if options.get(name) is not None:
            numbers[name] = scalar(name, options[name], 0, high)
    start = scalar("initial_scale", initial_scale, 0)
    if options["bias_correction"] and (centered or _concrete(start)):
        cause = "centered=True" if centered else f"initial_scale={initial_scale}"
        raise ValueError(
            f"bias_correction cannot be combined with {cause}: it corrects an average that "
            "is not centered and starts at 0. Drop one of the two."
        )
    seen = _concrete(numbers["decay"])
    if centered and seen is not None and seen < np.finfo(np.float32).tiny:
        raise ValueError(
            f"centered requires decay > 0, got {seen:g}: a single gradient has no "
            "variance. Use a decay above 0, about 0.9."
        )
    if mask is not None and "weight_decay" not in numbers:
        raise ValueError(
            "weight_decay_mask says where weight_decay applies, but weight_decay is "
            "None. Pass weight_decay, or drop the mask."
        )
    return start, numbers, flags


def scalar(name, value, low=-math.inf, high=math.inf, wait=True):
    """Check that value is a finite real scalar in [low, high), and return it.

    Python and NumPy scalars become floats. Without `wait`, a JAX array is not read.
    """
    if not isinstance(
        value, int | float | complex | np.ndarray | np.generic | jax.Array
    ):
        raise ValueError(f"{name} must be a number or a scalar array, got {value!r}.")
    dtype = jnp.result_type(value)
    if np.shape(value) != () or np.issubdtype(dtype, np.complexfloating):
        raise ValueError(
            f"{name} must be one real number, got {dtype}{list(np.shape(value))}. To "
            "try several values at once, use jax.vmap."
        )
    seen = _concrete(value) if wait or not isinstance(value, jax.Array) else None
    if seen is not None and not (math.isfinite(seen) and low <= seen < high):
        fix = ""
        if seen == high and dtype.itemsize < 4 and jnp.issubdtype(dtype, np.floating):
            fix = f" Rounding to {dtype} may have moved it there: pass float32 "
            fix += "(in optax.inject_hyperparams, hyperparam_dtype=jnp.float32)."
        domain = "finite" if low == -math.inf else f"in [{low}, {high})"
        raise ValueError(f"{name} must be {domain}, got {seen}.{fix}")
    return value if isinstance(value, jax.Array) else seen


def _concrete(value):
    """Return the value of a scalar as a float, or None if it is traced."""
    if isinstance(value, Tracer):
        return None
    return float(jax.device_get(value))


def parameter(path, leaf):
    """Check a leaf of params and return it as an array or ShapeDtypeStruct."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    try:
        return jnp.asarray(leaf)
    except TypeError:
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} must be an array, got "
            f"{type(leaf).__name__}. Exclude parameters that are not trained: filter the "
            "tree, or use optax.masked."
        ) from None


def state(state, centered, momentum):
    """Raise ValueError if the state was made with other options."""
    if not (hasattr(state, "nu") and hasattr(state, "trace")):
        raise ValueError(
            f"state must be an RMSPropState, got {type(state).__name__}. Pass the "
            "state that init or the last update returned; convert a state of "
            "optax.rmsprop with interop.from_optax."
        )
    for name, option, wanted in (
        ("mu", "centered", centered),
        ("trace", "momentum", momentum),
    ):
        if (getattr(state, name) is not None) != wanted:
            raise ValueError(
                f"state.{name} is {'missing' if wanted else 'present'}, but {option} "
                f"is {'on' if wanted else 'off'}: the state was made with other "
                "options. Use those, or call init again."
            )


def leaves(name, values, treedef):
    """Flatten a tree, which must have the structure of the parameters."""
    try:
        found = treedef.flatten_up_to(values)
    except ValueError as error:
        found = jax.tree_util.tree_flatten_with_path(values)[0]
        found = [jax.tree_util.keystr(path) for path, _ in found]
        known = [_path(treedef, i) for i in range(treedef.num_leaves)]
        missing = ", ".join(x for x in known if x not in found) or "nothing"
        extra = ", ".join(x for x in found if x not in known) or "nothing"
        if missing == extra == "nothing":
            missing += " (but the container types differ)"
        raise ValueError(
            f"{name} must have the tree structure that init was given; missing: "
            f"{missing}; extra: {extra}. {error}"
        ) from None
    return [
        jnp.asarray(x) if isinstance(x, int | float | complex) else x for x in found
    ]


def param_dtypes(params, treedef):
    """Return the dtype of each parameter, or None if params do not match the state.

    A mismatch is an error only where params are used: many programs pass a whole
    model to transformations that ignore it.
    """

    def dtype(p):
        floating = hasattr(p, "dtype") and jnp.issubdtype(p.dtype, jnp.inexact)
        return p.dtype if floating else None

    try:
        return tuple(map(dtype, treedef.flatten_up_to(params)))
    except ValueError:
        return None


def is_absent(g):
    """Return whether g marks a missing gradient, which passes through unchanged."""
    return (
        g is None
        or isinstance(g, optax.MaskedNode)
        or getattr(g, "dtype", None) == jax.dtypes.float0
    )


def gradient(g, p, nu, mu, trace, reads_params, treedef, i):
    """Raise ValueError if gradient leaf i does not match its parameter and state."""

    def at():
        return _path(treedef, i)

    for name, x in (("updates", g), ("params", p))[: 1 + reads_params]:
        if not hasattr(x, "dtype"):
            raise ValueError(f"{name}{at()} must be an array, got {type(x).__name__}.")
    if not jnp.issubdtype(g.dtype, jnp.inexact):
        raise ValueError(
            f"updates{at()} must be floating point or complex, got {g.dtype}. "
            "Exclude parameters that are not trained, with optax.masked or optax.partition."
        )
    if g.shape != nu.shape:
        raise ValueError(
            f"updates{at()} must have shape {nu.shape} as in init, got {g.shape}: "
            "gradients are not broadcast. Reshape one of the two."
        )
    if p is not None and p.shape != nu.shape:
        raise ValueError(
            f"params{at()} must have shape {nu.shape} as in init, got {p.shape}."
        )
    if not storage.is_supported(nu):
        arrays = getattr(nu, "_asdict", lambda: {"": nu})().items()
        found = ", ".join(f"{k} {x.dtype}{list(x.shape)}".strip() for k, x in arrays)
        raise ValueError(
            f"state.nu{at()} must be float32, float64, bfloat16, or a Quantized of "
            f"uint8 codes and a float32 scale for each row, got {found}. Restore a "
            "state into what init returns, and cast it with storage.convert only."
        )
    for other in (p, mu, trace):
        if other is not None and jnp.iscomplexobj(other) != jnp.iscomplexobj(g):
            raise ValueError(
                f"updates{at()} is {g.dtype}, but its parameter or state is "
                f"{other.dtype}. Both must be real, or both complex."
            )


def mask(mask, params, treedef):
    """Expand the weight decay mask to one bool for each leaf."""

    def spread(m, part):
        if isinstance(m, str) or np.asarray(m).dtype != bool or np.ndim(m):
            raise ValueError(f"It contains {m!r}.")
        return jax.tree.map(lambda _: bool(m), part)

    try:
        mask = mask(params) if callable(mask) else mask
        leaves = treedef.flatten_up_to(jax.tree.map(spread, mask, params))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "weight_decay_mask must be a tree of bools like params, or a prefix of it. "
            f"{error}"
        ) from None
    return tuple(x is True for x in leaves)


def _path(treedef, i):
    numbered = treedef.unflatten(range(treedef.num_leaves))
    return jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(numbered)[0][i][0])
