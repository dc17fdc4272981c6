"""Fine-tuning that keeps the exit, its threshold set anew, and what clients of transformers do with a routed model."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from lego.hf import LegoForCausalLM, to_hf
from lego.model.exit_criteria import StateCriterion
from tests.conftest import ROOT, VOCAB, random_batches
from tests.hub.test_export import CONTEXTS, lego_model


def arguments(folder, **changes) -> TrainingArguments:
    fixed = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **fixed | changes)


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Sequences (16,) of the noisy cyclic language of `random_batches`."""
    ids = torch.cat([x for x, _ in random_batches(count // 4, length=16, seed=seed)])
    return [{"input_ids": row, "labels": row} for row in ids]


@torch.no_grad()
def perplexities(model: LegoForCausalLM, ids: Tensor) -> dict[str, float]:
    """Of the routed model, of block 1 alone and of the full depth."""
    chosen, found = model.config.exit_threshold, {}
    for name, threshold in (("routed", chosen), ("shallow", 0.0), ("deep", None)):
        model.config.exit_threshold = threshold
        logits = model.eval()(ids).logits[:, :-1]
        found[name] = math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    model.config.exit_threshold = chosen
    return found


def test_fine_tuning_takes_the_exit_along(tmp_path):
    ids = torch.stack([row["input_ids"] for row in rows(64, seed=5)])
    found = {}
    for weight in (0.5, 0.0):
        torch.manual_seed(0)
        model = to_hf(lego_model("sequence", own_head=False), 0.0, exit_loss_weight=weight)
        model.calibrate(ids, deep_share=0.6)
        before = perplexities(model, ids)
        options = {"max_steps": 100, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "seed": 1}
        Trainer(model, arguments(tmp_path, **options), train_dataset=rows(512, seed=6)).train()
        model.calibrate(ids, deep_share=0.6)
        found[weight] = after = perplexities(model, ids)
        assert after["deep"] < before["deep"] / 2
        deep = model(ids).went_deep.float().mean()
        assert abs(deep - 0.6) < 0.01
    joint, neglected = found[0.5], found[0.0]
    assert joint["shallow"] < 1.2 * joint["deep"]
    assert joint["routed"] < 1.1 * joint["deep"]
    assert neglected["shallow"] > 1.5 * joint["shallow"]
    assert joint["deep"] < 1.2 * neglected["deep"]
    assert joint["routed"] < neglected["routed"]


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("own_head", [False, True])
def test_the_training_loss_is_the_weighted_mean_of_both_exits(weight, own_head):
    model = to_hf(lego_model("sequence", own_head), None, exit_loss_weight=weight)
    ids, losses = torch.randint(0, VOCAB, (3, 8)), []
    for threshold in (None, 0.0):
        model.config.exit_threshold = threshold
        logits = model.eval()(ids).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    expected = (1 - weight) * losses[0] + weight * losses[1]
    torch.testing.assert_close(model.train()(ids, labels=ids).loss, expected)
    counted = model(ids, labels=ids, num_items_in_batch=42).loss  # as Trainer gives it when it accumulates gradients
    torch.testing.assert_close(counted, expected * 21 / 42)
    torch.testing.assert_close(model.eval()(ids, labels=ids).loss, losses[0])  # evaluation is the full depth's


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("case", ["labels", "no exit", "no labels", "frozen"])
def test_every_trained_weight_gets_a_gradient(context, own_head, case, tmp_path):
    """Distributed training waits for one of each: a weight that no loss reaches stops it."""
    scorer = StateCriterion(32, 4)
    made = to_hf(lego_model(context, own_head), 0.3, "gain", scorer, exit_loss_weight=0.0 if case == "no exit" else 0.5)
    made.save_pretrained(tmp_path)
    for model in (made, LegoForCausalLM.from_pretrained(tmp_path)):
        ids, labelled = torch.randint(0, VOCAB, (2, 6)), case != "no labels"
        if case == "frozen":
            model.freeze_block1()
        for name, parameter in model.named_parameters():
            if "criterion" in name:
                assert not parameter.requires_grad
        answer = model.train()(ids, labels=ids if labelled else None)
        (answer.loss if labelled else answer.logits.logsumexp(dim=-1).mean()).backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
        if case == "frozen":
            assert not any(p.requires_grad for p in model.model.layers[:2].parameters())
            assert model.model.layers[2].self_attn.o_proj.weight.grad.any()


PROCESS = """
import sys, torch
from transformers import Trainer, TrainingArguments
from lego.hf import LegoForCausalLM
model = LegoForCausalLM.from_pretrained(sys.argv[1])
rows = [{"input_ids": row, "labels": row} for row in (torch.arange(128) % 97).view(16, 8)]
options = dict(max_steps=3, per_device_train_batch_size=2, gradient_checkpointing=True, report_to=[],
    save_strategy="no", use_cpu=True, ddp_backend="gloo", disable_tqdm=True, ddp_find_unused_parameters=False)
trainer = Trainer(model, TrainingArguments(sys.argv[2], **options), train_dataset=rows)
assert trainer.args.world_size == 2, trainer.args.world_size
trainer.train()
sys.stdout.write(f"<loss {trainer.state.log_history[-1]['train_loss']}>\\n")
"""


@pytest.mark.parametrize("context", ["sequence", pytest.param("token", marks=pytest.mark.slow)])
def test_two_processes_train_with_gradient_checkpointing(context, tmp_path):
    to_hf(lego_model(context, own_head=False), 0.3, "gain", StateCriterion(32, 4)).save_pretrained(tmp_path / "model")
    (tmp_path / "train.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "train.py"), str(tmp_path / "model"), str(tmp_path / "out")]
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("<loss ") == 2


def test_training_without_labels_says_that_it_leaves_the_exit_behind(caplog, monkeypatch):
    import lego.hub.modeling as modeling

    said = []
    monkeypatch.setattr(modeling.logger, "warning_once", said.append)
    model, ids = to_hf(lego_model("sequence", own_head=False), 0.3).train(), torch.randint(0, VOCAB, (2, 6))
    model(ids)
    assert len(said) == 1
    assert "give labels, or call model.freeze_block1() first" in said[0]
    model.freeze_block1()
    model(ids)
    model.eval()(ids)
    assert len(said) == 1


@pytest.mark.parametrize("criterion", ["max_prob", "margin", "entropy", "probe"])
def test_calibrate_sends_the_share_deep_whatever_it_is_given(criterion):
    scorer = StateCriterion(32, 0) if criterion == "probe" else None
    model = to_hf(lego_model("sequence", own_head=False), 0.3, criterion, scorer).train()
    ids = torch.randint(1, VOCAB, (8, 16))
    threshold = model.calibrate(ids, deep_share=0.25)
    assert model.training
    assert type(threshold) is float
    assert threshold == model.config.exit_threshold
    assert model.eval()(ids).went_deep.sum() == 32
    for batches in (
        [ids[:3], ids[3:]],
        {"input_ids": ids},
        [{"input_ids": row.tolist()} for row in ids],
        [(ids, ids)],
        torch.utils.data.DataLoader(ids, batch_size=3),
    ):
        assert model.calibrate(batches, deep_share=0.25) == pytest.approx(threshold, rel=1e-5)
    padded, mask = torch.zeros(8, 20, dtype=torch.long), torch.zeros(8, 20, dtype=torch.long)
    padded[:, 4:], mask[:, 4:] = ids, 1
    found = model.calibrate({"input_ids": padded, "attention_mask": mask}, deep_share=0.25)
    assert found == pytest.approx(threshold, rel=1e-4)
    unpadded = {"input_ids": [*ids[:7].tolist(), ids[7, :5].tolist()], "attention_mask": [[1] * 16] * 7 + [[1] * 5]}
    padded[7, 9:], mask[7, 9:] = 0, 0
    found = model.calibrate({"input_ids": padded, "attention_mask": mask}, deep_share=0.25)
    assert model.calibrate(unpadded, deep_share=0.25) == pytest.approx(found, rel=1e-4)
    for share, expected in ((0, 0.0), (1, 8 * 16)):
        model.calibrate(ids, share)
        assert model(ids).went_deep.sum() == expected
    with pytest.raises(ValueError, match=r"deep_share must be in \[0, 1\], got 1\.5"):
        model.calibrate(ids, 1.5)
    with pytest.raises(ValueError, match="calibration needs at least one token; give token ids of some text"):
        model.calibrate([], 0.5)


def test_the_trainer_predicts_logits_with_and_without_labels(tmp_path):
    model = to_hf(lego_model("sequence", own_head=False), 0.3)
    trainer = Trainer(model, arguments(tmp_path))
    labelled = rows(8, seed=1)
    for data in (labelled, [{"input_ids": row["input_ids"]} for row in labelled]):
        predictions = trainer.predict(data).predictions
        assert isinstance(predictions, np.ndarray)
        assert predictions.shape == (8, 16, VOCAB)


@pytest.mark.parametrize(
    "value",
    [np.float32(0.25), np.float64(0.25), np.array(0.25), np.array([0.25]), torch.tensor(0.25), torch.tensor([0.25])],
)
def test_a_threshold_is_one_number_of_any_kind(value, tmp_path):
    model, ids = to_hf(lego_model("sequence", own_head=False), value), torch.randint(0, VOCAB, (2, 6))
    expected = model(ids).went_deep
    assert model.config.exit_threshold == 0.25
    assert type(model.config.exit_threshold) is float
    model.config.exit_threshold = 0.9
    model.config.exit_threshold = value
    assert torch.equal(model(ids).went_deep, expected)
    model.save_pretrained(tmp_path)
    assert LegoForCausalLM.from_pretrained(tmp_path).config.exit_threshold == 0.25
    model.config.exit_threshold = 1
    assert model(ids).went_deep.all()


@pytest.mark.parametrize("value", ["0.5", True, [0.5], torch.tensor([0.1, 0.2]), np.array([0.1, 0.2]), np.nan, -1])
def test_a_threshold_that_is_no_number_is_named(value):
    model = to_hf(lego_model("sequence", own_head=False), 0.3)
    model.config.exit_threshold = value
    with pytest.raises(ValueError, match=r"exit_threshold must be None or at least 0\.0, got .*; give one number"):
        model(torch.tensor([[1, 2]]))


def test_continuous_batching_and_export_of_a_routed_model_are_refused():
    model, ids = to_hf(lego_model("sequence", own_head=False), 0.3), torch.randint(0, VOCAB, (2, 6))
    for refused in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(ValueError, match=r"continuous batching is not supported.*use generate with prompts padded"):
            refused([[1, 2, 3]])
    for strict in (False, True):
        with pytest.raises(Exception, match=r"set model\.config\.exit_threshold = None first"):
            torch.export.export(model, (ids,), {"use_cache": False}, strict=strict)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_full_depth_can_be_exported(context):
    model, ids = to_hf(lego_model(context, own_head=False), None), torch.randint(0, VOCAB, (2, 6))
    exported = torch.export.export(model, (ids,), {"use_cache": False}).module()
    torch.testing.assert_close(exported(ids, use_cache=False).logits, model(ids).logits)


def test_the_full_depth_is_exported_for_any_length():
    model = to_hf(lego_model("sequence", own_head=False), None)
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=60)}, "use_cache": None}
    ids = torch.randint(0, VOCAB, (2, 6))
    exported = torch.export.export(model, (ids,), {"use_cache": False}, dynamic_shapes=shapes).module()
    other = torch.randint(0, VOCAB, (2, 11))
    torch.testing.assert_close(exported(other, use_cache=False).logits, model(other).logits)


@pytest.mark.parametrize(
    "auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]
)
def test_other_heads_stand_on_the_full_depth(auto, tmp_path):
    model, ids = to_hf(lego_model("sequence", own_head=True), 0.3, pad_token_id=0), torch.randint(1, VOCAB, (2, 6))
    model.save_pretrained(tmp_path)
    other = auto.from_pretrained(tmp_path)
    torch.testing.assert_close(other.base_model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    first = other(ids)[0]
    first.sum().backward()
    assert other.base_model.layers[3].mlp.up_proj.weight.grad.any()
    other.save_pretrained(tmp_path / "other")
    torch.testing.assert_close(auto.from_pretrained(tmp_path / "other")(ids)[0], first)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"block2_context": "token"}, "block2_context is 'sequence' in this model's weights and cannot be 'token'"),
        ({"exit_layer": 1}, "exit_layer is 2 in this model's weights and cannot be 1"),
        ({"own_head": True}, "own_head is False in this model's weights and cannot be True"),
        ({"exit_criterion": "probe"}, "exit_criterion is 'max_prob' in this model's weights and cannot be 'probe'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 4 in this model's weights and cannot be 3"),
    ],
)
def test_a_field_that_contradicts_the_weights_is_refused(change, sentence, tmp_path):
    model = to_hf(lego_model("sequence", own_head=False), 0.3)
    model.save_pretrained(tmp_path)
    changed = AutoConfig.from_pretrained(tmp_path, **change)  # by itself a configuration may say so
    for load, options in (
        (AutoModelForCausalLM.from_pretrained, change),
        (LegoForCausalLM.from_pretrained, change),
        (AutoModel.from_pretrained, change),
        (LegoForCausalLM.from_pretrained, {"config": changed}),
    ):
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path, **options)
    name, value = next(iter(change.items()))
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=sentence if name != "exit_criterion" else "needs a model that was saved with"):
        model(torch.tensor([[1, 2]]))
    kept = AutoModelForCausalLM.from_pretrained(tmp_path, exit_threshold=0.7, exit_criterion="margin", exit_layer=2)
    assert (kept.config.exit_threshold, kept.config.exit_criterion) == (0.7, "margin")
