"""State in the formats of PyTorch, Keras and TensorFlow 1, made by hand in NumPy."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import aligned, assert_same, from_params, to_params, types

from rmsprop_jax import interop, presets, rmsprop, storage

COUNT = 7
BOTH = dict(centered=True, momentum=0.9)
# Of PyTorch; they do not change the update.
EXECUTION = dict(foreach=None, capturable=True, differentiable=False)
kinds = pytest.mark.parametrize("kind", ["torch", "keras", "tf1"])


@pytest.fixture(autouse=True)
def no_framework(monkeypatch):
    """Make the import of another framework fail."""
    for name in ("torch", "keras", "tensorflow", "flax", "h5py"):
        monkeypatch.setitem(sys.modules, name, None)


def draw(seed, dtype="float32"):
    """Return a (2, 3) kernel and a (4,) bias."""
    random = np.random.default_rng(seed)
    return [aligned(random.normal(size=x).astype(dtype)) for x in ((2, 3), (4,))]


def draw_params(seed):
    return jax.tree.map(jnp.asarray, to_params(draw(seed)))


def buffers(dtype="float32"):
    """Return the average of squares, the average, and the momentum buffer."""
    m, deviation, b = (draw(seed, dtype) for seed in (1, 2, 3))
    return [aligned(x**2 + y**2) for x, y in zip(m, deviation, strict=True)], m, b


def saved(kind, dtype="float32", centered=True, momentum=0.9):
    """Return the arguments of `from_<kind>`, except `to_params`."""
    v, m, b = buffers(dtype)
    m, b = m if centered else [], b if momentum else []
    options = dict(centered=centered, momentum=momentum, weight_decay=0.01)
    if kind == "torch":
        names = dict(square_avg=v, grad_avg=m, momentum_buffer=b)
        rows = {i: {k: x[i] for k, x in names.items() if x} for i in (0, 1)}
        rows = {i: row | dict(step=float(COUNT)) for i, row in rows.items()}
        group = dict(lr=0.01, alpha=0.99, eps=1e-8, maximize=False, params=[0, 1])
        groups = [options | EXECUTION | group]
        return dict(state_dict=dict(state=rows, param_groups=groups))
    if kind == "keras":
        values = [np.int32(COUNT), np.float32(0.01), *v, *b, *m]
        config = options | dict(learning_rate=0.01, rho=0.9, epsilon=1e-7)
        config |= dict(name="rmsprop", clipnorm=None, use_ema=False, ema_momentum=0.99)
        variables = {f"{i}": np.asarray(x) for i, x in enumerate(values)}
        return dict(variables=variables, config=config)
    slots = {name: x for name, x in dict(rms=v, momentum=b, mg=m).items() if x}
    return dict(slots=slots, count=COUNT)


def load(kind, saved, to_params=to_params, **options):
    """Return the optimizer, or None for TensorFlow 1, and the state."""
    result = getattr(interop, f"from_{kind}")(**saved, to_params=to_params, **options)
    return (None, result) if kind == "tf1" else result


def save(kind, state, from_params=from_params, **changed):
    torch = BOTH | EXECUTION | dict(lr=np.float64(0.01), weight_decay=0.01) | changed
    options = dict(torch=torch, keras=dict(learning_rate=0.01), tf1={})[kind]
    return getattr(interop, f"to_{kind}")(state, from_params, **options)


@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["", "momentum"])
@pytest.mark.parametrize("centered", [False, True], ids=["", "centered"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@kinds
def test_state_moves_here_and_back(kind, dtype, centered, momentum, x64):
    given = saved(kind, dtype, centered, momentum)
    before, v, m, b = next(iter(given.values())), *buffers(dtype)
    _, state = load(kind, given)
    assert (state.count.dtype, int(state.count)) == (jnp.int32, COUNT)
    assert_same(state.mu, to_params(m) if centered else None)
    assert_same(state.trace, to_params(b) if momentum else None)
    for nu, x, mean in zip(from_params(state.nu), v, m, strict=True):
        exact = np.longdouble(x) - centered * np.longdouble(mean) ** 2
        # The square and the difference are each rounded once.
        bound = centered * np.finfo(dtype).eps * x
        assert (np.abs(np.asarray(nu) - exact) <= bound).all()
        assert nu.dtype == dtype

    after = save(kind, state, centered=centered, momentum=momentum)
    if kind == "torch":
        (group,) = groups = after.pop("param_groups")
        assert groups == before.pop("param_groups")
        # What PyTorch loads with weights_only.
        values = [after["state"][0]["step"], *group.values()]
        assert {*map(type, values)} <= {float, bool, list, type(None)}
    if kind == "tf1" and not momentum:
        assert not np.concatenate([x.ravel() for x in after.pop("momentum")]).any()
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert np.shape(new) == np.shape(old)
        np.testing.assert_array_max_ulp(np.asarray(new), np.asarray(old), centered)


@kinds
def test_no_memory_is_shared(kind):
    def arrange(arrays):
        arranged.append(jax.tree.map(aligned, to_params(arrays)))
        return arranged[-1]

    arranged, given = [], saved(kind)
    expected = jax.tree.map(np.array, load(kind, given)[1])
    _, state = load(kind, given, arrange)
    assert_same(given, saved(kind))
    for x in jax.tree.leaves((given, arranged, save(kind, state))):
        if np.ndim(x):
            x[...] = 9
    assert_same(state, expected)


def test_a_variance_rounded_below_zero_is_zero():
    given = saved("tf1")
    for square, mean in zip(given["slots"]["rms"], given["slots"]["mg"], strict=True):
        square[...] = np.nextafter(mean**2, 0)
    _, state = load("tf1", given)
    assert_same(state.nu, jax.tree.map(np.zeros_like, state.nu))


def test_tensors_are_copied_from_their_device():
    class Tensor:
        dtype = "torch.float32"

        def detach(self):
            return self

        def cpu(self):
            return np.ones(3, "float32")

    assert_same(interop.from_tf1(dict(rms=[Tensor()]), list).nu, [np.ones(3)])


def test_zeros_of_both_signs_move():
    momentum = np.float32([[0.0, -0.0, -0.0], [-0.0, 0.0, 0.0]])
    slots = dict(rms=[momentum**2], momentum=[momentum])
    state = interop.from_tf1(slots, lambda x: x[0].T)
    assert_same(interop.to_tf1(state, lambda x: (x.T,)), slots)


def test_a_compressed_state_is_decoded():
    _, state = load("tf1", saved("tf1"))
    small = storage.convert(state, nu_dtype="uint8", momentum_dtype="bfloat16")
    large = storage.convert(small)
    assert_same(save("tf1", small), save("tf1", large))
    like = optax.rmsprop(0.1, **BOTH).init(draw_params(4))
    assert_same(interop.to_optax(small, like), interop.to_optax(large, like))


OPTIONS = dict(momentum=0.6, weight_decay=0.3, centered=True)
TORCH = OPTIONS | dict(lr=0.02, alpha=0.7, eps=0.1)
TIMM = TORCH | dict(lr_in_momentum=False, decoupled_decay=False)
KERAS = OPTIONS | dict(learning_rate=0.02, rho=0.7, epsilon=0.1)
MASK = dict(weight_decay_mask=dict(kernel=True, bias=False))


@pytest.mark.parametrize(
    ("kind", "preset", "options"),
    [
        ("torch", presets.torch, TORCH | dict(maximize=True)),
        ("torch", presets.timm, TIMM | dict(decoupled_decay=True)),
        ("torch", presets.timm, TIMM | dict(lr_in_momentum=True)),
        ("torch", presets.sb3, TORCH),
        ("keras", presets.keras, KERAS | MASK),
        ("keras", presets.keras, KERAS | MASK | dict(weight_decay=0.0)),
        ("keras", presets.keras, KERAS | MASK | dict(weight_decay=None)),
    ],
)
def test_hyperparameters_are_those_of_the_run(kind, preset, options):
    given = saved(kind)
    if kind == "torch":
        (group,) = given["state_dict"]["param_groups"]
        if preset is not presets.torch:
            group.pop("maximize")
        group |= options
        more = dict(preset=preset) if preset is presets.sb3 else {}
    else:
        # A callback changes the variable alone.
        given["config"] |= options | dict(learning_rate=0.5)
        given["variables"]["1"] = np.float32(options["learning_rate"])
        # h5py sorts names as text.
        given["variables"] = dict(sorted(given["variables"].items(), reverse=True))
        more = MASK
    optimizer, state = load(kind, given, **more)
    grads, params = draw_params(4), draw_params(5)
    assert types(state) == types(optimizer.init(params))
    expected = preset(**options).update(grads, state, params)
    assert_same(optimizer.update(grads, state, params), expected)


@pytest.mark.parametrize(
    ("preset", "own"),
    [
        (presets.timm, dict(lr_in_momentum=False, caution=False, max_lr_snapshot=0.1)),
        (presets.sb3, dict(initial_lr=0.1, param_names=["kernel", "bias"])),
    ],
)
def test_a_parameter_group_keeps_its_entries(preset, own):
    _, state = load("torch", saved("torch"))
    group = TORCH | own | dict(lr=np.float64(0.02), params=["kernel", "bias"])
    after = interop.to_torch(state, from_params, preset=preset, **group)
    (after,) = after["param_groups"]
    assert after["lr"] is group["lr"]
    decoupled = dict(decoupled_decay=False) if preset is presets.timm else {}
    assert after == decoupled | group | dict(params=[0, 1])


def test_a_keras_schedule_has_no_variable():
    seen, params, given = [], draw_params(4), saved("keras")
    values = list(given["variables"].values())
    given["variables"] = [values[0], *values[2:]]
    given["config"]["learning_rate"] = dict(class_name="ExponentialDecay")
    schedule = dict(learning_rate=lambda count: seen.append(count) or 0.5)
    optimizer, state = load("keras", given, **schedule)
    optimizer.update(params, state, params)
    assert seen == [COUNT]
    assert_same(state, load("keras", saved("keras"))[1])
    store = interop.to_keras(state, from_params, learning_rate=None)
    for old, new in zip(given["variables"], store.values(), strict=True):
        np.testing.assert_array_max_ulp(old, new, 1)


def test_equal_groups_are_joined_in_their_order_and_continue_a_schedule():
    seen, params, given = [], draw_params(4), saved("torch")
    (group,) = given["state_dict"]["param_groups"]
    group |= dict(initial_lr=0.1, max_lr=0.1, min_lr=1e-5, swa_lr=0.05)
    groups = [group | dict(params=[1]), group | dict(params=[0], foreach=True)]
    given["state_dict"]["param_groups"] = groups
    # The largest step counts.
    given["state_dict"]["state"][0]["step"] = np.float32(COUNT - 2)
    lr = lambda count: seen.append(count) or 0.5
    optimizer, state = load("torch", given, lambda x: to_params(x[::-1]), lr=lr)
    assert_same(state, load("torch", saved("torch"))[1])
    optimizer.update(params, state, params)
    assert seen == [COUNT]


@pytest.mark.parametrize("preset", [presets.torch, presets.sb3])
def test_a_parameter_without_state_gets_the_initial_one(preset):
    given, (_, whole) = saved("torch"), load("torch", saved("torch"))
    del given["state_dict"]["state"][1]
    if preset is presets.sb3:
        del given["state_dict"]["param_groups"][0]["maximize"]
    params = dict(enumerate(draw(4)))
    optimizer, state = load("torch", given, preset=preset, params=params)
    first = optimizer.init(to_params(draw(4)))
    assert state.count == COUNT
    for found, old, new in zip(state[1:], whole[1:], first[1:], strict=True):
        assert_same(found, dict(kernel=old["kernel"], bias=new["bias"]))


@pytest.mark.parametrize("options", [{}, BOTH], ids=["plain", "both"])
def test_a_restored_state_of_optax_is_not_shared(options):
    params = draw_params(4)
    restored = jax.device_get(optax.rmsprop(0.1, **options).init(params))
    restored = jax.tree.map(aligned, restored)
    state = interop.from_optax(restored)
    for x in jax.tree.leaves(restored):
        x[...] = 9
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert_same(state, rmsprop(0.1, **options).init(params))


def test_the_count_of_an_optax_state_precedes_the_argument():
    for rate, count in ((lambda count: 0.1, 0), (0.1, 3)):
        state = optax.rmsprop(rate).init(jnp.ones(2))
        assert interop.from_optax(state, count=3).count == count
    with pytest.raises(ValueError, match=r"count must be an integer .* got 0.5"):
        interop.from_optax(state, count=0.5)
