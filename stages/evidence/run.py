"""Suites of models over settings and seeds: runs what is missing, reuses what is current, and writes it down.

python -m stages.evidence.run --seeds 5              the core suite; --full: all suites; --quick: one seed, no search

Each stage of each setting and seed runs in a folder of its own under .scratch/evidence, with links to what it reads.
metrics/evidence/<suite>.json holds a model's numbers with a fingerprint of everything they follow from: parameters,
code, text, versions. A run with the same fingerprint is not repeated; a killed one continues. The first seed of a
setting searches the learning rate of each model, the others take what it found.
"""

import argparse
import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import yaml

from lego.base.artifacts import ArtifactError, read_json, write_text
from lego.base.code import ROOT
from lego.base.harness import RECOVERY, StageError
from lego.base.parameter_files import ParamsError
from lego.base.scratch import SCRATCH, BusyError, only_run, pipeline_entry
from stages.evidence.graph import FULL, Suite, Task, load_suites
from stages.evidence.wanted import Wanted, adopt, drop_stale, missing, put, searched

STORE, RUNS = SCRATCH / "evidence/store", SCRATCH / "evidence/runs"
SEARCHED = "validation perplexity by learning rate:"  # what lego.training.search prints
AGAIN = "run the same command again: what is finished is kept"
CHILDREN: set[subprocess.Popen[bytes]] = set()  # stages that run now


def execute(task: Task) -> float:
    """Runs a stage in a folder of its own and puts the folder into the store; returns the seconds it took."""
    folder, entry = (RUNS / task.label).absolute(), pipeline_entry(task.stage)
    folder.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load(task.params)
    for section, key in (("data", "path"), ("data", "pretrained"), ("data", "hub_name"), ("model", "init_from")):
        if values[section][key] and Path(values[section][key]).exists():  # it is read from another folder
            values[section][key] = str(Path(values[section][key]).absolute())
    write_text(folder / "params.yaml", yaml.safe_dump(values, sort_keys=False))
    for file, source in task.inputs:
        link = folder / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((STORE / source.label / file).absolute())
    start = time.perf_counter()
    with (folder / "log.txt").open("a") as log:  # a stage that outlived a killed runner may write there too
        before = log.tell()
        command = [sys.executable, *entry["cmd"].split()[1:]]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        CHILDREN.add(child)
        code = child.wait()
        CHILDREN.discard(child)
    if code:
        lines = (folder / "log.txt").read_bytes()[before:].decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        said = errors[-1].removeprefix("error: ").replace(f" ({RECOVERY})", "") if errors else f"ended with {code}"
        reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else said
        raise StageError(f"{task.stage}: {reason}; its log is {folder}/log.txt")
    STORE.mkdir(parents=True, exist_ok=True)
    folder.replace(STORE / task.label)
    return time.perf_counter() - start


def table(file: Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers, empty cells as NaN."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {key: [round(float(row[key] or "nan"), 4) for row in rows] for key in rows[0]}


def record(one: Wanted) -> dict[str, Any]:
    """What is kept of a finished model."""
    by_stage = {task.stage: STORE / task.label for task in one.task.ancestors()}
    folder = by_stage[one.task.stage]
    if one.model == "ashem":
        curve = table(by_stage["train_phase2"] / "data/curves/train_phase2.csv")
        extra = {
            "shallow_documents": table(folder / "data/documents/shallow.csv"),
            "phase1": read_json(by_stage["train_phase1"] / "data/facts/train_phase1.json"),
            "phase1_curve": _drawn(table(by_stage["train_phase1"] / "data/curves/train_phase1.csv")),
            "criteria": read_json(folder / "metrics/details/criteria.json"),
            "sweep": table(folder / "data/curves/evaluate_routing.csv"),
        }
    else:
        curve, extra = table(folder / f"data/curves/{one.model}.csv"), {}
    metrics = read_json(folder / f"metrics/details/{one.model}.json")
    documents = table(folder / f"data/documents/{one.model}.csv")
    trained = by_stage["train_phase2"] if one.model == "ashem" else by_stage[one.task.stage]
    tried = searched_rates((trained / "log.txt").read_text(errors="replace"))
    return {"metrics": metrics, "documents": documents, "curve": _drawn(curve), "tried": tried, **extra}


def searched_rates(log: str) -> dict[str, float | None]:
    """Validation perplexity by learning rate, as `lego.training.search` prints it, None where training diverged."""
    lines = [line for line in log.splitlines() if line.startswith(SEARCHED)]
    pairs = lines[-1].removeprefix(SEARCHED).partition(";")[0].split(", ") if lines else []
    found = {rate.strip(): float(ppl) for rate, ppl in (pair.split(":") for pair in pairs)}
    return {rate: ppl if math.isfinite(ppl) else None for rate, ppl in found.items()}


def _drawn(curve: dict[str, list[float]]) -> dict[str, list[float]]:
    return {key: curve[key] for key in ("macs", "val_ppl")}


def write_record(one: Wanted, revision: str) -> None:
    """Adds a finished model to its suite's file."""
    put(one, {"fingerprint": one.task.fingerprint, "revision": revision} | record(one))


def revision_now() -> str:
    """The commit, with a + if the work tree differs from it in more than results."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        diff = subprocess.run(
            ["git", "status", "--porcelain", "--", "lego", "stages", "params.yaml"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if diff.stdout.strip() else "")


def prune(pending: list[Wanted]) -> None:
    """Removes from the store what nothing that is still to run reads."""
    needed = {task.label for one in pending for task in one.task.ancestors()}
    for folder in STORE.glob("*"):
        if folder.name not in needed:
            shutil.rmtree(folder)


def run_all(todo: list[Wanted], workers: int) -> list[str]:
    """Runs the tasks, each when what it reads is there, and writes each model down as soon as it is finished.

    Returns:
        What went wrong; what does not read the output of a failed task is run all the same.
    """
    goals = {one.task.label: [other for other in todo if other.task.label == one.task.label] for one in todo}
    order = {task.label: task for one in todo for task in one.task.ancestors()}
    pending = {label: task for label, task in order.items() if not (STORE / label).exists()}
    count, start, revision = len(pending), time.perf_counter(), revision_now()
    running: dict[Future[float], Task] = {}
    failed: dict[str, str] = {}
    print(f"{len(todo)} models to make, {count} stages to run on {workers} workers", flush=True)
    for one in todo:  # made before, by a run that was killed between the two
        if one.task.label not in pending:
            write_record(one, revision)
    with ThreadPoolExecutor(workers) as pool:
        while pending or running:
            for label in [key for key, task in pending.items() if any(one.label in failed for one in task.ancestors())]:
                failed[label] = ""
                del pending[label]
            for label in ready(pending, running)[: workers - len(running)]:
                task = pending.pop(label)
                running[pool.submit(execute, task)] = task
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task = running.pop(future)
                what = ", ".join(one.title for one in goals.get(task.label, [])) or task.stage
                try:
                    seconds = future.result()
                except StageError as error:
                    failed[task.label] = str(error)
                    print(f"{what}: {error}", flush=True)
                    continue
                for one in goals.get(task.label, []):
                    write_record(one, revision)
                done, spent = count - len(pending) - len(running), time.perf_counter() - start
                left = spent / done * (count - done) / 60
                print(f"{done}/{count} {what}: {seconds:.0f} s; about {left:.0f} min left", flush=True)
    return [error for error in failed.values() if error]


def ready(pending: dict[str, Task], running: dict[Future[float], Task]) -> list[str]:
    """The waiting tasks of which everything they read is there."""
    unmade = pending.keys() | {task.label for task in running.values()}
    return [label for label, task in pending.items() if not unmade & {source.label for _, source in task.inputs}]


def of_settings(suite: Suite, settings: list[str] | None) -> Suite:
    """The suite with some of its settings alone; None = all."""
    kept = {key: changes for key, changes in suite.settings.items() if settings is None or key in settings}
    return suite.model_copy(update={"settings": kept})


def stopped(number: int, _: object) -> None:
    """Ends the stages that run, too."""
    for child in list(CHILDREN):
        child.terminate()
    os.write(2, f"\nerror: {signal.Signals(number).name}; {AGAIN}\n".encode())
    os._exit(128 + number)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="of core, quick and what --suite names; default: see suites.yaml")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help=f"the suites {', '.join(FULL)}")
    which.add_argument("--quick", action="store_true", help="the core models, one seed, no search")
    which.add_argument("--suite", action="append", help="this suite alone; may be given more than once")
    parser.add_argument("--setting", action="append", help="these settings of the suites alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="stages at a time, one thread each")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    asked = parser.parse_args(arguments)
    suites = load_suites()
    names = asked.suite or (["quick"] if asked.quick else list(FULL) if asked.full else ["core"])
    if unknown := [name for name in names if name not in suites]:
        raise StageError(f"--suite {unknown[0]}: suites.yaml has {', '.join(suites)}")
    if (asked.seeds is not None and asked.seeds < 1) or asked.workers < 1:
        raise StageError("--seeds and --workers must be at least 1")
    settings = {setting for name in names for setting in suites[name].settings}
    if unknown := [setting for setting in asked.setting or [] if setting not in settings]:
        raise StageError(f"--setting {unknown[0]}: these suites have {', '.join(sorted(settings))}")
    parts = {name: of_settings(suites[name], asked.setting) for name in names}
    counts = {
        name: asked.seeds if asked.seeds and (asked.suite or name in ("core", "quick")) else suites[name].seeds
        for name in names
    }
    failures = []
    with only_run("evidence"):
        for index, (name, part) in enumerate(parts.items()):
            for seeds in (range(1), range(1, counts[name])):  # the first one finds the learning rates
                if not asked.dry_run:
                    drop_stale(name, suites[name])  # of later seeds, those of another rate than the first one found
                behind, total = missing(name, part, seeds), len(seeds) * len(part.settings) * len(part.models)
                print(
                    f"{name}: {total - len(behind)} of {total} models are current for seeds {list(seeds)}", flush=True
                )
                todo = [] if asked.dry_run else adopt(searched(behind))
                if todo:
                    prune(
                        [one for later in names[index:] for one in missing(later, parts[later], range(counts[later]))]
                    )
                    failures += run_all(todo, asked.workers)
    if failures:
        raise StageError(f"{len(failures)} stages failed, the first: {failures[0]}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stopped)
    try:
        main()
    except (ParamsError, ArtifactError, StageError, BusyError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())} ({AGAIN})")
