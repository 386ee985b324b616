"""The rule against an independent oracle, and each numerical trap it avoids.

Every trap has a test that fails on the naive form of the guarded line.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import CORES, scan, together
from oracle import SINGLE, assert_near, drop, random

from rmsprop_jax import rmsprop, scale_by_rms

BOTH = (True, False)
STARTED = [
    dict(initial_scale=1.0, centered=x, eps_in_sqrt=y) for x in BOTH for y in BOTH
]
MOMENTA = [dict()] + [
    dict(momentum=0.8, nesterov=x, lr_in_momentum=y) for x in BOTH for y in BOTH
]
L2, DECAY = dict(l2=0.3), dict(weight_decay=0.2)
TERMS = itertools.cycle([L2 | DECAY, DECAY, L2, {}])
GRID = [a | b | next(TERMS) for a in CORES for b in MOMENTA]
GRID += [a | L2 | DECAY for a in STARTED]
SCALED = [dict(decay=x) | case for x in (0.1, 0.99) for case in CORES + STARTED]
WIDTHS = ("float32", "float64", "complex64", "complex128")


# The two halves of the grid between them cover both widths, real and complex.
@pytest.mark.parametrize(
    ("factory", "lr", "cases", "dtypes"),
    [
        (partial(rmsprop, drop), drop, GRID[::2], ("float32", "complex128")),
        (partial(rmsprop, drop), drop, GRID[1::2], ("float64", "complex64")),
        (scale_by_rms, None, SCALED, WIDTHS),
    ],
)
def test_updates_follow_the_oracle(factory, lr, cases, dtypes, x64):
    """A step rounds about ten times, and averages carry on a part of that: 4 ulp.

    Centered, the new mu has moved to 1 - decay of the way to g, and g - mu loses
    1 / decay. With bias correction, 1 - decay^t loses 1 / (1 - decay), twice, and half
    is left.
    """
    gs, ps = ({dtype: random(seed)[dtype] for dtype in dtypes} for seed in (0, 1))
    all_updates, _ = scan(together(factory(**case) for case in cases), gs, ps)
    for case, updates in zip(cases, all_updates, strict=True):
        decay = case.get("decay", 0.9)
        ulps = 4 / decay if case.get("centered") else 4
        ulps += case.get("bias_correction", False) / (1 - decay)
        for dtype, update in updates.items():
            assert update.dtype == dtype
            wanted = oracle.rmsprop(gs[dtype], ps[dtype], lr, **case)
            assert_near(update, wanted, ulps, (dtype, case))


@pytest.mark.parametrize("dtype", (np.float32, np.complex64))
def test_update_is_bounded_and_never_zero(dtype):
    """0 < |u| <= 1 / sqrt(1 - decay), since nu holds at least (1 - decay) |g|^2."""
    rng = np.random.default_rng(0)
    gs = np.exp(5 * rng.normal(size=(200, 50))) * rng.normal(size=(200, 50))
    gs[50, :10], gs[50:100, 10:20], gs[100:150, 10:20] = 1e25, 3e38, -3e38
    gs = gs.astype(dtype) * (dtype(1 + 1j) if dtype is np.complex64 else 1)
    # XLA adds before it multiplies by 0.5.
    decays = (0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    both = [scale_by_rms(decay, eps=1e-12) for decay in decays]
    both += [scale_by_rms(decay, centered=True) for decay in decays[1:]]
    all_updates, states = scan(together(both), gs)
    assert all(np.isfinite(state.nu).all() for state in states)
    for decay, updates in zip(decays, all_updates, strict=False):
        us = np.abs(updates)
        # Rounded: c, the square, the product, the sum, the root, the ratio.
        assert us.max() <= (1 + 4 * SINGLE) / np.sqrt(1 - decay)
        assert us.min() > 0


def test_centered_never_gives_nan():
    """The difference v - m^2 cancels when gradients are nearly constant."""
    gs = np.float32(1 + 1e-4 * np.random.default_rng(0).normal(size=(400, 500)))
    cases = [dict(centered=True, eps_in_sqrt=x, eps=1e-12) for x in BOTH]
    txs = together(scale_by_rms(**case) for case in cases)
    for case, updates in zip(cases, scan(txs, gs)[0], strict=True):
        wanted = np.float64(oracle.rmsprop(gs, gs, **case).real)
        # mu is off by the roundings of 1 / (1 - decay) steps, at about 1, and the
        # spread is g / u.
        np.testing.assert_array_less(np.abs(updates / wanted - 1), 10 * SINGLE * wanted)


def test_state_of_bf16_gradients_does_not_freeze():
    """In bfloat16, 0.999 is 1 and an average neither grows nor decays."""
    gs = (np.arange(6000) < 3000).astype(jnp.bfloat16)
    nu = scan(scale_by_rms(0.999), gs)[1].nu
    # Each step rounds decay, the product and the sum once.
    full = 1 - 0.999**3000
    rounding = 3000 * 1.5 * SINGLE
    assert nu[2999] == pytest.approx(full, rel=rounding)
    assert nu[5999] == pytest.approx(full * 0.999**3000, rel=2 * rounding)


def test_fp16_survives_large_and_zero_gradients():
    """In float16, 300^2 is inf and 1e-8 is 0."""
    txs = together(scale_by_rms(eps_in_sqrt=x) for x in BOTH)
    both = scan(txs, np.full((5, 2), [300, 0], np.float16))
    for updates, states in zip(*both, strict=True):
        assert updates.dtype == np.float16
        # nu is 9000 after the first step; u is rounded once more, to float16.
        np.testing.assert_allclose(updates[0], [10**0.5, 0], rtol=1e-3)
        np.testing.assert_array_equal(updates[:, 1], 0)
        assert np.isfinite(states.nu).all()


def test_weight_moves_again_after_overflow():
    """One finite gradient whose square is inf must not stop a weight for ever."""
    # nu decays from 3e38 to 1, and |mu|^2 twice as fast from 1e50.
    steps = int((np.log(3e38) + 0.5 * np.log(1e50)) / -np.log(0.9))
    count, huge = np.arange(3000 + steps)[:, None], np.array([1, 3000])
    gs = np.where(count < huge, 1e25, 1 + 0.5 * (-1.0) ** (count - huge))
    gs = {dtype: gs.astype(dtype) for dtype in ("float32", "complex64")}
    txs = together(scale_by_rms(centered=x) for x in BOTH)
    for all_updates, state in zip(*scan(txs, gs), strict=True):
        for dtype, updates in all_updates.items():
            assert np.isfinite(state.nu[dtype]).all(), dtype
            assert np.isfinite(updates).all(), dtype
            assert (np.abs(updates)[huge + steps - 1, [0, 1]] > 0.4).all(), dtype


def test_float64_gradients_do_not_overflow_a_float32_nu(x64):
    tx = scale_by_rms()
    _, state = tx.update(np.array([1e25]), tx.init(np.ones(1, np.float32)))
    assert state.nu.dtype == np.float32
    assert np.isfinite(state.nu).all()


@pytest.mark.parametrize("traced", BOTH)
def test_zero_denominator_gives_zero_update(traced):
    """0 / 0, and 1e-30 / 0; 1e-42 is a number that most processors flush to 0."""
    numbers = (0.0, 1e-42)

    def run(numbers):
        cases = [dict(eps=x, eps_in_sqrt=inside) for x in numbers for inside in BOTH]
        gs = np.float32([[0, 0, 1e-30], [0, 2, 0], [0, 2, 0]])
        return scan(together(rmsprop(0.1, **case) for case in cases), gs)[0]

    for updates in jax.jit(run)(np.float32(numbers)) if traced else run(numbers):
        np.testing.assert_array_equal(updates[0], 0)
        np.testing.assert_array_equal(updates[:, [0, 2]], 0)
        assert (updates[1:, 1] < 0).all()


def nu_of_one_step(decay, dtype=None):
    tx, ones = scale_by_rms(decay, nu_dtype=dtype), np.ones(1, np.float32)
    return tx.update(ones, tx.init(ones))[1].nu[0]


def test_one_minus_decay_keeps_its_digits(x64):
    """In float32, 1 - 0.999 is off by 1.3e-5 of it."""
    double, single = jnp.float64(0.999), jnp.float32(0.1)
    jitted = jax.jit(nu_of_one_step)
    for nu in (nu_of_one_step(0.999), nu_of_one_step(double), jitted(double)):
        assert nu.dtype == np.float32
        assert nu == pytest.approx(1 - 0.999, rel=SINGLE)
    for decay in (0.999, single):
        nu = nu_of_one_step(decay, "float64")
        assert nu == pytest.approx(1 - float(decay), rel=1e-15)


def test_traced_decay_and_its_rest_sum_to_one():
    """In bfloat16, 1 - 0.1 is off by 2e-3, and nu would not stay where it is."""
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float32)
    decays = [np.asarray(x, dtype) for dtype in dtypes for x in (0.1, 0.3, 0.9)]

    @jax.jit
    def nus(decays):
        txs = (scale_by_rms(x, initial_scale=1.0) for x in decays)
        return [state.nu[0] for state in scan(together(txs), np.ones(1, "f"))[1]]

    for decay, nu in zip(decays, nus(decays), strict=True):
        assert nu == pytest.approx(1, rel=SINGLE), repr(decay)


def test_bias_correction_rounds_as_adam_does(lenient):
    """At decay 0.9999 and t = 1, 1 - decay^t in float32 is off by 2e-4; so is Adam's.

    Optax promises that the two are equal, and its own tests check it to 1e-6.
    """
    ours = scale_by_rms(0.9999, eps_in_sqrt=False, bias_correction=True)
    txs = together([ours, optax.scale_by_adam(b1=0.0, b2=0.9999)])
    gs = np.float32(np.random.default_rng(0).normal(size=(100, 3)))
    np.testing.assert_allclose(*scan(txs, gs)[0], rtol=1e-6)


def test_gradient_that_is_not_finite_is_seen():
    """`optax.apply_if_finite` can only help if an update shows it."""
    cases = [core | dict(eps=eps) for core in CORES for eps in (0.0, 1e-3)]
    txs = together(rmsprop(0.1, **case) for case in cases)
    gs = np.ones((3, 4))
    gs[2, :3] = np.nan, np.inf, -np.inf
    all_gs = {dtype: gs.astype(dtype) for dtype in ("float16", "float32", "complex64")}
    for case, updates in zip(cases, scan(txs, all_gs)[0], strict=True):
        for dtype, x in updates.items():
            assert (np.isfinite(x) == np.isfinite(gs)).all(), (dtype, case)
