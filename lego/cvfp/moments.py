"""Running moments of context vectors: the statistics that a layer owns, in memory that does not grow with the text."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Exponential moving mean and variance of rows, with the terms that make a loss of them.

    The variance is taken about the running mean, so that it is right for single rows too; a population variance within
    each batch is 0 for a batch of one and would let the estimate decay as momentum**t (specification, B6).

    Args:
        dim: width of the rows (d).
        momentum: share of the old value that an update keeps.
    """

    mean: Tensor
    var: Tensor
    steps: Tensor
    weight: Tensor
    sum: Tensor
    square: Tensor

    def __init__(self, *, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("weight", torch.zeros(()))  # 1 - momentum**steps: how much of mean is data
        self.register_buffer("sum", torch.zeros(dim))  # the same from zero, for the debiased estimate
        self.register_buffer("square", torch.zeros(dim))

    def moved(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (d,) and variance (d,) as they would be after these rows (n, d); with gradient through the rows."""
        m = self.momentum
        mean = m * self.mean + (1 - m) * rows.mean(0)
        var = m * self.var + (1 - m) * (rows - self.mean).square().mean(0)
        return mean, var

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Takes rows (n, d) into the statistics."""
        m, (mean, var) = self.momentum, self.moved(rows)
        self.sum.mul_(m).add_((1 - m) * rows.mean(0))
        self.square.mul_(m).add_((1 - m) * rows.square().mean(0))
        self.weight.mul_(m).add_(1 - m)
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.steps.add_(1)

    def debiased(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and variance (d,) without the start-up bias: divided by 1 - momentum**steps (B7).

        Raises:
            ValueError: no row was taken yet.
        """
        if not int(self.steps):
            raise ValueError("the running moments have seen no row yet")
        mean = self.sum / self.weight
        return mean, self.square / self.weight - mean.square()

    def moved_debiased(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `debiased`, after these rows (n, d) and with gradient through them.

        The variance is E[x²] - E[x]² of debiased moments: about a running mean that begins at 0, as in `moved`, it
        would hold the distance of that mean as well, which no debiasing takes out.
        """
        m = self.momentum
        weight = m * self.weight + (1 - m)
        mean = (m * self.sum + (1 - m) * rows.mean(0)) / weight
        square = (m * self.square + (1 - m) * rows.square().mean(0)) / weight
        return mean, square - mean.square()
