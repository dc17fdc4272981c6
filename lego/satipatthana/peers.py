"""What the trust score is compared with: one-line scores on a plain network, an ensemble, an isolation forest (10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lego.satipatthana import jobs, metrics
from lego.satipatthana.nets import perceptron
from lego.satipatthana.reject import fit_temperature
from lego.satipatthana.sections import PeersParams
from lego.satipatthana.settings import VoidParams
from lego.satipatthana.tasks import Split, Task
from lego.satipatthana.void import VoidSource
from lego.training.steps import StepOptions, run_epoch

OWN = ("ensemble", "outlier_exposure")  # peers that train networks of their own; the others read one and the same


class Plain(nn.Module):
    """A classifier of two hidden layers: features before the last one, and logits.

    Args:
        size: of an input, flattened.
        hidden: width of its layers.
        dim: of the features.
        classes: C.
    """

    def __init__(self, size: int, hidden: int, dim: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), perceptron([size, hidden, dim]), nn.LayerNorm(dim), nn.ReLU())
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.head(features)


def train_plain(task: Task, settings: PeersParams, seed: int, outliers: VoidSource | None = None) -> Plain:
    """One classifier, by cross-entropy on train rows with a linear schedule.

    With outliers, as many of them as train rows should get equal probabilities (Hendrycks et al. 2019, equation 2).
    """
    torch.manual_seed(seed)
    model = plain_network(task, settings)
    optimizer = AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    generator, rows = torch.Generator().manual_seed(seed), len(task.train)
    steps = settings.epochs * -(-rows // settings.batch_size)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)

    def loss_of(places: Tensor) -> tuple[Tensor, int]:
        loss = functional.cross_entropy(model(task.train.x[places])[1], task.train.y[places])
        if outliers is not None:
            strange = model(outliers.draw(len(places), generator))[1]
            loss = loss - settings.exposure * functional.log_softmax(strange, dim=1).mean()
        return loss, len(places)

    for _ in range(settings.epochs):
        epoch = torch.randperm(rows, generator=generator).split(settings.batch_size)
        run_epoch(epoch, loss_of, optimizer, "cpu", StepOptions(scheduler=schedule))
    return model.eval()


@dataclass(frozen=True)
class Scored:
    """A peer: probabilities (n, C) and trust (n,) of inputs (n, *shape)."""

    probabilities: Callable[[Tensor], np.ndarray]
    trust: Callable[[Tensor], np.ndarray]


def plain_network(task: Task, settings: PeersParams) -> Plain:
    """A classifier of the task as it begins."""
    return Plain(int(np.prod(task.shape)), settings.hidden, settings.dim, len(task.classes))


def networks(name: str, task: Task, settings: PeersParams, seed: int, void: VoidParams) -> list[Plain]:
    """Networks that a peer trains of its own, or the plain one that all others read.

    An ensemble trains those that it has besides the plain one.

    Args:
        name: a peer of `OWN`, or `plain`.
        task: train rows are learned from.
        settings: section `peers`.
        seed: of weights and order.
        void: outliers of the one peer that is trained with them, the same kinds as stage 2 has.
    """
    if name == "ensemble":
        return [train_plain(task, settings, seed * 1000 + number) for number in range(1, settings.members)]
    exposed = name == "outlier_exposure"
    outliers = VoidSource(task.train.x, task.train.y, void, task.known, task.strangers) if exposed else None
    return [train_plain(task, settings, seed, outliers)]


def peer(name: str, models: list[Plain], task: Task, settings: PeersParams, seed: int) -> Scored:
    """A peer that scores with networks that have been trained.

    Args:
        name: one of `lego.satipatthana.sections.PeerName`.
        models: as `networks` gives them.
        task: train rows are what distances are taken to, validation rows fit a temperature.
        settings: section `peers`.
        seed: of the isolation forest.

    Raises:
        ValueError: there is no such peer.
    """
    temperature = (
        fit_temperature(_logits(models[0], task.validation.x), task.validation.y) if name == "temperature" else 1.0
    )

    def probabilities(x: Tensor) -> np.ndarray:
        parts = [torch.softmax(_logits(model, x).double() / temperature, dim=1).numpy() for model in models]
        return np.asarray(np.mean(parts, axis=0))

    return Scored(probabilities, _trust(name, models[0], task, settings, seed, probabilities))


def _trust(
    name: str,
    model: Plain,
    task: Task,
    settings: PeersParams,
    seed: int,
    probabilities: Callable[[Tensor], np.ndarray],
) -> Callable[[Tensor], np.ndarray]:
    match name:
        case "msp" | "temperature" | "ensemble" | "outlier_exposure":
            return lambda x: probabilities(x).max(axis=1)
        case "energy":  # Liu et al. 2020
            return lambda x: torch.logsumexp(_logits(model, x).double(), dim=1).numpy()
        case "knn":  # Sun et al. 2022: distance to the k-th neighbour of normalized features
            neighbours = NearestNeighbors(n_neighbors=settings.neighbours).fit(_unit(_features(model, task.train.x)))
            return lambda x: -neighbours.kneighbors(_unit(_features(model, x)))[0][:, -1]
        case "mahalanobis":  # Lee et al. 2018: nearest class mean under a shared covariance
            rows, labels = _features(model, task.train.x), task.train.y.numpy()
            means = np.stack([rows[labels == one].mean(axis=0) for one in range(len(task.classes))])
            shared = LedoitWolf(assume_centered=True).fit(rows - means[labels])  # features outnumber a class's rows
            return lambda x: -np.stack([shared.mahalanobis(_features(model, x) - mean) for mean in means]).min(axis=0)
        case _:
            return of_inputs(name, task, settings, seed)


def of_inputs(name: str, task: Task, settings: PeersParams, seed: int) -> Callable[[Tensor], np.ndarray]:
    """Scores (n,) of inputs as they are, which need no network and no labels.

    Args:
        name: `input_knn`, the distance to the k-th neighbour, or `isolation_forest` (Liu et al. 2008).
        task: train rows are what inputs are compared with.
        settings: section `peers`.
        seed: of the forest.

    Raises:
        ValueError: there is no such score.
    """
    rows = task.train.x.flatten(1).numpy()
    if name == "input_knn":
        near = NearestNeighbors(n_neighbors=settings.neighbours).fit(rows)
        return lambda x: -near.kneighbors(x.flatten(1).numpy())[0][:, -1]
    if name == "isolation_forest":
        forest = IsolationForest(random_state=seed % 2**32).fit(rows)
        return lambda x: forest.score_samples(x.flatten(1).numpy())
    raise ValueError(f"there is no peer {name}")


@torch.no_grad()
def _logits(model: Plain, x: Tensor) -> Tensor:
    return model(x)[1]


@torch.no_grad()
def _features(model: Plain, x: Tensor) -> np.ndarray:
    return model(x)[0].double().numpy()


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def judge(scored: Scored, test: Split, outside: dict[str, Tensor]) -> dict[str, float]:
    """The same numbers as of the system, as far as a peer has them."""
    p, trust, labels = scored.probabilities(test.x), scored.trust(test.x), test.y.numpy()
    right = p.argmax(axis=1) == labels
    return {
        "accuracy": float(right.mean()),
        "nll": metrics.nll(p, labels),
        "ece": metrics.ece(p.max(axis=1), right),
        "brier": metrics.brier(p, labels),
        **jobs.believed(trust, right),
        **metrics.strangers(trust, {kind: scored.trust(rows) for kind, rows in outside.items()}),
    }
