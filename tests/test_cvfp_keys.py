"""B26: no hyper-parameter lives in CVFP's training code, and every key of phase 1 changes what comes out."""

from __future__ import annotations

import ast

import pytest
import torch
from conftest import ROOT
from cvfp_models import seed_params, trained

from lego.cvfp.sections import Phase1Params

FORBIDDEN = {0.95, 0.1, 0.002, 0.99, 0.999, 0.9, 0.02, 0.05, 0.03, 0.5, 0.2, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 100, 10, 30}


@pytest.mark.parametrize("room", ["model", "moments", "losses", "passes", "phase1", "predict", "phase2", "run"])
def test_b26_no_hyper_parameter_lives_in_training_code(room):
    tree = ast.parse((ROOT / f"lego/cvfp/{room}.py").read_text())
    named = {  # a constant of a formula has a name
        id(node)
        for statement in tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for node in ast.walk(statement)
    }
    found = [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in named
        if isinstance(node.value, int | float) and not isinstance(node.value, bool) and node.value in FORBIDDEN
    ]
    assert [one for one in found if not percent(tree, one)] == []


def percent(tree: ast.Module, found: tuple[int, float]) -> bool:
    """A 100 inside a string that is printed."""
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    return found[1] == 100 and any(one.lineno <= found[0] <= one.end_lineno for one in strings)


BASE = {"phase1__early_stop": False, "phase1__max_iterations": 4}
OTHERWISE = {  # a key of phase 1, another value, and what else must be so for it to matter
    "mode": ("sequential_batch", {}),
    "cvfp_target": ("iteration0_fixed", {"phase1__dist_reg_weight": 0.5}),
    "diversity": ("vicreg", {}),
    "dist_reg_weight": (0.3, {}),
    "normalize": ("per_token", {}),
    "ema_momentum": (0.5, {"phase1__diversity": "ema_live"}),
    "lr": (0.01, {}),
    "lr_schedule": ("steps", {"phase1__lr_steps": [1, 2]}),
    "lr_steps": ([2, 3], {"phase1__lr_schedule": "steps"}),
    "lr_step_factors": ([0.5, 0.5, 0.5], {"phase1__lr_schedule": "steps"}),
    "max_iterations": (3, {}),
    "early_stop": (True, {"phase1__min_updates": 1}),
    "min_updates": (1, {"phase1__early_stop": True}),
    "min_converged_ratio": (0.999, {"phase1__early_stop": True, "phase1__min_updates": 1}),
    "convergence_threshold": (0.0, {"phase1__early_stop": True, "phase1__min_updates": 1}),
    "start_context": ("zero", {}),
    "two_view_noise": (2.0, {"phase1__cvfp_target": "two_view"}),
    "bptt_len": (8, {"phase1__mode": "sequential_batch"}),
    "recompute_contexts": (False, {}),
    "grad_clip": (1e-9, {}),
}
ELSEWHERE = {  # tested by name
    "objective": "tests/test_cvfp_phase2.py",
    "allow_zero_gradient_loss": "test_b5_a_loss_without_gradient",
    "stop_when_worse": "test_the_step_schedule_and_the_worse_rule",
    "worse_margin": "test_the_step_schedule_and_the_worse_rule",
    "chunk_tokens": "test_chunks_give_the_same_weights",
}


@pytest.mark.parametrize("key", OTHERWISE)
def test_b26_every_key_changes_what_comes_out(key):
    value, needed = OTHERWISE[key]
    results = []
    for changes in (needed, needed | {f"phase1__{key}": value}):
        torch.manual_seed(0)
        trainer, iterations = trained(seed_params(**(BASE | changes)), tokens=80)
        results.append(trainer.final(iterations[-1]).values)
    assert results[0].shape == results[1].shape
    assert not torch.equal(*results)


def test_b26_no_key_is_forgotten():
    assert OTHERWISE.keys() | ELSEWHERE.keys() == set(Phase1Params.model_fields)
