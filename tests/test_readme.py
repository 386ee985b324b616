"""The README does what it says."""

import inspect
import re
from pathlib import Path

import formats
import jax
import numpy as np
import parity
import pytest
from flax import linen

import rmsprop_jax
from rmsprop_jax import presets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run_in_order(lenient, capsys):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)
    params = names["params"]
    assert abs(params["w"] - names["jnp"].array([1.0, -2.0, 3.0])).max() < 0.05
    assert abs(params["b"] - 4) < 0.05


def test_a_torch_run_goes_on_as_it_says(lenient):
    pytest.importorskip("torch")
    (code,) = re.findall(r"```python torch\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    params, state = names["params"], names["state"]
    jax.tree.map(lambda p, nu: p.shape == nu.shape or pytest.fail(), params, state.nu)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32")
    conv, dense = linen.Conv(4, (3, 3), padding="VALID"), linen.Dense(10)
    hidden = conv.apply({"params": params["Conv_0"]}, images).reshape(2, -1)
    ours = dense.apply({"params": params["Dense_0"]}, hidden)
    torch, model = names["torch"], names["model"]
    theirs = model(torch.tensor(images.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert state.count == 1


def test_every_module_has_its_line():
    modules = {path.name for path in Path(rmsprop_jax.__file__).parent.glob("*.py")}
    listed = set(re.findall(r"^\| \[[^]]*\]\(rmsprop_jax/(\w+\.py)\)", README, re.M))
    assert listed == modules


def test_the_comparison_is_in_it():
    found = re.findall(r"^\| `(\w+)` \| (\w+) [\d.+a-z]+, (.+?) \|", README, re.M)
    assert found == [(row.preset, row.package, row.title) for row in parity.ROWS]


def test_the_formats_are_in_it():
    section = README.split("## State in fewer bytes")[1].split("\n## ")[0]
    rows = re.findall(
        r"^\| ([^|]+) \| (\d\.\d{3}) \|((?: [^|]+ % \|)+)$", section, re.M
    )
    bytes_of = {k: f"{formats.bytes_of(x):.3f}" for k, x in formats.FORMATS.items()}
    assert dict(row[:2] for row in rows[:-1]) == bytes_of
    assert rows[-1][0].startswith("bitsandbytes")
    small = {name: re.findall(r"[\d.]+(?:e-\d+)?", cells) for name, _, cells in rows}
    assert {len(x) for x in small.values()} == {18}
    assert max(map(float, small["bfloat16"])) <= 1.6
    # As to be reached: a spread of e, steady and falling, at the three decays.
    reached = [float(small["uint8"][i]) for i in (0, 1, 6, 7, 12, 13)]
    assert np.all(np.array(reached) <= (7, 7, 10, 10, 13, 13))


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            heading = target[1:].replace("-", " ")
            assert re.search(rf"^## {heading}$", README, re.M | re.I), target
        else:
            assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_benchmark_is_in_it():
    rows = re.findall(
        r"^\| (?:step|direct|trace|compile).*\d\.\d\d.* \|$", README, re.M
    )
    assert len(rows) == 30
    assert re.search(r"^20\d\d-\d\d-\d\d, .*jax \d", README, re.M)


def test_there_are_two_commands_of_one_line_each():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        assert command.startswith("python3 -m venv .venv && ")
        assert command.count("\n") == 1


def test_the_table_of_presets_is_all_of_them():
    calls = re.findall(
        r"^\| [^|]+ \| `((?:presets\.\w+|rmsprop)\([^`]*\))` \|", README, re.M
    )
    named = {call.split("(")[0].removeprefix("presets.") for call in calls}
    functions = inspect.getmembers(presets, inspect.isfunction)
    public = {name for name, _ in functions if not name.startswith("_")}
    assert named == public
    for call in calls:
        names = dict(presets=presets, rmsprop=rmsprop_jax.rmsprop, learning_rate=0.1)
        made = eval(call, names)
        assert callable(made.update)
