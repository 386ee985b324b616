"""The training program, run as a user runs it: killed, resumed, misused."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from rmsprop_jax.demo import cli, data

SHORT = ("--epochs", "4", "--momentum", "0.5", "--seed", "3", "--eps", "1e-6")
# Few steps, as two processes on one machine are slow to talk to each other.
SPREAD = ("--epochs", "2", "--batch-size", "256", "--momentum", "0.5", "--zero")


@pytest.fixture
def start():
    """Return a function that starts the program; none survives the test."""
    started = []

    def run(*arguments, devices=1, cwd=None):
        flags = f"--xla_force_host_platform_device_count={devices}"
        process = subprocess.Popen(
            [sys.executable, "-m", "rmsprop_jax", *map(str, arguments)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def start_two(start):
    """Return a function that starts two processes with two devices each."""

    def run(*arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        arguments = [*arguments, "--coordinator", address, "--processes", 2]
        return [start(*arguments, "--process-id", i, devices=2) for i in range(2)]

    return run


def finish(process):
    """Return status, standard output and standard error of a program."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def succeed(process):
    """Return the output of a program, which must not fail."""
    status, out, err = finish(process)
    assert status == 0, out + err
    return out + err


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoints(folder):
    return folder / "checkpoints" / "rmsprop"


# In a process of its own, as Orbax leaves threads behind.
PRINT_BITS = """
import sys, jax, orbax.checkpoint as ocp
for path in sys.argv[1:]:
    tree = ocp.StandardCheckpointer().restore(path)
    print(len(jax.tree.leaves(tree)), *(x.tobytes().hex() for x in jax.tree.leaves(
        jax.tree.map(lambda x: jax.device_get(x), tree))))
"""


def assert_same_bits(*folders):
    """Check that metrics and last checkpoints do not differ in a bit."""
    last = max(int(x.name) for x in checkpoints(folders[0]).iterdir())
    paths = [checkpoints(x) / str(last) / "default" for x in folders]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRINT_BITS, *map(str, paths)],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        **dict(capture_output=True, text=True, timeout=120),
    )
    first, *others = done.stdout.splitlines()
    assert others == [first] * (len(folders) - 1) and len(first) > 10**5, done.stderr
    metrics = [(x / "metrics.csv").read_bytes() for x in folders]
    assert metrics == metrics[:1] * len(folders)


def test_defaults_reach_95_percent_and_are_recorded(start, tmp_path):
    out = succeed(start(cwd=tmp_path))
    (folder,) = (tmp_path / "runs").iterdir()
    first, *_, last = rows(folder)
    assert last["epoch"] == "20" and float(last["accuracy"]) >= 0.95
    assert float(last["loss"]) < 0.01 < float(first["loss"])
    assert float(first["learning_rate"]) > 0.0099 and float(first["eps_share"]) < 0.05
    assert float(last["nonfinite_state"]) == 0
    # Late in the run the rate is almost 0, so this is relative to it.
    step = float(last["update_rms"]) / float(last["learning_rate"])
    assert 0.01 < step < 1 / np.sqrt(1 - 0.9)
    assert float(last["effective_learning_rate_mean/rnn/cell/dense_h/kernel"]) > 0
    for name in ("curves", "diagnostics"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for shown in ("1 x cpu", "loss=", "accuracy=", "step/s", "diagnostics.png"):
        assert shown in out


def test_runs_killed_or_stopped_at_any_moment_end_with_the_same_bits(start, tmp_path):
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    succeed(start(*SHORT, "--out", undisturbed))
    # With a larger eps, it outweighs more of the average.
    assert float(rows(undisturbed)[0]["eps_share"]) > 0.1
    process = start(*SHORT, "--out", folder)
    # This appears once the checkpoint of the first epoch is written.
    wait_for(checkpoints(folder) / "44", process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    process = start("--resume", "--out", folder)
    wait_for(checkpoints(folder) / "88", process)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130 and "Traceback" not in err
    assert f"-m rmsprop_jax --resume --out {folder}" in out

    damaged = max(checkpoints(folder).iterdir(), key=lambda path: int(path.name))
    files = [x for x in damaged.rglob("*") if x.is_file()]
    max(files, key=lambda x: x.stat().st_size).write_bytes(b"cut")
    status, _, err = finish(start("--resume", "--out", folder))
    # There may be a traceback too, of a thread of Orbax that is still reading.
    assert status == 1 and f"error: cannot restore {damaged}; delete it" in err
    shutil.rmtree(damaged)
    succeed(start("--resume", "--out", folder))
    assert_same_bits(folder, undisturbed)


def test_all_optimizers_train_on_all_devices(start, tmp_path):
    flags = ("--optimizer", "all", "--epochs", 1, "--schedule", "warmup_cosine")
    out = succeed(start(*flags, "--out", tmp_path / "run", devices=2))
    assert "2 x cpu" in out
    found = {row["optimizer"]: float(row["accuracy"]) for row in rows(tmp_path / "run")}
    assert found.keys() == {"rmsprop", "sgd", "momentum", "adam", "adagrad"}
    assert min(found.values()) > 0.3, "chance is 0.1"


def test_two_processes_of_which_one_was_killed_are_like_one(start, start_two, tmp_path):
    folder, single = tmp_path / "run", tmp_path / "single"
    processes = start_two(*SPREAD, "--out", folder)
    wait_for(checkpoints(folder) / "5", processes[0])
    processes[0].send_signal(signal.SIGKILL)
    (_, out, _), (status, _, _) = map(finish, processes)
    assert "4 x cpu" in out and status != 0, "the other one ends by itself"
    shutil.copytree(folder, single)
    _, silent = map(succeed, start_two("--resume", "--out", folder))
    assert "Training on" not in silent and "step/s" not in silent
    # What four devices of two processes saved resumes on two devices of one, which sum
    # in another order: the same but for some float32 ulp per step.
    succeed(start("--resume", "--out", single, devices=2))
    assert len(rows(folder)) == 2
    for ours, theirs in zip(rows(folder), rows(single), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
        assert abs(float(ours["accuracy"]) - float(theirs["accuracy"])) < 0.01


def test_all_processes_report_the_error_of_the_first(start_two, tmp_path):
    (tmp_path / "mine").touch()
    for status, _, err in map(finish, start_two("--out", tmp_path)):
        assert status == 1 and "is not empty" in err and "Traceback" not in err
    assert [x.name for x in tmp_path.iterdir()] == ["mine"]


def refused(capsys, *arguments):
    """Return the one line with which the program refuses the arguments."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(x) for x in arguments])
    message = caught.value.code
    if message == 2:  # From argparse, which prints it.
        message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--decay", "1"], "must be in [0, 1)"),
        (["--decay", "nan"], "must be in [0, 1)"),
        (["--learning-rate", "fast"], "invalid float value: 'fast'"),
        (["--learning-rate", "inf"], "learning_rate must be"),
        (["--epochs", "0"], "epochs must be in range(1, 1000000), got 0"),
        (["--epochs", "1.5"], "invalid int value: '1.5'"),
        (["--batch-size", "9"], "must be a multiple of the 8 devices"),
        (["--batch-size", "5000"], "must be in range(1, 1438)"),
        (["--optimizer", "adamw"], "got 'adamw'"),
        (["--optimizer", "adam", "--centered"], "centered is for rmsprop, not adam"),
        (["--centered", "--decay", "0"], "decay"),
        (["--momentun", ".9"], "unrecognized arguments"),
        (["--processes", "2"], "several processes need --coordinator"),
    ],
)
def test_bad_flags_get_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_used_get_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("mine")
    assert "file" in refused(capsys, "--out", file / "run")
    assert "file" in refused(capsys, "--out", file)
    assert "no run in runs/ to resume" in refused(capsys, "--resume")
    assert "not the config of a run" in refused(capsys, "--resume", "--out", tmp_path)
    assert "not empty" in refused(capsys, "--out", tmp_path)
    config = tmp_path / "config.json"
    config.write_text("[]")
    assert "not the config of a run" in refused(capsys, "--resume", "--out", tmp_path)
    config.write_text(json.dumps({"decay": 0.8}))
    message = refused(capsys, "--resume", "--out", tmp_path, "--decay", 0.5)
    assert "decay is 0.8 in" in message and "only --epochs can change" in message
    assert file.read_text() == "mine" and config.read_text() == '{"decay": 0.8}'


def test_every_epoch_has_its_own_order_and_sees_all_images():
    images = np.arange(50)
    orders = [
        [
            x
            for i in range(5)
            for x in data.batch(images, images, 10, seed, i + first)[0]
        ]
        for seed, first in ((0, 0), (0, 5), (1, 0))
    ]
    assert len({*map(tuple, orders)}) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "optimizer learning-rate decay eps momentum centered schedule epochs "
        "batch-size seed out resume zero coordinator process-id processes"
    ).split():
        assert f"--{flag}" in text
