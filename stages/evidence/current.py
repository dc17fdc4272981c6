"""Whether a record follows from today's code, text and parameters, and if not, what has changed since.

Code is compared by the hashes that `dvc status` compares, of the packages and files that a model's stages depend on.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

from dvc.dependency import ParamsDependency, loads_from
from dvc.repo import Repo

from lego.base.harness import StageError
from lego.base.params import Params, load_params
from stages.evidence.records import Found
from stages.evidence.suites import Suite, changed, changes_of, checked, flat, made_by

BESIDE = "train_shallow_continued"  # evaluate_routing prints the yardstick beside ASHEM, whose numbers do not follow
MISSING = "missing"
SHOWN = 8  # hexadecimal digits of a hash


def is_code(path: str) -> bool:
    """Whether a dep is no output of another stage."""
    return not path.startswith(("data/", "metrics/"))


@cache
def _repo() -> Repo:
    return Repo()


@cache
def declared(target: str) -> tuple[dict[str, str], list[str], list[str]]:
    """A stage and all before it: today's hash of each file and package of code, parameters that are named, stages."""
    code, keys, names = dict[str, str](), list[str](), list[str]()
    for stage in _repo().stage.collect(target, with_deps=True):
        if stage.name == BESIDE != target:
            continue
        names.append(stage.name)
        for dep in stage.deps:
            if isinstance(dep, ParamsDependency):
                keys += dep.params
            elif is_code(dep.def_path) and dep.def_path != load_params().data.path:
                code[dep.def_path] = dep.get_hash().value[:SHOWN]
    return code, keys, names


@cache
def text_of(source: str, path: str) -> dict[str, str]:
    """What the text of `data.source` is known by.

    Raises:
        StageError: it is not here.
    """
    if source != "text":
        return {"Python": platform.python_version()} if source == "python-stdlib" else {}
    if not Path(path).exists():
        raise StageError(f"data.path {path} is missing; docs/evidence.md says how to put text there")
    tokenize = _repo().stage.load_one(name="tokenize")
    return {"text": loads_from(tokenize, [str(Path(path).absolute())])[0].get_hash().value[:SHOWN]}


def rates_of(found: Found, setting: str, models: list[str], params: Params) -> dict[str, float]:
    """The rate that the first seed of a setting took, by its key, of the models that it has made."""
    first = {model: found.get(setting, {}).get(model, {}).get("0") for model in models}
    return {made_by(model, params)[1]: one["metrics"]["lr"] for model, one in first.items() if one}


def differing(record: dict[str, Any], values: dict[str, Any], target: str) -> list[str]:
    """What a record follows from and is no longer so: keys of params.yaml, packages and files of code, text, Python.

    Args:
        record: with all its parameters, as `results` gives it.
        values: today's parameters of the same model, setting and seed, by section.
        target: as `made_by` has it.
    """
    (code, keys, _), then, data = declared(target), record["params"], values["data"]
    own = {key: value for key, value in flat(values).items() if any(f"{key}.".startswith(f"{one}.") for one in keys)}
    since = [key for key, value in own.items() if key != "data.path" and (key not in then or then[key] != value)]
    now = code | text_of(data["source"], data["path"])
    return [name for name in now if record["made_of"].get(name) != now[name]] + since


def standing(suite: Suite, setting: str, seed: int, found: Found) -> dict[str, list[str]]:
    """Of each model of a setting and seed why it has to be made: what has changed, or that it is missing.

    Raises:
        StageError: a setting is not valid, or its text is not here.
    """
    values = load_params().model_dump()
    params = checked(changed(values, suite.settings[setting]), setting)
    changes = changes_of(suite, setting, seed, rates_of(found, setting, suite.models, params))
    values, why = checked(changed(values, changes), setting).model_dump(), dict[str, list[str]]()
    for model in suite.models:
        record = found.get(setting, {}).get(model, {}).get(str(seed))
        why[model] = differing(record, values, made_by(model, params)[0]) if record else [MISSING]
    return why


def outdated(suite: Suite, found: Found) -> list[list[str]]:
    """What has changed since, of each record that is not current.

    Raises:
        StageError: a setting is not valid, or its text is not here.
    """
    said = []
    for setting, models in found.items():
        for seed in sorted({seed for seeds in models.values() for seed in seeds}, key=int):
            known = standing(suite, setting, int(seed), found) if setting in suite.settings else {}
            said += [known.get(model, ["suites.yaml"]) for model, seeds in models.items() if seed in seeds]
    return [why for why in said if why]
