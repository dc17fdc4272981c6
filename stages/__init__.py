"""One script per DVC stage: reads its deps, calls lego, writes its outs."""

import os
import signal
import sys
from importlib.util import find_spec

from lego.base.experiments import side_by_side

# a stage runs the first `python` on PATH; without the virtual environment that is another one, and imports would fail
if missing := [name for name in ("torch", "pydantic", "safetensors", "tokenizers", "datasets") if not find_spec(name)]:
    sys.exit(
        f"error: {sys.executable} lacks {', '.join(missing)}: run . .venv/bin/activate first, "
        "then pip install -r requirements.txt"
    )


if side_by_side() > 1:
    # threads of OpenMP spin while they wait, which doubles the speed of a small model that has the cores to itself, and
    # takes them from whoever shares them: two runs are then slower than one after the other. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _interrupted(*_: object) -> None:
    """Ctrl-C at any moment, imports included. A stage may die at any moment, so nothing is cleaned up."""
    os.write(2, b"\nerror: interrupted; dvc repro goes on, after the last finished epoch or shard\n")
    os._exit(130)


if sys.argv[0] == "-m":  # run as a stage, not imported by a test
    signal.signal(signal.SIGINT, _interrupted)
