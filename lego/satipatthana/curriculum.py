"""One seed through the curriculum, and what is needed to use and to judge the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from lego.base.artifacts import derived_seed
from lego.base.harness import StageError
from lego.satipatthana import jobs
from lego.satipatthana.evaluation import Protocol, evaluate
from lego.satipatthana.metrics import ece
from lego.satipatthana.reject import TrustMap, fit_temperature, fit_trust, threshold
from lego.satipatthana.sections import PARAMS, SatipatthanaParams
from lego.satipatthana.settings import RejectParams
from lego.satipatthana.specs import spec_of, start_probes
from lego.satipatthana.store import Use, restore
from lego.satipatthana.system import Satipatthana, build
from lego.satipatthana.tables import TaskError
from lego.satipatthana.tasks import Split, Task
from lego.satipatthana.training import TRAINABLE, check_states, run_stage

STAGES = (0, 1, 2, 3)


def begin(task: Task, params: SatipatthanaParams, seed: int) -> Satipatthana:
    """A fresh system of a seed.

    Args:
        task: whose shape and classes it is made for.
        params: all of them.
        seed: number of the run, from 0.
    """
    for name in ("train", "validation", "test"):
        check_rows(name, getattr(task, name), len(task.classes), params.task.job == "regression")
    try:
        return build(
            task.shape, len(task.classes), params, task.train.x, derived_seed(params.seed, f"satipatthana/{seed}")
        )
    except ValueError as error:  # an adapter that does not fit the inputs
        raise StageError(f"{PARAMS}: {error}") from None


def check_rows(name: str, rows: Split, classes: int, numbers: bool = False) -> None:
    """Checks inputs and answers.

    Raises:
        TaskError: an input or a number is not finite, or a label is no class.
    """
    bad = ~torch.isfinite(rows.x.flatten(1)).all(dim=1)
    if bool(bad.any()):
        raise TaskError(f"{name}: row {int(bad.nonzero()[0])} has a feature that is not a finite number")
    if numbers:
        if not bool(torch.isfinite(rows.y).all()):
            row = int((~torch.isfinite(rows.y)).nonzero()[0])
            raise TaskError(f"{name}: row {row} has an answer that is not a finite number")
        return
    outside = (rows.y < 0) | (rows.y >= classes)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise TaskError(f"{name}: row {row} has the label {int(rows.y[row])}, but the classes are 0 to {classes - 1}")


def resume(task: Task, params: SatipatthanaParams, seed: int, before: int, folder: str | Path) -> Satipatthana:
    """A system of a seed as the stages up to `before` left it in a folder; later parts are fresh."""
    system = begin(task, params, seed)
    restore(system, folder, {name for number in range(before + 1) for name in TRAINABLE[number]})
    return system.eval().requires_grad_(False)


def advance(
    system: Satipatthana, number: int, task: Task, params: SatipatthanaParams, seed: int
) -> list[dict[str, float]]:
    """Trains one stage in place; returns the terms by epoch, none where it has nothing to train.

    Args:
        system: as the stage before left it.
        number: 0 to 3.
        task: train rows are read.
        params: all of them.
        seed: number of the run.

    Raises:
        StageCheckError: the stage would train nothing, or on states that are all alike.
    """
    if number == 3 and system.decoder is None:
        print("stage 3: the job anomaly has no decoder; 1 - trust is the answer", flush=True)
        return []
    own = derived_seed(params.seed, f"satipatthana/{seed}/stage{number}")
    if number == 1:
        start_probes(system, task.train.x, own)
    if number:
        facts = check_states(system, task.train.x, settles=number > 1)
        said = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
        print(f"stage {number}, before it begins, {len(task.train)} rows: {said}", flush=True)
    spec = spec_of(number, system, task.train, params, own, task.known, task.strangers, task.validation)
    history = run_stage(system, spec, own)
    if number == 1:
        with torch.no_grad():
            system.vitakka.learn_gate(system.adapter(task.train.x))
    return history


def how_to_use(system: Satipatthana, task: Task, settings: RejectParams) -> Use:
    """Temperature, map of trust and threshold, all from validation rows.

    Args:
        system: trained.
        task: validation rows are read.
        settings: section `reject`.
    """
    found, labels = system(task.validation.x), task.validation.y
    job, classifies = system.params.task.job, system.params.task.job == "classification"
    temperature = fit_temperature(found.output, labels) if classifies and settings.calibration != "none" else 1.0
    right = jobs.right(job, found.output, labels, settings.tolerance).numpy()
    trust = found.trust[:, 0].double().numpy()
    # validation rows of the job anomaly hold no known mistake that trust could be mapped to the share of
    mapped: TrustMap = fit_trust(trust, right, settings.calibration if job != "anomaly" else "none")
    scale = {name: [] if one is None else one.tolist() for name, one in (("mean", task.mean), ("std", task.std))}
    cut = threshold(trust, right, settings.rule, settings.wanted)
    return Use(
        task.classes,
        task.columns,
        **scale,
        temperature=temperature,
        trust=mapped,
        threshold=cut,
        answer=list(task.answer),
        names=task.names,
    )


def judge(system: Satipatthana, task: Task, use: Use, params: SatipatthanaParams, seed: int) -> dict[str, float]:
    """All numbers of the test rows, with what abstaining by the threshold comes to."""
    own, job = derived_seed(params.seed, f"satipatthana/{seed}/test"), params.task.job
    protocol = Protocol(task.test, task.outside, params.stage2, own, job, params.reject.tolerance)
    facts = evaluate(system, protocol, use.temperature)
    output, accepted, trust = system.predict(task.test.x, use.threshold)
    facts["coverage"] = float(accepted.double().mean())
    if job != "anomaly":
        right = jobs.right(job, output, task.test.y, params.reject.tolerance)
        facts |= {
            "risk_of_accepted": float((~right[accepted]).double().mean()) if bool(accepted.any()) else math.nan,
            "trust_ece_calibrated": ece(use.trust(trust[:, 0].double().numpy()), right.numpy()),
        }
    for kind, rows in task.outside.items():
        facts[f"accepted_{kind}"] = float(system.predict(rows, use.threshold)[1].double().mean())
    return facts


def in_short(facts: dict[str, float]) -> str:
    """The first numbers of a job, for a line of output."""
    wanted = ("accuracy", "r2", "within_tolerance", "auroc_anomaly", "auprc_anomaly", "aurc")
    return ", ".join(f"{key} {facts[key]:.4f}" for key in wanted if key in facts)


def written(facts: dict[str, float]) -> dict[str, float | None]:
    """Numbers as JSON takes them: what is not defined, as an AUROC without a wrong row, is None."""
    return {key: value if math.isfinite(value) else None for key, value in facts.items()}


def means(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Mean over seeds of each number, of those seeds where it is defined."""
    found: dict[str, float | None] = {}
    for key in rows[0]:
        values = [row[key] for row in rows if math.isfinite(row[key])]
        found[key] = sum(values) / len(values) if values else None
    return found
