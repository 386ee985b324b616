"""Statistics of large arrays, computed in one or two passes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rmsprop_jax import rule

# How statistics merge, and the value for no elements; those not listed are added.
MERGES = dict(lowest=jax.lax.min, highest=jax.lax.max)
IDENTITIES = dict(lowest=np.inf, highest=-np.inf)


def reduce(**columns):
    """Reduce arrays of one shape to scalars: masks to counts, others as in `MERGES`.

    Those not listed are added by `jnp.sum`, which compiles to a tree of additions: a
    plain loop would be imprecise. So are masks too large for a uint32 count. The others
    share a loop, and are constants to derivatives.
    """
    found, joint = {}, {}
    axes = range(next(iter(columns.values())).ndim)
    for name, column in columns.items():
        if column.dtype == bool and column.size < 2**32:
            column = column.astype(jnp.uint32)
        elif name not in MERGES:
            found[name] = jnp.sum(column, dtype=rule.at_least_float32(column.dtype))
            continue
        joint[name] = jax.lax.stop_gradient(column)

    def join(one, other):
        return {k: MERGES.get(k, jax.lax.add)(x, other[k]) for k, x in one.items()}

    if joint:
        identities = {k: x.dtype.type(IDENTITIES.get(k, 0)) for k, x in joint.items()}
        found |= jax.lax.reduce(joint, identities, join, axes)
    return found


def count_nonfinite(x):
    """Count the elements that are NaN or infinite; float32 []."""
    finite = jnp.isfinite(x)
    counts = reduce(bad=~finite, good=finite)
    # Uses both, because XLA on CPU would store a mask that is counted alone.
    return counts["bad"].astype(jnp.float32) + 0 * counts["good"].astype(jnp.float32)


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
