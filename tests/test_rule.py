"""The rule against an independent oracle, and each numerical trap it avoids.

Every trap has a test that fails on the naive form of the guarded line.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax import jacfwd, jacrev

import rmsprop_jax

BOTH = (True, False)
CORES = [
    dict(eps_in_sqrt=eps_in_sqrt, **rest)
    for eps_in_sqrt in BOTH
    for rest in (
        dict(),
        dict(initial_scale=1.0),
        dict(centered=True),
        dict(centered=True, initial_scale=1.0),
        dict(bias_correction=True),
    )
]
MOMENTA = [dict()] + [
    dict(momentum=0.8, nesterov=nesterov, lr_in_momentum=inside)
    for nesterov in BOTH
    for inside in BOTH
]
L2, DECAY = dict(l2=0.3), dict(weight_decay=0.2)
# Both decays with everything; each alone and none, where only that can matter.
GRID = [a | b | L2 | DECAY for a in CORES for b in MOMENTA] + CORES
GRID += [a | b for a in MOMENTA for b in (L2, DECAY)]


def label(options):
    return "-".join(f"{k}={x}" for k, x in options.items()) or "defaults"


def drop(count):
    """Drop the learning rate on the way: only then lr_in_momentum matters."""
    return jnp.where(count < 20, 0.1, 0.01)


def scan(tx, gs, ps=None):
    """Return all updates and all states for trees of [steps, ...]."""

    def step(state, row):
        updates, state = tx.update(row[0], state, row[1])
        return state, (updates, state)

    first = jax.tree.map(lambda x: x[0], gs)
    return jax.lax.scan(step, tx.init(first), (gs, ps))[1]


def together(txs):
    """Return the transformations as one, with tuples of theirs: one compiled program.

    What takes the time is to compile, and of one program that is a third of it.
    """
    txs = tuple(txs)

    def update(gs, states, ps=None):
        pairs = (tx.update(gs, x, ps) for tx, x in zip(txs, states, strict=True))
        return tuple(zip(*pairs, strict=True))

    return optax.GradientTransformation(lambda p: tuple(x.init(p) for x in txs), update)


def ulp(dtype):
    return float(jnp.finfo(dtype).eps)


@functools.cache
def random(seed, steps=60):
    """Return leaves [steps, ...] of every precision and several shapes."""
    rng = np.random.default_rng(seed)
    shapes = dict(float32=(2, 3), float64=(), complex64=(4,), complex128=(3, 1))

    def leaf(dtype, shape):
        x = rng.normal(size=(2, steps, *shape)) * np.exp(rng.normal(size=shape))
        return (x[0] + 1j * x[1] if "complex" in dtype else x[0]).astype(dtype)

    return {dtype: leaf(dtype, shape) for dtype, shape in shapes.items()}


def assert_follows(updates, gs, ps, lr=None, decay=0.9, **options):
    """Compare every update of every leaf with the oracle.

    A step rounds about ten times, and the averages carry that on with factors below
    one: 4 ulp a step, of the largest update so far, in which sums cancel. Centered,
    the new mu has moved to 1 - decay of the way to g, and g - mu loses 1 / decay.
    With bias correction, 1 - decay^t loses 1 / (1 - decay), twice, and half is left.
    """
    lost = 4 / decay if options.get("centered") else 4
    lost += options.get("bias_correction", False) / (1 - decay)
    for dtype, update in updates.items():
        wanted = oracle.rmsprop(gs[dtype], ps[dtype], lr, decay, **options)
        flat = (len(wanted), -1)
        size = np.maximum.accumulate(np.abs(wanted).reshape(flat).max(1))
        error = np.abs(np.asarray(update) - wanted).reshape(flat).max(1)
        steps = 1 + np.arange(len(wanted))
        single = dtype in ("float32", "complex64")
        bound = size * (lost * steps * ulp(dtype) if single else 1e-12)
        assert update.dtype == dtype
        assert (error <= bound).all(), (dtype, options)


# In turn, each both real and complex, and in both widths.
@pytest.mark.parametrize(
    ("grid", "dtypes"),
    [(GRID[::2], ("float32", "complex128")), (GRID[1::2], ("float64", "complex64"))],
    ids=("float32", "float64"),
)
def test_rmsprop_follows_the_oracle(grid, dtypes, x64):
    gs, ps = ({k: random(seed)[k] for k in dtypes} for seed in (0, 1))
    updates, _ = scan(together(rmsprop_jax.rmsprop(drop, **x) for x in grid), gs, ps)
    for options, update in zip(grid, updates, strict=True):
        assert_follows(update, gs, ps, lambda n: 0.1 if n < 20 else 0.01, **options)


@pytest.mark.parametrize("decay", (0.1, 0.5, 0.99))
def test_scale_by_rms_follows_the_oracle(decay, x64):
    gs, ps = random(2), random(3)
    txs = together(rmsprop_jax.scale_by_rms(decay, **core) for core in CORES)
    for core, update in zip(CORES, scan(txs, gs, ps)[0], strict=True):
        assert_follows(update, gs, ps, decay=decay, **core)


def test_update_is_bounded_and_never_zero():
    """0 < |u| <= 1 / sqrt(1 - decay), since nu holds at least (1 - decay) |g|^2."""
    scales = jnp.exp(5 * jax.random.normal(jax.random.key(0), (200, 50)))
    gs = scales * jax.random.normal(jax.random.key(1), scales.shape)
    decays = (0.5, 0.9, 0.99, 0.999)
    txs = together(rmsprop_jax.scale_by_rms(decay, eps=1e-12) for decay in decays)
    for decay, updates in zip(decays, scan(txs, gs)[0], strict=True):
        us = np.abs(updates)
        # Rounded: c, the square, the product, the sum, the root, the ratio.
        assert us.max() <= (1 + 4 * ulp(jnp.float32)) / np.sqrt(1 - decay)
        assert us.min() > 0


@pytest.mark.parametrize("eps_in_sqrt", BOTH)
def test_centered_never_gives_nan(eps_in_sqrt, lenient):
    """The difference v - m^2 cancels when gradients are nearly constant."""
    gs = 1 + 1e-4 * jax.random.normal(jax.random.key(0), (400, 500))
    options = dict(centered=True, eps_in_sqrt=eps_in_sqrt, eps=1e-12)
    assert jnp.isnan(scan(optax.rmsprop(0.1, **options), gs)[0]).any()
    updates, states = scan(rmsprop_jax.rmsprop(0.1, **options), gs)
    assert jnp.isfinite(updates).all()
    # mu is off by the roundings of 1 / (1 - decay) steps, at about 1; nu is quadratic
    # in g - mu.
    weights = 0.1 * 0.9 ** np.arange(399, -1, -1.0)[:, None]
    exact = np.asarray(gs, np.float64)
    variance = (weights * (exact - (weights * exact).sum(0)) ** 2).sum(0)
    error = 10 * ulp(jnp.float32) / np.sqrt(variance)
    assert (np.abs(states.nu[-1] / variance - 1) <= 2 * error + error**2).all()


def test_bf16_state_does_not_freeze():
    """In bfloat16, 0.999 is 1 and an average neither grows nor decays."""
    on, off = jnp.ones(3000, jnp.bfloat16), jnp.zeros(3000, jnp.bfloat16)
    nu = scan(rmsprop_jax.scale_by_rms(0.999), jnp.concatenate([on, off]))[1].nu
    # Each step rounds decay, the product and the sum once.
    full = 1 - 0.999**3000
    rounding = 3000 * 1.5 * ulp(jnp.float32)
    assert nu[2999] == pytest.approx(full, rel=rounding)
    assert nu[5999] == pytest.approx(full * 0.999**3000, rel=2 * rounding)


@pytest.mark.parametrize("eps_in_sqrt", BOTH)
def test_fp16_survives_large_and_zero_gradients(eps_in_sqrt):
    """In float16, 300^2 is inf and 1e-8 is 0."""
    tx = rmsprop_jax.scale_by_rms(eps_in_sqrt=eps_in_sqrt)
    updates, states = scan(tx, jnp.full((5, 2), jnp.array([300, 0], jnp.float16)))
    assert updates.dtype == jnp.float16
    # nu is 9000 after the first step; u is rounded once more, to float16.
    np.testing.assert_allclose(updates[0], [10**0.5, 0], rtol=ulp(jnp.float16))
    np.testing.assert_array_equal(updates[:, 1], 0)
    assert jnp.isfinite(states.nu).all()


def test_weight_moves_again_after_overflow():
    """One finite gradient whose square is inf must not stop a weight for ever."""
    cases = list(itertools.product((0.9, 0.99), BOTH))
    # nu decays from 3e38 to 1, and |mu|^2 twice as fast from 1e50.
    steps = {
        decay: int((np.log(3e38) + 0.5 * np.log(1e50)) / -np.log(decay))
        for decay, _ in cases
    }
    huge = np.array([1, 3000])
    ordinary = 1 + 0.5 * (-1.0) ** (np.arange(3000 + steps[0.99])[:, None] - huge)
    gs = np.where(np.arange(len(ordinary))[:, None] < huge, 1e25, ordinary)
    gs = {dtype: jnp.asarray(gs, dtype) for dtype in ("float32", "complex64")}
    txs = (rmsprop_jax.scale_by_rms(decay, centered=x) for decay, x in cases)
    for case, *both in zip(cases, *scan(together(txs), gs), strict=True):
        last = huge + steps[case[0]] - 1
        for dtype in gs:
            updates, nu = both[0][dtype], both[1].nu[dtype]
            assert jnp.isfinite(nu).all(), (case, dtype)
            assert jnp.isfinite(updates).all(), (case, dtype)
            assert (np.abs(updates)[last, [0, 1]] > 0.4).all(), (case, dtype)


@pytest.mark.parametrize("traced", BOTH)
def test_zero_gradient_gives_zero_update_with_eps_0(traced):
    """0 / 0; and 1e-42 is a number that most processors flush to 0."""
    numbers = (0.0, 1e-42)

    def run(numbers):
        cases = [dict(eps=x, eps_in_sqrt=inside) for x in numbers for inside in BOTH]
        txs = together(rmsprop_jax.rmsprop(0.1, **case) for case in cases)
        return scan(txs, jnp.array([[0.0, 0.0], [0.0, 2.0], [0.0, 2.0]]))[0]

    for updates in jax.jit(run)(jnp.float32(numbers)) if traced else run(numbers):
        np.testing.assert_array_equal(updates[:, 0], 0)
        np.testing.assert_array_equal(updates[0], 0)
        assert (updates[1:, 1] < 0).all()


DERIVED = [
    options | dict(eps=eps)
    for eps in (0.0, 1e-3)
    for options in [*CORES, dict(momentum=0.9, nesterov=True)]
]


def moved(derived):
    """Return the function from gradients to where several steps lead, for each."""
    txs = together(rmsprop_jax.rmsprop(0.1, **options) for options in derived)

    def ends(gs):
        weights = jnp.arange(1.0, 1 + gs[0].size).astype(gs.dtype)
        return jnp.stack([jnp.real(x.sum(0) * weights).sum() for x in scan(txs, gs)[0]])

    return ends


# In turn, as what is complex and what is an option do not meet.
@pytest.mark.parametrize(
    ("derived", "dtype"),
    [(DERIVED[::2], jnp.float32), (DERIVED[1::2], jnp.complex64)],
    ids=("real", "complex"),
)
def test_derivative_is_finite_at_zero(derived, dtype):
    gs = jnp.zeros((4, 2), dtype).at[1, 0].set(1)
    finite = jnp.isfinite(jax.jit(jacrev(moved(derived)))(gs)).all((1, 2))
    assert finite.all(), [x for x, ok in zip(derived, finite, strict=True) if not ok]


def test_derivative_is_that_of_finite_differences(x64):
    gs = 1 + jax.random.uniform(jax.random.key(0), (4, 2), jnp.float64)
    ends, h = moved(DERIVED), 1e-6

    @jax.jit
    def derivatives(gs):
        along = jax.vmap(lambda x: (ends(gs + h * x) - ends(gs - h * x)) / (2 * h))
        differences = along(jnp.eye(gs.size).reshape(-1, *gs.shape))
        return differences.T.reshape(-1, *gs.shape), jacfwd(ends)(gs), jacrev(ends)(gs)

    # Central differences of step 1e-6 are off by 1e-12 of a third derivative.
    differences, *exact = derivatives(gs)
    for found in exact:
        for options, x, y in zip(DERIVED, found, differences, strict=True):
            np.testing.assert_allclose(x, y, 1e-6, 1e-6, err_msg=label(options))


def test_one_minus_decay_keeps_its_digits():
    """In float32, 1 - 0.999 is off by 5e-5."""
    nu = scan(rmsprop_jax.scale_by_rms(0.999), jnp.ones(1))[1].nu[0]
    assert nu == pytest.approx(1 - 0.999, rel=ulp(jnp.float32))


def test_traced_decay_and_its_rest_sum_to_one():
    """In bfloat16, 1 - 0.1 is off by 2e-3, and nu would not stay where it is."""
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float32)
    decays = [dtype(decay) for dtype in dtypes for decay in (0.1, 0.3, 0.9)]

    @jax.jit
    def nus(decays):
        txs = (rmsprop_jax.scale_by_rms(x, initial_scale=1.0) for x in decays)
        return [state.nu[0] for state in scan(together(txs), jnp.ones(1))[1]]

    for decay, nu in zip(decays, nus(decays), strict=True):
        assert nu == pytest.approx(1, rel=ulp(jnp.float32)), repr(decay)


@pytest.mark.parametrize("traced", BOTH)
def test_bias_correction_rounds_as_adam_does(traced, lenient):
    """At decay 0.9999 and t = 1, 1 - decay^t in float32 is off by 2e-4; so is Adam's.

    Optax promises that the two are equal, and its own tests hold us to 1e-6.
    """

    def run(decay):
        options = dict(eps_in_sqrt=False, bias_correction=True)
        return scan(rmsprop_jax.scale_by_rms(decay, **options), gs)[0]

    gs = jax.random.normal(jax.random.key(0), (100, 3))
    ours = jax.jit(run)(jnp.float32(0.9999)) if traced else run(0.9999)
    adam = scan(optax.scale_by_adam(b1=0.0, b2=0.9999), gs)[0]
    # Adam's c is 1 - float32(0.9999) where ours is traced too.
    np.testing.assert_allclose(ours, adam, rtol=1e-4 if traced else 1e-6)


PARAMETER_GRADIENT_NU_MU = [
    ("float16", "float16", "float32", "float32"),
    ("bfloat16", "float32", "float32", "float32"),
    ("float32", "bfloat16", "float32", "float32"),
    ("float32", "float64", "float32", "float32"),
    ("float64", "float32", "float64", "float64"),
    ("complex64", "complex128", "float32", "complex64"),
    ("complex128", "complex64", "float64", "complex128"),
]


def test_state_keeps_its_dtype(x64):
    """Whatever dtype gradients have, else `scan` fails and `jit` compiles twice."""
    ps, gs, nus, mus = map(list, zip(*PARAMETER_GRADIENT_NU_MU, strict=True))
    tx = rmsprop_jax.rmsprop(0.1, centered=True, momentum=0.9)
    state = tx.init([jnp.ones(3, p) for p in ps])
    updates, after = tx.update([jnp.ones(3, g) for g in gs], state)
    for each in (state, after):
        assert each.count.dtype == "int32"
        assert [dtypes(x) for x in each[1:]] == [nus, mus, mus]
    assert dtypes(updates) == gs


def dtypes(arrays):
    return [x.dtype for x in arrays]


def test_state_has_the_dtype_that_was_asked_for(x64):
    tx = rmsprop_jax.rmsprop(
        0.1, centered=True, momentum=0.9, nu_dtype="float64", momentum_dtype="float32"
    )
    params = [jnp.ones(3, dtype) for dtype in ("bfloat16", "float32", "float64")]
    state = tx.init(params)
    after = tx.update(params, state)[1]
    for each in (state, after):
        assert each.count.dtype == "int32"
        found = [{*dtypes(x)} for x in each[1:]]
        assert found == [{jnp.dtype(x)} for x in ("float64", "float32", "float32")]


def test_complex_average_of_squares_is_real():
    tx = rmsprop_jax.scale_by_rms(0.5)
    g = jnp.array([3 + 4j])
    _, state = tx.update(g, tx.init(g))
    assert state.nu.dtype == jnp.float32
    np.testing.assert_array_equal(state.nu, [12.5])


def test_gradient_of_another_shape_is_refused():
    """Broadcast to (3, 3), it would train, silently and wrongly."""
    tx = rmsprop_jax.rmsprop(0.1)
    state = tx.init({"w": jnp.ones((3, 1))})
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(ValueError, match="broadcast"),
    ):
        tx.update({"w": jnp.ones(3)}, state)


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.float32, jnp.complex64))
def test_gradient_that_is_not_finite_is_seen(dtype):
    """`optax.apply_if_finite` can only help if an update shows it."""
    gs = jnp.ones((3, 4), dtype).at[2, :3].set(jnp.array(BAD, dtype))
    txs = together(rmsprop_jax.rmsprop(0.1, **options) for options in DERIVED)
    expected = np.ones((3, 4), bool)
    expected[2, :3] = False
    for options, updates in zip(DERIVED, scan(txs, gs)[0], strict=True):
        finite = np.isfinite(updates)
        np.testing.assert_array_equal(finite, expected, err_msg=label(options))
