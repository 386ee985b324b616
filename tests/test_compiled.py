"""The memory traffic of compiled updates on TPU and NVIDIA GPU; neither is needed.

The compilers come with the extra `aot`: `pip install -e '.[aot]'`, then
`pytest tests/test_compiled.py`. Without it, these tests are skipped.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from measuring import step_of
from scale import COLLECTIVE, shaped, state_of

from rmsprop_jax import rmsprop, sharding

# What XLA would read from the driver of an H200.
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
UINT8 = dict(nu_dtype=jnp.uint8)
# Options; bytes a parameter that a step moves, and of parameters and state.
CASES = {
    "plain": ({}, 20, 8),
    "momentum": (dict(momentum=0.9), 28, 12),
    "centered_momentum": (dict(centered=True, momentum=0.9), 36, 16),
    "bfloat16": (dict(nu_dtype=jnp.bfloat16), 16, 6),
    "bfloat16_both": (SMALL, 20, 8),
    "uint8": (UINT8, 14, 5),
}
each = pytest.mark.parametrize("case", CASES)
SIDE = 4096


@pytest.fixture(autouse=True, scope="module")
def uncached():
    """Disable the cache: programs for absent devices cannot be read back."""
    for enabled in (False, True):
        jax.config.update("jax_enable_compilation_cache", enabled)
        # JAX decides once whether it has a cache.
        compilation_cache.reset_cache()
        if not enabled:
            yield


@pytest.fixture(scope="module", params=["tpu", "gpu"])
def devices(request):
    """Return four absent devices of a kind."""
    pytest.importorskip(dict(tpu="libtpu", gpu="jax_plugins.xla_cuda13")[request.param])
    if request.param == "gpu":
        options = dict(topology="1x1x4", target_config=H200)
        return topologies.get_topology_desc("h200", "cuda", **options).devices
    with pytest.MonkeyPatch.context() as patch:
        # There is no such machine to ask about.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
        return topologies.get_topology_desc("v5e:2x2", "tpu").devices


def parameter(shape, sharding):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def compiled(options, params):
    """Return the compiled step, with parameters and state donated."""
    tx = rmsprop(0.001, **options)
    held = params, state_of(tx, params)
    return jax.jit(step_of(tx), donate_argnums=0).lower(held, params).compile()


TYPED_COLLECTIVE = re.compile(r" = (.*?)" + COLLECTIVE.pattern)
BITS = dict(pred=8, s32=32, u32=32, f32=32, bf16=16, u8=8, s8=8, u16=16, s16=16)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")


def arrays(text):
    """Return the bytes of each array in a type, and whether it is in main memory."""
    found = []
    for kind, dimensions, layout in ARRAY.findall(text):
        size = math.prod(int(x) for x in dimensions.split(",") if x)
        # S(n) is another memory: on TPU, that of the core.
        found.append((size * BITS[kind] // 8, "S(" not in layout))
    return found


def traffic(executable):
    """Return the bytes that each kernel moves from and to main memory, and the total.

    A copy that runs beside the kernels lists all its ends in one type; it moves the
    smallest of them that is an array.
    """
    text = executable.as_text()
    types, kernels, copies = {}, [], []
    for line in text[text.index("\nENTRY ") :].splitlines()[2:]:
        found = re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line)
        if not found:
            continue
        name, kind, operation, rest = found.groups()
        types[name] = arrays(kind)
        if operation.endswith("-start"):
            copies.append(min(size for size, _ in types[name] if size > 4))
        elif operation in ("fusion", "copy", "custom-call"):
            ends = [types[x] for x in re.findall(r"%[\w.-]+", rest.split(")")[0])]
            ends = [end for x in [types[name], *ends] for end in x]
            kernels.append(sum(size for size, main in ends if main))
    return kernels, sum(kernels) + sum(copies)


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (3072, 4096), (8192, 16384)], ids=str)
@each
def test_a_step_moves_and_allocates_no_more_than_it_must(case, shape, devices):
    options, expected, held = CASES[case]
    where, count = SingleDeviceSharding(devices[0]), math.prod(shape)
    step = compiled(options, [parameter(shape, where)])
    kernels, moved = traffic(step)
    assert moved / count == pytest.approx(expected, rel=0.002)
    assert sum(x > count for x in kernels) == 1
    if devices[0].platform == "tpu" and "nu_dtype" not in options:
        # Nothing is held in the core's memory, so XLA's own count is the same.
        assert step.cost_analysis()["bytes accessed"] == pytest.approx(moved, 1e-4)
    memory = step.memory_analysis()
    # Tables of pointers and, on GPU, the scales of each row as three integers.
    unpacked = 12 * shape[0] * (case == "uint8" and devices[0].platform != "tpu")
    assert memory.temp_size_in_bytes <= 1024 + unpacked
    assert memory.alias_size_in_bytes / count == pytest.approx(held, rel=0.001)


# The shapes of 16 parameters, as of a transformer of one block.
MIXED = [(8000, 512), (256, 512), (512,), (512, 1), (512, 1536), (1536,), (512, 512)]
MIXED += [(512, 2048), (2048,), (2048, 512), *6 * [(512,)]]


@each
def test_a_tree_is_one_kernel_a_leaf(case, devices):
    options, expected, _ = CASES[case]
    where = SingleDeviceSharding(devices[0])
    kernels, moved = traffic(compiled(options, [parameter(x, where) for x in MIXED]))
    if case == "uint8" and devices[0].platform != "tpu":
        # For leaves of up to about a million elements, XLA expects two kernels to be
        # faster than one with few rows. What the second reads is in the cache of 60 MB.
        expected += 8
    assert moved <= sum(map(math.prod, MIXED)) * expected * 1.02
    large = sum(math.prod(x) >= 4096 and len(x) > 1 for x in MIXED)
    # One each for count and dither offset, and for the scales of the rows of codes.
    most = len(MIXED) + 2 + (case == "uint8") * large
    assert len([x for x in kernels if x > 8]) <= most


WHOLE_ROWS, SPLIT_ROWS = [P("x")], [P("x", "y"), P(None, ("x", "y"))]


def collectives(options, specs, devices):
    """Return the type and the name of each collective in a step on a 2 x 2 mesh."""
    mesh = Mesh(np.array(devices).reshape(2, 2), ("x", "y"))
    params = [parameter((SIDE, SIDE), NamedSharding(mesh, spec)) for spec in specs]
    return TYPED_COLLECTIVE.findall(compiled(options, params).as_text())


@each
def test_a_mesh_needs_no_collective(case, devices):
    specs = WHOLE_ROWS if case == "uint8" else WHOLE_ROWS + SPLIT_ROWS
    assert not collectives(CASES[case][0], specs, devices)


@pytest.mark.parametrize("spec", SPLIT_ROWS, ids=str)
def test_split_rows_of_uint8_need_one_maximum(spec, devices):
    ((kind, operation),) = collectives(UINT8, [spec], devices)
    assert operation == "all-reduce"
    assert max(size for size, _ in arrays(kind)) <= 4 * SIDE


@pytest.mark.parametrize("options", [{}, UINT8], ids=["float32", "uint8"])
def test_zero_scatters_gradients_and_gathers_updates(options, devices):
    mesh = Mesh(np.array(devices), ("data",))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    tx = rmsprop(0.01, **options)
    params = parameter((SIDE, SIDE), everywhere)
    state = jax.eval_shape(tx.init, params)
    where, replicated = sharding.zero(state, mesh, "data")
    assert not replicated
    state = jax.tree.map(shaped, state, where)

    def step(held, x):
        grads = jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p) ** 2))(held[0])
        return step_of(tx)(held, grads)

    step = jax.jit(step, donate_argnums=0, out_shardings=(everywhere, where))
    program = step.lower((params, state), parameter((512, SIDE), split)).compile()
    found = set(COLLECTIVE.findall(program.as_text()))
    if devices[0].platform == "tpu":
        # With so few chips XLA sums whole gradients, and permutes to pass the new parts
        # of the parameters around.
        assert found == {"all-reduce", "all-gather", "collective-permute"}
    else:
        assert found == {"reduce-scatter", "all-gather"}
