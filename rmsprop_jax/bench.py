"""Measure this machine: `python -m rmsprop_jax.bench [--quick]` prints a table.

Times are ratios of medians of runs that take turns, A B A B ..., on the same inputs.
The step is compiled, with parameters and state donated; the first of ours and of
Optax's is compared with the rule in float64. `optax` is `optax.rmsprop`; `torch` is
`torch.optim.RMSprop`, if it is installed, on the same kind of device.
"""

import argparse
import datetime
import importlib.metadata
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


def arrays(leaves, shape, seed):
    """Return random leaves of one shape; the sizes of gradients differ by leaf."""
    random = np.random.default_rng(seed)
    return [
        jnp.asarray(random.normal(scale=10.0 ** -(i % 5), size=shape), jnp.float32)
        for i in range(leaves)
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
    """Compare the first step with the rule in float64."""
    c = 0.1
    for new, p, g in zip(held[0], params, grads, strict=True):
        g = np.asarray(g, np.float64)
        v = c * g**2 - (c * g) ** 2 * centered
        expected = np.asarray(p, np.float64) - 1e-3 * g / np.sqrt(v + 1e-8)
        np.testing.assert_allclose(new, expected, rtol=2e-6, atol=1e-6)


def torch_stepper(options, params, grads):
    """Return PyTorch's step on the same numbers, or None without PyTorch."""
    # Threads that spin while they wait would take their cores from the next task.
    os.environ |= dict(OMP_WAIT_POLICY="passive", KMP_BLOCKTIME="0")
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    leaves = [torch.tensor(np.asarray(p), device=device) for p in params]
    for leaf, g in zip(leaves, grads, strict=True):
        leaf.grad = torch.tensor(np.asarray(g), device=device)
    optimizer = torch.optim.RMSprop(leaves, lr=1e-3, alpha=0.9, **options)

    def run():
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()

    return run


def copy_bandwidth(size, rounds):
    """Return the bytes a second of x = x + 1, in place, on so many float32 numbers."""
    held = [jnp.ones(size, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run():
        held[0] = add(held[0]).block_until_ready()

    return 8 * size / interleaved({"": lambda: run}, rounds)[""]


def steps(name, leaves, shape, rounds, bandwidth):
    """Return the row of the compiled step of one configuration."""
    options = OPTIONS[name]
    params, grads = arrays(leaves, shape, 0), arrays(leaves, shape, 1)
    runs, temporary = {}, {}
    for library, module in (("ours", rmsprop_jax), ("optax", optax)):
        tx = module.rmsprop(1e-3, **options)
        step = compiled(tx, params, grads)
        runs[library], held = stepper(step, tx, params, grads)
        memory = step.memory_analysis()
        temporary[library] = memory.temp_size_in_bytes if memory else None
        runs[library]()
        check(held, params, grads, "centered" in options)
    tasks = {library: (lambda run=run: run) for library, run in runs.items()}
    seconds = interleaved(tasks, rounds)
    against_torch = {}
    if run := torch_stepper(options, params, grads):
        against_torch = interleaved(dict(ours=tasks["ours"], torch=lambda: run), rounds)
    count = leaves * int(np.prod(shape))
    moved = 12 + 8 * (1 + len(options))
    return (
        f"step, {name}",
        f"{leaves} x {shape}",
        ratio(seconds, "optax"),
        ratio(against_torch, "torch"),
        str(moved),
        f"{moved * count / bandwidth / seconds['ours']:.2f}",
        str(temporary["ours"]),
    )


def many_leaves(name, leaves, rounds):
    """Return the rows of a tree of many small leaves."""
    shape, options = (32, 32), OPTIONS[name]
    params, grads = arrays(leaves, shape, 0), arrays(leaves, shape, 1)
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
        (f"{what}, {name}", f"{leaves} x {shape}", ratio(seconds, "optax"), *["-"] * 4)
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
        "| what | leaves | / optax | / torch | bytes a parameter | of copy bandwidth "
        "| temporary bytes |\n|---|---|---|---|---|---|---|"
    )
    for name in OPTIONS:
        for number in (1, 100):
            row = steps(name, number, (size // number,), rounds, bandwidth)
            print("|", " | ".join(row), "|", flush=True)
    for name in OPTIONS:
        for row in many_leaves(name, leaves, rounds):
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
