"""Each preset beside its original, run here and now where that is installed."""

import inspect

import jax.numpy as jnp
import numpy as np
import originals
import parity
import pytest

from rmsprop_jax import presets

FRAMEWORKS = dict(
    torch="torch",
    tf1="tensorflow",
    keras="keras",
    keras_legacy="tf_keras",
    timm="timm",
    sb3="stable_baselines3",
)


def need(package):
    # Not importorskip: an installed framework that does not import is a failure.
    if not originals.installed(package):
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row.preset}-{row.package}-{row.title}-{dtype}")
        for row in parity.ROWS
        for dtype in row.dtypes
    ],
)
def test_preset_takes_the_steps_of_its_original(row, dtype, lenient):
    need(row.package)
    found = parity.differences(row, dtype)
    share = dict(zip(map(str, row.cases()), found[:, 2], strict=True))
    assert max(share.values()) <= 1, share


@pytest.mark.parametrize(("name", "package"), FRAMEWORKS.items())
def test_arguments_are_those_of_the_original(name, package):
    need(package)
    with originals.quiet():
        theirs = dict(inspect.signature(originals.find(package)).parameters)
    theirs.pop("params", None)
    ours = dict(inspect.signature(getattr(presets, name)).parameters)
    for own in ("nu_dtype", "momentum_dtype", "weight_decay_mask"):
        ours.pop(own, None)
    in_order = [k for k, x in ours.items() if x.kind == x.POSITIONAL_OR_KEYWORD]
    assert list(theirs)[: len(in_order)] == in_order
    for name, parameter in ours.items():
        assert parameter.default == theirs[name].default


@pytest.mark.parametrize(("name", "decay"), [("tf1", "decay"), ("keras_legacy", "rho")])
def test_tensorflow_rounds_python_numbers_to_float32(name, decay):
    need(FRAMEWORKS[name])
    (row,) = (x for x in parity.ROWS if (x.preset, x.golden) == (name, True))
    options = {decay: 0.9, "momentum": 0.9, "centered": True}
    (theirs,) = row.theirs([options], "float64", number=float)

    def difference(number):
        numbers = options | {k: number(options[k]) for k in (decay, "momentum")}
        rates = list(map(number, parity.RATES))
        (ours,) = parity.run(getattr(presets, name), [numbers], "float64", rates)
        return np.abs(theirs - ours).max()

    assert difference(lambda x: float(np.float32(x))) <= 1e-12
    assert 1e-10 < difference(float) < 1e-6


def test_keras_legacy_has_momentum_where_it_is_a_tensor_of_0():
    need("tf_keras")
    # Then eps is inside the root, there as here, though there is nothing to keep.
    (row,) = (x for x in parity.ROWS if x.preset == "keras_legacy")
    (theirs,) = row.theirs([dict(momentum=lambda: np.float64(0))], "float64")
    cases = [dict(momentum=jnp.zeros(())), dict(momentum=0.0)]
    inside, outside = parity.run(presets.keras_legacy, cases, "float64")
    assert np.abs(inside - theirs).max() <= 1e-12 < np.abs(outside - theirs).max()


def test_a_missing_framework_is_named(monkeypatch, capsys):
    rows = [row for row in parity.ROWS if row.package in ("numpy", "keras")]
    monkeypatch.setattr(parity, "ROWS", rows)
    monkeypatch.setattr(originals, "installed", lambda package: package == "numpy")
    parity.table()
    printed = capsys.readouterr().out
    assert "| `keras` | keras, RMSprop | " in printed
    assert printed.count("not installed | - | - | - |") == 1
    assert printed.count("| `") == len(rows)
    with pytest.raises(SystemExit, match=r"golden.json needs .*keras"):
        parity.write_golden()
