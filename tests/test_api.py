"""The public interface of ashem section 2: names, signatures, defaults, and its code block, word for word."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import lego
from lego import *  # noqa: F403
from lego import ASHEMConfig, DeepSupervisionTransformer, StageConfig, Trainer, TrainingConfig
from lego.base.params import load_params
from tests.conftest import ROOT, VOCAB, random_batches


def test_every_public_name_is_importable_and_listed():
    for name in lego.__all__:
        assert getattr(lego, name).__module__.startswith("lego.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lego.nothing


def test_help_names_every_public_name_under_its_topic_with_what_it_does():
    shown = re.findall(r"^    (\w+) +\S.*$", lego.__doc__, re.M)
    assert shown == list(lego._HOME)
    assert set(shown) == set(lego.__all__)
    said = pydoc.plain(pydoc.render_doc(lego))
    assert [name for name in lego.__all__ if not re.search(rf"^ {{8}}{name} +\S", said, re.M)] == []


def test_importing_lego_loads_no_room():
    code = "import sys, lego; assert not {m for m in sys.modules if m == 'torch' or m.startswith('lego.')}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


NO = inspect.Parameter.empty
MODEL = {"vocab_size": NO, "dim": NO, "num_layers": NO, "num_heads": NO}
SIGNATURES = {
    "StandardTransformer": MODEL,
    "DeepSupervisionTransformer": MODEL | {"exit_layer": 1, "routing_threshold": 0.0},
    "Trainer": {"config": NO, "vocab_size": NO, "device": "cpu"},
    "StageConfig": {"layers": NO, "loss_weight": 1.0},
    "TrainingConfig": {"stages": NO, "routing_threshold": 0.0, "exit_layer": 1},
    "create_standard_config": {"num_layers": NO},
    "create_deep_supervision_config": {"num_layers": NO},
    "compute_confidence": {"model": NO, "hidden_state": NO},
    "compute_confidence_threshold": {"model": NO, "val_batches": NO, "target_ratio": NO, "device": NO},
    "collect_hard_examples": {"model": NO, "val_batches": NO, "threshold": NO, "device": NO},
    "create_hard_example_loader": {"hard_examples": NO, "batch_size": NO},
    "train_upper_layers": {
        "model": NO,
        "hard_batches": NO,
        "optimizer": NO,
        "vocab_size": NO,
        "device": NO,
        "num_lower_layers": 2,
    },
    "evaluate_on_hard_examples": {
        "model": NO,
        "hard_examples": NO,
        "vocab_size": NO,
        "device": NO,
        "batch_size": 64,
        "num_lower_layers": 2,
    },
}
TRAINER_METHODS = {
    "create_optimizer": {"model": NO, "base_lr": NO},
    "compute_loss": {"model": NO, "x": NO, "y": NO},
    "train_epoch": {"model": NO, "batches": NO, "optimizer": NO},
    "evaluate": {"model": NO, "batches": NO},
    "train_with_early_stopping": {
        "model": NO,
        "train_batches": NO,
        "val_batches": NO,
        "optimizer": NO,
        "max_epochs": NO,
        "patience": NO,
        "min_delta": 0.0,
        "verbose": True,
    },
}


def positional(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_frozen(name):
    signature = positional(getattr(lego, name))
    assert signature == SIGNATURES[name]
    assert list(signature) == list(SIGNATURES[name])


@pytest.mark.parametrize("name", TRAINER_METHODS)
def test_trainer_signatures_are_frozen(name):
    signature = positional(getattr(Trainer, name))
    assert signature == TRAINER_METHODS[name]
    assert list(signature) == list(TRAINER_METHODS[name])


def test_type_checkers_see_the_same_names():
    """A lazy `__getattr__` hides types, so a stub names what is handed on."""
    stub = ast.parse((ROOT / "lego" / "__init__.pyi").read_text())
    handed_on = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert handed_on == {name: f"lego.{home}" for name, home in lego._HOME.items()}
    assert list(handed_on) == list(lego._HOME)  # by the same topics


def test_ashem_config_keeps_the_originals_defaults_and_params_yaml_its_own():
    assert asdict(ASHEMConfig()) == {
        "phase1_layers": 2,
        "phase1_lr": 1e-3,
        "phase1_patience": 1,
        "hard_example_ratio": 0.5,
        "phase2_layers": 4,
        "phase2_lr": 1e-4,
        "phase2_patience": 3,
    }
    ashem = load_params(ROOT / "params.yaml").ashem
    own = ASHEMConfig(**{name: getattr(ashem, name) for name in asdict(ASHEMConfig())})
    assert asdict(own) == {
        "phase1_layers": 2,
        "phase1_lr": 1.6e-2,
        "phase1_patience": 3,
        "hard_example_ratio": 0.7,
        "phase2_layers": 6,
        "phase2_lr": 1.6e-2,
        "phase2_patience": 3,
    }


@pytest.mark.parametrize("fresh_optimizer", [False, True])
def test_the_specifications_code_block_runs_as_written(fresh_optimizer):
    vocab_size, dim, num_heads, device = VOCAB, 32, 4, "cpu"
    train_loader, val_loader = random_batches(20, seed=1), random_batches(8, seed=2)
    model = DeepSupervisionTransformer(vocab_size, dim, 2, num_heads, exit_layer=2)
    optimizer = Trainer(TrainingConfig([StageConfig((2, 2))]), vocab_size).create_optimizer(model, 3e-3)
    # fmt: off
    config = TrainingConfig(stages=[StageConfig(layers=(2, 2), loss_weight=1.0)])
    trainer = Trainer(config, vocab_size=vocab_size, device=device)
    result = trainer.train_with_early_stopping(model, train_loader, val_loader, optimizer, max_epochs=50, patience=1)
    confidence_threshold = compute_confidence_threshold(model, val_loader, target_ratio=0.5, device=device)  # noqa: F405
    hard_examples = collect_hard_examples(model, val_loader, confidence_threshold, device)  # noqa: F405

    model_extended = DeepSupervisionTransformer(vocab_size=vocab_size, dim=dim, num_layers=4, num_heads=num_heads,
                                                exit_layer=2, routing_threshold=confidence_threshold)
    model_extended.embedding.load_state_dict(model.embedding.state_dict())
    for i in range(2):
        model_extended.layers[i].load_state_dict(model.layers[i].state_dict())
    model_extended.output_head.load_state_dict(model.output_head.state_dict())
    for param in model_extended.embedding.parameters():
        param.requires_grad = False
    for i in range(2):
        for param in model_extended.layers[i].parameters():
            param.requires_grad = False
    # fmt: on
    eval_config = TrainingConfig(
        stages=[StageConfig(layers=(4, 4), loss_weight=1.0)], routing_threshold=confidence_threshold, exit_layer=2
    )
    tokens = sum(y.numel() for _, y in val_loader)
    before = Trainer(eval_config, vocab_size=vocab_size, device=device).evaluate(model_extended, val_loader)
    assert before["shallow_ratio"] == pytest.approx(1 - 0.5, abs=1 / tokens)  # right after the copy
    frozen = {name: p.clone() for name, p in model_extended.named_parameters() if not p.requires_grad}
    upper = model_extended.layers[3].mlp.up_proj.weight.clone()
    if fresh_optimizer:
        optimizer = trainer.create_optimizer(model_extended, 1e-3)
    # fmt: off
    hard_batches = create_hard_example_loader(hard_examples, batch_size=64)  # noqa: F405
    train_loss = train_upper_layers(model_extended, hard_batches, optimizer, vocab_size, device, num_lower_layers=2)  # noqa: F405

    eval_config = TrainingConfig(stages=[StageConfig(layers=(4, 4), loss_weight=1.0)],
                                 routing_threshold=confidence_threshold, exit_layer=2)
    stats = Trainer(eval_config, vocab_size=vocab_size, device=device).evaluate(model_extended, val_loader)
    # fmt: on
    assert set(result) == {"train_losses", "val_losses", "val_accs", "best_epoch", "total_epochs", "stopped_early"}
    assert set(hard_examples) == {"inputs", "hidden_states", "targets", "confidences"}
    assert set(stats) == {"acc", "ppl", "shallow_ratio", "compute_cost"}
    assert train_loss > 0
    assert all(torch.equal(p, frozen[name]) for name, p in model_extended.named_parameters() if name in frozen)
    assert torch.equal(upper, model_extended.layers[3].mlp.up_proj.weight) != fresh_optimizer
