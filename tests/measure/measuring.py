"""Shared by the programs in this folder: options, one step, timing, tables."""

import time

import jax
import jax.numpy as jnp
import optax

MOMENTUM = dict(momentum=0.9)
BFLOAT16, UINT8 = dict(nu_dtype=jnp.bfloat16), dict(nu_dtype=jnp.uint8)
BFLOAT16_MOMENTUM = MOMENTUM | dict(momentum_dtype=jnp.bfloat16)


def step_of(tx):
    """Return the function of one step, from parameters and state to new ones."""

    def step(held, grads):
        params, state = held
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def timed(run):
    """Return the result of a call and its seconds, until all arrays are ready."""
    begun = time.perf_counter()
    result = jax.block_until_ready(run())
    return result, time.perf_counter() - begun


def heads(*cells):
    """Begin a Markdown table."""
    row(*cells)
    print(len(cells) * "|---" + "|")


def row(*cells):
    """Print a row of a Markdown table as soon as it is known."""
    print("|", " | ".join(cells), "|", flush=True)
