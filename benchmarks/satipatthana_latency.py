"""What an answer with its trust takes in time, beside one pass of the plain network and beside an ensemble.

python -m benchmarks.satipatthana_latency          after dvc repro stages/satipatthana/dvc.yaml

Test rows of the default pipeline, its system and its plain networks, on one thread; runs alternate, and each pair gives
a ratio. An ensemble is peers.members plain networks.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from lego.harness import exit_cleanly, reuse_freed_memory
from lego.latency import ratio_of_pairs
from lego.satipatthana.peers import Plain
from lego.satipatthana.sections import WRITTEN
from lego.satipatthana.sections import load as load_params
from lego.satipatthana.store import load
from lego.satipatthana.tasks import read_task
from stages.satipatthana.plain import read


def of_all(models: list[Plain], x: Tensor) -> list[Tensor]:
    """Logits (n, C) of each."""
    return [model(x)[1] for model in models]


@torch.no_grad()
def lines(repeats: int) -> list[str]:
    """A line for each batch size."""
    params, task = load_params(), read_task("data/satipatthana/task")
    x = task.test.x
    system, _ = load("data/satipatthana/system")
    plain = read(task, params, 0)
    members, found = [plain] * params.peers.members, []
    for rows in (1, 32, len(x)):
        part = x[:rows]
        others = {"the plain network": partial(plain, part), "an ensemble": partial(of_all, members, part)}
        said = []
        for name, other in others.items():
            middle, low, high = ratio_of_pairs(partial(system, part), other, repeats)
            said.append(f"{middle:.1f} ({low:.1f} to {high:.1f}) times {name}")
        found.append(f"{rows} rows at a time: {'; '.join(said)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="pairs of runs")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    reuse_freed_memory()
    print("\n".join(lines(repeats)))


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
