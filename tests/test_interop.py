"""State in the formats of PyTorch, Keras and TensorFlow 1, made by hand in NumPy."""

import doctest
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contract import assert_same, types
from test_imports import in_a_new_process

from rmsprop_jax import RMSPropState, interop, interop_optax, presets

COUNT = 7
KINDS = {
    "torch": ("float32", "float64", "complex64", "complex128"),
    "keras": ("float32", "float64"),
    "tf1": ("float32", "float64"),
}
FUNCTIONS = [f"{way}_{kind}" for kind in (*KINDS, "optax") for way in ("from", "to")]
each = pytest.mark.parametrize("name", FUNCTIONS)
PRESETS = [x.__name__ for x in vars(presets).values() if inspect.isfunction(x)]
PRESETS = [name for name in PRESETS if name != "rmsprop" and name[0] != "_"]
kinds = pytest.mark.parametrize("kind", KINDS)
kinds_and_dtypes = pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind in KINDS for dtype in KINDS[kind]]
)
with_momentum = pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["", "momentum"])
with_mean = pytest.mark.parametrize("centered", [False, True], ids=["", "centered"])


def to_params(x):
    return dict(kernel=x[0].T, bias=x[1])


def from_params(params):
    return [params["kernel"].T, params["bias"]]


def draw(seed, dtype="float32"):
    """Return the numbers of a (2, 3) kernel and a (4,) bias."""
    random = np.random.default_rng(seed)
    pairs = [random.normal(size=(2, *shape)) for shape in [(2, 3), (4,)]]
    is_complex = np.issubdtype(dtype, np.complexfloating)
    return [(x + 1j * y if is_complex else x).astype(dtype) for x, y in pairs]


def squares(x):
    """Return the squares, by parts where x is complex, as PyTorch has them."""
    return x.real**2 + 1j * x.imag**2 if np.iscomplexobj(x) else x**2


def averages(dtype="float32"):
    """Return v of squares and m of gradients, and the momentum buffer b."""
    m, deviation, b = (draw(seed, dtype) for seed in (1, 2, 3))
    v = [squares(x) + squares(y) for x, y in zip(m, deviation, strict=True)]
    return v, m, b


def given(kind, dtype="float32", centered=True, momentum=0.9):
    """Return what `from_<kind>` takes, but for `to_params`."""
    v, m, b = averages(dtype)
    m, b = m if centered else None, b if momentum else None
    options = dict(centered=centered, momentum=momentum, weight_decay=0.01)
    if kind == "torch":
        names = dict(square_avg=v, grad_avg=m, momentum_buffer=b)
        names = {name: x for name, x in names.items() if x}
        rows = {i: {k: x[i] for k, x in names.items()} for i in (0, 1)}
        rows = {i: row | dict(step=float(COUNT)) for i, row in rows.items()}
        group = options | dict(lr=0.01, alpha=0.99, eps=1e-8, maximize=False)
        # These change nothing, and neither does their absence.
        group |= dict(foreach=None, capturable=False, differentiable=False)
        return dict(
            state_dict=dict(state=rows, param_groups=[group | {"params": [0, 1]}])
        )
    if kind == "keras":
        variables = [np.int32(COUNT), np.float32(0.01), *v, *(b or []), *(m or [])]
        config = options | dict(learning_rate=0.01, rho=0.9, epsilon=1e-7)
        config |= dict(name="rmsprop", clipnorm=None, use_ema=False, ema_momentum=0.99)
        numbered = {str(i): np.asarray(x) for i, x in enumerate(variables)}
        return dict(variables=numbered, config=config)
    slots = {name: x for name, x in dict(rms=v, mg=m, momentum=b).items() if x}
    return dict(slots=slots, count=COUNT)


def load(kind, given, to_params=to_params, **options):
    result = getattr(interop, f"from_{kind}")(**given, to_params=to_params, **options)
    return result if isinstance(result, RMSPropState) else result[1]


def save(kind, state, centered=True, momentum=0.9, from_params=from_params):
    options = dict(centered=centered, momentum=momentum, weight_decay=0.01, lr=0.01)
    options = dict(torch=options, keras=dict(learning_rate=0.01), tf1={})[kind]
    return getattr(interop, f"to_{kind}")(state, from_params, **options)


def by_parts(x):
    return np.stack([x.real, x.imag]) if np.iscomplexobj(x) else np.asarray(x)


def aligned(x):
    """Return a copy where XLA would share it: it begins at a multiple of 64 bytes."""
    memory = np.empty(x.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copied = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copied[...] = x
    return copied


@with_momentum
@with_mean
@kinds_and_dtypes
def test_numbers_are_those_of_the_other_side(kind, dtype, centered, momentum, x64):
    v, m, b = averages(dtype)
    state = load(kind, given(kind, dtype, centered, momentum))
    assert type(state) is RMSPropState
    assert (state.count.dtype, int(state.count)) == (jnp.int32, COUNT)
    assert_same(state.mu, to_params(m) if centered else None)
    assert_same(state.trace, to_params(b) if momentum else None)
    if not centered:
        assert_same(state.nu, to_params(v))
        return
    for nu, x, mean in zip(from_params(state.nu), v, m, strict=True):
        # The square and the difference are each rounded once, at most at the size of v.
        error = by_parts(nu).astype("longdouble") - by_parts(x)
        error += by_parts(mean).astype("longdouble") ** 2
        assert (np.abs(error) <= np.finfo(dtype).eps * by_parts(x)).all()
        assert nu.dtype == dtype


@with_momentum
@with_mean
@kinds_and_dtypes
def test_back_again_are_the_same_numbers(kind, dtype, centered, momentum, x64):
    (before, *_) = given(kind, dtype, centered, momentum).values()
    state = load(kind, given(kind, dtype, centered, momentum))
    after = save(kind, state, centered, momentum)
    if kind == "tf1" and not momentum:
        assert not np.concatenate([x.ravel() for x in after.pop("momentum")]).any()
    if kind == "torch":
        (old,), (new,) = before.pop("param_groups"), after.pop("param_groups")
        assert new == {name: old[name] for name in new}
        assert set(old) - set(new) == {"foreach", "capturable", "differentiable"}
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        # m^2 is the same both ways; the difference and the sum are each rounded once.
        ulp = 1 if centered else 0
        np.testing.assert_array_max_ulp(by_parts(old), by_parts(new), ulp)
        assert np.shape(new) == np.shape(old)


@pytest.mark.parametrize("dtype", KINDS["torch"])
def test_a_variance_rounded_below_zero_is_zero(dtype, x64):
    below = given("torch", dtype)
    for row in below["state_dict"]["state"].values():
        square = squares(row["grad_avg"])
        by_part = row["square_avg"].view(square.real.dtype)
        by_part[...] = np.nextafter(square.view(by_part.dtype), 0)
    nu = load("torch", below).nu
    assert_same(nu, jax.tree.map(np.zeros_like, nu))


@kinds_and_dtypes
def test_the_transformation_takes_the_state(kind, dtype, x64):
    optimizer = presets.tf1(0.1, momentum=0.9, centered=True)
    if kind != "tf1":
        result = getattr(interop, f"from_{kind}")(
            **given(kind, dtype), to_params=to_params
        )
        optimizer = result[0]
    params = jax.tree.map(jnp.asarray, to_params(draw(4, dtype)))
    state = load(kind, given(kind, dtype))
    assert types(state) == types(optimizer.init(params))
    updates, after = optimizer.update(params, state, params)
    assert types(after) == types(state)
    assert (types(updates), int(after.count)) == (types(params), COUNT + 1)


NUMBERS = dict(momentum=0.6, weight_decay=0.3, centered=True)
TORCH = NUMBERS | dict(lr=0.02, alpha=0.7, eps=0.1)


@pytest.mark.parametrize(
    ("kind", "preset", "numbers"),
    [
        ("torch", presets.torch, TORCH | dict(maximize=True)),
        (
            "torch",
            presets.timm,
            TORCH | dict(decoupled_decay=True, lr_in_momentum=True),
        ),
        ("torch", presets.timm, TORCH | dict(lr_in_momentum=False)),
        ("torch", presets.sb3, TORCH),
        (
            "keras",
            presets.keras,
            NUMBERS | dict(learning_rate=0.02, rho=0.7, epsilon=0.1),
        ),
    ],
    ids=["torch", "timm", "timm_outside", "sb3", "keras"],
)
def test_numbers_of_the_run_are_those_of_the_preset(kind, preset, numbers):
    saved, options = given(kind), {}
    if kind == "torch":
        (group,) = saved["state_dict"]["param_groups"]
        if preset is not presets.torch:
            group.pop("maximize")
        group |= numbers
        options = dict(preset=preset) if preset is presets.sb3 else {}
    else:
        saved["config"] |= numbers
        # What a callback made of it is in the variable alone.
        saved["config"]["learning_rate"] = 0.5
        saved["variables"]["1"] = np.float32(numbers["learning_rate"])
    load_from = getattr(interop, f"from_{kind}")
    optimizer, state = load_from(**saved, to_params=to_params, **options)
    grads, params = (jax.tree.map(jnp.asarray, to_params(draw(k))) for k in (4, 5))
    expected = preset(**numbers).update(grads, state, params)
    assert_same(optimizer.update(grads, state, params), expected)


@pytest.mark.parametrize(
    ("kind", "name"), [("torch", "lr"), ("keras", "learning_rate")]
)
def test_a_schedule_goes_on_at_the_count(kind, name):
    saved, load_from = given(kind), getattr(interop, f"from_{kind}")
    if kind == "torch":
        # What the scheduler did to it is not in the dict of the optimizer.
        saved["state_dict"]["param_groups"][0]["initial_lr"] = 0.1
    grads, params = (jax.tree.map(jnp.asarray, to_params(draw(k))) for k in (4, 5))
    steps = []
    for rate in (lambda count: jnp.where(count == COUNT, 0.5, 0.0), 0.5, 0.25):
        optimizer, state = load_from(**saved, to_params=to_params, **{name: rate})
        steps.append(optimizer.update(grads, state, params)[0])
    assert_same(*steps[:2])
    assert (steps[1]["bias"] != steps[2]["bias"]).all()


def test_what_a_torch_scheduler_left_needs_lr_alone():
    left = dict(initial_lr=0.1, max_lr=0.1, min_lr=1e-5, swa_lr=0.05)
    saved = given("torch")
    saved["state_dict"]["param_groups"][0] |= left
    assert_same(load("torch", saved, lr=0.1), load("torch", given("torch")))


def test_a_keras_schedule_has_no_variable_of_its_own():
    saved = given("keras")
    expected = load("keras", given("keras"))
    values = list(saved["variables"].values())
    saved["variables"] = [values[0], *values[2:]]
    saved["config"]["learning_rate"] = dict(class_name="ExponentialDecay")
    state = load("keras", saved, learning_rate=0.1)
    assert_same(state, expected)
    store = interop.to_keras(state, from_params, learning_rate=None)
    assert_same(list(map(by_parts, store.values())), saved["variables"])


def test_the_count_is_that_of_the_oldest_parameter():
    saved = given("torch")
    saved["state_dict"]["state"][0]["step"] = np.float32(COUNT - 2)
    assert load("torch", saved).count == COUNT


def test_equal_groups_are_one_in_their_order():
    saved = given("torch")
    (group,) = saved["state_dict"]["param_groups"]
    groups = [group | dict(params=[1]), group | dict(params=[0], foreach=True)]
    saved["state_dict"]["param_groups"] = groups
    state = load("torch", saved, lambda x: to_params([x[1], x[0]]))
    assert_same(state, load("torch", given("torch")))


@kinds
def test_nothing_is_shared_with_the_caller(kind):
    saved = jax.tree.map(lambda x: aligned(x) if np.ndim(x) else x, given(kind))
    expected = jax.tree.map(np.array, load(kind, given(kind)))
    state = load(kind, saved)
    assert_same(saved, given(kind))
    for x in jax.tree.leaves(saved):
        if np.ndim(x):
            x[...] = 9
    assert_same(state, expected)

    returned = save(kind, state)
    for x in jax.tree.leaves(returned):
        if np.ndim(x):
            x[...] = 9
    assert_same(state, expected)


def test_no_framework_is_imported():
    code = """
import sys
import numpy as np
from rmsprop_jax import interop
row = dict(step=3.0, square_avg=np.ones(2, "float32"))
group = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0, momentum=0, centered=False)
saved = dict(state={0: row}, param_groups=[group | dict(params=[0], maximize=False)])
_, state = interop.from_torch(saved, list)
interop.to_keras(state, list, learning_rate=0.1)
interop.from_tf1(interop.to_tf1(state, list), list)
heavy = ["flax", "torch", "keras", "tensorflow", "h5py", "timm", "stable_baselines3"]
print(state.count, *[name for name in heavy if name in sys.modules])
"""
    assert in_a_new_process(code) == ["3"]


@each
def test_docstring_arguments_are_the_signature(name):
    function = getattr(interop, name)
    doc = inspect.getdoc(function)
    section = re.search(r"Args:\n(.*?)\n\n", doc, re.DOTALL).group(1)
    documented = re.findall(r"^  \**(\w+):", section, re.MULTILINE)
    assert documented == list(inspect.signature(function).parameters)
    for part in ("Returns", "Raises", "Example", "References"):
        assert f"\n{part}:\n" in doc


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_how_it_differs_and_from_where_it_is(name):
    doc = inspect.getdoc(getattr(presets, name))
    assert "\nDiffers from `rmsprop`: " in doc
    assert "\nReferences:\n" in doc


def test_docstring_examples_run():
    modules = interop, interop_optax, presets
    tests = [
        test for module in modules for test in doctest.DocTestFinder().find(module)
    ]
    tests = [test for test in tests if test.examples]
    found = {test.name.split(".")[-1] for test in tests}
    assert found == {*FUNCTIONS, "presets"}
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_keras_weight_decay_may_be_masked():
    saved, mask = given("keras"), jax.tree.map(lambda x: x.ndim > 1, to_params(draw(0)))
    optimizer, state = interop.from_keras(
        **saved, to_params=to_params, weight_decay_mask=mask
    )
    params = jax.tree.map(jnp.asarray, to_params(draw(5)))
    updates, _ = optimizer.update(params, state, params)
    numbers = dict(momentum=0.9, centered=True, learning_rate=0.01, weight_decay=0.01)
    expected = presets.keras(**numbers, weight_decay_mask=mask)
    assert_same(updates, expected.update(params, state, params)[0])
