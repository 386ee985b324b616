"""Small storage formats lose no more than promised, and work wherever float32 does."""

from functools import partial

import formats
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    COMPILED,
    SMALL,
    SPECS,
    assert_close,
    assert_placed,
    assert_same,
    assert_within_an_ulp,
    draw,
    mesh_of,
    nbytes,
    programs,
    read_back,
    refusal,
    scan,
    together,
    types,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scale import shaped

from rmsprop_jax import RMSPropState, rmsprop, scale_by_rms, storage

BF16, U8 = jnp.bfloat16, jnp.uint8
BOTH = dict(centered=True, momentum=0.9, nesterov=True)
MATRIX = dict(matrix=(64, 128), vector=(8,))
SHAPES = MATRIX | dict(cube=(8, 8, 80), scalar=())
nearest = jax.jit(storage.encode_nearest, static_argnames="dtype")


def gradients(steps, shapes):
    return draw(1, {name: (steps, *shape) for name, shape in shapes.items()})


def at(step, tree):
    return jax.tree.map(lambda x: x[step], tree)


def test_bfloat16_is_right_on_average_over_the_steps():
    x = np.random.default_rng(0).normal(size=50).astype("float32")
    x = np.r_[x, 1e-30 * x, 1e30 * x]
    read = np.asarray(read_back(x, nearest(x, BF16), 2**16))
    gap = np.abs(x) * 2.0**-7
    assert (np.abs(read - x) <= gap).all()
    # Each of 65,536 offsets comes about once: the mean is right to a few of them.
    assert (np.abs(read.mean(0, dtype="float64") - x) <= 4 * 2**-16 * gap).all()


def test_bfloat16_keeps_special_values():
    largest, top = (float(jnp.finfo(dtype).max) for dtype in (BF16, jnp.float32))
    kept = [0.0, -0.0, 1.0, -2.0, np.inf, -np.inf, np.nan, largest]
    x, expected = (np.float32([*kept, y, -y]) for y in (top, largest))
    stored = nearest(x, BF16)
    read = np.r_[storage.decode(stored)[None], read_back(x, stored, 1000)]
    # Their bits, which tell the sign of 0 and compare NaN.
    assert (read.view("int32") == expected.view("int32")).all()


def test_arrays_that_would_gain_little_stay_exact():
    few = [(), (0,), (5000,), (63, 65), (0, 5000), (5000, 1), (600, 7)]
    assert not any(map(storage.worth_quantizing, few))
    assert all(map(storage.worth_quantizing, [(64, 64), (512, 8), (2, 2, 1024)]))
    for shape in few[::2]:
        x = draw(0, dict(x=shape))["x"] ** 2
        old = nearest(2 * x, U8)
        stored = storage.encode_dithered(x, old, jnp.int32(1))
        expected = types(storage.Quantized(x, jnp.ones((1,) * x.ndim, BF16)))
        assert types(stored) == types(old) == expected
        assert_same((storage.decode(old), storage.decode(stored)), (2 * x, x))


@pytest.mark.parametrize("dtype", [BF16, U8, jnp.float32])
def test_a_state_starts_at_the_initial_scale(dtype):
    params = [jnp.full(shape, jnp.nan) for shape in ((64, 64), (63, 64), (0, 3))]
    limits = (2.0**126 if dtype == U8 else np.inf, np.inf, np.inf)

    def start(value):
        return rmsprop(0.1, initial_scale=value, nu_dtype=dtype).init(params)

    for value in (0.0, 1.0, 0.3, 3.4e38):
        for state in start(value), start(jnp.float32(value)), jax.jit(start)(value):
            assert types(state) == types(start(0.0))
            assert not any(x.committed for x in jax.tree.leaves(state))
            for nu, limit in zip(storage.convert(state).nu, limits, strict=True):
                # A code has three bits of mantissa.
                error = 2.0**-4 if nu.size == 64**2 and dtype == U8 else 0.004
                np.testing.assert_allclose(nu, min(value, limit), rtol=error)


# Of bfloat16 and uint8, in percent, where sizes in a row differ by a factor of e.
PROMISED = {0.9: (1.6, 5), 0.99: (1.6, 11), 0.999: (1.6, 11.5)}


@pytest.mark.parametrize("decay", formats.STEPS)
def test_errors_are_as_small_as_promised(decay, monkeypatch):
    monkeypatch.setattr(formats, "SHAPE", (2, 2048))
    for kind in ("steady", "falling"):
        found = formats.errors(["bfloat16", "uint8"], decay, formats.SCALES[0], kind)
        assert (100 * found < PROMISED[decay]).all(), kind


def test_float64_gradients_do_not_overflow_a_small_state(x64):
    grads = jnp.ones((200, 64, 64), "float64").at[0].set(1e20)
    dtypes = (None, BF16, U8, jnp.float32)
    txs = together(rmsprop(0.1, decay=0.5, nu_dtype=x) for x in dtypes)
    for updates in scan(txs, grads)[0]:
        assert updates.dtype == "float64"
        np.testing.assert_allclose(updates[-1], -0.1, rtol=0.05)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_updates_are_bounded_whatever_storage_loses(decay):
    random = np.random.default_rng(0)
    sizes = 10.0 ** random.integers(-18, 18, size=(100, 64, 64))
    sizes[::3] = 0
    grads = jnp.asarray(sizes * random.normal(size=sizes.shape), jnp.float32)
    nbytes_of = {None: 4, BF16: 2, U8: 1 + 2 / 64}
    txs = together(scale_by_rms(decay, eps=0.0, nu_dtype=x) for x in nbytes_of)
    found = zip(nbytes_of.values(), *scan(txs, grads), strict=True)
    for size, updates, states in found:
        assert nbytes(states.nu) == 100 * size * 64**2
        assert jnp.abs(updates).max() <= (1 - decay) ** -0.5 * 1.001


@pytest.mark.parametrize("small", [SMALL, dict(nu_dtype=BF16, momentum_dtype=BF16)])
def test_direct_and_scanned_updates_agree_and_are_near_float32(small):
    txs = tx, _ = [rmsprop(0.01, **BOTH, **each) for each in (small, {})]
    grads = gradients(30, SHAPES)
    (updates, exact), (states, _) = scan(together(txs), grads)
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    for name in ("matrix", "cube", "vector"):
        moved = exact[name].sum(0)
        assert rms(updates[name].sum(0) - moved) <= 0.05 * rms(moved)

    direct = tx.init(draw(0, SHAPES))
    for step in range(3):
        found, direct = tx.update(at(step, grads), direct)
        # An ulp in float32 may become one of the format, which a step shows.
        assert_close(found, at(step, updates), atol=2e-3)
        assert types(direct) == types(at(step, states))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_state_lives_where_params_do_and_compiles_once(kind):
    mesh = mesh_of(4, 2, kind=kind)
    specs = SPECS | dict(cube=P("model", None, "data"))
    where = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params, grads = (jax.device_put(draw(seed, SHAPES), where) for seed in (0, 1))
    shapes = jax.tree.map(shaped, params, where)
    init, update = rmsprop(0.01, **BOTH, **SMALL)
    with jax.transfer_guard("disallow"):
        starts = [init(params), init(shapes), jax.jit(init)(params)]
    starts += [storage.convert(rmsprop(0.01, **BOTH).init(params), **SMALL)]
    starts += [update(grads, starts[0], params)[1]]
    # One scale per row, with its row; the last axis is whole.
    rows = {name: NamedSharding(mesh, P(*spec[:-1])) for name, spec in specs.items()}
    count, nu = NamedSharding(mesh, P()), storage.Quantized(where, rows)
    before = len(COMPILED)
    for state in starts:
        for each in (state, update(grads, state, params)[1]):
            assert_placed(each, RMSPropState(count, nu, where, where))
    assert COMPILED[before:] == []


def test_update_runs_in_shard_map_and_vmap():
    tx, where = rmsprop(0.01, **BOTH, **SMALL), NamedSharding(mesh_of(8), P("data"))
    params = jax.device_put(draw(0, SHAPES)["cube"], where)
    update = lambda p: tx.update(p, tx.init(p), p)
    expected = jax.jit(update)(params)
    given = params, tx.init(params), params
    specs = jax.tree.map(lambda x: x.sharding.spec, given)
    options = dict(mesh=where.mesh, in_specs=specs, out_specs=specs[:2])
    mapped = jax.jit(jax.shard_map(tx.update, **options))
    assert_within_an_ulp(mapped(*given), expected)
    members = jax.jit(jax.vmap(update))(jnp.stack([100 * params, params]))
    assert_within_an_ulp(at(1, members), expected)


def test_optax_wrappers_take_small_state(lenient):
    build = partial(rmsprop, momentum=0.9, **SMALL)
    txs = [
        build(0.01),
        optax.apply_if_finite(build(0.01), 3),
        optax.MultiSteps(build(0.01), 1),
        optax.masked(build(0.01), dict(matrix=True, vector=False)),
        optax.inject_hyperparams(build, static_args=tuple(SMALL))(0.01),
    ]
    expected, *updates = scan(together(txs), gradients(3, MATRIX))[0]
    for found in updates:
        assert_close(found["matrix"], expected["matrix"], atol=2e-3)


def test_codes_are_trees_like_params():
    tx, names = rmsprop(0.01, **BOTH, **SMALL), {name: name for name in MATRIX}
    state = tx.init(draw(0, MATRIX))
    found = optax.tree.map_params(tx, lambda _, name: name, state, names)
    assert all(tree == names for tree in (*found.nu, found.mu, found.trace))


def test_a_state_is_converted_by_one_program():
    state = rmsprop(0.1, **BOTH).init(draw(0, SHAPES | dict(more=(65, 67))))
    assert programs(storage.convert, state, **SMALL) == 1
    assert programs(storage.convert, state, **SMALL) == 0


def test_a_converted_state_resumes():
    wide, small = rmsprop(0.01, **BOTH), rmsprop(0.01, **BOTH, **SMALL)
    state = at(-1, scan(wide, gradients(3, MATRIX))[1])
    # Under jit too, as is best for large states.
    converted = jax.jit(partial(storage.convert, **SMALL))(state)
    assert types(converted) == types(small.init(draw(0, MATRIX)))
    exact, _ = wide.update(draw(4, MATRIX), state)
    # An update keeps the formats of its state, whatever its optimizer was given.
    for tx in (wide, small):
        updates, new = tx.update(draw(4, MATRIX), converted)
        assert types(new) == types(converted)
        assert_close(updates, exact, atol=1e-3)
    back = storage.convert(converted)
    assert types(back) == types(state)
    assert_close(back.nu, state.nu, rtol=0.2)
    assert_close((back.mu, back.trace), (state.mu, state.trace), rtol=0.005)


def test_states_that_were_cast_or_taken_apart_are_refused():
    tx = rmsprop(0.01, nu_dtype=U8)
    state = tx.init(draw(0, SHAPES))
    codes, scale = state.nu
    wrong = [
        codes,
        optax.tree.cast(state.nu, jnp.float32),
        storage.Quantized(codes | dict(vector=codes["vector"].astype(BF16)), scale),
        storage.Quantized(codes, optax.tree.cast(scale, jnp.float32)),
        storage.Quantized(codes, jax.tree.map(lambda x: x.T, scale)),
        optax.tree.cast(storage.convert(state).nu, "float16"),
    ]
    words = "state.nu['", "must be float32", "got", "Restore", "storage.convert only"
    for nu in wrong:
        with refusal(*words):
            tx.update(draw(1, SHAPES), state._replace(nu=nu))
    with refusal("RMSPropState", "got tuple", "of a chain, it is"):
        storage.convert((state,))
    for name, dtype in dict(nu_dtype="float16", momentum_dtype="uint8").items():
        with refusal(f"{name} must be float32", "None, got", dtype):
            storage.convert(state, **{name: dtype})


def test_complex_parameters_have_a_real_nu_and_complex_momentum():
    params = jnp.full((64, 64), 3 + 4j, jnp.complex64)
    tx = rmsprop(0.01, momentum=0.9, **SMALL)
    updates, states = scan(tx, jnp.stack([params] * 100))
    state = at(-1, states)
    assert updates.dtype == state.trace.dtype == jnp.complex64
    assert state.nu.codes.dtype == U8
    np.testing.assert_allclose(storage.convert(state).nu, 25, rtol=0.07)
    assert storage.convert(state, momentum_dtype=BF16).trace.dtype == jnp.complex64
