"""The extended model by share of deep tokens, on its own text and on another kind of text; what it weighs and takes.

dvc repro stages/extend/dvc.yaml:evaluate
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lego.base.artifacts import atomic_folder, read_json, read_number, write_csv, write_json
from lego.base.harness import Stage, exit_cleanly, resolve_device
from lego.base.params import load_params
from lego.evaluation.latency import ratio_of_pairs
from lego.evaluation.routed import TokenTable, load_table, token_table
from lego.hub.modeling import LegoForCausalLM
from lego.model.checkpoint import RoutedModel, load_routed
from lego.model.cost import Ledger
from lego.model.exit_criteria import Criterion, StateCriterion, max_prob
from lego.model.gate import Gate
from lego.routing.decoder import RoutedDecoder
from lego.tokens.batches import split_batches
from lego.tokens.blocks import PackedBlocks, data_digests
from stages.extend.settings import load_settings
from stages.extend.texts import TEXTS, measured

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BATCHES = (1, 8)
NEW_TOKENS = 16  # read one by one after a prompt


def tables_of(
    routed: RoutedModel, name: str, size: int, device: torch.device
) -> tuple[dict[str, TokenTable], dict[str, TokenTable]]:
    """What both exits said of each text, with the gate, if there is one, and without.

    Args:
        routed: the model with its routing.
        name: of its criterion.
        size: blocks at a time.
        device: where it runs.
    """
    scored: dict[str, Criterion] = {} if name == "max_prob" else {name: routed.criterion or max_prob}

    def table(prefix: str, gate: Gate | None) -> TokenTable:
        return token_table(routed.model, split_batches(*TEXTS[prefix], size), device, scored, gate=gate)

    gated = {
        "": load_table("data/evaluation/test.safetensors"),
        "val_": load_table("data/evaluation/validation.safetensors"),
    }
    gated["other_"] = table("other_", routed.gate)
    return gated, gated if routed.gate is None else {prefix: table(prefix, None) for prefix in TEXTS}


def figures(tables: dict[str, TokenTable], easy: Callable[[TokenTable], np.ndarray]) -> dict[str, float | None]:
    """Perplexity, bits per byte and share of deep tokens on each text, the tokens routed as `easy` says."""
    leaves = {name: easy(table) for name, table in tables.items()}
    answers = {name: np.where(leaves[name], table.nll_shallow, table.nll_deep) for name, table in tables.items()}
    return measured(answers) | {f"{name}deep_share": 1 - float(leave.mean()) for name, leave in leaves.items()}


def leaving(criterion: str, threshold: float, table: TokenTable) -> np.ndarray:
    """Which tokens (n,) leave at the exit."""
    return table.score(criterion) >= threshold


def by_share(tables: dict[str, TokenTable], criterion: str, gated: bool) -> Iterator[dict[str, Any]]:
    """One row a share of own text that goes deep; the other texts are routed by the same threshold."""
    score = tables["val_"].score(criterion)
    for share in SHARES:
        threshold = np.inf if share == 1 else float(np.quantile(score, share))
        found = figures(tables, partial(leaving, criterion, threshold))
        yield {"criterion": criterion, "gated": int(gated), "share": share} | found


def latencies(routed: RoutedModel, ids: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Median time as a multiple of the base's, to read a text and to write token by token, by batch size.

    Args:
        routed: the model with its routing.
        ids: of text (n, T).
        repeats: timed pairs.
    """
    criterion, found = routed.criterion or max_prob, dict[str, dict[str, float]]()

    def prefill(at: float | None, batch: Tensor) -> None:
        RoutedDecoder(routed.model, at, len(batch), criterion, routed.gate).read(batch)

    def decode(at: float | None, batch: Tensor) -> None:
        decoder = RoutedDecoder(routed.model, at, len(batch), criterion, routed.gate)
        decoder.read(batch[:, :NEW_TOKENS], last_only=True)
        for place in range(NEW_TOKENS, 2 * NEW_TOKENS):
            decoder.read(batch[:, place : place + 1])

    for size in BATCHES:
        batch = ids[torch.arange(size) % len(ids)].to(routed.model.embedding.weight.device)
        for how, run in (("prefill", prefill), ("decode", decode)):
            for name, at in (("routed", routed.threshold), ("deep", 2.0)):
                median, *_ = ratio_of_pairs(partial(run, at, batch), partial(run, 0.0, batch), repeats)
                found.setdefault(f"{how}_batch_{size}", {})[name] = median
    return found


def fitting(ledger: Ledger) -> int:
    """MACs of the passes at both depths by which the stage route fits gate and criterion and sets the threshold."""
    exits = read_json("data/exit/exit.json")
    return ledger.always_deep * (2 * exits["fit_tokens"] + PackedBlocks("data/tokens", exits["split"]).tokens)


def write_block(place: str) -> int:
    """Writes the block, without the base, as `LegoForCausalLM.load_block` takes it; returns its bytes."""
    with atomic_folder(place) as folder:
        LegoForCausalLM.from_pretrained("data/routed", trust_remote_code=False).save_block(folder)
    return sum(file.stat().st_size for file in Path(place).glob("*.safetensors"))


@torch.no_grad()
def main() -> None:
    params = load_params()
    size, device = params.evaluation.batch_size, resolve_device(params.train.device)
    with Stage("extend/evaluate", params.seed, params.train.threads) as stage:
        routed = load_routed("data/routed")
        assert routed.threshold is not None
        name = read_json("data/routed/config.json")["exit_criterion"]
        gated, plain = tables_of(routed, name, size, device)
        kinds = {False: plain} | ({} if routed.gate is None else {True: gated})
        rows = [row for gate, one in kinds.items() for by in {name, "max_prob"} for row in by_share(one, by, gate)]
        rows.sort(key=lambda row: (row["criterion"], row["gated"], row["share"]))
        write_csv("data/curves/extend.csv", rows)
        ledger = Ledger.of(routed.model, params.model.seq_len, gated=routed.gate is not None)
        base = ledger.block1 + ledger.head
        scorer = routed.criterion.macs if isinstance(routed.criterion, StateCriterion) else None
        models = {
            "base": figures(gated, lambda table: np.ones(len(table.nll_deep), dtype=bool)) | {"macs": 1.0},
            "routed": figures(gated, lambda table: table.score(name) >= routed.threshold),
            "deep": figures(gated, lambda table: np.zeros(len(table.nll_deep), dtype=bool)),
            "deep_without_gate": figures(plain, lambda table: np.zeros(len(table.nll_deep), dtype=bool)),
        }
        models["routed"]["macs"] = ledger.routed(1 - (models["routed"]["deep_share"] or 0.0), scorer) / base
        models["deep"]["macs"], models["deep_without_gate"]["macs"] = ledger.always_deep / base, ledger.full / base
        trained = read_json("data/facts/train_phase2.json", "trainable_parameters", "lr", "leaky")
        block = {
            **{key: trained[key] for key in ("trainable_parameters", "lr", "leaky")},
            "megabytes": write_block("data/blocks/default") / 1e6,
            "added_macs": read_number("data/facts/added_macs.json", "added_macs"),
            "fit_macs": fitting(ledger),
        }
        write_json("metrics/blocks/default.json", {"models": models, "block": block})
        if repeats := load_settings().latency_repeats:
            blocks = PackedBlocks("data/tokens", "test")
            ids = blocks.rows(torch.arange(min(max(BATCHES), len(blocks))))[:, :-1]
            stage.record["latency"] = latencies(routed, ids, repeats)
        for key, one in models.items():
            print(
                f"{key:>18}: test ppl {one['ppl']:.3f}, other text {one['other_ppl']:.3f}, deep {one['deep_share']:.3f}"
            )
        stage.record |= data_digests("data/tokens")


if __name__ == "__main__":
    exit_cleanly(main)
