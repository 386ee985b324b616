"""State of Optax's rmsprop goes on in ours, and back, whatever is around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import assert_same
from test_interop import aligned

from rmsprop_jax import RMSPropState, interop, presets, rmsprop, scale_by_rms

HALF = 50
# Relative to the largest parameter so far, which grows with the updates: one step of
# either side rounds about ten times, some of them to the other side.
REAL = ("float32", "float64")
MIXED = ("float32", "complex128")
UNITS = {dtype: 8 * float(jnp.finfo(dtype).eps) * 2 * HALF for dtype in (*REAL, *MIXED)}
ALL = dict(centered=True, momentum=0.9, nesterov=True)


def falling(count):
    return 0.05 * (1 - count / 200)


RUNS = {
    "plain": dict(learning_rate=0.05),
    "bias_correction": dict(learning_rate=0.05, bias_correction=True),
    "all": ALL | dict(learning_rate=0.05, eps_in_sqrt=False, initial_scale=1.0),
    "plain_scheduled": {},
    "eps_outside_scheduled": dict(eps_in_sqrt=False),
    "initial_scale_scheduled": dict(initial_scale=1.0),
    "bias_correction_scheduled": dict(bias_correction=True),
    "momentum_scheduled": dict(momentum=0.9),
    "nesterov_scheduled": dict(momentum=0.9, nesterov=True),
    "centered_scheduled": dict(centered=True),
    "centered_momentum_scheduled": dict(centered=True, momentum=0.9),
}
RUNS = {name: dict(learning_rate=falling) | run for name, run in RUNS.items()}
WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(2.0), tx),
    "chain_in_chain": lambda tx: optax.chain(optax.chain(tx), optax.scale(0.5)),
    "masked": lambda tx: optax.masked(tx, dict(float32=True, float64=False)),
    "multisteps": lambda tx: optax.MultiSteps(tx, 2),
    "partition": lambda tx: optax.partition(
        dict(a=tx, b=tx), dict(float32="a", float64="b")
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


CORES = {
    "scale_by_rms": (optax.scale_by_rms, scale_by_rms, {}),
    "with_count": (optax.scale_by_rms, scale_by_rms, dict(bias_correction=True)),
    "scale_by_stddev": (
        optax.scale_by_stddev,
        functools.partial(scale_by_rms, centered=True),
        {},
    ),
}


@functools.cache
def gradients():
    """Return ordinary gradients, whose spread is like their size, of every dtype."""
    x = np.random.default_rng(0).normal(size=(2, 2 * HALF, 2, 3))
    z = x[0] + 1j * x[1]
    return {
        dtype: (z if "c" in dtype else x[0]).astype(dtype) for dtype in (*REAL, *MIXED)
    }


def train(tx):
    """Return a compiled run over half of the gradients: (carry, start) -> carry."""

    @jax.jit
    def run(carry, start):
        def step(carry, t):
            params, state = carry
            grads = {dtype: jnp.asarray(gradients()[dtype])[t] for dtype in params}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, start + jnp.arange(HALF))[0]

    return run


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def assert_moves(theirs, ours, dtypes, count=HALF):
    """Compare runs that change sides in the middle with a run that does not."""
    params = {dtype: jnp.ones((2, 3), dtype) for dtype in dtypes}
    run_theirs, run_ours = train(theirs), train(ours)
    there, here = theirs.init(params), ours.init(params)

    middle = run_theirs((params, there), 0)
    end, _ = run_theirs(middle, HALF)
    moved = interop.from_optax(middle[1], count=HALF)
    assert types(moved) == types(here)
    is_ours = lambda x: isinstance(x, RMSPropState)  # noqa: E731
    states = filter(is_ours, jax.tree.leaves(moved, is_leaf=is_ours))
    assert {int(state.count) for state in states} == {count}
    assert_close(run_ours((middle[0], moved), HALF)[0], end)

    middle = run_ours((params, here), 0)
    moved = interop.to_optax(middle[1], there)
    assert types(moved) == types(there)
    assert_close(run_theirs((middle[0], moved), HALF)[0], end)


def assert_close(params, expected):
    for dtype, x in expected.items():
        size = np.abs(x).max()
        assert params[dtype].dtype == dtype
        assert np.abs(params[dtype] - x).max() <= UNITS[dtype] * size, dtype


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_goes_on_on_the_other_side(options, lenient, x64):
    assert_moves(optax.rmsprop(**options), rmsprop(**options), MIXED)


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_around_it_goes_on_too(name, lenient, x64):
    wrap, options = WRAPPED[name], ALL | dict(learning_rate=falling)
    # There, one step is of two gradients.
    count = HALF // 2 if name == "multisteps" else HALF
    ours, theirs = rmsprop(**options), optax.rmsprop(**options)
    assert_moves(wrap(theirs), wrap(ours), REAL, count)


def test_injected_hyperparameters_go_on(lenient, x64):
    options = ALL | dict(learning_rate=falling)
    ours, theirs = map(optax.inject_hyperparams, (rmsprop, optax.rmsprop))
    # Hyperparameters of one dtype widen everything narrower, in Optax.
    assert_moves(theirs(**options), ours(**options), ["float64"])


@pytest.mark.parametrize(("theirs", "ours", "options"), CORES.values(), ids=CORES)
def test_a_core_goes_on_alone_and_in_a_chain(theirs, ours, options, lenient, x64):
    theirs, ours = theirs(**options), ours(**options)
    assert_moves(theirs, ours, ["complex128"])
    # Neither is the state of optax.rmsprop, whatever their parts.
    after = optax.trace(0.9), optax.scale(-0.1)
    assert_moves(optax.chain(theirs), optax.chain(ours), REAL)
    assert_moves(optax.chain(theirs, *after), optax.chain(ours, *after), REAL)


def state_of(tx, **leaves):
    return tx.init(dict(w=jnp.ones((2, 3))) | leaves)


def spoiled(value, **options):
    """Return the state of a chain with a leaf of nu that is this."""
    tx = optax.chain(optax.clip(1.0), optax.rmsprop(0.1, **options))
    state = state_of(tx)
    core = state[1][0]._replace(nu=dict(w=value))
    return (state[0], (core, *state[1][1:]))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            lambda: state_of(optax.adam(0.1)),
            r"opt_state must hold .*got.*Adam.*Restore",
        ),
        (lambda: state_of(rmsprop(0.1)), r"opt_state must hold .*got.*RMSPropState"),
        (
            lambda: [{"nu": jnp.ones(2)}],
            r"opt_state must hold a state of optax.rmsprop",
        ),
        (
            lambda: spoiled(jnp.ones(2, "bfloat16")),
            r"opt_state\[1\]\[0\]\.nu\['w'\] must be .* got bfloat16. Half precision",
        ),
        (
            lambda: spoiled(jnp.float32([1, np.nan])),
            r"opt_state\[1\]\[0\]\.nu\['w'\] must be finite, got 1 .* of 2. Go back",
        ),
        (
            lambda: state_of(optax.rmsprop(0.1, centered=True, bias_correction=True)),
            r"opt_state is centered with bias_correction.* Start anew without one",
        ),
    ],
)
def test_an_optax_state_that_cannot_go_on_is_named(state, words):
    with pytest.raises(ValueError, match=words):
        interop.from_optax(state())


@pytest.mark.parametrize("count", [-1, 0.5, 2**31])
def test_a_count_is_an_integer(count):
    with pytest.raises(ValueError, match=r"count must be an integer in \[0, 2\^31\)"):
        interop.from_optax(state_of(optax.rmsprop(0.1)), count=count)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (optax.rmsprop(0.1), r"state must be .*\['count', 'nu'\].*got .*'trace'.*Make"),
        (optax.rmsprop(0.1, centered=True), r"state must be .*'mu'.*got .*'trace'"),
        (optax.chain(optax.rmsprop(0.1, momentum=0.9)), r"state.*like"),
        (optax.adam(0.1), r"like.*optax"),
        (rmsprop(0.1, momentum=0.9), r"like.*optax"),
    ],
)
def test_a_state_that_does_not_fit_like_is_refused(like, words):
    state = state_of(rmsprop(0.1, momentum=0.9))
    with pytest.raises(ValueError, match=words):
        interop.to_optax(state, state_of(like))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (dict(w=jnp.ones((3, 2))), r"state\[0\]\.nu\['w'\] .*\(3, 2\).*got \(2, 3\)"),
        (dict(w=jnp.ones((2, 3), "float16")), r"like\[0\]\.nu\['w'\] .*got float16"),
        (dict(b=jnp.ones(2)), r"state.*like"),
    ],
)
def test_parameters_that_do_not_fit_like_are_refused(other, words):
    state, like = state_of(rmsprop(0.1)), state_of(optax.rmsprop(0.1), **other)
    with pytest.raises(ValueError, match=words):
        interop.to_optax(state, like)


def test_a_spoiled_state_is_refused():
    state = state_of(rmsprop(0.1))._replace(nu=dict(w=jnp.full((2, 3), np.inf)))
    with pytest.raises(
        ValueError, match=r"state\[0\]\.nu\['w'\] must be finite, got 6"
    ):
        interop.to_optax(state, state_of(optax.rmsprop(0.1)))


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_a_restored_state_is_not_shared_with_the_caller(options):
    theirs, expected = optax.rmsprop(0.1, **options), rmsprop(0.1, **options)
    # A checkpoint may come as NumPy arrays, and XLA shares those that are aligned.
    restored = jax.tree.map(aligned, jax.device_get(state_of(theirs)))
    state = interop.from_optax(restored)
    for x in jax.tree.leaves(restored):
        x[...] = 9
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert_same(state, state_of(expected))


def test_the_count_of_the_state_comes_before_the_argument():
    state = state_of(optax.rmsprop(falling))
    assert interop.from_optax(state, count=3).count == 0
    assert interop.from_optax(state_of(optax.rmsprop(0.1)), count=3).count == 3


def test_the_complex_state_of_torch_is_not_that_of_optax():
    params = dict(w=jnp.ones(2, "complex64"))
    with pytest.raises(ValueError, match=r"state\.nu is complex, as presets\.torch"):
        interop.to_optax(presets.torch().init(params), optax.rmsprop(0.1).init(params))
