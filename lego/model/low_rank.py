"""Low-rank changes of frozen linear maps (LoRA, Hu et al. 2022, arXiv 2106.09685), added to them when they are saved.

Shapes: r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lego.model.layers import TransformerLayer


class LowRankLinear(nn.Linear):
    """A frozen linear map without bias, plus a trained one through `rank` numbers that begins at zero.

    Args:
        frozen: its weight (out, in) is taken over.
        rank: columns of the change (r).
    """

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__(frozen.in_features, frozen.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(frozen.weight, requires_grad=False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))  # as LoRA's authors and peft begin
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.up(self.down(x))


def train_low_rank(layer: TransformerLayer, rank: int) -> None:
    """Freezes the matrices of a branch layer and puts changes of this rank beside them; its norms train as before."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            owner = layer.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], LowRankLinear(module, rank))


def folded_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with each low-rank change added to the map that it changes."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            down, up = state.pop(f"{name}.down.weight"), state.pop(f"{name}.up.weight")
            state[f"{name}.weight"] = torch.addmm(state[f"{name}.weight"], up, down)
    return state
