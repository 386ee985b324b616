"""Shared by the tests: configurations, random trees, comparisons."""

import copy
import pickle
import re
from functools import partial

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rmsprop_jax import rmsprop, scale_by_rms, storage


def halving(count):
    """A schedule: 0.1, halved at every step."""
    return 0.1 * 0.5 ** jnp.asarray(count, jnp.float32)


def on_matrices(params):
    """A weight decay mask: True for leaves of rank 2 and more."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


OPTIONS = {
    "plain": {},
    "eps_outside": dict(eps_in_sqrt=False),
    "centered": dict(centered=True),
    "momentum": dict(momentum=0.9),
    "nesterov": dict(momentum=0.9, nesterov=True),
    "centered_momentum": dict(centered=True, momentum=0.9),
    "lr_outside_momentum": dict(momentum=0.9, lr_in_momentum=False),
    "l2": dict(l2=1e-2),
    "weight_decay": dict(weight_decay=1e-2, weight_decay_mask=on_matrices),
    "bias_correction": dict(bias_correction=True),
    "scheduled": dict(learning_rate=halving),
}
TABLE = {
    name: partial(rmsprop, **{"learning_rate": 0.1, **options})
    for name, options in OPTIONS.items()
} | {
    "scale_by_rms": partial(scale_by_rms),
    "scale_by_rms_centered": partial(scale_by_rms, centered=True),
}
# How nu is averaged, and where eps is added.
CORES = [
    form | dict(eps_in_sqrt=x)
    for form in (dict(), dict(centered=True), dict(bias_correction=True))
    for x in (True, False)
]
direct_and_jit = pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit], ids=["direct", "jit"]
)

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "/compile/" in event else None
)


def programs(f, *args, **kwargs):
    """Return how many programs are compiled in a call."""
    before = len(COMPILED)
    f(*args, **kwargs)
    return sum("backend_compile" in event for event in COMPILED[before:])


def draw(seed, shapes, dtypes=None):
    """Return a random tree of arrays with these shapes; float32 unless told."""
    random = np.random.default_rng(seed)
    dtypes = dtypes or ["float32"] * len(shapes)
    return {
        name: jnp.asarray(random.normal(size=shape), dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }


def normal(seed, dtypes=None):
    """Return a random tree of a matrix (8, 4), a vector (8,) and a scalar."""
    return draw(seed, dict(matrix=(8, 4), vector=(8,), scalar=()), dtypes)


def run(tx, params, update=None, steps=3):
    """Return parameters and state after a few steps with known gradients."""
    state = tx.init(params)
    for seed in range(1, steps + 1):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), normal(seed), params)
        updates, state = (update or tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def together(txs):
    """Combine transformations into one of tuples, which compiles as one program."""
    txs = tuple(txs)

    def update(grads, states, params=None):
        pairs = (tx.update(grads, x, params) for tx, x in zip(txs, states, strict=True))
        return tuple(zip(*pairs, strict=True))

    return optax.GradientTransformation(lambda p: tuple(x.init(p) for x in txs), update)


def scan(tx, grads, params=None):
    """Return all updates and all states for trees of [steps, ...], in one program."""

    @jax.jit
    def run(grads, params):
        def step(state, row):
            updates, state = tx.update(row[0], state, row[1])
            return state, (updates, state)

        first = jax.tree.map(lambda x: x[0], grads)
        return jax.lax.scan(step, tx.init(first), (grads, params))[1]

    return run(grads, params)


def types(tree):
    """Return the shape, dtype, weak type and sharding of each leaf."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), tree)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def assert_close(tree, other, rtol=2e-6, atol=1e-7, err_msg=""):
    # A few float32 ulp a step: compilers fuse multiply and add as they like.
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=atol, err_msg=err_msg)
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(close, tree, other)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def refusal(*words):
    """Expect a ValueError whose message has these words in this order."""
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, words)))


def mesh_of(*sizes, kind=AxisType.Auto, first=0):
    """Return a mesh of the 8 CPU devices with the axes data and model."""
    devices = np.array(jax.devices()[first : first + np.prod(sizes)]).reshape(sizes)
    names = ("data", "model")[: len(sizes)]
    return Mesh(devices, names, axis_types=(kind,) * len(sizes))


# jax.set_mesh was called use_mesh until JAX 0.8.
set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
SPECS = dict(matrix=P("data", "model"), vector=P("model"), scalar=P())


def on_mesh(seed, kind=AxisType.Auto):
    """Return `normal(seed)` sharded over a mesh of 4 x 2."""
    mesh = mesh_of(4, 2, kind=kind)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    return jax.device_put(normal(seed), where)


def through_orbax(state, target, folder):
    """Save a state with Orbax and restore it into a target."""
    with ocp.StandardCheckpointer() as disk:
        disk.save(folder / "state", state)
        disk.wait_until_finished()
        return disk.restore(folder / "state", target)


def through_flax(state, target, folder):
    """Serialize a state with Flax and restore it into a target."""
    return flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))


def through_pickle(state, target, folder):
    """Restore a copy of a state from a pickle."""
    return copy.deepcopy(pickle.loads(pickle.dumps(state)))


SMALL = dict(nu_dtype="uint8", momentum_dtype="bfloat16")


@partial(jax.jit, static_argnames="steps")
def read_back(x, old, steps):
    """Return the values of x as they are stored, like `old`, in each of these steps."""
    encode = lambda t: storage.decode(storage.encode_dithered(x, old, t))
    return jax.vmap(encode)(jnp.arange(1, steps + 1))


def assert_within_an_ulp(state, other):
    """Compare stored states: a float32 ulp may become one of a smaller format."""
    ulp = dict(float32=(1e-6, 1e-7), bfloat16=(0.01, 1e-7), uint8=(0, 1), int32=(0, 0))
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for pair in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        rtol, atol = ulp[pair[0].dtype.name]
        values = [np.asarray(x).astype("float64") for x in pair]
        np.testing.assert_allclose(*values, rtol=rtol, atol=atol)


def assert_placed(tree, shardings):
    same = lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim)
    assert jax.tree.all(jax.tree.map(same, tree, shardings))


def aligned(x):
    """Return a NumPy copy that JAX would share: it begins at a multiple of 64 bytes."""
    memory = np.empty(x.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copied = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copied[...] = x
    return copied


def to_params(arrays):
    """Arrange a kernel and a bias of PyTorch as a pytree, for `interop`."""
    return dict(kernel=arrays[0].T, bias=arrays[1])


def from_params(params):
    return [params["kernel"].T, params["bias"]]
