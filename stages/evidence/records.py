"""What the suites wrote: metrics/evidence/<suite>.json, which people merge, edit and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, RootModel, StringConstraints, ValidationError

from lego.base.artifacts import ArtifactError, read_json

RESULTS = Path("metrics/evidence")
Seed = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}$")]
Columns = dict[str, list[float | None]]


class Record(BaseModel):
    """One model of one seed, as far as every reader relies on it."""

    fingerprint: str
    revision: str
    metrics: Annotated[dict[str, float | bool | None], Field(min_length=1)]
    documents: Columns
    curve: Columns


class Records(RootModel[dict[str, dict[str, dict[Seed, Record]]]]):
    """Setting -> model -> seed -> record."""


def results(suite: str) -> dict[str, Any]:
    """The records of a suite; empty if it has no file.

    Raises:
        ArtifactError: the file is damaged or not of this shape.
    """
    file = RESULTS / f"{suite}.json"
    if not file.exists():
        return {}
    try:
        found = read_json(file)
        Records.model_validate(found)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        reason = f"{file}: {key} is not as the runner wrote it"
    except ArtifactError as error:
        reason = str(error).split(";")[0]
    else:
        return found
    raise ArtifactError(f"{reason}; bring it back with git checkout {file}, or remove it and run the suite again")
