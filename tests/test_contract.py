"""What every optimizer here keeps to, checked over one table of configurations."""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import RMSPropState, rmsprop, scale_by_rms


def halving(count):
    return 0.1 * 0.5 ** count.astype(jnp.float32)


def on_matrices(params):
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


OPTIONS = {
    "plain": {},
    "eps_outside": dict(eps_in_sqrt=False),
    "centered": dict(centered=True),
    "momentum": dict(momentum=0.9),
    "nesterov": dict(momentum=0.9, nesterov=True),
    "centered_momentum": dict(centered=True, momentum=0.9),
    "lr_outside_momentum": dict(momentum=0.9, lr_in_momentum=False),
    "l2": dict(l2=1e-2),
    "weight_decay": dict(weight_decay=1e-2, weight_decay_mask=on_matrices),
    "bias_correction": dict(bias_correction=True),
    "scheduled": dict(learning_rate=halving),
}
RMSPROP = {
    name: partial(rmsprop, **{"learning_rate": 0.1, **options})
    for name, options in OPTIONS.items()
}
TABLE = RMSPROP | {
    "scale_by_rms": partial(scale_by_rms),
    "scale_by_rms_centered": partial(scale_by_rms, centered=True),
}
every = pytest.mark.parametrize("build", TABLE.values(), ids=TABLE)


def normal(seed, dtypes=("float32", "float32", "float32")):
    """Return a tree of a matrix, a vector and a scalar."""
    random = np.random.default_rng(seed)
    shapes = dict(matrix=(8, 4), vector=(8,), scalar=())
    return {
        name: jnp.asarray(random.normal(size=shape), dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }


def run(tx, params, update=None, steps=3):
    """Return parameters and state after steps of known gradients."""
    state = tx.init(params)
    for seed in range(1, steps + 1):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), normal(seed), params)
        updates, state = (update or tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), tree)


def assert_close(tree, other, rtol=2e-6, atol=1e-7, err_msg=""):
    # A few float32 ulp a step: compilers fuse multiply and add as they like.
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=atol, err_msg=err_msg)
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(close, tree, other)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@every
def test_jit_equals_eager(build):
    tx = build()
    assert_close(run(tx, normal(0)), run(tx, normal(0), jax.jit(tx.update)))


@every
def test_disabling_jit_changes_nothing(build):
    expected = run(build(), normal(0))
    with jax.disable_jit():
        assert_close(run(build(), normal(0)), expected)


@every
def test_update_changes_no_types(build):
    tx, params = build(), normal(0)
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new = update(normal(1), state, params)
        assert types(new) == types(state)
        assert types(updates) == types(params)
    assert jax.tree.map(lambda x: x.weak_type, state.count) is False


# Below, all in one program where one for each would add nothing but its compiling.
TXS = {name: build() for name, build in TABLE.items()}


def init_all(params):
    return {name: tx.init(params) for name, tx in TXS.items()}


def step_all(params, states, grads):
    """Return new parameters and states of each configuration, from those of each."""
    new = {}
    for name, tx in TXS.items():
        updates, state = tx.update(grads, states[name], params[name])
        new[name] = optax.apply_updates(params[name], updates), state
    return [{name: x[k] for name, x in new.items()} for k in (0, 1)]


def test_scan_equals_a_loop():
    params = normal(0)
    grads = jax.tree.map(lambda *x: jnp.stack(x), *map(normal, (1, 2, 3)))

    step = lambda carry, g: (step_all(*carry, g), None)  # noqa: E731
    start = [dict.fromkeys(TXS, params), init_all(params)]
    (ends, states), _ = jax.lax.scan(step, start, grads)
    for name, tx in TXS.items():
        assert_close((ends[name], states[name]), run(tx, params), err_msg=name)


@pytest.mark.parametrize("taken", [True, False])
def test_update_is_a_branch_of_cond(taken):
    params, grads = normal(0), normal(1)
    states = init_all(params)
    step = lambda name: TXS[name].update(grads, states[name], params)  # noqa: E731
    skip = lambda name: (jax.tree.map(jnp.zeros_like, grads), states[name])  # noqa: E731
    every_one = lambda branch: lambda: {name: branch(name) for name in TXS}  # noqa: E731
    found = jax.lax.cond(taken, every_one(step), every_one(skip))
    for name in TXS:
        expected = step(name) if taken else skip(name)
        assert_close(found[name], expected, err_msg=name)


@every
def test_nothing_is_transferred(build):
    params, grads = normal(0), normal(1)
    with jax.transfer_guard("disallow"):
        tx = build()
        state = tx.init(params)
        jax.jit(tx.init)(params)
        for update in (tx.update, jax.jit(tx.update)):
            _, later = update(grads, state, params)
            update(grads, later, params)


def test_params_and_state_can_be_donated():
    step = jax.jit(step_all, donate_argnums=(0, 1))
    for init in (init_all, jax.jit(init_all)):
        params = {name: normal(0) for name in TXS}
        states = init(normal(0))
        new = step(*step(params, states, normal(1)), normal(2))
        for name in TXS:
            given = jax.tree.leaves((params[name], states[name]))
            assert all(x.is_deleted() for x in given), name
        assert not any(x.is_deleted() for x in jax.tree.leaves(new))


@every
def test_no_tracer_leaks(build):
    with jax.checking_leaks():
        tx = build()
        run(tx, normal(0), jax.jit(tx.update), steps=1)
        run(tx, normal(0), steps=1)


@every
def test_init_accepts_shapes(build):
    tx, params = build(), normal(0, ("float32", "bfloat16", "float32"))
    expected = tx.init(params)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert_same(tx.init(shapes), expected)
    assert types(tx.init(shapes)) == types(expected)
    abstract = jax.eval_shape(tx.init, shapes)
    aval = lambda x: (x.shape, x.dtype)  # noqa: E731
    assert jax.tree.map(aval, abstract) == jax.tree.map(aval, expected)


@every
def test_no_gradient_means_no_change(build):
    tx, params = build(), normal(0)
    _, state = tx.update(normal(1), tx.init(params), params)
    grads = normal(2) | dict(vector=None, scalar=optax.MaskedNode())
    for update in (tx.update, jax.jit(tx.update)):
        updates, new = update(grads, state, params)
        assert updates["vector"] is None
        assert updates["scalar"] == optax.MaskedNode()
        assert int(new.count) == 2
        for old, buffer in zip(state[1:], new[1:], strict=True):
            if old is not None:
                assert_same(buffer["vector"], old["vector"])
                assert_same(buffer["scalar"], old["scalar"])
                assert not (buffer["matrix"] == old["matrix"]).all()


@every
@pytest.mark.parametrize(
    "params",
    [{}, (), [None], {"a": optax.MaskedNode()}, np.float32(2), np.zeros((0, 3))],
    ids=["empty", "tuple", "none", "masked", "scalar", "zero_size"],
)
def test_degenerate_trees_pass(build, params):
    tx, params = build(), jax.tree.map(jnp.float32, params)
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new = update(params, state, params)
        assert types(updates) == types(params)
        assert types(new) == types(state)
        assert int(new.count) == 1


@every
def test_integer_leaves_pass_through(build):
    tx = build()
    params = dict(w=jnp.ones(3), step=jnp.arange(2))
    loss = lambda p: (p["w"] ** 2).sum() * p["step"].sum()  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        grads = jax.grad(loss, allow_int=True)(params)
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new = update(grads, state, params)
        assert updates["step"].dtype == jax.dtypes.float0
        assert updates["step"].shape == (2,)
        assert_same(new.nu["step"], state.nu["step"])


@every
def test_count_saturates(build):
    tx, params = build(), normal(0)
    state = tx.init(params)._replace(count=jnp.int32(2**31 - 1))
    _, state = tx.update(normal(1), state, params)
    assert int(state.count) == 2**31 - 1


@every
def test_state_structure_is_frozen(build):
    fields = ["count", "nu['w']"]
    fields += ["mu['w']"] * ("centered" in build.keywords)
    fields += ["trace['w']"] * ("momentum" in build.keywords)
    rates = [{}]
    if build.func is rmsprop:
        rates = [dict(learning_rate=x) for x in (0.1, jnp.float32(0.1), halving)]
    for rate in rates:
        state = build(**rate).init(dict(w=jnp.ones(3)))
        assert type(state) is RMSPropState
        paths = jax.tree_util.tree_flatten_with_path(state)[0]
        assert [jax.tree_util.keystr(k) for k, _ in paths] == [f".{x}" for x in fields]
        assert RMSPropState._fields == ("count", "nu", "mu", "trace")


@every
def test_state_is_found_and_mapped_by_optax(build):
    tx, params = build(), normal(0)
    _, state = tx.update(normal(1), tx.init(params), params)
    assert optax.tree_utils.tree_get(state, "nu") is state.nu
    mapped = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    assert int(mapped.count) == 1
    assert_same(mapped[1:], jax.tree.map(lambda x: x + 1, state[1:]))


@every
def test_state_survives_pickle_and_deepcopy(build):
    tx, params = build(), normal(0)
    _, state = tx.update(normal(1), tx.init(params), params)
    expected = tx.update(normal(2), state, params)
    host = jax.device_get(state)
    for back in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state), host):
        assert type(back) is RMSPropState
        assert_same(copy.deepcopy(tx).update(normal(2), back, params), expected)
