"""One script per DVC stage: reads its deps, calls lego, writes its outs."""

import sys
from importlib.util import find_spec

# a stage runs the first `python` on PATH; without the virtual environment that is another one, and imports would fail
if missing := [name for name in ("torch", "pydantic", "safetensors", "tokenizers", "datasets") if not find_spec(name)]:
    sys.exit(
        f"error: {sys.executable} lacks {', '.join(missing)}: run . .venv/bin/activate first, "
        "then pip install -r requirements.txt"
    )
