"""The RMSProp of other frameworks and of papers: `rmsprop`, with its options chosen.

A framework's preset takes the arguments of its original, in their order, so that a call
is ported by changing its first word; flags that only say how it is executed are left
out. Each docstring lists how the preset differs from `rmsprop`, whose own value stands
in brackets. What is returned, and what raises ValueError, is as in `rmsprop`.

Args:
  learning_rate, lr: step size, or an Optax schedule.
  decay, rho, alpha: share of the averages that each step keeps; `decay` in `rmsprop`.
  eps, epsilon: added to the denominator; see the preset for where.
  momentum: share of the momentum buffer that each step keeps; 0 means none.
  centered: divide by the gradient's standard deviation, not its root mean square.
  weight_decay: coefficient of the parameters; see the preset for where; 0 means none.
  nu_dtype, momentum_dtype: as in `rmsprop`.
Numbers may be traced, as in `rmsprop`. A term is off for a plain 0, as in the
originals; an array of 0, such as `optax.inject_hyperparams` makes, keeps its buffer.

Example:
  >>> import jax.numpy as jnp
  >>> from rmsprop_jax import presets
  >>> optimizer = presets.torch(lr=0.01, momentum=0.9)
  >>> params = jnp.ones(3)
  >>> updates, state = optimizer.update(params, optimizer.init(params), params)
  >>> print(updates.round(3))
  [-0.1 -0.1 -0.1]
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from rmsprop_jax import checks, storage
from rmsprop_jax.transform import PyTree, rmsprop

Dtype = DTypeLike | None
Rate = optax.ScalarOrSchedule
Transformation = optax.GradientTransformationExtraArgs


def torch(
    lr: Rate = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0,
    centered: bool = False,
    *,
    maximize: bool = False,
    nu_dtype: Dtype = None,
    momentum_dtype: Dtype = None,
) -> Transformation:
    """Build `torch.optim.RMSprop`.

    Differs from `rmsprop`: learning rate 0.01 (none), decay 0.99 (0.9), eps outside the
    root (inside), momentum buffer without the learning rate (with it), weight_decay
    added to the gradient (`l2`). With `maximize`, the gradient is negated before all
    else (no such option). The two parts of a complex number are two parameters (one),
    so its `nu` is complex too; outside `jit` each such array costs some small calls.

    References:
      PyTorch 2.13, torch/optim/rmsprop.py. The same without momentum: MLX, Chainer's
      RMSprop, bitsandbytes (which ignores `momentum`).
    """
    inner = rmsprop(
        lr,
        alpha,
        eps,
        eps_in_sqrt=False,
        centered=centered,
        momentum=_on(momentum),
        lr_in_momentum=False,
        l2=_on(weight_decay),
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )
    return _by_parts(inner, maximize, nu_dtype)


def tf1(
    learning_rate: Rate,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    *,
    centered: bool = False,
    nu_dtype: Dtype = None,
    momentum_dtype: Dtype = None,
) -> Transformation:
    """Build `tf.compat.v1.train.RMSPropOptimizer`.

    Differs from `rmsprop`: eps 1e-10 (1e-8), nu starts at 1 (0).

    References:
      TensorFlow 2.21, tensorflow/python/training/rmsprop.py. It rounds these numbers to
      float32; so 0.9 is 0.9 + 2e-8 there, seen only in float64.
    """
    return rmsprop(
        learning_rate,
        decay,
        epsilon,
        initial_scale=1.0,
        centered=centered,
        momentum=_on(momentum),
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def keras(
    learning_rate: Rate = 1e-3,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-7,
    centered: bool = False,
    weight_decay: ArrayLike | None = None,
    *,
    weight_decay_mask: PyTree | Callable[[optax.Params], PyTree] | None = None,
    nu_dtype: Dtype = None,
    momentum_dtype: Dtype = None,
) -> Transformation:
    """Build `keras.optimizers.RMSprop` of Keras 3.

    Differs from `rmsprop`: learning rate 0.001 (none), eps 1e-7 (1e-8). weight_decay is
    the same, and `weight_decay_mask` what `exclude_from_weight_decay` is there.

    References:
      Keras 3.15, keras/src/optimizers/rmsprop.py and base_optimizer.py.
    """
    return rmsprop(
        learning_rate,
        rho,
        epsilon,
        centered=centered,
        momentum=_on(momentum),
        weight_decay=_on(weight_decay),
        weight_decay_mask=weight_decay_mask,
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def keras_legacy(
    learning_rate: Rate = 1e-3,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike | None = 1e-7,
    centered: bool = False,
    *,
    nu_dtype: Dtype = None,
    momentum_dtype: Dtype = None,
) -> Transformation:
    """Build the RMSprop of Keras 2, now `tf_keras.optimizers.legacy.RMSprop`.

    Differs from `rmsprop`: learning rate 0.001 (none), eps 1e-7 (1e-8), outside the
    root unless there is momentum (inside). As there, epsilon None or 0 means 1e-7, and
    momentum in an array counts as momentum, also 0: under `optax.inject_hyperparams`,
    pass static_args="momentum" where there is none.

    References:
      tf_keras 2.21, tf_keras/src/optimizers/legacy/rmsprop.py. It rounds these numbers,
      but not epsilon, to float32.
    """
    return rmsprop(
        learning_rate,
        rho,
        1e-7 if epsilon is None or _on(epsilon) is None else epsilon,
        eps_in_sqrt=_on(momentum) is not None,
        centered=centered,
        momentum=_on(momentum),
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def timm(
    lr: Rate = 1e-2,
    alpha: ArrayLike = 0.9,
    eps: ArrayLike = 1e-10,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    *,
    lr_in_momentum: bool = True,
    nu_dtype: Dtype = None,
    momentum_dtype: Dtype = None,
) -> Transformation:
    """Build `timm.optim.RMSpropTF`, but not `caution` or `corrected_weight_decay`.

    Differs from `rmsprop`: learning rate 0.01 (none), eps 1e-10 (1e-8), nu starts at 1
    (0), weight_decay added to the gradient (`l2`) unless `decoupled_decay`.

    References:
      timm 1.0.31, timm/optim/rmsprop_tf.py.
    """
    return rmsprop(
        lr,
        alpha,
        eps,
        initial_scale=1.0,
        centered=centered,
        momentum=_on(momentum),
        lr_in_momentum=lr_in_momentum,
        l2=None if decoupled_decay else _on(weight_decay),
        weight_decay=_on(weight_decay) if decoupled_decay else None,
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def sb3(
    lr: Rate = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0,
    centered: bool = False,
    *,
    nu_dtype: Dtype = None,
    momentum_dtype: Dtype = None,
) -> Transformation:
    """Build Stable-Baselines3's `RMSpropTFLike`.

    Differs from `rmsprop`: learning rate 0.01 (none), decay 0.99 (0.9), nu starts at 1
    (0), momentum buffer without the learning rate (with it), weight_decay added to the
    gradient (`l2`).

    References:
      Stable-Baselines3 2.9, common/sb2_compat/rmsprop_tf_like.py.
    """
    return rmsprop(
        lr,
        alpha,
        eps,
        initial_scale=1.0,
        centered=centered,
        momentum=_on(momentum),
        lr_in_momentum=False,
        l2=_on(weight_decay),
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def graves(
    learning_rate: Rate = 1e-4, *, nu_dtype: Dtype = None, momentum_dtype: Dtype = None
) -> Transformation:
    """Build the RMSProp with which Graves generated sequences.

    Differs from `rmsprop`: learning rate 1e-4 (none), decay 0.95 (0.9), eps 1e-4
    (1e-8), momentum 0.9 (none), centered (not).

    References:
      Graves, Generating Sequences With Recurrent Neural Networks, 2013, eqs. 38-45.
      Chainer, chainer/optimizers/rmsprop_graves.py.
    """
    return rmsprop(
        learning_rate,
        0.95,
        1e-4,
        centered=True,
        momentum=0.9,
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def dqn(
    learning_rate: Rate = 2.5e-4,
    eps: ArrayLike = 0.01,
    *,
    nu_dtype: Dtype = None,
    momentum_dtype: Dtype = None,
) -> Transformation:
    """Build the RMSProp of the Deep Q-Network that played Atari games.

    Differs from `rmsprop`: learning rate 2.5e-4 (none), decay 0.95 (0.9), eps 0.01
    (1e-8), centered (not). The loss was a sum over a batch of 32: for a mean, pass
    eps=0.01 / 32**2, as DQN Zoo does.

    References:
      Mnih et al., Human-level control through deep reinforcement learning, Nature 2015;
      its code, NeuralQLearner.lua. google-deepmind/dqn_zoo, dqn_zoo/dqn/run_atari.py.
    """
    return rmsprop(
        learning_rate,
        0.95,
        eps,
        centered=True,
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def a3c(
    learning_rate: Rate = 7e-4, *, nu_dtype: Dtype = None, momentum_dtype: Dtype = None
) -> Transformation:
    """Build the RMSProp of PFRL's reproduction of A3C.

    Differs from `rmsprop`: learning rate 7e-4 (none), decay 0.99 (0.9), eps 0.1 (1e-8).
    There the learning rate falls linearly to 0, and gradients are clipped to a norm
    of 40.

    References:
      pfnet/pfrl, examples/atari/reproduction/a3c/train_a3c.py, for Mnih et al.,
      Asynchronous Methods for Deep Reinforcement Learning, 2016.
    """
    return rmsprop(
        learning_rate, 0.99, 0.1, nu_dtype=nu_dtype, momentum_dtype=momentum_dtype
    )


def impala(
    learning_rate: Rate = 4.8e-4,
    *,
    nu_dtype: Dtype = None,
    momentum_dtype: Dtype = None,
) -> Transformation:
    """Build the RMSProp of IMPALA: `tf1` with other numbers.

    Differs from `rmsprop`: learning rate 4.8e-4 (none), decay 0.99 (0.9), eps 0.1
    (1e-8), nu starts at 1 (0). There the learning rate falls linearly to 0. TorchBeast
    instead is `torch(4.8e-4, alpha=0.99, eps=0.01)`.

    References:
      deepmind/scalable_agent, experiment.py, for Espeholt et al., IMPALA, 2018.
    """
    return tf1(
        learning_rate,
        decay=0.99,
        momentum=0.0,
        epsilon=0.1,
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def inception(
    learning_rate: Rate, *, nu_dtype: Dtype = None, momentum_dtype: Dtype = None
) -> Transformation:
    """Build the RMSProp of Inception-v3: `tf1` with other numbers.

    Differs from `rmsprop`: eps 1.0 (1e-8), nu starts at 1 (0), momentum 0.9 (none;
    from the code, the paper names none). The paper's learning rate is 0.045, times 0.94
    every second epoch.

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2015, section 8.
      tensorflow/models, research/slim/train_image_classifier.py.
    """
    return tf1(
        learning_rate,
        decay=0.9,
        momentum=0.9,
        epsilon=1.0,
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def efficientnet(
    learning_rate: Rate, *, nu_dtype: Dtype = None, momentum_dtype: Dtype = None
) -> Transformation:
    """Build the RMSProp of EfficientNet and MnasNet: `tf1` with other numbers.

    Differs from `rmsprop`: eps 1e-3 (1e-8), nu starts at 1 (0), momentum 0.9 (none).
    The paper's learning rate is 0.256, times 0.97 every 2.4 epochs, with a weight decay
    of 1e-5 in the loss; eps is from the code.

    References:
      Tan and Le, EfficientNet, 2019, section 5.2.
      tensorflow/tpu, models/official/efficientnet/utils.py.
    """
    return tf1(
        learning_rate,
        decay=0.9,
        momentum=0.9,
        epsilon=1e-3,
        nu_dtype=nu_dtype,
        momentum_dtype=momentum_dtype,
    )


def _on(value):
    """Return None, which means off, for a plain zero."""
    return None if isinstance(value, int | float | np.number) and not value else value


def _by_parts(inner, maximize, nu_dtype):
    """Let `inner` see a complex array as a real one with a last axis of 2."""

    def init(params):
        checks.real_nu(nu_dtype, params)
        state = inner.init(params)
        if not any(map(np.iscomplexobj, jax.tree.leaves(params))):
            return state
        nu = jax.tree.map(_join, params, state.nu, state.nu)
        return state._replace(nu=nu)

    def update(updates, state, params=None, **extra_args):
        given = updates, state, params
        if not (maximize or any(map(np.iscomplexobj, jax.tree.leaves(given)))):
            return inner.update(*given, **extra_args)
        _check(updates, state)
        grads = updates
        if maximize:
            grads = jax.tree.map(lambda g: g if checks.absent(g) else -g, grads)
        new = inner.update(*jax.tree.map(_split, (grads, state, params)), **extra_args)
        return jax.tree.map(_unsplit, (updates, state), new)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(updates, state):
    """Refuse gradients that do not fit the state before they are taken apart."""
    if not hasattr(state, "nu"):
        return
    tree = storage.structure(state.nu)
    grads = checks.leaves("updates", updates, tree)
    buffer = storage.leaves(state.nu, tree)
    for i, (g, nu) in enumerate(zip(grads, buffer, strict=True)):
        if not checks.absent(g):
            checks.gradient(g, None, nu, nu, None, False, tree, i)


def _split(x):
    return jnp.stack([x.real, x.imag], axis=-1) if np.iscomplexobj(x) else x


def _unsplit(old, x):
    return _join(old, x[..., 0], x[..., 1]) if np.iscomplexobj(old) else x


def _join(old, real, imag):
    return jax.lax.complex(real, imag) if np.iscomplexobj(old) else real
