"""A baseline that is phase 2 on other tokens than the hard ones, or by the historical protocol, for ASHEM's added MACs.

dvc repro stages/evidence/dvc.yaml:block2@random      (python -m stages.evidence.train_block2 random)
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lego.base.artifacts import atomic_folder, identity, read_number, write_csv, write_json, write_metrics
from lego.base.ashem_sections import AshemParams
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.evaluation.calibration import GainFit
from lego.evaluation.metrics import summary
from lego.evaluation.plain import Comparison, Leaving
from lego.evaluation.routed import Route, evaluate_at_share, token_table
from lego.growing import selection
from lego.growing.phase2 import grown, hard_batches, steps_for, train_block2
from lego.mining.hard_tokens import exit_states
from lego.mining.hidden_states import HiddenStateStore, StoreWriter
from lego.mining.thresholds import collect_confidences, quantile_threshold
from lego.model.checkpoint import load_model, save_model
from lego.model.cost import Ledger
from lego.model.exit_criteria import max_prob
from lego.model.transformer import BaseTransformer, DeepSupervisionTransformer
from lego.tokens.batches import EvaluationBatches, TrainingBatches, blocks_in_epoch, split_batches
from lego.tokens.blocks import corpus_facts, data_digests, train_text
from lego.training.budget import Budget, train_blocks
from lego.training.epochs import History
from lego.training.search import Search, Trial, search_rates
from lego.training.trainer import create_standard_config
from stages.evidence.baselines import Spent, exits_config, leaving_of, small_reference

Choose = Callable[[DeepSupervisionTransformer], tuple[HiddenStateStore, float]]
"""Block 2 as it is -> what it learns from next, and the MACs that finding this out cost."""


@dataclass
class Baseline:
    """What all parts of this stage need: parameters, block 1, what was mined, and what a run spent by learning rate."""

    name: str
    params: Params
    stage: Stage
    block1: BaseTransformer
    store: HiddenStateStore
    budget: Budget
    spent: dict[float, Spent] = field(default_factory=dict)
    n_hard: int = 0

    @property
    def protocol(self) -> str:
        return self.params.baselines.block2[self.name].protocol

    @property
    def ashem(self) -> AshemParams:
        """The section `ashem`, as the protocol changes it."""
        if self.protocol != "historic":
            return self.params.ashem
        if not self.params.ashem.new_layers:
            raise StageError(
                f"params.yaml: baselines.block2.{self.name} puts new layers on block 1, and there are none: raise "
                "ashem.phase2_layers, or leave it out"
            )
        historic = {"phase2_context": "historic", "head": "shared_trainable", "replay_share": 0.0, "states": "stored"}
        return self.params.ashem.model_copy(update=historic | {"branch_layer": None, "branch": "full"})

    @property
    def branch(self) -> int | None:
        """Layer whose outputs the store holds, if not the exit's."""
        return self.ashem.branch_of(self.block1.num_layers)

    @property
    def device(self) -> torch.device:
        return resolve_device(self.params.train.device)

    def text(self, split: str, part: tuple[float, float] = (0.0, 1.0)) -> EvaluationBatches:
        return split_batches("data/tokens", split, self.params.evaluation.batch_size, part)


def mine_validation(params: Params, stage: Stage, block1: BaseTransformer) -> HiddenStateStore:
    """The historical fault: hard tokens, and the threshold, from the text on which the model is then scored."""
    folder, device = stage.scratch / "store", resolve_device(params.train.device)
    batches = split_batches("data/tokens", "validation", params.evaluation.batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    threshold = quantile_threshold(collect_confidences(block1, batches, device), params.ashem.hard_example_ratio)
    writer = StoreWriter(folder, threshold, params.ashem.store_dtype, params.ashem.shard_tokens)
    for batch in exit_states(block1, EvaluationBatches(batches.blocks, batches.batch_size, writer.blocks), device):
        writer.add(*batch)
    macs = Ledger.of(block1, batches.blocks.seq_len).mine(2 * batches.blocks.tokens)  # once more for the threshold
    writer.close(split="validation", text="all", macs=macs, block1_sha256="", tokenizer_sha256="")
    return HiddenStateStore(folder)


def reference_of(one: Baseline) -> tuple[BaseTransformer, float]:
    """The small model that reducible_loss subtracts, trained on phase 1's text, and what it costs to make and use."""
    params, own = one.params, one.params.baselines.selection
    torch.manual_seed(one.stage.seed)
    model = small_reference(one.block1, own.reference_dim, own.reference_layers)
    share, split = params.ashem.phase2_share, params.ashem.phase2_split
    blocks = train_text("data/tokens", 1, share, split, params.seed)
    ledger = Ledger.of(model, blocks.seq_len)
    affordable = max(1, round(own.reference_share * one.budget.macs / ledger.train_joint(blocks.seq_len)))
    per_epoch = blocks_in_epoch(params.train.tokens_per_epoch, blocks)
    batches = TrainingBatches(blocks, params.train.batch_size, per_epoch, one.stage.seed, total_blocks=affordable)
    train_blocks(
        model,
        create_standard_config(model.num_layers),
        batches,
        params.ashem.phase1_lr,
        params.train,
        one.text("validation"),
        one.device,
        one.stage.scratch / "reference.safetensors",
        keep_start=False,
    )
    return model, ledger.train_joint(affordable * blocks.seq_len) + ledger.full * one.store.manifest["tokens"]


def by_expected_gain(one: Baseline, model: DeepSupervisionTransformer) -> tuple[HiddenStateStore, float]:
    """As many tokens as are hard, those that block 2 as it is helps most by a linear fit on calibration text."""
    params, device = one.params, one.device
    calibration = one.text("calibration", (0.0, params.exits.fit_share))
    fit = GainFit(model.sizes["dim"], 0)
    token_table(model, calibration, device, on_states=fit.add)
    gain = fit.solve(params.routing.gain_l2, one.stage.seed).to(device)
    scores = selection.scores_of(
        one.store, selection.expected_gain(gain, device, one.block1, one.branch), params.evaluation.batch_size
    )
    ledger = Ledger.of(model, calibration.blocks.seq_len)
    macs = (ledger.full + ledger.head) * calibration.blocks.tokens
    macs += (gain.macs + to_exits(one)) * one.store.manifest["tokens"]
    return one.store.selecting(selection.top(scores, one.store.hard_tokens)), macs


def to_exits(one: Baseline) -> int:
    """MACs that lead from what the store holds of a token to its exit state."""
    ledger = Ledger.of(one.block1, corpus_facts("data/tokens")["seq_len"])
    if one.store.online:
        return ledger.block1
    return 0 if one.store.kept or one.branch is None else (ledger.exit_layer - one.branch) * ledger.layer


def rounds(one: Baseline) -> list[tuple[float, Choose]]:
    """Passes of phase 2: the share of the budget that each has, and how it finds its tokens."""
    store, device, blocks = one.store, one.device, one.params.evaluation.batch_size
    select, extra = one.params.baselines.block2[one.name].select, 0.0
    first = one.params.baselines.selection.first_round
    block1 = one.block1.to(device)
    head = block1.sizes["dim"] * block1.sizes["vocab_size"]
    reading = (to_exits(one) + head) * store.manifest["tokens"]  # the exit's loss of every token
    match select:
        case "hard":
            chosen = selection.with_replay(store, one.ashem.replay_share, one.stage.seed)
        case "all":
            chosen = store.selecting(selection.everything(store))
        case "sequence_level":
            chosen = store.selecting(selection.whole_blocks(store))
        case "expected_gain":
            return [(first, lambda model: (store, 0.0)), (1 - first, lambda model: by_expected_gain(one, model))]
        case _:
            if select == "random":
                score = selection.random(one.stage.seed)
            elif select == "easy":
                score = selection.easy
            elif select == "high_loss":
                score, extra = selection.exit_loss(block1, device, one.branch), reading
            else:
                reference, extra = reference_of(one)
                extra += reading
                score = selection.reducible_loss(block1, reference, device, one.branch)
            chosen = store.selecting(selection.top(selection.scores_of(store, score, blocks), store.hard_tokens))
    print(f"{one.name}: {chosen.hard_tokens / store.manifest['tokens']:.1%} of the mined tokens", flush=True)
    one.n_hard = chosen.hard_tokens
    return [(1.0, lambda model: (chosen, extra))]


def search(one: Baseline) -> Search:
    """Trains block 2 at each learning rate for the whole budget."""
    params, passes, seq_len = one.params, rounds(one), corpus_facts("data/tokens")["seq_len"]
    validation, mined, before = one.text("validation"), one.store.manifest["macs"], one.budget.before or 0
    frozen = 1 - (params.baselines.selection.unfrozen_end if one.protocol == "unfreeze" else 0)

    def train(lr: float) -> Trial:
        model = grown(one.ashem, one.block1, one.store.threshold, one.stage.seed)
        spent = one.spent[lr] = Spent(mined)
        ledger = replace(Ledger.of(model, seq_len), online=one.store.online, kept=one.store.kept)
        head_trains = one.ashem.head != "shared"
        for number, (share, choose) in enumerate(passes):
            chosen, macs = choose(model)
            batches = hard_batches(chosen, one.ashem.phase2_context, params.train, seq_len, one.stage.seed + number)
            spent.macs += macs
            steps = steps_for(share * (frozen * one.budget.macs - mined) - macs, batches, ledger, head_trains)
            if steps < 1:
                raise StageError(
                    f"data/facts/added_macs.json: pays for no step of {one.name}; raise ashem.phase2_epochs"
                )
            batches.total_steps, epochs = steps, -(-steps // batches.steps)
            state_file = one.stage.scratch / f"state-{lr:g}-{number}.safetensors"
            history, continued = train_block2(
                model, batches, lr, epochs, epochs + 1, params.train, validation, one.device, state_file
            )
            seen, streamed = batches.seen(epochs), batches.streamed(epochs)
            spent.add(history.as_result(), seen, ledger.train_block2(seen[-1], head_trains, streamed), before)
            one.stage.continued |= continued
        return Trial(lr, model, unfreeze(one, model, lr) if frozen < 1 else history)

    return search_rates(params.baselines.block2[one.name].lr, params.search.lr_factors, train)


def unfreeze(one: Baseline, model: DeepSupervisionTransformer, lr: float) -> History:
    """Spends what is left of the budget on all layers and all tokens, with the loss at both exits."""
    params, spent, before = one.params, one.spent[lr], one.budget.before or 0
    share, split, drawn = params.ashem.phase2_share, params.ashem.phase2_split, params.ashem.phase2_text
    blocks = train_text("data/tokens", 2, share, split, params.seed, drawn)
    ledger, validation = Ledger.of(model, blocks.seq_len), one.text("validation")
    spent.macs += ledger.mine(one.text("calibration").blocks.tokens)  # block 1 moves, and with it the threshold
    affordable = round((one.budget.macs - spent.macs) / ledger.train_joint(blocks.seq_len, exits=2))
    if affordable < 1:
        raise StageError(f"params.yaml: baselines.selection.unfrozen_end pays for no block of {one.name}; raise it")
    per_epoch = blocks_in_epoch(params.train.tokens_per_epoch, blocks)
    batches = TrainingBatches(blocks, params.train.batch_size, per_epoch, one.stage.seed, total_blocks=affordable)
    model.requires_grad_(True)
    history, continued = train_blocks(
        model,
        exits_config(model),
        batches,
        lr * params.train.min_lr_ratio,  # where the schedule ended; its peak undoes what block 2 learned
        params.train.model_copy(update={"warmup_steps": 0}),
        validation,
        one.device,
        one.stage.scratch / f"state-{lr:g}-unfrozen.safetensors",
        keep_start=True,
        evaluate=lambda: evaluate_at_share(model, validation, params.ashem.hard_example_ratio, one.device),
    )
    one.stage.continued |= continued
    seen = batches.seen(len(history.evaluations))
    spent.add(history.as_result(), seen, ledger.train_joint(seen[-1], exits=2), before)
    return history


def evaluate(one: Baseline, model: BaseTransformer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The keys of a model file that follow from what the model says of text, and its losses by document."""
    size = one.params.evaluation.batch_size
    ledger = Ledger.of(model, corpus_facts("data/tokens")["seq_len"])
    threshold = read_number("data/facts/compute_threshold.json", "threshold", high=1.0)
    compared = Comparison.on("data/tokens", size, one.block1, threshold, ledger, one.device)
    if one.protocol == "historic":  # by the threshold that it was mined with, and without a gate
        return compared.judge(model, Leaving(Route("max_prob", one.store.threshold), max_prob))
    return compared.judge(model, leaving_of(one.params, model, one.stage.seed))


def prepare(name: str, params: Params, stage: Stage) -> Baseline:
    block1 = load_model("data/phase1")
    budget = Budget(
        read_number("data/facts/added_macs.json", "added_macs"),
        read_number("data/facts/train_phase1.json", "train_macs"),
    )
    if params.baselines.block2[name].protocol == "historic":
        store = mine_validation(params, stage, block1)
    else:
        store = HiddenStateStore("data/hard")
        store.verify(identity("data/phase1"), identity("data/tokens/tokenizer/tokenizer.json"))
    one = Baseline(name, params, stage, block1, store, budget, n_hard=store.hard_tokens)
    store.require_layer(one.branch)
    if store.online:
        selection.recompute(store, block1, one.device, one.branch)
    return one


def main(name: str = "") -> None:
    params = load_params()
    if name not in params.baselines.block2:
        known = ", ".join(params.baselines.block2)
        raise StageError(f"params.yaml: baselines.block2 must have {name!r}, it has {known}")
    with Stage(f"block2@{name}", params.seed, params.train.threads) as stage:
        one = prepare(name, params, stage)
        found = search(one)
        model, spent = found.best.model, one.spent[found.best.lr]
        metrics, documents = evaluate(one, model)
        with atomic_folder(f"data/baseline/{name}") as folder:
            save_model(model, folder, tokenizer="data/tokens/tokenizer")
        write_csv(f"metrics/curves/{name}.csv", spent.rows)
        write_csv(f"metrics/documents/{name}.csv", documents)
        leaky = one.store.manifest["split"] == "validation"
        mined = {"n_hard": one.n_hard, "hard_share": one.n_hard / one.store.manifest["tokens"], "leaky": leaky}
        cost, distance = one.budget.spent(spent.macs, found.best.lr), 100 * (spent.macs / one.budget.macs - 1)
        metrics |= cost | mined
        write_json(f"metrics/details/{name}.json", metrics)
        write_metrics(f"metrics/baseline/{name}.json", summary(metrics))
        print(f"{name}: test ppl {metrics['ppl']:.3f}, {distance:+.2f} % of its budget")
        stage.record |= data_digests("data/tokens") | {"counts": {"trained_tokens": spent.tokens * len(found.tried)}}


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
