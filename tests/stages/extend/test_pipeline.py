"""The whole way of stages/extend with a tiny Llama: from its folder to the page."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shlex
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lego.base.artifacts import read_json, write_json
from lego.base.harness import StageError, exit_cleanly
from lego.base.params import load_params
from lego.base.scratch import fingerprint
from lego.hub.modeling import LegoForCausalLM
from lego.model.checkpoint import load_model
from lego.text.sources import stdlib_documents
from lego.text.tokenizer import TextEncoder
from lego.tokens.batches import split_batches
from stages.extend import base, block, retention, rival
from stages.extend.settings import load_settings, write_params
from tests.conftest import ROOT, TINY, Clone, run_in_process, train_llama
from tests.stages.conftest import ORDER

pytest.importorskip("peft")
EXTEND = {
    "init_from": "data/base",
    "branch_layer": "1",
    "branch": "full",
    "phase2_layers": "2",
    "phase2_lr": "2.0e-03",
    "phase2_share": "0.9",
    "gain_width": "0",
    "fit_share": "0.5",
    "warmup_steps": "1",
}
SECOND_PASS = {"ashem.branch_layer": 0, "ashem.branch": "lora", "ashem.branch_rank": 2, "ashem.phase2_lr": 2e-2}
KEPT = ("max_train_tokens", "max_validation_tokens", "max_test_tokens", "seq_len", "tokens_per_epoch", "threads")


def tiny(clone: Clone) -> Path:
    """The folder of the pipeline in a clone, with a tiny Llama and as little of everything."""
    folder = clone.folder / "stages/extend"
    train_llama(folder / "llama")
    text = (folder / "extend.yaml").read_text().replace("from: smollm2", "from: llama")
    text = text.replace("  tokens: 4000", "  tokens: 1600").replace("size: 6", "size: 2")
    for key, value in ({key: TINY[key] for key in KEPT} | EXTEND).items():
        text, count = re.subn(rf"(?m)^(    {key}: )\S+", rf"\g<1>{value}", text)
        assert count == 1, key
    (folder / "extend.yaml").write_text(text)
    return folder


def in_process(module: str, work: Path, name: str) -> None:
    """What block.run does in a process of its own."""
    with contextlib.chdir(work):
        write_params(load_settings())
        import_module(module).main()
        write_json(f"data/memory/{module.rpartition('.')[2]}.json", {"peak_mib": 1.0})


def up_to_phase_2(module: str, work: Path, name: str) -> None:
    if module.endswith("train_phase2"):
        raise StageError("killed")
    in_process(module, work, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tiny(Clone.of_this_tree(tmp_path_factory.mktemp("extend")))
    settings = yaml.safe_load((folder / "extend.yaml").read_text())
    settings["rivals"] = {name: settings["rivals"][name] for name in ("full", "lora_8", "new_layers")}
    settings["rivals"]["full"]["equal"] = "macs"  # the page's commands below measure seconds
    settings["blocks"] = {"same": {}, "second_pass": SECOND_PASS}
    (folder / "extend.yaml").write_text(yaml.safe_dump(settings))
    write_params(load_settings(folder / "extend.yaml"), folder / "params.yaml")
    stages = ["extend.base", *ORDER[:5], "extend.route", "extend.retention"]
    run_in_process(folder, stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in load_settings().rivals:
            rival.main(name)
        import_module("stages.extend.evaluate").main()
        patch.setattr(block, "run", in_process)
        block.main("same")
        patch.setattr(block, "run", up_to_phase_2)
        with pytest.raises(StageError, match="killed"):
            block.main("second_pass")
        patch.setattr(block, "run", in_process)
        with (run_out := io.StringIO()), contextlib.redirect_stdout(run_out):
            block.main("second_pass")
            (folder / "said.txt").write_text(run_out.getvalue())
        import_module("stages.extend.report").main()
    return folder


@torch.no_grad()
def test_the_base_is_the_given_model(run):
    x = torch.arange(20)[None] * 7 % 300
    given, ours = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("llama", "data/base"))
    assert torch.equal(ours(x).logits, given(x).logits)
    assert read_json(run / "data/facts/base.json") == {"parameters": given.num_parameters(), "layers": 3}


@torch.no_grad()
def test_at_no_share_it_is_the_given_model_and_at_all_it_is_always_deep(run):
    with (run / "data/curves/extend.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["criterion"], row["gated"]) == ("gain", "1")]
    models = read_json(run / "metrics/blocks/default.json")["models"]
    for key in ("ppl", "val_ppl", "other_ppl"):
        assert float(rows[0][key]) == pytest.approx(models["base"][key], rel=0.02)
        assert float(rows[-1][key]) == pytest.approx(models["deep"][key], rel=1e-4)
    given = AutoModelForCausalLM.from_pretrained(run / "llama").eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run)
        losses, tokens = 0.0, 0
        for x, y in split_batches("data/retention", "test", 8):
            loss = torch.nn.functional.cross_entropy(given(x).logits.flatten(0, 1), y.flatten(), reduction="sum")
            losses, tokens = losses + float(loss), tokens + y.numel()
    assert models["base"]["other_ppl"] == pytest.approx(torch.tensor(losses / tokens).exp().item(), rel=1e-4)
    assert models["base"]["deep_share"] == 0
    assert models["deep"]["other_deep_share"] == 1


def test_rivals_cost_what_mining_and_phase_2_cost(run):
    for name, entry in load_settings(run / "extend.yaml").rivals.items():
        found = read_json(run / f"metrics/rivals/{name}.json")
        if entry.equal == "macs":
            step = found["added_macs"] / found["trained_tokens"] * 32
            assert abs(found["added_macs"] - found["budget_macs"]) <= step
        assert found["val_ppl"] <= read_json(run / "metrics/blocks/default.json")["models"]["base"]["val_ppl"] + 1e-6
        assert found["lr"] == entry.lr
    trained = {
        name: read_json(run / f"metrics/rivals/{name}.json")["trainable_parameters"] for name in ("lora_8", "full")
    }
    layers = 3 * 8 * sum((48 + 48, 48 + 24, 48 + 24, 48 + 48, 48 + 96, 48 + 96, 96 + 48))
    assert trained["lora_8"] == layers
    assert trained["full"] == sum(p.numel() for p in load_model(run / "data/phase1").parameters())


def test_a_rival_that_goes_on_keeps_its_budget(run, monkeypatch, tmp_path):
    """Time would be measured anew, and the schedule of the part that was trained would be another's."""
    monkeypatch.chdir(run)
    stage, params = SimpleNamespace(scratch=tmp_path / "scratch", seed=1), load_params()
    entry = load_settings().rivals["full"].model_copy(update={"equal": "macs"})
    found = rival.budget(entry, stage, params, 5e9)
    monkeypatch.setattr(rival, "macs_of_block", None)
    assert rival.budget(entry, stage, params, 9e9) == found


def test_another_base_in_the_same_folder_is_noticed_and_bytecode_is_not(run, monkeypatch, tmp_path):
    for name in ("params.yaml", "extend.yaml"):
        shutil.copy(run / name, tmp_path / name)
    shutil.copytree(run / "data/base", tmp_path / "data/base")
    monkeypatch.chdir(tmp_path)
    before = [fingerprint(name) for name in ("tokenize", "train_phase1", "extend/evaluate")]
    (ROOT / "lego/report/__pycache__").mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=ROOT / "lego/report/__pycache__", suffix=".pyc"):
        assert [fingerprint(name) for name in ("tokenize", "train_phase1", "extend/evaluate")] == before
    (tmp_path / "data/base/config.json").write_text("{}")
    after = [fingerprint(name) for name in ("tokenize", "train_phase1", "extend/evaluate")]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]


def test_a_block_of_the_same_parameters_is_the_same_and_another_is_not(run):
    first, same, other = (read_json(run / f"metrics/blocks/{name}.json") for name in ("default", "same", "second_pass"))
    assert {key: same[key] for key in first} == first
    assert other["models"]["base"] == first["models"]["base"]
    assert other["models"]["deep"]["ppl"] != first["models"]["deep"]["ppl"]
    assert other["block"]["trainable_parameters"] < first["block"]["trainable_parameters"]
    assert not list((run / ".scratch/extend").glob("block@*"))  # its stages' outs are not kept twice


@torch.no_grad()
def test_the_file_of_a_block_answers_as_its_metrics_say(run):
    model = LegoForCausalLM.from_pretrained(run / "data/routed")
    model.load_block(run / "data/blocks/second_pass", "second_pass")
    for name in ("default", "second_pass"):
        model.set_block(name)
        model.config.exit_threshold = None
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(run)
            losses = [
                torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="none")
                for x, y in split_batches("data/tokens", "test", 8)
            ]
        expected = read_json(run / f"metrics/blocks/{name}.json")["models"]["deep"]["ppl"]
        assert torch.cat(losses).mean().exp().item() == pytest.approx(expected, rel=1e-4)


def test_a_killed_block_does_not_repeat_what_had_finished(run):
    ran = re.findall(r"^block second_pass: stages\.(\w+)", (run / "said.txt").read_text(), re.M)
    assert ran == ["train_phase2", "extend", "extend"]


def test_the_page_has_every_model_and_its_times(run):
    page = (run / "metrics/report.md").read_text()
    for name in (
        "the given model",
        "extended, routed",
        "extended, always deep",
        "second_pass, routed",
        'ashem.branch "lora", ashem.branch_layer 0, ashem.branch_rank 2',
        *load_settings(run / "extend.yaml").rivals,
    ):
        assert name in page
    assert "Median time as a multiple of the given model's" in page


def test_nobody_knows_better_what_the_given_model_writes(run, monkeypatch):
    """Gibbs: of its own samples the sampler expects the least loss; and they are the same each time."""
    models = read_json(run / "metrics/blocks/default.json")["models"]
    others = [models["deep"], *(read_json(file) for file in (run / "metrics/rivals").glob("*.json"))]
    assert all(one["other_ppl"] > models["base"]["other_ppl"] for one in others)
    assert models["base"]["other_ppl"] <= models["routed"]["other_ppl"] <= models["deep"]["other_ppl"]
    monkeypatch.chdir(run)
    encoder, device = TextEncoder.load("llama", "llama"), torch.device("cpu")
    file, written = Path("data/base/generation_config.json"), []
    plain = file.read_text()
    for told in (plain, json.dumps(json.loads(plain) | {"repetition_penalty": 1.8, "return_dict_in_generate": True})):
        file.write_text(told)
        torch.manual_seed(3)
        written.append([(ids.tolist(), size) for ids, size in retention.own_words(5, 24, encoder, device)])
    file.write_text(plain)
    assert written[0] == written[1]  # its own distribution, whatever its configuration would do
    (first, _), *blocks = written[0]
    assert first == [encoder.end]
    assert [len(ids) for ids, _ in blocks] == [24] * 5
    assert all(ids[-1] == encoder.end and max(ids) < encoder.vocab_size for ids, _ in blocks)
    assert all(size == len(encoder.fast.decode(ids[:-1]).encode()) for ids, size in blocks)


def test_text_of_another_kind_comes_from_python_or_from_files(run, monkeypatch):
    monkeypatch.chdir(run)
    (run / "other.txt").write_text("A text of one's own.")
    assert list(retention.texts("other.txt")) == ["A text of one's own."]
    assert "lambda" in "".join(retention.texts("pydoc"))
    licences = list(retention.texts("licences"))
    assert len(set(licences)) == len(licences) > 50
    assert any("WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND" in text for text in licences)
    assert next(retention.texts("stdlib")) in {one.text for one in stdlib_documents()}


def test_what_is_missing_is_said(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    monkeypatch.setattr(base, "PACKAGE", "no_such_package")
    with pytest.raises(StageError, match=r"extend\.yaml: base\.from smollm2 needs a package: pip install"):
        base.place_of("smollm2")
    with pytest.raises(StageError, match=r"extend\.yaml: blocks must have 'nobody', it has same, second_pass"):
        block.main("nobody")
    with pytest.raises(SystemExit):
        exit_cleanly(lambda: rival.main("nobody"))
    assert "error: extend.yaml: rivals must have 'nobody', it has full, lora_8" in capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_they_are_typed(tmp_path):
    """docs/extend.md after its pip install, which is done here, to generated text; a second time nothing runs."""
    page = (ROOT / "docs/extend.md").read_text()
    commands = page.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert [command.split()[0] for command in commands] == ["pip", "dvc", "python"]
    clone = Clone.of_this_tree(tmp_path)
    folder = tiny(clone)
    settings = yaml.safe_load((folder / "extend.yaml").read_text())
    settings["rivals"] = {name: settings["rivals"][name] for name in ("lora_8", "lora_32_seconds")}
    settings["blocks"] = {"second_pass": SECOND_PASS}
    (folder / "extend.yaml").write_text(yaml.safe_dump(settings))
    clone.run(*shlex.split(commands[1]))
    said = clone.run(*shlex.split(commands[2]), "--max-new-tokens", "8")
    assert "The capital of France is" in said
    again = clone.run(*shlex.split(commands[1]))
    assert "Running stage" not in again
    assert (tmp_path / "stages/extend/metrics/report.html").exists()
    changed = clone.run(
        "dvc", "exp", "run", "-S", "stages/extend/extend.yaml:rivals.lora_8.lr=0.002", commands[1].split()[-1]
    )
    assert re.findall(r"Running stage '(?:.*:)?([\w@]+)'", changed) == ["rival@lora_8", "report"]
