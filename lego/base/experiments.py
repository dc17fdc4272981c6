"""Experiments in temporary folders (`dvc exp run --temp`, `--queue`): what they lack, and who runs beside them.

DVC copies there what git tracks. Nothing here loads torch at import: how its threads wait is decided before.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

TEMPORARY = (".dvc", "tmp", "exps")
BETWEEN_STAGES = 60.0  # seconds; DVC takes a few to record what a stage made


def origin(folder: Path) -> Path | None:
    """The work tree that a temporary experiment was started from; None for a folder that is none.

    Args:
        folder: where the experiment runs.
    """
    parts = folder.absolute().parts
    for n in range(len(parts) - len(TEMPORARY)):
        if parts[n : n + len(TEMPORARY)] == TEMPORARY:
            return Path(*parts[:n])
    return None


def side_by_side() -> int:
    """How many runs of this tree there are now: temporary experiments, and this one if it is none."""
    here = Path.cwd()
    tree = origin(here)
    others = [folder for folder in (tree or here).joinpath(*TEMPORARY).glob("tmp*") if folder != here]
    return 1 + sum(_under_way(folder) for folder in others)


def _under_way(folder: Path) -> bool:
    """Whether an experiment runs in a temporary folder; of a killed one the folder stays.

    DVC keeps no list of those that live. A stage's lock names its process (to try the lock would take it, for a
    moment, from a stage that starts); between two stages the last one is not long over.
    """
    try:
        locks = [file for file in folder.glob(".scratch/locks/**/*") if file.is_file()]
        if any(_lives(file.read_text(encoding="utf-8")) for file in locks):
            return True
        times = [file.stat().st_mtime for file in (folder, folder / "dvc.lock", *locks) if file.exists()]
        return folder.is_dir() and time.time() - max(times) < BETWEEN_STAGES
    except (OSError, ValueError):  # it ended, and dvc removes it, at this moment; or holds what no stage wrote
        return False


def _lives(process: str) -> bool:
    try:
        number = int(process)
        if number < 1:  # of a whole group of processes
            return False
        os.kill(number, 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def require_tracked(path: str | Path, key: str) -> None:
    """Refuses to run an experiment on a part of the user's files, unawares.

    Args:
        path: a file or folder that the stage reads.
        key: of params.yaml, that names it.

    Raises:
        StageError: there are files of it in the work tree that the experiment does not see.
    """
    from lego.base.harness import StageError

    here = Path.cwd()
    tree = origin(here)
    if tree is None or Path(path).is_absolute():
        return
    named = tree / path
    files = [named] if named.is_file() else [one for one in named.rglob("[!.]*") if one.is_file()]
    lacking = [file for file in files if not (here / file.relative_to(tree)).exists()]
    if lacking:
        raise StageError(
            f"{key} {path}: {len(lacking)} of {len(files)} files are not in git, {lacking[0].relative_to(tree)} among "
            "them, and an experiment with --temp or --queue sees only what is: git add them and queue it again, or run "
            "it without"
        )
