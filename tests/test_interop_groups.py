"""A run of PyTorch with parameter groups, an LSTM and a frozen layer, here and back.

Of the two biases, the state of one is dropped, as `rmsprop_jax.interop` explains.
"""

import jax
import numpy as np
import optax
import pytest
from helpers import assert_close

from rmsprop_jax import interop, presets

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("x64", "lenient")
SIZE, STEPS = 3, 5
LABELS = ["kernel", "bias"]
# Of the two biases, among the parameters of the optimizer.
B_IH, B_HH = 3, 4


def build(kind):
    """Return a network of PyTorch, and its optimizer, which does not decay biases."""
    torch.manual_seed(0)
    recurrent, frozen = getattr(torch.nn, kind)(SIZE, SIZE), torch.nn.Linear(SIZE, SIZE)
    frozen.requires_grad_(False)
    model = torch.nn.ModuleList([recurrent, frozen]).double()
    kernels, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [dict(params=kernels, weight_decay=0.1), dict(params=biases)]
    return model, torch.optim.RMSprop(groups, momentum=0.9, centered=True)


def backward(model, x):
    recurrent, frozen = model
    model.zero_grad()
    frozen(recurrent(x)[0]).square().mean().backward()


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def to_leaves(label, arrays):
    """Arrange a group of PyTorch, without the elements of b_hh that Flax lacks."""
    if label == "kernel":
        return [x if x is None else x.T for x in arrays]
    b_ih, b_hh, *others = arrays
    return [*np.split(b_ih, [len(b_ih) - len(b_hh)]), b_hh, *others]


def from_leaves(label, leaves):
    leaves = [torch.tensor(np.array(x).T) for x in leaves]
    return leaves if label == "kernel" else [torch.cat(leaves[:2]), *leaves[2:]]


def to_tree(arrays, twice):
    arrays[B_HH] = arrays[B_HH][twice:]
    kernels, biases = arrays[:B_IH], arrays[B_IH:]
    return dict(kernel=to_leaves("kernel", kernels), bias=to_leaves("bias", biases))


def get_params(optimizer, twice):
    """Return parameters in which the first elements of the two biases are added."""
    arrays = [p.detach().numpy().copy() for p in params_of(optimizer)]
    arrays[B_IH][:twice] += arrays[B_HH][:twice]
    return to_tree(arrays, twice)


def get_gradients(optimizer, twice):
    """Return gradients; those of the frozen layer are None."""
    grads = [p.grad for p in params_of(optimizer)]
    return to_tree([g if g is None else g.numpy().copy() for g in grads], twice)


def from_torch(optimizer, params, twice):
    """Return the optimizer in JAX and its state."""
    saved, txs, states = optimizer.state_dict(), {}, {}
    rows, masked = saved["state"], dict.fromkeys(LABELS, optax.MaskedNode())
    rows[B_HH] = {k: x[twice:] if x.ndim else x for k, x in rows[B_HH].items()}
    for label, group in zip(LABELS, saved["param_groups"], strict=True):
        own = {i: row for i, row in rows.items() if i in group["params"]}
        txs[label], state = interop.from_torch(
            dict(state=own, param_groups=[group]),
            lambda arrays, label=label: masked | {label: to_leaves(label, arrays)},
            params=dict(enumerate(params_of(optimizer))),
        )
        states[label] = optax.MaskedState(state)
    groups = optax.partition(txs, dict(kernel="kernel", bias="bias"))
    doubled = dict(kernel=False, bias=[True, *3 * [False]])
    tx = optax.chain(groups, optax.masked(optax.scale(2.0), doubled))
    initial, *rest = tx.init(params)
    return tx, (initial._replace(inner_states=states), *rest)


def to_torch(state, optimizer, twice):
    """Load the state into an optimizer of PyTorch."""
    rows, groups = [], []
    for label, group in zip(LABELS, optimizer.param_groups, strict=True):
        saved = interop.to_torch(
            state[0].inner_states[label].inner_state,
            lambda params, label=label: from_leaves(label, params[label]),
            **group,
        )
        indices = [len(rows) + i for i in saved["state"]]
        rows += saved["state"].values()
        groups += [saved["param_groups"][0] | dict(params=indices)]
    for name in ("square_avg", "grad_avg", "momentum_buffer"):
        rows[B_HH][name] = torch.cat([rows[B_IH][name][:twice], rows[B_HH][name]])
    state = dict(enumerate(rows))
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


@pytest.mark.parametrize(("kind", "twice"), [("LSTM", 4 * SIZE), ("GRU", 2 * SIZE)])
def test_groups_a_frozen_layer_and_two_biases_move_here_and_back(kind, twice):
    first, second, third = torch.randn(3, STEPS, 2, 1, SIZE, dtype=torch.float64)
    model, expected = build(kind)
    for x in first:
        backward(model, x)
        expected.step()

    params = get_params(expected, twice)
    tx, state = from_torch(expected, params, twice)
    for x in second:
        backward(model, x)
        updates, state = tx.update(get_gradients(expected, twice), state, params)
        add = lambda p, u: p if u is None else p + u
        params = jax.tree.map(add, params, updates)
        expected.step()
        assert_close(params, get_params(expected, twice), rtol=0, atol=1e-12)

    moved_model, moved = build(kind)
    moved_model.load_state_dict(model.state_dict())
    to_torch(state, moved, twice)
    for x in third:
        for network, optimizer in ((model, expected), (moved_model, moved)):
            backward(network, x)
            optimizer.step()
        params = get_params(moved, twice)
        assert_close(params, get_params(expected, twice), rtol=0, atol=1e-12)


def test_a_scheduler_resumes_and_flags_stay():
    state = presets.torch().init(np.ones(3, "float32"))
    own = dict(lr=0.05, initial_lr=0.1, foreach=True, differentiable=False)
    saved = interop.to_torch(state, lambda x: [torch.tensor(x)], **own)
    optimizer = torch.optim.RMSprop([torch.ones(3)])
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert group["foreach"] is True
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t, last_epoch=4)
    assert group["lr"] == 0.1 * 0.5**5
