"""Command line of the demo: flags, output folder, several processes, interrupts."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shlex
import signal
import sys
import threading
import time
import typing
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmsprop_jax.demo.config import OPTIMIZERS, Config


def parse(arguments):
    """Parse the command line; return all arguments, and the options of `Config`."""
    # Without the usage message, an error takes only one line.
    parser = argparse.ArgumentParser(
        prog="python -m rmsprop_jax",
        usage=argparse.SUPPRESS,
        description="Train a GRU to read handwritten digits. Ctrl-C saves and stops.",
    )
    add = parser.add_argument
    for field in dataclasses.fields(Config):
        kind, *_ = typing.get_args(field.type) or [field.type]
        how: typing.Any = {"action": "store_true"} if kind is bool else {"type": kind}
        help = field.metadata["help"] + (
            f"; default {field.default}" * (field.default not in (None, False))
        )
        name = "--" + field.name.replace("_", "-")
        add(name, default=argparse.SUPPRESS, help=help, **how)
    add("--out", type=Path, help="output folder; default: a new one in runs/")
    add("--resume", action="store_true", help="resume the run in --out, or the newest")
    add("--coordinator", help="HOST:PORT of process 0, or auto (on a TPU pod)")
    add("--process-id", type=int, help="index of this process, starting at 0")
    add("--processes", type=int, help="number of processes")
    version = importlib.metadata.version("rmsprop_jax")
    add("--version", action="version", version=version)
    args = parser.parse_args(arguments)
    return args, {k: v for k, v in vars(args).items() if hasattr(Config, k)}


def connect(args):
    """Connect to the other processes, if there are several."""
    if args.coordinator is None:
        if args.process_id is not None or args.processes is not None:
            raise ValueError("several processes need --coordinator HOST:PORT or auto.")
        return
    print(f"Waiting up to 60 s for the other processes at {args.coordinator}")
    try:
        jax.distributed.initialize(
            None if args.coordinator == "auto" else args.coordinator,
            num_processes=args.processes,
            process_id=args.process_id,
            initialization_timeout=60,
            heartbeat_timeout_seconds=20,
        )
    except Exception as error:
        raise ValueError(
            f"cannot connect the processes ({error}). Give all the same --coordinator "
            "HOST:PORT and --processes N, and each its own --process-id below N."
        ) from error


def configure(args, options):
    """Return the folder and the config of a new or resumed run, and save the config."""
    out, saved = args.out, {}
    if out is None and args.resume:
        configs = [*Path("runs").glob("*/config.json")]
        if not configs:
            raise ValueError("there is no run in runs/ to resume. Pass its --out.")
        out = max(configs, key=os.path.getmtime).parent
    out = out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    path = out / "config.json"
    if args.resume:
        try:
            saved = dataclasses.asdict(Config(**json.loads(path.read_text())))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not the config of a run ({error}). Start a new run in "
                "another folder."
            ) from error
        changed = [k for k, v in options.items() if saved[k] != v and k != "epochs"]
        if changed:
            raise ValueError(
                f"{changed[0]} is {saved[changed[0]]} in {path}; only --epochs can "
                "change when a run is resumed."
            )
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder.")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty. Use --resume or another --out.")
    config = Config(**saved | options)
    if config.batch_size % jax.device_count():
        raise ValueError(
            f"batch_size must be a multiple of the {jax.device_count()} devices, got "
            f"{config.batch_size}."
        )
    out.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2))
    os.replace(temporary, path)
    return out, config


def agree(args, options):
    """Run `configure` in process 0, and share its result or error with all."""
    found = {}
    if jax.process_index() == 0:
        try:
            out, config = configure(args, options)
            found = dict(out=str(out), config=dataclasses.asdict(config))
        except (OSError, ValueError) as error:
            found = dict(error=str(error))
    found = json.loads(broadcast(json.dumps(found)))
    if "error" in found:
        raise ValueError(found["error"])
    return Path(found["out"]), Config(**found["config"])


def broadcast(text):
    """Return the text of process 0 in every process.

    `multihost_utils.broadcast_one_to_all` returns when one device is done. A process
    that exits then leaves the devices of the others waiting.
    """
    mesh = Mesh(jax.devices(), "devices")
    # The sum of one row per device, of which all but one are zero.
    rows = np.zeros((jax.local_device_count(), 2**14), np.uint8)
    if jax.process_index() == 0:
        rows[0] = np.frombuffer(text.encode().ljust(2**14), np.uint8)
    rows = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("devices")), rows
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    total = jax.jit(lambda x: x.sum(0, dtype=x.dtype), out_shardings=replicated)(rows)
    return np.asarray(total.block_until_ready()).tobytes().decode()


def stop_on_interrupt():
    """Return an event that the first Ctrl-C sets; the second one exits at once."""
    stop = threading.Event()

    def handle(*_):
        stop.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not print, because the interrupt may have come during a print.
        os.write(
            2, b"\nStopping after this step; press Ctrl-C again to exit at once.\n"
        )

    signal.signal(signal.SIGINT, handle)
    return stop


def main(arguments=None):
    """Run the command line and return the exit status."""
    try:
        return run(arguments)
    finally:
        # At exit, JAX would close the connections before it waits for the other
        # processes, which may still be reading from them.
        jax.distributed.shutdown()


def run(arguments):
    """Train as the command line says and return the exit status."""
    # Before there is anything to save, Ctrl-C exits without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    args, options = parse(arguments)
    try:
        Config(**options)
        from rmsprop_jax.demo import report, train

        connect(args)
        out, config = agree(args, options)
    except ImportError as error:
        raise SystemExit(f"error: {error}. Run: pip install '.[demo]'") from error
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    stop = stop_on_interrupt()
    first = jax.process_index() == 0
    if first:
        kind = jax.devices()[0].device_kind
        print(f"Training on {jax.device_count()} x {kind}, writing into {out}/")
    names = OPTIMIZERS if config.optimizer == "all" else [config.optimizer]
    finished = all(train.train(config, name, out, stop) for name in names)
    if first and report.read_metrics(out):
        report.draw_curves(out)
    if not finished:
        again = [*sys.orig_argv, *["--resume"] * (not args.resume), "--out", str(out)]
        print(f"Stopped and saved. Resume with: {shlex.join(again)}")
        return 130
    if first:
        print(f"Wrote {', '.join(sorted(x.name for x in out.iterdir()))} in {out}/")
    return 0
