"""The section train: compiled layers take the same steps."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from lego import Trainer, create_standard_config
from lego.base.params import load_params
from lego.model.layers import TransformerLayer
from lego.training.setup import build_training
from tests.conftest import ROOT, VOCAB
from tests.training.test_trainer import small


def test_compiled_layers_take_the_same_steps_under_the_same_names(batches, monkeypatch):
    """Through graph capture, with the backend that runs the captured graph as it is."""
    backend = torch._dynamo.testing.CompileCounterWithBackend("eager")
    plain_compile = torch.nn.Module.compile
    monkeypatch.setattr(TransformerLayer, "compile", lambda self: plain_compile(self, backend=backend))
    train = load_params(ROOT / "params.yaml").train
    curves, captured = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = small()
        section = train.model_copy(update={"compile": compiled, "warmup_steps": 2})
        optimizer, options = build_training(model, 1e-3, 10, section)
        trainer = Trainer(create_standard_config(2), VOCAB, options=options)
        curve = []
        for _ in range(2):
            curve.append(trainer.train_epoch(model, batches, optimizer))
            captured.append(backend.frame_count)
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert captured[:2] == [0, 0]
    assert captured[2] == captured[3] > 0  # nothing is captured again in the second epoch
    assert model.state_dict().keys() == small().state_dict().keys()
