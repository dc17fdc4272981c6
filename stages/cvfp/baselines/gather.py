"""All models' numbers in one file, which the page reads -> metrics/cvfp/contest.json.

dvc repro stages/cvfp/baselines/dvc.yaml          (python -m stages.cvfp.baselines.gather)

The file is no out of this pipeline: else the page, which depends on it, would make the default run train all of these.
"""

from pathlib import Path

from lego.base.artifacts import read_json, write_json
from lego.base.harness import Stage, exit_cleanly
from lego.cvfp.sections import WRITTEN, load


def spent(name: str) -> dict[str, float]:
    """Seconds of a run and the most memory that its process held, which are no metrics: they differ by machine."""
    record = read_json(f"data/timing/cvfp/baselines/{name}.json", "seconds_a_run", "peak_mib")
    return {"seconds": record["seconds_a_run"], "peak_mib": record["peak_mib"]}


def main() -> None:
    params = load()
    with Stage("cvfp/baselines/gather"):
        found = {
            name: read_json(f"metrics/cvfp/baselines/{name}.json", "ppl", "bits_per_byte", "parameters", "made_of")
            | spent(name)
            for name in params.contest.lr
            if Path(f"metrics/cvfp/baselines/{name}.json").exists()  # the page names the others
        }
        if missing := [name for name in params.contest.lr if name not in found]:
            print(f"not run yet: {', '.join(missing)}")
        write_json("metrics/cvfp/contest.json", found)


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
