"""Changes to the profile `sound` that were tried, one at a time."""

from __future__ import annotations

import hashlib
import json

from lego.cvfp.contest import OF_ALL, OF_OWN
from lego.cvfp.sections import CvfpParams


def trial_digest(params: CvfpParams, text: dict[str, str]) -> str:
    """Digest of what a trial's numbers come from: its parameters, its seeds and the text.

    Args:
        params: with the trial's changes.
        text: digests of the ids by split.
    """
    values = params.model_dump()
    used = {key: values[key] for key in (*OF_ALL, *OF_OWN)} | {"seeds": params.contest.trial_seeds, "text": text}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()
