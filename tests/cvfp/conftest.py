"""Small CVFP networks and parameters that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lego.cvfp.model import NewLLMResidual
from lego.cvfp.phase1 import ContextTrainer, Iteration
from lego.cvfp.sections import CvfpParams, changed, load, with_profile
from lego.cvfp.store import build
from tests.conftest import ROOT

PARAMS = load(ROOT / "stages/cvfp/params.yaml", ROOT / "params.yaml")
SEED_PROFILE = with_profile(PARAMS, "seed", ROOT / "stages/cvfp/profiles.yaml")
SMALL = {"model.context_dim": 24, "model.embed_dim": 16, "model.hidden_dim": 40, "model.layer_structure": [1, 1]}
VOCAB = 50


def seed_params(**changes: Any) -> CvfpParams:
    """The seed profile at test size; `phase1__lr=0.1` changes phase1.lr."""
    return changed(SEED_PROFILE, SMALL | {key.replace("__", "."): value for key, value in changes.items()}, "test")


def network(params: CvfpParams, vocab_size: int = VOCAB, seed: int = 0) -> NewLLMResidual:
    return build(params.model, params.phase1, vocab_size, seed)


def text(tokens: int, vocab_size: int = VOCAB, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))


def trained(params: CvfpParams, tokens: int = 60, seed: int = 0) -> tuple[ContextTrainer, list[Iteration]]:
    """Phase 1 on random ids: the trainer, and all of its iterations."""
    model = network(params, seed=seed)
    trainer = ContextTrainer(model, model.embed(text(tokens)).detach(), params.phase1)
    return trainer, list(trainer.iterations())
