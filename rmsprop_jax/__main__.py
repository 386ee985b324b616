"""The command line of the main job: `python -m rmsprop_jax --help`."""

import argparse
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

NAME = "python -m rmsprop_jax"
# What a run remembers, and what it is when no flag says otherwise.
DEFAULTS = dict(
    optimizer="rmsprop",
    learning_rate=None,
    decay=0.9,
    eps=1e-8,
    momentum=None,
    centered=False,
    zero=False,
    schedule="cosine",
    epochs=20,
    batch_size=None,
    seed=0,
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        """Print the message and leave."""
        self.exit(2, f"{NAME}: error: {message} (see --help)\n")


def number(kind, low, high=math.inf):
    """Return an argument type: a number in [low, high)."""

    def parse(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(
                f"{text} is out of range; it must be in [{low}, {high})"
            )
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def parser():
    """Return the parser; a flag that was not given is absent from its result."""
    result = Parser(
        prog=NAME,
        argument_default=argparse.SUPPRESS,
        description="Train a recurrent network (a Flax NNX GRU) to read scikit-learn's "
        "handwritten digits row by row, with RMSProp. Writes curves.png, metrics.csv "
        "and checkpoints into a folder. Ctrl-C saves and stops.",
    )

    def add(flag, help, **options):
        result.add_argument(flag, help=help, **options)

    names = ("rmsprop", "sgd", "momentum", "adam", "adagrad", "all")
    real, share = number(float, 0), number(float, 0, 1)
    add(
        "--optimizer",
        "which to train with; default rmsprop; all: each of them, in one figure",
        choices=names,
    )
    add(
        "--learning-rate",
        "size of a step at its largest; default: one that suits the optimizer",
        type=real,
        metavar="X",
    )
    add(
        "--decay",
        "rmsprop: share of the average of squares kept at each step; default 0.9",
        type=share,
        metavar="X",
    )
    add(
        "--eps",
        "rmsprop: added to that average under the root; default 1e-8",
        type=real,
        metavar="X",
    )
    add(
        "--momentum",
        "rmsprop: share of the last step kept; default none",
        type=share,
        metavar="X",
    )
    add(
        "--centered",
        "rmsprop: divide by the gradient's standard deviation, not its root mean "
        "square",
        action="store_true",
    )
    add(
        "--zero",
        "spread the optimizer's state over the devices (ZeRO, stage 1)",
        action="store_true",
    )
    add(
        "--schedule",
        "how the learning rate changes over the run; default cosine",
        choices=("constant", "cosine", "warmup_cosine"),
    )
    add(
        "--epochs",
        "passes over the training images; default 20",
        type=number(int, 1),
        metavar="N",
    )
    add(
        "--batch-size",
        "images a step, a multiple of the number of devices; default 32 or the next",
        type=number(int, 1, 1438),
        metavar="N",
    )
    add(
        "--seed",
        "of the first weights and the order of images; default 0",
        type=number(int, 0, 2**31),
        metavar="N",
    )
    add(
        "--out",
        "folder to write into; default: a new one in runs/",
        type=Path,
        metavar="DIR",
    )
    add(
        "--resume",
        "go on with the run in --out (default: the newest in runs/) from its last "
        "checkpoint; its flags are remembered",
        action="store_true",
    )
    add(
        "--coordinator",
        "be one of several processes: HOST:PORT of the first, or auto where JAX finds "
        "the others by itself, as on a TPU pod; needs --out, a folder that all share",
        metavar="HOST:PORT",
    )
    add(
        "--process-id",
        "which of them this is, from 0",
        type=number(int, 0),
        metavar="I",
    )
    add(
        "--processes",
        "how many they are",
        type=number(int, 1),
        metavar="N",
    )
    return result


def join(flags, demo):
    """Take the flags about processes, and wait until all of these are there."""
    address, *numbers = (
        flags.pop(name, None) for name in ("coordinator", "process_id", "processes")
    )
    if address is None and numbers == [None, None]:
        return
    automatic = address == "auto"
    if address is None or (None in numbers) != automatic or "out" not in flags:
        raise demo.Problem(
            "several processes need --coordinator HOST:PORT, --process-id, --processes "
            "and --out; or --coordinator auto and --out alone."
        )
    if not automatic:
        port = address.rpartition(":")[2]
        if ":" not in address or not port.isdigit() or numbers[0] >= numbers[1]:
            raise demo.Problem(
                "--coordinator must be HOST:PORT, and --process-id below --processes, "
                f"got {address}, {numbers[0]} and {numbers[1]}."
            )
        print(f"Waiting up to 60 s for all {numbers[1]} processes", flush=True)
    import jax

    try:
        jax.distributed.initialize(
            None if automatic else address,
            process_id=numbers[0],
            num_processes=numbers[1],
            # So long the others wait for one that is gone, instead of for minutes.
            initialization_timeout=60,
            heartbeat_timeout_seconds=20,
        )
    except (RuntimeError, ValueError) as error:
        raise demo.Problem(
            f"the processes did not find each other: {error} Start all with the same "
            "--coordinator and --processes, and each with its own --process-id."
        ) from error


def _flag(name):
    return "--" + name.replace("_", "-")


def begin(flags, demo):
    """Return the folder and the config of a new run."""
    config = DEFAULTS | flags
    for name in ("decay", "eps", "momentum", "centered"):
        if name in flags and config["optimizer"] not in ("rmsprop", "all"):
            raise demo.Problem(
                f"--{name} is for rmsprop, not {config['optimizer']}. Leave it out."
            )
    out = config.pop("out", None)
    if out is None:
        out = Path("runs", time.strftime(f"{config['optimizer']}-%Y%m%d-%H%M%S"))
    return out, config


def claim(out, demo):
    """Make the folder of a new run, which must have nothing in it."""
    out.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(".") for path in out.iterdir()):
        raise demo.Problem(
            f"{out} is not empty. Use --resume to go on with a run in it, or another "
            "--out."
        )


def resume(flags, demo):
    """Return the folder and the config of a run that was stopped or killed."""
    out = flags.pop("out", None)
    if out is None:
        runs = sorted(Path("runs").glob("*/config.json"), key=os.path.getmtime)
        if not runs:
            raise demo.Problem("runs/ holds no run to resume. Use --out DIR.")
        out = runs[-1].parent
    try:
        config = json.loads((out / "config.json").read_text())
        words = []
        for name, value in config.items():
            if value is True:
                words.append(_flag(name))
            elif value is not None and value is not False:
                words += [_flag(name), str(value)]
        read = DEFAULTS | vars(parser().parse_args(words))
        if read != DEFAULTS | config or config.keys() != DEFAULTS.keys():
            raise ValueError("config.json is not that of a run")
    except (OSError, ValueError, AttributeError) as error:
        raise demo.Problem(
            f"{out} holds no run to resume ({error}). Begin one without --resume."
        ) from error
    for name, value in flags.items():
        if config[name] != value:
            raise demo.Problem(
                f"the run in {out} has {_flag(name)} {config[name]}, not {value}. "
                "Leave the flag out, or begin a new run with another --out."
            )
    return out, config


def run(flags, demo):
    """Do what the flags say and return the exit status."""
    import jax

    join(flags, demo)
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise demo.Problem(f"JAX finds no device: {error}") from error
    resumed = flags.pop("resume", False)
    out, config = (resume if resumed else begin)(flags, demo)
    count = len(devices)
    config["batch_size"] = config["batch_size"] or -(-32 // count) * count
    if config["batch_size"] % count:
        raise demo.Problem(
            f"--batch-size {config['batch_size']} cannot be split over {count} "
            f"devices. Use a multiple of {count}, or to resume, devices that divide it."
        )
    chosen = config["optimizer"]
    optimizers = demo.OPTIMIZERS if chosen == "all" else [chosen]
    try:
        for optimizer in optimizers:
            demo.transformation(config, optimizer, 0.0)
    except ValueError as error:
        raise demo.Problem(str(error)) from error
    demo.compare("flags", "Start all with the same.", sorted(config.items()))
    first, trouble = jax.process_index() == 0, None
    if first:
        try:
            if not resumed:
                claim(out, demo)
            with demo.replacing(out / "config.json") as temporary:
                temporary.write_text(json.dumps(config, indent=2))
        except (demo.Problem, OSError) as error:
            trouble = error
    if demo.agreed(trouble):
        raise trouble or demo.Problem("process 0 could not begin; it says why.")
    demo.share(out)
    if first:
        print(
            f"Training on {count} x {devices[0].device_kind}, into {out}/", flush=True
        )

    stops = []

    def interrupt(*_):
        # The first Ctrl-C saves and ends within 15 steps; the second just leaves.
        stops.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    table, finished = [], True
    for optimizer in optimizers:
        earlier, folder = table, out / "checkpoints" / optimizer

        def report(rows, earlier=earlier):
            nonlocal table
            table = earlier + rows
            if first:
                demo.write_metrics(out / "metrics.csv", table)

        finished, histogram = demo.train(
            config, optimizer, folder, lambda: stops, report
        )
        if first and histogram and table[len(earlier) :]:
            path = out / "diagnostics.png"
            rows = table[len(earlier) :]
            demo.write_diagnostics(path, rows, histogram, config["eps"])
        if not finished:
            break
    if not first:
        return 0 if finished else 130
    if table:
        demo.write_curves(out / "curves.png", table)
    if not finished:
        print(f"Stopped and saved. Go on with: {NAME} --resume --out {out}")
        return 130
    for row in table:
        if row["epoch"] == config["epochs"]:
            print("{optimizer}: held-out accuracy {accuracy:.2%}".format(**row))
    print(f"Wrote curves.png, metrics.csv and checkpoints/ in {out}/")
    return 0


def main(arguments=None):
    """Run the command line; return the exit status."""
    flags = vars(parser().parse_args(arguments))
    try:
        from rmsprop_jax import demo
    except ImportError as error:
        sys.exit(f"{NAME}: error: {error}. Install it: pip install '.[demo]'")
    try:
        return run(flags, demo)
    except (demo.Problem, OSError) as error:
        sys.exit(f"{NAME}: error: {' '.join(str(error).split())}")


def end(status):
    """Leave with a status or a message, as `sys.exit` does."""
    jax = sys.modules.get("jax")
    if status in (0, 130) or not (jax and jax.distributed.is_initialized()):
        sys.exit(status)
    # An orderly end would wait for the other processes, which wait for this one.
    if isinstance(status, str):
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    # What libraries leave behind unfinished is not for the user to read.
    sys.unraisablehook = lambda _: None
    try:
        end(main())
    except KeyboardInterrupt:
        end(f"{NAME}: stopped at once. A checkpoint that was saved is whole.")
    except SystemExit as stopped:
        end(stopped.code)
    except Exception:
        traceback.print_exc()
        end(1)
