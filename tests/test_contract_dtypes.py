"""Which dtype state and updates have, whatever parameters and gradients have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contract import TABLE, assert_close, every, types

from rmsprop_jax import rmsprop


@every
def test_one_tree_may_mix_dtypes(build, x64):
    names = ["bfloat16", "float32", "float16", "float64", "complex64"]
    own = {name: (name, name) for name in names}
    other = dict(narrow=("bfloat16", "float32"), wide=("float32", "bfloat16"))
    params = {name: jnp.ones(3, p) for name, (p, _) in (own | other).items()}
    grads = {name: jnp.full(3, 0.5, g) for name, (_, g) in (own | other).items()}
    wide = dict.fromkeys(params, "float32") | {"float64": "float64"}
    signed = wide | {"complex64": "complex64"}

    tx = build()
    state = tx.init(params)
    updates, new = tx.update(grads, state, params)
    dtypes = partial(jax.tree.map, lambda x: x.dtype.name)
    assert dtypes(updates) == dtypes(grads)
    assert dtypes(state.nu) == wide
    for buffer in (state.mu, state.trace):
        assert buffer is None or dtypes(buffer) == signed
    assert types(new) == types(state)
    for x in jax.tree.leaves((updates, new)):
        assert jnp.isfinite(x).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_dtypes_are_as_asked(dtype, x64):
    params = {x: jnp.ones(2, x) for x in ("bfloat16", "float64", "complex64")}
    options = dict(centered=True, momentum=0.9)
    tx = rmsprop(0.1, **options, nu_dtype=dtype, momentum_dtype=dtype)
    state = tx.init(params)
    _, new = tx.update(params, state)
    assert {x.dtype.name for x in state.nu.values()} == {dtype}
    signed = dict.fromkeys(params, dtype)
    signed["complex64"] = dict(float32="complex64", float64="complex128")[dtype]
    for buffer in (state.mu, state.trace):
        assert {k: x.dtype.name for k, x in buffer.items()} == signed
    assert types(new) == types(state)


def assert_same_inside_jit(params):
    """Compare direct updates of NumPy or Python numbers with those under jit."""
    txs = {name: build() for name, build in TABLE.items()}
    states = {name: tx.init(params) for name, tx in txs.items()}

    # Closed over, they reach update as they are even under jit.
    @jax.jit
    def inside(states):
        return {k: tx.update(params, states[k], params) for k, tx in txs.items()}

    for name, found in inside(states).items():
        expected = txs[name].update(params, states[name], params)
        assert_close(found, expected, err_msg=name)
    return states


def test_numpy_float64_is_taken_as_float32_without_a_warning():
    # As jnp.asarray does while x64 is off; NumPy makes float64 unless told.
    states = assert_same_inside_jit(dict(w=np.ones((2, 3)), b=np.ones(())))
    for state in states.values():
        assert {x.dtype.name for x in state.nu.values()} == {"float32"}


def test_python_numbers_are_leaves():
    assert_same_inside_jit([1.0, 2.0])
