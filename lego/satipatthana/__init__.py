"""Satipatthana: a network that settles on what it sees and says how far it trusts it (docs/satipatthana.md).

It stands on base, report and the steps of training, and knows nothing of ASHEM. `evaluate` and `Protocol` score
any system with this interface; they are loaded when they are asked for, so that no stage depends on them for nothing.
"""

import importlib
from typing import Any

EXPOSED = ("evaluate", "Protocol")


def __getattr__(name: str) -> Any:
    if name in EXPOSED:
        return getattr(importlib.import_module("lego.satipatthana.evaluation"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
