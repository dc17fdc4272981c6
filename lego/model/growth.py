"""How a trained model grows: block 2 on top of it, and any number of blocks after that. What was there is frozen."""

from __future__ import annotations

import torch
from torch import nn

from lego.model.blocks import source_of
from lego.model.layers import TransformerLayer
from lego.model.low_rank import folded_state, train_low_rank
from lego.model.transformer import BaseTransformer, DeepSupervisionTransformer

INITS = ("copy", "zero", "random")


def grow_model(
    block1: BaseTransformer,
    num_layers: int,
    *,
    init: str = "copy",
    routing_threshold: float = 0.0,
    block2_context: str = "full",
    head: str = "shared",
    branch_layer: int | None = None,
    branch_rank: int = 0,
) -> DeepSupervisionTransformer:
    """Puts new layers on top of a trained model and freezes what was there.

    Args:
        block1: the trained model; all of its layers become block 1, its last layer the exit.
        num_layers: total depth of the grown model, branch layers not counted again.
        init: `copy` repeats block 1's last layers in order, so that the last new one is a copy of its last; `zero`
            zeroes the new layers' output projections, so that deep equals shallow before training; `random` keeps the
            constructor's weights.
        routing_threshold: confidence from which a token leaves early.
        block2_context: see DeepSupervisionTransformer.
        head: `shared` (frozen), `own` (a trainable copy for block 2 alone), or `shared_trainable` (one trainable head
            for both exits, untied from the embedding: the historical protocol, which moves block 1's confidences).
        branch_layer: see DeepSupervisionTransformer; branch layers begin as copies of those that they repeat, and there
            need be no new ones.
        branch_rank: of the changes that branch layers learn instead of whole matrices (LoRA); 0 = whole ones.

    Raises:
        ValueError: num_layers does not exceed block 1's depth, or an unknown init or head, or a branch_layer outside
            block 1, or a rank that is not below its width.
    """
    k = block1.num_layers
    branches = 0 if branch_layer is None else k - branch_layer
    _refuse_growth(block1, num_layers, init, head, branches, branch_rank)
    sizes = block1.sizes | {"num_layers": num_layers + branches, "own_head": head == "own"}
    if head == "shared_trainable":
        sizes["tie_embeddings"] = False
    grown = DeepSupervisionTransformer(
        **sizes,
        exit_layer=k,
        routing_threshold=routing_threshold,
        block2_context=block2_context,
        branch_layer=branch_layer,
    )
    grown.generation_config = dict(block1.generation_config)
    grown.embedding.load_state_dict(block1.embedding.state_dict())
    grown.output_head.load_state_dict(block1.output_head.state_dict())
    if grown.deep_head is not None:
        grown.deep_head.load_state_dict(block1.output_head.state_dict())
    for index in range(k):
        grown.layers[index].load_state_dict(block1.layers[index].state_dict())
    branch_layers = [grown.layer(number) for number in range(k + 1, k + branches + 1)]
    for number, layer in enumerate(branch_layers, k - branches + 1):
        _init_new_layer(layer, block1.layer(number), block1.layer(k).exit_norm, "copy")
    for number in grown.own_layers:
        source = block1.layer(k - (grown.num_layers - number) % k)
        _init_new_layer(grown.layer(number), source, block1.layer(k).exit_norm, init)
    frozen = [grown.embedding, *grown.layers[:k]] + ([] if head == "shared_trainable" else [grown.output_head])
    for module in frozen:
        module.requires_grad_(False)
    grown.branch_rank = branch_rank
    for layer in branch_layers if branch_rank else ():
        train_low_rank(layer, branch_rank)
    return grown


def _refuse_growth(
    block1: BaseTransformer, num_layers: int, init: str, head: str, branches: int, branch_rank: int
) -> None:
    """Raises ValueError for arguments of `grow_model` that do not fit; `branches` layers are repeated."""
    k, dim = block1.num_layers, block1.sizes["dim"]
    if block1.branches:
        raise ValueError("block 1 has a block 2 that begins below its exit; grow the model that it was grown from")
    if not 0 <= branches <= k:
        raise ValueError(f"branch_layer must be in 0..{k}, block 1's last, got {k - branches}")
    if num_layers < k + (not branches):
        raise ValueError(f"num_layers must exceed block 1's {k}, got {num_layers}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if not 0 <= branch_rank < dim:
        raise ValueError(f"branch_rank must be in 0..{dim - 1}, got {branch_rank}")
    if branch_rank and not branches:
        raise ValueError("branch_rank needs a branch_layer below the exit: it is the branch layers that it is of")
    if head not in ("shared", "own", "shared_trainable"):
        raise ValueError(f"head must be shared, own or shared_trainable, got {head!r}")


@torch.no_grad()
def _init_new_layer(layer: TransformerLayer, source: TransformerLayer, exit_norm: nn.RMSNorm, init: str) -> None:
    if init == "random":
        return
    if init == "copy":
        wanted, given = layer.state_dict(), source.state_dict()  # either may repeat another, without keys and values
        layer.load_state_dict(wanted | {name: tensor for name, tensor in given.items() if name in wanted})
    else:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    layer.exit_norm.load_state_dict(exit_norm.state_dict())


def add_block(
    model: BaseTransformer, layers: int, *, repeats: int = 0, init: str = "copy", rank: int = 0
) -> DeepSupervisionTransformer:
    """Puts one more block on a model of two blocks or more and freezes what was there.

    It is read through the head of the block below, which is frozen, and a norm of its own.

    Args:
        model: with two blocks at least, in `sequence` context.
        layers: new layers, which may be none where there are repeating ones.
        repeats: so many of the block below's last layers are repeated first, on their keys and values; they begin as
            copies of them.
        init: of the new layers, as for `grow_model`; `copy` repeats the last layers of the block below.
        rank: of the changes that repeating layers learn instead of whole matrices (LoRA); 0 = whole ones.

    Raises:
        ValueError: the model has one block, or another context; nothing is added; arguments outside their range.
    """
    _refuse_block(model, layers, repeats, init, rank)
    later = [[block.layers, block.repeats] for block in model.blocks[1:]]
    grown = DeepSupervisionTransformer(
        **model.sizes | {"num_layers": model.num_layers + repeats + layers},
        exit_layer=model.exit_layer,
        routing_threshold=getattr(model, "routing_threshold", 0.0),
        block2_context=model.block2_context,
        branch_layer=model.branched_at,
        later_blocks=[*later, [repeats + layers, repeats]],
    )
    grown.generation_config = dict(model.generation_config)
    missing = grown.load_state_dict(folded_state(model), strict=False)
    assert not missing.unexpected_keys
    grown.requires_grad_(False)
    below, block = model.blocks[-1], grown.blocks[-1]
    norm = grown.layer(below.last).exit_norm
    for number in range(block.first, block.last + 1):
        grown.layer(number).requires_grad_(True)
    for number in block.repeating:
        _init_new_layer(grown.layer(number), grown.layer(number - repeats), norm, "copy")
    for place, number in enumerate(reversed(block.own)):
        copied = below.last - place % below.layers
        _init_new_layer(grown.layer(number), grown.layer(copied), norm, init)
        if init == "copy":  # a layer that repeats another reads that one's keys and values
            source = grown.layer(source_of(copied, grown.blocks)).self_attn
            for name in ("k_proj", "v_proj"):
                getattr(grown.layer(number).self_attn, name).load_state_dict(getattr(source, name).state_dict())
    grown.branch_rank = rank
    for number in block.repeating if rank else ():
        train_low_rank(grown.layer(number), rank)
    return grown


def _refuse_block(model: BaseTransformer, layers: int, repeats: int, init: str, rank: int) -> None:
    """Raises ValueError for arguments of `add_block` that do not fit."""
    if not model.blocks or model.block2_context != "sequence":
        raise ValueError("a further block needs a model of two blocks in context sequence; grow_model makes one")
    below = model.blocks[-1].layers
    if not 0 <= repeats <= below:
        raise ValueError(f"repeats must be in 0..{below}, the layers of the block below, got {repeats}")
    if layers < (not repeats):
        raise ValueError(f"layers must be at least {int(not repeats)}, got {layers}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if not 0 <= rank < model.sizes["dim"] or (rank and not repeats):
        raise ValueError(f"rank must be 0, or below the width with layers that repeat others, got {rank}")
