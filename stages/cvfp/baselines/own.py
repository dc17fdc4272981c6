"""One of CVFP's own forms over all seeds -> metrics/cvfp/baselines/<form>.json.

dvc repro stages/cvfp/baselines/dvc.yaml          (python -m stages.cvfp.baselines.own sound)
"""

from functools import partial

from lego.base.harness import exit_cleanly
from lego.cvfp.forms import compete
from stages.cvfp.baselines.contest import run

if __name__ == "__main__":
    exit_cleanly(lambda: run("own", partial(compete, blind_heads=True)))
