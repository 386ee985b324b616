"""A state is saved, moved to other devices and read by later versions unchanged."""

import base64
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from test_contract import assert_close, halving, normal
from test_contract_mesh import SPECS

from rmsprop_jax import RMSPropState, rmsprop

BOTH = dict(centered=True, momentum=0.9)
MIXED = ("bfloat16", "complex64", "float32")


def begin(tx, params):
    return dict(params=params, state=tx.init(params))


def train(tx, run, seeds):
    """Take steps of known gradients; they go where the parameters are."""
    params, state = run["params"], run["state"]
    for seed in seeds:
        # A phase, so that an imaginary part that is lost shows.
        grads = jax.tree.map(
            lambda g, p: g.astype(p.dtype) * (1 + 2j if p.dtype.kind == "c" else 1),
            normal(seed),
            params,
        )
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return dict(params=params, state=state)


def bits(tree):
    # The structure too: a named tuple equals any tuple of the same fields.
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.dtype.name, x.shape, np.asarray(x).tobytes()) for x in leaves]


def avals(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.dtype.name, x.shape) for x in leaves]


def through_orbax(saved, target, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "run", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "run", target)


def through_flax(saved, target, _):
    return flax.serialization.from_bytes(target, flax.serialization.to_bytes(saved))


def through_pickle(saved, *_):
    return pickle.loads(pickle.dumps(saved))


@pytest.mark.parametrize("way", [through_orbax, through_flax, through_pickle])
@pytest.mark.parametrize(
    ("options", "dtypes"),
    [({}, ("float32",) * 3), (BOTH, ("float32",) * 3), ({}, MIXED), (BOTH, MIXED)],
    ids=["plain", "centered_momentum", "plain_mixed", "centered_momentum_mixed"],
)
def test_training_goes_on_with_the_same_bits(options, dtypes, way, tmp_path):
    # The rate follows the count, so a count that is lost shows.
    tx, params = rmsprop(halving, **options), normal(0, dtypes)
    undisturbed = train(tx, begin(tx, params), range(1, 7))
    saved = train(tx, begin(tx, params), range(1, 4))
    back = way(saved, begin(tx, normal(9, dtypes)), tmp_path)
    assert bits(back) == bits(saved)
    assert bits(train(tx, back, range(4, 7))) == bits(undisturbed)


def shardings(count):
    """Return shardings on the last so many devices: not on those that are default."""
    devices = jax.devices()[-count:]
    if count == 1:
        return dict.fromkeys(SPECS, SingleDeviceSharding(*devices))
    mesh = Mesh(np.array(devices).reshape(-1, 2), ("x", "y"))
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


@pytest.mark.parametrize(("before", "after"), [(8, 4), (8, 2), (8, 1), (1, 8)])
@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
def test_orbax_moves_a_state_to_other_devices(before, after, abstract, tmp_path):
    tx = rmsprop(halving, **BOTH)
    params = jax.device_put(normal(0), shardings(before))
    saved = train(tx, begin(tx, params), (1, 2, 3))
    wanted = shardings(after)

    # The recipe: what init returns for parameters on the new devices is the target.
    # From eval_shape it would have no shardings, and Orbax would take the saved ones.
    target = begin(tx, jax.device_put(normal(9), wanted))
    if abstract:
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            target,
        )
    back = through_orbax(saved, target, tmp_path)

    assert bits(back) == bits(saved)
    later = train(tx, back, (4,))
    assert_close(later, train(tx, saved, (4,)), rtol=5e-7)
    state = RMSPropState(wanted["scalar"], wanted, wanted, wanted)
    expected = dict(params=wanted, state=state)
    same = lambda x, s: x.sharding.is_equivalent_to(s, x.ndim)  # noqa: E731
    for run in (back, later):
        assert jax.tree.all(jax.tree.map(same, run, expected))


# The leaves for parameters b, bfloat16 [2]; c, complex64 []; f, float32 [3, 1].
COUNT, NO_MU, NO_TRACE = [".count int32[]"], [".mu None"], [".trace None"]
NU = [".nu['b'] float32[2]", ".nu['c'] float32[]", ".nu['f'] float32[3, 1]"]
MU = [".mu['b'] float32[2]", ".mu['c'] complex64[]", ".mu['f'] float32[3, 1]"]
TRACE = [
    ".trace['b'] float32[2]",
    ".trace['c'] complex64[]",
    ".trace['f'] float32[3, 1]",
]


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, COUNT + NU + NO_MU + NO_TRACE),
        (dict(momentum=0.9), COUNT + NU + NO_MU + TRACE),
        (dict(centered=True), COUNT + NU + MU + NO_TRACE),
        (BOTH, COUNT + NU + MU + TRACE),
    ],
    ids=["plain", "momentum", "centered", "centered_momentum"],
)
def test_the_leaves_of_a_state_are_frozen(options, frozen):
    params = dict(b=jnp.ones(2, "bfloat16"), c=jnp.complex64(1), f=jnp.ones((3, 1)))
    state = rmsprop(0.1, **options).init(params)
    # Flattened, an absent buffer would have no row, whether it is None or ().
    absent = lambda x: x is None  # noqa: E731
    found = jax.tree_util.tree_flatten_with_path(state, is_leaf=absent)[0]
    rows = [
        jax.tree_util.keystr(k) + (" None" if x is None else f" {x.dtype}{[*x.shape]}")
        for k, x in found
    ]
    assert rows == frozen


def test_pickle_finds_the_state_where_it_always_was():
    # Protocol 2 spells the class out: module, line feed, name.
    pickled = pickle.dumps(rmsprop(0.1).init([]), 2)
    assert b"crmsprop_jax.transform\nRMSPropState\n" in pickled


def known():
    """Return the state of {"w": float32 [2], "z": complex64 []} that is kept below."""
    real, signed = np.float32, np.complex64
    return RMSPropState(
        count=np.array(7, np.int32),
        nu=dict(w=np.array([0.5, 2.0**-120], real), z=np.array(0.25, real)),
        mu=dict(w=np.array([-0.125, 3.0], real), z=np.array(1 - 2j, signed)),
        trace=dict(w=np.array([-0.0, -8.0], real), z=np.array(0.5 + 4j, signed)),
    )


def kept():
    """Return the two strings below, which stay as made: users have such files."""
    written = flax.serialization.to_bytes(known()), pickle.dumps(known(), 4)
    return [base64.b64encode(x).decode() for x in written]


FLAX = """
hKVjb3VudMcOAZOQpWludDMyxAQHAAAAom51gqF3xxUBk5ECp2Zsb2F0MzLECAAAAD8AAIADoXrYAZOQp2Zsb2F0
MzLEBAAAgD6ibXWCoXfHFQGTkQKnZmxvYXQzMsQIAAAAvgAAQEChescWAZOQqWNvbXBsZXg2NMQIAACAPwAAAMCl
dHJhY2WCoXfHFQGTkQKnZmxvYXQzMsQIAAAAgAAAAMGhescWAZOQqWNvbXBsZXg2NMQIAAAAPwAAgEA=
"""
PICKLE = """
gASV7wEAAAAAAACMFXJtc3Byb3BfamF4LnRyYW5zZm9ybZSMDFJNU1Byb3BTdGF0ZZSTlCiMFm51bXB5Ll9jb3Jl
Lm11bHRpYXJyYXmUjAxfcmVjb25zdHJ1Y3SUk5SMBW51bXB5lIwHbmRhcnJheZSTlEsAhZRDAWKUh5RSlChLASlo
BowFZHR5cGWUk5SMAmk0lImIh5RSlChLA4wBPJROTk5K/////0r/////SwB0lGKJQwQHAAAAlHSUYn2UKIwBd5Ro
BWgISwCFlGgKh5RSlChLAUsChZRoDowCZjSUiYiHlFKUKEsDaBJOTk5K/////0r/////SwB0lGKJQwgAAAA/AACA
A5R0lGKMAXqUaAVoCEsAhZRoCoeUUpQoSwEpaB6JQwQAAIA+lHSUYnV9lChoF2gFaAhLAIWUaAqHlFKUKEsBSwKF
lGgeiUMIAAAAvgAAQECUdJRiaCJoBWgISwCFlGgKh5RSlChLASloDowCYziUiYiHlFKUKEsDaBJOTk5K/////0r/
////SwB0lGKJQwgAAIA/AAAAwJR0lGJ1fZQoaBdoBWgISwCFlGgKh5RSlChLAUsChZRoHolDCAAAAIAAAADBlHSU
YmgiaAVoCEsAhZRoCoeUUpQoSwEpaDSJQwgAAAA/AACAQJR0lGJ1dJSBlC4=
"""


@pytest.mark.parametrize("written", [FLAX, PICKLE], ids=["flax", "pickle"])
def test_what_version_0_1_0_wrote_is_read(written):
    tx = rmsprop(0.1, **BOTH)
    today = jax.eval_shape(tx.init, dict(w=jnp.ones(2), z=jnp.complex64(1)))
    content = base64.b64decode(written)
    if written is FLAX:
        state = flax.serialization.from_bytes(today, content)
    else:
        state = pickle.loads(content)
    assert avals(state) == avals(today)
    assert bits(state) == bits(known())
    _, later = tx.update(state.mu, state)
    assert avals(later) == avals(today)
    assert int(later.count) == 8
