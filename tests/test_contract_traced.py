"""Hyperparameters, schedules and whole steps under vmap, jit and grad."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import OPTIONS, TABLE, assert_close, every, normal, run

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
SWEPT = [*([name] for name in SWEEP), list(SWEEP)]


@dataclasses.dataclass
class Decay:
    """A schedule that, as any dataclass with eq, has no hash."""

    peak: float

    def __call__(self, count):
        return self.peak * 0.5 ** count.astype(jnp.float32)


@pytest.mark.parametrize("options", [{}, dict(eps_in_sqrt=False, nesterov=True)])
def test_a_vmapped_sweep_equals_a_loop(options):
    sweeps = [[{k: SWEEP[k][i] for k in names} for i in range(3)] for names in SWEPT]
    stacked = [jax.tree.map(lambda *x: jnp.float32(x), *values) for values in sweeps]
    params, *gs = ({"vector": normal(seed)["vector"]} for seed in range(4))
    grads = jax.tree.map(lambda *x: jnp.stack(x), *gs)

    def train(params, grads, values):
        tx = rmsprop(**{"learning_rate": 0.1} | options | values)

        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    # In one program: what takes the time is to compile.
    @jax.jit
    def run_all(stacked, *start):
        alone = [[train(*start, v) for v in values] for values in sweeps]
        return alone, [jax.vmap(partial(train, *start))(v) for v in stacked]

    # A traced 1 - decay is formed in float32: off by eps / (1 - 0.999) = 6e-5.
    for alone, together in zip(*run_all(stacked, params, grads), strict=True):
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


def after_steps(tx, gradient, start):
    """Return where three steps lead, unrolled."""
    x, state = dict(w=start), tx.init(dict(w=start))
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(gradient, x), state, x)
        x = optax.apply_updates(x, updates)
    return x["w"]


def slopes(build, eps, *at):
    """Return the derivatives of a loss by the start and by a factor of gradients."""

    def loss(start, scale):
        return (after_steps(build(eps=eps), lambda x: scale * x, start) ** 2).sum()

    return jax.grad(loss, (0, 1))(*at)


AT_0 = np.float32([[1.0, -2.0, 0.0]]), np.float32(0.5)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_steps_are_differentiable_where_the_gradient_is_0(eps):
    compiled = jax.jit(lambda *at: {k: slopes(x, eps, *at) for k, x in TABLE.items()})
    for name, found in compiled(*AT_0).items():
        for x in found:
            assert jnp.isfinite(x).all(), name


@every
def test_direct_steps_are_differentiable_where_the_gradient_is_0(build):
    # An eps that is not 0 has no other way through the compiled calls.
    for x in slopes(build, 0.0, *map(jnp.asarray, AT_0)):
        assert jnp.isfinite(x).all()


def test_hypergradients_equal_finite_differences(x64):
    h = 1e-6

    @jax.jit
    def derivatives(start, at):
        def both(options):
            def after(at):
                return after_steps(rmsprop(*at, **options), jnp.sin, start).sum()

            along = jax.vmap(
                lambda x: (after(at + h * x) - after(at - h * x)) / (2 * h)
            )
            return jax.grad(after)(at), along(jnp.eye(2))

        return {
            name: both(options)
            for name, options in OPTIONS.items()
            if name != "scheduled"
        }

    found = derivatives(jnp.array([[1.0, -2.0]]), jnp.array([0.1, 0.9]))
    for name, (exact, difference) in found.items():
        np.testing.assert_allclose(exact, difference, rtol=1e-6, err_msg=name)


def test_an_ensemble_is_vmapped_over_its_params():
    stack = partial(jax.tree.map, lambda *x: jnp.stack(x))
    for build in TABLE.values():
        tx = build()
        params, grads = stack(normal(0), normal(1)), stack(normal(2), normal(3))
        state = jax.vmap(tx.init)(params)
        together, _ = jax.vmap(tx.update)(grads, state, params)
        alone, _ = tx.update(normal(3), tx.init(normal(1)), normal(1))
        assert_close(jax.tree.map(lambda x: x[1], together), alone)
