"""The curriculum: what each stage changes and nothing else, fresh optimizers, pre-flight; saving, using, bad input."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from satipatthana_systems import COMPAT, PARAMS, SMALL, clusters, small, system

from lego.artifacts import ArtifactError
from lego.harness import StageError, exit_cleanly
from lego.params import ParamsError
from lego.satipatthana import predict, stages, tasks
from lego.satipatthana.ablation import heads
from lego.satipatthana.curriculum import advance, begin, how_to_use, judge, resume
from lego.satipatthana.made import outside_sets
from lego.satipatthana.peers import OWN, networks, peer
from lego.satipatthana.peers import judge as judge_peer
from lego.satipatthana.sections import changed
from lego.satipatthana.specs import spec_of, start_probes
from lego.satipatthana.stages import (
    TRAINABLE,
    StageCheckError,
    StageSpec,
    batches,
    check_gradients,
    check_states,
    run_stage,
    trainable,
)
from lego.satipatthana.store import Use, load, save, standardized
from lego.satipatthana.tables import TaskError, labelled, read_table
from lego.satipatthana.tasks import Task
from lego.satipatthana.void import VoidError, VoidSource

VOID = PARAMS.void.model_copy(update={"kinds": ["gaussian"]})
ONCE = {f"stage{number}__epochs": 1 for number in range(4)}
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


def test_r5_5_unknown_and_missing_keys_are_refused():
    with pytest.raises(
        ParamsError, match="test: adapter hidden must be a multiple of heads for the kind transformer, got 130 and 4"
    ):
        small(adapter__kind="transformer", adapter__hidden=130, adapter__heads=4)
    with pytest.raises(ParamsError, match=r"test: stage1\.speed is no key"):
        small(stage1__speed=1)
    with pytest.raises(ParamsError, match=r"stage2\.batch_size must be at least the number of paths, 5, got 4"):
        small(stage2__batch_size=4)


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


def a_task(rows: int = 60) -> Task:
    return Task(clusters(rows), clusters(30, seed=1), clusters(30, seed=2), {}, ["a", "b", "c"])


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
    real = stages.AdamW
    monkeypatch.setattr(stages, "AdamW", lambda parameters, **k: seen.append(parameters) or real(parameters, **k))
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
        next(batches(few, torch.Generator()))


def test_large_columns_are_standardized_alike_in_training_and_use(tmp_path):
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"time": 1.7e9 + 50 * random.normal(size=60), "b": random.normal(size=60)})
    frame["kind"] = ["x", "y"] * 30
    frame.to_csv(tmp_path / "t.csv", index=False)
    settings = PARAMS.task.model_copy(update={"name": "table", "file": str(tmp_path / "t.csv"), "label": "kind"})
    task = tasks.load(settings, PARAMS.test.model_copy(update={"kinds": ["uniform"]}))
    use = Use(task.classes, task.columns, task.mean.tolist(), task.std.tolist())
    rows = standardized(torch.from_numpy(frame[["time", "b"]].to_numpy(copy=True)), use)
    apart = (rows[:, None] - torch.cat([task.train.x, task.validation.x, task.test.x])[None]).abs().amax(2).amin(0)
    assert apart.max() < 1e-5


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


DAMAGE = [  # of system.json: values that cannot be those that were written
    ("shape", []),
    ("shape", [0]),
    ("shape", "12"),
    ("outputs", 2),
    ("outputs", None),
    ("classes", ["a", "b"]),
    ("classes", ["a", "a", "b"]),
    ("shape", [10**30]),
    ("columns", ["a"]),
    ("mean", [0.0]),
    ("mean", None),
    ("std", [0.0] * 12),
    ("temperature", 0),
    ("temperature", "warm"),
    ("threshold", None),
    ("answer", [1.0]),
    ("trust", {"x": [0.0, 1.0], "y": [0.0]}),
    ("trust", [0, 1]),
    ("trust", {"x": [1.0, 0.0], "y": [0.0, 1.0]}),
    ("guide", True),
    ("parameters", {}),
]


def test_r4_3_and_r4_4_a_saved_system_is_the_same_and_errors_are_of_what_was_encoded(tmp_path):
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    for number in range(4):
        advance(made, number, task, params, 0)
        folder = tmp_path / str(number)
        folder.mkdir()
        save(made, folder, how_to_use(made, task, params.reject))
        again, _ = load(folder)
        assert torch.equal(again(task.test.x).trust, made(task.test.x).trust)
    (tmp_path / "out").mkdir()
    use = how_to_use(made, task, params.reject)
    save(made, tmp_path / "out", use, guide=False)
    exported, same = load(tmp_path / "out")
    assert exported.aux is None
    assert (same.threshold, same.temperature) == (use.threshold, use.temperature)
    assert torch.equal(exported(task.test.x).output, made(task.test.x).output)
    noisy = made.samatha(task.test.x, 1.0, generator=torch.Generator().manual_seed(0))
    expected = (made.samatha_recon(noisy.state) - noisy.encoded).square().mean(1, keepdim=True)
    torch.testing.assert_close(made.look(noisy)[1], expected)
    assert not torch.equal(noisy.encoded, task.test.x)
    weights = (tmp_path / "out/system.safetensors").read_bytes()
    (tmp_path / "out/system.safetensors").write_bytes(weights[:-8])
    with pytest.raises(ArtifactError, match=r"system\.safetensors: cannot be read as safetensors"):
        load(tmp_path / "out")
    (tmp_path / "out/system.safetensors").write_bytes(weights)
    facts = json.loads((tmp_path / "out/system.json").read_text())
    (tmp_path / "out/system.json").write_text(json.dumps(facts | {"temperature": 10**30}))
    assert isinstance(load(tmp_path / "out")[1].temperature, float)
    broken = exported.state_dict() | {"vicara.inner": torch.full_like(exported.vicara.inner, torch.nan)}
    save_file(broken, tmp_path / "out/system.safetensors")
    with pytest.raises(ArtifactError, match=r"system\.safetensors: holds weights that are not finite"):
        load(tmp_path / "out")
    (tmp_path / "out/system.safetensors").write_bytes(weights)
    for key, value in DAMAGE:
        (tmp_path / "out/system.json").write_text(json.dumps(facts | {key: value}))
        with pytest.raises(ArtifactError, match=r"system\.(json|safetensors): "):
            load(tmp_path / "out")


def test_a_later_part_of_another_size_leaves_the_trained_ones_as_they_are(tmp_path):
    """So a changed parameter of stage 2 needs nothing before it to run again."""
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    for number in range(2):
        advance(made, number, task, params, 0)
    save(made, tmp_path, how_to_use(made, task, params.reject))
    other = resume(task, small(**(ONCE | {"vipassana__hidden": 9, "heads__decoder_hidden": 5})), 0, 1, tmp_path)
    assert torch.equal(other.samatha(task.test.x).state, made.samatha(task.test.x).state)
    assert torch.equal(other.samatha_recon.trunk[0].weight, made.samatha_recon.trunk[0].weight)
    with pytest.raises(ArtifactError, match="is not of these parameters; run dvc repro stages/satipatthana"):
        resume(task, small(**(ONCE | {"adapter__hidden": 9})), 0, 1, tmp_path)


def test_predict_abstains_below_the_threshold_and_numbers_are_flat():
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    for number in range(4):
        advance(made, number, task, params, 0)
    found = made(task.test.x)
    cut = float(found.trust.median())
    output, accepted, trust = made.predict(task.test.x, reject_below=cut)
    assert torch.equal(accepted, trust[:, 0] >= cut)
    assert torch.equal(output, found.output)
    task = Task(**{**vars(task), "outside": outside_sets(task.train.x.numpy(), task.test.x.numpy(), PARAMS.test)})
    facts = judge(made, task, how_to_use(made, task, params.reject), params, 0)
    assert all(isinstance(value, float) for value in facts.values())
    assert 0 <= facts["accuracy"] <= 1
    assert facts["auroc_uniform"] > 0.5
    assert facts["recon_mse_1T"] == pytest.approx(facts["recon_mse_20T"], rel=0.02)
    assert facts["last_step_20T"] < 1e-5 < facts["last_step"]
    longer = made(task.test.x, max_steps=200, rests=False)
    assert (longer.steps == 200).all()  # the sweep takes its steps
    torch.testing.assert_close(longer.s_star, found.s_star, rtol=0, atol=2e-2)


# tasks and tables


def test_digits_are_split_as_the_specification_says():
    task = tasks.load(PARAMS.task, PARAMS.test)
    assert (len(task.train), len(task.validation), len(task.test)) == (858, 152, 433)
    assert {kind: len(rows) for kind, rows in task.outside.items()} == {"near": 354} | dict.fromkeys(
        ("gauss_matched", "uniform", "pixel_perm", "inverted", "noisy_0.5"), 433
    )
    assert task.train.x.min() >= -1
    assert task.train.x.max() <= 1
    torch.testing.assert_close(task.outside["inverted"], -task.test.x)
    again = tasks.load(PARAMS.task, PARAMS.test)
    assert all(torch.equal(rows, again.outside[kind]) for kind, rows in task.outside.items())


@pytest.mark.parametrize(("name", "features"), [("breast_cancer", (30,)), ("wine", (13,)), ("sensors", (30, 4))])
def test_other_tasks_come_with_their_shapes_and_sets_from_outside(name, features):
    kinds = ["stuck", "drift", "spikes", "swapped"] if name == "sensors" else ["uniform", "noisy_0.5"]
    task = tasks.load(PARAMS.task.model_copy(update={"name": name}), PARAMS.test.model_copy(update={"kinds": kinds}))
    assert task.shape == features
    assert list(task.outside) == kinds
    for rows in task.outside.values():
        assert rows.shape == task.test.x.shape
        assert not torch.equal(rows, task.test.x)
    if name != "sensors":
        assert task.train.x.mean(0).abs().max() < 1e-4


def test_a_table_of_ones_own_and_what_is_wrong_with_it(tmp_path):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(60, 3)), columns=["a", "b", "c"])
    frame["kind"] = ["x", "y"] * 30
    file = tmp_path / "rows.csv"
    frame.to_csv(file, index=False)
    settings = PARAMS.task.model_copy(update={"name": "table", "file": str(file), "label": "kind"})
    task = tasks.load(settings, PARAMS.test.model_copy(update={"kinds": ["uniform"]}))
    assert (task.classes, task.columns, task.shape) == (["x", "y"], ["a", "b", "c"], (3,))
    folder = tmp_path / "task"
    folder.mkdir()
    tasks.write_task(task, folder)
    again = tasks.read_task(folder)
    assert torch.equal(again.outside["uniform"], task.outside["uniform"])
    assert torch.equal(again.mean, task.mean)
    for change, sentence in (
        ({"label": "sort"}, "has no column sort; task.label must name one of a, b, c, kind"),
        ({"file": str(tmp_path / "none.csv")}, "cannot be read as .csv"),
    ):
        with pytest.raises(TaskError, match=sentence):
            tasks.load(settings.model_copy(update=change), PARAMS.test.model_copy(update={"kinds": ["uniform"]}))
    with pytest.raises(TaskError, match=r"rows: row 7, column b is not a finite number"):
        broken = frame.copy()
        broken.loc[7, "b"] = np.nan
        tasks.features_of(broken, ["a", "b"], "rows")
    with pytest.raises(TaskError, match="rows: column kind is not numeric"):
        tasks.features_of(frame, ["kind"], "rows")
    with pytest.raises(TaskError, match="rows: has no column q"):
        tasks.features_of(frame, ["q"], "rows")
    with pytest.raises(TaskError, match="rows: has no column beside kind; give at least one to learn from"):
        labelled(frame[["kind"]], "kind", "rows")
    for text, sentence in (
        ("a,b\n1,2,3\n4,5,6\n", "rows have more fields than the header"),  # pandas would make an index of the first
        ("a,b,b\n1,2,3\n", "has the column b twice; drop or rename one"),
        ("", r"cannot be read as \.csv"),
    ):
        file.write_text(text)
        with pytest.raises(TaskError, match=sentence):
            read_table(file)
    file.write_text("NA,null,,\n1,2,,\n")  # names that pandas takes for missing, and a spreadsheet's empty columns
    assert list(read_table(file).columns[:2]) == ["NA", "null"]
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(b"a\n1\n")[:-4])
    with pytest.raises(TaskError, match=r"rows\.csv\.gz: cannot be read as \.gz"):
        read_table(packed)
    frame.assign(a=1e300 * frame["a"]).to_csv(file, index=False)
    with pytest.raises(TaskError, match="column a spreads beyond double precision; scale it down"):
        tasks.load(settings, PARAMS.test.model_copy(update={"kinds": ["uniform"]}))


def test_r6_4_void_rows_may_come_from_a_table(tmp_path):
    """Of another dataset, with the task's columns and in its units."""
    rows = clusters(80, features=3)
    columns = {f"c{n}": rows.x[:, n].numpy() for n in range(3)}
    pd.DataFrame(columns | {"y": rows.y.numpy()}).to_csv(tmp_path / "own.csv", index=False)
    away = {name: 10 + values for name, values in columns.items()}
    pd.DataFrame(away).to_parquet(tmp_path / "other.parquet")
    named = {"task.name": "table", "task.file": str(tmp_path / "own.csv"), "task.label": "y"}
    named |= {"task.strangers": str(tmp_path / "other.parquet"), "void.kinds": ["file"], "test.kinds": ["uniform"]}
    params = changed(PARAMS, named, "test")
    task = tasks.load(params.task, params.test)
    torch.testing.assert_close(task.strangers * task.std + task.mean, 10 + rows.x.double(), rtol=1e-4, atol=1e-4)
    (tmp_path / "task").mkdir()
    tasks.write_task(task, tmp_path / "task")
    again = tasks.read_task(tmp_path / "task")
    assert torch.equal(again.strangers, task.strangers)
    drawn = VoidSource.of_task(task.train, params, None, task.strangers).draw(20, torch.Generator().manual_seed(0))
    assert (drawn[:, None] == task.strangers).all(dim=2).any(dim=1).all()
    short = {f"stage{number}.epochs": 1 for number in range(4)} | {"peers.epochs": 1, "ablations.epochs": 1}
    few = changed(params, SMALL | short | {"ablations.batches": 2}, "test")
    assert networks("outlier_exposure", task, few.peers, 0, few.void)  # peers and ablations are shown them too
    made = begin(task, few, 0)
    for number in range(4):
        advance(made, number, task, few, 0)
    assert {"all_features", "without_log"} < heads(made, task, few, 0).keys()
    with pytest.raises(VoidError, match=r"the task has no such rows; name some in task\.strangers"):
        VoidSource.of_task(task.train, params).draw(3, torch.Generator())
    with pytest.raises(ParamsError, match=r"task\.strangers must name a CSV or Parquet file if void\.kinds has file"):
        changed(PARAMS, {"void.kinds": ["file"]}, "test")
    with pytest.raises(TaskError, match="has no column c0, c1, c2"):
        pd.DataFrame({"d": [1.0]}).to_csv(tmp_path / "odd.csv", index=False)
        tasks.load(params.task.model_copy(update={"strangers": str(tmp_path / "odd.csv")}), params.test)
    windows = {"task.name": "sensors", "task.strangers": "x.csv", "void.kinds": ["file"], "test.kinds": ["stuck"]}
    with pytest.raises(TaskError, match="the inputs of this task are none; leave it null"):
        odd = changed(PARAMS, windows, "test")
        tasks.load(odd.task, odd.test)


def test_the_command_line_answers_a_table(tmp_path, monkeypatch, capsys):
    params, task = small(**ONCE), a_task()
    task = Task(**{**vars(task), "columns": [f"c{n}" for n in range(12)]})
    made = begin(task, params, 0)
    for number in range(4):
        advance(made, number, task, params, 0)
    folder = tmp_path / "system"
    folder.mkdir()
    save(made, folder, how_to_use(made, task, params.reject), guide=False)
    frame = pd.DataFrame(task.test.x.numpy(), columns=task.columns)
    frame["truth"] = [task.classes[one] for one in task.test.y]
    frame.to_parquet(tmp_path / "rows.parquet")

    def run(*arguments: str) -> tuple[int, str]:
        rows = [str(tmp_path / "rows.parquet"), "--system", str(folder)]
        monkeypatch.setattr(sys, "argv", ["predict", *rows, *arguments])
        return predict.main(), capsys.readouterr().err

    code, said = run("--out", str(tmp_path / "a.csv"), "--label", "truth")
    assert code == 0
    assert "30 rows, " in said
    found = pd.read_csv(tmp_path / "a.csv")
    assert list(found.columns[:5]) == ["answer", "probability", "trust", "trust_calibrated", "accepted"]
    np.testing.assert_allclose(found["trust"], made(task.test.x).trust[:, 0], rtol=1e-5)
    code, said = run("--label", "nothing")
    assert code == 1
    assert "has no column nothing, which --label names" in said
    code, said = run("--label", "c0")
    assert code == 1
    assert "which is none of the classes a, b, c" in said
    numbered = Use(["1", "2"])
    some = pd.DataFrame({"answer": ["1", "2", "1"]})
    told = predict.rights(made, numbered, some, pd.Series([1.0, 2.0, 2.0], name="y"), "t")  # one was missing once
    assert told.tolist() == [True, True, False]
    code, said = run("--out", str(tmp_path))
    assert (code, said) == (1, f"error: --out {tmp_path}: is a folder; name a file\n")
    frame["c3"] = frame["c3"].astype(float)
    frame.loc[7, "c3"] = 1e39
    frame.to_parquet(tmp_path / "rows.parquet")
    assert run() == (
        1,
        f"error: {tmp_path}/rows.parquet: row 7 is too large for single precision; correct it or leave it out\n",
    )
    frame[:0].to_parquet(tmp_path / "rows.parquet")
    assert run() == (1, f"error: {tmp_path}/rows.parquet: has no rows; give at least one below the header\n")


def test_the_decoder_brings_contexts_into_the_range_it_learned_from():
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    assert bool(torch.isinf(made.decoder.low).all())
    for number in range(4):
        advance(made, number, task, params, 0)
    found = made(task.train.x)
    assert torch.equal(made.decoder.low, found.v_ctx.amin(dim=0))
    assert torch.equal(made.decoder.high, found.v_ctx.amax(dim=0))
    with torch.no_grad():
        answered = made.decoder(found.s_star, found.v_ctx)
        far = made.decoder(found.s_star, found.v_ctx + 1e6)
        edge = made.decoder(found.s_star, made.decoder.high.expand_as(found.v_ctx))
    assert torch.equal(answered, found.output)
    assert torch.equal(far, edge)
    free = small(heads__bounded_context=False, **ONCE)
    spec_of(3, made := begin(task, free, 0).eval(), task.train, free, 0)
    assert bool(torch.isinf(made.decoder.high).all())


@pytest.mark.parametrize("name", PARAMS.peers.names)
def test_peers_tell_what_is_far_from_what_is_near(name):
    task = a_task(120)
    outside = {"far": 3 * torch.randn(60, 12, generator=torch.Generator().manual_seed(5))}
    settings = PARAMS.peers.model_copy(update={"epochs": 20, "hidden": 32, "dim": 32})
    kind = name if name in OWN else "plain"

    def judged():
        return judge_peer(peer(name, networks(kind, task, settings, 0, VOID), task, settings, 0), task.test, outside)

    found = judged()
    assert found["accuracy"] > 0.9
    assert 0 <= found["auroc_far"] <= 1
    if name in ("knn", "input_knn", "mahalanobis", "outlier_exposure", "isolation_forest"):
        assert found["auroc_far"] > 0.8
    again = judged()
    assert found == again or (math.isnan(found["auroc_correct"]) and copy.copy(found).keys() == again.keys())
