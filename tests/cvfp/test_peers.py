"""CVFP's rivals: causal, of equal size, judged on every token once; and what each learns from equal tokens."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional

from lego.cvfp import forms, peers, rivals
from lego.cvfp.contest import epochs_of, size_on_paper
from lego.cvfp.sections import changed, with_profile
from lego.cvfp.store import build
from lego.cvfp.text import Text
from tests.conftest import ROOT
from tests.cvfp.conftest import PARAMS, SMALL

OWN, NAMES = PARAMS.contest.own, list(PARAMS.contest.peers)
SIZED = [name for name in NAMES if name != "end_to_end"]
VOCAB = 40


def peer(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "end_to_end":
        network = build(changed(PARAMS, SMALL, "test").model, PARAMS.phase1, VOCAB, 0)
        torch.nn.init.normal_(network.token_output.weight)
        return peers.EndToEnd(network).eval()
    return peers.make(name, VOCAB, 16, 24, 32).eval()


@pytest.mark.parametrize("name", NAMES)
def test_peers_see_what_came_before_and_nothing_after(name):
    model, ids = peer(name), torch.randint(VOCAB, (20, 3))
    logits, _ = model(ids, None)
    assert logits.shape == (20, 3, VOCAB)
    other = ids.clone()
    other[12] = (other[12] + 1) % VOCAB
    after, _ = model(other, None)
    torch.testing.assert_close(after[:12], logits[:12])
    assert (after[12] - logits[12]).abs().max() > 1e-4
    reach = int(name.removeprefix("mlp_")) if name.startswith("mlp") else 20
    for lag in (1, 3):
        changed_later = (after[12 + lag] - logits[12 + lag]).abs().max() > 1e-7
        assert changed_later == (lag < reach), f"{name} {lag}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "transformer"])
def test_a_text_in_windows_is_the_text_as_a_whole(name):
    model, ids = peer(name), torch.randint(VOCAB, (90,))
    logits, _ = model(ids[:-1, None], None)
    expected = functional.cross_entropy(logits[:, 0], ids[1:]).detach()
    for window in (7, 32, 200):
        assert rivals.peer_loss(model, ids, window) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("window", [32, 31])
@pytest.mark.parametrize("tokens", [5, 33, 34, 60, 90])
def test_a_transformer_judges_every_token_once_with_half_a_window_before(tokens, window):
    model, ids, seen = peer("transformer"), torch.randint(VOCAB, (tokens,)), []
    forward = model.forward

    def spy(rows, state):
        seen.append(len(rows))
        return forward(rows, state)

    model.forward = spy
    losses = []
    real = functional.cross_entropy
    rivals.functional.cross_entropy = lambda a, b, reduction: losses.append(len(b)) or real(a, b, reduction=reduction)
    try:
        found = rivals.peer_loss(model, ids, window)
    finally:
        rivals.functional.cross_entropy = real
    assert sum(losses) == tokens - 1
    assert math.isfinite(found)
    assert max(seen) <= 32


@pytest.mark.parametrize("name", SIZED)
def test_widths_give_equal_parameters(name):
    budget = 400_000
    width = rivals.width_for(name, budget, 1024, 64, 64)
    sizes = [rivals.count(peers.make(name, 1024, 64, one, 64)) for one in (width - 4, width, width + 4)]
    assert abs(sizes[1] - budget) == min(abs(size - budget) for size in sizes)
    assert sizes[1] == pytest.approx(budget, rel=0.05)


def test_the_budget_is_that_of_sound():
    assert size_on_paper(PARAMS, 1024) == 98_304 + 194_400 + 138_720 + 295_936
    with pytest.raises(ValueError, match="there is no peer bert; there are mlp_1"):
        peers.make("bert", 10, 8, 8, 8)


def toy_text(tokens: int = 1500) -> Text:
    """Every id follows from the two before it, most of the time."""
    generator = torch.Generator().manual_seed(0)
    ids = {}
    for split, n in (("train", tokens), ("validation", 300), ("test", 300)):
        made = [1, 2]
        for draw in torch.rand(n - 2, generator=generator).tolist():
            made.append((made[-1] + made[-2]) % 8 if draw < 0.9 else int(draw * 10**6) % 8)
        ids[split] = torch.tensor(made)
    return Text(ids, VOCAB, torch.ones(VOCAB, dtype=torch.long), "heldout_in_vocab")


CONTEST = changed(
    PARAMS,
    SMALL
    | {"predict.epochs": 2, "predict.streams": 4, "phase2.batch_tokens": 64, "peers.streams": 4, "peers.window": 16}
    | {"contexts.segments": 4, "phase1.max_iterations": 3},
    "test",
)


@pytest.mark.parametrize(
    "name", ["sound", "sound_reservoir", "untrained_longer", "end_to_end", "gru", "mlp_2", "transformer"]
)
def test_a_contestant_learns_from_equal_tokens(name):
    text = toy_text()
    compete = partial(forms.compete, blind_heads=True) if name in OWN else rivals.compete
    found = compete(name, CONTEST, text, seed=1, lr=0.01)
    assert found["tokens"] == epochs_of(CONTEST) * 1500
    assert found["ppl"] < 0.7 * VOCAB
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["ppl"]))  # a token is a byte here
    assert ("ppl_zero_contexts" in found) == (name in OWN)
    assert ("ppl_trained_zero_contexts" in found) == (name == "sound")
    assert 0 < found["parameters_without_embeddings"] < found["parameters"]
    again = compete(name, CONTEST, text, seed=1, lr=0.01)
    assert {**again, "seconds_besides": 0} == {**found, "seconds_besides": 0}


def test_end_to_end_has_a_layernorm_and_windows_of_its_own():
    found = [
        rivals.compete(
            "end_to_end",
            changed(CONTEST, {"peers.end_to_end.layernorm_mix": mix, "peers.end_to_end.window": 16}, "test"),
            toy_text(),
            1,
            0.01,
        )
        for mix in (0.0, 0.5, 1.0)
    ]
    assert len({one["ppl"] for one in found}) == 3
    short = changed(CONTEST, {"peers.end_to_end.window": 8}, "test")
    assert rivals.compete("end_to_end", short, toy_text(), 1, 0.01)["updates"] > 1.8 * found[0]["updates"]
    normed = 2 * (2 * CONTEST.model.context_dim + CONTEST.model.embed_dim)  # of two blocks and of one token block
    assert [one["parameters"] - found[0]["parameters"] for one in found] == [0, normed, normed]


def test_seed_has_as_many_parameters_and_reads_as_many_tokens_in_passes_over_less_text(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the profiles lie
    scaled = forms.seed_of_equal_size(PARAMS, 1024)
    budget, size = size_on_paper(PARAMS, 1024), size_on_paper(scaled, 1024)
    assert size == pytest.approx(budget, rel=0.05)
    assert scaled.model.layer_structure == [1] * 6
    stops = forms.compete("seed", CONTEST, toy_text(400), seed=1, lr=0.01)
    patient = {"phase1.early_stop": False, "phase1.max_iterations": 4}
    monkeypatch.setattr(forms, "with_profile", lambda *of: changed(with_profile(*of), patient, "test"))
    found = forms.compete("seed", CONTEST, toy_text(400), seed=1, lr=0.01)
    assert found["tokens"] == epochs_of(CONTEST) * 400 > stops["tokens"]
    untrained = forms.compete("seed_untrained", CONTEST, toy_text(400), seed=1, lr=0.01)
    assert untrained["tokens"] == CONTEST.phase2.epochs * 400  # the same phase 2, and nothing before it
    assert untrained["parameters"] == found["parameters"]
    with pytest.raises(ValueError, match="there is no form untraind; there are sound"):
        forms.compete("untraind", CONTEST, toy_text(400), seed=1, lr=0.01)


def test_a_reservoir_trains_its_embedding_and_no_block():
    text, before = toy_text(), build(CONTEST.model, CONTEST.phase1, VOCAB, 1).state_dict()
    model, reader, spent, _ = forms._contexts("sound_reservoir", CONTEST, text, 1)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in moved} == {"token_embedding", "embed_norm"}
    assert reader is not None
    assert spent == CONTEST.predict.epochs * 1500
