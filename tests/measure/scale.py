"""Compile the update of a model of 7 billion parameters for 256 devices.

`python tests/measure/scale.py` compiles for a mesh of 16 x 16 CPU devices, with the
parameters sharded over its model axis, and prints the memory that the state takes and
its communication; then how compilation grows with the number of leaves. No arrays are
allocated.
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

BFLOAT16, UINT8 = dict(nu_dtype=jnp.bfloat16), dict(nu_dtype=jnp.uint8)
MOMENTUM = dict(momentum=0.9)
SMALL_MOMENTUM = MOMENTUM | dict(momentum_dtype=jnp.bfloat16)
FORMATS = {
    "float32": {},
    "bfloat16 nu": BFLOAT16,
    "uint8 nu": UINT8,
    "float32, momentum": MOMENTUM,
    "bfloat16 nu and momentum": BFLOAT16 | SMALL_MOMENTUM,
    "uint8 nu, bfloat16 momentum": UINT8 | SMALL_MOMENTUM,
}
COLLECTIVE = re.compile(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(")


def shaped(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def transformer(mesh, layers=32, width=4096, hidden=11008, words=32000):
    """Return the shapes of a language model, sharded over the model axis.

    The first matrix of a pair is split by columns and the second by rows, as in
    Megatron-LM; uint8 state that is split along rows needs one maximum.
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
    where = jax.jit(tx.init).lower(params).compile().output_shardings
    state = jax.tree.map(shaped, jax.eval_shape(tx.init, params), where)
    if spread:
        where, _ = sharding.zero(state, mesh, "data")
        state = jax.tree.map(shaped, state, where)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    out_shardings = jax.tree.map(lambda p: p.sharding, params), where
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)
    begun = time.perf_counter()
    text = jitted.lower(params, state, params).compile().as_text()
    seconds = time.perf_counter() - begun
    found = COLLECTIVE.findall(text)
    counts = [f"{found.count(kind)} {kind}" for kind in sorted(set(found))]
    return on_a_device(state), ", ".join(counts) or "none", seconds


def seconds_to_compile(build, leaves):
    """Return how long it takes to trace, lower and compile the update of a tree."""
    jax.clear_caches()
    params = [jax.ShapeDtypeStruct((32, 32), jnp.float32)] * leaves
    tx = build(0.001, momentum=0.9)
    state = jax.eval_shape(tx.init, params)
    begun = time.perf_counter()
    jax.jit(tx.update).lower(params, state, params).compile()
    return time.perf_counter() - begun


def table(mesh=None, leaves=(10, 100, 1000, 3000), **sizes):
    """Print a row for each format, with ZeRO and without, then one a number of leaves.

    Without a mesh, this makes 256 CPU devices, so JAX must not have started before.
    """
    if mesh is None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 256)
        devices = np.array(jax.devices()).reshape(16, 16)
        mesh = Mesh(devices, ("data", "model"))
    params = transformer(mesh, **sizes)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    size = " x ".join(map(str, mesh.shape.values()))
    print(
        f"{count / 1e9:.2f} billion parameters in {len(jax.tree.leaves(params))} "
        f"leaves, {on_a_device(params) / 1e6:.1f} MB on each of {size} devices.\n\n"
        "| state | ZeRO | MB on a device | collectives of an update | compiled in |\n"
        "|---|---|---|---|---|"
    )
    for name in FORMATS:
        for spread in (False, True):
            held, found, seconds = row(name, params, mesh, spread)
            cells = (name, "yes" if spread else "no", f"{held / 1e6:.1f}", found)
            print("|", " | ".join(cells), f"| {seconds:.1f} s |", flush=True)
    print("\n| leaves of 32 x 32 | compiled in | / optax |\n|---|---|---|")
    for n in leaves:
        ours, theirs = (seconds_to_compile(x, n) for x in (rmsprop, optax.rmsprop))
        print(f"| {n} | {ours:.2f} s | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    table()
