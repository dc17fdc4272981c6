"""Training stages of all three systems and the workers of dvc's queue, killed (-9) at random moments under real dvc.

What is made in the end must have the bytes of a run that nobody killed.

python tests/kills.py --rounds 20 --queue 5      prints each kill; about half a minute a round on 2 cores
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from lego.base.artifacts import sha256
from lego.base.profiles import with_keys
from tests.conftest import Clone
from tests.stages.conftest import names

STAGES = {
    "dvc.yaml": ["train_phase1", "collect_hard", "train_phase2", "train_shallow_continued"],
    "stages/cvfp/dvc.yaml": ["train_phase1", "build_contexts", "train_phase2"],
    "stages/satipatthana/dvc.yaml": [f"train_stage{number}" for number in range(4)],
}
SIZES = {  # small, but training takes longer than imports
    "params.yaml": {
        "train.tokens_per_epoch": 60_000,
        "ashem.phase1_epochs": 6,
        "ashem.phase2_epochs": 4,
        "evaluation.latency_repeats": 0,
    },
    "stages/cvfp/params.yaml": {
        "data.max_train_tokens": 20_000,
        "predict.epochs": 4,
        "contest.seeds": 2,
        "threads": 1,
    },
    "stages/satipatthana/params.yaml": {
        "seeds": 1,
        "ablations.seeds": 1,
        "workers": 1,
        "task.name": "digits",
        **{f"stage{number}.epochs": 30 for number in range(4)},
    },
}


def prepared(folder: Path) -> Clone:
    """A clone with these sizes in which every stage of STAGES has run once."""
    clone = Clone.of_this_tree(folder)
    for file, sizes in SIZES.items():
        path = folder / file
        values = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(with_keys(values, sizes, "sizes", file), sort_keys=False))
    clone.commit("sizes")
    for file, stages in STAGES.items():
        clone.run("dvc", "repro", f"{file}:{stages[-1]}" if file != "dvc.yaml" else file)
    clone.commit("results")
    return clone


def outs(clone: Clone, file: str, stage: str) -> dict[str, str]:
    """Digests of what a stage makes."""
    entry = yaml.safe_load((clone.folder / file).read_text())["stages"][stage]
    return {out: sha256(clone.folder / out) for out in names(entry["outs"])}


def started(clone: Clone, *command: str) -> subprocess.Popen:
    log = (clone.folder / ".scratch/killed.log").open("w")
    return subprocess.Popen(
        command, cwd=clone.folder, env=clone.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def round_of_a_stage(clone: Clone, file: str, stage: str, luck: random.Random) -> str:
    """Kills a stage with its dvc once or twice, lets it end, and says where the kills fell."""
    expected, command = outs(clone, file, stage), ("dvc", "repro", "-s", "-f", f"{file}:{stage}")
    if file == "dvc.yaml":
        command = (*command[:-1], stage)
    start = time.monotonic()
    clone.run(*command)
    whole, fell = time.monotonic() - start, []
    assert outs(clone, file, stage) == expected, f"{file}:{stage} differs without a kill"
    for _ in range(luck.choice((1, 2))):
        child = started(clone, *command)
        with suppress(subprocess.TimeoutExpired):
            child.wait(luck.uniform(0.25, 1.0) * whole)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        said = (clone.folder / ".scratch/killed.log").read_text()
        fell.append((re.split(r"[\r\n]+", said.strip()) or [""])[-1][:60] if child.returncode else "after its end")
    said = clone.run(*command)
    assert outs(clone, file, stage) == expected, f"{file}:{stage} differs after kills at {fell}"
    continued = re.search(r"continues after [^\n]*", said)
    return f"{file}:{stage}: killed at {fell}; {continued.group() if continued else 'began anew'}; same bytes"


def workers(clone: Clone) -> list[int]:
    """Processes whose work folder lies in the clone: dvc's workers, which are daemons, and their stages."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cwd").resolve(strict=True).is_relative_to(clone.folder.resolve()):
                found.append(int(folder.name))
        except OSError:
            continue
    return [number for number in found if number != os.getpid()]


def waited(clone: Clone) -> float:
    """Seconds until no queued experiment waits or runs."""
    start = time.monotonic()
    while any(word in clone.run("dvc", "queue", "status") for word in ("Queued", "Running")):
        time.sleep(1)
    return time.monotonic() - start


def queue(clone: Clone, ratios: dict[str, float]) -> None:
    """Queues experiments by name and starts two workers; dvc's cache of runs goes first, or nothing would run."""
    shutil.rmtree(clone.folder / ".dvc/cache/runs", ignore_errors=True)
    for name, ratio in ratios.items():
        clone.run("dvc", "exp", "run", "--queue", "-n", name, "-S", f"ashem.hard_example_ratio={ratio}")
    started(clone, "dvc", "queue", "start", "-j", "2").wait()  # its workers would hold a pipe open


def made(clone: Clone, name: str) -> list[str]:
    """The digests of all that an experiment made, as its lock names them."""
    refs = clone.run("git", "for-each-ref", "refs/exps", "--format=%(refname)").split()
    (ref,) = (ref for ref in refs if ref.endswith(f"/{name}"))
    lock = yaml.safe_load(clone.run("git", "show", f"{ref}:dvc.lock"))["stages"]
    return [f"{stage} {out['path']} {out['md5']}" for stage, entry in lock.items() for out in entry["outs"]]


def round_of_the_queue(clone: Clone, whole: float, expected: list[list[str]], luck: random.Random) -> str:
    """Kills the workers with their stages, follows README.md, and lets the experiments that were lost run again."""
    ratios = {"one": 0.3, "two": 0.4}
    queue(clone, ratios)
    moment = luck.uniform(0.1, 0.9) * whole
    time.sleep(moment)
    killed = workers(clone)
    for process in killed:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    while any(Path(f"/proc/{process}").exists() for process in killed):  # dvc takes one that is not reaped for alive
        time.sleep(0.1)
    status = clone.run("dvc", "queue", "status")
    lost = [name for name in ratios if re.search(rf"\s{name}\s.*(Running|Queued)", status)]
    if lost:
        clone.run("dvc", "queue", "kill", "--force", *lost)
        clone.run("dvc", "queue", "remove", "--failed")
        for folder in clone.folder.glob(".dvc/tmp/exps/tmp*"):
            shutil.rmtree(folder)
        queue(clone, {name: ratios[name] for name in lost})
        waited(clone)
    assert [made(clone, name) for name in ratios] == expected, f"the queue differs after a kill at {moment:.0f} s"
    clone.run("dvc", "queue", "remove", "--all")
    clone.run("dvc", "exp", "remove", *ratios)
    return f"queue: killed after {moment:.0f} s of {whole:.0f} s, {' and '.join(lost) or 'nothing'} lost; same bytes"


def rounds_of_the_queue(clone: Clone, rounds: int, luck: random.Random) -> None:
    clone.run("git", "checkout", "-q", ".")
    queue(clone, {"one": 0.3, "two": 0.4})
    whole = waited(clone)
    expected = [made(clone, name) for name in ("one", "two")]
    clone.run("dvc", "queue", "remove", "--all")
    clone.run("dvc", "exp", "remove", "one", "two")
    for number in range(rounds):
        print(f"{number + 1}. {round_of_the_queue(clone, whole, expected, luck)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of stages, in turn")
    parser.add_argument("--queue", type=int, default=3, help="rounds of the queue")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    luck, all_stages = random.Random(asked.seed), [(file, stage) for file, of in STAGES.items() for stage in of]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name) / "clone"
        folder.mkdir()
        clone = prepared(folder)
        for number in range(asked.rounds):
            file, stage = all_stages[number % len(all_stages)]
            print(f"{number + 1}. {round_of_a_stage(clone, file, stage, luck)}", flush=True)
        if asked.queue:
            rounds_of_the_queue(clone, asked.queue, luck)


if __name__ == "__main__":
    main()
