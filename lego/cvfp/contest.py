"""One model of the results page, trained for one seed: CVFP's own forms and its peers, on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lego.cvfp import peers
from lego.cvfp.phase2 import FixedText, Score, ppl, score, shuffled, train_head, zeroed
from lego.cvfp.run import bits_per_byte, first_phase, settled
from lego.cvfp.sections import CvfpParams, with_profile
from lego.cvfp.store import build, parameter_counts
from lego.cvfp.text import SPLITS, Text

OWN = ("sound", "seed", "untrained")


@dataclass(frozen=True)
class Outcome:
    """Of one seed: metrics of the chosen rate, and the rate."""

    metrics: dict[str, Any]
    lr: float


def epochs_of(params: CvfpParams) -> int:
    """Passes over train that every model gets: those of both phases of `sound`."""
    return params.predict.epochs + params.phase2.epochs


def parameter_budget(params: CvfpParams, vocab_size: int) -> int:
    """Parameters of `sound`, which the peers' widths follow."""
    with torch.device("meta"):
        return sum(parameter_counts(build(params.model, params.phase1, vocab_size, 0)).values())


def compete(name: str, params: CvfpParams, text: Text, seed: int, lr: float) -> dict[str, Any]:
    """Trains one model with one rate and judges it.

    Args:
        name: of `OWN` or of a peer.
        params: of the pipeline, profile `sound`.
        text: ids by split.
        seed: of initial weights and training.
        lr: peak rate: of phase 1 for `sound`, of phase 2 for `seed` and `untrained`.

    Returns:
        val_loss, ppl, bits_per_byte, parameters, tokens (processed in training), and for CVFP's own forms the
        perplexities without contexts and with those of other tokens.
    """
    return _own(name, params, text, seed, lr) if name in OWN else _peer(name, params, text, seed, lr)


def _peer(name: str, params: CvfpParams, text: Text, seed: int, lr: float) -> dict[str, Any]:
    torch.manual_seed(seed)
    settings, epochs = params.peers, epochs_of(params)
    sizes = text.vocab_size, params.model.embed_dim
    width = peers.width_for(name, parameter_budget(params, text.vocab_size), *sizes, settings.window)
    model, validation = peers.make(name, *sizes, width, settings.window), list[float]()

    def after_epoch(epoch: int) -> None:
        validation.append(peers.peer_loss(model, text.ids["validation"], settings.window))

    peers.train_peer(model, text.ids["train"], settings, epochs, lr, seed, after_epoch)
    loss = peers.peer_loss(model, text.ids["test"], settings.window)
    return {
        "val_loss": validation[-1],
        "ppl": ppl(loss),
        "bits_per_byte": bits_per_byte(loss, text, "test"),
        "parameters": peers.count(model),
        "tokens": epochs * len(text.ids["train"]),
    }


def _own(name: str, params: CvfpParams, text: Text, seed: int, lr: float) -> dict[str, Any]:
    phase2, whole, first = params.phase2, text.ids["train"], text
    if name == "sound":
        params = params.model_copy(update={"predict": params.predict.model_copy(update={"lr": lr})})
    elif name == "untrained":  # what `sound` spends on contexts goes into the head
        phase2 = phase2.model_copy(update={"lr": lr, "epochs": epochs_of(params), "patience": epochs_of(params)})
    else:  # as many tokens as `sound` reads in phase 1, in passes over less text
        phase2, budget = phase2.model_copy(update={"lr": lr}), params.predict.epochs * len(whole)
        params = with_profile(params, "seed")
        part = whole[: budget // params.phase1.max_iterations]
        first = Text(text.ids | {"train": part}, text.vocab_size, text.token_bytes, text.validation)
    model, spent = build(params.model, params.phase1, text.vocab_size, seed).eval(), 0
    if name != "untrained":
        done = first_phase(params, first, seed)
        model, spent = done.model, done.passes * len(first.ids["train"])
    found = settled(model, text, params.contexts)
    fixed = {split: FixedText(text.ids[split], found[split].contexts) for split in SPLITS}
    after, result = train_head(model, fixed["train"], fixed["validation"], phase2, seed)
    test: Score = score(after, fixed["test"])
    return {
        "val_loss": min(one.loss for one in result.validation),
        "ppl": test.ppl,
        "bits_per_byte": bits_per_byte(test.loss, text, "test"),
        "parameters": sum(parameter_counts(after).values()),
        "tokens": spent + len(result.train) * len(whole),
        "ppl_zero_contexts": score(after, zeroed(fixed["test"])).ppl,
        "ppl_shuffled_contexts": score(after, shuffled(fixed["test"], seed)).ppl,
    }
