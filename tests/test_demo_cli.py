"""The command line of the training program: one line for each mistake."""

import hashlib
import os
import signal
import sys
import threading
import time
from importlib.metadata import version

import jax
import pytest

from rmsprop_jax.demo import cli


@pytest.fixture
def options(tmp_path):
    return cli.parse(["--optimizer", "all", "--out", str(tmp_path / "run")])


def refused(capsys, *arguments):
    """Return the one line with which the program refuses the arguments."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(x) for x in arguments])
    message = caught.value.code
    if message == 2:  # From argparse, which prints it.
        message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    return message


def test_all_optimizers_are_trained_until_one_is_stopped(options):
    trained = []

    def train(options, name, optimizer, peak, stop):
        trained.append((name, (optimizer, peak)))
        return name != "adam"

    assert cli.run(options, train) == 130
    assert trained == [*cli.OPTIMIZERS.items()][:4]
    # Of two runs that start at once, the second one saw no folder either.
    with pytest.raises(SystemExit, match="File exists"):
        cli.run(options, train)


def test_a_resumed_run_may_have_more_epochs(options):
    resume = "--resume", "--out", str(options.out)
    cli.run(options, lambda *_: True)
    assert cli.run(cli.parse([*resume, "--epochs", "30"]), lambda *_: True) == 0
    assert vars(cli.parse(resume)) == vars(options) | dict(epochs=30, resume=True)


def test_ctrl_c_is_answered_while_jax_compiles(options, monkeypatch):
    times = []

    def compile(*_):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        # Not interruptible, and without the GIL, like a compilation.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        times.append(time.monotonic())
        return False

    def record(*_, **__):
        times.append(time.monotonic())

    monkeypatch.setattr(cli, "print", record, raising=False)
    assert cli.run(options, compile) == 130
    _, answered, compiled, _ = times
    assert compiled - answered > 0.1
    # The second one exits at once, with status 130 in a shell.
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize(("processes", "resume"), [(1, []), (2, ["--resume"])])
def test_failures_in_training_get_one_line(
    options, monkeypatch, capsys, processes, resume
):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Connection\nreset")

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "orig_argv", ["python", "--out", "my run", *resume])
    options.resume = bool(resume)
    with pytest.raises(SystemExit) as caught:
        cli.run(options, fail)
    message = capsys.readouterr().err if processes == 2 else caught.value.code
    assert f"{options.out}: UNKNOWN: Connection reset. Resume with: " in message
    assert message.strip().endswith("with: python --out 'my run' --resume")
    assert ("did another process end?" in message) == (processes == 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--decay 1", "must be in [0, 1)"),
        ("--learning-rate inf", "--learning-rate must be positive, got inf"),
        ("--learning-rate 0", "--learning-rate must be positive, got 0"),
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--seed -1", "--seed must be at least 0 and below 2**63, got -1"),
        (f"--seed {2**63}", "below 2**63"),
        ("--batch-size 9", "devices, --batch-size must be in range("),
        ("--optimizer adamw", "invalid choice: 'adamw'"),
        ("--optimizer adam --centered", "centered are for rmsprop, not adam"),
        ("--epochs 1.5", "invalid int value: '1.5'"),
        ("--processes 2", "JAX does not start"),
        ("--out run", "run exists. Use --resume or another --out"),
        # Before processes wait for each other.
        (
            "--out run --coordinator localhost:1 --processes 2 --process-id 1",
            "run exists. Use",
        ),
        ("--resume", "no run to resume: runs/digits/config.json"),
        ("--resume --out cut", "no run to resume: cut/config.json"),
        ("--resume --out array", "no run to resume: array/config.json"),
        ("--resume --out empty", "Use another --out"),
        ("--resume --out run --decay 0.5", "decay is 0.8 in run/config.json"),
        ("--resume --out run --decay 0.9", "; only --epochs can change"),
    ],
)
def test_bad_flags_get_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    configs = dict(run='{"decay": 0.8}', cut='{"a', array="[]", empty="")
    for name, text in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    assert words in refused(capsys, *arguments.split())
    assert {x.name for x in tmp_path.iterdir()} == configs.keys()


def test_a_missing_extra_or_device_gets_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "devices", lambda: 1 / 0)
    assert "JAX does not start (ZeroDivisionError" in refused(capsys)
    monkeypatch.setitem(sys.modules, "rmsprop_jax.demo.train", None)
    assert "Run: pip install '.[demo]'" in refused(capsys)


def test_help_and_version_are_printed(capsys):
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([flag])
    text = capsys.readouterr().out
    assert "default: 1e-08" in text and version("rmsprop_jax") in text
