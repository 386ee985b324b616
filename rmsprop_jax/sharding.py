"""Where optimizer state lives on a mesh, if not where its parameters do.

By itself it takes each parameter's sharding. In data-parallel training those are
replicated, and so is it; `zero` spreads it over the devices instead (ZeRO, stage 1).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


def zero(state: Any, mesh: Mesh | AbstractMesh, axis: str) -> tuple[Any, list[str]]:
    """Return shardings that spread a state over one axis of a mesh.

    Each array is divided along the axis of which a device holds the most, of those that
    can be divided; never within the rows of uint8 codes, as these share a scale, and
    beside such, all other arrays by rows too if they can be.

    Args:
      state: what `init` returns, or its shapes: `jax.eval_shape(tx.init, params)`; also
        of a chain. Shardings that its arrays have on this mesh are kept, and added to.
      mesh: mesh of the parameters.
      axis: name of the mesh axis along which parameters are replicated.

    Returns:
      A NamedSharding for each array of the state, for `out_shardings` and to restore
      a checkpoint; and the key paths of the arrays of more than one number that stay
      whole along this axis, because nothing of theirs can be divided.

    Raises:
      ValueError: if the mesh has no such axis.

    Example:
      >>> import jax
      >>> from rmsprop_jax import rmsprop, sharding
      >>> params = {"w": jax.numpy.ones((3, 4)), "b": jax.numpy.ones(3)}
      >>> optimizer = rmsprop(0.1)
      >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
      >>> shapes = jax.eval_shape(optimizer.init, params)
      >>> shardings, whole = sharding.zero(shapes, mesh, "data")
      >>> print(shardings.nu["w"].shard_shape((3, 4)), whole)
      (3, 2) [".nu['b']"]

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter
      Models, 2020, section 5.1.
    """
    if axis not in mesh.shape:
        raise ValueError(
            f"axis must be one of {list(mesh.shape)}, the axes of the mesh, got "
            f"{axis!r}. Name the axis over which the batch is split."
        )
    whole = []
    codes = any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))

    def place(path, x):
        names, memory = _placed(x, mesh)
        if any(axis in each for each in names):
            return x.sharding
        rows = x.ndim - 1 if codes else x.ndim
        held = [
            size // math.prod(mesh.shape[name] for name in each)
            for size, each in zip(x.shape, names, strict=True)
        ]
        allowed = range(rows if x.dtype == jnp.uint8 else x.ndim)
        divisible = [i for i in allowed if held[i] % mesh.shape[axis] == 0]
        if divisible and x.size:
            best = max(divisible, key=lambda i: (i < rows, held[i]))
            names[best] += (axis,)
        elif x.size > 1:
            whole.append(jax.tree_util.keystr(path))
        return NamedSharding(mesh, PartitionSpec(*names), memory_kind=memory)

    return jax.tree_util.tree_map_with_path(place, state), whole


def _placed(x, mesh):
    """Return for each axis of an array the names that divide it, and its memory."""
    spec, memory = (), None
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.shape == mesh.shape:
        spec, memory = sharding.spec, sharding.memory_kind
    spec = [*spec, *[None] * (x.ndim - len(spec))]
    names = [() if e is None else e if isinstance(e, tuple) else (e,) for e in spec]
    return names, memory
