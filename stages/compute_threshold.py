"""What block 1 alone decides of exits: the threshold, a quantile of its confidence on calibration text, and the probe.

dvc repro compute_threshold      (python -m stages.compute_threshold)
"""

import torch

from lego.artifacts import atomic_folder, write_json
from lego.batches import EvaluationBatches
from lego.blocks import PackedBlocks, data_digests
from lego.checkpoint import block1_sha256, load_model
from lego.criteria import Ridge, log_odds
from lego.exits import collect_confidences, quantile_threshold
from lego.harness import Stage, StageError, exit_cleanly, resolve_device
from lego.params import load_params


def main() -> None:
    params = load_params()
    leaky = params.ashem.hard_split == "validation"
    split = "validation" if leaky else "calibration"
    with Stage("compute_threshold", threads=params.train.threads) as stage:
        batches = EvaluationBatches(PackedBlocks("data/tokens", split), params.evaluation.batch_size)
        model = load_model("data/phase1")
        fit_tokens = round(params.exits.fit_share * len(batches.blocks)) * batches.blocks.seq_len
        if not 0 < fit_tokens < batches.blocks.tokens:
            raise StageError(
                f"params.yaml: exits.fit_share {params.exits.fit_share:g} of {len(batches.blocks)} blocks of {split} "
                "text leaves nothing to fit on or to calibrate with; change it or raise data.max_calibration_tokens"
            )
        probe = Ridge(model.sizes["dim"])

        def fit(states: torch.Tensor, confidence: torch.Tensor) -> None:
            left = fit_tokens - probe.n
            probe.add(states[:left], log_odds(confidence[:left]))

        confidences = collect_confidences(model, batches, resolve_device(params.train.device), fit)
        if confidences.min() == confidences.max():
            raise StageError(
                f"metrics/compute_threshold.json: all {confidences.numel():,} {split} tokens have the confidence "
                f"{confidences[0]:g}, so none is hard; block 1 has "
                "learned nothing: change ashem.phase1_lr or phase1_epochs"
            )
        threshold = quantile_threshold(confidences, params.ashem.hard_example_ratio)
        with atomic_folder("data/exit") as folder:
            probe.solve(params.exits.probe_l2).save(folder / "probe.safetensors")
            write_json(
                folder / "exit.json",
                {
                    "block1_sha256": block1_sha256(model),
                    "threshold": threshold,
                    "hard_example_ratio": params.ashem.hard_example_ratio,
                    "split": split,
                    "fit_tokens": fit_tokens,
                },
            )
        write_json(
            "metrics/compute_threshold.json",
            {
                "threshold": threshold,
                "split": split,
                "tokens": confidences.numel(),
                "hard_example_ratio": params.ashem.hard_example_ratio,
                "hard_share": (confidences < threshold).float().mean().item(),
                "mean_confidence": confidences.double().mean().item(),
                "leaky": leaky,
            },
        )
        stage.record |= data_digests("data/tokens") | {"counts": {"tokens": confidences.numel()}}


if __name__ == "__main__":
    exit_cleanly(main)
