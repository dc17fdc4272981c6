"""B26: no hyper-parameter lives in CVFP's code, and every key of its sections changes what comes out."""

from __future__ import annotations

import ast
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from lego.cvfp.contest_sections import PeersParams
from lego.cvfp.passes import Telling, sequential_pass
from lego.cvfp.peers import make
from lego.cvfp.phase2 import FixedText, train_head
from lego.cvfp.predict import train_contexts
from lego.cvfp.rivals import train_peer
from lego.cvfp.run import settled
from lego.cvfp.sections import CvfpParams, Phase1Params, changed
from lego.cvfp.text import Text
from tests.conftest import ROOT
from tests.cvfp.conftest import PARAMS, SMALL, VOCAB, network, seed_params, text, trained

FORMULAS = {"CENTRE", "APART", "DECAYS", "EMBEDDING_STD", "PLACES", "FOLLOWED", "DEPTHS"}
MEASURES = {"PAIRS", "STRETCH", "STEPS", "LATEST", "JUDGED_AT_A_TIME"}  # how much is looked at
FORBIDDEN = {0.95, 0.1, 0.002, 0.99, 0.999, 0.9, 0.02, 0.05, 0.03, 0.5, 0.2, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 100, 10, 30}


ROOMS = sorted(file.stem for file in (ROOT / "lego/cvfp").glob("*.py") if file.stem not in ("__init__", "sections"))


@pytest.mark.parametrize("room", ROOMS)
def test_b26_no_hyper_parameter_lives_in_training_code(room):
    tree = ast.parse((ROOT / f"lego/cvfp/{room}.py").read_text())
    at_top = [one for one in tree.body if isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant)]
    numbers = {ast.unparse(one.targets[0]) for one in at_top if isinstance(one.value.value, int | float)}
    assert numbers <= FORMULAS | MEASURES  # nothing else may be set at the top of a room
    named = {  # constants of a formula, by name
        id(node)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in FORMULAS
        for node in ast.walk(statement)
    }
    found = [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in named | percentages(tree)
        if isinstance(node.value, int | float) and not isinstance(node.value, bool) and node.value in FORBIDDEN
    ]
    assert found == []
    defaults = [
        (function.name, ast.unparse(default))
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for default in (*function.args.defaults, *function.args.kw_defaults)
        if isinstance(default, ast.Constant) and isinstance(default.value, int | float) and default.value
    ]
    assert defaults == []
    clipped = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "clip_grad" in ast.unparse(node.func)]
    assert not any(isinstance(one.args[1], ast.Constant) for one in clipped)


def percentages(tree: ast.Module) -> set[int]:
    """Every 100 that makes a share a percentage: `100 * share`."""
    return {
        id(node.left)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
        if isinstance(node.left, ast.Constant) and node.left.value == 100
    }


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
    "objective": "test_sound_contexts_predict",
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


def test_b26_no_key_of_phase_1_is_forgotten():
    assert OTHERWISE.keys() | ELSEWHERE.keys() == set(Phase1Params.model_fields)
    assert names_tests(ELSEWHERE.values())


def names_tests(names: Iterable[str]) -> bool:
    """Whether there is a test whose name begins so, for each."""
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("**/cvfp/test_*.py"))
    return all(f"def {name}" in tests for name in names)


FEW = {"predict.streams": 4, "predict.epochs": 1, "phase2.batch_tokens": 32, "phase2.epochs": 2}
SOUND = changed(PARAMS, SMALL | FEW, "test")
WIDER = {"model.context_dim": 32, "model.hidden_dim": 48}
SECTIONS = {  # section: key, another value, and what else must be so for it to matter
    "model": {
        "context_dim": (32, WIDER),
        "embed_dim": (24, {"model.embed_dim": 24, "model.hidden_dim": 48}),
        "layer_structure": ([2], {}),
        "token_structure": ([2], {}),
        "layernorm_mix": (0.5, {}),
        "update": ("relu", {}),
        "head": ("context", {}),
        "train_embedding": (False, {}),
        "init_weight_std": (0.2, {}),
        "init_bias_std": (0.0, {}),
        "init_embedding_std": (0.5, {}),
    },
    "predict": {
        "loss": ("infonce", {"predict.keep_reader": False}),
        "keep_reader": (False, {}),
        "epochs": (2, {}),
        "streams": (2, {}),
        "bptt_len": (32, {}),
        "lr": (0.02, {}),
        "warmup_steps": (0, {}),
        "weight_decay": (0.0, {}),
        "regularizer_weight": (1.0, {}),
        "contraction_gamma": (0.1, {"phase1.dist_reg_weight": 0.0}),
    },
    "phase2": {
        "freeze_context": (True, {}),
        "lr": (0.02, {}),
        "lr_schedule": ("constant", {}),
        "weight_decay": (0.0, {}),
        "epochs": (1, {}),
        "batch_tokens": (0, {}),
        "grad_clip": (1e-3, {}),
    },
    "contexts": {"segments": (2, {}), "tolerance": (10.0, {}), "max_train_sweeps": (1, {})},
}
BY_NAME = {
    "model": {"hidden_dim": "test_b8", "embedding": "test_embeddings_come", "embedding_from": "test_embeddings_come"},
    "predict": {},
    "phase2": {"mode": "test_9_10", "patience": "test_patience", "chunk_tokens": "test_a_step_in_chunks"},
    "contexts": {},
}


def both_phases(params: CvfpParams) -> dict[str, Tensor]:
    """All weights after both phases, and the contexts in between, with how often the solver swept."""
    model, ids = network(params), text(180)
    result = train_contexts(model, ids, params.predict, params.phase1, params.model.train_embedding, 0)
    model.eval()
    splits = Text({"train": ids, "validation": ids[:9], "test": ids[:9]}, VOCAB, torch.ones(VOCAB), "")
    found = settled(model, splits, params.contexts, params.progress)["train"]
    fixed = FixedText(ids, found.contexts)
    after, _ = train_head(model, fixed, fixed, params.phase2, 0, result.reader)
    return after.state_dict() | {"contexts": found.contexts, "sweeps": torch.tensor(found.sweeps)}


@pytest.fixture(scope="module")
def as_they_are() -> dict[str, Tensor]:
    return both_phases(SOUND)


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in SECTIONS.items() for key in keys])
def test_b26_every_key_of_the_other_sections_changes_what_comes_out(section, key, as_they_are):
    value, needed = SECTIONS[section][key]
    one = both_phases(changed(SOUND, needed, "test")) if needed and f"{section}.{key}" not in needed else as_they_are
    other = both_phases(changed(SOUND, needed | {f"{section}.{key}": value}, "test"))
    assert one.keys() != other.keys() or any(
        one[name].shape != other[name].shape or not torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_b26_no_key_of_the_other_sections_is_forgotten(section):
    assert SECTIONS[section].keys() | BY_NAME[section].keys() == set(type(getattr(PARAMS, section)).model_fields)
    assert names_tests(BY_NAME[section].values())


TRAINED_PEER = {
    "streams": 3,
    "window": 16,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "grad_clip": 1e-3,
}


def peer_weights(settings: PeersParams) -> Tensor:
    torch.manual_seed(0)
    model = make("mlp_2", VOCAB, 16, 24, settings.window)
    train_peer(model, text(400), settings, 2, 0.01, 0)
    return torch.cat([one.flatten() for one in model.parameters()]).detach()


@pytest.mark.parametrize("key", TRAINED_PEER)
def test_b26_every_key_of_the_peers_changes_their_weights(key):
    few = PARAMS.peers.model_copy(update={"streams": 4})
    other = few.model_copy(update={key: TRAINED_PEER[key]})
    assert not torch.equal(peer_weights(few), peer_weights(other))
    of_one = {"end_to_end"}  # test_end_to_end_has_a_layernorm_and_windows_of_its_own
    assert TRAINED_PEER.keys() | of_one == set(PeersParams.model_fields)


def test_b26_keys_of_the_contest_text_and_progress_have_tests_by_name():
    names = {
        "seeds": "test_the_search_takes_the_best_rate",
        "seed_sweeps": "test_the_digest_of_a_row",
        "workers": "test_the_digest_of_a_row",
        "lr_factors": "test_the_search_takes_the_best_rate",
        "own": "test_a_contestant_learns",
        "peers": "test_a_contestant_learns",
        "scaling": "test_the_curve_over_train_text",
        "trials": "test_trials_are_shown",
        "trial_seeds": "test_trials_are_shown",
        "validation": "test_validation_from_train_is",
        "val_share": "test_validation_from_train_is",
        "unseen": "test_ids_that_train_does_not_have",
        "block_length": "test_a_stream_is_the_ids",
        "overlap_length": "test_b22_held_out_text",
        "progress_every": "test_progress_is_told",
        "warn_above": "test_progress_is_told",
    }
    keys = [set(type(getattr(PARAMS, section)).model_fields) for section in ("contest", "text", "progress")]
    assert set().union(*keys) == names.keys()
    assert names_tests(names.values())


def test_progress_is_told_every_so_many_tokens_and_long_passes_announce_themselves(capsys):
    model = network(seed_params())
    embeddings = model.embed(text(25)).detach()
    sequential_pass(model, embeddings, None, Telling(10, 20), "pass 1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pass 1: 25 tokens one after another, more than 20"
    assert [line.split(",")[0] for line in lines[1:]] == [
        "pass 1: 10/25 tokens (40 %)",
        "pass 1: 20/25 tokens (80 %)",
        "pass 1: 25/25 tokens (100 %)",
    ]
    sequential_pass(model, embeddings, None, Telling(0, 30), "pass 1")
    assert capsys.readouterr().out == ""
