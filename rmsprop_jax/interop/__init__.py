"""Convert optimizer state from and to PyTorch, Keras, TensorFlow 1 and Optax.

The functions take and return plain dicts and arrays; they import no other framework and
unpickle nothing. The caller arranges the arrays: `to_params` takes a list of NumPy
arrays, one for each parameter in the order of the other optimizer, and returns them as
the pytree of the JAX parameters; `from_params` does the reverse. Each is called once
for every buffer of the state. Values are checked; placement is not: swapped parameters
of the same shape, or a square matrix that was not transposed, go unnoticed. Pass the
function that converts the parameters themselves, and compare the loss before and after.

Two buffers differ in value: a centered `nu` is E|g|^2 elsewhere and
E|g|^2 - |E g|^2 here, and Optax's momentum buffer has the opposite sign.

PyTorch's LSTM has two biases where Flax has one; so do gates r and z of its GRU. Both
have the same gradient and, without weight decay, the same state: cut one out of the
row of bias_hh, add the biases, and double the updates of the sum with
`optax.masked(optax.scale(2.0), mask)`. `tests/test_interop_groups.py` does this both
ways, with a frozen layer, and weight decay of kernels only.
"""

from rmsprop_jax.interop.keras import from_keras, to_keras
from rmsprop_jax.interop.optax import from_optax, to_optax
from rmsprop_jax.interop.tf1 import from_tf1, to_tf1
from rmsprop_jax.interop.torch import from_torch, to_torch

__all__ = ["from_keras", "from_optax", "from_tf1", "from_torch"]
__all__ += ["to_keras", "to_optax", "to_tf1", "to_torch"]
