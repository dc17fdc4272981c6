"""Another block on the same base: the root's stages, from the threshold of mining on, with some parameters changed.

dvc repro stages/extend/dvc.yaml:block@last_6      (python here.py stages.extend.block last_6)
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from lego.base.artifacts import atomic_folder, read_json, write_json, write_text
from lego.base.harness import Stage, StageError, exit_cleanly
from stages import collect_hard, compute_threshold, train_phase2
from stages.extend import evaluate, here, route
from stages.extend.settings import Settings, load_settings

TRAINING = (compute_threshold, collect_hard, train_phase2)
STEPS = (*TRAINING, route, evaluate)
SHARED = ("data/base", "data/tokens", "data/phase1", "data/retention", "data/facts/train_phase1.json")
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
        link.unlink(missing_ok=True)  # of a run before
        link.symlink_to(os.path.relpath(path, link.parent))


def run(module: str, work: Path, name: str) -> None:
    """Runs one stage in a process of its own, whose memory is then its own too; it ends where this one is stopped.

    Raises:
        StageError: it failed; it has said why.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with subprocess.Popen([sys.executable, here.__file__, module], cwd=work) as process:
        try:
            code = process.wait()
        finally:
            process.terminate()
    if code < 0:
        raise StageError(
            f"block {name}: {module} was ended by signal {-code}; if memory ran out, lower train.batch_size or "
            "evaluation.batch_size"
        )
    if code:
        raise StageError(
            f"block {name}: {module} failed, and says why above, where params.yaml is root of extend.yaml with "
            f"blocks.{name}; rm -r {work.parent} lets the block begin anew"
        )


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
        stages = [step.__name__.rpartition(".")[2] for step in TRAINING]
        times = [read_json(work / f"data/timing/{one}.json") for one in stages]
        stage.continued = any(one["continued"] for one in times)
        stage.record["training_seconds"] = sum(one["seconds"] for one in times)
        stage.record["peak_mib"] = max(read_json(work / f"data/memory/{one}.json")["peak_mib"] for one in stages)
        found = read_json(work / "metrics/blocks/default.json")
        write_json(f"metrics/blocks/{name}.json", found)
        with atomic_folder(f"data/blocks/{name}") as folder:
            for file in (work / "data/blocks/default").glob("*.safetensors"):
                shutil.copyfile(file, folder / file.name)
        print(f"{name}: test ppl {found['models']['deep']['ppl']:.3f} always deep")


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
