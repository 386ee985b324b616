"""The experiments of notebook 2: tuning and training. `tasks.py` has the tasks.

Every comparison follows one protocol. Each optimizer's learning rate is tuned on a few
seeds over powers of ten and then over steps of a fifth of a decade around the best of
them. Then the optimizer is trained with other seeds at that rate. A run's score is the
logarithm of its mean loss over the last steps. Two optimizers are compared by the
differences of their scores seed by seed, because runs with the same seed start from the
same parameters and see the same batches.
"""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from rmsprop_jax import rmsprop

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that everything runs
DECADES = 10.0 ** np.arange(-5, 3)
REFINED = 10.0 ** (np.array([-4, -3, -2, -1, 1, 2, 3, 4]) / 5)
WORST = 100.0  # a run with a larger loss has diverged, and counts as this
SOLVED = 1e-12  # a smaller loss counts as this


class Runs(NamedTuple):
    """What an optimizer did at its best learning rate."""

    rate: float
    losses: np.ndarray  # [seed, step]
    scores: np.ndarray  # [seed], log of the mean loss over the last steps


OPTIMIZERS = {
    "SGD": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    # As published, the sum starts at 0. Optax's default of 0.1 hides the division.
    "Adagrad": functools.partial(optax.adagrad, initial_accumulator_value=0.0),
    "RMSProp": rmsprop,
    "Adam": optax.adam,
}


def clipped(make):
    """Return the optimizer with gradients clipped to norm 1."""

    def clipped_make(rate):
        return optax.chain(optax.clip_by_global_norm(1.0), make(rate))

    return clipped_make


def decayed(make, steps):
    """Return the optimizer with its learning rate decayed to 0 along a cosine."""

    def decayed_make(rate):
        return make(optax.cosine_decay_schedule(rate, steps))

    return decayed_make


def train(task, optimizers, rates, seeds, steps):
    """Train with each optimizer and run; return losses [optimizer, run, step].

    Args:
      task: a Task.
      optimizers: functions from a learning rate to a gradient transformation.
      rates: learning rates [optimizer, run].
      seeds: the seed of each run, the same for all optimizers.
      steps: how many steps.
    """
    losses = _train(
        task[:3],
        tuple(optimizers),
        steps,
        task.data,
        jnp.asarray(rates, jnp.float32),
        jnp.asarray(seeds),
    )
    losses = np.nan_to_num(np.asarray(losses), nan=WORST, posinf=WORST)
    return np.minimum(losses, WORST)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(functions, optimizers, steps, data, rates, seeds):
    init, make_batch, loss_fn = functions

    def one_run(rates, seed):
        start_key, batch_key = jax.random.split(jax.random.key(seed))
        # One vector of parameters for each optimizer: less to compile.
        start, unravel = ravel_pytree(init(start_key))
        made = [make(rate) for make, rate in zip(optimizers, rates, strict=True)]

        def one_step(carry, i):
            params, states = carry
            batch = make_batch(data, jax.random.fold_in(batch_key, i), i)
            loss = jax.value_and_grad(lambda p: loss_fn(unravel(p), batch))
            losses, grads = jax.vmap(loss)(params)
            moved = [
                optimizer.update(*of_one)
                for optimizer, *of_one in zip(made, grads, states, params, strict=True)
            ]
            updates, states = zip(*moved, strict=True)
            return (params + jnp.stack(updates), states), losses

        params = jnp.stack([start] * len(made))
        states = tuple(optimizer.init(start) for optimizer in made)
        return jax.lax.scan(one_step, (params, states), jnp.arange(steps))[1]

    losses = jax.vmap(one_run, in_axes=(1, 0))(rates, seeds)  # [run, step, optimizer]
    return losses.transpose(2, 0, 1)


def scores(losses, last):
    """Return the log of the mean of the last losses."""
    return np.log(np.maximum(losses[..., -last:].mean(-1), SOLVED))


def compare(task, optimizers, steps, last=50, tuned_on=5):
    """Tune each optimizer and run it with other seeds; return {name: Runs}.

    Args:
      task: a Task.
      optimizers: {name: function from a learning rate to a gradient transformation}.
      steps: how many steps.
      last: how many of the last losses count.
      tuned_on: how many seeds the rate is tuned on; eight times as many are reported.
    """
    if QUICK:
        steps, tuned_on = max(2, steps // 20), 1
    # One compiled program does it all, because reporting takes as many runs as tuning.
    reported = tuned_on * len(DECADES)
    makes = optimizers.values()
    tried, their_scores = [], []
    rates = np.broadcast_to(DECADES, (len(optimizers), len(DECADES)))
    seeds = np.tile(np.arange(tuned_on), len(DECADES))
    for _ in ("powers of ten", "around the best"):
        losses = train(task, makes, np.repeat(rates, tuned_on, 1), seeds, steps)
        of_seeds = scores(losses, last).reshape(*rates.shape, tuned_on)
        tried, their_scores = [*tried, rates], [*their_scores, of_seeds.mean(-1)]
        best = np.concatenate(their_scores, 1).argmin(1)
        best = np.take_along_axis(np.concatenate(tried, 1), best[:, None], 1)
        rates = best * REFINED
    seeds = 1000 + np.arange(reported)
    losses = train(task, makes, np.repeat(best, reported, 1), seeds, steps)
    return {
        name: Runs(rate, of_one, scores(of_one, last))
        for name, rate, of_one in zip(optimizers, best[:, 0], losses, strict=True)
    }


def trace(task, make, rate, seeds, steps):
    """Return parameters, gradients and updates [seed, step, parameter] of runs."""

    @jax.jit
    @jax.vmap
    def one_run(seed):
        start_key, batch_key = jax.random.split(jax.random.key(seed))
        start, unravel = ravel_pytree(task.init(start_key))
        optimizer = make(rate)

        def one_step(carry, i):
            params, state = carry
            batch = task.batch(task.data, jax.random.fold_in(batch_key, i), i)
            grads = jax.grad(lambda p: task.loss(unravel(p), batch))(params)
            updates, state = optimizer.update(grads, state, params)
            return (params + updates, state), (params, grads, updates)

        start = (start, optimizer.init(start))
        return jax.lax.scan(one_step, start, jnp.arange(steps))[1]

    return [np.asarray(x) for x in one_run(jnp.asarray(seeds))]


def respond(make, gradients):
    """Return the updates of one parameter that receives these gradients [step]."""
    optimizer = make(1.0)

    def step(state, gradient):
        update, state = optimizer.update(gradient, state, jnp.float32(0))
        return state, update

    gradients = jnp.asarray(gradients, jnp.float32)
    return np.asarray(jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1])
