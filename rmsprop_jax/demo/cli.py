"""Command line: options, processes, interrupts and errors around the training."""

import argparse
import concurrent.futures
import functools
import json
import os
import shlex
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import broadcast_one_to_all

import rmsprop_jax

# Each has a peak learning rate that trains stably, within a factor of 3 of the best.
OPTIMIZERS = dict(
    rmsprop=(rmsprop_jax.rmsprop, 0.01),
    sgd=(optax.sgd, 1.2),
    momentum=(functools.partial(optax.sgd, momentum=0.9), 0.3),
    adam=(optax.adam, 0.01),
    adagrad=(optax.adagrad, 0.4),
)
RMSPROP = ("decay", "eps", "momentum", "centered")


def main(arguments=None):
    """Run the command line and return the exit status."""
    # Until there is something to save, Ctrl-C ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = parse(arguments)
    try:
        from rmsprop_jax.demo.train import train  # This takes seconds.

        connect(options)
        return run(options, train)
    except ImportError as error:
        raise SystemExit(f"error: {error}. Run: pip install '.[demo]'") from error
    finally:
        # At exit, JAX would close the connections before it waits for the other
        # processes, which may still be reading from them.
        jax.distributed.shutdown()


def parse(arguments):
    """Return the options on the command line, or of the run that it resumes."""
    parser = argparse.ArgumentParser(
        prog="python -m rmsprop_jax",
        usage=argparse.SUPPRESS,  # An error then takes only one line.
        description="Train a GRU to read handwritten digits. Ctrl-C saves and stops.",
    )
    add, names, out = parser.add_argument, [*OPTIMIZERS, "all"], Path("runs/digits")
    add("--optimizer", default="rmsprop", choices=names, help="default: rmsprop")
    add("--learning-rate", type=float, help="at the start; default: set per optimizer")
    add("--decay", default=0.9, type=float, help="of rmsprop; default: %(default)s")
    add("--eps", default=1e-8, type=float, help="of rmsprop; default: %(default)s")
    add("--momentum", type=float, help="of rmsprop; default: none")
    add("--centered", action="store_true", help="of rmsprop; default: not centered")
    add("--zero", action="store_true", help="shard the optimizer state over devices")
    add("--epochs", default=20, type=int, help="default: 20; may change on --resume")
    add("--batch-size", default=32, type=int, help="on all devices; default: 32")
    add("--seed", default=0, type=int, help="of parameters and batches; default: 0")
    add("--out", default=out, type=Path, help="folder to create; default: %(default)s")
    add("--resume", action="store_true", help="resume the run in that folder")
    add("--coordinator", help="HOST:PORT of process 0, or auto (on a TPU pod)")
    add("--processes", type=int, help="number of processes")
    add("--process-id", type=int, help="from 0, whose options the others take")
    add("--version", action="version", version=version("rmsprop_jax"))
    options = parser.parse_args(arguments)

    if options.resume:
        path = options.out / "config.json"
        try:
            saved = json.loads(path.read_text())
            parser.set_defaults(**saved)
        except (OSError, TypeError, ValueError) as error:
            parser.error(f"no run to resume: {path}: {error}. Use another --out.")
        options = parser.parse_args(arguments)
        for name, value in saved.items():
            if getattr(options, name) != value and name != "epochs":
                parser.error(f"{name} is {value} in {path}; only --epochs can change.")
    elif options.out.exists():
        parser.error(f"{options.out} exists. Use --resume or another --out.")

    rate, epochs, seed = options.learning_rate, options.epochs, options.seed
    if rate is not None and not 0 < rate < float("inf"):
        parser.error(f"--learning-rate must be positive, got {rate}.")
    if epochs < 1:
        parser.error(f"--epochs must be at least 1, got {epochs}.")
    if not 0 <= seed < 2**63:
        parser.error(f"--seed must be at least 0 and below 2**63, got {seed}.")
    settings = {name: getattr(options, name) for name in RMSPROP}
    defaults = {name: parser.get_default(name) for name in RMSPROP}
    if settings != defaults and options.optimizer not in ("rmsprop", "all"):
        parser.error(f"{', '.join(RMSPROP)} are for rmsprop, not {options.optimizer}.")
    try:
        rmsprop_jax.rmsprop(0.1, **settings)
    except ValueError as error:
        parser.error(str(error))
    return options


def connect(options):
    """Connect to other processes, if any; take the options of process 0."""
    address, n, i = options.coordinator, options.processes, options.process_id
    try:
        if (address, n, i) != (None, None, None):
            print(
                f"Waiting up to 60 s for {n or 'all'} processes at {address}; all take "
                "the options of process 0. If one is missing, or ends later, JAX "
                "aborts the others; then start all again, with --resume if the output "
                "folder exists.",
                flush=True,
            )
            address = None if address == "auto" else address
            jax.distributed.initialize(
                address, n, i, initialization_timeout=60, heartbeat_timeout_seconds=20
            )
        devices = len(jax.devices())
        text = np.frombuffer(config(options).encode().ljust(1000), np.uint8)
        vars(options).update(json.loads(bytes(broadcast_one_to_all(text))))
    except Exception as error:
        raise SystemExit(
            f"error: JAX does not start ({error!r}). Check JAX_PLATFORMS, and "
            "--coordinator HOST:PORT, --processes N and --process-id below N."
        ) from error
    sizes = range(devices, 1438, devices)
    if options.batch_size not in sizes:
        raise SystemExit(
            f"error: on {devices} devices, --batch-size must be in {sizes}."
        )


def run(options, train):
    """Train until done or interrupted, and return the exit status."""
    stop, first = threading.Event(), jax.process_index() == 0
    names = OPTIMIZERS if options.optimizer == "all" else [options.optimizer]
    added = [] if options.resume else ["--resume"]
    resume = f"Resume with: {shlex.join([*sys.orig_argv, *added])}"

    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        stop.set()
        print(f"\nStopping after this epoch; Ctrl-C again: now. {resume}", flush=True)

    signal.signal(signal.SIGINT, interrupt)
    if first:
        devices = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
        print(f"Training on {devices}, writing into {options.out}/", flush=True)
    try:
        if first:
            # Of two runs that start at once, the second one fails here.
            options.out.mkdir(parents=True, exist_ok=options.resume)
            write_atomically(options.out / "config.json", config(options))
        results = (train(options, name, *OPTIMIZERS[name], stop) for name in names)
        # In another thread, so that this one answers Ctrl-C even while JAX compiles.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            finished = pool.submit(all, results).result()
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(f"{options.out}: {error}. {resume}".split())
        if jax.process_count() == 1:
            raise SystemExit(f"error: {reason}") from error
        print(f"error: did another process end? {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # An orderly exit would wait for the other processes.
    if not finished:
        print(f"Stopped and saved. {resume}")
        return 130
    if first:
        print(f"Wrote checkpoints, metrics and figures into {options.out}/")
    return 0


def config(options):
    """Return the options that must not change during a run, and `epochs`, as JSON."""
    others = ("out", "resume", "coordinator", "processes", "process_id")
    return json.dumps({k: v for k, v in vars(options).items() if k not in others})


def write_atomically(path, text):
    """Write a file atomically: a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
