"""Changing the import from Optax changes nothing but what is listed at the end.

See also `tests/measure/optax_own.py`.
"""

import functools
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of, programs, scan, together
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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
# Relative to the largest update so far. In float32, each side rounds about ten times in
# a step, by up to half an ulp: together 10 ulp.
SINGLE = 10 * float(jnp.finfo(jnp.float32).eps) * (1 + np.arange(STEPS))
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


def is_refused(f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except ValueError:
        return True
    return False


def last_update(tx, gradients):
    return scan(tx, jnp.asarray(gradients, jnp.float32))[0][-1]


def steady(rmsprop):
    """`centered` with steady gradients"""
    gradients = [np.linspace(1, 1000, 100)] * 200
    return jnp.isfinite(last_update(rmsprop(0.1, centered=True), gradients)).all()


def narrow(rmsprop):
    """bfloat16 or float16 parameters"""
    states = [rmsprop(0.1).init(jnp.ones(3, x)) for x in ("bfloat16", "float16")]
    return all(x.dtype.itemsize == 4 for x in jax.tree.leaves(states))


def large(rmsprop):
    """A single gradient of 1e25"""
    return last_update(rmsprop(0.1), [1e25] + [1] * 1000) != 0


def zero(rmsprop):
    """Zero gradient with `eps=0`"""
    tx, zeros = rmsprop(0.1, eps=0.0), jnp.zeros(3)
    updates, slopes = jax.vjp(lambda g: tx.update(g, tx.init(zeros))[0], zeros)
    is_zero, is_finite = (updates == 0).all(), jnp.isfinite(slopes(zeros + 1)[0]).all()
    (same,) = {bool(is_zero), bool(is_finite)}
    return same


def complex_(rmsprop):
    """Complex parameters"""
    state = rmsprop(0.1).init(jnp.ones(3, complex))
    return not any(map(jnp.iscomplexobj, jax.tree.leaves(state)))


def column(rmsprop):
    """Gradient `(3,)` for a parameter `(3, 1)`"""
    tx, params = rmsprop(0.1), jnp.ones((3, 1))
    return is_refused(tx.update, jnp.ones(3), tx.init(params), params)


def invalid(rmsprop):
    """`decay=1.5`, `eps=-1`; `centered` with `decay=0`; `bias_correction` with \
`centered` or `initial_scale`"""
    corrected = dict(bias_correction=True)
    cases = dict(decay=1.5), dict(eps=-1), dict(centered=True, decay=0.0)
    cases += corrected | dict(centered=True), corrected | dict(initial_scale=1.0)
    (refused,) = {is_refused(rmsprop, 0.1, **case) for case in cases}
    return refused


def mesh(rmsprop):
    """Second step on a mesh, after `jit(init)` or with a schedule"""
    params = jax.device_put(jnp.ones(8), NamedSharding(mesh_of(8), P("data")))

    def compiles_once(tx, init):
        step = jax.jit(tx.update)
        _, state = step(params, init(params), params)
        return programs(step, params, state, params) == 0

    number, schedule = rmsprop(0.1), rmsprop(drop)
    cases = (number, jax.jit(number.init)), (schedule, schedule.init)
    (once,) = {compiles_once(*case) for case in cases}
    return once


def direct(rmsprop):
    """`update` outside `jit`"""
    tx, params = rmsprop(0.1), [jnp.ones(n) for n in (31, 37)]
    return programs(tx.update, params, tx.init(params), params) == 1


def absent(rmsprop):
    """A leaf without a gradient (`None`)"""
    tx, params = rmsprop(0.1), [jnp.ones(3), jnp.ones(4)]
    _, state = tx.update([None, params[1]], tx.init(params), params)
    return optax.tree_utils.tree_get(state, "nu")[0] is not None


def fields(rmsprop):
    """State"""
    state = rmsprop(0.1, centered=True).init(jnp.ones(3))
    return getattr(state, "_fields", None) == ("count", "nu", "mu", "trace")


def count(rmsprop):
    """`count`"""
    return optax.tree_utils.tree_get(rmsprop(0.1).init(jnp.ones(3)), "count") == 0


def stacked(rmsprop):
    """Stacked parameters under `jax.vmap(update)`"""
    tx, params = rmsprop(0.1), jnp.ones((3, 2))
    return is_refused(jax.vmap(tx.update), params, tx.init(params), params)


DIFFERENCES = (
    *(steady, narrow, large, zero, complex_, column, invalid),
    *(mesh, direct, absent, fields, count, stacked),
)


@pytest.mark.parametrize("differs", DIFFERENCES)
def test_differences_are_seen_in_both(differs, lenient):
    assert differs(rmsprop_jax.rmsprop) and not differs(optax.rmsprop)


def test_the_readme_lists_them():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    _, rest = readme.split("| Difference |")
    table, *_ = rest.split("\n\n")
    listed = [row.split(" | ")[0].removeprefix("| ") for row in table.split("\n")[2:]]
    assert listed == [differs.__doc__ for differs in DIFFERENCES]
