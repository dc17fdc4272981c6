"""What users would do instead of a second block: it begins as the given model, and trains what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lego.base.harness import StageError
from lego.model.checkpoint import load_model, save_model
from lego.model.cost import Ledger
from lego.model.transformer import DeepSupervisionTransformer
from lego.training.trainer import Trainer, create_standard_config
from stages.extend.rivals import interleaved, macs_of, merged, seconds_of, start
from stages.extend.settings import RivalParams
from tests.conftest import VOCAB

T = 12
pytest.importorskip("peft")


def entry(trains: str, size: int | None) -> RivalParams:
    return RivalParams(trains=trains, size=size, equal="macs", lr=1e-3)


@pytest.fixture
def given(tmp_path):
    model = DeepSupervisionTransformer(VOCAB, 32, 4, 4, exit_layer=4, num_kv_heads=2, tie_embeddings=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    save_model(model, tmp_path)
    return tmp_path


KINDS = [("all", None), ("lora", 3), ("last_layers", 2), ("new_layers", 2), ("new_layers", 1)]


@pytest.mark.parametrize(("trains", "size"), KINDS)
def test_it_begins_as_the_given_model_and_changes_only_what_it_trains(trains, size, given):
    model, x = start(entry(trains, size), given, 0), torch.randint(0, VOCAB, (2, T))
    original = load_model(given).eval()
    assert torch.equal(model.eval()(x), original(x))
    trainer = Trainer(create_standard_config(model.num_layers), VOCAB)
    optimizer = trainer.create_optimizer(model, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        trainer.train_epoch(model, [(x, x)], optimizer)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trainer.compute_loss(model, x, x).backward()
    assert changed == {name for name, p in model.named_parameters() if p.grad is not None}
    unread = {name for name, p in model.named_parameters() if p.requires_grad} - changed
    assert all("exit_norm" in name for name in unread)  # norms that only an exit there would read
    assert not torch.equal(model.eval()(x), original(x))


def test_a_merged_adapter_answers_as_before(given):
    model, x = start(entry("lora", 3), given, 0), torch.randint(0, VOCAB, (2, T))
    assert sum("lora_A" in name for name, p in model.named_parameters() if p.requires_grad) == 4 * 7
    trainer = Trainer(create_standard_config(4), VOCAB)
    trainer.train_epoch(model, [(x, x)], trainer.create_optimizer(model, 1e-1))
    answer = model.eval()(x)
    assert not torch.allclose(answer, load_model(given).eval()(x), atol=1e-3)
    plain = merged(model)
    torch.testing.assert_close(plain(x), answer, rtol=1e-5, atol=1e-5)
    assert plain.state_dict().keys() == load_model(given).state_dict().keys()


def test_new_layers_stand_behind_the_last_of_each_group(given):
    original = load_model(given)
    model = interleaved(original, 2)
    for place, copied in ((2, 1), (5, 3)):
        assert torch.equal(model.layers[place].self_attn.q_proj.weight, original.layers[copied].self_attn.q_proj.weight)
        assert not model.layers[place].mlp.down_proj.weight.any()
    assert [layer.mlp.up_proj.weight.requires_grad for layer in model.layers] == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]


def counted(trains: str, size: int | None, given: Path, x: torch.Tensor) -> int:
    model = start(entry(trains, size), given, 0)
    trainer = Trainer(create_standard_config(model.num_layers), VOCAB)
    return macs_of(lambda: trainer.compute_loss(model, x, x).backward())


def test_training_all_costs_what_the_ledger_says(given):
    x = torch.randint(0, VOCAB, (2, T))
    assert counted("all", None, given, x) == Ledger.of(load_model(given), T).train_block1(x.numel())


def test_what_is_frozen_costs_less(given):
    x = torch.randint(0, VOCAB, (2, T))
    everything, last = counted("all", None, given, x), counted("last_layers", 1, given, x)
    ledger = Ledger.of(load_model(given), T)
    assert last == (ledger.full + 2 * ledger.layer + ledger.head) * x.numel()  # down to the one layer, and its weights
    assert 0.6 * everything < counted("lora", 3, given, x) < 0.85 * everything


def test_more_layers_than_there_are_is_said(given):
    with pytest.raises(StageError, match=r"extend\.yaml: a rival trains 5 layers, and the model has 4"):
        start(entry("last_layers", 5), given, 0)


def test_times_are_taken_in_turn():
    order: list[int] = []
    times = seconds_of([lambda: order.append(1), lambda: order.append(2)], rounds=2)
    assert order == [1, 2] * 3
    assert len(times) == 2
