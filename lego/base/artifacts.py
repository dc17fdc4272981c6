"""Files that stages hand each other: written beside, flushed, renamed, so that a half file never looks whole."""

from __future__ import annotations

import csv
import errno
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

from lego.base.digests import DIGESTS, sealed, unsealed, verify, way_back, write_digests
from lego.base.digests import ArtifactError as ArtifactError
from lego.base.digests import sha256 as sha256

DIGITS = 5  # of declared metrics
TOKENIZER = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # suffixes of a tokenizer's files
OF_MODELS = ("config.json", "generation_config.json", DIGESTS)


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


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside `path` that takes its name when the block ends; if it fails, nothing of it is left."""
    partial = _beside(path)
    try:
        with named(path):
            yield partial
            _fsync(partial)
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a file atomically: a reader sees the old content or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a dict as JSON with sorted keys, atomically.

    Raises:
        ValueError: a value is not finite; JSON has no spelling for it.
    """
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_facts(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that stands alone, with a digest of its content that `read_json` compares and leaves out."""
    write_json(path, sealed(json.loads(json.dumps(content, allow_nan=False))))


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
    verify(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); run dvc repro to make it") from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path}: is not valid JSON; {way_back(path)}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: must hold a JSON object; {way_back(path)}")
    content = unsealed(content, path)
    if missing := [key for key in required if key not in content]:
        raise ArtifactError(f"{path}: lacks {', '.join(missing)}; {way_back(path)}")
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
        raise ArtifactError(f"{path}: {key} is not as it was written; {way_back(path)}") from None
    return content


def read_number(path: str | Path, key: str, high: float = math.inf) -> float:
    """Reads one number in [0, high] from a JSON object.

    Raises:
        ArtifactError: as `read_json`, or the value is none.
    """
    value = read_json(path, key)[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise ArtifactError(f"{path}: {key} must be a number in [0, {high:g}], got {value!r}; {way_back(path)}")
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
def atomic_folder(path: str | Path, digests: bool = True) -> Iterator[Path]:
    """Yields an empty folder beside `path` that takes its name when the block ends without an exception.

    Args:
        path: of the folder.
        digests: whether digests of its files go with it; not where no stage reads them.
    """
    partial = _beside(Path(path))
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, path, digests)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(folder: Path, path: str | Path, digests: bool = True) -> None:
    """Gives a finished folder its name, in place of what has it now.

    Args:
        folder: finished.
        path: its name.
        digests: as for `atomic_folder`.
    """
    path = Path(path)
    with named(path):
        if digests:
            write_digests(folder)
        for file in folder.rglob("*"):
            if file.is_file():
                _fsync(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(path)
        if folder != partial:
            _move(folder, partial)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        _fsync(path.parent)


def _move(folder: Path, target: Path) -> None:
    """Renames a folder, or copies it if the target lies on another disk; the original goes when the copy is whole."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        os.rename(folder, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    try:
        for source in sorted(folder.rglob("*")):
            copy = target / source.relative_to(folder)
            if source.is_dir():
                copy.mkdir(parents=True, exist_ok=True)
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source, copy)
                _fsync(copy)
            except OSError as error:  # which names the source: what is full is the other disk
                raise OSError(error.errno, error.strerror, str(copy)) from None
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    shutil.rmtree(folder)


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes named tensors as one safetensors file, atomically."""
    path = Path(path)
    with _replacing(path) as partial:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        except SafetensorError as error:  # its way to say that the disk is full or read-only
            what = f"cannot be written ({error}); make room or let the folder be written"
            raise ArtifactError(f"{path}: {what}") from None


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file.

    Raises:
        ArtifactError: the file is missing, truncated or not safetensors, or not as it was published.
    """
    verify(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: cannot be read as safetensors (it is missing); run dvc repro to make it"
        ) from None
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error}); {way_back(path)}") from None


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """Copies the files of a tokenizer in Hugging Face format, and none of a model that lies beside them.

    Raises:
        ArtifactError: one of them is not as it was published.
    """
    verify(source)
    for file in sorted(Path(source).iterdir()):
        if file.suffix in TOKENIZER and file.name not in OF_MODELS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, Path(folder) / file.name)


def identity(path: str | Path) -> str:
    """SHA-256 of an artifact, for the record of what is made from it.

    Raises:
        ArtifactError: it is missing, or not as it was published: then nothing may be recorded as made from it.
    """
    verify(path)
    return sha256(path)
