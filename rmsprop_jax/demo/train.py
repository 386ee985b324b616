"""Training loop, written as for one device but run on the devices of all processes."""

import functools
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from rmsprop_jax import diagnostics, sharding
from rmsprop_jax.demo import data, report
from rmsprop_jax.demo.checkpoints import Checkpoints
from rmsprop_jax.demo.config import OPTIMIZERS


def make_optimizer(config, name, steps):
    """Create the optimizer and its schedule."""
    optimizer, peak = OPTIMIZERS[name]
    if config.learning_rate is not None:
        peak = config.learning_rate
    schedule = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(peak, steps)
    elif config.schedule == "warmup_cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
    return optimizer(schedule, **config.rmsprop if name == "rmsprop" else {}), schedule


def make_steps(config, tx, mesh):
    """Create the initial state and the compiled functions `step` and `evaluate`."""
    training, held_out = data.load()
    graph, params = nnx.split(data.Reader(nnx.Rngs(config.seed)))
    # Process 0 decides, because the others may draw different numbers.
    params = multihost_utils.broadcast_one_to_all(nnx.to_pure_dict(params))

    params = put(params, replicated := NamedSharding(mesh, PartitionSpec()))
    shapes = jax.eval_shape(tx.init, params)
    spread = sharding.zero(shapes, mesh, "data")[0] if config.zero else replicated
    state = {"params": params, "opt": jax.jit(tx.init, out_shardings=spread)(params)}
    shardings = {"params": replicated, "opt": spread}

    def loss_fn(params, images, labels):
        logits = nnx.merge(graph, nnx.State(params))(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits.argmax(-1) == labels).mean()

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, replicated))
    def step(state, images, labels):
        grads, _ = jax.grad(loss_fn, has_aux=True)(state["params"], images, labels)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, updates

    @jax.jit
    def evaluate(params):
        return loss_fn(params, *training)[0], loss_fn(params, *held_out)[1]

    return state, step, evaluate


def train(config, name, out, stop):
    """Train with one optimizer, resuming from its last checkpoint if there is one.

    Writes metrics, checkpoints and diagnostics into the folder `out`; saves and stops
    when the event `stop` is set. Returns whether all epochs are done.
    """
    (images, labels), _ = data.load()
    per_epoch = len(labels) // config.batch_size
    steps = config.epochs * per_epoch
    mesh = Mesh(jax.devices(), ("data",))
    tx, schedule = make_optimizer(config, name, steps)
    state, step, evaluate = make_steps(config, tx, mesh)
    checkpoints = Checkpoints(out / "checkpoints" / name)
    done, state = checkpoints.restore(state)
    # Rows are written before checkpoints, so the file may be ahead of them.
    rows = report.read_metrics(out)
    rows = [x for x in rows if x["optimizer"] != name or int(x["step"]) <= done]

    first = jax.process_index() == 0
    hidden = not first
    with tqdm(total=steps, initial=done, desc=name, unit="step", disable=hidden) as bar:
        while done < steps and not any_process(stop.is_set()):
            batch = data.batch(images, labels, config.batch_size, config.seed, done)
            batch = put(batch, NamedSharding(mesh, PartitionSpec("data")))
            state, updates = step(state, *batch)
            done += 1
            bar.update()
            if done % per_epoch == 0:
                rate: Any = schedule(done - 1)
                loss, accuracy = evaluate(state["params"])
                row = dict(learning_rate=rate, loss=loss, accuracy=accuracy)
                if name == "rmsprop":
                    trees = updates, state["opt"], state["params"]
                    options = dict(eps=config.eps, per_layer=True)
                    row |= diagnostics.metrics(*trees, rate, **options)
                row = {key: np.asarray(value).item() for key, value in row.items()}
                epoch = done // per_epoch
                rows.append(dict(optimizer=name, epoch=epoch, step=done) | row)
                if first:
                    report.write_metrics(out, rows)
                    bar.set_postfix(loss=row["loss"], accuracy=row["accuracy"])
                checkpoints.save(done, state)
    checkpoints.save(done, state)
    if name == "rmsprop" and rows:
        histogram = jax.device_get(diagnostics.histogram(state["opt"]))
        if first:
            report.draw_diagnostics(out, rows, histogram, config.eps)
    return done >= steps


def put(tree, sharding):
    """Place arrays that every process holds on the devices of all processes."""
    place = jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: place(sharding, x, np.shape(x)), tree)


def any_process(flag):
    """Return whether any process set the flag, so that all stop at the same step."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
