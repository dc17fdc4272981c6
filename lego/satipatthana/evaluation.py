"""All numbers of a trained system under one protocol (specification, 11): flat keys, one per row of its table."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lego.satipatthana import jobs, metrics
from lego.satipatthana.introspect import velocity
from lego.satipatthana.log import SantanaLog
from lego.satipatthana.paths import Way, damaged
from lego.satipatthana.settings import Job, Stage2Params
from lego.satipatthana.specs import diversity
from lego.satipatthana.system import Output, Satipatthana
from lego.satipatthana.tasks import Split
from lego.satipatthana.training import distinct_share, mean_cosine

SWEEP = (1, 2, 5, 20)  # multiples of max_steps of the T-sweep
ROUNDING = 1e-4  # length of a step, as a share of the state's, below which its ratio to the next is rounding


@dataclass(frozen=True)
class Protocol:
    """What a system is judged on.

    Args:
        test: inputs and classes.
        outside: inputs from outside by kind.
        settings: section `stage2`, of which the damage of rows by path is taken.
        seed: of noise and damage.
        job: what an answer is; see `lego.satipatthana.jobs`.
        tolerance: within which a number is right, in the job regression.
    """

    test: Split
    outside: dict[str, Tensor]
    settings: Stage2Params
    seed: int
    job: Job = "classification"
    tolerance: float = 0.0


class Answered(typing.Protocol):
    """What any system must say of inputs: answers (n, C), logits in classification, and trust (n, 1)."""

    @property
    def output(self) -> Tensor: ...

    @property
    def trust(self) -> Tensor: ...


def evaluate(system: Callable[[Tensor], Answered], protocol: Protocol, temperature: float = 1.0) -> dict[str, float]:
    """How good the answers are, trust on every kind of fault, selective risk, and what the fixed point is (R-11.1).

    Args:
        system: trained. Of a Satipatthana all numbers are taken; of anything else, those of its answers and trust.
        protocol: data and seed.
        temperature: of the decoder, fitted on validation rows.
    """
    test, found = protocol.test, system(protocol.test.x)
    trust = _scores(found.trust)
    facts = jobs.answered(protocol.job, found.output, trust, test.y, protocol.tolerance, temperature)
    away = {kind: system(rows) for kind, rows in protocol.outside.items()}
    facts |= _strangers(trust, {kind: _scores(one.trust) for kind, one in away.items()}, protocol.job)
    if not isinstance(system, Satipatthana):
        return facts
    inside, outside = typing.cast(Output, found), typing.cast(dict[str, Output], away)
    errors = {kind: -_scores(one.recon_error) for kind, one in outside.items()}
    of_error = _strangers(-_scores(inside.recon_error), errors, protocol.job)
    kept = ("auroc_", "auprc_anomaly", "recall_at_1", "precision_at_100")
    facts |= {f"{key}_recon": value for key, value in of_error.items() if key.startswith(kept)}
    facts |= {f"known_share_{kind}": float(one.known.double().mean()) for kind, one in outside.items()}
    return facts | engine(system, inside) | paths(system, protocol) | fixed_point(system, protocol)


def _scores(column: Tensor) -> np.ndarray:
    return column[:, 0].double().numpy()


def _strangers(inside: np.ndarray, outside: dict[str, np.ndarray], job: Job) -> dict[str, float]:
    """How well a score tells rows of each kind (m,) from test rows (n,)."""
    facts = metrics.strangers(inside, outside)
    return facts | (jobs.flagged(inside, np.concatenate(list(outside.values()))) if job == "anomaly" else {})


def engine(system: Satipatthana, found: Output) -> dict[str, float]:
    """What the states of test rows are like, and how large the system is."""
    states = found.s_star
    last = velocity(states, found.log)
    return {
        "known_share": float(found.known.double().mean()),
        "cosine": mean_cosine(states),
        "mean_steps": float(found.steps.double().mean()),
        "last_step": float((last / states.norm(dim=1)).mean()),
        "last_step_squared": float(last.square().mean()),
        "recon_mse": float(found.recon_error.mean()),
        "parameters": float(sum(one.numel() for one in system.parameters())),
    } | probes_used(system, states)


def paths(system: Satipatthana, protocol: Protocol) -> dict[str, float]:
    """Mean trust by path, and AUROC of clean rows against each damaged path."""
    generator, trusted = torch.Generator().manual_seed(protocol.seed), dict[str, np.ndarray]()
    clean = Way.of(system, protocol.test.x)
    for path in ("clean", "augmented", "drunk", "mismatch"):
        rows = damaged(system, clean, {path: len(clean.state)}, protocol.settings, None, generator)
        with torch.no_grad():
            view = system.view(rows.state, rows.log, rows.recon_error)
        trusted[path] = view.trust[:, 0].double().numpy()
    facts = {f"trust_{path}": float(values.mean()) for path, values in trusted.items()}
    return facts | {f"auroc_{path}": metrics.auroc(trusted["clean"], trusted[path]) for path in ("drunk", "mismatch")}


def fixed_point(system: Satipatthana, protocol: Protocol) -> dict[str, float]:
    """What more steps change, with the stop rule off: right answers, reconstruction, last step, distinct states (9.1).

    The decoder reads the way as well, which is longer than any that it was trained with.
    """
    facts: dict[str, float] = {}
    test, job, tolerance = protocol.test, protocol.job, protocol.tolerance
    horizon = system.params.samatha.max_steps
    for factor in SWEEP:
        found = system(test.x, max_steps=factor * horizon, rests=False)
        last = velocity(found.s_star, found.log)
        if factor == 1:
            facts["contraction"] = contraction(found.log)
        facts |= {
            f"recon_mse_{factor}T": float(found.recon_error.mean()),
            f"last_step_{factor}T": float((last / found.s_star.norm(dim=1)).mean()),
            f"distinct_{factor}T": distinct_share(found.s_star),
        }
        if job == "anomaly":  # no decoder, and a guide that knows of normal rows what all have in common
            continue
        name = "accuracy" if job == "classification" else "within_tolerance"
        facts[f"{name}_{factor}T"] = float(jobs.right(job, found.output, test.y, tolerance).double().mean())
        if system.aux is not None:
            with torch.no_grad():
                guess = system.aux(found.s_star)
            facts[f"aux_{name}_{factor}T"] = float(jobs.right(job, guess, test.y, tolerance).double().mean())
    return facts


def contraction(log: SantanaLog) -> float:
    """The largest ratio of a step's length to that of the one before, over rows and steps that are not yet rounding."""
    steps, sizes = log.energies().sqrt(), log.to_tensor()[1:].norm(dim=2)  # (T, B)
    counts = steps[:-1] > ROUNDING * sizes[:-1]
    return float((steps[1:][counts] / steps[:-1][counts]).max()) if bool(counts.any()) else math.nan


def probes_used(system: Satipatthana, states: Tensor) -> dict[str, float]:
    """Perplexity of the probes nearest to settled states (B, d), and how alike the probes are."""
    nearest = torch.cdist(states, system.vitakka.read()).argmin(dim=1)
    share = torch.bincount(nearest, minlength=len(system.vitakka.probes)).double() / len(states)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {
        "probes_used": float((share > 0).sum()),
        "probe_perplexity": float(entropy.exp()),
        "probe_cosine": float(diversity(system.vitakka.probes, False).detach()),
    }
