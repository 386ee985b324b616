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
from helpers import assert_close, from_params, scan, to_params, together, types

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


def find(run):
    """Return the optimizer and the parameters of an original that is running."""
    inside = inspect.getgeneratorlocals(run)
    return inside["optimizer"], inside["leaves"]


def slots(optimizer, leaves, options):
    names = ["rms", "mg", "momentum"] if options else ["rms"]
    return {name: [optimizer.get_slot(p, name) for p in leaves] for name in names}


def leave(optimizer, leaves, preset, options):
    """Convert the state of an original; return the transformation and the state."""
    if hasattr(optimizer, "state_dict"):
        saved = optimizer.state_dict()
        return interop.from_torch(saved, to_params, lr=schedule, preset=preset)
    if hasattr(optimizer, "get_slot"):
        saved = slots(optimizer, leaves, options)
        state = interop.from_tf1(saved, to_params, count=OUT)
        return preset(schedule, **options), state
    optimizer.save_own_variables(stored := {})
    config = optimizer.get_config()
    return interop.from_keras(stored, config, to_params, learning_rate=schedule)


def enter(optimizer, leaves, preset, options, state):
    """Convert a state back and load it into an original."""
    if hasattr(optimizer, "state_dict"):
        import torch

        (group,) = optimizer.param_groups
        before = group.copy()
        to_tensors = lambda params: list(map(torch.tensor, from_params(params)))
        saved = interop.to_torch(state, to_tensors, preset=preset, **group)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups == [before]
    elif hasattr(optimizer, "get_slot"):
        moved = interop.to_tf1(state, from_params)
        for name, variables in slots(optimizer, leaves, options).items():
            for variable, x in zip(variables, moved[name], strict=True):
                variable.assign(x)
    else:
        stored = interop.to_keras(state, from_params, learning_rate=0.0)
        optimizer.load_own_variables(stored)


# The default epsilon of TensorFlow 1 is rounded to float32.
TF1 = partial(originals.tensorflow, epsilon=1e-10)
DECOUPLED = DECAYED | dict(decoupled_decay=True, lr_in_momentum=False)
ORIGINALS = dict(
    torch=("torch", originals.torch, presets.torch, DECAYED | dict(maximize=True)),
    timm=("timm", originals.torch, presets.timm, DECAYED),
    timm_decoupled=("timm", originals.torch, presets.timm, DECOUPLED),
    sb3=("stable_baselines3", originals.torch, presets.sb3, DECAYED),
    keras=("keras", originals.keras, presets.keras, DECAYED),
    tf1=("tensorflow", TF1, presets.tf1, BOTH),
    keras_legacy=("tf_keras", originals.tensorflow, presets.keras_legacy, BOTH),
)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_run_moves_here_and_back(name, full):
    package, original, preset, options = ORIGINALS[name]
    # Not importorskip: of timm, only the optimizers need to be importable.
    if not originals.installed(package):
        pytest.skip(f"{package} is not installed")
    options = options if full else {}
    run = partial(original, package, options)
    first = from_params(draw(100))
    steps = [(from_params(draw(t)), rate) for t, rate in enumerate(RATES)]

    with originals.quiet():
        expected = list(run(first, steps))
        there = run(first, steps)
        for _ in range(OUT):
            arrays = next(there)
    tx, state = leave(*find(there), preset, options)
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
    there = run(from_params(params), [nothing, *steps[BACK:]])
    next(there)
    enter(*find(there), preset, options, state)
    for t in range(BACK, STEPS):
        assert_close(next(there), expected[t], rtol=0, atol=1e-12)


def test_complex_parameters_move_as_two_real_ones():
    torch = pytest.importorskip("torch")
    params, grads = np.random.default_rng(0).normal(size=(2, 3, 2)) @ [1, 1j]
    run = originals.torch("torch", BOTH, [params], 2 * [([grads], 0.1)])
    (params,) = map(jnp.array, next(run))
    optimizer, _ = find(run)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("square_avg", "grad_avg", "momentum_buffer"):
        saved["state"][0][name] = torch.view_as_real(saved["state"][0][name])
    tx = optax.contrib.split_real_and_imaginary(presets.torch(0.1, **BOTH))
    state = tx.init(params)
    split = jax.tree.structure(state.inner_state.nu)
    arrange = lambda x: split.unflatten([x[0][..., 0], x[0][..., 1]])
    _, inner = interop.from_torch(saved, arrange)
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


def transformations(rmsprop, core, centered_core):
    """Return the transformations of one library, alone and inside others."""
    everything = dict(centered=True, momentum=0.9, nesterov=True, eps_in_sqrt=False)
    scheduled = optax.chain(rmsprop(falling, momentum=0.9))
    inject = partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    parts = dict(x=rmsprop(0.05, initial_scale=1.0), y=rmsprop(0.05))
    return [
        rmsprop(0.05, **everything),
        inject(rmsprop)(falling, bias_correction=True),
        optax.MultiSteps(optax.chain(scheduled, optax.scale(2.0)), 2),
        optax.partition(parts, dict(real="x", complex="y")),
        optax.chain(core(), optax.scale(-0.1)),
        centered_core(),
        # It has three parts too, but is no state of optax.rmsprop.
        optax.chain(core(), optax.trace(0.9), optax.scale(-0.1)),
    ]


OPTAX = optax.rmsprop, optax.scale_by_rms, optax.scale_by_stddev
OURS = rmsprop, scale_by_rms, partial(scale_by_rms, centered=True)


def test_optax_and_this_library_exchange_states():
    real, imaginary = np.random.default_rng(0).normal(size=(2, OUT, 2, 3))
    grads = dict(real=jnp.float32(real), complex=jnp.asarray(real + 1j * imaginary))
    txs = [together(transformations(*library)) for library in (OPTAX, OURS)]
    theirs, ours = (jax.tree.map(lambda x: x[-1], scan(x, grads)[1]) for x in txs)
    like = txs[0].init(jax.tree.map(lambda g: g[0], grads))
    moved = interop.from_optax(theirs, count=OUT), interop.to_optax(ours, like)
    for found, expected in zip(moved, (ours, theirs), strict=True):
        assert types(found) == types(expected)
        # Each side rounds about ten times a step, some of them to the other side.
        assert_close(found, expected, rtol=2e-5, atol=2e-6)
