"""The texts that models are measured on, and what is said of their losses there."""

from collections.abc import Mapping

import numpy as np

from lego.evaluation.routed import perplexity
from lego.tokens.blocks import bits_per_byte, corpus_facts

TEXTS = {"": ("data/tokens", "test"), "val_": ("data/tokens", "validation"), "other_": ("data/retention", "test")}
"""By the prefix of their keys: folder and split."""


def measured(losses: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Perplexity and bits per byte on each text, from the losses (n,) in nats there, by prefix."""
    found: dict[str, float | None] = {}
    for prefix, nll in losses.items():
        folder, split = TEXTS[prefix]
        found[f"{prefix}ppl"] = ppl = perplexity(nll)
        found[f"{prefix}bits_per_byte"] = bits_per_byte(ppl, corpus_facts(folder)["splits"][split])
    return found
