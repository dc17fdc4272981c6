"""The parameters of params.yaml; lego/base/params.py reads them.

python -m lego.params            checks params.yaml and says what is wrong with it
"""

from lego.base.parameter_files import ParamsError, read_params
from lego.base.params import Params, load_params, main

__all__ = ["Params", "ParamsError", "load_params", "main", "read_params"]

if __name__ == "__main__":
    raise SystemExit(main())
