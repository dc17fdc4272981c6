"""A profile as options of `dvc exp run`.

dvc exp run stages/satipatthana/dvc.yaml $(python -m stages.satipatthana.profile compat)
"""

import sys

from lego.satipatthana.sections import SIBLING

if __name__ == "__main__":
    raise SystemExit(SIBLING.print_options(sys.argv[1:]))
