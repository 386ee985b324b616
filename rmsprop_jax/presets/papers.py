"""Presets that reproduce the RMSProp of a paper or of its reference code."""

from typing import Unpack

from jax.typing import ArrayLike

from rmsprop_jax.presets.frameworks import Dtypes, LearningRate, Optimizer, preset, tf1
from rmsprop_jax.transform import rmsprop


@preset
def graves(learning_rate: LearningRate = 1e-4, **dtypes: Unpack[Dtypes]) -> Optimizer:
    """Create the RMSProp of Graves (2013), which is centered and has momentum.

    Args:
      learning_rate: learning rate or schedule.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      Graves, Generating Sequences With Recurrent Neural Networks, 2013, eqs. 38-45.
      Chainer, chainer/optimizers/rmsprop_graves.py.
    """
    return rmsprop(learning_rate, 0.95, 1e-4, centered=True, momentum=0.9, **dtypes)


@preset
def dqn(
    learning_rate: LearningRate = 2.5e-4,
    eps: ArrayLike = 0.01,
    **dtypes: Unpack[Dtypes],
) -> Optimizer:
    """Create the centered RMSProp of the Deep Q-Network (DQN) for Atari games.

    Args:
      learning_rate: learning rate or schedule.
      eps: added inside the square root, in units of |g|^2. The original loss is a sum
        over a batch of 32; for a mean, pass 0.01 / 32**2, as DQN Zoo does.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      Mnih et al., Human-level control through deep reinforcement learning, Nature 2015;
      its code, NeuralQLearner.lua. google-deepmind/dqn_zoo, dqn_zoo/dqn/run_atari.py.
    """
    return rmsprop(learning_rate, 0.95, eps, centered=True, **dtypes)


@preset
def a3c(learning_rate: LearningRate = 7e-4, **dtypes: Unpack[Dtypes]) -> Optimizer:
    """Create the RMSProp of PFRL's reproduction of A3C: decay 0.99, eps 0.1.

    Args:
      learning_rate: learning rate or schedule. PFRL decays it linearly to 0, and
        clips gradients to a norm of 40.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      pfnet/pfrl, examples/atari/reproduction/a3c/train_a3c.py, for Mnih et al.,
      Asynchronous Methods for Deep Reinforcement Learning, 2016.
    """
    return rmsprop(learning_rate, 0.99, 0.1, **dtypes)


@preset
def impala(learning_rate: LearningRate = 4.8e-4, **dtypes: Unpack[Dtypes]) -> Optimizer:
    """Create the RMSProp of IMPALA: `tf1` with decay 0.99 and epsilon 0.1.

    TorchBeast's IMPALA instead uses `torch(4.8e-4, alpha=0.99, eps=0.01)`.

    Args:
      learning_rate: learning rate or schedule; IMPALA decays it linearly to 0.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      deepmind/scalable_agent, experiment.py, for Espeholt et al., IMPALA, 2018.
    """
    return tf1(learning_rate, 0.99, 0.0, 0.1, **dtypes)


@preset
def inception(learning_rate: LearningRate, **dtypes: Unpack[Dtypes]) -> Optimizer:
    """Create the RMSProp of Inception-v3: `tf1` with momentum 0.9 and epsilon 1.

    Args:
      learning_rate: learning rate or schedule; in the paper 0.045, times 0.94 every
        second epoch. The momentum is from the code; the paper gives none.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2015, section 8.
      tensorflow/models, research/slim/train_image_classifier.py.
    """
    return tf1(learning_rate, 0.9, 0.9, 1.0, **dtypes)


@preset
def efficientnet(learning_rate: LearningRate, **dtypes: Unpack[Dtypes]) -> Optimizer:
    """Create the RMSProp of EfficientNet: `tf1` with momentum 0.9 and epsilon 1e-3.

    MnasNet and MobileNetV3 use the same.

    Args:
      learning_rate: learning rate or schedule; in the paper 0.256, times 0.97 every 2.4
        epochs, with a weight decay of 1e-5 in the loss. The epsilon is from the code.
      **dtypes: `nu_dtype` and `momentum_dtype`, as in `rmsprop`.

    References:
      Tan and Le, EfficientNet, 2019, section 5.2.
      tensorflow/tpu, models/official/efficientnet/utils.py.
    """
    return tf1(learning_rate, 0.9, 0.9, 1e-3, **dtypes)
