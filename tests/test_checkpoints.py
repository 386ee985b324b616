"""State is saved, moved to other devices and read by later versions unchanged."""

import base64
import pickle
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import from_bytes
from helpers import (
    SMALL,
    SPECS,
    halving,
    mesh_of,
    normal,
    through_flax,
    through_orbax,
    through_pickle,
    together,
    types,
)
from jax.sharding import NamedSharding, SingleDeviceSharding

from rmsprop_jax import RMSPropState, rmsprop

BOTH = dict(centered=True, momentum=0.9)
# The rate follows the count, so a count that is lost shows.
TX = together([rmsprop(halving), rmsprop(halving, **BOTH, **SMALL)])


def make(seed):
    """Return a tree of bfloat16, complex64 and float32 leaves, one of them large."""
    tree = normal(seed, ("bfloat16", "complex64", "float32"))
    tree["vector"] *= jnp.complex64(1 + 2j)
    return tree | dict(large=jnp.full((64, 64), jnp.float32(seed)))


def bits(tree):
    # The structure too: a named tuple equals any tuple of the same fields.
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.dtype.name, x.shape, np.asarray(x).tobytes()) for x in leaves]


@pytest.mark.parametrize("through", [through_orbax, through_flax, through_pickle])
def test_a_run_resumes_with_the_same_bits(through, tmp_path):
    state, target = TX.init(make(0)), TX.init(make(9))
    for seed in (1, 2, 3):
        _, state = TX.update(make(seed), state)
    back = through(state, target, tmp_path)
    assert bits(back) == bits(state)
    assert bits(TX.update(make(4), back)) == bits(TX.update(make(4), state))


def shardings(count):
    """Return shardings on the last devices: not on the default one."""
    if count == 1:
        return dict.fromkeys(SPECS, SingleDeviceSharding(jax.devices()[-1]))
    mesh = mesh_of(count // 2, 2, first=8 - count)
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


@pytest.mark.parametrize(("before", "after"), [(8, 4), (8, 1), (1, 8)])
def test_orbax_moves_a_state_to_other_devices(before, after, tmp_path):
    tx = rmsprop(halving, **BOTH)
    grads, moved = (jax.device_put(normal(0), shardings(n)) for n in (before, after))
    _, saved = tx.update(grads, tx.init(grads))
    # From eval_shape it would have no shardings, and Orbax would take the saved ones.
    target = tx.init(moved)
    back = through_orbax(saved, target, tmp_path)
    assert bits(back) == bits(saved)
    assert types(back) == types(tx.update(moved, back)[1]) == types(target)


# The state below as version 0.1.0 wrote it with flax.serialization and with pickle,
# compressed. They stay as they are, because users have such files.
FLAX, PICKLE = """
eNprWZqcX5pXcpyPcfKEpZl5JcZGR1jYGRgYFuWVNi0sPy7KOHki0/K0nPxEkAwHUMKegaGBeWHVDaB6uDgLUMxu
US4OHfsYGBwcFlYdFwNqWZmcn1uQk1phZgKSagAaxnBgaUlRYnIqdr0NQHwQq16wQxwAqV5CMg==

eNqNj8tKw0AUhmfSxhYRF4K668JVu8mqCxeihe4MBmkfIEzTlKmYC5MJGkGIC9HC2fX4OqJP5CPomURQMEIHZpjL
x/f/U7ZfPjirBuyrKEtVkvpX4tbRSsTZIlERws7kYnpJ91MtdIhr7MNBnEdp4fhBokInyq/1UiglCkJ9FQZJnGmV
B5pQsCsSoRPPa2SNLnvEMZ/hE06w7/KB3AJ7rovUqMFaDnH1XD+1gJ+g53nnnzSqxWUaZ6txu0N1kbb31IXfoLRl
11jl9rfTteiwC9bil0zuNam6ZDpjrGwZHfC7v66B7FEiIacGySlSHjYH9mrdK2OjkWHlUYOMWgXHG7QqqRV72zCy
pPn+b+Tw55tVr1zjAzpf9Bq4fg==
""".split("\n\n")


def test_versions_read_the_states_of_each_other():
    tx = rmsprop(0.1, **BOTH)
    today = tx.init(dict(w=jnp.ones(2), z=jnp.complex64(1)))
    flax, pickled = (zlib.decompress(base64.b64decode(x)) for x in (FLAX, PICKLE))
    expected = RMSPropState(
        count=jnp.int32(7),
        nu=dict(w=jnp.float32([0.5, 2.0**-120]), z=jnp.float32(0.25)),
        mu=dict(w=jnp.float32([-0.125, 3.0]), z=jnp.complex64(1 - 2j)),
        trace=dict(w=jnp.float32([-0.0, -8.0]), z=jnp.complex64(0.5 + 4j)),
    )
    for state in (from_bytes(today, flax), pickle.loads(pickled)):
        assert bits(state) == bits(expected)
        assert types(tx.update(state.mu, state)[1]) == types(today)
    # Protocol 2 spells a class out: module, line feed, name.
    pickled = pickle.dumps(rmsprop(0.1, nu_dtype="uint8").init([]), protocol=2)
    for name in (b"transform\nRMSPropState\n", b"storage\nQuantized\n"):
        assert b"crmsprop_jax." + name in pickled
