"""The main job: train a recurrent Flax model on handwritten digits with RMSProp.

A GRU reads each 8 x 8 image row by row. Run it with `python -m rmsprop_jax`; the
command line is in `__main__.py`.

What decides a run is its `config` and its checkpoint: the order of the data follows
from seed and epoch, and sums that become metrics are saved too. So a run that was
killed and resumed on as many devices ends with the same bits as one that was not.
"""

import contextlib
import csv
import functools
import hashlib
import logging
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits
from tqdm import tqdm

import rmsprop_jax
from rmsprop_jax import diagnostics, plots, sharding

OPTIMIZERS = ("rmsprop", "sgd", "momentum", "adam", "adagrad")
# Each within a factor of 3 of the best loss after 20 epochs, and steady from the first.
LEARNING_RATES = dict(rmsprop=0.01, sgd=0.7, momentum=0.3, adam=0.01, adagrad=0.4)
METRICS = ("optimizer", "epoch", "step", "loss", "learning_rate", "accuracy")
HIDDEN = 64
HELD_OUT = 360


class Problem(Exception):
    """Something the user can mend; its message is all they need."""


class Reader(nnx.Module):
    """A GRU over the rows of an image, and a linear layer on its last output."""

    def __init__(self, rngs: nnx.Rngs):
        """Make the layers."""
        self.rnn = nnx.RNN(nnx.GRUCell(8, HIDDEN, rngs=rngs), rngs=False)
        self.head = nnx.Linear(HIDDEN, 10, rngs=rngs)

    def __call__(self, images):
        """Return logits [batch, 10] of images [batch, 8, 8]."""
        start = jnp.zeros((len(images), HIDDEN), images.dtype)
        outputs = jnp.asarray(self.rnn(images, initial_carry=start))
        return self.head(outputs[:, -1])


def digits():
    """Return images [n, 8, 8] in [0, 1] and labels [n], for training and held out."""
    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images / 16).astype(np.float32)[order]
    labels = data.target.astype(np.int32)[order]
    train, held_out = slice(HELD_OUT, None), slice(HELD_OUT)
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def shuffled(seed, epoch, count):
    """Return the order in which an epoch goes through so many images."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def learning_rate(config, optimizer, steps):
    """Return the schedule of a run of so many steps."""
    peak = config["learning_rate"]
    if peak is None:
        peak = LEARNING_RATES[optimizer]
    if config["schedule"] == "cosine":
        return optax.cosine_decay_schedule(peak, steps)
    if config["schedule"] == "warmup_cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
    return optax.constant_schedule(peak)


def transformation(config, optimizer, schedule):
    """Return the optimizer by its name on the command line."""
    if optimizer == "rmsprop":
        options = {k: config[k] for k in ("decay", "eps", "momentum", "centered")}
        return rmsprop_jax.rmsprop(schedule, **options)
    if optimizer == "momentum":
        return optax.sgd(schedule, momentum=0.9)
    return getattr(optax, optimizer)(schedule)


def train(config, optimizer, folder, stop, report):
    """Train one model, going on from its last checkpoint if there is one.

    Args:
      config: what the command line decided; see `__main__.py`.
      optimizer: one of `OPTIMIZERS`.
      folder: where its checkpoints are kept.
      stop: function that says whether to save and leave before the end.
      report: function that is given the rows so far, at the start and each epoch.

    Returns:
      Whether the run is complete, and for rmsprop the histogram of its average.
    """
    (images, labels), held_out = digits()
    batch = config["batch_size"]
    per_epoch = len(labels) // batch
    steps = per_epoch * config["epochs"]
    schedule = learning_rate(config, optimizer, steps)
    tx = transformation(config, optimizer, schedule)

    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    compare("images", "Give all the same scikit-learn.", _digest((images, labels)))
    images, labels, held_out = place((images, labels, held_out), replicated)
    graph, params = nnx.split(Reader(nnx.Rngs(config["seed"])))
    params = nnx.to_pure_dict(params)
    compare("models", "Give all the same program.", jax.tree.map(jnp.shape, params))
    # Drawn by one process, as they need not be alike.
    params = place(multihost_utils.broadcast_one_to_all(params), replicated)
    where = replicated
    if config["zero"]:
        where, _ = sharding.zero(jax.eval_shape(tx.init, params), mesh, "data")
    opt_state = jax.jit(tx.init, out_shardings=where)(params)
    state = dict(
        params=params, opt_state=opt_state, loss=place(np.float32(0), replicated)
    )
    # Where things live is where they stay.
    places = jax.tree.map(lambda x: x.sharding, state)

    def logits(params, images):
        return nnx.merge(graph, nnx.State(params))(images)

    kept_in = (places, replicated, replicated)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=kept_in)
    def step(state, chosen):
        def loss_of(params):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits(params, images[chosen]), labels[chosen]
            )
            return losses.mean()

        params = state["params"]
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        state = dict(params=params, opt_state=opt_state, loss=state["loss"] + loss)
        return state, loss, updates

    @jax.jit
    def accuracy(params):
        return (logits(params, held_out[0]).argmax(-1) == held_out[1]).mean()

    checkpoints = Checkpoints(folder, dict(config, optimizer=optimizer))
    done, state, rows = checkpoints.restore(state)
    report(rows)
    first = jax.process_index() == 0
    if first:
        shards = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), opt_state)
        held = jax.tree.map(lambda x, s: math.prod(s) * x.itemsize, opt_state, shards)
        total = sum(jax.tree.leaves(held))
        print(f"{optimizer}: {total / 1000:.1f} kB of state on a device", flush=True)
    with tqdm(
        total=steps, initial=done, desc=optimizer, unit="step", disable=not first
    ) as bar:
        while done < steps and not (done % 15 == 0 and agreed(stop())):
            epoch, within = divmod(done, per_epoch)
            order = shuffled(config["seed"], epoch, len(labels))
            chosen = order[within * batch :][:batch]
            state, loss, updates = step(state, place(chosen, split))
            rate = float(jnp.asarray(schedule(done)))
            done += 1
            bar.update()
            if done % 15 == 0 or done == steps:
                bar.set_postfix(loss=f"{float(loss):.4f}", lr=f"{rate:.2e}")
            if done % per_epoch == 0:
                values = (
                    optimizer,
                    epoch + 1,
                    done,
                    float(state["loss"]) / per_epoch,
                    rate,
                    float(accuracy(state["params"])),
                )
                rows.append(dict(zip(METRICS, values, strict=True)))
                if optimizer == "rmsprop":
                    found = diagnostics.metrics(
                        *(updates, state["opt_state"], state["params"], rate),
                        eps=config["eps"],
                        per_layer=True,
                    )
                    rows[-1] |= {k: x.item() for k, x in jax.device_get(found).items()}
                state["loss"] = place(np.float32(0), replicated)
                checkpoints.save(done, state, rows)
                report(rows)
                text = (
                    "{optimizer}: epoch {epoch}, loss {loss:.4f}, learning rate "
                    "{learning_rate:.2e}, held-out accuracy {accuracy:.1%}"
                )
                if first:
                    bar.write(text.format(**rows[-1]))
    if done < steps:
        checkpoints.save(done, state, rows)
    histogram = None
    if optimizer == "rmsprop":
        histogram = jax.device_get(diagnostics.histogram(state["opt_state"]))
    return done == steps, histogram


def place(tree, where):
    """Put a tree, which every process has, on the devices of all of them."""

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda i: x[i])

    return jax.tree.map(put, tree)


def agreed(stop):
    """Return whether any process wants to stop: none may leave the others alone."""
    return bool(gather(np.array(bool(stop))).any())


def compare(what, fix, value):
    """Refuse processes that are to do different things: they would wait for ever."""
    digest = hashlib.sha256(repr(value).encode()).digest()
    found = gather(np.frombuffer(digest, np.uint8))
    if (found != found[0]).any():
        raise Problem(f"the processes have different {what}. {fix}")


def share(folder):
    """Refuse a folder that is not one for all: each would wait for the others in it."""
    path, token = folder / ".shared", np.frombuffer(os.urandom(16), np.uint8)
    if jax.process_index() == 0:
        path.write_bytes(token.tobytes())
    written = gather(token)[0].tobytes()
    seen = path.read_bytes() if path.exists() else b""
    if agreed(seen != written):
        raise Problem(
            f"{folder} is not the same folder for all processes. Give them an --out on "
            "a disk that they share."
        )
    if jax.process_index() == 0:
        path.unlink()


def gather(x):
    """Return what each process has, in their order."""
    return np.reshape(multihost_utils.process_allgather(x), (-1, *x.shape))


class Checkpoints:
    """The Orbax checkpoints of one run: arrays, rows, and what they belong to."""

    def __init__(self, folder, config):
        """Open the folder, creating it if need be."""
        self.folder, self.config = folder.absolute(), config
        # Orbax reports on itself at length; what matters is raised.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step, state, rows):
        """Write a checkpoint beside the last one, unless this step has one."""
        if step == self.manager.latest_step():
            return
        about = dict(config=self.config, rows=rows, digest=_digest(_whole(state)))
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
                ),
            )
        except Exception as error:
            raise Problem(
                f"cannot save a checkpoint in {self.folder}: {_line(error)} The one "
                "before it is whole; mend the cause, then --resume."
            ) from error

    def restore(self, state):
        """Return step, state and rows of the last checkpoint; of none, the start."""
        step = self.manager.latest_step()
        if step is None:
            return 0, state, []
        where = self.folder / str(step)
        try:
            about = self.manager.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )["about"]
            if about["config"] != self.config:
                raise Problem(f"{where} belongs to another run. Use another --out.")
            state = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state))
            )["state"]
            if about["digest"] != _digest(_whole(state)):
                raise ValueError("its arrays are not those that were saved")
        except Problem:
            raise
        except Exception as error:
            raise Problem(
                f"checkpoint {where} is damaged: {_line(error)} Delete that folder, "
                "and --resume goes on from the one before it."
            ) from error
        return step, state, about["rows"]


def _digest(tree):
    arrays = jax.tree.leaves(jax.device_get(tree))
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()


def _whole(state):
    """Return a state whose parts several processes have."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(state, tiled=True)
    return state


def _line(error):
    text = str(error).strip().splitlines() or ["no details"]
    return f"{type(error).__name__}: {text[0][:200]}."


def write_metrics(path, rows):
    """Write the rows as CSV."""
    names = dict.fromkeys([*METRICS, *(name for row in rows for name in row)])
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_curves(path, rows):
    """Draw loss and held-out accuracy against epochs, one line an optimizer."""
    with picture(path, "A GRU reading handwritten digits row by row", 2) as both:
        loss, accuracy = both
        plots.training_curves(loss, rows, "loss")
        plots.training_curves(accuracy, rows, "accuracy")
        loss.set(ylabel="training loss [nats]", yscale="log")
        accuracy.set(ylabel="held-out accuracy")
        accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
        for axes in both:
            axes.xaxis.get_major_locator().set_params(integer=True)


def write_diagnostics(path, rows, histogram, eps):
    """Draw what RMSProp did: rates and sizes of steps by layer, its denominators."""
    with picture(path, "What RMSProp did", 3) as (rates, ratios, denominators):
        plots.per_layer(rates, rows)
        plots.per_layer(ratios, rows, "update_ratio")
        ratios.set(ylabel="RMS of the update / RMS of the array")
        plots.denominator(denominators, histogram, eps=eps)


@contextlib.contextmanager
def picture(path, title, count):
    """Give so many axes beside each other, which are written once they are drawn."""
    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    all_axes: Any = figure.subplots(1, count)
    yield all_axes
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


@contextlib.contextmanager
def replacing(path):
    """Give a file to write that takes the place of path once it is complete."""
    temporary = path.with_name(f".{path.name}")
    yield temporary
    os.replace(temporary, path)
