"""Run Optax's own tests with our functions in place of Optax's.

`python tests/measure/optax_own.py` needs an Optax that ships its tests, as 0.2.8 does.
"""

import collections
import functools
import os
import sys
from pathlib import Path

import optax
import pytest
from optax._src import alias, transform

import rmsprop_jax

OPTAX = Path(optax.__file__).parent
MODULES = ("alias", "transform", "float64", "sharding")
FILES = [OPTAX / "_src" / f"{module}_test.py" for module in MODULES]
FILES.append(OPTAX / "contrib" / "_common_test.py")
# schedule_free_adamw uses scale_by_rms.
TOUCHED = ("rms", "stddev", "schedule_free_adamw")
CALLS, OUTCOMES = collections.Counter(), dict(passed=set(), failed=set(), skipped=set())


def pytest_collection_modifyitems(items):
    """Select the tests of our functions."""

    def text(item):
        # absl keeps the parameters of a case here, and numbers them in its name.
        return item.name + getattr(item.function, "__x_params_repr__", "")

    items[:] = [x for x in items if any(word in text(x) for word in TOUCHED)]


def pytest_runtest_logreport(report):
    """Keep the outcome of each test."""
    if report.when == "call" or not report.passed:
        OUTCOMES[report.outcome].add(report.nodeid)


def replace(module, name, ours):
    """Put our function in the place of Optax's, counting its calls."""

    # The tests compare names; inject_hyperparams reads the signature.
    @functools.wraps(ours, assigned=("__doc__",))
    def counted(*args, **kwargs):
        CALLS[name] += 1
        return ours(*args, **kwargs)

    counted.__name__ = name
    setattr(optax, name, counted)
    setattr(module, name, counted)


if __name__ == "__main__":
    stddev = functools.partial(rmsprop_jax.scale_by_rms, centered=True)
    replace(alias, "rmsprop", rmsprop_jax.rmsprop)
    replace(transform, "scale_by_rms", rmsprop_jax.scale_by_rms)
    replace(transform, "scale_by_stddev", stddev)
    options = ["-q", "-c", os.devnull, f"--rootdir={OPTAX}", "--import-mode=importlib"]
    plugins = [sys.modules[__name__]]
    pytest.main([*options, "-pno:cacheprovider", *map(str, FILES)], plugins=plugins)

    passed, failed = OUTCOMES["passed"], len(OUTCOMES["failed"])
    print(f"{len(passed)} of Optax's tests pass with ours, {failed} fail; {CALLS}")
    # Optax 0.2.8 has 61, besides those of schedule_free_adamw.
    ran = all(any(file.name in test for test in passed) for file in FILES)
    sys.exit(not (ran and len(CALLS) == 3 and len(passed) >= 61 and not failed))
