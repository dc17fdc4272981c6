"""A model of any number of blocks on test text: each exit, and routed by thresholds from calibration text.

dvc repro stages/cascade/dvc.yaml:evaluate@third      (python -m stages.cascade.evaluate third)
"""

import sys
from typing import Any

import torch

from lego.base.artifacts import atomic_folder, read_number, write_csv, write_json
from lego.base.harness import Stage, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.evaluation.calibration import certificate_line, units_after
from lego.evaluation.cascade import ExitTable, certified_thresholds, exit_table, gates_for
from lego.evaluation.risk import units_of
from lego.evaluation.routed import perplexity
from lego.model.checkpoint import load_exit, save_cascade
from lego.model.cost import Ledger, cascade_macs
from lego.model.gate import Gate
from lego.model.transformer import BaseTransformer
from lego.tokens.batches import EvaluationBatches, split_batches
from lego.tokens.blocks import PackedBlocks, bits_per_byte, corpus_facts, data_digests
from stages.cascade.settings import OWN, block_of, stands_on

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def cost(model: BaseTransformer, seq_len: int, routed: dict[str, float]) -> float:
    """Mean MACs of a token so routed, as a multiple of block 1 and its head."""
    shares = [routed[f"share_{number}"] for number in range(2, len(model.exits) + 1)]
    return cascade_macs(model, seq_len, shares) / Ledger.of(model, seq_len).shallow()


def by_share(model: BaseTransformer, tables: dict[str, ExitTable], seq_len: int) -> list[dict[str, Any]]:
    """One row a share that goes on at every exit, the same for all; thresholds are those of calibration text."""
    rows = []
    for share in SHARES:
        found = tables["test"].routed(tables["calibration"].thresholds([share] * len(model.blocks)))
        rows.append({"share": share, "macs": cost(model, seq_len, found)} | found)
    return rows


def fitted(
    params: Params, model: BaseTransformer, text: EvaluationBatches, device: torch.device
) -> tuple[list[Gate] | None, int]:
    """The gates, and how many of the first tokens of calibration text they are fitted on."""
    fit_tokens: int = load_exit("data/exit", model)[0]["fit_tokens"]
    if params.routing.gate == "none":
        return None, fit_tokens
    part = (0.0, fit_tokens / text.blocks.tokens)
    first = split_batches("data/tokens", "calibration", params.evaluation.batch_size, part)
    return gates_for(model, first, device), fit_tokens


def promised(params: Params, table: ExitTable, fit_tokens: int) -> list[float]:
    """The thresholds whose risk is certified on the rest of calibration text."""
    blocks, end = PackedBlocks("data/tokens", "calibration"), corpus_facts("data/tokens")["end_of_text"]
    units = units_after(units_of(blocks, params.routing.risk_unit, end), fit_tokens)
    fit, rest = table.part(0, fit_tokens), table.part(fit_tokens)
    thresholds, found = certified_thresholds(fit, rest, units, params.routing)
    print(certificate_line("max_prob at every exit", found, params.routing), flush=True)
    return thresholds


def main(name: str = "") -> None:
    params = load_params()
    block_of(name)  # or one sentence
    size = params.evaluation.batch_size
    with Stage(f"cascade/evaluate@{name}", params.seed, params.train.threads) as stage:
        device, facts = resolve_device(params.train.device), corpus_facts("data/tokens")
        model, mined = stands_on(f"{OWN}{name}")
        texts = {split: split_batches("data/tokens", split, size) for split in ("calibration", "validation", "test")}
        gates, fit_tokens = fitted(params, model, texts["calibration"], device)
        tables = {split: exit_table(model, text, device, gates) for split, text in texts.items()}
        test, thresholds = tables["test"], tables["calibration"].thresholds(mined.ratios)
        if params.routing.calibration == "risk":
            thresholds = promised(params, tables["calibration"], fit_tokens)
        routed = test.routed(thresholds)
        metrics = routed | {
            "bits_per_byte": bits_per_byte(routed["ppl"], facts["splits"]["test"]),
            "val_ppl": tables["validation"].routed(thresholds)["ppl"],
            "macs": cost(model, facts["seq_len"], routed),
            "added_macs": read_number(f"data/cascade_facts/train_{name}.json", "added_macs"),
        }
        metrics |= {f"exit_{number}_ppl": perplexity(nll) for number, nll in enumerate(test.nll, 1)}
        with atomic_folder(f"data/cascade_routed/{name}") as folder:
            save_cascade(model, folder, thresholds, gates, tokenizer=f"data/{OWN}{name}")
        write_csv(f"data/curves/cascade_shares_{name}.csv", by_share(model, tables, facts["seq_len"]))
        write_json(f"metrics/cascade/{name}.json", metrics)
        exits = ", ".join(f"{metrics[f'exit_{number}_ppl']:.3f}" for number in range(1, len(model.exits) + 1))
        print(
            f"{name}: test ppl by exit {exits}; routed {routed['ppl']:.3f} at {metrics['macs']:.3f} of block 1's MACs"
        )
        stage.record |= data_digests("data/tokens")


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
