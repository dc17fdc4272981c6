"""Vipassana: what the way to a state says about it (specification, 3.7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional

from lego.satipatthana.log import SantanaLog
from lego.satipatthana.settings import VipassanaParams

EXACT = "donot_use_mm_for_euclid_dist"
SMALLEST = 1e-3  # deviation of a feature that is taken for one


@dataclass(frozen=True)
class View:
    """Context (B, c), scores as logits (B,), None where the profile has none, and the features they read (B, F)."""

    context: Tensor
    trust_logit: Tensor
    conformity_logit: Tensor | None
    confidence_logit: Tensor | None
    features: Tensor

    @property
    def trust(self) -> Tensor:
        """(B, 1) in (0, 1)."""
        return torch.sigmoid(self.trust_logit)[:, None]

    def scores(self) -> dict[str, Tensor]:
        """Logits (B,) by head."""
        found = {"trust": self.trust_logit, "conformity": self.conformity_logit, "confidence": self.confidence_logit}
        return {name: logit for name, logit in found.items() if logit is not None}


def velocity(state: Tensor, log: SantanaLog) -> Tensor:
    """Length (B,) of the last step, from the state that is given: another row's state is visible."""
    states = log.to_tensor()  # (T + 1, B, d)
    before = (log.lengths - 2).clamp_min(0)
    return (state - states[before, torch.arange(len(state), device=state.device)]).norm(dim=1)


def mean_energy(log: SantanaLog) -> Tensor:
    """Mean squared length (B,) of a row's own steps."""
    return log.energies().sum(dim=0) / log.steps.clamp_min(1)


def whole_way(state: Tensor, log: SantanaLog) -> Tensor:
    """Distance (B,) of the state that is shown from the log's first: what the original called velocity."""
    return (state - log.initial).norm(dim=1)


def dynamics2(state: Tensor, log: SantanaLog, kind: str = "last_step") -> Tensor:
    """log(1 + velocity) and log(1 + energy) (B, 2): all that the trust of the founding note reads.

    Args:
        state: states (B, d) that are shown.
        log: of the way.
        kind: of the first: `last_step` or `whole_way`; both see the state that is shown.
    """
    first = velocity(state, log) if kind == "last_step" else whole_way(state, log)
    return torch.stack([first, mean_energy(log)], dim=1).log1p()


def grounded8(state: Tensor, log: SantanaLog, probes: Tensor, recon_error: Tensor, max_steps: int) -> Tensor:
    """Eight features (B, 8): where the state lies, how it came there, and how well it tells the input.

    Steps taken, entropy of the assignment, distance to the nearest probe, that of the start, way from the start,
    reconstruction error, velocity, energy; distances, errors and energies as log(1 + x).
    """
    # not by a matrix product, whose rounding depends on the rows beside a row
    distances = torch.cdist(state, probes, compute_mode=EXACT)  # (B, K)
    shares = torch.softmax(-distances, dim=1)
    entropy = -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum(dim=1)
    start = torch.cdist(log.initial, probes, compute_mode=EXACT).amin(dim=1)
    way = (state - log.initial).norm(dim=1)
    grounded = [distances.amin(dim=1), start, way, recon_error.reshape(-1)]
    columns = [log.steps / max_steps, entropy, *(one.log1p() for one in grounded)]
    return torch.cat([torch.stack(columns, dim=1), dynamics2(state, log)], dim=1)


class Vipassana(nn.Module):
    """Context and scores of a settled state; every parameter exists from construction on (R-3.7c).

    Where `prototypes` is above 0, the grounded features measure distances to as many centres of settled train states
    instead of to the probes, which are directions: those tell how states should look.

    Args:
        dim: of states.
        settings: section `vipassana`.
    """

    mean: Tensor
    std: Tensor
    prototypes: Tensor

    def __init__(self, dim: int, settings: VipassanaParams) -> None:
        super().__init__()
        self.settings, self.grounded = settings, settings.trust_features == "grounded8"
        hidden, features = settings.hidden, 8 if self.grounded else 2
        if self.grounded:
            self.register_buffer("mean", torch.zeros(features))  # of clean train rows: features differ by orders
            self.register_buffer("std", torch.ones(features))
            self.register_buffer("prototypes", torch.zeros(settings.prototypes, dim))
            self.way = nn.GRU(dim, settings.gru_hidden)
            self.metrics = nn.Sequential(nn.Linear(features, settings.metric_proj), nn.ReLU())
            self.trust_head: nn.Module = TrustHead(features, hidden, settings.trust_limit)
            self.conformity_head = _head(settings.gru_hidden, hidden)
            self.confidence_head = _head(settings.gru_hidden + settings.metric_proj, hidden)
        else:
            width = settings.context_hidden
            self.context = nn.Sequential(nn.Linear(dim + 2, width), nn.ReLU(), nn.Linear(width, settings.context_dim))
            self.trust_head = _head(features, hidden)

    @property
    def context_dim(self) -> int:
        """Width c of the context."""
        return self.settings.gru_hidden + self.settings.metric_proj if self.grounded else self.settings.context_dim

    def features(self, state: Tensor, log: SantanaLog, probes: Tensor, recon_error: Tensor, max_steps: int) -> Tensor:
        """What the trust head reads (B, 2) or (B, 8), not yet standardized."""
        if self.grounded:
            return grounded8(state, log, self.prototypes if len(self.prototypes) else probes, recon_error, max_steps)
        return dynamics2(state, log, self.settings.velocity)

    def standardized(self, features: Tensor) -> Tensor:
        """Grounded features (B, 8) in deviations of clean train rows."""
        return (features - self.mean) / self.std

    @torch.no_grad()
    def learn_range(self, states: Tensor, features: Callable[[], Tensor], seed: int) -> None:
        """Takes prototypes and the range of the features from clean train rows, before stage 2.

        Args:
            states: settled states (N, d).
            features: computes those of the same rows (N, F), with the prototypes in place.
            seed: of k-means.
        """
        if not self.grounded:
            return
        if count := len(self.prototypes):
            means = KMeans(count, n_init=1, random_state=seed % 2**32).fit(states.double().numpy())
            self.prototypes.copy_(torch.from_numpy(means.cluster_centers_))
        rows = features()
        self.mean.copy_(rows.mean(dim=0))
        self.std.copy_(rows.std(dim=0).clamp_min(SMALLEST))

    def forward(self, state: Tensor, log: SantanaLog, probes: Tensor, recon_error: Tensor, max_steps: int) -> View:
        """Scores of states (B, d) with the log of their way, the probes (K, d) and reconstruction errors (B, 1)."""
        features = self.features(state, log, probes, recon_error, max_steps)
        if not self.grounded:
            velocity_and_energy = features.expm1()
            context = self.context(torch.cat([state, velocity_and_energy], dim=1))
            return View(context, self.trust_head(features)[:, 0], None, None, features)
        standard = self.standardized(features)
        rows, _ = self.way(log.to_tensor())  # (T + 1, B, g)
        way = rows[log.lengths - 1, torch.arange(len(state), device=state.device)]  # (B, g)
        context = torch.cat([way, self.metrics(standard)], dim=1)
        return View(
            context,
            self.trust_head(standard)[:, 0],
            self.conformity_head(way)[:, 0],
            self.confidence_head(context)[:, 0],  # of the projected metrics: else nothing would train the projection
            features,
        )


class TrustHead(nn.Module):
    """Within the range of the training rows one hidden layer; beyond it, trust falls with every way of being strange.

    A hidden layer alone extrapolates as it happens to: rows far outside would be trusted more than some inside.

    Args:
        features: F.
        hidden: width.
        limit: deviations of clean train rows that count as their range.
    """

    def __init__(self, features: int, hidden: int, limit: float) -> None:
        super().__init__()
        self.body, self.limit = _head(features, hidden), limit
        self.fall = nn.Parameter(torch.zeros(features))

    def forward(self, standard: Tensor) -> Tensor:
        """Logits (B, 1) of standardized features (B, F)."""
        inside = standard.clamp(-self.limit, self.limit)
        beyond = (standard - inside).abs()  # (B, F)
        return self.body(inside) - (beyond @ functional.softplus(self.fall))[:, None]


def _head(features: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
