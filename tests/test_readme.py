"""The README does what it says."""

import re
from pathlib import Path

import rmsprop_jax

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run_in_order(lenient, capsys):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)
    params = names["params"]
    assert abs(params["w"] - names["jnp"].array([1.0, -2.0, 3.0])).max() < 0.05
    assert abs(params["b"] - 4) < 0.05


def test_every_module_has_its_line():
    modules = {path.name for path in Path(rmsprop_jax.__file__).parent.glob("*.py")}
    listed = set(re.findall(r"^\| \[[^]]*\]\(rmsprop_jax/(\w+\.py)\)", README, re.M))
    assert listed == modules


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_benchmark_is_in_it():
    rows = re.findall(
        r"^\| (?:step|direct|trace|compile).*\d\.\d\d.* \|$", README, re.M
    )
    assert len(rows) == 15
    assert re.search(r"^20\d\d-\d\d-\d\d, .*jax \d", README, re.M)


def test_there_are_two_commands_of_one_line_each():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        assert command.startswith("python3 -m venv .venv && ")
        assert command.count("\n") == 1


def test_the_table_of_options_is_accepted():
    found = re.findall(r"^\| [^|]+ \| `(l[^`]*|[\d.]+e-\d+,[^`]*)` \|$", README, re.M)
    assert len(found) == 6
    for arguments in found:
        values = {"lr": 0.1, "learning_rate": 0.1, "weight_decay": 0.01}
        eval(f"rmsprop({arguments})", {"rmsprop": rmsprop_jax.rmsprop} | values)
