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
      centered: whether `nu` is centered; bool.
      mask: weight decay mask, or None.
      options: arguments of `rule.step`; an optional number that is None is off.

    Returns:
      The initial scale; a dict of the numbers that are not None and `one_minus_decay`;
      a tuple of flags as (name, bool). Python and NumPy numbers become floats.
    """
    flag("centered", centered)
    flags = tuple((k, flag(k, options[k])) for k in FLAGS if k in options)
    numbers: dict[str, Any] = dict(
        decay=scalar("decay", options["decay"], 0, 1),
        eps=scalar("eps", options["eps"], 0),
    )
    decay = numbers["decay"]
    if isinstance(decay, jax.Array):
        decay = decay.astype(rule.promote(decay.dtype, jnp.result_type(float)))
    numbers["one_minus_decay"] = 1 - decay
    if "lr" in options:
        lr = options["lr"]
        numbers["lr"] = lr if callable(lr) else scalar("learning_rate", lr)
    for name, high in (("momentum", 1), ("l2", math.inf), ("weight_decay", math.inf)):
        if options.get(name) is not None:
            numbers[name] = scalar(name, options[name], 0, high)
    initial_scale = scalar("initial_scale", initial_scale, 0)
    if options["bias_correction"] and (centered or _concrete(initial_scale)):
        cause = "centered=True" if centered else f"initial_scale={initial_scale}"
        raise ValueError(
            f"bias_correction cannot be combined with {cause}: it corrects an average "
            "that is not centered and starts at 0. Drop one of the two."
        )
    seen = _concrete(numbers["decay"])
    if centered and seen is not None and seen < np.finfo(np.float32).tiny:
        raise ValueError(
            f"centered requires decay > 0, got {seen:g}: a single gradient has no "
            "variance. Use a decay above 0, about 0.9."
        )
    if mask is False:
        raise ValueError(
            "weight_decay_mask=False applies weight_decay nowhere: drop both. In "
            "optax.inject_hyperparams, which calls functions, list it in static_args."
        )
    if mask is not None and "weight_decay" not in numbers:
        raise ValueError(
            "weight_decay_mask says where weight_decay applies, but weight_decay is "
            "None. Pass weight_decay, or drop the mask."
        )
    return initial_scale, numbers, flags


def flag(name, value):
    """Check that value is a bool, and return it."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def scalar(name, value, low=-math.inf, high=math.inf, read_arrays=True):
    """Check that value is a finite real scalar in [low, high), and return it.

    Python and NumPy scalars become floats. Reading a JAX array waits for it.
    """
    if not isinstance(
        value, int | float | complex | np.ndarray | np.generic | jax.Array
    ):
        or_schedule = ", or a schedule" * (name == "learning_rate")
        raise ValueError(
            f"{name} must be a number or a scalar array{or_schedule}, got {value!r}."
        )
    dtype = jnp.result_type(value)
    if np.shape(value) != () or np.issubdtype(dtype, np.complexfloating):
        raise ValueError(
            f"{name} must be one real number, got {dtype}{list(np.shape(value))}. To "
            "try several values at once, use jax.vmap."
        )
    read = read_arrays or not isinstance(value, jax.Array)
    seen = _concrete(value) if read else None
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
            f"{type(leaf).__name__}. Exclude parameters that are not trained: filter "
            "the tree, or use optax.masked."
        ) from None


def state(state, centered, momentum):
    """Raise ValueError if the state was made with other options."""
    storage.check_state(
        state,
        "Pass the state that init or the last update returned; convert a state of "
        "optax.rmsprop with interop.from_optax.",
    )
    wanted_by = ("mu", "centered", centered), ("trace", "momentum", momentum)
    for name, option, wanted in wanted_by:
        if (getattr(state, name) is not None) != wanted:
            raise ValueError(
                f"state.{name} is {'missing' if wanted else 'present'}, but {option} "
                f"is {'on' if wanted else 'off'}: the state was made with other "
                "options. Use those, or call init again."
            )


def flatten_like(name, values, treedef):
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


def gradient(g, p, nu, mu, trace, param_dtype, reads_params, treedef, i):
    """Raise ValueError if gradient leaf i does not match its parameter and state."""
    at = lambda: _path(treedef, i)
    for name, x in (("updates", g), ("params", p))[: 1 + reads_params]:
        if not hasattr(x, "dtype"):
            raise ValueError(f"{name}{at()} must be an array, got {type(x).__name__}.")
    if not jnp.issubdtype(g.dtype, jnp.inexact):
        raise ValueError(
            f"updates{at()} must be floating point or complex, got {g.dtype}. "
            "Exclude parameters that are not trained: use optax.masked or "
            "optax.partition."
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
            f"uint8 codes and a bfloat16 scale for each row, got {found}. Restore a "
            "state into what init returns, and cast it with storage.convert only. It "
            "also reads the float32 scales of version 0.1."
        )
    for dtype in (param_dtype, *(x.dtype for x in (mu, trace) if x is not None)):
        if dtype is not None and (dtype.kind == "c") != (g.dtype.kind == "c"):
            raise ValueError(
                f"updates{at()} is {g.dtype}, but its parameter or state is {dtype}. "
                "Both must be real, or both complex."
            )


def mask(mask, params, treedef):
    """Expand the weight decay mask to one bool for each leaf."""

    def spread(path, m, part):
        if isinstance(m, str) or np.asarray(m).dtype != bool or np.ndim(m):
            raise ValueError(
                f"It has {m!r} at {jax.tree_util.keystr(path) or 'the top'}."
            )
        return jax.tree.map(lambda _: bool(m), part)

    try:
        mask = mask(params) if callable(mask) else mask
        found = jax.tree_util.tree_map_with_path(spread, mask, params)
        found = treedef.flatten_up_to(found)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "weight_decay_mask must be a tree of bools like params, or a prefix of it. "
            f"{error}"
        ) from None
    # Where params have a subtree in place of a leaf, which another check refuses, so
    # does the mask, and a subtree cannot be hashed.
    return tuple(x is True for x in found)


def _path(treedef, i):
    numbered = treedef.unflatten(range(treedef.num_leaves))
    return jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(numbered)[0][i][0])
