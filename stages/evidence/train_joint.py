"""A baseline whose layers all learn from all tokens, for exactly the MACs that phase 1 and ASHEM, or ASHEM alone, cost.

dvc repro stages/evidence/dvc.yaml:joint@dense      (python -m stages.evidence.train_joint dense)
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lego.base.artifacts import atomic_folder, read_json, read_number, write_csv, write_json, write_metrics
from lego.base.ashem_sections import JointParams
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.base.sections import TrainParams
from lego.evaluation.calibration import score_macs
from lego.evaluation.metrics import summary
from lego.evaluation.plain import Comparison
from lego.evaluation.routed import evaluate_at_share
from lego.model.checkpoint import load_model, save_model
from lego.model.cost import Ledger
from lego.model.transformer import BaseTransformer
from lego.tokens.batches import TrainingBatches, blocks_in_epoch, split_batches
from lego.tokens.blocks import PackedBlocks, data_digests, train_text
from lego.training.budget import Budget, train_blocks
from lego.training.epochs import History, epoch_rows
from lego.training.search import Search, Trial, search_rates
from lego.training.trainer import TrainingConfig
from stages.evidence.baselines import joint_macs, leaving_of, losses_of, start_joint


@dataclass(frozen=True)
class Leg:
    """A stretch of training: what it begins with, on which batches, under which schedule.

    Args:
        start: makes the model, from the one that the leg before ended with.
        config: where the loss is computed.
        macs_per_token: what training it costs.
        batches: with total_blocks.
        train: section `train` of the parameters, its schedule that of this leg.
        keep_start: whether the model may also stay as it began.
    """

    start: Callable[[BaseTransformer | None], BaseTransformer]
    config: TrainingConfig
    macs_per_token: int
    batches: TrainingBatches
    train: TrainParams
    keep_start: bool

    @property
    def tokens(self) -> int:
        assert self.batches.total_blocks
        return self.batches.total_blocks * self.batches.blocks.seq_len

    @property
    def macs(self) -> int:
        return self.macs_per_token * self.tokens


@dataclass(frozen=True)
class Plan:
    """What is trained and for how much: `ledger` holds the costs of the routed model it is compared with.

    `threshold_macs` are those of the pass over calibration text of a model that routes by its own exit.
    """

    entry: JointParams
    block1: BaseTransformer
    ledger: Ledger
    budget: Budget
    legs: list[Leg]
    threshold_macs: int

    @property
    def tokens(self) -> int:
        return sum(leg.tokens for leg in self.legs)

    @property
    def macs(self) -> int:
        return sum(leg.macs for leg in self.legs) + self.threshold_macs


def threshold_macs(model: BaseTransformer, calibration: PackedBlocks) -> int:
    """What a model that routes by its own exit needs to find its threshold; nothing for the others."""
    routes = model.exit_layer < model.num_layers
    return Ledger.of(model, calibration.seq_len).mine(calibration.tokens) if routes else 0


def budget_of(name: str, entry: JointParams) -> Budget:
    phase1 = read_number("data/facts/train_phase1.json", "train_macs")
    added = read_number("data/facts/added_macs.json", "added_macs")
    if entry.budget == "added":
        return Budget(added, phase1)
    if not phase1:
        raise StageError(
            f"params.yaml: baselines.joint.{name} starts from scratch, but block 1 was given (ashem.phase1_epochs is "
            "0) and the MACs it cost are not known; leave this baseline out"
        )
    return Budget(phase1 + added)


def plan(name: str, params: Params, seed: int) -> Plan:
    """What the budget pays for."""
    entry, ashem, block1 = params.baselines.joint[name], params.ashem, load_model("data/phase1")
    budget, blocks = budget_of(name, entry), PackedBlocks("data/tokens", "train")
    if entry.budget == "added":
        share, split = ashem.phase2_share, ashem.phase2_split
        blocks = train_text("data/tokens", 2, share, split, params.seed, ashem.phase2_text)
    depth = block1.num_layers + ashem.new_layers
    ledger = Ledger.of(block1, blocks.seq_len).grown(depth, ashem.phase2_context, ashem.branch_of(block1.num_layers))
    routing = params.routing
    ledger = replace(ledger, gated=routing.gate == "fitted")
    deep, macs = routing.deep_share(ashem.hard_example_ratio), score_macs(routing.criterion, ledger.dim, routing)

    def start(entry: JointParams, before: BaseTransformer | None) -> BaseTransformer:
        torch.manual_seed(seed)
        return start_joint(entry, before or block1, ledger, deep, macs)

    parts = [(entry, 1.0, params.train)]
    if entry.start == "late":
        growth = params.baselines.growth
        first = entry.model_copy(update={"start": "scratch", "depth": "shallow", "exits": "last"})
        last = params.train.model_copy(update={"schedule": "wsd", "decay_share": growth.decay_share})
        steady = params.train.model_copy(update={"schedule": "constant"})
        parts = [(first, growth.at, steady), (entry, 1.0, last)]
    passed = threshold_macs(start(entry, None), PackedBlocks("data/tokens", "calibration"))
    legs: list[Leg] = []
    for number, (part, share, train) in enumerate(parts):
        model = start(part, None)
        cost = joint_macs(part, model, blocks.seq_len, 1)
        left = share * (budget.macs - passed) - sum(leg.macs for leg in legs)
        affordable = round(left / (cost * blocks.seq_len))
        if affordable < 1:
            raise StageError(
                f"data/facts/added_macs.json: the budget of {name} pays for no block; raise ashem.phase2_epochs"
            )
        per_epoch = blocks_in_epoch(params.train.tokens_per_epoch, blocks)
        batches = TrainingBatches(blocks, params.train.batch_size, per_epoch, seed + number, total_blocks=affordable)
        legs.append(Leg(partial(start, part), losses_of(part, model), cost, batches, train, part.start != "scratch"))
    return Plan(entry, block1, ledger, budget, legs, passed)


def search(params: Params, stage: Stage, planned: Plan) -> tuple[Search, dict[float, list[History]]]:
    """Trains the model at each learning rate for the whole budget; also says what each run saw in its legs."""
    device, ratio = resolve_device(params.train.device), params.ashem.hard_example_ratio
    validation = split_batches("data/tokens", "validation", params.evaluation.batch_size)
    seen: dict[float, list[History]] = {}

    def train(lr: float) -> Trial:
        model, seen[lr] = None, []
        for number, leg in enumerate(planned.legs):
            model = leg.start(model)
            routes = model.exit_layer < model.num_layers
            history, continued = train_blocks(
                model,
                leg.config,
                leg.batches,
                lr,
                leg.train,
                validation,
                device,
                stage.scratch / f"state-{lr:g}-{number}.safetensors",
                keep_start=leg.keep_start,
                evaluate=partial(evaluate_at_share, model, validation, ratio, device) if routes else None,
            )
            stage.continued |= continued
            seen[lr].append(history)
        assert model is not None
        return Trial(lr, model, seen[lr][-1])

    return search_rates(planned.entry.lr, params.search.lr_factors, train), seen


def curve(planned: Plan, histories: list[History]) -> list[dict[str, float]]:
    """Rows of the legs' epochs, one after the other."""
    rows: list[dict[str, float]] = []
    spent, tokens = planned.budget.before or 0.0, 0
    for leg, history in zip(planned.legs, histories, strict=True):
        result, begun = history.as_result(), len(rows)
        macs = leg.macs + (planned.threshold_macs if leg is planned.legs[-1] else 0)
        for row in epoch_rows(result, leg.batches.seen(result["total_epochs"]), macs, spent):
            rows.append(row | {"epoch": begun + row["epoch"], "tokens": tokens + row["tokens"]})
        spent, tokens = spent + macs, tokens + leg.tokens
    return rows


def evaluate(
    params: Params, model: BaseTransformer, planned: Plan, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The keys of a model file that follow from what the model says of text, and its losses by document."""
    device, threshold = (
        resolve_device(params.train.device),
        read_number("data/facts/compute_threshold.json", "threshold"),
    )
    compared = Comparison.on(
        "data/tokens", params.evaluation.batch_size, planned.block1, threshold, planned.ledger, device
    )
    routes = model.exit_layer < model.num_layers  # by its own exit, at the same share
    return compared.judge(model, leaving_of(params, model, seed) if routes else None)


def main(name: str = "") -> None:
    params = load_params()
    if name not in params.baselines.joint:
        raise StageError(f"params.yaml: baselines.joint must have {name!r}, it has {', '.join(params.baselines.joint)}")
    with Stage(f"joint@{name}", params.seed, params.train.threads) as stage:
        planned = plan(name, params, stage.seed)
        tokens, macs = planned.tokens, planned.macs
        print(f"{name}: {tokens:,} tokens for {planned.budget.macs:.3e} MACs", flush=True)
        found, histories = search(params, stage, planned)
        metrics, documents = evaluate(params, found.best.model, planned, stage.seed)
        with atomic_folder(f"data/baseline/{name}") as folder:
            save_model(found.best.model, folder, tokenizer="data/tokens/tokenizer")
        write_csv(f"metrics/curves/{name}.csv", curve(planned, histories[found.best.lr]))
        write_csv(f"metrics/documents/{name}.csv", documents)
        spent = planned.budget.spent(macs, found.best.lr)
        leaky = read_json("data/facts/added_macs.json", "leaky")["leaky"]  # whether its budget is that of a leaky run
        unmined = {"n_hard": None, "hard_share": None, "leaky": leaky}  # it learns from every token
        metrics |= spent | unmined
        write_json(f"metrics/details/{name}.json", metrics)
        write_metrics(f"metrics/baseline/{name}.json", summary(metrics))
        print(f"{name}: test ppl {metrics['ppl']:.3f}, {100 * (macs / planned.budget.macs - 1):+.2f} % of its budget")
        stage.record |= data_digests("data/tokens") | {"counts": {"trained_tokens": tokens * len(found.tried)}}


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
