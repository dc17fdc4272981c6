"""Reads finished experiments of the suites and writes what the page needs of them to metrics/evidence.

python -m stages.evidence.gather            of all suites; --suite NAME: of these alone

An experiment is known by its name. Numbers are read from its commit, and from DVC's cache or remote.
"""

import argparse
import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import parse_yaml

from lego.base.harness import StageError, exit_cleanly
from lego.base.params import load_params
from stages.evidence.current import SHOWN, declared, is_code, standing
from stages.evidence.records import Found, flattened, nested, results, rounded, write
from stages.evidence.suites import EXPERIMENT, Suite, flat, load_suites, made_by

SEARCHED = "validation perplexity by learning rate:"  # what lego.training.search prints
PHASE1 = ("parameters", "train_tokens", "train_text_tokens", "phase1_converged", "val_ppl")
CRITERION = ("ppl", "gain_auroc", "flops_ratio")
LOCKS = ("dvc.lock", "stages/evidence/dvc.lock")


class Experiment(NamedTuple):
    """A finished experiment: its name and what that says, its commit, and the revision that it was queued from."""

    name: str
    suite: str
    setting: str
    seed: int
    commit: str
    revision: str


def git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True)
    if done.returncode:
        raise StageError(f"git {command[0]}: {done.stderr.strip() or 'failed'}")
    return done.stdout


def finished() -> list[Experiment]:
    """The experiments of suites that are in this clone, the oldest first."""
    listed = git("for-each-ref", "--sort=committerdate", "--format=%(refname) %(objectname)", "refs/exps").splitlines()
    found = [re.fullmatch(rf"refs/exps/(\w\w)/(\w{{38}})/({EXPERIMENT}) (\w+)", line) for line in listed]
    return [Experiment(one[3], one[4], one[5], int(one[6]), one[7], one[1] + one[2]) for one in found if one]


def table(text: str, *columns: str) -> dict[str, list[float | None]]:
    """Columns of a CSV file of numbers, empty cells as None."""
    rows = list(csv.DictReader(io.StringIO(text)))
    return {key: [round(float(row[key]), 4) if row[key] else None for row in rows] for key in columns}


def searched_rates(log: str) -> dict[str, float | None]:
    """Validation perplexity by learning rate, as `lego.training.search` prints it, None where training diverged."""
    lines = [line for line in log.splitlines() if line.startswith(SEARCHED)]
    pairs = lines[-1].removeprefix(SEARCHED).partition(";")[0].split(", ") if lines else []
    found = {rate.strip(): float(ppl) for rate, ppl in (pair.split(":") for pair in pairs)}
    return {rate: ppl if math.isfinite(ppl) else None for rate, ppl in found.items()}


def logs(name: str) -> dict[str, str]:
    """What each stage of an experiment printed; nothing if it ran in another clone."""
    done = subprocess.run([sys.executable, "-m", "dvc", "queue", "logs", name], capture_output=True, text=True)
    parts = re.split(r"^Running stage '(?:.*:)?([\w@]+)':$", done.stdout if done.returncode == 0 else "", flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def numbers(model: str, stage: str, seed: int, read: Callable[[str], str], said: dict[str, str]) -> dict[str, Any]:
    """What is kept of a model's results: `read` gives the text of a file, `said` is what each stage printed."""
    place = "metrics" if "@" in stage else "data"  # of a baseline they are in the experiment's commit
    columns = ("tokens", "hard_tokens", "nll", "nll_deep", "nll_hard")
    kept: dict[str, Any] = {
        "metrics": json.loads(read(f"metrics/details/{model}.json")),
        "documents": table(read(f"{place}/documents/{model}.csv"), *columns),
    }
    if seed == 0:
        trained = "train_phase2" if model == "ashem" else model
        kept["curve"] = table(read(f"{place}/curves/{trained}.csv"), "macs", "val_ppl")
        kept["tried"] = searched_rates(said.get("train_phase2" if model == "ashem" else stage, ""))
    if model == "ashem":
        phase1 = json.loads(read("data/facts/train_phase1.json"))
        criteria = json.loads(read("metrics/details/criteria.json"))
        kept["phase1"] = {key: phase1[key] for key in PHASE1}
        kept["phase1_curve"] = table(read("data/curves/train_phase1.csv"), "macs", "val_ppl")
        kept["shallow_documents"] = table(read("data/documents/shallow.csv"), "nll")
        kept["sweep"] = table(read("data/curves/evaluate_routing.csv"), "flops_ratio", "ppl")
        kept["criteria"] = {
            "test": {name: {key: one[key] for key in CRITERION} for name, one in criteria["test"].items()}
        }
        kept["of_attainable"] = criteria.get("of_attainable_by_deep_share", {}).get("test")  # null without a gate
    return kept


def records_of(experiment: Experiment, suite: Suite) -> Iterator[dict[str, Any]]:
    """A record of each model of the suite that the experiment made.

    Raises:
        StageError: a file of it is neither here nor in a remote.
    """
    files = DVCFileSystem(rev=experiment.commit)

    def read(path: str) -> str:
        try:
            return files.read_text(path)
        except (OSError, DvcException):
            raise StageError(
                f"{experiment.name}: {path} is not in DVC's cache; bring it here with dvc exp pull origin "
                f"{experiment.name}, or gather where it ran"
            ) from None

    values, stages, printed = parse_yaml(read("params.yaml"), "params.yaml"), dict[str, Any](), logs(experiment.name)
    for lock in LOCKS:
        stages |= parse_yaml(read(lock), lock)["stages"] if files.exists(lock) else {}
    python = re.search(r"Python (\S+)", git("log", "-1", "--format=%B", experiment.commit))
    own, data = flat(values), values["data"]
    for model in suite.models:
        target = made_by(model, load_params())[0]
        stage = target.rpartition(":")[2]
        if stage not in stages or not flat(stages[stage]["params"]["params.yaml"]).items() <= own.items():
            continue  # it was not among the targets: dvc.lock has none, or that of the revision
        deps = [dep for name in declared(target)[2] for dep in stages.get(name, {"deps": []})["deps"]]
        hashes = {dep["path"]: dep["md5"][:SHOWN] for dep in deps if is_code(dep["path"])}
        text = hashes.pop(data["path"], "")
        known = {"python-stdlib": {"Python": python[1] if python else ""}, "text": {"text": text}}
        record = {"setting": experiment.setting, "model": model, "seed": experiment.seed}
        record |= {"revision": experiment.revision[:SHOWN], "experiment": experiment.commit[:SHOWN], "params": own}
        record["made_of"] = dict(sorted((hashes | known.get(data["source"], {})).items()))
        yield rounded(record | numbers(model, stage, experiment.seed, read, printed))


def with_finished(name: str, suite: Suite) -> tuple[Found, list[str]]:
    """The records of a suite with those of finished experiments, and what was read of which.

    A current record is not replaced by one that is not, where that can be told. Settings and models that suites.yaml no
    longer names are left out.
    """
    kept = [
        one for one in flattened(results(name)) if one["setting"] in suite.settings and one["model"] in suite.models
    ]
    found, names = nested(kept), []
    known = {one["experiment"] for one in flattened(found) if "experiment" in one}
    for experiment in finished():
        setting, seed = experiment.setting, experiment.seed
        if experiment.suite != name or setting not in suite.settings or experiment.commit[:SHOWN] in known:
            continue
        new = list(records_of(experiment, suite))
        try:
            before = standing(suite, setting, seed, found)
            after = standing(suite, setting, seed, nested([*flattened(found), *new]))
        except StageError:  # its text is not here
            before, after = {}, {}
        taken = [one for one in new if not after.get(one["model"]) or before.get(one["model"])]
        found = nested([*flattened(found), *taken])
        if taken:
            names.append(f"{experiment.name}: {', '.join(one['model'] for one in taken)}")
    return found, names


def queued() -> dict[str, str]:
    """Status by name of the experiments on the queue of this clone: Queued, Running, Failed or Success."""
    with Repo() as repo:
        return {one["name"]: one["status"] for one in reversed(repo.experiments.celery_queue.status()) if one["name"]}


def main(arguments: list[str] | None = None) -> None:
    suites = load_suites()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", action="extend", choices=suites, help="these suites alone")
    for name in parser.parse_args(arguments).suite or suites:
        found, read = with_finished(name, suites[name])
        if read:
            write(name, found)
            print("\n".join(read), flush=True)
    for name, status in queued().items():
        if re.fullmatch(EXPERIMENT, name) and status == "Failed":
            print(f"{name} failed; dvc queue logs {name} says why", flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
