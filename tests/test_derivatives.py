"""Derivatives of updates, also where gradients and averages are 0."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CORES, TABLE, direct_and_jit, scan, together
from jax.test_util import check_grads

from rmsprop_jax import rmsprop, scale_by_rms

FORMS = [
    *CORES,
    dict(momentum=0.9, nesterov=True),
    dict(momentum=0.9, lr_in_momentum=False),
    dict(l2=0.1, weight_decay=0.1),
]


def ends(gs, *at):
    """Return a weighted sum of all updates, for each of FORMS.

    Each has gradients of its own, so that one backward pass differentiates them all.
    """
    found = []
    for options, g in zip(FORMS, gs, strict=True):
        moved = scan(rmsprop(*at, **options), g, g)[0].sum(0)
        found.append((moved * np.arange(1, 3).astype(moved.dtype)).real.sum())
    return jnp.stack(found)


@pytest.mark.parametrize("eps", (0.0, 1e-3))
@pytest.mark.parametrize("dtype", (np.float32, np.complex64))
def test_derivative_is_finite_at_zero(dtype, eps):
    gs = np.zeros((4, 2), dtype)
    gs[1, 0] = 1
    total = lambda gs: ends(gs, 0.1, 0.9, eps).sum()
    found = jax.jit(jax.grad(total))([gs] * len(FORMS))
    for options, x in zip(FORMS, found, strict=True):
        assert np.isfinite(x).all(), options


@pytest.mark.parametrize("name", ["eps_outside", "centered_momentum", "weight_decay"])
def test_direct_steps_are_differentiable_where_the_gradient_is_0(name):
    def loss(params, scale):
        tx = TABLE[name](eps=0.0)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(scale * params, state, params)
            params = optax.apply_updates(params, updates)
        return (params**2).sum()

    slopes = jax.grad(loss, (0, 1))(jnp.float32([[1.0, -2.0, 0.0]]), jnp.float32(0.5))
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_derivatives_are_finite_at_zero_for_every_eps():
    """A product of powers of 1 / eps overflows, and 0 * inf is NaN."""
    numbers = np.float32([0.0, 1e-42, 1e-30, 1e-20, 1e-8])

    def second_updates(g, eps):
        txs = together(scale_by_rms(eps=eps, **case) for case in CORES)
        _, states = txs.update(g, txs.init(g))
        return jnp.stack(txs.update(g, states)[0])

    first = jax.jacfwd(second_updates)
    for derivative in (first, jax.jacrev(first)):
        found = jax.jit(jax.vmap(derivative, (None, 0)))(np.float32(0), numbers)
        assert np.isfinite(found).all(), found


@direct_and_jit
def test_derivative_at_zero_is_the_reciprocal_of_eps(wrap):
    for eps_in_sqrt, expected in ((True, 100), (False, 10000)):
        tx = scale_by_rms(eps=1e-4, eps_in_sqrt=eps_in_sqrt)
        slope = jax.grad(lambda g, tx=tx: tx.update(g, tx.init(g))[0])
        assert wrap(slope)(jnp.float32(0)) == pytest.approx(expected)


def test_derivatives_are_those_of_finite_differences(x64, lenient):
    """With respect to gradients, parameters, learning rate, decay and eps."""
    rng = np.random.default_rng(0)
    gs = [rng.uniform(1, 2, (4, 2)) for _ in FORMS]
    # Central differences of step 1e-6 are off by 1e-12 of a third derivative.
    at = (gs, 0.1, 0.9, 0.01)
    check_grads(jax.jit(ends), at, order=1, eps=1e-6, rtol=1e-6, atol=1e-6)
