"""Derivatives of updates, also where gradients and averages are 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import direct_and_jit, scan, together
from jax.test_util import check_grads

from rmsprop_jax import rmsprop, scale_by_rms

CORES = [
    form | dict(eps_in_sqrt=x)
    for form in (dict(), dict(centered=True), dict(bias_correction=True))
    for x in (True, False)
]
DERIVED = [
    options | dict(eps=eps)
    for eps in (0.0, 1e-3)
    for options in [*CORES, dict(momentum=0.9, nesterov=True)]
]


def ends(gs):
    """Return a weighted sum of all updates, for each of DERIVED.

    Each has gradients of its own, so that one backward pass differentiates them all.
    """
    found = []
    for options, g in zip(DERIVED, gs, strict=True):
        moved = scan(rmsprop(0.1, **options), g)[0].sum(0)
        found.append((moved * np.arange(1, 3).astype(moved.dtype)).real.sum())
    return jnp.stack(found)


@pytest.mark.parametrize("dtype", (np.float32, np.complex64))
def test_derivative_is_finite_at_zero(dtype):
    gs = np.zeros((4, 2), dtype)
    gs[1, 0] = 1
    found = jax.jit(jax.grad(lambda gs: ends(gs).sum()))([gs] * len(DERIVED))
    for options, x in zip(DERIVED, found, strict=True):
        assert np.isfinite(x).all(), options


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


def test_derivative_is_that_of_finite_differences(x64, lenient):
    rng = np.random.default_rng(0)
    gs = [rng.uniform(1, 2, (4, 2)) for _ in DERIVED]
    # Central differences of step 1e-6 are off by 1e-12 of a third derivative.
    check_grads(jax.jit(ends), (gs,), order=1, eps=1e-6, rtol=1e-6, atol=1e-6)
