"""What users would do instead: the given model trained further, for what mining and phase 2 cost.

dvc repro stages/extend/dvc.yaml:rival@lora_32      (python here.py stages.extend.rival lora_32)
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from lego.base.artifacts import read_json, read_number, write_csv, write_json
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.base.params import Params, load_params
from lego.evaluation.routed import token_table
from lego.growing.hard_batches import HardBlockBatches
from lego.growing.phase2 import grown, hard_batches
from lego.growing.selection import recompute
from lego.growing.upper_layers import train_gathered
from lego.mining.hard_tokens import exit_states
from lego.mining.hidden_states import HiddenStateStore
from lego.model.checkpoint import load_model
from lego.model.transformer import BaseTransformer
from lego.tokens.batches import TrainingBatches, blocks_in_epoch, split_batches
from lego.tokens.blocks import data_digests, train_text
from lego.training.budget import train_blocks
from lego.training.epochs import epoch_rows
from lego.training.search import Search, Trial, search_rates
from lego.training.setup import build_training
from lego.training.trainer import Trainer, create_standard_config
from stages.extend.rivals import macs_of, merged, seconds_of, start
from stages.extend.settings import RivalParams, load_settings
from stages.extend.texts import TEXTS, measured

BLOCK1, TOKENS = "data/phase1", "data/tokens"


def a_batch(params: Params) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the text that is learned: x, y (B, T)."""
    blocks = text(params)
    rows = blocks.rows(torch.arange(params.train.batch_size) % len(blocks))  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]


def macs_of_block(entry: RivalParams, params: Params, seed: int) -> int:
    """MACs of training the rival on one block: forward and backward, as the ledger counts them for every model."""
    model, (x, y) = start(entry, BLOCK1, seed), a_batch(params)
    trainer = Trainer(create_standard_config(model.num_layers), model.sizes["vocab_size"])
    return macs_of(lambda: trainer.compute_loss(model, x[:1], y[:1]).backward())


def seconds_in_turn(entry: RivalParams, seed: int) -> tuple[float, float]:
    """Seconds that mining and phase 2 take on this machine, and that a step of a rival takes, measured in turn."""
    params = load_params()
    torch.set_num_threads(params.train.threads)
    torch.manual_seed(seed)
    device, ashem, (x, y) = resolve_device(params.train.device), params.ashem, a_batch(params)
    seq_len = x.shape[1]
    block1, store = load_model(BLOCK1), HiddenStateStore("data/hard")
    branch = ashem.branch_of(block1.num_layers)
    if store.online:
        recompute(store, block1, device, branch)
    batches = hard_batches(store, ashem.phase2_context, params.train, seq_len, params.seed)
    if not isinstance(batches, HardBlockBatches):
        raise StageError("params.yaml: ashem.phase2_context must be sequence for a rival of equal seconds")
    ours = grown(ashem, block1, store.threshold, params.seed).to(device)
    optimizer, options = build_training(ours, 1e-9, 1, params.train)
    batches.total_steps = 1
    steps = read_number("data/facts/train_phase2.json", "hard_tokens_seen") / batches.seen(1)[-1]
    model = start(entry, BLOCK1, seed).to(device)
    of_rival, how = build_training(model, 1e-9, 1, params.train)
    trainer = Trainer(create_standard_config(model.num_layers), model.sizes["vocab_size"], device, options=how)
    runs = (
        lambda: list(exit_states(block1, [(x, y)], device, branch, store.kept)),
        lambda: train_gathered(ours, batches, optimizer, device, options=options),
        lambda: trainer.train_epoch(model, [(x, y)], of_rival),
    )
    mine, step, rival = seconds_of(runs)
    mined = store.manifest["tokens"] + read_number("data/facts/compute_threshold.json", "tokens")
    return mine * mined / x.numel() + step * steps, rival


def budget(entry: RivalParams, stage: Stage, params: Params, macs: float) -> tuple[int, int]:
    """How many blocks the rival is trained on, and the MACs that one costs; a run that goes on keeps what it found.

    Args:
        entry: what is trained.
        stage: whose scratch folder holds what was found.
        params: of this folder.
        macs: that mining and phase 2 cost.

    Raises:
        StageError: not even one.
    """
    file = stage.scratch / "budget.json"
    if file.exists():
        known = read_json(file)
        return known["blocks"], known["macs"]
    each = macs_of_block(entry, params, stage.seed)
    affordable = round(macs / each)
    if entry.equal == "seconds":  # in a process of its own, whose memory is not the rival's
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            spent, step = pool.submit(seconds_in_turn, entry, stage.seed).result()
        affordable = round(spent / step * params.train.batch_size)
    if affordable < 1:
        raise StageError("data/facts/added_macs.json: the budget pays for no block; raise ashem.phase2_epochs")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"blocks": affordable, "macs": each})
    return affordable, each


def text(params: Params) -> Any:
    """What block 2 was mined on."""
    ashem = params.ashem
    return train_text(TOKENS, 2, ashem.phase2_share, ashem.phase2_split, params.seed, ashem.phase2_text)


def search(
    entry: RivalParams, params: Params, stage: Stage, batches: TrainingBatches
) -> tuple[Search, dict[float, Any]]:
    """Trains the rival at each learning rate; also seconds and trained parameters by rate."""
    device, spent = resolve_device(params.train.device), dict[float, Any]()
    validation = split_batches(TOKENS, "validation", params.evaluation.batch_size)

    def train(lr: float) -> Trial:
        model = start(entry, BLOCK1, stage.seed)
        begun, file = time.perf_counter(), stage.scratch / f"state-{lr:g}.safetensors"
        config = create_standard_config(model.num_layers)
        rest = (params.train, validation, device, file)
        history, continued = train_blocks(model, config, batches, lr, *rest, keep_start=True)
        stage.continued |= continued
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        spent[lr] = {"seconds": time.perf_counter() - begun, "trainable_parameters": trained}
        return Trial(lr, merged(model), history)

    return search_rates(entry.lr, params.search.lr_factors, train), spent


def judged(model: BaseTransformer, params: Params) -> dict[str, float | None]:
    """What is said of a model on each text."""
    device, size = resolve_device(params.train.device), params.evaluation.batch_size
    texts = {prefix: split_batches(*place, size) for prefix, place in TEXTS.items()}
    return measured({prefix: token_table(model, text, device).nll_deep for prefix, text in texts.items()})


def main(*names: str) -> None:
    params, settings, name = load_params(), load_settings(), " ".join(names)
    if name not in settings.rivals:
        raise StageError(f"extend.yaml: rivals must have {name!r}, it has {', '.join(settings.rivals)}")
    entry = settings.rivals[name]
    with Stage(f"extend/rival@{name}", params.seed, params.train.threads) as stage:
        added = read_json("data/facts/added_macs.json", "added_macs")["added_macs"]
        affordable, each = budget(entry, stage, params, added)
        blocks = text(params)
        per_epoch = blocks_in_epoch(params.train.tokens_per_epoch, blocks)
        batches = TrainingBatches(blocks, params.train.batch_size, per_epoch, stage.seed, total_blocks=affordable)
        print(f"{name}: {affordable * blocks.seq_len:,} tokens for {affordable * each:.3e} MACs", flush=True)
        found, spent = search(entry, params, stage, batches)
        history = found.best.history
        seen = batches.seen(len(history.evaluations))
        write_csv(f"data/curves/rival_{name}.csv", epoch_rows(history.as_result(), seen, affordable * each, 0.0))
        of_best = spent[found.best.lr]
        seconds = of_best.pop("seconds")
        stage.record |= {} if stage.continued else {"train_seconds": seconds}  # else another run took a part of them
        metrics = judged(found.best.model, params) | found.facts | of_best
        metrics |= {"added_macs": affordable * each, "budget_macs": added, "equal": entry.equal}
        metrics |= {"trained_tokens": affordable * blocks.seq_len}
        write_json(f"metrics/rivals/{name}.json", metrics)
        print(f"{name}: test ppl {metrics['ppl']:.3f}, on other text {metrics['other_ppl']:.3f}")
        stage.record |= data_digests(TOKENS) | {"counts": {"trained_tokens": affordable * blocks.seq_len}}


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
