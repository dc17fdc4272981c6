"""Suites of models over settings and seeds: runs what is missing, reuses what is current, and writes it down.

python -m stages.evidence.run --seeds 5              the core suite; --full: all suites; --quick: one seed, no search

Each stage of each setting and seed runs in a folder of its own under .scratch/evidence, with links to what it reads.
metrics/evidence/<suite>.json holds a model's numbers with a fingerprint of everything they follow from: parameters,
code, text, versions. A run with the same fingerprint is not repeated; a killed one continues. The first seed of a
setting searches the learning rate of each model, the others take what it found.
"""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lego.artifacts import ArtifactError, read_json, write_json, write_text
from lego.harness import RECOVERY, StageError
from lego.params import Params, ParamsError, load_params
from lego.scratch import ROOT, SCRATCH, BusyError, only_run, pipeline_entry
from stages.evidence.graph import FULL, Suite, Task, base_rate, changed, first_error, load_suites, stage_of, task_of
from stages.evidence.records import RESULTS, results

STORE, RUNS = SCRATCH / "evidence/store", SCRATCH / "evidence/runs"
AGAIN = "run the same command again: what is finished is kept"
CHILDREN: set[subprocess.Popen[bytes]] = set()  # stages that run now


@dataclass(frozen=True)
class Wanted:
    """A model of a suite under a setting and seed, and the task that makes it."""

    suite: str
    setting: str
    model: str
    seed: int
    task: Task

    @property
    def title(self) -> str:
        return f"{self.suite} {self.setting} {self.model} seed {self.seed}"


def record_of(found: dict[str, Any], setting: str, model: str, seed: int) -> dict[str, Any]:
    return found.get(setting, {}).get(model, {}).get(str(seed), {})


def parameters(suite: Suite, setting: str, seed: int) -> dict[str, Any]:
    """Those of params.yaml with the setting's changes, on one thread and without timing.

    Raises:
        StageError: they are not valid, or the suites would compare what is not comparable.
    """
    values = load_params().model_dump()
    alone = {"seed": seed, "train.threads": 1, "evaluation.latency_repeats": 0, "search.lr_factors": suite.search}
    values = changed(changed(values, alone), suite.settings[setting])
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise StageError(f"suites.yaml: setting {setting}: {first_error(error)}") from None
    routing = params.routing
    if params.ashem.hard_split != "train":
        raise StageError(
            "params.yaml: ashem.hard_split must be train for the suites; leaky_validation is the other one"
        )
    if (routing.criterion, routing.calibration, routing.hard_ratio) != ("max_prob", "quantile", None):
        raise StageError(
            "params.yaml: routing must be max_prob, quantile and hard_ratio null for the suites: baselines route so"
        )
    return values


def factors_found(
    found: dict[str, Any], setting: str, models: list[str], values: dict[str, Any]
) -> dict[str, list[float]]:
    """search.lr_factors of the later seeds by stage: the one that the first seed took, by the suite's records."""
    params = Params.model_validate(values)
    factors = {}
    for model in models:
        lr = record_of(found, setting, model, 0).get("metrics", {}).get("lr")
        base = base_rate(model, params)
        matching = [factor for factor in params.search.lr_factors if lr and abs(base * factor - lr) < 1e-9 * lr]
        if matching:
            factors["train_phase2" if model == "ashem" else stage_of(model, params)] = matching
    return factors


def wanted(name: str, suite: Suite, seeds: range) -> Iterator[Wanted]:
    """What the suite consists of for these seeds."""
    found = results(name)
    for setting in suite.settings:
        for seed in seeds:
            values = parameters(suite, setting, seed)
            factors = factors_found(found, setting, suite.models, values) if seed else {}
            if "shallow_continued" not in suite.models:  # it is made on the way to ASHEM and not compared
                factors["train_shallow_continued"] = [1.0]
            params = Params.model_validate(values)
            for model in suite.models:
                yield Wanted(name, setting, model, seed, task_of(stage_of(model, params), values, factors))


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
    folder = by_stage[one.task.stage] / "metrics"
    if one.model == "ashem":
        curve = table(by_stage["train_phase2"] / "metrics/curves/train_phase2.csv")
        extra = {
            "shallow_documents": table(folder / "documents/shallow.csv"),
            "phase1": read_json(by_stage["train_phase1"] / "metrics/train_phase1.json"),
            "phase1_curve": _drawn(table(by_stage["train_phase1"] / "metrics/curves/train_phase1.csv")),
            "criteria": read_json(folder / "criteria.json"),
            "sweep": table(folder / "curves/evaluate_routing.csv"),
        }
        metrics = read_json(folder / "evaluate_routing.json")
    else:
        curve, extra = table(folder / f"curves/{one.model}.csv"), {}
        metrics = read_json(folder / f"baseline/{one.model}.json")
    documents = table(folder / f"documents/{one.model}.csv")
    return {"metrics": metrics, "documents": documents, "curve": _drawn(curve), **extra}


def _drawn(curve: dict[str, list[float]]) -> dict[str, list[float]]:
    return {key: curve[key] for key in ("macs", "val_ppl")}


def write_record(one: Wanted, revision: str) -> None:
    """Adds a finished model to its suite's file."""
    put(one, {"fingerprint": one.task.fingerprint, "revision": revision} | record(one))


def put(one: Wanted, kept: dict[str, Any]) -> None:
    found = results(one.suite)
    found.setdefault(one.setting, {}).setdefault(one.model, {})[str(one.seed)] = kept
    write_json(RESULTS / f"{one.suite}.json", found)


def adopt(todo: list[Wanted]) -> list[Wanted]:
    """Takes over what another suite made already; returns what is still to make."""
    made = {
        kept["fingerprint"]: kept
        for name in {file.stem for file in RESULTS.glob("*.json")} & load_suites().keys()
        for models in results(name).values()
        for seeds in models.values()
        for kept in seeds.values()
    }
    for one in todo:
        if one.task.fingerprint in made:
            put(one, made[one.task.fingerprint])
            print(f"{one.title}: made before, for another suite", flush=True)
    return [one for one in todo if one.task.fingerprint not in made]


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


def outdated(name: str, suite: Suite) -> list[tuple[str, str, str]]:
    """Setting, model and seed of the records that follow from other parameters, code or text than today's."""
    found = results(name)
    seeds = {int(seed) for models in found.values() for kept in models.values() for seed in kept}
    if not seeds:
        return []
    current = {
        (one.setting, one.model, str(one.seed)): one.task.fingerprint
        for one in wanted(name, suite, range(max(seeds) + 1))
    }
    return [
        (setting, model, seed)
        for setting, models in found.items()
        for model, kept in models.items()
        for seed, one in kept.items()
        if current.get((setting, model, seed)) != one["fingerprint"]
    ]


def drop_stale(name: str, suite: Suite) -> None:
    """Removes outdated records, so that they are not averaged with current ones.

    Settings and models that the suite does not have (any more) go too.
    """
    if stale := outdated(name, suite):
        found = results(name)
        for setting, model, seed in stale:
            del found[setting][model][seed]
        print(f"{name}: {len(stale)} models of other parameters, code or text are dropped", flush=True)
        write_json(RESULTS / f"{name}.json", found)


def missing(name: str, suite: Suite, seeds: range) -> list[Wanted]:
    """The models of a suite whose numbers are not there or not current."""
    found = results(name)
    return [
        one
        for one in wanted(name, suite, seeds)
        if record_of(found, one.setting, one.model, one.seed).get("fingerprint") != one.task.fingerprint
    ]


def searched(todo: list[Wanted]) -> list[Wanted]:
    """Without the later seeds of what the first one did not make: its learning rate is not known."""
    return [one for one in todo if one.seed == 0 or record_of(results(one.suite), one.setting, one.model, 0)]


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
