"""What an answer with its trust takes in time, beside the plain network and an ensemble of it.

Measured where the page is written, on which no stage depends: seconds differ from run to run.
"""

from collections.abc import Callable

import torch

from lego.base.timing import fastest
from lego.satipatthana.curriculum import STAGES, resume
from lego.satipatthana.sections import SatipatthanaParams
from lego.satipatthana.tasks import read_task
from stages.satipatthana.plain import read

RUNS = 20  # of each model, of which the fastest counts


@torch.no_grad()
def latencies(params: SatipatthanaParams) -> dict[int, dict[str, float]]:
    """Seconds for one test row and for all of them, by model; an ensemble is as many passes of the plain network."""
    task = read_task("data/satipatthana/task")
    system = resume(task, params, 0, STAGES[-1], f"data/satipatthana/stage{STAGES[-1]}/seed_0")
    plain = read(task, params, 0)

    def works(x: torch.Tensor) -> dict[str, Callable[[], object]]:
        return {
            "satipatthana": lambda: system(x),
            "plain": lambda: plain(x),
            "ensemble": lambda: [plain(x) for _ in range(params.peers.members)],
        }

    return {rows: fastest(works(task.test.x[:rows]), RUNS) for rows in (1, len(task.test))}
