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
    momentum=0,
    nesterov=False,
    bias_correction=False,
    lr_in_momentum=True,
    l2=0,
    weight_decay=0,
):
    """Return the updates [steps, ...] for gradients and parameters [steps, ...].

    `lr` is a schedule, or None for the bare ratio g / sqrt(v + eps).
    """
    gs, ps = (np.asarray(x).astype(np.clongdouble) for x in (gs, ps))
    a = np.longdouble(decay)
    v, m, b, out = np.longdouble(initial_scale), 0, 0, []
    for count, (g, p) in enumerate(zip(gs, ps, strict=True)):
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
        b = momentum * b + pushed
        d = pushed + momentum * b if nesterov else b
        if not lr_in_momentum:
            d = rate * d
        out.append(-d - rate * weight_decay * p)
    return np.stack(out)
