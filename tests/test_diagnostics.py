"""Metrics equal those that NumPy computes in float64, in every format and on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import COMPILED, SMALL, mesh_of, refusal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rmsprop_jax import diagnostics, presets, reductions, rmsprop, scale_by_rms, storage

SHAPES = dict(kernel=(64, 128), bias=(128,), large=(200, 200), scalar=())
FORMATS = {"float32": {}, "bfloat16": dict(nu_dtype="bfloat16"), "uint8": SMALL}
formats = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


def draw(seed, shapes=SHAPES):
    """Return a tree whose elements differ in magnitude by ten decades."""
    random = np.random.default_rng(seed)
    decades = lambda shape: 10.0 ** random.integers(-8, 3, shape)  # noqa: E731
    return {
        name: jnp.asarray(random.normal(size=shape) * decades(shape), "float32")
        for name, shape in shapes.items()
    }


def halved(count):
    return 0.1 * 0.5 ** count.astype("float32")


def steps(tx, params=None):
    """Return the gradients, updates and state of the second step, and parameters."""
    params = draw(0) if params is None else params
    state = tx.init(params)
    for seed in (1, 2):
        grads = {name: draw(seed)[name].astype(p.dtype) for name, p in params.items()}
        updates, state = tx.update(grads, state, params)
    return grads, updates, state, params


def flat(tree):
    leaves = [np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves).astype("float64")


def expected(updates, nu, params, rate, eps, eps_in_sqrt):
    """Compute the metrics of flat arrays with NumPy."""
    rms = lambda x: np.sqrt(np.mean(x**2))  # noqa: E731
    rates = rate / (np.sqrt(nu + eps) if eps_in_sqrt else np.sqrt(nu) + eps)
    return dict(
        update_rms=rms(updates),
        param_rms=rms(params),
        update_ratio=rms(updates) / rms(params),
        effective_learning_rate_min=rates.min(),
        effective_learning_rate_mean=np.exp(np.log(rates).mean()),
        effective_learning_rate_max=rates.max(),
        eps_share=np.mean(nu < (eps if eps_in_sqrt else eps**2)),
    )


def assert_metrics(found, wanted, end=""):
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name + end], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
@formats
def test_metrics_equal_those_of_numpy(options, eps_in_sqrt):
    how = dict(eps=1e-4, eps_in_sqrt=eps_in_sqrt)
    tx = rmsprop(0.1, centered=True, momentum=0.9, **options, **how)
    _, *run = steps(tx)
    found = diagnostics.metrics(*run, 0.1, **how, per_layer=True)
    decoded = storage.convert(run[1], nu_dtype="float32").nu
    wanted = expected(*map(flat, (run[0], decoded, run[2])), 0.1, **how)
    assert 0.05 < wanted["eps_share"] < 0.95
    rest = dict(step=2, learning_rate=0.1)
    rest |= {f"nonfinite_{x}": 0 for x in ("updates", "params", "state")}
    assert_metrics(found, wanted | rest)
    layers = 0
    for name in SHAPES:
        trees = (flat(tree[name]) for tree in (run[0], decoded, run[2]))
        assert_metrics(found, expected(*trees, 0.1, **how), f"/{name}")
        layers += len(wanted)
    assert len(found) == len(wanted) + len(rest) + layers
    assert {x.dtype.name for x in found.values()} == {"float32", "int32"}


@pytest.mark.parametrize("schedule", [0.1, halved], ids=["constant", "schedule"])
@pytest.mark.parametrize(
    ("build", "eps", "eps_in_sqrt"),
    [
        (rmsprop, 1e-8, True),
        (functools.partial(rmsprop, centered=True, nu_dtype="float32"), 1e-8, True),
        (presets.tf1, 1e-10, True),
        (presets.keras, 1e-7, True),
        (presets.torch, 1e-8, False),
    ],
    ids=["rmsprop", "centered", "tf1", "keras", "torch"],
)
def test_the_update_is_gradient_times_effective_learning_rate(
    build, eps, eps_in_sqrt, schedule
):
    grads, updates, state, params = steps(build(schedule))
    how = dict(eps=eps, eps_in_sqrt=eps_in_sqrt)
    rates = diagnostics.effective_learning_rate(state, schedule, **how)
    for name, g in grads.items():
        assert rates[name].dtype == jnp.float32
        np.testing.assert_allclose(-rates[name] * g, updates[name], rtol=2e-6)
    found = diagnostics.metrics(updates, state, params, schedule)
    assert found["learning_rate"] == (0.1 if schedule == 0.1 else np.float32(0.05))


def test_a_new_state_has_the_first_learning_rate():
    params = draw(0)
    found = diagnostics.metrics(params, rmsprop(halved).init(params), params, halved)
    np.testing.assert_allclose(found["learning_rate"], 0.1)


def in_train_state(params):
    held = TrainState.create(apply_fn=None, params=params, tx=rmsprop(0.1))
    return held.apply_gradients(grads=draw(1)).apply_gradients(grads=draw(2))


HOLDERS = dict(
    chain=lambda p: steps(optax.chain(optax.clip(1e9), rmsprop(0.1)), p)[2],
    inject=lambda p: steps(optax.inject_hyperparams(rmsprop)(0.1), p)[2],
    multi=lambda p: steps(optax.MultiSteps(rmsprop(0.1), 1), p)[2],
    train_state=in_train_state,
)


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_the_state_is_found_in_any_container(hold, lenient):
    _, updates, state, params = steps(rmsprop(0.1))
    wanted = diagnostics.metrics(updates, state, params, 0.1)
    assert_metrics(diagnostics.metrics(updates, hold(params), params, 0.1), wanted)


@pytest.mark.parametrize("options", [{}, SMALL], ids=["float32", "uint8"])
def test_an_nnx_optimizer_is_read(options, lenient):
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rmsprop(0.1, **options), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        after = nnx.state(model, nnx.Param)
        updates = jax.tree.map(jnp.subtract, after, before)
        how = dict(per_layer=True)
        return grads, diagnostics.metrics(updates, optimizer, after, 0.1, **how)

    grads, found = step(model, optimizer, jnp.ones((2, 64)))
    nu = 0.1 * flat(grads) ** 2
    wanted = expected(flat(grads), nu, flat(grads), 0.1, 1e-8, True)
    name = "effective_learning_rate_min"
    # The first codes of a row are powers of 4.
    rtol = 0.5 if options is SMALL else 0.01
    np.testing.assert_allclose(found[name], wanted[name], rtol=rtol)
    rates = 0.1 / np.sqrt(nu + 1e-8)
    rms = np.sqrt(np.mean((rates * flat(grads)) ** 2))
    np.testing.assert_allclose(found["update_rms"], rms, rtol=1e-4)
    layers = {k for k in found if k.startswith("update_rms/")}
    assert layers == {"update_rms/bias", "update_rms/kernel"} and found["step"] == 1


def test_only_what_this_optimizer_trains_is_measured():
    params = draw(0) | {"empty": jnp.zeros((0, 3)), "none": None}
    params["frozen"] = jnp.full((5,), 1e6)
    trained = rmsprop(0.1, nu_dtype="uint8")
    mask = {name: name not in ("large", "none", "frozen") for name in params}
    masked = optax.masked(trained, mask)
    labels = {True: "trained", False: "frozen"}
    parts = dict(trained=trained, frozen=optax.set_to_zero())
    partition = optax.partition(parts, {k: labels[v] for k, v in mask.items()})
    names = ("bias", "kernel", "scalar")
    for tx in (masked, partition):
        updates, state = tx.update(params, tx.init(params), params)
        found = diagnostics.metrics(updates, state, params, 0.1, per_layer=True)
        layers = {k for k in found if k.startswith("update_rms/")}
        assert layers == {f"update_rms/{name}" for name in names}
        rms = np.sqrt(np.mean(flat([params[k] for k in names]) ** 2))
        np.testing.assert_allclose(found["param_rms"], rms, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("options", [{}, SMALL], ids=["float32", "uint8"])
def test_on_a_mesh_only_sums_and_extrema_travel(options, kind):
    shapes = dict(matrix=(64, 128), large=(256, 256), vector=(128,), scalar=())
    specs = dict(matrix=P("data", "model"), large=P("data"), vector=P("model"))
    mesh, params = mesh_of(4, 2, kind=kind), draw(0, shapes)
    shardings = {k: NamedSharding(mesh, specs.get(k, P())) for k in shapes}
    tx = rmsprop(0.1, **options)
    updates, state = tx.update(params, tx.init(params))
    spread = jax.device_put(params, shardings)
    _, spread_state = tx.update(spread, tx.init(spread))
    placed = (jax.device_put(updates, shardings), spread_state, spread)
    lr = jnp.float32(0.1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-30)
    jax.tree.map(
        close,
        (diagnostics.metrics(*placed, lr), diagnostics.histogram(spread_state)),
        (diagnostics.metrics(updates, state, params, lr), diagnostics.histogram(state)),
    )
    for f, args in (
        (diagnostics.metrics, (*placed, lr)),
        (lambda state: diagnostics.histogram(state)[1], (spread_state,)),
    ):
        program = jax.jit(f).lower(*args).compile().as_text()
        moved = re.findall(r"= (.*) ((?:all|collective|reduce)-\S+?)\(", program)
        sent = [x for x in moved if x[1] != "reduce-window"]
        sizes = [re.findall(r"\[([\d,]*)\]", shape) for shape, _ in sent]
        counts = [
            np.prod([int(n) for n in x.split(",") if n]) for y in sizes for x in y
        ]
        assert 1 <= max(counts) <= 128


def test_parts_of_a_shard_map_are_measured_apart():
    def measure(g):
        updates, state = scale_by_rms().update(g, scale_by_rms().init(g))
        found = diagnostics.metrics(updates, state, g, jnp.float32(1))
        return jax.tree.map(lambda x: x[None], found)

    mesh, g = mesh_of(8, 1), draw(1)["kernel"]
    found = jax.jit(
        jax.shard_map(measure, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    )(g)
    for i, part in enumerate(np.split(np.asarray(g, "float64"), 8)):
        mean = np.exp(np.mean(-0.5 * np.log(0.1 * part**2 + 1e-8)))
        name = "effective_learning_rate_mean"
        np.testing.assert_allclose(found[name][i], mean, rtol=1e-5)


@pytest.mark.parametrize("rows", [3, 512])
@formats
def test_nonfinite_elements_are_counted(options, rows):
    bad = jnp.array([[jnp.nan, jnp.inf, -jnp.inf] + [1.0] * 93] * rows)
    tx = rmsprop(0.1, momentum=0.9, centered=True, **options)
    updates, state = tx.update(bad, tx.init(bad))
    found = diagnostics.metrics(updates, state, bad, 0.1)
    count = lambda *trees: sum(int((~jnp.isfinite(x)).sum()) for x in trees)  # noqa: E731
    assert found["nonfinite_params"] == 3 * rows
    assert found["nonfinite_updates"] == count(updates) > 0
    buffers = [storage.decode(x) for x in state[1:]]
    assert found["nonfinite_state"] == count(*buffers) > count(buffers[0]) > 0


@formats
def test_the_histogram_equals_that_of_numpy(options):
    nu = draw(1) | {"zeros": jnp.zeros(3), "bad": jnp.array([jnp.nan, jnp.inf])}
    powers = np.float32(4) ** np.arange(-62, 63, dtype="float32")
    nu |= dict(powers=jnp.array(powers), below=jnp.array(np.nextafter(powers, 0)))
    state = scale_by_rms().init(nu)._replace(nu=jax.tree.map(jnp.abs, nu))
    state = storage.convert(state, nu_dtype=options.get("nu_dtype"))
    edges, counts = diagnostics.histogram(state)
    root = np.sqrt(flat(storage.convert(state, nu_dtype="float32").nu))
    wanted = np.histogram(root[np.isfinite(root)], edges)[0]
    np.testing.assert_array_equal(counts, wanted)
    assert counts.dtype == jnp.float32 and edges[0] == 0 and counts[0] >= 3


def test_parameters_of_zero_that_did_not_move_have_a_ratio_of_zero():
    params = jnp.zeros(3)
    state = rmsprop(0.1).init(params)
    assert diagnostics.metrics(params, state, params)["update_ratio"] == 0


def test_each_number_of_a_large_leaf_is_read_in_few_passes():
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    state = jax.eval_shape(rmsprop(0.1).init, x)
    for f, args, passes in (
        (diagnostics.metrics, (x, state, x, jnp.float32(0.1)), 5),
        (lambda state: diagnostics.histogram(state)[1], (state,), 2),
    ):
        program = jax.jit(f).lower(*args).compile().as_text()
        main = program[program.index("\nENTRY") :]
        large = re.findall(
            r"^ *(?:ROOT )?%(\S+) = f32\[1024,1024\].*parameter", main, re.M
        )
        operands = re.findall(r" (?:fusion|reduce|call)\(([^)]*)\)", main)
        read = sum(any(f"%{p}" in found for p in large) for found in operands)
        assert len(large) >= 1 and 1 <= read <= passes


def test_leaves_of_one_shape_are_traced_once():
    def traced(leaves):
        params = [jnp.ones((7, leaves))] * leaves
        state = rmsprop(0.1).init(params)
        before = len(COMPILED)
        text = jax.jit(diagnostics.metrics).lower(params, state, params).as_text()
        return text.count("stablehlo.reduce("), len(COMPILED) - before

    assert traced(2) == traced(20)


def test_leaves_of_one_shape_are_compiled_once():
    def compiled(leaves, *shapes):
        params = [jnp.ones(shape) for shape in shapes * leaves]
        state = rmsprop(0.1).init(params)
        before = len(COMPILED)
        diagnostics.metrics(params, state, params, 0.1, per_layer=True)
        return sum("backend" in event for event in COMPILED[before:])

    # Two programs for each shape and one that combines what they return.
    assert compiled(7, (7, 4), (7, 5), (7, 6)) == 7
    assert compiled(2, (7, 2)) == compiled(20, (7, 3))
    params = {"a": jnp.ones(3)}
    state = rmsprop(0.1).init(params)
    diagnostics.metrics(params, state, params, 0.1, eps=1e-3)
    before = len(COMPILED)
    diagnostics.metrics(params, state, params, 0.2, eps=1e-4)
    assert COMPILED[before:] == []


def test_complex_and_low_precision_leaves_are_measured_and_integers_are_not():
    params = {"h": jnp.full((3,), 2.0**-10, "bfloat16"), "z": jnp.full((3,), 3e-3j)}
    tx = rmsprop(0.1)
    _, state = tx.update(params, tx.init(params))
    rates = diagnostics.effective_learning_rate(state, 0.1)
    assert {x.dtype.name for x in jax.tree.leaves(rates)} == {"float32"}
    more = params | {"count": jnp.arange(4), "key": jax.random.key(0)}
    more["none"] = np.zeros(2, jax.dtypes.float0)
    found = diagnostics.metrics(params, state, more, 0.1, per_layer=True)
    rms = np.sqrt((2.0**-20 + 9e-6) / 2)
    np.testing.assert_allclose(found["param_rms"], rms, rtol=1e-6)
    np.testing.assert_allclose(found["update_rms/z"], 3e-3, rtol=1e-6)
    # In other containers than those of init, all leaves are measured.
    other = {"x": params["h"], "n": jnp.arange(4)}
    found = diagnostics.metrics(other, state, params)
    np.testing.assert_allclose(found["update_rms"], 2.0**-10)
    assert "learning_rate" not in found and "update_rms" in found


def test_split_complex_parameters_have_two_rates(lenient):
    params = {"z": jnp.array([1 + 2j, 1e-9j]), "x": jnp.array([2.0, 0.0])}
    tx = optax.contrib.split_real_and_imaginary(presets.torch(0.1))
    updates, state = tx.update(params, tx.init(params), params)
    how = dict(eps_in_sqrt=False)
    rates = diagnostics.effective_learning_rate(state, 0.1, **how)
    for part in ("real", "imaginary"):
        of = lambda z, part=part: np.asarray(z.real if part == "real" else z.imag)  # noqa: E731
        rate = getattr(rates["z"], part)
        np.testing.assert_allclose(-rate * of(params["z"]), of(updates["z"]), rtol=1e-6)
    found = diagnostics.metrics(updates, state, params, 0.1, **how)
    # Of six real numbers: two that are 0, and 1e-9.
    np.testing.assert_allclose(found["eps_share"], 3 / 6)


def test_leaves_of_any_size_are_counted_without_overflow():
    large = jax.ShapeDtypeStruct((2**17, 2**15), jnp.float32)
    state = jax.eval_shape(rmsprop(0.1, nu_dtype="uint8").init, large)
    text = str(jax.make_jaxpr(diagnostics.metrics)(large, state, large))
    assert "u32[131072,32768]" not in text
    ones = jnp.ones((2**12 + 1, 2**12 + 1), bool)
    assert reductions.reduce(x=ones)["x"] == np.float32(ones.size)


def test_paths_name_the_layers():
    x = jnp.ones(2)
    head = {"head": {"value": x, "policy": x}}
    found = diagnostics.metrics(head, rmsprop(0.1).init(head), head, per_layer=True)
    assert {"update_rms/head/value", "update_rms/head/policy"} <= found.keys()
    twice = {"a/b": x, "a": {"b": x}}
    with refusal("two leaves have the path a/b"):
        diagnostics.metrics(twice, rmsprop(0.1).init(twice), twice)


def test_invalid_arguments_are_refused():
    params = draw(0)
    state = rmsprop(0.1).init(params)
    with refusal("one RMSPropState, got 0, in a tuple"):
        diagnostics.metrics(params, (), params)
    with refusal("got 2 at [0], [1]"):
        diagnostics.effective_learning_rate((state, state), 0.1)
    with refusal("got 0"):
        diagnostics.histogram(optax.adam(0.1).init(params))
    with refusal("updates like", "shape (128,) at bias; updates are at w"):
        diagnostics.metrics({"w": params["bias"]}, state, params, per_layer=True)
    with refusal("must hold numbers, got none"):
        diagnostics.metrics({}, rmsprop(0.1).init({}), {})
    for words, given in (
        ("learning_rate must be one real number", dict(learning_rate=jnp.ones(3))),
        ("learning_rate must be a number", dict(learning_rate="0.1")),
        ("eps must be a number", dict(learning_rate=0.1, eps=None)),
        ("eps must be in [0, inf)", dict(learning_rate=0.1, eps=-1.0)),
    ):
        with refusal(words):
            diagnostics.metrics(params, state, params, **given)
        with refusal(words):
            diagnostics.effective_learning_rate(state, **given)
