"""How a latent vector settles: probes give a start, one map is applied until a state rests (section 3.3 to 3.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lego.satipatthana.log import SantanaLog
from lego.satipatthana.settings import SamathaParams, SatiParams, VicaraParams, VitakkaParams

GATE_SLOPE = 10.0  # of the soft gate, a sigmoid of the attention less its threshold


@dataclass(frozen=True)
class Meta:
    """What Vitakka saw: winner (B,), attention and cosines (B, K), confidence (B,), likeness (B,) to what attention
    draws, and whether it opens the gate (B,)."""

    winner_id: Tensor
    probs: Tensor
    raw_scores: Tensor
    confidence: Tensor
    likeness: Tensor
    gate_open: Tensor


class Vitakka(nn.Module):
    """A bank of probes; the start state is the latent drawn towards those that it resembles.

    Where inference_gate_threshold is `learned`, what counts as known at inference follows from train rows.

    Args:
        dim: of latents and states.
        settings: section `vitakka`.
    """

    learned_gate: Tensor

    def __init__(self, dim: int, settings: VitakkaParams) -> None:
        super().__init__()
        self.settings = settings
        rows = functional.normalize(torch.randn(settings.n_probes, dim), dim=1)
        self.probes = nn.Parameter(rows, requires_grad=settings.probe_trainable)
        self.register_buffer("learned_gate", torch.tensor(-1.0))

    def read(self) -> Tensor:
        """Probes (K, d): of length 1 whatever training did to them, unless normalize_on_read is off (R-3.3b)."""
        return functional.normalize(self.probes, dim=1) if self.settings.normalize_on_read else self.probes

    @torch.no_grad()
    def load_probes(self, rows: Tensor) -> None:
        """Takes (K, d) rows, normalized.

        Raises:
            ValueError: another shape.
        """
        if rows.shape != self.probes.shape:
            raise ValueError(f"probes must be {tuple(self.probes.shape)}, got {tuple(rows.shape)}")
        self.probes.copy_(functional.normalize(rows, dim=1))

    def forward(self, z: Tensor) -> tuple[Tensor, Meta]:
        """Start states (B, d) of latents (B, d)."""
        settings, probes = self.settings, self.read()
        scores = functional.normalize(z, dim=1) @ probes.T  # (B, K)
        weights = torch.softmax(scores / settings.softmax_temp, dim=1)
        winner = scores.argmax(dim=1)
        threshold = settings.training_gate_threshold if self.training else self._inference_gate()
        attention = settings.attention_training if self.training else settings.attention_inference
        if attention == "soft":
            drawn, likeness = weights @ probes, (weights * scores).sum(dim=1)
            gate = torch.sigmoid(GATE_SLOPE * (likeness - threshold))
        else:
            drawn, likeness = probes[winner], scores.amax(dim=1)
            gate = (likeness > threshold).to(z.dtype)
        start = settings.mix_alpha * z + (1 - settings.mix_alpha) * drawn  # (B, d)
        if settings.closed_gate == "zeroes":  # every rejected input then is the same point (R-3.3a)
            start = gate[:, None] * start
        return start, Meta(winner, weights, scores, scores.amax(dim=1), likeness, likeness > threshold)

    def _inference_gate(self) -> float | Tensor:
        fixed = self.settings.inference_gate_threshold
        return self.learned_gate if fixed == "learned" else fixed

    @torch.no_grad()
    def learn_gate(self, z: Tensor) -> None:
        """Sets the gate of inference so that `known_share` of the latents (N, d) of train rows are known, if asked."""
        if self.settings.inference_gate_threshold == "learned":
            likeness = self(z)[1].likeness
            self.learned_gate.copy_(torch.quantile(likeness, 1 - self.settings.known_share))


class Vicara(nn.Module):
    """One step: s <- i s + (1 - i) Phi(s, z).

    With `inject`, Phi(s, z) = tanh(rho W s + U z + b) where the largest singular value of W is at most 1: a contraction
    whose fixed point depends on the input (specification, 9.1; cf. deep equilibrium models, Bai et al. 2019). Without,
    Phi is a bottleneck of s alone, as the original had it. `probe_mixed` and `probe_picked` have a map for each probe,
    mixed by attention or picked by the winner; `none` leaves the state where it starts, to see what the loop is worth.

    Args:
        dim: of states.
        n_probes: K.
        settings: section `vicara`.
    """

    def __init__(self, dim: int, n_probes: int, settings: VicaraParams) -> None:
        super().__init__()
        self.settings = settings
        self.maps = n_probes if settings.kind.startswith("probe") else 1
        if settings.kind == "none":
            return
        if settings.inject:
            self.inner = nn.Parameter(
                torch.stack([nn.init.orthogonal_(torch.empty(dim, dim)) for _ in range(self.maps)])
            )
            self.outer = nn.ModuleList(nn.Linear(dim, dim) for _ in range(self.maps))
        else:
            self.bodies = nn.ModuleList(
                nn.Sequential(
                    nn.Linear(dim, dim // 2), nn.LayerNorm(dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim), nn.Tanh()
                )
                for _ in range(self.maps)
            )

    def contraction(self) -> Tensor:
        """W (M, d, d) with a largest singular value of at most 1, computed exactly: the bound must hold."""
        return self.inner / torch.linalg.matrix_norm(self.inner, 2).clamp_min(1)[:, None, None]

    def prepare(self, z: Tensor, meta: Meta) -> Prepared:
        """What stays the same over the steps of a run."""
        shares = None
        if self.settings.kind == "none":
            return Prepared(None, None, None)
        if self.settings.kind == "probe_mixed":
            shares = meta.probs
        elif self.settings.kind == "probe_picked":
            shares = functional.one_hot(meta.winner_id, self.maps).to(z.dtype)
        if not self.settings.inject:
            return Prepared(None, None, shares)
        pushes = torch.stack([one(z) for one in self.outer])  # (M, B, d)
        return Prepared(self.settings.rho * self.contraction(), pushes, shares)

    def forward(self, state: Tensor, prepared: Prepared) -> Tensor:
        """The next state (B, d)."""
        if self.settings.kind == "none":
            return state
        if prepared.inner is not None and prepared.pushes is not None:
            found = torch.tanh(state @ prepared.inner.transpose(1, 2) + prepared.pushes)  # (M, B, d)
        else:
            found = torch.stack([body(state) for body in self.bodies])  # (M, B, d)
        phi = found[0] if prepared.shares is None else torch.einsum("mbd,bm->bd", found, prepared.shares)
        return torch.lerp(phi, state, self.settings.inertia)


@dataclass(frozen=True)
class Prepared:
    """rho W (M, d, d), U z + b (M, B, d), and how the maps are mixed (B, M); None where there is nothing."""

    inner: Tensor | None
    pushes: Tensor | None
    shares: Tensor | None


class Sati(nn.Module):
    """The stop rule.

    Args:
        settings: section `sati`.
    """

    def __init__(self, settings: SatiParams) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, before: Tensor, state: Tensor, step: int) -> Tensor:
        """Which rows (B,) rest after so many updates; `per_sample: false` asks the batch, as the original did."""
        settings = self.settings
        if settings.kind == "fixed" or step < settings.min_steps:
            return torch.zeros(len(state), dtype=torch.bool, device=state.device)
        moved = (state - before).norm(dim=1)
        allowed = settings.eps_abs + settings.eps_rel * state.norm(dim=1)
        if not settings.per_sample:
            return (moved.mean() <= allowed.mean()).expand(len(state))
        return moved <= allowed


@dataclass(frozen=True)
class Drunk:
    """A loop that is damaged on purpose (6.2): section `samatha`, and the generator of every draw."""

    settings: SamathaParams
    generator: torch.Generator

    def start(self, state: Tensor) -> Tensor:
        return state + self.settings.drunk_s0_std * self._normal(state)

    def step(self, before: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state after a step that some rows skip, and which did (B,)."""
        coins = len(state) if self.settings.drunk_per_sample else 1
        draws = torch.rand(coins, generator=self.generator, device=self.generator.device).to(state.device)
        skipped = (draws < self.settings.drunk_skip_prob).expand(len(state))
        shaken = state + self.settings.drunk_perturbation_std * self._normal(state)
        return torch.where(skipped[:, None], before, shaken), skipped

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=self.generator.device).to(like.device)


@dataclass(frozen=True)
class Settled:
    """The last state (B, d), the way to it, and its last two states with graph, for the stability loss."""

    state: Tensor
    log: SantanaLog
    pair: tuple[Tensor, Tensor]


def settle(
    start: Tensor, z: Tensor, meta: Meta, vicara: Vicara, sati: Sati, max_steps: int, drunk: Drunk | None = None
) -> Settled:
    """Applies the map until every row rests, or max_steps times; a row that rests is frozen.

    What comes out for a row is what would alone (R-3.5), as no row looks at another.

    Args:
        start: s_0 (B, d).
        z: latents (B, d), injected at every step.
        meta: what Vitakka saw.
        vicara, sati: map and stop rule.
        max_steps: T.
        drunk: damage; a skipped step never counts as rest (R-6.2).
    """
    prepared, log = vicara.prepare(z, meta), SantanaLog()
    state = start if drunk is None else drunk.start(start)
    previous, active, all_active = state, torch.ones(len(state), dtype=torch.bool, device=state.device), True
    log.add(state)
    for step in range(1, max_steps + 1):
        new, skipped = vicara(state, prepared), None
        if drunk is not None:
            new, skipped = drunk.step(state, new)
        if all_active:
            previous = state
        else:  # a row that rests is frozen
            new = torch.where(active[:, None], new, state)
            previous = torch.where(active[:, None], state, previous)
        with torch.no_grad():  # energies and the rule look on; the loss takes the pair
            log.add(new, (new - state).square().sum(dim=1), active=active)
            rests = sati(state, new, step)
            active = active & ~(rests if skipped is None else rests & ~skipped)
        state = new
        left = int(active.sum())
        if not left:
            break
        all_active = left == len(active)
    return Settled(state, log, (state, previous))
