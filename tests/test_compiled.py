"""What the update is compiled to for a TPU and an NVIDIA GPU; neither is needed.

The compilers come with the extra `aot`: `pip install -e '.[aot]'`, then
`pytest tests/test_compiled.py`. Without it, all of this is skipped.
"""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rmsprop_jax import rmsprop, sharding

# What XLA asks the driver of an H200 for.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 62914560  clock_rate_ghz: 1.98
  device_memory_size: 150754820096  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
SMALL = dict(nu_dtype=jnp.bfloat16, momentum=0.9, momentum_dtype=jnp.bfloat16)
# Options, bytes a parameter, and passes over the arrays: codes need their row's scale.
CASES = {
    "plain": ({}, 20, 1),
    "momentum": (dict(momentum=0.9), 28, 1),
    "centered_momentum": (dict(centered=True, momentum=0.9), 36, 1),
    "bfloat16": (dict(nu_dtype=jnp.bfloat16), 16, 1),
    "bfloat16_both": (SMALL, 20, 1),
    "uint8": (dict(nu_dtype=jnp.uint8), 19, 2),
}
each = pytest.mark.parametrize("case", CASES)
FLOAT32 = [name for name, (options, *_) in CASES.items() if "nu_dtype" not in options]


@pytest.fixture(autouse=True, scope="module")
def uncached():
    """Keep no programs, as those for devices that are not there cannot be read back."""
    for enabled in (False, True):
        jax.config.update("jax_enable_compilation_cache", enabled)
        # JAX decides once whether it has a cache.
        compilation_cache.reset_cache()
        if not enabled:
            yield


@pytest.fixture(scope="module", params=["tpu", "gpu"])
def devices(request):
    """Return four devices that are not there."""
    package = dict(tpu="libtpu", gpu="jax_plugins.xla_cuda13")[request.param]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if not found:
        pytest.skip(f"{package} is not installed")
    if request.param == "gpu":
        options = dict(topology="1x1x4", target_config=H200)
        return topologies.get_topology_desc("h200", "cuda", **options).devices
    with pytest.MonkeyPatch.context() as patch:
        # There is no machine of that kind around to ask for.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
        return topologies.get_topology_desc("v5e:2x2", "tpu").devices


def compiled(options, params):
    """Return the compiled step: parameters and state are given away, as in training."""
    tx = rmsprop(0.001, **options)
    # The state lives where `init` puts it.
    init = jax.jit(tx.init).lower(params).compile()
    state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(tx.init, params),
        init.output_shardings,
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, params).compile()


def shaped(shape, sharding, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


COLLECTIVE = re.compile(
    r" = (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
)
BITS = dict(pred=8, s32=32, u32=32, f32=32, bf16=16, u8=8, s8=8, u16=16, s16=16)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")


def arrays(text):
    """Return the bytes of each array of a type, and whether it is in main memory."""
    found = []
    for kind, dimensions, layout in ARRAY.findall(text):
        size = math.prod(int(x) for x in dimensions.split(",") if x)
        # S(n) is another memory: on TPU, that of the core.
        found.append((size * BITS[kind] // 8, "S(" not in layout))
    return found


def traffic(executable):
    """Return {instruction: bytes it moves from and to main memory}, copies apart.

    A copy that runs beside the kernels reports all its ends in one type; what it moves
    is the smallest that is an array.
    """
    text = executable.as_text()
    types, kernels, copies = {}, {}, {}
    for line in text[text.index("\nENTRY ") :].splitlines()[2:]:
        found = re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line)
        if not found:
            continue
        name, kind, operation, rest = found.groups()
        types[name] = arrays(kind)
        if operation.endswith("-start"):
            copies[name] = min(size for size, _ in types[name] if size > 4)
        elif operation in ("fusion", "copy", "custom-call"):
            ends = [types[x] for x in re.findall(r"%[\w.-]+", rest.split(")")[0])]
            ends = [end for x in [types[name], *ends] for end in x]
            kernels[name] = sum(size for size, main in ends if main)
    return kernels, copies


@each
def test_moves_no_more_than_it_must(case, devices):
    options, expected, passes = CASES[case]
    shape = (4096, 4096)
    step = compiled(options, [shaped(shape, SingleDeviceSharding(devices[0]))])
    kernels, copies = traffic(step)
    moved = (sum(kernels.values()) + sum(copies.values())) / math.prod(shape)
    assert moved == pytest.approx(expected, rel=0.001)
    assert sum(x > math.prod(shape) for x in kernels.values()) == passes
    cost = step.cost_analysis()
    if devices[0].platform == "tpu" and case in FLOAT32:
        # Nothing is held in the core's memory, so XLA's own count is the same.
        assert cost["bytes accessed"] / math.prod(shape) == pytest.approx(moved, 1e-4)


@each
def test_needs_no_memory_of_its_own(case, devices):
    options, _, passes = CASES[case]
    shape = (4096, 4096)
    step = compiled(options, [shaped(shape, SingleDeviceSharding(devices[0]))])
    memory = step.memory_analysis()
    # Tables of pointers, and between two passes the scale of each row and its inverse.
    assert memory.temp_size_in_bytes <= 1024 + (passes - 1) * 8 * shape[0]
    given = memory.alias_size_in_bytes / math.prod(shape)
    moved = dict(plain=8, momentum=12, centered_momentum=16, bfloat16=6, uint8=5)
    assert given == pytest.approx(moved.get(case, 8), rel=0.001)


def mixed():
    """Return the shapes of 100 parameters, as of a small transformer."""
    block = [(512, 1536), (1536,), (512, 512), (512,), (512,), (512,), (512, 2048)]
    block += [(2048,), (2048, 512), (512,), (512,), (512,)]
    return [(8000, 512), (256, 512), (512,), (512, 1), *8 * block]


@each
def test_a_tree_is_one_kernel_a_leaf(case, devices):
    options, expected, passes = CASES[case]
    where = SingleDeviceSharding(devices[0])
    params = [shaped(shape, where) for shape in mixed()]
    assert len(params) == 100
    kernels, copies = traffic(compiled(options, params))
    total = sum(math.prod(shape) for shape in mixed())
    moved = (sum(kernels.values()) + sum(copies.values())) / total
    if case == "uint8" and devices[0].platform != "tpu":
        # Of a small leaf, the fresh average is written and read again: the GPU's second
        # cache of 60 MB holds it, and arithmetic is dearer.
        expected += 8
    assert moved <= expected * 1.02
    large = sum(math.prod(x) >= 4096 and len(x) > 1 for x in mixed())
    # Count and offset have theirs; codes a second pass and, on TPU, one for the scales.
    most = 102 + 2 * (passes - 1) * large
    assert len([x for x in kernels.values() if x > 8]) <= most


@each
@pytest.mark.parametrize("spec", [P("x", "y"), P("x"), P(None, ("x", "y"))], ids=str)
def test_a_mesh_needs_no_collective(case, spec, devices):
    mesh = Mesh(np.array(devices).reshape(2, 2), ("x", "y"))
    step = compiled(CASES[case][0], [shaped((4096, 4096), NamedSharding(mesh, spec))])
    found = COLLECTIVE.findall(step.as_text())
    if case == "uint8" and len(spec) > 1:
        # A row that is split has one largest number: 4 bytes of it.
        ((kind, operation),) = found
        assert operation == "all-reduce"
        assert max(size for size, _ in arrays(kind)) <= 4 * 4096
    else:
        assert not found


@pytest.mark.parametrize("kept", [{}, dict(nu_dtype=jnp.uint8)], ids=["float", "uint8"])
def test_zero_scatters_gradients_and_gathers_updates(kept, devices):
    mesh, size = Mesh(np.array(devices), ("data",)), 4096
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    tx = rmsprop(0.01, **kept)
    params = shaped((size, size), everywhere)
    state = jax.eval_shape(tx.init, params)
    where, whole = sharding.zero(state, mesh, "data")
    state = jax.tree.map(lambda x, s: shaped(x.shape, s, x.dtype), state, where)

    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(everywhere, where))
    program = step.lower(params, state, shaped((512, size), split)).compile()
    found = {operation for _, operation in COLLECTIVE.findall(program.as_text())}
    if devices[0].platform == "tpu":
        # Of so few chips XLA sums the gradients whole; permuting is one more way to
        # pass the new parts of the parameters around.
        assert found == {"all-reduce", "all-gather", "collective-permute"}
    else:
        assert found == {"reduce-scatter", "all-gather"}
    assert not whole
    # Given to a device: the parameters, a quarter of the state and of the batch.
    bytes_of_state = size**2 * (1 if kept else 4) + (4 * size if kept else 0)
    given = 4 * size**2 + (bytes_of_state + 4 * 512 * size) / 4
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(
        given, 1e-4
    )
