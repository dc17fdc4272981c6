"""What the specification asks of digits (section 11): the targets of `sound`, and what the original measured.

Each is judged on means over seeds; `stages/satipatthana/report.py` writes them on the page. Not among them: seconds of
training, which are no metric (data/timing/satipatthana has them). "Monotone, calibrated" trust has no number there:
it is read as trust that falls from clean over augmented to drunk and mismatched rows, and as a calibration error, once
calibrated, of at most what is asked of the decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

FAR = ("gauss_matched", "uniform", "pixel_perm", "inverted")  # unseen kinds, far from the data
SLACK = 0.05  # how far from a reference a number may lie that has no deviation, or a small one
STEADY = 0.005  # accuracy of the guide at T and 20 T
SAME_RECON = 0.02  # share by which the reconstruction error at 20 T may differ from that at T
AHEAD = ("near", "noisy_0.5")  # where trust must be ahead of the reconstruction error alone
BELOW = 0.002  # how far it may lie below it elsewhere
ABOVE_0 = math.nextafter(0.0, 1.0)
BELOW_1 = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class Target:
    """A number, its bound, whether it must not be lower (`at_least`), and what it came to."""

    name: str
    value: float
    bound: float
    at_least: bool = True

    def asked(self) -> str:
        """The bound in words."""
        if self.bound in (ABOVE_0, BELOW_1):
            return "above 0" if self.at_least else "below 1"
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


AT_LEAST = {
    "accuracy": 0.985,
    "probe_perplexity": 6.0,
    "auroc_drunk": 0.99,
    "auroc_mismatch": 0.95,
    "auroc_near": 0.97,
    **{f"auroc_{kind}": 0.995 for kind in FAR},
    "auroc_noisy_0.5": 0.96,
    "auroc_correct": 0.95,
}
AT_MOST = {"recon_mse": 0.05, "last_step": 0.01, "ece": 0.02, "aurc": 0.001, "trust_ece_calibrated": 0.02}
REFERENCE = {  # seed v4.0: mean of 3 seeds, and the deviation where it was reported
    "accuracy": (0.927, 0.066),
    "aux_accuracy_1T": (0.783, None),  # of one seed, as is the next
    "aux_accuracy_20T": (0.238, None),
    "trust_clean": (0.485, None),
    "trust_drunk": (0.012, None),
    "trust_mismatch": (0.471, None),
    "auroc_drunk": (1.00, None),
    "auroc_mismatch": (0.54, None),
    "auroc_near": (0.668, None),
}


SUCCESSOR = {  # v4.1, tuned: what comes of stages 0 and 1, which are the same there, and near strangers
    "accuracy": 0.972,
    "aux_accuracy_1T": 0.956,
    "aux_accuracy_20T": 0.118,
    "auroc_near": 0.644,
}


def targets(means: Mapping[str, float]) -> list[Target]:
    """The target column, and trust against the reconstruction error alone: ahead of it on near strangers and on noise,
    nowhere more than 0.002 below it. Numbers that are not there are left out.

    Args:
        means: of `lego.satipatthana.evaluation.evaluate` over seeds, on digits.
    """
    found = [Target(key, means[key], bound) for key, bound in AT_LEAST.items() if key in means]
    found += [Target(key, means[key], bound, at_least=False) for key, bound in AT_MOST.items() if key in means]
    if "aux_accuracy_1T" in means:
        apart = abs(means["aux_accuracy_1T"] - means["aux_accuracy_20T"])
        found.append(Target("guide at T less at 20 T", apart, STEADY, at_least=False))
    if "recon_mse_20T" in means:
        apart = abs(means["recon_mse_20T"] / means["recon_mse_1T"] - 1)
        found.append(Target("recon MSE at 20 T, off that at T by", apart, SAME_RECON, at_least=False))
    if "contraction" in means:
        found.append(Target("contraction ratio", means["contraction"], BELOW_1, at_least=False))
    if "trust_clean" in means:
        clean, noisy, *worst = (means[f"trust_{path}"] for path in ("clean", "augmented", "drunk", "mismatch"))
        found.append(Target("trust, least fall from path to path", min(clean - noisy, noisy - max(worst)), ABOVE_0))
    for kind in (*AHEAD, *FAR):
        if f"auroc_{kind}" in means:
            above = means[f"auroc_{kind}"] - means[f"auroc_{kind}_recon"]
            found.append(Target(less_recon(kind), above, ABOVE_0 if kind in AHEAD else -BELOW))
    return found


def less_recon(kind: str) -> str:
    """Name of the target that compares the two scores on a kind of strangers."""
    return f"{kind}: trust less -recon_error"


def reproduced(means: Mapping[str, float]) -> dict[str, tuple[float, float, bool]]:
    """What compat came to beside the reference, and whether it lies within two of its deviations or 0.05."""
    found = {}
    for key, (value, deviation) in REFERENCE.items():
        if key not in means:
            continue
        allowed = max(SLACK, 2 * (deviation or 0.0))
        found[key] = (means[key], value, abs(means[key] - value) <= allowed)
    return found
