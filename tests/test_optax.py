"""Changing the import from Optax changes nothing; see also `optax_own.py`."""

import functools
import inspect

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import scan, together

import rmsprop_jax

STEPS = 60
CORES = [
    dict(eps_in_sqrt=eps_in_sqrt, **rest)
    for eps_in_sqrt in (True, False)
    for rest in (
        {},
        dict(initial_scale=1.0, decay=0.8, eps=1e-5),
        dict(bias_correction=True),
    )
]
MOMENTA = [{}, dict(momentum=0.9), dict(momentum=0.9, nesterov=True)]
OPTIONS = [
    core | momentum | dict(centered=centered)
    for core in CORES
    for momentum in MOMENTA
    for centered in (True, False)
    if not (centered and "bias_correction" in core)
]
# Relative to the largest update so far. In float32, one step of either side rounds
# about ten times, some of them to the other side: 8 ulp a step.
SINGLE = 8 * float(jnp.finfo(jnp.float32).eps) * (1 + np.arange(STEPS))
BOUNDS = dict(float32=SINGLE, complex128=1e-12)


def drop(count):
    return jnp.where(count < 20, 0.1, 0.01)


@functools.cache
def gradients():
    """Return ordinary gradients: their spread is like their size."""
    x = np.random.default_rng(0).normal(size=(2, STEPS, 2, 3))
    z = x[0] + 1j * x[1]
    return {dtype: (z if "c" in dtype else x[0]).astype(dtype) for dtype in BOUNDS}


def assert_same_updates(ours, theirs, cases, *dtypes):
    """Compare all updates of two factories, called with the options of each case."""
    gs = {dtype: gradients()[dtype] for dtype in dtypes}
    found = scan(together(f(**case) for f in (ours, theirs) for case in cases), gs)[0]
    pairs = found[: len(cases)], found[len(cases) :]
    for case, mine, optaxs in zip(cases, *pairs, strict=True):
        for dtype in gs:
            error = np.abs(np.asarray(mine[dtype]) - optaxs[dtype]).max((1, 2))
            size = np.maximum.accumulate(np.abs(optaxs[dtype]).max((1, 2)))
            assert mine[dtype].dtype == optaxs[dtype].dtype == dtype
            assert (error <= BOUNDS[dtype] * size).all(), (dtype, case)


# Both widths, real and complex; test_rule.py has every dtype.
@pytest.mark.parametrize(
    ("cases", "dtype"), [(OPTIONS[::2], "float32"), (OPTIONS[1::2], "complex128")]
)
def test_rmsprop_is_a_drop_in(cases, dtype, lenient, x64):
    ours, theirs = (functools.partial(x.rmsprop, drop) for x in (rmsprop_jax, optax))
    assert_same_updates(ours, theirs, cases, dtype)


def test_scale_by_rms_is_a_drop_in(lenient, x64):
    ours, theirs = rmsprop_jax.scale_by_rms, optax.scale_by_rms
    assert_same_updates(ours, theirs, CORES, *BOUNDS)


def test_centered_scale_by_rms_is_scale_by_stddev(lenient):
    ours = functools.partial(rmsprop_jax.scale_by_rms, centered=True)
    cases = [core for core in CORES if "bias_correction" not in core]
    assert_same_updates(ours, optax.scale_by_stddev, cases, "float32")


@pytest.mark.parametrize("function", ("rmsprop", "scale_by_rms"))
def test_positional_arguments_are_those_of_optax(function):
    def arguments(module):
        found = inspect.signature(getattr(module, function)).parameters.values()
        return [(x.name, x.default) for x in found if x.kind is not x.KEYWORD_ONLY]

    assert arguments(rmsprop_jax) == arguments(optax)
