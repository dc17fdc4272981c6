"""transformers' classes: our decoder's routing and generation, folders that hold them, and what they refuse."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from lego import DeepSupervisionTransformer, load_model
from lego.base.artifacts import ArtifactError, read_json, write_json, write_tensors
from lego.hf import LegoConfig, LegoForCausalLM, save_routed, to_hf
from lego.model.checkpoint import load_routed
from lego.model.exit_criteria import LOGIT_CRITERIA, StateCriterion
from lego.routing.command_line import main as write_text_with
from lego.routing.decoder import RoutedDecoder
from lego.routing.generation import generate
from lego.text.tokenizer import TextEncoder, fit_bpe
from tests.conftest import SOURCE, VOCAB, logits_close
from tests.routing.conftest import BRANCHED

CONTEXTS = ["sequence", "token", "full", *BRANCHED]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TextEncoder.fitted(fit_bpe([SOURCE], 300, 10**6)).save(folder)
    return folder


def lego_model(context: str, own_head: bool) -> DeepSupervisionTransformer:
    torch.manual_seed(2)
    sizes = {"exit_layer": 2, "num_kv_heads": 2, "own_head": own_head, "tie_embeddings": True}
    if context in BRANCHED:
        sizes, context = sizes | {"branch_layer": BRANCHED[context]}, "sequence"
    model = DeepSupervisionTransformer(VOCAB, 32, 4, 4, block2_context=context, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def read_in_pieces(routed: LegoForCausalLM, x: Tensor) -> Tensor:
    """Logits (B, T, V) of ids (B, T) that are read three at a time, through the cache."""
    pieces, cache = [], None
    for piece in x.split(3, dim=1):
        part = routed(piece, past_key_values=cache, use_cache=True)
        cache = part.past_key_values
        pieces.append(part.logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("criterion", ["max_prob", "entropy", "gain"])
@torch.no_grad()
def test_the_transformers_model_routes_as_our_decoder_does(context, criterion, tmp_path, tokenizer_folder):
    model = lego_model(context, own_head=criterion == "entropy")
    scorer = StateCriterion(32, 4).requires_grad_(False) if criterion == "gain" else None
    chosen = scorer or LOGIT_CRITERIA[criterion]
    x = torch.randint(0, VOCAB, (3, 11))
    h = model.forward_to_hidden(x).flatten(0, 1)
    threshold = chosen(h, model.logits_at(h, 2)).sort().values[14:16].mean().item()
    expected = RoutedDecoder(model, threshold, 3, chosen).read(x)
    save_routed(to_hf(model, threshold, criterion, scorer), tmp_path, tokenizer_folder, "a card")
    routed = AutoModelForCausalLM.from_pretrained(tmp_path)
    answer = routed(x)
    logits_close(answer.logits.flatten(0, 1), expected.logits)
    assert torch.equal(answer.went_deep.flatten(), expected.deep)
    logits_close(read_in_pieces(routed, x), answer.logits)
    logits_close(routed(x, logits_to_keep=2).logits, answer.logits[:, -2:])
    for value, full in ((None, model(x)), (2.0, model(x)), (0.0, model.logits_at(model.forward_to_hidden(x), 2))):
        routed.config.exit_threshold = value
        logits_close(routed(x).logits, full)
    again = load_routed(tmp_path)  # and back
    assert again.threshold == threshold
    logits_close(RoutedDecoder(again.model, threshold, 3, again.criterion).read(x).logits, expected.logits)
    logits_close(load_model(tmp_path)(x), model(x))


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_generate_equals_our_generation_and_padding_changes_nothing(context):
    model = lego_model(context, own_head=False)
    routed = to_hf(model, 0.3, eos_token_id=None, pad_token_id=0, bos_token_id=None)
    prompts = [[5, 9, 2, 11], [17], [3, 3, 8]]
    ids, mask = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # on the left, as generate wants it
        ids[row, 4 - len(prompt) :], mask[row, 4 - len(prompt) :] = torch.tensor(prompt), 1
    ours: list[list[int]] = [[], [], []]
    for token in generate(model, prompts, 12, 0.3):
        ours[token.sequence].append(token.id)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert routed.generate(ids, **options)[:, 4:].tolist() == ours
    beams = {**options, "num_beams": 3, "length_penalty": 0.5}
    assert torch.equal(routed.generate(ids, **beams), routed.generate(ids, **beams, use_cache=False))
    sampled = {**options, "do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3, "repetition_penalty": 1.2}
    set_seed(0)
    drawn = routed.generate(ids, **sampled)
    set_seed(0)
    assert torch.equal(routed.generate(ids, **sampled, use_cache=False), drawn)
    static = routed.generate(ids, **options, cache_implementation="static")
    assert static[:, 4:].tolist() == ours
    whole = torch.randint(0, VOCAB, (2, 7))  # without padding there is no mask
    options = {"max_new_tokens": 12, "do_sample": False}
    for threshold in (None, 0.3, 2.0):
        routed.config.exit_threshold = threshold
        static = routed.generate(whole, **options, cache_implementation="static")
        assert torch.equal(static, routed.generate(whole, **options))


@pytest.mark.parametrize("context", CONTEXTS)
def test_gradient_checkpointing_recomputes_every_layer_and_changes_no_gradient(context):
    model = to_hf(lego_model(context, own_head=False), None).train()
    x, calls, gradients = torch.randint(0, VOCAB, (2, 6)), [0, 0, 0, 0], []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(x, labels=x).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert calls == [3, 3, 3, 3]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_what_a_routed_model_cannot_do_is_named():
    model, x = to_hf(lego_model("sequence", own_head=False), 0.3), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=r"assistant_early_exit is not supported; lego\.generate\.generate_lossless"):
        model.generate(x, assistant_early_exit=2)
    with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds"):
        model()
    for threshold in (-1.0, float("nan")):
        model.config.exit_threshold = threshold
        with pytest.raises(ValueError, match=r"exit_threshold must be None or at least 0\.0, got"):
            model(x)
    model.config.exit_threshold, model.config.exit_criterion = 0.3, "probe"
    with pytest.raises(ValueError, match="exit_criterion probe needs a model that was saved with it"):
        model(x)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"exit_criterion": "hope"}, "exit_criterion must be one of max_prob, margin, entropy, probe, gain, got hope"),
        ({"rope_parameters": None}, r"config\.json: describes no model"),
        ({"rms_norm_eps": "x"}, r"config\.json: describes no model \(rms_norm_eps is no number\)"),
        ({"model_type": "llama"}, r"is of model_type llama, not lego; to extend a trained Llama set model\.init_from"),
    ],
)
def test_an_edited_configuration_is_named(change, sentence, tmp_path, tokenizer_folder):
    save_routed(to_hf(lego_model("sequence", own_head=False), 0.3), tmp_path, tokenizer_folder, "a card")
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | change)
    with pytest.raises(ArtifactError, match=sentence):
        load_routed(tmp_path)


@torch.no_grad()
def test_a_folder_in_several_files_is_read_as_one_in_one_is(tmp_path, tokenizer_folder, capsys):
    scorer = StateCriterion(32, 4).requires_grad_(False)
    model, x = to_hf(lego_model("sequence", own_head=False), 0.3, "gain", scorer), torch.randint(0, VOCAB, (2, 9))
    model.resize_token_embeddings(300)
    model.calibrate(x, 0.5)
    save_routed(model, tmp_path, tokenizer_folder, "a card")
    whole = load_routed(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"of": torch.zeros(1)})  # transformers would read this first
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    split = load_routed(tmp_path)
    read, again = (RoutedDecoder(m.model, m.threshold, 2, m.criterion).read(x) for m in (whole, split))
    assert torch.equal(read.logits, again.logits)
    assert torch.equal(read.deep, again.deep)
    assert write_text_with([str(tmp_path), "def", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("def")
    index = read_json(tmp_path / "model.safetensors.index.json")
    name, file = next(iter(index["weight_map"].items()))
    for outside in ("../" + file, str(tmp_path / file), 3):
        write_json(tmp_path / "model.safetensors.index.json", {"weight_map": index["weight_map"] | {name: outside}})
        with pytest.raises(ArtifactError, match="weight_map must name files of this folder; save the model again"):
            load_routed(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", index)
    (tmp_path / file).unlink()
    with pytest.raises(ArtifactError, match=f"{file}: cannot be read as safetensors"):
        load_routed(tmp_path)


def test_one_file_takes_the_place_of_several(tmp_path):
    model = to_hf(lego_model("full", own_head=False), 0.3)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("model*")} == {"model.safetensors", "modeling_lego.py"}


@pytest.mark.parametrize("kind", ["model", "config"])
def test_what_is_uploaded_has_the_code_that_loads_it(tmp_path, monkeypatch, kind):
    """The upload of `push_to_hub` takes what was written in the folder since it began."""
    model, sent = to_hf(lego_model("full", own_head=False), 0.3), list[str]()
    hub = SimpleNamespace(
        create_repo=lambda repo, **_: SimpleNamespace(repo_id=repo),
        create_commit=lambda operations, **_: sent.extend(one.path_in_repo for one in operations),
    )
    for module in ("utils.hub", "modeling_utils", "configuration_utils"):
        monkeypatch.setattr(f"transformers.{module}.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: ModelCard(""))
    (model if kind == "model" else model.config).save_pretrained(str(tmp_path / "mine"), push_to_hub=True)
    assert {"config.json", "modeling_lego.py"} <= {*sent}
    assert ("model.safetensors" in sent) is (kind == "model")


def test_the_tokenizer_of_a_folder_pads_and_knows_the_trained_context(tmp_path, tokenizer_folder):
    trained = DeepSupervisionTransformer(300, 32, 4, 4, exit_layer=2, context=48)
    save_routed(to_hf(trained, 0.3), tmp_path, tokenizer_folder, "a card")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 48
    assert tokenizer.pad_token == tokenizer.eos_token
    assert (
        tokenizer(["def f(x):", "x"], padding=True, return_tensors="pt")["attention_mask"].sum(dim=1).tolist()[1] == 1
    )
    assert len(tokenizer("x " * 90, truncation=True)["input_ids"]) == 48
    mine = AutoTokenizer.from_pretrained(tokenizer_folder, pad_token="x")
    mine.save_pretrained(tmp_path / "mine")
    (tmp_path / "routed").mkdir()
    save_routed(to_hf(lego_model("full", own_head=False), 0.3), tmp_path / "routed", tmp_path / "mine", "a card")
    kept = AutoTokenizer.from_pretrained(tmp_path / "routed")
    assert kept.pad_token == "x"
    assert kept.model_max_length > 10**6  # not known: lego_model has no trained context


@torch.no_grad()
def test_load_model_routes_by_confidence_or_not_at_all(tmp_path, tokenizer_folder):
    """What it returns knows max_prob alone: another criterion's threshold must not be compared with it."""
    model, x = lego_model("sequence", own_head=False), torch.randint(0, VOCAB, (2, 9))
    for criterion, threshold in (("max_prob", 0.3), ("margin", 0.3)):
        save_routed(to_hf(model, threshold, criterion), tmp_path, tokenizer_folder, "a card")
        loaded = load_model(tmp_path)
        assert loaded.routing_threshold == (0.3 if criterion == "max_prob" else 0.0)
        expected = model.route(x, 2, 0.3)[0] if criterion == "max_prob" else model(x)
        logits_close(loaded.forward_inference(x)[0], expected)


def test_embeddings_are_resized_with_both_heads():
    model = to_hf(lego_model("sequence", own_head=True), 0.3)
    model.resize_token_embeddings(VOCAB + 5)
    x = torch.randint(0, VOCAB, (1, 4))
    for threshold in (None, 0.0, 0.3):
        model.config.exit_threshold = threshold
        assert model(x).logits.shape == (1, 4, VOCAB + 5)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("exit_layer", 9, r"exit_layer must be in 1\.\.2, got 9"),
        ("exit_threshold", -0.5, r"exit_threshold must be None or at least 0\.0, got -0\.5"),
        ("exit_criterion", "hope", "exit_criterion must be one of max_prob, margin, entropy, probe, gain, got 'hope'"),
        ("block2_context", "all", "block2_context must be one of full, token, sequence, got 'all'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(field, value, sentence):
    with pytest.raises(Exception, match=sentence):
        LegoConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, **{field: value})
    with pytest.raises(ValueError, match="exit_criterion gain needs its fitted weights"):
        to_hf(lego_model("token", own_head=False), 0.3, "gain")


def test_a_tokenizer_beside_a_whole_checkpoint_brings_no_weights(tmp_path, tokenizer_folder):
    given, folder = tmp_path / "given", tmp_path / "routed"
    LlamaForCausalLM(LlamaConfig(vocab_size=48, hidden_size=16, num_attention_heads=2)).save_pretrained(given)
    shutil.copytree(tokenizer_folder, given, dirs_exist_ok=True)
    (given / "model.safetensors.index.json").write_text("{}")
    (given / "special_tokens_map.json").write_text("{}")
    folder.mkdir()
    model = to_hf(lego_model("sequence", own_head=False), 0.3)
    save_routed(model, folder, given, "a card")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is LegoForCausalLM
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert (folder / "special_tokens_map.json").exists()
    assert not (folder / "model.safetensors.index.json").exists()
