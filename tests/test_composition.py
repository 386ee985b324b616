"""Short examples of use with Optax and Flax, each checked for one property."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import linen, nnx
from flax.training.train_state import TrainState
from helpers import COMPILED, assert_close, assert_same, direct_and_jit, normal, refusal

from rmsprop_jax import RMSPropState, rmsprop, scale_by_rms

WEIGHTS = np.float32([[1.0], [-2.0], [0.5]])
INPUTS = np.float32(np.random.default_rng(0).normal(size=(64, 3)))
TARGETS = INPUTS @ WEIGHTS
START = dict(w=np.zeros((3, 1), np.float32))
ONES = dict(w=np.ones((3, 1), np.float32))


def loss_of(params):
    return ((INPUTS @ params["w"] - TARGETS) ** 2).mean()


def minimize(tx, params, steps=100):
    """Return parameters and state after steps on the regression, in one program."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def loop(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]

    return loop(params)


def test_a_loop_in_scan_finds_the_weights(lenient):
    tx = rmsprop(optax.cosine_decay_schedule(0.1, 200), momentum=0.5)
    params, state = minimize(tx, START, 200)
    np.testing.assert_allclose(params["w"], WEIGHTS, atol=1e-2)
    assert int(state.count) == 200


def test_scale_by_rms_in_a_chain_is_rmsprop():
    chain = optax.chain(scale_by_rms(), optax.scale_by_learning_rate(0.1))
    assert_close(minimize(chain, START)[0], minimize(rmsprop(0.1), START)[0])


def test_clipping_comes_before_the_average():
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(0.1))
    grads = dict(w=jnp.float32([[30.0], [40.0], [0.0]]))
    _, (_, state) = tx.update(grads, tx.init(START), START)
    # 0.1 of the square of (0.6, 0.8), not of (30, 40).
    np.testing.assert_allclose(state.nu["w"], [[0.036], [0.064], [0]], rtol=1e-5)


def test_masked_leaves_have_no_state_and_keep_their_gradient():
    params = START | dict(bias=np.ones(2, "f"), frozen=np.ones(2, "f"))
    decayed = dict(w=True, bias=False, frozen=True)
    inner = rmsprop(0.1, weight_decay=0.5, weight_decay_mask=decayed)
    tx = optax.masked(inner, dict(w=True, bias=True, frozen=False))
    state, ones = tx.init(params), jax.tree.map(np.ones_like, params)
    assert len(jax.tree.leaves(state)) == 3
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(ones, state, ones)
        np.testing.assert_array_equal(updates["frozen"], 1)
        ratio = 1 / np.sqrt(0.1)
        np.testing.assert_allclose(updates["bias"], -0.1 * ratio, rtol=1e-6)
        np.testing.assert_allclose(updates["w"], -0.1 * (ratio + 0.5), rtol=1e-6)


def test_partition_gives_each_group_its_own_optimizer():
    params = START | dict(bias=jnp.ones(2), frozen=jnp.ones(2))
    groups = dict(slow=rmsprop(0.01), fast=rmsprop(0.1), none=optax.set_to_zero())
    tx = optax.partition(groups, dict(w="slow", bias="fast", frozen="none"))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.1 / np.sqrt(0.1), rtol=1e-6)
    np.testing.assert_allclose(updates["w"], -0.01 / np.sqrt(0.1), rtol=1e-6)
    np.testing.assert_array_equal(updates["frozen"], 0)


def test_multisteps_is_one_step_on_the_mean_gradient(lenient):
    tx, params = rmsprop(0.1, centered=True, momentum=0.9), normal(0)
    many = optax.MultiSteps(tx, every_k_schedule=3)
    update, state, got = jax.jit(many.update), many.init(params), params
    for seed in (1, 2, 3):
        updates, state = update(normal(seed), state, got)
        got = optax.apply_updates(got, updates)
    mean = jax.tree.map(lambda *g: sum(g) / 3, *map(normal, (1, 2, 3)))
    updates, one = tx.update(mean, tx.init(params), params)
    assert_close(got, optax.apply_updates(params, updates), rtol=1e-5)
    assert_close(state.inner_opt_state, one, rtol=1e-5)


@direct_and_jit
def test_apply_if_finite_skips_a_bad_step(wrap, lenient):
    tx = optax.apply_if_finite(rmsprop(0.1, centered=True, momentum=0.9), 5)
    update, params = wrap(tx.update), normal(0)
    _, before = update(normal(1), tx.init(params), params)

    bad = normal(2) | dict(scalar=jnp.float32(jnp.nan))
    updates, after = update(bad, before, params)
    assert_same(optax.apply_updates(params, updates), params)
    assert_same(after.inner_state, before.inner_state)

    updates, _ = update(normal(3), after, params)
    expected, _ = update(normal(3), before, params)
    assert_same(updates, expected)


@direct_and_jit
def test_injected_hyperparameters_can_change_without_compiling(wrap, lenient):
    tx = optax.inject_hyperparams(rmsprop)(0.1, momentum=0.0, l2=0.0)
    update, state = wrap(tx.update), tx.init(START)
    _, state = update(ONES, state, START)
    rate = dict(learning_rate=jnp.float32(0.01))
    changed = state._replace(hyperparams=state.hyperparams | rate)
    # The factory is called anew at each step: it must find what it compiled before.
    before = len(COMPILED)
    slow, _ = update(ONES, changed, START)
    fast, later = update(ONES, state, START)
    update(ONES, later, START)
    assert COMPILED[before:] == []
    np.testing.assert_allclose(10 * slow["w"], fast["w"], rtol=1e-6)


def test_injecting_a_dtype_needs_static_args():
    inject = optax.inject_hyperparams
    with refusal("nu_dtype must be", "static_args"):
        inject(rmsprop)(0.1, nu_dtype=jnp.float32).init(START)
    tx = inject(rmsprop, static_args="nu_dtype")(0.1, nu_dtype=jnp.float32)
    assert tx.init(START).inner_state.nu["w"].dtype == jnp.float32


def test_injecting_next_to_bfloat16_parameters_needs_a_dtype(lenient):
    params = dict(w=jnp.ones(3, jnp.bfloat16))
    with refusal("decay", "1.0", "hyperparam_dtype"):
        optax.inject_hyperparams(rmsprop)(0.1, decay=0.999).init(params)
    tx = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)
    tx = tx(0.1, decay=0.999)
    _, state = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(state.inner_state.nu["w"], 1e-3, rtol=1e-4)


def test_schedule_free_averages_find_the_weights(lenient):
    tx = optax.contrib.schedule_free(rmsprop(0.1), learning_rate=0.1, b1=0.9)
    params, state = minimize(tx, START, 300)
    params = optax.contrib.schedule_free_eval_params(state, params)
    np.testing.assert_allclose(params["w"], WEIGHTS, atol=5e-2)


@direct_and_jit
def test_update_number_n_uses_schedule_of_n(wrap, lenient):
    for schedule in (
        optax.linear_schedule(0.1, 0.0, 4),
        optax.warmup_cosine_decay_schedule(0.01, 0.1, 2, 6),
        optax.piecewise_constant_schedule(0.1, {2: 0.5}),
    ):
        injected = optax.inject_hyperparams(rmsprop)
        for tx in (factory(schedule, 0.0, 0.0) for factory in (rmsprop, injected)):
            update, state = wrap(tx.update), tx.init(START)
            for n in range(4):
                # With decay 0 and gradient 1 the step is the learning rate.
                updates, state = update(ONES, state, START)
                np.testing.assert_allclose(updates["w"], -schedule(n), rtol=1e-6)


def test_a_linen_train_state_learns():
    model = linen.Dense(1, use_bias=False)
    params = model.init(jax.random.key(0), INPUTS)
    tx = rmsprop(0.02, momentum=0.9)
    train = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(train):
        loss = lambda p: ((train.apply_fn(p, INPUTS) - TARGETS) ** 2).mean()  # noqa: E731
        value, grads = jax.value_and_grad(loss)(train.params)
        return train.apply_gradients(grads=grads), value

    train, first = step(train)
    for _ in range(60):
        train, last = step(train)
    assert last < 0.05 * first
    assert isinstance(train.opt_state, RMSPropState)


def test_an_nnx_optimizer_learns():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = rmsprop(0.02, momentum=0.9, centered=True, weight_decay=1e-4)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: ((m(INPUTS) - TARGETS) ** 2).mean()  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    first = step(model, optimizer)
    for _ in range(60):
        last = step(model, optimizer)
    assert last < 0.05 * first
    assert int(optimizer.opt_state.count[...]) == 61
