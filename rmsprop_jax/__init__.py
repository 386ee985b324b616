"""RMSProp as an Optax gradient transformation."""

from rmsprop_jax import diagnostics, interop, plots, presets, sharding, storage
from rmsprop_jax.transform import RMSPropState, rmsprop, scale_by_rms

__all__ = [
    "RMSPropState",
    "diagnostics",
    "interop",
    "plots",
    "presets",
    "rmsprop",
    "scale_by_rms",
    "sharding",
    "storage",
]
