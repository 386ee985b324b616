"""Compile the update of a model of 7 billion parameters for 256 devices.

`python tests/measure/scale.py` compiles for a mesh of 16 x 16 CPU devices, with the
parameters sharded over its model axis, and prints the memory that the state takes and
its communication. No arrays are allocated.
"""

import collections
import itertools
import math
import re

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
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

    def leaf(shape, *axes):
        where = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    columns, rows, norm = (None, "model"), ("model", None), leaf((width,))
    square, up = leaf((width, width), *columns), leaf((width, hidden), *columns)
    attention = dict(q=square, k=square, v=square, o=leaf((width, width), *rows))
    mlp = dict(gate=up, up=up, down=leaf((hidden, width), *rows))
    layer = dict(attention=attention, mlp=mlp, norms=[norm, norm])
    head, embedding = leaf((width, words), *columns), leaf((words, width), *rows)
    return dict(embedding=embedding, layers=layers * [layer], norm=norm, head=head)


def state_of(tx, params):
    """Return the shapes of the state that `jax.jit(tx.init)` makes."""
    where = jax.jit(tx.init).lower(params).compile().output_shardings
    return jax.tree.map(shaped, jax.eval_shape(tx.init, params), where)


def on_a_device(tree):
    """Return the bytes that one device holds of arrays with these shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def row(name, params, mesh, spread):
    """Return bytes of state on a device, collectives of a step, seconds to compile."""
    tx = rmsprop(0.001, **FORMATS[name])
    state = state_of(tx, params)
    if spread:
        state = jax.tree.map(shaped, state, sharding.zero(state, mesh, "data")[0])
    held = params, state
    where = jax.tree.map(lambda x: x.sharding, held)
    step = jax.jit(measuring.step_of(tx), donate_argnums=0, out_shardings=where)
    program, seconds = measuring.timed(lambda: step.lower(held, params).compile())
    counts = collections.Counter(COLLECTIVE.findall(program.as_text())).items()
    collectives = ", ".join(f"{count} {kind}" for kind, count in sorted(counts))
    return on_a_device(state), collectives or "none", seconds


def table(**sizes):
    """Print a row for each format, with ZeRO and without.

    This makes 256 CPU devices, so JAX must not have started before.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 256)
    mesh = Mesh(np.array(jax.devices()).reshape(16, 16), ("data", "model"))
    params = transformer(mesh, **sizes)
    leaves = jax.tree.leaves(params)
    print(
        f"{sum(x.size for x in leaves) / 1e9:.2f} billion parameters in {len(leaves)} "
        f"leaves, {on_a_device(params) / 1e6:.1f} MB on each of 16 x 16 devices.\n"
    )
    columns = "MB on a device", "collectives of an update", "compiled in"
    measuring.heads("state", "ZeRO", *columns)
    for name, spread in itertools.product(FORMATS, (False, True)):
        held, found, seconds = row(name, params, mesh, spread)
        cells = f"{held / 1e6:.1f}", found, f"{seconds:.1f} s"
        measuring.row(name, "yes" if spread else "no", *cells)


if __name__ == "__main__":
    table()
