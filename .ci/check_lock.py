"""Fails if a dvc.lock was not made by this code, these parameters and these commands, or if metrics differ.

In a fresh clone the data is absent, which `dvc status` reports as deleted or not in cache; all else is a mismatch.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TARGETS = (  # baselines run when asked for, but the page of the evidence is that of its records
    "dvc.yaml",
    "stages/cvfp/dvc.yaml",
    "stages/satipatthana/dvc.yaml",
    "stages/evidence/dvc.yaml:report",
)


def mismatches(entry: Any, place: str = "") -> list[str]:
    """Leaves of dvc's status tree other than absent data."""
    if isinstance(entry, dict):
        return [found for key, value in entry.items() for found in mismatches(value, f"{place} {key}".strip())]
    if isinstance(entry, list):
        return [found for value in entry for found in mismatches(value, place)]
    absent = entry in {"deleted", "not in cache"} and place.split()[-1].startswith("data/")
    return [] if absent else [f"{place}: {entry}"]


def main() -> int:
    ran = [target for target in TARGETS if Path(target.partition(":")[0]).with_suffix(".lock").exists()]
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json", *ran], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    found = mismatches(json.loads(done.stdout))
    for line in found:
        print(f"dvc.lock: {line}; run dvc repro and commit dvc.lock and metrics/", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
