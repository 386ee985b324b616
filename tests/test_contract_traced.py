"""Hyperparameters, schedules and whole steps under vmap, jit and grad."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import RMSPROP, TABLE, assert_close, every, normal, run

from rmsprop_jax import rmsprop

SWEEP = dict(
    learning_rate=[0.1, 0.01, 0.0],
    decay=[0.9, 0.999, 0.0],
    eps=[1e-8, 1e-3, 1.0],
    momentum=[0.9, 0.0, 0.5],
    l2=[0.0, 0.1, 0.01],
    weight_decay=[0.1, 0.0, 0.01],
    initial_scale=[0.0, 1.0, 0.5],
)
swept = pytest.mark.parametrize("names", [*([x] for x in SWEEP), SWEEP])


@dataclasses.dataclass
class Decay:
    """A schedule that, as any dataclass with eq, has no hash."""

    peak: float

    def __call__(self, count):
        return self.peak * 0.5 ** count.astype(jnp.float32)


@swept
@pytest.mark.parametrize("options", [{}, dict(eps_in_sqrt=False, nesterov=True)])
def test_a_vmapped_sweep_equals_a_loop(names, options):
    def train(values):
        numbers = dict(learning_rate=0.1) | options | values
        return run(rmsprop(**numbers), normal(0))

    values = [{k: SWEEP[k][i] for k in names} for i in range(3)]
    alone = [train(v) for v in values]
    stacked = jax.tree.map(lambda *x: jnp.asarray(x, jnp.float32), *values)
    together = jax.vmap(train)(stacked)
    # A traced 1 - decay is formed in float32: off by eps / (1 - 0.999) = 6e-5.
    for i, expected in enumerate(alone):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        assert_close(one, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [dict(centered=True), dict(bias_correction=True)])
@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap])
def test_traced_decay_equals_a_number(options, wrap):
    train = lambda decay: run(rmsprop(0.1, decay, **options), normal(0))  # noqa: E731
    decay = jnp.float32(0.75) if wrap is jax.jit else jnp.float32([0.75])
    traced = jax.tree.map(
        lambda x, y: x.reshape(y.shape), wrap(train)(decay), train(0.75)
    )
    assert_close(traced, train(0.75))


@pytest.mark.parametrize("shared", [True, False], ids=["state_shared", "state_own"])
def test_the_peak_of_a_schedule_may_be_vmapped(shared):
    params, peaks = normal(0), jnp.float32([0.1, 0.2])
    fixed = rmsprop(0.0).init(params)

    def first_steps(peak):
        tx = rmsprop(lambda count: peak * 0.5 ** count.astype(jnp.float32))
        # A state from outside vmap is concrete, though the schedule is not.
        state = fixed if shared else tx.init(params)
        _, state = tx.update(normal(1), state)
        return tx.update(normal(2), state)

    together = jax.vmap(first_steps)(peaks)
    for i, peak in enumerate((0.1, 0.2)):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        assert_close(one, first_steps(peak))


def test_an_optax_schedule_may_be_vmapped():
    def train(peak):
        return run(rmsprop(optax.linear_schedule(peak, 0.0, 5)), normal(0))

    together = jax.vmap(train)(jnp.float32([0.1, 0.2]))
    assert_close(jax.tree.map(lambda x: x[1], together), train(0.2))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["direct", "jit"])
def test_an_unhashable_schedule_is_accepted(wrap):
    with pytest.raises(TypeError):
        hash(Decay(0.1))
    tx = rmsprop(Decay(0.1))
    expected = run(
        rmsprop(lambda count: 0.1 * 0.5 ** count.astype(jnp.float32)), normal(0)
    )
    assert_close(run(tx, normal(0), wrap(tx.update)), expected)


def test_schedules_of_one_code_are_told_apart():
    params = normal(0)
    for peak in (0.1, 0.2):
        for schedule in (
            Decay(peak),
            lambda count, peak=peak: peak * 0.5 ** count.astype(jnp.float32),
        ):
            updates, _ = rmsprop(schedule).update(params, rmsprop(0.1).init(params))
            expected, _ = rmsprop(peak).update(params, rmsprop(0.1).init(params))
            assert_close(updates, expected)


@every
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_steps_are_differentiable_where_the_gradient_is_0(build, eps):
    tx = build(eps=eps)

    def after(start, scale):
        x, state = dict(w=start), tx.init(dict(w=start))
        for _ in range(3):
            grads = jax.tree.map(lambda x: scale * x, x)
            updates, state = tx.update(grads, state, x)
            x = optax.apply_updates(x, updates)
        return (x["w"] ** 2).sum()

    start = jnp.float32([[1.0, -2.0, 0.0]])
    for grad in (jax.grad(after, (0, 1)), jax.jit(jax.grad(after, (0, 1)))):
        for x in grad(start, jnp.float32(0.5)):
            assert jnp.isfinite(x).all()


@pytest.mark.parametrize("build", RMSPROP.values(), ids=RMSPROP)
def test_hypergradients_equal_finite_differences(build, x64):
    options = {k: v for k, v in build.keywords.items() if k != "learning_rate"}

    def after(rate, decay):
        tx = rmsprop(rate, decay, **options)
        start = dict(w=jnp.array([[1.0, -2.0]]))
        x, state = start, tx.init(start)
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.sin, x), state, x)
            x = optax.apply_updates(x, updates)
        return x["w"].sum()

    at, h = (jnp.array(0.1), jnp.array(0.9)), 1e-6
    for i, exact in enumerate(jax.grad(after, (0, 1))(*at)):
        low, high = (
            after(*(x + sign * h if j == i else x for j, x in enumerate(at)))
            for sign in (-1, 1)
        )
        np.testing.assert_allclose(exact, (high - low) / (2 * h), rtol=1e-6)


def test_an_ensemble_is_vmapped_over_its_params():
    stack = partial(jax.tree.map, lambda *x: jnp.stack(x))
    for build in TABLE.values():
        tx = build()
        params, grads = stack(normal(0), normal(1)), stack(normal(2), normal(3))
        state = jax.vmap(tx.init)(params)
        together, _ = jax.vmap(tx.update)(grads, state, params)
        alone, _ = tx.update(normal(3), tx.init(normal(1)), normal(1))
        assert_close(jax.tree.map(lambda x: x[1], together), alone)
