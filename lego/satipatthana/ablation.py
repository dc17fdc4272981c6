"""What the parts of the trust are worth: other heads on the same damaged rows, a system without the loop, and costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from lego.satipatthana import metrics
from lego.satipatthana.introspect import TrustHead
from lego.satipatthana.merit import deserved
from lego.satipatthana.paths import Way
from lego.satipatthana.sections import SatipatthanaParams
from lego.satipatthana.specs import batches_of
from lego.satipatthana.system import Output, Satipatthana
from lego.satipatthana.tasks import Task
from lego.satipatthana.training import dealt
from lego.satipatthana.void import VoidSource
from lego.training.steps import run_epoch

FROM_LOG = (0, 3, 4, 6, 7)  # columns of grounded8 that need the way: steps, start, distance gone, last step, energy


def heads(system: Satipatthana, task: Task, params: SatipatthanaParams, seed: int) -> dict[str, dict[str, float]]:
    """AUROC on strangers and AURC of heads that read less, trained on stored rows at a constant rate.

    Args:
        system: trained, of the grounded features.
        task: train rows are damaged, test rows and sets from outside judged.
        params: sections stage2, paths, void and ablations.
        seed: of the draws and of the heads.

    Returns:
        `all_features`, the head that is used trained again on these rows; `without_log`; `latent`, on z alone;
        `recon_error`, no head at all.
    """
    found = {"recon_error": _judged(system, task, lambda out, x: -out.recon_error[:, 0])}
    if not system.vipassana.grounded:  # two numbers of the way, of which nothing can be left out
        return found
    look = system.vipassana
    features, latents, target = _rows(system, task, params, seed)
    kept = [column for column in range(features.shape[1]) if column not in FROM_LOG]
    readers: dict[str, tuple[Tensor, Callable[[Output, Tensor], Tensor]]] = {
        "all_features": (features, lambda out, x: look.standardized(out.features)),
        "without_log": (features[:, kept], lambda out, x: look.standardized(out.features)[:, kept]),
        "latent": (latents, lambda out, x: system.adapter(x)),
    }
    for name, (rows, read) in readers.items():
        found[name] = _judged(system, task, partial(_read_by, _trained(rows, target, params, seed), read))
    return found


def _read_by(head: nn.Module, read: Callable[[Output, Tensor], Tensor], out: Output, x: Tensor) -> Tensor:
    logits: Tensor = head(read(out, x))
    return logits[:, 0]


@torch.no_grad()
def _rows(system: Satipatthana, task: Task, params: SatipatthanaParams, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standardized features (N, F), latents (N, d) and targets (N,) of batches of stage 2."""
    generator, train = torch.Generator().manual_seed(seed), task.train
    source = VoidSource.of_task(train, params, task.known, task.strangers)
    right, clean = deserved(train, params, seed), Way.of(system, train.x)
    features, latents, targets = list[Tensor](), list[Tensor](), list[Tensor]()
    left, least, epochs = params.ablations.batches, len(params.paths.shares()), list[list[Tensor]]()
    while left > 0:
        epochs.append(dealt(len(train), params.stage2.batch_size, least, generator)[:left])
        left -= len(epochs[-1])
    for rows in chain.from_iterable(
        batches_of(system, clean, right, source, params, epoch, generator) for epoch in epochs
    ):
        view = system.view(rows.state, rows.log, rows.recon_error)
        features.append(system.vipassana.standardized(view.features))
        latents.append(system.adapter(rows.encoded))
        targets.append(rows.target)
    return torch.cat(features), torch.cat(latents), torch.cat(targets)


def _trained(rows: Tensor, target: Tensor, params: SatipatthanaParams, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    settings, generator = params.ablations, torch.Generator().manual_seed(seed)
    head = TrustHead(rows.shape[1], params.vipassana.hidden, params.vipassana.trust_limit)
    optimizer = AdamW(head.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)

    def loss_of(places: Tensor) -> tuple[Tensor, int]:
        return functional.binary_cross_entropy_with_logits(head(rows[places])[:, 0], target[places]), len(places)

    for _ in range(settings.epochs):
        epoch = torch.randperm(len(rows), generator=generator).split(params.stage2.batch_size)
        run_epoch(epoch, loss_of, optimizer, "cpu")
    return head.eval()


@torch.no_grad()
def _judged(system: Satipatthana, task: Task, trust: Callable[[Output, Tensor], Tensor]) -> dict[str, float]:
    found = system(task.test.x)
    inside = trust(found, task.test.x).double().numpy()
    wrong = (found.output.argmax(dim=1) != task.test.y).numpy()
    facts = {"aurc": metrics.aurc(inside, wrong), "auroc_correct": metrics.correct_above_wrong(inside, ~wrong)}
    for kind, rows in task.outside.items():
        facts[f"auroc_{kind}"] = metrics.auroc(inside, trust(system(rows), rows).double().numpy())
    return facts


def macs(module: Callable[[Tensor], object], x: Tensor) -> float:
    """Multiply-accumulates of one row, counted by torch over these rows (B, *shape)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() / 2 / len(x)
