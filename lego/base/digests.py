"""Digests of what stages hand each other: written beside it, compared when it is read, and the way back if they differ.

A published folder holds digests.json with the SHA-256 of each of its files, and of that list itself; a JSON file that
stands alone holds one of its own content. Folders that users give have neither and are not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DIGESTS = "digests.json"
SEAL = "sha256_of_content"  # key of a JSON file that stands alone
DEPTH = 4  # folders above a file that may be the published one
PIPELINES = {"cvfp": " stages/cvfp/dvc.yaml", "satipatthana": " stages/satipatthana/dvc.yaml"}
SETTLED = 1.0  # seconds after which a file's times tell its content apart

_known: dict[tuple[str, int, int, int, int], str] = {}  # digests that this process has computed


class ArtifactError(RuntimeError):
    """A file of an earlier stage that is missing, damaged or made by another run; the message names it."""


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


def way_back(path: str | Path) -> str:
    """The end of a sentence about a damaged file: commands that bring it back.

    DVC takes a file whose modification time was kept for the one it wrote, and its cache may be the same file under
    another name (a hard link): so that name goes too, and what is then missing is taken from the cache or made again.
    """
    path = Path(path)
    inside = path.absolute().is_relative_to(Path.cwd()) and path.absolute().relative_to(Path.cwd()).parts
    if not inside or inside[0] not in ("data", "metrics"):
        return "take it again from where it came from"
    parent = published(path) or path
    system = inside[1] if len(inside) > 2 else ""
    pipeline = PIPELINES.get(system, "")
    if system == "baseline" and inside[2] != "shallow_continued":
        pipeline = " stages/evidence/dvc.yaml"
    file, folder = shlex.quote(str(path)), shlex.quote(str(parent))
    cached = f'find "$(dvc cache dir)" -samefile {file} -delete; ' if path.is_file() else ""
    return f"bring it back with: {_there()}{cached}rm -rf {folder}; dvc repro{pipeline}"


def _there() -> str:
    """How one gets to the working folder from the repository's root: a pipeline may run in a folder of its own."""
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if os.path.isdir(folder / ".dvc")), here)
    return "" if root == here else f"cd {shlex.quote(here.relative_to(root).as_posix())}; "


def published(path: str | Path) -> Path | None:
    """The published folder that a file or folder lies in, or is; None if it lies in none."""
    path = Path(path)
    near = [path, *path.parents][: DEPTH + 1]
    return next((folder for folder in near if (folder / DIGESTS).is_file()), None)


def write_digests(folder: Path) -> None:
    """Writes the digests of all files of a folder that is finished."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = {name: sha256(folder / name) for name in names if name != DIGESTS}
    text = json.dumps({"files": files, "sha256": _of_json(files)}, indent=2, sort_keys=True) + "\n"
    (folder / DIGESTS).write_text(text, encoding="utf-8", newline="\n")


def verify(path: str | Path) -> bool:
    """Compares a file, or every file of a folder, with what was published; each is read once in a process.

    Returns:
        Whether there was something to compare with.

    Raises:
        ArtifactError: a file is not as it was written, or is missing.
    """
    path = Path(path)
    folder = published(path)
    if folder is None:
        return False
    files, own = _listed(folder), path.relative_to(folder).as_posix()
    names = [name for name in files if own in (".", name) or name.startswith(f"{own}/")]
    for name in names:
        if not (file := folder / name).is_file():
            raise ArtifactError(f"{file}: is missing; {way_back(file)}")
        if _digest_once(file) != files[name]:
            raise _changed(file, folder)
    return bool(names)


def _changed(file: Path, folder: Path) -> ArtifactError:
    meant = f"or, if the change was meant, remove {folder / DIGESTS}"
    return ArtifactError(f"{file}: is not as it was written; {way_back(file)}; {meant}")


def _listed(folder: Path) -> dict[str, str]:
    file = folder / DIGESTS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["sha256"] == _of_json(content["files"]):
            return content["files"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise _changed(file, folder)


def _digest_once(file: Path) -> str:
    told = file.stat()
    key = (str(file.absolute()), told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns)
    if key not in _known:
        found = sha256(file)
        if time.time() - told.st_ctime < SETTLED:  # a change within the clock's tick would not show in the times
            return found
        _known[key] = found
    return _known[key]


def _of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of its content."""
    return {**content, SEAL: _of_json(dict(content))}


def unsealed(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A JSON object without its digest, if it has one.

    Raises:
        ArtifactError: the digest is of another content.
    """
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content[SEAL] != _of_json(rest):
        meant = f"or, if the change was meant, remove its key {SEAL}"
        raise ArtifactError(f"{path}: is not as it was written; {way_back(path)}; {meant}")
    return rest


def of_tensors(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """SHA-256 of tensors with their names, types and shapes, and of a text beside them."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def inside(folder: str | Path, name: object, said_by: str | Path) -> Path:
    """A file that a list beside it names.

    Args:
        folder: in which it must lie.
        name: relative to the folder.
        said_by: the list.

    Raises:
        ArtifactError: the name is none, or leads out of the folder.
    """
    safe = isinstance(name, str) and name and not os.path.isabs(name) and "\\" not in name and "\0" not in name
    if not safe or ".." in Path(str(name)).parts:
        raise ArtifactError(
            f"{said_by}: names the file {str(name)[:200]!r}, which does not lie in {folder}; name files beside it alone"
        )
    return Path(folder) / str(name)
