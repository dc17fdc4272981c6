"""Prints a profile as options of `dvc exp run`: changes to stages/cvfp/params.yaml.

dvc exp run stages/cvfp/dvc.yaml $(python -m stages.cvfp.profile seed)
"""

import sys

from lego.cvfp.sections import SIBLING

if __name__ == "__main__":
    raise SystemExit(SIBLING.print_options(sys.argv[1:]))
