"""Small formats lose no more than they say, and go wherever float32 goes."""

import functools

import formats
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_checkpoints import through_flax, through_orbax, through_pickle
from test_contract_mesh import COMPILED, direct

from rmsprop_jax import interop, presets, rmsprop, scale_by_rms, storage

BF16, U8 = jnp.bfloat16, jnp.uint8
OPTIONS = {
    "plain": {},
    "centered_nesterov": dict(centered=True, momentum=0.9, nesterov=True),
    "torch": dict(eps_in_sqrt=False, momentum=0.9, lr_in_momentum=False, l2=0.01),
}
SMALL = [
    dict(nu_dtype=nu, momentum_dtype=momentum)
    for nu, momentum in ((BF16, None), (BF16, BF16), (U8, BF16))
]
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
small = pytest.mark.parametrize(
    "small",
    SMALL,
    ids=lambda kept: "-".join(x.__name__ for x in kept.values() if x),
)
# Each buffer is stored by itself, so these two have every format there is.
two = pytest.mark.parametrize("small", SMALL[::2], ids=("bfloat16", "uint8-bfloat16"))
SHAPES = dict(matrix=(64, 128), cube=(8, 8, 80), vector=(8,), scalar=(), none=(0, 3))


def normal(seed, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(random.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


def steps(tx, params, state, seeds, update=None):
    for seed in seeds:
        updates, state = (update or tx.update)(normal(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), tree)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@functools.partial(jax.jit, static_argnames="dtype")
def through(x, dtype, t=1):
    """Return what is read of an array that was stored in step t."""
    x = jnp.asarray(x, jnp.float32)
    return storage.decode(storage.encode(x, storage.store(x, dtype), jnp.asarray(t)))


def test_bfloat16_is_right_on_average_over_the_steps():
    x = np.random.default_rng(0).normal(size=50).astype("float32")
    x = np.r_[x, 1e-30 * x, 1e30 * x]
    read = np.asarray(jax.vmap(lambda t: through(x, BF16, t))(jnp.arange(2**16)))
    gap = np.abs(x) * 2.0**-7
    assert (np.abs(read - x) <= gap).all()
    # Each of 65,536 offsets comes about once: the mean is right to a few of them.
    assert (np.abs(read.mean(0, dtype="float64") - x) <= 4 * 2**-16 * gap).all()


def test_bfloat16_keeps_what_has_no_neighbour():
    largest = jnp.finfo(BF16).max.astype(jnp.float32)
    x = jnp.array([0.0, -0.0, 1.0, -2.0, jnp.inf, -jnp.inf, jnp.nan, largest])
    read = np.asarray(jax.vmap(lambda t: through(x, BF16, t))(jnp.arange(1000)))
    np.testing.assert_array_equal(read, np.broadcast_to(x, read.shape))
    signs = np.broadcast_to(np.signbit(x), read.shape)
    np.testing.assert_array_equal(np.signbit(read), signs)
    top = jax.vmap(lambda t: through(jnp.finfo(jnp.float32).max, BF16, t))
    assert jnp.isfinite(top(jnp.arange(1000))).all()


def test_bfloat16_never_freezes():
    # 2,000 zero gradients; rounded to nearest, nothing would change after some.
    tx = scale_by_rms(0.999, nu_dtype=BF16)
    nu = jnp.asarray(np.random.default_rng(0).lognormal(size=1000), BF16)
    state = tx.init(nu)._replace(nu=nu)

    def step(state, _):
        return tx.update(jnp.zeros(1000), state)[1], None

    last = jax.lax.scan(step, state, length=2000)[0].nu.astype(jnp.float32)
    ratio = last / nu.astype(jnp.float32) / 0.999**2000
    assert 0.95 < ratio.min() and ratio.max() < 1.05


def test_codes_are_neighbours_and_right_on_average():
    random = np.random.default_rng(0)
    x = random.lognormal(sigma=4, size=(8, 1024)).astype("float32")
    old = storage.store(jnp.asarray(x), U8)
    assert (old.codes.dtype, old.scale.shape) == (jnp.uint8, (8, 1))
    np.testing.assert_array_equal(old.scale[:, 0], x.max(1))

    read = jax.jit(jax.vmap(lambda t: storage.decode(storage.encode(x, old, t))))
    read = np.asarray(read(jnp.arange(1, 2001)), "float64")
    root = lambda x: (x / x.max(-1, keepdims=True)) ** (1 / 16) * 254  # noqa: E731
    assert np.abs(root(read) - root(x.astype("float64"))).max() < 1.0001
    # Of 2,000 offsets each is a few too early or late.
    gap = 16 / root(x) * x
    assert (np.abs(read.mean(0) - x) <= 0.004 * gap).all()
    assert len(np.unique(old.codes)) > 150


def test_codes_that_are_stored_again_stay():
    row = (np.arange(2, 255) / 254) ** 16
    codes = storage.store(jnp.asarray([np.resize(row, 256)] * 16, jnp.float32), U8)
    assert len(np.unique(codes.codes)) == 253
    assert_same(storage.store(storage.decode(codes), U8), codes)
    zeros = jax.tree.map(jnp.zeros_like, codes)
    assert (storage.decode(zeros) == 0).all(), "a state may be set to zeros"


@pytest.mark.parametrize("start", [0.0, 1.0, 0.3, 3e38])
@pytest.mark.parametrize("dtype", [BF16, U8])
def test_a_state_starts_where_it_should(start, dtype):
    nu = rmsprop(0.1, initial_scale=start, nu_dtype=dtype).init(jnp.ones((64, 64))).nu
    expected = min(start, 2.0**126) if dtype == U8 else start
    np.testing.assert_allclose(storage.decode(nu), expected, rtol=0.003)


@pytest.mark.parametrize("dtype", [None, BF16, U8, jnp.float32])
def test_float64_parameters_do_not_overflow_a_small_state(dtype, x64):
    tx = rmsprop(0.1, nu_dtype=dtype)
    params = dict(w=jnp.ones((64, 64), "float64"), b=jnp.ones(3, "float64"))
    state = tx.init(params)
    big = jax.tree.map(lambda p: p * 1e25, params)
    _, state = tx.update(big, state)
    run = lambda state, _: (tx.update(params, state)[1], None)  # noqa: E731
    state, _ = jax.lax.scan(run, state, length=3000)
    updates, _ = tx.update(params, state)
    for x in jax.tree.leaves(updates):
        np.testing.assert_allclose(x, -0.1, rtol=0.05)


def test_a_row_of_codes_keeps_what_is_special():
    x = np.ones((5, 1024), "float32")
    x[0] = 0
    x[1, 3] = np.nan
    x[2, 4] = np.inf
    x[3] = 3e38
    x[4] = 1e-37
    read = np.asarray(through(x, U8))
    assert (read[0] == 0).all()
    assert np.isnan(read[1, 3]) and (np.delete(read[1], 3) == 1).all()
    # An infinite average would never decay; the largest that is kept does.
    assert read[2, 4] == 2.0**126 and np.isfinite(read[2]).all()
    assert (read[3] == 2.0**126).all()
    np.testing.assert_array_equal(read[4], x[4])
    last = np.asarray(through(np.full((5, 1024), np.nan), U8))
    assert np.isnan(last).all()


@pytest.mark.parametrize(
    "shape", [(), (0,), (5000,), (63, 65), (0, 5000), (5000, 1), (5000, 7)]
)
def test_an_array_that_would_not_gain_stays_exact(shape):
    x = jnp.asarray(np.random.default_rng(0).lognormal(size=shape), jnp.float32)
    stored = storage.store(x, U8)
    assert (stored.codes.dtype, stored.scale.size) == (jnp.float32, 1)
    assert storage.store(jnp.ones((512, 8)), U8).codes.dtype == jnp.uint8
    assert stored.scale.ndim == x.ndim
    np.testing.assert_array_equal(through(x, U8), x)


def test_bytes_are_as_few_as_promised():
    found = {k: formats.bytes_of(build) for k, build in formats.FORMATS.items()}
    assert found["float32"] == 4 and found["bfloat16"] == 2 and found["uint8"] <= 1.004


# In percent, in rows with a spread of e, with gradients that are steady or all fall.
PROMISED = {"bfloat16": dict.fromkeys(formats.STEPS, 1.6)}
PROMISED["uint8"] = {0.9: 7, 0.99: 10, 0.999: 13}


@pytest.mark.parametrize("decay", formats.STEPS)
def test_errors_are_as_small_as_promised(decay):
    for kind in formats.KINDS:
        errors = formats.errors(
            formats.FORMATS.values(), decay, formats.SCALES[0], kind
        )
        found = dict(zip(formats.FORMATS, 100 * errors, strict=True))
        # The constant that is rounded to float32 acts 1 / (1 - decay) times.
        assert found["float32"] < 1e-4 + 100 * 2**-25 / (1 - decay)
        assert found["bfloat16"] < PROMISED["bfloat16"][decay]
        if kind != "half of them falling":
            assert found["uint8"] < PROMISED["uint8"][decay]
        elif decay > 0.9:
            # To nearest they freeze, which these gradients show.
            for name in PROMISED:
                assert 2 * found[name] < found[f"{name}, to nearest"]


def test_numbers_of_a_row_of_codes_move_apart():
    # Rounded to nearest, they would keep the ratio they had when the first was 1.
    tx = scale_by_rms(0.99, eps=0.0, nu_dtype=U8)
    sizes = jnp.full((64, 64), 1.0).at[:, 1:].set(1e-3)

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates[0, -1]

    state = tx.init(sizes)
    state, _ = jax.lax.scan(step, state, jnp.ones((2000, 64, 64)))
    _, updates = jax.lax.scan(step, state, jnp.broadcast_to(sizes, (4000, 64, 64)))
    assert abs(updates[-1000:].mean() - 1) < 0.1


@pytest.mark.parametrize("decay", [0.9, 0.999])
@pytest.mark.parametrize("dtype", [None, BF16, U8])
def test_an_update_is_bounded_whatever_storing_loses(decay, dtype):
    tx = scale_by_rms(decay, eps=0.0, nu_dtype=dtype)
    random = np.random.default_rng(0)
    state = tx.init(jnp.zeros((64, 64)))
    assert nbytes(state.nu) == {None: 4, BF16: 2, U8: 1 + 4 / 64}[dtype] * 64**2
    update = jax.jit(tx.update)
    for t in range(100):
        sizes = 10.0 ** random.integers(-18, 18, size=(64, 64)) * (t % 3 > 0)
        grads = jnp.asarray(sizes * random.normal(size=(64, 64)), jnp.float32)
        updates, state = update(grads, state)
        assert jnp.abs(updates).max() <= (1 - decay) ** -0.5 * 1.001


@options
@small
def test_a_run_is_near_that_in_float32(options, small):
    tx, wide = rmsprop(0.01, **options, **small), rmsprop(0.01, **options)
    params = normal(0)
    got, state = steps(tx, params, tx.init(params), range(1, 31))
    expected, exact = steps(wide, params, wide.init(params), range(1, 31))
    rms = lambda x: np.sqrt(np.mean(np.square(x)))  # noqa: E731
    for name in ("matrix", "cube", "vector"):
        moved = rms(expected[name] - params[name])
        assert rms(got[name] - expected[name]) <= 0.05 * moved
    # And not because nothing was stored in fewer bytes.
    assert nbytes(state) < nbytes(exact)
    assert types(state) == types(tx.init(params))


@pytest.mark.parametrize(
    ("options", "small"),
    # Every option and format, as the rule knows of none; the full product is above.
    [
        ("plain", SMALL[0]),
        ("torch", SMALL[0]),
        ("centered_nesterov", SMALL[1]),
        ("centered_nesterov", SMALL[2]),
        ("torch", SMALL[2]),
    ],
)
def test_direct_jitted_and_scanned_updates_are_one(options, small):
    options = OPTIONS[options]
    tx, params = rmsprop(0.01, **options, **small), normal(0)
    direct = steps(tx, params, tx.init(params), (1, 2, 3))[0]
    jitted = steps(tx, params, jax.jit(tx.init)(params), (1, 2, 3), jax.jit(tx.update))

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    grads = jax.tree.map(lambda *x: jnp.stack(x), *map(normal, (1, 2, 3)))
    scanned = jax.lax.scan(step, (params, tx.init(params)), grads)[0]
    # An ulp in float32 can become one of the format, which a small step shows.
    for other in (jitted[0], scanned[0]):
        for name in params:
            np.testing.assert_allclose(direct[name], other[name], atol=2e-3)
    assert types(scanned[1]) == types(jitted[1]) == types(tx.init(params))


def placed(seed, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = dict.fromkeys(SHAPES, PartitionSpec())
    specs |= dict(matrix=PartitionSpec("x", "y"), cube=PartitionSpec("y", None, "x"))
    specs["vector"] = PartitionSpec("y")
    where = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    return jax.device_put(normal(seed), where)


@pytest.mark.parametrize(
    ("kind", "wrap", "converted"),
    [
        (AxisType.Auto, direct, True),
        (AxisType.Auto, jax.jit, False),
        (AxisType.Explicit, direct, False),
        (AxisType.Explicit, jax.jit, True),
    ],
)
@two
def test_state_lives_where_params_do_and_compiles_once(small, kind, wrap, converted):
    tx = rmsprop(0.01, centered=True, momentum=0.9, **small)
    params, grads = placed(0, kind), [placed(seed, kind) for seed in (1, 2, 3)]
    state, update = wrap(tx.init)(params), wrap(tx.update)
    if converted:
        wide = rmsprop(0.01, centered=True, momentum=0.9)
        state = wrap(functools.partial(storage.convert, **small))(wide.init(params))
    update(grads[0], state, params)
    before = len(COMPILED)
    for g in grads:
        _, state = update(g, state, params)
        assert len(state.count.devices()) == 8
        for buffer in state[1:]:
            values, scale = buffer, {}
            if isinstance(buffer, storage.Quantized):
                values, scale = buffer
            for name, p in params.items():
                where = p.sharding
                assert values[name].sharding.is_equivalent_to(where, p.ndim)
                # One number a row, beside its row; the last axis is whole.
                where = NamedSharding(where.mesh, PartitionSpec(*where.spec[:-1]))
                if name in scale:
                    assert scale[name].sharding.is_equivalent_to(where, p.ndim), name
    assert COMPILED[before:] == []


@pytest.mark.parametrize("way", [through_orbax, through_flax, through_pickle])
@small
def test_checkpoints_keep_every_bit(small, way, tmp_path):
    shapes = {k: x for k, x in SHAPES.items() if k != "none"}  # Orbax keeps none such.
    tx = rmsprop(0.01, centered=True, momentum=0.9, **small)
    params = normal(0, shapes)
    state = tx.init(params)
    for seed in (1, 2):
        state = tx.update(normal(seed, shapes), state)[1]
    back = way(state, tx.init(params), tmp_path)
    assert_same(back, state)
    expected = tx.update(normal(3, shapes), state)
    assert_same(tx.update(normal(3, shapes), back), expected)


@small
def test_a_state_moves_to_other_devices(small, tmp_path):
    shapes = {k: x for k, x in SHAPES.items() if k != "none"}
    tx = rmsprop(0.01, centered=True, momentum=0.9, **small)
    many = {k: placed(0, AxisType.Auto)[k] for k in shapes}
    saved = tx.update(normal(1, shapes), tx.init(normal(0, shapes)))[1]
    back = through_orbax(saved, tx.init(many), tmp_path)
    assert_same(back, saved)
    assert types(back) == types(tx.init(many))


@two
def test_transformations_of_optax_take_it(small, lenient):
    build = functools.partial(rmsprop, momentum=0.9, **small)
    params = normal(0)
    plain = build(0.01)
    expected, _ = steps(plain, params, plain.init(params), (1, 2, 3))
    injected = optax.inject_hyperparams(build, static_args=tuple(small))(0.01)
    for tx in (
        optax.chain(optax.clip(1e9), build(0.01)),
        optax.apply_if_finite(build(0.01), 3),
        optax.MultiSteps(build(0.01), 1),
        optax.masked(build(0.01), dict.fromkeys(params, True)),
        injected,
    ):
        got, _ = steps(tx, params, tx.init(params), (1, 2, 3))
        for name in params:
            np.testing.assert_allclose(got[name], expected[name], atol=2e-3)


@two
def test_masks_and_missing_gradients_leave_their_place(small):
    params = normal(0)
    mask = dict.fromkeys(params, False) | {"matrix": True}
    tx = optax.masked(rmsprop(0.01, **small), mask)
    state = tx.init(params)
    updates, _ = tx.update(normal(1), state, params)
    np.testing.assert_array_equal(updates["cube"], normal(1)["cube"])
    tx = rmsprop(0.01, momentum=0.9, **small)
    state = tx.init(params)
    _, new = tx.update(normal(1) | {"matrix": None}, state, params)
    for path, x in leaves(new):
        if "matrix" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(x, dict(leaves(state))[path])
    assert int(new.count) == 1


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


@small
def test_optax_maps_over_the_parameters_of_a_state(small):
    tx, params = rmsprop(0.01, centered=True, momentum=0.9, **small), normal(0)
    state = tx.init(params)
    names = {k: k for k in params}
    found = optax.tree.map_params(tx, lambda x, name: name, state, names)
    for buffer in found[1:]:
        for tree in buffer if isinstance(buffer, storage.Quantized) else [buffer]:
            assert tree == names


def test_vmapped_members_have_scales_of_their_own():
    tx = rmsprop(0.01, nu_dtype=U8)
    members = jax.tree.map(lambda *x: jnp.stack(x), *map(normal, range(3)))
    state = jax.vmap(tx.init)(members)
    updates, state = jax.jit(jax.vmap(tx.update))(members, state)
    assert state.nu.codes["matrix"].dtype == jnp.uint8
    for k in range(3):
        one = jax.tree.map(lambda x, k=k: x[k], members)
        expected, _ = tx.update(one, tx.init(one))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5),
            jax.tree.map(lambda x, k=k: x[k], updates),
            expected,
        )


@two
def test_a_state_is_converted_and_goes_on(small):
    wide = rmsprop(0.01, centered=True, momentum=0.9)
    params = normal(0)
    _, state = steps(wide, params, wide.init(params), range(1, 11))
    # As is best for large states.
    converted = jax.jit(functools.partial(storage.convert, **small))(state)
    kept = rmsprop(0.01, centered=True, momentum=0.9, **small)
    assert types(converted) == types(kept.init(params))
    assert converted.count == 10
    # The format is that of the state, not that of the optimizer.
    for tx in (wide, kept):
        updates, new = tx.update(normal(11), converted, params)
        assert types(new) == types(converted)
        exact, _ = wide.update(normal(11), state, params)
        np.testing.assert_allclose(updates["matrix"], exact["matrix"], atol=1e-3)
    back = jax.jit(storage.convert)(converted)
    assert types(back) == types(state)
    np.testing.assert_allclose(back.nu["cube"], state.nu["cube"], rtol=0.2)
    np.testing.assert_allclose(back.trace["cube"], state.trace["cube"], rtol=0.005)


def test_a_state_that_was_cast_or_taken_apart_is_refused():
    tx, params = rmsprop(0.01, nu_dtype=U8), normal(0)
    state = tx.init(params)
    codes, scale = state.nu
    wrong = {
        "codes alone": codes,
        "cast": optax.tree.cast(state.nu, jnp.float32),
        "whole": storage.Quantized(optax.tree.cast(codes, "int32"), scale),
        "scale": state.nu._replace(scale=jax.tree.map(lambda x: x.T, scale)),
        "half": optax.tree.cast(storage.convert(state).nu, "float16"),
    }
    for nu in wrong.values():
        words = r"state\.nu\['\w+'\] must be float32, .*, got .*Restore .*convert only"
        with pytest.raises(ValueError, match=words):
            tx.update(normal(1), state._replace(nu=nu), params)


def test_conversion_refuses_what_cannot_be_kept():
    state = rmsprop(0.01, momentum=0.9).init(normal(0))
    with pytest.raises(
        ValueError, match=r"RMSPropState, got tuple.* of a chain, it is"
    ):
        storage.convert((state,))
    with pytest.raises(ValueError, match=r"nu_dtype must be .* got float16"):
        storage.convert(state, nu_dtype="float16")
    with pytest.raises(ValueError, match=r"momentum_dtype must be .* got uint8"):
        storage.convert(state, momentum_dtype="uint8")


@pytest.mark.parametrize("dtype", [BF16, U8])
def test_complex_parameters_have_a_real_nu_or_none_that_is_small(dtype):
    params = dict(w=jnp.ones((64, 64), jnp.complex64))
    options = dict(momentum=0.9, nu_dtype=dtype, momentum_dtype=BF16)
    tx = rmsprop(0.01, **options)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == state.trace["w"].dtype == jnp.complex64
    words = f"nu_dtype={jnp.dtype(dtype)} keeps real numbers, .* Use None, or rmsprop"
    with pytest.raises(ValueError, match=words):
        presets.torch(0.01, **options).init(params)
    state = presets.torch(0.01).init(params)
    with pytest.raises(ValueError, match=words):
        storage.convert(state, nu_dtype=dtype)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_torch_preset_keeps_small_state(maximize):
    tx = presets.torch(0.01, maximize=maximize, nu_dtype=U8)
    params = normal(0)
    updates, state = tx.update(normal(1), tx.init(params), params)
    assert state.nu.codes["matrix"].dtype == jnp.uint8
    wide = presets.torch(0.01, maximize=maximize)
    expected, _ = wide.update(normal(1), wide.init(params), params)
    assert_same(updates, expected)


@two
def test_interop_writes_the_values(small):
    tx = presets.torch(0.01, momentum=0.9, centered=True, **small)
    shapes = {k: x for k, x in SHAPES.items() if k != "none"}
    params = normal(0, shapes)
    _, state = tx.update(normal(1, shapes), tx.init(params), params)
    values = storage.convert(state)
    call = dict(lr=0.01, momentum=0.9, centered=True)
    arrange = lambda tree: list(tree.values())  # noqa: E731
    saved = interop.to_torch(state, arrange, **call)
    for other in jax.tree.leaves(saved["state"]):
        assert isinstance(other, float) or other.dtype == "float32"
    assert_same(saved, interop.to_torch(values, arrange, **call))
    like = optax.rmsprop(0.01, momentum=0.9, centered=True).init(params)
    assert_same(interop.to_optax(state, like), interop.to_optax(values, like))


@pytest.fixture
def hasty():
    """Compile with less care, in half the time: where only what is learnt matters."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_small_formats_learn_as_float32_does(lenient, hasty):
    names = ("float32, momentum", "uint8 nu, bfloat16 momentum")
    wide, small = (
        formats.train(formats.TRAINED[name], epochs=4, seeds=2)[:, -1].mean()
        for name in names
    )
    assert wide > 0.9 and abs(small - wide) < 0.02
