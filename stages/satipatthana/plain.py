"""The plain network that most peers read, for all seeds -> data/satipatthana/plain.

dvc repro stages/satipatthana/dvc.yaml:plain          (python -m stages.satipatthana.plain)
"""

from functools import partial
from pathlib import Path

from lego.base.artifacts import ArtifactError, atomic_folder, derived_seed, read_tensors, write_tensors
from lego.base.harness import Stage, exit_cleanly
from lego.satipatthana.jobs import classification_only
from lego.satipatthana.peers import Plain, networks, plain_network
from lego.satipatthana.sections import SatipatthanaParams, load
from lego.satipatthana.tasks import Task, read_task
from stages.satipatthana.seeds import for_each_seed

FOLDER = "data/satipatthana/plain"


def seed_of(params: SatipatthanaParams, seed: int) -> int:
    """The seed of all peers in a run."""
    return derived_seed(params.seed, f"satipatthana/peers/{seed}")


def read(task: Task, params: SatipatthanaParams, seed: int) -> Plain:
    """The network of a run.

    Raises:
        ArtifactError: it is missing, damaged or of other sizes.
    """
    model, file = plain_network(task, params.peers), f"{FOLDER}/seed_{seed}.safetensors"
    weights = read_tensors(file)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise ArtifactError(f"{file}: is not of these parameters; run dvc repro stages/satipatthana/dvc.yaml") from None
    return model.eval()


def one_seed(params: SatipatthanaParams, folder: Path, seed: int) -> None:
    """Trains and saves."""
    task = read_task("data/satipatthana/task")
    (model,) = networks("plain", task, params.peers, seed_of(params, seed), params.void)
    write_tensors(folder / f"seed_{seed}.safetensors", model.state_dict())


def main() -> None:
    params = load()
    classification_only(params, "the plain network")
    with Stage("satipatthana/plain", params.seed, params.threads), atomic_folder(FOLDER) as folder:
        for_each_seed(partial(one_seed, params, folder), params, light=True)
        print(f"{params.seeds} plain networks of {params.peers.epochs} epochs", flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
