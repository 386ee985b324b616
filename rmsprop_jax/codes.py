"""One byte per element: the codes and scales of the storage format uint8.

Each row (the last axis) of x >= 0 has a scale s, a power of 4, and each element a code:
    code 0           x = 0
    code 1 to 23     1 code for each factor of 2, from s * 2^-59 to s * 2^-37
    code 23 to 39    2 codes for each factor of 2, from s * 2^-37 to s * 2^-29
    code 39 to 87    4 codes for each factor of 2, from s * 2^-29 to s * 2^-17
    code 87 to 223   8 codes for each factor of 2, from s * 2^-17 to s
    code 223 to 254  x = s * 4^(code - 223)
    code 255         NaN

Up to s, a code is a floating-point number with a mantissa of 0 to 3 bits. The bits of a
float32, taken as an integer, grow linearly between two such numbers, so the code with
its fraction is a piecewise linear function of them. The rounding offset of the step is
added before the fraction is cut off: stored averages are then correct on average over
steps. Rounded to nearest, the elements of a row could not move apart again. (Above s, 2
is taken for the middle between powers of 4.)

s is the smallest power of 4 that is at least twice the maximum of the row one step
earlier. Codes and the new maximum can therefore be written in the pass that computes x;
a row that outgrows s uses codes above 223 for one step. When s changes by a power of 4,
the numbers that codes can represent stay the same. After one huge gradient, a row has
less resolution until its largest average has decayed.

The scale of a row is stored as one bfloat16, (1 + n / 128) times the s of the next
step; the s of its codes is 4^(n - 20).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Pairs (shift, code), for 8, 4, 2 and 1 codes for each factor of 2: up to s, code +
# fraction is the largest of (bits of x - bits of s) / 2^(20 + shift) + code.
LINES = ((0, 223), (1, 155), (2, 97), (3, 60))
# The range of scales, as exponents of 4. With the smallest, codes reach up to 2^22, so
# that the first gradients of a row are not lost.
SMALLEST, LARGEST = -20, 63


def encode(x, scale: Any = None, offset: Any = None):
    """Encode rows as codes and scales, to nearest or dithered.

    Args:
      x: new values; float32.
      scale: scales that the last step returned; bfloat16, like x with a last axis of 1.
        None means the scale of each row's own maximum, and rounding to nearest.
      offset: with `scale`, the rounding offset of the step, as a fraction of 2^32;
        uint32 [].

    Returns:
      Codes, uint8 like x; scales of this step and the next, like `scale`.
    """
    known = ~jnp.isnan(x)
    # Bounded, because an infinite scale would lose the rest of the row.
    x = jnp.where(known, jnp.minimum(x, 4.0**LARGEST), 0)
    if scale is None:
        exponent, offset = _exponent(jnp.max(x, axis=-1, keepdims=True)), 2**31
    else:
        exponent, _ = _unpack(scale)
    # Packed, the maximum is one reduction, which all backends fuse with the rest.
    packed = jnp.max(_pack(_exponent(x), exponent), axis=-1, keepdims=True)
    code = _to_codes(x.view(jnp.int32) - _scale_bits(exponent))
    code = code + jnp.asarray(offset >> 12, jnp.int32) >> 20
    # On TPU, XLA writes what was converted from float32 in the same pass.
    codes = jnp.where(known, jnp.clip(code, 0, 254).astype(jnp.float32), 255)
    return codes.astype(jnp.uint8), packed.astype(jnp.bfloat16)


@jax.jit
def encode_scalar(value):
    """Return the code and the scale of a row of which each element is `value`."""
    codes, scale = encode(jnp.full((1,), value, jnp.float32))
    return codes[0], scale[0]


def decode(codes, scale):
    """Decode rows to float32."""
    code = codes.astype(jnp.int32)
    if scale.dtype == jnp.float32:  # Of version 0.1; only storage.convert reads it.
        x = scale * (code.astype(jnp.float32) * (1 / 254)) ** 16
    else:
        _, exponent = _unpack(scale)
        bits = _to_bits(code) + _scale_bits(exponent)
        x = jnp.where(code == 0, 0, bits.view(jnp.float32))
    return jnp.where(code == 255, jnp.nan, x)


def _to_codes(bits):
    """Return 2^20 times the codes, with their fractions, of bits less those of s."""
    lines = [(bits >> shift) + (code << 20) for shift, code in LINES]
    above = (bits >> 4) + (223 << 20)
    return jnp.minimum(functools.reduce(jnp.maximum, lines), above)


def _to_bits(codes):
    """Return bits less those of s: the inverse of `_to_codes`."""
    lines = [codes - code << 20 + shift for shift, code in LINES]
    above = jnp.maximum(codes, 150) - 223 << 24  # Limited to what fits in 32 bits.
    return jnp.maximum(functools.reduce(jnp.minimum, lines), above)


def _exponent(x):
    """Return the smallest exponent of a scale for which 4^exponent >= 2 * x >= 0."""
    # One unit in the last place less, so that a power of 2 is not above itself.
    below = x.view(jnp.int32) - 1
    return jnp.clip((((below >> 23) - 126) >> 1) + 1, SMALLEST, LARGEST)


def _scale_bits(exponent):
    """Return the bits of 4^exponent as a float32."""
    return 2 * exponent + 127 << 23


def _pack(following, exponent):
    """Pack two exponents in the upper half of a float32 that grows with the first."""
    return (_scale_bits(following) | (exponent - SMALLEST << 16)).view(jnp.float32)


def _unpack(scale):
    """Return the exponents of 4 of the scale of the next step and of the codes."""
    bits = scale.astype(jnp.float32).view(jnp.int32)
    following = ((bits >> 23) - 127) >> 1
    # A state that was set to zeros has scales of 0.
    return jnp.maximum(following, SMALLEST), (bits >> 16 & 127) + SMALLEST
