"""How the other models of the contest are sized, trained on a text and judged on another (section 12)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lego.base.progress import track
from lego.cvfp.contest import epochs_of, parameter_facts, size_on_paper
from lego.cvfp.contest_sections import PeersParams
from lego.cvfp.peers import EndToEnd, State, Transformer, make
from lego.cvfp.phase2 import ppl
from lego.cvfp.predict import columns, windows
from lego.cvfp.sections import CvfpParams
from lego.cvfp.store import build
from lego.cvfp.text import Text
from lego.training.steps import build_scheduler


def compete(name: str, params: CvfpParams, text: Text, seed: int, lr: float) -> dict[str, Any]:
    """Trains one model with one rate and judges it.

    Args:
        name: a peer that `lego.cvfp.peers.make` knows, or `end_to_end`.
        params: of the pipeline, profile `sound`, whose parameters and tokens it gets.
        text: ids by split.
        seed: of initial weights and training.
        lr: peak rate.

    Returns:
        val_loss, ppl, bits_per_byte, parameters, tokens (processed in training), updates (of weights).
    """
    torch.manual_seed(seed)
    settings, epochs = params.peers, epochs_of(params)
    if name == "end_to_end":
        normed = params.model.model_copy(update={"layernorm_mix": settings.end_to_end.layernorm_mix})
        network = build(normed, params.phase1, text.vocab_size, seed)
        model: nn.Module = EndToEnd(network)
        settings = settings.model_copy(update={"window": settings.end_to_end.window})
        facts = parameter_facts(network)
    else:
        sizes = text.vocab_size, params.model.embed_dim
        width = width_for(name, size_on_paper(params, text.vocab_size), *sizes, settings.window)
        model = make(name, *sizes, width, settings.window)
        embeddings = sum(count(one) for one in model.modules() if isinstance(one, nn.Embedding))
        facts = {"parameters": count(model), "parameters_without_embeddings": count(model) - embeddings}
    updates = train_peer(model, text.ids["train"], settings, epochs, lr, seed)
    losses = {split: peer_loss(model, text.ids[split], settings.window) for split in ("validation", "test")}
    return facts | {
        "val_loss": losses["validation"],
        "ppl": ppl(losses["test"]),
        "bits_per_byte": text.bits_per_byte(losses["test"], "test"),
        "tokens": epochs * len(text.ids["train"]),
        "updates": updates,
    }


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def width_for(kind: str, budget: int, vocab_size: int, embed_dim: int, window: int) -> int:
    """The width, a multiple of 4, whose parameters come nearest to a budget."""

    def size(width: int) -> int:
        with torch.device("meta"):
            return count(make(kind, vocab_size, embed_dim, width, window))

    low, high = 4, 4096
    while high - low > 4:
        middle = (low + high) // 8 * 4
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return min((low, high), key=lambda width: abs(size(width) - budget))


def train_peer(
    model: nn.Module,
    ids: Tensor,
    settings: PeersParams,
    epochs: int,
    lr: float,
    seed: int,
) -> int:
    """Trains a peer on a text, in place, with a cosine schedule; returns its weight updates.

    Args:
        model: reads windows.
        ids: train text (n,).
        settings: section `peers`.
        epochs: passes over the text.
        lr: peak rate.
        seed: of the borders of windows.
    """
    generator, text = torch.Generator().manual_seed(seed), columns(ids, settings.streams)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=settings.weight_decay, fused=True)
    total = len(text) - 1
    steps = epochs * (-(-total // settings.window) + 1)
    scheduler = build_scheduler(optimizer, "cosine", settings.warmup_steps, steps, 0.0)
    updates = 0
    # not lego.training.steps.run_epoch: windows hand a state on, and only a loss that is not finite ends a run, where
    # run_epoch refuses such a gradient too
    for epoch in range(epochs):
        first = int(torch.randint(1, settings.window + 1, (1,), generator=generator))
        state: State = None
        model.train()
        parts = list(windows(total, settings.window, first))
        for part in track(parts, len(parts), f"epoch {epoch + 1}/{epochs}", "window"):
            logits, state = model(text[part], state)
            loss = functional.cross_entropy(logits.flatten(0, 1), text[part.start + 1 : part.stop + 1].flatten())
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch + 1}; lower its rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
            scheduler.step()
            updates += 1
    return updates


@torch.no_grad()
def peer_loss(model: nn.Module, ids: Tensor, window: int) -> float:
    """Mean loss in nats of a text (n,), read from its start in one stream.

    A model without state sees half a window before each prediction; one with state, all of the text before.
    """
    model.eval()
    state, total, n = None, 0.0, len(ids) - 1
    if isinstance(model, Transformer):
        return _overlapping(model, ids, window)
    for part in windows(n, window, window):
        logits, state = model(ids[part][:, None], state)
        wanted = ids[part.start + 1 : part.stop + 1]
        total += float(functional.cross_entropy(logits[:, 0], wanted, reduction="sum"))
    return total / n


def _overlapping(model: nn.Module, ids: Tensor, window: int) -> float:
    """Windows that overlap by half, of which what no window before it held is judged."""
    n, half, total, done = len(ids) - 1, window // 2, 0.0, 0
    starts = [0, *range(half, max(half, n - half), half)]
    for start in starts:
        stop = min(start + window, n)
        logits, _ = model(ids[start:stop][:, None], None)
        wanted = ids[done + 1 : stop + 1]
        total += float(functional.cross_entropy(logits[done - start :, 0], wanted, reduction="sum"))
        done = stop
    return total / n
