"""What importing costs, what is public, and which module may know which."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rmsprop_jax
from rmsprop_jax import (
    arrange,
    checks,
    diagnostics,
    interop,
    interop_optax,
    plots,
    presets,
    rule,
    sharding,
    storage,
    transform,
)

NAMES = ["RMSPropState", "rmsprop", "scale_by_rms"]
MODULES = ["diagnostics", "interop", "plots", "presets", "sharding", "storage"]
FUNCTIONS = [rmsprop_jax.rmsprop, rmsprop_jax.scale_by_rms]
FUNCTIONS += [storage.convert, sharding.zero, diagnostics.metrics]
FUNCTIONS += [diagnostics.effective_learning_rate, diagnostics.histogram]
FUNCTIONS += [plots.training_curves, plots.per_layer, plots.denominator]
each = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def in_a_new_process(code):
    """Return what the code prints, in an interpreter that has imported nothing."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_and_building_stay_light():
    code = """
import sys, rmsprop_jax
from jax._src import xla_bridge
rmsprop_jax.rmsprop(0.1, momentum=0.9, l2=0.1, nu_dtype="float32")
rmsprop_jax.rmsprop(lambda count: 0.1, centered=True)
rmsprop_jax.scale_by_rms()
rmsprop_jax.presets.torch(momentum=0.9)
print(xla_bridge.backends_are_initialized())
heavy = ["flax", "torch", "keras", "tensorflow", "matplotlib", "sklearn", "orbax"]
heavy += ["tqdm", "rmsprop_jax.demo", "rmsprop_jax.bench"]
print(*[name for name in heavy if name in sys.modules])
"""
    assert in_a_new_process(code) == ["False"]


def test_public_names_are_these():
    assert sorted(rmsprop_jax.__all__) == sorted(NAMES + MODULES)
    code = """
import types, rmsprop_jax
public = {k: v for k, v in vars(rmsprop_jax).items() if not k.startswith("_")}
print(*(k for k, v in public.items() if not isinstance(v, types.ModuleType)))
"""
    assert sorted(in_a_new_process(code)) == sorted(NAMES)


def test_no_module_has_the_name_of_a_function():
    modules = {path.stem for path in Path(rmsprop_jax.__file__).parent.glob("*.py")}
    assert not modules & set(NAMES)


@each
def test_docstring_arguments_are_the_signature(function):
    doc = inspect.getdoc(function)
    section = re.search(r"Args:\n(.*?)\n\n", doc, re.DOTALL).group(1)
    documented = re.findall(r"^  (\w+):", section, re.MULTILINE)
    assert documented == list(inspect.signature(function).parameters)
    returned = inspect.signature(function).return_annotation is not None
    for name in ("Returns", "Raises", "Example", "References")[not returned :]:
        assert f"\n{name}:\n" in doc


@each
def test_docstring_example_runs(function):
    tests = doctest.DocTestFinder().find(function, globs={})
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        result = doctest.DocTestRunner().run(test)
        assert result.failed == 0


def test_state_attributes_are_documented():
    doc = inspect.getdoc(rmsprop_jax.RMSPropState)
    documented = re.findall(r"^  (\w+):", doc, re.MULTILINE)
    assert tuple(documented) == rmsprop_jax.RMSPropState._fields


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        (rule, set()),
        (checks, set()),
        (storage, {"checks"}),
        (transform, {"checks", "rule", "storage"}),
        (presets, {"checks", "storage", "transform"}),
        (arrange, {"storage", "transform"}),
        (interop_optax, {"arrange", "storage", "transform"}),
        (interop, {"arrange", "interop_optax", "presets", "transform"}),
        (sharding, set()),
        (diagnostics, {"checks", "storage", "transform"}),
        (plots, set()),
        (rmsprop_jax, {*MODULES, "transform"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_imports_point_one_way(module, allowed):
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = {x.split(".")[1] for x in found if x.split(".")[0] == "rmsprop_jax"}
    assert own == allowed
    others = {x.split(".")[0] for x in found} - {"rmsprop_jax"}
    assert others <= {"jax", "optax", "numpy"} | sys.stdlib_module_names


def test_optax_arguments_keep_their_order():
    import optax

    for name in ("rmsprop", "scale_by_rms"):
        theirs = inspect.signature(getattr(optax, name)).parameters
        ours = inspect.signature(getattr(rmsprop_jax, name)).parameters
        shared = list(theirs)[: len(ours)]
        assert list(ours)[: len(shared)] == shared
        for key in shared:
            assert ours[key].default == theirs[key].default
