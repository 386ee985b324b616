"""How a buffer of the state is kept: as it is, in bfloat16, or in one byte a number.

`decode` and `encode` stand before and after the rule, one array at a time, and the rule
does not know of them. It makes the update from the fresh average, before that is
stored; so |u| <= 1 / sqrt(1 - decay) for any finite |g|^2, whatever storing loses.

float32, float64:
    as they are

bfloat16, for step t:
    x = the upper 16 of the 32 bits of x + (t * 0x9E3779B9 mod 2^32) / 2^16
  Rounded to nearest, an average would freeze once it changes by less than 1/512 a step.
  This offset, the same for all elements, visits all of [0, 65536) evenly in time.

uint8, for x >= 0 and a scale for each row along the last axis:
    scale = max(x)
    code = 254 * (x / scale)^(1/16), down or up to a whole number; 255 means NaN
    x = scale * (code / 254)^16
  Codes are 6 % apart at the top and 40 % at 2^-42 of it. Up, if x is further from the
  lower neighbour to the upper than the offset of the step, of 1: so x is right on
  average here too. To the nearest, numbers of a row could not move apart again.

Where one huge gradient raised an average, its row has less resolution until that has
decayed. Derivatives through what is stored are 0.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rmsprop_jax import checks

PyTree = Any
# Of a scale: with it, the reciprocal is a normal number too.
LARGEST = 2.0**126


class Quantized(NamedTuple):
    """A buffer in codes of one byte.

    Attributes:
      codes: uint8; or the float32 values themselves where there is little to gain: of
        fewer than 4,096 numbers, fewer than two axes, or rows of fewer than 8.
      scale: largest number of each row; float32, like codes with a last axis of 1; of
        size 1 where codes are the values.
    """

    codes: PyTree
    scale: PyTree

    @property
    def shape(self):
        """Shape of the buffer of one parameter."""
        return self.codes.shape

    @property
    def dtype(self):
        """What `nu_dtype` was."""
        return jnp.dtype(jnp.uint8)


def full(p, value, dtype, kept):
    """Return the stored array like p in which each number is `value`, wide of dtype.

    A constant has no sharding of its own; one computed from p takes p's. The product
    with 0 is 0 for NaN too, and of floats it is not folded before p's sharding is seen.
    """
    none = p != p
    if kept == jnp.uint8 and _gains(p.shape):
        # Not by `store`: compilers take seconds to fold the row maximum of a constant.
        scale = _fill(none.any(axis=-1, keepdims=True), jnp.float32, value)
        codes = _fill(none, jnp.float32, 254).astype(jnp.uint8)
        return Quantized(codes, jnp.minimum(scale, LARGEST))
    return store(_fill(none, dtype, value), kept)


def _fill(like, dtype, value):
    return like.astype(dtype) * 0 + jnp.asarray(value, dtype)


def store(x, dtype):
    """Return an array of 32 bits or more in the format of a dtype; None: as is."""
    if dtype is None or jnp.iscomplexobj(x):
        return x
    if dtype == jnp.bfloat16:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
    if dtype != jnp.uint8:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    if not _gains(x.shape):
        return Quantized(x, _fill((x != x).any(keepdims=True), jnp.float32, 1))
    return _quantize(x, 0.5)


def _gains(shape):
    return len(shape) > 1 and math.prod(shape) >= 4096 and shape[-1] >= 8


def encode(x, old, t):
    """Return the new values of a stored array in its format.

    Args:
      x: what `decode(old)` became in this step; of its shape and dtype.
      old: array or Quantized of arrays, or None as x then is.
      t: number of this step; int32 [].
    """
    offset = t.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    if isinstance(old, Quantized):
        if old.codes.dtype != jnp.uint8:
            return Quantized(x, old.scale)
        return _quantize(x, (offset >> 8).astype(jnp.float32) * 2.0**-24)
    if old is None or old.dtype != jnp.bfloat16:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # The largest number, infinity and NaN have nothing above them to go to.
    last = bits & 0x7FFF0000 >= 0x7F7F0000
    bits = jnp.where(last, bits, bits + (offset >> 16)) & jnp.uint32(0xFFFF0000)
    # Exact now. A shift to 16 bits instead would split the kernel on TPU.
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def decode(stored) -> Any:
    """Return the values of a stored array; None for None."""
    if isinstance(stored, Quantized):
        codes, scale = stored
        if codes.dtype != jnp.uint8:
            return codes
        return jnp.where(codes == 255, jnp.nan, scale * _ratio(codes))
    if stored is None or stored.dtype != jnp.bfloat16:
        return stored
    return stored.astype(jnp.float32)


def _ratio(codes):
    """Return what codes stand for, in shares of the scale."""
    return (codes.astype(jnp.float32) * (1 / 254)) ** 16


def _quantize(x, offset):
    known = ~jnp.isnan(x)
    # Bounded, because an infinite scale would lose the rest of the row.
    x = jnp.where(known, jnp.minimum(x, LARGEST), 0)
    scale = jnp.max(x, axis=-1, keepdims=True)
    x = x * (1 / jnp.maximum(scale, 1 / LARGEST))
    root = jnp.sqrt(jnp.sqrt(jnp.sqrt(jnp.sqrt(x))))
    code = jnp.floor(254 * root)
    low, high = _ratio(code), _ratio(code + 1)
    up = x - low > offset * (high - low)
    codes = jnp.where(known, jnp.minimum(code + up.astype(jnp.float32), 254), 255)
    return Quantized(codes.astype(jnp.uint8), scale)


def convert(
    state: Any,
    *,
    nu_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
) -> Any:
    """Return a state in other formats; a run goes on in those its state has.

    So a state from elsewhere can be made small, and a small one be made readable. Large
    states are best converted under `jax.jit`.

    Args:
      state: RMSPropState.
      nu_dtype: as in `rmsprop`; None: the values, at least float32.
      momentum_dtype: the same for `mu` and `trace`; complex arrays stay as they are.

    Returns:
      A state with the same count, rounded to nearest; arrays that need no change are
      shared with `state`.

    Raises:
      ValueError: if a dtype is not one of those, or this is no RMSPropState; if `nu` is
        complex, as presets.torch keeps it for complex parameters, and nu_dtype is
        bfloat16 or uint8.

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
    if not (hasattr(state, "nu") and hasattr(state, "trace")):
        raise ValueError(
            f"state must be an RMSPropState, got {type(state).__name__}. In the state "
            "of a chain, it is one of the elements."
        )
    nu_dtype = checks.state_dtype("nu_dtype", nu_dtype)
    momentum_dtype = checks.state_dtype("momentum_dtype", momentum_dtype)
    checks.real_nu(nu_dtype, state.nu)

    def change(buffer, dtype):
        if buffer is None:
            return None
        tree = structure(buffer)
        arrays = [store(decode(x), dtype) for x in leaves(buffer, tree)]
        return unflatten(tree, arrays, dtype == jnp.uint8)

    return state._replace(
        nu=change(state.nu, nu_dtype),
        mu=change(state.mu, momentum_dtype),
        trace=change(state.trace, momentum_dtype),
    )


def structure(buffer):
    """Return the structure of the parameters to which a buffer belongs."""
    return jax.tree.structure(buffer.codes if isinstance(buffer, Quantized) else buffer)


def leaves(buffer, tree):
    """Return the stored arrays of a buffer, one for each leaf of the parameters."""
    if isinstance(buffer, Quantized):
        return list(map(Quantized, *map(tree.flatten_up_to, buffer)))
    return tree.flatten_up_to(buffer)


def unflatten(tree, arrays, quantized):
    """Return the buffer of these stored arrays; two trees, never a tree of pairs."""
    if quantized:
        return Quantized(*(tree.unflatten([x[k] for x in arrays]) for k in (0, 1)))
    return tree.unflatten(arrays)
