"""Optimizer state in from and out to PyTorch, Keras, TensorFlow 1 and Optax.

Plain dicts and arrays go in and come out; no framework is imported and nothing is
unpickled. The parameters are yours to port, and so is their order: `to_params` takes a
list of NumPy arrays like the parameters, in the order of the other optimizer, and
returns them as the tree of the JAX model; `from_params` does the reverse. They are
called once for each buffer. That they lose and change nothing is checked. What cannot
be seen is a wrong place: equal shapes exchanged, a square matrix not transposed. So use
the function with which you port the parameters, and compare the loss before and after.

The numbers are the same but for two: a centered `nu` is E|g|^2 elsewhere, and
E|g|^2 - |mu|^2 here; Optax's momentum buffer has the opposite sign.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from rmsprop_jax import arrange, presets
from rmsprop_jax.interop_optax import from_optax, to_optax
from rmsprop_jax.transform import PyTree, RMSPropState

__all__ = [
    "from_keras",
    "from_optax",
    "from_tf1",
    "from_torch",
    "to_keras",
    "to_optax",
    "to_tf1",
    "to_torch",
]

ToParams = Callable[[list[np.ndarray]], PyTree]
FromParams = Callable[[PyTree], Sequence[Any]]
Preset = Callable[..., optax.GradientTransformationExtraArgs]

TORCH = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"}
# In the order in which Keras saves them.
KERAS = {"nu": "velocity", "trace": "momentum", "mu": "average_gradient"}
TF1 = {"nu": "rms", "mu": "mg", "trace": "momentum"}


def from_torch(
    state_dict: Mapping[str, Any],
    to_params: ToParams,
    *,
    lr: optax.ScalarOrSchedule | None = None,
    preset: Preset | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, RMSPropState]:
    """Go on here with a run of `torch.optim.RMSprop`.

    Args:
      state_dict: what `optimizer.state_dict()` returned.
      to_params: arranges a list of arrays, in the order of `model.named_parameters()`
        if that is what the optimizer was given, as the tree of parameters.
      lr: learning rate, or a schedule, which goes on at the step that the run had
        reached; None for that of the parameter group. Needed after a torch scheduler.
      preset: None for PyTorch's and timm's, which are told apart by their entries;
        `presets.sb3` for Stable-Baselines3's.

    Returns:
      The transformation, with the numbers of the parameter group, and its state. They
      belong together: under `rmsprop`, PyTorch's buffers mean something else. The
      count is the largest step of any parameter. Groups with different numbers are
      converted each alone, with `optax.MaskedNode()` in the places of the others, and
      joined: the state of `optax.partition(optimizers, labels)` is that of its `init`,
      `._replace(inner_states={label: optax.MaskedState(state), ...})`.

    Raises:
      ValueError: if an entry is missing, extra, misshapen, not finite, or not of 32 or
        64 bits; if parameter groups differ. The message names the entry and the fix.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import interop
      >>> buffers = dict(step=3.0, square_avg=np.ones((2, 3), "float32"))
      >>> group = dict(lr=0.01, alpha=0.9, eps=1e-8, weight_decay=0, momentum=0)
      >>> group |= dict(centered=False, maximize=False, params=[0])
      >>> saved = dict(state={0: buffers}, param_groups=[group])
      >>> optimizer, state = interop.from_torch(saved, lambda x: {"kernel": x[0].T})
      >>> print(state.count, state.nu["kernel"].shape)
      3 (3, 2)

    References:
      PyTorch 2.13, torch/optim/rmsprop.py; the same names in timm and
      Stable-Baselines3.
    """
    fix = "Pass what optimizer.state_dict() returned."
    groups = arrange.entry(state_dict, "state_dict", "param_groups", fix)
    rows = arrange.entry(state_dict, "state_dict", "state", fix)
    ids = []
    for k, group in enumerate(groups):
        ids += arrange.entry(group, f"param_groups[{k}]", "params")
    if not ids:
        raise ValueError("state_dict['param_groups'] must have params, got none.")
    preset = _original(groups, preset)
    numbers = _numbers(groups, lr, preset)
    at = "state_dict['state']"
    fix = (
        "A parameter has one after its first gradient. Where there never is any, take "
    )
    fix += "it out of the group's params and put optax.MaskedNode() in its place."
    arrange.expect(rows, at, ids, fix)
    names = _used(TORCH, numbers["centered"], numbers["momentum"])
    for i in ids:
        fix = "centered and momentum of the parameter group say which."
        arrange.expect(rows[i], f"{at}[{i!r}]", ["step", *names.values()], fix)
    buffers = {
        field: {f"{at}[{i!r}][{name!r}]": rows[i][name] for i in ids}
        for field, name in names.items()
    }
    steps = [arrange.steps(f"{at}[{i!r}]['step']", rows[i]["step"]) for i in ids]
    state = arrange.state(max(steps), buffers, to_params)
    return preset(**numbers), state


def to_torch(
    state: RMSPropState,
    from_params: FromParams,
    *,
    preset: Preset = presets.torch,
    **hyperparameters: Any,
) -> dict[str, Any]:
    """Go on in `torch.optim.RMSprop` with a run of `presets.torch`.

    Args:
      state: state of `presets.torch`, or of another `preset`.
      from_params: arranges the tree of parameters as a list in the order of the torch
        optimizer; of torch tensors, as `load_state_dict` takes nothing else.
      preset: the preset that made the state.
      **hyperparameters: the arguments with which the preset was built, as numbers; lr
        is needed, and the current one.

    Returns:
      A dict that `optimizer.load_state_dict` accepts, with one parameter group. Loading
      it replaces the numbers with which the torch optimizer was built; attach a
      scheduler after that. A momentum buffer must be without the learning rate, as in
      `presets.torch`, not as in `rmsprop`, whose state looks the same.

    Raises:
      ValueError: if momentum or centered are not those of the state, or a leaf is not
        finite or not of 32 or 64 bits, or `from_params` changed elements.
      TypeError: if a hyperparameter is unknown to the preset.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop, presets
      >>> state = presets.torch(lr=0.01).init({"kernel": jnp.ones((3, 2))})
      >>> saved = interop.to_torch(state, lambda p: [p["kernel"].T], lr=0.01)
      >>> print(saved["state"][0]["square_avg"].shape, saved["param_groups"][0]["lr"])
      (2, 3) 0.01

    References:
      PyTorch 2.13, torch/optim/rmsprop.py.
    """
    call = inspect.signature(preset).bind(**hyperparameters)
    call.apply_defaults()
    group = {k: x for k, x in call.arguments.items() if not k.endswith("_dtype")}
    if "lr" not in group:
        raise ValueError(
            f"preset must be presets.torch, timm or sb3, got {preset.__name__}."
        )
    if "lr" not in hyperparameters or callable(group["lr"]):
        got = "a schedule" if callable(group["lr"]) else "none"
        raise ValueError(
            f"lr must be the current number, got {got}. Call the schedule with the "
            "count of the state."
        )
    group = {k: x if isinstance(x, bool) else float(x) for k, x in group.items()}
    lists = arrange.lists(state, from_params)
    if set(lists) != set(_used(TORCH, group["centered"], group["momentum"])):
        raise ValueError(
            f"centered={group['centered']} and momentum={group['momentum']} do not fit "
            f"a state with {', '.join(lists)}. Pass the numbers of the run."
        )
    rows = {
        i: {"step": float(state.count)} | {TORCH[k]: x[i] for k, x in lists.items()}
        for i in range(len(lists["nu"]))
    }
    return {"state": rows, "param_groups": [group | {"params": list(rows)}]}


def from_keras(
    variables: Mapping[str, Any] | Sequence[Any],
    config: Mapping[str, Any],
    to_params: ToParams,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
) -> tuple[optax.GradientTransformationExtraArgs, RMSPropState]:
    """Go on here with a run of `keras.optimizers.RMSprop`.

    Args:
      variables: what `optimizer.save_own_variables` stored, as the group
        optimizer/vars of a saved file; or `optimizer.variables` themselves.
      config: what `optimizer.get_config()` returned.
      to_params: arranges a list of arrays as the tree of parameters.
      learning_rate: number or schedule in place of that of `variables`; needed where
        `config` has a Keras schedule.
      weight_decay_mask: see `rmsprop`; needed after `exclude_from_weight_decay`, which
        `config` does not hold.

    Returns:
      The transformation, with the numbers of `config`, and its state.

    Raises:
      ValueError: as `from_torch`; if `config` asks for clipping, averaging or
        accumulation, which Optax has.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import interop
      >>> variables = [3, 0.01, np.ones((2, 3), "float32")]
      >>> config = dict(learning_rate=0.01, rho=0.9, momentum=0.0, epsilon=1e-7)
      >>> config |= dict(centered=False, weight_decay=None)
      >>> optimizer, state = interop.from_keras(
      ...     variables, config, lambda x: {"kernel": x[0]}
      ... )
      >>> print(state.count, state.nu["kernel"].shape)
      3 (2, 3)

    References:
      Keras 3.15, keras/src/optimizers/rmsprop.py and base_optimizer.py: iteration,
      learning_rate unless scheduled, then velocity, momentum and average_gradient.
    """
    numbers: dict[str, Any] = {
        name: arrange.entry(config, "config", name)
        for name in ("learning_rate", "rho", "momentum", "epsilon", "centered")
    }
    extras = ("clipnorm", "clipvalue", "global_clipnorm", "use_ema")
    for name in (*extras, "loss_scale_factor", "gradient_accumulation_steps"):
        if config.get(name):
            raise ValueError(
                f"config[{name!r}] must be off, got {config[name]}: it is no part of "
                "RMSProp. Optax has the like of it to chain; pass config without it, "
                "and variables without those that Keras keeps for it."
            )
    scheduled = not isinstance(numbers["learning_rate"], int | float | np.number)
    if learning_rate is not None:
        numbers["learning_rate"] = learning_rate
    elif scheduled:
        raise ValueError(
            "config['learning_rate'] is a Keras schedule. Pass learning_rate, the "
            "Optax schedule or the number to go on with."
        )
    names = _used(KERAS, numbers["centered"], numbers["momentum"])
    head = 1 if scheduled else 2
    size, rest = divmod(len(variables) - head, len(names))
    if size < 1 or rest:
        raise ValueError(
            f"variables must be iteration{', learning_rate' * (head - 1)}, then "
            f"{', '.join(names.values())} of each parameter, got {len(variables)} in "
            "all. Is config of the same optimizer?"
        )
    starts = range(head, len(variables), size)
    if isinstance(variables, Mapping):
        keys = map(str, range(len(variables)))
        variables = [arrange.entry(variables, "variables", key) for key in keys]
    buffers = {
        field: {
            f"variables['{i}'] ({name})": variables[i] for i in range(at, at + size)
        }
        for at, (field, name) in zip(starts, names.items(), strict=True)
    }
    steps = arrange.steps("variables['0'] (iteration)", variables[0])
    state = arrange.state(steps, buffers, to_params)
    if learning_rate is None:
        # A schedule of callbacks changes this one only.
        numbers["learning_rate"] = float(np.asarray(variables[1]))
    decay = config.get("weight_decay")
    optimizer = presets.keras(
        **numbers, weight_decay=decay, weight_decay_mask=weight_decay_mask
    )
    return optimizer, state


def to_keras(
    state: RMSPropState, from_params: FromParams, *, learning_rate: float | None
) -> dict[str, np.ndarray]:
    """Go on in `keras.optimizers.RMSprop` with a run of `presets.keras`.

    Args:
      state: state of `presets.keras`.
      from_params: arranges the tree of parameters as a list of arrays in the order of
        the Keras variables.
      learning_rate: current number; None if the Keras optimizer has a schedule.

    Returns:
      A dict that `load_own_variables` of a built Keras optimizer accepts, which must
      have `momentum` and `centered` as the run had.

    Raises:
      ValueError: as `to_torch`.

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
        raise ValueError("learning_rate must be a number or None, got a schedule.")
    lists = arrange.lists(state, from_params)
    head = [np.asarray(state.count)]
    if learning_rate is not None:
        head.append(np.asarray(learning_rate, "float32"))
    variables = [*head, *(x for field in KERAS for x in lists.get(field, []))]
    return {str(i): x for i, x in enumerate(variables)}


def from_tf1(
    slots: Mapping[str, Sequence[Any]], to_params: ToParams, *, count: int = 0
) -> RMSPropState:
    """Go on here with a run of `tf.compat.v1.train.RMSPropOptimizer`.

    Args:
      slots: lists of arrays under "rms", "mg" if centered, and "momentum", which is to
        be left out if momentum was 0: `[optimizer.get_slot(w, "rms") for w in ws]`. A
        checkpoint numbers them in this order: for a variable w, w/RMSProp is rms,
        w/RMSProp_1 is mg if centered, else momentum, and w/RMSProp_2 momentum.
        tf_keras's legacy RMSprop has the same three.
      to_params: arranges a list of arrays as the tree of parameters.
      count: steps taken; the slots do not hold it.

    Returns:
      A state for `presets.tf1` (or `presets.keras_legacy`) with the numbers of the run.

    Raises:
      ValueError: as `from_torch`.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import interop
      >>> slots = {"rms": [np.ones((2, 3), "float32")]}
      >>> print(interop.from_tf1(slots, lambda x: {"kernel": x[0]}).nu["kernel"].shape)
      (2, 3)

    References:
      TensorFlow 2.21, tensorflow/python/training/rmsprop.py.
    """
    arrange.entry(slots, "slots", "rms")
    names = _used(TF1, "mg" in slots, "momentum" in slots)
    fix = "Leave out momentum if it was 0."
    arrange.expect(slots, "slots", list(names.values()), fix)
    for name in names.values():
        if not isinstance(slots[name], list | tuple):
            raise ValueError(
                f"slots[{name!r}] must be a list of arrays, one for each variable, got "
                f"{type(slots[name]).__name__}."
            )
    buffers = {
        field: {f"slots[{name!r}][{i}]": x for i, x in enumerate(slots[name])}
        for field, name in names.items()
    }
    return arrange.state(arrange.steps("count", count), buffers, to_params)


def to_tf1(state: RMSPropState, from_params: FromParams) -> dict[str, list[np.ndarray]]:
    """Go on in `tf.compat.v1.train.RMSPropOptimizer` with a run of `presets.tf1`.

    Args:
      state: state of `presets.tf1`.
      from_params: arranges the tree of parameters as a list of arrays.

    Returns:
      Lists of arrays under "rms", "momentum" (zeros if momentum is off: TensorFlow has
      the slot all the same) and, if centered, "mg".

    Raises:
      ValueError: as `to_torch`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop, presets
      >>> state = presets.tf1(0.1).init({"kernel": jnp.ones((2, 3))})
      >>> print(list(interop.to_tf1(state, lambda p: [p["kernel"]])))
      ['rms', 'momentum']

    References:
      TensorFlow 2.21, tensorflow/python/training/rmsprop.py.
    """
    lists = arrange.lists(state, from_params)
    lists.setdefault("trace", [np.zeros_like(x) for x in lists["nu"]])
    return {TF1[field]: x for field, x in lists.items()}


def _original(groups, preset) -> Preset:
    """Return the preset of these parameter groups, told by the entries they have."""
    entries = {name for group in groups for name in group}
    if "lr_in_momentum" in entries:
        known = presets.timm
    elif "maximize" in entries:
        known = presets.torch
    elif preset is not None:
        known = preset
    else:
        raise ValueError(
            "param_groups have neither maximize (PyTorch) nor lr_in_momentum (timm). "
            "Pass preset: presets.sb3 for Stable-Baselines3's RMSpropTFLike, "
            "presets.torch for a PyTorch before 1.12."
        )
    if preset not in (None, known):
        raise ValueError(
            f"param_groups are those of presets.{known.__name__}, but preset is "
            f"{preset.__name__}. Leave preset out."
        )
    return known


def _numbers(groups, lr, preset):
    """Return the arguments of the preset that all parameter groups agree on."""
    known = set(inspect.signature(preset).parameters) - {"nu_dtype", "momentum_dtype"}
    needed = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "params")
    execution = {"foreach", "capturable", "differentiable"}
    found = []
    for k, group in enumerate(groups):
        at = f"param_groups[{k}]"
        for name in needed:
            arrange.entry(group, at, name)
        # Schedulers leave numbers in a group; what is True changes the step.
        flags = {n for n, x in group.items() if isinstance(x, bool | np.bool_) and x}
        flags -= known | execution
        if flags:
            raise ValueError(
                f"{at} has {', '.join(sorted(flags))} on, which {preset.__name__} does "
                "not do. Is it of another optimizer? See the argument preset."
            )
        if "base_momentum" in group:
            raise ValueError(
                f"{at} has base_momentum: its scheduler drives the momentum too, which "
                "is constant here. Leave the entry out to go on with momentum="
                f"{group['momentum']}."
            )
        if lr is None and "initial_lr" in group:
            raise ValueError(
                f"{at} was driven by a scheduler, for it has initial_lr. Pass lr, the "
                "Optax schedule or the number to go on with."
            )
        numbers = {n: group[n] for n in (known | {"initial_lr"}) & set(group)}
        numbers = {n: x if type(x) is bool else float(x) for n, x in numbers.items()}
        found.append(numbers)
        for name in found[0] | found[k]:
            one, other = found[0].get(name), found[k].get(name)
            if one != other:
                raise ValueError(
                    f"{at} has {name}={other}, but param_groups[0] has {one}: one "
                    "transformation has one of each. Convert each group alone, from "
                    "dict(state={i: state_dict['state'][i] for i in group['params']}, "
                    "param_groups=[group]), and join them with optax.partition."
                )
    numbers = {name: x for name, x in found[0].items() if name != "initial_lr"}
    return numbers if lr is None else numbers | {"lr": lr}


def _used(names, centered, momentum):
    """Return the names of the buffers that there are."""
    has = {"nu": True, "mu": bool(centered), "trace": bool(momentum)}
    return {field: name for field, name in names.items() if has[field]}
