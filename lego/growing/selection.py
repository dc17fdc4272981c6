"""Which tokens block 2 learns from, other than those block 1 is unsure of: the selections ASHEM is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lego.mining.hidden_states import HiddenStateStore
from lego.model.exit_criteria import StateCriterion
from lego.model.reached import Reached
from lego.model.transformer import BaseTransformer

BLOCKS = 64  # of which exit states are made at a time
Score = Callable[[dict[str, Tensor]], Tensor]
"""(inputs, targets, confidences, hard (b, T), exit_states (b, T, D)) -> how much each token is wanted (b, T)."""


def recompute(store: HiddenStateStore, model: BaseTransformer, device: torch.device, layer: int | None = None) -> None:
    """Lets a store without states make them with block 1, a few blocks at a time; of its exit or a lower layer."""
    at = model.exit_layer if layer is None else layer

    @torch.no_grad()
    def states(ids: Tensor) -> Tensor:
        model.eval()
        made = (model.run_layers(model.embedding(part.to(device)), 1, at).cpu() for part in ids.split(BLOCKS))
        return torch.cat(list(made))

    model.to(device)
    store.compute = states


def top(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks of the `count` tokens with the largest scores; of equal ones those that come first."""
    flat = torch.cat([score.flatten() for score in scores])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.argsort(flat, descending=True, stable=True)[:count]] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


@torch.no_grad()
def scores_of(store: HiddenStateStore, score: Score, batch_blocks: int) -> list[Tensor]:
    """The score of every token of the store, per shard (b, T), a few blocks at a time."""
    found = []
    for index in range(len(store.shards)):
        shard = store.read_shard(index)
        parts = [_Blocks(store, shard, part) for part in torch.arange(len(shard["hard"])).split(batch_blocks)]
        found.append(torch.cat([score(part).cpu() for part in parts]))
    return found


class _Blocks(dict[str, Tensor]):
    """Some blocks of a shard; exit states that are not stored are made for a score that asks for them."""

    def __init__(self, store: HiddenStateStore, shard: dict[str, Tensor], places: Tensor) -> None:
        super().__init__({key: value[places] for key, value in shard.items()})
        self.store = store

    def __missing__(self, key: str) -> Tensor:
        if key != "exit_states":
            raise KeyError(key)
        return self.store.states(self)


def random(seed: int) -> Score:
    """Any tokens."""
    generator = torch.Generator().manual_seed(seed)
    return lambda blocks: torch.rand(blocks["hard"].shape, generator=generator)


def easy(blocks: dict[str, Tensor]) -> Tensor:
    """The tokens block 1 is surest of."""
    return blocks["confidences"]


def exits_of(
    blocks: dict[str, Tensor], model: BaseTransformer | None, device: torch.device, layer: int | None
) -> Tensor:
    """Exit states (b, T, D) of blocks, whose states are those of the exit or of a lower layer of block 1."""
    h = blocks["exit_states"].float().to(device)
    if model is None or layer is None:
        return h
    if h.shape[-1] > model.sizes["dim"]:
        return Reached.unpacked(h, model.sizes).states[-1]
    return model.run_layers(h, layer + 1, model.exit_layer)


def exit_loss(model: BaseTransformer, device: torch.device, layer: int | None = None) -> Score:
    """The tokens with the largest loss at block 1's exit.

    Args:
        model: block 1.
        device: where it runs.
        layer: whose outputs the store holds, if not the exit's.
    """

    def score(blocks: dict[str, Tensor]) -> Tensor:
        y = blocks["targets"].long().to(device)
        return model.read_at(exits_of(blocks, model, device, layer), model.exit_layer, y)[0].view(y.shape)

    return score


def reducible_loss(
    model: BaseTransformer, reference: BaseTransformer, device: torch.device, layer: int | None = None
) -> Score:
    """RHO-loss (Mindermann et al. 2022, arXiv 2206.07137): the loss less that of a reference model of other text."""
    loss = exit_loss(model, device, layer)

    def score(blocks: dict[str, Tensor]) -> Tensor:
        x, y = (blocks[key].long().to(device) for key in ("inputs", "targets"))
        states = reference.states_at(x, reference.num_layers)
        return loss(blocks) - reference.read_at(states, reference.num_layers, y)[0].view(y.shape)

    return score


def expected_gain(
    gain: StateCriterion, device: torch.device, model: BaseTransformer | None = None, layer: int | None = None
) -> Score:
    """The tokens that block 2, as a first round left it, is expected to help most.

    Args:
        gain: fitted to exit states.
        device: where it runs.
        model: block 1, where a layer is given.
        layer: whose outputs the store holds, if not the exit's.
    """

    def score(blocks: dict[str, Tensor]) -> Tensor:
        h = exits_of(blocks, model, device, layer)  # (b, T, D)
        return -gain(h.flatten(0, 1), h.new_empty(h.shape[0] * h.shape[1], 0)).view(h.shape[:2])

    return score


def everything(store: HiddenStateStore) -> list[Tensor]:
    """All tokens of the store."""
    return [torch.ones_like(store.read_shard(index)["hard"]) for index in range(len(store.shards))]


def with_replay(store: HiddenStateStore, share: float, seed: int) -> HiddenStateStore:
    """The hard tokens and, mixed among them, easy ones drawn at random, until these are this share of both."""
    if not share:
        return store
    wanted = min(store.manifest["tokens"] - store.hard_tokens, round(store.hard_tokens * share / (1 - share)))
    draw = random(seed)
    scores = scores_of(store, lambda blocks: draw(blocks) + 2 * blocks["hard"], 1024)  # hard ones first
    return store.selecting(top(scores, store.hard_tokens + wanted))


def whole_blocks(store: HiddenStateStore) -> list[Tensor]:
    """All tokens of every block that holds a hard one: mining per sequence, the documented mistake."""
    masks = [store.read_shard(index)["hard"] for index in range(len(store.shards))]
    return [mask.any(dim=1, keepdim=True).expand_as(mask).contiguous() for mask in masks]
