"""Parameters changed by key, and named sets of such changes: the profiles of a sibling system.

A key is written as `seed` or section.key, as `dvc exp run -S` takes it.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from lego.base.outside import printable
from lego.base.parameter_files import ParamsError, check
from lego.base.sections import Section
from lego.base.yaml_files import YamlError, read_yaml

P = TypeVar("P", bound=Section)


def read_profiles(path: str | Path) -> dict[str, dict[str, Any]]:
    """Named sets of changes; `sound` is the parameter file itself and changes nothing.

    Raises:
        ParamsError: the file cannot be read, or is not a name with keys and values under it each.
    """
    try:
        found = read_yaml(path, repeated_keys=True)
    except (OSError, YamlError) as error:
        raise ParamsError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise ParamsError(f"{path}: must hold profiles by name, got {type(found).__name__}; git checkout {path}")
    for name, changes in found.items():
        if not isinstance(changes, dict):
            raise ParamsError(f"{path}: {name} must hold keys and values, got {type(changes).__name__}")
    sound: dict[str, dict[str, Any]] = {"sound": {}}
    return sound | found


def profiled(params: P, name: str, path: str | Path, file: str | Path) -> P:
    """The parameters with a profile's changes.

    Args:
        params: valid ones.
        name: of the profile.
        path: file of the profiles.
        file: of the parameters, for messages.

    Raises:
        ParamsError: there is no such profile, or what it makes is not valid.
    """
    known = read_profiles(path)
    if name not in known:
        raise ParamsError(f"{path}: has no profile {name}; it has {', '.join(known)}")
    return changed(params, known[name], f"{path}: {name}", file)


def changed(params: P, changes: dict[str, Any], where: str, file: str | Path) -> P:
    """The parameters with some keys set to other values.

    Args:
        params: valid ones.
        changes: value by key.
        where: what a message begins with.
        file: of the parameters, for messages.

    Raises:
        ParamsError: there is no such key, or the values are not valid.
    """
    values = with_keys(params.model_dump(), changes, where, file)
    try:
        return type(params).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key, said = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        raise ParamsError(f"{where}: {key} {said}".replace(":  ", ": ")) from None


def with_keys(values: dict[str, Any], changes: dict[str, Any], where: str, file: str | Path) -> dict[str, Any]:
    """A copy with some of its keys, written as section.key, set to other values.

    Args:
        values, changes, where, file: as for `changed`; values in sections.

    Raises:
        ParamsError: there is no such key.
    """
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *path, last = key.split(".")
        place = values
        for part in path:
            place = place.get(part, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict) or last not in place:
            raise ParamsError(f"{where}: {key} is no key of {file}")
        place[last] = value
    return values


def options(changes: dict[str, Any], file: str | Path) -> str:
    """Changes as options of `dvc exp run`."""
    return " ".join(f"-S {file}:{key}={json.dumps(value, separators=(',', ':'))}" for key, value in changes.items())


@dataclass(frozen=True)
class Sibling(Generic[P]):
    """The parameters of a sibling system and their profiles, by the files that hold them.

    Args:
        load: reads and checks the parameters.
        params: their file.
        named: file of the profiles.
    """

    load: Callable[[], P]
    params: Path
    named: Path

    def profiles(self, path: str | Path | None = None) -> dict[str, dict[str, Any]]:
        """Named sets of changes; see `read_profiles`."""
        return read_profiles(path or self.named)

    def with_profile(self, params: P, name: str, path: str | Path | None = None) -> P:
        """The parameters with a profile's changes; see `profiled`."""
        return profiled(params, name, path or self.named, self.params)

    def changed(self, params: P, changes: dict[str, Any], where: str) -> P:
        """The parameters with some keys set to other values; see `lego.base.profiles.changed`."""
        return changed(params, changes, where, self.params)

    def checked(self) -> P:
        """The parameters, with which each profile is valid.

        Raises:
            ParamsError: see `with_profile`.
        """
        params = self.load()
        for name in self.profiles():
            self.with_profile(params, name)
        return params

    def main(self) -> int:
        """Checks both files; see `lego.base.parameter_files.check`."""
        return check(self.checked)

    def print_options(self, arguments: list[str]) -> int:
        """Prints the one profile that is named as options of `dvc exp run`, or what is wrong; returns the exit code."""
        try:
            known = self.profiles()
            if len(arguments) != 1 or arguments[0] not in known:
                raise ParamsError(f"give one of the profiles {', '.join(known)}")
            self.with_profile(self.load(), arguments[0])
        except ParamsError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return 1
        print(options(known[arguments[0]], self.params))
        return 0
