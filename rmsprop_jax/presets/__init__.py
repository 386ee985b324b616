"""Presets that reproduce the RMSProp of other frameworks and of papers.

The preset of a framework takes the arguments of its original in the same order, so that
porting a call changes only the name of the function; arguments that only affect
execution, such as `foreach`, are left out. Each returns and raises as `rmsprop` does,
and differs from it only as its docstring says.

Hyperparameters may be traced, as in `rmsprop`. A coefficient of 0 turns its term off,
as in the originals; an array of 0, as `optax.inject_hyperparams` makes, does not.

Example:
  >>> import jax.numpy as jnp
  >>> from rmsprop_jax import presets
  >>> optimizer = presets.torch(lr=0.01, momentum=0.9)
  >>> params = jnp.ones(3)
  >>> updates, state = optimizer.update(params, optimizer.init(params), params)
  >>> print(updates.round(3))
  [-0.1 -0.1 -0.1]
"""

from rmsprop_jax.presets.frameworks import keras, keras_legacy, sb3, tf1, timm, torch
from rmsprop_jax.presets.papers import a3c, dqn, efficientnet, graves, impala, inception

__all__ = ["a3c", "dqn", "efficientnet", "graves", "impala", "inception"]
__all__ += ["keras", "keras_legacy", "sb3", "tf1", "timm", "torch"]
