"""State lives where its parameters do, or is divided over the data axis on request."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scale
from flax import nnx
from helpers import (
    COMPILED,
    SMALL,
    assert_close,
    assert_placed,
    assert_same,
    assert_within_an_ulp,
    draw,
    mesh_of,
    nbytes,
    refusal,
    set_mesh,
    through_orbax,
)
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rmsprop_jax import rmsprop, sharding

SHAPES = dict(kernel=(64, 128), bias=(128,), odd=(3, 5), long=(8, 1), scalar=())
BOTH = dict(centered=True, momentum=0.9)


def replicated(seed, mesh):
    return jax.device_put(draw(seed, SHAPES), NamedSharding(mesh, P()))


def shards(shardings):
    return {k: s.shard_shape(SHAPES[k]) for k, s in shardings.items()}


def bytes_on_a_device(tree):
    return nbytes([x.addressable_shards[0].data for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    ("kind", "small"), [(AxisType.Auto, SMALL), (AxisType.Explicit, {})]
)
def test_zero_changes_where_and_not_what(kind, small):
    tx, mesh = rmsprop(0.01, **BOTH, **small), mesh_of(8, kind=kind)
    with set_mesh(mesh):
        params = replicated(0, mesh)
        where, _ = sharding.zero(jax.eval_shape(tx.init, params), mesh, "data")
        state = jax.jit(tx.init, out_shardings=where)(params)
        step = jax.jit(tx.update, out_shardings=(None, where))
        for seed in (1, 2):
            updates, state = step(replicated(seed, mesh), state)
        assert step._cache_size() == 1
    assert_placed(state, where)
    assert bytes_on_a_device(state) < 0.13 * nbytes(state)
    expected = tx.init(draw(0, SHAPES))
    for seed in (1, 2):
        other, expected = tx.update(draw(seed, SHAPES), expected)
    assert_within_an_ulp(state, expected)
    assert_close(updates, other, atol=1e-3 if small else 1e-7)


def test_zero_divides_the_largest_axis_and_lists_what_stays_whole():
    tx = optax.chain(optax.clip(1.0), rmsprop(0.01, momentum=0.9))
    state = jax.eval_shape(tx.init, draw(0, SHAPES))
    (_, where), whole = sharding.zero(state, mesh_of(8), "data")
    assert whole == ["[1].nu['odd']", "[1].trace['odd']"]
    assert where.count.is_fully_replicated
    expected = dict(kernel=(64, 16), bias=(16,), odd=(3, 5), long=(1, 1), scalar=())
    assert shards(where.nu) == shards(where.trace) == expected
    with refusal("axis must be one of ['data', 'model']", "'batch'", "Name the axis"):
        sharding.zero(state, AbstractMesh((2, 4), ("data", "model")), "batch")


def test_zero_keeps_the_rows_of_codes_whole():
    state = jax.eval_shape(rmsprop(0.01, momentum=0.9, **SMALL).init, draw(0, SHAPES))
    where, _ = sharding.zero(state, mesh_of(8), "data")
    assert where.nu.scale["kernel"].shard_shape((64, 1)) == (8, 1)
    # As the buffers of a parameter meet, they are divided alike.
    for buffer in (where.nu.codes, where.trace):
        assert shards(buffer) | dict(kernel=(8, 128), bias=(16,)) == shards(buffer)
    wide, _ = sharding.zero(dict(c=state.nu, w=jnp.ones((3, 8))), mesh_of(8), "data")
    assert wide["w"].shard_shape((3, 8)) == (3, 1)


def host_memory():
    # Until JAX 0.8, a CPU has one kind of memory.
    kinds = {x.kind for x in jax.devices()[0].addressable_memories()}
    return max(kinds, key=lambda kind: kind == "pinned_host")


def test_state_is_in_the_memory_of_params():
    where = NamedSharding(mesh_of(8), P("data"), memory_kind=host_memory())
    params = jax.device_put(draw(0, SHAPES)["kernel"], where)
    for x in jax.tree.leaves(rmsprop(0.1, **BOTH, **SMALL).init(params)):
        assert x.sharding.memory_kind == where.memory_kind


def test_zero_extends_what_is_sharded_already():
    mesh, host = mesh_of(2, 4), host_memory()

    def array(*spec, shape=(16, 3), dtype=jnp.float32, mesh=mesh, kind=None):
        where = NamedSharding(mesh, P(*spec), memory_kind=kind)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    after = P(("model", "data"), None)
    cases = dict(
        host=(array("model", kind=host), after),
        there=(array("data", kind=host), P("data", None)),
        columns=(array(None, "model", shape=(8, 16)), P("data", "model")),
        elsewhere=(array("model", mesh=mesh_of(4, 2)), P("data", None)),
        empty=(jax.ShapeDtypeStruct((0, 2), jnp.float32), P(None, None)),
        odd=(array("model", shape=(4, 3)), P("model", None)),
    )
    state, expected = ({k: pair[i] for k, pair in cases.items()} for i in (0, 1))
    where, whole = sharding.zero(state, mesh, "data")
    assert {k: x.spec for k, x in where.items()} == expected
    assert all(x.mesh == mesh for x in where.values())
    assert where["host"].memory_kind == where["there"].memory_kind == host
    assert whole == ["['odd']"]
    for rows, spec in ((64, after), (4, P("model", None))):
        codes = array("model", shape=(rows, 128), dtype=jnp.uint8)
        assert sharding.zero(codes, mesh, "data")[0].spec == spec


def test_a_divided_state_restores_on_fewer_devices(tmp_path):
    tx, mesh = rmsprop(0.01, momentum=0.9, **SMALL), mesh_of(8)
    params = replicated(0, mesh)
    shapes = jax.eval_shape(tx.init, params)
    divided = jax.jit(tx.init, out_shardings=sharding.zero(shapes, mesh, "data")[0])
    _, saved = tx.update(draw(1, SHAPES), divided(params), params)
    for devices in (4, 1):
        where, _ = sharding.zero(shapes, mesh_of(devices, first=8 - devices), "data")
        target = jax.tree.map(scale.shaped, shapes, where)
        back = through_orbax(saved, target, tmp_path / str(devices))
        assert_same(back, saved)
        assert_placed(back, where)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_state_on_another_mesh_is_refused(kind):
    tx = rmsprop(0.1)
    here, there = (replicated(0, mesh_of(n, kind=kind)) for n in (8, 4))
    words = "incompatible devices.*updates.*state|Mesh for all inputs should be equal"
    with pytest.raises(ValueError, match=words):
        tx.update(here, tx.init(there))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_only_codes_whose_rows_are_split_need_a_collective(kind):
    x, mesh = draw(0, SHAPES)["kernel"], mesh_of(4, 2, kind=kind)
    for options, spec, expected in (
        (dict(**BOTH, weight_decay=0.01), P("data", "model"), []),
        (dict(nu_dtype="uint8"), P("data"), []),
        (dict(nu_dtype="uint8"), P(None, "model"), ["all-reduce"]),
    ):
        params = jax.device_put(x, NamedSharding(mesh, spec))
        tx = rmsprop(0.1, **options)
        program = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
        assert scale.COLLECTIVE.findall(program.as_text()) == expected


def test_a_sharded_nnx_model_needs_no_line_for_the_optimizer(lenient):
    mesh = mesh_of(4, 2)
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    specs = {(64, 128): P("data", "model"), (128,): P("model")}
    for variable in (model.kernel, model.bias):
        where = NamedSharding(mesh, specs[variable.shape])
        variable[...] = jax.device_put(variable[...], where)
    optimizer = nnx.Optimizer(model, rmsprop(0.01, **BOTH, **SMALL), wrt=nnx.Param)
    # Flax begins its own count on one device, and so would compile twice.
    optimizer.step[...] = jax.device_put(optimizer.step[...], NamedSharding(mesh, P()))
    x = jax.device_put(np.ones((32, 64), np.float32), NamedSharding(mesh, P("data")))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))

    step(model, optimizer)
    before = len(COMPILED)
    step(model, optimizer)
    assert COMPILED[before:] == []
    found = jax.tree.leaves(nnx.state((model, optimizer)))
    # Parameters, codes, mu and trace.
    for shape, spec in specs.items():
        alike = [x.sharding.spec for x in found if x.shape == shape]
        assert alike == 4 * [spec]


def test_a_model_on_paper_takes_what_its_arrays_would():
    mesh, name = mesh_of(4, 2), "uint8 nu"
    params = scale.transformer(mesh, layers=1, width=64, hidden=128, words=256)
    assert len(jax.tree.leaves(params)) == 12
    held, collectives, _ = scale.row(name, params, mesh, False)
    divided, more, _ = scale.row(name, params, mesh, True)
    real = jax.tree.map(lambda p: jax.device_put(jnp.ones(p.shape), p.sharding), params)
    state = rmsprop(0.01, **scale.FORMATS[name]).init(real)
    assert held == bytes_on_a_device(state)
    assert divided == pytest.approx(held / 4, rel=0.01)
    # The maxima of rows that are split; how many XLA joins is its own affair.
    assert re.fullmatch(r"\d all-reduce", collectives)
    assert "all-gather" in more
