"""Run Optax's own tests with our functions in place of Optax's.

`python tests/measure/optax_own.py` needs an Optax that ships its tests, as 0.2.8 does.
"""

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


class Tally:
    """Pytest plugin that selects the tests of our functions and counts outcomes."""

    def __init__(self):
        self.ends = dict(passed=set(), failed=set(), skipped=set())

    def pytest_collection_modifyitems(self, items):
        def text(item):
            # absl keeps the parameters of a case here, and numbers them in its name.
            return item.name + getattr(item.function, "__x_params_repr__", "")

        items[:] = [x for x in items if any(word in text(x) for word in TOUCHED)]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.ends[report.outcome].add(report.nodeid)


def replace(name, ours, module, calls):
    """Put our function in the place of Optax's, counting its calls."""

    # The tests compare names; inject_hyperparams reads the signature.
    @functools.wraps(ours, assigned=("__doc__",))
    def counted(*args, **kwargs):
        calls[name] = calls.get(name, 0) + 1
        return ours(*args, **kwargs)

    counted.__name__ = name
    setattr(optax, name, counted)
    setattr(module, name, counted)


def main():
    """Return an exit status: 0 if enough tests ran and none failed."""
    calls, tally = {}, Tally()
    stddev = functools.partial(rmsprop_jax.scale_by_rms, centered=True)
    replace("rmsprop", rmsprop_jax.rmsprop, alias, calls)
    replace("scale_by_rms", rmsprop_jax.scale_by_rms, transform, calls)
    replace("scale_by_stddev", stddev, transform, calls)
    options = ["-q", "-c", os.devnull, f"--rootdir={OPTAX}", "--import-mode=importlib"]
    pytest.main([*options, "-pno:cacheprovider", *map(str, FILES)], plugins=[tally])

    passed, failed = tally.ends["passed"], tally.ends["failed"]
    print(f"{len(passed)} of Optax's tests pass with ours, {len(failed)} fail; {calls}")
    # Optax 0.2.8 has 61, besides those of schedule_free_adamw.
    ran = all(any(file.name in test for test in passed) for file in FILES)
    called = calls.keys() == {"rmsprop", "scale_by_rms", "scale_by_stddev"}
    return 0 if ran and called and len(passed) >= 61 and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
