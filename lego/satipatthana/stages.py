"""The curriculum: four stages, each with a trainable part, data and a loss of its own (specification, 5).

`run_stage` builds optimizer and schedule anew for every stage, so that nothing of the stage before is left in them
(R-8.2), and checks before it begins that what should learn can (R-8.12).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lego.harness import StageError
from lego.progress import track
from lego.satipatthana.paths import allocate, damaged, floor, losses
from lego.satipatthana.sections import PATHS, SatipatthanaParams, StageParams
from lego.satipatthana.system import Satipatthana
from lego.satipatthana.tasks import Split
from lego.satipatthana.void import VoidSource, acceptance

TRAINABLE = {
    0: ("adapter", "adapter_recon"),
    1: ("adapter", "vitakka", "vicara", "samatha_recon", "aux"),
    2: ("vipassana",),
    3: ("decoder",),
}
LEAST_DISTINCT = 0.5  # share of train rows whose settled states differ, below which a stage is not begun
VACUOUS = 0.99  # share of uniform rows that a filter keeps, above which it is none
PLATEAU = 0.01  # of what a loss has fallen by before: the least fall that counts as progress
RESTED = 1e-3  # relative length of the last step below which states have settled
FOLDS = 5
POOLED = {"dynamics2": ("clean", "augmented", "mismatch"), "grounded8": ()}  # what a trust head cannot tell apart


class StageCheckError(StageError):
    """A stage that would train nothing, or on states that are all alike; the message says which."""


@dataclass(frozen=True)
class StageSpec:
    """What a stage trains, and how.

    Args:
        number: 0 to 3.
        settings: epochs, rate, batch size, clipping.
        loss: of the rows at some places (B,), with draws of a generator: terms by name, `loss` among them.
        rows: to learn from.
        least: rows of a batch that its loss can be taken of.
    """

    number: int
    settings: StageParams
    loss: Callable[[Tensor, torch.Generator], dict[str, Tensor]]
    rows: int
    least: int = 2


def trainable(system: Satipatthana, number: int) -> list[nn.Parameter]:
    """Freezes all but a stage's part, puts the frozen part into evaluation mode, and returns the trainable parameters.

    Raises:
        StageCheckError: the set is empty.
    """
    system.requires_grad_(False)
    system.eval()
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


def batches(spec: StageSpec, generator: torch.Generator) -> Iterator[Tensor]:
    """Places (B,) in random order; a last batch of fewer than `least` rows is left out.

    Raises:
        StageCheckError: there are fewer rows than that.
    """
    if spec.rows < spec.least:
        raise StageCheckError(f"stage {spec.number}: needs at least {spec.least} train rows, got {spec.rows}")
    for places in torch.randperm(spec.rows, generator=generator).split(spec.settings.batch_size):
        if len(places) >= spec.least:
            yield places


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
    check_gradients(system, spec, torch.Generator().manual_seed(seed))
    optimizer = AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=True)
    per_epoch = sum(1 for _ in batches(spec, torch.Generator().manual_seed(seed)))
    total = per_epoch * settings.epochs
    schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))
    history = []
    for epoch in range(settings.epochs):
        sums: dict[str, float] = {}
        work = batches(spec, generator)
        for places in track(work, per_epoch, f"stage {spec.number}, epoch {epoch + 1}/{settings.epochs}", "batch"):
            terms = spec.loss(places, generator)
            if not torch.isfinite(terms["loss"]):
                raise FloatingPointError(f"stage {spec.number}: the loss is not finite; lower stage{spec.number}.lr")
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
            optimizer.step()
            schedule.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach()) / per_epoch
        history.append(sums)
        if settings.patience and finished(spec.number, history, settings.patience):
            print(f"stage {spec.number}: nothing changes any more; it ends after epoch {epoch + 1}", flush=True)
            break
    system.requires_grad_(False)
    system.eval()
    return history


def finished(number: int, history: list[dict[str, float]], patience: int) -> bool:
    """Whether a stage may end before its epochs are over (R-5.7).

    All once the last epochs have added less than a hundredth to what the loss has fallen by before, in stage 2 the
    distance of trust's loss from its floor; stage 1 only if states have settled as well, measured by their last step.
    These are losses on train rows, of which stage 2 draws damage and strangers anew in every epoch.

    Args:
        number: of the stage.
        history: terms by epoch.
        patience: epochs that count as the last ones.
    """
    if len(history) <= patience:
        return False
    values = [one["trust"] - one["floor"] if number == 2 else one["loss"] for one in history]
    before, last = min(values[:-patience]), min(values[-patience:])
    stands = before - last <= PLATEAU * (values[0] - before)
    return stands and (number != 1 or all(one["residual"] < RESTED for one in history[-patience:]))


def cross_fitted(states: Tensor, y: Tensor, seed: int) -> Tensor:
    """Whether a guide that was fitted on other rows tells the class of each state (n, d) -> (n,) of 0 and 1 (R-9.4).

    The guide is a logistic regression. The states come of a stage 1 that has seen all rows and their classes, so this
    finds fewer errors than unseen rows have. Rows of a class with fewer rows than folds are taken as right.
    """
    counts = torch.bincount(y)
    judged = counts[y] >= FOLDS  # (n,)
    right = torch.ones(len(y))
    if len(torch.unique(y[judged])) < 2:
        print(f"stage 2: no two classes have {FOLDS} rows, so every clean row deserves trust", flush=True)
        return right
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    rows, labels = states[judged].double().numpy(), y[judged].numpy()
    guess = cross_val_predict(LogisticRegression(max_iter=500), rows, labels, cv=folds)
    right[judged] = torch.from_numpy(guess == labels).float()
    return right


def deserved(train: Split, states: Tensor, correctness: bool, seed: int) -> Tensor:
    """Trust (n,) that clean train rows with these settled states (n, d) deserve (R-9.4)."""
    if train.deserved is not None:
        return train.deserved
    return cross_fitted(states, train.y, seed) if correctness else torch.ones(len(train))


def check_gradients(system: Satipatthana, spec: StageSpec, generator: torch.Generator) -> list[str]:
    """One backward pass without a step: every trainable parameter must have a gradient (R-8.12).

    Returns:
        names of the trainable parameters.

    Raises:
        StageCheckError: some have none; the message names them.
    """
    named = {name: one for name, one in system.named_parameters() if one.requires_grad}
    before = {name: buffer.clone() for name, buffer in system.named_buffers()}  # BatchNorm counts what it sees
    places = next(batches(spec, generator))
    spec.loss(places, generator)["loss"].backward()
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


def check_states(system: Satipatthana, x: Tensor) -> dict[str, float]:
    """How different latents, starts and settled states of inputs (B, *shape) are (R-8.4, R-8.12).

    Raises:
        StageCheckError: the states are all alike.
    """
    with torch.no_grad():
        thought = system.samatha(x)
    rows = functional.normalize(thought.state, dim=1)
    cosine = float((rows.sum(dim=0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1)))
    distinct = distinct_share(thought.state)
    facts = {"cosine": cosine, "distinct": distinct, "z_std": float(thought.latent.std())}
    facts |= {"s0_std": float(thought.log.initial.std()), "gates_open": float(thought.meta.gate_open.double().mean())}
    if distinct < LEAST_DISTINCT:
        raise StageCheckError(
            f"settled states are alike: {100 * distinct:.0f} % of {len(x)} rows are distinct, mean cosine "
            f"{cosine:.3f}; lower the thresholds of the gate in vitakka"
        )
    return facts


def spec_of(number: int, system: Satipatthana, train: Split, params: SatipatthanaParams, seed: int) -> StageSpec:
    """The specification of a stage of the curriculum, with what its frozen part makes cached where it stays the same.

    Args:
        number: 0 to 3.
        system: as the stage before left it.
        train: inputs and classes.
        params: all of them.
        seed: of prototypes.
    """
    if number == 0:
        return StageSpec(0, params.stage0, lambda places, _: _stage0(system, train.x[places]), len(train))
    if number == 1:
        return StageSpec(
            1, params.stage1, lambda places, generator: _stage1(system, train, places, generator), len(train)
        )
    if number == 2:
        return _stage2(system, train, params, seed)
    with torch.no_grad():  # frozen thinking is a pure function
        found = system(train.x)

    def loss(places: Tensor, _: torch.Generator) -> dict[str, Tensor]:
        answered = system.decoder(found.s_star[places], found.v_ctx[places])
        return {"loss": functional.cross_entropy(answered, train.y[places])}

    return StageSpec(3, params.stage3, loss, len(train))


def _stage0(system: Satipatthana, x: Tensor) -> dict[str, Tensor]:
    return {"loss": functional.mse_loss(system.adapter_recon(system.adapter(x)), x)}


def diversity(probes: Tensor, squared: bool) -> Tensor:
    """Mean off-diagonal cosine of probes (K, d), or of its square: the plain mean is as low for two opposite clusters
    as for probes that are spread, so it does not prevent collapse (R-8.10)."""
    rows = functional.normalize(probes, dim=1)
    cosines = rows @ rows.T
    k = len(rows)
    values = cosines.square() if squared else cosines
    return (values.sum() - values.diagonal().sum()) / (k * (k - 1))


def usage(shares: Tensor) -> Tensor:
    """Minus the entropy of the mean attention (B, K) over a batch, as a share of log K: -1 where all are used alike."""
    mean = shares.mean(dim=0)
    return (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum() / torch.log(torch.tensor(float(len(mean))))


def _stage1(system: Satipatthana, train: Split, places: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    settings = system.params.stage1
    thought = system.samatha(train.x[places], settings.noise_level, generator=generator)
    last, before = thought.pair
    terms = {
        "stability": (last - before).square().sum(dim=1).mean(),
        "recon": system.recon_error(thought.state, thought.encoded).mean(),
        "diversity": diversity(system.vitakka.probes, settings.squared_diversity),
        "usage": usage(thought.meta.probs),
    }
    if system.aux is not None:
        terms["guidance"] = functional.cross_entropy(system.aux(thought.state), train.y[places])
    weighted = [getattr(settings, f"weight_{name}") * term for name, term in terms.items()]
    residual = (last - before).norm(dim=1) / last.norm(dim=1).clamp_min(torch.finfo(last.dtype).tiny)
    return terms | {"loss": torch.stack(weighted).sum(), "residual": residual.mean().detach()}


def start_probes(system: Satipatthana, x: Tensor, seed: int) -> None:
    """Probes at the centres of the latents of train inputs, if vitakka.init says k_means; before stage 1."""
    if system.params.vitakka.init != "k_means":
        return
    with torch.no_grad():
        latents = functional.normalize(system.adapter(x), dim=1).double().numpy()
    if system.params.vitakka.n_probes > len(x):
        wanted = system.params.vitakka.n_probes
        raise StageCheckError(f"vitakka.n_probes is {wanted}, but there are only {len(x)} train rows; lower it")
    centres = KMeans(system.params.vitakka.n_probes, n_init=4, random_state=seed % 2**32).fit(latents).cluster_centers_
    system.vitakka.load_probes(torch.from_numpy(centres).float())


def _stage2(system: Satipatthana, train: Split, params: SatipatthanaParams, seed: int) -> StageSpec:
    settings, shares = params.stage2, params.paths.shares()
    source = VoidSource(train.x, train.y, params.void) if "void" in shares else None
    weights = {head: getattr(params.vipassana, f"weight_{head}") for head in ("trust", "conformity", "confidence")}
    pooled = POOLED[params.vipassana.trust_features]
    if (wanted := params.vipassana.prototypes) > len(train) and system.vipassana.grounded:
        raise StageCheckError(f"vipassana.prototypes is {wanted}, but there are only {len(train)} train rows; lower it")
    if source is not None and "filtered_uniform" in params.void.kinds:
        kept = acceptance(source, torch.Generator().manual_seed(seed))
        if kept > VACUOUS:
            print(
                f"warning: void.min_distance keeps {100 * kept:.1f} % of uniform rows, so it filters nothing",
                flush=True,
            )
    with torch.no_grad():
        system.eval()
        thought = system.samatha(train.x)
        system.vipassana.learn_range(thought.state, lambda: system.look(thought)[0].features, seed)
    right = deserved(train, thought.state, settings.correctness, seed)

    def loss(places: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        counts = allocate(shares, len(places))
        rows = damaged(system, train.x[places], counts, settings, source, generator, right[places])
        scores = system.view(rows.state, rows.log, rows.recon_error).scores()
        terms = losses(scores, rows, weights)
        lowest, constant = floor(rows.target, rows.path, pooled)
        facts = {"floor": torch.tensor(lowest)}
        if pooled:
            facts["pooled_constant"] = torch.tensor(constant)
        for number, path in enumerate(PATHS):
            if bool((rows.path == number).any()):
                facts[f"trust_{path}"] = torch.sigmoid(scores["trust"][rows.path == number]).mean().detach()
        return terms | facts

    return StageSpec(2, settings, loss, len(train), len(shares))


def build(shape: tuple[int, ...], outputs: int, params: SatipatthanaParams, train: Tensor, seed: int) -> Satipatthana:
    """A fresh system from a seed, whose noise is in units of the train inputs' deviation."""
    torch.manual_seed(seed)
    system = Satipatthana(shape, outputs, params)
    system.augmenter.scale.copy_(train.std())
    return system
