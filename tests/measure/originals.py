"""The RMSProp of every framework and paper, behind one interface.

An original is called with a package, options, parameters (a list of arrays) and steps
(pairs of gradients and learning rate), and yields the parameters after each step.
"""

import contextlib
import importlib.util
import os
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np

# Read when Keras and TensorFlow are imported.
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

OPTIMIZERS = dict(
    torch="torch.optim.RMSprop",
    bitsandbytes="bitsandbytes.optim.RMSprop",
    timm="timm_optim.rmsprop_tf.RMSpropTF",
    stable_baselines3="stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike",
    mlx="mlx.optimizers.RMSprop",
    keras="keras.optimizers.RMSprop",
    tensorflow="tensorflow.compat.v1.train.RMSPropOptimizer",
    tf_keras="tf_keras.optimizers.legacy.RMSprop",
)


def installed(package):
    return importlib.util.find_spec(package) is not None


def find(package):
    """Import the RMSProp of a package."""
    if package == "timm":
        # timm imports torchvision, which must be built for the same PyTorch. Its
        # optimizers need neither: they are imported as a package of their own.
        folder = Path(importlib.util.find_spec("timm").origin).parent / "optim"
        sys.modules["timm_optim"] = types.ModuleType("timm_optim")
        sys.modules["timm_optim"].__path__ = [str(folder)]
    module, _, name = OPTIMIZERS[package].rpartition(".")
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def quiet():
    """Silence the frameworks; let those built on JAX promote types."""
    sys.stderr.flush()
    screen = os.dup(2)
    with (
        open(os.devnull, "w") as nowhere,
        warnings.catch_warnings(action="ignore"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        # TensorFlow writes to the file descriptor, not to sys.stderr.
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def torch(package, options, params, steps, **fixed):
    """Run an optimizer that has the interface of PyTorch's."""
    import torch

    leaves = list(map(torch.tensor, params))
    optimizer = find(package)(leaves, **options, **fixed)
    for grads, optimizer.param_groups[0]["lr"] in steps:
        for p, g in zip(leaves, grads, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        yield [p.numpy().copy() for p in leaves]


def mlx(package, options, params, steps):
    """Run the optimizer of MLX."""
    import mlx.core as mx

    def tree(leaves):
        dtype = getattr(mx, str(params[0].dtype))
        return {str(i): mx.array(x, dtype) for i, x in enumerate(leaves)}

    mx.set_default_device(mx.cpu)
    leaves, optimizer = tree(params), find(package)(0.0, **options)
    for grads, rate in steps:
        # A Python number would be rounded to float32.
        optimizer.learning_rate = mx.array(rate, mx.float64)
        leaves = optimizer.apply_gradients(tree(grads), leaves)
        yield [np.array(p) for p in leaves.values()]


def keras(package, options, params, steps):
    """Run the optimizer of Keras 3."""
    import keras

    options = dict(options)
    mask = options.pop("weight_decay_mask", [True] * len(params))
    keras.config.set_floatx(str(params[0].dtype))
    leaves = list(map(keras.Variable, params))
    optimizer = find(package)(**options)
    excluded = [p for p, decayed in zip(leaves, mask, strict=True) if not decayed]
    optimizer.exclude_from_weight_decay(var_list=excluded)
    for grads, optimizer.learning_rate in steps:
        optimizer.apply(list(map(keras.ops.convert_to_tensor, grads)), leaves)
        yield list(map(np.asarray, leaves))


def tensorflow(package, options, params, steps, number=np.float64, **fixed):
    """Run the optimizer of TensorFlow 1 or Keras 2, with hyperparameters of a type.

    They round Python numbers to float32, but not NumPy's, nor what functions return.
    """
    import tensorflow as tf

    options = {"rho" if package == "tf_keras" else "decay": 0.9} | fixed | options
    for name, x in options.items():
        if isinstance(x, float) and x:
            options[name] = number(x) if name == "epsilon" else partial(number, x)
    leaves = list(map(tf.Variable, params))
    optimizer = find(package)(lambda: number(rate), **options)
    for grads, rate in steps:  # noqa: B007
        optimizer.apply_gradients(zip(map(tf.constant, grads), leaves, strict=True))
        yield [p.numpy() for p in leaves]


def paper(move):
    """Run the equations of a paper for one array: its move, and what they keep."""

    def original(package, options, params, steps):
        kept = [()] * len(params)
        for grads, rate in steps:
            new = [move(g, rate, *x) for g, x in zip(grads, kept, strict=True)]
            params = [p + x for p, (x, *_) in zip(params, new, strict=True)]
            kept = [x for _, *x in new]
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
    """Follow Mnih et al. 2016, section 4, with PFRL's hyperparameters."""
    g = 0.99 * g + 0.01 * gradient**2
    return -rate * gradient / np.sqrt(g + 0.1), g
