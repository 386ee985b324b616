"""Convert state from and to PyTorch's, timm's and Stable-Baselines3's RMSprop."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from rmsprop_jax import presets
from rmsprop_jax.interop import arrange
from rmsprop_jax.transform import RMSPropState

Transformation = optax.GradientTransformationExtraArgs
Preset = Callable[..., Transformation]
NAMES = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"}
REQUIRED = ("params", "lr", "alpha", "eps", "weight_decay", "momentum", "centered")
# Arguments that affect only how PyTorch executes a step.
EXECUTION = ("foreach", "capturable", "differentiable")


def from_torch(
    state_dict: Mapping[str, Any],
    to_params: arrange.ToParams,
    *,
    lr: optax.ScalarOrSchedule | None = None,
    preset: Preset | None = None,
) -> tuple[Transformation, RMSPropState]:
    """Convert the state of `torch.optim.RMSprop` to resume its run in JAX.

    Args:
      state_dict: result of `optimizer.state_dict()`.
      to_params: arranges a list of arrays as the pytree of parameters; the list has the
        order of `model.named_parameters()` if the optimizer was built from those.
      lr: learning rate, or schedule, which continues at the saved step; None means that
        of the parameter group. Required if a PyTorch scheduler was used.
      preset: `presets.sb3` for Stable-Baselines3. PyTorch and timm are recognized.

    Returns:
      The gradient transformation, with the hyperparameters of the group, and its state,
      whose count is the largest step of any parameter. Convert groups with different
      hyperparameters one at a time, with `optax.MaskedNode()` for the parameters of the
      others, and combine them with `optax.partition`: in the state that its `init`
      returns, replace `inner_states` by `{label: optax.MaskedState(state), ...}`.

    Raises:
      ValueError: if an entry is missing or unknown, parameter groups differ, elements
        are lost or changed, or an array is not finite, has another shape, or is not
        float32 or float64.

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
      PyTorch 2.13, torch/optim/rmsprop.py.
    """
    fix = "Pass optimizer.state_dict()."
    arrange.check_entries(state_dict, "state_dict", ["state", "param_groups"], fix)
    rows, groups = state_dict["state"], state_dict["param_groups"]
    if not any("params" in group and group["params"] for group in groups):
        raise ValueError("state_dict['param_groups'] must have params, got none.")
    preset = _choose_preset({name for group in groups for name in group}, preset)
    hyperparameters = _hyperparameters(groups, lr, preset)
    labels = {i: f"state_dict['state'][{i!r}]" for x in groups for i in x["params"]}
    fix = "PyTorch creates it in the first step. For a parameter that never has a "
    fix += (
        "gradient, remove it from params, and arrange optax.MaskedNode() in its place."
    )
    arrange.check_entries(rows, "state_dict['state']", labels, fix, exact=True)
    names = arrange.buffer_names(NAMES, hyperparameters)
    fix = "They must match centered and momentum of the parameter group."
    for i, at in labels.items():
        arrange.check_entries(rows[i], at, ["step", *names.values()], fix, exact=True)
    buffers = {
        field: {f"{at}[{name!r}]": rows[i][name] for i, at in labels.items()}
        for field, name in names.items()
    }
    steps = (
        arrange.step_count(f"{x}['step']", rows[i]["step"]) for i, x in labels.items()
    )
    return preset(**hyperparameters), arrange.to_state(max(steps), buffers, to_params)


def to_torch(
    state: RMSPropState,
    from_params: arrange.FromParams,
    *,
    preset: Preset = presets.torch,
    **hyperparameters: Any,
) -> dict[str, Any]:
    """Convert the state of `presets.torch` to resume its run in PyTorch.

    Args:
      state: state of `preset`; not of `rmsprop`, whose momentum buffer contains the
        learning rate.
      from_params: arranges the pytree of parameters as a list in the order of the
        PyTorch optimizer; of torch tensors, because `load_state_dict` takes no others.
      preset: `presets.torch`, `timm` or `sb3`.
      **hyperparameters: arguments of the preset in this run, with the current value of
        `lr`, and PyTorch's `foreach`, `capturable` and `differentiable`; or
        `**optimizer.param_groups[0]` of an optimizer that was built with them.

    Returns:
      A dict for `optimizer.load_state_dict`, with one parameter group. Loading it
      replaces all arguments that the optimizer was built with; pass its own parameter
      group to keep them. Attach a scheduler after loading.

    Raises:
      ValueError: if `lr` is missing, `momentum` or `centered` contradicts the state,
        an array is not finite or not float32 or float64, elements changed, or a
        parameter group belongs to another optimizer.
      TypeError: if the preset does not take a hyperparameter.

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
    lr = hyperparameters.get("lr")
    if lr is None or callable(lr):
        raise ValueError(
            f"lr must be a number, got {lr}. Call a schedule with the state's count."
        )
    known, verbatim = inspect.signature(preset).parameters, {*EXECUTION}
    if "params" in hyperparameters:  # All entries of a parameter group.
        _choose_preset({*hyperparameters}, preset)
        _check_enabled("**hyperparameters", hyperparameters, preset)
        verbatim = {*hyperparameters}
    unknown = verbatim - {*known}
    options = {k: x for k, x in hyperparameters.items() if k not in unknown}
    call = inspect.signature(preset).bind(**options)
    call.apply_defaults()
    group, lists = _to_floats(call.arguments), arrange.from_state(state, from_params)
    names = arrange.buffer_names(NAMES, group)
    if set(lists) != set(names):
        raise ValueError(
            f"centered={group['centered']} and momentum={group['momentum']} do not fit "
            f"a state with {', '.join(lists)}. Pass the hyperparameters of the run."
        )
    rows = {
        i: {"step": float(state.count)} | {names[k]: x[i] for k, x in lists.items()}
        for i in range(len(lists["nu"]))
    }
    group |= {k: x for k, x in hyperparameters.items() if k in verbatim}
    return {"state": rows, "param_groups": [group | {"params": list(rows)}]}


def _choose_preset(entries, preset) -> Preset:
    """Choose the preset that matches the entries of parameter groups."""
    known = presets.torch if "maximize" in entries else preset
    known = presets.timm if "lr_in_momentum" in entries else known
    allowed = (presets.torch, presets.timm, presets.sb3)
    if known not in allowed or preset not in (None, known):
        raise ValueError(
            "preset must be presets.torch if param_groups have maximize, presets.timm "
            "if they have lr_in_momentum, presets.sb3 for Stable-Baselines3; got "
            f"{getattr(preset, '__name__', preset)}."
        )
    return known


def _hyperparameters(groups, lr, preset):
    """Return the preset's arguments, on which all parameter groups must agree."""
    known = set(inspect.signature(preset).parameters)
    for k, group in enumerate(groups):
        at = f"param_groups[{k}]"
        arrange.check_entries(group, at, REQUIRED, "Pass optimizer.state_dict().")
        _check_enabled(at, group, preset)
        if "base_momentum" in group:
            raise ValueError(
                f"{at} has base_momentum: a scheduler changed momentum, which is "
                f"constant here. Remove it to resume with {group['momentum']}."
            )
        if lr is None and "initial_lr" in group:
            raise ValueError(
                f"{at} has initial_lr: a scheduler changed lr. Pass lr, the current "
                "number or an Optax schedule."
            )
        for name in sorted({*known, "initial_lr"}):
            first, other = groups[0].get(name), group.get(name)
            if first != other:
                raise ValueError(
                    f"{at} has {name}={other}, but param_groups[0] has {first}. "
                    "Convert each alone, as dict(param_groups=[group], state={i: "
                    "state_dict['state'][i] for i in group['params']}), and join them "
                    "with optax.partition."
                )
    numbers = _to_floats({name: groups[0][name] for name in known & {*groups[0]}})
    return numbers if lr is None else numbers | {"lr": lr}


def _check_enabled(at, group, preset):
    """Raise ValueError if a group enables an option that the preset does not have."""
    # Schedulers add other numbers, but an option that is True changes a step.
    known = {*inspect.signature(preset).parameters, *EXECUTION}
    enabled = [name for name in {*group} - known if group[name] is True]
    if enabled:
        raise ValueError(
            f"{at} has {', '.join(sorted(enabled))} enabled, unlike presets."
            f"{preset.__name__}. For another optimizer, pass its preset."
        )


def _to_floats(arguments):
    """Convert arguments to bools and floats, without dtypes, which PyTorch lacks."""
    return {
        name: x if isinstance(x, bool) else float(x)
        for name, x in arguments.items()
        if not name.endswith("_dtype")
    }
