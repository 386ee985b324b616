"""The same contract on a mesh of eight devices; nothing is compiled a second time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_contract import TXS, assert_close, every, normal, run

from rmsprop_jax import rmsprop, rule

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "/compile/" in event else None
)
SPECS = dict(
    matrix=PartitionSpec("x", "y"), vector=PartitionSpec("y"), scalar=PartitionSpec()
)
axes = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


def direct(function):
    return function


ways = pytest.mark.parametrize("wrap", [direct, jax.jit], ids=["direct", "jit"])


def shardings(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def placed(seed, kind):
    """Return a tree on the mesh, or on one device if kind is None."""
    tree = normal(seed)
    return tree if kind is None else jax.device_put(tree, shardings(kind))


def assert_placed(state, params):
    replicated = NamedSharding(params["matrix"].sharding.mesh, PartitionSpec())
    assert state.count.sharding.is_equivalent_to(replicated, 0)
    for buffer in state[1:]:
        for name, x in (buffer or {}).items():
            assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim)


@every
@axes
@ways
def test_state_lives_where_params_do(build, kind, wrap):
    tx, params = build(), placed(0, kind)
    state = wrap(tx.init)(params)
    assert_placed(state, params)
    updates, new = wrap(tx.update)(placed(1, kind), state, params)
    assert_placed(new, params)
    assert_placed(new._replace(nu=updates), params)


@every
def test_a_mesh_changes_no_number(build):
    tx = build()
    sharded = placed(0, AxisType.Auto)
    place = jax.jit(lambda x: x, out_shardings=shardings(AxisType.Auto))
    update = lambda g, *rest: tx.update(place(g), *rest)  # noqa: E731
    assert_close(run(tx, sharded, update), run(tx, normal(0)))


@every
@axes
def test_init_from_shapes_places_state(build, kind):
    tx, params = build(), placed(0, kind)
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )
    state = tx.init(shapes)
    assert_placed(state, params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


@every
@pytest.mark.parametrize(
    ("kind", "init", "wrap"),
    [
        (None, direct, jax.jit),
        (AxisType.Auto, direct, direct),
        (AxisType.Auto, jax.jit, direct),
        (AxisType.Auto, jax.jit, jax.jit),
        (AxisType.Explicit, direct, jax.jit),
        (AxisType.Explicit, jax.jit, direct),
    ],
)
def test_later_steps_compile_nothing(build, kind, init, wrap):
    tx, params = build(), placed(0, kind)
    grads = [placed(seed, kind) for seed in (1, 2, 3)]
    update = wrap(tx.update)
    # Tracing, lowering and compiling each count; the first step may do all three.
    _, state = update(grads[0], init(tx.init)(params), params)
    before = len(COMPILED)
    for g in grads[1:]:
        _, state = update(g, state, params)
    assert COMPILED[before:] == []
    if wrap is jax.jit:
        # An entry for another sharding or weak type costs a retrace of the caller.
        assert update._cache_size() == 1


@axes
@ways
def test_params_and_state_are_donated_on_a_mesh(kind, wrap):
    tx, params = rmsprop(0.1, centered=True, momentum=0.9), placed(0, kind)
    state = wrap(tx.init)(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new = jax.jit(step, donate_argnums=(0, 1))(params, state, placed(1, kind))
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
    assert_placed(new[1], new[0])


def test_update_runs_in_shard_map():
    params, grads = placed(0, AxisType.Auto), placed(1, AxisType.Auto)

    def two_steps(name, params, grads):
        state = TXS[name].init(params)
        for _ in range(2):
            updates, state = TXS[name].update(grads, state, params)
        return updates

    mesh = params["matrix"].sharding.mesh
    mapped = jax.shard_map(
        lambda *given: {name: two_steps(name, *given) for name in TXS},
        mesh=mesh,
        in_specs=(SPECS, SPECS),
        out_specs=dict.fromkeys(TXS, SPECS),
    )
    for name, found in jax.jit(mapped)(params, grads).items():
        expected = two_steps(name, normal(0), normal(1))
        assert_close(found, expected, err_msg=name)


def test_nothing_is_transferred_on_a_mesh():
    tx = rmsprop(jnp.float32(0.1), centered=True, momentum=0.9)
    params, grads = placed(0, AxisType.Auto), placed(1, AxisType.Auto)
    with jax.transfer_guard("disallow"):
        _, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    assert np.isfinite(jax.device_get(state.nu["matrix"])).all()


def test_leaves_of_one_kind_are_traced_once(monkeypatch):
    traced = []
    step = rule.step
    monkeypatch.setattr(rule, "step", lambda *a, **k: traced.append(1) or step(*a, **k))
    tx, params = rmsprop(0.1, eps=3e-7), [jnp.ones((3, 5))] * 20
    tx.update(params, tx.init(params))
    assert len(traced) == 1


@every
def test_a_direct_update_is_one_compiled_call(build):
    # An eps of its own, for a program that is not in the cache yet.
    tx, params, grads = build(eps=5e-7), normal(0), normal(1)
    state = tx.init(params)
    before = len(COMPILED)
    tx.update(grads, state, params)
    assert sum("backend_compile" in event for event in COMPILED[before:]) == 1


def test_an_update_inside_jit_is_not_wrapped_in_another():
    tx, params = rmsprop(0.1, l2=0.1), normal(0)
    program = str(jax.make_jaxpr(tx.update)(normal(1), tx.init(params), params))
    assert "name=_leaf" in program
    assert "name=_update" not in program
