"""Convert state from and to PyTorch's, timm's and Stable-Baselines3's RMSprop."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from rmsprop_jax import checks, presets
from rmsprop_jax.interop import arrange
from rmsprop_jax.transform import RMSPropState

Preset = Callable[..., optax.GradientTransformationExtraArgs]
NAMES = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"}
REQUIRED = ("params", "lr", "alpha", "eps", "weight_decay", "momentum", "centered")
# Entries of a parameter group that do not change what a step computes.
NEUTRAL = ("foreach", "capturable", "differentiable", "initial_lr")


def from_torch(
    state_dict: Mapping[str, Any],
    to_params: arrange.ToParams,
    *,
    lr: optax.ScalarOrSchedule | None = None,
    preset: Preset | None = None,
    params: Mapping[Any, Any] | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, RMSPropState]:
    """Convert the state of `torch.optim.RMSprop` to resume its run in JAX.

    Convert parameter groups with different hyperparameters (`l2` takes no mask) one at
    a time, with `optax.MaskedNode()` for the parameters of the others, and combine them
    with `optax.partition`: in the state that its `init` returns, replace `inner_states`
    by `{label: optax.MaskedState(state), ...}`.

    Args:
      state_dict: result of `optimizer.state_dict()`.
      to_params: as in `rmsprop_jax.interop`.
      lr: learning rate, or schedule, which continues at the saved step; None means that
        of the parameter group. Required if a PyTorch scheduler was used.
      preset: `presets.sb3` for Stable-Baselines3. PyTorch and timm are recognized.
      params: `dict(enumerate(model.parameters()))`, required if some never had a
        gradient: PyTorch has no state for them, and they get the initial one. Frozen
        parameters must have None as gradient.

    Returns:
      The gradient transformation, with the hyperparameters of the group, and its state,
      whose count is the largest step of any parameter.

    Raises:
      ValueError: if an entry is missing or unknown, parameter groups differ, elements
        are lost or changed, or an array is not finite, has another shape, or is not
        float32 or float64.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop, presets
      >>> state = presets.torch().init({"kernel": jnp.ones((3, 2))})
      >>> saved = interop.to_torch(state, lambda p: [p["kernel"].T], lr=0.01)
      >>> optimizer, state = interop.from_torch(saved, lambda x: {"kernel": x[0].T})
      >>> print(state.count, state.nu["kernel"].shape)
      0 (3, 2)

    References:
      PyTorch 2.13, torch/optim/rmsprop.py.
    """
    fix, params = "Pass optimizer.state_dict().", params or {}
    arrange.check_entries(state_dict, "state_dict", ["state", "param_groups"], fix)
    rows, groups = state_dict["state"], state_dict["param_groups"]
    for k, group in enumerate(groups):
        at = f"param_groups[{k}]"
        arrange.check_entries(group, at, REQUIRED, fix)
        preset = _choose_preset(at, group, preset)
        _check_group(at, group, groups[0], preset, lr)
    labels = {i: f"state_dict['state'][{i!r}]" for x in groups for i in x["params"]}
    if preset is None or not labels:
        raise ValueError("state_dict['param_groups'] must have params, got none.")
    known = inspect.signature(preset).parameters
    options = _to_floats({k: x for k, x in groups[0].items() if k in known})
    optimizer = preset(**options | ({} if lr is None else {"lr": lr}))
    names = arrange.buffer_names(NAMES, options)

    def initial_row(i):
        state = optimizer.init(arrange.check_array(f"params[{i!r}]", params[i]))
        return {"step": 0} | {name: getattr(state, k) for k, name in names.items()}

    fix = "PyTorch has none if the parameter never had a gradient: pass params."
    required = [i for i in labels if i not in params]
    arrange.check_entries(rows, "state_dict['state']", required, fix, optional=labels)
    rows = {at: rows[i] if i in rows else initial_row(i) for i, at in labels.items()}
    fix = "They must match centered and momentum of the parameter group."
    for at, row in rows.items():
        arrange.check_entries(row, at, ["step", *names.values()], fix, optional=())
    counts = {f"{at}['step']": row["step"] for at, row in rows.items()}
    buffers = {
        field: {f"{at}[{name!r}]": row[name] for at, row in rows.items()}
        for field, name in names.items()
    }
    return optimizer, arrange.to_state(counts, buffers, to_params)


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
      from_params: as in `rmsprop_jax.interop`, but returns torch tensors.
      preset: `presets.torch`, `timm` or `sb3`.
      **hyperparameters: `**optimizer.param_groups[0]` of an optimizer that was built
        with those of the run, or arguments of the preset, with the current `lr`, and
        PyTorch's `foreach`, `capturable`, `differentiable` and `initial_lr`, which a
        scheduler with `last_epoch` needs.

    Returns:
      A dict for `optimizer.load_state_dict`, with one parameter group, which replaces
      that of the optimizer. Attach a scheduler after loading.

    Raises:
      ValueError: as in `from_torch`, or if `lr` is missing, or `momentum` or `centered`
        contradicts the state.
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
    if "params" in hyperparameters:  # All entries of a parameter group.
        _choose_preset("**hyperparameters", hyperparameters, preset)
    else:
        neutral = {k: hyperparameters.pop(k) for k in NEUTRAL if k in hyperparameters}
        preset(**hyperparameters)  # Rejects unknown ones.
        hyperparameters = _to_floats(hyperparameters) | neutral
    defaults = {k: x.default for k, x in inspect.signature(preset).parameters.items()}
    group = _to_floats(defaults | {"lr": lr}) | hyperparameters
    checks.state(state, bool(group["centered"]), bool(group["momentum"]))
    lists = arrange.from_state(state, from_params)
    step = float(state.count)
    rows = {
        i: {"step": step} | {NAMES[field]: x[i] for field, x in lists.items()}
        for i in range(len(lists["nu"]))
    }
    return {"state": rows, "param_groups": [group | {"params": list(rows)}]}


def _choose_preset(at, group, preset) -> Preset:
    """Choose the preset that matches a parameter group, which must not do more."""
    known = presets.torch if "maximize" in group else preset
    known = presets.timm if "lr_in_momentum" in group else known
    allowed = (presets.torch, presets.timm, presets.sb3)
    if known not in allowed or preset not in (None, known):
        raise ValueError(
            "preset must be presets.torch if param_groups have maximize, presets.timm "
            "if they have lr_in_momentum, presets.sb3 for Stable-Baselines3; got "
            f"{getattr(preset, '__name__', preset)}."
        )
    # Schedulers add other numbers, but an option that is True changes a step.
    neutral = {*inspect.signature(known).parameters, *NEUTRAL}
    enabled = [name for name in {*group} - neutral if group[name] is True]
    if enabled:
        raise ValueError(
            f"{at} has {', '.join(sorted(enabled))} enabled, unlike presets."
            f"{known.__name__}. For another optimizer, pass its preset."
        )
    return known


def _check_group(at, group, first, preset, lr):
    """Raise ValueError if hyperparameters change in the run or between groups."""
    if "base_momentum" in group:
        raise ValueError(
            f"{at} has base_momentum: a scheduler changed momentum, which is constant "
            f"here. Remove it to resume with {group['momentum']}."
        )
    if lr is None and "initial_lr" in group:
        raise ValueError(
            f"{at} has initial_lr: a scheduler changed lr. Pass lr, the current number "
            "or an Optax schedule."
        )
    for name in sorted({*inspect.signature(preset).parameters, "initial_lr"}):
        if first.get(name) != group.get(name):
            raise ValueError(
                f"{at} has {name}={group.get(name)}, but param_groups[0] has "
                f"{first.get(name)}. Convert each alone, as dict(param_groups=[group], "
                "state={i: x for i, x in state_dict['state'].items() if i in "
                "group['params']}), and join them with optax.partition."
            )


def _to_floats(arguments) -> dict[str, Any]:
    """Convert arguments to bools and floats, without dtypes, which PyTorch lacks."""
    return {
        name: x if isinstance(x, bool) else float(x)
        for name, x in arguments.items()
        if not name.endswith("_dtype")
    }
