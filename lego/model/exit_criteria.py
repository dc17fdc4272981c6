"""Exit criteria: how sure block 1 is of a token, as a score in [0, 1]; a token leaves if its score is high enough.

Shapes: n tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lego.base.artifacts import ArtifactError, read_tensors, write_tensors
from lego.model.gate import SURE
from lego.model.losses import max_probability


class Criterion(Protocol):
    """(exit states (n, D), exit logits (n, V)) -> score (n,); thresholds lie in [0, 1] for those of this file.

    One with an attribute `needs_logits` that is false is given no logits, and hard tokens are spared the exit's head.
    """

    def __call__(self, exit_states: Tensor, logits: Tensor, /) -> Tensor: ...


def max_prob(exit_states: Tensor, logits: Tensor) -> Tensor:
    """The default criterion, also of mining: the largest softmax probability (n,)."""
    return max_probability(logits)


def margin(exit_states: Tensor, logits: Tensor) -> Tensor:
    """How far the largest softmax probability lies above the second largest (n,)."""
    logits = logits.float()
    if logits.shape[-1] == 1:
        return torch.ones_like(logits[..., 0])
    best = (logits.topk(2, dim=-1).values - logits.logsumexp(dim=-1, keepdim=True)).exp()  # (n, 2)
    return best[..., 0] - best[..., 1]


def entropy(exit_states: Tensor, logits: Tensor) -> Tensor:
    """One minus the softmax's entropy as a share of the largest possible one (n,)."""
    log_p = logits.float().log_softmax(dim=-1)
    nats = (log_p.exp() * log_p).nan_to_num(nan=0.0).sum(dim=-1)  # nothing for what is impossible
    return 1 + nats / math.log(max(2, logits.shape[-1]))


LOGIT_CRITERIA = {"max_prob": max_prob, "margin": margin, "entropy": entropy}
STATE_CRITERIA = ("probe", "gain")  # fitted, each a StateCriterion
CRITERIA = (*LOGIT_CRITERIA, *STATE_CRITERIA)


def needs_logits(criterion: Criterion) -> bool:
    return bool(getattr(criterion, "needs_logits", True))


class StateCriterion(nn.Module):
    """A score from the exit state: the sigmoid of a linear function, or of one with a hidden layer of ReLUs.

    Args:
        dim: width of the exit state (D).
        width: of the hidden layer; 0 = linear.
        reads_logits: it is told the largest of the exit's logits beside the state.
    """

    def __init__(self, dim: int, width: int = 0, reads_logits: bool = False) -> None:
        super().__init__()
        self.dim, self.width, self.needs_logits = dim, width, reads_logits
        inputs = dim + reads_logits
        self.hidden = nn.Linear(inputs, width) if width else None
        self.output = nn.Linear(width or inputs, 1)

    def forward(self, exit_states: Tensor, logits: Tensor | None = None) -> Tensor:
        """Score (...,) of exit states (..., D), with the logits (..., V) where it reads them."""
        kind = exit_states.device.type
        with torch.autocast(kind, enabled=False):  # float32 tells scores apart that bfloat16 does not
            largest = logits.amax(dim=-1) if self.needs_logits and logits is not None else None
            x = features(exit_states, largest)
            if self.hidden is not None:
                x = F.linear(x, self.hidden.weight.float(), self.hidden.bias.float()).relu()
            return F.linear(x, self.output.weight.float(), self.output.bias.float()).squeeze(-1).sigmoid()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one token."""
        inputs = self.dim + self.needs_logits
        return inputs * self.width + self.width if self.width else inputs

    def save(self, path: str | Path) -> None:
        write_tensors(path, self.state_dict())

    @classmethod
    def load(cls, path: str | Path, dim: int, reads_logits: bool = False) -> StateCriterion:
        """Reads what `save` wrote.

        Raises:
            ArtifactError: the file is missing or damaged, or belongs to a criterion that reads something else.
        """
        return cls.of(read_tensors(path), dim, path, reads_logits)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], dim: int, path: str | Path, reads_logits: bool) -> StateCriterion:
        """From its tensors, read from `path`; raises as `load`."""
        hidden = tensors.get("hidden.weight")
        criterion = cls(dim, 0 if hidden is None else len(hidden), reads_logits)
        shapes = {name: tensor.shape for name, tensor in criterion.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            reads = f"exit states of width {dim} (exit_criterion_reads_logits: {str(reads_logits).lower()})"
            raise ArtifactError(f"{path}: does not fit {reads}; run dvc repro")
        criterion.load_state_dict(tensors)
        return criterion.requires_grad_(False)


def features(exit_states: Tensor, largest: Tensor | None = None) -> Tensor:
    """What a criterion reads: exit states (..., D) in float32 at unit root mean square, as their scale says little.

    Where it reads logits, the largest of them (...,) is one number more. With the state it tells as much as the softmax
    does, for a twentieth of its time.
    """
    states = F.rms_norm(exit_states.float(), (exit_states.shape[-1],))
    return states if largest is None else torch.cat([states, largest.float().unsqueeze(-1)], dim=-1)  # (..., D + 1)


class Ridge:
    """Linear least squares in one pass: its memory is D^2, whatever the number of tokens.

    Minimises mean((w x + b - y)^2) + l2 |w|^2 for features x of exit states.
    """

    def __init__(self, dim: int, reads_logits: bool = False) -> None:
        self.n, self.dim, self.reads_logits = 0, dim, reads_logits
        inputs = dim + reads_logits + 1
        self.products = torch.zeros(inputs, inputs, dtype=torch.float64)  # of (x, 1) with itself
        self.targets = torch.zeros(inputs, dtype=torch.float64)

    def add(self, exit_states: Tensor, targets: Tensor, largest: Tensor | None = None) -> None:
        """Takes in exit states (n, D) with targets (n,), and largest logits (n,) where the criterion reads them."""
        x = features(exit_states, largest if self.reads_logits else None).cpu()
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()  # (n, D + 1)
        self.products += x.t() @ x
        self.targets += x.t() @ targets.cpu().double()
        self.n += len(x)

    def solve(self, l2: float) -> StateCriterion:
        penalty = torch.full((len(self.targets),), l2, dtype=torch.float64)
        penalty[-1] = 0.0  # the bias is free
        weights = torch.linalg.solve(self.products / self.n + penalty.diag(), self.targets / self.n)
        criterion = StateCriterion(self.dim, reads_logits=self.reads_logits)
        with torch.no_grad():
            criterion.output.weight.copy_(weights[:-1])
            criterion.output.bias.copy_(weights[-1:])
        return criterion.requires_grad_(False)


def log_odds(confidence: Tensor) -> Tensor:
    """What the probe is fitted to: its sigmoid is the confidence."""
    return confidence.double().logit(eps=SURE)


def fit_mlp(
    exit_states: Tensor, targets: Tensor, width: int, l2: float, seed: int, largest: Tensor | None = None
) -> StateCriterion:
    """A criterion with a hidden layer, fitted by scikit-learn with early stopping on a tenth of the tokens.

    Args:
        exit_states: (n, D).
        targets: (n,), what the score's log-odds should be.
        width: of the hidden layer.
        l2: weight penalty.
        seed: of initial weights and shuffling.
        largest: of the exit's logits (n,), for a criterion that reads them.
    """
    from sklearn.neural_network import MLPRegressor

    options = {"early_stopping": True, "random_state": seed % 2**32, "max_iter": 1000}
    regressor = MLPRegressor(hidden_layer_sizes=(width,), alpha=l2, **options)
    mean, std = (0.0, 1.0) if largest is None else (float(largest.mean()), float(largest.std()))
    std = std if std > 1e-6 else 1.0  # of text on which it never changes
    scaled = None if largest is None else (largest - mean) / std  # to the scale of the others
    regressor.fit(features(exit_states, scaled).numpy(), targets.numpy())
    criterion = StateCriterion(exit_states.shape[1], width, reads_logits=largest is not None)
    state = {}
    for number, name in enumerate(("hidden", "output")):
        state[f"{name}.weight"] = torch.from_numpy(regressor.coefs_[number].T.copy())
        state[f"{name}.bias"] = torch.from_numpy(regressor.intercepts_[number].copy())
    if largest is not None:
        state["hidden.weight"][:, -1] /= std
        state["hidden.bias"] -= state["hidden.weight"][:, -1] * mean
    criterion.load_state_dict(state)
    return criterion.requires_grad_(False)
