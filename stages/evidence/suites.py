"""What suites.yaml names: models compared under settings, which are changes to params.yaml, over seeds.

Each setting and seed is one DVC experiment, `<suite>-<setting>-s<seed>`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lego.base.harness import StageError
from lego.base.parameter_files import ParamsError
from lego.base.params import Params
from lego.base.profiles import with_keys
from lego.base.yaml_files import YamlError, read_yaml

FULL = ("core", "regime", "ratios", "selection", "options", "total")  # suites of --full, in this order
PIPELINE_MODELS = {  # stage, and key of the rate
    "ashem": ("evaluate_routing", "ashem.phase2_lr"),
    "shallow_continued": ("train_shallow_continued", "yardstick.lr"),
}
FIXED = ("seed", "search.lr_factors", "train.threads", "evaluation.latency_repeats")  # set for every experiment
NAME = r"[A-Za-z0-9_]+"
EXPERIMENT = rf"({NAME})-({NAME})-s([0-9]+)"  # name of one: suite, setting, seed


class Suite(BaseModel):
    """Settings (changes to params.yaml by name) and the models that are compared in each, over so many seeds.

    `search` holds the factors of each model's learning rate that the first seed tries.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    seeds: Annotated[int, Field(ge=1)]
    search: Annotated[list[float], Field(min_length=1)]
    settings: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    models: Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="after")
    def _comparable(self) -> Suite:
        for name, changes in self.settings.items():
            if not re.fullmatch(NAME, name):
                raise ValueError(f"setting {name} must be letters, digits and _: experiments are named by it")
            if fixed := [key for key in changes if key in FIXED]:
                raise ValueError(f"setting {name} must not change {fixed[0]}, which is the same for all")
            if whole := [key for key, value in changes.items() if isinstance(value, dict)]:
                raise ValueError(f"setting {name} must change single keys of {whole[0]}, not the section")
        if twice := [name for name in self.models if self.models.count(name) > 1]:
            raise ValueError(f"models has {twice[0]} twice")
        return self


def load_suites() -> dict[str, Suite]:
    """The suites of suites.yaml.

    Raises:
        StageError: it is not what it should be.
    """
    file, suites = Path(__file__).with_name("suites.yaml"), {}
    try:
        found = read_yaml(file, repeated_keys=True)
    except YamlError as error:
        raise StageError(f"{file.name}: {error}") from None
    if not isinstance(found, dict):
        raise StageError(f"{file.name}: must hold suites by name")
    for name, suite in found.items():
        try:
            suites[name] = Suite.model_validate(suite)
        except ValidationError as error:
            raise StageError(f"{file.name}: {name}: {first_error(error)}") from None
    return suites


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong, with its key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Parameters with some of their keys, written as section.key, set to other values.

    Raises:
        StageError: there is no such key.
    """
    try:
        return with_keys(values, changes, "suites.yaml", "params.yaml")
    except ParamsError as error:
        raise StageError(str(error)) from None


def made_by(model: str, params: Params) -> tuple[str, str]:
    """The stage that makes a model, as `dvc exp run` calls it, and the key of its peak learning rate.

    Raises:
        StageError: none does.
    """
    if model in PIPELINE_MODELS:
        return PIPELINE_MODELS[model]
    for group in ("joint", "block2"):
        if model in getattr(params.baselines, group):
            return f"stages/evidence/dvc.yaml:{group}@{model}", f"baselines.{group}.{model}.lr"
    raise StageError(f"suites.yaml: no model {model}; params.yaml: baselines names those there are")


def rate_keys(model: str) -> list[str]:
    """The keys of params.yaml of which one is a model's peak learning rate."""
    if model in PIPELINE_MODELS:
        return [PIPELINE_MODELS[model][1]]
    return [f"baselines.{group}.{model}.lr" for group in ("joint", "block2")]


def changes_of(suite: Suite, setting: str, seed: int, rates: dict[str, float]) -> dict[str, Any]:
    """What an experiment changes in params.yaml; `rates` are those that the first seed took, by key."""
    alone = {"seed": seed, "train.threads": 1, "evaluation.latency_repeats": 0, "search.lr_factors": suite.search}
    found = rates | {"search.lr_factors": [1.0]} if seed and len(suite.search) > 1 else {}
    return suite.settings[setting] | alone | found


def checked(values: dict[str, Any], setting: str) -> Params:
    """The parameters of an experiment.

    Raises:
        StageError: they are not valid, or the suites would compare what is not comparable.
    """
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise StageError(f"suites.yaml: setting {setting}: {first_error(error)}") from None
    routing = params.routing
    if params.ashem.hard_split != "train":
        raise StageError(
            "params.yaml: ashem.hard_split must be train for the suites; leaky_validation is the other one"
        )
    if routing.criterion not in ("max_prob", "gain") or routing.calibration != "quantile":
        raise StageError(
            "params.yaml: routing.criterion must be max_prob or gain and routing.calibration quantile for the suites: "
            "baselines route so"
        )
    return params


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Parameters by their whole key, section.key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def override(key: str, value: Any) -> str:
    """A change as `dvc exp run -S` takes it; data.path is found from the folder that the experiment runs in."""
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    text = str(Path(value).absolute()) if key == "data.path" else value
    quoted = text.replace("'", "\\'")
    return f"{key}='{quoted}'"
