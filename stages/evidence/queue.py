"""Puts on DVC's queue what the suites lack: an experiment for each setting and seed with a missing or stale model.

python -m stages.evidence.queue --seeds 5            the core suite; --full: all suites; --suite NAME: these alone
dvc queue start -j 2
python -m stages.evidence.gather

Run again it queues only what is neither queued nor finished. The first seed of a setting searches the learning rates;
the others wait until it has finished, and take what it found.
"""

import argparse
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from lego.base.harness import StageError, exit_cleanly
from lego.base.params import load_params
from stages.evidence.current import MISSING, rates_of, standing
from stages.evidence.gather import finished, git, queued, with_finished
from stages.evidence.records import Found
from stages.evidence.suites import FULL, Suite, changes_of, load_suites, made_by, override

SAID = 4  # of what has changed, so many are named
CODE = ("lego", "stages", "dvc.yaml", "params.yaml", ":!*dvc.lock")


@dataclass(frozen=True)
class Lack:
    """An experiment that a suite lacks: why, what it changes and runs, and whether it waits for its first seed."""

    name: str
    why: str
    changes: dict[str, Any]
    targets: list[str]
    waits: bool

    def put(self) -> None:
        """Puts it on the queue; the message says of which Python's text it is made.

        Raises:
            StageError: dvc did not take it.
        """
        command = [sys.executable, "-m", "dvc", "exp", "run", "--queue", "-n", self.name]
        command += ["-m", f"{self.name}, Python {platform.python_version()}"]
        command += [word for key, value in self.changes.items() for word in ("-S", override(key, value))]
        done = subprocess.run([*command, *self.targets], capture_output=True, text=True)
        if done.returncode:
            raise StageError(f"{self.name}: {done.stderr.strip()}")


def lacks(name: str, suite: Suite, found: Found, seeds: range, settings: list[str]) -> list[Lack]:
    """What a suite lacks of these settings and seeds, the first seeds of all settings before the others.

    Raises:
        StageError: a setting is not valid, or its text is not here.
    """
    params, lacking = load_params(), []
    for seed in seeds:
        for setting in settings:
            why = {model: since for model, since in standing(suite, setting, seed, found).items() if since}
            if why:
                searched = seed > 0 and len(suite.search) > 1
                waits = searched and any(standing(suite, setting, 0, found).values())
                changes = changes_of(suite, setting, seed, rates_of(found, setting, suite.models, params))
                targets, words = (
                    [made_by(model, params)[0] for model in why],
                    reasons(why, found.get(setting, {}), seed),
                )
                lacking.append(Lack(f"{name}-{setting}-s{seed}", words, changes, targets, waits))
    return lacking


def reasons(why: dict[str, list[str]], found: dict[str, Any], seed: int) -> str:
    """Models by the reason why they have to be made."""
    by_reason: dict[str, list[str]] = {}
    for model, since in why.items():
        revision = found[model][str(seed)]["revision"] if since != [MISSING] else ""
        more = f" and {len(since) - SAID} more" if len(since) > SAID else ""
        changed = f"{', '.join(since[:SAID])}{more}"
        words = f"computed at revision {revision}; since then {changed} changed" if revision else MISSING
        by_reason.setdefault(words, []).append(model)
    return "; ".join(f"{', '.join(models)} ({words})" for words, models in by_reason.items())


def held(lack: Lack, status: str, here: bool) -> str:
    """Why an experiment is not put on the queue, or "": by its status there, and whether it has finished `here`."""
    if status in ("Queued", "Running"):
        return f"is {status.lower()}"
    if status == "Failed":
        return f"failed, dvc queue logs {lack.name} says why; dvc queue remove --failed, and it is queued again"
    if here:
        return f"has finished at this revision and is not current; dvc exp remove {lack.name}, and it is queued again"
    return "waits for its first seed, whose learning rates it takes" if lack.waits else ""


def main(arguments: list[str] | None = None) -> None:
    suites = load_suites()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="of core and what --suite names; default: see suites.yaml")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help=f"the suites {', '.join(FULL)}")
    which.add_argument("--suite", nargs="+", action="extend", choices=suites, help="these suites")
    every = sorted({setting for suite in suites.values() for setting in suite.settings})
    parser.add_argument("--setting", nargs="+", action="extend", choices=every, help="these settings alone")
    parser.add_argument("--dry-run", action="store_true", help="say what would be queued, and why")
    options = parser.parse_args(arguments)
    names = options.suite or (FULL if options.full else ["core"])
    if options.seeds is not None and options.seeds < 1:
        raise StageError("--seeds must be at least 1")
    edited = git("status", "--porcelain", "--", *CODE).splitlines()
    if edited and not options.dry_run:
        raise StageError(f"{edited[0][3:]} is not committed; commit it first, as a record names the commit it is of")
    statuses, count, head = queued(), 0, git("rev-parse", "HEAD").strip()
    here = {one.name for one in finished() if one.revision == head}
    for name in names:
        suite = suites[name]
        seeds = range(options.seeds if options.seeds and (options.suite or name == "core") else suite.seeds)
        settings = [one for one in suite.settings if one in (options.setting or every)]
        lacking = lacks(name, suite, with_finished(name, suite)[0], seeds, settings)
        models, made = len(seeds) * len(settings) * len(suite.models), sum(len(lack.targets) for lack in lacking)
        print(f"{name}: {models - made} of {models} models are current", flush=True)
        for lack in lacking:
            stays = held(lack, statuses.get(lack.name, ""), lack.name in here)
            if not stays and not options.dry_run:
                lack.put()
                count += 1
            print(f"{lack.name} {stays or ('lacks' if options.dry_run else 'is queued')}: {lack.why}", flush=True)
    if count:
        print(f"{count} queued: dvc queue start -j 2, and when they have finished python -m stages.evidence.gather")


if __name__ == "__main__":
    exit_cleanly(main)
