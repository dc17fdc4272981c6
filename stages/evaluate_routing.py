"""The routed model on test text, with every exit criterion, and the folder that users load: data/routed.

dvc repro evaluate_routing      (python -m stages.evaluate_routing)
"""

from dataclasses import dataclass
from typing import Any, cast

import torch

from lego.artifacts import atomic_folder, read_json, read_number, write_csv, write_json
from lego.batches import EvaluationBatches
from lego.blocks import PackedBlocks, corpus_facts, data_digests
from lego.calibration import (
    Calibration,
    GainFit,
    all_criteria,
    macs_of,
    payment_sentence,
    quality_lines,
    realised_risk,
    router_quality,
)
from lego.checkpoint import load_exit, load_model
from lego.cost import Ledger
from lego.criteria import Criterion, StateCriterion
from lego.evaluation import (
    Route,
    TokenTable,
    comparison_lines,
    routed_metrics,
    save_tables,
    threshold_sweep,
    token_table,
)
from lego.harness import Stage, exit_cleanly, resolve_device
from lego.hf import model_card, save_routed, to_hf
from lego.latency import latency_ratios
from lego.params import Params, load_params
from lego.progress import share
from lego.transformer import BaseTransformer, DeepSupervisionTransformer


@dataclass(frozen=True)
class Routing:
    """What calibration text decided: criteria by name, how each routes, the chosen one, and what is promised of it."""

    criteria: dict[str, Criterion]
    routes: dict[str, Route]
    chosen: Route
    promise: dict[str, Any]


def text(split: str, params: Params, part: tuple[float, float] = (0.0, 1.0)) -> EvaluationBatches:
    return EvaluationBatches(PackedBlocks("data/tokens", split, part), params.evaluation.batch_size)


def decide(params: Params, model: BaseTransformer, seed: int, device: torch.device) -> Routing:
    """Fits the gain criterion and sets every criterion's threshold, on calibration text alone."""
    settings, exit_facts, probe = params.routing, *load_exit("data/exit", model)
    split, fit_tokens = exit_facts["split"], exit_facts["fit_tokens"]
    whole = text(split, params)
    gain = GainFit(model.sizes["dim"], settings.gain_width)
    token_table(model, text(split, params, (0.0, fit_tokens / whole.blocks.tokens)), device, on_states=gain.add)
    criteria = all_criteria(probe, gain.solve(settings.gain_l2, seed))
    calibration = Calibration(
        token_table(model, whole, device, criteria),
        fit_tokens,
        whole.blocks.seq_len,
        exit_facts["threshold"],
        exit_facts["hard_example_ratio"],
        settings,
    )
    macs = {name: macs_of(criterion) for name, criterion in criteria.items()}
    routes = {name: Route(name, calibration.quantile(name), macs[name]) for name in criteria}
    if settings.calibration == "quantile":
        return Routing(criteria, routes, routes[settings.criterion], {})
    threshold, found = calibration.certificate(settings.criterion)
    print(
        f"risk by {settings.criterion}: at most {found.epsilon:g} nats with probability {1 - found.delta:g} on "
        f"{found.units} units; the smallest promise on them is {found.smallest_epsilon:.4f}, on any so many "
        f"{found.best_epsilon:.4f}" + ("" if found.chosen is not None else "; it cannot be kept: always deep"),
        flush=True,
    )
    return Routing(criteria, routes, Route(settings.criterion, threshold, macs[settings.criterion]), vars(found))


def report(
    params: Params, model: BaseTransformer, routing: Routing, test: TokenTable, ledger: Ledger, leaky: bool
) -> None:
    """Writes and prints what each criterion is worth on test text, and what came of the promise."""
    quality = {name: router_quality(test, route, ledger) for name, route in routing.routes.items()}
    chosen = routing.chosen
    promise = routing.promise | (
        realised_risk(test, chosen, ledger.seq_len, params.routing.risk_clip) if routing.promise else {}
    )
    write_json("metrics/criteria.json", quality | {"risk": promise, "leaky": leaky})
    print("\n".join(quality_lines(quality)))
    if promise:
        print("risk on test text: " + ", ".join(f"{key} {value}" for key, value in promise.items()))
    print(payment_sentence(chosen.criterion, router_quality(test, chosen, ledger), ledger, model.sizes["dim"]))


def write_routed(model: DeepSupervisionTransformer, routing: Routing, metrics: dict[str, Any]) -> None:
    """data/routed: the model as transformers and `lego.generate` load it."""
    from transformers import AutoTokenizer

    tokenizer, chosen = "data/tokens/tokenizer", routing.chosen
    end = AutoTokenizer.from_pretrained(tokenizer).eos_token_id
    scorer = routing.criteria[chosen.criterion]
    converted = to_hf(
        model,
        chosen.threshold,
        chosen.criterion,
        scorer if isinstance(scorer, StateCriterion) else None,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=None,
    )
    with atomic_folder("data/routed") as folder:
        save_routed(converted, folder, tokenizer, model_card(converted, metrics))


def main() -> None:
    params = load_params()
    with Stage("evaluate_routing", params.seed, params.train.threads) as stage:
        mined = read_json("metrics/collect_hard.json", "n_hard", "hard_share", "leaky")
        converged = read_json("metrics/train_phase1.json", "phase1_converged")["phase1_converged"]
        train_macs = read_number("metrics/train_phase1.json", "train_macs")
        train_macs += read_number("metrics/added_macs.json", "added_macs")
        yardstick = read_json("metrics/baseline/shallow_continued.json")
        model, device = cast(DeepSupervisionTransformer, load_model("data/phase2")), resolve_device(params.train.device)
        routing = decide(params, model, stage.seed, device)
        chosen, test = routing.chosen, text("test", params)
        ledger = Ledger.of(model, test.blocks.seq_len)
        tables = {
            "test": token_table(model, test, device, routing.criteria),
            "validation": token_table(model, text("validation", params), device, routing.criteria),
        }
        mining = load_exit("data/exit", model)[0]["threshold"]
        facts = corpus_facts("data/tokens")["splits"]["test"]
        metrics = routed_metrics(tables["test"], tables["validation"], mining, ledger, facts, chosen)
        metrics |= {key: mined[key] for key in ("n_hard", "hard_share", "leaky")} | {"train_macs": train_macs}
        with atomic_folder("data/evaluation") as folder:
            save_tables(folder, **tables)
        write_routed(model, routing, metrics)
        write_json("metrics/evaluate_routing.json", metrics)
        sweep = threshold_sweep(tables["test"], ledger, params.evaluation.sweep_points, chosen.criterion, chosen.macs)
        write_csv("metrics/curves/evaluate_routing.csv", sweep)
        report(params, model, routing, tables["test"], ledger, mined["leaky"])
        easy = int(tables["test"].easy(chosen.threshold, chosen.criterion).sum())
        print(f"shallow {share(easy, test.blocks.tokens)} of test text; phase 1 converged: {converged}")
        print("\n".join(comparison_lines(metrics, yardstick)))
        if params.evaluation.latency_repeats:
            ids = test.blocks.rows(torch.arange(min(32, len(test.blocks))))[:, :-1]
            criterion, repeats = routing.criteria[chosen.criterion], params.evaluation.latency_repeats
            stage.record |= latency_ratios(model, ids, chosen.threshold, repeats, criterion)
        stage.record |= data_digests("data/tokens") | {"counts": {"tokens": test.blocks.tokens}}


if __name__ == "__main__":
    exit_cleanly(main)
