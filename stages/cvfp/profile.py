"""Prints a profile as options of `dvc exp run`: changes to stages/cvfp/params.yaml.

dvc exp run stages/cvfp/dvc.yaml $(python -m stages.cvfp.profile seed)
"""

import sys

from lego.base.params import ParamsError
from lego.base.profiles import options
from lego.cvfp.sections import PARAMS, load, profiles, with_profile


def main() -> int:
    names = list(profiles())
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        print(f"error: give one of the profiles {', '.join(names)}", file=sys.stderr)
        return 1
    try:
        with_profile(load(), sys.argv[1])
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options(profiles()[sys.argv[1]], PARAMS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
