"""Inputs from outside of the data: what stage 2 calls unknown while training (specification, 6.4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lego.base.harness import StageError
from lego.satipatthana.sections import SatipatthanaParams
from lego.satipatthana.settings import VoidParams
from lego.satipatthana.tasks import Split

LEAST_WARP = 0.3  # power of two, of at most 1: a warp that is hardly one is none


class VoidError(StageError):
    """A kind of row that cannot be made: none far enough from the data, no windows, no known anomalies."""


class VoidSource:
    """Rows of several kinds, made from train inputs.

    Args:
        x: train inputs (N, *shape).
        y: their classes (N,), so that a mixture is of two different ones; None = any two rows.
        settings: section `void`.
        known: anomalies (k, *shape), of the kind `anomalies`.
        strangers: rows (k, *shape) of another dataset, of the kind `file`.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        settings: VoidParams,
        known: Tensor | None = None,
        strangers: Tensor | None = None,
    ) -> None:
        self.x, self.y, self.settings, self.shown = x, y, settings, {"anomalies": known, "file": strangers}
        self.low, self.high = x.amin(dim=0), x.amax(dim=0)
        self.mean, self.std = x.mean(dim=0), x.std(dim=0, correction=0)

    @classmethod
    def of_task(
        cls, train: Split, params: SatipatthanaParams, known: Tensor | None = None, strangers: Tensor | None = None
    ) -> VoidSource:
        """The source of a task, where rows have classes or not."""
        return cls(train.x, train.y if params.task.job == "classification" else None, params.void, known, strangers)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows (count, *shape), as many of each kind, in random order."""
        kinds = self.settings.kinds
        offset = int(torch.randint(len(kinds), (1,), generator=generator))
        sizes = [len(range((number - offset) % len(kinds), count, len(kinds))) for number in range(len(kinds))]
        rows = torch.cat([self.of(kind, size, generator) for kind, size in zip(kinds, sizes, strict=True) if size])
        return rows[torch.randperm(count, generator=generator)]

    def of(self, kind: str, count: int, generator: torch.Generator) -> Tensor:
        """Rows (count, *shape) of one kind.

        Raises:
            VoidError: filtered_uniform found no row far enough from the data, or there are no rows to draw from.
        """
        shape = (count, *self.x.shape[1:])
        match kind:
            case "gaussian":
                return self.mean + self.std * torch.randn(shape, generator=generator)
            case "uniform":
                return self.low + (self.high - self.low) * torch.rand(shape, generator=generator)
            case "filtered_uniform":
                return self._filtered(count, generator)
            case "mixup":
                one, other = self._pairs(count, generator)
                return (one + other) / 2
            case "cut_paste":
                one, other = self._pairs(count, generator)
                return torch.where(_windows(shape, generator), other, one)
            case "patch_permutation":
                return self._patches(count, generator)
            case "time_warp":
                return self._warped(count, generator)
            case "anomalies" | "file":
                rows = self.shown[kind]
                if rows is None:
                    key = "task.known" if kind == "anomalies" else "task.strangers"
                    raise VoidError(f"void.kinds has {kind}, but the task has no such rows; name some in {key}")
                return rows[torch.randint(len(rows), (count,), generator=generator)]
            case _:  # feature_shuffle: every feature of another row
                rows = torch.randint(len(self.x), shape, generator=generator)
                return self.x.gather(0, rows)

    def _pairs(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two rows each (count, *shape), where there are classes of different ones."""
        one = torch.randint(len(self.x), (count,), generator=generator)
        if self.y is None or len(sizes := torch.bincount(self.y)) < 2 or int(sizes.max()) == len(self.y):
            return self.x[one], self.x[torch.randint(len(self.x), (count,), generator=generator)]
        first, own = (sizes.cumsum(0) - sizes)[self.y[one]], sizes[self.y[one]]  # where its class lies among the sorted
        other = (torch.rand(count, generator=generator, dtype=torch.double) * (len(self.y) - own)).long()
        other += torch.where(other >= first, own, 0)  # past its own class
        return self.x[one], self.x[self.y.argsort(stable=True)[other]]

    def _patches(self, count: int, generator: torch.Generator) -> Tensor:
        """Quarters of an image, or of a row, in another order."""
        rows = self.x[torch.randint(len(self.x), (count,), generator=generator)].flatten(1)
        parts = rows.tensor_split(4, dim=1)
        order = derangements(count, 4, generator)  # (count, 4)
        width = min(part.shape[1] for part in parts)
        stacked = torch.stack([part[:, :width] for part in parts], dim=1)  # (count, 4, w)
        moved = stacked.gather(1, order[:, :, None].expand_as(stacked)).flatten(1)
        return torch.cat([moved, rows[:, moved.shape[1] :]], dim=1).view(count, *self.x.shape[1:])

    def _warped(self, count: int, generator: torch.Generator) -> Tensor:
        """Windows (count, steps, ...) at half to twice their speed, from a place of their own.

        Raises:
            VoidError: rows are no windows.
        """
        if self.x.dim() < 3:
            raise VoidError("void.kinds has time_warp, but the rows of this task are no windows; leave it out")
        rows, steps = self.x[torch.randint(len(self.x), (count,), generator=generator)], self.x.shape[1]
        power, sign, begin = torch.rand(3, count, 1, generator=generator).unbind()
        speed = 2 ** ((LEAST_WARP + (1 - LEAST_WARP) * power) * (sign - 0.5).sign())
        places = (begin * (steps - 1) + speed * torch.arange(steps)) % (2 * (steps - 1))  # there and back again
        places = (steps - 1) - (places - (steps - 1)).abs()  # (count, steps)
        low = places.floor().long().clamp(max=steps - 2)
        share = (places - low).view(count, steps, *[1] * (rows.dim() - 2))
        shape = (count, steps, *[1] * (rows.dim() - 2))
        before, after = (rows.gather(1, one.view(shape).expand_as(rows)) for one in (low, low + 1))
        return torch.lerp(before, after, share)

    def _filtered(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform rows at least min_distance from `reference_rows` of the data."""
        reference = self.x[torch.randperm(len(self.x), generator=generator)[: self.settings.reference_rows]].flatten(1)
        kept: list[Tensor] = []
        for _ in range(self.settings.max_attempts):
            rows = self.of("uniform", count, generator)
            far = torch.cdist(rows.flatten(1), reference).amin(dim=1) >= self.settings.min_distance
            kept.append(rows[far])
            if sum(map(len, kept)) >= count:
                return torch.cat(kept)[:count]
        raise VoidError(
            f"void.filtered_uniform: {sum(map(len, kept))} of {count} rows lie at least {self.settings.min_distance:g} "
            f"from the data after {self.settings.max_attempts} attempts; lower void.min_distance"
        )


def acceptance(source: VoidSource, generator: torch.Generator) -> float:
    """Share of uniform rows that the filter keeps: near 1 it filters nothing, as in many dimensions (R-6.4)."""
    rows = source.of("uniform", source.settings.reference_rows, generator).flatten(1)
    reference = source.x[: source.settings.reference_rows].flatten(1)
    return float((torch.cdist(rows, reference).amin(dim=1) >= source.settings.min_distance).double().mean())


def _windows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """True in a part of each row: a block of half the height and width of an image, else half of the features."""
    count, *rest = shape
    flat = int(np.prod(rest))
    side = round(flat**0.5)
    if len(rest) == 3:
        side = rest[-1]
    elif side * side != flat or len(rest) != 1:  # not an image
        steps = rest[0]
        begin = torch.randint(steps, (count, 1), generator=generator)
        inside = (torch.arange(steps)[None] - begin) % steps < steps // 2  # (count, steps)
        return inside.view(count, steps, *[1] * (len(rest) - 1)).expand(shape)
    corner = torch.randint(side, (count, 2, 1), generator=generator)
    near = (torch.arange(side) - corner) % side < side // 2  # (count, 2, side)
    block = near[:, 0, :, None] & near[:, 1, None, :]  # (count, side, side)
    return block.flatten(1) if len(rest) == 1 else block[:, None].expand(shape)


def derangements(count: int, n: int, generator: torch.Generator) -> Tensor:
    """Random orders (count, n) in which nothing keeps its place: each is one cycle through all of them."""
    cycle = torch.rand(count, n, generator=generator).argsort(dim=1)  # (count, n)
    return torch.empty_like(cycle).scatter_(1, cycle, cycle.roll(1, dims=1))


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """A random order (n,) in which no row keeps its place (R-6.3).

    Raises:
        ValueError: fewer than two rows.
    """
    if n < 2:
        raise ValueError(f"a mismatch needs at least 2 rows, got {n}")
    return derangements(1, n, generator)[0]
