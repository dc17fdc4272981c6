"""The steps of the pipeline as functions: phase 1 by either objective, settled contexts, texts with both."""

from __future__ import annotations

import copy
import hashlib
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lego.base.artifacts import ArtifactError, read_json, read_tensors
from lego.cvfp.model import NewLLMResidual, Reader
from lego.cvfp.passes import NonFiniteContextError, Settled, Telling, settle
from lego.cvfp.phase1 import ContextTrainer, Iteration
from lego.cvfp.phase2 import FixedText
from lego.cvfp.predict import train_contexts
from lego.cvfp.sections import ContextsParams, CvfpParams, ProgressParams
from lego.cvfp.store import build
from lego.cvfp.text import SPLITS, Text, digest

MADE_OF = "made_of.json"  # beside contexts: digests of the ids by split and of the network


@dataclass(frozen=True)
class FirstPhase:
    """What phase 1 leaves: the network, as it is and as it was, weight updates, and one row a pass or epoch.

    weights_version counts the updates behind the network: without recompute_contexts it is that of before the last one.
    The head is as it was made (B20); reader is where phase 2's may start, if predict.keep_reader says so. carried are
    the contexts (N, d) of the last pass, which starts where the one before it ended (ruling 9.4), if passes do.
    """

    model: NewLLMResidual
    untrained: NewLLMResidual
    updates: int
    weights_version: int
    rows: list[dict[str, Any]]
    last: Iteration | None
    reader: Reader | None = None
    carried: Tensor | None = None

    def facts(self) -> dict[str, Any]:
        """For metrics: the last row, and what the mandatory report needs."""
        converged = None if self.last is None else self.last.converged
        tokens = None if self.last is None else len(self.last.contexts.values)
        counts = {"updates": self.updates, "passes": self.passes, "converged": converged, "tokens": tokens}
        return dict(self.rows[-1]) | counts

    @property
    def passes(self) -> int:
        """Over the text: epochs, or iterations with the one that trains nothing."""
        return len(self.rows) if self.last is None else self.last.number + 1


def telling(settings: ProgressParams) -> Telling:
    return Telling(settings.progress_every, settings.warn_above)


def announce(what: str, tokens: int, settings: ProgressParams) -> None:
    """Says so before work on many tokens."""
    if tokens > settings.warn_above:
        print(f"{what}: {tokens:,} tokens, more than {settings.warn_above:,}", flush=True)


def seed_all(seed: int) -> None:
    """The generators of Python, numpy and torch, and deterministic kernels (specification, section 7)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def first_phase(params: CvfpParams, text: Text, seed: int) -> FirstPhase:
    """Trains contexts on the train ids by the objective that the parameters name.

    Args:
        params: all of them.
        text: ids; only train is read.
        seed: of initial weights and of training.

    Raises:
        FloatingPointError: a loss or a context is not finite.
    """
    seed_all(seed)
    model = build(params.model, params.phase1, text.vocab_size, seed)
    untrained = copy.deepcopy(model).eval()
    ids = text.ids["train"]
    if params.phase1.objective == "predict":
        announce("phase 1", len(ids), params.progress)
        result = train_contexts(model, ids, params.predict, params.phase1, params.model.train_embedding, seed)
        rows: list[dict[str, Any]] = [
            {"pass": number, "loss": loss, "contraction": fading, "vicreg": spread}
            for number, (loss, fading, spread) in enumerate(
                zip(result.loss, result.contraction, result.vicreg, strict=True), 1
            )
        ]
        return FirstPhase(model.eval(), untrained, result.updates, result.updates, rows, None, result.reader)
    trainer = ContextTrainer(model, model.embed(ids).detach(), params.phase1, telling(params.progress))
    rows, last = [], None
    for last in trainer.iterations():
        print(last.line(params.phase1.max_iterations), flush=True)
        _require_finite_loss(trainer, last)
        if last.cvfp is not None:
            rows.append(
                {"pass": last.number, "cvfp_mse": last.cvfp, "diversity": last.diversity, "converged": last.converged}
            )
    version = trainer.updates
    carries = last is not None and params.phase1.start_context == "carry"
    carried = trainer.final(last).values if last is not None and carries else None
    if trainer.weights_before:  # the returned contexts are of before the last step, and so is the network
        model.load_state_dict(trainer.weights_before)
        version = trainer.made_with
    return FirstPhase(model.eval(), untrained, trainer.updates, version, rows, last, None, carried)


def _require_finite_loss(trainer: ContextTrainer, last: Iteration) -> None:
    """Contexts may be finite and so large that their squares are not: no step is taken then, and no number is one.

    Raises:
        NonFiniteContextError: the loss is not finite; the message names the token with the largest context.
    """
    if last.cvfp is None or last.diversity is None or (math.isfinite(last.cvfp) and math.isfinite(last.diversity)):
        return
    size = last.contexts.values.abs().amax(dim=1)  # (N,)
    raise NonFiniteContextError(
        f"iteration {last.number + 1}: the loss is not finite, {trainer.skipped} steps were skipped; the largest "
        f"context, {float(size.max()):.2g}, is that of token {int(size.argmax())}; set model.layernorm_mix above 0, or "
        "lower the rate"
    )


def settled(
    model: NewLLMResidual, text: Text, settings: ContextsParams, progress: ProgressParams
) -> dict[str, Settled]:
    """C* of each split, from start 0.

    Args:
        model: of phase 1.
        text: ids by split.
        settings: section `contexts`.
        progress: from how many tokens the work announces itself.

    Raises:
        NonFiniteContextError: a context is not finite.
    """
    found = {}
    for split in SPLITS:
        embeddings = model.embed(text.ids[split]).detach()
        announce(f"{split}: contexts", len(embeddings), progress)
        most = settings.max_train_sweeps if split == "train" else 0  # what is judged is always settled
        found[split] = settle(model, embeddings, settings.segments, settings.tolerance, most or None, split)
        one = found[split]
        print(f"{split}: {len(embeddings):,} tokens, {one.sweeps} sweeps, residual {one.residual:.2e}", flush=True)
    return found


def fixed_text(text: Text, split: str, folder: str | Path, snapshot: NewLLMResidual) -> FixedText:
    """A split with the contexts that build_contexts wrote.

    Args:
        text: ids by split.
        split: of it.
        folder: of the contexts.
        snapshot: the network of phase 1 that should have made them.

    Raises:
        ArtifactError: they are missing, damaged, of another text or of another network.
    """
    file = Path(folder) / f"{split}.safetensors"
    facts, tensors = read_json(Path(folder) / MADE_OF, split, "network"), read_tensors(file)
    wanted = {"text": (split, digest(text.ids[split])), "network": ("network", weights_digest(snapshot))}
    for what, (key, found) in wanted.items():
        if facts[key] != found or "contexts" not in tensors:
            raise ArtifactError(f"{file}: is not of this {what}; run dvc repro stages/cvfp/dvc.yaml")
    return FixedText(text.ids[split], tensors["contexts"])


def weights_digest(network: NewLLMResidual) -> str:
    """SHA-256 of all weights, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
