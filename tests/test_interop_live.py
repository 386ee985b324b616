"""Runs move from the optimizers of other frameworks here in mid-training, and back."""

import copy
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import originals
import pytest
from helpers import assert_close, from_params, to_params, types

from rmsprop_jax import interop, presets, rmsprop, scale_by_rms

pytestmark = [
    pytest.mark.usefixtures("x64", "lenient"),
    # Keras converts its variables in a way that NumPy deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
OUT, BACK, STEPS = 10, 20, 30
# Exact in float32, in which Keras stores it.
RATES = [2.0 ** (-7 - t // 7) for t in range(STEPS)]
BOTH = dict(momentum=0.9, centered=True)
DECAYED = BOTH | dict(weight_decay=0.01)


def schedule(count):
    return RATES[count]


def draw(seed):
    random = np.random.default_rng(seed)
    return dict(kernel=random.normal(size=(2, 3)), bias=random.normal(size=4))


def torch_list(params):
    import torch

    return list(map(torch.tensor, from_params(params)))


def from_torch(preset, optimizer, **inside):
    saved = optimizer.state_dict()
    return interop.from_torch(saved, to_params, lr=schedule, preset=preset)


def to_torch(state, preset, optimizer, **inside):
    (group,) = optimizer.param_groups
    before = group.copy()
    saved = interop.to_torch(state, torch_list, preset=preset, **group)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups == [before]


def from_keras(preset, optimizer, **inside):
    stored = {}
    optimizer.save_own_variables(stored)
    config = optimizer.get_config()
    return interop.from_keras(stored, config, to_params, learning_rate=schedule)


def to_keras(state, preset, optimizer, **inside):
    stored = interop.to_keras(state, from_params, learning_rate=0.0)
    optimizer.load_own_variables(stored)


def slots(optimizer, leaves, options):
    names = dict(mg="centered", momentum="momentum")
    names = ["rms", *(name for name, option in names.items() if option in options)]
    return {name: [optimizer.get_slot(p, name) for p in leaves] for name in names}


def from_tf1(preset, optimizer, leaves, options, **inside):
    state = interop.from_tf1(slots(optimizer, leaves, options), to_params, count=OUT)
    return preset(schedule, **{k: BOTH[k] for k in BOTH if k in options}), state


def to_tf1(state, preset, optimizer, leaves, options, **inside):
    moved = interop.to_tf1(state, from_params)
    for name, variables in slots(optimizer, leaves, options).items():
        for variable, x in zip(variables, moved[name], strict=True):
            variable.assign(x)


TORCH = originals.torch, from_torch, to_torch
KERAS = originals.keras, from_keras, to_keras
TF_KERAS = originals.tensorflow, from_tf1, to_tf1
# Its default is rounded to float32.
TF1 = partial(originals.tensorflow, epsilon=1e-10), from_tf1, to_tf1
DECOUPLED = DECAYED | dict(decoupled_decay=True, lr_in_momentum=False)
ORIGINALS = dict(
    torch=("torch", presets.torch, DECAYED | dict(maximize=True), TORCH),
    timm=("timm", presets.timm, DECAYED, TORCH),
    timm_decoupled=("timm", presets.timm, DECOUPLED, TORCH),
    sb3=("stable_baselines3", presets.sb3, DECAYED, TORCH),
    keras=("keras", presets.keras, DECAYED, KERAS),
    tf1=("tensorflow", presets.tf1, BOTH, TF1),
    keras_legacy=("tf_keras", presets.keras_legacy, BOTH, TF_KERAS),
)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_run_moves_here_and_back(name, full):
    package, preset, options, (run, leave, enter) = ORIGINALS[name]
    # Not importorskip: of timm, only the optimizers need to be importable.
    if not originals.installed(package):
        pytest.skip(f"{package} is not installed")
    options = options if full else {}
    first = from_params(draw(100))
    steps = [(from_params(draw(t)), rate) for t, rate in enumerate(RATES)]

    with originals.quiet():
        expected = list(run(package, options, first, steps))
        there = run(package, options, first, steps)
        for _ in range(OUT):
            arrays = next(there)
    tx, state = leave(preset, **inspect.getgeneratorlocals(there))
    params = to_params(arrays)
    for t in range(OUT, BACK):
        grads = jax.tree.map(jnp.asarray, draw(t))
        updates, state = tx.update(grads, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        # Each side rounds about ten times a step, by 2e-16 of numbers around 1.
        assert_close(from_params(params), expected[t], rtol=0, atol=1e-12)
    assert state.count == BACK

    # A first step of rate 0 creates the state that is replaced.
    nothing = [np.zeros_like(x) for x in first], 0.0
    there = run(package, options, from_params(params), [nothing, *steps[BACK:]])
    next(there)
    enter(state, preset, **inspect.getgeneratorlocals(there))
    for t in range(BACK, STEPS):
        assert_close(next(there), expected[t], rtol=0, atol=1e-12)


def test_complex_parameters_move_as_two_real_ones():
    torch = pytest.importorskip("torch")
    params, grads = np.random.default_rng(0).normal(size=(2, 3, 2)) @ [1, 1j]
    run = originals.torch("torch", BOTH, [params], 2 * [([grads], 0.1)])
    (params,) = map(jnp.array, next(run))
    optimizer = inspect.getgeneratorlocals(run)["optimizer"]
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("square_avg", "grad_avg", "momentum_buffer"):
        saved["state"][0][name] = torch.view_as_real(saved["state"][0][name])
    tx = optax.contrib.split_real_and_imaginary(presets.torch(0.1, **BOTH))
    state = tx.init(params)
    split = jax.tree.structure(state.inner_state.nu)
    _, inner = interop.from_torch(
        saved, lambda x: split.unflatten([x[0][..., 0], x[0][..., 1]])
    )
    updates, state = tx.update(grads, state._replace(inner_state=inner), params)
    np.testing.assert_allclose(params + updates, next(run)[0], rtol=1e-14)


def test_a_saved_keras_file_has_the_variables_of_the_optimizer(tmp_path):
    with originals.quiet():
        keras = pytest.importorskip("keras")
    h5py = pytest.importorskip("h5py")
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(4)])
    optimizer = keras.optimizers.RMSprop(0.5, **DECAYED)
    model.compile(optimizer)
    optimizer.apply([np.ones((3, 4)), np.ones(4)], model.trainable_variables)
    model.save_weights(tmp_path / "model.weights.h5")
    config = optimizer.get_config()
    _, state = interop.from_keras(optimizer.variables, config, list)
    assert (state.count, state.nu[0].shape) == (1, (3, 4))
    with h5py.File(tmp_path / "model.weights.h5") as file:
        _, saved = interop.from_keras(file["optimizer/vars"], config, list)
    jax.tree.map(np.testing.assert_array_equal, saved, state)


def falling(count):
    return 0.05 * (1 - count / 40)


def transformations(rmsprop, scale_by_rms, scale_by_stddev):
    """Return the transformations of one library, alone and inside others."""
    everything = dict(centered=True, momentum=0.9, nesterov=True, eps_in_sqrt=False)
    scheduled = rmsprop(falling, momentum=0.9)
    inject = partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    labels = dict(real="x", complex="y")
    parts = dict(x=rmsprop(0.05, initial_scale=1.0), y=rmsprop(0.05))
    return dict(
        everything=rmsprop(0.05, **everything),
        bias_correction=inject(rmsprop)(falling, bias_correction=True),
        chain=optax.MultiSteps(
            optax.chain(optax.chain(scheduled), optax.scale(2.0)), 2
        ),
        partition=optax.partition(parts, labels),
        core_before_another=optax.chain(scale_by_rms(), optax.scale(-0.1)),
        centered_core=scale_by_stddev(),
        # It has three parts too, but is no state of optax.rmsprop.
        core_in_chain=optax.chain(scale_by_rms(), optax.trace(0.9), optax.scale(-0.1)),
    )


OPTAX = optax.rmsprop, optax.scale_by_rms, optax.scale_by_stddev
OURS = rmsprop, scale_by_rms, partial(scale_by_rms, centered=True)


@partial(jax.jit, static_argnums=0)
def states(library, grads):
    """Return the states of all transformations before and after some steps."""

    def step(states, grads):
        return {k: txs[k].update(grads, x)[1] for k, x in states.items()}, None

    txs = transformations(*library)
    params = jax.tree.map(lambda g: g[0], grads)
    first = {name: tx.init(params) for name, tx in txs.items()}
    return first, jax.lax.scan(step, first, grads)[0]


def test_optax_and_this_library_exchange_states():
    real, imaginary = np.random.default_rng(0).normal(size=(2, OUT, 2, 3))
    grads = dict(real=jnp.float32(real), complex=jnp.asarray(real + 1j * imaginary))
    (like, theirs), (_, ours) = states(OPTAX, grads), states(OURS, grads)
    moved = interop.from_optax(theirs, count=OUT), interop.to_optax(ours, like)
    for found, expected in zip(moved, (ours, theirs), strict=True):
        assert types(found) == types(expected)
        # Each side rounds about ten times a step, some of them to the other side.
        assert_close(found, expected, rtol=2e-5, atol=2e-6)
