"""Measure what small optimizer state loses, beside what it saves.

`python tests/measure/formats.py` prints the table; bitsandbytes takes part where it is
installed.
"""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import measuring
import numpy as np

from rmsprop_jax import scale_by_rms, storage

SHAPE = (4, 2048)
# By decay: four times as many as the average remembers, and at least 400.
STEPS = {0.9: 400, 0.99: 400, 0.999: 4000}
# Of the gradients: their size, and how many e-folds it differs from weight to weight.
SCALES = ((1.0, 1), (1e-4, 2))
KINDS = ("steady", "falling", "half of them falling")


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


keep = lambda nu: nu
# Bytes per parameter; `nu_dtype`; what `nu` passes through after each step.
FORMATS = {
    "float32": (4, None, keep),
    "bfloat16": (2, jnp.bfloat16, keep),
    "bfloat16, to nearest": (2, None, nearest_bfloat16),
    "uint8": (1 + 2 / SHAPE[-1], jnp.uint8, keep),
    "uint8, to nearest": (1 + 2 / SHAPE[-1], None, nearest_uint8),
}
if importlib.util.find_spec("bitsandbytes"):
    FORMATS["bitsandbytes, 8 bit"] = (1 + 4 / 256, None, bitsandbytes)


def gradients(decay, scale, kind):
    """Return Gaussian gradients [steps, *SHAPE].

    Their sizes differ by a log-normal factor from weight to weight, and fall
    exponentially by 64 over the run: all, none, or every second one.
    """
    random, steps = np.random.RandomState(0), np.arange(STEPS[decay]).reshape(-1, 1, 1)
    sizes = scale[0] * random.lognormal(sigma=scale[1], size=SHAPE)
    every = {"steady": 0, "falling": 2, "half of them falling": 1}[kind]
    falling = np.arange(SHAPE[-1]) % 2 < every
    grads = random.standard_normal((len(steps), *SHAPE))
    grads *= sizes
    grads *= 64.0 ** -(falling * steps / len(steps))
    return grads.astype(np.float32)


def updates_of(name, decay, grads):
    """Return the updates [steps, *SHAPE] with a format."""
    _, dtype, through = FORMATS[name]
    tx = scale_by_rms(decay, eps=0.0, nu_dtype=dtype)

    def step(state, g):
        update, state = tx.update(g, state)
        return state._replace(nu=through(state.nu)), update

    run = jax.jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads)[1])
    return np.asarray(run(grads))


def errors(names, decay, scale, kind):
    """Return the relative RMS error of g / sqrt(v), over all steps, of some formats."""
    grads = gradients(decay, scale, kind)
    v, exact = np.zeros(SHAPE), np.empty(grads.shape)
    for t, g in enumerate(grads.astype(np.float64)):
        v = decay * v + (1 - decay) * g**2
        exact[t] = g / np.sqrt(v)
    found = (updates_of(name, decay, grads) for name in names)
    return np.array([np.sqrt(np.mean((u / exact - 1) ** 2)) for u in found])


def table(decays=tuple(STEPS)):
    """Print a row for each format: bytes per parameter, and errors.

    A column is a decay and the spread of sizes within a row of the array; a cell has
    the errors with gradients that are steady, that fall, and of which half fall.
    """
    columns = [*itertools.product(decays, SCALES)]
    found = np.array([[errors(FORMATS, *x, kind) for kind in KINDS] for x in columns])
    heads = (f"decay {decay}, e^{spread}" for decay, (_, spread) in columns)
    measuring.heads("`nu`", "bytes", *heads)
    for i, (name, (nbytes, _, _)) in enumerate(FORMATS.items()):
        cells = (", ".join(f"{100 * x:.2g}" for x in cell) for cell in found[..., i])
        measuring.row(name, f"{nbytes:.3f}", *(f"{x} %" for x in cells))


if __name__ == "__main__":
    table()
