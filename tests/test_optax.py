"""Changing the import from Optax changes nothing but what is listed at the end.

See also `tests/measure/optax_own.py`.
"""

import inspect
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of, programs, scan, together
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_near, drop, random

import rmsprop_jax

FORMS = [
    dict(eps_in_sqrt=eps_in_sqrt, **rest)
    for eps_in_sqrt in (True, False)
    for rest in ({}, dict(initial_scale=1.0, decay=0.8, eps=1e-5))
]
CORRECTED = [dict(eps_in_sqrt=x, bias_correction=True) for x in (True, False)]
CENTERED = [core | dict(centered=True) for core in FORMS]
MOMENTA = [{}, dict(momentum=0.9), dict(momentum=0.9, nesterov=True)]
OPTIONS = [a | b for a in FORMS + CORRECTED + CENTERED for b in MOMENTA]
RMSPROP = [partial(x.rmsprop, drop) for x in (rmsprop_jax, optax)]
SCALE_BY_RMS = [rmsprop_jax.scale_by_rms, optax.scale_by_rms]
STDDEV = [partial(rmsprop_jax.scale_by_rms, centered=True), optax.scale_by_stddev]


# Both widths, real and complex; test_rule.py has every dtype.
@pytest.mark.parametrize(
    ("factories", "cases", "dtypes"),
    [
        (RMSPROP, OPTIONS[::2], ["float32"]),
        (RMSPROP, OPTIONS[1::2], ["complex128"]),
        (SCALE_BY_RMS, FORMS + CORRECTED, ["float32", "complex128"]),
        (STDDEV, FORMS, ["float32"]),
    ],
)
def test_updates_are_those_of_optax(factories, cases, dtypes, lenient, x64):
    gs = {dtype: random(0)[dtype] for dtype in dtypes}
    ours, theirs = (scan(together(f(**x) for x in cases), gs)[0] for f in factories)
    for case, one, other in zip(cases, ours, theirs, strict=True):
        for dtype in dtypes:
            assert one[dtype].dtype == other[dtype].dtype == dtype
            # Each side rounds about ten times in a step, by up to half an ulp.
            assert_near(one[dtype], other[dtype], 10, (dtype, case))


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
