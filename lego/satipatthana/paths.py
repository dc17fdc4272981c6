"""The rows of a stage-2 batch: clean, augmented, drunk, mismatched and void, with what their trust should be (6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lego.satipatthana.log import SantanaLog
from lego.satipatthana.sections import PATHS, Stage2Params
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
    order = sorted(exact, key=lambda path: exact[path] - int(exact[path]), reverse=True)
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

    def seen_by(self, head: str) -> Tensor:
        """Rows (B,) whose fault a head can see."""
        hidden = [PATHS.index(path) for path in BLIND.get(head, ())]
        return ~torch.isin(self.path, torch.tensor(hidden, dtype=self.path.dtype))


@torch.no_grad()
def damaged(
    system: Satipatthana,
    x: Tensor,
    counts: dict[str, int],
    settings: Stage2Params,
    void: VoidSource | None,
    generator: torch.Generator,
    deserved: Tensor | None = None,
) -> Rows:
    """Runs the frozen engine on a batch whose rows are assigned to paths at random (6.4b).

    Clean, mismatched, augmented and void rows settle in one run, as no row looks at another; drunk ones in their own.

    Args:
        system: in evaluation mode.
        x: clean inputs; as many as all paths but void need are read.
        counts: rows by path.
        settings: upper end of the severities, and what void rows deserve.
        void: source of inputs from outside.
        generator: of every draw.
        deserved: trust (B,) that clean rows deserve, and augmented ones before their noise; default 1.
    """
    own = {path: count for path, count in counts.items() if path != "void"}
    drawn = torch.randperm(len(x), generator=generator).split([*own.values(), *_rest(x, own)])
    parts = {path: x[places] for path, places in zip(own, drawn, strict=False)}
    rights = {path: places.new_ones(len(places), dtype=x.dtype) for path, places in zip(own, drawn, strict=False)}
    if deserved is not None:
        rights = {path: deserved[places] for path, places in zip(own, drawn, strict=False)}
    noisy, severity = system.augmenter(parts.get("augmented", x[:0]), settings.noise_level, generator)
    inputs = {"clean": parts["clean"], "augmented": noisy, "mismatch": parts.get("mismatch", x[:0])}
    if counts.get("void"):
        if void is None:
            raise ValueError("paths.void is above 0 and there is no void source")
        inputs["void"] = void.draw(counts["void"], generator)
    thought = system.samatha(torch.cat(list(inputs.values())))
    state, log, encoded = thought.state, thought.log, thought.encoded
    wanted = {path: severity.new_full((len(rows),), 0.0) for path, rows in inputs.items()}
    wanted["clean"] = rights["clean"]
    wanted["augmented"] = (1 - severity).clamp(0, 1) * rights.get("augmented", severity)
    if "void" in wanted:
        wanted["void"] += settings.void_target
    target = torch.cat(list(wanted.values()))
    path = torch.cat([torch.full((len(rows),), PATHS.index(name)) for name, rows in inputs.items()])
    if len(inputs["mismatch"]):
        state = _mismatched(state, path, generator)
    if counts.get("drunk"):
        drunk = system.samatha(parts["drunk"], drunk=True, generator=generator)
        state, log = torch.cat([state, drunk.state]), SantanaLog.joined([log, drunk.log])
        encoded, target = torch.cat([encoded, drunk.encoded]), torch.cat([target, x.new_zeros(counts["drunk"])])
        path = torch.cat([path, torch.full((counts["drunk"],), PATHS.index("drunk"))])
    return Rows(state, log, system.recon_error(state, encoded), encoded, target, path)


def _rest(x: Tensor, own: dict[str, int]) -> list[int]:
    left = len(x) - sum(own.values())
    if left < 0:
        raise ValueError(f"{sum(own.values())} clean rows are needed, got {len(x)}")
    return [left] if left else []


def _mismatched(state: Tensor, path: Tensor, generator: torch.Generator) -> Tensor:
    """Every mismatch row gets the state of another row that is not its own."""
    rows = (path == PATHS.index("mismatch")).nonzero()[:, 0]
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
