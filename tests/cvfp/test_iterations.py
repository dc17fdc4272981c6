"""Phase 1 from iteration to iteration: every variant, schedules, targets, what is carried on, equal runs, and speed."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cvfp_speed
from lego.cvfp import passes
from lego.cvfp.model import EMA
from lego.cvfp.passes import sequential_pass, settle
from lego.cvfp.phase1 import ContextTrainer
from lego.cvfp.run import first_phase
from lego.cvfp.text import Text
from tests.conftest import ROOT
from tests.cvfp.conftest import VOCAB, network, seed_params, text, trained

VARIANTS = [
    {"phase1__mode": "sequential_batch"},
    {"phase1__mode": "sequential_online", "phase1__diversity": "centroid_ema"},
    {"phase1__mode": "sequential_online", "phase1__diversity": "ema_live"},
    *({"phase1__cvfp_target": one} for one in ("iteration0_fixed", "two_view")),
    {"phase1__cvfp_target": "two_view", "phase1__mode": "sequential_batch"},
    {"phase1__cvfp_target": "two_view", "phase1__mode": "sequential_online", "phase1__diversity": "ema_target"},
    {"phase1__start_context": "zero"},
    *({"phase1__dist_reg_weight": one} for one in (0.2, 0.5, 0.99, 0.01)),
    *({"model__layernorm_mix": one} for one in (0.0, 0.2)),
    {"phase1__mode": "sequential_batch", "phase1__bptt_len": 16},
    {"phase1__lr_schedule": "steps"},
    {"phase1__stop_when_worse": True},
    *({"model__head": one} for one in ("context", "token")),
    {"model__init_weight_std": 0.05, "model__init_bias_std": 0.0},
    {"model__update": "gated"},
    *({"phase1__diversity": one} for one in ("none", "dist_batch", "oacd", "vicreg", *EMA) if one != "ema_buffer"),
    {"phase1__diversity": "ema_buffer", "phase1__allow_zero_gradient_loss": True},
    {"phase1__convergence_threshold": 0.02},
    {"phase1__recompute_contexts": False},
    {"phase1__normalize": "per_token"},
]


@pytest.mark.filterwarnings("ignore:.*trains nothing")  # of ema_buffer, which is allowed to
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a3_every_variant_runs_from_parameters_alone(changes):
    mix = {"model__init_weight_std": 0.01} if changes.get("model__layernorm_mix") == 0.0 else {}
    params = seed_params(phase1__max_iterations=3, phase1__early_stop=False, **(changes | mix))
    trainer, iterations = trained(params, tokens=200)
    assert len(iterations) == 3
    assert trainer.updates == (400 if params.phase1.mode == "sequential_online" else 2)
    assert torch.isfinite(iterations[-1].contexts.values).all()


def test_the_step_schedule_and_the_worse_rule():
    params = seed_params(phase1__lr_schedule="steps", phase1__max_iterations=12, phase1__early_stop=False)
    model = network(params)
    trainer = ContextTrainer(model, model.embed(text(40)).detach(), params.phase1)
    rates = [trainer.optimizer.param_groups[0]["lr"] for one in trainer.iterations() if one.number]
    assert rates == pytest.approx([0.002] * 3 + [0.0005] * 5 + [0.0001] * 3)
    stops = SimpleNamespace(
        settings=params.phase1.model_copy(update={"stop_when_worse": True}), _stops=ContextTrainer._stops
    )
    assert not ContextTrainer._stops(stops, [0.9, 0.5, 0.895])
    assert ContextTrainer._stops(stops, [0.9, 0.5, 0.5])


@pytest.mark.parametrize("segments", [1, 3, 7, 60])
def test_segments_side_by_side_settle_to_the_sequential_contexts(segments):
    model = network(seed_params())
    embeddings = model.embed(text(60)).detach()
    expected = sequential_pass(model, embeddings)
    found = settle(model, embeddings, segments, tolerance=0.0)
    torch.testing.assert_close(found.contexts, expected, rtol=0, atol=1e-5)
    assert found.sweeps == min(segments, 3)  # one without training forgets nothing: the third goes token by token
    early = settle(model, embeddings, segments, 0.0, max_sweeps=1)
    assert early.residual > 0 or segments == 1


def test_a5_two_runs_are_equal_and_progress_changes_nothing(capsys):
    params = seed_params(phase1__cvfp_target="two_view", phase1__max_iterations=4)
    runs = []
    for telling in (passes.QUIET, passes.Telling(every=10, warn_above=50)):
        model = network(params)
        trainer = ContextTrainer(model, model.embed(text(60)).detach(), params.phase1, telling)
        torch.manual_seed(5)
        runs.append([one.contexts.values for one in trainer.iterations()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "iteration 1: 60 tokens one after another, more than 50"
    assert [line.split(",")[0] for line in lines[1:7]] == [
        f"iteration 1: {n}/60 tokens ({round(n / 0.6)} %)" for n in range(10, 61, 10)
    ]
    assert VOCAB == 50


def test_one_iteration_takes_the_target_that_the_parameters_name():
    """A1: an iteration is callable on its own; which target it takes is no matter of which contexts are given."""

    def after(target: str, *given: int) -> torch.Tensor:
        params = seed_params(phase1__cvfp_target=target, phase1__min_updates=9, phase1__max_iterations=4)
        model = network(params)
        trainer = ContextTrainer(model, model.embed(text(60)).detach(), params.phase1)
        made = [sequential_pass(model, trainer.embeddings)]
        for number in range(1, 4):
            made.append(trainer.iterate(number, made[-1], *(made[one] for one in given)).contexts.values)
        return made[-1]

    moving, fixed = after("previous_iteration"), after("iteration0_fixed", 0)
    assert torch.equal(moving, after("previous_iteration", 0))
    assert not torch.allclose(moving, fixed, atol=1e-3)
    for target, wanted in (("previous_iteration", moving), ("iteration0_fixed", fixed)):
        params = seed_params(phase1__cvfp_target=target, phase1__min_updates=9, phase1__max_iterations=4)
        assert torch.equal(trained(params)[1][-1].contexts.values, wanted)
    with pytest.raises(ValueError, match="iteration0_fixed is the contexts of iteration 0"):
        after("iteration0_fixed")


def test_9_4_contexts_that_carry_their_start_over_are_of_one_more_pass():
    params = seed_params(phase1__min_updates=2, phase1__max_iterations=4)
    of_text = Text({"train": text(100)}, VOCAB, torch.ones(VOCAB), "heldout_in_vocab")
    done = first_phase(params, of_text, 0)
    last = done.last.contexts.values
    wanted = passes.parallel_pass(done.model, done.model.embed(text(100)).detach(), last, last[-1], 100)
    torch.testing.assert_close(done.carried, wanted)
    params = seed_params(phase1__min_updates=2, phase1__max_iterations=4, phase1__start_context="zero")
    assert first_phase(params, of_text, 0).carried is None


def test_a_skipped_step_leaves_no_older_weights_to_go_back_to(monkeypatch):
    params = seed_params(phase1__recompute_contexts=False, phase1__min_updates=9)
    model = network(params)
    trainer = ContextTrainer(model, model.embed(text(60)).detach(), params.phase1)
    previous = sequential_pass(model, trainer.embeddings)
    previous = trainer.iterate(1, previous).contexts.values
    assert trainer.weights_before
    monkeypatch.setattr("lego.cvfp.phase1.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    trainer.iterate(2, previous)
    assert (trainer.skipped, trainer.weights_before) == (1, {})  # the contexts are of the weights as they are


@pytest.mark.slow
def test_parallel_iterations_are_15_times_as_fast_as_sequential_ones_and_no_slower_than_plain_pytorch(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the profiles lie
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = cvfp_speed.measure(cvfp_speed.profile(768, 6), tokens=6400, sequential_tokens=100, repeats=3)
    finally:
        torch.set_num_threads(threads)
    assert found["parallel"] > 15 * found["sequential_batch"]
    assert found["parallel"] > found["plain"]


@pytest.mark.slow
def test_an_iteration_over_100000_tokens_of_width_768_stays_below_4_gib():
    command = [sys.executable, "-m", "benchmarks.cvfp_speed", "--memory", "100000", "--iterations", "1"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "100,000 tokens" in told
    assert float(told.split()[-2]) < 4.0  # "... peak resident memory 3.30 GiB"
