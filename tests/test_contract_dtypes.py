"""Which dtype state and updates have, whatever parameters and gradients have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contract import assert_close, every, types

from rmsprop_jax import rmsprop


@every
@pytest.mark.parametrize("flip", [False, True], ids=["own_dtype", "other_dtype"])
def test_one_tree_may_mix_dtypes(build, flip, x64):
    names = ["bfloat16", "float32", "float16", "float64", "complex64"]
    params = {name: jnp.ones(3, name) for name in names}
    swapped = dict(bfloat16="float32", float32="bfloat16") if flip else {}
    grads = {name: jnp.full(3, 0.5, swapped.get(name, name)) for name in names}
    wide = dict.fromkeys(names, "float32") | {"float64": "float64"}
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


@every
def test_numpy_float64_is_taken_as_float32_without_a_warning(build):
    # As jnp.asarray does while x64 is off; NumPy makes float64 unless told.
    params = dict(w=np.ones((2, 3)), b=np.ones(()))
    tx = build()
    state = tx.init(params)
    assert {x.dtype.name for x in state.nu.values()} == {"float32"}
    expected = tx.update(params, state, params)
    # Closed over, they reach update as NumPy arrays even under jit.
    inside = jax.jit(lambda state: tx.update(params, state, params))(state)
    assert_close(inside, expected)


@every
def test_python_numbers_are_leaves(build):
    tx, params = build(), [1.0, 2.0]
    state = tx.init(params)
    expected = tx.update(params, state, params)
    inside = jax.jit(lambda state: tx.update(params, state, params))(state)
    assert_close(inside, expected)
