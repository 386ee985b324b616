"""Other frameworks' own optimizers go on here in mid-run, and ours in theirs.

All have the same recorded gradients, so that nothing is amplified.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
from digits import (
    HALF,
    RATES,
    RUNS,
    STEPS,
    as_list,
    as_tree,
    assert_close,
    from_params,
    need,
    recorded,
    replay,
    schedule,
    start,
    through_a_file,
    to_params,
)

from rmsprop_jax import interop, presets

pytestmark = pytest.mark.usefixtures("x64", "lenient")
DECOUPLED = dict(decoupled_decay=True, lr_in_momentum=False)
# TensorFlow has none.
NO_DECAY = {k: x for k, x in RUNS.items() if "weight_decay" not in x}
NO_DECAY |= dict(both=dict(momentum=0.9, centered=True))


class Torch:
    """A run of `torch.optim.RMSprop`, and of those with its interface."""

    package, preset = "torch", staticmethod(presets.torch)
    find = staticmethod(originals.TORCH)
    to_params, from_params = staticmethod(to_params), staticmethod(from_params)
    fixed, runs = {}, RUNS

    def __init__(self, options):
        need(self.package)
        import torch

        self.tensor, self.options = torch.tensor, options | self.fixed
        with originals.quiet():
            build = self.find()
        self.leaves = list(map(torch.tensor, self.from_params(start())))
        self.optimizer = build(self.leaves, lr=RATES[0], **self.options)

    def step(self, grads, rate):
        self.optimizer.param_groups[0]["lr"] = rate
        for p, g in zip(self.leaves, self.from_params(grads), strict=True):
            p.grad = self.tensor(g)
        self.optimizer.step()

    def params(self):
        return self.to_params([np.array(np.asarray(p)) for p in self.leaves])

    def leave(self):
        saved = through_a_file(self.optimizer.state_dict())
        more = dict(lr=schedule, preset=self.preset)
        return interop.from_torch(saved, self.to_params, **more)

    def enter(self, params, state):
        def tensors(tree):
            return list(map(self.tensor, self.from_params(tree)))

        for p, new in zip(self.leaves, tensors(params), strict=True):
            p.copy_(new)
        options = self.options | dict(preset=self.preset, lr=RATES[HALF])
        self.optimizer.load_state_dict(interop.to_torch(state, tensors, **options))


class Timm(Torch):
    package, preset = "timm", staticmethod(presets.timm)
    find = staticmethod(originals.find_timm)


class Decoupled(Timm):
    fixed = DECOUPLED


class SB3(Torch):
    package, preset = "stable_baselines3", staticmethod(presets.sb3)
    find = staticmethod(originals.SB3)


class Keras(Torch):
    package, preset = "keras", staticmethod(presets.keras)
    find = staticmethod(originals.KERAS)
    to_params, from_params = staticmethod(as_tree), staticmethod(as_list)

    def __init__(self, options):
        need(self.package)
        with originals.quiet():
            build = self.find()
            import keras
        keras.config.set_floatx("float64")
        self.leaves = list(map(keras.Variable, self.from_params(start())))
        self.optimizer = build(RATES[0], **options)
        self.optimizer.build(self.leaves)

    def step(self, grads, rate):
        self.optimizer.learning_rate = rate
        grads = list(map(jnp.asarray, self.from_params(grads)))
        self.optimizer.apply(grads, self.leaves)

    def leave(self):
        store = {}
        with warnings.catch_warnings(action="ignore"):
            # Keras converts its variables in a way that NumPy deprecates.
            config = self.optimizer.get_config()
            self.optimizer.save_own_variables(store)
        rate = dict(learning_rate=schedule)
        return interop.from_keras(store, config, self.to_params, **rate)

    def enter(self, params, state):
        for p, new in zip(self.leaves, self.from_params(params), strict=True):
            p.assign(new)
        rate = dict(learning_rate=RATES[HALF])
        store = interop.to_keras(state, self.from_params, **rate)
        self.optimizer.load_own_variables(store)


class TF1(Keras):
    """It rounds Python's numbers to float32, but not NumPy's."""

    runs = NO_DECAY

    package, preset = "tensorflow", staticmethod(presets.tf1)
    find = staticmethod(originals.TF1)

    def __init__(self, options):
        need(self.package)
        with originals.quiet():
            build = self.find()
            import tensorflow as tf
        self.tensor, self.options, self.rate = tf.constant, options, RATES[0]
        self.leaves = list(map(tf.Variable, self.from_params(start())))
        self.optimizer = build(lambda: self.exact(self.rate), **self.numbers(options))

    def numbers(self, options):
        numbers = dict(decay=0.9, momentum=0.0, epsilon=1e-10) | options
        return {k: x if x is True else self.exact(x) for k, x in numbers.items()}

    def exact(self, number):
        return np.float64(number)

    def step(self, grads, rate):
        self.rate = rate
        grads = map(self.tensor, self.from_params(grads))
        self.optimizer.apply_gradients(zip(grads, self.leaves, strict=True))

    def slots(self):
        names = ["rms"] + ["mg"] * ("centered" in self.options)
        names += ["momentum"] * ("momentum" in self.options)
        return {k: [self.optimizer.get_slot(p, k) for p in self.leaves] for k in names}

    def leave(self):
        state = interop.from_tf1(self.slots(), self.to_params, count=HALF)
        return self.preset(schedule, **self.options), state

    def enter(self, params, state):
        # The first step makes the slots.
        self.step(jax.tree.map(np.zeros_like, params), 0.0)
        moved = interop.to_tf1(state, self.from_params)
        for name, slots in self.slots().items():
            for slot, new in zip(slots, moved[name], strict=True):
                slot.assign(new)
        for p, new in zip(self.leaves, self.from_params(params), strict=True):
            p.assign(new)


class Legacy(TF1):
    """It rounds numbers to float32, but not what functions return, and not epsilon."""

    package, preset = "tf_keras", staticmethod(presets.keras_legacy)
    find = staticmethod(originals.KERAS_LEGACY)

    def numbers(self, options):
        numbers = dict(rho=0.9) | options
        return {
            k: x if x is True else lambda x=x: self.exact(x) for k, x in numbers.items()
        }

    def exact(self, number):
        return self.tensor(number, "float64")


CASES = [
    pytest.param(original, options, id=f"{original.__name__.lower()}-{name}")
    for original in (Torch, Timm, Decoupled, SB3, Keras, TF1, Legacy)
    for name, options in original.runs.items()
]


@pytest.mark.parametrize(("original", "options"), CASES)
def test_a_run_on_recorded_gradients_goes_on(original, options):
    there = original(options)
    for t, grads in enumerate(recorded()):
        if t == HALF:
            params, (tx, state) = there.params(), there.leave()
        there.step(grads, RATES[t])
    assert state.count == HALF
    assert_close(replay(tx, params, state, HALF, STEPS)[0], there.params())

    params, state = replay(tx, start(), tx.init(start()), 0, HALF)
    back = original(options)
    back.enter(jax.device_get(params), state)
    for t in range(HALF, STEPS):
        back.step(recorded()[t], RATES[t])
    assert_close(back.params(), there.params())
