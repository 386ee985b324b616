"""State in the formats of PyTorch, Keras, TensorFlow 1 and Optax, made by hand."""

from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import aligned, assert_same, from_params, to_params, types

from rmsprop_jax import RMSPropState, interop, presets, storage

COUNT = 7
BOTH = dict(centered=True, momentum=0.6)
TORCH = BOTH | dict(lr=0.02, alpha=0.7, eps=0.1, weight_decay=0.3)
TIMM = TORCH | dict(lr_in_momentum=False, decoupled_decay=True)
KERAS = BOTH | dict(learning_rate=0.02, rho=0.7, epsilon=0.1, weight_decay=0.3)
OPTIONS = dict(torch=TORCH | dict(maximize=False), keras=KERAS, tf1=BOTH, optax=BOTH)
# Of PyTorch; they do not change the update.
EXECUTION = dict(foreach=None, capturable=True, differentiable=False)
kinds = pytest.mark.parametrize("kind", OPTIONS)


def draw(seed, dtype="float32"):
    """Return a (2, 3) kernel and a (4,) bias of eighths, whose squares are exact."""
    random = np.random.default_rng(seed)
    draws = (random.integers(-8, 9, shape) / 8 for shape in ((2, 3), (4,)))
    return [aligned(x.astype(dtype)) for x in draws]


def draw_params(seed):
    return jax.tree.map(jnp.asarray, to_params(draw(seed)))


def buffers(dtype="float32"):
    """Return the average of squares, the average, and the momentum buffer."""
    m, deviation, b = (draw(seed, dtype) for seed in (1, 2, 3))
    return [aligned(x**2 + y**2) for x, y in zip(m, deviation, strict=True)], m, b


def saved(kind, options=None, dtype="float32"):
    """Return the arguments of `from_<kind>`, except `to_params`."""
    options = options or OPTIONS[kind]
    v, m, b = buffers(dtype)
    m, b = m if options["centered"] else [], b if options["momentum"] else []
    if kind == "torch":
        names = dict(square_avg=v, grad_avg=m, momentum_buffer=b)
        names = {"step": 2 * [float(COUNT)]} | {k: x for k, x in names.items() if x}
        rows = {i: {k: x[i] for k, x in names.items()} for i in (0, 1)}
        groups = [options | EXECUTION | dict(params=[0, 1])]
        return dict(state_dict=dict(state=rows, param_groups=groups))
    if kind == "keras":
        values = [np.int32(COUNT), np.float32(options["learning_rate"]), *v, *b, *m]
        variables = {f"{i}": np.asarray(x) for i, x in enumerate(values)}
        # A callback changes the variable alone.
        config = options | dict(learning_rate=0.5, name="rmsprop", use_ema=False)
        return dict(variables=variables, config=config | dict(ema_momentum=0.99))
    if kind == "optax":
        names = dict(nu=v, mu=m, trace=[aligned(-x) for x in b])
        values = {k: to_params(x) for k, x in names.items() if x}
        options = dict(centered=bool(m), momentum=0.6 if b else None)
        state = optax.rmsprop(0.1, **options).init(draw_params(4))
        return dict(opt_state=optax.tree_utils.tree_set(state, **values), count=COUNT)
    slots = dict(rms=v, momentum=b, mg=m)
    return dict(slots={k: x for k, x in slots.items() if x}, count=COUNT)


def load(kind, saved, to_params=to_params, **options):
    """Return the optimizer, or None where there is none, and the state."""
    if kind != "optax":
        options["to_params"] = to_params
    result = getattr(interop, f"from_{kind}")(**saved, **options)
    return result if kind in ("torch", "keras") else (None, result)


def save(kind, state, from_params=from_params, **changed):
    """Return what `to_<kind>` returns, with options of the saved run."""
    if kind == "optax":
        return interop.to_optax(state, **dict(like=saved(kind)["opt_state"]) | changed)
    torch = OPTIONS["torch"] | EXECUTION | dict(lr=np.float64(0.02))
    options = dict(torch=torch, keras=dict(learning_rate=0.02), tf1={})[kind]
    return getattr(interop, f"to_{kind}")(state, from_params, **options | changed)


# What every kind loads, from buffers in float32.
_, STATE = load("tf1", saved("tf1"))


@pytest.mark.parametrize("momentum", [0.0, 0.6], ids=["", "momentum"])
@pytest.mark.parametrize("centered", [False, True], ids=["", "centered"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@kinds
def test_state_moves_here_and_back(kind, dtype, centered, momentum, x64):
    options = dict(centered=centered, momentum=momentum)
    given = saved(kind, OPTIONS[kind] | options, dtype)
    _, state = load(kind, given)
    square, mu, trace = map(to_params, buffers(dtype))
    nu = jax.tree.map(lambda x, m: x - centered * m**2, square, mu)
    expected = nu, mu if centered else None, trace if momentum else None
    expected = jax.tree.map(jnp.asarray, RMSPropState(np.int32(COUNT), *expected))
    assert_same(state, expected)
    assert types(state) == types(expected)

    before = next(iter(given.values()))
    changed = dict(torch=options, optax=dict(like=before)).get(kind, {})
    after = save(kind, state, **changed)
    if kind == "torch":
        # What PyTorch loads with weights_only.
        values = [after["state"][0]["step"], *after["param_groups"][0].values()]
        assert {*map(type, values)} <= {float, bool, list, type(None)}
    if kind == "tf1" and not momentum:
        before["momentum"] = [np.zeros_like(x) for x in before["rms"]]
    assert_same(after, before)
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, before)


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
        if np.ndim(x) and not (kind == "optax" and isinstance(x, jax.Array)):
            x[...] = 9
    assert_same(state, expected)


def test_a_variance_rounded_below_zero_is_zero():
    slots = dict(mg=draw(1), rms=[np.nextafter(x**2, 0) for x in draw(1)])
    state = interop.from_tf1(slots, to_params)
    assert_same(state.nu, jax.tree.map(np.zeros_like, state.nu))


def test_tensors_are_copied_from_their_device():
    tensor = Mock(dtype="torch.float32")
    tensor.detach().cpu.return_value = np.ones(3, "float32")
    assert_same(interop.from_tf1(dict(rms=[tensor]), list).nu, [np.ones(3)])


def test_zeros_of_both_signs_move():
    momentum = np.float32([[0.0, -0.0, -0.0], [-0.0, 0.0, 0.0]])
    slots = dict(rms=[momentum**2], momentum=[momentum])
    state = interop.from_tf1(slots, lambda x: x[0].T)
    assert_same(interop.to_tf1(state, lambda x: (x.T,)), slots)


@kinds
def test_a_compressed_state_is_decoded(kind):
    small = storage.convert(STATE, nu_dtype="uint8", momentum_dtype="bfloat16")
    assert_same(save(kind, small), save(kind, storage.convert(small)))


MASK = dict(weight_decay_mask=dict(kernel=True, bias=False))


@pytest.mark.parametrize(
    ("kind", "preset", "options", "arguments"),
    [
        ("torch", presets.torch, TORCH | dict(maximize=True), {}),
        ("torch", presets.timm, TIMM, {}),
        ("torch", presets.sb3, TORCH, dict(preset=presets.sb3)),
        ("keras", partial(presets.keras, **MASK), KERAS, MASK),
    ],
)
def test_hyperparameters_are_those_of_the_run(kind, preset, options, arguments):
    given = saved(kind, options)
    if kind == "keras":
        # h5py sorts names as text.
        given["variables"] = dict(reversed(given["variables"].items()))
    optimizer, state = load(kind, given, **arguments)
    grads, params = draw_params(4), draw_params(5)
    assert types(state) == types(optimizer.init(params))
    expected = preset(**options).update(grads, state, params)
    assert_same(optimizer.update(grads, state, params), expected)


def test_a_parameter_group_keeps_its_entries():
    own = dict(lr=np.float64(0.02), params=["a", "b"], param_names=["kernel", "bias"])
    own |= dict(lr_in_momentum=False, caution=False, max_lr=0.1, initial_lr=0.1)
    after = interop.to_torch(STATE, from_params, preset=presets.timm, **TORCH | own)
    (group,) = after["param_groups"]
    assert group == TORCH | own | dict(decoupled_decay=False, params=[0, 1])
    assert group["lr"] is own["lr"]


def test_a_keras_schedule_has_no_variable():
    seen, params, given = [], draw_params(4), saved("keras")
    given["variables"] = variables = list(given["variables"].values())
    del variables[1]
    given["config"]["learning_rate"] = dict(class_name="ExponentialDecay")
    schedule = lambda count: seen.append(count) or 0.5
    optimizer, state = load("keras", given, learning_rate=schedule)
    optimizer.update(params, state, params)
    assert seen == [COUNT]
    assert_same(state, STATE)
    after = interop.to_keras(state, from_params, learning_rate=None)
    assert_same([*after.values()], variables)


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
    assert_same(state, STATE)
    optimizer.update(params, state, params)
    assert seen == [COUNT]


def test_a_parameter_without_state_gets_the_initial_one():
    given = saved("torch", TORCH)
    del given["state_dict"]["state"][1]
    params = dict(enumerate(draw(4)))
    optimizer, state = load("torch", given, preset=presets.sb3, params=params)
    first = optimizer.init(to_params(draw(4)))
    assert state.count == COUNT
    for found, old, new in zip(state[1:], STATE[1:], first[1:], strict=True):
        assert_same(found, dict(kernel=old["kernel"], bias=new["bias"]))


def test_the_count_of_an_optax_state_precedes_the_argument():
    for rate, count in ((lambda count: 0.1, 0), (0.1, 3)):
        state = optax.rmsprop(rate).init(jnp.ones(2))
        assert interop.from_optax(state, count=3).count == count
