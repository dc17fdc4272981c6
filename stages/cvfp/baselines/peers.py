"""One other model over all seeds -> metrics/cvfp/baselines/<model>.json.

dvc repro stages/cvfp/baselines/dvc.yaml          (python -m stages.cvfp.baselines.peers gru)
"""

from lego.base.harness import exit_cleanly
from lego.cvfp.rivals import compete
from stages.cvfp.baselines.contest import run

if __name__ == "__main__":
    exit_cleanly(lambda: run("peers", compete))
