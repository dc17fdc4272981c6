"""Whether a record follows from today's code, text and parameters, and if not, what has changed since.

Code is compared by the hashes that `dvc status` compares, of the packages and files that a model's stages depend on.
"""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from dvc.dependency import ParamsDependency, loads_from
from dvc.repo import Repo

from lego.base.harness import StageError
from lego.base.params import Params, load_params
from stages.evidence.records import Found
from stages.evidence.suites import PATHS, Suite, changed, changes_of, checked, flat, rate_key, target_of

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
def declared(target: str) -> tuple[dict[str, str], frozenset[str]]:
    """Of a stage and all before it: today's hash of each file and package of code, and the parameters they name."""
    code, keys = dict[str, str](), set[str]()
    for stage in _repo().stage.collect(target, with_deps=True):
        if stage.name == BESIDE != target:
            continue
        for dep in stage.deps:
            if isinstance(dep, ParamsDependency):
                keys.update(dep.params)
            elif is_code(dep.def_path) and not (stage.name == "tokenize" and dep.def_path == load_params().data.path):
                code[dep.def_path] = dep.get_hash().value[:SHOWN]
    return code, frozenset(keys)


@cache
def text_hash(path: str) -> str:
    """What DVC makes of a text that is not this interpreter's own.

    Raises:
        StageError: it is not here.
    """
    if not Path(path).exists():
        raise StageError(f"data.path {path} is missing; docs/evidence.md says how to put text there")
    stage = _repo().stage.load_one(name="tokenize")
    return loads_from(stage, [str(Path(path).absolute())])[0].get_hash().value[:SHOWN]


def made_of(target: str, values: dict[str, Any]) -> dict[str, str]:
    """What a model would be made of today: code, and Python's own text or another one.

    Args:
        target: as `target_of` has it.
        values: all parameters, by section.
    """
    data, code = values["data"], declared(target)[0]
    if data["source"] == "python-stdlib":
        return code | {"Python": platform.python_version()}
    return code | ({"text": text_hash(data["path"])} if data["source"] == "text" else {})


def rates_of(found: Found, setting: str, models: list[str], params: Params) -> dict[str, float]:
    """The rate that the first seed of a setting took, by its key, of the models that it has made."""
    first = {model: found.get(setting, {}).get(model, {}).get("0") for model in models}
    return {rate_key(model, params): one["metrics"]["lr"] for model, one in first.items() if one}


def parameters(suite: Suite, setting: str, seed: int, found: Found) -> dict[str, Any]:
    """Those of params.yaml, by section, as an experiment changes them; of later seeds with the rates that were found.

    Raises:
        StageError: see `checked`.
    """
    values = changed(load_params().model_dump(), suite.settings[setting])
    rates = rates_of(found, setting, suite.models, checked(values, setting))
    return checked(changed(values, changes_of(suite, setting, seed, rates)), setting).model_dump()


def differing(record: dict[str, Any], values: dict[str, Any], target: str) -> list[str]:
    """What a record follows from and is no longer so: keys of params.yaml, packages and files of code, text, Python.

    Args:
        record: with all its parameters, as `results` gives it.
        values: today's parameters of the same model, setting and seed, by section.
        target: as `target_of` has it.

    Raises:
        StageError: the text is not here, so it cannot be told.
    """
    keys, today, then = declared(target)[1], flat(values), record["params"]
    named = [key for key in today if any(key == one or key.startswith(f"{one}.") for one in keys)]
    found = sorted(key for key in named if not _same(key, today[key], then.get(key, "missing")))
    now = made_of(target, values)
    if record["made_of"] is None:
        return sorted(changed_in_git(record["revision"], tuple(path for path in now if Path(path).exists()))) + found
    return sorted(name for name in now if record["made_of"].get(name) != now[name]) + found


def _same(key: str, one: Any, other: Any) -> bool:
    """Whether two values are equal; of what a path names, the content counts, which is compared by its hash."""
    if key in PATHS and isinstance(one, str) and isinstance(other, str):
        return Path(one).name == Path(other).name
    return bool(one == other)


@cache
def changed_in_git(revision: str, paths: tuple[str, ...]) -> set[str]:
    """Which of the paths are not as they were at a revision; all if the revision, or its code, is not in git."""
    command = ["git", "diff", "--name-only", revision, "--", *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return set(paths)
    files = [Path(line) for line in done.stdout.splitlines()]
    return {path for path in paths if any(file.is_relative_to(path) for file in files)}


def standing(suite: Suite, setting: str, seed: int, found: Found) -> dict[str, list[str]]:
    """Of each model of a setting and seed why it has to be made: what has changed, or that it is missing.

    Raises:
        StageError: a setting is not valid, or its text is not here.
    """
    values = parameters(suite, setting, seed, found)
    params, why = Params.model_validate(values), dict[str, list[str]]()
    for model in suite.models:
        record = found.get(setting, {}).get(model, {}).get(str(seed))
        why[model] = differing(record, values, target_of(model, params)) if record else [MISSING]
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
