"""CVFP's pipelines against the code: deps equal imports, declared keys exist, and which key reruns which stage."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lego.base.scratch import fingerprint, pipeline_entry
from lego.cvfp.sections import PARAMS, ROOT_PARAMS, CvfpParams
from tests.conftest import ROOT
from tests.stages.conftest import code_deps, code_lines, names

STAGES = yaml.safe_load((ROOT / "stages/cvfp/dvc.yaml").read_text())["stages"]
BESIDES = {
    folder: yaml.safe_load((ROOT / f"stages/cvfp/{folder}/dvc.yaml").read_text())["stages"]
    for folder in ("baselines", "scaling", "trials")
}
ENTRIES = {f"cvfp/{name}": entry for name, entry in STAGES.items()}
ENTRIES |= {
    f"cvfp/{folder}/{name}": entry.get("do", entry) for folder, of in BESIDES.items() for name, entry in of.items()
}


def declared(entry: dict) -> list[str]:
    return [key for one in entry["params"] for keys in one.values() for key in keys]


@pytest.mark.parametrize("stage", ENTRIES)
def test_deps_equal_the_transitive_imports(stage):
    assert code_deps(ENTRIES[stage]) == code_lines(stage, guest=True)
    assert ENTRIES[stage]["cmd"].removesuffix(" ${key}") == f"python -m stages.{stage.replace('/', '.')}"


def test_tokenize_and_the_page_depend_on_both_files_with_a_section_data():
    for stage in ("tokenize", "report"):
        keys = {file: keys for one in STAGES[stage]["params"] for file, keys in one.items()}
        assert keys[ROOT_PARAMS.as_posix()] == ["data"]
        assert "data" in keys[PARAMS.as_posix()]
    others = [entry for name, entry in ENTRIES.items() if name not in ("cvfp/tokenize", "cvfp/report")]
    assert not any(ROOT_PARAMS.as_posix() in one for entry in others for one in entry["params"])


def test_every_section_is_declared_and_every_declared_key_exists():
    keys = {key for entry in ENTRIES.values() for key in declared(entry)}
    sections = {key.split(".")[0] for key in keys}
    assert sections == set(CvfpParams.model_fields)
    values = yaml.safe_load((ROOT / PARAMS).read_text())
    for key in {key.removesuffix(".${key}") for key in keys}:
        found = values
        for part in key.split("."):
            assert part in found, key
            found = found[part]


def test_a_peer_does_not_rerun_for_what_only_cvfp_reads():
    own, peers = (set(declared(BESIDES["baselines"][group]["do"])) for group in ("own", "peers"))
    assert own - peers == {"phase1", "predict", "contexts", "phase2", "contest.seed_sweeps", "contest.own.${key}"}
    assert peers - own == {"predict.epochs", "phase2.epochs", "peers", "contest.peers.${key}"}


def test_what_a_stage_reads_an_earlier_one_writes_and_timing_is_no_dependency():
    made: set[str] = set()
    for entry in STAGES.values():
        data = {dep for dep in entry["deps"] if dep.startswith(("data/", "metrics/"))}
        assert data <= made | {f"metrics/cvfp/{name}.json" for name in ("contest", "scaling", "trials")}
        assert not any("timing" in dep for dep in data)
        made |= set(names(entry["outs"]))


def test_what_no_stage_makes_is_in_git():
    tracked = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split())
    made = {name for entry in STAGES.values() for name in names(entry["outs"])}
    read = {dep for entry in STAGES.values() for dep in entry["deps"]}
    assert {dep for dep in read - made if Path(dep).suffix and not dep.startswith(("data/", "${"))} <= tracked


def reruns(key: str) -> list[str]:
    """Stages of the default pipeline that name a key."""
    return [
        stage
        for stage, entry in STAGES.items()
        if any(one in (key, key.split(".")[0]) for one in declared(entry)) and stage != "report"
    ]


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("data.vocab_size", ["tokenize"]),
        ("phase1.dist_reg_weight", ["train_phase1"]),
        ("phase1.convergence_threshold", ["train_phase1", "evaluate", "check_val_convergence"]),
        ("predict.lr", ["train_phase1"]),
        ("contexts.segments", ["build_contexts"]),
        ("phase2.lr", ["train_phase2"]),
        ("checks.lags", ["evaluate", "check_val_convergence"]),
    ],
)
def test_a_key_reruns_the_stages_that_read_it(key, stages):
    assert reruns(key) == stages


def test_fingerprints_follow_the_siblings_own_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages/cvfp").mkdir(parents=True)
    text = (ROOT / PARAMS).read_text()
    (tmp_path / PARAMS).write_text(text)
    first = {one: fingerprint(f"cvfp/baselines/peers@{one}") for one in ("gru", "lstm")}
    (tmp_path / PARAMS).write_text(re.sub(r"(    gru: )\S+", r"\g<1>5.0e-01", text, count=1))
    second = {one: fingerprint(f"cvfp/baselines/peers@{one}") for one in ("gru", "lstm")}
    assert first["gru"] != second["gru"]
    assert first["lstm"] == second["lstm"]
    assert pipeline_entry("cvfp/evaluate")["wdir"] == "../.."
