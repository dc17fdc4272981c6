"""The original ASHEM by its parameters, block 2 on top of the exit, no gate, AdamW: its numbers are the recorded ones.

They were recorded when these were the defaults (docs/results.md, 2026-11-26). Another processor or another version of
the standard library, which is the text, moves them by less than what is asked here.
"""

from __future__ import annotations

import pytest
import yaml

from lego.base.params import load_params
from lego.base.profiles import with_keys
from tests.conftest import ROOT, Clone, run_in_process
from tests.stages.conftest import ORDER

ORIGINAL = {
    "data.stdlib_tests": False,
    "data.max_train_tokens": 2_700_000,
    "data.max_calibration_tokens": 100_000,
    "exits.fit_share": 0.3,
    "model.dim": 64,
    "model.ffn_dim": 192,
    "train.threads": 1,  # another worker has the other core
    "train.optimizer": "adamw",
    "train.tokens_per_epoch": 200_000,
    "ashem.phase1_lr": 6e-3,
    "ashem.phase1_epochs": 6,
    "ashem.phase1_patience": 3,
    "ashem.hard_example_ratio": 0.5,
    "ashem.phase2_share": 0.5,
    "ashem.phase2_layers": 4,
    "ashem.branch_layer": None,
    "ashem.phase2_lr": 8e-3,
    "ashem.phase2_epochs": 3,
    "ashem.init_new_layers": "copy",
    "yardstick.lr": 8e-3,
    "routing.criterion": "max_prob",
    "routing.hard_ratio": None,
    "routing.gate": "none",
    "evaluation.latency_repeats": 0,
}
RECORDED = {"shallow_ppl": 44.427, "deep_ppl": 42.644, "ppl": 40.437, "flops_ratio": 0.92778, "shallow_ratio": 0.4797}
YARDSTICK = 37.417


@pytest.mark.slow
def test_the_original_has_its_recorded_numbers(tmp_path):
    clone = Clone.of_this_tree(tmp_path)
    values = with_keys(load_params(ROOT / "params.yaml").model_dump(), ORIGINAL, "this test", "params.yaml")
    (clone.folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    run_in_process(clone.folder, ORDER)
    found = clone.json("metrics/summary.json")
    assert {key: found[key] for key in RECORDED} == pytest.approx(RECORDED, rel=0.02)
    assert clone.json("metrics/yardstick.json")["ppl"] == pytest.approx(YARDSTICK, rel=0.02)
