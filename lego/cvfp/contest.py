"""What all models of the results page share: equal tokens, equal parameters, and a digest of what they were made of."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from lego.cvfp.model import NewLLMResidual
from lego.cvfp.sections import CvfpParams, profiles
from lego.cvfp.store import bare, parameter_counts

OF_ALL = ("seed", "model")
OF_OWN = ("phase1", "predict", "contexts", "phase2")


def epochs_of(params: CvfpParams) -> int:
    """Passes over train that every model gets: those of both phases of `sound`."""
    return params.predict.epochs + params.phase2.epochs


def size_on_paper(params: CvfpParams, vocab_size: int) -> int:
    """Parameters of the network that params describe, without making it."""
    with torch.device("meta"):
        return sum(parameter_counts(bare(params.model, params.phase1, vocab_size)).values())


def parameter_facts(network: NewLLMResidual) -> dict[str, int]:
    """All parameters, and those that are not embeddings."""
    counts = parameter_counts(network)
    return {
        "parameters": sum(counts.values()),
        "parameters_without_embeddings": sum(counts.values()) - counts["embedding"],
    }


def made_of(name: str, params: CvfpParams, text: dict[str, Any]) -> str:
    """Digest of what a model's numbers come from, so that a page can tell which rows are of other text or parameters.

    Args:
        name: of the model.
        params: all of them.
        text: digests of the ids by split, as `lego.cvfp.text.Text.digests` gives them.
    """
    if name not in params.contest.lr:  # an n-gram
        return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    values = params.model_dump()
    own = name in params.contest.own
    used = {key: values[key] for key in (*OF_ALL, *(OF_OWN if own else ("peers",)))}
    used |= {"epochs": epochs_of(params), "lr": params.contest.lr[name], "text": text}
    if name.startswith("seed"):
        used |= {"profile": profiles()["seed"]}
    used |= {key: values["contest"][key] for key in ("seeds", "lr_factors", *(["seed_sweeps"] if own else []))}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()


def trial_digest(params: CvfpParams, text: dict[str, str]) -> str:
    """Digest of what a trial's numbers come from: its parameters, its seeds and the text.

    Args:
        params: with the trial's changes.
        text: digests of the ids by split.
    """
    values = params.model_dump()
    used = {key: values[key] for key in (*OF_ALL, *OF_OWN)} | {"seeds": params.contest.trial_seeds, "text": text}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()
