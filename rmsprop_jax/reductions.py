"""Statistics of large arrays in one pass: sums, counts and extrema by name."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

EXTREMA = dict(lowest=(jax.lax.min, np.inf), highest=(jax.lax.max, -np.inf))
SUM = (operator.add, 0)


def reduce(**columns):
    """Reduce arrays of the same shape to float32 scalars; masks are counted.

    Counts and `EXTREMA` share one loop. Sums use `jnp.sum`, which compiles to a tree of
    float32 additions: a plain loop would be imprecise.
    """
    found, joint = {}, {}
    for name, x in columns.items():
        if x.dtype == bool:
            x = x.astype(jnp.uint32 if x.size < 2**32 else jnp.float32)
        if x.dtype == jnp.uint32 or name in EXTREMA:
            joint[name] = x
        else:
            found[name] = jnp.sum(x)
    if joint:
        arrays = tuple(joint.values())
        merges, identities = zip(*(EXTREMA.get(k, SUM) for k in joint), strict=True)
        reduced = jax.lax.reduce(
            arrays,
            tuple(x.dtype.type(i) for x, i in zip(arrays, identities, strict=True)),
            lambda x, y: tuple(f(*z) for f, *z in zip(merges, x, y, strict=True)),
            tuple(range(arrays[0].ndim)),
        )
        found |= zip(joint, reduced, strict=True)
    return {name: x.astype(jnp.float32) for name, x in found.items()}


def merge(parts):
    """Combine the statistics of several arrays by name."""
    found = {}
    for part in parts:
        for name, x in part.items():
            merge, _ = EXTREMA.get(name, SUM)
            found[name] = merge(found[name], x) if name in found else x
    return found


def histogram(x):
    """Count elements by magnitude, in 128 bins of a factor of 4; float32 [128].

    Bin n has 2^(2 n - 128) <= x < 2^(2 n - 126), and bin 0 also 0; NaN and infinity are
    in none.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # Bins span two exponents; 255 is the exponent of NaN and infinity.
    bins = (((bits >> 23) & 255) + 1) >> 1
    count: Any = _count
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:  # JAX does not infer a sharding then.
        replicated = NamedSharding(mesh, PartitionSpec())
        count = jax.sharding.auto_axes(_count, out_sharding=replicated)
    return count(bins).astype(jnp.float32)


def _count(bins):
    return jnp.zeros(128, jnp.uint32).at[bins].add(1, mode="drop")
