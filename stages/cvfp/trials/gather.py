"""All trials in one file, which the page reads -> metrics/cvfp/trials.json.

dvc repro stages/cvfp/trials/dvc.yaml          (python -m stages.cvfp.trials.gather)

The file is no out of this pipeline: else the page, which depends on it, would make the default run train all of these.
"""

from lego.base.artifacts import read_json, write_json
from lego.base.harness import Stage, exit_cleanly
from lego.cvfp.sections import load


def main() -> None:
    params = load()
    with Stage("cvfp/trials/gather"):
        found = {name: read_json(f"metrics/cvfp/trials/{name}.json", "made_of") for name in params.contest.trials}
        write_json("metrics/cvfp/trials.json", found)


if __name__ == "__main__":
    exit_cleanly(main)
