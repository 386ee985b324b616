"""Importing is cheap, public names are few, and modules import only earlier ones."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import rmsprop_jax

FOLDER = Path(rmsprop_jax.__file__).parent
FUNCTIONS = {"rmsprop", "scale_by_rms"}
MODULES = {"diagnostics", "interop", "plots", "presets", "sharding", "storage"}
ORDER = ["rule", "sharding", "codes", "storage", "checks", "transform", "presets"]
ORDER += ["reductions", "diagnostics", "plots", "interop"]
ORDER += ["__init__", "demo", "__main__"]


def test_importing_and_building_stay_light():
    code = """
import sys, rmsprop_jax
from jax._src import xla_bridge
rmsprop_jax.rmsprop(0.1, momentum=0.9, l2=0.1, nu_dtype="float32")
rmsprop_jax.rmsprop(lambda count: 0.1, centered=True)
rmsprop_jax.scale_by_rms()
rmsprop_jax.presets.torch(momentum=0.9)
assert not xla_bridge.backends_are_initialized()
heavy = {"flax", "torch", "keras", "tensorflow", "matplotlib", "sklearn", "orbax"}
assert not {*heavy, "tqdm", "rmsprop_jax.demo"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_these():
    assert {*rmsprop_jax.__all__} == FUNCTIONS | MODULES | {"RMSPropState"}
    names = {k: x for k, x in vars(rmsprop_jax).items() if not k.startswith("_")}
    others = {k for k, x in names.items() if not inspect.ismodule(x)}
    assert others == FUNCTIONS | {"RMSPropState"}
    assert not FUNCTIONS & {*ORDER}, "a function would hide its module"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from ([*node.module.split("."), alias.name] for alias in node.names)


def test_modules_import_only_earlier_ones():
    packages = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert packages | {path.stem for path in FOLDER.glob("*.py")} == {*ORDER}
    known = {"rmsprop_jax", "jax", "optax", "numpy"} | sys.stdlib_module_names
    for i, name in enumerate(ORDER):
        allowed = {*ORDER[: i + (name in packages)]}
        for path in [*FOLDER.glob(f"{name}.py"), *FOLDER.glob(f"{name}/**/*.py")]:
            found = [*imports(path)]
            own = {(*x, "__init__")[1] for x in found if x[0] == "rmsprop_jax"}
            assert own & {*ORDER} <= allowed, path
            assert name == "demo" or {x[0] for x in found} <= known, path
