"""Each refusal says what came, what was allowed, and the fix."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import rmsprop, scale_by_rms

OPTIONAL = ("momentum", "l2", "weight_decay")
LIMITS = dict.fromkeys(["learning_rate", "eps", "initial_scale", *OPTIONAL], "inf")
LIMITS |= dict(decay="1", momentum="1")
by_name = pytest.mark.parametrize("name", LIMITS)
ways = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["direct", "jit"])
BOTH = dict(centered=True, momentum=0.9)


def refusal(*words):
    """Expect a ValueError whose message has these words in this order."""
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, words)))


def build(**options):
    return rmsprop(**{"learning_rate": 0.1, **options})


def params():
    return dict(w=jnp.ones((2, 3)), b=jnp.ones(()))


def refuse_update(wrap, words, tx, updates, params_given=None, state=None):
    state = tx.init(params()) if state is None else state
    with refusal(*words):
        wrap(tx.update)(updates, state, params_given)


@by_name
@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [float, np.float32, np.float64, np.array, jnp.float32])
def test_numbers_outside_their_domain_are_refused(name, value, make):
    shown = str(float(make(value)))
    with refusal(f"{name} must be in [0, {LIMITS[name]}), got {shown}."):
        build(**{name: make(value)})


@pytest.mark.parametrize("name", ["decay", "momentum"])
@pytest.mark.parametrize("value", [1, 1.0, 2, np.float32(0.99999999)])
def test_averages_that_never_forget_are_refused(name, value):
    with refusal(f"{name} must be in [0, 1), got {float(value)}."):
        build(**{name: value})


@by_name
@pytest.mark.parametrize("make", [float, int, np.float64, np.float16, np.array])
def test_python_and_numpy_numbers_are_taken(name, make):
    build(**{name: make(0)}).init(params())
    build(**{name: make(0.5)}).init(params())


@pytest.mark.parametrize("name", ["decay", "momentum"])
@pytest.mark.parametrize("make", [jnp.bfloat16, np.dtype(jnp.bfloat16).type])
def test_rounding_to_1_is_explained(name, make):
    words = (f"{name} must be in [0, 1), got 1.0", "bfloat16", "pass float32")
    with refusal(*words):
        build(**{name: make(0.999)})


def test_rounding_is_explained_for_inject_hyperparams():
    with refusal("got 1.0", "inject_hyperparams", "hyperparam_dtype=jnp.float32"):
        build(decay=jnp.bfloat16(0.999))


@by_name
@pytest.mark.parametrize("make", [jnp.ones, np.ones])
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1), (0,)])
def test_arrays_of_numbers_are_sent_to_vmap(name, make, shape):
    with refusal(name, str(list(shape)), "jax.vmap"):
        build(**{name: 0.5 * make(shape)})


@by_name
@pytest.mark.parametrize("value", ["0.1", "fast", b"0.1", {}, object()])
def test_what_is_no_number_is_refused(name, value):
    with refusal(f"{name} must be a number or a scalar array, got {value!r}"):
        build(**{name: value})


@by_name
@pytest.mark.parametrize("value", [1j, np.complex64(1j), jnp.complex64(1j), [0.1]])
def test_what_is_no_real_scalar_is_refused(name, value):
    with refusal(f"{name} must be"):
        build(**{name: value})


@pytest.mark.parametrize("name", [x for x in LIMITS if x not in OPTIONAL])
def test_none_is_no_number_where_nothing_can_be_off(name):
    with refusal(f"{name} must be a number or a scalar array, got None."):
        build(**{name: None})


@pytest.mark.parametrize("factory", [build, scale_by_rms])
def test_contradictions_are_refused(factory):
    with refusal("bias_correction", "centered=True", "Drop one"):
        factory(bias_correction=True, centered=True)
    with refusal("bias_correction", "initial_scale=1.0", "Drop one"):
        factory(bias_correction=True, initial_scale=1.0)
    with refusal("centered", "decay=0", "decay above 0"):
        factory(centered=True, decay=0)
    with refusal("decay must be in [0, 1)"):
        factory(decay=1.0)


def test_a_mask_needs_weight_decay():
    with refusal("weight_decay_mask", "weight_decay is None", "Pass weight_decay"):
        build(weight_decay_mask=True)


KEPT = {
    "nu_dtype": "nu_dtype must be float32, float64, bfloat16, uint8 or None, got",
    "momentum_dtype": "momentum_dtype must be float32, float64, bfloat16 or None, got",
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dtype", ["int8", jnp.float16, int, jnp.complex64])
def test_state_has_one_of_a_few_dtypes(name, dtype):
    with refusal(f"{KEPT[name]} {jnp.dtype(dtype).name}."):
        build(**{name: dtype})


def test_momentum_is_not_kept_in_codes_without_a_sign():
    with refusal(f"{KEPT['momentum_dtype']} uint8."):
        build(momentum=0.9, momentum_dtype="uint8")


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dtype", ["wide", object(), 8, np.ones(2), jnp.float32(1)])
def test_what_is_no_dtype_is_refused(name, dtype):
    with refusal(KEPT[name], "static_args"):
        build(**{name: dtype})


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dtype", ["float64", jnp.float64, float])
def test_float64_needs_x64(name, dtype):
    with refusal(f"{name}=float64 needs jax.config.jax_enable_x64"):
        build(**{name: dtype})


@ways
@pytest.mark.parametrize("options", [{}, BOTH])
@pytest.mark.parametrize(
    ("updates", "words"),
    [
        (dict(w=jnp.ones((2, 3))), ("missing: ['b']", "extra: nothing")),
        (params() | dict(c=jnp.ones(1)), ("missing: nothing", "extra: ['c']")),
        (dict(w=jnp.ones((2, 3)), c=jnp.ones(())), ("missing: ['b']", "extra: ['c']")),
        ([jnp.ones((2, 3)), jnp.ones(())], ("missing: ['b'], ['w']", "[0], [1]")),
        (params() | dict(w=dict(v=jnp.ones((2, 3)))), ("['w']",)),
        (params() | dict(w=(jnp.ones((2, 3)),)), ("['w']",)),
        (params() | dict(w={}), ("['w']",)),
    ],
    ids=["missing", "extra", "renamed", "list", "deeper", "in_tuple", "emptied"],
)
def test_gradients_of_another_structure_are_refused(wrap, options, updates, words):
    words = ("updates", *words)
    refuse_update(wrap, words, build(**options), updates)


@ways
def test_a_tuple_is_no_list(wrap):
    tx, state = build(), build().init(dict(deep=[jnp.ones(3)]))
    words = ("updates", "Expected list, got")
    refuse_update(wrap, words, tx, dict(deep=(jnp.ones(3),)), state=state)


@ways
def test_a_gradient_where_init_had_none_is_refused(wrap):
    state = build().init(dict(w=jnp.ones(3), b=None))
    words = ("updates", "extra: ['b']")
    refuse_update(wrap, words, build(), dict(w=jnp.ones(3), b=jnp.ones(3)), state=state)


@ways
@pytest.mark.parametrize(
    ("kept", "came"),
    [((3,), (3, 1)), ((3, 1), (3,)), ((), (1,)), ((1,), ()), ((0,), ())],
)
def test_gradients_are_not_broadcast(wrap, kept, came):
    state = build(**BOTH).init(dict(deep=[jnp.ones(kept)]))
    words = ("updates['deep'][0]", f"shape {kept}", f"got {came}", "Reshape")
    updates = dict(deep=[jnp.ones(came)])
    refuse_update(wrap, words, build(**BOTH), updates, state=state)


@ways
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integer_gradients_are_refused(wrap, dtype):
    words = ("updates['b']", "floating point or complex", dtype, "optax.masked")
    refuse_update(wrap, words, build(), params() | dict(b=jnp.ones((), dtype)))


@ways
@pytest.mark.parametrize("options", [BOTH, dict(l2=0.1), dict(centered=True)])
@pytest.mark.parametrize("kept", ["float32", "complex64"])
def test_real_and_complex_do_not_mix(wrap, options, kept):
    came = dict(float32="complex64", complex64="float32")[kept]
    tx, old = build(**options), params() | dict(b=jnp.ones((), kept))
    words = ("updates['b']", came, kept, "both")
    updates = params() | dict(b=jnp.ones((), came))
    refuse_update(wrap, words, tx, updates, old, tx.init(old))


@ways
@pytest.mark.parametrize("options", [dict(l2=0.1), dict(weight_decay=0.1)])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, ("read", "update(updates, state, params)")),
        (dict(w=jnp.ones((2, 3))), ("params", "missing: ['b']")),
        (params() | dict(w=jnp.ones(3)), ("params['w']", "(2, 3)", "got (3,)")),
        (params() | dict(w=[jnp.ones((2, 3))]), ("params", "['w']")),
        (params() | dict(w=None), ("params", "['w']")),
        (params() | dict(w=optax.MaskedNode()), ("params", "['w']")),
    ],
    ids=["none", "missing", "shape", "deeper", "leaf_none", "leaf_masked"],
)
def test_params_that_do_not_fit_are_refused(wrap, options, given, words):
    name = next(iter(options)) if given is None else ""
    refuse_update(wrap, (name, *words), build(**options), params(), given)


@ways
@pytest.mark.parametrize(
    "mask",
    [
        dict(w=True),
        dict(w=True, b=True, c=True),
        [True, False],
        dict(w=dict(v=True), b=True),
        dict(w=jnp.array([True, False]), b=True),
        lambda params: None,
        "w",
    ],
    ids=["missing", "extra", "list", "deeper", "array", "returns_none", "string"],
)
def test_a_mask_unlike_params_is_refused(wrap, mask):
    tx = build(weight_decay=0.1, weight_decay_mask=mask)
    refuse_update(wrap, ("weight_decay_mask", "tree of bools"), tx, params(), params())


@ways
@pytest.mark.parametrize(
    ("options", "field", "is_now"),
    [
        (dict(centered=True), "mu", "missing, but centered is on"),
        (dict(momentum=0.9), "trace", "missing, but momentum is on"),
        (dict(), "mu", "present, but centered is off"),
        (dict(centered=True), "trace", "present, but momentum is off"),
    ],
)
def test_a_state_of_other_options_is_refused(wrap, options, field, is_now):
    other = BOTH if "present" in is_now else {}
    words = (f"state.{field} is {is_now}", "other options", "init again")
    state = build(**other).init(params())
    refuse_update(wrap, words, build(**options), params(), state=state)


@ways
def test_what_is_no_state_is_refused(wrap):
    theirs = optax.rmsprop(0.1).init(params())
    for state in (theirs, theirs[0], params(), (), [build().init(params())]):
        words = ("must be an RMSPropState", type(state).__name__, "init")
        refuse_update(wrap, words, build(), params(), state=state)
    refuse_update(wrap, ("RMSPropState",), build(), build().init(params()), params())


@ways
@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (None, "must be a number or a scalar array, got None"),
        ("0.1", "must be a number or a scalar array, got '0.1'"),
        (np.ones((2,)), "[2]"),
        (-0.1, "must be in [0, inf), got -0.1"),
        (float("nan"), "must be in [0, inf), got nan"),
    ],
)
def test_a_schedule_must_return_a_number(wrap, rate, words):
    tx = build(learning_rate=lambda count: rate)
    refuse_update(wrap, ("learning_rate(count)", words), tx, params())


@ways
def test_a_schedule_must_return_a_scalar(wrap):
    tx = build(learning_rate=lambda count: jnp.stack([count, count]))
    refuse_update(wrap, ("learning_rate(count)", "int32[2]"), tx, params())
