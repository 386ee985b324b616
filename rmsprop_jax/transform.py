"""RMSProp as Optax gradient transformations: trees, schedules, masks, refusals.

The equations are in `rmsprop_jax.rule`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from rmsprop_jax import checks, rule, storage
from rmsprop_jax.storage import Quantized

PyTree = Any


class RMSPropState(NamedTuple):
    """State of `rmsprop` and `scale_by_rms`, the same for every option.

    Attributes:
      count: steps taken; int32 [], stays at its maximum once there.
      nu: moving average of |g|^2, or of |g - mu|^2 if centered; real, like params.
      mu: moving average of g; like params, None unless centered.
      trace: momentum buffer; like params, None unless momentum.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: PyTree
    mu: PyTree | None
    trace: PyTree | None


def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    lr_in_momentum: bool = True,
    l2: ArrayLike | None = None,
    weight_decay: ArrayLike | None = None,
    weight_decay_mask: PyTree | Callable[[optax.Params], PyTree] | None = None,
    nu_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Build the RMSProp optimizer: each step is divided by a running gradient size.

    Takes the arguments of `optax.rmsprop` in their order; the keyword-only ones are
    additions. Every number may be a traced or vmapped scalar. None means off.

    Args:
      learning_rate: step size, or a schedule: a pure function, which is compiled, from
        the steps taken to it. The first update uses `learning_rate(0)`.
      decay: share of the averages that each step keeps, in [0, 1).
      eps: added to the denominator, in units of |g|^2 if `eps_in_sqrt`, else of |g|.
      initial_scale: value at which `nu` starts. TensorFlow 1 starts at 1.
      eps_in_sqrt: divide by sqrt(nu + eps) (TensorFlow), not sqrt(nu) + eps (PyTorch).
      centered: divide by the gradient's standard deviation, not its root mean square.
      momentum: share of the momentum buffer that each step keeps, in [0, 1).
      nesterov: look one momentum step ahead; nothing without `momentum`.
      bias_correction: divide `nu` by 1 - decay^t, as Adam does.
      lr_in_momentum: the buffer holds learning_rate * u (TensorFlow, Keras, Optax), not
        u (PyTorch). They differ once the learning rate changes.
      l2: adds l2 * params to the gradient, before everything else (PyTorch's
        weight_decay).
      weight_decay: adds -learning_rate * weight_decay * params to the update, outside
        the momentum buffer (Keras, AdamW).
      weight_decay_mask: tree of bools like params (or a prefix of it), or a function
        from params to one; where False, `weight_decay` does not act.
      nu_dtype: dtype in which `nu` is kept: float32, float64, bfloat16 (2 bytes) or
        uint8 (1 byte; `nu` is then a `storage.Quantized`). None: that of the parameter,
        but at least float32. The small ones: `rmsprop_jax.storage`. It is for `init`: a
        run goes on in the format that its state has; `storage.convert` changes it.
      momentum_dtype: the same for `mu` and `trace`, but not uint8; complex where the
        parameter is.

    Returns:
      A transformation whose state is an `RMSPropState`. Updates have the dtype of the
      gradients. `update` needs `params` if `l2` or `weight_decay` is given.

    Raises:
      ValueError: at construction, if a number is outside its domain or options
        contradict each other; in `init` and `update`, if trees, shapes or dtypes do not
        fit. The message names the entry, what came, what was allowed and the fix.

    Example:
      >>> import jax, optax, rmsprop_jax
      >>> loss = lambda x: (x**2).sum()
      >>> x = jax.numpy.array([1.0, 2.0])
      >>> optimizer = rmsprop_jax.rmsprop(0.1)
      >>> state = optimizer.init(x)
      >>> for _ in range(50):
      ...     updates, state = optimizer.update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(loss(x) < 0.01)
      True

    References:
      Tieleman and Hinton, Lecture 6.5 of Neural Networks for Machine Learning, 2012.
      Graves, Generating Sequences With Recurrent Neural Networks, 2013, eqs. 38-45
      (centered). The equations: `rmsprop_jax.rule`.
    """
    return _transformation(
        lr=learning_rate,
        decay=decay,
        eps=eps,
        initial_scale=initial_scale,
        eps_in_sqrt=eps_in_sqrt,
        centered=centered,
        momentum=momentum,
        nesterov=nesterov,
        bias_correction=bias_correction,
        lr_in_momentum=lr_in_momentum,
        l2=l2,
        weight_decay=weight_decay,
        mask=weight_decay_mask,
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def scale_by_rms(
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    nu_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide gradients by their running size: the core of `rmsprop` for `optax.chain`.

    Takes the arguments of `optax.scale_by_rms` in their order, and covers
    `optax.scale_by_stddev` with `centered=True`. The sign of the gradient stays.

    Args:
      decay: see `rmsprop`, as for all arguments.
      eps: added to the denominator.
      initial_scale: value at which `nu` starts.
      eps_in_sqrt: divide by sqrt(nu + eps), not sqrt(nu) + eps.
      bias_correction: divide `nu` by 1 - decay^t.
      centered: divide by the standard deviation, not the root mean square.
      nu_dtype: dtype of `nu`.
      momentum_dtype: dtype of `mu`.

    Returns:
      A transformation whose state is an `RMSPropState`.

    Raises:
      ValueError: as `rmsprop`.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> core = rmsprop_jax.scale_by_rms(decay=0.75)
      >>> gradients = jnp.array([1e-3, -1e3])
      >>> scaled, _ = core.update(gradients, core.init(gradients))
      >>> print([f"{x:.2f}" for x in scaled])
      ['1.96', '-2.00']

    References:
      The equations, with lr None: `rmsprop_jax.rule`.
    """
    return _transformation(
        decay=decay,
        eps=eps,
        initial_scale=initial_scale,
        eps_in_sqrt=eps_in_sqrt,
        centered=centered,
        bias_correction=bias_correction,
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def _transformation(
    *, initial_scale, centered, mask=None, nu_dtype, momentum_dtype, **options
):
    """Close `init` and `update` over checked options; `options` are `rule.step`'s."""
    centered = bool(centered)
    start, options = checks.options(initial_scale, centered, mask, options)
    nu_dtype = checks.state_dtype("nu_dtype", nu_dtype)
    momentum_dtype = checks.state_dtype("momentum_dtype", momentum_dtype)
    has_trace = options.get("momentum") is not None
    reads_params = [k for k in ("l2", "weight_decay") if options.get(k) is not None]
    options = _split(options)

    def init(params) -> Any:
        params = jax.tree_util.tree_map_with_path(checks.parameter, params)
        leaves, tree = jax.tree.flatten(params)

        def nu(p):
            dtype = jnp.finfo(rule.wide(nu_dtype or p.dtype)).dtype
            return _full(p, dtype, nu_dtype, *_split({"value": start}))

        def zeros(p):
            dtype = rule.wide(momentum_dtype or p.dtype)
            if jnp.iscomplexobj(p):
                dtype = np.promote_types(dtype, jnp.complex64)
            return _full(p, dtype, momentum_dtype, *_split({"value": 0.0}))

        return RMSPropState(
            count=_zero(leaves[:1]),
            nu=storage.unflatten(tree, [*map(nu, leaves)], nu_dtype == jnp.uint8),
            mu=jax.tree.map(zeros, params) if centered else None,
            trace=jax.tree.map(zeros, params) if has_trace else None,
        )

    def update(updates, state: Any, params=None, **extra_args) -> tuple[Any, Any]:
        del extra_args
        checks.state(state, centered, has_trace)
        if reads_params and params is None:
            raise ValueError(
                f"{' and '.join(reads_params)} must read the parameters: call "
                "update(updates, state, params)."
            )
        decayed = None
        if mask is not None:
            decayed = checks.mask(mask, params, storage.structure(state.nu))
        params = params if reads_params else None
        # Inside another trace, a jit of its own would only cost time.
        step = _update if isinstance(state.count, Tracer) else _compiled_update
        return step(updates, state, params, decayed, *options)

    return optax.GradientTransformationExtraArgs(init, update)


# The compiled functions live at module level, so that a factory called anew at every
# step compiles once.
@functools.partial(jax.jit, keep_unused=True)
def _zero(leaves):
    """Return the number 0 on the devices of the leaves."""
    return jnp.zeros([], jnp.int32)


@functools.partial(jax.jit, static_argnames=("dtype", "kept", "static"))
def _full(p, dtype, kept, arrays, static):
    return storage.full(p, (arrays | dict(static))["value"], dtype, kept)


def _update(updates, state, params, decayed, arrays, static):
    """Step the whole tree; trees, shapes and dtypes are checked while it is traced."""
    tree = storage.structure(state.nu)
    none = [None] * tree.num_leaves
    rows = zip(
        checks.leaves("updates", updates, tree),
        none if params is None else checks.leaves("params", params, tree),
        *(none if x is None else storage.leaves(x, tree) for x in state[1:]),
        decayed or [True] * tree.num_leaves,
        strict=True,
    )
    options = dict(static) | arrays
    if callable(options.get("lr")):
        lr = options["lr"](state.count)
        options["lr"] = checks.number("learning_rate(count)", lr)
    count = jnp.asarray(optax.safe_increment(state.count))

    new = []
    for i, (g, p, nu, mu, trace, decay) in enumerate(rows):
        if not checks.absent(g):
            checks.gradient(g, p, nu, mu, trace, params is not None, tree, i)
            used = options if decay else options | {"weight_decay": None}
            g, nu, mu, trace = _leaf(g, p, nu, mu, trace, count, *_split(used))
        new.append((g, nu, mu, trace))
    steps, *buffers = ([row[k] for row in new] for k in range(4))
    return tree.unflatten(steps), RMSPropState(
        count,
        *(
            None if old is None else storage.unflatten(tree, x, type(old) is Quantized)
            for old, x in zip(state[1:], buffers, strict=True)
        ),
    )


_compiled_update = jax.jit(_update, static_argnames=("decayed", "static"))


# Jitted by itself, so that leaves of one shape and dtype are traced once.
@functools.partial(jax.jit, static_argnames="static")
def _leaf(g, p, nu, mu, trace, t, arrays, static):
    stored = (nu, mu, trace)
    nu, mu, trace = map(storage.decode, stored)
    update, *new = rule.step(g, p, nu, mu, trace, t, **arrays, **dict(static))
    return update, *map(storage.encode, new, stored, 3 * [t])


def _split(options):
    """Part options into arrays, which are traced, and the rest, which is hashed."""
    arrays = {k: x for k, x in options.items() if isinstance(x, jax.Array)}
    return arrays, tuple((k, x) for k, x in options.items() if k not in arrays)
