"""What a suite wants, and which of it is there: models over settings and seeds, against their records.

A record is current if its fingerprint is that of today's parameters, code, text and versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lego.base.artifacts import write_json
from lego.base.harness import StageError
from lego.base.params import Params, load_params
from stages.evidence.graph import Suite, Task, base_rate, changed, first_error, load_suites, stage_of, task_of
from stages.evidence.records import RESULTS, results


@dataclass(frozen=True)
class Wanted:
    """A model of a suite under a setting and seed, and the task that makes it."""

    suite: str
    setting: str
    model: str
    seed: int
    task: Task

    @property
    def title(self) -> str:
        return f"{self.suite} {self.setting} {self.model} seed {self.seed}"


def record_of(found: dict[str, Any], setting: str, model: str, seed: int) -> dict[str, Any]:
    return found.get(setting, {}).get(model, {}).get(str(seed), {})


def parameters(suite: Suite, setting: str, seed: int) -> dict[str, Any]:
    """Those of params.yaml with the setting's changes, on one thread and without timing.

    Raises:
        StageError: they are not valid, or the suites would compare what is not comparable.
    """
    values = load_params().model_dump()
    alone = {"seed": seed, "train.threads": 1, "evaluation.latency_repeats": 0, "search.lr_factors": suite.search}
    values = changed(changed(values, alone), suite.settings[setting])
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise StageError(f"suites.yaml: setting {setting}: {first_error(error)}") from None
    routing = params.routing
    if params.ashem.hard_split != "train":
        raise StageError(
            "params.yaml: ashem.hard_split must be train for the suites; leaky_validation is the other one"
        )
    if (routing.criterion, routing.calibration, routing.hard_ratio) != ("max_prob", "quantile", None):
        raise StageError(
            "params.yaml: routing must be max_prob, quantile and hard_ratio null for the suites: baselines route so"
        )
    return values


def factors_found(
    found: dict[str, Any], setting: str, models: list[str], values: dict[str, Any]
) -> dict[str, list[float]]:
    """search.lr_factors of the later seeds by stage: the one that the first seed took, by the suite's records."""
    params = Params.model_validate(values)
    factors = {}
    for model in models:
        lr = record_of(found, setting, model, 0).get("metrics", {}).get("lr")
        base = base_rate(model, params)
        matching = [factor for factor in params.search.lr_factors if lr and abs(base * factor - lr) < 1e-9 * lr]
        if matching:
            factors["train_phase2" if model == "ashem" else stage_of(model, params)] = matching
    return factors


def wanted(name: str, suite: Suite, seeds: range) -> Iterator[Wanted]:
    """What the suite consists of for these seeds."""
    found = results(name)
    for setting in suite.settings:
        for seed in seeds:
            values = parameters(suite, setting, seed)
            factors = factors_found(found, setting, suite.models, values) if seed else {}
            if "shallow_continued" not in suite.models:  # it is made on the way to ASHEM and not compared
                factors["train_shallow_continued"] = [1.0]
            params = Params.model_validate(values)
            for model in suite.models:
                yield Wanted(name, setting, model, seed, task_of(stage_of(model, params), values, factors))


def outdated(name: str, suite: Suite) -> list[tuple[str, str, str]]:
    """Setting, model and seed of the records that follow from other parameters, code or text than today's."""
    found = results(name)
    seeds = {int(seed) for models in found.values() for kept in models.values() for seed in kept}
    if not seeds:
        return []
    current = {
        (one.setting, one.model, str(one.seed)): one.task.fingerprint
        for one in wanted(name, suite, range(max(seeds) + 1))
    }
    return [
        (setting, model, seed)
        for setting, models in found.items()
        for model, kept in models.items()
        for seed, one in kept.items()
        if current.get((setting, model, seed)) != one["fingerprint"]
    ]


def drop_stale(name: str, suite: Suite) -> None:
    """Removes outdated records, so that they are not averaged with current ones.

    Settings and models that the suite does not have (any more) go too.
    """
    if stale := outdated(name, suite):
        found = results(name)
        for setting, model, seed in stale:
            del found[setting][model][seed]
        print(f"{name}: {len(stale)} models of other parameters, code or text are dropped", flush=True)
        write_json(RESULTS / f"{name}.json", found)


def missing(name: str, suite: Suite, seeds: range) -> list[Wanted]:
    """The models of a suite whose numbers are not there or not current."""
    found = results(name)
    return [
        one
        for one in wanted(name, suite, seeds)
        if record_of(found, one.setting, one.model, one.seed).get("fingerprint") != one.task.fingerprint
    ]


def searched(todo: list[Wanted]) -> list[Wanted]:
    """Without the later seeds of what the first one did not make: its learning rate is not known."""
    return [one for one in todo if one.seed == 0 or record_of(results(one.suite), one.setting, one.model, 0)]


def put(one: Wanted, kept: dict[str, Any]) -> None:
    found = results(one.suite)
    found.setdefault(one.setting, {}).setdefault(one.model, {})[str(one.seed)] = kept
    write_json(RESULTS / f"{one.suite}.json", found)


def adopt(todo: list[Wanted]) -> list[Wanted]:
    """Takes over what another suite made already; returns what is still to make."""
    made = {
        kept["fingerprint"]: kept
        for name in {file.stem for file in RESULTS.glob("*.json")} & load_suites().keys()
        for models in results(name).values()
        for seeds in models.values()
        for kept in seeds.values()
    }
    for one in todo:
        if one.task.fingerprint in made:
            put(one, made[one.task.fingerprint])
            print(f"{one.title}: made before, for another suite", flush=True)
    return [one for one in todo if one.task.fingerprint not in made]
