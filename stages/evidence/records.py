"""The records of the suites, metrics/evidence/<suite>.json: one line a model, setting and seed, as people merge them.

`base` holds parameters; each record says what it differs by, the revision that its experiment was queued from, and
what it was made of: code, text and Python, as dvc.lock of the experiment has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from lego.base.artifacts import ArtifactError, read_json, write_text
from lego.base.params import load_params
from stages.evidence.suites import flat

RESULTS = Path("metrics/evidence")
DIGITS = 10  # significant ones of what is kept
Columns = dict[str, list[float | None]]
Found = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""Setting -> model -> seed -> record."""


class Record(BaseModel):
    """One model of one seed, as far as every reader relies on it."""

    setting: str
    model: str
    seed: Annotated[int, Field(ge=0)]
    revision: str
    changes: dict[str, Any]
    made_of: dict[str, str]
    metrics: Annotated[dict[str, float | bool | None], Field(min_length=1)]
    documents: Columns
    curve: Columns | None = None


class Records(BaseModel):
    """A suite's file."""

    base: dict[str, Any]
    records: list[Record]


def read(suite: str) -> dict[str, Any]:
    """A suite's file, `base` and `records`; both are empty if there is none.

    Raises:
        ArtifactError: it is damaged or not of this shape.
    """
    file = RESULTS / f"{suite}.json"
    if not file.exists():
        return {"base": {}, "records": []}
    try:
        found = read_json(file)
        Records.model_validate(found)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        reason = f"{file}: {key} is not as stages.evidence.gather wrote it"
    except ArtifactError as error:
        reason = str(error).split(";")[0]
    else:
        return found
    raise ArtifactError(f"{reason}; bring it back with git checkout {file}, or remove it and gather again")


def results(suite: str) -> Found:
    """The records of a suite, each with all its parameters; empty if it has no file."""
    content = read(suite)
    return nested([one | {"params": content["base"] | one["changes"]} for one in content["records"]])


def nested(records: list[dict[str, Any]]) -> Found:
    found: Found = {}
    for one in records:
        found.setdefault(one["setting"], {}).setdefault(one["model"], {})[str(one["seed"])] = one
    return found


def flattened(found: Found) -> list[dict[str, Any]]:
    return [one for models in found.values() for seeds in models.values() for one in seeds.values()]


def write(suite: str, found: Found) -> None:
    """Writes a suite's file, a record a line, in the order of their names."""
    base = read(suite)["base"] or flat(load_params().model_dump())
    lines = []
    for one in sorted(flattened(found), key=lambda one: (one["setting"], one["model"], one["seed"])):
        changes = {key: value for key, value in one["params"].items() if key not in base or base[key] != value}
        first = {key: one[key] for key in ("setting", "model", "seed", "revision")} | {"changes": changes}
        lines.append(_line(first | {key: one[key] for key in one if key not in ("params", *first)}))
    write_text(RESULTS / f"{suite}.json", f'{{"base":{_line(base)},\n"records":[\n' + ",\n".join(lines) + "\n]}\n")


def _line(content: dict[str, Any]) -> str:
    return json.dumps(rounded(content), separators=(",", ":"))


def rounded(content: dict[str, Any]) -> dict[str, Any]:
    """What comes back once it is written."""
    return json.loads(json.dumps(content, allow_nan=False), parse_float=_short)


def _short(number: str) -> float:
    """A number of JSON with DIGITS significant digits, a whole one without a point."""
    value = float(f"{float(number):.{DIGITS}g}")
    return int(value) if value.is_integer() else value
