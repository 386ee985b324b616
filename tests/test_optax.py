"""Changing the import from Optax changes nothing, which Optax's own tests confirm.

As a script, this file runs those tests with our functions in place of Optax's.
"""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax

OPTAX = Path(optax.__file__).parent
MODULES = ("alias", "transform", "float64", "sharding")
FILES = [OPTAX / "_src" / f"{module}_test.py" for module in MODULES]
FILES.append(OPTAX / "contrib" / "_common_test.py")
# schedule_free_adamw is made of scale_by_rms.
TOUCHED = ("rms", "stddev", "schedule_free_adamw")
BOTH = (True, False)
STEPS = 60
CORES = [
    dict(eps_in_sqrt=eps_in_sqrt, initial_scale=start, bias_correction=corrected)
    for eps_in_sqrt in BOTH
    for start, corrected in ((0.0, False), (1.0, False), (0.0, True))
]
OPTIONS = [
    core | dict(centered=centered, momentum=momentum, nesterov=nesterov)
    for core in CORES
    for centered in BOTH
    for momentum in (None, 0.9)
    for nesterov in BOTH
    if not (centered and core["bias_correction"])
]
# Relative to the largest update so far. In float32, one step of either side rounds
# about ten times, some of them to the other side: 8 ulp a step.
SINGLE = 8 * float(jnp.finfo(jnp.float32).eps) * (1 + np.arange(STEPS))
UNITS = dict(float32=SINGLE, float64=1e-12, complex64=SINGLE, complex128=1e-12)
POSITIONAL = (0.01, 0.8, 1e-5, 0.5, False, True, 0.7, True, False)


def drop(count):
    return jnp.where(count < 20, 0.1, 0.01)


@functools.cache
def gradients():
    """Return ordinary gradients: their spread is like their size."""
    x = np.random.default_rng(0).normal(size=(2, STEPS, 2, 3))
    z = x[0] + 1j * x[1]
    return {dtype: (z if "c" in dtype else x[0]).astype(dtype) for dtype in UNITS}


def assert_same_updates(ours, theirs, cases, gs):
    """Compare all updates of two factories, called with the options of each case."""
    # In one program: what takes the time is to compile.
    pairs = [(ours(**case), theirs(**case)) for case in cases]

    @jax.jit
    def run(gs):
        def step(states, g):
            new = [
                [tx.update(g, state) for tx, state in zip(*both, strict=True)]
                for both in zip(pairs, states, strict=True)
            ]
            return [[x[1] for x in both] for both in new], [
                [x[0] for x in both] for both in new
            ]

        first = jax.tree.map(lambda x: x[0], gs)
        states = [[tx.init(first) for tx in both] for both in pairs]
        return jax.lax.scan(step, states, gs)[1]

    for case, (mine, optaxs) in zip(cases, run(gs), strict=True):
        for dtype in gs:
            error = np.abs(np.asarray(mine[dtype]) - optaxs[dtype]).max((1, 2))
            size = np.maximum.accumulate(np.abs(optaxs[dtype]).max((1, 2)))
            assert mine[dtype].dtype == optaxs[dtype].dtype == dtype
            assert (error <= UNITS[dtype] * size).all(), (dtype, case)


# In turn, each both real and complex, and in both widths.
@pytest.mark.parametrize(
    ("cases", "dtypes"),
    [
        (OPTIONS[::4] + OPTIONS[3::4], ("float32", "complex128")),
        (OPTIONS[1::4] + OPTIONS[2::4], ("float64", "complex64")),
    ],
    ids=("float32", "float64"),
)
def test_rmsprop_is_a_drop_in(cases, dtypes, lenient, x64):
    ours, theirs = (functools.partial(x.rmsprop, drop) for x in (rmsprop_jax, optax))
    assert_same_updates(ours, theirs, cases, {k: gradients()[k] for k in dtypes})


def test_scale_by_rms_is_a_drop_in(lenient, x64):
    ours, theirs = rmsprop_jax.scale_by_rms, optax.scale_by_rms
    assert_same_updates(ours, theirs, CORES, gradients())


def test_centered_scale_by_rms_is_scale_by_stddev(lenient):
    cases = [
        dict(initial_scale=start, eps_in_sqrt=eps_in_sqrt)
        for start in (0.0, 1.0)
        for eps_in_sqrt in BOTH
    ]
    ours = functools.partial(rmsprop_jax.scale_by_rms, centered=True)
    gs = {"float32": gradients()["float32"]}
    assert_same_updates(ours, optax.scale_by_stddev, cases, gs)


def test_positional_and_keyword_calls_are_those_of_optax(lenient):
    names = list(inspect.signature(optax.rmsprop).parameters)

    def called(function):
        def build(given):
            by_name = dict(zip(names[given:], POSITIONAL[given:], strict=True))
            return function(*POSITIONAL[:given], **by_name)

        return build

    cases = [dict(given=n) for n in range(1, 1 + len(POSITIONAL))]
    gs = {"float32": gradients()["float32"]}
    assert_same_updates(called(rmsprop_jax.rmsprop), called(optax.rmsprop), cases, gs)


@pytest.mark.parametrize("function", ("rmsprop", "scale_by_rms"))
def test_positional_arguments_are_those_of_optax(function):
    def arguments(module):
        found = inspect.signature(getattr(module, function)).parameters.values()
        return [(x.name, x.default) for x in found if x.kind is not x.KEYWORD_ONLY]

    assert arguments(rmsprop_jax) == arguments(optax)


@pytest.mark.parametrize("other", (dict(centered=True), dict(initial_scale=1.0)))
def test_bias_correction_is_refused_where_optax_accepts_it(other):
    optax.rmsprop(0.1, bias_correction=True, **other)
    with pytest.raises(ValueError, match="bias_correction has no meaning"):
        rmsprop_jax.rmsprop(0.1, bias_correction=True, **other)


@pytest.fixture
def own_tests():
    """Return a function that runs Optax's tests, in a process of their own."""
    reason = "needs an Optax that ships its tests, without the dependency on chex"
    pytest.importorskip("optax._src.test_utils", reason=reason)
    if not all(path.exists() for path in FILES):
        pytest.skip(reason)

    def run(*words, **environment):
        done = subprocess.run(
            [sys.executable, __file__, *words],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_own_tests_of_optax_pass_with_our_functions(own_tests):
    # Compiled with less care, which their tolerances do not see: a fifth faster.
    found = own_tests(*TOUCHED, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert not found["failed"]
    # 61 in Optax 0.2.8, besides those of schedule_free_adamw; later ones may have more.
    assert len(found["passed"]) >= 61
    for file in FILES:
        assert any(file.name in x for x in found["passed"])
    assert set(found["calls"]) == {"rmsprop", "scale_by_rms", "scale_by_stddev"}


class Tally:
    """Pytest plugin: keep the tests that a word is in, and tally how they end."""

    def __init__(self, words):
        self.words = words
        self.ends = dict(passed={}, failed={}, skipped={})

    def pytest_collection_modifyitems(self, items):
        def text(item):
            # absl keeps the parameters of a case here, and numbers them in its name.
            return item.name + getattr(item.function, "__x_params_repr__", "")

        items[:] = [x for x in items if any(word in text(x) for word in self.words)]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.ends[report.outcome][report.nodeid] = True


def replace(function, ours, module, calls):
    """Put our function in the place of Optax's, counting its calls."""

    # The tests compare names; inject_hyperparams reads the signature.
    @functools.wraps(ours, assigned=("__doc__",))
    def counted(*args, **kwargs):
        calls[function] = calls.get(function, 0) + 1
        return ours(*args, **kwargs)

    counted.__name__ = function
    setattr(optax, function, counted)
    setattr(module, function, counted)


def main(words):
    from optax._src import alias, transform

    calls, tally = {}, Tally(words)
    stddev = functools.partial(rmsprop_jax.scale_by_rms, centered=True)
    replace("rmsprop", rmsprop_jax.rmsprop, alias, calls)
    replace("scale_by_rms", rmsprop_jax.scale_by_rms, transform, calls)
    replace("scale_by_stddev", stddev, transform, calls)
    options = ["-q", "-c", os.devnull, f"--rootdir={OPTAX}", "--import-mode=importlib"]
    files = [str(path) for path in FILES]
    pytest.main([*options, "-pno:cacheprovider", *files], plugins=[tally])
    ends = {end: list(tests) for end, tests in tally.ends.items()}
    print(json.dumps(ends | dict(calls=calls)))


if __name__ == "__main__":
    main(sys.argv[1:])
