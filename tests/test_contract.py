"""Contract tests, run over one table of configurations."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    COMPILED,
    SPECS,
    TABLE,
    assert_close,
    assert_same,
    halving,
    mesh_of,
    normal,
    on_mesh,
    through_pickle,
    types,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rmsprop_jax import RMSPropState, rmsprop

TXS = {name: build() for name, build in TABLE.items()}
FEW = ("plain", "centered_momentum", "weight_decay", "scheduled")


def init_all(params, names=TXS):
    return {name: TXS[name].init(params) for name in names}


def update_all(grads, states, params):
    """Return the updates and the state of each configuration in `states`."""
    return {name: TXS[name].update(grads, x, params) for name, x in states.items()}


# One program for all configurations, as compiling one for each would take much longer.
JIT_UPDATE_ALL = jax.jit(update_all)
both_ways = pytest.mark.parametrize(
    "update", [update_all, JIT_UPDATE_ALL], ids=["direct", "jit"]
)
MESHES = [AxisType.Auto, AxisType.Explicit]


def make(seed, kind=None):
    """Return `normal(seed)`, on a mesh if its kind of axes is given."""
    return on_mesh(seed, kind) if kind else normal(seed)


def states_of(new):
    return {name: state for name, (_, state) in new.items()}


def steps(update, states, seeds=(1, 2, 3), kind=None):
    """Return the last updates and the state of each configuration."""
    new = {}
    for seed in seeds:
        new = update(make(seed, kind), states, make(0, kind))
        states = states_of(new)
    return new


@cache
def expected(*seeds):
    """Return what direct updates with these gradients give on one device."""
    return steps(update_all, init_all(normal(0)), seeds)


def assert_all_close(found, expected):
    for name in found:
        assert_close(found[name], expected[name], err_msg=name)


def test_jit_changes_nothing():
    states = init_all(normal(0))
    assert_all_close(steps(JIT_UPDATE_ALL, states), expected(1, 2, 3))
    with jax.disable_jit():
        assert_all_close(steps(update_all, states), expected(1, 2, 3))


@both_ways
def test_update_changes_no_types(update):
    params, states = normal(0), init_all(normal(0))
    for name, (updates, state) in update(normal(1), states, params).items():
        assert types(state) == types(states[name]), name
        assert types(updates) == types(params), name
        assert state.count.weak_type is False, name


def test_update_runs_in_scan_and_cond():
    params = normal(0)

    def step(new, row):
        grads, taken = row
        take = lambda: update_all(grads, states_of(new), params)
        return jax.lax.cond(taken, take, lambda: new), None

    grads = jax.tree.map(lambda *x: np.stack(x), *map(normal, (1, 2, 3)))
    start = {name: (params, state) for name, state in init_all(params).items()}
    new, _ = jax.lax.scan(step, start, (grads, np.array([True, False, True])))
    assert_all_close(new, expected(1, 3))


def test_no_tracer_leaks():
    with jax.checking_leaks():
        txs = {name: build() for name, build in TABLE.items()}
        for name, tx in txs.items():
            state = jax.jit(tx.init)(normal(0))
            jax.jit(tx.update).lower(normal(1), state, normal(0))
            if name in FEW:
                tx.update(normal(1), state, normal(0))


def test_init_from_shapes_equals_init_from_arrays():
    params = normal(0, ("float32", "bfloat16", "float32"))
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    before = len(COMPILED)
    states, others = init_all(params), init_all(shapes)
    assert COMPILED[before:] == []
    assert_same(others, states)
    assert types(others) == types(states)
    avals = partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert avals(jax.eval_shape(init_all, shapes)) == avals(states)


@both_ways
def test_leaves_without_a_gradient_pass_through(update):
    params = normal(0) | dict(steps=np.arange(2), none=None, empty=np.zeros((0, 3)))
    grads = normal(1) | dict(vector=None, scalar=optax.MaskedNode())
    grads |= dict(steps=np.zeros(2, jax.dtypes.float0), none=None)
    grads |= dict(empty=np.zeros((0, 3), np.float32))
    states = init_all(params)
    for name, (updates, state) in update(grads, states, params).items():
        assert updates["vector"] is updates["none"] is None
        assert updates["scalar"] == optax.MaskedNode()
        assert updates["steps"].dtype == jax.dtypes.float0
        assert updates["empty"].shape == (0, 3)
        assert int(state.count) == 1
        for old, buffer in zip(states[name][1:], state[1:], strict=True):
            for leaf in ("vector", "scalar", "steps") if buffer else ():
                assert_same(buffer[leaf], old[leaf])
            assert not buffer or (buffer["matrix"] != old["matrix"]).all()


@both_ways
def test_degenerate_trees_pass(update):
    for params in ({}, (), [None], {"a": optax.MaskedNode()}, jnp.float32(2)):
        states = init_all(params, FEW)
        for name, (updates, state) in update(params, states, params).items():
            assert types(updates) == types(params), name
            assert types(state) == types(states[name]), name
            assert int(state.count) == 1, name


def test_count_saturates():
    last = jnp.int32(2**31 - 1)
    states = {k: x._replace(count=last) for k, x in init_all(normal(0)).items()}
    for name, state in states_of(steps(JIT_UPDATE_ALL, states, [1])).items():
        assert int(state.count) == last, name


@pytest.mark.parametrize("rate", [0.1, jnp.float32(0.1), halving])
def test_state_structure_is_frozen(rate):
    assert RMSPropState._fields == ("count", "nu", "mu", "trace")
    for name, build in TABLE.items():
        fields = ["count", "nu['w']"]
        fields += ["mu['w']"] * ("centered" in build.keywords)
        fields += ["trace['w']"] * ("momentum" in build.keywords)
        rates = dict(learning_rate=rate) if build.func is rmsprop else {}
        state = build(**rates).init(dict(w=jnp.ones(3)))
        assert type(state) is RMSPropState, name
        paths = jax.tree_util.tree_flatten_with_path(state)[0]
        assert [jax.tree_util.keystr(k) for k, _ in paths] == [f".{x}" for x in fields]


def test_optax_finds_and_maps_the_state():
    for name, (_, state) in expected(1).items():
        assert optax.tree_utils.tree_get(state, "nu") is state.nu
        mapped = optax.tree_utils.tree_map_params(TXS[name], lambda x: x + 1, state)
        assert int(mapped.count) == 1
        assert_same(mapped[1:], jax.tree.map(lambda x: x + 1, state[1:]))


def test_state_survives_pickle_and_the_host(tmp_path):
    states = states_of(expected(1))
    for name, state in states.items():
        for back in (through_pickle(state, None, tmp_path), jax.device_get(state)):
            assert type(back) is RMSPropState
            assert_same(back, state)
            new = TXS[name].update(normal(2), back, normal(0))
            assert_same(new, expected(1, 2)[name])


def assert_placed(params, state, updates=None):
    """Check that state and updates have the shardings of the parameters."""
    replicated = NamedSharding(params["matrix"].sharding.mesh, PartitionSpec())
    assert state.count.sharding.is_equivalent_to(replicated, 0)
    for tree in filter(None, (*state[1:], updates)):
        for x, p in zip(tree.values(), params.values(), strict=True):
            assert x.sharding.is_equivalent_to(p.sharding, x.ndim)


@pytest.mark.parametrize("kind", MESHES)
def test_init_places_state_where_params_are(kind):
    params = on_mesh(0, kind)
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )
    for states in (init_all(params), jax.jit(init_all)(params), init_all(shapes)):
        for state in states.values():
            assert_placed(params, state)


@pytest.mark.parametrize("kind", [None, *MESHES])
@both_ways
def test_later_steps_compile_nothing_and_stay_in_place(kind, update):
    names = FEW if update is update_all else tuple(TXS)
    params, jit_init = make(0, kind), jax.jit(init_all, static_argnums=1)
    starts = [init(params, names) for init in (init_all, jit_init)]
    # The first step may trace, lower and compile, each of which counts.
    steps(update, starts[0], [1], kind)
    before = len(COMPILED)
    for states in starts:
        new = steps(update, states, kind=kind)
        assert_all_close(new, expected(1, 2, 3))
        for updates, state in new.values() if kind else ():
            assert_placed(params, state, updates)
    assert COMPILED[before:] == []


@pytest.mark.parametrize("kind", [None, *MESHES])
def test_params_and_state_are_donated(kind):
    def step(params, states, grads):
        new = update_all(grads, states, params)
        updates, _ = new["centered_momentum"]
        return optax.apply_updates(params, updates), states_of(new)

    step = jax.jit(step, donate_argnums=(0, 1))
    for init in (init_all, jax.jit(init_all, static_argnums=1)):
        params = make(0, kind)
        states = init(params, FEW)
        new = step(params, states, make(1, kind))
        assert all(x.is_deleted() for x in jax.tree.leaves((params, states)))
        assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_nothing_is_transferred_under_jit():
    tx = rmsprop(jnp.float32(0.1), centered=True, momentum=0.9)
    for kind in (None, AxisType.Auto):
        params, grads = make(0, kind), make(1, kind)
        with jax.transfer_guard("disallow"):
            JIT_UPDATE_ALL(grads, jax.jit(init_all)(params), params)
            jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)


def test_update_runs_in_shard_map():
    params, grads = on_mesh(0), on_mesh(1)

    def step(grads, params):
        new = update_all(grads, init_all(params), params)
        return {name: updates for name, (updates, _) in new.items()}

    specs = dict(in_specs=(SPECS, SPECS), out_specs=dict.fromkeys(TXS, SPECS))
    mapped = jax.shard_map(step, mesh=mesh_of(4, 2), **specs)
    for name, found in jax.jit(mapped)(grads, params).items():
        assert_close(found, expected(1)[name][0], err_msg=name)


def test_an_ensemble_is_vmapped_over_its_params():
    stack = lambda *trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    states = jax.vmap(init_all)(stack(normal(1), normal(0)))
    grads, params = stack(normal(2), normal(1)), stack(normal(1), normal(0))
    new = jax.jit(jax.vmap(update_all))(grads, states, params)
    assert_all_close(jax.tree.map(lambda x: x[1], new), expected(1))
