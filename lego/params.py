"""The parameters of params.yaml; lego/base/params.py reads them.

python -m lego.params            checks params.yaml and says what is wrong with it
"""

from lego.base.params import Params, ParamsError, load_params, main, read_params

__all__ = ["Params", "ParamsError", "load_params", "main", "read_params"]

if __name__ == "__main__":
    raise SystemExit(main())
