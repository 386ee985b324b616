"""The main job, run as a user runs it: as a program, killed, resumed, misused."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rmsprop_jax import demo
from rmsprop_jax.__main__ import main

SHORT = ("--epochs", "4", "--momentum", "0.5", "--seed", "3", "--eps", "1e-6")


def start(*arguments, devices=1, cwd=None):
    """Start the program on so many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "rmsprop_jax", *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def finish(process):
    """Return status, standard output and standard error of a program."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def result(folder):
    """Return all that must not depend on how often a run was killed."""
    saved = folder / "checkpoints" / "rmsprop"
    last = max(saved.iterdir(), key=lambda path: int(path.name))
    about = next((last / "about").iterdir())
    metrics = (folder / "metrics.csv").read_bytes()
    return metrics, json.loads(about.read_text())["digest"], last.name


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    status, out, err = finish(start(*SHORT, "--out", folder))
    assert status == 0, out + err
    # With eps = 1e-6, it outweighs more of the average.
    assert float(rows(folder)[0]["eps_share"]) > 0.1
    return folder


def test_defaults_reach_95_percent_within_a_minute(tmp_path):
    begun = time.monotonic()
    status, out, err = finish(start(cwd=tmp_path))
    assert status == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert time.monotonic() - begun < 60
    assert float(rows(folder)[-1]["accuracy"]) >= 0.95
    assert len(rows(folder)) == 20
    for name in ("curves", "diagnostics"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    last = rows(folder)[-1]
    assert float(last["nonfinite_state"]) == 0
    assert float(last["loss"]) < 0.01 < float(rows(folder)[0]["loss"]), (
        "each epoch's own"
    )
    assert float(rows(folder)[0]["eps_share"]) < 0.05
    # Late in the run the rate is 0, so this is a share of it.
    steps = float(last["update_rms"]) / float(last["learning_rate"])
    assert 0.01 < steps < 3.2, "no step is longer than the rate / sqrt(1 - decay)"
    assert float(last["effective_learning_rate_median/rnn/cell/dense_h/kernel"]) > 0
    assert "1 x cpu" in out
    for shown in ("loss=", "lr=", "step/s", "held-out accuracy"):
        assert shown in out + err


def test_killed_or_stopped_at_any_moment_it_ends_with_the_same_bits(
    undisturbed, tmp_path
):
    folder = tmp_path / "run"
    saved = folder / "checkpoints" / "rmsprop"
    # In the first epoch, and while the first checkpoint is being written.
    for path, delay, flags in (
        (saved, 0.4, (*SHORT, "--out", folder)),
        (saved / "44", 0, ("--resume", "--out", folder)),
    ):
        process = start(*flags)
        wait_for(path, process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        finish(process)

    # Ctrl-C saves, and says how to go on.
    process = start("--resume", "--out", folder)
    wait_for(saved / "88", process)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130, err
    assert f"python -m rmsprop_jax --resume --out {folder}" in out
    assert "Traceback" not in err

    status, _, err = finish(start("--resume", "--out", folder))
    assert status == 0, err
    assert result(folder) == result(undisturbed)


def test_all_optimizers_train_on_all_devices(tmp_path):
    folder = tmp_path / "run"
    process = start(
        "--optimizer", "all", "--epochs", 1, "--out", folder, devices=4, cwd=tmp_path
    )
    status, out, err = finish(process)
    assert status == 0, err
    assert "4 x cpu" in out
    found = {row["optimizer"]: float(row["accuracy"]) for row in rows(folder)}
    assert found.keys() == {"rmsprop", "sgd", "momentum", "adam", "adagrad"}
    assert min(found.values()) > 0.3, "chance is 0.1"


def refused(capsys, *arguments):
    """Return the one line with which the program refuses the arguments."""
    with pytest.raises(SystemExit) as caught:
        main([str(x) for x in arguments])
    message = caught.value.code
    if isinstance(message, int):
        message = capsys.readouterr().err
    assert caught.value.code != 0
    assert len(message.strip().splitlines()) == 1
    return message


# In a process of its own: Orbax leaves threads behind that fail when it is long over.
RESUME_ALL = """
import sys
from rmsprop_jax.__main__ import main
for folder in sys.argv[1:]:
    try:
        main(["--resume", "--out", folder])
    except SystemExit as stopped:
        print(stopped.code)
"""


def test_damaged_checkpoint_is_named_and_the_one_before_still_resumes(
    undisturbed, tmp_path
):
    folders = {damage: tmp_path / damage for damage in ("cut", "altered", "removed")}
    kept = {}
    for damage, folder in folders.items():
        shutil.copytree(undisturbed, folder)
        saved = folder / "checkpoints" / "rmsprop"
        before = [x for x in (saved / "132").rglob("*") if x.is_file()]
        kept |= {x: x.read_bytes() for x in before}
        files = [x for x in (saved / "176").rglob("*") if x.is_file()]
        data = max(files, key=lambda x: x.stat().st_size)
        content = bytearray(data.read_bytes())
        if damage == "removed":
            data.unlink()
        elif damage == "cut":
            data.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 255
            data.write_bytes(content)
    command = [sys.executable, "-c", RESUME_ALL, *map(str, folders.values())]
    flags = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=os.environ | flags, capture_output=True, text=True, timeout=120
    )
    messages = [line for line in done.stdout.splitlines() if "error" in line]
    for folder, message in zip(folders.values(), messages, strict=True):
        last = folder / "checkpoints" / "rmsprop" / "176"
        assert f"checkpoint {last} is damaged" in message and "Delete" in message
    assert kept == {x: x.read_bytes() for x in kept}

    folder = folders["altered"]
    shutil.rmtree(folder / "checkpoints" / "rmsprop" / "176")
    status, _, err = finish(start("--resume", "--out", folder))
    assert status == 0, err
    assert result(folder) == result(undisturbed)


def test_checkpoint_of_another_run_is_refused(undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"decay": 0.5}))
    message = refused(capsys, "--resume", "--out", folder)
    assert "belongs to another run" in message
    assert result(folder) == result(undisturbed)


def test_a_run_is_never_overwritten_and_its_flags_are_kept(undisturbed, capsys):
    before = result(undisturbed)
    assert "not empty" in refused(capsys, "--out", undisturbed)
    message = refused(capsys, "--resume", "--out", undisturbed, "--decay", 0.5)
    assert "--decay 0.9, not 0.5" in message
    assert result(undisturbed) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--decay", "1"], "must be in [0, 1)"),
        (["--decay", "nan"], "must be in [0, 1)"),
        (["--learning-rate", "fast"], "invalid number value: 'fast'"),
        (["--learning-rate", "-1"], "must be in [0, inf)"),
        (["--learning-rate", "inf"], "must be in [0, inf)"),
        (["--epochs", "0"], "must be in [1, inf)"),
        (["--epochs", "1.5"], "invalid whole number value: '1.5'"),
        (["--batch-size", "9"], "multiple of 8"),
        (["--batch-size", "5000"], "must be in [1, 1438)"),
        (["--optimizer", "adamw"], "choose from"),
        (["--optimizer", "adam", "--centered"], "--centered is for rmsprop, not adam"),
        (["--centered", "--decay", "0"], "centered has no meaning with decay=0"),
        (["--momentun", ".9"], "unrecognized arguments"),
        (["--processes", "2"], "several processes need --coordinator HOST:PORT"),
        (["--coordinator", "auto"], "or --coordinator auto and --out alone"),
    ],
)
def test_bad_flags_get_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments)


def test_folders_that_cannot_be_used_get_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("mine")
    assert "file" in refused(capsys, "--out", file / "run")
    assert "file" in refused(capsys, "--out", file)
    assert "holds no run" in refused(capsys, "--resume")
    assert "holds no run" in refused(capsys, "--resume", "--out", tmp_path)
    assert "not empty" in refused(capsys, "--out", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "holds no run" in refused(capsys, "--resume", "--out", Path(tmp_path))
    assert file.read_text() == "mine"


def test_every_epoch_has_its_own_order_and_sees_all_images():
    orders = [tuple(demo.shuffled(0, epoch, 50)) for epoch in range(3)]
    assert len({*orders, tuple(demo.shuffled(1, 0, 50))}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "optimizer learning-rate decay eps momentum centered schedule epochs "
        "batch-size seed out resume zero coordinator process-id processes"
    ).split():
        assert f"--{flag}" in text
