"""Measure what small optimizer state loses, beside what it saves.

`python tests/measure/formats.py` prints the table; bitsandbytes takes part where it is
installed.
"""

import importlib.util

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax

from rmsprop_jax import scale_by_rms, storage

SHAPE = (4, 2048)
# By decay: four times as many as the average remembers, and at least 400.
STEPS = {0.9: 400, 0.99: 400, 0.999: 4000}
# Of the gradients: their size, and how many e-folds it differs from weight to weight.
SCALES = ((1.0, 1), (1e-4, 2))
KINDS = ("steady", "falling", "half of them falling")
BLOCK = 100


def gradients(decay, scale, kind):
    """Yield blocks [BLOCK, *SHAPE] of Gaussian gradients.

    Their sizes differ by a log-normal factor from weight to weight, and fall
    exponentially by 64 over the run: all, none, or every second one. The stream of
    RandomState never changes.
    """
    random = np.random.RandomState(0)
    sizes = scale[0] * random.lognormal(sigma=scale[1], size=SHAPE)
    every = {"steady": 0, "falling": 2, "half of them falling": 1}[kind]
    falling = np.arange(SHAPE[-1]) % 2 < every
    for first in range(0, STEPS[decay], BLOCK):
        times = np.arange(first, first + BLOCK).reshape(-1, 1, 1) / STEPS[decay]
        factor = np.where(falling, 64.0**-times, 1)
        noise = random.standard_normal((BLOCK, *SHAPE))
        yield (noise * sizes * factor).astype(np.float32)


def ours(dtype):
    return lambda decay: scale_by_rms(decay, eps=0.0, nu_dtype=dtype)


def rounded(through, nbytes):
    """Return `scale_by_rms` whose average passes through a format after each step.

    It is kept as float32; `nbytes` is what the format would take per parameter.
    """

    def build(decay):
        inner = scale_by_rms(decay, eps=0.0)

        def update(grads, state, params=None):
            updates, state = inner.update(grads, state, params)
            return updates, state._replace(nu=through(state.nu))

        return optax.GradientTransformation(inner.init, update)

    build.nbytes = nbytes
    return build


def nearest_bfloat16(nu):
    # Not two casts, which a compiler may remove.
    return jax.lax.reduce_precision(nu, exponent_bits=8, mantissa_bits=7)


def nearest_uint8(nu):
    return storage.decode(storage.encode_nearest(nu, jnp.uint8))


def bitsandbytes(nu):
    """Quantize as bitsandbytes.optim.RMSprop8bit does in version 0.50."""
    import torch
    from bitsandbytes import functional

    torch.set_num_threads(1)
    code = functional.create_dynamic_map(signed=True)

    def through(nu):
        nu = torch.tensor(np.asarray(nu))
        codes, state = functional.quantize_blockwise(nu, code=code, blocksize=256)
        return functional.dequantize_blockwise(codes, state).numpy()

    return jax.pure_callback(through, jax.ShapeDtypeStruct(nu.shape, nu.dtype), nu)


FORMATS = {
    "float32": ours(None),
    "bfloat16": ours(jnp.bfloat16),
    "bfloat16, to nearest": rounded(nearest_bfloat16, 2),
    "uint8": ours(jnp.uint8),
    "uint8, to nearest": rounded(nearest_uint8, 1 + 2 / SHAPE[-1]),
}
if importlib.util.find_spec("bitsandbytes"):
    FORMATS["bitsandbytes, 8 bit"] = rounded(bitsandbytes, 1 + 4 / 256)


def errors(builds, decay, scale, kind):
    """Return the relative RMS error of g / sqrt(v), over all steps, of each format."""
    txs = [build(decay) for build in builds]

    def step(states, g):
        pairs = [tx.update(g, s) for tx, s in zip(txs, states, strict=True)]
        return [state for _, state in pairs], [u for u, _ in pairs]

    run = jax.jit(lambda states, grads: jax.lax.scan(step, states, grads))
    states, v, squares = [tx.init(jnp.zeros(SHAPE)) for tx in txs], 0, []
    for grads in gradients(decay, scale, kind):
        states, updates = run(states, grads)
        exact = np.empty(grads.shape)
        for t, g in enumerate(grads.astype(np.float64)):
            v = decay * v + (1 - decay) * g**2
            exact[t] = g / np.sqrt(v)
        squares += [[np.mean((np.asarray(u) / exact - 1) ** 2) for u in updates]]
    return np.sqrt(np.mean(squares, 0))


def table(decays=tuple(STEPS)):
    """Print a row for each format: bytes per parameter, and errors.

    A column is a decay and the spread of sizes within a row of the array; a cell has
    the errors with gradients that are steady, that fall, and of which half fall.
    """
    columns = [(decay, scale) for decay in decays for scale in SCALES]
    found = [
        [errors(FORMATS.values(), *column, kind) for kind in KINDS]
        for column in columns
    ]
    names = [f"decay {decay}, e^{scale[1]}" for decay, scale in columns]
    measuring.heads("`nu`", "bytes", *names)
    rows = zip(FORMATS.items(), np.moveaxis(found, 2, 0), strict=True)
    for (name, build), row in rows:
        nu = jax.tree.leaves(build(0.9).init(jnp.zeros(SHAPE)).nu)
        nbytes = getattr(build, "nbytes", sum(x.nbytes for x in nu) / np.prod(SHAPE))
        cells = [", ".join(f"{100 * x:.2g}" for x in cell) + " %" for cell in row]
        measuring.row(name, f"{nbytes:.3f}", *cells)


if __name__ == "__main__":
    table()
