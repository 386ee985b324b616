"""Placement of optimizer state on devices.

State is placed like the parameters. In data-parallel training both are replicated;
`zero` shards the state over the devices instead (ZeRO, stage 1).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

__all__ = ["zero"]


def zero(state: Any, mesh: Mesh | AbstractMesh, axis: str) -> tuple[Any, list[str]]:
    """Return shardings that divide optimizer state over one axis of a device mesh.

    Each array is divided along its largest axis that the mesh axis divides. Rows of
    uint8 codes stay whole, as each has a scale; in a state with codes, other arrays are
    also divided between rows where possible.

    Args:
      state: the state of any transformation, or its shapes, as from
        `jax.eval_shape(tx.init, params)`. Shardings on this mesh are extended.
      mesh: mesh of the parameters.
      axis: name of the mesh axis over which parameters are replicated.

    Returns:
      A NamedSharding for each array, for `out_shardings` or to restore a checkpoint;
      the key paths of arrays that are not divided, as this axis divides none of their
      axes, except scalars.

    Raises:
      ValueError: if the mesh has no such axis.

    Example:
      >>> import jax
      >>> from rmsprop_jax import rmsprop, sharding
      >>> params = {"w": jax.numpy.ones((3, 4)), "b": jax.numpy.ones(3)}
      >>> optimizer = rmsprop(0.1)
      >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
      >>> shapes = jax.eval_shape(optimizer.init, params)
      >>> shardings, replicated = sharding.zero(shapes, mesh, "data")
      >>> print(shardings.nu["w"].shard_shape((3, 4)), replicated)
      (3, 2) [".nu['b']"]

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter
      Models, 2020, section 5.1.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}.")
    if axis not in mesh.shape:
        raise ValueError(
            f"axis must be one of {list(mesh.shape)}, the axes of the mesh, got "
            f"{axis!r}. Name the axis over which the batch is split."
        )
    replicated = []
    has_codes = any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))

    def place(path, x):
        old = getattr(x, "sharding", None)
        if not (isinstance(old, NamedSharding) and old.mesh.shape == mesh.shape):
            old = NamedSharding(mesh, P())
        shard, spec = old.shard_shape(x.shape), old.spec
        axes = [() if e is None else e if isinstance(e, tuple) else (e,) for e in spec]
        axes += [()] * (x.ndim - len(axes))
        if x.size and not any(axis in names for names in axes):
            rows = x.ndim - 1 if has_codes else x.ndim
            candidates = range(rows if x.dtype == jnp.uint8 else x.ndim)
            divisible = [i for i in candidates if shard[i] % mesh.shape[axis] == 0]
            if divisible:
                axes[max(divisible, key=lambda i: (i < rows, shard[i]))] += (axis,)
            elif x.size > 1:
                replicated.append(jax.tree_util.keystr(path))
        return NamedSharding(mesh, P(*axes), memory_kind=old.memory_kind)

    return jax.tree_util.tree_map_with_path(place, state), replicated


def full_like(p, shape, value, dtype):
    """Create an array filled with `value`, sharded like p along the axes they share.

    `shape` is that of p with any axes reduced to 1, or (). p may be a ShapeDtypeStruct.
    `value`, a float or scalar array, is limited to the largest number of `dtype`.
    """
    floating = jnp.issubdtype(dtype, jnp.inexact)
    largest = float(jnp.finfo(dtype).max) if floating else math.inf
    if not isinstance(value, Tracer):
        value = min(float(value), largest)
    elif isinstance(p, jax.ShapeDtypeStruct):
        p = jnp.zeros(p.shape, p.dtype, device=p.sharding)
    if isinstance(p, Tracer) or isinstance(value, Tracer):
        return _traced_full_like(p, value, shape, dtype, largest)
    sharding = p.sharding
    if isinstance(sharding, NamedSharding) and shape != p.shape:
        sizes = zip(sharding.spec, shape, p.shape, strict=False)
        spec = [axes if new == old else None for axes, new, old in sizes]
        while spec and spec[-1] is None:
            spec.pop()  # As in the outputs of jit: a change would recompile.
        mesh, memory_kind = sharding.mesh, sharding.memory_kind
        sharding = NamedSharding(mesh, P(*spec), memory_kind=memory_kind)
    elif not isinstance(sharding, NamedSharding | SingleDeviceSharding | None):
        return _traced_full_like(p, value, shape, dtype, largest)
    # Created on the host: a device would compile a program for each shape.
    constant = np.asarray(value).astype(dtype)
    with jax.transfer_guard("allow"):
        if sharding is None or not getattr(p, "committed", True):
            full = np.broadcast_to(constant, shape)
            if jax.sharding.get_abstract_mesh().empty:
                return jax.device_put(full, may_alias=False)
            return jnp.array(full)  # On the mesh of jax.set_mesh.
        shard = np.broadcast_to(constant, sharding.shard_shape(shape))
        return jax.make_array_from_callback(shape, sharding, lambda _: shard)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "largest"))
def _traced_full_like(p, value, shape, dtype, largest):
    if not shape and p.ndim:
        return jnp.full((), value, dtype)
    # Only values computed from p get its sharding. XLA does not fold a float times 0
    # before that, and a bool times 0 is 0 even where p is NaN.
    replaced = tuple(i for i in range(p.ndim) if shape[i] != p.shape[i])
    nan = (p != p).any(axis=replaced, keepdims=True)
    wide = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32
    value = jnp.minimum(jnp.asarray(value).astype(wide), largest)
    return (nan.astype(wide) * 0 + value).astype(dtype)
