"""A small network on handwritten digits, for runs that change frameworks half-way.

PyTorch keeps kernels as (out, in, h, w) and (out, in), Flax and Keras as (h, w, in,
out) and (in, out). All is in float64.
"""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import originals
import pytest
from flax import linen
from sklearn.datasets import load_digits

HALF = 50
STEPS = 2 * HALF
# Changes after the move too. Halves are exact, in whichever way they are computed.
RATES = [0.004 * 0.5 ** (t // 35) for t in range(STEPS)]
EVERYTHING = dict(momentum=0.9, centered=True, weight_decay=0.01)
RUNS = {name: {name: value} for name, value in EVERYTHING.items()}
RUNS = {"plain": {}} | RUNS | {"everything": EVERYTHING}


def schedule(count):
    return jnp.asarray(RATES)[count]


class Network(linen.Module):
    @linen.compact
    def __call__(self, x):
        # Smooth, as a kink would part runs that differ in a last digit. (Keras computes
        # tanh in float32.)
        more = dict(param_dtype=jnp.float64)
        x = linen.soft_sign(linen.Conv(4, (3, 3), padding="VALID", **more)(x))
        return linen.Dense(10, **more)(x.reshape(len(x), -1))


def to_params(arrays):
    """Arrange PyTorch's (4, 1, 3, 3), (4,), (10, 4 * 6 * 6) and (10,) for Flax."""
    conv, conv_bias, dense, dense_bias = arrays
    # Flax flattens height, width, channels; PyTorch channels, height, width.
    dense = dense.reshape(10, 4, 6, 6).transpose(2, 3, 1, 0).reshape(6 * 6 * 4, 10)
    return {
        "Conv_0": {"kernel": conv.transpose(2, 3, 1, 0), "bias": conv_bias},
        "Dense_0": {"kernel": dense, "bias": dense_bias},
    }


def from_params(params):
    conv, dense = params["Conv_0"], params["Dense_0"]
    kernel = np.asarray(dense["kernel"]).reshape(6, 6, 4, 10).transpose(3, 2, 0, 1)
    conv_kernel = np.asarray(conv["kernel"]).transpose(3, 2, 0, 1)
    arrays = [conv_kernel, conv["bias"], kernel.reshape(10, 4 * 6 * 6), dense["bias"]]
    return [np.array(x) for x in arrays]


def as_list(params):
    """Return the arrays as Keras and TensorFlow have them."""
    return [np.array(params[k][x]) for k in params for x in ("kernel", "bias")]


def as_tree(arrays):
    pairs = dict(Conv_0=arrays[:2], Dense_0=arrays[2:])
    return {k: dict(zip(("kernel", "bias"), x, strict=True)) for k, x in pairs.items()}


@functools.cache
def batches():
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.RandomState(0).randint(len(labels), size=(STEPS, 32))
    return images.reshape(-1, 8, 8, 1)[chosen] / 16, labels[chosen]


def loss_of(params, images, labels):
    logits = Network().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


gradient_of = jax.jit(jax.value_and_grad(loss_of))


@functools.cache
def start():
    params = Network().init(jax.random.key(0), batches()[0][0])["params"]
    return jax.tree.map(np.asarray, params)


@functools.cache
def recorded():
    """Return the gradients of a run, so that all optimizers can have the same."""
    params, gradients = start(), []
    for images, labels in zip(*batches(), strict=True):
        gradients.append(jax.device_get(gradient_of(params, images, labels)[1]))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients[-1])
    return gradients


def train(tx, params, state, first, last):
    """Return parameters, state and losses after steps of the network itself."""
    losses = []
    for images, labels in zip(*(x[first:last] for x in batches()), strict=True):
        loss, grads = gradient_of(params, images, labels)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return params, state, losses


def replay(tx, params, state, first, last):
    for grads in recorded()[first:last]:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(params, expected):
    # One step of either side rounds about ten times, some of them to the other side.
    bound = 8 * np.finfo("float64").eps * STEPS
    for x, y in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        assert x.dtype == y.dtype == "float64"
        assert np.abs(np.asarray(x) - y).max() <= bound * np.abs(y).max()


def need(package):
    # Not importorskip: an installed framework that does not import is a failure.
    if not originals.installed(package):
        pytest.skip(f"{package} is not installed")
    if originals.installed("torch"):
        import torch

        # Its threads would wait for those of XLA.
        torch.set_num_threads(1)


def tensors(arrays):
    import torch

    return [torch.tensor(x) for x in arrays]


def through_a_file(saved):
    import torch

    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
