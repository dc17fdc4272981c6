"""How a stage of the curriculum trains its own part of the system, and when it ends (specification, 5).

`run_stage` builds optimizer and schedule anew for every stage, so that nothing of the stage before is left in them
(R-8.2), and checks before it begins that what should learn can (R-8.12).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lego.base.harness import StageError
from lego.base.progress import track
from lego.satipatthana.settings import StageParams
from lego.satipatthana.system import Satipatthana

TRAINABLE = {
    0: ("adapter", "adapter_recon"),
    1: ("adapter", "vitakka", "vicara", "samatha_recon", "aux"),
    2: ("vipassana",),
    3: ("decoder",),
}
LEAST_DISTINCT = 0.5  # share of train rows whose settled states differ, below which a stage is not begun
LEAST_SPREAD = 1e-4  # deviation over rows of latents and of start states, below which they are alike
PLATEAU = 0.01  # of what a loss has fallen by before: the least fall that counts as progress
RESTED = 1e-3  # relative length of the last step below which states have settled


class StageCheckError(StageError):
    """A stage that would train nothing, or on states that are all alike; the message says which."""


def the_places(epoch: list[Tensor], _: torch.Generator) -> Iterable[Tensor]:
    """The places (B,) of each batch as they are."""
    return epoch


@dataclass(frozen=True)
class StageSpec:
    """What a stage trains, and how.

    Args:
        number: 0 to 3.
        settings: epochs, rate, batch size, clipping.
        loss: of a batch, with draws of a generator: terms by name, `loss` among them.
        rows: to learn from.
        least: rows of a batch that its loss can be taken of.
        draw: batches of an epoch, of the places (B,) of the rows of each, with draws of the generator.
        held_out: terms of rows that are not learned from, after each epoch.
    """

    number: int
    settings: StageParams
    loss: Callable[[Any, torch.Generator], dict[str, Tensor]]
    rows: int
    least: int = 2
    draw: Callable[[list[Tensor], torch.Generator], Iterable[Any]] = the_places
    held_out: Callable[[], dict[str, float]] = dict


def freeze(system: Satipatthana) -> None:
    """Evaluation mode for all parts, but for the probes where `vitakka.frozen_as` says so, as the original had it."""
    system.eval()
    system.vitakka.train(system.params.vitakka.frozen_as == "training")


def trainable(system: Satipatthana, number: int) -> list[nn.Parameter]:
    """Freezes all but a stage's part, puts the frozen part into evaluation mode, and returns the trainable parameters.

    Raises:
        StageCheckError: the set is empty.
    """
    system.requires_grad_(False)
    freeze(system)
    found = []
    for name in TRAINABLE[number]:
        module = getattr(system, name)
        if module is not None:
            module.requires_grad_(True)
            module.train()
            found += list(module.parameters())
    if number == 1 and not system.params.vitakka.probe_trainable:
        system.vitakka.probes.requires_grad_(False)
    if number == 2 and not system.vipassana.grounded:  # no loss of the note's stage 2 reaches its context
        system.vipassana.context.requires_grad_(False)
    found = [parameter for parameter in found if parameter.requires_grad]
    if not found:
        raise StageCheckError(f"stage {number}: there is nothing to train")
    return found


def dealt(rows: int, size: int, least: int, generator: torch.Generator) -> list[Tensor]:
    """Places (B,) of so many rows in random order, by batch; a last batch of fewer than `least` is left out."""
    return [places for places in torch.randperm(rows, generator=generator).split(size) if len(places) >= least]


def batches(spec: StageSpec, generator: torch.Generator) -> list[Tensor]:
    """The batches of an epoch of a stage; see `dealt`.

    Raises:
        StageCheckError: there are fewer rows than that.
    """
    if spec.rows < spec.least:
        raise StageCheckError(f"stage {spec.number}: needs at least {spec.least} train rows, got {spec.rows}")
    return dealt(spec.rows, spec.settings.batch_size, spec.least, generator)


def run_stage(system: Satipatthana, spec: StageSpec, seed: int) -> list[dict[str, float]]:
    """Trains one stage in place; returns the mean of every term by epoch.

    Args:
        system: as the stage before left it.
        spec: of the stage.
        seed: of order, noise and damage.

    Raises:
        StageCheckError: nothing to train, or a parameter without gradient.
        FloatingPointError: the loss is not finite.
    """
    generator, settings = torch.Generator().manual_seed(seed), spec.settings
    parameters = trainable(system, spec.number)
    names = check_gradients(system, spec, torch.Generator().manual_seed(seed))
    print(f"stage {spec.number}: {len(names)} tensors learn: {', '.join(names)}", flush=True)
    torch.manual_seed(seed)  # of dropout: else it would follow from what was initialized before
    optimizer = AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=True)
    per_epoch = len(batches(spec, torch.Generator().manual_seed(seed)))
    total = per_epoch * settings.epochs
    schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))
    history = []
    for epoch in range(settings.epochs):
        sums: dict[
            str, float
        ] = {}  # not by lego.training.steps.run_epoch, which knows of one loss where these are many
        work = spec.draw(batches(spec, generator), generator)
        for batch in track(work, per_epoch, f"stage {spec.number}, epoch {epoch + 1}/{settings.epochs}", "batch"):
            terms = spec.loss(batch, generator)
            if not torch.isfinite(terms["loss"]):
                raise FloatingPointError(f"stage {spec.number}: the loss is not finite; lower stage{spec.number}.lr")
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
            optimizer.step()
            schedule.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach()) / per_epoch
        history.append(sums | spec.held_out())
        if settings.patience and finished(spec.number, history, settings.patience):
            print(f"stage {spec.number}: nothing changes any more; it ends after epoch {epoch + 1}", flush=True)
            break
    system.requires_grad_(False)
    system.eval()
    return history


def finished(number: int, history: list[dict[str, float]], patience: int) -> bool:
    """Whether a stage may end before its epochs are over (R-5.7).

    All once the last epochs have added less than a hundredth to what the loss has fallen by before, in stage 2 the
    distance of trust's loss on validation rows from its floor; stage 1 only if states have settled as well, measured by
    their last step.

    Args:
        number: of the stage.
        history: terms by epoch.
        patience: epochs that count as the last ones.
    """
    if len(history) <= patience:
        return False
    values = [one["validation"] - one["validation_floor"] if number == 2 else one["loss"] for one in history]
    before, last = min(values[:-patience]), min(values[-patience:])
    stands = before - last <= PLATEAU * (values[0] - before)
    return stands and (number != 1 or all(one["residual"] < RESTED for one in history[-patience:]))


def check_gradients(system: Satipatthana, spec: StageSpec, generator: torch.Generator) -> list[str]:
    """One backward pass without a step: every trainable parameter must have a gradient (R-8.12).

    Returns:
        names of the trainable parameters.

    Raises:
        StageCheckError: some have none; the message names them.
    """
    named = {name: one for name, one in system.named_parameters() if one.requires_grad}
    before = {name: buffer.clone() for name, buffer in system.named_buffers()}  # BatchNorm counts what it sees
    (batch,) = spec.draw(batches(spec, generator)[:1], generator)
    spec.loss(batch, generator)["loss"].backward()
    without = [name for name, one in named.items() if one.grad is None]
    system.zero_grad(set_to_none=True)
    for name, buffer in system.named_buffers():
        buffer.copy_(before[name])
    if without:
        raise StageCheckError(f"stage {spec.number}: no gradient reaches {', '.join(without)}")
    return list(named)


def distinct_share(states: Tensor) -> float:
    """Share of states (B, d) that differ from each other, to a thousandth."""
    return len(torch.unique((states / 1e-3).round(), dim=0)) / len(states)


def check_states(system: Satipatthana, x: Tensor, settles: bool = True) -> dict[str, float]:
    """How different latents, starts and settled states of inputs (B, *shape) are (R-8.4, R-8.12).

    Args:
        system: in evaluation mode.
        x: train inputs.
        settles: whether it has learned to; before, states may be alike.

    Raises:
        StageCheckError: the states, or what they are made of, are all alike.
    """
    with torch.no_grad():
        thought = system.samatha(x)
    cosine, distinct = mean_cosine(thought.state), distinct_share(thought.state)
    facts = {"cosine": cosine, "distinct": distinct}
    facts |= {"z_std": _spread(thought.latent), "s0_std": _spread(thought.log.initial)}
    facts["gates_open"] = float(thought.meta.gate_open.double().mean())
    if settles and distinct < LEAST_DISTINCT:
        raise StageCheckError(
            f"settled states are alike: {100 * distinct:.0f} % of {len(x)} rows are distinct, mean cosine "
            f"{cosine:.3f}; lower the thresholds of the gate in vitakka"
        )
    for name, what in (("z_std", "latents"), *((("s0_std", "start states"),) if settles else ())):
        if facts[name] < LEAST_SPREAD:
            raise StageCheckError(
                f"{what} of {len(x)} rows are alike: their deviation over rows is {facts[name]:.1e}; train stage 0 "
                "longer, or look for features that never change"
            )
    return facts


def mean_cosine(states: Tensor) -> float:
    """Mean cosine of states (B, d) with each other."""
    rows = functional.normalize(states, dim=1)
    return float((rows.sum(dim=0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1)))


def _spread(rows: Tensor) -> float:
    """Deviation over rows (B, d), the mean over dimensions."""
    return float(rows.std(dim=0, correction=0).mean())
