"""Changing the import from Optax changes nothing; see also `optax_own.py`."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax

BOTH = (True, False)
STEPS = 60
CORES = [
    dict(eps_in_sqrt=eps_in_sqrt, initial_scale=start, bias_correction=corrected)
    for eps_in_sqrt in BOTH
    for start, corrected in ((0.0, False), (1.0, False), (0.0, True))
]
OPTIONS = [
    core | dict(centered=centered, momentum=momentum, nesterov=nesterov)
    for core in CORES
    for centered in BOTH
    for momentum in (None, 0.9)
    for nesterov in BOTH
    if not (centered and core["bias_correction"])
]
# Relative to the largest update so far. In float32, one step of either side rounds
# about ten times, some of them to the other side: 8 ulp a step.
SINGLE = 8 * float(jnp.finfo(jnp.float32).eps) * (1 + np.arange(STEPS))
UNITS = dict(float32=SINGLE, float64=1e-12, complex64=SINGLE, complex128=1e-12)
POSITIONAL = (0.01, 0.8, 1e-5, 0.5, False, True, 0.7, True, False)


def drop(count):
    return jnp.where(count < 20, 0.1, 0.01)


@functools.cache
def gradients():
    """Return ordinary gradients: their spread is like their size."""
    x = np.random.default_rng(0).normal(size=(2, STEPS, 2, 3))
    z = x[0] + 1j * x[1]
    return {dtype: (z if "c" in dtype else x[0]).astype(dtype) for dtype in UNITS}


def assert_same_updates(ours, theirs, cases, gs):
    """Compare all updates of two factories, called with the options of each case."""
    # In one program: what takes the time is to compile.
    pairs = [(ours(**case), theirs(**case)) for case in cases]

    @jax.jit
    def run(gs):
        def step(states, g):
            new = [
                [tx.update(g, state) for tx, state in zip(*both, strict=True)]
                for both in zip(pairs, states, strict=True)
            ]
            return [[x[1] for x in both] for both in new], [
                [x[0] for x in both] for both in new
            ]

        first = jax.tree.map(lambda x: x[0], gs)
        states = [[tx.init(first) for tx in both] for both in pairs]
        return jax.lax.scan(step, states, gs)[1]

    for case, (mine, optaxs) in zip(cases, run(gs), strict=True):
        for dtype in gs:
            error = np.abs(np.asarray(mine[dtype]) - optaxs[dtype]).max((1, 2))
            size = np.maximum.accumulate(np.abs(optaxs[dtype]).max((1, 2)))
            assert mine[dtype].dtype == optaxs[dtype].dtype == dtype
            assert (error <= UNITS[dtype] * size).all(), (dtype, case)


# In turn, each both real and complex, and in both widths.
@pytest.mark.parametrize(
    ("cases", "dtypes"),
    [
        (OPTIONS[::4] + OPTIONS[3::4], ("float32", "complex128")),
        (OPTIONS[1::4] + OPTIONS[2::4], ("float64", "complex64")),
    ],
    ids=("float32", "float64"),
)
def test_rmsprop_is_a_drop_in(cases, dtypes, lenient, x64):
    ours, theirs = (functools.partial(x.rmsprop, drop) for x in (rmsprop_jax, optax))
    assert_same_updates(ours, theirs, cases, {k: gradients()[k] for k in dtypes})


def test_scale_by_rms_is_a_drop_in(lenient, x64):
    ours, theirs = rmsprop_jax.scale_by_rms, optax.scale_by_rms
    assert_same_updates(ours, theirs, CORES, gradients())


def test_centered_scale_by_rms_is_scale_by_stddev(lenient):
    cases = [
        dict(initial_scale=start, eps_in_sqrt=eps_in_sqrt)
        for start in (0.0, 1.0)
        for eps_in_sqrt in BOTH
    ]
    ours = functools.partial(rmsprop_jax.scale_by_rms, centered=True)
    gs = {"float32": gradients()["float32"]}
    assert_same_updates(ours, optax.scale_by_stddev, cases, gs)


def test_positional_and_keyword_calls_are_those_of_optax(lenient):
    names = list(inspect.signature(optax.rmsprop).parameters)

    def called(function):
        def build(given):
            by_name = dict(zip(names[given:], POSITIONAL[given:], strict=True))
            return function(*POSITIONAL[:given], **by_name)

        return build

    cases = [dict(given=n) for n in range(1, 1 + len(POSITIONAL))]
    gs = {"float32": gradients()["float32"]}
    assert_same_updates(called(rmsprop_jax.rmsprop), called(optax.rmsprop), cases, gs)


@pytest.mark.parametrize("function", ("rmsprop", "scale_by_rms"))
def test_positional_arguments_are_those_of_optax(function):
    def arguments(module):
        found = inspect.signature(getattr(module, function)).parameters.values()
        return [(x.name, x.default) for x in found if x.kind is not x.KEYWORD_ONLY]

    assert arguments(rmsprop_jax) == arguments(optax)


@pytest.mark.parametrize("other", (dict(centered=True), dict(initial_scale=1.0)))
def test_bias_correction_is_refused_where_optax_accepts_it(other):
    optax.rmsprop(0.1, bias_correction=True, **other)
    with pytest.raises(ValueError, match="bias_correction has no meaning"):
        rmsprop_jax.rmsprop(0.1, bias_correction=True, **other)
