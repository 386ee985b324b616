"""Presets that reproduce the RMSProp of another framework."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar, Unpack

import jax
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from rmsprop_jax import checks
from rmsprop_jax.transform import PyTree, rmsprop

LearningRate = optax.ScalarOrSchedule
Optimizer = optax.GradientTransformationExtraArgs
Preset = TypeVar("Preset", bound=Callable[..., Optimizer])


class Dtypes(TypedDict, total=False):
    """Keyword arguments that every preset passes to `rmsprop`."""

    nu_dtype: DTypeLike | None
    momentum_dtype: DTypeLike | None


def preset(function: Preset) -> Preset:
    """Replace `**dtypes` in a signature by Dtypes, and reject other arguments."""
    signature = inspect.signature(function)
    *own, _ = signature.parameters.values()
    dtypes = [inspect.signature(rmsprop).parameters[x] for x in Dtypes.__annotations__]
    signature = signature.replace(parameters=own + dtypes)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"presets.{function.__name__}() {error}; its arguments are "
                f"{', '.join(signature.parameters)}."
            ) from None
        return function(*args, **kwargs)

    checked.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return checked  # pyright: ignore[reportReturnType]


def _none_if_zero(value: Any) -> Any:
    """Convert the number 0 to None, which means off; arrays pass through."""
    return None if isinstance(value, int | float | np.number) and not value else value


@preset
def torch(
    lr: LearningRate = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0,
    centered: bool = False,
    *,
    maximize: bool = False,
    **dtypes: Unpack[Dtypes],
) -> Optimizer:
    """Create the equivalent of `torch.optim.RMSprop`.

    PyTorch treats a complex parameter as two real ones. To do the same, wrap this in
    `optax.contrib.split_real_and_imaginary`.

    Args:
      lr: learning rate or schedule.
      alpha: decay rate of the moving averages (`decay`).
      eps: added outside the square root, in units of |g|.
      weight_decay: coefficient of params, added to the gradient (`l2`).
      momentum: decay rate of the momentum buffer; the learning rate is not in it.
      centered: divide by the standard deviation of the gradient.
      maximize: negate the gradient before anything else.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      PyTorch 2.13, torch/optim/rmsprop.py. Without momentum, MLX, Chainer's
      RMSprop and bitsandbytes (which ignores `momentum`) do the same.
    """
    tx = rmsprop(
        lr,
        alpha,
        eps,
        eps_in_sqrt=False,
        centered=centered,
        momentum=_none_if_zero(momentum),
        lr_in_momentum=False,
        l2=_none_if_zero(weight_decay),
        **dtypes,
    )
    if not maximize:
        return tx

    def update(updates, state, params=None, **extra_args):
        updates = jax.tree.map(lambda g: g if checks.is_absent(g) else -g, updates)
        return tx.update(updates, state, params, **extra_args)

    return Optimizer(tx.init, update)


@preset
def tf1(
    learning_rate: LearningRate,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    *,
    centered: bool = False,
    **dtypes: Unpack[Dtypes],
) -> Optimizer:
    """Create the equivalent of TensorFlow 1's `RMSPropOptimizer`; `nu` starts at 1.

    Args:
      learning_rate: learning rate or schedule.
      decay: decay rate of the moving averages.
      momentum: decay rate of the momentum buffer.
      epsilon: added inside the square root, in units of |g|^2.
      centered: divide by the standard deviation of the gradient.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      TensorFlow 2.21, tensorflow/python/training/rmsprop.py. It rounds hyperparameters
      to float32, so 0.9 is 0.9 - 2e-8 there; visible only in float64.
    """
    return timm(learning_rate, decay, epsilon, 0, momentum, centered, **dtypes)


@preset
def keras(
    learning_rate: LearningRate = 1e-3,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-7,
    centered: bool = False,
    weight_decay: ArrayLike | None = None,
    *,
    weight_decay_mask: PyTree | Callable[[optax.Params], PyTree] | None = None,
    **dtypes: Unpack[Dtypes],
) -> Optimizer:
    """Create the equivalent of `keras.optimizers.RMSprop` of Keras 3.

    Args:
      learning_rate: learning rate or schedule.
      rho: decay rate of the moving averages (`decay`).
      momentum: decay rate of the momentum buffer.
      epsilon: added inside the square root, in units of |g|^2.
      centered: divide by the standard deviation of the gradient.
      weight_decay: coefficient of decoupled weight decay.
      weight_decay_mask: pytree of bools, in place of `exclude_from_weight_decay`.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      Keras 3.15, keras/src/optimizers/rmsprop.py and base_optimizer.py.
    """
    weight_decay = _none_if_zero(weight_decay)
    return rmsprop(
        learning_rate,
        rho,
        epsilon,
        centered=centered,
        momentum=_none_if_zero(momentum),
        weight_decay=weight_decay,
        weight_decay_mask=None if weight_decay is None else weight_decay_mask,
        **dtypes,
    )


@preset
def keras_legacy(
    learning_rate: LearningRate = 1e-3,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike | None = 1e-7,
    centered: bool = False,
    **dtypes: Unpack[Dtypes],
) -> Optimizer:
    """Create the equivalent of Keras 2's `tf_keras.optimizers.legacy.RMSprop`.

    As in the original, an array counts as momentum even if it is 0: without momentum,
    pass static_args="momentum" to `optax.inject_hyperparams`.

    Args:
      learning_rate: learning rate or schedule.
      rho: decay rate of the moving averages (`decay`).
      momentum: decay rate of the momentum buffer.
      epsilon: added inside the square root with momentum, and outside it without; None
        and 0 mean 1e-7.
      centered: divide by the standard deviation of the gradient.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      tf_keras 2.21, tf_keras/src/optimizers/legacy/rmsprop.py. It rounds
      hyperparameters, but not epsilon, to float32.
    """
    momentum = _none_if_zero(momentum)
    epsilon = _none_if_zero(epsilon)
    return rmsprop(
        learning_rate,
        rho,
        1e-7 if epsilon is None else epsilon,
        eps_in_sqrt=momentum is not None,
        centered=centered,
        momentum=momentum,
        **dtypes,
    )


@preset
def timm(
    lr: LearningRate = 1e-2,
    alpha: ArrayLike = 0.9,
    eps: ArrayLike = 1e-10,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    *,
    lr_in_momentum: bool = True,
    **dtypes: Unpack[Dtypes],
) -> Optimizer:
    """Create the equivalent of `timm.optim.RMSpropTF`.

    `nu` starts at 1. `caution` and `corrected_weight_decay` are not supported.

    Args:
      lr: learning rate or schedule.
      alpha: decay rate of the moving averages (`decay`).
      eps: added inside the square root, in units of |g|^2.
      weight_decay: coefficient of params, added to the gradient (`l2`).
      momentum: decay rate of the momentum buffer.
      centered: divide by the standard deviation of the gradient.
      decoupled_decay: apply weight decay to params instead of the gradient.
      lr_in_momentum: as in `rmsprop`.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      timm 1.0.31, timm/optim/rmsprop_tf.py.
    """
    weight_decay = _none_if_zero(weight_decay)
    return rmsprop(
        lr,
        alpha,
        eps,
        initial_scale=1.0,
        centered=centered,
        momentum=_none_if_zero(momentum),
        lr_in_momentum=lr_in_momentum,
        l2=None if decoupled_decay else weight_decay,
        weight_decay=weight_decay if decoupled_decay else None,
        **dtypes,
    )


@preset
def sb3(
    lr: LearningRate = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0,
    centered: bool = False,
    **dtypes: Unpack[Dtypes],
) -> Optimizer:
    """Create the equivalent of Stable-Baselines3's `RMSpropTFLike`; `nu` starts at 1.

    Args:
      lr: learning rate or schedule.
      alpha: decay rate of the moving averages (`decay`).
      eps: added inside the square root, in units of |g|^2.
      weight_decay: coefficient of params, added to the gradient (`l2`).
      momentum: decay rate of the momentum buffer; the learning rate is not in it.
      centered: divide by the standard deviation of the gradient.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      Stable-Baselines3 2.9, common/sb2_compat/rmsprop_tf_like.py.
    """
    return timm(
        lr, alpha, eps, weight_decay, momentum, centered, lr_in_momentum=False, **dtypes
    )
