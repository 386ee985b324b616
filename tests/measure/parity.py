"""Compare every preset with its original, step by step, on the same gradients.

`python tests/measure/parity.py` runs each framework that is installed and prints a
table; with `--golden` it writes the parameters that the originals reach to golden.json.
"""

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
import originals

from rmsprop_jax import presets, rmsprop

GOLDEN = Path(__file__).with_name("golden.json")
STEPS, DROP = 150, 75
# Only a learning rate that changes shows whether the momentum buffer contains it. It is
# linear because that is rounded alike everywhere, unlike an exponential.
RATES = [0.01 * (1 - t / 300) * (0.1 if t >= DROP else 1) for t in range(STEPS)]


def problem(dtype):
    """Return parameters of order 1, and gradients [STEPS, ...] around 0.

    Gradients that hardly change would show the digits that an original loses where it
    subtracts averages to center. The stream of RandomState never changes.
    """
    random = np.random.RandomState(0)

    def leaf(low, high, shape):
        x = random.uniform(low, high, (2, *shape))
        return (x[0] + 1j * x[1] if "complex" in dtype else x[0]).astype(dtype)

    sizes = {(): 1.0, (5,): 100.0, (3, 2): 0.1}
    params = [leaf(0.5, 1.5, shape) for shape in sizes]
    return params, [leaf(-x, x, (STEPS, *shape)) for shape, x in sizes.items()]


def flat(leaves):
    """Return leaves [steps, ...] as numbers [steps, n]; a complex one is two."""
    path = np.concatenate([np.reshape(x, (len(x), -1)) for x in leaves], axis=1)
    return path.view(path.real.dtype).astype(np.float64)


@contextlib.contextmanager
def precision(dtype):
    """Enable 64-bit types if dtype is one of them, else disable them."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype in ("float64", "complex128"))
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def run(build, cases, dtype, rates=RATES):
    """Return the path [steps, n] of a transformation with each of several options.

    All are compiled as one program. Complex parameters are split, as PyTorch does.
    """
    with precision(dtype):
        params, grads = problem(dtype)
        rates, params = jnp.asarray(rates), list(map(jnp.asarray, params))
        txs = [build(lambda count: rates[count], **options) for options in cases]
        if "complex" in dtype:
            txs = list(map(optax.contrib.split_real_and_imaginary, txs))

        def step(runs, grads):
            runs = [step(run, grads) for step, run in zip(steps, runs, strict=True)]
            return runs, [params for params, _ in runs]

        steps = list(map(measuring.step_of, txs))
        start = [(params, tx.init(params)) for tx in txs]
        return list(map(flat, jax.jit(partial(jax.lax.scan, step))(start, grads)[1]))


class Row(NamedTuple):
    """A preset and its original, with grids of options that both take."""

    preset: str
    package: str
    title: str
    original: Callable | None
    grids: tuple = ({},)
    dtypes: tuple = ("float64", "float32")
    golden: bool = True

    def cases(self):
        """Return the options of each run."""
        return [
            dict(zip(grid, values, strict=True))
            for grid in self.grids
            for values in itertools.product(*grid.values())
        ]

    def theirs(self, cases, dtype, **fixed):
        """Return the path [steps, n] of the original with each of several options."""
        if self.original is None:
            return run(optax.rmsprop, cases, dtype)
        params, grads = problem(dtype)
        steps = list(zip(zip(*grads, strict=True), RATES, strict=True))
        original = partial(self.original, self.package)
        with precision(dtype), originals.quiet():
            paths = [original(x, params, steps, **fixed) for x in cases]
            return [flat(list(zip(*path, strict=True))) for path in paths]


WITH = dict(momentum=(0.0, 0.9), centered=(False, True))
L2 = dict(weight_decay=(0.0, 0.01))
TORCH = (WITH | L2 | dict(maximize=(False, True)),)
COMPLEX = ("complex128", "complex64")
KERAS = (
    WITH | dict(weight_decay=(None, 0.01)),
    WITH | dict(weight_decay=(0.01,), weight_decay_mask=([True, False, True],)),
)
LEGACY = (WITH, WITH | dict(epsilon=(0.0,)))
INSIDE = WITH | dict(lr_in_momentum=(True, False))
TIMM = (INSIDE, INSIDE | dict(weight_decay=(0.01,), decoupled_decay=(False, True)))
OPTAX = dict(momentum=(None, 0.9), centered=(False, True), nesterov=(False, True))
OPTAX = (OPTAX | dict(eps_in_sqrt=(True, False)),)
torch, tensorflow = originals.torch, originals.tensorflow
foreach = partial(torch, foreach=True)
bitsandbytes = partial(torch, optim_bits=32)
impala = partial(tensorflow, decay=0.99, momentum=0.0, epsilon=0.1)
inception = partial(tensorflow, decay=0.9, momentum=0.9, epsilon=1.0)
efficientnet = partial(tensorflow, decay=0.9, momentum=0.9, epsilon=0.001)

ROWS = (
    Row("torch", "torch", "RMSprop", torch, TORCH),
    Row("torch", "torch", "foreach", foreach, TORCH, golden=False),
    Row("torch", "torch", "complex", torch, TORCH, COMPLEX),
    Row("torch", "torch", "complex, foreach", foreach, TORCH, COMPLEX, False),
    Row("torch", "mlx", "RMSprop", originals.mlx),
    Row("torch", "bitsandbytes", "RMSprop", bitsandbytes, (L2,), ("float32",), False),
    Row("tf1", "tensorflow", "RMSPropOptimizer", tensorflow, (WITH,)),
    Row("keras", "keras", "RMSprop", originals.keras, KERAS),
    Row("keras_legacy", "tf_keras", "legacy", tensorflow, LEGACY),
    Row("timm", "timm", "RMSpropTF", torch, TIMM),
    Row("sb3", "stable_baselines3", "RMSpropTFLike", torch, (WITH | L2,)),
    Row("graves", "numpy", "from the paper", originals.graves),
    Row("dqn", "numpy", "from the code in Lua", originals.dqn),
    Row("a3c", "numpy", "from the paper", originals.a3c),
    Row("impala", "tensorflow", "with its numbers", impala),
    Row("inception", "tensorflow", "with its numbers", inception),
    Row("efficientnet", "tensorflow", "with its numbers", efficientnet),
    Row("rmsprop", "optax", "rmsprop", None, OPTAX),
)


def ulp(path):
    """Return a float32 ulp of the largest value that each number has had so far."""
    return np.spacing(np.maximum.accumulate(np.abs(path)).astype(np.float32))


def tolerance(path, centered, dtype):
    """Return how far two correct implementations may be apart, [steps, n].

    In float64, 1e-12: in each of 150 steps an ulp of 2e-16, and some of the move, make
    about 1e-13. In float32, in each step an ulp of the parameter, half from either
    subtraction, and 4 ulp of the longest move so far, for ten roundings on either side,
    which averages carry on with factors below one. The originals subtract centered
    averages, v - m^2, which multiplies by v / (v - m^2); that is largest at decay 0.9,
    with the fewest gradients.
    """
    if dtype in ("float64", "complex128"):
        return np.full(path.shape, 1e-12)
    params, grads = problem(dtype)
    condition, v, m = [], 0, 0
    for g in flat(grads):
        v, m = 0.9 * v + 0.1 * g**2, 0.9 * m + 0.1 * g
        condition.append(v / (v - m**2))
    condition = np.maximum.accumulate(condition) if centered else 1
    before = flat([p[None] for p in params])
    moves = ulp(np.diff(path, axis=0, prepend=before))
    return np.arange(1, STEPS + 1)[:, None] * (ulp(path) + 4 * condition * moves)


def differences(row, dtype):
    """Return the largest differences of each case.

    They are absolute, in float32 ulp of the parameters, and as a share of `tolerance`.
    """
    found, cases = [], row.cases()
    paths = run(getattr(presets, row.preset, rmsprop), cases, dtype)
    theirs = row.theirs(cases, dtype)
    for options, ours, original in zip(cases, paths, theirs, strict=True):
        off = np.abs(ours - original)
        centered = options.get("centered", row.preset in ("graves", "dqn"))
        share = off / tolerance(ours, centered, dtype)
        found.append([off.max(), (off / ulp(ours)).max(), share.max()])
    return np.array(found)


def table():
    """Print a row for each original as soon as it is known."""
    print(
        f"Largest difference in {STEPS} steps over all combinations of the options: in "
        "float64\nabsolute, of parameters around 1; in float32 in ulp of them; and as "
        "a share of what\nrounding allows, which is 1e-12 in float64.\n"
    )
    heads = "preset", "original", "options", "runs", "float64", "float32", "of allowed"
    measuring.heads(*heads)
    for row in ROWS:
        name, runs, found = row.package, "not installed", ["-", "-", "-"]
        if originals.installed(name):
            name, runs = f"{name} {version(name)}", str(len(row.cases()))
            *wide, single = worst = [differences(row, x).max(0) for x in row.dtypes]
            found = f"{wide[0][0]:.0e}" if wide else "-", f"{single[1]:.1f}"
            found += (f"{max(x[2] for x in worst):.0%}",)
        options = ", ".join(dict.fromkeys(itertools.chain(*row.grids))) or "-"
        measuring.row(f"`{row.preset}`", f"{name}, {row.title}", options, runs, *found)


def kept(path):
    """Return every 5th number at the first step and the drop, and all at the last."""
    some = {str(t): path[t - 1, ::5].tolist() for t in (1, DROP, DROP + 1)}
    return some | {str(STEPS): path[-1].tolist()}


def golden_cases():
    """Yield the row and the description of each case in golden.json."""
    for row in ROWS:
        about = dict(preset=row.preset, beside=f"{row.package}, {row.title}")
        for options in row.cases() if row.golden else ():
            yield row, about | dict(dtype=row.dtypes[0], options=options)


def write_golden():
    """Run the originals and write golden.json."""
    packages = dict.fromkeys(row.package for row, _ in golden_cases())
    missing = [x for x in packages if not originals.installed(x)]
    if missing:
        raise SystemExit(f"golden.json needs these too: {', '.join(missing)}")
    lines = [
        json.dumps(x | dict(params=kept(*row.theirs([x["options"]], x["dtype"]))))
        for row, x in golden_cases()
    ]
    head = dict(made_by="python tests/measure/parity.py --golden")
    head |= dict(versions={x: version(x) for x in packages})
    cases = ",\n".join(lines)
    GOLDEN.write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{cases}\n]}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", action="store_true", help="write golden.json")
    jax.config.update("jax_platforms", "cpu")
    write_golden() if parser.parse_args().golden else table()
