"""A given Llama with layers on top, as transformers' class: its own logits bit for bit, and what users do with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments, pipeline
from transformers.generation.streamers import BaseStreamer

from lego import DeepSupervisionTransformer, grow_model, load_model
from lego.hf import LegoForCausalLM, model_card, save_routed, to_hf
from lego.model.exit_criteria import StateCriterion
from lego.model.llama import load_llama
from tests.conftest import SOURCE
from tests.hub.test_export import tokenizer_folder  # noqa: F401 - a fixture


def text_ids(folder, count: int, length: int) -> Tensor:
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(SOURCE[20_000:40_000])["input_ids"])
    return ids[: count * length].view(count, length)


def with_trained_top(model: DeepSupervisionTransformer) -> DeepSupervisionTransformer:
    """New layers that change the answers, as after phase 2."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mean = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def extended(checkpoint, tokenizer_folder, tmp_path_factory):  # noqa: F811
    """The whole way: checkpoint, block 1, new layers, a folder."""
    folder = tmp_path_factory.mktemp("routed")
    model = with_trained_top(grow_model(load_llama(str(checkpoint)), 5, init="zero", block2_context="sequence"))
    x = text_ids(checkpoint, 6, 24)
    threshold = model.compute_confidence(model.forward_to_hidden(x)).median().item()
    converted = to_hf(model, threshold, eos_token_id=0, pad_token_id=0, bos_token_id=None)
    save_routed(converted, folder, tokenizer_folder, model_card(converted, {"ppl": 1.5}))
    return folder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_easy_tokens_have_the_original_models_logits_bit_for_bit(checkpoint, extended, attention, dtype):
    options = {"dtype": dtype, "attn_implementation": attention}
    llama = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    routed = AutoModelForCausalLM.from_pretrained(extended, **options)
    assert routed.dtype == dtype
    x = text_ids(checkpoint, 6, 24)
    mask = torch.ones_like(x)
    mask[0, :7] = mask[3, :2] = 0
    for padding in (None, mask):
        answer, original = routed(x, attention_mask=padding), llama(x, attention_mask=padding).logits
        easy = ~answer.went_deep
        assert 10 < easy.sum() < easy.numel() - 10
        assert torch.equal(answer.logits[easy], original[easy])
        assert not torch.equal(answer.logits[~easy], original[~easy])
    cache, original_cache, seen = None, None, []
    for step in range(24):  # token by token
        answer = routed(x[:, step : step + 1], past_key_values=cache, use_cache=True)
        original = llama(x[:, step : step + 1], past_key_values=original_cache, use_cache=True)
        cache, original_cache = answer.past_key_values, original.past_key_values
        easy = ~answer.went_deep
        assert torch.equal(answer.logits[easy], original.logits[easy])
        seen.append(easy)
    assert 10 < torch.cat(seen).sum() < 134


@pytest.mark.parametrize("easy", [1, 3, 17])
@torch.no_grad()
def test_few_easy_tokens_have_the_same_bits_without_the_exits_head(checkpoint, easy):
    """A head of fewer rows would round otherwise."""
    block1 = grow_model(load_llama(str(checkpoint)), 5, init="random", block2_context="sequence")
    routed = to_hf(block1, 0.5, "probe", StateCriterion(48, 0))
    x = text_ids(checkpoint, 4, 32)
    routed.config.exit_threshold = routed(x).exit_scores.flatten().sort().values[-easy].item()
    answer, original = routed(x), LlamaForCausalLM.from_pretrained(checkpoint)(x).logits
    assert (~answer.went_deep).sum() == easy
    assert torch.equal(answer.logits[~answer.went_deep], original[~answer.went_deep])
    half = routed.to(torch.bfloat16)(x)
    assert half.logits.dtype == torch.bfloat16
    assert half.exit_scores.dtype == torch.float32


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_stop_strings_streamer_and_pipeline(extended):
    tokenizer, model = AutoTokenizer.from_pretrained(extended), AutoModelForCausalLM.from_pretrained(extended)
    inputs, streamer = tokenizer("def _get_", return_tensors="pt"), Collected()
    whole = model.generate(**inputs, max_new_tokens=30, do_sample=False, streamer=streamer)
    assert streamer.tokens == [*whole[0].tolist(), -1]
    written = tokenizer.decode(whole[0])
    stop = written[len("def _get_") + 3 :][:2]
    stopped = model.generate(**inputs, max_new_tokens=30, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert stop in tokenizer.decode(stopped[0])
    assert len(stopped[0]) < len(whole[0])
    writer = pipeline("text-generation", model=str(extended), tokenizer=str(extended))
    assert isinstance(writer.model, LegoForCausalLM)
    assert writer("def _get_", max_new_tokens=30, do_sample=False)[0]["generated_text"] == written
    assert (extended / "generation_config.json").exists()
    assert "| ppl | 1.5000 |" in (extended / "README.md").read_text()


def test_the_loss_is_the_deep_cross_entropy_whatever_the_threshold(extended):
    model = AutoModelForCausalLM.from_pretrained(extended)
    x = text_ids(extended, 2, 16)
    labels = x.clone()
    labels[0, :5] = -100
    answer = model(x, labels=labels)
    deep = load_model(extended)(x)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(deep, labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(answer.loss, expected, rtol=1e-5, atol=1e-5)
    assert answer.went_deep is None


def test_under_the_trainer_the_loss_falls_on_real_text(checkpoint, tmp_path):
    model = to_hf(grow_model(load_llama(str(checkpoint)), 5, init="zero", block2_context="sequence"), 0.3)
    rows = [{"input_ids": row, "labels": row} for row in text_ids(checkpoint, 64, 32)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=10,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.3
