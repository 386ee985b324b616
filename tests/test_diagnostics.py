"""Metrics equal those that NumPy computes in float64, in every format and on a mesh."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import SMALL, assert_close, halving, mesh_of, programs, refusal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rmsprop_jax import diagnostics, rmsprop, scale_by_rms, storage

SHAPES = dict(kernel=(64, 128), bias=(128,), scalar=())
# A sum of 8,192 logarithms of about 5: on average sqrt(8192) * 5 half ulp in a loop.
RTOL = 1e-4


def draw(seed):
    """Return a tree whose elements differ in magnitude by ten decades."""
    random, tree = np.random.default_rng(seed), {}
    for name, shape in SHAPES.items():
        x = random.normal(size=shape) * 10.0 ** random.integers(-8, 3, shape)
        tree[name] = jnp.asarray(x, "float32")
    return tree


def steps(tx, params):
    """Return the gradients, updates and state of the second step."""
    _, state = tx.update(draw(1), tx.init(params), params)
    return draw(2), *tx.update(draw(2), state, params)


def flat(tree):
    leaves = [np.ravel(x) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves).astype("float64")


def expected(updates, nu, params, rate, eps, eps_in_sqrt):
    """Compute the metrics of flat arrays with NumPy."""
    rms = lambda x: np.sqrt(np.mean(x**2))
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


@pytest.mark.parametrize(
    ("options", "eps_in_sqrt"),
    [({}, True), ({}, False), (dict(nu_dtype="bfloat16"), False), (SMALL, True)],
    ids=["float32", "eps_outside", "bfloat16", "uint8"],
)
def test_metrics_equal_those_of_numpy(options, eps_in_sqrt):
    how, params = dict(eps=1e-4, eps_in_sqrt=eps_in_sqrt), draw(0)
    _, updates, state = steps(rmsprop(0.1, **options, **how), params)
    found = diagnostics.metrics(updates, state, params, 0.1, **how, per_layer=True)
    assert {x.dtype.name for x in found.values()} == {"float32", "int32"}
    trees = updates, storage.convert(state, nu_dtype="float32").nu, params
    for end in ("", *(f"/{name}" for name in SHAPES)):
        arrays = (flat(tree[end[1:]] if end else tree) for tree in trees)
        for name, wanted in expected(*arrays, 0.1, **how).items():
            got = found.pop(f"{name}{end}")
            np.testing.assert_allclose(got, wanted, rtol=RTOL, err_msg=name + end)
            assert end or name != "eps_share" or 0.05 < got < 0.95
    assert (found.pop("step"), found.pop("learning_rate")) == (2, np.float32(0.1))
    assert len(found) == 3 * 4 and not any(found.values())  # Non-finite elements.


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
def test_the_update_is_gradient_times_effective_learning_rate(eps_in_sqrt):
    rate, how = 0.1 if eps_in_sqrt else halving, dict(eps=1e-6, eps_in_sqrt=eps_in_sqrt)
    grads, updates, state = steps(rmsprop(rate, **how), draw(0))
    factors = diagnostics.effective_learning_rate(state, rate, **how)
    for name, factor in factors.items():
        assert factor.dtype == jnp.float32
        np.testing.assert_allclose(-factor * grads[name], updates[name], rtol=2e-6)


def test_step_and_learning_rate_are_of_the_last_step_and_outlive_the_state():
    x = jnp.zeros(3)
    state = rmsprop(0.1).init(x)
    for count, rate in ((0, 0.1), (1, 0.1), (2, 0.05)):
        found = diagnostics.metrics(x, state._replace(count=count), x, halving)
        np.testing.assert_allclose(found["learning_rate"], rate, rtol=1e-6)
    found = diagnostics.metrics(x, state, x)
    assert not any("learning_rate" in name for name in found)
    assert found["update_ratio"] == 0  # Zeros that did not move.
    rate = jnp.float32(0.5)
    found = diagnostics.metrics(x, state, x, rate)
    jax.tree.map(lambda x: x.delete(), (state, rate))  # As donating them does.
    assert (found["step"], found["learning_rate"]) == (0, 0.5)


def test_the_state_is_found_in_any_container(lenient):
    tx, params = rmsprop(0.1), draw(0)
    _, updates, state = steps(tx, params)
    injected = optax.inject_hyperparams(rmsprop)(0.1).init(params)
    wanted = diagnostics.metrics(updates, state, params, 0.1)
    for held in (
        (optax.EmptyState(), state),
        injected._replace(inner_state=state),
        optax.MultiSteps(tx, 1).init(params)._replace(inner_opt_state=state),
        TrainState.create(apply_fn=None, params=params, tx=tx).replace(opt_state=state),
    ):
        assert diagnostics.metrics(updates, held, params, 0.1) == wanted


def test_an_nnx_optimizer_is_read(lenient):
    model, tx = nnx.Linear(64, 128, rngs=nnx.Rngs(0)), rmsprop(0.1, **SMALL)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))

    @nnx.jit
    def step(model, optimizer):
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        optimizer.update(model, before)
        after = nnx.state(model, nnx.Param)
        updates = jax.tree.map(jnp.subtract, after, before)
        return diagnostics.metrics(updates, optimizer, after, 0.1, per_layer=True)

    updates, state = tx.update(params, tx.init(params))
    after = optax.apply_updates(params, updates)
    expected = diagnostics.metrics(updates, state, after, 0.1, per_layer=True)
    assert {"update_rms/bias", "update_rms/kernel"} < expected.keys()
    assert_close(step(model, optimizer), expected, rtol=1e-5)


def test_only_what_this_optimizer_trains_is_measured():
    frozen = dict(frozen=jnp.full((5,), 1e6), none=None)
    params = draw(0) | dict(empty=jnp.zeros((0, 3))) | frozen
    parts = dict(yes=rmsprop(0.1, nu_dtype="uint8"), no=optax.set_to_zero())
    labels = {name: "no" if name in frozen else "yes" for name in params}
    state = optax.partition(parts, labels).init(params)
    found = diagnostics.metrics(params, state, params, per_layer=True)
    layers = {k for k in found if k.startswith("update_rms/")}
    assert layers == {f"update_rms/{name}" for name in SHAPES}
    rms = np.sqrt(np.mean(flat([params[name] for name in SHAPES]) ** 2))
    np.testing.assert_allclose(found["param_rms"], rms, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "kind"), [({}, AxisType.Auto), (SMALL, AxisType.Explicit)]
)
def test_on_a_mesh_only_sums_and_extrema_travel(options, kind):
    tx, params, mesh = rmsprop(0.1, **options), draw(0), mesh_of(4, 2, kind=kind)
    specs = dict(kernel=P("data", "model"), bias=P("model"), scalar=P())
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    placed = jax.device_put(params, shardings)
    args = *tx.update(params, tx.init(params)), params
    like = placed, tx.init(placed), placed
    spread = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), args, like)
    close = partial(np.testing.assert_allclose, rtol=RTOL)
    histogram = lambda *args: diagnostics.histogram(args)[1]
    for f in (partial(diagnostics.metrics, learning_rate=0.1), histogram):
        compiled = jax.jit(f).lower(*spread).compile()
        jax.tree.map(close, compiled(*spread), f(*args))
        collective = r"= (.*) (?:all|collective|reduce)-(?!window)\S+?\("
        moved = " ".join(re.findall(collective, compiled.as_text()))
        shapes = [x.split(",") for x in re.findall(r"\[([\d,]*)\]", moved)]
        assert 1 <= max(np.prod([int(n or 1) for n in x]) for x in shapes) <= 128


def test_parts_of_a_shard_map_are_measured_apart():
    def measure(g):
        updates, state = scale_by_rms().update(g, scale_by_rms().init(g))
        found = diagnostics.metrics(updates, state, g, jnp.float32(1))
        return jax.tree.map(lambda x: x[None], found)

    mesh, g = mesh_of(8, 1), draw(1)["bias"]
    specs = dict(in_specs=P("data"), out_specs=P("data"))
    found = jax.jit(jax.shard_map(measure, mesh=mesh, **specs))(g)
    parts = np.asarray(g, "float64").reshape(8, -1)
    means = np.exp(-0.5 * np.log(0.1 * parts**2 + 1e-8).mean(axis=1))
    np.testing.assert_allclose(found["effective_learning_rate_mean"], means, rtol=1e-5)


def test_nonfinite_elements_are_counted():
    values = jnp.array([jnp.inf, jnp.nan, -jnp.inf, jnp.nan, jnp.inf, 1, 1, 1])
    bad = [jnp.where(jnp.arange(8) < count, values, 1) for count in range(6)]
    empty = jnp.zeros((0, 3))
    left = [dict(a=empty, b=x, c=bad[0]) for x in bad]
    right = [dict(a=empty, b=bad[0], c=x) for x in bad]
    state = rmsprop(0.1, momentum=0.9, centered=True).init(left[0])
    state = state._replace(nu=left[1], mu=right[2], trace=left[4])
    found = diagnostics.metrics(left[3], state, right[5], eps=2.0, per_layer=True)
    for end, wanted in (
        ("", [3, 5, 1 + 2 + 4]),
        ("/b", [3, 0, 1 + 4]),
        ("/c", [0, 5, 2]),
    ):
        names = [f"nonfinite_{name}{end}" for name in ("updates", "params", "state")]
        assert [found[name] for name in names] == wanted
    assert found["eps_share/b"] == 7 / 8


def test_large_and_small_finite_numbers_are_not_nonfinite(x64):
    params = jnp.array([1e25, 0.0], "float32"), jnp.array([1e25, 0.0], "float64")
    tx = rmsprop(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert state.nu[1][0] > float(np.finfo("float32").max)
    how = dict(eps=1e-30, eps_in_sqrt=False)
    found = diagnostics.metrics(updates, state, params, 0.1, **how, per_layer=True)
    assert not any(value for name, value in found.items() if "nonfinite" in name)
    assert [found[f"eps_share/{i}"] for i in (0, 1)] == [0.5, 0.5]
    lowest = diagnostics.effective_learning_rate(state, 0.1, **how)[1][0]
    assert found["effective_learning_rate_min/1"] == lowest
    np.testing.assert_allclose(lowest, 0.1 / np.sqrt(0.1 * 1e50), rtol=1e-6)


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
def test_metrics_have_derivatives(eps_in_sqrt):
    grads, how = jnp.array([1.0, 2.0, 4.0, 0.0]), dict(eps_in_sqrt=eps_in_sqrt)
    tx = rmsprop(0.1, **how)

    def measure(grads):
        updates, state = tx.update(grads, tx.init(grads))
        found = diagnostics.metrics(updates, state, grads, 0.1, **how)
        return found["effective_learning_rate_mean"], found

    (rate, _), slope = jax.value_and_grad(measure, has_aux=True)(grads)
    # log of the mean rate is the mean of -log|g|, but constant where g is 0.
    expected = [*(-rate / grads[:3] / 4), 0]
    np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_leaves_of_one_shape_are_compiled_once():
    def compiled(params, eps):
        args = params, rmsprop(0.1).init(params), params, 0.1
        return programs(diagnostics.metrics, *args, eps=eps, per_layer=True)

    compiled([jnp.ones(5)] * 2, 1e-2)  # Also what does not depend on the shape.
    params = [jnp.ones((7, n)) for n in (4, 5)] * 2
    assert compiled(params, 1e-3) == 2
    assert compiled(params, 1e-4) == 0


def test_complex_and_low_precision_leaves_are_measured_and_integers_are_not():
    full = partial(jnp.full, (3,))
    params = dict(h=full(2.0**-10, "bfloat16"), z=full(3e-3j), python=0.0)
    state = rmsprop(0.1).init(params)
    more = params | {"count": jnp.arange(4), "key": jax.random.key(0)}
    more |= dict(none=np.zeros(2, jax.dtypes.float0), activation=jax.nn.relu)
    found = diagnostics.metrics(params, state, more, 0.1, per_layer=True)
    rms = np.sqrt((2.0**-20 + 9e-6) * 3 / 7)
    np.testing.assert_allclose(found["param_rms"], rms, rtol=1e-6)
    np.testing.assert_allclose(found["update_rms/z"], 3e-3, rtol=1e-6)
    # In other containers than those of init, all leaves are measured.
    found = diagnostics.metrics({"x": params["h"]}, state, params)
    np.testing.assert_allclose(found["update_rms"], 2.0**-10)


def test_paths_name_the_layers():
    x = jnp.ones(2)
    head = {"head": {"value": x, "policy": x}}
    found = diagnostics.metrics(head, rmsprop(0.1).init(head), head, per_layer=True)
    assert {"update_rms/head/value", "update_rms/head/policy"} <= found.keys()
    twice = {"a/b": x, "a": {"b": x}}
    with refusal("two leaves have the path a/b"):
        diagnostics.metrics(twice, rmsprop(0.1).init(twice), twice)


def test_invalid_arguments_are_refused():
    params = {"bias": jnp.ones(128)}
    state = rmsprop(0.1).init(params)
    with refusal("one RMSPropState, got 0, in a tuple"):
        diagnostics.histogram(())
    with refusal("got 2 at [0], [1]"):
        diagnostics.effective_learning_rate((state, state), 0.1)
    for name, size in (("w", 128), ("bias", 1)):
        with refusal("updates like", f"shape (128,) at bias; updates are at {name}"):
            diagnostics.metrics({name: jnp.ones(size)}, state, params, per_layer=True)
    for updates, held in ((jnp.zeros(0), state), (params, rmsprop(0.1).init({}))):
        with refusal("must hold numbers, got none"):
            diagnostics.metrics(updates, held, params)
    for words, given in (
        ("learning_rate must be one real number", dict(learning_rate=jnp.ones(3))),
        ("learning_rate must be a number", dict(learning_rate="0.1")),
        ("eps must be a number", dict(learning_rate=0.1, eps=None)),
        ("eps must be in [0, inf)", dict(learning_rate=0.1, eps=-1.0)),
        ("eps_in_sqrt must be", dict(learning_rate=0.1, eps_in_sqrt="False")),
    ):
        with refusal(words):
            diagnostics.metrics(params, state, params, **given)
        with refusal(words):
            diagnostics.effective_learning_rate(state, **given)
    with refusal("per_layer must be"):
        diagnostics.metrics(params, state, params, per_layer="no")
