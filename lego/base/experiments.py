"""Experiments in temporary folders (`dvc exp run --temp`, `--queue`): what they lack, and who runs beside them.

DVC copies there what git tracks. Nothing here loads torch at import: how its threads wait is decided before.
"""

from __future__ import annotations

from pathlib import Path

TEMPORARY = (".dvc", "tmp", "exps")


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
    others = (tree or here).joinpath(*TEMPORARY).glob("tmp*")
    return sum(folder.is_dir() for folder in others) + (tree is None)


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
