"""Hyperparameters, schedules and dtypes: in direct calls, under jit and vmap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    COMPILED,
    TABLE,
    assert_close,
    assert_same,
    halving,
    normal,
    programs,
    run,
    types,
)
from jax import export

from rmsprop_jax import rmsprop

BOTH = dict(centered=True, momentum=0.9)


def first_updates(tx):
    """Return the updates of two direct steps."""
    first, state = tx.update(normal(1), tx.init(normal(0)), normal(0))
    return first, tx.update(normal(2), state, normal(0))[0]


def test_a_direct_update_is_one_compiled_program_and_init_is_none():
    for build in TABLE.values():
        # A leaf that no other test has, for a program that is not in the cache yet.
        tx, params = build(), [jnp.ones((2, 5))] * 3
        assert programs(tx.init, params) == 0
        state = tx.init(params)
        halving(state.count)
        assert programs(tx.update, params, state, params) == 1


def test_a_direct_sweep_compiles_once():
    options = dict(learning_rate=0.1, momentum=0.9, l2=0.1)
    first_updates(rmsprop(**options))
    first_updates(rmsprop(optax.linear_schedule(0.1, 0.0, 10)))
    before = len(COMPILED)
    for name in (*options, "decay", "eps"):
        for x in (0.2, np.float64(0.5), 0):
            first_updates(rmsprop(**options | {name: x}))
    # An equal schedule made anew is the same program too.
    first_updates(rmsprop(optax.linear_schedule(0.1, 0.0, 10)))
    assert COMPILED[before:] == []


def test_under_jit_numbers_are_constants_and_equal_leaves_are_traced_once():
    tx = rmsprop(0.375, 0.75, 0.5**9, momentum=0.625, l2=0.125)
    params = 20 * [jnp.ones(3)]
    program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    assert program.consts == []
    # Not wrapped in a jit of the whole update, which would only cost time.
    assert "name=_update" not in str(program)
    leaves = [x for x in program.eqns if x.params.get("name") == "_leaf"]
    step = leaves[0].params["jaxpr"]
    assert len(leaves) == 20 and all(x.params["jaxpr"] is step for x in leaves)
    # The gradient, the parameter, nu, the trace and the count.
    assert len(step.in_avals) == 5
    for number in (0.375, 0.75, 0.25, 0.5**9, 0.625, 0.125):
        assert f" {number}:f32[]" in str(step), number


def test_stateful_and_branching_schedules_work_in_direct_calls():
    rates = iter((0.2, 0.1))
    stateful = lambda count: next(rates)
    branching = lambda count: 0.2 if count < 1 else 0.1
    for schedule in (stateful, branching):
        first, second = first_updates(rmsprop(schedule))
        assert_close(first, first_updates(rmsprop(0.2))[0])
        assert_close(second, first_updates(rmsprop(0.1))[1])


def test_direct_calls_do_not_wait_for_the_learning_rate():
    """It is not read, so one that is not a number is seen in the update."""
    first, _ = first_updates(rmsprop(lambda count: jnp.float32(jnp.nan)))
    assert all(np.isnan(x).all() for x in jax.tree.leaves(first))


def test_the_peak_of_a_schedule_may_be_vmapped():
    """The count of a state from outside is concrete, though the schedule is not."""
    peaks, fixed = jnp.float32([0.1, 0.2]), rmsprop(0.0).init(normal(0))

    def train(peak, state=None):
        tx = rmsprop(lambda count: peak * halving(count))
        _, state = tx.update(normal(1), state or tx.init(normal(0)))
        return tx.update(normal(2), state)

    for start in (fixed, None):
        together = jax.vmap(partial(train, state=start))(peaks)
        assert_close(jax.tree.map(lambda x: x[1], together), train(0.2))


def test_a_negative_learning_rate_ascends():
    def step(rate):
        tx = rmsprop(rate, momentum=0.9, nesterov=True, weight_decay=0.1)
        return tx.update(normal(1), tx.init(normal(0)), normal(0))[0]

    up = jax.tree.map(jnp.negative, step(0.1))
    for rate in (-0.1, jnp.float32(-0.1), lambda count: -0.1):
        assert_close(step(rate), up)
        assert_close(jax.jit(partial(step, rate))(), up)
    assert_close(jax.jit(step)(jnp.float32(-0.1)), up)


@pytest.mark.parametrize(
    ("parameter", "gradient", "nu", "mu", "update"),
    [
        ("float16", "float16", "float32", "float32", "float16"),
        ("bfloat16", "bfloat16", "float32", "float32", "bfloat16"),
        ("bfloat16", "float32", "float32", "float32", "float32"),
        ("float32", "bfloat16", "float32", "float32", "float32"),
        ("bfloat16", "float16", "float32", "float32", "float32"),
        ("float32", "float64", "float32", "float32", "float64"),
        ("float64", "float32", "float64", "float64", "float64"),
        ("complex64", "complex128", "float32", "complex64", "complex128"),
        ("complex128", "complex64", "float64", "complex128", "complex128"),
    ],
)
def test_dtypes_of_updates_and_state(parameter, gradient, nu, mu, update, x64):
    params = np.full(3, 0.5, jnp.dtype(parameter))
    grads = np.full(3, 0.3, jnp.dtype(gradient))
    for name, build in TABLE.items():
        tx = build()
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, grads, state, params)
        assert updates.dtype == update, name
        for each in (state, after):
            assert (each.count.dtype, each.nu.dtype) == ("int32", nu), name
            signed = [x.dtype for x in (each.mu, each.trace) if x is not None]
            assert signed == [mu] * len(signed), name
    tx = rmsprop(0.1, **BOTH)
    updates, _ = tx.update(grads, tx.init(params))
    assert updates.dtype == gradient and np.isfinite(updates).all()


def test_params_give_updates_of_bfloat16_gradients_their_digits():
    tx, grads = rmsprop(0.1), normal(1, 3 * ["bfloat16"])
    params, wide = normal(0), jax.tree.map(lambda g: g.astype("float32"), grads)
    expected, _ = tx.update(wide, tx.init(params), params)
    assert_close(tx.update(grads, tx.init(params), params)[0], expected)
    narrow = jax.tree.map(lambda x: x.astype("bfloat16"), expected)
    assert_same(tx.update(grads, tx.init(params))[0], narrow)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_has_the_dtypes_asked_for(dtype, x64):
    params = {x: np.ones(2, x) for x in ("float16", "float64", "complex64")}
    signed = dict.fromkeys(params, dtype)
    signed["complex64"] = dict(float32="complex64", float64="complex128")[dtype]
    tx = rmsprop(0.1, **BOTH, nu_dtype=dtype, momentum_dtype=dtype)
    state = tx.init(params)
    for each in (state, jax.eval_shape(tx.update, params, state)[1]):
        assert {x.dtype.name for x in each.nu.values()} == {dtype}
        for buffer in (each.mu, each.trace):
            assert {k: x.dtype.name for k, x in buffer.items()} == signed


def test_numpy_and_python_numbers_are_leaves():
    """NumPy makes float64 unless told; while x64 is off, it is float32 to JAX."""
    given = dict(w=np.ones((2, 3)), b=np.ones(()), many=[2.0, 3.0])
    arrays = jax.tree.map(jnp.float32, given)
    tx = rmsprop(0.1, **BOTH, l2=0.1)
    expected = tx.update(arrays, tx.init(arrays), arrays)
    # Closed over, they reach update as they are even under jit.
    for wrap in (lambda f: f, jax.jit):
        found = wrap(lambda state: tx.update(given, state, given))(tx.init(given))
        assert_close(found, expected)
        assert types(found) == types(expected)


SWEEP = dict(
    learning_rate=[0.1, 0.01, 0.0],
    decay=[0.9, 0.999, 0.5],
    eps=[1e-8, 1e-3, 1.0],
    momentum=[0.9, 0.0, 0.5],
    l2=[0.0, 0.1, 0.01],
    weight_decay=[0.1, 0.0, 0.01],
    initial_scale=[0.0, 1.0, 0.5],
)


def test_a_vmapped_sweep_equals_a_loop():
    other = dict(eps_in_sqrt=False, nesterov=True)
    cases = [({}, [name]) for name in SWEEP] + [({}, [*SWEEP]), (other, [*SWEEP])]
    cases += [(dict(centered=True), ["decay"]), (dict(bias_correction=True), ["decay"])]

    def train(options, values):
        tx = rmsprop(**{"learning_rate": 0.1} | options | values)
        return run(tx, normal(0), steps=2)

    @jax.jit
    def train_all():
        return [
            jax.vmap(partial(train, options))({k: jnp.float32(SWEEP[k]) for k in names})
            for options, names in cases
        ]

    for (options, names), together in zip(cases, train_all(), strict=True):
        # A traced 1 - decay is formed in float32: off by eps / (1 - 0.999) = 6e-5.
        for i in range(3):
            alone = train(options, {k: SWEEP[k][i] for k in names})
            one = jax.tree.map(lambda x, i=i: x[i], together)
            assert_close(one, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nu_dtype", [None, "uint8"])
def test_a_jitted_step_can_be_exported(nu_dtype):
    tx = rmsprop(0.1, **BOTH, nu_dtype=nu_dtype)
    params, grads = (np.full((64, 64), x, np.float32) for x in (1, 0.5))
    step, state = jax.jit(tx.update), tx.init(params)
    saved = export.export(step)(grads, state, params).serialize()
    found = export.deserialize(saved).call(grads, state, params)
    assert_same(found, step(grads, state, params))
    assert jax.tree.structure(found[1]) == jax.tree.structure(state)
