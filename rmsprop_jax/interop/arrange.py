"""Convert lists of arrays to an RMSPropState and back, with shared validation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import storage
from rmsprop_jax.transform import PyTree, RMSPropState

ToParams = Callable[[list[np.ndarray]], PyTree]
FromParams = Callable[[PyTree], Sequence[Any]]
REAL = ("float32", "float64")
HALF = "Averages freeze in half precision: cast it to float32 to accept that."
COMPLEX = "PyTorch treats a complex parameter as two real ones: convert its buffers as "
COMPLEX += "torch.view_as_real, with optax.contrib.split_real_and_imaginary(optimizer)."
FIXES = dict(float16=HALF, bfloat16=HALF, complex64=COMPLEX, complex128=COMPLEX)
X64 = "Enable jax.config.jax_enable_x64, or cast it."


def check_entries(mapping, at, names, fix, optional=None):
    """Check that a dict has `names`, and no others but `optional` (None: any)."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{at} must be a dict, got {type(mapping).__name__}. {fix}")
    missing = [name for name in names if name not in mapping]
    allowed = {*mapping} if optional is None else {*names, *optional}
    extra = [name for name in mapping if name not in allowed]
    if missing or extra:
        raise ValueError(
            f"{at} must have the entries {[*names][:12]}; missing: {missing[:12]}, "
            f"extra: {extra[:12]}. {fix}"
        )


def buffer_names(names, options):
    """Select the {field: name} of the buffers that a run with these options has."""
    has = {"nu": True, "mu": options["centered"], "trace": options["momentum"]}
    return {field: name for field, name in names.items() if has[field]}


def step_count(at, count):
    """Convert a number of steps to an int."""
    try:
        number = float(count if hasattr(count, "__float__") else np.asarray(count))
    except (TypeError, ValueError):
        number = np.nan
    if not (0 <= number < 2**31 and number == int(number)):
        raise ValueError(f"{at} must be an integer in [0, 2^31), got {count}.")
    return int(number)


def check_dtype(at, x, allowed=REAL):
    """Raise ValueError if a dtype is not allowed, or is disabled in JAX."""
    dtype = getattr(x, "dtype", type(x).__name__)
    dtype = getattr(dtype, "name", str(dtype).removeprefix("torch."))
    enabled = [x for x in allowed if jax.dtypes.canonicalize_dtype(x) == x]
    if dtype not in enabled:
        fix = X64 if dtype in allowed else FIXES.get(dtype, "")
        raise ValueError(f"{at} must be {' or '.join(enabled)}, got {dtype}. {fix}")


def check_array(at, x, allowed=REAL):
    """Check dtype and values of an array; return it as a JAX or a NumPy array."""
    check_dtype(at, x, allowed)
    if isinstance(x, jax.Array):
        finite = jnp.isfinite(x)
    else:
        x = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
        finite = np.isfinite(x)
    if not finite.all():
        raise ValueError(
            f"{at} must be finite, got {int(finite.size - finite.sum())} of "
            f"{finite.size} elements that are not. Use an earlier checkpoint."
        )
    return x


def to_state(counts, buffers, to_params):
    """Build a state from {field: {label: array}}, with E|g|^2 for `nu`.

    Labels are for error messages, also in `counts`, {label: steps}, which may differ.
    """
    count = max(step_count(at, x) for at, x in counts.items())
    arrays = {}
    for field, buffer in buffers.items():
        arrays[field] = [check_array(at, x) for at, x in buffer.items()]
        rows = zip(buffers["nu"], arrays["nu"], buffer, arrays[field], strict=True)
        for label, nu, at, x in rows:
            _check_buffer(field, label, nu, at, x)
    if "mu" in arrays:
        arrays["nu"] = variance(arrays["nu"], arrays["mu"])
    trees: dict[str, Any] = dict(mu=None, trace=None)
    for field, given in arrays.items():
        tree = to_params([np.array(x) for x in given])
        _check_elements("to_params", given, jax.tree.leaves(tree))
        trees[field] = jax.tree.map(jnp.array, tree)
    return RMSPropState(jnp.asarray(count, jnp.int32), **trees)


def from_state(state, from_params):
    """Convert a state to buffers as {field: list}, with E|g|^2 for `nu`."""
    buffers = jax.tree_util.tree_map_with_path(
        lambda path, x: check_array(f"state{jax.tree_util.keystr(path)}", x),
        jax.device_get(storage.convert(state)._replace(count=None)),
    )
    if buffers.mu is not None:
        buffers = buffers._replace(nu=second_moment(buffers.nu, buffers.mu))
    lists = {}
    for field, tree in buffers._asdict().items():
        if tree is not None:
            lists[field] = list(from_params(jax.tree.map(np.copy, tree)))
            _check_elements("from_params", jax.tree.leaves(tree), lists[field])
    return lists


def variance(square, mu):
    """Compute E|g|^2 - |E g|^2, at least 0, for each leaf."""
    return jax.tree.map(lambda x, m: (x - (m * m.conj()).real).clip(0), square, mu)


def second_moment(nu, mu):
    """Compute E|g|^2 from a centered `nu`, for each leaf."""
    return jax.tree.map(lambda x, m: x + (m * m.conj()).real, nu, mu)


def _check_buffer(field, label, nu, at, x):
    """Raise ValueError if buffer x does not match its average of squares."""
    if (x.shape, x.dtype) != (nu.shape, nu.dtype):
        raise ValueError(
            f"{at} must be {nu.dtype}{list(nu.shape)} like {label}, got "
            f"{x.dtype}{list(x.shape)}."
        )
    if field == "nu" and (x < 0).any():
        raise ValueError(f"{at} must not be negative: it is an average of squares.")
    # The tolerance exceeds the accumulated rounding error.
    if field == "mu" and (np.abs(x) > 1.0005 * np.sqrt(nu) + 1e-15).any():
        raise ValueError(
            f"{at} must have squares below {label}, the average of squares of the same "
            "gradients. Is it the momentum?"
        )


def _check_elements(name, given, returned):
    """Raise ValueError if the function `name` lost, repeated or changed elements."""
    returned = [check_array(f"{name}(...)[{i}]", x) for i, x in enumerate(returned)]
    if _elements(given) != _elements(returned):
        old, new = ([f"{x.dtype}{list(x.shape)}" for x in y] for y in (given, returned))
        raise ValueError(
            f"{name} must return every element once and unchanged, got {new} for {old}."
            " It may transpose, reshape, split and join arrays."
        )


def _elements(arrays):
    """Return the sorted elements of each dtype, for comparison."""
    by_dtype = {}
    for x in arrays:
        by_dtype.setdefault(str(x.dtype), []).append(np.ravel(x))
    # Adding 0 turns -0 into 0: they sort as equal, but their bytes differ.
    return {k: np.sort(np.concatenate(x) + 0).tobytes() for k, x in by_dtype.items()}
