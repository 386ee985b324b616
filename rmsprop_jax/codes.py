"""One byte per element: codes and scales of the storage format uint8.

For x >= 0, with a scale s, a power of 4, for each row (the last axis):
    code 0           x = 0
    code 1 to 15     x = s * 2^-26 * 4^(code - 15)
    code 15 to 223   x = s * 2^-26 * 2^n * (1 + m / 8), with 8 * n + m = code - 15
    code 223 to 254  x = s * 4^(code - 223)
    code 255         NaN
From 2^-26 of s to s, this is floating point with 3 bits of mantissa; outside of that
range, codes are powers of 4. The bits of a float32, taken as an integer, grow linearly
between two such codes. To them the offset of the step is added before they are cut off:
stored averages are then correct on average over steps. Rounded to nearest, the elements
of a row could not move apart again. Between powers of 4, 2 is taken for the middle.

s is the smallest power of 4 that is at least twice the maximum of the row one step
earlier. Codes and the new maximum can therefore be written in the pass that computes x;
a row that outgrows s uses codes above 223 for one step. When s changes by a power of 4,
the numbers that codes can represent stay the same.

After one huge gradient, a row has less resolution until its largest average has
decayed.
"""

import jax
import jax.numpy as jnp

# The number of codes below the range with a mantissa, and of steps in that range.
COARSE, FINE = 15, 208
# The range of scales, as exponents of 4. With the smallest, codes reach up to 2^22, so
# that the first gradients of a row are not lost.
SMALLEST, LARGEST = -20, 63


def encode_dithered(x, scale, offset):
    """Encode rows with the scale that the last step left, correct on average.

    Args:
      x: new values; float32.
      scale: scale of the last step; bfloat16, like x with a last axis of size 1.
      offset: rounding offset of the step, as a fraction of 2^32; uint32 [].

    Returns:
      Codes; uint8, like x. Their scale and that of the next step, packed like `scale`.
    """
    exponent, _ = _unpack(scale)
    return _encode(x, exponent, (offset >> 12).astype(jnp.int32))


def encode_nearest(x):
    """Encode rows to nearest, each with the scale of its own maximum."""
    known = jnp.where(jnp.isnan(x), 0, x)
    return _encode(x, _exponent(jnp.max(known, axis=-1, keepdims=True)), 2**19)


@jax.jit
def encode_scalar(value):
    """Return the code and the scale of a row of which each element is `value`."""
    codes, scale = encode_nearest(jnp.full((1,), value, jnp.float32))
    return codes[0], scale[0]


def decode(codes, scale):
    """Decode rows to float32."""
    code = codes.astype(jnp.int32)
    if scale.dtype == jnp.float32:  # Of version 0.1; only storage.convert reads it.
        x = scale * (code.astype(jnp.float32) * (1 / 254)) ** 16
    else:
        _, exponent = _unpack(scale)
        fine = jnp.clip(code - COARSE, 0, FINE)
        steps = fine + 16 * (code - COARSE - fine)
        x = jnp.where(code == 0, 0, _float((steps << 20) + _origin(exponent)))
    return jnp.where(code == 255, jnp.nan, x)


def _encode(x, exponent, offset):
    """Encode rows with a scale of 4^exponent; offset is a fraction of 2^20."""
    known = ~jnp.isnan(x)
    # Bounded, because an infinite scale would lose the rest of the row.
    x = jnp.where(known, jnp.minimum(x, 4.0**LARGEST), 0)
    scale = jnp.max(_pack(_exponent(x), exponent), axis=-1, keepdims=True)
    # In units of 2^-20 of a step of the fine range; a power of 4 is 16 of these.
    steps = _bits(x) - _origin(exponent)
    fine = jnp.clip(steps, 0, FINE << 20)
    code = COARSE + (fine + (steps - fine >> 4) + offset >> 20)
    # On TPU, XLA writes what was converted from float32 in the same pass.
    codes = jnp.where(known, jnp.clip(code, 0, 254).astype(jnp.float32), 255)
    return codes.astype(jnp.uint8), scale.astype(jnp.bfloat16)


def _origin(exponent):
    """Return the bits of the least number with a mantissa, for a scale of 4^exponent."""
    return 2 * exponent + 127 - FINE // 8 << 23


def _exponent(x):
    """Return the smallest exponent of a scale for which 4^exponent >= 2 * x >= 0."""
    # One unit in the last place less, so that a power of 2 is not above itself.
    below = _bits(x) - 1
    return jnp.clip((((below >> 23) - 126) >> 1) + 1, SMALLEST, LARGEST)


def _pack(following, exponent):
    """Pack two exponents of 4 in the upper half of a float32 that grows with the first.

    The maximum of a row is then one reduction, which all backends fuse with the rest.
    """
    return _float((2 * following + 127 << 23) | (exponent - SMALLEST << 16))


def _unpack(scale):
    """Return the exponents of 4 of the scale of the next step and of the codes."""
    bits = _bits(scale.astype(jnp.float32))
    return ((bits >> 23) - 127) >> 1, (bits >> 16 & 127) + SMALLEST


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
