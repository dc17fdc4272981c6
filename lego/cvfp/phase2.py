"""Phase 2: the head learns the next token from contexts that are fixed (specification, section 4).

C*[i] is the context after token i, from start 0 and the weights of phase 1, of which a snapshot is kept: training may
change the blocks that made it, C* never changes.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lego.base.progress import track
from lego.cvfp.model import NewLLMResidual, Reader
from lego.cvfp.passes import require_finite, shifted
from lego.cvfp.sections import Phase2Params
from lego.training.steps import build_scheduler

JUDGED_AT_A_TIME = 4096  # positions, which changes no number


@dataclass(frozen=True)
class FixedText:
    """A text with its fixed contexts: ids (n,) and C* (n, d); positions 0 .. n - 2 predict the id that follows."""

    ids: Tensor
    contexts: Tensor

    @property
    def predictions(self) -> int:
        return len(self.ids) - 1

    def sha256(self) -> str:
        """Of the contexts."""
        return hashlib.sha256(self.contexts.contiguous().numpy().tobytes()).hexdigest()

    def with_contexts(self, contexts: Tensor) -> FixedText:
        return FixedText(self.ids, contexts)


def zeroed(text: FixedText) -> FixedText:
    """The text with C* = 0: what is left without contexts."""
    return text.with_contexts(torch.zeros_like(text.contexts))


def shuffled(text: FixedText, seed: int) -> FixedText:
    """The text with its contexts in another order: as many and as diverse, of the wrong tokens."""
    order = torch.randperm(len(text.contexts), generator=torch.Generator().manual_seed(seed))
    return text.with_contexts(text.contexts[order])


def logits_at(model: NewLLMResidual, text: FixedText, before: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (k, V) at some positions, and the context (k, d) that the network itself makes there.

    Args:
        model: blocks, token blocks and head.
        text: ids and C*.
        before: C* before each token (n, d), 0 at first.
        places: positions (k,).
    """
    token = model.embed(text.ids[places])  # (k, e)
    fixed = text.contexts[places].detach()
    if len(model.token_blocks):
        return model.logits(context=fixed, token=model.read(context=fixed, token=token)), fixed
    made, written = model(context=before[places], token=token)
    return model.logits(context=fixed, token=written), made


def positions(count: int, batch: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """0 .. count - 1 in batches, in random order if there is a generator."""
    order = torch.randperm(count, generator=generator) if generator else torch.arange(count)
    yield from order.split(batch or count)


def ppl(loss: float) -> float:
    """Perplexity of a mean loss in nats, kept finite."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class Score:
    """Mean loss in nats and accuracy of the predicted tokens."""

    loss: float
    accuracy: float

    @classmethod
    def of(cls, losses: Tensor, right: Tensor) -> Score:
        """Of what `nll` gives, position by position (n,)."""
        return cls(float(losses.double().mean()), float(right.double().mean()))

    @property
    def ppl(self) -> float:
        return ppl(self.loss)


def propagated(
    model: NewLLMResidual, text: FixedText, mode: str, chunk: int, what: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Positions (k,), their logits (k, V) and contexts (k, d), where the context is handed on from token to token.

    It is detached in between. v1_mse predicts from [context; token], propagate from the token vector alone.

    Args:
        model: of phase 2.
        text: of which the ids are read.
        mode: v1_mse or propagate.
        chunk: most positions at a time.
        what: is done, for the lines of its progress.
    """
    context = torch.zeros(1, model.context_dim)
    for places in torch.arange(text.predictions).split(chunk):
        made, written = list[Tensor](), list[Tensor]()
        tokens = model.embed(text.ids[places]).split(1)
        for token in track(tokens, len(tokens), f"{what}, token by token", "token"):
            context, after = model(context=context.detach(), token=token)
            made.append(context)
            written.append(after)
        contexts = torch.cat(made)
        require_finite(contexts, what, int(places[0]))
        seen = torch.zeros_like(contexts) if mode == "propagate" else contexts
        yield places, model.logits(context=seen, token=torch.cat(written)), contexts


@torch.no_grad()
def nll(model: NewLLMResidual, text: FixedText, mode: str, batch: int = JUDGED_AT_A_TIME) -> tuple[Tensor, Tensor]:
    """Loss in nats (n - 1,) and whether the likeliest id was right (n - 1,), position by position.

    Args:
        model: of phase 2.
        text: ids and C*, which v2 alone reads.
        mode: phase2.mode; each is judged as it was trained.
        batch: positions at a time.
    """
    before, losses, right = shifted(text.contexts, torch.zeros(model.context_dim)), list[Tensor](), list[Tensor]()
    if mode == "v2":
        fixed = positions(text.predictions, batch, None)
        parts = ((places, logits_at(model, text, before, places)[0]) for places in fixed)
    else:
        parts = ((places, logits) for places, logits, _ in propagated(model, text, mode, batch, "judged"))
    for places, logits in parts:
        wanted = text.ids[places + 1]
        losses.append(functional.cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(dim=1) == wanted)
    return torch.cat(losses), torch.cat(right)


def score(model: NewLLMResidual, text: FixedText, mode: str) -> Score:
    """Mean loss and accuracy of a text with fixed contexts; see `nll`."""
    return Score.of(*nll(model, text, mode))


@dataclass(frozen=True)
class Phase2Result:
    """Scores after each epoch, train ones before it; and the epoch whose weights were kept, from 1."""

    train: list[float]
    validation: list[Score]
    best: int
    updates: int


def train_head(
    model: NewLLMResidual,
    train: FixedText,
    validation: FixedText,
    settings: Phase2Params,
    seed: int,
    reader: Reader | None = None,
) -> tuple[NewLLMResidual, Phase2Result]:
    """Trains head and token vector; returns the network of the best epoch by validation loss.

    Args:
        model: of phase 1; it is copied and stays as it is.
        train, validation: ids and C*, made by the snapshot.
        settings: section `phase2`.
        seed: of the order of batches.
        reader: of phase 1, where the head starts, its token half at 0; without, all of it is 0.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model = copy.deepcopy(model).train()
    if reader is not None:
        with torch.no_grad():
            model.token_output.weight[:, : model.context_dim] = reader.weight
            model.token_output.bias.copy_(reader.bias)
    shared = not len(model.token_blocks)  # else contexts and tokens have parameters of their own
    for block in model.blocks:
        block.requires_grad_(shared and not settings.freeze_context)
    for block in model.token_blocks:
        block.requires_grad_(not settings.freeze_context)
    model.embed_norm.requires_grad_(shared and not settings.freeze_context)
    model.token_output.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    scheduler = build_scheduler(optimizer, settings.lr_schedule, 0, settings.epochs * _steps(train, settings), 0.0)
    losses, scores, best, kept, updates = list[float](), list[Score](), 0, copy.deepcopy(model.state_dict()), 0
    for epoch in range(settings.epochs):
        loss, steps = _epoch(model, train, settings, optimizer, scheduler, parameters, generator)
        losses, updates = [*losses, loss], updates + steps
        model.eval()
        scores.append(score(model, validation, settings.mode))
        model.train()
        print(
            f"epoch {epoch + 1}/{settings.epochs}: train loss {loss:.4f}, validation ppl {scores[-1].ppl:.2f}, "
            f"accuracy {100 * scores[-1].accuracy:.2f} % ({validation.predictions:,} tokens), weight updates {updates}",
            flush=True,
        )
        if scores[-1].loss < scores[best].loss or epoch == 0:
            best, kept = epoch, copy.deepcopy(model.state_dict())
        if epoch - best >= settings.patience:
            break
    model.load_state_dict(kept)
    return model.eval(), Phase2Result(losses, scores, best + 1, updates)


def _steps(text: FixedText, settings: Phase2Params) -> int:
    """Optimizer steps an epoch: one for all tokens, or one a batch."""
    whole = settings.mode != "v2" or not settings.batch_tokens
    return 1 if whole else -(-text.predictions // settings.batch_tokens)


def _epoch(
    model: NewLLMResidual,
    text: FixedText,
    settings: Phase2Params,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    parameters: list[nn.Parameter],
    generator: torch.Generator,
) -> tuple[float, int]:
    """Mean loss of an epoch and its optimizer steps."""
    # not lego.training.steps.run_epoch: parts of a step are weighted by what it will hold, and two modes hand state on
    steps = _steps(text, settings)
    if steps == 1:
        batches: Iterator[Tensor] = iter([torch.arange(text.predictions)])
    else:
        batches = positions(text.predictions, settings.batch_tokens, generator)
    before, total = shifted(text.contexts, torch.zeros(model.context_dim)), 0.0
    for places in track(batches, steps, "phase 2", "batch") if steps > 1 else batches:
        optimizer.zero_grad(set_to_none=True)
        for loss, objective, count in _parts(model, text, before, places, settings):
            if not torch.isfinite(objective):
                raise FloatingPointError(f"the loss of phase 2 is {objective.item()}; lower phase2.lr")
            (objective * (count / len(places))).backward()
            total += loss.item() * count
        nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        scheduler.step()
    return total / text.predictions, steps


def _parts(
    model: NewLLMResidual, text: FixedText, before: Tensor, places: Tensor, settings: Phase2Params
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Mean loss, objective and number of positions, for one part after another of a step's positions (k,).

    v1_mse adds the squared distance of the contexts that it hands on from C*.
    """
    if settings.mode == "v2":
        parts = places.split(settings.chunk_tokens)
        for part in track(parts, len(parts), "phase 2", "chunk") if len(parts) > 1 else parts:
            logits, _ = logits_at(model, text, before, part)
            loss = functional.cross_entropy(logits, text.ids[part + 1])
            yield loss, loss, len(part)
        return
    for part, logits, made in propagated(model, text, settings.mode, settings.chunk_tokens, "phase 2"):
        loss = functional.cross_entropy(logits, text.ids[part + 1])
        distance = (made - text.contexts[part]).square().mean()
        yield loss, loss + distance if settings.mode == "v1_mse" else loss, len(part)
