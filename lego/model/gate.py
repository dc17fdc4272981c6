"""The gate: what a token that goes deep is answered with, a mixture of both exits (specs: ashem section 9).

Block 2 sees further and block 1 is the steadier of the two; which of them is to be trusted, block 1's own distribution
tells. Easy tokens are not touched.

Shapes: n tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lego.base.artifacts import ArtifactError

TOP = 8  # largest log-probabilities among the features
FEATURES = 2 + TOP
SURE = 1e-6  # the log-odds of a probability are bounded by those of this


def gate_features(logits: Tensor) -> Tensor:
    """What the gate is told (..., FEATURES), in float32, of block 1's logits (..., V).

    The log-odds of the largest probability, the entropy in nats, and the TOP largest log-probabilities.
    """
    log_p = logits.float().log_softmax(dim=-1)
    top = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1).values
    top = torch.cat([top, top[..., -1:].expand(*top.shape[:-1], TOP - top.shape[-1])], dim=-1)  # of a tiny vocabulary
    entropy = -(log_p.exp() * log_p).sum(dim=-1, keepdim=True)
    return torch.cat([top[..., :1].exp().logit(eps=SURE), entropy, top], dim=-1)


class Gate(nn.Module):
    """The share a = sigmoid(w . features + c) of block 1 in the answer, p = a p1 + (1 - a) p2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(FEATURES), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, shallow: Tensor) -> Tensor:
        """The log-odds (...,) of block 1's share, from its logits (..., V)."""
        return (gate_features(shallow) * self.weight.float()).sum(dim=-1) + self.bias.float()

    def mixed(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Log-probabilities (..., V) of the mixture, from the logits (..., V) of both exits."""
        odds = self(shallow).unsqueeze(-1)  # (..., 1)
        first = F.logsigmoid(odds) + shallow.float().log_softmax(dim=-1)
        return torch.logaddexp(first, F.logsigmoid(-odds) + deep.float().log_softmax(dim=-1))

    @classmethod
    def of(cls, tensors: dict[str, Tensor], path: object) -> Gate:
        """From its tensors, read from `path`.

        Raises:
            ArtifactError: they are not those of a gate.
        """
        gate = cls()
        shapes = {name: tensor.shape for name, tensor in gate.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ArtifactError(f"{path}: lacks the gate that its config.json speaks of; run dvc repro")
        gate.load_state_dict(tensors)
        return gate
