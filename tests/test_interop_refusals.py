"""What `interop` refuses, with the entry, what came, and the fix in the message."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree import leaves as flat
from test_contract import assert_same
from test_interop import draw, from_params, given, kinds, load, save, to_params

from rmsprop_jax import interop, presets

# Called on the dict of a run, these spoil it.
TORCH = {
    "no_groups_entry": (
        lambda saved: saved.pop("param_groups"),
        ["state_dict must have an entry 'param_groups', got ['state']"],
    ),
    "no_state_entry": (
        lambda saved: saved.pop("state"),
        ["state_dict must have an entry 'state', got ['param_groups']"],
    ),
    "no_groups": (
        lambda saved: saved["param_groups"].clear(),
        ["state_dict['param_groups'] must have params, got none"],
    ),
    "group_is_no_dict": (
        lambda saved: saved["param_groups"].append([0]),
        ["param_groups[1] must be a dict, got list"],
    ),
    "rows_are_no_dict": (
        lambda saved: saved.update(state=[1, 2]),
        ["state_dict['state'] must be a dict, got list"],
    ),
    "row_is_no_dict": (
        lambda saved: saved["state"].update({1: [2]}),
        ["state_dict['state'][1] must be a dict, got list"],
    ),
    "row_missing": (
        lambda saved: saved["state"].pop(1),
        ["state_dict['state'] must have the entries [0, 1]; missing: [1]", "gradient"],
    ),
    "row_extra": (
        lambda saved: saved["state"].update({5: {}}),
        ["state_dict['state'] must have the entries [0, 1]", "extra: [5]"],
    ),
    "buffer_missing": (
        lambda saved: saved["state"][1].pop("grad_avg"),
        ["state_dict['state'][1] must have", "missing: ['grad_avg']", "centered"],
    ),
    "buffer_extra": (
        lambda saved: saved["param_groups"][0].update(momentum=0),
        ["state_dict['state'][0] must have", "extra: ['momentum_buffer']", "momentum"],
    ),
    "other_optimizer": (
        lambda saved: saved["param_groups"][0].update(caution=True),
        ["param_groups[0] has caution on", "torch does not do", "argument preset"],
    ),
    "scheduler_of_momentum": (
        lambda saved: saved["param_groups"][0].update(initial_lr=1, base_momentum=0.8),
        ["param_groups[0] has base_momentum", "Leave the entry out", "momentum=0.9"],
    ),
    "scheduler": (
        lambda saved: saved["param_groups"][0].update(initial_lr=0.1),
        ["param_groups[0]", "scheduler", "initial_lr", "Pass lr"],
    ),
    "groups_differ": (
        lambda saved: saved["param_groups"].append(
            saved["param_groups"][0] | dict(weight_decay=0, params=[])
        ),
        [
            "param_groups[1] has weight_decay=0",
            "but param_groups[0] has 0.01",
            "dict(state={i: state_dict['state'][i]",
            "optax.partition",
        ],
    ),
    "only_the_second_group_maximizes": (
        lambda saved: saved["param_groups"].append(
            saved["param_groups"][0]
            | dict(params=[], maximize=not saved["param_groups"][0].pop("maximize"))
        ),
        ["param_groups[1]", "maximize", "optax.partition"],
    ),
    "no_parameters": (
        lambda saved: (
            saved["param_groups"][0].update(params=[]),
            saved["state"].clear(),
        ),
        ["param_groups", "params"],
    ),
    "shape": (
        lambda saved: saved["state"][0].update(grad_avg=np.ones((3, 2), "float32")),
        [
            "['grad_avg'] must be float32[2, 3] like",
            "['square_avg'], got float32[3, 2]",
        ],
    ),
    "dtype": (
        lambda saved: saved["state"][1].update(grad_avg=np.ones(4, "complex64")),
        ["['grad_avg'] must be float32[4] like", "['square_avg'], got complex64[4]"],
    ),
} | {
    f"group_without_{name}": (
        lambda saved, name=name: saved["param_groups"][0].pop(name),
        [f"param_groups[0] must have an entry '{name}', got ["],
    )
    for name in ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "params")
}
EXTRAS = ("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor")
EXTRAS += ("gradient_accumulation_steps",)
KERAS = {
    "too_few": (
        lambda saved: saved["variables"].pop("7"),
        ["variables must be", "momentum, average_gradient", "got 7", "config"],
    ),
    "other_keys": (
        lambda saved: saved["variables"].update(x=saved["variables"].pop("7")),
        ["variables must have an entry '7', got [", "'x'"],
    ),
    "other_config": (
        lambda saved: saved["config"].update(centered=False, momentum=0),
        # All are velocities then.
        ["variables['4'] (velocity) must not be negative: it is an average of squares"],
    ),
    "schedule": (
        lambda saved: saved["config"].update(learning_rate={"class_name": "Step"}),
        ["config['learning_rate'] is a Keras schedule", "Pass learning_rate"],
    ),
}
KERAS |= {
    name: (
        lambda saved, name=name: saved["config"].update({name: 2}),
        [f"config['{name}'] must be off, got 2", "Optax has"],
    )
    for name in EXTRAS
}
KERAS |= {
    f"config_without_{name}": (
        lambda saved, name=name: saved["config"].pop(name),
        [f"config must have an entry '{name}', got ["],
    )
    for name in ("learning_rate", "rho", "momentum", "epsilon", "centered")
}
TF1 = {
    "no_rms": (
        lambda saved: saved["slots"].pop("rms"),
        ["slots must have an entry 'rms', got ['mg', 'momentum']"],
    ),
    "unknown": (
        lambda saved: saved["slots"].update(velocity=[]),
        ["slots must have the entries", "extra: ['velocity']", "Leave out momentum"],
    ),
    "unequally_many": (
        lambda saved: saved["slots"]["mg"].pop(),
        ["slots['mg'][0]", "slots['rms'][1]", "equally many"],
    ),
    "shape": (
        lambda saved: saved["slots"]["mg"].reverse(),
        ["slots['mg'][0] must be float32[2, 3] like slots['rms'][0], got float32[4]"],
    ),
}
SPOILED = [
    pytest.param(kind, *row, id=f"{kind}-{name}")
    for kind, table in dict(torch=TORCH, keras=KERAS, tf1=TF1).items()
    for name, row in table.items()
]
LEAVES = {
    "half": (np.ones((2, 3), "float16"), "float16. Half precision has lost digits"),
    "bfloat16": (jnp.ones((2, 3), "bfloat16"), "bfloat16. Half precision has lost"),
    "integer": (np.ones((2, 3), "int32"), "got int32"),
    "list": ([[1.0, 1.0, 1.0]] * 2, "got list"),
    "wide": (np.ones((2, 3)), "is float64: turn jax.config.jax_enable_x64 on, or cast"),
    "nan": (np.float32([[1, np.nan, 1]]), "must be finite, got 1 that are not, of 3"),
    "infinite": (np.float32([[np.inf, -np.inf]]), "must be finite, got 2 that are not"),
    "negative": (np.float32([[-1e-9]]), "must not be negative"),
}
STEPS = {"nan": "nan", "-1": "-1.0", "0.5": "0.5", "2147483648": "2147483648.0"}


def in_place(x):
    for leaf in flat(x):
        leaf *= 2
    return x


def first(x):
    return max(flat(x), key=np.size)


# What to_params and from_params may not do to the tree or list that they return.
SPOILERS = {
    "drops": lambda x: [first(x)],
    "doubles": lambda x: [x, first(x)],
    "drops_one_doubles_another": lambda x: [first(x), first(x).ravel()[:4]],
    "scales": lambda x: jax.tree.map(lambda leaf: 2 * leaf, x),
    "negates": lambda x: jax.tree.map(np.negative, x),
    "casts": lambda x: jax.tree.map(lambda leaf: leaf.astype("complex64"), x),
    "scales_in_place": in_place,
}


def assert_refused(kind, saved, parts, to_params=to_params):
    before = copy.deepcopy(saved)
    with pytest.raises(ValueError) as error:
        load(kind, saved, to_params)
    for part in parts:
        assert part in str(error.value)
    assert_same(saved, before)


def put(kind, saved, value):
    """Replace the first average of squares, and return what it is called."""
    if kind == "torch":
        saved["state_dict"]["state"][0]["square_avg"] = value
        return "state_dict['state'][0]['square_avg']"
    if kind == "keras":
        saved["variables"]["2"] = value
        return "variables['2'] (velocity)"
    saved["slots"]["rms"][0] = value
    return "slots['rms'][0]"


@pytest.mark.parametrize(("kind", "spoil", "parts"), SPOILED)
def test_a_spoiled_dict_is_refused_whole(kind, spoil, parts):
    saved = given(kind)
    spoil(saved.get("state_dict", saved))
    assert_refused(kind, saved, parts)


@pytest.mark.parametrize(("value", "words"), LEAVES.values(), ids=LEAVES)
@kinds
def test_a_spoiled_array_is_named(kind, value, words):
    saved = given(kind)
    assert_refused(kind, saved, [put(kind, saved, value), words])


@pytest.mark.parametrize(("count", "words"), STEPS.items(), ids=STEPS)
@kinds
def test_a_count_is_an_integer(kind, count, words):
    saved, count = given(kind), float(count)
    if kind == "torch":
        saved["state_dict"]["state"][0]["step"] = np.float32(count)
        at = "state_dict['state'][0]['step']"
    elif kind == "keras":
        saved["variables"]["0"] = np.float64(count)
        at = "variables['0'] (iteration)"
    else:
        saved["count"] = count
        at = "count"
    words = f"{at} must be an integer in [0, 2^31), got {words}"
    assert_refused(kind, saved, [words])


@pytest.mark.parametrize(
    ("kind", "argument"),
    [("torch", "state_dict"), ("keras", "config"), ("tf1", "slots")],
)
def test_what_is_no_dict_is_named(kind, argument):
    saved = given(kind) | {argument: [np.ones(2, "float32")]}
    assert_refused(kind, saved, [f"{argument} must be a dict, got list"])


@pytest.mark.parametrize("spoiler", SPOILERS.values(), ids=SPOILERS)
@kinds
def test_an_arrangement_keeps_the_elements(kind, spoiler):
    assert_refused(kind, given(kind), ["to_params"], lambda x: spoiler(to_params(x)))
    state = load(kind, given(kind))
    expected = jax.tree.map(np.array, state)
    with pytest.raises(ValueError, match="from_params"):
        save(kind, state, from_params=lambda x: flat(spoiler(from_params(x))))
    assert_same(state, expected)


@pytest.mark.parametrize("name", ["lr", "initial_lr"])
def test_groups_of_different_rates_are_not_one_under_a_schedule(name):
    saved = given("torch")
    (group,) = saved["state_dict"]["param_groups"]
    group |= dict(initial_lr=0.1, params=[0])
    saved["state_dict"]["param_groups"].append(group | {name: 0.001, "params": [1]})
    with pytest.raises(
        ValueError, match=rf"param_groups\[1\] has {name}=0.001, .*alone"
    ):
        load("torch", saved, lr=0.1)


def test_zeros_of_both_signs_may_move():
    # Where momentum decays below the smallest number, it ends so.
    momentum = np.float32([[0.0, -0.0, -0.0], [-0.0, 0.0, 0.0]])
    slots = dict(rms=[momentum**2], momentum=[momentum])
    state = interop.from_tf1(slots, lambda x: x[0].T)
    assert_same(interop.to_tf1(state, lambda x: [x.T]), slots)


@pytest.mark.parametrize("other", ["float32", "float64"])
def test_an_arrangement_does_not_cast_next_to_others(other, x64):
    v = [draw(0)[0] ** 2, draw(0, other)[1] ** 2]
    with pytest.raises(
        ValueError, match="to_params must return every element once and"
    ):
        interop.from_tf1(dict(rms=v), lambda x: [y.astype("float64") for y in x])


def test_the_message_about_an_arrangement_counts():
    words = r"was given 10 .*float32 as \[\(2, 3\), \(4,\)\], and returned 6"
    with pytest.raises(ValueError, match=words):
        load("tf1", given("tf1"), lambda x: x[0].T)


@kinds
def test_a_state_around_a_state_is_refused(kind):
    state = (load(kind, given(kind)),)
    with pytest.raises(
        ValueError, match=r"RMSPropState, got tuple\. In the state of a "
    ):
        save(kind, state)


@pytest.mark.parametrize("field", ["nu", "mu", "trace"])
@kinds
def test_a_spoiled_state_is_refused(kind, field):
    state = load(kind, given(kind))
    for value, words in ((jnp.nan, "must be finite"), (jnp.float16(1), "float16")):
        leaves = getattr(state, field) | dict(bias=jnp.asarray(value))
        with pytest.raises(ValueError, match=rf"state\.{field}\['bias'\] .*{words}"):
            save(kind, state._replace(**{field: leaves}))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            dict(lr=lambda _: 0.1),
            ValueError,
            "lr must be the current number, got a sch",
        ),
        (
            dict(centered=False),
            ValueError,
            "centered=False .* state with nu, mu, trace",
        ),
        (dict(momentum=0), ValueError, "momentum=0.0 do not fit .* Pass the numbers"),
        (dict(decay=0.9), TypeError, "decay"),
        (dict(preset=presets.sb3, maximize=True), TypeError, "maximize"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, error, words):
    state = load("torch", given("torch"))
    numbers = dict(lr=0.1, centered=True, momentum=0.9) | options
    with pytest.raises(error, match=words):
        interop.to_torch(state, from_params, **numbers)


def test_momentum_in_the_place_of_the_mean_is_noticed():
    slots = dict(rms=[np.ones(2, "float32")], mg=[np.full(2, 3.0, "float32")])
    with pytest.raises(ValueError, match=r"slots\['mg'\]\[0\] .* Is it the momentum"):
        interop.from_tf1(slots, list)


def test_the_dict_of_another_optimizer_is_noticed():
    saved = given("torch")["state_dict"]
    with pytest.raises(ValueError, match=r"those of presets\.torch.*is timm.*Leave"):
        load("torch", dict(state_dict=saved), preset=presets.timm)
    del saved["param_groups"][0]["maximize"]
    with pytest.raises(ValueError, match=r"neither maximize.*presets\.sb3"):
        load("torch", dict(state_dict=saved))


def test_an_array_in_the_place_of_a_list_is_noticed():
    with pytest.raises(ValueError, match=r"slots\['rms'\] must be a list .* ndarray"):
        interop.from_tf1(dict(rms=np.ones((2, 3), "float32")), list)


def test_lr_is_needed_for_torch():
    state = load("torch", given("torch"))
    with pytest.raises(ValueError, match="lr must be the current number, got none"):
        interop.to_torch(state, from_params, momentum=0.9, centered=True)
    with pytest.raises(ValueError, match=r"preset must be .* got keras"):
        interop.to_torch(state, from_params, preset=presets.keras)


def test_a_step_count_that_is_no_number_is_named():
    with pytest.raises(ValueError, match=r"variables\['0'\] \(iteration\) must be an"):
        values = [np.ones((2, 3), "float32")] * 4
        load(
            "keras", given("keras", momentum=0, centered=False) | {"variables": values}
        )
