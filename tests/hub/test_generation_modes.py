"""Every way in which transformers generates, with the original's tokens: at threshold 0, and at full depth where new
layers add nothing. (How routed tokens differ from it is tested elsewhere.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, set_seed
from transformers.cache_utils import DynamicCache

from lego.hf import LegoForCausalLM, to_hf
from lego.model.growth import grow_model
from lego.model.llama import load_llama

NEW = 10
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "top k and min p": {"do_sample": True, "top_k": 20, "min_p": 0.02},
    "typical": {"do_sample": True, "typical_p": 0.8},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "no repeats": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "one token": {"max_new_tokens": 1},
}
THRESHOLDS = [0.0, None, 2.0]


@pytest.fixture(scope="module")
def pair(checkpoint) -> tuple[LlamaForCausalLM, LegoForCausalLM]:
    """A Llama, and the same one with two layers on top that add nothing."""
    llama = AutoModelForCausalLM.from_pretrained(checkpoint)
    grown = grow_model(load_llama(str(checkpoint)), 5, init="zero", block2_context="sequence")
    return llama, to_hf(grown, 0.0)


def ids_and_mask(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[1, :1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_generation_has_the_originals_tokens(pair, mode, padded, threshold):
    pair[1].config.exit_threshold = threshold
    inputs, options, texts = ids_and_mask(padded), {"max_new_tokens": NEW, "min_new_tokens": 1} | MODES[mode], []
    if mode == "prompt lookup":  # of one text at a time
        inputs = {name: part[2:] for name, part in inputs.items()}
    for model in pair:
        set_seed(7)
        texts.append(model.generate(**inputs, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_routed_model_drafts_and_verifies(pair, threshold):
    """Assisted generation: the routed model as the assistant of the original, and the other way round."""
    llama, routed = pair
    routed.config.exit_threshold = threshold
    ids = ids_and_mask(False)["input_ids"][:1]
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = llama.generate(ids, **options)
    assert torch.equal(llama.generate(ids, assistant_model=routed, **options), expected)
    assert torch.equal(routed.generate(ids, assistant_model=llama, **options), expected)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_what_is_returned_has_the_originals_shapes_and_scores(pair, threshold):
    pair[1].config.exit_threshold = threshold
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    for more in ({}, {"num_beams": 3}):
        theirs, ours = (m.generate(**ids_and_mask(True), **options, **more, output_logits=True) for m in pair)
        assert torch.equal(theirs.sequences, ours.sequences)
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.stack(getattr(ours, name)), torch.stack(getattr(theirs, name)))
        if more:
            torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores)
            assert torch.equal(ours.beam_indices, theirs.beam_indices)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_generation_from_embeddings_and_from_a_cache_that_is_handed_on(pair, threshold):
    llama, routed = pair
    routed.config.exit_threshold = threshold
    inputs = ids_and_mask(True)
    embedded = {"inputs_embeds": llama.get_input_embeddings()(inputs["input_ids"])}
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    new, handed = [], []
    for model in pair:
        new.append(model.generate(**embedded, attention_mask=inputs["attention_mask"], **options))
        first = model.generate(
            **inputs, **options | {"max_new_tokens": 4}, return_dict_in_generate=True, past_key_values=DynamicCache()
        )
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)], dim=1)
        handed.append(
            model.generate(first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **options)
        )
    assert torch.equal(*new)
    assert torch.equal(*handed)
    whole = llama.generate(**inputs, **options | {"max_new_tokens": 4 + NEW})
    assert torch.equal(handed[1], whole)
