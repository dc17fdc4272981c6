"""What tests of evaluation share: a routed model with random weights, and two texts."""

from __future__ import annotations

import pytest
import torch

from lego import DeepSupervisionTransformer
from tests.conftest import VOCAB, random_batches

TEST, VALIDATION = random_batches(6, seed=1), random_batches(5, seed=2)
FACTS = {"tokens": 6 * 4 * 12, "bytes": 1000}


@pytest.fixture(scope="module", params=["token", "full"])
def model(request) -> DeepSupervisionTransformer:
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(VOCAB, 32, 4, 4, exit_layer=2, block2_context=request.param)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model
