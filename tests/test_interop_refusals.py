"""Errors of `interop`: each names the entry, what came, and the fix."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, refusal, to_params
from test_interop import KERAS, STATE, TORCH, load, save, saved

from rmsprop_jax import interop, presets, rmsprop

GONE = object()


def put(given, path, value):
    """Replace the entry at a path, append it to a list, or remove it if it is GONE."""
    *parents, last = path
    for key in parents:
        given = given[key]
    if value is GONE:
        del given[last]
    elif isinstance(given, list):
        given[last : last + 1] = [value]
    else:
        given[last] = value


def assert_refused(kind, given, words, to_params=to_params, **options):
    before = copy.deepcopy(given)
    with refusal(*words.split("...")):
        load(kind, given, to_params, **options)
    assert_same(given, before)


AT, GROUP = "state_dict['state']", TORCH | dict(maximize=False, params=[0, 1])
FIRST, SECOND = ("param_groups", 0), ("param_groups", 1)
ONES, COMPLEX = np.ones((3, 2), "float32"), np.ones(4, "complex64")
REQUIRED = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "params")
OF_TORCH = [
    (FIRST[:1], GONE, "state_dict must have...missing: ['param_groups']"),
    (["state"], GONE, "state_dict must have...missing: ['state']"),
    (["state"], [], f"{AT} must be a dict, got list"),
    (["param_groups"], [], "state_dict['param_groups'] must have params, got none"),
    ((*FIRST, "params"), [], "state_dict['param_groups'] must have params, got none"),
    (["state", 1], GONE, f"{AT} must have the entries [0, 1]; missing: [1]...params"),
    (["state", 5], {}, f"{AT} must have the entries [0, 1]...extra: [5]"),
    (["state", 1, "step"], GONE, f"{AT}[1] must have...missing: ['step']"),
    (["state", 1, "grad_avg"], GONE, f"{AT}[1] must...missing: ['grad_avg']...match"),
    ((*FIRST, "momentum"), 0, f"{AT}[0] must...extra: ['momentum_buffer']...match"),
    ((*FIRST, "caution"), True, "[0] has caution enabled...pass its preset"),
    ((*FIRST, "maximize"), GONE, "preset must be...presets.sb3 for...got None"),
    ((*FIRST, "base_momentum"), 1, "[0] has base_momentum...to resume with 0.6"),
    ((*FIRST, "initial_lr"), 1, "param_groups[0] has initial_lr...scheduler...Pass lr"),
    (SECOND, GROUP | dict(alpha=0.5), "[1] has alpha=0.5, but...has 0.7...partition"),
    (["state", 0, "grad_avg"], ONES, f"[2, 3] like {AT}[0]['square_avg'], got"),
    (["state", 0, "grad_avg"], 9 * ONES.T, f"{AT}[0]['grad_avg'] must have squares..."),
    (["state", 1, "square_avg"], COMPLEX, "got complex64. PyTorch...split_real_and"),
    (["state", 0, "step"], 0.5, f"{AT}[0]['step'] must be an integer"),
    *(
        ((*FIRST, name), GONE, f"param_groups[0] must have...missing: ['{name}'")
        for name in REQUIRED
    ),
]
ORDER = "iteration, learning_rate, then velocity, momentum, average_gradient of each"
OFF = ("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor")
OFF += ("gradient_accumulation_steps",)
CONFIG = {k: x for k, x in KERAS.items() if k != "weight_decay"}
# With which all variables are taken for velocities.
PLAIN_CONFIG = CONFIG | dict(centered=False, momentum=0)
OF_KERAS = [
    (["variables", "7"], GONE, f"{ORDER} parameter, got 7 in all. Pass the config"),
    (["variables"], [7, 0.1], "got 2 in all"),
    (["variables"], dict.fromkeys("12345678", ONES), "variables must...missing: ['0']"),
    (["config"], PLAIN_CONFIG, "variables['4'] (velocity) must not be negative"),
    (["config", "learning_rate"], {}, "['learning_rate'] is a Keras schedule. Pass"),
    (["variables", "0"], 0.5, "variables['0'] (iteration) must be an integer"),
    *((["config", k], GONE, f"config must have...missing: ['{k}']") for k in CONFIG),
    *((["config", k], 2, f"config['{k}'] must be off, got 2. Chain") for k in OFF),
]
RMS = ["slots", "rms", 0]
OF_TF1 = [
    (["slots", "rms"], GONE, "slots must have...missing: ['rms']"),
    (["slots", "velocity"], [], "slots must have...extra: ['velocity']. Remove"),
    (["slots", "mg", 1], GONE, "slots must have lists...'rms': 2...'mg': 1"),
    (["slots"], dict(rms=ONES), "slots must have lists...'rms': 'ndarray'"),
    (
        RMS,
        jnp.ones(3, "bfloat16"),
        "['rms'][0] must be float32, got bfloat16. Averages",
    ),
    (RMS, [1.0, 1.0], "must be float32, got list"),
    (RMS, np.ones(3), "must be float32, got float64. Enable jax.config.jax_enable_x64"),
    (RMS, np.float32([1, np.nan, 1]), "must be finite, got 1 of 3 elements that are"),
    *(
        (["count"], value, f"count must be an integer in [0, 2^31), got {value}")
        for value in ("seven", -1.0, 0.5, 2.0**31, [1, 2])
    ),
]


@pytest.mark.parametrize(
    ("kind", "path", "value", "words"),
    [
        *(("torch", ["state_dict", *path], *rest) for path, *rest in OF_TORCH),
        *(("keras", *row) for row in OF_KERAS),
        *(("tf1", *row) for row in OF_TF1),
    ],
)
def test_a_broken_dict_is_refused(kind, path, value, words):
    given = saved(kind)
    put(given, path, value)
    assert_refused(kind, given, words)


def test_groups_and_presets_that_do_not_fit_are_refused():
    given, path = saved("torch"), ["state_dict", "param_groups"]
    assert_refused("torch", given, "preset must be...got timm", preset=presets.timm)
    put(given, ["state_dict", "state", 1], GONE)
    assert_refused("torch", given, "params[1] must be float32", params={1: [1.0]})
    put(given, path, [TORCH | dict(params=[0, 1])])
    assert_refused("torch", given, "preset must be...got keras", preset=presets.keras)
    for name in ("lr", "initial_lr"):
        group = GROUP | dict(initial_lr=0.1)
        put(given, path, [group, group | {name: 0.001}])
        words = f"[1] has {name}=0.001...optax.partition"
        assert_refused("torch", given, words, lr=0.1)


# What to_params and from_params must not do to the arrays that they return.
CHANGES = dict(
    drop=lambda x: [x["kernel"]],
    repeat=lambda x: [x["kernel"], x["kernel"].ravel()[:4]],
    negate_in_place=lambda x: [np.negative(leaf, out=leaf) for leaf in x.values()],
)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_arrangement_must_keep_the_elements(change):
    words, before = "must return every element once", jax.tree.map(np.array, STATE)
    arrange = lambda x: change(to_params(x))
    assert_refused("tf1", saved("tf1"), f"to_params {words}", arrange)
    with refusal(f"from_params {words} and unchanged, got"):
        save("tf1", STATE, lambda x: jax.tree.leaves(change(x)))
    assert_same(STATE, before)


def test_dtypes_must_not_change(x64):
    slots = dict(rms=[np.ones((2, 3), "float32"), np.ones(4, "float64")])
    with refusal("to_params must return every element once and unchanged, got"):
        interop.from_tf1(slots, lambda x: [y.astype("float64") for y in x])
    with refusal("to_params(...)[0] must be float32 or float64, got float16"):
        interop.from_tf1(slots, lambda x: [y.astype("float16") for y in x])
    slots = dict(rms=[np.ones(4, "float64")], momentum=[np.ones(4, "float32")])
    with refusal("slots['momentum'][0] must be float64[4] like slots['rms'][0], got"):
        interop.from_tf1(slots, list)


def test_a_state_that_does_not_fit_is_refused():
    with refusal("state must be an RMSPropState, got tuple. In the state of a chain"):
        save("tf1", (STATE,))
    mu = STATE.mu | dict(bias=jnp.float32([1, np.inf]))
    with refusal("state.mu['bias'] must be finite, got 1 of 2"):
        save("tf1", STATE._replace(mu=mu))


PRESET = "preset must be...presets.timm if they have lr_in_momentum...got "


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(lr=lambda _: 0.1), "lr must be a number, got <function"),
        (dict(lr=None), "lr must be a number, got None. Call a schedule"),
        (dict(centered=False), "state.mu is present, but centered is off"),
        (dict(momentum=0), "state.trace is present, but...Use those"),
        (dict(params=[], lr_in_momentum=True), f"{PRESET}torch"),
        (dict(params=[], nesterov=True), "has nesterov enabled, unlike"),
    ],
)
def test_hyperparameters_that_do_not_fit_are_refused(options, words):
    with refusal(*words.split("...")):
        save("torch", STATE, **options)


def test_hyperparameters_of_other_presets_are_refused():
    with pytest.raises(TypeError, match="lr_in_momentum"):
        save("torch", STATE, lr_in_momentum=True)


def test_keras_takes_the_current_rate():
    with refusal("learning_rate must be a number or None, got <function", "Call a"):
        interop.to_keras(STATE, list, learning_rate=lambda _: 0.1)


PARAMS = dict(w=jnp.ones((2, 3)))
PLAIN, MOMENTUM = optax.rmsprop(0.1), optax.rmsprop(0.1, momentum=0.9)
CENTERED = optax.rmsprop(0.1, centered=True)
CORRECTED = optax.rmsprop(0.1, centered=True, bias_correction=True)
CORE, *REST = PLAIN.init(PARAMS)
HALF = jnp.ones((2, 3), "float16")


def with_nu(x):
    return optax.EmptyState(), (CORE._replace(nu=dict(w=x)), *REST)


@pytest.mark.parametrize(
    ("opt_state", "words"),
    [
        (optax.adam(0.1).init(PARAMS), "opt_state must contain...Adam...Restore a"),
        ([{"nu": jnp.ones(2)}], "opt_state must contain a state of optax.rmsprop"),
        (CORRECTED.init(PARAMS), "opt_state is centered with bias_correction...Start"),
        (with_nu(HALF), "opt_state[1][0].nu['w'] must...float16. Averages"),
        (with_nu(np.ones(2, complex)), "be float32 or complex64, got complex128. En"),
    ],
)
def test_an_optax_state_that_does_not_fit_is_refused(opt_state, words):
    with refusal(*words.split("...")):
        interop.from_optax(opt_state)


LIKE = MOMENTUM.init(PARAMS)
STRUCTURE = "state must have the tree structure"


@pytest.mark.parametrize(
    ("like", "change", "words"),
    [
        (PLAIN.init(PARAMS), {}, "state.trace is present, but momentum is off"),
        (CENTERED.init(PARAMS), {}, "state.mu is missing, but centered is on"),
        (optax.adam(0.1).init(PARAMS), {}, "like must contain a state of optax.rms"),
        (optax.chain(MOMENTUM).init(PARAMS), {}, f"{STRUCTURE}...[0]...(2, 3)"),
        (MOMENTUM.init(dict(b=PARAMS["w"])), {}, f"{STRUCTURE}...missing: [0].nu['b']"),
        (MOMENTUM.init(dict(w=jnp.ones(6))), {}, "state[0].nu['w'] must be float32[6]"),
        (MOMENTUM.init(dict(w=HALF)), {}, "like[0].nu['w'] must be...got float16"),
        (LIKE, dict(trace=np.float16(1)), "state[2].trace['w'] must...got float16"),
        (LIKE, dict(trace=1j), "float32[2, 3] as in like, got complex64[2, 3]"),
    ],
)
def test_a_state_that_does_not_fit_like_is_refused(like, change, words):
    change = {k: dict(w=jnp.full((2, 3), x)) for k, x in change.items()}
    state = rmsprop(0.1, momentum=0.9).init(PARAMS)._replace(**change)
    with refusal(*words.split("...")):
        interop.to_optax(state, like)
