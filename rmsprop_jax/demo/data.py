"""Handwritten digits, and a recurrent Flax model that reads them row by row."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits


def load():
    """Load images [n, 8, 8] and labels [n]: 1437 for training, 360 held out."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images / 16).astype(np.float32)[order]
    labels = digits.target.astype(np.int32)[order]
    return (images[360:], labels[360:]), (images[:360], labels[:360])


def batch(images, labels, size, seed, step):
    """Select the images and labels of a step, which a resumed run sees too.

    Noise keeps the gradients above eps: without it, the model soon fits every image.
    """
    epoch, i = divmod(step, len(labels) // size)
    order = np.random.default_rng([seed, epoch]).permutation(len(labels))
    chosen = order[i * size :][:size]
    noise = np.random.default_rng([seed, epoch, i + 1]).normal(0, 0.2, (size, 8, 8))
    return images[chosen] + noise.astype(np.float32), labels[chosen]


class Reader(nnx.Module):
    """GRU over the rows of an image, with a linear layer on its last output."""

    def __init__(self, rngs: nnx.Rngs, hidden: int = 64):
        """Create the layers."""
        self.rnn = nnx.RNN(nnx.GRUCell(8, hidden, rngs=rngs), rngs=False)
        self.head = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, images):
        """Return logits [batch, 10] of images [batch, 8, 8]."""
        carry = jnp.zeros((len(images), self.head.in_features), images.dtype)
        return self.head(jnp.asarray(self.rnn(images, initial_carry=carry))[:, -1])
