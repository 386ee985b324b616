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

    Each array is divided along the largest of its axes that is whole so far and that
    the mesh axis divides; never along the rows of uint8 codes, as they share a scale.

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
      >>> print(tuple(shardings.nu["w"].spec), whole)
      (None, 'data') [".nu['b']"]

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

    def place(path, x):
        spec = _spec(x, mesh)
        if axis in jax.tree.leaves(tuple(spec)):
            return NamedSharding(mesh, PartitionSpec(*spec))
        last = x.ndim - 1 if x.dtype == jnp.uint8 else x.ndim
        sizes = {
            i: x.shape[i]
            for i in range(last)
            if spec[i] is None and x.shape[i] and x.shape[i] % mesh.shape[axis] == 0
        }
        if sizes:
            spec[max(sizes, key=lambda i: sizes[i])] = axis
        elif math.prod(x.shape) > 1:
            whole.append(jax.tree_util.keystr(path))
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, state), whole


def _spec(x, mesh):
    """Return how an array is divided on this mesh, one entry an axis."""
    spec = ()
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.shape == mesh.shape:
        spec = sharding.spec
    return [*spec, *[None] * (x.ndim - len(spec))]
