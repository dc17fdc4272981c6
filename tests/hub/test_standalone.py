"""A colleague who has transformers and not this package loads what we save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lego.hf import model_card, save_routed, to_hf
from lego.hub.standalone import STANDALONE, standalone_code
from lego.model.exit_criteria import StateCriterion
from tests.conftest import VOCAB
from tests.hub.test_export import CONTEXTS, lego_model, tokenizer_folder  # noqa: F401 - a fixture

COLLEAGUE = """
import importlib.util, json, sys
assert importlib.util.find_spec("lego") is None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, out = sys.argv[1:]
trust = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder, **trust)
ids = torch.tensor(json.loads(sys.stdin.read()))
answer = model(ids)
said = {"logits": answer.logits.tolist(), "deep": answer.went_deep.tolist(), "class": type(model).__module__}
said["generated"] = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
said["threshold"] = model.calibrate(ids, 0.5)
model.train()(ids, labels=ids).loss.backward()
said["headless"] = list(AutoModel.from_pretrained(folder, **trust)(ids).last_hidden_state.shape)
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
said["padded"] = list(tokenizer(["def main", "x"], padding=True, return_tensors="pt")["input_ids"].shape)
writer = pipeline("text-generation", folder, **trust)
said["text"] = writer("def", max_new_tokens=3)[0]["generated_text"]
model.config.exit_threshold = 0.3
model.save_pretrained(out)
said["again"] = AutoModelForCausalLM.from_pretrained(out, **trust).eval()(ids).logits.tolist()
print(json.dumps(said))
"""


@pytest.mark.parametrize("context", [CONTEXTS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in CONTEXTS[1:])])
def test_a_folder_brings_its_own_code(context, tmp_path, tokenizer_folder):  # noqa: F811
    scorer = StateCriterion(32, 4) if context == "token" else None
    model = to_hf(lego_model(context, context == "full"), 0.3, "gain" if scorer else "max_prob", scorer)
    model.resize_token_embeddings(300)
    ids = torch.randint(1, VOCAB, (2, 7))
    model.calibrate(ids, 0.5)
    (tmp_path / "routed").mkdir()
    save_routed(model, tmp_path / "routed", tokenizer_folder, "a card")
    (tmp_path / "colleague.py").write_text(COLLEAGUE)
    apart = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", str(tmp_path / "colleague.py"), str(tmp_path / "routed"), str(tmp_path / "out")],
        input=json.dumps(ids.tolist()),
        env=apart | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["class"].endswith("modeling_lego")
    torch.testing.assert_close(torch.tensor(said["logits"]), model(ids).logits)
    assert said["deep"] == model(ids).went_deep.tolist()
    assert said["generated"] == model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
    assert said["threshold"] == pytest.approx(model.config.exit_threshold, rel=1e-5)
    assert said["headless"] == [2, 7, 32]
    assert said["text"].startswith("def")
    model.config.exit_threshold = 0.3
    torch.testing.assert_close(torch.tensor(said["again"]), model(ids).logits)
    assert (tmp_path / "out" / STANDALONE).read_text() == standalone_code()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # and here again, with this package's own classes
    assert type(back) is type(model)
    torch.testing.assert_close(back(ids).logits, model(ids).logits)


def test_the_code_names_nothing_that_it_lacks(tmp_path):
    file = tmp_path / STANDALONE
    file.write_text(standalone_code())
    assert "import lego" not in standalone_code()
    assert "from lego" not in standalone_code()
    checked = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(file)]
    done = subprocess.run(checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_save_brings_the_code_and_the_card_says_both_ways(tmp_path):
    model = to_hf(lego_model("sequence", own_head=False), 0.3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / STANDALONE).read_text() == standalone_code()
    maps = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(maps) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert {Path(name.split(".")[0] + ".py").name for name in maps.values()} == {STANDALONE}
    card = model_card(model, {"ppl": 1.5})
    assert "import lego.hf" in card
    assert card.count("trust_remote_code=True") == 2  # the tokenizer's class is found through the configuration
