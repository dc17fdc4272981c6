"""transformers' classes with a gate: our decoder's mixtures, and training that goes around it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

from lego.base.artifacts import ArtifactError, read_json, write_json
from lego.hf import LegoConfig, save_routed, to_hf
from lego.model.checkpoint import load_model, load_routed
from lego.model.exit_criteria import LOGIT_CRITERIA, StateCriterion
from lego.routing.decoder import RoutedDecoder
from lego.routing.generation import generate
from tests.conftest import VOCAB, logits_close
from tests.hub.test_export import CONTEXTS, lego_model, read_in_pieces, tokenizer_folder  # noqa: F401
from tests.routing.test_gated import gate_of


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("criterion", "reads"), [("max_prob", False), ("gain", False), ("gain", True)])
@torch.no_grad()
def test_the_transformers_model_mixes_as_our_decoder_does(context, criterion, reads, tmp_path, tokenizer_folder):  # noqa: F811
    model, gate = lego_model(context, own_head=criterion == "max_prob"), gate_of()
    scorer = StateCriterion(32, 4, reads).requires_grad_(False) if criterion == "gain" else None
    chosen = scorer or LOGIT_CRITERIA[criterion]
    x = torch.randint(0, VOCAB, (3, 11))
    h = model.forward_to_hidden(x).flatten(0, 1)
    threshold = chosen(h, model.logits_at(h, 2)).sort().values[14:16].mean().item()
    save_routed(to_hf(model, threshold, criterion, scorer, gate), tmp_path, tokenizer_folder, "a card")
    routed = AutoModelForCausalLM.from_pretrained(tmp_path)
    again, bare = load_routed(tmp_path), to_hf(model, threshold, criterion, scorer)
    for at in (threshold, None, 2.0, 0.0):
        expected = RoutedDecoder(model, at, 3, chosen, gate).read(x)
        routed.config.exit_threshold = bare.config.exit_threshold = at
        answer = routed(x)
        logits_close(answer.logits.flatten(0, 1), expected.logits)
        logits_close(RoutedDecoder(again.model, at, 3, again.criterion, again.gate).read(x).logits, expected.logits)
        left = ~expected.deep.view(3, 11)
        assert torch.equal(answer.logits[left], bare(x).logits[left])  # easy tokens know nothing of the gate
        logits_close(read_in_pieces(routed, x), answer.logits)
    logits_close(load_model(tmp_path)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_gated_folder_runs_in_half_precision(dtype, tmp_path, tokenizer_folder):  # noqa: F811
    """Gate and criterion stay in float32, and nothing else does: not the layers' gate_proj."""
    model, scorer = (
        lego_model("sequence", own_head=True),
        StateCriterion(32, 4, reads_logits=True).requires_grad_(False),
    )
    x = torch.randint(0, VOCAB, (2, 9))
    h = model.forward_to_hidden(x).flatten(0, 1)
    threshold = scorer(h, model.logits_at(h, 2)).median().item()
    save_routed(to_hf(model, threshold, "gain", scorer, gate_of()), tmp_path / "first", tokenizer_folder, "a card")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "first")(x)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype)
    kept = {name.split(".")[0] for name, weight in half.named_parameters() if weight.dtype is torch.float32}
    assert kept == {"gate", "exit_criterion_module"}
    half.save_pretrained(tmp_path / "second")
    for again in (half, AutoModelForCausalLM.from_pretrained(tmp_path / "second")):
        answer = again(x)
        assert answer.logits.dtype is dtype
        same = answer.went_deep == expected.went_deep  # a score may fall on the other side
        assert same.float().mean() > 0.8
        torch.testing.assert_close(answer.logits[same].float(), expected.logits[same], atol=0.1, rtol=0.05)
    assert load_routed(tmp_path / "second").criterion.needs_logits


@pytest.mark.parametrize("context", CONTEXTS)
def test_generate_equals_our_generation(context):
    model, gate = lego_model(context, own_head=False), gate_of()
    routed = to_hf(model, 0.3, gate=gate, eos_token_id=None, pad_token_id=0, bos_token_id=None)
    ours = [token.id for token in generate(model, [[5, 9, 2, 11]], 12, 0.3, gate=gate)]
    assert routed.generate(torch.tensor([[5, 9, 2, 11]]), max_new_tokens=12, do_sample=False)[0, 4:].tolist() == ours


def test_the_loss_of_text_is_the_mixtures_and_training_goes_around_the_gate():
    model, x = lego_model("sequence", own_head=True), torch.randint(0, VOCAB, (2, 9))
    gated, bare = to_hf(model, 0.3, gate=gate_of()), to_hf(model, 0.3)
    with torch.no_grad():
        mixed = RoutedDecoder(model, None, 2, gate=gate_of()).read(x).logits.view(2, 9, -1)
        logits_close(gated(x, labels=x).loss, F.cross_entropy(mixed[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
    losses = [one.train()(x, labels=x).loss for one in (gated, bare)]
    assert torch.equal(*losses)
    losses[0].backward()
    assert not any(weight.requires_grad for weight in gated.gate.parameters())


def test_a_folder_with_a_gate_brings_its_own_code(tmp_path, tokenizer_folder):  # noqa: F811
    """In a process that cannot import lego."""
    model, gate = lego_model("sequence", own_head=True), gate_of()
    scorer = StateCriterion(32, 4, reads_logits=True).requires_grad_(False)
    save_routed(to_hf(model, 0.5, "gain", scorer, gate), tmp_path, tokenizer_folder, "a card")
    code = (
        "import sys, torch\nsys.modules['lego'] = None\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        f"torch.save(model(torch.arange(12).view(1, 12)).logits.detach(), {str(tmp_path / 'logits')!r})\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = RoutedDecoder(model, 0.5, criterion=scorer, gate=gate).read(torch.arange(12).view(1, 12)).logits
    logits_close(torch.load(tmp_path / "logits")[0], expected)


def test_a_folder_that_lacks_its_gate_is_refused(tmp_path):
    to_hf(lego_model("full", own_head=False), 0.3).save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"gated": True})
    with pytest.raises(ArtifactError, match=r"lacks the gate that its config\.json speaks of"):
        load_routed(tmp_path)
    with pytest.raises(ValueError, match=r"gate\.bias is in its weights and not in its config\.json, or the other way"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_gated_folder_without_its_heads_is_no_language_model(tmp_path):
    to_hf(lego_model("full", own_head=False), 0.3, gate=gate_of()).save_pretrained(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "headless")
    AutoModel.from_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"headless: gate\.bias is in its weights and not in its config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "headless")


@pytest.mark.parametrize("saved", [None, 1])
@pytest.mark.parametrize("asked", [None, 0, 1, 2])
def test_a_branch_layer_that_the_weights_do_not_have_is_refused(tmp_path, saved, asked):
    """As an argument, set on the loaded model, or written into the folder's configuration."""
    context = "sequence" if saved is None else "branch"
    to_hf(lego_model(context, own_head=False), 0.3).save_pretrained(tmp_path)
    if asked == saved:
        assert AutoModelForCausalLM.from_pretrained(tmp_path, branch_layer=asked).config.branch_layer == saved
        return
    refused = "branch_layer is .* in this model's weights and cannot be"
    with pytest.raises(ValueError, match=refused):
        AutoModelForCausalLM.from_pretrained(tmp_path, branch_layer=asked)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.config.branch_layer = asked
    with pytest.raises(ValueError, match=refused):
        model(torch.zeros(1, 3, dtype=torch.long))
    if {saved, asked} != {None, 2}:  # 2 is the exit, as null is
        write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"branch_layer": asked})
        with pytest.raises(ValueError, match="in its weights and not in its config"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_whose_criterion_is_of_another_kind_is_refused(tmp_path):
    scorer = StateCriterion(32, 4, reads_logits=True).requires_grad_(False)
    to_hf(lego_model("full", own_head=False), 0.3, "gain", scorer, gate_of()).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"exit_criterion_reads_logits": False})
    with pytest.raises(
        ArtifactError, match=r"does not fit exit states of width 32 \(exit_criterion_reads_logits: false\)"
    ):
        load_routed(tmp_path)
    write_json(tmp_path / "config.json", config | {"exit_threshold": {"__float__": "Infinity"}})
    with pytest.raises(ArtifactError, match=r"config\.json: exit_threshold must be null or a number"):
        load_routed(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"exit_threshold": float("inf")},
            "exit_threshold must be None or at least 0.0, got inf; give one number",
        ),
        ({"exit_criterion_width": -1}, "exit_criterion_width must be at least 0, got -1"),
    ],
)
def test_values_that_no_model_has_are_named(values, said):
    with pytest.raises(Exception, match=said):
        LegoConfig(num_hidden_layers=4, hidden_size=8, num_attention_heads=2, exit_layer=2, **values)


def test_a_criterion_set_on_a_loaded_model_is_one_it_has():
    x, scorer = torch.zeros(1, 3, dtype=torch.long), StateCriterion(32, 4).requires_grad_(False)
    plain, fitted = (
        to_hf(lego_model("full", own_head=False), 0.3, "max_prob"),
        to_hf(lego_model("full", own_head=False), 0.3, "gain", scorer),
    )
    for model, name, said in (
        (plain, "confidence", "exit_criterion must be one of max_prob, margin, entropy, probe, gain, got 'confidence'"),
        (plain, "gain", "exit_criterion gain needs a model that was saved with it"),
        (fitted, "max_prob", "exit_criterion must be probe or gain in a model that was saved with it, got max_prob"),
    ):
        model.config.exit_criterion = name
        with pytest.raises(ValueError, match=said):
            model(x)


@pytest.mark.parametrize("value", [-1, 99, 1.5, 1.0, "x", [1], True])
def test_a_branch_layer_that_is_no_layer_is_named(value):
    with pytest.raises(Exception, match="branch_layer"):
        LegoConfig(num_hidden_layers=4, hidden_size=8, num_attention_heads=2, exit_layer=2, branch_layer=value)
