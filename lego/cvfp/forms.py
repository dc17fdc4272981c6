"""CVFP's own forms in the contest, trained for one seed: what trained contexts are worth, part by part."""

from __future__ import annotations

import time
from typing import Any, get_args

import torch

from lego.cvfp.contest import epochs_of, parameter_facts, size_on_paper
from lego.cvfp.contest_sections import Form
from lego.cvfp.model import NewLLMResidual, Reader
from lego.cvfp.phase2 import FixedText, ppl, score, shuffled, train_head, zeroed
from lego.cvfp.predict import train_contexts
from lego.cvfp.run import first_phase, settled
from lego.cvfp.sections import CvfpParams, changed, with_profile
from lego.cvfp.store import build
from lego.cvfp.text import SPLITS, Text

FORMS = get_args(Form)


def seed_of_equal_size(params: CvfpParams, vocab_size: int) -> CvfpParams:
    """The profile `seed` with d = e as wide as gives it the parameters of `sound`, in steps of 8."""
    budget, profile = size_on_paper(params, vocab_size), with_profile(params, "seed")

    def of(width: int) -> CvfpParams:
        sizes = {"model.context_dim": width, "model.embed_dim": width, "model.hidden_dim": 2 * width}
        return changed(profile, sizes, "contest")

    low, high = 1, 1024
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_on_paper(of(8 * middle), vocab_size) <= budget else (low, middle)
    return min((of(8 * one) for one in (low, high)), key=lambda one: abs(size_on_paper(one, vocab_size) - budget))


def compete(
    name: str, params: CvfpParams, text: Text, seed: int, lr: float, blind_heads: bool = False
) -> dict[str, Any]:
    """Trains one form with one rate and judges it.

    Args:
        name: `sound`; `sound_reservoir`, whose blocks stay as they began while its embedding learns; `untrained`, of
            which phase 1 trains nothing, with the same phase 2; `untrained_longer`, whose phase 2 has what the others
            spend on phase 1; `seed` or `seed_untrained`.
        params: of the pipeline, profile `sound`.
        text: ids by split.
        seed: of initial weights and training.
        lr: peak rate: of phase 1 for the first two, of phase 2 for the others.
        blind_heads: whether `sound` trains heads without contexts too.

    Returns:
        val_loss, ppl, bits_per_byte, parameters, tokens (processed in training), updates (of weights), perplexities
        of the finished head without contexts and with those of other tokens; with blind heads, theirs, and their time
        `seconds_besides`.

    Raises:
        ValueError: there is no such form.
    """
    if name not in FORMS:
        raise ValueError(f"there is no form {name}; there are {', '.join(FORMS)}")
    if name.startswith("sound"):
        params = params.model_copy(update={"predict": params.predict.model_copy(update={"lr": lr})})
    else:
        params = params.model_copy(update={"phase2": params.phase2.model_copy(update={"lr": lr})})
    contexts, phase2, whole = params.contexts, params.phase2, len(text.ids["train"])
    if name.startswith("seed"):
        contexts = contexts.model_copy(update={"max_train_sweeps": params.contest.seed_sweeps})
    if name == "untrained_longer":
        phase2 = phase2.model_copy(update={"epochs": epochs_of(params), "patience": epochs_of(params)})
    model, reader, spent, updates = _contexts(name, params, text, seed)
    found = settled(model, text, contexts, params.progress)
    fixed = {split: FixedText(text.ids[split], found[split].contexts) for split in SPLITS}
    after, result = train_head(model, fixed["train"], fixed["validation"], phase2, seed, reader)
    test = score(after, fixed["test"], phase2.mode)
    outcome = {
        "val_loss": min(one.loss for one in result.validation),
        "ppl": test.ppl,
        "bits_per_byte": text.bits_per_byte(test.loss, "test"),
        "tokens": spent + len(result.train) * whole,
        "updates": updates + result.updates,
        "ppl_zero_contexts": score(after, zeroed(fixed["test"]), phase2.mode).ppl,
        "ppl_shuffled_contexts": score(after, shuffled(fixed["test"], seed), phase2.mode).ppl,
    }
    if name == "sound" and blind_heads:
        begun = time.perf_counter()
        for key, change in (("zero", zeroed), ("shuffled", lambda one: shuffled(one, seed))):
            other = {split: change(one) for split, one in fixed.items()}
            blind, _ = train_head(model, other["train"], other["validation"], phase2, seed, reader)
            loss = score(blind, other["test"], phase2.mode).loss
            outcome[f"ppl_trained_{key}_contexts"] = ppl(loss)
            outcome[f"bits_per_byte_trained_{key}_contexts"] = text.bits_per_byte(loss, "test")
        outcome["seconds_besides"] = time.perf_counter() - begun
    return outcome | parameter_facts(after)


def _contexts(name: str, params: CvfpParams, text: Text, seed: int) -> tuple[NewLLMResidual, Reader | None, int, int]:
    """The network after phase 1, the reader to start from, and the tokens and weight updates of phase 1."""
    train = text.ids["train"]
    if name.startswith("seed"):
        scaled = seed_of_equal_size(params, text.vocab_size)
        if name == "seed_untrained":
            return build(scaled.model, scaled.phase1, text.vocab_size, seed).eval(), None, 0, 0
        # as many tokens as `sound` reads in phase 1, unless its stop rule ends it, in passes over less text
        part = train[: params.predict.epochs * len(train) // scaled.phase1.max_iterations]
        done = first_phase(scaled, Text(text.ids | {"train": part}, text.vocab_size, text.token_bytes, ""), seed)
        return done.model, None, done.passes * len(part), done.updates
    if name == "sound":
        done = first_phase(params, text, seed)
        return done.model, done.reader, done.passes * len(train), done.updates
    model = build(params.model, params.phase1, text.vocab_size, seed)
    if name.startswith("untrained"):
        return model.eval(), None, 0, 0
    torch.nn.ModuleList(model.blocks).requires_grad_(False)
    result = train_contexts(model, train, params.predict, params.phase1, params.model.train_embedding, seed)
    return model.eval(), result.reader, params.predict.epochs * len(train), result.updates
