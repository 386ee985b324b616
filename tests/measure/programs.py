"""Train with other libraries, with Optax's RMSProp and with ours in its place.

`python tests/measure/programs.py > tests/measure/programs.md` needs the extra
`programs`. It fails where results differ by more than rounding explains. Each of two
implementations rounds about ten times in a step, by up to half an ulp, so their updates
differ by up to 10 ulp: results may differ by what changes if all of Optax's updates are
10 ulp longer, and 10 ulp more. Differences are relative to the largest number of an
array.
"""

import datetime
import sys
from importlib.metadata import version

import diffrax as dfx
import equinox as eqx
import gpjax as gpx
import jax
import jax.numpy as jnp
import measuring
import netket as nk
import numpy as np
import optax
import optimistix as optx
from blackjax import meanfield_vi
from flax import nnx
from flowjax import flows, train
from flowjax.distributions import StandardNormal
from jaxopt import OptaxSolver
from numpyro import sample
from numpyro.distributions import Normal
from numpyro.infer import SVI, Trace_ELBO, autoguide
from numpyro.optim import optax_to_numpyro

import rmsprop_jax

STEPS = 50
KEYS = jax.random.split(jax.random.key(0), STEPS)
X = np.random.RandomState(0).standard_normal((64, 4)).astype(np.float32)
Y = np.sin(X[:, 0]) + X[:, 1] * X[:, 2]


def loss(weights, _=None):
    return jnp.mean((X @ weights - Y) ** 2)


def diffrax(rmsprop):
    """SDE as a GAN, whose discriminator ascends: `rmsprop(-1e-2)`."""
    both = dict(generator=rmsprop(1e-3), discriminator=rmsprop(-1e-2))
    optimizer = optax.partition(both, ("generator", "discriminator"))
    move = measuring.step_of(optimizer)

    def generate(matrices, key):
        noise = dfx.VirtualBrownianTree(0, 1, 0.1, (2,), key)
        drift = dfx.ODETerm(lambda t, y, args: jnp.tanh(matrices[0] @ y))
        diffusion = dfx.ControlTerm(lambda t, y, args: matrices[1], noise)
        terms = dfx.MultiTerm(drift, diffusion)
        return dfx.diffeqsolve(terms, dfx.Euler(), 0, 1, 0.25, jnp.ones(2)).ys[0]

    def score(params, key):
        matrices, weights = params
        fake = jax.vmap(generate, (None, 0))(matrices, jax.random.split(key, len(X)))
        real, fake = (jnp.mean(jnp.tanh(x @ weights)) for x in (X[:, 2:], fake))
        return real - fake

    def step(held, key):
        value, grads = jax.value_and_grad(score)(held[0], key)
        return move(held, grads), value

    start = jnp.stack([jnp.eye(2), jnp.eye(2)]), jnp.linspace(-1.0, 1, 6).reshape(2, 3)
    (found, _), values = jax.lax.scan(step, (start, optimizer.init(start)), KEYS)
    return values[-1], found


def equinox(rmsprop):
    """`filter_jit`: a multilayer perceptron whose biases are frozen."""
    model = eqx.nn.MLP(4, "scalar", 8, 1, key=KEYS[0])
    trained = jax.tree.map(lambda x: eqx.is_array(x) and x.ndim > 1, model)
    optimizer = rmsprop(1e-2, bias_correction=True)
    state = optimizer.init(eqx.filter(model, trained))

    @eqx.filter_jit
    def step(model, state):
        weights, rest = eqx.partition(model, trained)

        @eqx.filter_value_and_grad
        def error(weights):
            return jnp.mean((jax.vmap(eqx.combine(weights, rest))(X) - Y) ** 2)

        value, grads = error(weights)
        updates, state = optimizer.update(grads, state, weights)
        return eqx.apply_updates(model, updates), state, value

    for _ in KEYS:
        model, state, value = step(model, state)
    return value, model


def flax(rmsprop):
    """NNX: BatchNorm, momentum."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs))
    optimizer = nnx.Optimizer(model, rmsprop(1e-2, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        error = nnx.value_and_grad(lambda model: jnp.mean((model(X)[:, 0] - Y) ** 2))
        value, grads = error(model)
        optimizer.update(model, grads)
        return value

    return [step(model, optimizer) for _ in KEYS][-1], nnx.state(model, nnx.Param)


def optimistix(rmsprop):
    """`OptaxMinimiser`: least squares."""
    solver = optx.OptaxMinimiser(rmsprop(1e-2, nesterov=True, momentum=0.5), 0, 0)
    found = optx.minimise(loss, solver, jnp.zeros(4), max_steps=STEPS, throw=False)
    return found.state.f, found.value


def jaxopt(rmsprop):
    """`OptaxSolver`: least squares."""
    solver = OptaxSolver(loss, rmsprop(1e-2, initial_scale=1.0), maxiter=STEPS)
    params, state = solver.run(jnp.zeros(4))
    return state.value, params


def numpyro(rmsprop):
    """`SVI`: Bayesian regression, schedule."""

    def model():
        weights = sample("weights", Normal(jnp.zeros(4), 1).to_event())
        sample("y", Normal(X @ weights, 1), obs=Y)

    optimizer = rmsprop(optax.cosine_decay_schedule(0.1, STEPS), decay=0.99, eps=1e-3)
    guide, optimizer = autoguide.AutoNormal(model), optax_to_numpyro(optimizer)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    found = svi.run(KEYS[0], STEPS, progress_bar=False)
    return found.losses[-1], found.params


def blackjax(rmsprop):
    """`meanfield_vi`: Bayesian regression."""
    vi = meanfield_vi(lambda weights: -loss(weights), rmsprop(1e-2))
    start = vi.init(jnp.zeros(4))
    state, info = jax.lax.scan(lambda state, key: vi.step(key, state), start, KEYS)
    return info.elbo[-1], (state.mu, state.rho)


def flowjax(rmsprop):
    """`fit_to_key_based_loss`: normalizing flow."""
    base = StandardNormal((4,))
    flow = flows.coupling_flow(KEYS[0], base_dist=base, flow_layers=1, nn_width=8)
    elbo = train.losses.ElboLoss(lambda weights: -loss(weights), num_samples=10)
    options = dict(loss_fn=elbo, steps=STEPS, show_progress=False)
    fit, optimizer = train.fit_to_key_based_loss, rmsprop(1e-2)
    flow, losses = fit(KEYS[1], flow, optimizer=optimizer, **options)
    return jnp.float32(losses[-1]), flow


def gpjax(rmsprop):
    """`fit`: Gaussian process, float64, centered."""
    mean, kernel = gpx.mean_functions.Constant(), gpx.kernels.RBF()
    prior = gpx.gps.Prior(mean_function=mean, kernel=kernel)
    data = gpx.Dataset(X[:, :1].astype(float), Y[:, None].astype(float))
    options = dict(optim=rmsprop(1e-3, centered=True), num_iters=STEPS, verbose=False)
    model, losses = gpx.fit(
        model=prior * gpx.likelihoods.Gaussian(),
        objective=lambda model, data: -gpx.objectives.conjugate_mll(model, data),
        train_data=data,
        **options,
    )
    return losses[-1], model


def netket(rmsprop):
    """`VMC`: ground state of an Ising chain, complex128."""
    space = nk.hilbert.Spin(0.5, 6)
    ising = nk.operator.Ising(space, nk.graph.Chain(6), h=1.0)
    state = nk.vqs.FullSumState(space, nk.models.RBM(param_dtype=complex), seed=0)
    driver = nk.VMC(ising, rmsprop(1e-2), variational_state=state)
    driver.run(STEPS, show_progress=False)
    return jnp.real(driver.energy.mean), state.parameters


PROGRAMS = (
    *(diffrax, equinox, flax, optimistix, jaxopt),
    *(numpyro, blackjax, flowjax, gpjax, netket),
)
OFF = "loss differs by", "parameters differ by", "at 10 ulp"


def longer(*args, **kwargs):
    """Return optax.rmsprop with updates that are 10 ulp longer."""

    def scale(updates, params):
        return jax.tree.map(lambda u: u * (1 + 10 * jnp.finfo(u.dtype).eps), updates)

    return optax.chain(optax.rmsprop(*args, **kwargs), optax.stateless(scale))


def run(program, rmsprop):
    """Return the last loss and the parameters, as NumPy arrays."""
    # NetKet enables 64-bit types for all.
    with jax.enable_x64(program in (gpjax, netket)):
        found = eqx.filter(program(rmsprop), eqx.is_inexact_array)
        return jax.tree.map(np.asarray, found)


def difference(old, new):
    """Return the largest difference, relative to the largest number of its array."""
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    # Not Python's max, which may skip a NaN.
    return np.max([np.abs(x - y).max() / np.abs(x).max() for x, y in pairs])


def main():
    """Print the table; fail if the results of a program disagree."""
    versions = (f"{x} {version(x)}" for x in ("jax", "optax", "rmsprop_jax"))
    print(f"{STEPS} steps of each, {datetime.date.today()}, {', '.join(versions)}.\n")
    losses = "loss with Optax", "loss with ours"
    measuring.heads("library", "program", *losses, *OFF)
    failed = []
    for program in PROGRAMS:
        old, new = run(program, optax.rmsprop), run(program, rmsprop_jax.rmsprop)
        noise = difference(old, run(program, longer))
        off = [*map(difference, old, new), noise]
        name, about = program.__name__, program.__doc__.rstrip(".")
        cells = f"{old[0]:.7g}", f"{new[0]:.7g}", *(f"{x:.0e}" for x in off)
        measuring.row(f"{name} {version(name)}", about, *cells)
        allowed = noise + 10 * np.finfo(old[0].dtype).eps
        if not np.max(off[:2]) <= allowed:  # True for NaN too.
            failed.append(name)
    sys.exit(f"Results disagree: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
