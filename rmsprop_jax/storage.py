"""Storage formats for optimizer state: float32 or float64, bfloat16, uint8.

`decode` runs before the rule and `encode_dithered` after it, one array at a time. The
update is computed from the new average before that is rounded, so |u| <= 1 / sqrt(1 -
decay) holds in every format.

float32 and float64 are stored unchanged. uint8 has one code per element and one scale
per row: `rmsprop_jax.codes`. bfloat16 is the upper 16 of the 32 bits of x + an offset
below 2^16. Rounded to nearest instead, an average would freeze once a step changes it
by less than 1/512. The offset is the same for all elements, and is evenly distributed
over the steps.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.typing import DTypeLike

from rmsprop_jax import codes, rule, sharding

__all__ = ["Quantized", "convert"]


class Quantized(NamedTuple):
    """A moving average stored as one byte per element.

    Attributes:
      codes: pytree like params; uint8. Arrays that would gain little (fewer than 4,096
        elements, fewer than two axes, or rows of fewer than 8) hold float32 values.
      scale: scales of each row, for this step and the next; bfloat16, like codes with a
        last axis of size 1. Beside float32 values, it has one unused element.
    """

    codes: Any
    scale: Any

    @property
    def shape(self):
        """Return the shape of the stored array, if the fields are arrays, not trees."""
        return self.codes.shape


# For jax.export of functions of a state.
export.register_namedtuple_serialization(
    Quantized, serialized_name="rmsprop_jax.Quantized"
)


def state_dtype(name: str, dtype: DTypeLike | None):
    """Validate `nu_dtype` or `momentum_dtype`, and return it as a dtype or None."""
    if dtype is None:
        return None
    allowed = [jnp.float32, jnp.float64, jnp.bfloat16]
    if name == "nu_dtype":  # Codes are unsigned, but momentum is signed.
        allowed.append(jnp.uint8)
    try:
        known = jnp.dtype(dtype) if isinstance(dtype, str | type | np.dtype) else None
    except TypeError:
        known = None
    if known not in allowed:
        names = ", ".join(jnp.dtype(x).name for x in allowed)
        raise ValueError(
            f"{name} must be {names} or None, got {known or repr(dtype)}. In "
            "optax.inject_hyperparams, list it in static_args."
        )
    if known != jax.dtypes.canonicalize_dtype(known):
        raise ValueError(f"{name}={known} needs jax.config.jax_enable_x64.")
    return known


def is_supported(stored) -> bool:
    """Return whether an array, or a pair of codes and scale, has a known format."""
    if not isinstance(stored, Quantized):
        return stored.dtype in (jnp.bfloat16, rule.at_least_float32(stored.dtype))
    values, scale = stored
    if values.dtype == jnp.uint8:
        fits = scale.shape == (*values.shape[:-1], 1)
    else:
        fits = values.dtype == jnp.float32 and scale.size == 1
    return fits and scale.dtype == jnp.bfloat16


def worth_quantizing(shape) -> bool:
    """Return whether an array of this shape is stored as codes."""
    return len(shape) > 1 and math.prod(shape) >= 4096 and shape[-1] >= 8


def initial(p, value, default_dtype, nu_dtype):
    """Create the stored average of a parameter p, with every element equal to `value`.

    `nu_dtype` is a result of `state_dtype`; None means `default_dtype`.
    """
    full = functools.partial(sharding.full_like, p)
    if nu_dtype != jnp.uint8:
        return full(p.shape, value, nu_dtype or default_dtype)
    if not worth_quantizing(p.shape):
        scale = full((1,) * p.ndim, 1.0, jnp.bfloat16)
        return Quantized(full(p.shape, value, jnp.float32), scale)
    with jax.transfer_guard("allow"):
        code, scale = codes.encode_scalar(value)
    scale = full((*p.shape[:-1], 1), scale, jnp.bfloat16)
    return Quantized(full(p.shape, code, jnp.uint8), scale)


def encode_nearest(x, dtype):
    """Encode an array of at least 32 bits, to nearest; unchanged if dtype is None."""
    if dtype is None or jnp.iscomplexobj(x):
        return x
    if dtype == jnp.bfloat16:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
    if dtype != jnp.uint8:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    if not worth_quantizing(x.shape):
        return Quantized(x, sharding.full_like(x, (1,) * x.ndim, 1.0, jnp.bfloat16))
    return Quantized(*codes.encode(x))


def encode_dithered(x, old, t):
    """Encode new values in the format of the old, correct on average over steps.

    x has the shape and dtype of `decode(old)`, or both are None; t is an int32 [].
    """
    if isinstance(old, Quantized):
        if old.codes.dtype != jnp.uint8:
            return Quantized(x, old.scale)
        return Quantized(*codes.encode(x, old.scale, _dither(t)))
    if old is None or old.dtype != jnp.bfloat16:
        return x
    bits = x.view(jnp.uint32)
    # The largest number, infinity and NaN cannot be rounded up.
    last = bits & 0x7FFF0000 >= 0x7F7F0000
    bits = jnp.where(last, bits, bits + (_dither(t) >> 16)) & jnp.uint32(0xFFFF0000)
    # The cast is exact. A shift to 16 bits would split the kernel on TPU.
    return bits.view(jnp.float32).astype(jnp.bfloat16)


def _dither(t):
    """Return the rounding offset of step t, as a fraction of 2^32; uint32 [].

    The van der Corput sequence, t with its bits reversed, is evenly distributed over
    the steps, and over every nth step unless n is a multiple of a large power of 2, for
    which 165/256 is added every 256 steps.
    """
    t = bits = t.astype(jnp.uint32)
    masks = (0xFFFF, 0xFF00FF, 0xF0F0F0F, 0x33333333, 0x55555555)
    for n, mask in zip((16, 8, 4, 2, 1), masks, strict=True):
        bits = ((bits & mask) << n) | ((bits >> n) & mask)
    return bits + ((t >> 8) * 165 << 24)


def decode(stored) -> Any:
    """Decode a stored array to its values; None passes through."""
    if isinstance(stored, Quantized):
        if stored.codes.dtype == jnp.uint8:
            return codes.decode(*stored)
        stored = stored.codes
    if stored is None or stored.dtype != jnp.bfloat16:
        return stored
    return stored.astype(jnp.float32)


def convert(
    state: Any,
    *,
    nu_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
) -> Any:
    """Convert an optimizer state to other storage formats.

    An update keeps the formats of the state that it is given. Use this function to
    change them during a run, or to decode a uint8 state.

    Args:
      state: RMSPropState.
      nu_dtype: as in `rmsprop`; None means decoded, at least float32.
      momentum_dtype: the same for `mu` and `trace`; complex arrays are unchanged.

    Returns:
      A state with the same count, rounded to nearest. Arrays that need no change are
      shared with `state`.

    Raises:
      ValueError: if a dtype is not supported, or `state` is not an RMSPropState.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, storage
      >>> state = rmsprop(0.1).init(jnp.ones((64, 64)))
      >>> small = storage.convert(state, nu_dtype=jnp.uint8)
      >>> print(small.nu.codes.dtype, small.nu.scale.shape)
      uint8 (64, 1)

    References:
      The formats: `rmsprop_jax.storage`.
    """
    check_state(state, "In the state of a chain, it is one of the elements.")
    nu_dtype = state_dtype("nu_dtype", nu_dtype)
    return _convert(state, nu_dtype, state_dtype("momentum_dtype", momentum_dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(state, nu_dtype, momentum_dtype):
    def change(buffer, dtype):
        treedef = params_treedef(buffer)
        arrays = [encode_nearest(decode(x), dtype) for x in leaves(buffer, treedef)]
        return unflatten(treedef, arrays, dtype == jnp.uint8)

    return state._replace(
        nu=change(state.nu, nu_dtype),
        mu=change(state.mu, momentum_dtype),
        trace=change(state.trace, momentum_dtype),
    )


def check_state(state, fix):
    """Raise ValueError unless this is an RMSPropState or a copy with its fields."""
    if not (hasattr(state, "nu") and hasattr(state, "trace")):
        raise ValueError(
            f"state must be an RMSPropState, got {type(state).__name__}. {fix}"
        )


def params_treedef(buffer):
    """Return the treedef of the parameters that a buffer belongs to."""
    return jax.tree.structure(buffer.codes if isinstance(buffer, Quantized) else buffer)


def leaves(buffer, treedef):
    """Return the stored arrays of a buffer, one for each leaf of the parameters."""
    if isinstance(buffer, Quantized):
        return list(map(Quantized, *map(treedef.flatten_up_to, buffer)))
    return treedef.flatten_up_to(buffer)


def unflatten(treedef, arrays, quantized):
    """Build a buffer from stored arrays; if quantized, as a pair of trees."""
    if quantized:
        return Quantized(*(treedef.unflatten([x[k] for x in arrays]) for k in (0, 1)))
    return treedef.unflatten(arrays)
