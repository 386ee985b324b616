"""Reductions count every element, and read each at most twice."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import diagnostics, reductions, rmsprop


def test_the_histogram_equals_that_of_numpy(x64):
    random = np.random.default_rng(0)
    powers = np.float32(4) ** np.arange(-62, 63, dtype="float32")
    edges = [0, 0, 0, np.nan, np.inf, *powers, *np.nextafter(powers, 0)]
    nu = np.square(random.normal(size=8192) * 10.0 ** random.integers(-8, 3, 8192))
    nu = [jnp.array(nu.reshape(64, 128), "float32"), jnp.array(edges, "float32")]
    state = rmsprop(0.1).init(nu)._replace(nu=nu)
    edges, found = diagnostics.histogram(state)
    root = np.sqrt(np.concatenate([np.ravel(x) for x in nu]).astype("float64"))
    wanted = np.histogram(root[np.isfinite(root)], edges)[0]
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == jnp.float32 and edges[0] == 0 and found[0] >= 3


def test_each_number_of_a_large_leaf_is_read_at_most_twice():
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    state = jax.eval_shape(rmsprop(0.1).init, x)
    histogram = lambda *args: diagnostics.histogram(args)[1]
    inside = partial(diagnostics.metrics, learning_rate=0.1)
    outside = partial(inside, eps_in_sqrt=False)
    for f, leaves in ((inside, 3), (outside, 3), (histogram, 1)):
        compiled = jax.jit(f).lower(x, state, x).compile()
        program = compiled.as_text()
        main = program[program.index("\nENTRY") :]
        large = re.findall(r"%(\S+) = f32\[1024,1024\].* parameter\(", main)
        assert len(large) == leaves
        for name in large:
            reads = rf" (?:fusion|reduce|call)\([^)]*%{re.escape(name)}[,)]"
            assert 1 <= len(re.findall(reads, main)) <= 2
        # JAX 0.7 stores arrays that later releases fuse.
        is_fused = f is not histogram and jax.__version_info__ >= (0, 10)
        assert not is_fused or compiled.memory_analysis().temp_size_in_bytes < 10_000


def test_masks_are_counted_exactly_up_to_two_to_the_32():
    large = jax.ShapeDtypeStruct((2**17, 2**15), jnp.float32)
    text = str(jax.make_jaxpr(lambda x: reductions.reduce(mask=x > 0))(large))
    # A uint32 would overflow, and a float32 that counts in a loop stops at 2^24.
    assert "u32" not in text and "reduce_sum" in text
    ones = jnp.ones((2**12 + 1, 2**12 + 1))
    found = reductions.reduce(mask=ones > 0, sum=ones, lowest=ones, highest=-ones)
    assert found["mask"] == ones.size and found["sum"] == np.float32(ones.size)
    assert found["lowest"] == 1 and found["highest"] == -1
