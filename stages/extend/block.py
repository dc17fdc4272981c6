"""Another block on the same base: the root's stages, from the threshold of mining on, with some parameters changed.

dvc repro stages/extend/dvc.yaml:block@second_pass      (python here.py stages.extend.block second_pass)
"""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from lego.base.artifacts import atomic_folder, read_json, write_json, write_text
from lego.base.harness import Stage, StageError, exit_cleanly
from stages import collect_hard, compute_threshold, evaluate_routing, train_phase2
from stages.extend import evaluate, here
from stages.extend.settings import Settings, load_settings

STEPS = (compute_threshold, collect_hard, train_phase2, evaluate_routing, evaluate)
TRAINING = ("compute_threshold", "collect_hard", "train_phase2")
SHARED = (
    "data/base",
    "data/tokens",
    "data/phase1",
    "data/retention",
    "data/facts/tokenize.json",
    "data/facts/train_phase1.json",
    "data/facts/train_shallow_continued.json",
    "metrics/details/shallow_continued.json",
)
"""What a block's stages read that is the same for all of them."""


def prepare(work: Path, settings: Settings, name: str) -> None:
    """Makes the folder that the stages run in: extend.yaml with the block's parameters, links to what all share."""
    work.mkdir(parents=True, exist_ok=True)
    values = settings.model_dump(by_alias=True) | {"blocks": {}, "latency_repeats": 0}
    values["root"] = settings.of_block(name).model_dump()
    write_text(work / "extend.yaml", yaml.safe_dump(values, sort_keys=False))
    for path in SHARED:
        link = work / path
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(Path(path).resolve())


def run(module: str, work: Path, name: str) -> None:
    """Runs one stage in a process of its own, whose memory is then its own too.

    Raises:
        StageError: it failed; it has said why.
    """
    done = subprocess.run([sys.executable, here.__file__, module], cwd=work)
    if done.returncode:
        raise StageError(f"block {name}: {module} failed, and says why above")


def main(*names: str) -> None:
    settings, name = load_settings(), " ".join(names)
    if name not in settings.blocks:
        raise StageError(f"extend.yaml: blocks must have {name!r}, it has {', '.join(settings.blocks) or 'none'}")
    with Stage(f"extend/block@{name}", settings.root.seed, settings.root.train.threads) as stage:
        work = stage.scratch / "work"
        prepare(work, settings, name)
        for step in STEPS:
            finished = work / "finished" / step.__name__
            if finished.exists():  # before a kill
                continue
            print(f"block {name}: {step.__name__}", flush=True)
            run(step.__name__, work, name)
            finished.parent.mkdir(exist_ok=True)
            finished.touch()
        times = [read_json(work / f"data/timing/{one}.json") for one in TRAINING]
        stage.continued = any(one["continued"] for one in times)
        stage.record["training_seconds"] = sum(one["seconds"] for one in times)
        stage.record["peak_mib"] = max(read_json(work / f"data/memory/{one}.json")["peak_mib"] for one in TRAINING)
        found = read_json(work / "metrics/blocks/default.json")
        write_json(f"metrics/blocks/{name}.json", found | {"lr": read_json(work / "metrics/details/ashem.json")["lr"]})
        with atomic_folder(f"data/blocks/{name}") as folder:
            shutil.copytree(work / "data/blocks/default", folder, dirs_exist_ok=True)
        print(f"{name}: test ppl {found['models']['deep']['ppl']:.3f} always deep")


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
