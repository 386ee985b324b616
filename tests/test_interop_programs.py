"""Training programs of PyTorch and Keras go on here without a jump in the loss."""

import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import originals
import pytest
from digits import (
    HALF,
    RATES,
    RUNS,
    STEPS,
    as_list,
    as_tree,
    batches,
    from_params,
    loss_of,
    need,
    schedule,
    start,
    tensors,
    through_a_file,
    to_params,
    train,
)
from flax import nnx
from test_contract import types

from rmsprop_jax import interop, presets

pytestmark = pytest.mark.usefixtures("x64", "lenient")
EVERYTHING = RUNS["everything"]


class Torch:
    """A PyTorch program; two groups of parameters if it is told where each begins."""

    def __init__(self, params, options, groups=None):
        need("torch")
        from torch import nn, optim

        layers = (
            nn.Conv2d(1, 4, 3),
            nn.Softsign(),
            nn.Flatten(),
            nn.Linear(4 * 6 * 6, 10),
        )
        self.model = nn.Sequential(*layers).double()
        self.parameters = list(self.model.parameters())
        for p, x in zip(self.parameters, tensors(from_params(params)), strict=True):
            p.data.copy_(x)
        groups = groups(self.parameters) if groups else self.parameters
        self.optimizer = optim.RMSprop(groups, lr=RATES[0], **options)

    def train(self, first, last):
        from torch.nn.functional import cross_entropy

        losses = []
        for t in range(first, last):
            images, labels = tensors(x[t] for x in batches())
            loss = cross_entropy(self.model(images.permute(0, 3, 1, 2)), labels)
            self.optimizer.zero_grad()
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = RATES[t]
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def params(self):
        return to_params([p.detach().numpy().copy() for p in self.parameters])


class Keras:
    def __init__(self, params, options):
        need("keras")
        with originals.quiet():
            import keras
        keras.config.set_floatx("float64")
        layers = keras.layers
        self.model = keras.Sequential([layers.Input((8, 8, 1))])
        self.model.add(layers.Conv2D(4, 3, activation="softsign"))
        self.model.add(layers.Flatten())
        self.model.add(layers.Dense(10))
        self.model.set_weights(as_list(params))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.optimizer = keras.optimizers.RMSprop(RATES[0], **options)
        self.model.compile(self.optimizer, loss)
        self.optimizer.build(self.model.trainable_variables)

    def train(self, first, last):
        losses = []
        for t in range(first, last):
            images, labels = (x[t] for x in batches())
            losses.append(float(loss_of(self.params(), images, labels)))
            self.optimizer.learning_rate = RATES[t]
            self.model.train_on_batch(images, labels)
        return losses

    def params(self):
        return as_tree(self.model.get_weights())


def assert_no_jump(losses, expected, tx, params, state):
    """Compare losses, up to what training makes of a last digit: see how much that is.

    Another forward pass rounds otherwise, and each step amplifies what came before it.
    So the same run is done again from parameters that differ by an ulp.
    """
    random = np.random.RandomState(0)
    nudged = jax.tree.map(
        lambda p: p * (1 + 2.0**-52 * random.choice([-1, 1], p.shape)), params
    )
    runs = [train(tx, p, state, HALF, STEPS)[2] for p in (params, nudged)]
    ulp = 2.0**-52 + np.maximum.accumulate(np.abs(np.subtract(*runs)))
    # Not once but at every step, about ten times, some of them to the other side.
    assert (np.abs(np.subtract(losses, expected)) <= 8 * HALF * ulp).all()
    # With a state that begins anew there is a jump.
    _, _, fresh = train(tx, params, tx.init(params), HALF, STEPS)
    assert np.abs(np.subtract(fresh, expected)).max() > 0.1


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_torch_program_goes_on(options):
    there = Torch(start(), options)
    there.train(0, HALF)
    params, saved = there.params(), through_a_file(there.optimizer.state_dict())
    expected = there.train(HALF, STEPS)
    tx, state = interop.from_torch(saved, to_params, lr=schedule)
    losses = train(tx, params, state, HALF, STEPS)[2]
    assert_no_jump(losses, expected, tx, params, state)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_torch_program_takes_over(options):
    tx = presets.torch(schedule, **options)
    params, state, _ = train(tx, start(), tx.init(start()), 0, HALF)
    expected = train(tx, params, state, HALF, STEPS)[2]
    there = Torch(params, options)
    back = lambda tree: tensors(from_params(tree))  # noqa: E731
    saved = interop.to_torch(state, back, lr=RATES[HALF], **options)
    there.optimizer.load_state_dict(through_a_file(saved))
    assert_no_jump(there.train(HALF, STEPS), expected, tx, params, state)


def test_groups_go_on_in_a_partition():
    there = Torch(
        start(),
        dict(momentum=0.9),
        lambda p: [dict(params=p[::2], weight_decay=0.1), dict(params=p[1::2])],
    )
    there.train(0, HALF)
    params, saved = there.params(), through_a_file(there.optimizer.state_dict())
    expected = there.train(HALF, STEPS)
    with pytest.raises(
        ValueError, match=r"param_groups\[1\] has weight_decay.*partiti"
    ):
        interop.from_torch(saved, to_params, lr=schedule)

    # Where a group has no parameters, its tree has this.
    none = optax.MaskedNode()
    arranged = dict(
        kernels=lambda x: to_params([x[0], none, x[1], none]),
        biases=lambda x: as_tree([none, x[0], none, x[1]]),
    )
    optimizers, states = {}, {}
    for (name, to_group), group in zip(
        arranged.items(), saved["param_groups"], strict=True
    ):
        rows = {i: saved["state"][i] for i in group["params"]}
        alone = dict(state=rows, param_groups=[group])
        optimizers[name], state = interop.from_torch(alone, to_group, lr=schedule)
        states[name] = optax.MaskedState(state)
    tx = optax.partition(
        optimizers, as_tree(["kernels", "biases", "kernels", "biases"])
    )
    state = tx.init(params)._replace(inner_states=states)

    assert types(state) == types(tx.init(params))
    losses = train(tx, params, state, HALF, STEPS)[2]
    assert_no_jump(losses, expected, tx, params, state)


class NNX(nnx.Module):
    def __init__(self):
        more = dict(param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.conv = nnx.Conv(1, 4, (3, 3), padding="VALID", **more)
        self.dense = nnx.Linear(4 * 6 * 6, 10, **more)

    def __call__(self, x):
        return self.dense(nnx.soft_sign(self.conv(x)).reshape(len(x), -1))


def test_an_nnx_optimizer_goes_on_and_back():
    there = Torch(start(), EVERYTHING)
    there.train(0, HALF)
    params, saved = there.params(), through_a_file(there.optimizer.state_dict())
    expected = there.train(HALF, STEPS)

    model = NNX()
    tree, plain = (
        jax.tree.structure(x) for x in (nnx.state(model, nnx.Param), start())
    )
    to_state = lambda x: tree.unflatten(jax.tree.leaves(to_params(x)))  # noqa: E731
    nnx.update(model, tree.unflatten(map(jnp.asarray, jax.tree.leaves(params))))
    tx, state = interop.from_torch(saved, to_state, lr=schedule)
    # The optimizer keeps what its init returns.
    optimizer = nnx.Optimizer(model, tx._replace(init=lambda _: state), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        loss, grads = nnx.value_and_grad(
            lambda model: optax.softmax_cross_entropy_with_integer_labels(
                model(images), labels
            ).mean()
        )(model)
        optimizer.update(model, grads)
        return loss

    losses = []
    for images, labels in zip(*(x[HALF:STEPS] for x in batches()), strict=True):
        losses.append(float(step(model, optimizer, images, labels)))
    tx, state = interop.from_torch(saved, to_params, lr=schedule)
    assert_no_jump(losses, expected, tx, params, state)

    from_state = lambda x: from_params(plain.unflatten(jax.tree.leaves(x)))  # noqa: E731
    saved = interop.to_torch(
        optimizer.opt_state, from_state, lr=RATES[-1], **EVERYTHING
    )
    assert saved["state"][0]["step"] == STEPS


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_a_keras_program_goes_on_from_its_file(suffix, tmp_path):
    there = Keras(start(), EVERYTHING)
    import h5py

    path = tmp_path / f"model{suffix}"
    # Keras converts its variables in a way that NumPy deprecates.
    with warnings.catch_warnings(action="ignore"):
        there.train(0, HALF)
        params, config = there.params(), there.optimizer.get_config()
        if suffix == ".keras":
            there.model.save(path)
            with zipfile.ZipFile(path) as archive:
                path = archive.extract("model.weights.h5", tmp_path)
        else:
            there.model.save_weights(path)
        expected = there.train(HALF, STEPS)
    with h5py.File(path) as file:
        tx, state = interop.from_keras(
            file["optimizer/vars"], config, as_tree, learning_rate=schedule
        )
    losses = train(tx, params, state, HALF, STEPS)[2]
    assert_no_jump(losses, expected, tx, params, state)


def test_a_keras_program_takes_over():
    tx = presets.keras(schedule, **EVERYTHING)
    params, state, _ = train(tx, start(), tx.init(start()), 0, HALF)
    expected = train(tx, params, state, HALF, STEPS)[2]
    there = Keras(params, EVERYTHING)
    saved = interop.to_keras(state, as_list, learning_rate=RATES[HALF])
    there.optimizer.load_own_variables(saved)
    with warnings.catch_warnings(action="ignore"):
        losses = there.train(HALF, STEPS)
    assert_no_jump(losses, expected, tx, params, state)


def test_variables_of_a_keras_optimizer_are_taken_as_they_are():
    there = Keras(start(), EVERYTHING)
    with warnings.catch_warnings(action="ignore"):
        there.train(0, 3)
        store, config = {}, there.optimizer.get_config()
        there.optimizer.save_own_variables(store)
    _, state = interop.from_keras(there.optimizer.variables, config, as_tree)
    _, saved = interop.from_keras(store, config, as_tree)
    assert state.count == 3
    jax.tree.map(np.testing.assert_array_equal, state, saved)
