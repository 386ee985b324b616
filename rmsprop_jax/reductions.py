"""Statistics of large arrays in one pass: sums, counts and extrema by name."""

import operator

import jax
import jax.numpy as jnp
import numpy as np

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
