"""What block 1 alone decides of exits: the threshold, a quantile of its confidence on calibration text, and the probe.

dvc repro compute_threshold      (python -m stages.compute_threshold)
"""

import torch

from lego.base.artifacts import atomic_folder, write_facts, write_json
from lego.base.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.base.params import load_params
from lego.mining.thresholds import collect_confidences, quantile_threshold
from lego.model.checkpoint import block1_sha256, load_model
from lego.model.exit_criteria import Ridge, log_odds
from lego.tokens.batches import EvaluationBatches
from lego.tokens.blocks import PackedBlocks, data_digests

LEAST = 20  # tokens to fit on, of which a tenth says when to stop


def tokens_to_fit_on(share: float, blocks: PackedBlocks, split: str) -> int:
    """The first tokens of calibration text, on which exit criteria are fitted; their thresholds come from the rest."""
    count = round(share * len(blocks))
    if count * blocks.seq_len < LEAST or count >= len(blocks):
        raise StageError(
            f"params.yaml: exits.fit_share {share:g} of {len(blocks)} blocks of {split} text leaves fewer than {LEAST} "
            "tokens to fit on, or none to calibrate with; change it or raise data.max_calibration_tokens"
        )
    return count * blocks.seq_len


def main() -> None:
    params = load_params()
    ratio, leaky = params.ashem.hard_example_ratio, params.ashem.hard_split == "validation"
    split = "validation" if leaky else "calibration"
    with Stage("compute_threshold", threads=params.train.threads) as stage:
        blocks = PackedBlocks("data/tokens", split)
        batches, model = EvaluationBatches(blocks, params.evaluation.batch_size), load_model("data/phase1")
        fit_tokens = tokens_to_fit_on(params.exits.fit_share, blocks, split)
        probe = Ridge(model.sizes["dim"])

        def fit(states: torch.Tensor, confidence: torch.Tensor) -> None:
            left = fit_tokens - probe.n
            probe.add(states[:left], log_odds(confidence[:left]))

        confidences = collect_confidences(model, batches, resolve_device(params.train.device), fit)
        if confidences.min() == confidences.max():
            raise StageError(
                f"data/facts/compute_threshold.json: all {confidences.numel():,} {split} tokens have the confidence "
                f"{confidences[0]:g}, so none is hard; block 1 has "
                "learned nothing: change ashem.phase1_lr or phase1_epochs"
            )
        threshold = quantile_threshold(confidences, ratio)
        found = {"threshold": threshold, "split": split, "hard_example_ratio": ratio}
        counted = {
            "tokens": confidences.numel(),
            "hard_share": (confidences < threshold).float().mean().item(),
            "mean_confidence": confidences.double().mean().item(),
            "leaky": leaky,
        }
        write_facts("data/facts/compute_threshold.json", found | counted)
        with atomic_folder("data/exit") as folder:
            probe.solve(params.exits.probe_l2).save(folder / "probe.safetensors")
            write_json(folder / "exit.json", found | {"block1_sha256": block1_sha256(model), "fit_tokens": fit_tokens})
        stage.record |= data_digests("data/tokens") | {"counts": {"tokens": confidences.numel()}}


if __name__ == "__main__":
    exit_cleanly(main)
