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
from dataclasses import dataclass
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import parse_yaml

from lego.base.artifacts import ArtifactError
from lego.base.harness import StageError
from lego.base.parameter_files import ParamsError
from lego.base.params import load_params
from stages.evidence.current import BESIDE, SHOWN, is_code, standing
from stages.evidence.records import Found, flattened, nested, results, write
from stages.evidence.suites import EXPERIMENT, Suite, flat, load_suites, stage_of

SEARCHED = "validation perplexity by learning rate:"  # what lego.training.search prints
PHASE1 = ("parameters", "train_tokens", "train_text_tokens", "phase1_converged", "val_ppl")
CRITERION = ("ppl", "gain_auroc", "flops_ratio")
LOCKS = ("dvc.lock", "stages/evidence/dvc.lock")


@dataclass(frozen=True)
class Experiment:
    """A finished experiment: the name it was given, its commit, and the revision that it was queued from."""

    name: str
    commit: str
    revision: str

    @property
    def parts(self) -> tuple[str, str, int]:
        """Suite, setting and seed."""
        suite, setting, seed = EXPERIMENT.fullmatch(self.name).groups()  # type: ignore[union-attr]
        return suite, setting, int(seed)


def git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True)
    if done.returncode:
        raise StageError(f"git {command[0]}: {done.stderr.strip() or 'failed'}")
    return done.stdout


def finished() -> list[Experiment]:
    """The experiments of suites that are in this clone, the oldest first."""
    listed = git("for-each-ref", "--sort=committerdate", "--format=%(refname) %(objectname)", "refs/exps").splitlines()
    found = [re.fullmatch(r"refs/exps/(\w\w)/(\w{38})/(\S+) (\w+)", line) for line in listed]
    named = [Experiment(one[3], one[4], one[1] + one[2]) for one in found if one]
    return [one for one in named if EXPERIMENT.fullmatch(one.name)]


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


def made_by(stages: dict[str, Any], stage: str) -> list[dict[str, Any]] | None:
    """The entries in dvc.lock of a stage and all before it; None if one is not there or has read other outs."""
    outs = {out["path"]: (name, out["md5"]) for name, entry in stages.items() for out in entry["outs"]}
    todo, seen = [stage], dict[str, Any]()
    while todo:
        name = todo.pop()
        if name in seen or name == BESIDE != stage:
            continue
        if name not in stages:
            return None
        seen[name] = stages[name]
        for dep in stages[name]["deps"]:
            if not is_code(dep["path"]):
                maker, digest = outs.get(dep["path"], ("", ""))
                if digest != dep["md5"]:
                    return None
                todo.append(maker)
    return list(seen.values())


def origin(entries: list[dict[str, Any]], values: dict[str, Any], python: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Parameters by whole key, and hashes of code and text, as entries of dvc.lock have them."""
    params = flat({key: value for entry in entries for key, value in entry["params"]["params.yaml"].items()})
    hashes = {dep["path"]: dep["md5"][:SHOWN] for entry in entries for dep in entry["deps"] if is_code(dep["path"])}
    text, source = hashes.pop(values["data"]["path"], ""), values["data"]["source"]
    more = {"Python": python} if source == "python-stdlib" else {"text": text} if source == "text" else {}
    return params, hashes | more


def numbers(model: str, read: Callable[[str], str], seed: int, printed: dict[str, str], stage: str) -> dict[str, Any]:
    """What is kept of a model's results.

    Args:
        model: its name.
        read: gives the text of a file of the experiment.
        seed: curves and rates that were tried are kept of the first one.
        printed: by stages.
        stage: that makes the model.
    """
    place = "metrics" if "@" in stage else "data"  # of a baseline they are in the experiment's commit
    columns = ("tokens", "hard_tokens", "nll", "nll_deep", "nll_hard")
    kept: dict[str, Any] = {
        "metrics": json.loads(read(f"metrics/details/{model}.json")),
        "documents": table(read(f"{place}/documents/{model}.csv"), *columns),
    }
    trained = "train_phase2" if model == "ashem" else model
    if seed == 0:
        kept["curve"] = table(read(f"{place}/curves/{trained}.csv"), "macs", "val_ppl")
        kept["tried"] = searched_rates(printed.get("train_phase2" if model == "ashem" else stage, ""))
    if model == "ashem":
        phase1 = json.loads(read("data/facts/train_phase1.json"))
        criteria = json.loads(read("metrics/details/criteria.json"))["test"]
        kept["phase1"] = {key: phase1[key] for key in PHASE1}
        kept["phase1_curve"] = table(read("data/curves/train_phase1.csv"), "macs", "val_ppl")
        kept["shallow_documents"] = table(read("data/documents/shallow.csv"), "nll")
        kept["sweep"] = table(read("data/curves/evaluate_routing.csv"), "flops_ratio", "ppl")
        kept["criteria"] = {"test": {name: {key: one[key] for key in CRITERION} for name, one in criteria.items()}}
    return kept


def records_of(experiment: Experiment, suite: Suite) -> Iterator[dict[str, Any]]:
    """A record of each model of the suite that the experiment made.

    Raises:
        StageError: a file of it is neither here nor in a remote.
    """
    _, setting, seed = experiment.parts
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
    known = flat(values)
    python = re.search(r"Python (\S+)", git("log", "-1", "--format=%B", experiment.commit))
    for model in suite.models:
        stage = stage_of(model, load_params())
        entries = made_by(stages, stage)
        if entries is None or not flat(stages[stage]["params"]["params.yaml"]).items() <= known.items():
            continue  # it was not among the targets: what dvc.lock has is of the revision
        params, hashes = origin(entries, values, python[1] if python else "unknown")
        yield {
            "setting": setting,
            "model": model,
            "seed": seed,
            "revision": experiment.revision[:7],
            "experiment": experiment.commit[:7],
            "params": params,
            "made_of": hashes,
            **numbers(model, read, seed, printed, stage),
        }


def with_finished(name: str, suite: Suite) -> tuple[Found, list[str]]:
    """The records of a suite with those of finished experiments, and the names of the experiments that were read.

    A current record is not replaced by one that is not.
    """
    found, names = results(name), []
    known = {one["experiment"] for one in flattened(found) if "experiment" in one}
    for experiment in finished():
        own, setting, seed = experiment.parts
        if own != name or setting not in suite.settings or experiment.commit[:7] in known:
            continue
        new = list(records_of(experiment, suite))
        before = standing(suite, setting, seed, found)
        after = standing(suite, setting, seed, nested([*flattened(found), *new]))
        taken = [one for one in new if before[one["model"]] or not after[one["model"]]]
        found = nested([*flattened(found), *taken])
        if taken:
            names.append(f"{experiment.name}: {', '.join(one['model'] for one in taken)}")
    return found, names


def queued() -> dict[str, str]:
    """Status by name of the experiments on the queue of this clone: Queued, Running, Failed or Success."""
    with Repo() as repo:
        return {one["name"]: one["status"] for one in reversed(repo.experiments.celery_queue.status()) if one["name"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", action="extend", help="these suites alone")
    suites = load_suites()
    names = parser.parse_args(arguments).suite or list(suites)
    if unknown := [name for name in names if name not in suites]:
        raise StageError(f"--suite {unknown[0]}: suites.yaml has {', '.join(suites)}")
    for name in names:
        found, read = with_finished(name, suites[name])
        if read:
            write(name, found)
        for line in read:
            print(line, flush=True)
    for name, status in queued().items():
        if EXPERIMENT.fullmatch(name) and status == "Failed":
            print(f"{name} failed; dvc queue logs {name} says why", flush=True)


def cleanly(main: Callable[[], None]) -> None:
    """Runs a command; what a user can mend becomes one line."""
    try:
        main()
    except (ParamsError, ArtifactError, StageError, DvcException, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    cleanly(main)
