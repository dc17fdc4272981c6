"""Every line of docs/evidence.md's daily work with experiments, in a temporary clone of this tree with tiny parameters.

python tests/workflow.py            prints each command with what it says; about 5 minutes on 2 cores
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import Clone

MOST_COLUMNS = 16  # of exp show, besides the changed parameter
LINES = """
dvc repro
git add -A
git commit -m baseline
git tag baseline
dvc exp run -S ashem.hard_example_ratio=0.3 -n harder
dvc exp run --queue -S 'ashem.hard_example_ratio=0.1,0.3,0.5,0.7,0.9'
dvc queue start -j 2
dvc queue status
dvc exp show --only-changed --drop '^(data|lego|stages|metrics/details)' --md
dvc metrics diff baseline harder
dvc params diff baseline harder
dvc exp apply harder
dvc metrics diff baseline
dvc repro -s stages/evidence/dvc.yaml:joint@dense
python -m lego.compare metrics/details/ashem.json metrics/details/dense.json
dvc plots diff baseline --out plots
git add -A
git commit -m harder
dvc remote add -d storage ../storage
dvc push
git remote add origin ../origin
dvc exp push origin harder
rm -r data .dvc/cache
dvc pull
dvc gc --workspace --all-tags --force
dvc status dvc.yaml
""".strip().splitlines()


def finished(clone: Clone) -> bool:
    """Whether no queued experiment is waiting or running."""
    status = clone.run("dvc", "queue", "status")
    return not any(word in status for word in ("Queued", "Running"))


def check_table(markdown: str) -> None:
    """The table of experiments has few columns, the changed parameter last, and a row for each experiment."""
    head, _, *rows = [line.strip("| ").split("|") for line in markdown.splitlines() if line.startswith("|")]
    assert head[-1].strip() == "ashem.hard_example_ratio", head
    assert len(head) - 1 <= MOST_COLUMNS, head
    ratios = {row[-1].strip() for row in rows}
    assert {"0.1", "0.3", "0.5", "0.7", "0.9"} <= ratios, rows


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name) / "clone"
        folder.mkdir()
        clone = Clone.of_this_tree(folder)
        clone.run("git", "init", "-q", "--bare", "../origin")
        for line in LINES:
            print(f"$ {line}", flush=True)
            start = time.monotonic()
            if line.startswith("rm "):
                for path in shlex.split(line)[2:]:
                    shutil.rmtree(folder / path)
                continue
            said = clone.run(*shlex.split(line)).strip()
            print(said[-3000:], flush=True)
            if line.startswith("dvc exp show"):
                check_table(said)
            if line.startswith("dvc queue start"):
                while not finished(clone):
                    time.sleep(3)
            print(f"({time.monotonic() - start:.0f} s)\n", flush=True)
        plots = (folder / "plots/index.html").read_text()
        assert "evaluate_routing" in plots
        assert (folder / "data/phase2").exists()


if __name__ == "__main__":
    main()
