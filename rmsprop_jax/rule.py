"""The RMSProp rule: one step for one array.

With t = 1 at the first step and c = 1 - decay, from top to bottom:

    g      = g + l2 * p                                       l2

    square = |g|^2                                            not centered
    mu     = mu + c * (g - mu)                                centered
    square = |g - mu|^2 / decay                               centered
    nu     = decay * nu + c * min(square, largest number)

    v      = nu / (1 - decay^t)                               bias_correction
    v      = nu                                               otherwise

    u      = g / sqrt(v + eps)                                eps_in_sqrt
    u      = g / (sqrt(v) + eps)                              otherwise
    u      = 0                                                where v + eps = 0

    update = u                                                no lr
    update = -lr * u                                          no momentum
    trace  = momentum * trace + lr * u                        lr_in_momentum
    update = -trace
    trace  = momentum * trace + u                             not lr_in_momentum
    update = -lr * trace
    With nesterov, `update` has in place of the new trace what the momentum line
    makes of it once more: momentum * trace + lr * u, or momentum * trace + u.

    update = update - lr * weight_decay * p                   weight_decay

Centered, nu is E|g|^2 - |E g|^2 rearranged: as a sum of squares it is never negative,
where the difference of two averages cancels and gives NaN. The new mu stands in
`square`, for (g - mu_new) = decay * (g - mu_old); so mu can be overwritten in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def step(
    g: jax.Array,
    p,
    nu: jax.Array,
    mu,
    trace,
    t: jax.Array,
    *,
    decay,
    eps,
    eps_in_sqrt: bool,
    bias_correction: bool,
    lr=None,
    momentum=None,
    nesterov: bool = False,
    lr_in_momentum: bool = True,
    l2=None,
    weight_decay=None,
):
    """Return the update of one array and its new buffers.

    Scalars are Python floats, or arrays when they are traced. Arithmetic is in
    float32 or wider; every output has the dtype in which its input came.

    Args:
      g: gradient.
      p: parameter, read by `l2` and `weight_decay` only; like g.
      nu: average of squares, real; like g.
      mu: average of g, or None when not centered; like g.
      trace: momentum buffer, or None without momentum; like g.
      t: number of this step, from 1; int32 [].
      decay: share of `nu` and `mu` that is kept, in [0, 1).
      eps: added to the denominator.
      eps_in_sqrt: add it inside the square root.
      bias_correction: divide `nu` by 1 - decay^t.
      lr: learning rate, or None for the bare ratio u with its sign unchanged.
      momentum: share of `trace` that is kept, in [0, 1), or None.
      nesterov: look one momentum step ahead.
      lr_in_momentum: multiply by `lr` before the trace, not after it.
      l2: coefficient of p in the gradient, or None.
      weight_decay: coefficient of lr * p in the update, or None.

    Returns:
      update, nu, mu, trace.
    """
    real = np.promote_types(wide(nu.dtype), jnp.finfo(wide(g.dtype)).dtype)
    work = np.promote_types(real, g.dtype) if jnp.iscomplexobj(g) else real
    kept = tuple(None if x is None else x.dtype for x in (g, nu, mu, trace))
    g, p, mu, trace = (_cast(x, work) for x in (g, p, mu, trace))
    nu = _cast(nu, real)

    # Formed before rounding to `real`: in float32, 1 - 0.999 is off by 1e-5.
    c = _cast(1 - _cast(decay), real)
    decay, eps = _cast(decay, real), _cast(eps, real)
    lr, momentum, l2, weight_decay = (
        _cast(x, work) for x in (lr, momentum, l2, weight_decay)
    )

    if l2 is not None:
        g = g + l2 * p
    if mu is None:
        square = _abs_sq(g)
    else:
        mu = mu + _cast(c, work) * (g - mu)
        square = _abs_sq(g - mu) / decay
    # Bounded, because an infinite nu would never decay again.
    largest = min(jnp.finfo(real).max, jnp.finfo(kept[1]).max, key=float)
    nu = decay * nu + c * jnp.minimum(square, float(largest))

    v = nu
    if bias_correction:
        # With the rounding of optax.scale_by_adam, which this equals for b1 = 0 with
        # eps outside the root.
        v = nu / (1 - jnp.asarray(decay, real) ** t.astype(real))
    if isinstance(eps, float) and eps >= jnp.finfo(real).tiny:
        u = _divide(g, v, eps, eps_in_sqrt)
    else:
        # 0/0 is 0, and so is its derivative.
        zero = v + eps == 0
        u = jnp.where(zero, 0, _divide(g, jnp.where(zero, 1, v), eps, eps_in_sqrt))

    if lr is None:
        update = u
    elif momentum is None:
        update = -lr * u
    elif lr_in_momentum:
        pushed = lr * u
        trace = momentum * trace + pushed
        update = -(momentum * trace + pushed if nesterov else trace)
    else:
        trace = momentum * trace + u
        update = -lr * (momentum * trace + u if nesterov else trace)
    if weight_decay is not None:
        update = update - lr * weight_decay * p
    return tuple(
        _cast(x, dtype) for x, dtype in zip((update, nu, mu, trace), kept, strict=True)
    )


def wide(dtype) -> np.dtype:
    """Return the dtype itself, or float32 where it is narrower or not inexact."""
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32)


def _cast(x, dtype=None) -> Any:
    """Cast an array, if not to dtype then widen it; leave None and Python floats."""
    if x is None or isinstance(x, float):
        return x
    return x.astype(dtype or wide(x.dtype))


def _abs_sq(x):
    """Return |x|^2 as a real array, differentiable at 0."""
    return jnp.real(jnp.conj(x) * x)


def _divide(g, v, eps, eps_in_sqrt):
    scale = jax.lax.rsqrt(v + eps) if eps_in_sqrt else 1 / (_sqrt(v) + eps)
    return g * scale.astype(g.dtype)


@jax.custom_jvp
def _sqrt(x):
    """Return sqrt(x), with derivative 0 instead of infinity at x = 0."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    root = _sqrt(*primals)
    zero = root == 0
    return root, jnp.where(zero, 0, tangents[0] / jnp.where(zero, 1, 2 * root))
