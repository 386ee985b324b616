"""Each preset beside its original, run here and now where that is installed."""

import inspect

import jax.numpy as jnp
import numpy as np
import originals
import parity
import pytest

from rmsprop_jax import presets


def need(package):
    # Not importorskip: an installed framework that does not import is a failure.
    if not originals.installed(package):
        pytest.skip(f"{package} is not installed")


def label(row, options, dtype):
    shown = "-".join(f"{k}={x}" for k, x in options.items())
    return f"{row.preset}-{row.package}-{row.title}-{dtype}-{shown}".replace(" ", "_")


CASES = [
    pytest.param(row, options, dtype, id=label(row, options, dtype))
    for row in parity.ROWS
    for dtype in row.dtypes
    for options in row.cases()
    if dtype is not None
]


@pytest.mark.parametrize(("row", "options", "dtype"), CASES)
def test_preset_takes_the_steps_of_its_original(row, options, dtype):
    need(row.package)
    difference = parity.compare(row, options, dtype)
    if dtype in ("float64", "complex128"):
        # 150 steps, each off by an ulp of 2e-16 and some of the move: about 1e-13.
        assert difference.largest <= 1e-12
    else:
        assert difference.units_a_step <= 1


@pytest.mark.parametrize(
    ("preset", "package", "find"),
    [
        (presets.torch, "torch", originals.TORCH),
        (presets.tf1, "tensorflow", originals.TF1),
        (presets.keras, "keras", originals.KERAS),
        (presets.keras_legacy, "tf_keras", originals.KERAS_LEGACY),
        (presets.timm, "timm", originals.find_timm),
        (presets.sb3, "stable_baselines3", originals.SB3),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_arguments_are_those_of_the_original(preset, package, find):
    need(package)
    with originals.quiet():
        theirs = dict(inspect.signature(find()).parameters)
    theirs.pop("params", None)
    ours = inspect.signature(preset).parameters
    in_order = [k for k, x in ours.items() if x.kind == x.POSITIONAL_OR_KEYWORD]
    assert list(theirs)[: len(in_order)] == in_order
    own = {"nu_dtype", "momentum_dtype", "weight_decay_mask"}
    assert ours.keys() - own <= theirs.keys()
    for name in ours.keys() - own:
        assert ours[name].default == theirs[name].default


@pytest.mark.parametrize(
    ("preset", "original", "package", "options"),
    [
        ("tf1", originals.tf1, "tensorflow", dict(decay=0.9, epsilon=1e-10)),
        ("keras_legacy", originals.keras_legacy, "tf_keras", dict(rho=0.9)),
    ],
)
def test_tensorflow_rounds_python_numbers_to_float32(
    preset, original, package, options, x64
):
    need(package)
    single = lambda x: float(np.float32(x))  # noqa: E731
    problem, given = parity.problem("float64"), dict(centered=True, momentum=0.9)
    with originals.quiet():
        # The defaults too, which are not passed here.
        theirs = parity.flat(original(given, *problem, parity.RATES, exact=False))

    def ours(number):
        numbers = {k: number(x) for k, x in (options | dict(momentum=0.9)).items()}
        rates, build = [number(x) for x in parity.RATES], getattr(presets, preset)
        path = originals.transformation(build, given | numbers, *problem, rates)
        return parity.flat(path)

    off = np.abs(theirs - ours(single))
    assert off.max() <= 1e-12
    path = np.concatenate([parity.flat([problem[0]]), ours(float)])
    off = np.abs(theirs - path[1:])
    # 0.9 becomes 0.9 - 2.4e-8, and 1 - 0.9 is off by 2.4e-7 of itself: half of that
    # after the root, once more through the momentum, and 3e-8 with the rate.
    travelled = np.abs(np.diff(path, axis=0)).sum(axis=0)
    assert 1e-10 < off.max()
    assert (off <= 1e-6 * travelled).all()


def test_keras_legacy_has_momentum_where_it_is_a_tensor_of_0(x64):
    need("tf_keras")
    # Then eps is inside the root, there as here, though there is nothing to keep.
    problem, rates = parity.problem("float64"), np.float32(parity.RATES).astype(float)
    given = dict(momentum=lambda: 0.0, rho=0.5)
    with originals.quiet():
        path = originals.keras_legacy(given, *problem, rates.tolist(), exact=False)
        theirs = parity.flat(path)
    for zero, same in ((jnp.zeros(()), True), (0.0, False)):
        options = dict(momentum=zero, rho=0.5)
        path = originals.transformation(presets.keras_legacy, options, *problem, rates)
        off = np.abs(parity.flat(path) - theirs).max()
        assert (off <= 1e-12) == same


def test_a_missing_framework_is_named(monkeypatch, capsys):
    rows = [row for row in parity.ROWS if row.package in ("numpy", "keras")]
    monkeypatch.setattr(parity, "ROWS", rows)
    monkeypatch.setattr(originals, "installed", lambda package: package == "numpy")
    parity.table()
    printed = capsys.readouterr().out
    assert "| `keras` | keras, RMSprop | " in printed
    assert printed.count("not installed | - | - |") == 1
    assert printed.count("| `") == len(rows)
    with pytest.raises(SystemExit, match=r"golden.json needs .*keras"):
        parity.write_golden()
