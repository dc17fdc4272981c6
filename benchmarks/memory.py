"""Peak anonymous memory of each stage on a text and on one ten times as long.

python -m benchmarks.memory --tokens 1000000 10000000

Anonymous memory (RssAnon) is what a process really holds; pages of mapped files count in its resident size too, but the
kernel takes them back when it needs them. The text is the standard library's, its lines drawn anew for every document.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lego.text.sources import stdlib_documents

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tokenize", "train_phase1", "compute_threshold", "collect_hard", "train_phase2")
SETTINGS = {
    "source": "text",
    "path": "text.jsonl",
    "max_tokenizer_bytes": "1000000",
    "dim": "32",
    "num_heads": "2",
    "num_kv_heads": "2",
    "ffn_dim": "64",
    "phase1_layers": "1",
    "phase2_layers": "2",
    "phase1_epochs": "1",
    "phase2_epochs": "1",
}


def write_text(path: Path, tokens: int) -> None:
    """About 4.2 bytes a token, 1.6 times as much as is needed: a part of it is held out."""
    lines = [line for document in stdlib_documents() for line in document.text.splitlines(keepends=True)]
    chooser, size = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while size < 1.6 * 4.2 * tokens:
            text = "".join(chooser.choices(lines, k=120))
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)


def peak_anonymous(stage: str, folder: Path) -> float:
    """MiB."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, int(found[1]) if found else 0)
        time.sleep(0.005)
    if process.wait():
        raise SystemExit(process.stderr.read() if process.stderr else stage)
    return peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 10_000_000])
    arguments = parser.parse_args()
    rows: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            params = (ROOT / "params.yaml").read_text()
            for key, value in (SETTINGS | {"max_train_tokens": str(tokens)}).items():
                params = re.sub(rf"(?m)^(  {key}: )\S+", rf"\g<1>{value}", params)
            (folder / "params.yaml").write_text(params)
            write_text(folder / "text.jsonl", tokens)
            for stage in STAGES:
                rows[stage].append(peak_anonymous(stage, folder))
                print(f"{tokens:,} tokens, {stage}: {rows[stage][-1]:.0f} MiB", flush=True)
            shutil.rmtree(folder / "data")
    print(f"{'peak RssAnon, MiB':>20} " + " ".join(f"{tokens:>12,}" for tokens in arguments.tokens))
    for stage, peaks in rows.items():
        print(f"{stage:>20} " + " ".join(f"{peak:>12.0f}" for peak in peaks))


if __name__ == "__main__":
    main()
