"""The critical checks of frozen weights: identity, convergence, and its verdict on validation text (section 5)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lego.base.artifacts import ArtifactError
from lego.cvfp.model import NewLLMResidual
from lego.cvfp.passes import QUIET, Telling, sequential_pass
from lego.cvfp.sections import ChecksParams


class IdentityError(ArtifactError):
    """Contexts that hand their input on, of which phase 2 could learn nothing."""


@dataclass(frozen=True)
class Identity:
    """Both recorded forms of the identity check.

    Args:
        mean_norm_l2, mean_deviation_l2: of the contexts, L2.
        token_cosine: of contexts with their token's embedding; None if d is not e.
        noise_cosine: of c with f(c, t), both normal noise.
        on_data, on_noise: whether the form calls the network an identity (or its contexts constant).
    """

    mean_norm_l2: float
    mean_deviation_l2: float
    token_cosine: float | None
    noise_cosine: float
    on_data: bool
    on_noise: bool


def noise(model: NewLLMResidual, pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normal contexts (pairs, d) and tokens (pairs, e)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(pairs, model.context_dim + model.embed_dim, generator=generator)
    context, token = rows.split([model.context_dim, model.embed_dim], dim=1)
    return context, token


@torch.no_grad()
def noise_cosine(model: NewLLMResidual, pairs: int, seed: int) -> float:
    """Mean cosine of c with f(c, t), both normal noise."""
    context, token = noise(model, pairs, seed)
    return float(torch.cosine_similarity(context, model(context=context, token=token)[0]).mean())


def require_no_identity(model: NewLLMResidual, settings: ChecksParams, seed: int) -> None:
    """Phase 2 is not run on contexts that hand their input on (section 5.2).

    Raises:
        IdentityError: the cosine of noise with what is made of it is above checks.identity_cosine.
    """
    found = noise_cosine(model, settings.identity_pairs, seed)
    if found > settings.identity_cosine:
        raise IdentityError(
            f"data/cvfp/phase1: its network is an identity (mean cosine of c and f(c, t) {found:.4f}), so phase 2 is "
            f"not trained; change phase1 or model, or raise checks.identity_cosine above {settings.identity_cosine:g}"
        )


@torch.no_grad()
def flags(model: NewLLMResidual, settings: ChecksParams, seed: int) -> dict[str, bool]:
    """What a degenerate network is, at most one of them: constant, identity, token_blind or memoryless (B25).

    On noise, since the contexts that such a network makes are too alike to tell by.

    Args:
        model: frozen.
        settings: section `checks`.
        seed: of the noise.
    """
    context, token = noise(model, settings.identity_pairs, seed)
    here, _ = model(context=context, token=token)
    other_token, _ = model(context=context, token=token.roll(1, 0))
    other_context, _ = model(context=context.roll(1, 0), token=token)
    blind, forgets = (
        float(torch.cosine_similarity(here, other).mean()) > settings.blind_cosine
        for other in (other_token, other_context)
    )
    same = float(torch.cosine_similarity(context, here).mean()) > settings.identity_cosine
    return {
        "constant": blind and forgets,
        "identity": same,
        "token_blind": blind and not forgets and not same,
        "memoryless": forgets and not blind,
    }


@torch.no_grad()
def identity(
    model: NewLLMResidual, contexts: Tensor, embeddings: Tensor, settings: ChecksParams, seed: int
) -> Identity:
    """Whether the network hands its input on, or says nothing (section 5.2).

    Args:
        model: frozen.
        contexts, embeddings: of the same tokens, (n, d) and (n, e).
        settings: thresholds.
        seed: of the noise.
    """
    on_noise = noise_cosine(model, settings.identity_pairs, seed)
    norm = float(contexts.norm(dim=1).mean())
    deviation = float((contexts - contexts.mean(0)).norm(dim=1).mean())
    same = model.context_dim == model.embed_dim
    cosine = float(torch.cosine_similarity(contexts, embeddings).mean()) if same else None
    small = settings.identity_norm
    return Identity(
        mean_norm_l2=norm,
        mean_deviation_l2=deviation,
        token_cosine=cosine,
        noise_cosine=on_noise,
        on_data=norm < small or deviation < small or (cosine is not None and cosine >= settings.identity_cosine),
        on_noise=on_noise > settings.identity_cosine,
    )


@dataclass(frozen=True)
class Convergence:
    """Mean L2 norm, over tokens, of the change between successive frozen passes; MSE by token (n,) of the last one."""

    differences: list[float]
    dims: int
    passed: bool
    moved: Tensor

    def converged(self, threshold: float) -> int:
        """Tokens that moved less than a mean square."""
        return int((self.moved < threshold).sum())

    @property
    def final_diff(self) -> float:
        return self.differences[-1]

    def below(self, bands: Sequence[float]) -> float | None:
        """The lowest of the lines that the last change is below, if any (section 5.3)."""
        return min((band for band in bands if self.final_diff < band), default=None)

    @property
    def per_dimension(self) -> float:
        return self.final_diff / math.sqrt(self.dims)


def frozen_passes(model: NewLLMResidual, embeddings: Tensor, count: int, telling: Telling = QUIET) -> list[Tensor]:
    """Contexts (n, d) of `count` sequential passes under frozen weights, each from the last context of the one before.

    From 0 each, all passes would be the same one (ruling 9.4).

    Args:
        model: frozen.
        embeddings: (n, e).
        count: passes; the first starts from 0.
        telling: what is printed on the way.
    """
    found: list[Tensor] = []
    for number in range(count):
        start = found[-1][-1] if found else None
        found.append(sequential_pass(model, embeddings, start, telling, f"frozen pass {number + 1}/{count}"))
    return found


def convergence(
    model: NewLLMResidual, embeddings: Tensor, settings: ChecksParams, telling: Telling = QUIET
) -> Convergence:
    """Whether frozen passes over the same text settle (section 5.3); see `settles`."""
    passes = frozen_passes(model, embeddings, settings.passes, telling)
    changes = [float((after - before).norm(dim=1).mean()) for before, after in itertools.pairwise(passes)]
    moved = (passes[-1] - passes[-2]).square().mean(dim=1)
    return Convergence(changes, model.context_dim, settles(changes, settings.final_diff), moved)


def settles(changes: Sequence[float], final_diff: float) -> bool:
    """Whether the change from pass to pass falls and ends below final_diff, below which it need not fall further."""
    falling = all(after <= max(before, final_diff) for before, after in itertools.pairwise(changes))
    return falling and changes[-1] < final_diff


@dataclass(frozen=True)
class Trend:
    """Losses of successive passes and what they are called; section 5.4."""

    losses: list[float]
    slope: float
    std: float
    legacy: str
    verdict: str

    def lines(self) -> list[str]:
        """initial, final, mean, std, CV, reduction and slope, as they are printed."""
        if not self.losses:
            return [f"verdict {self.verdict}"]
        initial, final, mean = self.losses[0], self.losses[-1], float(np.mean(self.losses))
        reduction = 100 * (initial - final) / initial if initial else 0.0
        variation = 100 * self.std / mean if mean else 0.0
        return [
            f"initial {initial:.6g}, final {final:.6g}, mean {mean:.6g}, std {self.std:.6g}, CV {variation:.1f}%, "
            f"reduction {reduction:.1f}%, slope {self.slope:.6g}",
            f"verdict legacy {self.legacy}, with level test {self.verdict}",
        ]


def trend(losses: Sequence[float], threshold: float, variance: float, settings: ChecksParams) -> Trend:
    """Names a series of losses.

    The legacy verdict looks at slope and spread alone, so that unrelated contexts, a constant loss of 1.42, count as
    converged (B30). The other one also wants the last loss below `threshold` and below a small share of
    2 * variance, which unrelated contexts would have.

    Args:
        losses: MSE of successive passes.
        threshold: phase1.convergence_threshold.
        variance: of the contexts, mean over dimensions.
        settings: thresholds.
    """
    values = [float(one) for one in losses]
    if len(values) < 2:
        return Trend(values, 0.0, 0.0, "INSUFFICIENT_DATA", "INSUFFICIENT_DATA")
    slope, std = float(np.polyfit(np.arange(len(values)), values, 1)[0]), float(np.std(values))
    if slope < -settings.slope:
        legacy = "CONVERGING"
    elif abs(slope) < settings.slope and std < settings.loss_std:
        legacy = "CONVERGED"
    else:
        legacy = "DIVERGING" if slope > settings.slope else "UNSTABLE"
    low = values[-1] < threshold and (values[-1] < settings.level_share * 2 * variance)
    verdict = "NOT_CONVERGED" if legacy in ("CONVERGED", "CONVERGING") and not low else legacy
    return Trend(values, slope, std, legacy, verdict)


def validation_trend(
    model: NewLLMResidual, embeddings: Tensor, threshold: float, settings: ChecksParams, telling: Telling = QUIET
) -> Trend:
    """`trend` of num_trials frozen passes with carry-over over validation text (n, e); trial 1 has no loss."""
    passes = frozen_passes(model, embeddings, settings.num_trials, telling)
    losses = [float((b - a).square().mean()) for a, b in itertools.pairwise(passes)]
    return trend(losses, threshold, float(passes[-1].var(0, correction=0).mean()), settings)
