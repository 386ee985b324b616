"""Measure speed and memory on this machine and print them as Markdown tables.

`python tests/measure/speed.py > tests/measure/speed.md`; `--quick` is for a try.

Times are ratios of medians of runs that take turns, A B A B ..., on the same inputs:
below 1, ours is faster. In the first table a step is compiled, with parameters and
state donated, and the first one is checked against the rule in float64. `float32` is
ours with float32 state; `optax` is `optax.rmsprop` with float32 state; `torch` is
`torch.optim.RMSprop`, where it is installed, on the same kind of device, and on a GPU
`compiled` its compiled form. In the second table, first use starts with empty caches.
"""

import argparse
import datetime
import importlib.util
import math
import os
import platform
import re
import statistics
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
from measuring import BFLOAT16, BFLOAT16_MOMENTUM, MOMENTUM, UINT8

import rmsprop_jax
from rmsprop_jax import diagnostics, storage

CENTERED = dict(centered=True, momentum=0.9)
OPTIONS = {"plain": {}, "momentum": MOMENTUM, "centered + momentum": CENTERED}
SMALL = {
    "bfloat16 nu": BFLOAT16,
    "uint8 nu": UINT8,
    "bfloat16 nu and momentum": BFLOAT16 | BFLOAT16_MOMENTUM,
}
LIBRARIES = (rmsprop_jax, optax)


def transformer(width, blocks):
    """Return the shapes of a transformer: 4 arrays, and 12 in each block."""
    block = [(width, 3 * width), (3 * width,), (width, width), *3 * [(width,)]]
    block += [(width, 4 * width), (4 * width,), (4 * width, width), *3 * [(width,)]]
    return [(64 * width, width), (width,), (width, width), (width,), *blocks * block]


def trees(quick):
    """Return {name: shapes}: one large leaf, equal ones, mixed ones, a huge one."""
    side, width, blocks, huge = (1024, 32, 3, 2048) if quick else (4096, 128, 48, 16384)
    mixed = transformer(width, blocks)
    return {
        f"{side}^2": [(side, side)],
        f"100 x {side // 10}^2": 100 * [(side // 10, side // 10)],
        f"{len(mixed)} mixed": mixed,
        f"{huge}^2": [(huge, huge)],
    }


def problem(shapes):
    """Return random parameters and gradients whose sizes differ from leaf to leaf."""
    draw = partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    sizes = [np.float32(10.0 ** -(i % 5)) for i in range(len(shapes))]
    pairs = [*zip(sizes, shapes, strict=True)]
    return tuple([jnp.asarray(x * draw(y)) for x, y in pairs] for _ in range(2))


def fresh(run):
    """Empty all caches before a run."""
    jax.clear_caches()
    return run


def interleaved(runs, rounds, prepare=None):
    """Return the median seconds of each run, prepared anew; they take turns."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            seconds[name].append(measuring.timed(prepare(run) if prepare else run)[1])
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def ratio(seconds, other):
    return f"{seconds['ours'] / seconds[other]:.2f}" if other in seconds else "-"


class Repeated:
    """Call a compiled function of what it returned before, which is donated."""

    def __init__(self, function, start, *args):
        self.held, self.args = start, args
        function = jax.jit(function, donate_argnums=0)
        self.program = function.lower(start, *args).compile()

    def __call__(self):
        self.held = self.program(self.held, *self.args)
        return self.held


def repeated_step(tx, params, grads):
    held = jax.tree.map(jnp.copy, params), tx.init(params)
    return Repeated(measuring.step_of(tx), held, grads)


def check(new_params, params, grads, centered):
    """Compare the first step with the rule in float64, up to 2^20 numbers a leaf."""
    for leaf in zip(new_params, params, grads, strict=True):
        new, p, g = (np.asarray(x).ravel()[: 2**20].astype(np.float64) for x in leaf)
        v = 0.1 * g**2 - (0.1 * g) ** 2 * centered
        expected = p - 1e-3 * g / np.sqrt(v + 1e-8)
        np.testing.assert_allclose(new, expected, rtol=2e-6, atol=1e-6)


def torch_steps(options, params, grads):
    """Return PyTorch's step on the same numbers, and on a GPU its compiled form."""
    # Threads that spin while they wait would take their cores from the next run.
    os.environ |= dict(OMP_WAIT_POLICY="passive", KMP_BLOCKTIME="0")
    try:
        import torch
    except ImportError:
        return {}
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    tensor = partial(torch.tensor, device="cuda" if gpu else "cpu")
    leaves = [tensor(np.asarray(p)) for p in params]
    for leaf, g in zip(leaves, grads, strict=True):
        leaf.grad = tensor(np.asarray(g))
    common = dict(lr=1e-3, alpha=0.9, foreach=gpu or None)
    step = torch.optim.RMSprop(leaves, **common, **options).step
    if not gpu:
        return {"torch": step}
    steps = {"torch": step, "compiled": torch.compile(step)}
    return {k: lambda x=x: (x(), torch.cuda.synchronize()) for k, x in steps.items()}


def compiled_step(name, tree, shapes, rounds, bandwidth):
    """Print the row of the compiled step with some options."""
    options = (OPTIONS | SMALL)[name]
    wide = {k: x for k, x in options.items() if not k.endswith("_dtype")}
    txs = dict(
        ours=rmsprop_jax.rmsprop(1e-3, **options), optax=optax.rmsprop(1e-3, **wide)
    )
    if wide != options:
        txs["float32"] = rmsprop_jax.rmsprop(1e-3, **wide)
    params, grads = problem(shapes)
    runs = {library: repeated_step(tx, params, grads) for library, tx in txs.items()}
    for run in runs.values():
        check(run()[0], params, grads, "centered" in options)
    seconds, ours = interleaved(runs, rounds), runs["ours"]
    torch_runs = {"ours": ours} | torch_steps(wide, params, grads)
    torch_seconds = interleaved(torch_runs, rounds)
    memory, count = ours.program.memory_analysis(), sum(map(math.prod, shapes))
    moved = 12 + 2 * sum(x.nbytes for x in jax.tree.leaves(ours.held[1])) / count
    share = moved * count / bandwidth / seconds["ours"]
    ratios = [ratio(seconds, x) for x in ("float32", "optax")]
    ratios += [ratio(torch_seconds, x) for x in ("torch", "compiled")]
    temporary = str(memory.temp_size_in_bytes) if memory else "-"
    measuring.row(name, tree, *ratios, f"{moved:.1f}", f"{share:.2f}", temporary)


def compare(what, leaves, beside, ours, other, rounds, prepare=fresh):
    """Print the row of our run beside another."""
    seconds = interleaved({"ours": ours, beside: other}, rounds, prepare)
    measuring.row(what, leaves, beside, ratio(seconds, beside))


def many_leaves(count, rounds):
    """Print the rows of a tree of small leaves."""
    params, grads = problem(count * [(32, 32)])
    few, size = (rounds + 2) // 3, f"{count} x 32^2"
    to_compile = lambda lower: fresh(lower)().compile
    for name, options in OPTIONS.items():
        txs = [module.rmsprop(1e-3, **options) for module in LIBRARIES]
        calls = [(tx.update, grads, tx.init(params), params) for tx in txs]
        direct = [partial(*call) for call in calls]
        lower = [partial(jax.jit(update).lower, *args) for update, *args in calls]
        compare(f"direct update, {name}", size, "optax", *direct, rounds, None)
        compare(f"trace + lower, {name}", size, "optax", *lower, few)
        compare(f"compile, {name}", size, "optax", *lower, few, to_compile)


def sweep(module, params, rates):
    """Take three direct steps with each of several learning rates."""
    for rate in np.linspace(1e-3, 1e-2, rates).tolist():
        tx = module.rmsprop(rate)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
    return updates


def first_use(count, rates, blocks, side, rounds):
    """Print the rows of what is slow the first time."""
    tx = rmsprop_jax.rmsprop(1e-3)
    params, _ = problem([(8 + i, 16) for i in range(count)])
    inits = [partial(module.rmsprop(1e-3).init, params) for module in LIBRARIES]
    compare("first use, init", f"{count} shapes", "optax", *inits, rounds)

    params = params[: count // 6]
    sweeps = [partial(sweep, module, params, rates) for module in LIBRARIES]
    what, size = f"first use, {rates} learning rates", f"{len(params)} shapes"
    compare(what, size, "optax", *sweeps, rounds)

    metrics = partial(diagnostics.metrics, learning_rate=1e-3)
    convert = lambda _, state, __: storage.convert(state, **UINT8)
    leaves = transformer(64, blocks)
    for what, function, shapes in (
        ("metrics", metrics, leaves),
        ("metrics per layer", partial(metrics, per_layer=True), leaves),
        ("convert to uint8", convert, leaves[4:16]),
    ):
        params, grads = problem(shapes)
        args, size = (grads, tx.init(params), params), f"{len(shapes)} mixed"
        runs = partial(function, *args), partial(tx.update, *args)
        compare(f"first use, {what}", size, "first update", *runs, rounds)

    params, grads = problem([(side, side)])
    step = repeated_step(tx, params, grads)
    later = lambda: metrics(grads, *reversed(step.held))
    compare("metrics", f"{side}^2", "step", later, step, rounds, None)


def about():
    """Return date, hardware and versions."""
    hardware, cpuinfo = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    if hardware == "cpu" and cpuinfo.exists():
        models = set(re.findall("model name.*: (.*)", cpuinfo.read_text()))
        hardware = f"{os.cpu_count()} CPU cores {' and '.join(models)}"
    about = f"{datetime.date.today()}, {hardware}, Python {platform.python_version()}"
    packages = [x for x in ("jax", "optax", "torch") if importlib.util.find_spec(x)]
    return ", ".join([about, *(f"{x} {version(x)}" for x in packages)])


def copy_bandwidth(size, rounds):
    """Return the bytes per second of x = x + 1, in place, on float32 numbers."""
    add = Repeated(lambda x: x + 1, jnp.ones(size, jnp.float32))
    return 8 * size / interleaved({"copy": add}, rounds)["copy"]


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small arrays, few rounds")
    quick = parser.parse_args().quick
    size, rounds, leaves = (2**20, 5, 100) if quick else (2**24, 21, 1000)
    first = (30, 4, 2, 1024, 1) if quick else (300, 20, 12, 4096, 3)
    bandwidth = copy_bandwidth(size, rounds)
    print(f"{about()}; copy bandwidth {bandwidth / 1e9:.1f} GB/s.\n")

    others = "/ float32", "/ optax", "/ torch", "/ compiled"
    moved = "bytes a parameter", "of copy bandwidth"
    measuring.heads("step", "leaves", *others, *moved, "temporary bytes")
    for tree, shapes in trees(quick).items():
        large = max(map(math.prod, shapes)) > 2 * size
        for name in ("plain", *list(SMALL)[:2]) if large else (*OPTIONS, *SMALL):
            compiled_step(name, tree, shapes, 7 if large else rounds, bandwidth)
    print()
    measuring.heads("time of", "leaves", "beside", "ratio")
    many_leaves(leaves, rounds)
    first_use(*first)


if __name__ == "__main__":
    # Programs kept from an earlier run would make first use look fast.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
