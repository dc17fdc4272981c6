"""How a stage trains: what it changes and nothing else, fresh optimizers, pre-flight, bad input, and when it ends."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch

from lego.base.harness import StageError, exit_cleanly
from lego.base.parameter_files import ParamsError
from lego.satipatthana import tasks, training
from lego.satipatthana.curriculum import advance, begin
from lego.satipatthana.specs import spec_of, start_probes
from lego.satipatthana.tasks import Task
from lego.satipatthana.training import (
    TRAINABLE,
    StageCheckError,
    StageSpec,
    batches,
    check_gradients,
    check_states,
    finished,
    run_stage,
    trainable,
)
from tests.satipatthana.conftest import COMPAT, ONCE, PARAMS, a_task, clusters, small, system

LEARNING = {"lr": 0.1, "batch_size": 8, "grad_clip": 1e-4}


def state(made) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.state_dict().items()}


@pytest.mark.parametrize("base", [PARAMS, COMPAT], ids=["sound", "compat"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_r5_1_and_r5_2_a_stage_changes_its_own_tensors_and_no_other_buffers_included(base, kind):
    shape = (12,) if kind == "mlp" else (1, 16, 16)
    params = small(base, adapter__kind=kind, stage1__noise_level=0.1, **ONCE)
    made, train = system(params, shape), clusters(40, math.prod(shape))
    train = type(train)(train.x.view(40, *shape), train.y)
    for number in range(4):
        before = state(made)
        if number == 1:
            start_probes(made, train.x, 0)
        run_stage(made, spec_of(number, made, train, params, 0), number)
        changed = {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])}
        rooms = {name.split(".")[0] for name in changed}
        assert rooms <= set(TRAINABLE[number])
        assert rooms >= set(TRAINABLE[number]) - {"aux"}
        weights = {name for name, one in made.named_parameters() if name.split(".")[0] in TRAINABLE[number]}
        still = {name for name in weights - changed if "context" not in name}
        assert not still
        assert not any(one.training for one in made.modules())
        assert not any(one.requires_grad for one in made.parameters())


def test_r5_3_stage_3_thinks_once(monkeypatch):
    params = small(**(ONCE | {"stage3__epochs": 4}))
    made, train = system(params), clusters()
    calls = []
    real = type(made).samatha
    monkeypatch.setattr(type(made), "samatha", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    spec = spec_of(3, made, train, params, 0)
    run_stage(made, spec, 0)
    assert len(calls) == 1


def test_r5_4_guidance_is_one_switch():
    assert system(small()).aux is not None
    assert system(small(system__guided=False)).aux is None
    with pytest.raises(ParamsError, match=r"stage1\.weight_guidance must be above 0 when system\.guided is true"):
        small(stage1__weight_guidance=0.0)
    made = system(small())
    with pytest.raises(ValueError, match="row 1 has a feature that is not a finite number"):
        made(torch.tensor([[0.0] * 12, [float("nan")] * 12]))
    with pytest.raises(ValueError, match=r"inputs must be \(rows, 12\), got \(2, 11\)"):
        made(torch.zeros(2, 11))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage1__weight_stability", 50.0),
        ("stage1__weight_recon", 0.0),
        ("stage1__weight_guidance", 0.05),
        ("stage1__weight_diversity", 5.0),
        ("stage1__weight_usage", 5.0),
        ("stage1__noise_level", 1.0),
        ("stage1__lr", 0.1),
        ("stage1__batch_size", 8),
        ("stage1__grad_clip", 1e-4),
        ("stage1__squared_diversity", False),
        ("stage2__lr", 0.1),
        ("stage2__noise_level", 0.2),
        ("stage2__void_target", 0.5),
        ("stage2__batch_size", 8),
        ("stage2__mismatch", "permutation"),
        ("stage2__grad_clip", 1e-4),
        *((f"stage{number}__epochs", 2) for number in range(4)),
        *((f"stage{number}__{key}", value) for number in (0, 3) for key, value in LEARNING.items()),
        ("vipassana__weight_trust", 0.1),
        ("vipassana__weight_conformity", 0.0),
        ("vipassana__weight_confidence", 0.0),
        ("paths__void", None),
        ("seed", 7),
    ],
)
def test_r5_5_and_r5_6_every_field_of_a_stage_counts(key, value):
    changes = {"paths__void": 0.1, "paths__clean": 0.45} if key == "paths__void" else {key: value}
    last = int(key[5]) if key.startswith("stage") else 2  # no later stage needs to run to tell
    assert not torch.equal(trained_weights(last), trained_weights(last, **changes))


def trained_weights(last: int, **changes) -> torch.Tensor:
    return torch.cat([one.flatten() for one in after(last, **changes).values()])


@functools.cache
def after(number: int, **changes) -> dict[str, torch.Tensor]:
    """Weights after a stage; what changes later ones alone leaves those before as they are."""
    params, task = small(**(ONCE | changes)), a_task()
    made = begin(task, params, 0)
    if number:
        earlier = {key: value for key, value in changes.items() if not key.startswith(f"stage{number}")}
        made.load_state_dict(after(number - 1, **earlier))
    advance(made, number, task, params, 0)
    return copy.deepcopy(made.state_dict())


def test_r5_6_a_seed_gives_the_same_bits_twice_and_r4_1_so_does_inference():
    params, task = small(**ONCE), a_task()
    made = []
    for _ in range(2):
        one = begin(task, params, 3)
        for number in range(4):
            advance(one, number, task, params, 3)
        made.append(one)
    first, second = (one(task.test.x) for one in made)
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.trust, second.trust)
    assert torch.equal(made[0](task.test.x).trust, first.trust)
    assert not torch.equal(begin(task, params, 4).vitakka.probes, begin(task, params, 3).vitakka.probes)


def test_r8_2_every_stage_has_an_optimizer_of_its_own(monkeypatch):
    params, train = small(**ONCE), clusters()
    made, seen = system(params), []
    real = training.AdamW
    monkeypatch.setattr(training, "AdamW", lambda parameters, **k: seen.append(parameters) or real(parameters, **k))
    for number in (0, 1, 1, 2, 3):
        before = state(made)
        run_stage(made, spec_of(number, made, train, params, 0), number)
        wanted = {id(one) for name in TRAINABLE[number] for one in getattr(made, name).parameters()}
        assert {id(one) for one in seen[-1]} == wanted
        if number == 1:
            moved = (made.vicara.inner - before["vicara.inner"]).abs().max()
            assert moved > 1e-4  # also the second time


def test_r8_3_parameters_exist_before_anything_is_frozen_and_stay(monkeypatch):
    made = system(small())
    before = [id(one) for one in made.parameters()]
    made(torch.randn(4, 12))
    made.samatha(torch.randn(4, 12))
    assert [id(one) for one in made.parameters()] == before
    monkeypatch.setitem(TRAINABLE, 2, ())
    with pytest.raises(StageCheckError, match="stage 2: there is nothing to train"):
        trainable(made, 2)


def test_rows_that_cannot_be_learned_are_one_sentence(capsys):
    task, params = a_task(), small(**ONCE)
    x = task.train.x.clone()
    x[3, 2] = math.nan
    with pytest.raises(StageError, match="train: row 3 has a feature that is not a finite number"):
        begin(Task(**{**vars(task), "train": type(task.train)(x, task.train.y)}), params, 0)
    with pytest.raises(StageError, match="test: row 0 has the label 7, but the classes are 0 to 2"):
        begin(Task(**{**vars(task), "test": type(task.test)(task.test.x, task.test.y + 7)}), params, 0)
    with pytest.raises(StageError, match=r"params\.yaml: adapter\.kind lstm needs inputs of 2 dimensions"):
        begin(task, small(adapter__kind="lstm"), 0)
    made = begin(task, params, 0)
    for number in range(2):
        advance(made, number, task, params, 0)
    many = small(vipassana__prototypes=61, **ONCE)
    with pytest.raises(StageError, match=r"vipassana\.prototypes is 61, but there are only 60 train rows; lower it"):
        advance(begin(task, many, 0).eval(), 2, task, many, 0)
    with pytest.raises(SystemExit):  # as every stage says it
        exit_cleanly(lambda: tasks.load(PARAMS.task, PARAMS.test.model_copy(update={"kinds": ["unifrom"]})))
    assert (
        "error: stages/satipatthana/params.yaml: test.kinds has unifrom, which the task digits"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("rows", [35, 36, 37, 33])
def test_a_last_batch_too_small_for_the_paths_is_left_out(rows):
    params, task = small(**ONCE), a_task(rows)
    made = begin(task, params, 0)
    for number in range(3):
        advance(made, number, task, params, 0)
    few = StageSpec(2, params.stage2, lambda p, g: {}, 4, 5)
    with pytest.raises(StageCheckError, match="stage 2: needs at least 5 train rows, got 4"):
        batches(few, torch.Generator())


def test_r8_12_what_has_no_gradient_and_states_that_are_alike_are_found():
    params, train = small(**ONCE), clusters()
    made = system(params)
    trainable(made, 1)
    spec = spec_of(1, made, train, params, 0)
    names = check_gradients(made, spec, torch.Generator().manual_seed(0))
    assert {name.split(".")[0] for name in names} == set(TRAINABLE[1])
    blind = StageSpec(1, spec.settings, lambda p, g: {"loss": made.aux(made.samatha(train.x[p]).state).sum()}, 60)
    with pytest.raises(StageCheckError, match=r"stage 1: no gradient reaches samatha_recon\.trunk\.0\.weight"):
        run_stage(made, blind, 0)
    facts = check_states(made, train.x)
    assert facts["distinct"] > 0.9
    assert {"cosine", "z_std", "s0_std", "gates_open"} < facts.keys()
    same = train.x[:1].expand(60, -1) + 1e-7 * torch.randn(60, 12)
    with pytest.raises(StageCheckError, match="alike"):
        check_states(made, same)
    with torch.no_grad():
        [one for one in made.adapter.modules() if isinstance(one, torch.nn.Linear)][-1].weight.mul_(1e-6)
    with pytest.raises(StageCheckError, match="alike"):
        check_states(made, train.x)
    gated = system(small(COMPAT, vitakka__inference_gate_threshold=1.0))
    assert check_states(gated, train.x, settles=False)["distinct"] < 0.1  # it may learn to
    with pytest.raises(StageCheckError, match="settled states are alike: 2 % of 60 rows are distinct"):
        check_states(gated, train.x)


def test_r8_12_latents_that_are_alike_are_found_before_stage_1(capsys):
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    advance(made, 0, task, params, 0)
    advance(made, 1, task, params, 0)
    said = capsys.readouterr().out
    assert "stage 0: 20 tensors learn: adapter.body." in said
    assert "stage 1, before it begins, 60 rows: cosine " in said
    with torch.no_grad():
        [one for one in made.adapter.modules() if isinstance(one, torch.nn.Linear)][-1].weight.mul_(1e-6)
    with pytest.raises(StageCheckError, match="latents of 60 rows are alike"):
        advance(made, 1, task, params, 0)


@pytest.mark.parametrize(
    ("number", "history", "residual", "ends"),
    [
        (0, [1.0, 0.5, 0.499, 0.498], 0.0, True),
        (0, [1.0, 0.5, 0.499, 0.4], 0.0, False),
        (0, [1.0, 0.5], 0.0, False),  # no epochs before the last two to compare with
        (1, [1.0, 0.5, 0.5, 0.5], 9e-4, True),
        (1, [1.0, 0.5, 0.5, 0.5], 2e-3, False),  # its states still move
        (1, [1.0, 0.5, 0.4, 0.3], 9e-4, False),  # settled, but it still learns
        (2, [0.5, 0.31, 0.309, 0.31], 0.0, True),
        (2, [0.5, 0.31, 0.305, 0.302], 0.0, False),
        (2, [0.31, 0.295, 0.295, 0.295], 0.0, True),  # below a floor of pooled paths that it can tell apart after all
        (3, [0.3, 0.3, 0.3], 0.0, True),
    ],
)
def test_r5_7_a_stage_ends_where_nothing_changes_any_more(number, history, residual, ends):
    rows = [{"loss": one, "residual": residual, "validation": one, "validation_floor": 0.3} for one in history]
    assert finished(number, rows, 2) is ends


def test_r5_7_fixed_epochs_are_the_fallback_and_patience_ends_a_stage(capsys):
    train = clusters()
    for patience, epochs in ((0, 6), (1, 2)):
        params = small(stage0__epochs=6, stage0__lr=1e-9, stage0__patience=patience)
        made = system(params)
        history = run_stage(made, spec_of(0, made, train, params, 0), 0)
        assert len(history) == epochs
        said = "stage 0: nothing changes any more; it ends after epoch 2" in capsys.readouterr().out
        assert said == bool(patience)
