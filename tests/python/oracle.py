"""Update rules in float64 NumPy, written from the papers and PyTorch's documentation. Shares nothing with the package.

    adam, adamw   Kingma & Ba 2015 (algorithm 1, bias-corrected), Loshchilov & Hutter 2019 (algorithm 2)
    sgd, sgdw     torch.optim.SGD's documented pseudo-code; SGDW: Loshchilov & Hutter 2019 (algorithm 1)
    lion          Chen et al. 2023 (algorithm 2)

``step(rule, w, g, state, t, **hyper)`` returns the new weights and changes ``state`` in place. ``t`` counts from 1.
"""

from __future__ import annotations

import numpy as np

STATES = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "sgdw": ("momentum_buffer",),
    "lion": ("exp_avg",),
}


def new_state(rule, shape):
    return {name: np.zeros(shape) for name in STATES[rule]}


def step(
    rule,
    w,
    g,
    state,
    t,
    *,
    lr,
    weight_decay=0.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum=0.0,
    dampening=0.0,
    nesterov=False,
    maximize=False,
    first_lr=None,
):
    """``first_lr`` set: fully decoupled decay, by weight_decay * lr / first_lr."""
    w = np.asarray(w, np.float64)
    g = np.asarray(g, np.float64)
    if maximize:
        g = -g
    decay = weight_decay * lr if first_lr is None else weight_decay * lr / first_lr
    if rule in ("adam", "sgd"):
        g = g + weight_decay * w
        decay = 0.0
    shrunk = w - decay * w
    if rule in ("adam", "adamw"):
        beta1, beta2 = betas
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        return shrunk - lr * m_hat / (np.sqrt(v_hat) + eps)
    if rule in ("sgd", "sgdw"):
        if momentum == 0:
            return shrunk - lr * g
        b = g if t == 1 else momentum * state["momentum_buffer"] + (1 - dampening) * g
        state["momentum_buffer"] = b
        return shrunk - lr * (g + momentum * b if nesterov else b)
    if rule == "lion":
        beta1, beta2 = betas
        direction = np.sign(beta1 * state["exp_avg"] + (1 - beta1) * g)
        state["exp_avg"] = beta2 * state["exp_avg"] + (1 - beta2) * g
        return shrunk - lr * direction
    raise ValueError(rule)
