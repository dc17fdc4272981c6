"""A profile as options of `dvc exp run`.

dvc exp run stages/satipatthana/dvc.yaml $(python -m stages.satipatthana.profile compat)
"""

import sys

from lego.base.harness import StageError, exit_cleanly
from lego.base.profiles import options
from lego.satipatthana.sections import PARAMS, WRITTEN, profiles


def main() -> None:
    known = profiles()
    if len(sys.argv) != 2 or sys.argv[1] not in known:
        raise StageError(f"give one of the profiles {', '.join(known)}")
    print(options(known[sys.argv[1]], PARAMS))


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
