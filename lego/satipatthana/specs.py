"""What each stage of the curriculum learns from: rows and losses (specification, 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional

from lego.satipatthana import jobs
from lego.satipatthana.merit import deserved, guided
from lego.satipatthana.paths import Rows, Way, allocate, by_path, damaged, floors, losses
from lego.satipatthana.sections import SatipatthanaParams
from lego.satipatthana.system import Satipatthana
from lego.satipatthana.tasks import Split
from lego.satipatthana.training import StageCheckError, StageSpec, freeze
from lego.satipatthana.void import VoidError, VoidSource, acceptance

VACUOUS = 0.99  # share of uniform rows that a filter keeps, above which it is none
TOGETHER = 4096  # rows of stage 2 that settle in one run, where none looks at another
POOLED = {"dynamics2": ("clean", "augmented", "mismatch"), "grounded8": ()}  # what a trust head cannot tell apart


def spec_of(
    number: int,
    system: Satipatthana,
    train: Split,
    params: SatipatthanaParams,
    seed: int,
    known: Tensor | None = None,
    strangers: Tensor | None = None,
    validation: Split | None = None,
) -> StageSpec:
    """The specification of a stage of the curriculum, with what its frozen part makes cached where it stays the same.

    Args:
        number: 0 to 3.
        system: as the stage before left it.
        train: inputs and classes.
        params: all of them.
        seed: of prototypes, folds of the guide, and the damage of validation rows.
        known: anomalies (k, *shape) of the job anomaly, which a guide is told of and void rows are drawn from.
        strangers: rows (k, *shape) of another dataset, which void rows are drawn from.
        validation: rows that stage 2 is looked at with after each epoch, as stage2.patience needs.

    Raises:
        StageCheckError: what the parameters ask for is not there.
    """
    if number == 0:
        return StageSpec(0, params.stage0, lambda places, _: _stage0(system, train.x[places]), len(train))
    if number == 1:
        rows = _guided(train, params, known)
        return StageSpec(
            1, params.stage1, lambda places, generator: _stage1(system, rows, places, generator), len(rows)
        )
    if number == 2:
        void = (
            partial(VoidSource.of_task, params=params, known=known, strangers=strangers) if params.paths.void else None
        )
        return _stage2(system, train, params, seed, void, validation)
    decoder = system.decoder
    if decoder is None:
        raise StageCheckError("stage 3: there is nothing to train, as the job anomaly has no decoder")
    freeze(system)
    with torch.no_grad():  # frozen thinking is a pure function
        thought = system.samatha(train.x)
        context = system.look(thought)[0].context
    if params.heads.bounded_context:
        decoder.learn_range(context)

    def loss(places: Tensor, _: torch.Generator) -> dict[str, Tensor]:
        answered = decoder(thought.state[places], context[places])
        return {"loss": jobs.loss(params.task.job, answered, train.y[places])}

    return StageSpec(3, params.stage3, loss, len(train))


def _guided(train: Split, params: SatipatthanaParams, known: Tensor | None) -> Split:
    """Rows of stage 1: a guide of the job anomaly sees known anomalies too, which are in no clean path of stage 2."""
    if params.task.job != "anomaly" or not params.system.guided:
        return train
    if known is None:
        raise StageCheckError("stage 1: system.guided asks for labels, but task.known names no anomalies")
    return Split(torch.cat([train.x, known]), torch.cat([train.y, train.y.new_ones(len(known))]))


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
    errors = system.recon_error(thought.state, thought.encoded)  # (B, 1)
    if system.params.task.job == "anomaly":  # what is normal is learned from normal rows alone
        usual = (train.y[places] == 0).float()[:, None]
        errors = errors * usual / usual.mean().clamp_min(1 / len(usual))
    terms = {
        "stability": (last - before).square().sum(dim=1).mean(),
        "recon": errors.mean(),
        "diversity": diversity(system.vitakka.probes, settings.squared_diversity),
        "usage": usage(thought.meta.probs),
    }
    if system.aux is not None:
        terms["guidance"] = jobs.loss(system.params.task.job, system.aux(thought.state), train.y[places])
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


def _stage2(
    system: Satipatthana,
    train: Split,
    params: SatipatthanaParams,
    seed: int,
    void: Callable[[Split], VoidSource] | None,
    validation: Split | None,
) -> StageSpec:
    settings, shares, source = params.stage2, params.paths.shares(), void and void(train)
    if source is None:
        print("warning: paths.void is 0, so trust is never shown a row from outside of the data", flush=True)
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
    freeze(system)
    with torch.no_grad():
        thought = system.samatha(train.x)
        system.vipassana.learn_range(thought.state, lambda: system.look(thought)[0].features, seed)
    right, clean = deserved(train, params, seed), Way(thought.state, thought.log, thought.encoded)

    held_out = None
    if validation is not None and len(validation) >= len(shares):
        held_out = _held_out(system, validation, train, params, seed, void)
    if held_out is None and settings.patience:
        raise StageCheckError(
            f"stage2.patience needs at least {len(shares)} validation rows, one a path, with void ones; set it to 0"
        )

    def loss(rows: Rows, _: torch.Generator) -> dict[str, Tensor]:
        scores = system.view(rows.state, rows.log, rows.recon_error).scores()
        facts = floors(rows, scores, pooled) | by_path(rows, torch.sigmoid(scores["trust"].detach()))
        return losses(scores, rows, weights) | {name: torch.tensor(value) for name, value in facts.items()}

    draw = partial(batches_of, system, clean, right, source, params)
    return StageSpec(2, settings, loss, len(train), len(shares), draw, held_out or dict)


def batches_of(
    system: Satipatthana,
    clean: Way,
    right: Tensor,
    source: VoidSource | None,
    params: SatipatthanaParams,
    epoch: list[Tensor],
    generator: torch.Generator,
) -> Iterator[Rows]:
    """Batches of stage 2, whose rows settle in a few long runs: one of a batch costs as much as one of thousands.

    Where rows look at each other, as in `compat`, every batch settles alone.

    Args:
        system: in evaluation mode.
        clean: ways of all clean rows.
        right: trust (n,) that these deserve.
        source: of void rows.
        params: sections stage2 and paths, and whether rows look at each other.
        epoch: places (B,) of the rows of each batch; the last one may be smaller.
        generator: of every draw.
    """
    settings, shares = params.stage2, params.paths.shares()
    together = max(TOGETHER // settings.batch_size, 1) if params.rows_apart else 1
    for places in torch.cat(epoch).split(together * settings.batch_size):
        counts = [allocate(shares, len(part)) for part in places.split(settings.batch_size)]
        whole = {path: sum(one[path] for one in counts) for path in shares}
        rows = damaged(system, clean.at(places), whole, settings, source, generator, right[places])
        yield from rows.dealt(counts)


def _held_out(
    system: Satipatthana,
    validation: Split,
    train: Split,
    params: SatipatthanaParams,
    seed: int,
    void: Callable[[Split], VoidSource] | None,
) -> Callable[[], dict[str, float]] | None:
    """The loss of trust on validation rows that were damaged once, and its floor; None where no void row can be made.

    None of these rows is learned from; strangers and known anomalies among the void ones are those that training draws.
    """
    generator, counts = torch.Generator().manual_seed(seed), allocate(params.paths.shares(), len(validation))
    right, source = guided(validation, train, params), void and void(validation)
    try:
        rows = damaged(system, Way.of(system, validation.x), counts, params.stage2, source, generator, right)
    except VoidError as error:
        print(f"warning: stage 2 goes without validation rows: {error}", flush=True)
        return None
    lowest = floors(rows, ("trust",), POOLED[params.vipassana.trust_features])["floor"]

    @torch.no_grad()
    def judged() -> dict[str, float]:
        logit = system.view(rows.state, rows.log, rows.recon_error).trust_logit
        found = functional.binary_cross_entropy_with_logits(logit, rows.target)
        return {"validation": float(found), "validation_floor": lowest}

    return judged
