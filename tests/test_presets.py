"""The presets, without the frameworks whose RMSProp they reproduce."""

import inspect
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
from helpers import SMALL, assert_close, halving, normal, scan, together

from rmsprop_jax import RMSPropState, presets, rmsprop

CASES = json.loads(parity.GOLDEN.read_text())["cases"]
PRESETS = {name: getattr(presets, name) for name in presets.__all__}
SIGNATURES = dict(
    torch="lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0, centered=False, "
    "*, maximize=False",
    tf1="learning_rate, decay=0.9, momentum=0.0, epsilon=1e-10, *, centered=False",
    keras="learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-07, centered=False, "
    "weight_decay=None, *, weight_decay_mask=None",
    keras_legacy="learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-07, "
    "centered=False, *",
    timm="lr=0.01, alpha=0.9, eps=1e-10, weight_decay=0, momentum=0.0, centered=False, "
    "decoupled_decay=False, *, lr_in_momentum=True",
    sb3="lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0, centered=False, *",
    graves="learning_rate=0.0001, *",
    dqn="learning_rate=0.00025, eps=0.01, *",
    a3c="learning_rate=0.0007, *",
    impala="learning_rate=0.00048, *",
    inception="learning_rate, *",
    efficientnet="learning_rate, *",
)
MASK = dict(weight_decay_mask=[True, False])
TORCH = dict(eps_in_sqrt=False, lr_in_momentum=False)
TF1, SB3 = dict(initial_scale=1.0), dict(initial_scale=1.0, lr_in_momentum=False)
ALL = dict(decay=0.2, eps=0.3, momentum=0.5, centered=True)
TERMS = ("momentum", "weight_decay")
L2, DECOUPLED = dict(l2=0.4), dict(weight_decay=0.4)
# Presets, arguments after the learning rate, and the options of `rmsprop` that they
# must change from its defaults.
CALLS = [
    (presets.torch, (), dict(decay=0.99) | TORCH),
    (presets.torch, (0.2, 0.3, 0.4, 0.5, True), ALL | L2 | TORCH),
    (presets.tf1, (), dict(eps=1e-10) | TF1),
    (partial(presets.tf1, centered=True), (0.2, 0.5, 0.3), ALL | TF1),
    (partial(presets.keras, **MASK), (), dict(eps=1e-7)),
    (
        partial(presets.keras, **MASK),
        (0.2, 0.5, 0.3, True, 0.4),
        ALL | DECOUPLED | MASK,
    ),
    (presets.keras_legacy, (), dict(eps=1e-7, eps_in_sqrt=False)),
    (presets.keras_legacy, (0.2, 0.5, 0.3, True), ALL),
    (presets.timm, (), dict(eps=1e-10) | TF1),
    (presets.timm, (0.2, 0.3, 0.4, 0.5, True), ALL | L2 | TF1),
    (presets.timm, (0.2, 0.3, 0.4, 0.5, True, True), ALL | DECOUPLED | TF1),
    (partial(presets.timm, lr_in_momentum=False), (), dict(eps=1e-10) | SB3),
    (presets.sb3, (), dict(decay=0.99) | SB3),
    (presets.sb3, (0.2, 0.3, 0.4, 0.5, True), ALL | L2 | SB3),
    (presets.graves, (), dict(decay=0.95, eps=1e-4, momentum=0.9, centered=True)),
    (presets.dqn, (), dict(decay=0.95, eps=0.01, centered=True)),
    (presets.dqn, (0.3,), dict(decay=0.95, eps=0.3, centered=True)),
    (presets.a3c, (), dict(decay=0.99, eps=0.1)),
    (presets.impala, (), dict(decay=0.99, eps=0.1) | TF1),
    (presets.inception, (), dict(momentum=0.9, eps=1.0) | TF1),
    (presets.efficientnet, (), dict(momentum=0.9, eps=1e-3) | TF1),
]
every = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


@pytest.fixture
def record(monkeypatch):
    """Return `rmsprop`, also in presets, so that it lists the options of its calls."""
    signature = inspect.signature(rmsprop)

    def record(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        record.calls.append(dict(bound.arguments))
        return rmsprop(*args, **kwargs)

    record.calls = []
    for module in (presets.frameworks, presets.papers):
        monkeypatch.setattr(module, "rmsprop", record)
    return record


def label(case):
    options = "-".join(f"{k}={x}" for k, x in case["options"].items())
    return f"{case['preset']}-{case['beside']}-{case['dtype']}-{options}"


@pytest.mark.parametrize(
    ("preset", "dtype"), sorted({(x["preset"], x["dtype"]) for x in CASES})
)
def test_preset_takes_the_golden_steps_of_its_original(preset, dtype, lenient):
    cases = [x for x in CASES if (x["preset"], x["dtype"]) == (preset, dtype)]
    build = PRESETS.get(preset, rmsprop)
    paths = parity.run(build, [case["options"] for case in cases], dtype)
    for case, path in zip(cases, paths, strict=True):
        found = parity.kept(path)
        assert list(found) == list(case["params"]) == ["1", "75", "76", "150"]
        for step, expected in case["params"].items():
            # As in parity.tolerance.
            np.testing.assert_allclose(
                found[step], expected, rtol=0, atol=1e-12, err_msg=label(case)
            )


def test_golden_numbers_are_of_all_cases():
    cases = [{k: x for k, x in case.items() if k != "params"} for case in CASES]
    assert cases == [case for _, case in parity.golden_cases()]
    assert {case["preset"] for case in CASES} == {*PRESETS, "rmsprop"}


def test_golden_numbers_tell_every_algorithm_from_the_others(record):
    for case in CASES:
        options = case["options"]
        PRESETS.get(case["preset"], record)(0.1, **options)
        record.calls[-1] |= dict(maximize=options.get("maximize", False))
        if record.calls[-1]["momentum"] is None:
            record.calls[-1] |= dict(nesterov=False, lr_in_momentum=True)
    ends = [np.array(case["params"]["150"]) for case in CASES]
    for i, j in itertools.combinations(range(len(CASES)), 2):
        if ends[i].shape == ends[j].shape:
            # A thousand times the tolerance of the golden numbers.
            differ = np.abs(ends[i] - ends[j]).max() > 1e-9
            other = record.calls[i] != record.calls[j]
            assert differ == other, (label(CASES[i]), label(CASES[j]))


@every
def test_arguments_and_defaults_are_frozen(preset):
    found = inspect.signature(preset)
    bare = [x.replace(annotation=x.empty) for x in found.parameters.values()]
    found = found.replace(parameters=bare, return_annotation=found.empty)
    dtypes = "nu_dtype=None, momentum_dtype=None"
    assert str(found) == f"({SIGNATURES[preset.__name__]}, {dtypes})"


@pytest.mark.parametrize(("preset", "args", "expected"), CALLS)
def test_preset_chooses_these_options_of_rmsprop(preset, args, expected, record):
    # A negative learning rate, for gradient ascent, is passed on too.
    expected = expected | dict(learning_rate=-0.1) | SMALL
    tx = preset(-0.1, *args, **SMALL)
    (found,) = record.calls
    default = {k: x.default for k, x in inspect.signature(rmsprop).parameters.items()}
    assert {k: x for k, x in found.items() if x != default[k]} == expected
    assert type(tx) is optax.GradientTransformationExtraArgs
    assert type(tx.init(jnp.ones(3))) is RMSPropState


@every
def test_an_unknown_argument_is_named_beside_those_that_are_known(preset):
    known = ", ".join(inspect.signature(preset).parameters)
    for unknown in ("foreach", "nesterov", "use_locking", "clipnorm"):
        name = f"presets.{preset.__name__}"
        with pytest.raises(TypeError, match=rf"{name}\(\).*'{unknown}'.* {known}\."):
            preset(0.1, **{unknown: True})


@pytest.mark.parametrize(
    "zero", [0, 0.0, np.float32(0), np.int64(0)], ids=lambda x: type(x).__name__
)
def test_zero_turns_a_term_off_but_an_array_does_not(zero, record):
    array = jnp.float32(zero)
    for (name, preset), term in itertools.product(PRESETS.items(), TERMS):
        if f"{term}=" in SIGNATURES[name]:
            preset(0.1, **{term: zero})
            preset(0.1, **{term: array})
            off, on = ([x[k] for k in (*TERMS, "l2")] for x in record.calls[-2:])
            assert off == [None, None, None] and any(x is array for x in on)
    presets.timm(0.1, weight_decay=zero, decoupled_decay=True)
    assert record.calls[-1]["weight_decay"] is None


@pytest.mark.parametrize("epsilon", [None, 0, 0.0, np.float32(0), 1e-7])
def test_keras_legacy_never_has_an_epsilon_of_zero(epsilon, record):
    # Momentum moves it into the square root, also in an array of 0.
    for momentum, inside in ((0.0, False), (0.9, True), (jnp.float32(0), True)):
        presets.keras_legacy(0.1, epsilon=epsilon, momentum=momentum)
        found = record.calls[-1]
        assert (found["eps"], found["eps_in_sqrt"]) == (1e-7, inside)


def test_an_injected_learning_rate_can_change_between_steps(lenient):
    txs = []
    for name, preset in PRESETS.items():
        lr = next(iter(inspect.signature(preset).parameters))
        # Injected, momentum is an array: on, even if it is 0.
        more = dict(momentum=jnp.float32(0)) if "momentum=" in SIGNATURES[name] else {}
        txs += [optax.inject_hyperparams(preset)(**{lr: halving})]
        txs += [preset(halving, **more)]
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    updates, _ = scan(together(txs), grads, grads)
    for name, found, expected in zip(PRESETS, updates[::2], updates[1::2], strict=True):
        assert_close(found, expected, rtol=1e-5, err_msg=name)


def test_maximize_lets_missing_gradients_and_extra_arguments_pass():
    params = normal(0) | dict(step=jnp.arange(2), left=optax.MaskedNode())
    missing = dict(step=np.zeros(2, jax.dtypes.float0), left=optax.MaskedNode())
    tx = presets.torch(0.1, maximize=True)
    grads = normal(1) | missing | dict(scalar=None)
    updates, _ = tx.update(grads, tx.init(params), params, value=0.5)
    assert updates["scalar"] is None and updates["left"] == optax.MaskedNode()
    assert updates["step"].dtype == jax.dtypes.float0
    assert (updates["matrix"] * grads["matrix"] > 0).all()
