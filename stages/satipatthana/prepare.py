"""The task: train, validation and test rows, and sets from outside -> data/satipatthana/task.

dvc repro stages/satipatthana/dvc.yaml:prepare          (python -m stages.satipatthana.prepare)
"""

from os.path import abspath
from pathlib import Path

from lego.base.artifacts import atomic_folder, write_json
from lego.base.experiments import require_tracked
from lego.base.harness import Stage, exit_cleanly
from lego.satipatthana.sections import load
from lego.satipatthana.settings import TaskParams
from lego.satipatthana.tasks import load as load_task
from lego.satipatthana.tasks import write_task

TABLES = Path("tables")  # what DVC watches: a dependency of this stage


def tables(settings: TaskParams) -> dict[str, str]:
    """Tables of one's own by the key that names them."""
    named = {"task.file": settings.file, "task.strangers": settings.strangers}
    return {key: file for key, file in named.items() if file}


def unwatched(settings: TaskParams) -> list[str]:
    """Keys of tables that lie where DVC does not notice a change."""
    return [key for key, file in tables(settings).items() if TABLES.absolute() not in Path(abspath(file)).parents]


def main() -> None:
    params = load()
    for key in unwatched(params.task):
        print(f"warning: {key} lies outside of {TABLES}/, so DVC does not notice when it changes; move it there")
    for key, file in tables(params.task).items():
        require_tracked(file, key)
    with Stage("satipatthana/prepare", params.seed):
        task = load_task(params.task, params.test)
        with atomic_folder("data/satipatthana/task") as folder:
            write_task(task, folder)
        rows = {name: len(getattr(task, name)) for name in ("train", "validation", "test")}
        outside = {f"outside_{kind}": len(found) for kind, found in task.outside.items()}
        write_json("metrics/satipatthana/prepare.json", rows | outside | {"classes": len(task.classes)})


if __name__ == "__main__":
    exit_cleanly(main)
