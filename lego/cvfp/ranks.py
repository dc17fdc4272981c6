"""How many dimensions contexts use: effective rank and its relatives, always beside references at equal N and d."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PAIRS = 2000  # of rows, whose distance and cosine are taken


def singular_values(rows: Tensor, method: str = "gram") -> Tensor:
    """Singular values of rows (n, d), in double precision.

    Args:
        rows: contexts.
        method: `svd`, or `gram`: roots of the eigenvalues of the smaller Gram matrix, faster for long texts.
    """
    rows = rows.double()
    if method == "svd":
        return torch.linalg.svdvals(rows)
    gram = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


def effective_rank(rows: Tensor, method: str = "gram") -> float:
    """exp(-sum p ln(p + 1e-10)) of the normalized singular values p, neither squared nor centred (section 5.1).

    It is at most min(n, d) and grows with n, so it means something only beside the same quantity at equal n and d.
    """
    sigma = singular_values(rows, method)
    if not float(sigma.sum()):
        return 0.0
    p = sigma / sigma.sum()
    return math.exp(-float((p * (p + 1e-10).log()).sum()))


def participation_ratio(rows: Tensor) -> float:
    """(sum of variances)^2 / sum of squared variances over the principal axes of centred rows (n, d)."""
    variances = singular_values(rows - rows.mean(0)).square()
    return float(variances.sum().square() / variances.square().sum()) if float(variances.sum()) else 0.0


@dataclass(frozen=True)
class Spread:
    """What is said of a set of contexts (n, d)."""

    tokens: int
    dims: int
    rank: float
    centred_rank: float
    participation: float
    mean_norm_l2: float
    mean_distance_l2: float
    mean_cosine: float

    @classmethod
    def of(cls, contexts: Tensor, seed: int) -> Spread:
        """Args: contexts (n, d), seed of the pairs whose distance is taken."""
        (n, d), pairs = contexts.shape, PAIRS
        generator = torch.Generator().manual_seed(seed)
        left = torch.randint(n, (pairs,), generator=generator)
        right = (left + torch.randint(1, max(2, n), (pairs,), generator=generator)) % n  # another row
        a, b = contexts[left], contexts[right]
        return cls(
            tokens=n,
            dims=d,
            rank=effective_rank(contexts),
            centred_rank=effective_rank(contexts - contexts.mean(0)),
            participation=participation_ratio(contexts),
            mean_norm_l2=float(contexts.norm(dim=1).mean()),
            mean_distance_l2=float((a - b).norm(dim=1).mean()),
            mean_cosine=float(torch.cosine_similarity(a, b).mean()),
        )

    def is_attractor(self, distance: float, cosine: float) -> bool:
        """Whether all contexts are one: closer than `distance` and more alike than `cosine`."""
        return self.mean_distance_l2 < distance and self.mean_cosine > cosine

    def is_zero(self, norm: float) -> bool:
        """Whether contexts vanish: shorter than `norm` on average."""
        return self.mean_norm_l2 < norm
