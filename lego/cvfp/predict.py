"""Phase 1, objective predict: contexts that say what comes next, and forget their start (specification, section 12).

The text is read in streams side by side, a gradient reaching back bptt_len tokens (truncated backpropagation, Williams
& Peng 1990). Three terms: the next token, by cross-entropy or InfoNCE (van den Oord et al. 2018, arXiv 1807.03748);
contraction, two starts must come closer; and VICReg's variance and covariance, so that no dimension dies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lego.base.progress import track
from lego.cvfp.losses import ZeroGradientError, contraction, vicreg
from lego.cvfp.model import NewLLMResidual, Reader
from lego.cvfp.passes import NonFiniteContextError
from lego.cvfp.sections import Phase1Params, PredictParams
from lego.training.steps import build_scheduler


def columns(ids: Tensor, streams: int) -> Tensor:
    """Ids (n,) as streams side by side (T + 1, S): stream s reads its part of the text, the last id only a target."""
    streams = max(1, min(streams, (len(ids) - 1) // 2))
    length = (len(ids) - 1) // streams
    starts = torch.arange(streams) * length
    return ids[starts[None] + torch.arange(length + 1)[:, None]]  # (T + 1, S)


def windows(total: int, length: int, first: int) -> Iterator[slice]:
    """0 .. total in parts of `length`, the first one `first` long, so that borders differ from epoch to epoch."""
    begin, end = 0, first or length
    while begin < total:
        yield slice(begin, min(end, total))
        begin, end = min(end, total), end + length


@dataclass(frozen=True)
class PredictResult:
    """Mean loss of the next token (nats) and of the other terms by epoch, the optimizer steps, and a reader to keep."""

    loss: list[float]
    contraction: list[float]
    vicreg: list[float]
    updates: int
    reader: Reader | None


class Predictor(nn.Module):
    """Reads the next token out of a context.

    Args:
        model: whose contexts are read, and whose embeddings InfoNCE tells apart.
        loss: `ce` or `infonce`.
    """

    def __init__(self, model: NewLLMResidual, loss: str) -> None:
        super().__init__()
        self.kind = loss
        self.read = nn.Linear(model.context_dim, model.vocab_size if loss == "ce" else model.embed_dim)

    def forward(self, contexts: Tensor, wanted: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean loss in nats of the ids wanted (m,) after contexts (m, d).

        Args:
            contexts: after each token.
            wanted: the ids that follow.
            embed: ids -> vectors (m, e); the other ids of the batch are the negatives of InfoNCE.
        """
        return self.losses(contexts, wanted, embed).mean()

    def losses(self, contexts: Tensor, wanted: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The same context by context (m,)."""
        read = self.read(contexts)
        if self.kind == "ce":
            return functional.cross_entropy(read, wanted, reduction="none")
        candidates, place = torch.unique(wanted, return_inverse=True)
        scores = read @ embed(candidates).T / math.sqrt(read.shape[1])  # (m, distinct)
        return functional.cross_entropy(scores, place, reduction="none")

    def kept(self) -> Reader:
        return Reader(self.read.weight.detach().clone(), self.read.bias.detach().clone())


def unroll(model: NewLLMResidual, context: Tensor, embeddings: Tensor) -> Tensor:
    """Contexts (T, S, d) of T steps of S streams from the contexts (S, d) before them, with gradient through time."""
    rows = []
    for token in embeddings:
        context, _ = model(context=context, token=token)
        rows.append(context)
    return torch.stack(rows)


def two_starts(
    model: NewLLMResidual, start: Tensor, contexts: Tensor, ids: Tensor, gamma: float, generator: torch.Generator
) -> Tensor:
    """The contraction term at one random step of a window: its starts against those of other streams.

    Args:
        model: whose blocks contract.
        start: contexts before the window (S, d).
        contexts: after each of its tokens (T, S, d).
        ids: its tokens (T, S).
        gamma: see `lego.cvfp.losses.contraction`.
        generator: of the step and of the other stream.
    """
    steps, streams = ids.shape
    if streams < 2:
        return contexts.new_zeros(())
    step = int(torch.randint(steps, (1,), generator=generator))
    shift = int(torch.randint(1, streams, (1,), generator=generator))
    before = (contexts[step - 1] if step else start).detach()
    other = before.roll(shift, dims=0)
    token = model.embed(ids[step])
    here, there = (model(context=one, token=token)[0] for one in (before, other))
    return contraction((here - there).square().sum(1), (before - other).square().sum(1), gamma)


def train_contexts(
    model: NewLLMResidual, ids: Tensor, settings: PredictParams, phase1: Phase1Params, train_embedding: bool, seed: int
) -> PredictResult:
    """Trains the blocks, embed_norm and, if asked, the embedding, in place.

    Args:
        model: its head stays as it is; with keep_reader the result has what phase 2's may start from.
        ids: train text (n,).
        settings: section `predict`.
        phase1: of which dist_reg_weight and grad_clip count.
        train_embedding: whether embeddings learn too.
        seed: of the borders of windows, the pairs that are compared and the reading head.

    Raises:
        FloatingPointError: the loss or a context is not finite; the message names the token.
        ZeroGradientError: contraction counts, and there is one stream, so no other context to come closer to.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    model.token_embedding.weight.requires_grad_(train_embedding)
    predictor, text = Predictor(model, settings.loss), columns(ids, settings.streams)
    modules = [*model.blocks, model.embed_norm, model.token_embedding, predictor]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    w = phase1.dist_reg_weight
    weights = torch.tensor([1.0, settings.regularizer_weight * (1 - w), settings.regularizer_weight * w])
    if float(weights[1]) and text.shape[1] < 2:
        raise ZeroGradientError(
            "predict.regularizer_weight: contraction compares streams of the text and there is one, so it trains "
            "nothing; set predict.streams to at least 2 (5 tokens or more), or phase1.dist_reg_weight: 1"
        )
    total = len(text) - 1
    steps = settings.epochs * (-(-total // settings.bptt_len) + 1)
    scheduler = build_scheduler(optimizer, "cosine", settings.warmup_steps, steps, 0.0)
    history: list[list[float]] = []
    updates = 0
    # not lego.training.steps.run_epoch: windows hand contexts on, three terms are counted, and a fault names its token
    for epoch in range(settings.epochs):
        first = int(torch.randint(1, settings.bptt_len + 1, (1,), generator=generator))
        context, sums = torch.zeros(text.shape[1], model.context_dim), torch.zeros(3, dtype=torch.double)
        parts = list(windows(total, settings.bptt_len, first))
        for part in track(parts, len(parts), f"phase 1, epoch {epoch + 1}/{settings.epochs}", "window"):
            contexts = unroll(model, context, model.embed(text[part]))  # (T, S, d)
            flat, wanted = contexts.flatten(0, 1), text[part.start + 1 : part.stop + 1].flatten()
            fading = two_starts(model, context, contexts, text[part], settings.contraction_gamma, generator)
            terms = torch.stack([predictor(flat, wanted, model.embed), fading, vicreg(flat)])
            objective = terms @ weights
            if not torch.isfinite(objective):
                losses = predictor.losses(flat, wanted, model.embed).view(contexts.shape[:2])
                _refuse(contexts.detach(), losses.detach(), total, part.start, f"phase 1, epoch {epoch + 1}")
            optimizer.zero_grad(set_to_none=True)
            objective.backward()
            nn.utils.clip_grad_norm_(parameters, phase1.grad_clip)
            optimizer.step()
            scheduler.step()
            context, updates = contexts[-1].detach(), updates + 1
            sums += terms.detach().double() * (part.stop - part.start) / total
        history.append(sums.tolist())
        print(
            f"epoch {epoch + 1}/{settings.epochs}: next token {sums[0]:.4f} nats, contraction {sums[1]:.4f}, "
            f"VICReg {sums[2]:.4f}, weight updates {updates}",
            flush=True,
        )
    model.token_embedding.weight.requires_grad_(False)
    loss, fadings, spreads = (list(values) for values in zip(*history, strict=True))
    return PredictResult(loss, fadings, spreads, updates, predictor.kept() if settings.keep_reader else None)


def _refuse(contexts: Tensor, losses: Tensor, length: int, begin: int, what: str) -> None:
    """Says where in the text a loss that is not finite comes from.

    Args:
        contexts: of a window's tokens (T, S, d).
        losses: of what follows each (T, S).
        length: tokens of a stream.
        begin: of the window, in each stream.
        what: was done.

    Raises:
        NonFiniteContextError: always; a context is not finite, or the loss after one, or neither.
    """
    in_order = contexts.transpose(0, 1), losses.T  # (S, T, d), (S, T)
    for name, bad in zip(("context of", "loss after"), (~torch.isfinite(one) for one in in_order), strict=True):
        rows = bad.flatten(2).any(2) if bad.dim() == 3 else bad  # (S, T)
        if rows.any():
            stream, step = (int(one) for one in rows.nonzero()[0])
            token = stream * length + begin + step
            raise NonFiniteContextError(
                f"{what}: the {name} token {token} is not finite; set model.layernorm_mix above 0, or lower predict.lr"
            )
    raise NonFiniteContextError(f"{what}: contraction or VICReg of the contexts is not finite; lower predict.lr")
