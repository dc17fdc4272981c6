"""Model folders: the same model comes back, a damaged one is named; and what growing a model makes of block 1."""

from __future__ import annotations

import pytest
import torch

from lego import grow_model
from tests.conftest import logits_close, random_batches


@torch.no_grad()
def test_zero_initialised_layers_leave_the_logits_and_copies_repeat_block_1(block1):
    x = random_batches(1)[0][0]
    for context in ("full", "token"):
        zero = grow_model(block1, 5, init="zero", block2_context=context)
        logits_close(zero(x), block1(x), 1e-6)
    copied = grow_model(block1, 5, init="copy")
    for new, old in ((2, 0), (3, 1), (4, 0)):
        for name, tensor in copied.layers[new].state_dict().items():
            source = block1.layers[1 if name.startswith("exit_norm") else old]
            assert torch.equal(tensor, source.state_dict()[name])
    fresh = grow_model(block1, 4, init="random")
    assert not torch.equal(fresh.layers[2].mlp.up_proj.weight, block1.layers[0].mlp.up_proj.weight)


def test_growing_refuses_what_it_cannot_do(block1):
    for arguments, message in (
        (dict(num_layers=2), "num_layers must exceed block 1's 2, got 2"),
        (dict(num_layers=4, init="ones"), "init must be one of copy, zero, random, got 'ones'"),
        (dict(num_layers=4, head="none"), "head must be shared, own or shared_trainable, got 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            grow_model(block1, **arguments)
