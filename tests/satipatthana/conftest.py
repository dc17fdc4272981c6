"""Small Satipatthana systems and parameters that several tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lego.satipatthana.log import SantanaLog
from lego.satipatthana.sections import SatipatthanaParams, changed, load, with_profile
from lego.satipatthana.system import Satipatthana, build
from lego.satipatthana.tasks import Split, Task
from tests.conftest import ROOT

PARAMS = load(ROOT / "stages/satipatthana/params.yaml")
PROFILES = ROOT / "stages/satipatthana/profiles.yaml"
COMPAT = with_profile(PARAMS, "compat", PROFILES)
SMALL = {
    "system.dim": 8,
    "adapter.hidden": 16,
    "vitakka.n_probes": 4,
    "vipassana.prototypes": 6,
    "vipassana.gru_hidden": 5,
    "vipassana.metric_proj": 6,
    "vipassana.hidden": 7,
    "heads.recon_hidden": 16,
    "heads.decoder_hidden": 16,
    "heads.aux_hidden": 8,
}


ONCE = {f"stage{number}__epochs": 1 for number in range(4)}


def small(base: SatipatthanaParams = PARAMS, **changes: Any) -> SatipatthanaParams:
    """Parameters at test size; `stage1__lr=0.1` changes stage1.lr."""
    wanted = SMALL | ({"vipassana.prototypes": 0} if base is COMPAT else {})
    return changed(base, wanted | {key.replace("__", "."): value for key, value in changes.items()}, "test")


def clusters(rows: int = 60, features: int = 12, classes: int = 3, seed: int = 0) -> Split:
    """Rows around a few centres, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    y = torch.arange(rows) % classes
    return Split(torch.tanh(centres[y] + 0.2 * torch.randn(rows, features, generator=generator)), y)


def system(params: SatipatthanaParams, shape: tuple[int, ...] = (12,), seed: int = 0) -> Satipatthana:
    made = build(shape, 3, params, torch.randn(50, *shape, generator=torch.Generator().manual_seed(1)), seed)
    return made.eval()


def a_task(rows: int = 60) -> Task:
    return Task(clusters(rows), clusters(30, seed=1), clusters(30, seed=2), {}, ["a", "b", "c"])


def a_log(rows: int = 6, seed: int = 0) -> SantanaLog:
    """Random ways of different lengths."""
    generator, log = torch.Generator().manual_seed(seed), SantanaLog()
    state = torch.randn(rows, 8, generator=generator)
    log.add(state)
    for step in range(1, 6):
        active = torch.arange(rows) % 5 + 1 >= step
        new = torch.where(active[:, None], state + 0.3 * torch.randn(rows, 8, generator=generator), state)
        log.add(new, (new - state).square().sum(1), active=active)
        state = new
    return log


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each run of the engine is asked for."""
    seen, real = [], Satipatthana.samatha
    monkeypatch.setattr(
        Satipatthana, "samatha", lambda self, x, *rest, **more: seen.append(len(x)) or real(self, x, *rest, **more)
    )
    return seen
