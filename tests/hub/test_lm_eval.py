"""lm-evaluation-harness on a routed folder: the same figures in batches of one and of eight, and our own loss."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lego.hf import save_routed
from tests.conftest import SOURCE
from tests.hub.test_blocks import extended

lm_eval = pytest.importorskip("lm_eval")  # pip install lm_eval; it brings dozens of packages

TASKS = {
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
}


def test_batches_of_one_and_eight_agree_with_each_other_and_with_our_loss(checkpoint, tmp_path):
    folder = tmp_path / "routed"
    folder.mkdir()
    save_routed(extended(checkpoint, "branch", 1), folder, checkpoint, "a card")
    texts = [SOURCE[at : at + 40] for at in range(0, 800, 40)]  # within its 64 tokens
    rows = [{"text": text, "choices": [" self", "\n", " import", "("], "label": n % 4} for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for size in (1, 8):
        tasks = []
        for name, task in TASKS.items():
            data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
            tasks.append({"task": name, "test_split": "test", **data, **task})
        model = {"pretrained": str(folder), "trust_remote_code": True, "device": "cpu"}
        results = lm_eval.simple_evaluate(model="hf", model_args=model, tasks=tasks, batch_size=size)["results"]
        found[size] = {
            name: {key: value for key, value in one.items() if "stderr" not in key} for name, one in results.items()
        }
    for name in TASKS:
        for key, value in found[1][name].items():
            if isinstance(value, float):
                assert value == pytest.approx(found[8][name][key], rel=1e-5), (name, key)
    routed, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    nats = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
            log_p = routed(ids[:, :-1]).logits.log_softmax(dim=-1)
            nats -= float(log_p.gather(-1, ids[:, 1:, None]).sum())
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found[1]["text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
