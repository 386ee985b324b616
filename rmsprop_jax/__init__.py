"""RMSProp as an Optax gradient transformation."""

from rmsprop_jax import interop, presets, sharding, storage
from rmsprop_jax.transform import RMSPropState, rmsprop, scale_by_rms

__all__ = [
    "RMSPropState",
    "interop",
    "presets",
    "rmsprop",
    "scale_by_rms",
    "sharding",
    "storage",
]
