"""Errors of `interop`: each names the entry, what came, and the fix."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, refusal, to_params
from test_interop import BOTH, KERAS, STATE, TORCH, draw_params, load, save, saved

from rmsprop_jax import interop, presets

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
PARAMS, ADAM = draw_params(4), optax.adam(0.1).init(ONES)
HALF = PARAMS | dict(bias=jnp.ones(4, "float16"))


def like(params=PARAMS, **options):
    return optax.rmsprop(0.1, **BOTH | options).init(params)


def chained(**buffers):
    return optax.tree_utils.tree_set((optax.EmptyState(), like()), **buffers)


OPT_STATE, WIDE = ["opt_state"], np.ones(2, complex)
CORRECTED = like(bias_correction=True)
OF_OPTAX = [
    (OPT_STATE, ADAM, "opt_state must contain...Adam...Restore a"),
    (OPT_STATE, [{"nu": ONES}], "opt_state must contain a state of optax.rmsprop"),
    (OPT_STATE, CORRECTED, "opt_state is centered with bias_correction...Start"),
    (OPT_STATE, chained(nu=HALF), "opt_state[1][0].nu['bias'] must...float16. Average"),
    (OPT_STATE, chained(mu=WIDE), "be float32 or complex64, got complex128. Enable"),
    (["count"], 0.5, "count must be an integer in [0, 2^31), got 0.5"),
]


@pytest.mark.parametrize(
    ("kind", "path", "value", "words"),
    [
        *(("torch", ["state_dict", *path], *rest) for path, *rest in OF_TORCH),
        *(("keras", *row) for row in OF_KERAS),
        *(("tf1", *row) for row in OF_TF1),
        *(("optax", *row) for row in OF_OPTAX),
    ],
)
def test_what_does_not_fit_is_refused_on_load(kind, path, value, words):
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


PRESET = "preset must be...presets.timm if they have lr_in_momentum...got "
TO_TORCH = [
    (dict(lr=lambda _: 0.1), "lr must be a number, got <function"),
    (dict(lr=None), "lr must be a number, got None. Call a schedule"),
    (dict(centered=False), "state.mu is present, but centered is off"),
    (dict(momentum=0), "state.trace is present, but...Use those"),
    (dict(params=[], lr_in_momentum=True), f"{PRESET}torch"),
    (dict(params=[], nesterov=True), "has nesterov enabled, unlike"),
]
TREE, FLAT = "state must have the tree structure", PARAMS | dict(bias=jnp.ones((2, 2)))
WIDER = STATE._replace(trace=STATE.trace | dict(bias=COMPLEX))
TO_OPTAX = [
    (STATE, like(momentum=None), "state.trace is present, but momentum is off"),
    (STATE._replace(mu=None), like(), "state.mu is missing, but centered is on"),
    (STATE, ADAM, "like must contain a state of optax.rms"),
    (STATE, (like(),), f"{TREE}...[0]...(3, 2)"),
    (STATE, like(dict(b=ONES)), f"{TREE}...missing: [0].mu['b']"),
    (STATE, like(FLAT), "state[0].mu['bias'] must be float32[2, 2] as in"),
    (STATE, like(HALF), "like[0].mu['bias'] must be...got float16"),
    (STATE._replace(trace=HALF), like(), "state[2].trace['bias'] must...got float16"),
    (WIDER, like(), "float32[4] as in like, got complex64[4]"),
]
CALLABLE = dict(learning_rate=lambda _: 0.1)
NUMBER = "learning_rate must be a number or None, got <function...Call a"
INFINITE = STATE._replace(mu=STATE.mu | dict(bias=jnp.float32([1, np.inf])))


@pytest.mark.parametrize(
    ("kind", "state", "options", "words"),
    [
        *(("torch", STATE, *row) for row in TO_TORCH),
        *(("optax", x, dict(like=like), words) for x, like, words in TO_OPTAX),
        ("keras", STATE, CALLABLE, NUMBER),
        ("tf1", (STATE,), {}, "state must be an RMSPropState, got tuple. In the state"),
        ("tf1", INFINITE, {}, "state.mu['bias'] must be finite, got 1 of 2"),
    ],
)
def test_what_does_not_fit_is_refused_on_save(kind, state, options, words):
    with refusal(*words.split("...")):
        save(kind, state, **options)


def test_hyperparameters_of_other_presets_are_refused():
    with pytest.raises(TypeError, match="lr_in_momentum"):
        save("torch", STATE, lr_in_momentum=True)
