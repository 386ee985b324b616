"""The RMSProp rule: one step for one array.

With t = 1 at the first step and c = 1 - decay, evaluated from top to bottom:

    g      = g + l2 * p                                       l2
    g      = g, limited to a magnitude of 2^62                finite g

    square = |g|^2                                            not centered
    mu     = mu + c * (g - mu)                                centered
    square = |g - mu|^2 / decay                               centered
    nu     = decay * nu + c * square

    v      = nu / (1 - decay^t)                               bias_correction
    v      = nu                                               otherwise

    u      = g / sqrt(v + eps)                                eps_in_sqrt
    u      = g / (sqrt(v) + eps)                              otherwise
    u      = 0, with derivatives 0                            where v + eps = 0

    update = u                                                no lr
    update = -lr * u                                          no momentum
    trace  = momentum * trace + lr * u                        lr_in_momentum
    update = -trace
    trace  = momentum * trace + u                             not lr_in_momentum
    update = -lr * trace
    With nesterov, `update` uses, in place of the new trace, the momentum line applied
    to it once more: momentum * trace + lr * u, or momentum * trace + u.

    update = update - lr * weight_decay * p                   weight_decay

The limit, 2^510 if nu is float64, keeps squares finite: an infinite nu would never
decay. Thus |u| <= 1 / sqrt(c) for every finite gradient if not centered, unless eps and
|g|^2 both underflow. An infinite gradient or NaN gives NaN.

If centered, nu is E|g|^2 - |E g|^2, rearranged as a sum of squares: it is never
negative, whereas the difference of the averages cancels and gives NaN. `square` uses
the new mu, as g - mu_new = decay * (g - mu_old), so that mu can be updated in place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def step(  # noqa: D417
    g: jax.Array,
    p,
    nu: jax.Array,
    mu,
    trace,
    t: jax.Array,
    *,
    decay,
    one_minus_decay,
    eps,
    eps_in_sqrt: bool,
    bias_correction: bool,
    lr=None,
    momentum=None,
    nesterov: bool = False,
    lr_in_momentum: bool = True,
    l2=None,
    weight_decay=None,
    update_dtype=None,
):
    """Compute the update of one array and its new moving averages.

    Arithmetic is in at least float32.

    Args:
      g: gradient.
      p: parameter, read only by `l2` and `weight_decay`; like g.
      nu: moving average of |g|^2, real; like g.
      mu: moving average of g, or None unless centered; like g.
      trace: momentum buffer, or None without momentum; like g.
      t: number of this step, starting at 1; int32 [].
      decay: as in `rmsprop_jax.rmsprop`, like all that follow, as Python floats or
        scalar arrays. None turns a term off.
      one_minus_decay: 1 - decay, computed before rounding to float32, where 1 - 0.999
        is off by 5e-5.
      lr: learning rate, or None to return the ratio u with the sign of g.
      update_dtype: dtype of the update; None means that of g.

    Returns:
      update, nu, mu, trace; the last three keep their dtypes.
    """
    real = np.promote_types(
        at_least_float32(nu.dtype), jnp.finfo(at_least_float32(g.dtype)).dtype
    )
    work = np.promote_types(real, g.dtype) if jnp.iscomplexobj(g) else real
    output_dtypes = [update_dtype or g.dtype]
    output_dtypes += [None if x is None else x.dtype for x in (nu, mu, trace)]
    g, p, mu, trace, lr, momentum, l2, weight_decay = (
        _cast(x, work) for x in (g, p, mu, trace, lr, momentum, l2, weight_decay)
    )
    nu, decay, c, eps = (_cast(x, real) for x in (nu, decay, one_minus_decay, eps))

    if l2 is not None:
        g = g + l2 * p
    # A complex g - mu is up to sqrt(8) times that, and squared.
    limit = 2.0 ** (jnp.finfo(output_dtypes[1]).maxexp // 2 - 2)
    limited = _clip(g, limit)
    if mu is None:
        square = _abs_sq(limited)
    else:
        mu = mu + _cast(c, work) * (limited - mu)
        square = _abs_sq(limited - mu) / decay
    nu = decay * nu + c * square
    g = limited + (g - g)  # NaN where g is infinite, so that it remains visible.

    v = nu
    if bias_correction:
        # Rounded as in optax.scale_by_adam, which this equals if b1 = 0 and eps is
        # outside the root.
        v = nu / (1 - jnp.asarray(decay, real) ** t.astype(real))
    if not isinstance(eps, float) or eps < jnp.finfo(real).tiny:
        v = jnp.where(v + eps == 0, jnp.inf, v)
    u = _ratio(g, v + eps, 0.0, 1, 0) if eps_in_sqrt else _ratio(g, v, eps, 0, 1)

    if lr is None:
        update = u
    elif momentum is None:
        update = -lr * u
    elif lr_in_momentum:
        lr_u = lr * u
        trace = momentum * trace + lr_u
        update = -(momentum * trace + lr_u if nesterov else trace)
    else:
        trace = momentum * trace + u
        update = -lr * (momentum * trace + u if nesterov else trace)
    if weight_decay is not None:
        update = update - lr * weight_decay * p
    outputs = zip((update, nu, mu, trace), output_dtypes, strict=True)
    return tuple(_cast(x, dtype) for x, dtype in outputs)


def at_least_float32(dtype) -> np.dtype:
    """Return dtype, or float32 if dtype is narrower or not inexact."""
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32)


def promote(dtype, other) -> np.dtype:
    """Return the dtype to which JAX promotes a dtype and another one, or None."""
    with jax.numpy_dtype_promotion("standard"):
        promoted = jnp.promote_types(dtype, other or dtype)
    return jax.dtypes.canonicalize_dtype(promoted)


def _cast(x, dtype) -> Any:
    """Cast an array to dtype; None and Python floats pass through."""
    return x if x is None or isinstance(x, float) else x.astype(dtype)


def _abs_sq(x):
    """Return |x|^2 as a real array, differentiable at 0."""
    return jnp.real(jnp.conj(x) * x)


def _clip(x, limit):
    """Clip a real array, or each part of a complex one, to [-limit, limit]."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(_clip(x.real, limit), _clip(x.imag, limit))
    limit = x.dtype.type(limit)
    return jax.lax.clamp(-limit, x, limit)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _ratio(x, v, eps, m, n):
    """Return x / (sqrt(v)^m (sqrt(v) + eps)^n).

    JAX's own derivatives are NaN where x and v are 0, or eps is small: they multiply 0
    by infinity. Here each factor of a derivative is again such a ratio, and finite.
    """
    factors = m * [jax.lax.rsqrt(v)] if m else []
    if n:
        factors += n * [1 / (jnp.sqrt(v) + eps)]
    for factor in factors:
        x = x * factor.astype(x.dtype)
    # Leave room to multiply a derivative.
    return x if m + n == 1 else _clip(x, float(jnp.finfo(x.dtype).max) / 2**20)


@_ratio.defjvp
def _ratio_jvp(m, n, primals, tangents):
    x, v, eps = primals
    dx, dv, deps = (_cast(tangent, x.dtype) for tangent in tangents)
    slope = _ratio(jnp.ones_like(x), v, eps, m, n) * dx
    if m:
        slope -= m / 2 * _ratio(x, v, eps, m + 2, n) * dv
    if n:
        slope -= n * _ratio(x, v, eps, m, n + 1) * deps
        # The slope of sqrt(v) is infinite at 0: take 0.
        v = jnp.where(v == 0, jnp.inf, v)
        slope -= n / 2 * _ratio(x, v, eps, m + 1, n + 1) * dv
    return _ratio(*primals, m, n), slope
