"""Convert state from and to `keras.optimizers.RMSprop` of Keras 3."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax

from rmsprop_jax import presets
from rmsprop_jax.interop import arrange
from rmsprop_jax.transform import RMSPropState

# In the order in which Keras saves them.
NAMES = {"nu": "velocity", "trace": "momentum", "mu": "average_gradient"}
REQUIRED = ("learning_rate", "rho", "momentum", "epsilon", "centered")
OPTIONS = (*REQUIRED, "weight_decay")
UNSUPPORTED = ("clipnorm", "clipvalue", "global_clipnorm", "use_ema")
UNSUPPORTED += ("loss_scale_factor", "gradient_accumulation_steps")


def from_keras(
    variables: Mapping[str, Any] | Sequence[Any],
    config: Mapping[str, Any],
    to_params: arrange.ToParams,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
) -> tuple[optax.GradientTransformationExtraArgs, RMSPropState]:
    """Convert the state of `keras.optimizers.RMSprop` to resume its run in JAX.

    Args:
      variables: the dict that `optimizer.save_own_variables` filled (the optimizer/vars
        group of a saved file), or `optimizer.variables`.
      config: result of `optimizer.get_config()`.
      to_params: as in `rmsprop_jax.interop`.
      learning_rate: number or schedule to use instead of the stored one; required if
        `config` has a Keras schedule.
      weight_decay_mask: as in `rmsprop`; required after `exclude_from_weight_decay`,
        because `config` does not contain it.

    Returns:
      The gradient transformation, with the hyperparameters of `config`, and its state.

    Raises:
      ValueError: as in `from_torch`, or if `config` has clipping, averaging, loss
        scaling or accumulation, which are separate transformations in Optax.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import interop
      >>> config = dict(learning_rate=0.01, rho=0.9, epsilon=1e-7)
      >>> config |= dict(momentum=0.0, centered=False, weight_decay=None)
      >>> saved = [3, 0.01, np.ones((2, 3), "float32")]
      >>> optimizer, state = interop.from_keras(saved, config, lambda x: x[0])
      >>> print(state.count, state.nu.shape)
      3 (2, 3)

    References:
      Keras 3.15, keras/src/optimizers/rmsprop.py and base_optimizer.py: iteration,
      learning_rate unless scheduled, then velocity, momentum and average_gradient.
    """
    arrange.check_entries(config, "config", REQUIRED, "Pass optimizer.get_config().")
    for name in UNSUPPORTED:
        if config.get(name):
            raise ValueError(
                f"config[{name!r}] must be off, got {config[name]}. Chain what Optax "
                "has for it, and pass config, and variables, without it."
            )
    scheduled = not isinstance(config["learning_rate"], int | float | np.number)
    if scheduled and learning_rate is None:
        raise ValueError(
            "config['learning_rate'] is a Keras schedule. Pass learning_rate, a "
            "number or the equivalent Optax schedule."
        )
    head = ["iteration"] if scheduled else ["iteration", "learning_rate"]
    names = arrange.buffer_names(NAMES, config)
    size, rest = divmod(len(variables) - len(head), len(names))
    if size < 1 or rest:
        raise ValueError(
            f"variables must be {', '.join(head)}, then {', '.join(names.values())} of "
            f"each parameter, got {len(variables)} in all. Pass the config of the same "
            "optimizer."
        )
    if isinstance(variables, Mapping):
        keys = [str(i) for i in range(len(variables))]
        arrange.check_entries(variables, "variables", keys, "Pass all of them.")
        variables = [variables[key] for key in keys]
    buffers = {field: {} for field in names}
    for i, x in enumerate(variables[len(head) :]):
        field, name = [*names.items()][i // size]
        buffers[field][f"variables['{i + len(head)}'] ({name})"] = x
    count = {"variables['0'] (iteration)": variables[0]}
    state = arrange.to_state(count, buffers, to_params)
    if learning_rate is None:
        # Callbacks change this rate, not the one in config.
        learning_rate = float(np.asarray(variables[1]))
    options: dict[str, Any] = {k: x for k, x in config.items() if k in OPTIONS}
    options |= dict(learning_rate=learning_rate, weight_decay_mask=weight_decay_mask)
    return presets.keras(**options), state


def to_keras(
    state: RMSPropState,
    from_params: arrange.FromParams,
    *,
    learning_rate: float | None,
) -> dict[str, np.ndarray]:
    """Convert the state of `presets.keras` to resume its run in Keras.

    Args:
      state: state of `presets.keras`.
      from_params: as in `rmsprop_jax.interop`.
      learning_rate: its current value; None if the Keras optimizer has a schedule.

    Returns:
      A dict for `load_own_variables` of a built Keras optimizer, which must have the
      `momentum` and `centered` of the run.

    Raises:
      ValueError: as in `to_torch`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop, presets
      >>> state = presets.keras().init({"kernel": jnp.ones((2, 3))})
      >>> saved = interop.to_keras(state, lambda p: [p["kernel"]], learning_rate=0.01)
      >>> print(list(saved), saved["2"].shape)
      ['0', '1', '2'] (2, 3)

    References:
      Keras 3.15, keras/src/optimizers/base_optimizer.py.
    """
    if callable(learning_rate):
        raise ValueError(
            f"learning_rate must be a number or None, got {learning_rate}. Call a "
            "schedule with the count of the state."
        )
    lists = arrange.from_state(state, from_params)
    variables = [np.asarray(state.count)]
    if learning_rate is not None:
        variables.append(np.asarray(learning_rate, "float32"))
    variables += [x for field in NAMES for x in lists.get(field, [])]
    return {str(i): x for i, x in enumerate(variables)}
