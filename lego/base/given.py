"""Models and tokenizers that users name: where transformers reads them, and what it may not do while it does."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lego.base.digests import ArtifactError, inside


def where_from(name: str, key: str) -> tuple[str, dict[str, Any]]:
    """What a `from_pretrained` is told: a name or folder, and its keywords; none of them lets code of a folder run.

    Args:
        name: of a model on the hub, a folder, or a file in GGUF format.
        key: with which the name was given, for sentences.

    Raises:
        ArtifactError: a GGUF file that is missing or cannot be read here.
    """
    if not name.lower().endswith(".gguf"):
        return name, {"trust_remote_code": False}  # None would ask on stdin
    if not Path(name).is_file():
        raise ArtifactError(f"{key} is no file; name a file in GGUF format")
    if find_spec("gguf") is None:
        raise ArtifactError(f"{key} needs the package gguf, which reads it: pip install gguf")
    return str(Path(name).parent), {"trust_remote_code": False, "gguf_file": Path(name).name}


def require_inside(folder: str | Path) -> None:
    """Refuses a folder whose index files name weights that lie elsewhere; names of the hub are let through.

    Raises:
        ArtifactError: naming the index file.
    """
    for index in sorted(Path(folder).glob("*.index.json")) if Path(folder).is_dir() else ():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ArtifactError(f"{index}: has no weight_map of tensors to files; take it from its source") from None
        for file in sorted(map(str, files)):
            inside(folder, file, index)
