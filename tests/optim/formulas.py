"""Every optimizer's update as its paper writes it, one tensor at a time: what the tests compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from turbolm.optim.muon import POLAR_EXPRESS
from turbolm.recipe.optimizers import Optimizer

State = dict[str, Any]
Update = Callable[[State, torch.Tensor, torch.Tensor, float, Any, float], None]


def mean(state: State, name: str, value: torch.Tensor, beta: float) -> torch.Tensor:
    """The running mean of `value`, from zero."""
    state[name] = beta * state.get(name, torch.zeros_like(value)) + (1 - beta) * value
    return state[name]


def adamw(state: State, w: torch.Tensor, g: torch.Tensor, lr: float, o: Any, decay: float) -> None:
    """arXiv 1711.05101, algorithm 2."""
    m, v, t = mean(state, "m", g, o.betas[0]), mean(state, "v", g * g, o.betas[1]), state["t"]
    m_hat, v_hat = m / (1 - o.betas[0] ** t), v / (1 - o.betas[1] ** t)
    u = m_hat / (v_hat.sqrt() + o.eps)
    w -= lr * (u + decay * kept_decay(o, u, w))


def kept_decay(o: Any, u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What weight decay shrinks: with `cautious_weight_decay` (arXiv 2510.12402, algorithm 1) I(u w >= 0) w, else w."""
    return torch.where(u.sign() * w.sign() >= 0, w, 0) if getattr(o, "cautious_weight_decay", False) else w


def cautious_adamw(state: State, w: torch.Tensor, g: torch.Tensor, lr: float, o: Any, decay: float) -> None:
    """arXiv 2411.16085, algorithm 2: AdamW's step, masked where its sign is not the gradient's, and made up for."""
    m, v, t = mean(state, "m", g, o.betas[0]), mean(state, "v", g * g, o.betas[1]), state["t"]
    u = (m / (1 - o.betas[0] ** t)) / ((v / (1 - o.betas[1] ** t)).sqrt() + o.eps)
    mask = (u * g > 0).to(w.dtype)
    u = u * mask * (mask.numel() / (mask.sum() + 1))
    w -= lr * (u + decay * kept_decay(o, u, w))


def sgd(state: State, w: torch.Tensor, g: torch.Tensor, lr: float, o: Any, decay: float) -> None:
    g = g + decay * w
    state["m"] = o.momentum * state.get("m", 0) + g
    w -= lr * (g + o.momentum * state["m"] if o.nesterov else state["m"])


def rmsprop(state: State, w: torch.Tensor, g: torch.Tensor, lr: float, o: Any, decay: float) -> None:
    g = g + decay * w
    u = g / (mean(state, "v", g * g, o.alpha).sqrt() + o.eps)
    state["m"] = o.momentum * state.get("m", 0) + u
    w -= lr * state["m"]


def lion(state: State, w: torch.Tensor, g: torch.Tensor, lr: float, o: Any, decay: float) -> None:
    """arXiv 2302.06675, algorithm 2."""
    m = state.get("m", torch.zeros_like(g))
    u = (o.betas[0] * m + (1 - o.betas[0]) * g).sign()
    state["m"] = o.betas[1] * m + (1 - o.betas[1]) * g
    w -= lr * (u + decay * w)


def ademamix(state: State, w: torch.Tensor, g: torch.Tensor, lr: float, o: Any, decay: float) -> None:
    """arXiv 2409.03137, algorithm 1 and the schedulers of section 3."""
    t, total = state["t"], state["slow_warmup_steps"]
    beta1, beta2, beta3 = o.betas
    alpha_t = min(t * o.alpha / total, o.alpha)
    grown = t / total
    logs = math.log(beta1), math.log(beta3)
    beta3_t = min(math.exp(logs[0] * logs[1] / ((1 - grown) * logs[1] + grown * logs[0])), beta3)
    m1, m2, v = mean(state, "m1", g, beta1), mean(state, "m2", g, beta3_t), mean(state, "v", g * g, beta2)
    u = (m1 / (1 - beta1**t) + alpha_t * m2) / ((v / (1 - beta2**t)).sqrt() + o.eps)
    w -= lr * (u + decay * w)


def orthogonal(matrix: torch.Tensor, num_steps: int, polar_express: bool = False) -> torch.Tensor:
    """What the iterations do, on singular values: each goes through the polynomial of the post, or of its iteration."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s) / (1.02 if polar_express else 1)
    for number in range(num_steps):
        a, b, c = POLAR_EXPRESS[number] if polar_express else (3.4445, -4.7750, 2.0315)
        s = a * s + b * s**3 + c * s**5
    return (u @ torch.diag(s) @ vh).to(matrix.dtype)


def muon(state: State, w: torch.Tensor, g: torch.Tensor, lr: float, o: Any, decay: float) -> None:
    """kellerjordan.github.io/posts/muon, with the scale of arXiv 2502.16982 (equation 4) unless `original`."""
    m = mean(state, "m", g, o.momentum)
    u = o.momentum * m + (1 - o.momentum) * g if o.nesterov else m
    if o.soap is not None:
        u = soap_before_muon(state, u, g, o.soap)
    u = orthogonal(u, o.ns_steps, o.orthogonalization == "polar_express")
    rows, columns = w.shape
    scale = math.sqrt(max(1, rows / columns)) if o.adjust_lr == "original" else 0.2 * math.sqrt(max(rows, columns))
    u = scale * u
    if o.row_beta2 is not None:  # arXiv 2510.05491, algorithm 1
        v = mean(state, "v", (u / scale).square().mean(1), o.row_beta2)
        n = u / (v.sqrt() + 1e-8)[:, None]
        u = n * ((u.norm() if o.adjust_lr == "original" else 0.2 * math.sqrt(rows * columns)) / n.norm())
    if o.hyperball:  # arXiv 2606.16899: W <- R Norm(W - lr R Norm(u)), R the norm at the start
        radius = state.setdefault("radius", w.norm())
        v = w - lr * radius * u / u.norm()
        w.copy_(radius * v / v.norm())
        return
    w -= lr * (u + decay * kept_decay(o, u, w))


def soap_before_muon(state: State, u: torch.Tensor, g: torch.Tensor, o: Any) -> torch.Tensor:
    """SOAP-Muon as result 14 of modded-nanogpt's optimization benchmark: the basis follows after it was used."""
    t, sides = state["t"] - 1, [side for side in (0, 1) if u.shape[side] <= o.max_dim]
    q, p = state.setdefault("q", {}), state.setdefault("p", {})

    def turn(x: torch.Tensor, back: bool) -> torch.Tensor:
        for side in sides:
            one = q[side] if back else q[side].T
            x = one @ x if side == 0 else x @ one.T
        return x

    result = u
    if t > 0:
        x = turn(u, back=False)
        result = turn(x / (mean(state, "s", x * x, o.beta2).sqrt() + 1e-8), back=True)
        result = result * u.norm() / result.norm()
    for side in sides:
        outer = g @ g.T if side == 0 else g.T @ g
        p[side] = o.beta2 * p.get(side, torch.zeros_like(outer)) + (1 - o.beta2) * outer
        if t == 0:
            q[side] = torch.linalg.eigh(p[side])[1].flip(1)
        elif t % o.every == 0:
            order = torch.diag(q[side].T @ p[side] @ q[side]).argsort(descending=True)
            state["s"] = state["s"].index_select(side, order)
            q[side] = torch.linalg.qr(p[side] @ q[side][:, order])[0]
    return result


def adafactor(state: State, w: torch.Tensor, g: torch.Tensor, lr: float, o: Any, decay: float) -> None:
    """arXiv 1804.04235, algorithms 4 and 5, with rho_t at most 1 / sqrt(t)."""
    t = state["t"]
    beta2 = 1 - t**o.beta2_decay
    alpha = max(1e-3, w.norm().item() / w.numel() ** 0.5) * min(lr, 1 / math.sqrt(t))
    w *= 1 - lr * decay
    if w.dim() > 1:
        r, c = mean(state, "r", (g * g).mean(-1), beta2), mean(state, "c", (g * g).mean(-2), beta2)
        v = r[:, None] * c[None, :] / r.mean()
    else:
        v = mean(state, "v", g * g, beta2)
    u = g / v.clamp(min=1e-30).sqrt()  # unused embeddings have no gradient
    w -= alpha * u / max(1.0, (u.norm() / u.numel() ** 0.5).item() / o.clip_rms)


def soap(state: State, w: torch.Tensor, g: torch.Tensor, lr: float, o: Any, decay: float) -> None:
    """arXiv 2409.11321, algorithm 3; as in the authors' code the first step only fills the preconditioner."""
    beta1, beta2 = o.betas
    t = state["t"] - 1
    sides = [side if w.dim() > 1 and size <= o.max_precondition_dim else None for side, size in enumerate(w.shape)]

    def outer(side: int) -> torch.Tensor:
        return g @ g.T if side == 0 else g.T @ g

    def rotate(x: torch.Tensor, back: bool = False) -> torch.Tensor:
        for side, q in state["q"].items():
            turn = q if back else q.T
            x = turn @ x if side == 0 else x @ turn.T
        return x

    if t == 0:
        state["g"] = {side: (1 - beta2) * outer(side) for side in sides if side is not None}
        state["q"] = {side: torch.linalg.eigh(p)[1].flip(1) for side, p in state["g"].items()}
        return
    m = mean(state, "m", g, beta1)
    v = mean(state, "v", rotate(g) ** 2, beta2)
    u = rotate(rotate(m) / (v.sqrt() + o.eps), back=True)
    w -= lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * u
    w *= 1 - lr * decay
    for side in state["g"]:
        state["g"][side] = beta2 * state["g"][side] + (1 - beta2) * outer(side)
    if t % o.precondition_every == 0:
        for side, p in state["g"].items():
            q = state["q"][side]
            order = (q * (p @ q)).sum(0).argsort(descending=True)
            state["v"] = state["v"].index_select(side, order)
            state["q"][side] = torch.linalg.qr((p @ q)[:, order])[0]


FORMULAS: dict[str, Update] = {
    formula.__name__: formula
    for formula in (adamw, cautious_adamw, sgd, rmsprop, lion, ademamix, muon, adafactor, soap)
}


class Formula:
    """A trainer's worth of one formula: `step` updates every named tensor from its gradient."""

    def __init__(
        self,
        settings: Optimizer,
        parameters: Iterable[tuple[str, torch.Tensor]],
        *,
        decayed: set[str],
        matrices: set[str] = frozenset(),  # type: ignore[assignment]
        slow_warmup_steps: float = 1,
        lr_scales: dict[str, float] | None = None,
    ):
        self.settings, self.parameters = settings, dict(parameters)
        self.decayed, self.matrices = decayed, matrices
        self.lr_scales = lr_scales or {}  # by name, on the learning rate of a step
        self.states: dict[str, State] = {
            name: {"t": 0, "slow_warmup_steps": slow_warmup_steps} for name in self.parameters
        }

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float | None = None, momentum: float | None = None) -> None:
        settings: Any = self.settings
        if momentum is not None and hasattr(settings, "momentum"):
            settings = settings.model_copy(update={"momentum": momentum})
        elif momentum is not None:
            settings = settings.model_copy(update={"betas": (momentum, *settings.betas[1:])})
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            state = self.states[name]
            state["t"] += 1
            formula = FORMULAS[self.settings.name]
            if self.settings.name == "muon" and name not in self.matrices:
                formula = adamw
            base = self.settings.weight_decay if weight_decay is None else weight_decay
            decay = base if name in self.decayed else 0.0
            formula(state, parameter, parameter.grad, lr * self.lr_scales.get(name, 1.0), settings, decay)
