"""One peer over all seeds -> metrics/satipatthana/peers/<name>.json.

dvc repro stages/satipatthana/dvc.yaml:peers          (python -m stages.satipatthana.peers mahalanobis)
"""

import sys
from functools import partial
from typing import get_args

from lego.base.artifacts import write_json
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.satipatthana.curriculum import means, written
from lego.satipatthana.jobs import classification_only
from lego.satipatthana.peers import OWN, judge, networks, peer
from lego.satipatthana.sections import PeerName, SatipatthanaParams, load
from lego.satipatthana.tasks import read_task
from stages.satipatthana.plain import read, seed_of
from stages.satipatthana.seeds import for_each_seed


def one_seed(name: str, params: SatipatthanaParams, seed: int) -> dict[str, float]:
    """Trains what a peer has of its own, reads the plain network for all but outlier_exposure, and judges."""
    task, own = read_task("data/satipatthana/task"), seed_of(params, seed)
    models = [] if name == "outlier_exposure" else [read(task, params, seed)]
    if name in OWN:
        models += networks(name, task, params.peers, own, params.void)
    return judge(peer(name, models, task, params.peers, own), task.test, task.outside)


def main() -> None:
    names = get_args(PeerName)
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        raise StageError(f"give one of the peers {', '.join(names)}")
    name, params = sys.argv[1], load()
    classification_only(params, "peers")
    with Stage(f"satipatthana/peers@{name}", params.seed, params.threads):
        found = for_each_seed(partial(one_seed, name, params), params, light=name not in OWN)
        facts = means(found)
        write_json(f"metrics/satipatthana/peers/{name}.json", facts | {"seeds": [written(one) for one in found]})
        print(f"{name}: accuracy {facts['accuracy']:.4f}, AURC {facts['aurc']:.5f}", flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
