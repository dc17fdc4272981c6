"""Reading a parameter file: YAML into typed sections, or one sentence that says what is wrong with it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lego.base.outside import printable
from lego.base.sections import Section
from lego.base.yaml_files import YamlError, read_yaml

P = TypeVar("P", bound=Section)
MOST_SHOWN = 200  # characters of a wrong value


class ParamsError(ValueError):
    """A parameter file that cannot be used; the message names file, key and remedy."""


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _shown(value: Any) -> str:
    """A value as it is written, or its beginning."""
    if value is None:
        return "nothing"
    try:
        text = value.isoformat() if isinstance(value, date) else repr(value)
    except ValueError:  # of thousands of digits
        return "a number beyond all use"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _sentence(error: Any, shape: type[BaseModel]) -> str:
    """One pydantic error as `key does what is wrong, got value`."""
    key, value = ".".join(str(part) for part in error["loc"]), error["input"]
    shown = _shown(value)
    match error["type"]:
        case "missing":
            return f"{key} is missing"
        case "extra_forbidden":
            close = difflib.get_close_matches(key, _known_keys(shape), n=1)
            return f"{key} is not a known key" + (f"; did you mean {close[0]}?" if close else "")
        case "value_error" if isinstance(value, dict):  # a check across several keys names them itself
            return f"{key}.{error['ctx']['error']}".removeprefix(".")
        case "value_error":
            return f"{key} {error['ctx']['error']}, got {shown}"
        case "literal_error":
            return f"{key} must be one of {error['ctx']['expected']}, got {shown}"
        case "int_type":
            return f"{key} must be a whole number, got {shown}"
        case "float_type":
            return f"{key} must be a number, got {shown}"
        case "string_type":
            return f"{key} must be text, got {shown}" + ("" if isinstance(value, list | dict) else "; put it in quotes")
        case "bool_type":
            return f"{key} must be true or false, got {shown}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{key} must be a section of keys, got {shown}"
        case _:
            return f"{key}: {error['msg']}, got {shown}"


def read_params(path: str | Path, shape: type[P], given: dict[str, dict[str, Any]] | None = None) -> P:
    """Reads and checks a parameter file.

    Args:
        path: a YAML file with every key of `shape`; `1e-05` is read as a number.
        shape: the sections it has.
        given: by section, values of keys that the file may leave out.

    Raises:
        ParamsError: unreadable file, unknown or missing key, wrong type or range; the message names file and key.
    """
    try:
        raw = read_yaml(path)
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read ({error.strerror}); run from the repository root") from None
    except YamlError as error:
        raise ParamsError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: must hold the sections {', '.join(shape.model_fields)}")
    for section, values in (given or {}).items():
        if isinstance(raw.get(section), dict):
            raw[section] = values | raw[section]
    try:
        return shape.model_validate(raw)
    except ValidationError as error:
        raise ParamsError("; ".join(f"{path}: {_sentence(e, shape)}" for e in error.errors())) from None


def check(load: Callable[[], BaseModel]) -> int:
    """Prints parameters as JSON, or in one sentence what is wrong with their file; returns the exit code."""
    try:
        print(load().model_dump_json(indent=2, by_alias=True))
    except ParamsError as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    return 0
