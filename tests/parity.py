"""Every preset beside its original, step by step, on the same gradients.

`python tests/parity.py` runs each framework that is installed and prints a table;
`python tests/parity.py --golden` writes what they give, in float64, to golden.json.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import jax
import numpy as np
import originals

from rmsprop_jax import presets, rmsprop

GOLDEN = pathlib.Path(__file__).with_name("golden.json")
STEPS, DROP = 150, 75
# Only where the rate changes does it matter whether momentum holds it. On a line, which
# is rounded alike everywhere, as an exponential is not.
RATES = [0.01 * (1 - t / 300) * (0.1 if t >= DROP else 1) for t in range(STEPS)]
COUNT = np.arange(1, STEPS + 1)[:, None]


def problem(dtype):
    """Return parameters of order 1, and gradients whose spread is like their size.

    The frameworks subtract centered averages: gradients that hardly change would show
    what that leaves of their digits. The stream of RandomState never changes.
    """
    random = np.random.RandomState(0)

    def leaf(low, high, shape):
        x = random.uniform(low, high, (2, *shape))
        return (x[0] + 1j * x[1] if "complex" in dtype else x[0]).astype(dtype)

    sizes = {(): 1.0, (5,): 100.0, (3, 2): 0.1}
    params = [leaf(0.5, 1.5, shape) for shape in sizes]
    grads = [leaf(-size, size, (STEPS, *shape)) for shape, size in sizes.items()]
    return params, [[g[t] for g in grads] for t in range(STEPS)]


class Row(NamedTuple):
    """One original beside its preset, over grids of options that both take.

    The first of `dtypes` is the wide one, or None where the original has none.
    """

    preset: str
    package: str
    title: str
    original: Callable
    grids: tuple = ({},)
    dtypes: tuple = ("float64", "float32")
    golden: bool = True

    def cases(self):
        for grid in self.grids:
            for values in itertools.product(*grid.values()):
                yield dict(zip(grid, values, strict=True))

    def theirs(self, options, dtype):
        with width(dtype), originals.quiet():
            return flat(self.original(options, *problem(dtype), RATES))

    def ours(self, options, dtype):
        build = getattr(presets, self.preset, rmsprop)
        with width(dtype):
            run = originals.transformation(build, options, *problem(dtype), RATES)
            return flat(run)


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
IMPALA = originals.tf1_with(decay=0.99, momentum=0.0, epsilon=0.1)
INCEPTION = originals.tf1_with(decay=0.9, momentum=0.9, epsilon=1.0)
EFFICIENTNET = originals.tf1_with(decay=0.9, momentum=0.9, epsilon=0.001)

ROWS = (
    Row("torch", "torch", "RMSprop", originals.torch, TORCH),
    Row("torch", "torch", "foreach", originals.foreach, TORCH, golden=False),
    Row("torch", "torch", "complex", originals.torch, TORCH, COMPLEX),
    Row(
        *("torch", "torch", "complex, foreach", originals.foreach, TORCH, COMPLEX),
        golden=False,
    ),
    Row("torch", "mlx", "RMSprop", originals.mlx),
    Row(
        *("torch", "bitsandbytes", "RMSprop", originals.bitsandbytes, (L2,)),
        dtypes=(None, "float32"),
    ),
    Row("tf1", "tensorflow", "RMSPropOptimizer", originals.tf1, (WITH,)),
    Row("keras", "keras", "RMSprop", originals.keras, KERAS),
    Row("keras_legacy", "tf_keras", "legacy", originals.keras_legacy, LEGACY),
    Row("timm", "timm", "RMSpropTF", originals.timm, TIMM),
    Row("sb3", "stable_baselines3", "RMSpropTFLike", originals.sb3, (WITH | L2,)),
    Row("graves", "numpy", "from the paper", originals.graves),
    Row("dqn", "numpy", "from the code in Lua", originals.dqn),
    Row("a3c", "numpy", "from the paper", originals.a3c),
    Row("impala", "tensorflow", "with its numbers", IMPALA),
    Row("inception", "tensorflow", "with its numbers", INCEPTION),
    Row("efficientnet", "tensorflow", "with its numbers", EFFICIENTNET),
    Row("rmsprop", "optax", "rmsprop", originals.optax_rmsprop, OPTAX),
)


@contextlib.contextmanager
def width(dtype):
    """Turn 64-bit types on for those, and off for others."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype in ("float64", "complex128"))
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def flat(path):
    """Return real numbers [steps, n], the parts of complex ones side by side."""
    rows = [np.concatenate([np.ravel(x) for x in leaves]) for leaves in path]
    return np.stack(rows).view(rows[0].real.dtype).astype(np.float64)


def ulp(path):
    """Return an ulp, in float32, of the largest value that each number has had."""
    return np.spacing(np.maximum.accumulate(np.abs(path)).astype(np.float32))


def units(path, centered, dtype):
    """Return how far float32 may part two right implementations in each of the steps.

    By an ulp of the parameter, half from either subtraction, and 4 ulp of the longest
    move so far, for ten roundings on either side, which averages carry on with factors
    below one. The originals subtract centered averages, v - m^2, which multiplies by
    v / (v - m^2); that is largest at decay 0.9, with the fewest gradients.
    """
    params, grads = problem(dtype)
    condition, v, m = [], 0, 0
    for g in flat(grads):
        v, m = 0.9 * v + 0.1 * g**2, 0.9 * m + 0.1 * g
        condition.append(v / (v - m**2))
    condition = np.maximum.accumulate(condition) if centered else 1
    moves = np.abs(np.diff(path, axis=0, prepend=flat([params])))
    return ulp(path) + 4 * condition * ulp(moves)


class Difference(NamedTuple):
    largest: float
    in_ulp: float  # of float32, after any number of steps
    ulp_a_step: float
    units_a_step: float
    ulp_in_unit: float


def compare(row, options, dtype):
    ours = row.ours(options, dtype)
    off = np.abs(ours - row.theirs(options, dtype))
    unit = units(ours, options.get("centered", row.preset in ("graves", "dqn")), dtype)
    one = ulp(ours)
    each = off, off / one, off / one / COUNT, off / unit / COUNT, unit / one
    return Difference(*(x.max() for x in each))


def table():
    """Print a line for each row as soon as it is known."""
    print(
        f"Largest difference in {STEPS} steps and all combinations of the options: in\n"
        "float64 absolute, for parameters of order 1; in float32 in ulp of them.\n\n"
        "| preset | beside | options | runs | float64 | float32 |\n"
        "|---|---|---|---|---|---|"
    )
    found = []
    for row in ROWS:
        cases, cells = list(row.cases()), ["-", "-"]
        name, runs = row.package, "not installed"
        if originals.installed(row.package):
            name, runs = f"{name} {version(name)}", f"{len(cases)}"
            for i, dtype in enumerate(row.dtypes):
                if dtype:
                    new = [compare(row, options, dtype) for options in cases]
                    worst = Difference(*np.max(new, axis=0))
                    cells[i] = f"{worst.in_ulp:.1f}" if i else f"{worst.largest:.0e}"
                    found += [worst] * i
        options = ", ".join(dict.fromkeys(k for grid in row.grids for k in grid))
        about = f"`{row.preset}` | {name}, {row.title} | {options or '-'} | {runs}"
        print(f"| {about} | {' | '.join(cells)} |", flush=True)
    worst = Difference(*np.max(found, axis=0))
    print(
        "\nAllowed are 1e-12 in float64, and in float32 up to "
        f"{worst.ulp_in_unit:.1f} ulp a step; the most was {worst.ulp_a_step:.1f}."
    )


def kept(path):
    """Return every 5th number at the first step and the drop, and all at the last."""
    some = {str(t): path[t - 1, ::5].tolist() for t in (1, DROP, DROP + 1)}
    return some | {str(STEPS): path[-1].tolist()}


def golden_cases():
    """Yield the row of each line in golden.json, and how the line begins."""
    for row in ROWS:
        if row.golden and row.dtypes[0]:
            for options in row.cases():
                about = dict(preset=row.preset, beside=f"{row.package}, {row.title}")
                yield row, about | dict(dtype=row.dtypes[0], options=options)


def write_golden():
    packages = dict.fromkeys(row.package for row, _ in golden_cases())
    missing = [x for x in packages if not originals.installed(x)]
    if missing:
        raise SystemExit(f"golden.json needs these too: {', '.join(missing)}")
    lines = [
        json.dumps(x | dict(params=kept(row.theirs(x["options"], x["dtype"]))))
        for row, x in golden_cases()
    ]
    head = dict(made_by="python tests/parity.py --golden")
    head |= dict(versions={x: version(x) for x in packages})
    cases = ",\n".join(lines)
    GOLDEN.write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{cases}\n]}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", action="store_true", help="write golden.json")
    if parser.parse_args().golden:
        write_golden()
    else:
        table()
