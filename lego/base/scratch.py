"""What outlives a killed stage: a scratch folder, found again by a fingerprint; and the lock that keeps it to one run.

The fingerprint covers what decides a stage's result: the parameters and files that dvc.yaml names for it, the modules
that it imports, and the versions of Python and torch. A rerun with the same one continues, any other starts fresh.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from lego.base.artifacts import sha256
from lego.base.code import ROOT, code_of

SCRATCH = Path(".scratch")


class BusyError(RuntimeError):
    """Another process runs this stage; the message names it."""


@cache
def _stages(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]


def pipeline_entry(stage: str) -> dict[str, Any]:
    """What a dvc.yaml of this tree says of a stage.

    Args:
        stage: its name; `group@key` if it is one of a group made by foreach, `folder/name` if its dvc.yaml is that of
            a sibling system, stages/<folder>/dvc.yaml.
    """
    folder, _, name = stage.rpartition("/")
    group, _, key = name.partition("@")
    for place in (f"stages/{folder}",) if folder else (".", "stages/evidence"):
        entry = _stages(ROOT / place / "dvc.yaml").get(group)
        if entry is not None:
            return yaml.safe_load(yaml.safe_dump(entry["do"]).replace("${key}", key)) if key else entry
    raise KeyError(stage)


def declared_params(entry: dict[str, Any]) -> dict[str, list[str]]:
    """Parameter file -> keys that a stage of a dvc.yaml names; a key that stands alone is one of params.yaml."""
    declared: dict[str, list[str]] = {}
    for one in entry.get("params", []):
        for file, keys in one.items() if isinstance(one, dict) else [("params.yaml", [one])]:
            declared.setdefault(file, []).extend(keys)
    return declared


def fingerprint(stage: str) -> str:
    """32 hexadecimal digits that change with anything the stage's result depends on.

    Args:
        stage: as for `pipeline_entry`.
    """
    entry, params, inputs = pipeline_entry(stage), dict[str, Any](), dict[str, str | None]()
    for file, keys in declared_params(entry).items():
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        for key in keys:
            found = values
            for part in key.split("."):
                found = found[part]
            params[f"{file}:{key}"] = found
        given = values["model"].get("init_from") if {"model", "model.init_from"} & set(keys) else None
        if given and Path(given).exists():
            inputs[f"{file}:model.init_from"] = sha256(given)  # a folder keeps its name when what is in it changes
    for dep in entry["deps"]:
        if "${data.path}" in dep:  # of the parameter file beside the dvc.yaml, which is named last
            dep = dep.replace("${data.path}", values["data"]["path"])
        own = dep.removeprefix("../../")  # of a pipeline that runs in its own folder
        if not own.startswith("lego/") and not own.endswith(".py"):
            inputs[dep] = sha256(dep) if Path(dep).exists() else None  # the stage will say what it misses
    for code in code_of(entry["cmd"].split()[2]):
        inputs[code.relative_to(ROOT).as_posix()] = sha256(code)
    versions = {"python": platform.python_version(), "torch": version("torch"), "cuda": torch.cuda.is_available()}
    everything = json.dumps([stage, params, inputs, versions], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()[:32]


@contextmanager
def only_run(stage: str) -> Iterator[None]:
    """Holds the stage's lock; the kernel releases it when the process ends, however it ends.

    Raises:
        BusyError: another process holds it: a second run, or one whose dvc was killed.
    """
    path = SCRATCH / "locks" / stage
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise BusyError(
                f"{stage} is already running here as process {holder}; wait until it ends, or stop it with "
                f"kill {holder}, and run dvc repro again: it continues where it was"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)
