"""Short examples of use with Optax and Flax, each checked for one property."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from flax.training.train_state import TrainState
from helpers import COMPILED, assert_close, assert_same, direct_and_jit, refusal

from rmsprop_jax import RMSPropState, rmsprop, scale_by_rms

WEIGHTS = np.float32([[1.0], [-2.0], [0.5]])
INPUTS = np.float32(np.random.default_rng(0).normal(size=(64, 3)))
TARGETS = INPUTS @ WEIGHTS
START = dict(w=np.zeros((3, 1), np.float32))
ONES = dict(w=np.ones((3, 1), np.float32))
GRADS = [dict(w=x) for x in INPUTS[:3, :, None]]


def loss_of(params):
    return ((INPUTS @ params["w"] - TARGETS) ** 2).mean()


def test_schedule_free_averages_find_the_weights(lenient):
    tx = optax.contrib.schedule_free(rmsprop(0.1), learning_rate=0.1, b1=0.9)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        start = params, tx.init(params)
        (params, state), _ = jax.lax.scan(step, start, length=300)
        return optax.contrib.schedule_free_eval_params(state, params)

    np.testing.assert_allclose(train(START)["w"], WEIGHTS, atol=5e-2)


def test_a_chain_with_scale_by_rms_is_rmsprop_of_clipped_gradients():
    core, rate = scale_by_rms(eps=1.0), optax.scale_by_learning_rate(0.1)
    chain = optax.chain(optax.clip_by_global_norm(1.0), core, rate)
    grads = dict(w=jnp.float32([[30.0], [40.0], [0.0]]))
    updates, _ = chain.update(grads, chain.init(START))
    tx, clipped = rmsprop(0.1, eps=1.0), dict(w=jnp.float32([[0.6], [0.8], [0.0]]))
    assert_close(updates, tx.update(clipped, tx.init(START))[0])


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
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    for name, rate in dict(w=0.01, bias=0.1, frozen=0).items():
        np.testing.assert_allclose(updates[name], -rate / np.sqrt(0.1), rtol=1e-6)


def test_multisteps_is_one_step_on_the_mean_gradient(lenient):
    tx = rmsprop(0.1, centered=True, momentum=0.9)
    many = optax.MultiSteps(tx, every_k_schedule=3)
    update, state, got = jax.jit(many.update), many.init(START), START
    for grads in GRADS:
        updates, state = update(grads, state, got)
        got = optax.apply_updates(got, updates)
    mean = jax.tree.map(lambda *g: sum(g) / 3, *GRADS)
    updates, one = tx.update(mean, tx.init(START), START)
    assert_close(got, optax.apply_updates(START, updates), rtol=1e-5)
    assert_close(state.inner_opt_state, one, rtol=1e-5)


@direct_and_jit
def test_apply_if_finite_skips_a_bad_step(wrap, lenient):
    tx = optax.apply_if_finite(rmsprop(0.1, centered=True, momentum=0.9), 5)
    update = wrap(tx.update)
    _, before = update(GRADS[0], tx.init(START), START)
    bad = dict(w=jnp.float32([[jnp.nan], [1.0], [1.0]]))
    updates, after = update(bad, before, START)
    assert_same(optax.apply_updates(START, updates), START)
    assert_same(after.inner_state, before.inner_state)
    assert_same(update(ONES, after, START)[0], update(ONES, before, START)[0])


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
    inject = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)
    tx = inject(0.1, decay=0.999)
    _, state = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(state.inner_state.nu["w"], 1e-3, rtol=1e-4)


def test_a_flax_train_state_learns(lenient):
    tx = rmsprop(optax.cosine_decay_schedule(0.04, 60), momentum=0.9)
    train = TrainState.create(apply_fn=None, params=START, tx=tx)

    @jax.jit
    def step(train):
        return train.apply_gradients(grads=jax.grad(loss_of)(train.params))

    for _ in range(60):
        train = step(train)
    assert loss_of(train.params) < 0.05 * loss_of(START)
    assert isinstance(train.opt_state, RMSPropState)


def test_an_nnx_optimizer_learns():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = rmsprop(0.02, momentum=0.9, centered=True, weight_decay=1e-4)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: ((m(INPUTS) - TARGETS) ** 2).mean()
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [step(model, optimizer) for _ in range(61)]
    assert losses[-1] < 0.05 * losses[0]
    assert int(optimizer.opt_state.count[...]) == 61
