"""Contract tests, run over one table of configurations."""

from functools import cache

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
    set_mesh,
    through_pickle,
    types,
)
from jax.sharding import AxisType

from rmsprop_jax import RMSPropState, rmsprop

TXS = {name: build() for name, build in TABLE.items()}
FEW = ("plain", "centered_momentum", "weight_decay", "scheduled")


def init_all(params, names=TXS):
    return {name: TXS[name].init(params) for name in names}


jit_init_all = jax.jit(init_all, static_argnums=1)


def update_all(grads, states, params):
    """Return the updates and the state of each configuration in `states`."""
    return {name: TXS[name].update(grads, x, params) for name, x in states.items()}


def in_scan_and_cond(grads, states, params):
    """Update in the first of two rounds only."""

    def each(new, taken):
        take = lambda: update_all(grads, states_of(new), params)
        return jax.lax.cond(taken, take, lambda: new), None

    start = {name: (params, state) for name, state in states.items()}
    return jax.lax.scan(each, start, np.array([True, False]))[0]


def states_of(new):
    return {name: state for name, (_, state) in new.items()}


# One program for all configurations, as compiling one for each would take much longer.
WAYS = dict(
    direct=update_all,
    donated=jax.jit(update_all, donate_argnums=1),
    without_jit=jax.disable_jit()(update_all),
    scan_and_cond=jax.jit(in_scan_and_cond),
    host=lambda *args: update_all(*jax.device_get(args)),
    pickle=lambda *args: update_all(*through_pickle(args, None, None)),
)
MESHES = [AxisType.Auto, AxisType.Explicit]
PLACES = [(way, None) for way in WAYS]
PLACES += [(way, kind) for way in ("direct", "donated") for kind in MESHES]
both_ways = pytest.mark.parametrize(
    "update", [update_all, jax.jit(update_all)], ids=["direct", "jit"]
)


def make(seed, kind=None):
    """Return `normal(seed)`, on a mesh if its kind of axes is given."""
    return on_mesh(seed, kind) if kind else normal(seed)


@cache
def expected(*seeds):
    """Return what direct updates with these gradients give on one device."""
    states, new = init_all(normal(0)), {}
    for seed in seeds:
        new = update_all(normal(seed), states, normal(0))
        states = states_of(new)
    return new


def assert_all_close(found, expected):
    for name in found:
        assert_close(found[name], expected[name], err_msg=name)


def assert_like(params, states):
    """Check that states have the frozen structure, types and shardings of params."""
    like = types(params)
    count = ((), "int32", False, like["scalar"][-1])
    for name, state in states.items():
        options = TABLE[name].keywords
        mu, trace = (like if x in options else None for x in ("centered", "momentum"))
        assert type(state) is RMSPropState, name
        assert types(state) == (count, like, mu, trace), name


@pytest.mark.parametrize(("way", "kind"), PLACES)
def test_every_way_gives_the_same_updates_and_later_steps_compile_nothing(way, kind):
    update, params, wanted = WAYS[way], make(0, kind), expected(1, 2, 3)
    grads = [make(seed, kind) for seed in (1, 2, 3)]
    names = FEW if kind and way == "direct" else tuple(TXS)
    where = {name: p.sharding if kind else None for name, p in params.items()}
    shaped = lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where)
    shapes = jax.tree.map(shaped, params, where)
    before = len(COMPILED)
    starts = [init_all(params, names), init_all(shapes, names)]
    assert COMPILED[before:] == []
    starts += [jit_init_all(params, names)]
    # The first step may trace, lower and compile, each of which counts.
    update(grads[0], init_all(params, names), params)
    before = len(COMPILED)
    for states in starts:
        assert_like(params, states)
        for g in grads:
            new, old = update(g, states, params), states
            states = states_of(new)
            assert_like(params, states)
            assert all(types(updates) == types(params) for updates, _ in new.values())
            if way == "donated":
                assert all(x.is_deleted() for x in jax.tree.leaves(old))
        assert_all_close(new, wanted)
    assert COMPILED[before:] == []


@pytest.mark.parametrize("rate", [np.float32(0.1), jnp.float32(0.1), halving])
def test_the_learning_rate_does_not_change_the_structure_of_state(rate):
    for options in ({}, dict(centered=True, momentum=0.9)):
        state = rmsprop(rate, **options).init(normal(0))
        assert types(state) == types(rmsprop(0.1, **options).init(normal(0)))


def test_init_from_shapes_uses_the_mesh_that_is_set():
    with set_mesh(mesh_of(8)):
        state = rmsprop(0.1).init(jax.ShapeDtypeStruct((3,), jnp.float32))
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state))


def test_no_tracer_leaks():
    with jax.checking_leaks():
        for name, tx in TXS.items():
            state = jax.jit(tx.init)(normal(0))
            jax.jit(tx.update).lower(normal(1), state, normal(0))
            if name in FEW:
                tx.update(normal(1), state, normal(0))


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
    states = {k: x._replace(count=last) for k, x in init_all(normal(0), FEW).items()}
    for name, (_, state) in update_all(normal(1), states, normal(0)).items():
        assert int(state.count) == last, name


def test_optax_finds_and_maps_the_state():
    for name, (_, state) in expected(1).items():
        assert optax.tree_utils.tree_get(state, "nu") is state.nu
        mapped = optax.tree_utils.tree_map_params(TXS[name], lambda x: x + 1, state)
        assert int(mapped.count) == 1
        assert_same(mapped[1:], jax.tree.map(lambda x: x + 1, state[1:]))


def test_nothing_is_transferred_under_jit():
    tx = rmsprop(jnp.float32(0.1), centered=True, momentum=0.9)
    for kind in (None, AxisType.Auto):
        params, grads = make(0, kind), make(1, kind)
        with jax.transfer_guard("disallow"):
            jax.jit(update_all)(grads, jit_init_all(params, FEW), params)
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
