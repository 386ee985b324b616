"""The main job in two processes of four devices each, as on two machines."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_demo import finish, rows, start, wait_for

# Few steps, as two processes on one machine are slow to talk to each other.
FLAGS = ("--epochs", "2", "--batch-size", "256", "--momentum", "0.5", "--zero")
LIMIT = 120


@pytest.fixture
def launch():
    """Start two processes; none of them survives the test."""
    started = []

    def pair(*flags, second=(), program=("-m", "rmsprop_jax")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [*map(str, flags), "--coordinator", address]
        flags += ["--processes", "2", "--process-id"]
        environment = os.environ | dict(
            XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu"
        )
        started[:] = [
            subprocess.Popen(
                [sys.executable, *program, *flags, str(i), *(second if i else ())],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        return list(started)

    yield pair
    for process in started:
        process.kill()
        process.communicate()


def end(processes):
    """Return the status and the outputs of both, which must end by themselves."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=LIMIT)
        found.append((process.returncode, out, err))
    return found


def test_two_processes_of_which_one_was_killed_are_like_one(launch, tmp_path):
    folder, single = tmp_path / "killed", tmp_path / "single"
    processes = launch(*FLAGS, "--out", folder)
    wait_for(folder / "checkpoints" / "rmsprop" / "5", processes[0])
    processes[0].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    (_, out, _), (status, _, _) = end(processes)
    assert "8 x cpu" in out
    # Two buffers of 14,666 numbers, of which 8 do not divide 10.
    assert "rmsprop: 14.7 kB of state on a device" in out
    assert status != 0 and time.monotonic() - begun < 60, "the other one ends too"
    for devices in (4, 1):
        shutil.copytree(folder, tmp_path / str(devices))
    (status, _, err), (other, out, _) = end(launch("--resume", "--out", folder))
    assert (status, other) == (0, 0), err
    assert "accuracy" not in out, "the first speaks for all"

    # What eight devices of two processes saved goes on, on fewer and in one process.
    for devices in (4, 1):
        fewer = tmp_path / str(devices)
        status, out, err = finish(start("--resume", "--out", fewer, devices=devices))
        assert status == 0, err
        assert f"{devices} x cpu" in out
    status, _, err = finish(start(*FLAGS, "--out", single))
    assert status == 0, err
    # One process sums in another order: the same but for some float32 ulp a step.
    for run in (folder, tmp_path / "4", tmp_path / "1"):
        assert_same_run(run, single)


def assert_same_run(folder, single):
    assert len(rows(folder)) == 2
    for ours, theirs in zip(rows(folder), rows(single), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
        assert abs(float(ours["accuracy"]) - float(theirs["accuracy"])) < 0.01


# All in one pair of processes, as it takes long to start them.
DISAGREE = """
import sys
from pathlib import Path
from rmsprop_jax import __main__, demo

folder, second = Path(sys.argv[1]), sys.argv[-1] == "1"

def attempt(*flags):
    try:
        __main__.main(["--out", str(folder), *flags])
    except SystemExit as stopped:
        print(stopped.code)

attempt(*sys.argv[2:], "--seed", "54"[second])
attempt()
attempt("--out", str(folder) + sys.argv[-1])
demo.HIDDEN = 48 if second else 64
attempt("--out", str(folder) + "2")
# Who fails does not wait for the others, nor they for it.
if second:
    demo.agreed(False)
__main__.end("failed")
"""


def test_processes_that_disagree_are_told_and_do_not_wait(launch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    begun = time.monotonic()
    found = end(launch(tmp_path / "run", program=("-c", DISAGREE)))
    assert time.monotonic() - begun < 60
    for i, (status, out, err) in enumerate(found):
        assert status != 0 and ("failed" in err or i == 1)
        flags, full, place, models = (x for x in out.splitlines() if "error" in x)
        assert "the processes have different flags. Start all with" in flags
        assert ("is not empty", "process 0 could not begin")[i] in full
        assert "is not the same folder for all processes. Give them" in place
        assert "the processes have different models. Give all" in models
    assert [x.name for x in (tmp_path / "run").iterdir()] == ["mine"]
