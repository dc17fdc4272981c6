"""All numbers of a trained CVFP network: test perplexity, what its contexts are worth, ranks and critical checks."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import torch

from lego.cvfp.checks import Convergence, convergence, flags, identity
from lego.cvfp.dependence import dependence
from lego.cvfp.model import NewLLMResidual
from lego.cvfp.passes import Telling, sequential_pass
from lego.cvfp.phase2 import FixedText, Score, nll, ppl, score, shuffled, zeroed
from lego.cvfp.ranks import Spread
from lego.cvfp.reports import TrainFacts, ValidationFacts
from lego.cvfp.sections import ChecksParams, CvfpParams
from lego.cvfp.text import Text

DEPTHS = (0, 32, 128, 512)  # tokens since a document began, of perplexity by position


def since_document_began(ids: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Tokens (n,) from the end-of-text id before each of the ids (n,), or from the start."""
    places = torch.arange(len(ids))
    return places - torch.where(ids == end_of_text, places, 0).cummax(0).values


def worth(
    model: NewLLMResidual, mode: str, text: Text, test: FixedText, validation: FixedText, seed: int
) -> dict[str, float]:
    """Perplexities on held-out text; where phase 2 reads C*, also with none and with those of other tokens.

    Args:
        model: of phase 2.
        mode: phase2.mode it was trained in, and is judged in.
        text: for bits a byte.
        test, validation: with the contexts of the snapshot.
        seed: of the shuffling.
    """
    losses, right = nll(model, test, mode)
    whole = Score.of(losses, right)
    found = {
        "ppl": whole.ppl,
        "acc": whole.accuracy,
        "bits_per_byte": text.bits_per_byte(whole.loss, "test"),
        "val_ppl": score(model, validation, mode).ppl,
    }
    since = since_document_began(test.ids, text.end_of_text)[:-1]
    for low, high in itertools.pairwise((*DEPTHS, len(losses) + 1)):
        inside = (since >= low) & (since < high)
        if bool(inside.any()):
            found[f"ppl_from_token_{low}"] = ppl(float(losses[inside].double().mean()))
    if mode == "v2":
        found["ppl_zero_contexts"] = score(model, zeroed(test), mode).ppl
        found["ppl_shuffled_contexts"] = score(model, shuffled(test, seed), mode).ppl
    return found


def ranks(
    snapshot: NewLLMResidual,
    untrained: NewLLMResidual,
    ids: torch.Tensor,
    settings: ChecksParams,
    seed: int,
    prefix: str,
    telling: Telling,
) -> dict[str, float]:
    """Ranks of contexts from start 0 beside the three references at the same tokens and width.

    Args:
        snapshot, untrained: of phase 1, after and before.
        ids: the first tokens of a text (n,).
        settings: what counts as a global attractor, and as the zero solution.
        seed: of the pairs and of the Gaussian rows.
        prefix: of the keys.
        telling: what passes print.
    """
    embeddings = {name: model.embed(ids).detach() for name, model in (("own", snapshot), ("before", untrained))}
    own = sequential_pass(snapshot, embeddings["own"], None, telling, f"{prefix}: contexts")
    before = sequential_pass(untrained, embeddings["before"], None, telling, f"{prefix}: contexts of the untrained")
    found = Spread.of(own, seed)
    spread = {key: float(value) for key, value in asdict(found).items()}
    references = {"untrained": Spread.of(before, seed), "embeddings": Spread.of(embeddings["own"], seed)}
    noise = torch.randn(len(ids), snapshot.context_dim, generator=torch.Generator().manual_seed(seed))
    references["gaussian"] = Spread.of(noise, seed)
    spread |= {
        f"{key}_{name}": getattr(one, key)
        for name, one in references.items()
        for key in ("rank", "centred_rank", "participation")
    }
    spread |= {
        "attractor": found.is_attractor(settings.attractor_distance, settings.attractor_cosine),
        "zero": found.is_zero(settings.identity_norm),
    }
    return {f"{prefix}_{key}": value for key, value in spread.items()}


def critical_checks(
    snapshot: NewLLMResidual,
    untrained: NewLLMResidual,
    train: FixedText,
    params: CvfpParams,
    seed: int,
    telling: Telling,
) -> tuple[dict[str, Any], Convergence]:
    """Identity, convergence and dependence on the first tokens of train, R² by lag; and the convergence itself.

    Args:
        snapshot, untrained: of phase 1, after and before.
        train: ids and C*; checks.rank_tokens of it are read.
        params: for the section `checks`.
        seed: of noise and pairs.
        telling: what passes print.
    """
    n, settings = params.checks.rank_tokens, params.checks
    embeddings, contexts = snapshot.embed(train.ids[:n]).detach(), train.contexts[:n]
    same = identity(snapshot, contexts, embeddings, settings, seed)
    still = convergence(snapshot, embeddings, settings, telling)
    found = dependence(snapshot, contexts, embeddings, settings, seed)
    before = convergence(untrained, untrained.embed(train.ids[:n]).detach(), settings, telling)
    threshold = params.phase1.convergence_threshold
    facts = {f"identity_{key}": value for key, value in asdict(same).items()}
    facts |= {
        "final_diff_l2": still.final_diff,
        "final_diff_per_dimension": still.per_dimension,
        "final_diff_below_l2": still.below(settings.final_diff_bands),
        "converges": still.passed,
        "converged_when_frozen": still.converged(threshold),
        "untrained_final_diff_l2": before.final_diff,
        "untrained_converged_when_frozen": before.converged(threshold),
        "frozen_tokens": len(still.moved),
    }
    facts |= {f"is_{name}": flag for name, flag in flags(snapshot, settings, seed).items()}
    facts |= {key: value for key, value in asdict(found).items() if key != "lag_r2"}
    facts |= {f"r2_lag_{lag}": value for lag, value in enumerate(found.lag_r2)}
    return facts, still


def mandatory(
    snapshot: NewLLMResidual,
    params: CvfpParams,
    phase1: dict[str, Any],
    still: Convergence,
    validation: FixedText,
    rank: dict[str, float],
    telling: Telling,
) -> tuple[TrainFacts, ValidationFacts]:
    """The facts of both mandatory lines (specification, section 7).

    Args:
        snapshot: of phase 1.
        params: thresholds and numbers of passes.
        phase1: metrics of train_phase1.
        still: convergence of train text, as `critical_checks` found it.
        validation: ids and C*.
        rank: what `ranks` found of both, prefixes `train` and `val`.
        telling: what passes print.
    """
    n, threshold, dims = params.checks.rank_tokens, params.phase1.convergence_threshold, snapshot.context_dim
    whole = phase1["converged"] is not None  # counted while training, over all tokens
    val_still = convergence(snapshot, snapshot.embed(validation.ids[:n]).detach(), params.checks, telling)
    maximum = params.phase1.max_iterations if whole else params.predict.epochs
    return (
        TrainFacts(
            converged=phase1["converged"] if whole else still.converged(threshold),
            tokens=phase1["tokens"] if whole else len(still.moved),
            iterations=phase1["passes"],
            max_iterations=maximum,
            updates=phase1["updates"],
            rank=rank["train_rank"],
            untrained_rank=rank["train_rank_untrained"],
            dims=dims,
            cvfp=phase1["cvfp_mse"] if whole else float(still.moved.mean()),
        ),
        ValidationFacts(
            converged=val_still.converged(threshold),
            tokens=len(val_still.moved),
            passes=params.checks.passes,
            max_passes=params.checks.passes,
            rank=rank["val_rank"],
            dims=dims,
            final_diff=val_still.final_diff,
            threshold=params.checks.final_diff,
        ),
    )
