"""The gate: what a token that goes deep is answered with, a mixture of both exits (specs: ashem section 9).

Block 2 sees further and block 1 is the steadier of the two; which of them is to be trusted, block 1's own confidence
tells. Easy tokens are not touched.

Shapes: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lego.base.artifacts import ArtifactError

SURE = 1e-6  # the log-odds of a probability are bounded by those of this


class Gate(nn.Module):
    """The share a = sigmoid(weight * log-odds(largest probability) + bias) of block 1 in p = a p1 + (1 - a) p2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, confidence: Tensor) -> Tensor:
        """The log-odds (...,) of block 1's share, from its largest probability (...,)."""
        return self.weight.float() * confidence.float().logit(eps=SURE) + self.bias.float()

    def mixed(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Log-probabilities (..., V) of the mixture in float32, from the logits (..., V) of both exits.

        A probability too small for float32 counts as the least there is.
        """
        p1, p2 = shallow.float().softmax(dim=-1), deep.float().softmax(dim=-1)
        odds = self(p1.amax(dim=-1)).unsqueeze(-1)  # (..., 1)
        mixture = torch.addcmul(p1 * odds.sigmoid(), p2, (-odds).sigmoid())  # (..., V); 1 - a would lose a small p2
        return mixture.clamp(min=torch.finfo(torch.float32).tiny).log()

    @classmethod
    def at(cls, weight: float, bias: float) -> Gate:
        """The gate of these numbers."""
        gate = cls()
        gate.weight.fill_(weight)
        gate.bias.fill_(bias)
        return gate

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
