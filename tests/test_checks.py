"""Every error names the argument or leaf, what came, what was allowed, and the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, refusal

from rmsprop_jax import rmsprop, scale_by_rms

LIMITS = dict.fromkeys(["eps", "initial_scale", "l2", "weight_decay"], "in [0, inf)")
LIMITS |= dict.fromkeys(["decay", "momentum"], "in [0, 1)")
LIMITS |= dict(learning_rate="finite")
by_name = pytest.mark.parametrize("name", LIMITS)
BOTH = dict(centered=True, momentum=0.9)
PARAMS = dict(w=jnp.ones((2, 3)), deep=[jnp.ones(3)], z=jnp.ones((), "complex64"))


def build(**options):
    return rmsprop(**{"learning_rate": 0.1, **options})


def refuse(options, *words, updates=PARAMS, params=PARAMS, state=None):
    """Expect this error of a direct update and of one under jit."""
    tx = build(**options)
    state = tx.init(PARAMS) if state is None else state
    for update in (tx.update, jax.jit(tx.update)):
        with refusal(*words):
            update(updates, state, params)


@by_name
def test_hyperparameters_outside_their_domain_are_refused(name):
    values = [np.nan, np.float32(np.inf), jnp.float32(-np.inf)]
    values += [] if name == "learning_rate" else [np.array(-0.5), jnp.bfloat16(-0.5)]
    values += [1, np.float32(0.99999999)] if name in ("decay", "momentum") else []
    for value in values:
        with refusal(f"{name} must be {LIMITS[name]}, got {float(value)}.") as caught:
            build(**{name: value})
        assert "Rounding" not in str(caught.value)


@by_name
def test_only_real_scalars_are_accepted(name):
    off = name in ("momentum", "l2", "weight_decay")
    for value in ("0.1", [0.1], *([] if off else [None])):
        with refusal(f"{name} must be a number or a scalar array", f"got {value!r}."):
            build(**{name: value})
    for value in (1j, jnp.complex64(1j), np.ones(1), jnp.ones((0, 1))):
        shown = f"{jnp.result_type(value)}{list(np.shape(value))}"
        with refusal(f"{name} must be one real number, got {shown}.", "jax.vmap"):
            build(**{name: value})
    for value in (0, 0.5, np.float64(0.5), np.float16(0.5), np.array(0.5)):
        build(**{name: value})


@pytest.mark.parametrize("name", ["decay", "momentum"])
@pytest.mark.parametrize("make", [jnp.bfloat16, jnp.dtype(jnp.bfloat16).type])
def test_rounding_to_1_is_explained(name, make):
    words = (f"{name} must be in [0, 1), got 1.0", "bfloat16", "pass float32")
    with refusal(*words, "inject_hyperparams, hyperparam_dtype=jnp.float32"):
        build(**{name: make(0.999)})


@pytest.mark.parametrize("factory", [build, scale_by_rms])
def test_contradictions_are_refused(factory):
    with refusal("bias_correction", "centered=True", "Drop one"):
        factory(bias_correction=True, centered=True)
    with refusal("bias_correction", "initial_scale=1.0", "Drop one"):
        factory(bias_correction=True, initial_scale=1.0)
    with refusal("centered must be True or False, got 0.9."):
        factory(centered=0.9)
    with refusal("bias_correction must be True or False, got None."):
        factory(bias_correction=None)
    with refusal("centered requires decay > 0, got 0", "decay above 0"):
        factory(centered=True, decay=0)
    with refusal("centered requires decay > 0, got 1e-40"):
        factory(centered=True, decay=1e-40)
    with refusal("weight_decay_mask", "weight_decay is None", "Pass weight_decay"):
        build(weight_decay_mask=True)
    with refusal("weight_decay_mask=False", "list it in static_args"):
        build(weight_decay=0.1, weight_decay_mask=False)


@pytest.mark.parametrize("name", ["nu_dtype", "momentum_dtype"])
def test_state_dtypes_that_are_not_supported_are_refused(name):
    names = "float32, float64, bfloat16" + ", uint8" * (name == "nu_dtype")
    allowed = f"{name} must be {names} or None, got"
    signed = ["uint8"] * (name == "momentum_dtype")
    for dtype in ("int8", jnp.float16, int, jnp.complex64, *signed):
        with refusal(f"{allowed} {jnp.dtype(dtype).name}."):
            build(**{name: dtype})
    for value in ("wide", 8, jnp.float32(1)):
        with refusal(f"{allowed} {value!r}.", "static_args"):
            build(**{name: value})
    for dtype in ("float64", float):
        with refusal(f"{name}=float64 needs jax.config.jax_enable_x64"):
            build(**{name: dtype})


def tree(**leaves):
    return PARAMS | leaves


COLUMN, IMAGINARY = jnp.ones((3, 1)), 1j * np.ones(3, "complex64")
WRONG = {
    "missing": (dict(w=1.0, z=1j), " must have the tree structure", "extra: nothing"),
    "extra": (tree(c=1.0), " must have the", "missing: nothing; extra: ['c']"),
    "list": ([1.0], " must", "missing: ['deep'][0], ['w'], ['z']; extra: [0]"),
    "tuple": (tree(deep=(1.0,)), " must", "types differ", "Expected list, got"),
    "deeper": (tree(w=dict(v=1.0)), "['w'] must be an array, got dict"),
    "column": (tree(deep=[COLUMN]), "['deep'][0] must have shape (3,)", "got (3, 1)"),
    "scalar": (tree(deep=[1.0]), "['deep'][0] must have shape (3,)", "got ()"),
}
WRONG_UPDATES = WRONG | {
    "integer": (tree(w=np.ones(3, int)), "['w'] must be floating point", "masked"),
    "complex": (tree(deep=[IMAGINARY]), "['deep'][0] is complex64", "float32"),
    "real": (tree(z=1.0), "['z'] is float32", "complex64", "Both must be real"),
    "broadcast": (tree(deep=[jnp.ones(1)]), "not broadcast. Reshape one of the two"),
}
WRONG_PARAMS = WRONG | {
    "none": (None, "are needed for", "update(updates, state, params)"),
    "leaf_none": (tree(w=None), "['w'] must be an array, got NoneType"),
    "masked": (tree(w=optax.MaskedNode()), "['w']", "got MaskedNode"),
}


@pytest.mark.parametrize("case", WRONG_UPDATES.values(), ids=WRONG_UPDATES)
def test_gradients_unlike_the_parameters_are_refused(case):
    updates, *words = case
    # Each has one other array to which real or complex gradients are compared.
    refuse({}, "updates", *words, updates=updates)
    for options in (dict(centered=True), dict(momentum=0.9)):
        refuse(options, "updates", *words, updates=updates, params=None)


@pytest.mark.parametrize("case", WRONG_PARAMS.values(), ids=WRONG_PARAMS)
def test_params_of_another_structure_or_shape_are_refused(case):
    params, *words = case
    for name in ("l2", "weight_decay"):
        refuse({name: 0.1}, "params", *words, params=params)
    with refusal("params['w'] must be an array, got str", "optax.masked"):
        build().init(dict(w="weights"))


def test_params_that_are_not_read_may_be_any_tree():
    tx = build()
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), dict(whole="model"))
    assert_same(updates, tx.update(PARAMS, tx.init(PARAMS))[0])


def test_a_gradient_where_init_had_none_is_refused():
    state = build().init(tree(w=None))
    refuse({}, "updates", "missing: nothing; extra: ['w']", state=state)


MASKS = {
    "missing": (dict(w=True), ""),
    "array": (dict(w=np.array([True]), deep=True, z=True), "It has array([ True])"),
    "number": (dict(w=True, deep=[1], z=True), "It has 1 at ['deep'][0]."),
    "returns_none": (lambda params: None, ""),
    "string": ("w", "It has 'w' at the top."),
}


@pytest.mark.parametrize(("mask", "words"), MASKS.values(), ids=MASKS)
def test_a_mask_unlike_the_params_is_refused(mask, words):
    options = dict(weight_decay=0.1, weight_decay_mask=mask)
    refuse(options, "weight_decay_mask must be a tree of bools", "prefix", words)


def test_a_wrong_leaf_of_params_beside_a_mask_is_named():
    everywhere = lambda params: jax.tree.map(lambda _: True, params)
    options = dict(weight_decay=0.1, weight_decay_mask=everywhere)
    words, params = "params['w'] must be an array, got dict", tree(w=dict(v=1.0))
    refuse(options, words, params=params)


@pytest.mark.parametrize("name", BOTH)
def test_a_state_of_other_options_is_refused(name):
    field = dict(centered="mu", momentum="trace")[name]
    without = {other: BOTH[other] for other in BOTH if other != name}
    for options, others, is_now in (
        (BOTH, without, f"missing, but {name} is on"),
        (without, BOTH, f"present, but {name} is off"),
    ):
        words = (f"state.{field} is {is_now}", "other options", "init again")
        refuse(options, *words, state=build(**others).init(PARAMS))


def test_objects_that_are_no_state_are_refused():
    theirs = optax.rmsprop(0.1).init(PARAMS)
    for state in (theirs, theirs[0], PARAMS, (), [build().init(PARAMS)]):
        words = ("must be an RMSPropState", type(state).__name__, "init")
        refuse({}, *words, state=state)


def test_schedules_that_return_no_finite_scalar_are_refused():
    for rate, words in (
        (None, "must be a number or a scalar array, got None"),
        (np.ones(2), "must be one real number"),
        (float("nan"), "must be finite, got nan"),
        (-np.inf, "must be finite, got -inf"),
    ):
        schedule = lambda count, rate=rate: rate
        refuse(dict(learning_rate=schedule), "learning_rate(count)", words)
