"""RMSProp in NumPy, in the widest float there is, with gradients and error bounds.

It keeps the averages v and m of the textbook and subtracts them, as the library does
not. That costs digits: gradients should have a spread like their size.
"""

import functools

import jax.numpy as jnp
import numpy as np

SINGLE = float(jnp.finfo(jnp.float32).eps)


def drop(count):
    """A schedule that drops: only then does lr_in_momentum matter."""
    return jnp.where(count < 20, 0.1, 0.01)


@functools.cache
def random(seed, steps=60):
    """Return leaves [steps, ...] of every precision and several shapes."""
    rng = np.random.default_rng(seed)
    shapes = dict(float32=(2, 3), float64=(), complex64=(4,), complex128=(3, 1))

    def leaf(dtype, shape):
        x = rng.normal(size=(2, steps, *shape)) * np.exp(rng.normal(size=shape))
        return (x[0] + 1j * x[1] if "complex" in dtype else x[0]).astype(dtype)

    return {dtype: leaf(dtype, shape) for dtype, shape in shapes.items()}


def rmsprop(
    gs,
    ps,
    lr=None,
    decay=0.9,
    eps=1e-8,
    initial_scale=0.0,
    eps_in_sqrt=True,
    centered=False,
    momentum=0,
    nesterov=False,
    bias_correction=False,
    lr_in_momentum=True,
    l2=0,
    weight_decay=0,
):
    """Return the updates [steps, ...] for gradients and parameters [steps, ...].

    `lr` is a schedule, or None for the bare ratio g / sqrt(v + eps).
    """
    gs, ps = (np.asarray(x).astype(np.clongdouble) for x in (gs, ps))
    a = np.longdouble(decay)
    v, m, b, out = np.longdouble(initial_scale), 0, 0, []
    for count, (g, p) in enumerate(zip(gs, ps, strict=True)):
        g = g + l2 * p
        v = a * v + (1 - a) * np.abs(g) ** 2
        m = a * m + (1 - a) * g
        var = v - np.abs(m) ** 2 if centered else v
        if bias_correction:
            var = var / (1 - a ** (count + 1))
        u = g / (np.sqrt(var + eps) if eps_in_sqrt else np.sqrt(var) + eps)
        if lr is None:
            out.append(u)
            continue
        rate = float(lr(count))
        pushed = rate * u if lr_in_momentum else u
        b = momentum * b + pushed
        d = pushed + momentum * b if nesterov else b
        if not lr_in_momentum:
            d = rate * d
        out.append(-d - rate * weight_decay * p)
    return np.stack(out)


def assert_near(updates, wanted, ulps, case):
    """Compare updates [steps, ...] that round by this many ulp a step.

    The error is relative to the largest update so far, in which sums cancel.
    """
    flat = (len(wanted), -1)
    size = np.maximum.accumulate(np.abs(wanted).reshape(flat).max(1))
    error = np.abs(np.asarray(updates) - wanted).reshape(flat).max(1)
    steps = 1 + np.arange(len(wanted))
    single = updates.dtype in (jnp.float32, jnp.complex64)
    assert (error <= size * (ulps * steps * SINGLE if single else 1e-12)).all(), case
