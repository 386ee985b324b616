"""What `interop` moves: lists of arrays into a state and back, all of it checked."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import storage
from rmsprop_jax.transform import RMSPropState


def entry(mapping, at, name, fix=""):
    """Return an entry of a dict that must have it."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{at} must be a dict, got {type(mapping).__name__}. {fix}")
    if name not in mapping:
        raise ValueError(
            f"{at} must have an entry {name!r}, got {_some(mapping)}. {fix}"
        )
    return mapping[name]


def expect(mapping, at, names, fix):
    """Refuse a dict whose keys are not these."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{at} must be a dict, got {type(mapping).__name__}. {fix}")
    missing = [name for name in names if name not in mapping]
    extra = [name for name in mapping if name not in set(names)]
    if missing or extra:
        raise ValueError(
            f"{at} must have the entries {_some(names)}; missing: {_some(missing)}, "
            f"extra: {_some(extra)}. {fix}"
        )


def _some(names):
    """Return the names as text, the first of many."""
    names = list(names)
    return f"{names[:12]} and {len(names) - 12} more" if len(names) > 12 else f"{names}"


def steps(at, count):
    """Return a number of steps as an int."""
    try:
        number = float(np.asarray(_on_host(count)))
    except (TypeError, ValueError):
        number = np.nan
    if not (0 <= number < 2**31 and number == int(number)):
        raise ValueError(f"{at} must be an integer in [0, 2^31), got {count}.")
    return int(number)


def check(at, x):
    """Refuse an array that is not finite or not of 32 or 64 bits."""
    dtype = getattr(x, "dtype", type(x).__name__)
    dtype = getattr(dtype, "name", str(dtype).removeprefix("torch."))
    if dtype in ("float16", "bfloat16"):
        raise ValueError(
            f"{at} must be of 32 or 64 bits, got {dtype}. Half precision has lost "
            "digits, and averages freeze in it: cast it to float32 if that is wanted."
        )
    if dtype not in ("float32", "float64", "complex64", "complex128"):
        raise ValueError(
            f"{at} must be an array of float32, float64, complex64 or complex128, got "
            f"{dtype}."
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{at} is {dtype}: turn jax.config.jax_enable_x64 on, or cast it first."
        )
    finite = jnp.isfinite(x) if isinstance(x, jax.Array) else np.isfinite(np.asarray(x))
    if not finite.all():
        raise ValueError(
            f"{at} must be finite, got {int(finite.size - finite.sum())} that are not, "
            f"of {finite.size}. Go back to a checkpoint from before that."
        )


def array(at, x):
    """Return a NumPy copy, which nobody else holds, of an array of any framework."""
    x = _on_host(x)
    check(at, x)
    return np.array(np.asarray(x))


def _on_host(x):
    """Return a PyTorch tensor as NumPy can read it, and others as they are."""
    return x.detach().cpu() if hasattr(x, "detach") else x


def state(count, buffers, to_params):
    """Return the state with these buffers: {field: {where it came from: array}}."""
    arrays = {k: [array(at, x) for at, x in b.items()] for k, b in buffers.items()}
    for at, v in zip(buffers["nu"], arrays["nu"], strict=True):
        if _largest(-v) > 0:
            raise ValueError(f"{at} must not be negative: it is an average of squares.")
    for field, buffer in buffers.items():
        labels = list(buffers["nu"])
        if len(buffer) != len(labels):
            raise ValueError(f"{list(buffer)} and {labels} must be equally many.")
        for i, (at, x) in enumerate(zip(buffer, arrays[field], strict=True)):
            v = arrays["nu"][i]
            if (x.shape, x.dtype) != (v.shape, v.dtype):
                raise ValueError(
                    f"{at} must be {v.dtype}{list(v.shape)} like {labels[i]}, got "
                    f"{x.dtype}{list(x.shape)}."
                )
    if "mu" in arrays:
        for at, v, mu in zip(buffers["mu"], arrays["nu"], arrays["mu"], strict=True):
            # Of any gradients; a thousandth is more than rounding adds up to.
            if _largest(second_moment(-1.001 * v, mu)) > 1e-30:
                raise ValueError(
                    f"{at} must have squares below the average of squares, and has "
                    "not: it is no average of the same gradients. Is it the momentum?"
                )
        pairs = zip(arrays["nu"], arrays["mu"], strict=True)
        arrays["nu"] = [np.asarray(variance(v, mu)) for v, mu in pairs]
    trees = {}
    for field, given in arrays.items():
        tree = to_params([x.copy() for x in given])
        _unchanged("to_params", given, jax.tree.leaves(tree))
        trees[field] = jax.tree.map(jnp.array, tree)
    count = jnp.asarray(count, jnp.int32)
    return RMSPropState(count, trees["nu"], trees.get("mu"), trees.get("trace"))


def lists(state, from_params):
    """Return the buffers of a state as {field: list}, `nu` as the others keep it."""
    buffers = jax.tree_util.tree_map_with_path(
        lambda path, x: array(f"state{jax.tree_util.keystr(path)}", x),
        storage.convert(state)._replace(count=None),
    )
    if buffers.mu is not None:
        nu = jax.tree.map(second_moment, buffers.nu, buffers.mu)
        buffers = buffers._replace(nu=jax.tree.map(np.asarray, nu))
    lists = {}
    for field, tree in buffers._asdict().items():
        if tree is None:
            continue
        lists[field] = list(from_params(jax.tree.map(np.copy, tree)))
        _unchanged("from_params", jax.tree.leaves(tree), lists[field])
    return lists


def _unchanged(name, given, returned):
    """Refuse an arrangement that lost, doubled or changed elements."""
    returned = [array(f"{name}(...)[{i}]", x) for i, x in enumerate(returned)]
    if _elements(given) != _elements(returned):
        before, after = (
            f"{sum(x.size for x in xs)} of "
            f"{' and '.join(sorted({x.dtype.name for x in xs}))} as "
            f"{[x.shape for x in xs]}"
            for xs in (given, returned)
        )
        raise ValueError(
            f"{name} must return every element once and unchanged: it was given "
            f"{before}, and returned {after}. It may transpose, reshape, split, join."
        )


def _elements(arrays):
    """Return the elements of each dtype in a form that forgets their places."""
    kinds = {}
    for x in arrays:
        kinds.setdefault(x.dtype.name, []).append(np.ravel(x))
    # Plus 0, as zeros of both signs are equal and keep their order.
    return {k: (np.sort(np.concatenate(x)) + 0).tobytes() for k, x in kinds.items()}


def variance(v, mu):
    """Return v - |mu|^2, at least 0; by parts where v is complex."""
    if np.iscomplexobj(v):
        return variance(v.real, mu.real) + 1j * variance(v.imag, mu.imag)
    return (v - _square(mu)).clip(0)


def second_moment(nu, mu):
    """Return nu + |mu|^2; by parts where nu is complex."""
    if np.iscomplexobj(nu):
        return second_moment(nu.real, mu.real) + 1j * second_moment(nu.imag, mu.imag)
    return nu + _square(mu)


def _largest(x):
    """Return the largest real or imaginary part above 0, or 0."""
    return max(np.max(np.real(x), initial=0), np.max(np.imag(x), initial=0))


def _square(x):
    return (x * x.conj()).real
