"""The task: train, validation and test rows, and sets from outside -> data/satipatthana/task.

dvc repro stages/satipatthana/dvc.yaml:prepare          (python -m stages.satipatthana.prepare)
"""

from lego.artifacts import atomic_folder, write_json
from lego.harness import Stage, exit_cleanly
from lego.satipatthana.sections import WRITTEN, load
from lego.satipatthana.tasks import load as load_task
from lego.satipatthana.tasks import write_task


def main() -> None:
    params = load()
    with Stage("satipatthana/prepare", params.seed):
        task = load_task(params.task, params.test)
        with atomic_folder("data/satipatthana/task") as folder:
            write_task(task, folder)
        rows = {name: len(getattr(task, name)) for name in ("train", "validation", "test")}
        outside = {f"outside_{kind}": len(found) for kind, found in task.outside.items()}
        write_json("metrics/satipatthana/prepare.json", rows | outside | {"classes": len(task.classes)})


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
