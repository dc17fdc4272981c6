"""Hidden states and attentions of tokens that differ in their depth, and the model without its heads."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, pipeline

from lego.hf import LegoForCausalLM, LegoModel, save_routed, to_hf
from tests.conftest import VOCAB, logits_close
from tests.hub.test_export import CONTEXTS, lego_model, tokenizer_folder  # noqa: F401 - a fixture

B, Q, LAYERS, EXIT = 2, 9, 4, 2


def routed(context: str, attention: str = "eager", own_head: bool = False) -> tuple[LegoForCausalLM, torch.Tensor]:
    """A model of 4 layers with its exit after the second, at which half of the ids' tokens leave."""
    model, ids = to_hf(lego_model(context, own_head), 0.0), torch.randint(1, VOCAB, (B, Q))
    model.set_attn_implementation(attention)
    model.calibrate(ids, deep_share=0.5)
    return model, ids


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_token_that_left_carries_its_exit_state_up(context, attention):
    model, ids = routed(context, attention)
    plain, answer = model(ids), model(ids, output_hidden_states=True)
    states, deep = answer.hidden_states, answer.went_deep
    assert 0 < deep.sum() < B * Q
    assert [tuple(h.shape) for h in states] == [(B, Q, 32)] * (LAYERS + 1)
    torch.testing.assert_close(states[0], model.model.embed_tokens(ids))
    torch.testing.assert_close(states[3][~deep], states[EXIT][~deep])
    assert not torch.isclose(states[3][deep], states[EXIT][deep]).all(dim=-1).any()
    logits_close(model.lm_head(states[-1]), plain.logits)  # the last is normed, by the norm of where it left
    torch.testing.assert_close(states[-1][~deep], model.exit_norm(states[EXIT])[~deep])
    model.config.exit_threshold = None
    full = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[3][deep], full[3][deep])
    torch.testing.assert_close(states[-1][deep], full[-1][deep])


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_attention_weights_are_eagers_and_nothing_for_a_token_that_left(context):
    model, ids = routed(context)
    answer = model(ids, output_attentions=True)
    deep = answer.went_deep
    assert [tuple(weights.shape) for weights in answer.attentions] == [(B, 4, Q, Q)] * LAYERS
    for weights in answer.attentions[:EXIT]:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, 4, Q))
    for weights in answer.attentions[EXIT:]:
        torch.testing.assert_close(weights.sum(dim=-1), deep[:, None].float().expand(-1, 4, -1))
        assert not weights.triu(1).any()
        if context == "token":
            assert torch.equal(weights.diagonal(dim1=-2, dim2=-1)[:, 0], deep.float())
    logits_close(answer.logits, model(ids).logits)
    model.config.exit_threshold = None
    for weights in model(ids, output_attentions=True).attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, 4, Q))


@torch.no_grad()
def test_attentions_of_another_implementation_come_from_eager_for_that_call():
    model, ids = routed("sequence", "sdpa")
    answer = model(ids, output_attentions=True)
    assert len(answer.attentions) == LAYERS
    assert model.config._attn_implementation == "sdpa"
    logits_close(answer.logits, model(ids).logits)
    assert model(ids).attentions is None


@pytest.mark.parametrize("kind", [LegoForCausalLM, LegoModel])
@torch.no_grad()
def test_the_configuration_asks_for_states_and_attentions_as_an_argument_does(kind, tmp_path):
    routed("sequence")[0].save_pretrained(tmp_path)
    ids = torch.randint(1, VOCAB, (B, Q))
    loaded = kind.from_pretrained(
        tmp_path, output_hidden_states=True, output_attentions=True, attn_implementation="eager"
    )
    answer = loaded(ids)
    assert (len(answer.hidden_states), len(answer.attentions)) == (LAYERS + 1, LAYERS)
    answer = loaded(ids, output_hidden_states=False, output_attentions=False)
    assert answer.hidden_states is None
    assert answer.attentions is None
    some = loaded(ids, output_hidden_states=[1, -1]).hidden_states  # newer transformers choose by number
    assert [h is None for h in some] == [True, False, True, True, False]


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_generation_returns_states_and_attentions_of_every_step(context):
    model, ids = routed(context)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    plain = model.generate(ids, **options)
    for cache in (None, "static"):
        answer = model.generate(
            ids,
            **options,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_hidden_states=True,
            output_attentions=True,
        )
        assert torch.equal(answer.sequences, plain)
        assert [step[-1].shape[1] for step in answer.hidden_states] == [Q, 1, 1, 1]
        assert [len(step) for step in answer.hidden_states] == [LAYERS + 1] * 4
        assert [step[-1].shape[2] for step in answer.attentions] == [Q, 1, 1, 1]


@torch.no_grad()
def test_logits_that_are_kept_are_those_of_the_kept_tokens_when_states_are_asked_for():
    model, ids = routed("sequence")
    answer, whole = model(ids, logits_to_keep=2, output_hidden_states=True), model(ids)
    logits_close(answer.logits, whole.logits[:, -2:])
    assert torch.equal(answer.went_deep, whole.went_deep[:, -2:])
    torch.testing.assert_close(answer.exit_scores, whole.exit_scores[:, -2:])
    assert answer.hidden_states[-1].shape == (B, Q, 32)


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_the_model_without_heads_reads_folders_and_takes_the_full_depth(context, tmp_path, tokenizer_folder):  # noqa: F811
    model, ids = routed(context, own_head=True)
    model.resize_token_embeddings(300)
    save_routed(model, tmp_path, tokenizer_folder, "a card")
    headless = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(headless) is LegoModel
    model.config.exit_threshold = None
    expected = model(ids, output_hidden_states=True, output_attentions=True)
    answer = headless(ids, output_hidden_states=True, output_attentions=True)
    logits_close(model.deep_head(answer.last_hidden_state), expected.logits)
    for mine, theirs in zip(
        [*answer.hidden_states, *answer.attentions], [*expected.hidden_states, *expected.attentions], strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    steps, cache = [], None
    for start in range(0, Q, 4):
        part = headless(ids[:, start : start + 4], past_key_values=cache, use_cache=True)
        cache = part.past_key_values
        steps.append(part.last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, dim=1), answer.last_hidden_state, rtol=1e-4, atol=1e-5)
    features = pipeline("feature-extraction", model=str(tmp_path), tokenizer=str(tmp_path))("def main")
    assert len(features[0][0]) == 32
    headless.save_pretrained(tmp_path / "headless")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "headless")
    torch.testing.assert_close(again.model(ids).last_hidden_state, answer.last_hidden_state)


@pytest.mark.parametrize("context", CONTEXTS)
def test_states_and_attentions_carry_gradients(context):
    model, ids = routed(context)
    answer = model(ids, output_hidden_states=True, output_attentions=True)
    kept = [*answer.hidden_states[:-1], *answer.attentions[:EXIT]]
    for tensor in kept:
        tensor.retain_grad()
    answer.logits.sum().backward()
    assert all(tensor.grad is not None for tensor in kept[: EXIT + 1])
