"""Models that ASHEM is compared with: what they start as and cost, what they spent, and how tokens leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lego.base.ashem_sections import JointParams
from lego.base.harness import StageError, resolve_device
from lego.base.params import Params
from lego.evaluation.calibration import fitted_gain, share_threshold
from lego.evaluation.gating import gate_for
from lego.evaluation.plain import Leaving
from lego.evaluation.routed import Route, token_table
from lego.model.cost import SIZES, Ledger
from lego.model.exit_criteria import LOGIT_CRITERIA
from lego.model.growth import grow_model
from lego.model.transformer import BaseTransformer, DeepSupervisionTransformer
from lego.tokens.batches import EvaluationBatches, split_batches
from lego.training.epochs import epoch_rows
from lego.training.trainer import StageConfig, TrainingConfig, create_standard_config


@dataclass
class Spent:
    """What a run at one learning rate has cost so far: MACs, tokens it learned from, and its curve."""

    macs: float
    tokens: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)

    def add(self, result: dict[str, Any], seen: list[int], macs: float, before: float) -> None:
        """Notes what `fit` returned of a part of the run; see epoch_rows."""
        self.rows += epoch_rows(result, seen, macs, self.macs + before)
        self.macs += macs
        self.tokens += seen[-1]


def middle_depth(exit_layer: int, num_layers: int, hard_ratio: float) -> int:
    """The whole number of layers nearest to what a routed token passes on average; the larger of two as near."""
    return exit_layer + int(hard_ratio * (num_layers - exit_layer) + 0.5)


def resized(sizes: dict[str, Any], dim: int) -> dict[str, Any]:
    """Sizes of a model of about this width: a whole number of rotary pairs for each head, ffn_dim in proportion."""
    step = 2 * sizes["num_heads"]
    dim = step * max(1, round(dim / step))
    return sizes | {"dim": dim, "ffn_dim": max(1, round(sizes["ffn_dim"] * dim / sizes["dim"]))}


def widened(sizes: dict[str, Any], seq_len: int, macs: float) -> dict[str, Any]:
    """Sizes of the model of the same depth whose inference comes nearest to this many MACs per token.

    Args:
        sizes: of a BaseTransformer; heads stay as many and grow wider, ffn_dim keeps its proportion.
        seq_len: tokens per sequence.
        macs: mean cost of a token.
    """

    def cost(wide: dict[str, Any]) -> int:
        return Ledger(**{name: wide[name] for name in SIZES}, exit_layer=wide["num_layers"], seq_len=seq_len).full

    step = 2 * sizes["num_heads"]
    dim = step
    while cost(resized(sizes, dim)) < macs:
        dim += step
    return min((resized(sizes, dim), resized(sizes, dim - step)), key=lambda wide: abs(cost(wide) - macs))


def start_joint(
    entry: JointParams,
    block1: BaseTransformer,
    ledger: Ledger,
    deep_share: float,
    criterion_macs: int | None = None,
) -> DeepSupervisionTransformer:
    """The untrained or grown model that a baseline begins with.

    Args:
        entry: of the section baselines.joint.
        block1: the model of phase 1, or what `late` grows from.
        ledger: costs of the routed model that grows from it.
        deep_share: share of its tokens that go deep.
        criterion_macs: what its exit score costs; None = a head.

    Raises:
        StageError: it should have two exits, and is not deeper than the first.
    """
    k, full = ledger.exit_layer, ledger.num_layers
    depth = {"shallow": k, "middle": middle_depth(k, full, deep_share), "full": full}[entry.depth]
    if entry.exits == "both" and depth <= k:
        raise StageError(
            f"params.yaml: a baseline with exits both and depth {entry.depth} has {depth} layers, as block 1; make it "
            "full, or exits last"
        )
    if entry.start == "scratch":
        sizes = block1.sizes | {"num_layers": depth, "own_head": False}
        if entry.widened:
            sizes = widened(sizes, ledger.seq_len, ledger.routed(1 - deep_share, criterion_macs))
        return DeepSupervisionTransformer(**sizes, exit_layer=k if entry.exits == "both" else depth)
    if depth > k:
        model = grow_model(block1, depth, init="copy")
    else:
        model = DeepSupervisionTransformer(**block1.sizes, exit_layer=k)
        model.load_state_dict(block1.state_dict())
    model.requires_grad_(True)
    model.exit_layer = k if entry.exits == "both" else depth
    return model


def losses_of(entry: JointParams, model: BaseTransformer) -> TrainingConfig:
    """Where a baseline's loss is computed."""
    return create_standard_config(model.num_layers) if entry.exits == "last" else exits_config(model)


def exits_config(model: BaseTransformer) -> TrainingConfig:
    """The loss at both exits, with equal weight."""
    layers = (model.exit_layer, model.num_layers)
    return TrainingConfig([StageConfig((layer, layer), 1 / len(layers)) for layer in layers])


def joint_macs(entry: JointParams, model: BaseTransformer, seq_len: int, tokens: int) -> int:
    """What training it on `tokens` tokens costs."""
    return Ledger.of(model, seq_len).train_joint(tokens, exits=2 if entry.exits == "both" else 1)


def small_reference(block1: BaseTransformer, dim: int, num_layers: int) -> DeepSupervisionTransformer:
    """An untrained model of block 1's vocabulary and heads, of about this width, and of this depth."""
    sizes = resized(block1.sizes, dim) | {"num_layers": num_layers, "own_head": False}
    return DeepSupervisionTransformer(**sizes, exit_layer=num_layers)


@torch.no_grad()
def leaving_of(params: Params, model: BaseTransformer, seed: int) -> Leaving:
    """How tokens leave a model with two exits, decided on calibration text as ASHEM's: at the same share, gated alike.

    By `gain`, fitted to this model, if that is the criterion, or by what a criterion reads of logits; by `max_prob` in
    place of the others, which it says.
    """
    routing, device = params.routing, resolve_device(params.train.device)

    def text(part: tuple[float, float] = (0.0, 1.0)) -> EvaluationBatches:
        return split_batches("data/tokens", "calibration", params.evaluation.batch_size, part)

    first, rest = text((0.0, params.exits.fit_share)), text((params.exits.fit_share, 1.0))
    gate = gate_for(model, first, device)[0] if routing.gate == "fitted" else None
    share = routing.deep_share(params.ashem.hard_example_ratio)
    if routing.criterion != "gain":
        name = routing.criterion if routing.criterion in LOGIT_CRITERIA else "max_prob"
        if name != routing.criterion or routing.calibration != "quantile":
            print(f"this baseline routes by {name}, a share {share:g} of its tokens deep", flush=True)
        scores = torch.from_numpy(token_table(model, text(), device, {name: LOGIT_CRITERIA[name]}).score(name))
        return Leaving(Route(name, share_threshold(scores, share)), LOGIT_CRITERIA[name], gate)
    gain = fitted_gain(model, first, gate, routing, seed, device)
    scores = torch.from_numpy(token_table(model, rest, device, {"gain": gain}, gate=gate).score("gain"))
    return Leaving(Route("gain", share_threshold(scores, share), gain.macs), gain, gate)
