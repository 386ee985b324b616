"""The training program: killed, interrupted, resumed, misused."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import rmsprop_jax
from rmsprop_jax.demo import cli, data, report, train

FLAGS = "--learning-rate 0.012 --epochs 5 --momentum 0.5 --seed 3 --zero".split()


@pytest.fixture(scope="module")
def start():
    """Return a function that starts the program on two devices; the module ends it."""
    started = []

    def start(*arguments):
        flags = "--xla_force_host_platform_device_count=2"
        process = subprocess.Popen(
            [sys.executable, "-m", "rmsprop_jax", *map(str, arguments)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process, status=0):
    """Wait for the end of a process, and return what it wrote."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status and "Traceback" not in err, out + err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """Return the folder of a run to compare others with."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    finish(start(*FLAGS, "--out", folder))
    return folder


def epoch(folder, number):
    return folder / "checkpoints" / "rmsprop" / str(number)


def send_after(path, number, pid):
    """Send a signal as soon as the path exists, if it does within 5 minutes."""
    for _ in range(60_000):
        if path.exists():
            return os.kill(pid, number)
        time.sleep(0.005)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_five_epochs_reach_95_percent_and_are_recorded(undisturbed):
    first, *_, last = rows(undisturbed)
    assert last["epoch"] == "5" and float(last["accuracy"]) > 0.95
    assert float(last["loss"]) < 0.1 < float(first["loss"])
    assert 0.0108 < float(first["learning_rate"]) < 0.012
    # Noise keeps the gradients large, so that RMSProp does not become SGD.
    assert float(last["eps_share"]) < 0.01 and float(last["nonfinite_state"]) == 0
    # The last learning rate is almost 0, so this is relative to it.
    step = float(last["update_rms"]) / float(last["learning_rate"])
    assert 0.01 < step < 2 / np.sqrt(1 - 0.9)
    assert float(last["effective_learning_rate_mean/rnn/cell/dense_h/kernel"]) > 0
    with ocp.StandardCheckpointer() as disk:
        assert disk.restore(epoch(undisturbed, 5) / "default")["opt"]["trace"]
    kept = epoch(undisturbed, 5).parent.iterdir()
    assert {x.name for x in kept if x.is_dir()} == {"4", "5"}
    for name in ("curves", "diagnostics"):
        assert (undisturbed / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_figures_show_these_columns(undisturbed, monkeypatch):
    figures, recorded = [], rows(undisturbed)
    monkeypatch.setattr(report.Figure, "savefig", lambda x, *_, **__: figures.append(x))
    report.draw_curves(undisturbed, recorded)
    report.draw_diagnostics(undisturbed, recorded, ([0.0, 1.0, 2.0], [1, 1]), 1e-8)
    curves, (*layers, _) = (figure.axes for figure in figures)
    names = "loss", "accuracy", "effective_learning_rate_mean", "update_ratio"
    for axes, name in zip([*curves, *layers], names, strict=True):
        assert len(axes.lines) == (1 if axes in curves else 5)
        for line in axes.lines:
            column = f"{name}/{line.get_label()}" if axes in layers else name
            assert [*line.get_ydata()] == [float(row[column]) for row in recorded]


def compiled(*flags):
    options = cli.parse([*flags, "--out", "new"])
    return train.compile_steps(options, "sgd", rmsprop_jax.rmsprop(0.1))


def test_options_reach_the_first_state():
    whole, divided, other = (compiled(*x)[0] for x in ([], ["--zero"], ["--seed", "1"]))
    replicated = lambda state: jax.tree.leaves(state["opt"].nu)[-1].is_fully_replicated
    assert (replicated(whole), replicated(divided)) == (True, False)
    kernel = lambda state: state["params"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel(whole), kernel(divided))
    assert (kernel(whole) != kernel(other)).all()


def test_the_loss_is_of_training_images_and_the_accuracy_of_others(monkeypatch):
    images, labels = np.ones((2, 8, 8), np.float32), np.zeros(2, int)
    # The model answers 0 to NaN.
    splits = (images, labels + 1), (images * np.nan, labels)
    monkeypatch.setattr(data, "load", lambda: splits)
    state, _, measure, _ = compiled()
    row = measure(state, None, 0.1)
    assert np.isfinite(row["loss"]) and row["accuracy"] == 1


def test_runs_killed_or_stopped_at_any_moment_end_with_the_same_bits(
    undisturbed, start, tmp_path
):
    folder = tmp_path / "my run"
    process = start(*FLAGS, "--out", folder)
    send_after(epoch(folder, 1), signal.SIGKILL, process.pid)
    process.communicate()
    # Metrics are written before the checkpoint, so a kill may come between them.
    with open(folder / "metrics.csv", "a") as file:
        file.write("rmsprop,9\n")
    saved = [int(x.name) for x in epoch(folder, 1).parent.iterdir() if x.name.isdigit()]
    resume = "--resume", "--out", folder
    process = start(*resume)
    send_after(epoch(folder, max(saved) + 1), signal.SIGINT, process.pid)
    out, _ = finish(process, 130)
    assert "\nStopping after this epoch; Ctrl-C again: now. Resume with: " in out
    assert "Stopped and saved. Resume with: " in out and 2 <= len(rows(folder)) < 5

    damaged = epoch(folder, len(rows(folder)))
    files = [x for x in damaged.rglob("*") if x.is_file()]
    max(files, key=lambda x: x.stat().st_size).write_bytes(b"cut")
    process = start(*resume)
    _, err = process.communicate(timeout=300)
    # Orbax may print errors of other arrays, which it is still reading.
    (line,) = (x for x in err.splitlines() if x.startswith("error: "))
    assert process.returncode == 1 and f"cannot restore {damaged}; delete it" in line
    shutil.rmtree(damaged)
    # A row of another optimizer's run.
    with open(folder / "metrics.csv", "a") as file:
        file.write("sgd,9\n")
    # Files are replaced, not overwritten: a kill then leaves the old ones.
    names = "config.json", "metrics.csv"
    for name in names:
        (tmp_path / name).hardlink_to(folder / name)
    finish(start(*resume))
    assert not any((tmp_path / x).samefile(folder / x) for x in names)
    lines, expected = (
        (x / "metrics.csv").read_text().splitlines() for x in (folder, undisturbed)
    )
    (other,) = (i for i, line in enumerate(lines) if line.startswith("sgd,9"))
    assert lines[:other] + lines[other + 1 :] == expected


def test_two_processes_are_like_one(undisturbed, start, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    folder = tmp_path / "a"
    together = "--coordinator", address, "--processes", 2, "--out", folder
    # Process 1 takes the options of process 0, too.
    processes = [
        start(*FLAGS, *together, "--seed", 3 + i, "--process-id", i) for i in range(2)
    ]
    # Both stop after the same epoch, and neither hangs.
    send_after(epoch(folder, 1), signal.SIGINT, processes[1].pid)
    for i, process in enumerate(processes):
        out, err = finish(process, 130)
        assert f"Waiting up to 60 s for 2 processes at {address}" in out
        assert f"--process-id {i} --resume" in out
        assert ("4 x cpu" in out) == ("rmsprop 1: loss" in err) == (i == 0)
    # What two processes saved on four devices resumes in one process on two. They sum
    # in another order, by which results differ more and more.
    finish(start("--resume", "--out", folder))
    ours, theirs = ([float(x["loss"]) for x in rows(y)] for y in (folder, undisturbed))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-3)
    np.testing.assert_allclose(ours, theirs, rtol=0.5)


def test_every_optimizer_learns_at_its_rate(start, tmp_path):
    flags = "--optimizer", "all", "--epochs", 1, "--out", tmp_path / "a"
    out, err = finish(start(*flags))
    assert "Training on 2 x cpu" in out and f"figures into {tmp_path}/a/" in out
    # A line per epoch, and no bar where there is no terminal.
    assert err.count("\n") == 5 and "adam 1: loss " in err and "step" not in err
    found = {x["optimizer"]: float(x["loss"]) for x in rows(tmp_path / "a")}
    # A guess among ten digits has a loss of 2.3.
    assert found.keys() == cli.OPTIMIZERS.keys() and max(found.values()) < 1.3


def test_epochs_differ_in_order_and_noise_and_have_all_images():
    images, labels = np.zeros((50, 8, 8), np.float32), np.arange(50)
    orders, noise = set(), set()
    for seed, first in ((0, 0), (0, 5), (1, 0)):
        batches = [data.batch(images, labels, 10, seed, first + i) for i in range(5)]
        orders.add(tuple(np.concatenate([y for _, y in batches])))
        noise |= {x.tobytes() for x, _ in batches}
    assert len(orders) == 3 and len(noise) == 15
    assert all(sorted(order) == list(range(50)) for order in orders)
