"""One function in three ways: teacher-forced routing, batched reading with a cache, and token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lego.model.exit_criteria import LOGIT_CRITERIA, StateCriterion
from lego.routing.decoder import ALWAYS_DEEP, RoutedDecoder
from lego.routing.measure import evaluate
from tests.conftest import VOCAB, logits_close, random_batches
from tests.routing.conftest import CONTEXTS, MODELS, random_model

torch.manual_seed(0)
STATE = StateCriterion(32, 5).requires_grad_(False)


@st.composite
def cases(draw):
    """A model, sequences of different lengths, a threshold well between two confidences, and a way to cut them."""
    model = MODELS[draw(st.sampled_from(CONTEXTS)), draw(st.sampled_from([2, 4]))]
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    sequences = [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]
    with torch.no_grad():
        scores = torch.cat([model.compute_confidence(model.forward_to_hidden(s[None])).flatten() for s in sequences])
    ordered = torch.cat([torch.zeros(1), scores, torch.ones(1) * 1.1]).sort().values
    place = draw(st.integers(0, len(ordered) - 2))
    low, high = ordered[place].item(), ordered[place + 1].item()
    assume(high - low > 1e-4)  # else rounding decides
    return model, sequences, (low + high) / 2, draw(st.integers(1, 4)), draw(st.booleans())


def padded(sequences: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    longest = max(len(s) for s in sequences)
    ids, mask = torch.zeros(len(sequences), longest, dtype=torch.long), torch.zeros(len(sequences), longest).bool()
    for row, s in enumerate(sequences):
        place = slice(longest - len(s), None) if left else slice(0, len(s))
        ids[row, place], mask[row, place] = s, True
    return ids, mask


def by_sequence(parts: list[tuple[Tensor, Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    """Logits and depths of each sequence in order, from (logits (n, V), deep (n,), mask (B, Q)) of each reading."""
    found = []
    for row in range(count):
        logits = [logits[mask.nonzero()[:, 0] == row] for logits, _, mask in parts]
        deep = [deep[mask.nonzero()[:, 0] == row] for _, deep, mask in parts]
        found.append((torch.cat(logits), torch.cat(deep)))
    return found


@settings(max_examples=150, deadline=None)
@given(case=cases())
@torch.no_grad()
def test_teacher_forced_routing_equals_cached_reading_in_pieces(case):
    model, sequences, threshold, piece, left = case
    ids, mask = padded(sequences, left)
    decoder = RoutedDecoder(model, threshold, len(sequences))
    pieces = []
    for start in range(0, ids.shape[1], piece):
        part = decoder.read(ids[:, start : start + piece], mask[:, start : start + piece])
        pieces.append((part.logits, part.deep, part.mask))
    once = RoutedDecoder(model, threshold, len(sequences)).read(ids, mask)
    at_once = by_sequence([(once.logits, once.deep, once.mask)], len(sequences))
    for s, (cut, cut_deep), (whole, whole_deep) in zip(
        sequences, by_sequence(pieces, len(sequences)), at_once, strict=True
    ):
        expected, confidence = model.route(s[None], model.exit_layer, threshold)
        assert torch.equal(cut_deep, confidence[0] < threshold)
        assert torch.equal(whole_deep, cut_deep)
        logits_close(cut, expected[0])
        logits_close(whole, expected[0])
    assert decoder.lengths.tolist() == [len(s) for s in sequences]


@settings(max_examples=60, deadline=None)
@given(case=cases(), criterion=st.sampled_from(["max_prob", "entropy", "state"]), quantile=st.floats(0.1, 0.9))
@torch.no_grad()
def test_results_of_the_last_token_alone_equal_those_of_all(case, criterion, quantile):
    """Any criterion, with or without logits: prompts whose other tokens are not routed, then token by token."""
    model, sequences, _, steps, left = case
    chosen = STATE if criterion == "state" else LOGIT_CRITERIA[criterion]
    states = [model.forward_to_hidden(s[None])[0] for s in sequences]
    scores = torch.cat([chosen(h, model.logits_at(h, model.exit_layer)) for h in states]).sort().values
    place = int(quantile * (len(scores) - 1))
    threshold = (scores[place].item() + scores[min(place + 1, len(scores) - 1)].item()) / 2
    assume((scores - threshold).abs().min() > 1e-5)
    ids, mask = padded(sequences, left)
    whole = RoutedDecoder(model, threshold, len(sequences), chosen).read(ids, mask)
    decoder = RoutedDecoder(model, threshold, len(sequences), chosen)
    first = decoder.read(ids, mask, last_only=True)
    logits_close(first.last()[0], whole.last()[0])
    assert torch.equal(first.last()[1], whole.last()[1])
    assert len(first.score) == len(sequences)
    reference = RoutedDecoder(model, threshold, len(sequences), chosen)
    reference.read(ids, mask)
    for step in range(steps):
        more = torch.full((len(sequences), 1), 7 * step + 3)
        logits_close(decoder.read(more).logits, reference.read(more).logits)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("criterion", ["max_prob", "state"])
def test_evaluation_measures_what_the_decoder_answers(context, criterion):
    model, batches = MODELS[context, 2], random_batches(3)
    chosen = STATE if criterion == "state" else LOGIT_CRITERIA[criterion]
    for threshold in (0.3, None, 0.0, ALWAYS_DEEP):
        routed = [RoutedDecoder(model, threshold, len(x), chosen).read(x) for x, _ in batches]
        logits, y = torch.cat([r.logits for r in routed]), torch.cat([y.flatten() for _, y in batches])
        stats = evaluate(model, batches, threshold, "cpu", chosen)
        assert stats["ppl"] == pytest.approx(F.cross_entropy(logits, y).exp().item(), rel=1e-4)
        assert stats["acc"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
        easy = ~torch.cat([r.deep for r in routed])
        assert stats["shallow_ratio"] == pytest.approx(easy.float().mean().item())
        assert stats["compute_cost"] == pytest.approx(1 - easy.float().mean().item() / 2)
    with pytest.raises(ValueError, match="no batches to evaluate"):
        evaluate(model, [], 0.3, "cpu")


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_thresholds_at_the_ends_are_block_1_and_the_full_model(context):
    model, x = MODELS[context, 4], torch.randint(0, VOCAB, (2, 7))
    every = model.forward_all_layers(x)
    for threshold, expected in ((1.1, every[3]), (None, every[3]), (0.0, every[1])):
        routed = RoutedDecoder(model, threshold, 2).read(x)
        logits_close(routed.logits.view(2, 7, -1), expected)
        assert routed.deep.all() == (threshold != 0.0)
        logits_close(routed.last()[0], expected[:, -1])
    with pytest.raises(ValueError, match=r"threshold must be None or at least 0\.0, got nan"):
        RoutedDecoder(model, float("nan"))
    with pytest.raises(ValueError, match=r"ids must be \(1, Q\), got \(2, 7\)"):
        RoutedDecoder(model, None).read(x)


@torch.no_grad()
def test_routing_off_never_evaluates_the_exit_head():
    model, called = random_model("sequence", own_head=True), []
    model.output_head.register_forward_hook(lambda *_: called.append("exit"))
    RoutedDecoder(model, None).read(torch.randint(0, VOCAB, (1, 5)))
    assert called == []


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_what_is_forgotten_leaves_no_trace(context):
    model, x, other = MODELS[context, 2], torch.randint(0, VOCAB, (2, 6)), torch.randint(0, VOCAB, (2, 9))
    decoder = RoutedDecoder(model, 0.3, 2)
    decoder.read(x)
    decoder.read(other)
    decoder.forget(torch.tensor([6, 4]))
    assert decoder.lengths.tolist() == [6, 4]
    after = decoder.read(x[:, :3])
    fresh = RoutedDecoder(model, 0.3, 2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    fresh.read(x, mask)
    logits_close(after.logits, fresh.read(x[:, :3]).logits)


@torch.no_grad()
def test_any_criterion_decides_and_sees_states_and_logits():
    model, x = MODELS["sequence", 4], torch.randint(0, VOCAB, (2, 5))
    h = model.forward_to_hidden(x)

    def by_first_feature(states: Tensor, logits: Tensor) -> Tensor:
        logits_close(logits, model.logits_at(states, 2))
        return states[:, 0]

    routed = RoutedDecoder(model, 0.0, 2, criterion=by_first_feature).read(x)
    assert torch.equal(routed.deep, h[..., 0].flatten() < 0.0)
    assert 0 < routed.deep.sum() < 10
