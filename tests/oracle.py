"""RMSProp in NumPy, for one array, in the widest float there is.

It keeps the averages v and m of the textbook and subtracts them, as the library does
not. That costs digits: gradients should have a spread like their size.
"""

import numpy as np


def rmsprop(
    gs,
    ps,
    lr=None,
    decay=0.9,
    eps=1e-8,
    initial_scale=0.0,
    eps_in_sqrt=True,
    centered=False,
    momentum=None,
    nesterov=False,
    bias_correction=False,
    lr_in_momentum=True,
    l2=None,
    weight_decay=None,
):
    """Return the updates [steps, ...] for gradients and parameters [steps, ...].

    `lr` is a schedule, or None for the bare ratio g / sqrt(v + eps).
    """
    a = np.longdouble(decay)
    v, m, b, out = np.longdouble(initial_scale), 0, 0, []
    for count, (g, p) in enumerate(zip(_wide(gs), _wide(ps), strict=True)):
        if l2 is not None:
            g = g + l2 * p
        v = a * v + (1 - a) * np.abs(g) ** 2
        m = a * m + (1 - a) * g
        var = v - np.abs(m) ** 2 if centered else v
        if bias_correction:
            var = var / (1 - a ** (count + 1))
        u = g / (np.sqrt(var + eps) if eps_in_sqrt else np.sqrt(var) + eps)
        if lr is None:
            out.append(u)
            continue
        rate = lr(count)
        pushed = rate * u if lr_in_momentum else u
        if momentum is None:
            d = pushed
        else:
            b = momentum * b + pushed
            d = pushed + momentum * b if nesterov else b
        if not lr_in_momentum:
            d = rate * d
        if weight_decay is not None:
            d = d + rate * weight_decay * p
        out.append(-d)
    return np.stack(out)


def _wide(x):
    return np.asarray(x).astype(np.clongdouble)
