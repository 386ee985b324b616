"""Statistics of large arrays, each computed in one or two passes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# How statistics merge, and the value for no elements; those not listed are added.
MERGES = dict(lowest=jax.lax.min, highest=jax.lax.max)
IDENTITIES = dict(lowest=np.inf, highest=-np.inf)


def reduce(x, **columns):
    """Count the finite and the other elements of x, and reduce columns of its shape.

    Returns float32 scalars by name. Masks are counted; counts and `MERGES` share one
    loop. Sums use `jnp.sum`, which compiles to a tree of float32 additions: a plain
    loop would be imprecise.
    """
    # Both are counted, because XLA on CPU would store a mask that is counted alone.
    columns |= dict(finite=jnp.isfinite(x), nonfinite=~jnp.isfinite(x))
    found, joint = {}, {}
    for name, column in columns.items():
        if column.dtype == bool:
            column = column.astype(jnp.uint32 if x.size < 2**32 else jnp.float32)
        if column.dtype == jnp.uint32 or name in MERGES:
            joint[name] = column
        else:
            found[name] = jnp.sum(column)
    if joint:
        found |= merge(joint, range(x.ndim))
    return {name: total.astype(jnp.float32) for name, total in found.items()}


def merge(columns, axes=(0,)):
    """Reduce arrays of statistics over some axes, all in one loop."""

    def join(one, other):
        return {k: MERGES.get(k, jax.lax.add)(x, other[k]) for k, x in one.items()}

    identities = {k: x.dtype.type(IDENTITIES.get(k, 0)) for k, x in columns.items()}
    return jax.lax.reduce(columns, identities, join, axes)


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
