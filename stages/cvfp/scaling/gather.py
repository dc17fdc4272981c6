"""The curve over train text in one file, which the page reads, with that of a 5-gram -> metrics/cvfp/scaling.json.

dvc repro stages/cvfp/scaling/dvc.yaml          (python -m stages.cvfp.scaling.gather)

The file is no out of this pipeline: else the page, which depends on it, would make the default run train all of these.
"""

import math
from typing import Any

from lego.base.artifacts import read_json, write_json
from lego.base.harness import Stage, exit_cleanly
from lego.cvfp.contest import made_of
from lego.cvfp.sections import load
from lego.cvfp.text import Text, read_text_ids
from lego.text.ngram import KneserNey


def fivegram(text: Text) -> float:
    """Held-out perplexity of an interpolated Kneser-Ney 5-gram."""
    ids = {split: one.numpy() for split, one in text.ids.items()}
    return math.exp(KneserNey(ids["train"], text.vocab_size).nll(ids["test"]))


def main() -> None:
    params = load()
    scaling = params.contest.scaling
    with Stage("cvfp/scaling/gather"):
        found: dict[str, Any] = {
            name: read_json(f"metrics/cvfp/scaling/{name}.json", "made_of") for name in scaling.models
        }
        text = read_text_ids("data/cvfp/tokens")
        found["fivegram"] = {f"{share:g}": {"ppl_0": fivegram(text.first(share))} for share in scaling.shares}
        found["fivegram"]["made_of"] = made_of("fivegram", params, text.digests())
        write_json("metrics/cvfp/scaling.json", found)


if __name__ == "__main__":
    exit_cleanly(main)
