"""The tasks of notebook 2, each small enough for hundreds of runs on a laptop's CPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits


class Task(NamedTuple):
    """A function to minimize."""

    init: Callable  # key -> parameters
    batch: Callable  # data, key, step -> batch
    loss: Callable  # parameters, batch -> loss
    data: Any = ()


def ravine(degrees, condition=100.0):
    """Return a quadratic whose axes are turned by an angle, from random directions."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    scales = np.array([1.0, condition])

    def init(key):
        start = jax.random.uniform(key, minval=0.3, maxval=1.2)
        return jnp.asarray(turn, jnp.float32) @ jnp.stack(
            [jnp.cos(start), jnp.sin(start)]
        )

    def loss(point, batch):
        along = jnp.asarray(turn.T, jnp.float32) @ point
        return (jnp.asarray(scales, jnp.float32) * along**2).sum() / 2

    return Task(init, lambda data, key, step: None, loss)


def digits(inputs="pixels"):
    """Return scikit-learn's images of digits [1797, 64] and their labels.

    Args:
      inputs: "pixels" in [0, 1]; "units", each pixel multiplied by a factor of its own
        between 0.1 and 10; or "turned", these rotated by a random orthogonal matrix.
    """
    data = load_digits()
    images, rng = data.data / 16, np.random.default_rng(1)
    if inputs != "pixels":
        images = images * 10 ** rng.uniform(-1, 1, 64)
    if inputs == "turned":
        images = images @ np.linalg.qr(rng.normal(size=(64, 64)))[0]
    return jnp.asarray(images, jnp.float32), jnp.asarray(data.target)


def dense(key, shape, gain=1.0):
    """Return weights of shape [..., inputs, outputs] and biases of 0."""
    weights = jax.random.normal(key, shape) * (gain / np.sqrt(shape[-2]))
    return dict(w=weights, b=jnp.zeros(shape[:-2] + shape[-1:]))


def classify(size, depth=2, gain=1.0, width=16, inputs="pixels"):
    """Return the task of classifying batches of digits with a tanh network."""

    def init(key):
        first, hidden, last = jax.random.split(key, 3)
        return dict(
            first=dense(first, (64, width), gain),
            hidden=dense(hidden, (depth - 2, width, width), gain),
            last=dense(last, (width, 10), gain),
        )

    def batch(data, key, step):
        chosen = jax.random.randint(key, (size,), 0, len(data[1]))
        return data[0][chosen], data[1][chosen]

    def loss(params, batch):
        def layer(x, of_layer):
            return jnp.tanh(x @ of_layer["w"] + of_layer["b"]), None

        x, _ = layer(batch[0], params["first"])
        x, _ = jax.lax.scan(layer, x, params["hidden"])
        logits = x @ params["last"]["w"] + params["last"]["b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean()

    return Task(init, batch, loss, digits(inputs))


def drifting(phase, size=16):
    """Return the task of classifying digits whose labels are permuted at each phase."""
    stay = classify(size)
    rng = np.random.default_rng(0)
    orders = np.array([rng.permutation(10) for _ in range(100)])

    def batch(data, key, step):
        images, labels = stay.batch(data[:2], key, step)
        return images, data[2][step // phase][labels]

    return stay._replace(batch=batch, data=(*stay.data, jnp.asarray(orders)))


def adding(length, size=16, width=16):
    """Return the adding problem for a GRU: the sum of two marked numbers of many.

    Predicting 1, the mean, has a mean squared error of 1/6.
    """

    def init(key):
        first, second, third = jax.random.split(key, 3)
        inputs = dense(first, (2, 3 * width))
        # Start by keeping the state, as is usual for long sequences.
        inputs["b"] = inputs["b"].at[:width].set(3.0)
        state = dense(second, (width, 3 * width))["w"]
        return dict(inputs=inputs, state=state, output=dense(third, (width, 1)))

    def batch(data, key, step):
        first, second, third = jax.random.split(key, 3)
        numbers = jax.random.uniform(first, (length, size))
        early = jax.random.randint(second, (size,), 0, length // 2)
        late = jax.random.randint(third, (size,), length // 2, length)
        time = jnp.arange(length)[:, None]
        marks = ((time == early[None]) | (time == late[None])).astype(jnp.float32)
        return jnp.stack([numbers, marks], -1), (numbers * marks).sum(0)

    def loss(params, batch):
        from_inputs = batch[0] @ params["inputs"]["w"] + params["inputs"]["b"]

        def step(state, now):
            before = state @ params["state"]
            gates = jax.nn.sigmoid((now + before)[:, : 2 * width])
            keep, reset = gates[:, :width], gates[:, width:]
            new = jnp.tanh(now[:, 2 * width :] + reset * before[:, 2 * width :])
            return keep * state + (1 - keep) * new, None

        state, _ = jax.lax.scan(step, jnp.zeros((size, width)), from_inputs)
        predicted = state @ params["output"]["w"] + params["output"]["b"]
        return ((predicted[:, 0] - batch[1]) ** 2).mean()

    return Task(init, batch, loss)
