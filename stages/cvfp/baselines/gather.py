"""All models' numbers in one file, which the page reads -> metrics/cvfp/contest.json.

dvc repro stages/cvfp/baselines/dvc.yaml          (python -m stages.cvfp.baselines.gather)

The file is no out of this pipeline: else the page, which depends on it, would make the default run train all of these.
"""

from pathlib import Path
from typing import Any

from lego.base.artifacts import read_json, write_json
from lego.base.harness import Stage, exit_cleanly
from lego.cvfp.sections import load

GATHERED = Path("metrics/cvfp/contest.json")


def spent(name: str, known: dict[str, Any]) -> dict[str, float | None]:
    """Seconds of a run and the most memory that its process held, which are no metrics: they differ by machine.

    A model that was trained elsewhere keeps what was gathered there; None if that is of another model, or nothing is.
    """
    timing = Path(f"data/timing/cvfp/baselines/{name}.json")
    if timing.exists():
        record = read_json(timing, "seconds_a_run", "peak_mib")
        return {"seconds": record["seconds_a_run"], "peak_mib": record["peak_mib"]}
    return {key: known.get(key) for key in ("seconds", "peak_mib")}


def main() -> None:
    params = load()
    with Stage("cvfp/baselines/gather"):
        before, found = read_json(GATHERED) if GATHERED.exists() else {}, {}
        for name in params.contest.lr:
            file = Path(f"metrics/cvfp/baselines/{name}.json")
            if file.exists():  # the page names the others
                one = read_json(file, "ppl", "bits_per_byte", "parameters", "made_of")
                known = before.get(name, {})
                found[name] = one | spent(name, known if known.get("made_of") == one["made_of"] else {})
        if missing := [name for name in params.contest.lr if name not in found]:
            print(f"not run yet: {', '.join(missing)}")
        write_json(GATHERED, found)


if __name__ == "__main__":
    exit_cleanly(main)
