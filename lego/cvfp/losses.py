"""The loss of phase 1: how far contexts move, and how different they are (specification, sections 3.4 and 3.5).

Every function is differentiable in the contexts that it is given. What needs the past, the EMA kinds, is computed by
the statistics that the layers own: see `lego.cvfp.model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lego.base.parameter_files import ParamsError

CENTRE = 0.1  # weight of the centre's norm in oacd


class ZeroGradientError(ParamsError):
    """A loss with a weight above 0 that trains nothing (B5)."""


def cvfp_loss(contexts: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of contexts (n, d) from their target (n, d); norms count (B1)."""
    return functional.mse_loss(contexts, target)  # in one kernel, which keeps no difference (n, d) for the gradient


def dist_batch(contexts: Tensor) -> Tensor:
    """Distance of each dimension from mean 0 and population variance 1, as the old batch statistics took it."""
    return contexts.mean(0).square().mean() + (contexts.var(0, correction=0) - 1).square().mean()


def centroid_batch(contexts: Tensor) -> Tensor:
    """- ||X - mean(X)||_F / N: blind to rank, and its strength falls as 1 / sqrt(N) (B28, B29)."""
    return -(contexts - contexts.mean(0)).norm() / len(contexts)


def vicreg(contexts: Tensor) -> Tensor:
    """Variance hinge and off-diagonal covariance (Bardes et al. 2022, arXiv 2105.04906): rank 1 is costly."""
    n, d = contexts.shape
    centred = contexts - contexts.mean(0)
    deviation = (centred.square().sum(0) / max(1, n - 1) + torch.finfo(contexts.dtype).eps).sqrt()
    covariance = centred.T @ centred / max(1, n - 1)  # (d, d)
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return torch.relu(1 - deviation).mean() + off_diagonal / d


def centre(contexts: Tensor) -> Tensor:
    """A tenth of the squared norm of the centre: with centroid_batch, `oacd`, what the project chose last."""
    return CENTRE * contexts.mean(0).square().sum()


BATCH: dict[str, Callable[[Tensor], Tensor]] = {
    "dist_batch": dist_batch,
    "centroid_batch": centroid_batch,
    "vicreg": vicreg,
    "oacd": lambda contexts: centroid_batch(contexts) + centre(contexts),
}


def diversity_of(contexts: Tensor, kind: str, normalize: str) -> Tensor:
    """The diversity of a batch of contexts (n, d), low where they are diverse.

    Args:
        contexts: of n tokens.
        kind: a key of BATCH.
        normalize: `none`, or `per_token`: the centroid's part is multiplied by sqrt(n / d), which makes it
            independent of n and d.
    """
    if normalize == "per_token" and kind in ("centroid_batch", "oacd"):
        n, d = contexts.shape
        value = centroid_batch(contexts) * math.sqrt(n / d)
        return value + centre(contexts) if kind == "oacd" else value
    return BATCH[kind](contexts)


def contraction(moved: Tensor, apart: Tensor, gamma: float) -> Tensor:
    """How much two start contexts come out further apart than gamma allows (specification, section 12).

    Args:
        moved: squared distance (n,) of the outputs f(c, t) and f(c', t).
        apart: squared distance (n,) of the starts c and c'.
        gamma: share of the distance that may be left, below 1 for a memory that fades.
    """
    return torch.relu(moved / apart.clamp_min(torch.finfo(apart.dtype).eps) - gamma**2).mean()
