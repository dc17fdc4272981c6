"""CVFP's rivals: causal, of equal size, judged on every token once; and the contest between them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional

from lego.base.harness import StageError
from lego.base.parameter_files import ParamsError
from lego.cvfp import forms, peers, rivals
from lego.cvfp.contest import epochs_of, made_of, size_on_paper, trial_digest
from lego.cvfp.sections import changed, with_profile
from lego.cvfp.store import build
from lego.cvfp.text import Text
from lego.report.page import Page
from stages.cvfp.baselines.contest import Run, chosen
from stages.cvfp.compared import NGRAMS, Compared
from stages.cvfp.figures import scaling
from stages.cvfp.trials import shown
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


def test_the_digest_of_a_row_follows_what_it_is_made_of(monkeypatch):
    text = toy_text().digests()

    def of(name: str, **changes: object) -> str:
        return made_of(name, changed(PARAMS, {key.replace("__", "."): one for key, one in changes.items()}, "t"), text)

    monkeypatch.chdir(ROOT)  # where the profiles lie
    assert of("seed") != of("seed", contest__seed_sweeps=3)
    assert of("gru") == of("gru", phase1__lr=0.5) == of("gru", contest__workers=1, checks__lags=3)
    assert of("gru") != of("gru", peers__window=32)
    assert of("gru") != of("gru", phase2__epochs=2)
    assert of("gru") != of("gru", **{"contest__peers__gru": 0.1})
    assert of("sound") == of("sound", peers__window=32)
    assert of("sound") != of("sound", phase1__dist_reg_weight=0.5)
    assert of("sound") != made_of("sound", PARAMS, text | {"train": "other"})


def test_the_search_takes_the_best_rate_of_the_first_seed_and_says_when_it_is_an_end():
    asked = []

    def runs(wanted: list[Run]) -> list[dict[str, float]]:
        asked.extend(wanted)
        return [{"val_loss": abs(lr - 0.02) + 0.1 * seed, "ppl": 5.0, "bits_per_byte": 1.0} for seed, lr, _ in wanted]

    def diverges(wanted: list[Run]) -> list[dict[str, object]]:
        return [{"val_loss": 1.0} | ({"diverged": "x"} if seed else {}) for seed, *_ in wanted]

    params = changed(PARAMS, {"contest.seeds": 3, "contest.lr_factors": [0.5, 1.0, 2.0]}, "test")
    found, searched = chosen("gru", params, 0.01, runs)
    assert asked == [Run(0, 0.005), Run(0, 0.01), Run(0, 0.02), Run(1, 0.02), Run(2, 0.02)]
    assert len(found) == 3
    assert (searched["lr"], searched["rate_at_an_end"]) == (0.02, True)
    _, searched = chosen("gru", params, 0.02, runs)
    assert (searched["lr"], searched["rate_at_an_end"]) == (0.02, False)
    with pytest.raises(StageError, match=r"gru: seed 1 diverged at rate 0\.02"):
        chosen("gru", params, 0.04, diverges)


def test_no_sentence_of_the_page_speaks_of_an_outdated_row(monkeypatch):
    monkeypatch.chdir(ROOT)
    digests = toy_text().digests()
    tokens = {f"{split}_sha256": one for split, one in digests.items()}
    tokens |= {f"test_{name}_{key}": 50.0 for name in NGRAMS for key in ("ppl", "bits_per_byte")}

    def of(name: str, ppl: float) -> dict[str, object]:
        seeds = {f"{key}_{seed}": ppl + seed / 10 for key in ("ppl", "bits_per_byte") for seed in range(3)}
        blind = {"ppl_trained_zero_contexts": 70.0, "ppl_trained_shuffled_contexts": 71.0}
        kinds = [f"{key}_trained_{kind}_contexts" for key in ("ppl", "bits_per_byte") for kind in ("zero", "shuffled")]
        blind |= {f"{kind}_{seed}": 70.0 + seed for kind in kinds for seed in range(3)}
        facts = {
            "parameters": 9,
            "parameters_without_embeddings": 8,
            "tokens": 7,
            "seconds": 6.0,
            "peak_mib": 5.0,
            "lr": 0.1,
        }
        made = {"made_of": made_of(name, PARAMS, digests), "rate_at_an_end": False}
        return {"ppl": ppl, "bits_per_byte": 1.0} | seeds | blind | facts | made

    found = {name: of(name, ppl) for name, ppl in (("sound", 40), ("untrained", 60), ("gru", 39), ("lstm", 30))}
    compared = Compared(PARAMS, found, {}, tokens)
    assert compared.rivals() == ["untrained", "gru", "lstm"]  # the best of all is named, whoever it is
    assert "lstm 30.0 (+10.0" in compared.answer()
    assert "gru 39.0 (+1.0" in compared.answer()
    assert len(compared.claims()) == 1
    goals = compared.goals()
    assert [("**not reached**" in one, name in one) for one, name in zip(goals, ("untrained", "gru"), strict=True)] == [
        (False, True),
        (True, True),
    ]
    old = Compared(PARAMS, found | {"lstm": found["lstm"] | {"made_of": "x"}}, {}, tokens)
    assert "lstm" not in old.answer()
    page = Page("t")
    old.write(page, {})
    assert "Not run yet: sound_reservoir, " in page.markdown()  # of the models of contest those that have no row
    assert "| sound, head trained with C* = 0 | 71.00 [68.52, 73.48] | 71.000 [68.516, 73.484] | " in page.markdown()
    assert "**outdated**" in next(line for line in page.markdown().splitlines() if line.startswith("| lstm"))
    assert Compared(PARAMS, found, {}, tokens | {"test_sha256": "y"}).answer().startswith("Outdated")
    assert Compared(PARAMS, {}, {}, tokens).answer().startswith("Not run yet")


def test_the_curve_over_train_text_ends_in_the_contest_and_leaves_outdated_rows_out(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    text = toy_text()
    half = text.first(0.5)
    assert text.first(1.0) is text
    assert torch.equal(half.ids["train"], text.ids["train"][: len(text.ids["train"]) // 2])
    assert torch.equal(half.ids["test"], text.ids["test"])
    assert Run(2, 0.01, 0.5).file() != Run(2, 0.01, 0.25).file() != Run(2, 0.01).file()
    tokens = {f"{split}_sha256": one for split, one in text.digests().items()}
    tokens |= {"train_tokens": 1000, "test_fivegram_ppl": 50.0}
    made = {name: {"made_of": made_of(name, PARAMS, text.digests())} for name in ("gru", "fivegram")}
    found = {"gru": {"ppl": 31.0, "ppl_0": 30.0, "ppl_1": 32.0} | made["gru"]}
    curves = {"gru": {"0.25": {"ppl_0": 60.0, "ppl_1": 62.0}}, "fivegram": {"0.25": {"ppl_0": 70.0}}}
    curves = {name: one | made[name] for name, one in curves.items()}
    compared = Compared(PARAMS, found, curves, tokens)
    assert [(size, one.mean) for size, one in compared.curves["gru"]] == [(250, 61), (1000, 31)]
    assert [(size, one.mean) for size, one in compared.curves["fivegram"]] == [(250, 70), (1000, 50)]
    drawn = {"scaling": scaling(tmp_path, compared.curves)}
    assert (tmp_path / "scaling.svg").stat().st_size > 1000
    assert "gru 61.0 to 31.0" in drawn["scaling"].alt
    for old in ({"gru": curves["gru"] | {"made_of": "x"}}, {"gru": curves["gru"]}):
        kept = found if old["gru"]["made_of"] == "x" else {}
        assert not Compared(PARAMS, kept, old, tokens).curves
    wrong = {"contest.scaling.models": {"gru": 1}, "contest.peers": {"lstm": 0.1}}
    with pytest.raises(ParamsError, match=r"scaling\.models must be of contest\.own or contest\.peers, got gru"):
        changed(PARAMS, wrong, "test")
    with pytest.raises(ParamsError, match=r"scaling\.shares must differ, got \[0\.5, 0\.5\]"):
        changed(PARAMS, {"contest.scaling.shares": [0.5, 0.5]}, "test")


def test_every_trial_changes_what_there_is():
    for name, changes in PARAMS.contest.trials.items():
        assert changed(PARAMS, changes, name) != PARAMS or name == "unchanged"


def test_trials_are_shown_with_what_they_change_seed_by_seed_and_outdated_ones_are_left_out(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = toy_text().digests()
    trials = {"unchanged": {}, "wide": {"predict.bptt_len": 64}, "late": {"predict.lr": 0.5}}
    params = changed(PARAMS, {"contest.trials": trials, "contest.trial_seeds": 2}, "test")

    def found(name: str, *losses: float) -> dict:
        values = {f"{key}_{seed}": 10 * one for key in ("val_loss", "ppl") for seed, one in enumerate(losses)}
        mean = {key: 10 * sum(losses) / max(1, len(losses)) for key in ("val_loss", "ppl")}
        made = {"made_of": trial_digest(changed(params, trials[name], "test"), text), "diverged": not losses}
        return made | (values | mean if losses else {})

    results = {"unchanged": found("unchanged", 0.4, 0.5), "wide": found("wide", 0.3, 0.45), "late": found("late")}
    tokens = {f"{split}_sha256": one for split, one in text.items()}
    fits = shown.current(params, results, tokens)
    assert list(fits) == ["wide", "unchanged", "late"]
    wide, base, late = shown.rows(params, fits)
    assert late == ["late", "predict.lr: 0.5", "diverged", "", "", ""]
    assert shown.current(changed(params, {"contest.trial_seeds": 3}, "test"), results, tokens) == {}
    assert (
        shown.current(changed(params, {"contest.seeds": 9, "contest.own.sound": 0.5}, "test"), results, tokens) == fits
    )
    assert wide == ["wide", "predict.bptt_len: 64", "3.750", "-1.000, -0.500", "3.75", "-1.00, -0.50"]
    assert base == ["**unchanged**", "", "4.500", "", "4.50", ""]
    page = Page("p")
    shown.write(page, params, results | {"late": results["late"] | {"made_of": "x"}}, tokens)
    assert "Not run yet, or outdated: late." in page.markdown()
    assert "with one change each, 2 seeds" in page.markdown()
    assert shown.current(changed(params, {"predict.weight_decay": 0.5}, "test"), results, tokens) == {}
    empty = Page("p")
    shown.write(empty, params, {}, tokens)
    assert "Not run yet" in empty.markdown()
