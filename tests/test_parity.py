"""The PyTorch form of the README's table, step by step against PyTorch itself."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import rmsprop

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_torch_form_matches_torch(x64, lenient, centered, momentum, weight_decay):
    random = np.random.default_rng(0)
    start, grads = random.normal(size=5), random.normal(size=(120, 5))
    schedule = optax.piecewise_constant_schedule(1e-2, {60: 0.1})
    theirs = torch.tensor(start, dtype=torch.float64)
    optimizer = torch.optim.RMSprop(
        [theirs], momentum=momentum, centered=centered, weight_decay=weight_decay
    )
    ours = jnp.asarray(start)
    tx = rmsprop(
        schedule,
        decay=0.99,
        eps_in_sqrt=False,
        centered=centered,
        momentum=momentum or None,
        lr_in_momentum=False,
        l2=weight_decay or None,
    )
    state = tx.init(ours)
    for t, g in enumerate(grads):
        optimizer.param_groups[0]["lr"] = float(schedule(t))
        theirs.grad = torch.tensor(g)
        optimizer.step()
        updates, state = tx.update(jnp.asarray(g), state, ours)
        ours = optax.apply_updates(ours, updates)
    # 120 steps of length 1e-2, each of a few roundings of 1e-16.
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-12)
