"""RMSProp as Optax gradient transformations: pytrees, schedules, weight decay.

The equations are in `rmsprop_jax.rule`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from rmsprop_jax import checks, rule, sharding, storage

PyTree = Any


class RMSPropState(NamedTuple):
    """State of `rmsprop` and `scale_by_rms`.

    Attributes:
      count: number of steps taken; int32 [], saturates at its maximum.
      nu: moving average of |g|^2, or of |g - mu|^2 if centered; real, like params.
      mu: moving average of g; like params, None unless centered.
      trace: momentum buffer; like params, None unless momentum.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: PyTree
    mu: PyTree | None
    trace: PyTree | None


# For jax.export of functions of a state.
export.register_namedtuple_serialization(
    RMSPropState, serialized_name="rmsprop_jax.RMSPropState"
)


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
    """Create the RMSProp optimizer, which divides gradients by their recent magnitude.

    The positional arguments are those of `optax.rmsprop`, in order and with its
    defaults. Numbers may be traced. None turns `momentum`, `l2` or `weight_decay` off.

    Args:
      learning_rate: step size, or a schedule: a function of the number of steps taken,
        0 in the first update. A negative rate ascends.
      decay: decay rate of the moving averages, in [0, 1).
      eps: added to the denominator, in units of |g|^2 if `eps_in_sqrt`, else of |g|.
      initial_scale: initial value of `nu`; TensorFlow 1 uses 1.
      eps_in_sqrt: divide by sqrt(nu + eps) (TensorFlow), not sqrt(nu) + eps (PyTorch).
      centered: divide by the standard deviation of the gradient instead of its root
        mean square.
      momentum: decay rate of the momentum buffer, in [0, 1).
      nesterov: use Nesterov momentum; no effect without `momentum`.
      bias_correction: divide `nu` by 1 - decay^t, as Adam does.
      lr_in_momentum: accumulate learning_rate * u in the momentum buffer (TensorFlow,
        Keras, Optax) instead of u (PyTorch). They differ once the rate changes.
      l2: coefficient of params added to the gradient before anything else (PyTorch's
        weight_decay).
      weight_decay: adds -learning_rate * weight_decay * params to the update, outside
        the momentum buffer (Keras, AdamW).
      weight_decay_mask: pytree of bools like params, a prefix of it, or a function from
        params to one; `weight_decay` applies where it is True. In
        `optax.inject_hyperparams`, list it in `static_args`.
      nu_dtype: storage dtype of `nu`: float32, float64, bfloat16, or uint8 (`nu` is
        then a `storage.Quantized`). None means the parameter's dtype, but at least
        float32. An update keeps the format of its state; `storage.convert` changes it.
      momentum_dtype: storage dtype of `mu` and `trace`, as above but not uint8; they
        are complex where the parameter is. If centered, bfloat16 gives errors of 1, 9
        and 36 % where gradients vary by 10, 1 and 0.1 % of their mean.

    Returns:
      A gradient transformation whose state is an `RMSPropState`. `l2` and
      `weight_decay` need `params` in `update`. Updates have the promoted dtype of
      gradients and parameters, if given. A gradient that is None, `optax.MaskedNode`
      or float0 passes through.

    Raises:
      ValueError: if a hyperparameter that is not traced is outside its domain, options
        contradict each other, or trees, shapes or dtypes do not match.

    Example:
      >>> import jax, optax, rmsprop_jax
      >>> x = jax.numpy.array([1.0, 2.0])
      >>> optimizer = rmsprop_jax.rmsprop(0.1)
      >>> state = optimizer.init(x)
      >>> for _ in range(50):
      ...     updates, state = optimizer.update(2 * x, state)  # The gradient of x^2.
      ...     x = optax.apply_updates(x, updates)
      >>> print((abs(x) < 0.1).all())
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
    """Divide gradients by their recent magnitude: the core of `rmsprop`, for chains.

    The positional arguments are those of `optax.scale_by_rms`; `centered=True` replaces
    `optax.scale_by_stddev`. The sign of the gradient is unchanged.

    Args:
      decay: decay rate of the moving averages. All arguments are as in `rmsprop`.
      eps: added to the denominator.
      initial_scale: initial value of `nu`.
      eps_in_sqrt: divide by sqrt(nu + eps), not sqrt(nu) + eps.
      bias_correction: divide `nu` by 1 - decay^t.
      centered: divide by the standard deviation, not the root mean square.
      nu_dtype: storage dtype of `nu`.
      momentum_dtype: storage dtype of `mu`.

    Returns:
      A gradient transformation whose state is an `RMSPropState`.

    Raises:
      ValueError: as in `rmsprop`.

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
    """Build the gradient transformation; `options` are those of `rule.step`."""
    found = checks.hyperparameters(initial_scale, centered, mask, options)
    initial_scale, numbers, flags = found
    nu_dtype = storage.state_dtype("nu_dtype", nu_dtype)
    momentum_dtype = storage.state_dtype("momentum_dtype", momentum_dtype)
    has_trace = "momentum" in numbers
    reads_params = [name for name in ("l2", "weight_decay") if name in numbers]

    def init(params) -> Any:
        params = jax.tree_util.tree_map_with_path(checks.parameter, params)
        leaves, treedef = jax.tree.flatten(params)

        def nu(p):
            dtype = jnp.finfo(rule.at_least_float32(p.dtype)).dtype
            return storage.initial(p, initial_scale, dtype, nu_dtype)

        def zeros(p):
            dtype = momentum_dtype or rule.at_least_float32(p.dtype)
            if jnp.issubdtype(p.dtype, jnp.complexfloating):
                dtype = np.promote_types(rule.at_least_float32(dtype), jnp.complex64)
            return sharding.full_like(p, p.shape, 0.0, dtype)

        first = leaves[0] if leaves else jax.ShapeDtypeStruct((), jnp.float32)
        return RMSPropState(
            count=sharding.full_like(first, (), 0.0, jnp.int32),
            nu=storage.unflatten(treedef, [*map(nu, leaves)], nu_dtype == jnp.uint8),
            mu=jax.tree.map(zeros, params) if centered else None,
            trace=jax.tree.map(zeros, params) if has_trace else None,
        )

    def update(updates, state: Any, params=None, **extra_args) -> tuple[Any, Any]:
        del extra_args
        checks.state(state, centered, has_trace)
        if reads_params and params is None:
            raise ValueError(
                f"params are needed for {' and '.join(reads_params)}: call "
                "update(updates, state, params)."
            )
        treedef = storage.params_treedef(state.nu)
        scalars = dict(numbers)
        if callable(scalars.get("lr")):
            lr = scalars["lr"](state.count)
            scalars["lr"] = checks.scalar("learning_rate(count)", lr, read_arrays=False)
        # Inside another trace, a nested jit would only cost time.
        run = _update if isinstance(state.count, Tracer) else _compiled_update
        param_dtypes = checks.param_dtypes(params, treedef)
        decayed = None if mask is None else checks.mask(mask, params, treedef)
        static = dict(flags=flags, param_dtypes=param_dtypes, decayed=decayed)
        return run(updates, state, params if reads_params else None, scalars, **static)

    return optax.GradientTransformationExtraArgs(init, update)


def _update(updates, state, params, scalars, *, flags, param_dtypes, decayed):
    """Update the whole tree; trees, shapes and dtypes are checked while tracing."""
    treedef = storage.params_treedef(state.nu)
    none = [None] * treedef.num_leaves
    leaves = zip(
        checks.flatten_like("updates", updates, treedef),
        none if params is None else checks.flatten_like("params", params, treedef),
        *(none if x is None else storage.leaves(x, treedef) for x in state[1:]),
        param_dtypes or none,
        decayed or [True] * treedef.num_leaves,
        strict=True,
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    arrays = {k: x for k, x in scalars.items() if isinstance(x, jax.Array)}
    static = tuple((k, x) for k, x in scalars.items() if k not in arrays) + flags

    new = []
    for i, (g, p, nu, mu, trace, param_dtype, is_decayed) in enumerate(leaves):
        if not checks.is_absent(g):
            has_params = params is not None
            checks.gradient(g, p, nu, mu, trace, param_dtype, has_params, treedef, i)
            options = (*static, ("update_dtype", rule.promote(g.dtype, param_dtype)))
            g, nu, mu, trace = _leaf(
                g, p, nu, mu, trace, count, arrays, options=options, decayed=is_decayed
            )
        new.append((g, nu, mu, trace))
    updates, nu, mu, trace = ([leaf[k] for leaf in new] for k in range(4))
    return treedef.unflatten(updates), RMSPropState(
        count=count,
        nu=storage.unflatten(treedef, nu, isinstance(state.nu, storage.Quantized)),
        mu=None if state.mu is None else treedef.unflatten(mu),
        trace=None if state.trace is None else treedef.unflatten(trace),
    )


# At module level, so that an optimizer created anew at every step compiles once.
_compiled_update = jax.jit(
    _update, static_argnames=["flags", "param_dtypes", "decayed"]
)


# Jitted separately, so that leaves of the same shape and dtype are traced once.
@functools.partial(jax.jit, static_argnames=("options", "decayed"))
def _leaf(g, p, nu, mu, trace, t, arrays, *, options, decayed):
    options = arrays | dict(options) | ({} if decayed else {"weight_decay": None})
    stored = (nu, mu, trace)
    nu, mu, trace = map(storage.decode, stored)
    update, *new = rule.step(g, p, nu, mu, trace, t, **options)
    return update, *map(storage.encode_dithered, new, stored, 3 * [t])
