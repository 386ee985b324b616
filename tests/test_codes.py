"""One-byte codes are right on average, and keep what jumps, sleeps or repeats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, read_back, refusal, scan, together

from rmsprop_jax import codes, rmsprop, scale_by_rms, storage


def numbers(per_octave, lowest, octaves):
    steps = np.arange(octaves * per_octave)
    return 2.0 ** (lowest + steps // per_octave) * (1 + steps % per_octave / per_octave)


# What codes stand for with a scale of 1, as the module's docstring says.
TABLE = [[0], numbers(1, -59, 22), numbers(2, -37, 8), numbers(4, -29, 12)]
TABLE += [numbers(8, -17, 17), 4.0 ** np.arange(32)]
TABLE = np.concatenate(TABLE)
assert len(TABLE) == 255


@jax.jit
def quantize(x):
    return storage.encode_nearest(jnp.asarray(x, jnp.float32), jnp.dtype("uint8"))


def run(decay, grads):
    """Return updates and states of all steps, for uint8 and for float32."""
    txs = together(scale_by_rms(decay, eps=0.0, nu_dtype=x) for x in ("uint8", None))
    return scan(txs, jnp.asarray(grads, jnp.float32))


@pytest.mark.parametrize("grown", [1, 2.0**20], ids=["settled", "grown"])
def test_values_are_stored_as_their_neighbours_and_right_on_average(grown):
    random = np.random.default_rng(0)
    x = random.lognormal(sigma=9, size=(8, 512)).astype("float32")
    old = quantize(x / grown)
    assert (old.codes.dtype, old.scale.shape) == (jnp.uint8, (8, 1))
    assert old.scale.dtype == jnp.bfloat16 and len(np.unique(old.codes)) > 150
    scale = 4.0 ** np.ceil(np.log2(2 * x.max(1, keepdims=True) / grown) / 2)
    code = np.searchsorted(TABLE, x / scale, side="right") - 1
    low, high = TABLE[code] * scale, TABLE[code + 1] * scale

    read = np.asarray(read_back(x, old, 512), "float64")
    assert ((read == low) | (read == high)).all() and (read == high).any()
    mean = read.mean(0)
    # Two of 512 offsets may come too early or too late.
    exact, above = (code >= 1) & (code < 223), code >= 223
    assert exact.mean() > 0.7 and above.any() == (grown > 1)
    assert (np.abs(mean - x) <= (high - low) / 256)[exact].all()
    # Between powers of 4, 2 is taken for the middle: at most a quarter too high.
    assert (mean / x)[above].min(initial=1) > 0.99
    assert (mean / x)[above].max(initial=1) < 1.27


@pytest.mark.parametrize("exponent", [codes.SMALLEST, 0, codes.LARGEST])
def test_all_codes_are_read_as_the_docstring_says(exponent):
    every = jnp.arange(256, dtype=jnp.uint8)[None]
    scale = codes._pack(*2 * (jnp.full((1, 1), exponent),)).astype(jnp.bfloat16)
    with np.errstate(over="ignore"):
        expected = np.append((TABLE * 4.0**exponent).astype("float32"), np.nan)
    # Larger numbers are not stored.
    readable = ~(expected > 2.0**126)
    read = np.asarray(codes.decode(every, scale))[0]
    np.testing.assert_array_equal(read[readable], expected[readable])


def test_codes_that_are_encoded_again_stay():
    row = TABLE[1:216]  # Up to 1/2.
    quantized = quantize([np.resize(row, 256)] * 16)
    assert len(np.unique(quantized.codes)) == 215
    assert_same(quantize(storage.decode(quantized)), quantized)


def test_a_state_may_be_set_to_zeros():
    tx, params = rmsprop(0.1, nu_dtype="uint8"), jnp.ones((64, 64))
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, state)
    assert (storage.convert(zeros).nu == 0).all()
    assert_same(tx.update(params, zeros), tx.update(params, state))


def test_special_values_are_kept_in_their_coordinates():
    x = np.float32([0, 1, 1, 3e38, 1e-37, np.nan])[:, None] * np.ones(1024, "float32")
    x[1, 3], x[2, 4] = np.nan, np.inf
    nearest, (dithered,) = quantize(x), read_back(x, quantize(x), 1)
    # An infinite average would never decay; the largest value that is stored does.
    x[2, 4] = x[3] = 2.0**126
    for read in np.asarray(storage.decode(nearest)), np.asarray(dithered):
        for row in (0, 1, 3, 5):
            np.testing.assert_array_equal(read[row], x[row])
        assert read[2, 4] == 2.0**126 and np.isfinite(read[2]).all()
    with jax.debug_nans(True):
        storage.encode_nearest(jnp.zeros((64, 64)), jnp.dtype("uint8"))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e3])
def test_the_first_gradient_of_a_row_is_remembered(size):
    grads = jnp.zeros((2, 64, 64)).at[:, 5].set(jnp.array([[size], [0.1 * size]]))
    (updates, _), (states, _) = run(0.5, grads)
    state = jax.tree.map(lambda x: x[-1], states)
    # Above the scale that the row starts with, only powers of 4 are stored.
    exact = 0.1 * (0.01 / 2 + 1 / 4) ** -0.5
    assert 0.49 * exact < updates[1, 5, 0] < 2.01 * exact
    assert (storage.convert(state).nu[jnp.arange(64) != 5] == 0).all()


@pytest.mark.parametrize("decay", [0.97, 0.99, 0.999])
def test_rows_that_are_touched_seldom_keep_their_average(decay):
    """At random, once in 200 steps, as the rows of an embedding are."""
    random = np.random.default_rng(0)
    touched = random.random((2000, 64, 1)) < 1 / 200
    sizes = random.lognormal(size=(64, 64))
    grads = touched * sizes * random.normal(size=(2000, 64, 64))
    after = (touched & (touched.cumsum(0) > 3))[..., 0]
    (found, exact), _ = run(decay, grads)
    error = np.asarray(found / exact - 1)[after]
    assert np.sqrt(np.mean(error**2)) < 0.10


def test_gradients_that_repeat_after_any_number_of_steps_are_averaged_alike():
    """As in epochs that are not shuffled: the offset must not resonate with them."""
    periods = np.array([*range(2, 40), 55, 89, 144, 165, 181, 233, 256, 377])
    random = np.random.default_rng(0)
    sizes = random.lognormal(size=(len(periods), 90))
    grads = jnp.asarray(sizes * random.normal(size=(997, *sizes.shape)), jnp.float32)
    phase = random.integers(0, 10**6, sizes.shape)
    txs = together(scale_by_rms(0.9999, eps=0.0, nu_dtype=x) for x in ("uint8", None))

    def step(states, t):
        seen = (t + phase) % periods[:, None] == 0
        (found, exact), states = txs.update(jnp.where(seen, grads[t % 997], 0), states)
        counted = seen & (t > 3000)
        error = jnp.where(counted, found / jnp.where(counted, exact, 1) - 1, 0)
        return states, (jnp.square(error).sum(1), counted.sum(1))

    states = txs.init(grads[0])
    assert states[0].nu.codes.dtype == jnp.uint8
    _, sums = jax.jit(lambda: jax.lax.scan(step, states, jnp.arange(8000)))()
    squares, count = (np.asarray(x).sum(0) for x in sums)
    found = np.sqrt(squares / count)
    assert found.max() < 0.14 and np.median(found) < 0.10, periods[found.argmax()]


def test_states_with_the_scales_of_version_0_1_are_refused_and_converted():
    random = np.random.default_rng(0)
    scale = random.lognormal(size=(64, 1)).astype("float32")
    old = random.integers(0, 255, (64, 64)).astype("uint8")
    tx, grads = rmsprop(0.1, nu_dtype="uint8"), jnp.ones((64, 64))
    nu = storage.Quantized(jnp.asarray(old), jnp.asarray(scale))
    state = tx.init(grads)._replace(nu=nu)
    with refusal("It also reads the float32 scales of version 0.1"):
        tx.update(grads, state)
    read = storage.convert(state)
    expected = scale * (old / 254) ** 16
    np.testing.assert_allclose(read.nu, expected, rtol=1e-5, atol=1e-37)
    updates, _ = tx.update(grads, storage.convert(state, nu_dtype="uint8"))
    np.testing.assert_allclose(updates, tx.update(grads, read)[0], rtol=0.07)


def test_nothing_is_differentiated_through_what_is_stored():
    tx, grads = scale_by_rms(0.5, nu_dtype="uint8"), jnp.ones((64, 64))
    _, start = tx.update(grads, tx.init(grads))

    def total(g):
        first, state = tx.update(g, start)
        return jnp.stack([first.sum(), tx.update(grads, state)[0].sum()])

    first, second = jax.jacrev(total)(3 * grads)
    assert (first != 0).all() and (second == 0).all()
