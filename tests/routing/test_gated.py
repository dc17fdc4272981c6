"""Answers that mix both exits: one function in every way of reading, and easy tokens as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lego.model.exit_criteria import LOGIT_CRITERIA, StateCriterion
from lego.model.gate import Gate
from lego.routing.decoder import ALWAYS_DEEP, RoutedDecoder
from lego.routing.generation import generate, generate_lossless
from tests.conftest import VOCAB, logits_close
from tests.routing.conftest import CONTEXTS, MODELS, random_model
from tests.routing.test_decoder import by_sequence, cases, padded


def gate_of(seed: int = 5) -> Gate:
    gate, generator = Gate(), torch.Generator().manual_seed(seed)
    gate.weight.copy_(torch.randn((), generator=generator))
    gate.bias.fill_(0.7)
    return gate


def mixture(gate: Gate, shallow: Tensor, deep: Tensor) -> Tensor:
    """p = a p1 + (1 - a) p2 in double precision, a = sigmoid(w f + c) with f written out: log-probabilities."""
    p1, p2 = shallow.double().softmax(-1), deep.double().softmax(-1)
    best = p1.amax(-1).clamp(1e-6, 1 - 1e-6)
    a = (gate.weight.double() * (best / (1 - best)).log() + gate.bias.double()).sigmoid().unsqueeze(-1)
    return (a * p1 + (1 - a) * p2).log().float()


@settings(max_examples=60, deadline=None)
@given(case=cases())
@torch.no_grad()
def test_teacher_forced_mixtures_equal_cached_reading_in_pieces(case):
    model, sequences, threshold, piece, left = case
    gate, k = gate_of(), model.exit_layer
    ids, mask = padded(sequences, left)
    decoder, plain = (RoutedDecoder(model, threshold, len(sequences), gate=one) for one in (gate, None))
    parts, bare = [], []
    for start in range(0, ids.shape[1], piece):
        for reader, found in ((decoder, parts), (plain, bare)):
            part = reader.read(ids[:, start : start + piece], mask[:, start : start + piece])
            found.append((part.logits, part.deep, part.mask))
    read = zip(sequences, by_sequence(parts, len(sequences)), by_sequence(bare, len(sequences)), strict=True)
    for s, (logits, deep), (ungated, _) in read:
        shallow, full = model.logits_at(model.states_at(s[None], k), k)[0], model(s[None])[0]
        logits_close(logits[deep], mixture(gate, shallow, full)[deep], 1e-4)
        assert torch.equal(logits[~deep], ungated[~deep])


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("criterion", "reads"),
    [("margin", False), ("entropy", False), ("probe", False), ("gain", False), ("gain", True)],
)
@torch.no_grad()
def test_every_criterion_and_no_routing_answer_with_the_same_mixtures(context, criterion, reads):
    model, gate, x = MODELS[context, 2], gate_of(), torch.randint(0, VOCAB, (3, 8))
    width = 0 if criterion == "probe" else 5
    chosen = LOGIT_CRITERIA.get(criterion) or StateCriterion(32, width, reads).requires_grad_(False)
    k = model.exit_layer
    h = model.states_at(x, k)
    shallow, full = model.logits_at(h, k).flatten(0, 1), model(x).flatten(0, 1)
    threshold = chosen(h.flatten(0, 1), shallow).median().item()
    read = RoutedDecoder(model, threshold, 3, chosen, gate).read(x)
    logits_close(read.logits[read.deep], mixture(gate, shallow, full)[read.deep], 1e-4)
    logits_close(read.logits[~read.deep], shallow[~read.deep])
    assert 0 < read.deep.sum() < len(read.deep)
    for always in (None, ALWAYS_DEEP):
        logits_close(RoutedDecoder(model, always, 3, chosen, gate).read(x).logits, mixture(gate, shallow, full), 1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
def test_lossless_text_is_that_of_the_mixture_at_full_depth(context):
    model, gate = random_model(context), gate_of()
    expected = [token.id for token in generate(model, [[3, 1, 4]], 20, None, gate=gate)]
    for drafts in (1, 4):
        drafted = list(generate_lossless(model, [3, 1, 4], 20, drafts=drafts, gate=gate))
        assert [token.id for token in drafted] == expected
    assert expected != [token.id for token in generate(model, [[3, 1, 4]], 20, None)]


@torch.no_grad()
def test_the_mixture_is_a_distribution_whatever_the_logits():
    gate = gate_of()
    for shallow, deep in ((torch.randn(4, 5) * 1e3, torch.randn(4, 5) * 1e3), (torch.zeros(1, 3), torch.ones(1, 3))):
        mixed = gate.mixed(shallow, deep)
        logits_close(mixed.exp().sum(-1), torch.ones(len(mixed)))
        assert not mixed.isnan().any()


def test_forbidden_tokens_and_probabilities_too_small_for_float32_stay_finite():
    """Logits of -inf, as processors set them, give no NaN; what no exit allows has the least probability there is."""
    gate = Gate()
    gate.weight.fill_(2.0)
    shallow = torch.tensor([[1.0, 0.0, -torch.inf, -500.0]])
    log_p = gate.mixed(shallow, torch.tensor([[0.0, -torch.inf, -torch.inf, -500.0]]))
    assert torch.isfinite(log_p).all()
    assert log_p.exp().sum() == pytest.approx(1)
    assert (log_p[0, 2:] < -87).all()
    sure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 90.0]])
    logits_close(gate.mixed(*sure), mixture(gate, *sure).float(), 1e-4)


def test_gradients_pass_through_mixtures():
    """Whoever fine-tunes on gated answers trains both exits."""
    gate, both = gate_of(), torch.randn(2, 5, 11, requires_grad=True)
    found = torch.autograd.grad(gate.mixed(*both)[:, 3].sum(), both)[0]
    expected = torch.autograd.grad(mixture(gate, *both)[:, 3].sum(), both)[0]
    assert found[0].abs().sum() > 0
    assert found[1].abs().sum() > 0
    logits_close(found, expected.float(), 1e-4)
