"""The routed model on test text, with every exit criterion, and the folder that users load: data/routed.

dvc repro evaluate_routing      (python -m stages.evaluate_routing)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lego.base.artifacts import atomic_folder, read_json, read_number, write_csv, write_json, write_metrics
from lego.base.harness import Stage, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.base.progress import share
from lego.evaluation.calibration import Calibration, all_criteria, certificate_line, fitted_gain, score_macs
from lego.evaluation.gating import gate_for
from lego.evaluation.latency import latency_ratios
from lego.evaluation.metrics import HardTokens, comparison_lines, routed_metrics, summary
from lego.evaluation.plain import document_rows
from lego.evaluation.risk import Certificate, units_of
from lego.evaluation.routed import Route, TokenTable, save_tables, threshold_sweep, token_table
from lego.evaluation.router_quality import (
    captured_by_share,
    payment_sentence,
    quality_lines,
    realised_risk,
    router_quality,
)
from lego.hub.export import model_card, save_routed, to_hf
from lego.model.checkpoint import load_exit, load_model
from lego.model.cost import Ledger
from lego.model.exit_criteria import Criterion, StateCriterion
from lego.model.gate import Gate
from lego.model.transformer import BaseTransformer, DeepSupervisionTransformer
from lego.tokens.batches import EvaluationBatches, split_batches
from lego.tokens.blocks import PackedBlocks, corpus_facts, data_digests

SCORED = ("test", "validation")
FACTS = (
    "data/facts/tokenize.json",
    "data/facts/train_phase1.json",
    "data/facts/compute_threshold.json",
    "data/facts/collect_hard.json",
    "data/facts/train_phase2.json",
    "data/facts/added_macs.json",
    "data/facts/train_shallow_continued.json",
)
"""What the stages before this one counted and found."""


@dataclass(frozen=True)
class Routing:
    """What calibration text decided: criteria by name, how each routes, the chosen one, what is promised of it.

    `mining` is the threshold of max_prob that mining used; `gate` mixes both exits in answers of hard tokens, and
    `mixed` says what it was worth on the text it was fitted on.
    """

    criteria: dict[str, Criterion]
    routes: dict[str, Route]
    chosen: Route
    promise: Certificate | None
    mining: float
    gate: Gate | None
    mixed: dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """What the routed model answers: by which routing, token by token of each split, at what cost, in numbers."""

    routing: Routing
    tables: dict[str, TokenTable]
    ledger: Ledger
    metrics: dict[str, Any]


def answer(params: Params, model: DeepSupervisionTransformer, seed: int, device: torch.device) -> Answers:
    """Decides how the model routes, on calibration text, and has it answer test and validation text.

    Args:
        params: of the run.
        model: of two blocks.
        seed: of what is fitted.
        device: where it runs.
    """
    routing = decide(params, model, seed, device)
    texts = {name: split_batches("data/tokens", name, params.evaluation.batch_size) for name in SCORED}
    wanted, gate = scored(routing.criteria), routing.gate
    tables = {name: token_table(model, text, device, wanted, gate=gate) for name, text in texts.items()}
    ledger = Ledger.of(model, texts["test"].blocks.seq_len, gated=gate is not None)
    hard = {name: HardTokens.of(table, routing.mining) for name, table in tables.items()}
    facts = corpus_facts("data/tokens")["splits"]["test"]
    return Answers(routing, tables, ledger, routed_metrics(tables, hard, ledger, facts, routing.chosen))


def units(blocks: PackedBlocks, unit: str) -> np.ndarray:
    """Number of each predicted token's block or document."""
    return units_of(blocks, unit, corpus_facts("data/tokens")["end_of_text"])


def decide(params: Params, model: BaseTransformer, seed: int, device: torch.device) -> Routing:
    """Fits the gate and the gain criterion and sets every criterion's threshold, on calibration text alone."""
    settings, facts, probe = params.routing, *load_exit("data/exit", model)
    split, mining, fit_tokens, size = (
        facts["split"],
        facts["threshold"],
        facts["fit_tokens"],
        params.evaluation.batch_size,
    )
    blocks = PackedBlocks("data/tokens", split)
    first = split_batches("data/tokens", split, size, (0.0, fit_tokens / blocks.tokens))
    gate, mixed = gate_for(model, first, device) if settings.gate == "fitted" else (None, {})
    criteria = all_criteria(probe.to(device), fitted_gain(model, first, gate, settings, seed, device))
    table = token_table(model, EvaluationBatches(blocks, size), device, scored(criteria), gate=gate)
    ratio = facts["hard_example_ratio"]
    calibration = Calibration(table, fit_tokens, units(blocks, settings.risk_unit), mining, ratio, settings)
    macs = {name: score_macs(name, model.sizes["dim"], settings) for name in criteria}
    routes = {name: Route(name, calibration.quantile(name), macs[name]) for name in criteria}
    name, found = settings.criterion, None
    if settings.calibration == "risk":
        threshold, found = calibration.certificate(name)
        routes[name] = Route(name, threshold, macs[name])
        print(certificate_line(name, found, settings), flush=True)
    return Routing(criteria, routes, routes[name], found, mining, gate, mixed)


def scored(criteria: dict[str, Criterion]) -> dict[str, Criterion]:
    """Those whose scores a token table does not hold anyway."""
    return {name: criterion for name, criterion in criteria.items() if name != "max_prob"}


def report(params: Params, routing: Routing, tables: dict[str, TokenTable], ledger: Ledger, leaky: bool) -> None:
    """Writes and prints what each criterion is worth, and what came of the promise on test text."""
    quality = {
        split: {name: router_quality(table, route, ledger) for name, route in routing.routes.items()}
        for split, table in tables.items()
    }
    promise: dict[str, Any] = {}
    if routing.promise is not None:
        of_test = units(PackedBlocks("data/tokens", "test"), params.routing.risk_unit)
        realised = realised_risk(tables["test"], routing.chosen, of_test, params.routing.risk_clip)
        promise = vars(routing.promise) | realised
        print("risk on test text: " + ", ".join(f"{key} {value:.4f}" for key, value in realised.items()))
    gated: dict[str, Any] = {}
    if routing.gate is not None:
        captured = {split: captured_by_share(table, routing.routes) for split, table in tables.items()}
        gated = {"gate": routing.mixed, "of_attainable_by_deep_share": captured}
    write_json("metrics/details/criteria.json", quality | {"risk": promise, "leaky": leaky} | gated)
    if routing.gate is not None:
        print("gate, where it was fitted: " + ", ".join(f"{key} {value:.4f}" for key, value in routing.mixed.items()))
    print("\n".join(["exit criteria on validation text, where one is chosen:", *quality_lines(quality["validation"])]))
    print(payment_sentence(routing.chosen.criterion, quality["test"]))


def stage_facts() -> dict[str, Any]:
    """What earlier stages counted and found, gathered for git; digests apart, which stay in data/facts."""
    found = {Path(file).stem: read_json(file) for file in FACTS}
    return {stage: {key: facts[key] for key in facts if not key.endswith("sha256")} for stage, facts in found.items()}


def write_documents(table: TokenTable, routing: Routing) -> None:
    """Losses by test document: of the routed model, and of block 1, which every later gain is counted from."""
    hard, of_test = ~table.easy(routing.mining), units(PackedBlocks("data/tokens", "test"), "document")
    routed = table.routed_nll(routing.chosen.threshold, routing.chosen.criterion)
    write_csv("data/documents/ashem.csv", document_rows(routed, table.nll_deep, hard, of_test))
    shallow = table.nll_shallow
    write_csv("data/documents/shallow.csv", document_rows(shallow, shallow, hard, of_test))


def write_answers(model: DeepSupervisionTransformer, found: Answers) -> None:
    """data/evaluation: what both exits said; data/routed: the model as transformers and `lego.generate` load it."""
    with atomic_folder("data/evaluation") as folder:
        save_tables(folder, **found.tables)
    routing = found.routing
    tokenizer, chosen, end = "data/tokens/tokenizer", routing.chosen, corpus_facts("data/tokens")["end_of_text"]
    scorer = routing.criteria[chosen.criterion]
    ids = {"eos_token_id": end, "pad_token_id": end, "bos_token_id": None}
    converted = to_hf(
        model,
        chosen.threshold,
        chosen.criterion,
        scorer if isinstance(scorer, StateCriterion) else None,
        routing.gate,
        **{name: value for name, value in ids.items() if name not in model.generation_config},
    )
    with atomic_folder("data/routed") as folder:
        save_routed(converted, folder, tokenizer, model_card(converted, found.metrics))


def main() -> None:
    params = load_params()
    with Stage("evaluate_routing", params.seed, params.train.threads) as stage:
        mined = read_json("data/facts/collect_hard.json", "n_hard", "hard_share", "leaky")
        converged = read_json("data/facts/train_phase1.json", "phase1_converged")["phase1_converged"]
        trained = read_json("data/facts/train_phase2.json", "lr")
        phase1_macs = read_number("data/facts/train_phase1.json", "train_macs")
        added_macs = read_number("data/facts/added_macs.json", "added_macs")
        yardstick = read_json("metrics/details/shallow_continued.json")
        model, device = cast(DeepSupervisionTransformer, load_model("data/phase2")), resolve_device(params.train.device)
        found = answer(params, model, stage.seed, device)
        routing, tables, ledger, metrics = found.routing, found.tables, found.ledger, found.metrics
        chosen, blocks = routing.chosen, PackedBlocks("data/tokens", "test")
        metrics |= {key: mined[key] for key in ("n_hard", "hard_share", "leaky")} | {"lr": trained["lr"]}
        metrics |= {"train_macs": phase1_macs + added_macs, "added_macs": added_macs, "budget_macs": added_macs}
        metrics |= {"distance_from_budget": 0.0}  # the others' budget is what it spent
        write_documents(tables["test"], routing)
        write_answers(model, found)
        write_json("metrics/details/ashem.json", metrics)
        write_metrics("metrics/summary.json", summary(metrics))
        write_json("metrics/details/stages.json", stage_facts())
        sweep = threshold_sweep(tables["test"], ledger, params.evaluation.sweep_points, chosen.criterion, chosen.macs)
        write_csv("data/curves/evaluate_routing.csv", sweep)
        report(params, routing, tables, ledger, mined["leaky"])
        easy = int(tables["test"].easy(chosen.threshold, chosen.criterion).sum())
        known = "not known, it was given" if converged is None else converged
        print(f"shallow {share(easy, blocks.tokens)} of test text; phase 1 converged: {known}")
        print("\n".join(comparison_lines(metrics, yardstick)))
        if params.evaluation.latency_repeats:
            ids = blocks.rows(torch.arange(min(32, len(blocks))))[:, :-1]
            criterion, repeats = routing.criteria[chosen.criterion], params.evaluation.latency_repeats
            stage.record |= latency_ratios(model, ids, chosen.threshold, repeats, criterion, routing.gate)
        stage.record |= data_digests("data/tokens") | {"counts": {"tokens": blocks.tokens}}


if __name__ == "__main__":
    exit_cleanly(main)
