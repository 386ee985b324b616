"""Compile the update of a model of 7 billion parameters for 256 devices.

`python tests/measure/scale.py` compiles for a mesh of 16 x 16 CPU devices, with the
parameters sharded over its model axis, and prints the memory that the state takes and
its communication; then how compilation grows with the number of leaves. No arrays are
allocated.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measuring import BFLOAT16, UINT8

from rmsprop_jax import rmsprop, sharding

FORMATS = {"float32": {}, "bfloat16 nu": BFLOAT16, "uint8 nu": UINT8}
COLLECTIVE = re.compile(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(")


def shaped(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def transformer(mesh, layers=32, width=4096, hidden=11008, words=32000):
    """Return the shapes of a language model, sharded over the model axis.

    The first matrix of a pair is split by columns and the second by rows, as in
    Megatron-LM; uint8 state that is split along rows needs one maximum.
    """

    def leaves(names, *shape, split=None):
        axes = ("model" if axis == split else None for axis in range(len(shape)))
        where = NamedSharding(mesh, PartitionSpec(*axes))
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        return dict.fromkeys(names, leaf)

    layer = {
        **leaves(["q", "k", "v"], width, width, split=1),
        **leaves(["o"], width, width, split=0),
        **leaves(["gate", "up"], width, hidden, split=1),
        **leaves(["down"], hidden, width, split=0),
        **leaves(["norm", "other_norm"], width),
    }
    return {
        **leaves(["norm"], width),
        **leaves(["head"], width, words, split=1),
        **leaves(["embedding"], words, width, split=0),
        **{f"layer_{i}": layer for i in range(layers)},
    }


def on_a_device(tree):
    """Return the bytes that one device holds of arrays with these shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def row(name, params, mesh, spread):
    """Return bytes of state on a device, collectives of a step, seconds to compile."""
    tx = rmsprop(0.001, **FORMATS[name])
    where = jax.jit(tx.init).lower(params).compile().output_shardings
    state = jax.tree.map(shaped, jax.eval_shape(tx.init, params), where)
    if spread:
        where, _ = sharding.zero(state, mesh, "data")
        state = jax.tree.map(shaped, state, where)

    where = jax.tree.map(lambda p: p.sharding, params), where
    step = jax.jit(measuring.step_of(tx), donate_argnums=0, out_shardings=where)
    args = (params, state), params
    program, seconds = measuring.timed(lambda: step.lower(*args).compile())
    found = COLLECTIVE.findall(program.as_text())
    counts = [f"{found.count(kind)} {kind}" for kind in sorted(set(found))]
    return on_a_device(state), ", ".join(counts) or "none", seconds


def seconds_to_compile(build, leaves):
    """Return how long it takes to trace, lower and compile the update of a tree."""
    jax.clear_caches()
    params = [jax.ShapeDtypeStruct((32, 32), jnp.float32)] * leaves
    tx = build(0.001, momentum=0.9)
    args = params, jax.eval_shape(tx.init, params), params
    return measuring.timed(lambda: jax.jit(tx.update).lower(*args).compile())[1]


def table(leaves=(10, 100, 1000, 3000), **sizes):
    """Print a row for each format, with ZeRO and without, then one a number of leaves.

    This makes 256 CPU devices, so JAX must not have started before.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 256)
    devices = np.array(jax.devices()).reshape(16, 16)
    mesh = Mesh(devices, ("data", "model"))
    params = transformer(mesh, **sizes)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    print(
        f"{count / 1e9:.2f} billion parameters in {len(jax.tree.leaves(params))} "
        f"leaves, {on_a_device(params) / 1e6:.1f} MB on each of 16 x 16 devices.\n"
    )
    columns = "MB on a device", "collectives of an update", "compiled in"
    measuring.heads("state", "ZeRO", *columns)
    for name, spread in itertools.product(FORMATS, (False, True)):
        held, found, seconds = row(name, params, mesh, spread)
        cells = f"{held / 1e6:.1f}", found, f"{seconds:.1f} s"
        measuring.row(name, "yes" if spread else "no", *cells)
    print()
    measuring.heads("leaves of 32 x 32", "compiled in", "/ optax")
    for n in leaves:
        ours, theirs = (seconds_to_compile(x, n) for x in (rmsprop, optax.rmsprop))
        measuring.row(str(n), f"{ours:.2f} s", f"{ours / theirs:.2f}")


if __name__ == "__main__":
    table()
