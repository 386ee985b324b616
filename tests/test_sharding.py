"""State lives where its parameters do, or spread over the data axis if asked to."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import scale
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_contract import TABLE, assert_close, normal

from rmsprop_jax import rmsprop, sharding, storage

CODES = dict(nu_dtype=jnp.uint8, momentum_dtype=jnp.bfloat16)
SHAPES = dict(kernel=(64, 128), bias=(128,), odd=(3, 5), long=(8, 1), scalar=())
BATCH = 32


def mesh_of(*sizes, kind=AxisType.Auto, first=0):
    names = ("data", "model")[: len(sizes)]
    devices = np.array(jax.devices()[first : first + np.prod(sizes)]).reshape(sizes)
    return Mesh(devices, names, axis_types=(kind,) * len(sizes))


def draw(seed):
    random = np.random.default_rng(seed)
    return {
        k: jnp.asarray(random.normal(size=shape), jnp.float32)
        for k, shape in SHAPES.items()
    }


def loss_of(params, x):
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"][None])
    rest = sum((params[k] ** 2).sum() for k in ("odd", "long", "scalar"))
    return jnp.mean(hidden**2) + rest


def batches(mesh):
    random = np.random.default_rng(1)
    split = NamedSharding(mesh, P("data"))
    while True:
        yield jax.device_put(random.normal(size=(BATCH, 64)).astype("float32"), split)


def steps(tx, params, state, data, count, out_shardings):
    @functools.partial(jax.jit, out_shardings=out_shardings)
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss_of)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(count):
        params, state = step(params, state, next(data))
    assert step._cache_size() == 1
    return params, state


def bytes_on_a_device(tree):
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
        if shard.device == device
    )


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("kept", [{}, CODES], ids=["float32", "codes"])
def test_zero_changes_where_and_not_what(kept):
    mesh = mesh_of(8)
    tx = rmsprop(0.01, centered=True, momentum=0.9, **kept)
    everywhere = NamedSharding(mesh, P())
    params = jax.device_put(draw(0), everywhere)
    where, whole = sharding.zero(jax.eval_shape(tx.init, params), mesh, "data")
    whole_params = jax.tree.map(lambda _: everywhere, params)

    replicated = tx.init(params)
    expected = steps(
        *(tx, params, replicated, batches(mesh), 10),
        (whole_params, jax.tree.map(lambda _: everywhere, replicated)),
    )
    spread = jax.jit(tx.init, out_shardings=where)(params)
    got = steps(tx, params, spread, batches(mesh), 10, (whole_params, where))

    same = lambda x, s: x.sharding.is_equivalent_to(s, x.ndim)  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, got, (whole_params, where)))
    # The order of the sum over the batch may differ; then a format's ulp can.
    assert_close(got[0], expected[0], rtol=1e-5 if not kept else 1e-2, atol=1e-3)
    if not kept:
        assert_close(got, expected, rtol=1e-5, atol=1e-6)

    leaves = jax.tree_util.tree_leaves_with_path(replicated)
    kept_whole = [x for path, x in leaves if jax.tree_util.keystr(path) in whole]
    single = [x for _, x in leaves if x.size == 1]
    rest = nbytes(replicated) - nbytes(kept_whole) - nbytes(single)
    found = nbytes(kept_whole) + nbytes(single) + rest / 8
    assert bytes_on_a_device(got[1]) == found
    assert bytes_on_a_device(expected[1]) == nbytes(replicated)
    assert found < 0.2 * nbytes(replicated)


def test_zero_says_what_stays_whole():
    tx = optax.chain(optax.clip(1.0), rmsprop(0.01, momentum=0.9))
    shapes = jax.eval_shape(tx.init, draw(0))
    where, whole = sharding.zero(shapes, mesh_of(8), "data")
    assert whole == ["[1].nu['odd']", "[1].trace['odd']"]
    assert where[1].count.is_fully_replicated
    for buffer in (where[1].nu, where[1].trace):
        assert shards(buffer) == dict(
            kernel=(64, 16),  # The largest of its axes.
            bias=(16,),
            odd=(3, 5),
            long=(1, 1),
            scalar=(),
        )


def shards(where):
    return {k: s.shard_shape(SHAPES[k]) for k, s in where.items()}


def test_zero_keeps_the_rows_of_codes_whole():
    shapes = jax.eval_shape(rmsprop(0.01, momentum=0.9, **CODES).init, draw(0))
    where, _ = sharding.zero(shapes, mesh_of(8), "data")
    assert where.nu.codes["kernel"].shard_shape((64, 128)) == (8, 128)
    assert where.nu.scale["kernel"].shard_shape((64, 1)) == (8, 1)
    assert where.nu.codes["bias"].shard_shape((128,)) == (16,)
    # As the buffers of a parameter meet, they are divided alike.
    assert where.trace["kernel"].shard_shape((64, 128)) == (8, 128)
    wide, _ = sharding.zero(dict(c=shapes.nu, w=jnp.ones((3, 8))), mesh_of(8), "data")
    assert wide["w"].shard_shape((3, 8)) == (3, 1)


def test_zero_adds_to_what_is_divided_by_model():
    mesh = mesh_of(2, 4)
    specs = dict(kernel=P(None, "model"), bias=P("model"), odd=P(), long=P("model"))
    specs |= dict(scalar=P())
    params = jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), draw(0), specs
    )
    tx = rmsprop(0.01)
    where, whole = sharding.zero(tx.init(params), mesh, "data")
    assert whole == [".nu['odd']"]
    expected = dict(kernel=(32, 32), bias=(16,), odd=(3, 5), long=(1, 1), scalar=())
    assert shards(where.nu) == expected
    # And what lives on that axis already stays as it is.
    again, _ = sharding.zero(jax.device_put(tx.init(params), where), mesh, "data")
    assert shards(again.nu) == expected


def test_zero_divides_codes_whose_rows_are_divided_already():
    mesh = mesh_of(2, 4)
    rows = NamedSharding(mesh, P("model"))
    shapes = jax.ShapeDtypeStruct((64, 128), jnp.uint8, sharding=rows)
    where, whole = sharding.zero(shapes, mesh, "data")
    assert (where.shard_shape((64, 128)), whole) == ((8, 128), [])


def test_zero_keeps_what_is_placed_already_and_adds_after_it():
    mesh, other = mesh_of(2, 4), mesh_of(8)
    # Until JAX 0.8, a CPU has one kind of memory.
    kinds = {x.kind for x in jax.devices()[0].addressable_memories()}
    kind = max(kinds, key=lambda kind: kind == "pinned_host")
    place = lambda m, spec, **kw: jax.ShapeDtypeStruct(  # noqa: E731
        (16, 3), jnp.float32, sharding=NamedSharding(m, spec, **kw)
    )
    shapes = dict(
        model=place(mesh, P("model")),
        elsewhere=place(other, P("data")),
        host=place(mesh, P("model"), memory_kind=kind),
        there=place(mesh, P("data"), memory_kind=kind),
        nothing=jax.ShapeDtypeStruct((0, 2), jnp.float32),
    )
    where, whole = sharding.zero(shapes, mesh, "data")
    assert where["model"].spec == P(("model", "data"), None)
    assert where["elsewhere"].spec == P("data", None)
    assert where["host"].memory_kind == where["there"].memory_kind == kind
    assert (where["nothing"].spec, whole) == (P(None, None), [])


def test_zero_names_the_axes_there_are():
    words = r"axis must be one of \['data', 'model'\], .* got 'batch'\. Name the axis"
    with pytest.raises(ValueError, match=words):
        sharding.zero(draw(0), AbstractMesh((2, 4), ("data", "model")), "batch")


@pytest.mark.parametrize("kept", [{}, CODES], ids=["float32", "codes"])
@pytest.mark.parametrize("devices", [4, 1])
def test_a_spread_state_restores_on_fewer_devices(kept, devices, tmp_path):
    tx, mesh = rmsprop(0.01, momentum=0.9, **kept), mesh_of(8)
    params = jax.device_put(draw(0), NamedSharding(mesh, P()))
    shapes = jax.eval_shape(tx.init, params)
    spread = jax.jit(tx.init, out_shardings=sharding.zero(shapes, mesh, "data")[0])
    _, saved = tx.update(draw(1), spread(params), params)

    fewer = mesh_of(devices, first=8 - devices)
    where, _ = sharding.zero(shapes, fewer, "data")
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
    with ocp.StandardCheckpointer() as disk:
        disk.save(tmp_path / "state", saved)
        disk.wait_until_finished()
        back = disk.restore(tmp_path / "state", target)
    jax.tree.map(np.testing.assert_array_equal, back, saved)
    same = lambda x, s: x.sharding.is_equivalent_to(s, x.ndim)  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, back, where))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_state_on_another_mesh_is_refused(kind):
    tx, everywhere = rmsprop(0.1), P()
    here, there = (
        jax.device_put(draw(0), NamedSharding(mesh_of(n, kind=kind), everywhere))
        for n in (8, 4)
    )
    words = "incompatible devices.*updates.*state|Mesh for all inputs should be equal"
    with pytest.raises(ValueError, match=words):
        tx.update(here, tx.init(there))
    # The way out: the shardings of what init returns here.
    where = jax.tree.map(lambda x: x.sharding, tx.init(here))
    _, state = tx.update(here, jax.device_put(tx.init(there), where))
    assert state.nu["kernel"].sharding.mesh.shape == {"data": 8}


@pytest.mark.parametrize("kept", [{}, CODES], ids=["float32", "codes"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_zero_places_a_state_from_its_shapes(kind, kept):
    mesh = mesh_of(8, kind=kind)
    with (getattr(jax, "set_mesh", None) or jax.sharding.use_mesh)(mesh):
        params = jax.device_put(draw(0), NamedSharding(mesh, P()))
        tx = rmsprop(0.1, momentum=0.9, **kept)
        where, _ = sharding.zero(jax.eval_shape(tx.init, params), mesh, "data")
        spread = jax.jit(tx.init, out_shardings=where)(params)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, spread, where))
        update = jax.jit(tx.update, out_shardings=(None, where))
        _, once = update(draw(1), spread, params)
        _, twice = update(draw(2), once, params)
        assert update._cache_size() == 1
    whole = tx.update(draw(2), tx.update(draw(1), tx.init(draw(0)))[1])[1]
    # An ulp of the arithmetic may turn one of the format.
    ulp = dict(float32=(5e-7, 0), bfloat16=(0.01, 0), uint8=(0, 1), int32=(0, 0))
    for x, expected in zip(jax.tree.leaves(twice), jax.tree.leaves(whole), strict=True):
        rtol, atol = ulp[x.dtype.name]
        x, expected = (np.asarray(each).astype("float64") for each in (x, expected))
        np.testing.assert_allclose(x, expected, rtol=rtol, atol=atol)


SPECS = {
    "fsdp": dict(matrix=P("data"), vector=P("data"), scalar=P()),
    "tensor": dict(matrix=P(None, "model"), vector=P("model"), scalar=P()),
    "both": dict(matrix=P("data", "model"), vector=P(("data", "model")), scalar=P()),
}


@pytest.mark.parametrize("name", ["centered_momentum", "weight_decay"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_update_moves_nothing_between_devices(name, specs, kind):
    mesh = mesh_of(4, 2, kind=kind)
    where = {k: NamedSharding(mesh, s) for k, s in specs.items()}
    # Its name until JAX 0.8.
    with (getattr(jax, "set_mesh", None) or jax.sharding.use_mesh)(mesh):
        params, grads = jax.device_put((normal(0), normal(1)), (where, where))
        tx = TABLE[name]()
        state = jax.jit(tx.init)(params)
        program = jax.jit(tx.update).lower(grads, state, params).compile()
        assert not scale.COLLECTIVE.findall(program.as_text())
        updates, new = jax.jit(tx.update)(grads, state, params)
    for tree in (updates, *(x for x in (*state[1:], *new[1:]) if x is not None)):
        for name, x in tree.items():
            assert x.sharding.is_equivalent_to(where[name], x.ndim)


@pytest.mark.parametrize("kept", [{}, CODES], ids=["float32", "codes"])
def test_a_sharded_nnx_model_needs_no_line_for_the_optimizer(kept, lenient):
    mesh = mesh_of(4, 2)
    where = dict(kernel=P("data", "model"), bias=P("model"))
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    for name, spec in where.items():
        variable = getattr(model, name)
        variable[...] = jax.device_put(variable[...], NamedSharding(mesh, spec))
    optimizer = nnx.Optimizer(model, rmsprop(0.01, momentum=0.9, **kept), wrt=nnx.Param)
    # Flax begins its own count on one device, and so would compile twice.
    count = optimizer.step[...]
    optimizer.step[...] = jax.device_put(count, NamedSharding(mesh, P()))
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def step(state, x):
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))
        return nnx.state((model, optimizer))

    begun = nnx.to_pure_dict(state)
    for x, _ in zip(batches(mesh), range(2), strict=False):
        state = step(state, x)
    found = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    assert step._cache_size() == 1
    for (path, x), old in zip(found, jax.tree.leaves(begun), strict=True):
        path = jax.tree_util.keystr(path)
        assert x.sharding.is_equivalent_to(old.sharding, x.ndim), path
        for name, spec in where.items():
            if name in path and "scale" not in path:
                assert x.sharding.spec == spec, path
    assert len(found) == 8 + 2 * bool(kept)


def test_codes_of_whole_rows_need_no_collective_and_split_ones_a_maximum():
    mesh, tx = mesh_of(4, 2), rmsprop(0.01, nu_dtype=jnp.uint8)
    for spec, expected in ((P("data"), []), (P(None, "model"), ["all-reduce"])):
        where = NamedSharding(mesh, spec)
        x = jax.device_put(draw(0)["kernel"], where)
        program = jax.jit(tx.update).lower(x, tx.init(x)).compile()
        assert scale.COLLECTIVE.findall(program.as_text()) == expected
        assert isinstance(tx.init(x).nu, storage.Quantized)


@pytest.mark.parametrize("name", ["float32", "uint8 nu, bfloat16 momentum"])
def test_a_model_on_paper_takes_what_its_arrays_would(name):
    mesh = mesh_of(4, 2)
    params = scale.transformer(mesh, layers=1, width=64, hidden=128, words=256)
    held, collectives, _ = scale.row(name, params, mesh, False)
    spread, more, _ = scale.row(name, params, mesh, True)
    # On real devices, with real arrays.
    real = jax.tree.map(lambda p: jax.device_put(jnp.ones(p.shape), p.sharding), params)
    tx = rmsprop(0.01, **scale.FORMATS[name])
    state = jax.jit(tx.init)(real)
    assert held == bytes_on_a_device(state)
    single = nbytes([x for x in jax.tree.leaves(state) if x.size == 1])
    assert spread - single == pytest.approx((held - single) / 4)
    # The maxima of rows that are split; how many XLA joins is its own affair.
    assert re.fullmatch(r"\d all-reduce" if "uint8" in name else "none", collectives)
    assert "all-gather" in more
