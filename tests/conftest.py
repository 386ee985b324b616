"""Eight CPU devices, and JAX at its strictest: no silent promotion or broadcasting."""

import os
import shutil
import tempfile

# Read by JAX once, when it is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

# Compiling takes most of the time. CI runs some of the tests with optimizations too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# Shared by the workers of a run and the programs they start, which compile much the
# same.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rmsprop_jax-")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure(config):
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "rmsprop_jax-" in cache and not hasattr(config, "workerinput"):
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture
def lenient():
    """Allow JAX's defaults, for a test that goes through code which needs them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """Turn 64-bit types on, and back to what they were."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
