"""The one threshold, for mining and routing: a quantile of block 1's confidence on calibration text.

dvc repro compute_threshold      (python -m stages.compute_threshold)
"""

from lego.artifacts import write_json
from lego.batches import EvaluationBatches
from lego.blocks import PackedBlocks, data_digests
from lego.checkpoint import load_model
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
        confidences = collect_confidences(model, batches, resolve_device(params.train.device))
        if confidences.min() == confidences.max():
            raise StageError(
                f"metrics/compute_threshold.json: all {confidences.numel():,} {split} tokens have the confidence "
                f"{confidences[0]:g}, so none is hard; block 1 has "
                "learned nothing: change ashem.phase1_lr or phase1_epochs"
            )
        threshold = quantile_threshold(confidences, params.ashem.hard_example_ratio)
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
