"""The rows of a stage-2 batch: clean, augmented, drunk, mismatched and void, with what their trust should be (6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lego.satipatthana.log import SantanaLog
from lego.satipatthana.settings import PATHS, Stage2Params
from lego.satipatthana.system import Satipatthana
from lego.satipatthana.void import VoidSource, derangement

BLIND = {"conformity": ("mismatch",)}  # paths that a head cannot see: it reads the way alone, not the state


def allocate(shares: dict[str, float], rows: int) -> dict[str, int]:
    """Rows by path, by largest remainder; each path with a share gets at least one (R-6.1).

    Raises:
        ValueError: fewer rows than paths.
    """
    if rows < len(shares):
        raise ValueError(f"a batch of {rows} rows is too small for {len(shares)} paths; raise stage2.batch_size")
    exact = {path: share * rows for path, share in shares.items()}
    counts = {path: max(1, int(one)) for path, one in exact.items()}
    order = sorted(exact, key=lambda path: exact[path] - counts[path], reverse=True)
    while sum(counts.values()) < rows:
        for path in order[: rows - sum(counts.values())]:
            counts[path] += 1
    while sum(counts.values()) > rows:
        counts[max(counts, key=lambda path: counts[path])] -= 1
    return counts


@dataclass(frozen=True)
class Rows:
    """Settled states of a batch with the logs they are shown with, targets in [0, 1], and the path of each row.

    Args:
        state: (B, d), of another row where the path is mismatch.
        log: of B rows.
        recon_error: of `state` against the inputs that were encoded (B, 1).
        encoded: those inputs (B, *shape).
        target: trust that the rows deserve (B,).
        path: index into PATHS (B,).
    """

    state: Tensor
    log: SantanaLog
    recon_error: Tensor
    encoded: Tensor
    target: Tensor
    path: Tensor

    def at(self, places: Tensor) -> Rows:
        parts = (one[places] for one in (self.recon_error, self.encoded, self.target, self.path))
        return Rows(self.state[places], self.log.rows(places), *parts)

    def dealt(self, counts: list[dict[str, int]]) -> Iterator[Rows]:
        """Batches of so many rows by path, which are all rows that there are."""
        of = {path: (self.path == PATHS.index(path)).nonzero()[:, 0] for path in counts[0]}
        parts = [of[path].split([one[path] for one in counts]) for path in of]
        for places in zip(*parts, strict=True):
            yield self.at(torch.cat(places))

    def seen_by(self, head: str) -> Tensor:
        """Rows (B,) whose fault a head can see."""
        hidden = [PATHS.index(path) for path in BLIND.get(head, ())]
        return ~torch.isin(self.path, torch.tensor(hidden, dtype=self.path.dtype))


@dataclass(frozen=True)
class Way:
    """Settled states (B, d), the way to them, and the inputs (B, *shape) that were encoded."""

    state: Tensor
    log: SantanaLog
    encoded: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, system: Satipatthana, x: Tensor) -> Way:
        """What the frozen engine makes of clean inputs, which stays the same over the epochs (6.4b)."""
        thought = system.samatha(x)
        return cls(thought.state, thought.log, thought.encoded)

    def at(self, places: Tensor) -> Way:
        return Way(self.state[places], self.log.rows(places), self.encoded[places])

    @classmethod
    def joined(cls, parts: list[Way]) -> Way:
        state, encoded = (torch.cat([getattr(one, name) for one in parts]) for name in ("state", "encoded"))
        return cls(state, SantanaLog.joined([one.log for one in parts]), encoded)


@torch.no_grad()
def damaged(
    system: Satipatthana,
    clean: Way,
    counts: dict[str, int],
    settings: Stage2Params,
    void: VoidSource | None,
    generator: torch.Generator,
    deserved: Tensor | None = None,
) -> Rows:
    """Runs the frozen engine on rows that are assigned to paths at random (6.4b).

    Clean and mismatched rows have settled already; augmented and void ones settle in one run, as no row looks at
    another, drunk ones in their own.

    Args:
        system: in evaluation mode.
        clean: of clean inputs; as many as all paths but void need are read.
        counts: rows by path.
        settings: upper end of the severities, and what void rows deserve.
        void: source of inputs from outside.
        generator: of every draw.
        deserved: trust (B,) that clean rows deserve, and augmented ones before their noise; default 1.
    """
    x = clean.encoded
    own = {path: count for path, count in counts.items() if path != "void"}
    drawn = torch.randperm(len(x), generator=generator).split([*own.values(), *_rest(x, own)])
    places = dict(zip(own, drawn, strict=False))
    noisy, severity = system.augmenter(x[places.get("augmented", drawn[0][:0])], settings.noise_level, generator)
    kept = [path for path in ("clean", "mismatch") if counts.get(path)]
    ways = {path: clean.at(places[path]) for path in kept}
    targets = {path: x.new_zeros(counts[path]) for path in kept}
    if "clean" in targets:
        targets["clean"] = _deserved(deserved, places["clean"], x)
    fresh = {"augmented": noisy} if len(noisy) else {}
    if counts.get("void"):
        if void is None:
            raise ValueError("paths.void is above 0 and there is no void source")
        fresh["void"] = void.draw(counts["void"], generator)
        targets["void"] = x.new_full((counts["void"],), settings.void_target)
    if len(noisy):
        targets["augmented"] = (1 - severity).clamp(0, 1) * _deserved(deserved, places["augmented"], x)
    if fresh:
        thought = Way.of(system, torch.cat(list(fresh.values())))
        borders = torch.arange(len(thought.state)).split([len(rows) for rows in fresh.values()])
        ways |= {path: thought.at(rows) for path, rows in zip(fresh, borders, strict=True)}
    if counts.get("drunk"):
        drunk = system.samatha(x[places["drunk"]], drunk=True, generator=generator)
        ways["drunk"] = Way(drunk.state, drunk.log, drunk.encoded)
        targets["drunk"] = x.new_zeros(counts["drunk"])
    whole = Way.joined(list(ways.values()))
    path = torch.cat([torch.full((len(way.state),), PATHS.index(name)) for name, way in ways.items()])
    state = _mismatched(whole.state, path, settings, generator) if counts.get("mismatch") else whole.state
    target = torch.cat([targets[name] for name in ways])
    return Rows(state, whole.log, system.recon_error(state, whole.encoded), whole.encoded, target, path)


def _deserved(deserved: Tensor | None, places: Tensor, x: Tensor) -> Tensor:
    return x.new_ones(len(places)) if deserved is None else deserved[places]


def _rest(x: Tensor, own: dict[str, int]) -> list[int]:
    left = len(x) - sum(own.values())
    if left < 0:
        raise ValueError(f"{sum(own.values())} clean rows are needed, got {len(x)}")
    return [left] if left else []


def _mismatched(state: Tensor, path: Tensor, settings: Stage2Params, generator: torch.Generator) -> Tensor:
    """Every mismatch row gets the state of another row; where settings say so, one of any, its own not excluded."""
    rows = (path == PATHS.index("mismatch")).nonzero()[:, 0]
    if settings.mismatch == "permutation":
        pool, order = rows, torch.randperm(len(rows), generator=generator)
    else:
        pool = torch.cat([rows, (path == PATHS.index("clean")).nonzero()[:, 0]])
        order = derangement(len(pool), generator)
    changed = state.clone()
    changed[rows] = state[pool[order[: len(rows)]]]
    return changed


def losses(logits: dict[str, Tensor], rows: Rows, weights: dict[str, float]) -> dict[str, Tensor]:
    """Binary cross-entropy of each head on the rows whose fault it can see, and their weighted sum as `loss`."""
    found = {}
    for head, logit in logits.items():
        seen = rows.seen_by(head)
        found[head] = functional.binary_cross_entropy_with_logits(logit[seen], rows.target[seen])
    return found | {"loss": torch.stack([weights[head] * one for head, one in found.items()]).sum()}


def floor(target: Tensor, path: Tensor, pooled: tuple[str, ...]) -> tuple[float, float]:
    """The lowest loss that a head can reach, and the constant it then gives to the paths it cannot tell apart (R-6.3b).

    Args:
        target, path: of rows (B,).
        pooled: paths that it cannot tell apart; rows of the others reach the entropy of their own target.
    """
    inside = torch.isin(path, torch.tensor([PATHS.index(one) for one in pooled], dtype=path.dtype))
    constant = float(target[inside].mean()) if bool(inside.any()) else float("nan")
    best = torch.where(inside, target.new_full((), constant), target) if bool(inside.any()) else target
    return float(functional.binary_cross_entropy(best.clamp(1e-7, 1 - 1e-7), target)), constant


def floors(rows: Rows, heads: Iterable[str], pooled: tuple[str, ...]) -> dict[str, float]:
    """The floor of every head over the rows that it is trained on: `floor` of trust, `floor_<head>` of the others."""
    found: dict[str, float] = {}
    for head in heads:
        seen = rows.seen_by(head)
        lowest, constant = floor(rows.target[seen], rows.path[seen], pooled if head == "trust" else ())
        found["floor" if head == "trust" else f"floor_{head}"] = lowest
        if head == "trust" and pooled:
            found["pooled_constant"] = constant
    return found


def by_path(rows: Rows, trust: Tensor) -> dict[str, float]:
    """Mean trust (B,), mean target, lowest loss and number of rows of each path."""
    found: dict[str, float] = {}
    for number, path in enumerate(PATHS):
        inside = rows.path == number
        if bool(inside.any()):
            target = rows.target[inside]
            found |= {
                f"trust_{path}": float(trust[inside].mean()),
                f"target_{path}": float(target.mean()),
                f"floor_{path}": floor(target, rows.path[inside], ())[0],
                f"rows_{path}": float(inside.sum()),
            }
    return found
