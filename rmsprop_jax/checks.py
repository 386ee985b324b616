"""What is refused, and in which words: what came, what was allowed, the fix."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def options(initial_scale, centered, mask, options):
    """Return the initial scale and the options of the rule, numbers made plain."""
    limits = dict(decay=1, eps=math.inf, momentum=1, l2=math.inf, weight_decay=math.inf)
    checked = dict(options)
    for name, value in options.items():
        if name in ("eps_in_sqrt", "nesterov", "bias_correction", "lr_in_momentum"):
            checked[name] = bool(value)
    for name, below in limits.items():
        # None means off, for those that can be.
        if name in ("decay", "eps") or options.get(name) is not None:
            checked[name] = number(name, options[name], below)
    lr = options.get("lr")
    if callable(lr):
        checked["lr"] = _hashable(lr)
    elif "lr" in options:
        checked["lr"] = number("learning_rate", lr)
    start = number("initial_scale", initial_scale)
    if options["bias_correction"] and (centered or _concrete(start)):
        cause = "centered=True" if centered else f"initial_scale={initial_scale}"
        raise ValueError(
            f"bias_correction has no meaning with {cause}: it corrects an average that "
            "is not centered and starts at 0. Drop one of the two."
        )
    seen = _concrete(checked["decay"])
    if centered and seen is not None and seen < np.finfo(np.float32).tiny:
        raise ValueError(
            f"centered has no meaning with decay={seen:g}: one gradient has no spread. "
            "Use a decay above 0, about 0.9."
        )
    if mask is not None and options["weight_decay"] is None:
        raise ValueError(
            "weight_decay_mask says where weight_decay acts, but weight_decay is None. "
            "Pass weight_decay, or drop the mask."
        )
    return start, checked


def number(name, value, below=math.inf):
    """Return a scalar in [0, below): a Python or NumPy number as a float."""
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
    seen = _concrete(value)
    if seen is not None and not 0 <= seen < below:
        fix = ""
        if seen == below and dtype.itemsize < 4 and jnp.issubdtype(dtype, np.floating):
            fix = f" Rounding to {dtype} may have moved it there: pass float32 "
            fix += "(in optax.inject_hyperparams, hyperparam_dtype=jnp.float32)."
        raise ValueError(f"{name} must be in [0, {below}), got {seen}.{fix}")
    return value if isinstance(value, jax.Array) else seen


def state_dtype(name, dtype):
    """Return a dtype in which state can be kept, or None for None."""
    if dtype is None:
        return None
    allowed = [jnp.float32, jnp.float64, jnp.bfloat16]
    # Momentum is signed, and codes of one byte have no sign.
    allowed += [jnp.uint8] if name == "nu_dtype" else []
    names = ", ".join(jnp.dtype(x).name for x in allowed)
    text = f"{name} must be {names} or None, got"
    try:
        if not isinstance(dtype, str | type | np.dtype):
            raise TypeError
        known = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(
            f"{text} {dtype!r}. In optax.inject_hyperparams, list it in static_args."
        ) from None
    if known not in allowed:
        raise ValueError(f"{text} {known}.")
    if known != jax.dtypes.canonicalize_dtype(known):
        raise ValueError(f"{name}={known} needs jax.config.jax_enable_x64.")
    return known


def real_nu(dtype, tree):
    """Refuse a small dtype for a `nu` that is complex where this tree is."""
    small = dtype is not None and jnp.dtype(dtype).itemsize < 4
    if small and any(map(np.iscomplexobj, jax.tree.leaves(tree))):
        raise ValueError(
            f"nu_dtype={jnp.dtype(dtype)} keeps real numbers, but presets.torch has a "
            "complex nu for complex parameters. Use None, or rmsprop: its nu is real."
        )


def parameter(path, leaf):
    """Return a leaf of the tree that `init` was given as an array."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    if isinstance(leaf, jax.Array):
        return leaf
    try:
        return jnp.asarray(leaf)
    except TypeError:
        at = jax.tree_util.keystr(path)
        raise ValueError(
            f"params{at} must be an array, got {type(leaf).__name__}. Leave out what "
            "is not trained: filter the tree, or use optax.masked."
        ) from None


def state(state, centered, momentum):
    """Refuse a state that other options made."""
    if not (hasattr(state, "nu") and hasattr(state, "trace")):
        raise ValueError(
            f"state must be an RMSPropState, got {type(state).__name__}. Pass what "
            "init or the last update returned."
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


def leaves(name, values, tree):
    """Return the leaves of a tree, refusing one that is not like the parameters."""
    try:
        found = tree.flatten_up_to(values)
        return [
            jnp.asarray(x) if isinstance(x, int | float | complex) else x for x in found
        ]
    except ValueError as error:
        found = jax.tree_util.tree_flatten_with_path(values)[0]
        found = [jax.tree_util.keystr(keys) for keys, _ in found]
        known = [_path(tree, i) for i in range(tree.num_leaves)]
        missing = ", ".join(x for x in known if x not in found) or "nothing"
        extra = ", ".join(x for x in found if x not in known) or "nothing"
        if missing == extra == "nothing":
            missing += " (but the containers are of other types)"
        raise ValueError(
            f"{name} must have the tree structure that init was given; missing: "
            f"{missing}; extra: {extra}. {error}"
        ) from None


def absent(g):
    """Say whether this is a place without a gradient, which is passed through."""
    return (
        g is None
        or isinstance(g, optax.MaskedNode)
        or getattr(g, "dtype", None) == jax.dtypes.float0
    )


def gradient(g, p, nu, mu, trace, reads_params, tree, i):
    """Refuse leaf i of the gradients if it does not fit its parameter and state."""

    def at():
        return _path(tree, i)

    for name, x in (("updates", g), ("params", p))[: 1 + reads_params]:
        if not hasattr(x, "dtype"):
            raise ValueError(f"{name}{at()} must be an array, got {type(x).__name__}.")
    if not jnp.issubdtype(g.dtype, jnp.inexact):
        raise ValueError(
            f"updates{at()} must be floating point or complex, got {g.dtype}. Leave "
            "out what is not trained, with optax.masked or optax.partition."
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
    if not _kept(nu):
        kinds = getattr(nu, "_asdict", lambda: {"": nu})().items()
        found = ", ".join(f"{k} {x.dtype}{list(x.shape)}".strip() for k, x in kinds)
        raise ValueError(
            f"state.nu{at()} must be float32, float64, bfloat16, or a Quantized of "
            f"uint8 codes and a float32 scale a row, got {found}. Restore a state into "
            "what init returns, and cast it with storage.convert only."
        )
    for other in (p, mu, trace):
        if other is not None and jnp.iscomplexobj(other) != jnp.iscomplexobj(g):
            raise ValueError(
                f"updates{at()} is {g.dtype}, but its parameter or state is "
                f"{other.dtype}. Both must be real, or both complex."
            )


def _kept(nu):
    """Say whether an array of `nu`, or a pair of codes and scale, is a known format."""
    if not hasattr(nu, "codes"):
        wide = jnp.issubdtype(nu.dtype, jnp.inexact) and jnp.finfo(nu.dtype).bits >= 32
        return wide or nu.dtype == jnp.bfloat16
    codes, scale = nu
    rows = (*codes.shape[:-1], 1)
    fits = scale.shape == rows if codes.dtype == jnp.uint8 else scale.size == 1
    return fits and codes.dtype in (jnp.uint8, jnp.float32) and scale.dtype == "float32"


def mask(mask, params, tree):
    """Return the mask as one bool for each leaf."""

    def spread(m, part):
        if isinstance(m, str) or np.asarray(m).dtype != bool or np.ndim(m):
            raise ValueError(f"Got {m!r}.")
        return jax.tree.map(lambda _: bool(m), part)

    try:
        mask = mask(params) if callable(mask) else mask
        leaves = tree.flatten_up_to(jax.tree.map(spread, mask, params))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "weight_decay_mask must be a tree of bools like params, or a prefix of it. "
            f"{error}"
        ) from None
    return tuple(x is True for x in leaves)


def _path(tree, i):
    numbered = tree.unflatten(range(tree.num_leaves))
    return jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(numbered)[0][i][0])


def _concrete(value):
    """Return the value of a scalar as a float, or None while it is traced."""
    if isinstance(value, Tracer):
        return None
    return float(jax.device_get(value))


def _hashable(schedule):
    """Return the schedule, wrapped where it could not be a key of the jit cache."""
    try:
        hash(schedule)
    except TypeError:
        return functools.partial(schedule)
    return schedule
