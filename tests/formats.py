"""What small optimizer state loses, beside what it saves.

`python tests/formats.py` prints the table; bitsandbytes takes part where it is
installed. `python tests/formats.py --figure` trains on digits and draws formats.png.
"""

import argparse
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rmsprop_jax import demo, rmsprop, scale_by_rms, storage

FIGURE = pathlib.Path(__file__).parent.parent / ".github" / "formats.png"
SHAPE = (4, 2048)
# Four times as long as the average remembers, and never less than 400.
STEPS = {0.9: 400, 0.99: 400, 0.999: 4000}
# Of the gradients: their size, and how many e-folds it differs from weight to weight.
SCALES = ((1.0, 1), (1e-4, 2))
KINDS = ("steady", "falling", "half of them falling")
BLOCK = 100


def gradients(decay, scale, kind):
    """Yield blocks [BLOCK, *SHAPE] of Gaussian gradients.

    Their sizes differ by a log-normal factor from weight to weight, and fall
    exponentially by 64 over the run, all of them or every second one. The stream of
    RandomState never changes.
    """
    random = np.random.RandomState(0)
    sizes = scale[0] * random.lognormal(sigma=scale[1], size=SHAPE)
    every = {"steady": 0, "falling": 2, "half of them falling": 1}[kind]
    falling = np.arange(SHAPE[-1]) % 2 < every
    for first in range(0, STEPS[decay], BLOCK):
        times = np.arange(first, first + BLOCK).reshape(-1, 1, 1) / STEPS[decay]
        falls = np.where(falling, 64.0**-times, 1)
        noise = random.standard_normal((BLOCK, *SHAPE))
        yield (noise * sizes * falls).astype(np.float32)


def ours(dtype):
    """Return `scale_by_rms` with its state in one of its formats."""
    return lambda decay: scale_by_rms(decay, eps=0.0, nu_dtype=dtype)


def kept(keep, nbytes):
    """Return `scale_by_rms`, each average replaced by keep(average) after a step."""

    def build(decay):
        inner = scale_by_rms(decay, eps=0.0)

        def update(grads, state, params=None):
            updates, state = inner.update(grads, state, params)
            return updates, state._replace(nu=keep(state.nu))

        return optax.GradientTransformation(inner.init, update)

    build.nbytes = nbytes
    return build


def nearest(nu):
    # Not two casts, which a compiler may leave out.
    return jax.lax.reduce_precision(nu, exponent_bits=8, mantissa_bits=7)


def nearest_codes(nu):
    # As storage.py has them at the start, and never after.
    return storage.decode(storage.store(nu, jnp.uint8))


def bitsandbytes():
    """Return what bitsandbytes.optim.RMSprop8bit does to its average: 0.50."""
    import torch
    from bitsandbytes import functional

    torch.set_num_threads(1)
    code = functional.create_dynamic_map(signed=True)

    def through(nu):
        nu = torch.tensor(np.asarray(nu))
        codes, state = functional.quantize_blockwise(nu, code=code, blocksize=256)
        return functional.dequantize_blockwise(codes, state).numpy()

    def keep(nu):
        return jax.pure_callback(through, jax.ShapeDtypeStruct(nu.shape, nu.dtype), nu)

    return kept(keep, 1 + 4 / 256)


FORMATS = {
    "float32": ours(None),
    "bfloat16": ours(jnp.bfloat16),
    "bfloat16, to nearest": kept(nearest, 2),
    "uint8": ours(jnp.uint8),
    "uint8, to nearest": kept(nearest_codes, 1 + 4 / SHAPE[-1]),
}


def bytes_of(build):
    """Return the bytes of `nu` a parameter, counted from its arrays if it has them."""
    nu = build(0.9).init(jnp.zeros(SHAPE)).nu
    counted = sum(x.nbytes for x in jax.tree.leaves(nu)) / np.prod(SHAPE)
    return getattr(build, "nbytes", counted)


def errors(formats, decay, scale, kind):
    """Return the relative RMS error of g / sqrt(v), over all steps, of each format."""
    txs = [build(decay) for build in formats]

    @jax.jit
    def run(states, grads):
        def step(states, g):
            pairs = [tx.update(g, s) for tx, s in zip(txs, states, strict=True)]
            return [state for _, state in pairs], [u for u, _ in pairs]

        return jax.lax.scan(step, states, grads)

    states, v, squares = [tx.init(jnp.zeros(SHAPE)) for tx in txs], np.zeros(SHAPE), []
    for grads in gradients(decay, scale, kind):
        states, updates = run(states, grads)
        exact = np.empty(grads.shape)
        for t, g in enumerate(grads.astype(np.float64)):
            v = decay * v + (1 - decay) * g**2
            exact[t] = g / np.sqrt(v)
        squares += [[np.mean((np.asarray(u) / exact - 1) ** 2) for u in updates]]
    return np.sqrt(np.mean(squares, 0))


def table():
    """Print a row for each format: bytes a parameter, and errors.

    A column is a decay and the spread of sizes within a row; a cell has the errors of
    each kind of gradients.
    """
    formats = dict(FORMATS)
    if importlib.util.find_spec("bitsandbytes"):
        formats["bitsandbytes, 8 bit"] = bitsandbytes()
    columns = [(decay, scale) for decay in STEPS for scale in SCALES]
    found = [
        [errors(formats.values(), *column, kind) for kind in KINDS]
        for column in columns
    ]
    names = [f"β {decay}, e^{scale[1]}" for decay, scale in columns]
    print(f"| `nu` | bytes | {' | '.join(names)} |")
    print("|---" * (2 + len(columns)) + "|")
    for (name, build), row in zip(
        formats.items(), np.moveaxis(found, 2, 0), strict=True
    ):
        cells = [", ".join(f"{100 * x:.2g}" for x in cell) + " %" for cell in row]
        print(f"| {name} | {bytes_of(build):.3f} | {' | '.join(cells)} |")


SEEDS, EPOCHS, BATCH = 5, 20, 32
TRAINED = {
    "float32": {},
    "bfloat16 nu": dict(nu_dtype=jnp.bfloat16),
    "uint8 nu": dict(nu_dtype=jnp.uint8),
    "float32, momentum": dict(momentum=0.9),
    "bfloat16 nu and momentum": dict(
        momentum=0.9, nu_dtype=jnp.bfloat16, momentum_dtype=jnp.bfloat16
    ),
    "uint8 nu, bfloat16 momentum": dict(
        momentum=0.9, nu_dtype=jnp.uint8, momentum_dtype=jnp.bfloat16
    ),
}


def train(options, epochs=EPOCHS, seeds=SEEDS):
    """Return held-out accuracies [seeds, epochs] of the main job's network."""
    (images, labels), held_out = demo.digits()
    steps = len(labels) // BATCH
    rate = 0.001 if "momentum" in options else 0.01
    tx = rmsprop(optax.cosine_decay_schedule(rate, epochs * steps), **options)

    def logits(graph, params, images):
        return nnx.merge(graph, nnx.State(params))(images)

    def one(seed):
        graph, params = nnx.split(demo.Reader(nnx.Rngs(jax.random.key(seed))))
        params = nnx.to_pure_dict(params)

        def step(carry, chosen):
            def loss_of(params):
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits(graph, params, images[chosen]), labels[chosen]
                ).mean()

            params, state = carry
            updates, state = tx.update(jax.grad(loss_of)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, key):
            order = jax.random.permutation(jax.random.fold_in(key, seed), len(labels))
            batches = order[: steps * BATCH].reshape(steps, BATCH)
            carry, _ = jax.lax.scan(step, carry, batches)
            right = logits(graph, carry[0], held_out[0]).argmax(-1) == held_out[1]
            return carry, right.mean()

        keys = jax.random.split(jax.random.key(1), epochs)
        return jax.lax.scan(epoch, (params, tx.init(params)), keys)[1]

    images, labels, held_out = jax.tree.map(jnp.asarray, (images, labels, held_out))
    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(seeds)))


def figure():
    """Train in every format and draw the accuracies: mean lines in bands of range."""
    import matplotlib.figure

    drawing = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    plain, momentum = drawing.subplots(1, 2, sharey=True)
    for name, options in TRAINED.items():
        percent = 100 * train(options)
        last = percent[:, -1]
        text = f"{name}: {last.mean():.1f} ± {last.std(ddof=1):.1f} %"
        print(text, flush=True)
        axes = momentum if "momentum" in options else plain
        style = ("-", "--", ":")[len(axes.lines) % 3]
        epochs = np.arange(1, EPOCHS + 1)
        (line,) = axes.plot(epochs, percent.mean(0), style, label=text)
        color = line.get_color()
        axes.fill_between(
            epochs, percent.min(0), percent.max(0), color=color, alpha=0.15
        )
    plain.set(ylabel="held-out accuracy [%]", ylim=(80, 100), title="rmsprop")
    momentum.set(title="rmsprop with momentum")
    for axes in (plain, momentum):
        axes.set(xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        axes.xaxis.get_major_locator().set_params(integer=True)
    drawing.suptitle(f"Optimizer state in fewer bytes: mean and range of {SEEDS} seeds")
    drawing.savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--figure", action="store_true", help=f"draw {FIGURE.name}")
    figure() if arguments.parse_args().figure else table()
