"""The RMSProp of every framework and paper, behind one interface.

An original is a function of options, parameters (a list of arrays), gradients and
learning rates (one of each a step). It yields the parameters after each step.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import sys
import types
import warnings

# Read when JAX, Keras and TensorFlow are imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
import optax


def installed(package):
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def quiet():
    """Keep what frameworks say from the screen, and let those on JAX promote."""
    with (
        open(os.devnull, "w") as nowhere,
        os.fdopen(os.dup(2), "w") as screen,
        warnings.catch_warnings(action="ignore"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        # TensorFlow writes past sys.stderr.
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen.fileno(), 2)


def transformation(build, options, params, grads, rates):
    """Run an Optax transformation, of Optax or of rmsprop_jax."""
    rates = jnp.asarray(rates)
    tx = build(lambda count: rates[count], **options)
    params = [jnp.asarray(p) for p in params]
    state = tx.init(params)

    @jax.jit
    def step(params, state, gs):
        updates, state = tx.update(gs, state, params)
        return optax.apply_updates(params, updates), state

    for gs in grads:
        params, state = step(params, state, gs)
        yield params


optax_rmsprop = functools.partial(transformation, optax.rmsprop)


def find(module, name):
    """Return a function that imports the optimizer: `import torch` takes seconds."""
    return lambda: getattr(importlib.import_module(module), name)


def find_timm():
    # As empty packages: the real ones import timm's models, and these a torchvision
    # which must be of the same build as PyTorch. The optimizer needs neither.
    folder = pathlib.Path(importlib.util.find_spec("timm").origin).parent
    for name, path in {"timm": folder, "timm.optim": folder / "optim"}.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    try:
        return find("timm.optim.rmsprop_tf", "RMSpropTF")()
    finally:
        for name in [x for x in sys.modules if x.split(".")[0] == "timm"]:
            del sys.modules[name]


def torch_like(find, **fixed):
    """Return the original for an optimizer with the interface of PyTorch's."""

    def original(options, params, grads, rates):
        import torch

        leaves = [torch.tensor(p) for p in params]
        optimizer = find()(leaves, **options, **fixed)
        for gs, rate in zip(grads, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            for p, g in zip(leaves, gs, strict=True):
                p.grad = torch.tensor(g)
            optimizer.step()
            yield [p.numpy().copy() for p in leaves]

    return original


TORCH = find("torch.optim", "RMSprop")
SB3 = find("stable_baselines3.common.sb2_compat.rmsprop_tf_like", "RMSpropTFLike")
torch = torch_like(TORCH, foreach=False)
foreach = torch_like(TORCH, foreach=True)
bitsandbytes = torch_like(find("bitsandbytes.optim", "RMSprop"), optim_bits=32)
timm = torch_like(find_timm)
sb3 = torch_like(SB3)


def mlx(options, params, grads, rates):
    import mlx.core as mx
    import mlx.optimizers

    def tree(leaves):
        dtype = getattr(mx, str(params[0].dtype))
        return {str(i): mx.array(x, dtype) for i, x in enumerate(leaves)}

    mx.set_default_device(mx.cpu)
    leaves, optimizer = tree(params), mlx.optimizers.RMSprop(0.0, **options)
    for gs, rate in zip(grads, rates, strict=True):
        # A Python number would be rounded to float32.
        optimizer.learning_rate = mx.array(rate, mx.float64)
        leaves = optimizer.apply_gradients(tree(gs), leaves)
        yield [np.array(p) for p in leaves.values()]


KERAS = find("keras.optimizers", "RMSprop")


def keras(options, params, grads, rates):
    import keras

    mask = options.get("weight_decay_mask", [True] * len(params))
    options = {k: x for k, x in options.items() if k != "weight_decay_mask"}
    keras.config.set_floatx(str(params[0].dtype))
    leaves = [keras.Variable(p) for p in params]
    optimizer = KERAS()(**options)
    excluded = [p for p, decayed in zip(leaves, mask, strict=True) if not decayed]
    optimizer.exclude_from_weight_decay(var_list=excluded)
    for gs, rate in zip(grads, rates, strict=True):
        optimizer.learning_rate = rate
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gs], leaves)
        yield [np.asarray(p) for p in leaves]


TF1 = find("tensorflow.compat.v1.train", "RMSPropOptimizer")


def tf1(options, params, grads, rates, exact=True):
    """Run TensorFlow 1's, which rounds Python's numbers to float32, not NumPy's."""
    import tensorflow as tf

    if exact:
        numbers = dict(decay=0.9, momentum=0.0, epsilon=1e-10) | options
        options = options | {
            k: np.float64(x) for k, x in numbers.items() if isinstance(x, float)
        }
        rates = np.float64(rates)
    rate = iter(rates)
    leaves = [tf.Variable(p) for p in params]
    optimizer = TF1()(lambda: next(rate), **options)
    for gs in grads:
        optimizer.apply_gradients(zip(map(tf.constant, gs), leaves, strict=True))
        yield [p.numpy() for p in leaves]


def tf1_with(**numbers):
    """Return the original of a recipe whose preset takes no such options."""
    return lambda _, *rest: tf1(numbers, *rest)


KERAS_LEGACY = find("tf_keras.optimizers.legacy", "RMSprop")


def keras_legacy(options, params, grads, rates, exact=True):
    """Run Keras 2's, which rounds numbers to float32, not what functions return."""
    import tensorflow as tf

    wide = lambda x: functools.partial(tf.constant, x, tf.float64)  # noqa: E731
    if exact:
        numbers = dict(rho=0.9, momentum=0.0) | options
        options = options | {
            k: wide(numbers[k]) for k in ("rho", "momentum") if numbers[k]
        }
        rates = map(wide, rates)
    leaves = [tf.Variable(p) for p in params]
    optimizer = KERAS_LEGACY()(**options)
    for gs, rate in zip(grads, rates, strict=True):
        optimizer.learning_rate = rate
        optimizer.apply_gradients(zip(map(tf.constant, gs), leaves, strict=True))
        yield [p.numpy() for p in leaves]


def paper(step):
    """Return the original for equations of one array: its move, and what they keep."""

    def original(options, params, grads, rates):
        kept = [()] * len(params)
        for gs, rate in zip(grads, rates, strict=True):
            new = [step(g, rate, *old) for g, old in zip(gs, kept, strict=True)]
            params = [p + move for p, (move, *_) in zip(params, new, strict=True)]
            kept = [rest for _, *rest in new]
            yield params

    return original


@paper
def graves(epsilon, rate, n=0.0, g=0.0, delta=0.0):
    """Follow equations 38-45 of Graves 2013."""
    n = 0.95 * n + 0.05 * epsilon**2
    g = 0.95 * g + 0.05 * epsilon
    delta = 0.9 * delta - rate * epsilon / np.sqrt(n - g**2 + 0.0001)
    return delta, n, g, delta


@paper
def dqn(gradient, rate, g=0.0, g2=0.0):
    """Follow NeuralQLearner.lua, where dw points downhill in the loss."""
    dw = -gradient
    g = 0.95 * g + 0.05 * dw
    g2 = 0.95 * g2 + 0.05 * (dw * dw)
    return rate * dw / np.sqrt(g2 - g * g + 0.01), g, g2


@paper
def a3c(gradient, rate, g=0.0):
    """Follow Mnih et al. 2016, section 4, with PFRL's numbers."""
    g = 0.99 * g + 0.01 * gradient**2
    return -rate * gradient / np.sqrt(g + 0.1), g
