"""Measure this machine: `python -m rmsprop_jax.bench [--quick]` prints a table.

Times are ratios of medians of runs that take turns, A B A B ..., on the same inputs.
The step is compiled, with parameters and state donated; the first of ours and of
Optax's is compared with the rule in float64. `float32` is ours with its state in
float32; `optax` is `optax.rmsprop`, in float32; `torch` is `torch.optim.RMSprop`, if it
is installed, on the same kind of device, and on a GPU `compiled` its compiled form.
"""

import argparse
import datetime
import importlib.metadata
import math
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmsprop_jax

OPTIONS = {
    "plain": {},
    "momentum": dict(momentum=0.9),
    "centered + momentum": dict(centered=True, momentum=0.9),
}
BFLOAT16 = dict(nu_dtype=jnp.bfloat16)
SMALL = {
    "bfloat16 nu": BFLOAT16,
    "uint8 nu": dict(nu_dtype=jnp.uint8),
    "bfloat16 nu and momentum": BFLOAT16
    | dict(momentum=0.9, momentum_dtype=jnp.bfloat16),
}


def trees(quick):
    """Return {name: shapes}: one large leaf, equal ones, mixed ones, a huge one."""
    side, width, blocks, huge = (1024, 32, 3, 2048) if quick else (4096, 128, 48, 16384)
    block = [(width, 3 * width), (3 * width,), (width, width), *3 * [(width,)]]
    block += [(width, 4 * width), (4 * width,), (4 * width, width), *3 * [(width,)]]
    shapes = [(64 * width, width), (width,), (width, width), (width,), *blocks * block]
    return {
        f"{side}^2": [(side, side)],
        f"100 x {side // 10}^2": 100 * [(side // 10, side // 10)],
        f"{len(shapes)} mixed": shapes,
        f"{huge}^2": [(huge, huge)],
    }


def interleaved(tasks, rounds):
    """Return the median seconds of each task; the tasks take turns.

    A task is a function that gets ready and returns the function to time.
    """
    seconds = {name: [] for name in tasks}
    for turn in range(rounds + 2):
        for name, task in tasks.items():
            function = task()
            begun = time.perf_counter()
            function()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(each) for name, each in seconds.items()}


def arrays(shapes, seed):
    """Return random leaves; the sizes of gradients differ by leaf."""
    random = np.random.default_rng(seed)
    return [
        jnp.asarray(10.0 ** -(i % 5) * random.standard_normal(shape, np.float32))
        for i, shape in enumerate(shapes)
    ]


def compiled(tx, params, grads):
    """Return the compiled, donating step of a transformation."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, tx.init(params), grads).compile()


def stepper(step, tx, params, grads):
    """Return a function that takes one step and waits for it."""
    held = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def run():
        held[:] = step(*held, grads)
        jax.block_until_ready(held)

    return run, held


def check(held, params, grads, centered):
    """Compare the first step with the rule in float64: a million numbers a leaf."""
    c = 0.1
    for leaf in zip(held[0], params, grads, strict=True):
        new, p, g = (np.asarray(x).ravel()[: 2**20].astype(np.float64) for x in leaf)
        v = c * g**2 - (c * g) ** 2 * centered
        expected = p - 1e-3 * g / np.sqrt(v + 1e-8)
        np.testing.assert_allclose(new, expected, rtol=2e-6, atol=1e-6)


def torch_steppers(options, params, grads):
    """Return PyTorch's step on the same numbers, in the forms there are."""
    # Threads that spin while they wait would take their cores from the next task.
    os.environ |= dict(OMP_WAIT_POLICY="passive", KMP_BLOCKTIME="0")
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    leaves = [torch.tensor(np.asarray(p), device=device) for p in params]
    for leaf, g in zip(leaves, grads, strict=True):
        leaf.grad = torch.tensor(np.asarray(g), device=device)
    options = {k: x for k, x in options.items() if not k.endswith("_dtype")}
    more = dict(foreach=True) if gpu else {}
    optimizer = torch.optim.RMSprop(leaves, lr=1e-3, alpha=0.9, **options, **more)
    steps = {"torch": optimizer.step}
    if gpu:
        steps["compiled"] = torch.compile(optimizer.step)

    def run(step):
        step()
        if gpu:
            torch.cuda.synchronize()

    return {name: lambda step=step: run(step) for name, step in steps.items()}


def copy_bandwidth(size, rounds):
    """Return the bytes a second of x = x + 1, in place, on so many float32 numbers."""
    held = [jnp.ones(size, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run():
        held[0] = add(held[0]).block_until_ready()

    return 8 * size / interleaved({"": lambda: run}, rounds)[""]


def steps(name, tree, shapes, rounds, bandwidth):
    """Return the row of the compiled step of one configuration."""
    options = (OPTIONS | SMALL)[name]
    wide = {k: x for k, x in options.items() if not k.endswith("_dtype")}
    params, grads = arrays(shapes, 0), arrays(shapes, 1)
    builds = dict(ours=(rmsprop_jax, options), optax=(optax, wide))
    if wide != options:
        builds["float32"] = rmsprop_jax, wide
    runs, temporary, state = {}, {}, {}
    for library, (module, chosen) in builds.items():
        tx = module.rmsprop(1e-3, **chosen)
        step = compiled(tx, params, grads)
        runs[library], held = stepper(step, tx, params, grads)
        memory = step.memory_analysis()
        temporary[library] = memory.temp_size_in_bytes if memory else None
        state[library] = sum(x.nbytes for x in jax.tree.leaves(held[1]))
        runs[library]()
        check(held, params, grads, "centered" in options)
    tasks = {library: (lambda run=run: run) for library, run in runs.items()}
    seconds = interleaved(tasks, rounds)
    against = dict(ours=tasks["ours"])
    for other, run in torch_steppers(options, params, grads).items():
        against[other] = lambda run=run: run
    against = interleaved(against, rounds)
    count = sum(map(math.prod, shapes))
    # Codes need the largest number of a row before any: gradients and codes twice.
    again = 5 if options.get("nu_dtype") == jnp.uint8 else 0
    moved = 12 + 2 * state["ours"] / count + again
    return (
        f"step, {name}",
        tree,
        ratio(seconds, "float32"),
        ratio(seconds, "optax"),
        ratio(against, "torch"),
        ratio(against, "compiled"),
        f"{moved:.1f}",
        f"{moved * count / bandwidth / seconds['ours']:.2f}",
        str(temporary["ours"]),
    )


def many_leaves(name, leaves, rounds):
    """Return the rows of a tree of many small leaves."""
    shapes, options = leaves * [(32, 32)], OPTIONS[name]
    params, grads = arrays(shapes, 0), arrays(shapes, 1)
    direct, lowering, compiling = {}, {}, {}
    for library, module in (("ours", rmsprop_jax), ("optax", optax)):
        tx = module.rmsprop(1e-3, **options)
        state = tx.init(params)

        def update(tx=tx, state=state):
            jax.block_until_ready(tx.update(grads, state, params))

        def lower(tx=tx, state=state):
            # A function of its own, so that nothing is found in a cache.
            step = jax.jit(lambda g, s, p: tx.update(g, s, p))
            return step.lower(grads, state, params)

        def lower_fresh(lower=lower):
            jax.clear_caches()
            return lower

        direct[library] = lambda update=update: update
        lowering[library] = lower_fresh
        compiling[library] = lambda lower=lower: lower().compile
    return [
        (
            f"{what}, {name}",
            f"{leaves} x 32^2",
            "-",
            ratio(seconds, "optax"),
            *["-"] * 5,
        )
        for what, seconds in (
            ("direct update", interleaved(direct, rounds)),
            ("trace + lower", interleaved(lowering, max(3, rounds // 3))),
            ("compile", interleaved(compiling, max(3, rounds // 3))),
        )
    ]


def ratio(seconds, other):
    """Return ours over the other as text."""
    return f"{seconds['ours'] / seconds[other]:.2f}" if other in seconds else "-"


def version(package):
    """Return a package and its version, or that it is missing."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m rmsprop_jax.bench")
    parser.add_argument("--quick", action="store_true", help="small arrays, few rounds")
    quick = parser.parse_args().quick
    size, rounds, leaves = (2**20, 5, 100) if quick else (2**24, 21, 1000)
    bandwidth = copy_bandwidth(size, rounds)
    device = jax.devices()[0]
    versions = ", ".join(version(x) for x in ("jax", "optax", "torch"))
    print(
        f"{datetime.date.today()}, {device.device_kind}, {versions}; "
        f"copy bandwidth {bandwidth / 1e9:.1f} GB/s; float32.\n"
    )
    print(
        "| what | leaves | / float32 | / optax | / torch | / compiled "
        "| bytes a parameter | of copy bandwidth | temporary bytes |"
        + "\n"
        + 9 * "|---"
        + "|"
    )
    for tree, shapes in trees(quick).items():
        large = max(map(math.prod, shapes)) > 2 * size
        for name in ("plain", *list(SMALL)[:2]) if large else (*OPTIONS, *SMALL):
            row = steps(name, tree, shapes, 7 if large else rounds, bandwidth)
            print("|", " | ".join(row), "|", flush=True)
    for name in OPTIONS:
        for row in many_leaves(name, leaves, rounds):
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
