"""The scalars are what NumPy makes of the same arrays, wherever they lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scale
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

from rmsprop_jax import (
    diagnostics,
    plots,
    presets,
    rmsprop,
    scale_by_rms,
    storage,
)

SHAPES = dict(kernel=(64, 128), bias=(128,), odd=(3, 5), scalar=())
FORMATS = {
    "float32": {},
    "bfloat16": dict(nu_dtype=jnp.bfloat16),
    "uint8": dict(nu_dtype=jnp.uint8, momentum_dtype=jnp.bfloat16),
}


def draw(seed, dtype="float32"):
    """Return a tree whose numbers differ by some ten decades in size."""
    random = np.random.default_rng(seed)
    return {
        k: jnp.asarray(
            random.normal(size=shape) * 10.0 ** random.integers(-8, 3, shape), dtype
        )
        for k, shape in SHAPES.items()
    }


def falling(count):
    return 0.1 / (count.astype("float32") + 1)


def stepped(tx, params=None, steps=2):
    params = draw(0) if params is None else params
    state = tx.init(params)
    for seed in range(1, steps + 1):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), draw(seed), params)
        updates, state = tx.update(grads, state, params)
    return grads, updates, state, params


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


def expected(updates, state, params, rate, eps, eps_in_sqrt):
    """Return the same as `metrics`, in float64."""
    v = flat(storage.convert(state, nu_dtype=jnp.float32).nu).astype("float64")
    u, p = (flat(x).astype("float64") for x in (updates, params))
    rms = lambda x: np.sqrt(np.mean(x**2))  # noqa: E731
    root = np.sqrt(v + eps) if eps_in_sqrt else np.sqrt(v) + eps
    rates = np.sort(rate / root)
    return dict(
        learning_rate=rate,
        update_rms=rms(u),
        param_rms=rms(p),
        update_ratio=rms(u) / rms(p),
        effective_learning_rate_min=rates[0],
        effective_learning_rate_median=rates[len(rates) // 2],
        effective_learning_rate_max=rates[-1],
        eps_share=np.mean(v < (eps if eps_in_sqrt else eps**2)),
        nonfinite_updates=0,
        nonfinite_params=0,
        nonfinite_state=0,
    )


def assert_metrics(found, wanted):
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


# In turn, as a format is read before eps meets it.
@pytest.mark.parametrize(
    ("kept", "eps_in_sqrt"),
    [("float32", True), ("float32", False), ("bfloat16", True), ("uint8", False)],
)
def test_metrics_are_those_of_numpy(kept, eps_in_sqrt):
    forms = dict(eps=1e-4, eps_in_sqrt=eps_in_sqrt)
    tx = rmsprop(0.1, centered=True, momentum=0.9, **FORMATS[kept], **forms)
    _, updates, state, params = stepped(tx)
    found = diagnostics.metrics(updates, state, params, 0.1, **forms, per_layer=True)
    assert found["step"] == 2
    wanted = expected(updates, state, params, 0.1, **forms)
    assert_metrics(found, wanted)
    assert 0.05 < wanted["eps_share"] < 0.95
    # A layer is a tree of one array.
    for name in SHAPES:
        own = (only(name, x) for x in (updates, state, params))
        wanted = expected(*own, 0.1, **forms)
        layer = {k: found[f"{k}/{name}"] for k in wanted if f"{k}/{name}" in found}
        assert len(layer) == 7
        assert_metrics(layer, {k: wanted[k] for k in layer})


def only(name, tree):
    """Return the tree with one array in place of each dict."""
    is_dict = lambda x: isinstance(x, dict)  # noqa: E731
    pick = lambda x: x[name] if is_dict(x) else x  # noqa: E731
    return jax.tree.map(pick, tree, is_leaf=is_dict)


def test_the_median_is_exact_for_even_and_odd_numbers_of_any_size():
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 101):
        v = 10.0 ** random.uniform(-37, 38, size)
        v[random.random(size) < 0.3] = 0
        found = diagnostics._medians([[jnp.asarray(v, jnp.float32)]])
        assert found[0] == np.sort(v.astype("float32"))[(size - 1) // 2]


def test_more_are_counted_than_float32_can_count_one_by_one():
    mask = jnp.ones((9, 2**22), bool).at[0, 0].set(False)
    assert diagnostics._count(mask) == float(np.float32(9 * 2**22 - 1))
    assert diagnostics._count(jnp.ones((2**25,), bool)) == 2**25
    assert diagnostics._count(jnp.array(True)) == 1


@pytest.mark.parametrize("schedule", [0.1, falling], ids=["constant", "falling"])
@pytest.mark.parametrize(
    "make",
    [
        rmsprop,
        functools.partial(rmsprop, centered=True),
        presets.tf1,
        presets.keras,
        functools.partial(presets.keras, centered=True),
    ],
)
def test_effective_learning_rate_times_gradient_is_the_update(make, schedule):
    names = {rmsprop: 1e-8, presets.tf1: 1e-10}
    eps = names.get(getattr(make, "func", make), 1e-7)
    grads, updates, state, _ = stepped(make(schedule))
    rates = diagnostics.effective_learning_rate(state, schedule, eps=eps)
    jax.tree.map(
        lambda r, g, u: np.testing.assert_allclose(-r * g, u, rtol=2e-6),
        *(rates, grads, updates),
    )


def test_eps_outside_the_root_and_complex_averages():
    params = {"z": jnp.array([1 + 2j, 1e-9j]), "x": jnp.array([2.0, 0.0])}
    tx = presets.torch(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    rates = diagnostics.effective_learning_rate(state, 0.1, eps=1e-8, eps_in_sqrt=False)
    z, x = np.asarray(rates["z"]), rates["x"]
    given = np.asarray(params["z"])
    scaled = z.real * given.real + 1j * z.imag * given.imag
    np.testing.assert_allclose(-scaled, updates["z"], rtol=1e-6)
    np.testing.assert_allclose(-x * params["x"], updates["x"], rtol=1e-6)
    found = diagnostics.metrics(
        updates, state, params, 0.1, eps=1e-8, eps_in_sqrt=False
    )
    # Of six parts, those of 0 and of 1e-9.
    np.testing.assert_allclose(found["eps_share"], 3 / 6)
    assert found["update_rms"] > 0


def in_chain(tx, params):
    return stepped(optax.chain(optax.clip(10.0), tx), params)[2]


def in_train_state(tx, params):
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    return state.apply_gradients(grads=draw(1)).apply_gradients(grads=draw(2))


def under_inject(tx, params):
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=0.1)
    return stepped(tx, params)[2]


@pytest.mark.parametrize("put", [in_chain, in_train_state, under_inject])
def test_the_state_is_found_wherever_it_sits(put):
    params = draw(0)
    _, updates, _, _ = stepped(rmsprop(0.1), params)
    held = put(rmsprop(0.1), params)
    found = diagnostics.metrics(updates, held, params, 0.1)
    own = diagnostics.find(held)
    assert_metrics(found, expected(updates, own, params, 0.1, 1e-8, True))


@pytest.mark.parametrize("kept", [{}, FORMATS["uint8"]], ids=["float32", "uint8"])
def test_an_nnx_optimizer_is_read(kept, lenient):
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rmsprop(0.1, **kept), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        # A state of NNX is that of its model: without a copy, it would change too.
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        after = nnx.state(model, nnx.Param)
        updates = jax.tree.map(jnp.subtract, after, before)
        return grads, diagnostics.metrics(
            updates, optimizer, after, 0.1, per_layer=True
        )

    grads, found = step(model, optimizer, jnp.ones((2, 64)))
    assert found["step"] == 1
    # The first average is 0.1 g^2.
    rates = 0.1 / np.sqrt(0.1 * flat(grads) ** 2 + 1e-8)
    rms = np.sqrt(np.mean((rates * flat(grads)) ** 2))
    np.testing.assert_allclose(found["update_rms"], rms, rtol=1e-4)
    tolerance, fastest = 0.4 if kept else 1e-4, rates.max()
    np.testing.assert_allclose(
        found["effective_learning_rate_max"], fastest, rtol=tolerance
    )
    layers = {k for k in found if k.startswith("update_rms/")}
    assert layers == {"update_rms/bias", "update_rms/kernel"}


def test_what_is_masked_frozen_or_empty_is_left_out():
    params = draw(0) | {"empty": jnp.zeros((0, 3)), "none": None}
    mask = {k: k not in ("odd", "none") for k in params}
    tx = optax.masked(rmsprop(0.1), mask)
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    found = diagnostics.metrics(updates, state, params, 0.1, per_layer=True)
    assert {k for k in found if k.startswith("update_rms/")} == {
        f"update_rms/{k}" for k in ("bias", "kernel", "scalar")
    }


@pytest.mark.parametrize("kept", [{}, FORMATS["uint8"]], ids=["float32", "uint8"])
def test_on_a_mesh_they_are_the_same_and_only_sums_travel(kept):
    tx = rmsprop(0.1, **kept)
    _, *single = stepped(tx)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    where = {k: NamedSharding(mesh, P("x" if len(s) == 2 else None))
             for k, s in (SHAPES | dict(odd=(3,), scalar=())).items()}  # fmt: skip
    where["scalar"] = NamedSharding(mesh, P())
    params = jax.device_put(draw(0), where)
    _, *spread = stepped(tx, params)
    for name in ("metrics", "histogram"):
        call = getattr(diagnostics, name)
        rest = (0.1,) if name == "metrics" else ()
        ours, theirs = (
            call(*(run if rest else run[1:2]), *rest) for run in (spread, single)
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5), ours, theirs
        )
    compiled = jax.jit(diagnostics.metrics).lower(*spread, jnp.float32(0.1)).compile()
    found = set(scale.COLLECTIVE.findall(compiled.as_text()))
    assert found == {"all-reduce"}


def test_what_is_not_finite_is_counted_in_every_format():
    bad = jnp.array([[jnp.nan, jnp.inf] + [1.0] * 6] * 512)
    for kept in FORMATS.values():
        tx = rmsprop(0.1, momentum=0.9, **kept)
        updates, state = tx.update(bad, tx.init(bad))
        found = diagnostics.metrics(updates, state, bad, 0.1)
        assert found["nonfinite_params"] == 1024
        assert found["nonfinite_updates"] == int((~jnp.isfinite(updates)).sum()) > 0
        buffers = [storage.decode(x) for x in (state.nu, state.trace)]
        count = sum(int((~jnp.isfinite(x)).sum()) for x in buffers)
        assert found["nonfinite_state"] == count >= 1024


@pytest.mark.parametrize("kept", FORMATS.values(), ids=FORMATS)
def test_the_histogram_is_that_of_numpy(kept):
    _, _, state, _ = stepped(scale_by_rms(**kept))
    edges, counts = diagnostics.histogram(state)
    v = flat(storage.convert(state, nu_dtype=jnp.float32).nu)
    squares = np.square(edges).astype("float32")
    np.testing.assert_array_equal(counts, np.histogram(v, squares)[0])
    assert counts.sum() == v.size == sum(np.prod(s) for s in SHAPES.values())


def test_what_cannot_be_read_is_named():
    params = draw(0)
    state = rmsprop(0.1).init(params)
    with pytest.raises(ValueError, match=r"one RMSPropState, got 0, in a tuple"):
        diagnostics.metrics(params, (), params)
    with pytest.raises(ValueError, match=r"got 2 at \[0\], \[1\]"):
        diagnostics.effective_learning_rate((state, state), 0.1)
    with pytest.raises(ValueError, match="got 0"):
        diagnostics.histogram(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="none at bias; updates are at w, params"):
        diagnostics.metrics({"w": params["odd"]}, state, params, per_layer=True)
    with pytest.raises(ValueError, match="must hold numbers, got none"):
        diagnostics.metrics({}, rmsprop(0.1).init({}), {})


def test_models_of_more_numbers_than_int32_has_are_counted():
    large = jax.ShapeDtypeStruct((2**17, 2**15), jnp.float32)
    state = jax.eval_shape(rmsprop(0.1, nu_dtype=jnp.uint8).init, large)
    found = jax.eval_shape(diagnostics.metrics, large, state, large, jnp.float32(0.1))
    assert {x.dtype for k, x in found.items() if k != "step"} == {jnp.dtype("float32")}


def test_each_part_of_a_shard_map_may_be_measured():
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def measure(g):
        updates, state = scale_by_rms().update(g, scale_by_rms().init(g))
        found = diagnostics.metrics(updates, state, g, jnp.float32(1))
        return jax.tree.map(lambda x: x[None], found)

    parts = jax.jit(
        jax.shard_map(measure, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    )
    g = draw(1)["kernel"]
    found = parts(g)
    for i, part in enumerate(np.split(np.asarray(g), 8)):
        rates = 1 / np.sqrt(0.1 * np.square(part.ravel(), dtype="float64") + 1e-8)
        median = np.sort(rates)[rates.size // 2]
        name = "effective_learning_rate_median"
        np.testing.assert_allclose(found[name][i], median, rtol=1e-5)


def test_what_another_optimizer_trains_is_not_in_it():
    params = {"a": jnp.ones((4, 4)), "b": jnp.full((5,), 100.0)}
    labels = {"a": "rms", "b": "frozen"}
    kinds = {"rms": rmsprop(0.1), "frozen": optax.set_to_zero()}
    tx = optax.partition(kinds, labels)
    updates, state = tx.update(params, tx.init(params), params)
    found = diagnostics.metrics(updates, state, params, 0.1, per_layer=True)
    np.testing.assert_allclose(found["update_ratio"], found["update_ratio/a"])
    np.testing.assert_allclose(found["param_rms"], 1)


def test_a_fresh_state_has_the_first_learning_rate():
    params = draw(0)
    found = diagnostics.metrics(params, rmsprop(falling).init(params), params, falling)
    np.testing.assert_allclose(found["learning_rate"], 0.1)


def test_small_complex_and_whole_numbers_are_measured_or_left_out():
    tiny = {"h": jnp.full((3,), 2.0**-10, "bfloat16"), "z": jnp.full((3,), 3e-3j)}
    state = rmsprop(0.1).init(tiny)
    more = tiny | {"count": jnp.arange(4), "key": jax.random.key(0)}
    more["none"] = np.zeros(2, jax.dtypes.float0)
    found = diagnostics.metrics(tiny, state, more, 0.1, per_layer=True)
    expected = np.sqrt((2.0**-20 + 9e-6) / 2)
    np.testing.assert_allclose(found["param_rms"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["update_rms/z"], 3e-3, rtol=1e-6)
    # Without a match of paths, all that are numbers.
    other = {"x": tiny["h"], "n": jnp.arange(4)}
    found = diagnostics.metrics(other, state, tiny)
    np.testing.assert_allclose(found["update_rms"], 2.0**-10)


def test_paths_are_kept_apart():
    x = jnp.ones(2)
    head = {"head": {"value": x, "policy": x}}
    found = diagnostics.metrics(head, rmsprop(0.1).init(head), head, per_layer=True)
    assert {"update_rms/head/value", "update_rms/head/policy"} <= found.keys()
    twice = {"a/b": x, "a": {"b": x}}
    with pytest.raises(ValueError, match="two arrays have the path a/b"):
        diagnostics.metrics(twice, rmsprop(0.1).init(twice), twice)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(learning_rate=jnp.ones(3)), r"learning_rate must be one real number"),
        (dict(learning_rate="0.1"), "learning_rate must be a number"),
        (dict(learning_rate=0.1, eps=None), "eps must be a number"),
        (dict(learning_rate=0.1, eps=-1.0), r"eps must be in \[0, inf\)"),
    ],
)
def test_numbers_are_checked(given, words):
    params = draw(0)
    state = rmsprop(0.1).init(params)
    with pytest.raises(ValueError, match=words):
        diagnostics.metrics(params, state, params, **given)
    with pytest.raises(ValueError, match=words):
        diagnostics.effective_learning_rate(state, **given)


def test_what_was_measured_can_be_drawn():
    _, updates, state, params = stepped(rmsprop(0.1))
    rows = [diagnostics.metrics(updates, state, params, 0.1, per_layer=True)]
    left, middle, right = Figure().subplots(1, 3)
    plots.training_curves(left, rows, "update_rms", x="step")
    plots.per_layer(middle, rows)
    assert {x.get_label() for x in middle.lines} == set(SHAPES)
    # And also where there is nothing but NaN.
    state = state._replace(nu=jax.tree.map(lambda x: x * jnp.nan, state.nu))
    plots.denominator(right, diagnostics.histogram(state), eps=0.0)
    plots.denominator(right, diagnostics.histogram(state))
