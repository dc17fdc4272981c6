"""Systems in folders: weights in safetensors, and all that is needed to build them again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from lego.base.artifacts import ArtifactError, read_json, read_tensors, write_json, write_tensors
from lego.base.digests import way_back
from lego.satipatthana.reject import TrustMap
from lego.satipatthana.sections import SatipatthanaParams
from lego.satipatthana.system import Satipatthana


@dataclass(frozen=True)
class Use:
    """What using a system needs beside its weights.

    Args:
        classes: names of the classes, or of the number that is asked for.
        columns: names of the features, if inputs are rows of a table.
        mean, std: by which its columns are standardized; empty = they are not.
        temperature: of the decoder.
        trust: its map to the share of right answers.
        threshold: of trust, below which it abstains.
        answer: mean and deviation by which the answers of a regression were standardized.
        names: of all classes of the data, in the job anomaly.
    """

    classes: list[str]
    columns: list[str] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    temperature: float = 1.0
    trust: TrustMap = field(default_factory=lambda: TrustMap([0.0, 1.0], [0.0, 1.0]))
    threshold: float = 0.5
    answer: list[float] = field(default_factory=lambda: [0.0, 1.0])
    names: list[str] = field(default_factory=list)


Size = Annotated[int, Field(ge=1, le=10**6)]


class _Map(BaseModel):
    x: Annotated[list[FiniteFloat], Field(min_length=2)]
    y: Annotated[list[FiniteFloat], Field(min_length=2)]

    @model_validator(mode="after")
    def _of_points(self) -> _Map:
        if len(self.x) != len(self.y) or sorted(self.x) != self.x:
            raise ValueError("as many x as y, in order")
        return self


class _Facts(BaseModel):
    """What system.json holds."""

    shape: Annotated[list[Size], Field(min_length=1)]
    outputs: Size
    classes: list[str]
    columns: list[str]
    names: list[str]
    mean: list[FiniteFloat]
    std: list[Annotated[FiniteFloat, Field(gt=0)]]
    temperature: Annotated[FiniteFloat, Field(gt=0)]
    threshold: FiniteFloat
    answer: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]
    trust: _Map
    guide: bool
    parameters: SatipatthanaParams

    @model_validator(mode="after")
    def _fit(self) -> _Facts:
        size = math.prod(self.shape)
        if len(set(self.classes)) != self.outputs or len(self.columns) not in (0, size):
            raise ValueError("as many different classes as outputs, as many columns as inputs")
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, size):
            raise ValueError("as many means and deviations as inputs")
        return self


def save(system: Satipatthana, folder: str | Path, use: Use, guide: bool = True) -> None:
    """Writes into an existing folder.

    Args:
        system: of any stage.
        folder: exists.
        use: what goes with it.
        guide: whether the auxiliary head, which inference never uses, is kept.
    """
    folder = Path(folder)
    weights = {name: tensor for name, tensor in system.state_dict().items() if guide or not name.startswith("aux.")}
    write_tensors(folder / "system.safetensors", weights)
    facts = {"shape": list(system.shape), "outputs": system.outputs, "classes": use.classes, "columns": use.columns}
    facts |= {"mean": use.mean, "std": use.std, "temperature": use.temperature, "threshold": use.threshold}
    facts |= {"trust": {"x": use.trust.x, "y": use.trust.y}, "guide": guide, "answer": use.answer, "names": use.names}
    write_json(folder / "system.json", facts | {"parameters": json.loads(system.params.model_dump_json())})


def load(folder: str | Path) -> tuple[Satipatthana, Use]:
    """The system in evaluation mode, and how it is used.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    folder = Path(folder)
    facts = _read_facts(folder / "system.json")
    weights = read_tensors(folder / "system.safetensors")
    try:
        system = Satipatthana(tuple(facts.shape), facts.outputs, facts.parameters)
        if not facts.guide:
            system.aux = None
        system.load_state_dict(weights)
    except (RuntimeError, ValueError):
        raise ArtifactError(f"{folder}/system.safetensors: does not fit system.json; {way_back(folder)}") from None
    if not all(bool(torch.isfinite(one).all()) for one in system.parameters()):
        raise ArtifactError(f"{folder}/system.safetensors: holds weights that are not finite; {way_back(folder)}")
    of_use = ("classes", "columns", "mean", "std", "temperature", "threshold", "answer", "names")
    use = Use(**{key: getattr(facts, key) for key in of_use}, trust=TrustMap(facts.trust.x, facts.trust.y))
    return system.eval().requires_grad_(False), use


def _read_facts(file: Path) -> _Facts:
    """Raises:
    ArtifactError: the file is missing or damaged.
    """
    try:
        return _Facts.model_validate(read_json(file, *_Facts.model_fields))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ArtifactError(f"{file}: {key} is not as it was written; {way_back(file)}") from None


def restore(system: Satipatthana, folder: str | Path, rooms: set[str]) -> None:
    """Puts the trained parts of a saved system into a fresh one, whose other parts may have other sizes.

    Args:
        system: fresh.
        folder: that `save` wrote into.
        rooms: attributes of the system that have been trained.

    Raises:
        ArtifactError: the weights are missing, damaged or of other sizes.
    """
    file = Path(folder) / "system.safetensors"
    saved = {name: one for name, one in read_tensors(file).items() if name.split(".")[0] in rooms}
    wanted = {name for name in system.state_dict() if name.split(".")[0] in rooms}
    try:
        system.load_state_dict(system.state_dict() | saved)
    except RuntimeError:
        wanted = set()
    if wanted != saved.keys():
        raise ArtifactError(f"{file}: is not of these parameters; run dvc repro stages/satipatthana/dvc.yaml")


def standardized(x: torch.Tensor, use: Use) -> torch.Tensor:
    """Rows of a table (n, features), in double precision, as the system was trained on them (n, features)."""
    if not use.mean:
        return x.float()
    mean, std = (torch.tensor(one, dtype=torch.double) for one in (use.mean, use.std))
    return ((x.double() - mean) / std).float()
