"""Runs a stage in this folder, those of the root pipeline too: params.yaml from extend.yaml, own data/ and metrics/.

python here.py stages.train_phase2
"""

import resource
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(module: str) -> None:
    sys.path[0] = str(ROOT)  # in place of this folder
    sys.argv = sys.argv[1:]
    from lego.base.harness import exit_cleanly
    from stages.extend.settings import load_settings, write_params

    exit_cleanly(lambda: write_params(load_settings()))
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        from lego.base.artifacts import write_json

        name = module.rpartition(".")[2] if len(sys.argv) == 1 else sys.argv[1]
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scale = 2**20 if sys.platform == "darwin" else 2**10  # there in bytes
        write_json(f"data/memory/{name}.json", {"peak_mib": kibibytes / scale})


if __name__ == "__main__":
    main(sys.argv[1])
