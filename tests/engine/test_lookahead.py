"""EMA-Nesterov on one number, by hand; tests/optim trains with it at every ZeRO stage."""

from __future__ import annotations

import torch

from turbolm.engine.lookahead import Lookahead


def test_gradients_are_ahead_and_a_skipped_update_leaves_weights_and_mean() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer, ahead = torch.optim.SGD([weight], lr=1.0), Lookahead(decay=0.5)

    def step(beta: float, gradient: float, is_updated: bool = True) -> float:
        """Return where the gradient is taken."""
        ahead.begin(optimizer, [weight], beta)
        taken_at = weight.item()
        weight.grad = torch.tensor([gradient])
        if is_updated:
            optimizer.step()
        ahead.finish(optimizer, [weight], is_updated=is_updated)
        return taken_at

    assert (step(2.0, 0.5), weight.item()) == (1.0, 0.5)  # the mean is 0.5 x -0.5 = -0.25 now
    assert (step(2.0, 0.25), weight.item()) == (0.0, -0.25)  # from 0.5 - 2 x 0.25; mean -0.125 - 0.375 = -0.5
    assert (step(1.0, 9.0, is_updated=False), weight.item()) == (-0.75, -0.25)
    assert (step(0.0, 0.25), weight.item()) == (-0.25, -0.5)  # mean -0.25 - 0.125
    assert optimizer.state[weight]["lookahead"].item() == -0.375
