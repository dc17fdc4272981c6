"""What contexts depend on: the token, the context before, and how far back (specification, section 5.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lego.cvfp.model import NewLLMResidual
from lego.cvfp.sections import ChecksParams

PLACES, STEPS = 16, 512  # starts of the forgetting test, and tokens it follows each
STRETCH = 64  # tokens in a row that a regression is fitted on, or judged on
FOLLOWED = 500  # tokens of the Lyapunov exponent
APART = 1e-3  # its two starts, in standard deviations: large beside rounding, small beside the contexts


@dataclass(frozen=True)
class Dependence:
    """Numbers of the dependence tests; a cosine near 1 means that what was varied does not matter.

    Args:
        same_context: mean cosine of f(c, t) and f(c, t'): above .999 the network is blind to tokens.
        same_token: mean cosine of f(c, t) and f(c', t): near 1 it has no memory.
        forgetting: steps until two start contexts agree; None = not within the tokens tried.
        lag_r2: R² of E[t - k] from the context of t, by ridge regression, for k = 0, 1, ..
        memory_capacity: their sum without k = 0.
        lyapunov: largest exponent, nats a token: below 0 the network forgets its start.
    """

    same_context: float
    same_token: float
    forgetting: int | None
    lag_r2: list[float]
    memory_capacity: float
    lyapunov: float


@torch.no_grad()
def dependence(
    model: NewLLMResidual, contexts: Tensor, embeddings: Tensor, settings: ChecksParams, seed: int
) -> Dependence:
    """The dependence tests on a text.

    Args:
        model: frozen.
        contexts, embeddings: of its tokens in order, (n, d) and (n, e).
        settings: section `checks`.
        seed: of the pairs that are compared.
    """
    generator = torch.Generator().manual_seed(seed)
    n, pairs = len(contexts), settings.identity_pairs
    left, right = (torch.randint(n, (pairs,), generator=generator) for _ in range(2))
    here, _ = model(context=contexts[left], token=embeddings[left])
    other_token, _ = model(context=contexts[left], token=embeddings[right])
    other_context, _ = model(context=contexts[right], token=embeddings[left])
    r2 = [lag_r2(contexts, embeddings, lag, settings.ridge) for lag in range(min(settings.lags, n // 4) + 1)]
    return Dependence(
        same_context=float(torch.cosine_similarity(here, other_token).mean()),
        same_token=float(torch.cosine_similarity(here, other_context).mean()),
        forgetting=forgetting_time(model, contexts, embeddings, settings.forgetting, generator),
        lag_r2=r2,
        memory_capacity=sum(max(0.0, one) for one in r2[1:]),
        lyapunov=lyapunov(model, contexts, embeddings),
    )


@torch.no_grad()
def forgetting_time(
    model: NewLLMResidual, contexts: Tensor, embeddings: Tensor, tolerance: float, generator: torch.Generator
) -> int | None:
    """Tokens until contexts that began apart agree to this MSE, the median over PLACES places; None = not within them.

    Args:
        model: frozen.
        contexts, embeddings: (n, d) and (n, e).
        tolerance: MSE between the two.
        generator: of places and starts.
    """
    n, runs = len(embeddings), PLACES
    steps = min(STEPS, n // 2)
    places = torch.randint(n - steps + 1, (runs,), generator=generator)
    one, other = (contexts[torch.randint(n, (runs,), generator=generator)] for _ in range(2))
    agreed = torch.full((runs,), torch.inf)
    for step in range(steps):
        token = embeddings[places + step]
        one, other = model(context=one, token=token)[0], model(context=other, token=token)[0]
        close = (one - other).square().mean(dim=1) < tolerance
        agreed = torch.where(close & agreed.isinf(), float(step + 1), agreed)
        agreed = torch.where(close, agreed, torch.inf)  # it must stay so
    median = float(agreed.median())
    return None if median == torch.inf else int(median)


def lag_r2(contexts: Tensor, embeddings: Tensor, lag: int, ridge: float) -> float:
    """R² of a ridge regression of E[t - lag] from context t, fitted on every other stretch of a text, on the rest.

    Contexts that are all alike tell nothing: 0.

    Args:
        contexts, embeddings: (n, d) and (n, e).
        lag: tokens back.
        ridge: added to the diagonal, as a share of the contexts' mean variance times n.
    """
    x, y = contexts[lag:].double(), embeddings[: len(embeddings) - lag].double()
    fitted = torch.arange(len(x)) // STRETCH % 2 == 0  # texts change on their way: halves would differ
    x, y = x - x[fitted].mean(0), y - y[fitted].mean(0)
    gram = x[fitted].T @ x[fitted]
    if not float(gram.diagonal().mean()) or not float(y[~fitted].square().sum()):
        return 0.0
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, x[fitted].T @ y[fitted])
    left = (y[~fitted] - x[~fitted] @ weights).square().sum()
    return float(1 - left / y[~fitted].square().sum())


@torch.no_grad()
def lyapunov(model: NewLLMResidual, contexts: Tensor, embeddings: Tensor, steps: int = FOLLOWED) -> float:
    """Largest Lyapunov exponent, nats a token: mean log growth of a small difference, renormalized at every step.

    Args:
        model: frozen.
        contexts, embeddings: (n, d) and (n, e).
        steps: tokens followed, from the middle of the text.
    """
    steps = min(steps, len(embeddings) // 2)
    begin = len(embeddings) // 2
    generator = torch.Generator().manual_seed(0)
    tiny = APART * (float(contexts.std()) or 1.0)
    apart = torch.randn(model.context_dim, generator=generator)
    apart *= tiny / apart.norm()
    context, growth = contexts[begin - 1], 0.0
    for index in range(begin, begin + steps):
        token = embeddings[index].expand(2, -1)
        both, _ = model(context=torch.stack([context, context + apart]), token=token)
        context, apart = both[0], both[1] - both[0]
        size = float(apart.norm()) + torch.finfo(apart.dtype).tiny
        growth += torch.log(torch.tensor(size / tiny)).item()
        apart = apart * (tiny / size)
    return growth / steps
