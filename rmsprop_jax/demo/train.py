"""Training loop, written as for one device but run on the devices of all processes."""

import functools
import logging
import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from rmsprop_jax import diagnostics, sharding
from rmsprop_jax.demo import data, report
from rmsprop_jax.demo.cli import RMSPROP

# Orbax logs, with tracebacks, the errors that it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def compile_steps(options, name, tx):
    """Return a state, the compiled `step` and `measure`, and shardings of batches."""
    training, held_out = data.load()
    mesh = Mesh(jax.devices(), ("data",))
    shards = NamedSharding(mesh, PartitionSpec("data"))
    graph = nnx.graphdef(nnx.eval_shape(lambda: data.Reader(nnx.Rngs(0))))

    def init():
        params = nnx.to_pure_dict(nnx.state(data.Reader(nnx.Rngs(options.seed))))
        return {"params": params, "opt": tx.init(params)}

    def loss_fn(params, images, labels):
        logits = nnx.merge(graph, nnx.State(params))(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits.argmax(-1) == labels).mean()

    shardings = replicated = NamedSharding(mesh, PartitionSpec())
    if options.zero:
        spread, _ = sharding.zero(jax.eval_shape(init)["opt"], mesh, "data")
        shardings = {"params": replicated, "opt": spread}

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, replicated))
    def step(state, images, labels):
        grads, _ = jax.grad(loss_fn, has_aux=True)(state["params"], images, labels)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, updates

    @jax.jit
    def measure(state, updates, rate):
        loss, _ = loss_fn(state["params"], *training)
        _, accuracy = loss_fn(state["params"], *held_out)
        row = dict(learning_rate=rate, loss=loss, accuracy=accuracy)
        if name == "rmsprop":
            inputs = updates, state["opt"], state["params"], rate
            row |= diagnostics.metrics(*inputs, eps=options.eps, per_layer=True)
        return row

    return jax.jit(init, out_shardings=shardings)(), step, measure, shards


def train(options, name, optimizer, peak, stop):
    """Train with one optimizer, resuming from its last checkpoint if there is one.

    Saves a checkpoint after each epoch, and stops there when the event `stop` is set.
    Returns whether all epochs are done.
    """
    (images, labels), _ = data.load()
    per_epoch = len(labels) // options.batch_size
    steps = options.epochs * per_epoch
    schedule = optax.cosine_decay_schedule(options.learning_rate or peak, steps)
    settings = RMSPROP if name == "rmsprop" else ()
    tx = optimizer(schedule, **{x: getattr(options, x) for x in settings})
    state, step, measure, shards = compile_steps(options, name, tx)
    place = jax.make_array_from_process_local_data

    folder = options.out.absolute() / "checkpoints" / name
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    checkpoints = ocp.CheckpointManager(folder, options=keep)
    start = checkpoints.latest_step() or 0
    try:
        if start:
            like = ocp.args.StandardRestore(state)  # With its shardings.
            state = checkpoints.restore(start, args=like)
    except Exception as error:
        fix = "delete it to use the one before"
        reason = f"cannot restore {folder / str(start)}; {fix}. {str(error)[:200]}"
        raise ValueError(reason) from error
    # Rows are written before checkpoints, so the file may be ahead of them.
    rows = report.read_metrics(options.out)
    rows = [x for x in rows if x["optimizer"] != name or int(x["epoch"]) <= start]

    first, epoch, done = jax.process_index() == 0, start, start * per_epoch
    hide = None if first else True  # None hides the bar if there is no terminal.
    bar = tqdm(total=steps, initial=done, desc=name, disable=hide)
    for i in range(done, steps):
        batch = data.batch(images, labels, options.batch_size, options.seed, i)
        state, updates = step(state, *[place(shards, x, x.shape) for x in batch])
        if i == done:
            bar.unpause()  # Leaves out the time in which the step compiled.
        bar.update()
        epoch, remainder = divmod(i + 1, per_epoch)
        if remainder:
            continue

        row = measure(state, updates, schedule(i))
        row = {key: np.asarray(value).item() for key, value in row.items()}
        rows.append(dict(optimizer=name, epoch=epoch, step=i + 1) | row)
        if first:
            report.write_metrics(options.out, rows)
            result = "loss {loss:.3g}, accuracy {accuracy:.1%}".format(**row)
            tqdm.write(f"{name} {epoch}: {result}", file=sys.stderr)
        checkpoints.save(epoch, args=ocp.args.StandardSave(state))
        # All processes stop after the same epoch.
        if np.any(process_allgather(np.array(stop.is_set()))):
            break
    bar.close()
    if name == "rmsprop":
        # Wait: other processes may still be reading from the devices of this one.
        histogram = jax.block_until_ready(diagnostics.histogram(state["opt"]))
        if first:
            report.draw_diagnostics(options.out, rows, histogram, options.eps)
    if first:
        report.draw_curves(options.out, rows)
    return epoch >= options.epochs
