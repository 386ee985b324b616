"""The presets, without the frameworks that they are presets of."""

import functools
import inspect
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import originals
import parity
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_contract import assert_close, assert_same, normal, run, types

from rmsprop_jax import RMSPropState, presets, rmsprop

CASES = json.loads(parity.GOLDEN.read_text())["cases"]
PRESETS = {
    name: preset
    for name, preset in inspect.getmembers(presets, inspect.isfunction)
    if preset.__module__ == presets.__name__ and not name.startswith("_")
}
# What each takes, in order; "needed" where the original has no default.
TAKES = dict(
    torch=dict(lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0)
    | dict(centered=False, maximize=False),
    tf1=dict(learning_rate="needed", decay=0.9, momentum=0.0, epsilon=1e-10)
    | dict(centered=False),
    keras=dict(learning_rate=1e-3, rho=0.9, momentum=0.0, epsilon=1e-7)
    | dict(centered=False, weight_decay=None, weight_decay_mask=None),
    keras_legacy=dict(learning_rate=1e-3, rho=0.9, momentum=0.0, epsilon=1e-7)
    | dict(centered=False),
    timm=dict(lr=1e-2, alpha=0.9, eps=1e-10, weight_decay=0, momentum=0.0)
    | dict(centered=False, decoupled_decay=False, lr_in_momentum=True),
    sb3=dict(lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0)
    | dict(centered=False),
    graves=dict(learning_rate=1e-4),
    dqn=dict(learning_rate=2.5e-4, eps=0.01),
    a3c=dict(learning_rate=7e-4),
    impala=dict(learning_rate=4.8e-4),
    inception=dict(learning_rate="needed"),
    efficientnet=dict(learning_rate="needed"),
)
every = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
with_momentum = pytest.mark.parametrize(
    "preset", [x for x in PRESETS.values() if "momentum" in TAKES[x.__name__]]
)
with_weight_decay = pytest.mark.parametrize(
    "preset", [x for x in PRESETS.values() if "weight_decay" in TAKES[x.__name__]]
)
zeros = pytest.mark.parametrize(
    "zero", [0, 0.0, np.float32(0), np.int64(0)], ids=lambda x: type(x).__name__
)


def label(case):
    options = "-".join(f"{k}={x}" for k, x in case["options"].items())
    return f"{case['preset']}-{case['beside']}-{case['dtype']}-{options}"


def as_one(leaves):
    return [np.concatenate([np.ravel(x) for x in leaves])]


def recorder(calls):
    """Return `rmsprop`, which also appends all its arguments to the list of calls."""

    def record(*args, **kwargs):
        bound = inspect.signature(rmsprop).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        return rmsprop(*args, **kwargs)

    return record


def parts(leaves, n):
    size = len(leaves) // n
    return [leaves[i * size : (i + 1) * size] for i in range(n)]


def side_by_side(builds):
    """Return one factory, whose n parts of the leaves go where those of each would.

    What takes the time is to compile, and of one program that is a third of it.
    """

    def build(schedule):
        txs = [build(schedule) for build in builds]

        def init(params):
            rows = zip(txs, parts(params, len(txs)), strict=True)
            return [tx.init(p) for tx, p in rows]

        def update(grads, states, params):
            gs, ps = parts(grads, len(txs)), parts(params, len(txs))
            rows = zip(txs, gs, states, ps, strict=True)
            updates, states = zip(*(tx.update(*row) for tx, *row in rows), strict=True)
            return [x for part in updates for x in part], list(states)

        return optax.GradientTransformation(init, update)

    return build


def kind(case):
    """Return what cases share that go side by side."""
    return case["preset"], case["dtype"], "weight_decay_mask" in case["options"]


@pytest.mark.parametrize(("preset", "dtype", "masked"), sorted({*map(kind, CASES)}))
def test_preset_goes_where_its_original_went(preset, dtype, masked, x64):
    cases = [case for case in CASES if kind(case) == (preset, dtype, masked)]
    params, grads = parity.problem(dtype)
    if not masked:
        # Three leaves compile for three times as long; test_parity.py has them.
        params, grads = as_one(params), [as_one(g) for g in grads]
    n, one = len(cases), PRESETS.get(preset, rmsprop)
    builds = [functools.partial(one, **case["options"]) for case in cases]
    path = originals.transformation(
        side_by_side(builds), {}, params * n, [g * n for g in grads], parity.RATES
    )
    paths = zip(*(parts(leaves, n) for leaves in path), strict=True)
    for case, own in zip(cases, paths, strict=True):
        found = parity.kept(parity.flat(own))
        assert list(found) == list(case["params"]) == ["1", "75", "76", "150"]
        for step, expected in case["params"].items():
            # 150 steps, each off by an ulp of 2e-16 and some of the move: about 1e-13.
            np.testing.assert_allclose(
                found[step], expected, rtol=0, atol=1e-12, err_msg=label(case)
            )


def test_golden_numbers_are_of_all_cases():
    cases = [{k: x for k, x in case.items() if k != "params"} for case in CASES]
    assert cases == [case for _, case in parity.golden_cases()]
    assert {case["preset"] for case in CASES} == {*PRESETS, "rmsprop"}


def test_golden_numbers_tell_every_algorithm_from_the_others(monkeypatch):
    built, ends = [], []
    monkeypatch.setattr(presets, "rmsprop", recorder(built))
    for case in CASES:
        options = case["options"]
        PRESETS.get(case["preset"], recorder(built))(0.1, **options)
        built[-1] |= dict(maximize=options.get("maximize", False))
        if built[-1]["momentum"] is None:
            built[-1] |= dict(nesterov=False, lr_in_momentum=True)
        ends.append(np.array(case["params"]["150"]))
    for i, j in itertools.combinations(range(len(CASES)), 2):
        if ends[i].shape == ends[j].shape:
            # A thousand times what may part a preset from its golden numbers.
            apart = np.abs(ends[i] - ends[j]).max() > 1e-9
            assert apart == (built[i] != built[j]), (CASES[i], CASES[j])


@every
def test_arguments_and_defaults_are_known(preset):
    found = {
        name: "needed" if x.default is x.empty else x.default
        for name, x in inspect.signature(preset).parameters.items()
    }
    expected = TAKES[preset.__name__] | dict(nu_dtype=None, momentum_dtype=None)
    assert list(found.items()) == list(expected.items())


@every
def test_docstring_lists_each_difference_from_rmsprop(preset, monkeypatch):
    calls = []
    monkeypatch.setattr(presets, "rmsprop", recorder(calls))
    needed = {k: 0.1 for k, x in TAKES[preset.__name__].items() if x == "needed"}
    preset(**needed)
    (call,) = calls
    plain = inspect.signature(rmsprop).parameters
    differs = {k: call[k] != plain[k].default for k in call}
    differs["learning_rate"] = not needed
    doc = " ".join(inspect.getdoc(preset).split())

    def listed(words):
        found = re.search(rf"{words} ([\d.e-]+) \(", doc)
        return found and float(found[1])

    for name in ("learning_rate", "decay", "eps", "momentum"):
        expected = call[name] if differs[name] else None
        assert listed(name.replace("_", " ")) == expected
    assert differs["initial_scale"] == ("nu starts at 1 (0)" in doc)
    assert differs["eps_in_sqrt"] == ("outside the root" in doc)
    assert differs["lr_in_momentum"] == ("buffer without the learning rate" in doc)
    assert differs["centered"] == ("centered (not)" in doc)


@every
@pytest.mark.parametrize("unknown", ["foreach", "nesterov", "use_locking", "clipnorm"])
def test_an_unknown_argument_is_named(preset, unknown):
    with pytest.raises(TypeError, match=unknown):
        preset(0.1, **{unknown: True})


@every
def test_a_number_outside_its_domain_is_refused(preset):
    with pytest.raises(ValueError, match=r"learning_rate must be .*got -1"):
        preset(-1.0)
    words = dict(alpha="decay", rho="decay", epsilon="eps")
    bad = dict(decay=1.0, alpha=1.0, rho=1.0, momentum=1.5, eps=-1e-8, epsilon=-1e-8)
    for name in bad.keys() & TAKES[preset.__name__].keys():
        with pytest.raises(ValueError, match=f"{words.get(name, name)} must be in"):
            preset(0.1, **{name: bad[name]})
    for name in ("nu_dtype", "momentum_dtype"):
        with pytest.raises(ValueError, match=f"{name} must be float32"):
            preset(0.1, **{name: "float16"})


@with_weight_decay
def test_a_negative_weight_decay_is_refused(preset):
    with pytest.raises(ValueError, match=r"(l2|weight_decay) must be in .*got -0.1"):
        preset(0.1, weight_decay=-0.1)


@every
def test_a_preset_is_a_transformation_with_the_state_of_rmsprop(preset):
    tx, params = preset(0.1), normal(0)
    assert type(tx) is optax.GradientTransformationExtraArgs
    state, compiled = tx.init(params), jax.jit(tx.update)
    for update in (tx.update, compiled, compiled):
        updates, new = update(normal(1), state, params, value=0.5)
        assert type(new) is RMSPropState
        assert types(new) == types(state)
        assert types(updates) == types(params)
        state = new
    assert compiled._cache_size() == 1


@every
def test_jit_equals_eager(preset):
    tx = preset(0.1)
    assert_close(run(tx, normal(0)), run(tx, normal(0), jax.jit(tx.update)))


@every
def test_a_number_is_a_constant_schedule(preset):
    scheduled = preset(lambda count: jnp.float32(0.1))
    assert_close(run(scheduled, normal(0)), run(preset(0.1), normal(0)))


@every
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_dtypes_are_as_asked(preset, dtype, x64):
    options = dict(centered=True, momentum=0.9)
    options = {k: x for k, x in options.items() if k in TAKES[preset.__name__]}
    tx = preset(0.1, **options, nu_dtype=dtype, momentum_dtype=dtype)
    params = {x: jnp.ones(2, x) for x in ("bfloat16", "float32", "float64")}
    state = tx.init(params)
    assert {x.dtype.name for x in jax.tree.leaves(state[1:])} == {dtype}
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype.name, tree)  # noqa: E731
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert dtypes(new) == dtypes(state)
    assert dtypes(updates) == dtypes(params)


@with_momentum
@zeros
def test_momentum_0_keeps_no_buffer(preset, zero):
    state = preset(0.1, momentum=zero).init(normal(0))
    assert state.trace is None
    assert_same(state, preset(0.1).init(normal(0)))


@with_momentum
def test_momentum_in_an_array_keeps_its_buffer_at_0_too(preset):
    params, state = run(preset(0.1, momentum=jnp.float32(0)), normal(0))
    assert state.trace is not None
    if preset is not presets.keras_legacy:
        # There eps moves into the root with momentum; see test_parity.py.
        assert_close(params, run(preset(0.1), normal(0))[0])


@with_weight_decay
@zeros
def test_weight_decay_0_reads_no_parameters(preset, zero):
    tx = preset(0.1, weight_decay=zero)
    tx.update(normal(1), tx.init(normal(0)))
    array = preset(0.1, weight_decay=jnp.float32(zero))
    with pytest.raises(ValueError, match="must read the parameters"):
        array.update(normal(1), array.init(normal(0)))
    assert_close(run(array, normal(0)), run(tx, normal(0)))


@zeros
def test_decoupled_weight_decay_0_reads_no_parameters(zero):
    tx = presets.timm(0.1, weight_decay=zero, decoupled_decay=True)
    tx.update(normal(1), tx.init(normal(0)))


@pytest.mark.parametrize("epsilon", [None, 0, 0.0, np.float32(0), 1e-7])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_keras_legacy_has_an_epsilon_also_without_one(epsilon, momentum):
    found = run(
        presets.keras_legacy(0.1, epsilon=epsilon, momentum=momentum), normal(0)
    )
    assert_same(found, run(presets.keras_legacy(0.1, momentum=momentum), normal(0)))


@with_momentum
def test_injected_learning_rate_can_change_between_steps(preset, lenient):
    name = next(iter(TAKES[preset.__name__]))
    tx, params = optax.inject_hyperparams(preset)(**{name: 0.1}), normal(0)
    state, found = tx.init(params), params
    for step, rate in enumerate([0.1, 0.1, 0.02, 0.02]):
        state = state._replace(
            hyperparams=state.hyperparams | {name: jnp.float32(rate)}
        )
        updates, state = tx.update(normal(step + 1), state, found)
        found = optax.apply_updates(found, updates)
    # Injected, momentum is an array: on, also where it is 0.
    schedule = optax.piecewise_constant_schedule(0.1, {2: 0.2})
    expected, _ = run(preset(schedule, momentum=jnp.float32(0)), params, steps=4)
    assert_close(found, expected, rtol=1e-5)


def test_maximize_negates_the_gradient_before_all_else():
    options = dict(weight_decay=0.1, momentum=0.9, centered=True)
    up = presets.torch(0.1, **options, maximize=True)
    down = presets.torch(0.1, **options)
    negated = lambda g, *rest: down.update(jax.tree.map(jnp.negative, g), *rest)  # noqa: E731
    assert_same(run(up, normal(0)), run(down, normal(0), negated))


COMPLEX = {"matrix": "complex64", "vector": "float32", "scalar": "complex64"}
ALL = dict(momentum=0.9, centered=True, weight_decay=0.1)
complex_options = pytest.mark.parametrize(
    "options", [dict(), ALL | dict(maximize=True)], ids=["plain", "all"]
)


def complex_normal(seed):
    """Return a tree of a complex matrix, a real vector and a complex scalar."""
    parts = zip(normal(2 * seed).items(), normal(2 * seed + 1).values(), strict=True)
    return {
        k: jax.lax.complex(x, y) if "complex" in COMPLEX[k] else x
        for (k, x), y in parts
    }


def complex_run(tx, update=None):
    params = complex_normal(0)
    state = tx.init(params)
    for seed in (1, 2, 3):
        updates, state = (update or tx.update)(complex_normal(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@complex_options
def test_complex_numbers_are_two_real_ones(options):
    tx = presets.torch(0.1, **options)
    parts = lambda tree: jax.tree.map(lambda x: (x.real, jnp.imag(x)), tree)  # noqa: E731
    params = parts(complex_normal(0))
    state = tx.init(params)
    for seed in (1, 2, 3):
        updates, state = tx.update(parts(complex_normal(seed)), state, params)
        params = optax.apply_updates(params, updates)
    found, found_state = complex_run(tx)
    assert_close(parts(found), params)
    for buffer, expected in zip(found_state[1:], state[1:], strict=True):
        assert_close(parts(buffer), expected)


@complex_options
def test_complex_state_keeps_its_types(options):
    tx, params = presets.torch(0.1, **options), complex_normal(0)
    state = tx.init(params)
    for buffer in state[1:]:
        assert buffer is None or types(buffer) == types(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new = update(complex_normal(1), state, params)
        assert types(new) == types(state)
        assert types(updates) == types(params)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    for other in (tx.init(shapes), jax.jit(tx.init)(params)):
        assert types(other) == types(state)
        assert_same(other, state)
    aval = lambda x: (x.shape, x.dtype)  # noqa: E731
    abstract = jax.eval_shape(tx.init, shapes)
    assert jax.tree.map(aval, abstract) == jax.tree.map(aval, state)


@complex_options
def test_complex_jit_equals_eager(options):
    tx = presets.torch(0.1, **options)
    assert_close(complex_run(tx), complex_run(tx, jax.jit(tx.update)))


def test_complex_state_dtypes_are_as_asked(x64):
    dtypes = dict(nu_dtype="float64", momentum_dtype="float64")
    tx, params = presets.torch(0.1, **ALL, **dtypes), complex_normal(0)
    state = tx.init(params)
    _, new = tx.update(complex_normal(1), state, params)
    assert types(new) == types(state)
    for buffer in state[1:]:
        assert {k: x.dtype.name for k, x in buffer.items()} == {
            k: x.replace("32", "64") if "float" in x else "complex128"
            for k, x in COMPLEX.items()
        }


# Of real numbers, test_contract_mesh.py has all four.
@pytest.mark.parametrize(
    ("kind", "wrap"),
    [(AxisType.Auto, jax.jit), (AxisType.Explicit, lambda f: f)],
    ids=["auto_jit", "explicit_direct"],
)
def test_complex_state_lives_where_params_do(kind, wrap):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = dict(matrix=("x", "y"), vector=("y",), scalar=())
    place = {k: NamedSharding(mesh, PartitionSpec(*x)) for k, x in specs.items()}
    placed = lambda seed: jax.device_put(complex_normal(seed), place)  # noqa: E731
    tx, params = presets.torch(0.1, **ALL, maximize=True), placed(0)
    state, update = wrap(tx.init)(params), wrap(tx.update)
    for seed in (1, 2, 3):
        for buffer in state[1:]:
            for name, x in buffer.items():
                assert x.sharding.is_equivalent_to(place[name], x.ndim)
        updates, state = update(placed(seed), state, params)
        for name, x in updates.items():
            assert x.sharding.is_equivalent_to(place[name], x.ndim)
    if wrap is jax.jit:
        assert update._cache_size() == 1


@complex_options
def test_no_gradient_means_no_change_for_complex_numbers_too(options):
    tx = presets.torch(0.1, **options)
    params = complex_normal(0) | dict(step=jnp.arange(2), left=optax.MaskedNode())
    grads = complex_normal(1) | dict(step=np.zeros(2, jax.dtypes.float0))
    grads |= dict(left=optax.MaskedNode())
    state = tx.init(params)
    _, state = tx.update(grads, state, params)
    for missing in (None, optax.MaskedNode()):
        given = grads | dict(scalar=missing)
        for update in (tx.update, jax.jit(tx.update)):
            updates, new = update(given, state, params)
            assert updates["scalar"] == missing
            assert updates["left"] == optax.MaskedNode()
            assert updates["step"].dtype == jax.dtypes.float0
            assert updates["matrix"].dtype == jnp.complex64
            for old, buffer in zip(state[1:], new[1:], strict=True):
                if old is not None:
                    assert_same(buffer["scalar"], old["scalar"])
                    assert_same(buffer["step"], old["step"])
                    assert not (buffer["matrix"] == old["matrix"]).all()


@pytest.mark.parametrize(
    ("params", "updates", "words"),
    [
        (1j, 1.0, "float32, but its parameter or state is complex64"),
        (1.0, 1j, "complex64, but its parameter or state is float32"),
        (1j, [[1j]], r"must have shape \(\) as in init, got \(1, 1\)"),
        (1.0, True, "must be floating point or complex, got bool"),
    ],
)
def test_torch_gradients_unlike_the_state_are_named_as_they_came(
    params, updates, words
):
    tx = presets.torch(maximize=True)
    state = tx.init(dict(w=jnp.asarray(params)))
    with pytest.raises(ValueError, match=rf"updates\['w'\].*{words}"):
        tx.update(dict(w=jnp.asarray(updates)), state)
