"""What a suite consists of: which stage makes which model, what it reads, and a fingerprint of all it follows from.

The graph is that of the dvc.yaml files. A fingerprint holds the values of the parameters a stage declares, its code
(as a syntax tree, so comments and docstrings do not count), the fingerprints of what it reads, the text, and the
versions of the packages that compute. So it is known without running anything.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lego.base.artifacts import sha256
from lego.base.code import ROOT, code_of
from lego.base.harness import StageError
from lego.base.parameter_files import ParamsError
from lego.base.params import Params
from lego.base.profiles import with_keys
from lego.base.scratch import pipeline_entry
from lego.base.sections import DataParams
from lego.base.yaml_files import YamlError, read_yaml
from lego.text.sources import documents

FULL = ("core", "regime", "ratios", "selection", "options", "total")  # suites of --full, in this order
PIPELINE_MODELS = {"ashem": "evaluate_routing", "shallow_continued": "train_shallow_continued"}
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "tokenizers")


FIXED = ("seed", "search.lr_factors", "train.threads", "evaluation.latency_repeats")  # the runner sets these itself


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
            if fixed := [key for key in changes if key in FIXED]:
                raise ValueError(f"setting {name} must not change {fixed[0]}, which the runner sets")
        if twice := [name for name in self.models if self.models.count(name) > 1]:
            raise ValueError(f"models has {twice[0]} twice")
        return self


@dataclass(frozen=True)
class Task:
    """One stage under one setting and seed; `inputs` maps each file it reads to the task that makes it."""

    stage: str
    params: str  # YAML
    inputs: tuple[tuple[str, Task], ...]
    fingerprint: str

    @property
    def label(self) -> str:
        return f"{self.stage}-{self.fingerprint[:16]}"

    def ancestors(self) -> Iterator[Task]:
        """All tasks that must be done before, and itself, in order."""
        for _, task in self.inputs:
            yield from task.ancestors()
        yield self


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


def stage_of(model: str, params: Params) -> str:
    """The stage that makes a model.

    Raises:
        StageError: none does.
    """
    if model in PIPELINE_MODELS:
        return PIPELINE_MODELS[model]
    for group in ("joint", "block2"):
        if model in getattr(params.baselines, group):
            return f"{group}@{model}"
    raise StageError(f"suites.yaml: no model {model}; params.yaml: baselines names those there are")


def base_rate(model: str, params: Params) -> float:
    """The peak learning rate that a model's search multiplies."""
    if model in PIPELINE_MODELS:
        return params.ashem.phase2_lr if model == "ashem" else params.yardstick.lr
    return getattr(params.baselines, stage_of(model, params).split("@")[0])[model].lr


def task_of(stage: str, values: dict[str, Any], factors: dict[str, list[float]]) -> Task:
    """The task of a stage with all that it needs.

    Args:
        stage: its name in a dvc.yaml.
        values: parameters.
        factors: search.lr_factors by stage, where they were found by the first seed.
    """
    return _Builder(values, factors).task(stage)


class _Builder:
    """Tasks of one set of parameters, each made once."""

    def __init__(self, values: dict[str, Any], factors: dict[str, list[float]]) -> None:
        self.values, self.factors, self.made = values, factors, dict[str, Task]()

    def task(self, stage: str) -> Task:
        if stage not in self.made:
            self.made[stage] = self._make(stage)
        return self.made[stage]

    def _make(self, stage: str) -> Task:
        entry, values = pipeline_entry(stage), self.values
        if stage in self.factors:
            values = changed(values, {"search.lr_factors": self.factors[stage]})
        files = [dep for dep in entry["deps"] if dep.startswith(("data/", "metrics/"))]
        inputs = tuple((file, self.task(producers()[file])) for file in files)
        facts = {
            "stage": stage,
            "params": {key: _value(values, key) for key in entry["params"]},
            "code": {file.relative_to(ROOT).as_posix(): code_digest(file) for file in code_of(entry["cmd"].split()[2])},
            "inputs": {file: task.fingerprint for file, task in inputs},
            "versions": {package: version(package) for package in PACKAGES} | {"cuda": torch.cuda.is_available()},
            "text": text_digest(json.dumps(text_keys(values["data"]))) if stage == "tokenize" else None,
        } | {name: sha256(name) for name in _folders(values) if stage in ("tokenize", "train_phase1")}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return Task(stage, yaml.safe_dump(values, sort_keys=False), inputs, digest)


def _folders(values: dict[str, Any]) -> list[str]:
    """Models, tokenizers and data sets that are named and lie here: their content counts."""
    named = (values["model"]["init_from"], values["data"]["pretrained"], values["data"]["hub_name"])
    return [name for name in named if name and Path(name).exists()]


def _value(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def written(entry: dict[str, Any]) -> list[str]:
    """Files and folders that a stage writes."""
    return [next(iter(out)) if isinstance(out, dict) else out for out in entry["outs"]]


@cache
def producers() -> dict[str, str]:
    """The stage of the root pipeline that writes each file."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {out: stage for stage, entry in stages.items() for out in written(entry)}


@cache
def code_digest(file: Path) -> str:
    """SHA-256 of a source file's syntax tree without docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def text_keys(data: dict[str, Any]) -> dict[str, Any]:
    """Of the section `data`, what says which text is read, and not how much of it is kept."""
    named = ("source", "stdlib_tests", "path", "column", "split_on", "streaming")
    return {key: value for key, value in data.items() if key in named or key.startswith("hub_")}


@cache
def text_digest(keys: str) -> str:
    """SHA-256 of the text that `text_keys`, given as JSON, name; of its name and revision, if on the hub."""
    section = DataParams.model_construct(**json.loads(keys))
    if section.source == "hub":
        return hashlib.sha256(f"{section.hub_name} {section.hub_revision}".encode()).hexdigest()
    if section.source == "text":
        if not Path(section.path).exists():
            raise StageError(f"data.path {section.path} is missing; docs/evidence.md says how to put text there")
        return sha256(section.path)
    digest = hashlib.sha256()
    for document in documents(section):
        digest.update(f"{document.name} {document.text}\0".encode(errors="replace"))
    return digest.hexdigest()
