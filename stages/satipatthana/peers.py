"""One peer over all seeds -> metrics/satipatthana/peers/<name>.json.

dvc repro stages/satipatthana/dvc.yaml:peers          (python -m stages.satipatthana.peers mahalanobis)
"""

import sys
from functools import partial
from typing import get_args

from lego.artifacts import derived_seed, write_json
from lego.harness import Stage, StageError, exit_cleanly
from lego.satipatthana.curriculum import means, written
from lego.satipatthana.peers import judge, peer
from lego.satipatthana.sections import WRITTEN, PeerName, SatipatthanaParams, load
from lego.satipatthana.tasks import read_task
from stages.satipatthana.seeds import for_each_seed


def one_seed(name: str, params: SatipatthanaParams, seed: int) -> dict[str, float]:
    """Trains and judges."""
    task, own = read_task("data/satipatthana/task"), derived_seed(params.seed, f"satipatthana/peers/{seed}")
    return judge(peer(name, task, params.peers, own, params.void), task.test, task.outside)


def main() -> None:
    names = get_args(PeerName)
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        raise StageError(f"give one of the peers {', '.join(names)}")
    name, params = sys.argv[1], load()
    with Stage(f"satipatthana/peers@{name}", params.seed, params.threads):
        found = for_each_seed(partial(one_seed, name, params), params)
        facts = means(found)
        write_json(f"metrics/satipatthana/peers/{name}.json", facts | {"seeds": [written(one) for one in found]})
        print(f"{name}: accuracy {facts['accuracy']:.4f}, AURC {facts['aurc']:.5f}", flush=True)


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
