"""Suites as experiments: what is queued for which records, what a record says of itself, and the round through dvc."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lego.base.artifacts import ArtifactError
from lego.base.harness import StageError
from lego.base.params import Params, load_params
from stages.evidence import current, gather, queue, suites
from stages.evidence.gather import searched_rates, with_finished
from stages.evidence.queue import held, lacks
from stages.evidence.records import nested, results, write
from stages.evidence.suites import Suite, changed, changes_of, checked, flat, load_suites, made_by, override
from tests.conftest import ROOT

VALUES = load_params(ROOT / "params.yaml").model_dump()
PARAMS = Params.model_validate(VALUES)
SUITE = Suite(
    seeds=2, search=[0.5, 1.0], settings={"a": {}, "b": {"ashem.hard_example_ratio": 0.3}}, models=["ashem", "dense"]
)
CODE = {"lego/base": "11", "lego/model": "22"}
KEYS = ["seed", "data", "search", "ashem.phase2_lr", "ashem.hard_example_ratio", "baselines.joint.dense"]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A folder with params.yaml, where every model is made of CODE and follows from KEYS."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(current, "declared", lambda target: (CODE, KEYS, []))
    return tmp_path


def base_rate(model: str, params: Params) -> float:
    return flat(params.model_dump())[made_by(model, params)[1]]


def record(setting: str, model: str, seed: int, rates: dict | None = None, suite: Suite = SUITE, **more) -> dict:
    """Of a model as `gather` would write it today; it took half its rate."""
    changes = changes_of(suite, setting, seed, rates or {})
    lr = base_rate(model, PARAMS) / 2
    return {
        "setting": setting,
        "model": model,
        "seed": seed,
        "revision": "abc1234",
        "experiment": "def5678",
        "params": flat(changed(changed(VALUES, suite.settings[setting]), changes)),
        "made_of": CODE | {"Python": platform.python_version()},
        "metrics": {"lr": lr, "ppl": 30.123456789123},
        "documents": {"tokens": [10.0, 20.0], "nll": [30.1234, None]},
    } | more


def first_seeds(*settings: str, **more) -> list[dict]:
    return [record(setting, model, 0, **more) for setting in settings for model in SUITE.models]


def lacking(*records: dict, seeds: int = 2, suite: Suite = SUITE) -> dict[str, tuple[str, bool]]:
    """Why by name, and whether it waits."""
    found = lacks("x", suite, nested(list(records)), range(seeds), list(suite.settings))
    return {one.name: (one.why, one.waits) for one in found}


def test_the_suites_name_models_and_keys_that_there_are():
    for name, suite in load_suites().items():
        for setting, changes in suite.settings.items():
            params = Params.model_validate(changed(VALUES, changes))
            for model in suite.models:
                assert made_by(model, params)[0], (name, setting)
                assert base_rate(model, params) > 0
    with pytest.raises(StageError, match="no model nonsense"):
        made_by("nonsense", PARAMS)
    for key in ("model.nonsense", "seed.x", "data.path.x", "nonsense.y.z"):
        with pytest.raises(StageError, match="is no key of params"):
            changed(VALUES, {key: 1})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not valid YAML"),
        ("", "must hold suites"),
        ("a: 3", "a: Input should be"),
        ("a: {seeds: 1, search: [1.0], settings: {b: {seed: 3}}, models: [ashem]}", "must not change seed"),
        ("a: {seeds: 1, search: [1.0], settings: {b: {search.lr_factors: [2.0]}}, models: [ashem]}", "must not change"),
        ("a: {seeds: 1, search: [1.0], settings: {b: {}}, models: [ashem, ashem]}", "models has ashem twice"),
        ("a: {seeds: 1, search: [1.0], settings: {}, models: [ashem]}", "a: settings: "),
        ("a: {seeds: 1, search: [1.0], settings: {b-c: {}}, models: [ashem]}", "setting b-c must be letters"),
        ("a: {seeds: 1, search: [1.0], settings: {b: {data: {path: x}}}, models: [ashem]}", "single keys of data"),
    ],
)
def test_damaged_suites_are_refused_in_a_sentence(text, sentence, tmp_path, monkeypatch):
    (tmp_path / "suites.yaml").write_text(text)
    monkeypatch.setattr(suites, "__file__", str(tmp_path / "suites.py"))
    with pytest.raises(StageError, match=sentence) as error:
        load_suites()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("ashem.hard_split", "validation", r"ashem\.hard_split must be train"),
        ("routing.criterion", "probe", r"routing\.criterion must be max_prob or gain"),
        ("routing.calibration", "risk", r"and routing\.calibration quantile"),
        ("ashem.hard_example_ratio", 1.5, r"setting a: ashem\.hard_example_ratio"),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(key, value, sentence):
    with pytest.raises(StageError, match=sentence):
        checked(changed(VALUES, {key: value}), "a")


def test_wrong_requests_are_refused(capsys):
    for asked in (["--suite", "none"], ["--setting", "none"]):
        with pytest.raises(SystemExit):
            queue.main(asked)
        assert "invalid choice: 'none'" in capsys.readouterr().err
    with pytest.raises(StageError, match="--seeds must be at least 1"):
        queue.main(["--seeds", "0"])


@pytest.mark.parametrize("value", [" = [^=]", "it's 'so'", "a=b,c", None, True, 0.004, 1e-05, 3, [0.5, 1.0], "x: {y}"])
def test_a_change_reaches_an_experiment_as_it_is(value):
    (parsed,) = OverridesParser.create().parse_overrides([override("data.split_on", value)])
    assert getattr(parsed.value(), "text", parsed.value()) == value


def test_a_path_is_found_from_the_folder_of_an_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert override("data.path", "wikitext2") == f"data.path='{tmp_path / 'wikitext2'}'"


def test_first_seeds_are_queued_and_the_others_wait_for_the_rates_that_they_take(tree):
    assert lacking() == {
        "x-a-s0": ("ashem, dense (missing)", False),
        "x-b-s0": ("ashem, dense (missing)", False),
        "x-a-s1": ("ashem, dense (missing)", True),
        "x-b-s1": ("ashem, dense (missing)", True),
    }
    assert lacking(*first_seeds("a"), seeds=1) == {"x-b-s0": ("ashem, dense (missing)", False)}
    later = lacks("x", SUITE, nested(first_seeds("a")), range(1, 2), ["a", "b"])
    assert [one.waits for one in later] == [False, True]
    assert later[0].changes == {
        "seed": 1,
        "train.threads": 1,
        "evaluation.latency_repeats": 0,
        "search.lr_factors": [1.0],
        "ashem.phase2_lr": PARAMS.ashem.phase2_lr / 2,
        "baselines.joint.dense.lr": PARAMS.baselines.joint["dense"].lr / 2,
    }
    assert later[0].targets == ["evaluate_routing", "stages/evidence/dvc.yaml:joint@dense"]
    (first,) = lacks("x", SUITE, {}, range(1), ["b"])
    assert first.changes["search.lr_factors"] == [0.5, 1.0]
    assert first.changes["ashem.hard_example_ratio"] == 0.3


def test_a_suite_without_a_search_waits_for_nothing(tree):
    single = SUITE.model_copy(update={"search": [1.0]})
    assert [waits for _, waits in lacking(suite=single).values()] == [False] * 4


def test_what_is_current_is_not_queued_and_what_lacks_is_queued_alone(tree):
    rates = {made_by(model, PARAMS)[1]: base_rate(model, PARAMS) / 2 for model in SUITE.models}
    made = [*first_seeds("a", "b"), *(record(setting, model, 1, rates) for setting in "ab" for model in SUITE.models)]
    assert lacking(*made) == {}
    assert lacking(*made[:-1]) == {"x-b-s1": ("dense (missing)", False)}


def test_a_record_is_stale_by_code_by_parameter_by_python_and_by_what_it_does_not_hold(tree, monkeypatch):
    def since(**more) -> str:
        why, waits = lacking(*first_seeds("a", **more), seeds=1).get("x-a-s0", ("", False))
        assert not waits
        return why

    assert since() == ""
    said = "ashem, dense (computed at revision abc1234; since then {} changed)"
    own = record("a", "ashem", 0)
    assert since(made_of=own["made_of"] | {"lego/model": "33"}) == said.format("lego/model")
    assert since(made_of=own["made_of"] | {"Python": "3.11.0"}) == said.format("Python")
    assert since(params=own["params"] | {"ashem.phase2_lr": 1.0}) == said.format("ashem.phase2_lr")
    assert since(params=own["params"] | {"ashem.phase1_lr": 1.0}) == ""  # nothing here follows from it
    assert since(params={key: one for key, one in own["params"].items() if key != "seed"}) == said.format("seed")
    path = tree / "params.yaml"
    path.write_text(path.read_text().replace("phase2_lr: 1.6e-02", "phase2_lr: 7.0e-03"))
    assert since() == said.format("ashem.phase2_lr")
    found = nested(first_seeds("a"))
    assert current.outdated(SUITE, found) == [["ashem.phase2_lr"]] * 2
    assert current.outdated(SUITE.model_copy(update={"models": ["dense"]}), found)[0] == ["suites.yaml"]


def test_another_rate_of_the_first_seed_makes_the_later_ones_anew(tree):
    later = [record("a", model, 1, {"ashem.phase2_lr": 0.5}) for model in SUITE.models]
    found = lacking(*first_seeds("a", "b"), *later)["x-a-s1"]
    assert "ashem.phase2_lr, baselines.joint.dense.lr" in found[0]


@pytest.mark.parametrize(
    ("status", "here", "sentence"),
    [
        ("Queued", False, "is queued"),
        ("Running", False, "is running"),
        ("Failed", False, "dvc queue logs x-a-s0 says why"),
        ("Success", True, "dvc exp remove x-a-s0"),
        ("", False, ""),
    ],
)
def test_what_is_on_the_queue_is_not_put_there_again(status, here, sentence, tree):
    (lack, _) = lacks("x", SUITE, {}, range(1), ["a", "b"])
    said = held(lack, status, here)
    assert sentence in said
    assert bool(said) == bool(sentence)


def test_records_are_lines_that_hold_what_differs_and_come_back_as_they_were(tree):
    made = [*reversed(first_seeds("a", "b"))]
    write("x", nested(made))
    text = Path("metrics/evidence/x.json").read_text()
    lines = text.splitlines()
    assert len(lines) == 2 + 4 + 1
    assert lines[2].startswith('{"setting":"a","model":"ashem","seed":0,"revision":"abc1234","changes":{')
    assert json.loads(lines[-2])["changes"].keys() == {
        "ashem.hard_example_ratio",
        "evaluation.latency_repeats",
        "search.lr_factors",
        *(["train.threads"] if PARAMS.train.threads != 1 else []),
    }
    found = results("x")
    assert found["a"]["dense"]["0"]["documents"] == {"tokens": [10, 20], "nll": [30.1234, None]}
    assert found["a"]["dense"]["0"]["metrics"]["ppl"] == 30.12345679
    assert found["b"]["ashem"]["0"]["params"] == record("b", "ashem", 0)["params"]
    assert lacking(*first_seeds("b"), *[one["0"] for one in found["a"].values()], seeds=1) == {}
    write("x", found)
    assert Path("metrics/evidence/x.json").read_text() == text


def test_what_the_suite_no_longer_names_is_left_out(tree, monkeypatch):
    monkeypatch.setattr("stages.evidence.gather.finished", list)
    write("x", nested(first_seeds("a", "b")))
    fewer = SUITE.model_copy(update={"settings": {"b": SUITE.settings["b"]}, "models": ["dense"]})
    found, names = with_finished("x", fewer)
    assert {setting: list(models) for setting, models in found.items()} == {"b": ["dense"]}
    assert names == []
    assert with_finished("x", SUITE)[0].keys() == {"a", "b"}


@pytest.mark.parametrize(
    "damage", [[], {}, {"base": {}, "records": [{"setting": "a"}]}, {"base": [], "records": []}, "{"]
)
def test_damaged_records_are_named_and_left_alone(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "metrics/evidence/core.json"
    file.parent.mkdir(parents=True)
    file.write_text(damage if isinstance(damage, str) else json.dumps(damage))
    before = file.read_bytes()
    with pytest.raises(ArtifactError, match=r"evidence/core\.json.* git checkout") as error:
        results("core")
    assert "\n" not in str(error.value)
    assert file.read_bytes() == before


def test_the_committed_records_can_be_read():
    for file in (ROOT / "metrics/evidence").glob("*.json"):
        assert file.stem in load_suites()
        assert all(len(line) > 2 for line in file.read_text().splitlines()[2:-1])


def test_rates_that_were_tried_are_read_from_what_the_search_prints():
    log = "epoch 1\nvalidation perplexity by learning rate: 0.003: 40.125, 0.006: inf; taken: 0.003, the end\nlast"
    assert searched_rates(log) == {"0.003": 40.125, "0.006": None}
    assert searched_rates("") == {}


def test_a_current_record_stays_and_any_other_gives_way_to_what_has_finished(tree, monkeypatch):
    stale = {"made_of": record("a", "ashem", 0)["made_of"] | {"lego/model": "33"}}
    suite = SUITE.model_copy(update={"settings": {"a": {}, "there": {"data.source": "text", "data.path": "nowhere"}}})

    def taken(setting: str, held: list[dict], finished: list[dict]) -> list[str]:
        """Models whose record comes from the experiment."""
        one = gather.Experiment(f"x-{setting}-s0", "x", setting, 0, "f" * 40, "e" * 40)
        monkeypatch.setattr(gather, "finished", lambda: [one])
        monkeypatch.setattr(gather, "records_of", lambda *_: iter([new | {"experiment": "f" * 8} for new in finished]))
        monkeypatch.setattr(gather, "results", lambda name: nested(held))
        found, _ = gather.with_finished("x", suite)
        return [model for model, seeds in found[setting].items() if seeds["0"]["experiment"] == "f" * 8]

    current_ones, stale_ones = first_seeds("a"), first_seeds("a", **stale)
    assert taken("a", [], stale_ones) == taken("a", stale_ones, current_ones) == SUITE.models
    assert taken("a", current_ones, stale_ones) == []
    assert taken("a", [], [record("a", "dense", 0)]) == ["dense"]
    elsewhere = [record("there", model, 0, suite=suite) for model in SUITE.models]
    assert taken("there", elsewhere, elsewhere) == SUITE.models  # whether one is current cannot be told here
