"""Files that stages hand each other: written beside, flushed, renamed, so that a half file never looks whole."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

DIGITS = 5  # of declared metrics


class ArtifactError(RuntimeError):
    """A file of an earlier stage that is missing, damaged or made by another run; the message names it."""


def derived_seed(seed: int, name: object) -> int:
    """A seed of 32 bits, all that torch's CPU generator looks at: stable across runs, different for every name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def write_text(path: str | Path, text: str) -> None:
    """Writes a file atomically: a reader sees the old content or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    partial.write_text(text, encoding="utf-8", newline="\n")
    _fsync(partial)
    os.replace(partial, path)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a dict as JSON with sorted keys, atomically.

    Raises:
        ValueError: a value is not finite; JSON has no spelling for it.
    """
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_metrics(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes what people compare day by day, rounded: so another processor's last digits do not show as a change.

    Args:
        path: a file that `metrics:` of a dvc.yaml names.
        content: few numbers; each keeps DIGITS significant digits, and one that is None, not defined, is left out.

    Raises:
        TypeError: a value is no number.
        ValueError: a value is not finite.
    """
    rounded: dict[str, float] = {}
    for key, value in content.items():
        if isinstance(value, bool):
            rounded[key] = value
        elif isinstance(value, int | float):
            rounded[key] = type(value)(float(f"{value:.{DIGITS}g}"))
        elif value is not None:
            raise TypeError(f"{path}: {key} must be a number, got {value!r}")
    write_json(path, rounded)


def read_json(path: str | Path, *required: str) -> dict[str, Any]:
    """Reads a JSON object that has the required keys.

    Raises:
        ArtifactError: the file is missing, not JSON, not an object, or lacks a key.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); run dvc repro to make it") from None
    except ValueError:
        raise ArtifactError(f"{path}: is not valid JSON; run dvc checkout or dvc repro to restore it") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: must hold a JSON object; run dvc checkout or dvc repro to restore it")
    if missing := [key for key in required if key not in content]:
        raise ArtifactError(f"{path}: lacks {', '.join(missing)}; run dvc checkout or dvc repro to restore it")
    return content


def read_checked(path: str | Path, shape: type[BaseModel]) -> dict[str, Any]:
    """Reads a JSON object of the given shape; keys beyond it are kept.

    Raises:
        ArtifactError: as `read_json`, or a value is not as the shape says.
    """
    content = read_json(path, *shape.model_fields)
    try:
        shape.model_validate(content)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ArtifactError(f"{path}: {key} is not as it was written; run dvc checkout or dvc repro") from None
    return content


def read_number(path: str | Path, key: str, high: float = math.inf) -> float:
    """Reads one number in [0, high] from a JSON object.

    Raises:
        ArtifactError: as `read_json`, or the value is none.
    """
    value = read_json(path, key)[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise ArtifactError(
            f"{path}: {key} must be a number in [0, {high:g}], got {value!r}; run dvc checkout or dvc repro"
        )
    return value


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Gives the errors of libraries that do not say which file they were writing its name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows with the same keys as CSV, atomically; the columns are the keys of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that takes its name when the block ends without an exception."""
    partial = _beside(Path(path))
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    publish(partial, path)


def publish(folder: Path, path: str | Path) -> None:
    """Gives a finished folder its name, in place of what has it now."""
    path = Path(path)
    for file in folder.rglob("*"):
        if file.is_file():
            _fsync(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    if folder != partial:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.move(folder, partial)  # a copy, if data/ lies on another disk
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)
    _fsync(path.parent)


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes named tensors as one safetensors file, atomically."""
    path = Path(path)
    partial = _beside(path)
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:  # its way to say that the disk is full or read-only
        partial.unlink(missing_ok=True)
        raise ArtifactError(f"{path}: cannot be written ({error}); make room or let the folder be written") from None
    _fsync(partial)
    os.replace(partial, path)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file.

    Raises:
        ArtifactError: the file is missing, truncated or not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error}); run dvc checkout or dvc repro") from None


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder: of the relative names and digests of all its files in sorted order.

    Raises:
        ArtifactError: nothing is there.
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path}: is missing; run dvc repro to make it")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = (f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in files)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
