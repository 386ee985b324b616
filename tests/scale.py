"""A model of 7 billion parameters on 256 devices, of which this machine has none.

`python tests/scale.py` compiles the update for a mesh of 16 x 16, with parameters
divided over its model axis, and prints what the state takes and what is communicated;
then how compiling grows with the number of leaves. It allocates none of the arrays.
"""

import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rmsprop_jax import rmsprop, sharding

BFLOAT16 = dict(nu_dtype=jnp.bfloat16)
FORMATS = {
    "float32": {},
    "bfloat16 nu": BFLOAT16,
    "uint8 nu": dict(nu_dtype=jnp.uint8),
    "float32, momentum": dict(momentum=0.9),
    "bfloat16 nu and momentum": BFLOAT16
    | dict(momentum=0.9, momentum_dtype=jnp.bfloat16),
    "uint8 nu, bfloat16 momentum": dict(
        momentum=0.9, nu_dtype=jnp.uint8, momentum_dtype=jnp.bfloat16
    ),
}
LEAVES = (10, 100, 1000, 3000)
COLLECTIVE = re.compile(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(")


def transformer(mesh, layers=32, width=4096, hidden=11008, words=32000):
    """Return the shapes of a language model, divided over the model axis.

    The first matrix of a pair is divided by columns and the second by rows, as in
    Megatron-LM; the state of codes along rows then needs one maximum.
    """

    def leaf(*shape, spec=None):
        where = NamedSharding(mesh, spec or P())
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    columns, rows = P(None, "model"), P("model", None)

    def layer():
        attention = {k: leaf(width, width, spec=columns) for k in ("q", "k", "v")}
        attention["o"] = leaf(width, width, spec=rows)
        dense = {k: leaf(width, hidden, spec=columns) for k in ("gate", "up")}
        dense["down"] = leaf(hidden, width, spec=rows)
        return attention | dense | {"norm": leaf(width), "other_norm": leaf(width)}

    ends = dict(norm=leaf(width), head=leaf(width, words, spec=columns))
    ends["embedding"] = leaf(words, width, spec=rows)
    return ends | {f"layer_{i}": layer() for i in range(layers)}


def on_a_device(tree):
    """Return the bytes that one device holds of arrays with these shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def row(name, params, mesh, spread):
    """Return bytes of state on a device, collectives of a step, seconds to compile."""
    tx = rmsprop(0.001, **FORMATS[name])
    shapes = jax.eval_shape(tx.init, params)
    if spread:
        where, _ = sharding.zero(placed(tx, shapes, params), mesh, "data")
    else:
        where = jax.tree.map(lambda x: x.sharding, placed(tx, shapes, params))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lives = jax.tree.map(lambda p: p.sharding, params)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(lives, where))
    begun = time.perf_counter()
    text = jitted.lower(params, state, params).compile().as_text()
    seconds = time.perf_counter() - begun
    found = COLLECTIVE.findall(text)
    counts = [f"{found.count(kind)} {kind}" for kind in sorted(set(found))]
    return on_a_device(state), ", ".join(counts) or "none", seconds


def placed(tx, shapes, params):
    """Return the shapes of a state where `init` under jit puts it."""
    where = jax.jit(tx.init).lower(params).compile().output_shardings
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )


def table(mesh, **sizes):
    """Print a row for each format, with its state beside the parameters and spread."""
    params = transformer(mesh, **sizes)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    size = " x ".join(map(str, mesh.shape.values()))
    print(
        f"{count / 1e9:.2f} billion parameters, {len(jax.tree.leaves(params))} leaves,"
    )
    print(f"{on_a_device(params) / 1e6:.1f} MB on each of {size} devices.\n")
    print("| state | ZeRO | MB on a device | collectives of an update | compiled in |")
    print("|---|---|---|---|---|")
    for name in FORMATS:
        for spread in (False, True):
            held, found, seconds = row(name, params, mesh, spread)
            cells = (name, "yes" if spread else "no", f"{held / 1e6:.1f}", found)
            print("|", " | ".join(cells), f"| {seconds:.1f} s |", flush=True)


def growth(leaves=LEAVES):
    """Print how long it takes to trace, lower and compile, beside Optax."""
    print("\n| leaves of 32 x 32 | seconds | / optax |\n|---|---|---|")
    for count in leaves:
        params = [jax.ShapeDtypeStruct((32, 32), jnp.float32)] * count
        seconds = []
        for build in (rmsprop, optax.rmsprop):
            jax.clear_caches()
            tx = build(0.001, momentum=0.9)
            state = jax.eval_shape(tx.init, params)
            begun = time.perf_counter()
            jax.jit(tx.update).lower(params, state, params).compile()
            seconds.append(time.perf_counter() - begun)
        print(
            f"| {count} | {seconds[0]:.2f} | {seconds[0] / seconds[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 256)
    table(Mesh(np.array(jax.devices()).reshape(16, 16), ("data", "model")))
    growth()
