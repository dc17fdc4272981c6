"""Contexts trained to predict: what they learn, the windows and losses they learn from, and what phase 2 takes over."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lego.base.artifacts import ArtifactError, write_tensors
from lego.cvfp.losses import ZeroGradientError
from lego.cvfp.passes import NonFiniteContextError, sequential_pass
from lego.cvfp.phase2 import FixedText, score, shuffled, train_head, zeroed
from lego.cvfp.predict import Predictor, _refuse, columns, train_contexts, two_starts, unroll, windows
from lego.cvfp.sections import changed
from lego.cvfp.store import load_reader, save_reader
from tests.cvfp.conftest import VOCAB, network, text
from tests.cvfp.test_phase2 import SOUND, fixed, learnable


def test_contexts_trained_to_predict_keep_no_statistics():
    """An EMA diversity, which that objective does not read, would leave tensors with a graph on the layers."""
    params = changed(SOUND, {"phase1.diversity": "ema_live", "predict.epochs": 1}, "test")
    model, ids = network(params), text(200)
    train_contexts(model, ids, params.predict, params.phase1, True, 0)
    model.eval()
    after, _ = train_head(model, fixed(model), fixed(model, 40, 2), params.phase2, 0)
    assert after.vocab_size == VOCAB


def test_sound_contexts_predict_and_say_more_than_zero_or_shuffled_ones():
    changes = {"predict.epochs": 6, "predict.lr": 0.01, "phase2.epochs": 4}
    params = changed(SOUND, changes | {"model.init_weight_std": 0.3}, "test")  # 0.1 suits a width of 288, not of 40
    model, ids = network(params), learnable(2400)
    result = train_contexts(model, ids, params.predict, params.phase1, True, 0)
    assert result.loss[-1] < result.loss[0] - 0.3
    whole = -(-599 // params.predict.bptt_len)  # windows of a stream; one more where the first is shorter
    assert 6 * whole <= result.updates <= 6 * (whole + 1)
    model.eval()
    train, held_out = (
        FixedText(one, sequential_pass(model, model.embed(one).detach())) for one in (ids, learnable(600, 1))
    )
    after, _ = train_head(model, train, held_out, params.phase2, 0)
    losses = [score(after, one, "v2").loss for one in (held_out, zeroed(held_out), shuffled(held_out, 0))]
    assert losses[0] < losses[1] - 0.3
    assert losses[0] < losses[2] - 0.3


def test_unrolling_equals_one_pass_a_stream_and_windows_cover_the_text():
    model, ids = network(SOUND), text(101)
    side_by_side = columns(ids, 4)
    assert side_by_side.shape == (26, 4)
    assert torch.equal(side_by_side[1:, :3].T.flatten(), ids[1:76])
    contexts = unroll(model, torch.zeros(4, 24), model.embed(side_by_side[:-1]))
    alone = sequential_pass(model, model.embed(side_by_side[:-1, 2]).detach())
    torch.testing.assert_close(contexts[:, 2].detach(), alone)
    for first in (1, 5, 32):
        parts = list(windows(70, 32, first))
        assert torch.cat([torch.arange(one.start, one.stop) for one in parts]).tolist() == list(range(70))
        assert parts[0].stop == first


def test_infonce_is_cross_entropy_over_the_ids_of_the_batch():
    model = network(SOUND)
    predictor = Predictor(model, "infonce")
    contexts, wanted = torch.randn(5, 24), torch.tensor([3, 7, 3, 1, 7])
    found = predictor(contexts, wanted, model.embed)
    scores = predictor.read(contexts) @ model.embed(torch.tensor([1, 3, 7])).T / 4.0
    torch.testing.assert_close(found, functional.cross_entropy(scores, torch.tensor([1, 2, 1, 0, 2])))
    params = changed(
        SOUND,
        {"predict.loss": "infonce", "predict.keep_reader": False, "predict.epochs": 4, "predict.lr": 0.01},
        "test",
    )
    result = train_contexts(network(params), learnable(2000), params.predict, params.phase1, True, 0)
    assert result.loss[-1] < result.loss[0]


def test_the_contraction_term_falls_where_it_counts():
    """Without it a network with strong recurrence stays apart; with it two starts come closer."""
    losses = []
    for weight in (0.0, 10.0):
        params = changed(
            SOUND,
            {"predict.regularizer_weight": weight, "predict.contraction_gamma": 0.05, "phase1.dist_reg_weight": 0.0},
            "test",
        )
        model = network(params)
        losses.append(train_contexts(model, learnable(1500), params.predict, params.phase1, False, 0).contraction[-1])
    assert losses[1] < 0.5 * losses[0]
    start, contexts = torch.randn(1, 24), torch.randn(3, 1, 24)
    alone = two_starts(network(SOUND), start, contexts, text(3)[:, None], 0.5, torch.Generator())
    assert alone == 0


def test_b5_contraction_of_a_single_stream_is_refused():
    params = changed(SOUND, {"predict.streams": 1}, "test")
    with pytest.raises(ZeroGradientError, match=r"predict\.regularizer_weight: contraction .* set predict\.streams to"):
        train_contexts(network(params), learnable(100), params.predict, params.phase1, True, 0)
    params = changed(params, {"phase1.dist_reg_weight": 1.0}, "test")
    train_contexts(network(params), learnable(100), params.predict, params.phase1, True, 0)


def test_b27_a_token_is_named_by_its_place_in_the_text():
    ids = learnable(600) % (VOCAB - 1)
    ids[457] = VOCAB - 1
    model = network(SOUND)
    with torch.no_grad():
        model.token_embedding.weight[VOCAB - 1] = torch.inf
    with pytest.raises(NonFiniteContextError, match="phase 1, epoch 1: the context of token 457 is not finite"):
        train_contexts(model, ids, SOUND.predict, SOUND.phase1, True, 0)
    contexts, wrong = torch.zeros(3, 2, 4), torch.zeros(3, 2)
    wrong[2, 1] = torch.nan
    with pytest.raises(NonFiniteContextError, match="the loss after token 118 is not finite"):
        _refuse(contexts, wrong, length=100, begin=16, what="phase 1")
    with pytest.raises(NonFiniteContextError, match="contraction or VICReg"):
        _refuse(contexts, torch.zeros(3, 2), length=100, begin=16, what="phase 1")


def test_b20_phase_1_leaves_the_head_and_phase_2_may_start_it_from_the_reader(tmp_path):
    model = network(SOUND)
    result = train_contexts(model, learnable(300), SOUND.predict, SOUND.phase1, True, 0)
    assert all(not one.any() and not one.requires_grad for one in model.token_output.parameters())
    save_reader(result.reader, tmp_path)
    reader = load_reader(tmp_path)
    fixed = FixedText(learnable(80), torch.randn(80, 24))
    settings = SOUND.phase2.model_copy(update={"lr": 1e-12, "weight_decay": 0.0})  # which shows where it starts
    after, _ = train_head(model, fixed, fixed, settings, 0, reader)
    torch.testing.assert_close(after.token_output.weight[:, :24], result.reader.weight)
    torch.testing.assert_close(after.token_output.bias, result.reader.bias)
    assert after.token_output.weight[:, 24:].abs().max() < 1e-8
    write_tensors(tmp_path / "reader.safetensors", {"weights": torch.zeros(2)})
    with pytest.raises(ArtifactError, match=r"reader\.safetensors: is not as it was written"):
        load_reader(tmp_path)
    (tmp_path / "reader.safetensors").unlink()
    assert load_reader(tmp_path) is None
