"""Convert state from and to TensorFlow 1's RMSPropOptimizer and Keras 2's RMSprop."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmsprop_jax.interop import arrange
from rmsprop_jax.transform import RMSPropState

NAMES = {"nu": "rms", "mu": "mg", "trace": "momentum"}


def from_tf1(
    slots: Mapping[str, Sequence[Any]], to_params: arrange.ToParams, *, count: int = 0
) -> RMSPropState:
    """Convert the state of TensorFlow 1's RMSPropOptimizer to resume its run in JAX.

    Args:
      slots: `[optimizer.get_slot(w, "rms") for w in variables]` under "rms", the same
        under "mg" if centered, and under "momentum" unless momentum was 0. A checkpoint
        calls the slots of a variable w w/RMSProp, w/RMSProp_1 and w/RMSProp_2, in this
        order. The legacy RMSprop of tf_keras has the same slots.
      to_params: as in `rmsprop_jax.interop`.
      count: number of steps taken, which the slots do not contain.

    Returns:
      A state for `presets.tf1` or `presets.keras_legacy` with the hyperparameters of
      the run.

    Raises:
      ValueError: as in `from_torch`.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import interop
      >>> slots = {"rms": [np.ones((2, 3), "float32")]}
      >>> print(interop.from_tf1(slots, lambda x: {"kernel": x[0]}).nu["kernel"].shape)
      (2, 3)

    References:
      TensorFlow 2.21, tensorflow/python/training/rmsprop.py.
    """
    fix = "Remove others; rms is the slot that holds nu."
    arrange.check_entries(slots, "slots", ["rms"], fix, optional=["mg", "momentum"])
    size = lambda x: len(x) if isinstance(x, list | tuple) else type(x).__name__
    sizes = {name: size(x) for name, x in slots.items()}
    if isinstance(sizes["rms"], str) or len({*sizes.values()}) > 1:
        raise ValueError(
            f"slots must have lists with an array for each variable, got {sizes}."
        )
    buffers = {
        field: {f"slots[{name!r}][{i}]": x for i, x in enumerate(slots[name])}
        for field, name in NAMES.items()
        if name in slots
    }
    return arrange.to_state({"count": count}, buffers, to_params)


def to_tf1(
    state: RMSPropState, from_params: arrange.FromParams
) -> dict[str, list[np.ndarray]]:
    """Convert the state of `presets.tf1` to resume its run in TensorFlow 1.

    Args:
      state: state of `presets.tf1` or `presets.keras_legacy`.
      from_params: as in `rmsprop_jax.interop`.

    Returns:
      Lists of arrays under "rms", "momentum" (zeros if momentum is off: TensorFlow
      always has this slot) and, if centered, "mg".

    Raises:
      ValueError: as in `to_torch`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop, presets
      >>> state = presets.tf1(0.1).init({"kernel": jnp.ones((2, 3))})
      >>> print(list(interop.to_tf1(state, lambda p: [p["kernel"]])))
      ['rms', 'momentum']

    References:
      TensorFlow 2.21, tensorflow/python/training/rmsprop.py.
    """
    lists = arrange.from_state(state, from_params)
    lists.setdefault("trace", [np.zeros_like(x) for x in lists["nu"]])
    return {NAMES[field]: x for field, x in lists.items()}
