"""The real pipeline through real dvc, tiny, in a temporary clone: reruns, experiments, diffs, determinism."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys

import pytest

from lego import load_model
from lego.base.artifacts import read_json, sha256
from lego.evaluation.metrics import MODEL_KEYS
from lego.text.corpus import SPLITS
from lego.tokens.blocks import PackedBlocks
from tests.conftest import Clone, ran, run_in_process
from tests.stages.conftest import ORDER, copy_of, outs, reruns
from tests.workflow import LINES


@pytest.fixture(scope="module")
def clone(reproduced, tmp_path_factory) -> Clone:
    clone = copy_of(reproduced, tmp_path_factory.mktemp("clone") / "of_it")
    clone.output = reproduced.with_suffix(".txt").read_text()
    clone.commit("the results")
    return clone


def recorded(clone: Clone) -> dict[str, str]:
    """Digest of every out as dvc.lock holds it."""
    import yaml

    lock = yaml.safe_load((clone.folder / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}


def test_all_outs_are_there_and_the_two_models_report_the_same_keys(clone):
    for stage in ORDER:
        for out in outs(stage):
            assert (clone.folder / out).exists(), out
    assert [path.name for path in (clone.folder / ".scratch").iterdir()] == ["locks"]
    routed, yardstick = (clone.json(f"metrics/details/{n}.json") for n in ("ashem", "shallow_continued"))
    assert set(routed) == set(yardstick) == set(MODEL_KEYS)
    assert routed["leaky"] is yardstick["leaky"] is False
    assert len((clone.folder / "data/curves/evaluate_routing.csv").read_text().splitlines()) >= 22
    assert re.search(r"ppl +[\d.]+ +[\d.]+", clone.output)  # printed last, the yardstick beside it
    assert ran(clone.output)[-1] == "evaluate_routing"
    timing = clone.json("data/timing/train_phase1.json")
    assert {"python_executable", "torch_version", "seconds", "trained_tokens_per_second"} <= set(timing)


def test_what_dvc_shows_fits_a_screen(clone):
    shown = clone.run("dvc", "metrics", "show").splitlines()
    assert len(shown) <= 25
    assert max(map(len, shown)) <= 200
    plots = json.loads(clone.run("dvc", "plots", "show", "--json").partition("\nDVC failed")[0])["data"]
    assert 2 <= len(plots) <= 10
    assert {"routing", "validation"} <= set(plots)
    assert len(clone.run("dvc", "dag", "evaluate_routing").splitlines()) < 60


def test_nothing_changed_nothing_runs(clone):
    assert ran(clone.run("dvc", "repro")) == []
    assert clone.run("dvc", "status", "dvc.yaml").strip().endswith("Data and pipelines are up to date.")


@pytest.mark.parametrize("linked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rot_that_dvc_does_not_see_is_named_and_what_is_said_brings_it_back(clone, linked):
    """Once in a file of its own, once in one that is the same as that in dvc's cache, under another name."""
    file = clone.folder / "data/phase1/model.safetensors"
    before = sha256(file.parent)
    if linked:
        shutil.rmtree(file.parent)
        clone.run("dvc", "checkout", "data/phase1")
    content, told = bytearray(file.read_bytes()), file.stat()
    content[-5] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    file.chmod(told.st_mode)
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert "up to date" in clone.run("dvc", "status", "train_phase1", "compute_threshold")
    output = clone.run("dvc", "repro", "--force", "--single-item", "compute_threshold", fails=True)
    said = re.search(
        r"error: data/phase1/model\.safetensors: is not as it was written; bring it back with: (.*?); or, ", output
    )
    assert said is not None, output
    clone.run("sh", "-c", said[1])
    assert sha256(file.parent) == before
    assert "up to date" in clone.run("dvc", "status", "dvc.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [("ashem.hard_example_ratio", "0.4"), ("ashem.phase2_lr", "3e-3"), ("evaluation.sweep_points", "31")],
)
def test_dry_runs_agree_with_the_table(clone, key, value):
    """dvc names the stages whose key changed, and with --force-downstream also those that may follow."""
    path = clone.folder / "params.yaml"
    text = path.read_text()
    try:
        path.write_text(re.sub(rf"(?m)^(  {key.split('.')[1]}: )\S+", rf"\g<1>{value}", text))
        assert path.read_text() != text
        direct, following = reruns(key)
        assert ran(clone.run("dvc", "repro", "--dry")) == direct
        assert ran(clone.run("dvc", "repro", "--dry", "--force-downstream")) == [
            stage for stage in ORDER if stage in direct + following
        ]
    finally:
        path.write_text(text)


@pytest.mark.slow
def test_phase_2s_rate_leaves_the_yardstick_alone_when_no_step_was_taken_more_or_less(clone):
    before = recorded(clone)
    output = clone.run("dvc", "exp", "run", "-S", "ashem.phase2_lr=1e-05")
    assert ran(output) == ["train_phase2", "evaluate_routing"]
    changed = {path for path, md5 in recorded(clone).items() if before[path] != md5}
    assert "data/phase2" in changed
    assert not changed & {"data/baseline/shallow_continued", "data/facts/added_macs.json", "data/hard"}
    assert "phase2_lr: 1e-05" in (clone.folder / "params.yaml").read_text()  # dvc's spelling, which YAML reads as text
    clone.run("git", "checkout", "-q", ".")
    clone.run("dvc", "checkout", "-q")


def test_an_experiment_reruns_what_it_affects_and_dvc_shows_the_difference(clone):
    output = clone.run("dvc", "exp", "run", "-S", "ashem.hard_example_ratio=0.3")
    direct, following = reruns("ashem.hard_example_ratio")
    assert ran(output) == [stage for stage in ORDER if stage in direct + following]
    # its second line says that no file was found of baselines that never ran
    difference = json.loads(clone.run("dvc", "metrics", "diff", "--json").splitlines()[0])
    routed = difference["metrics/summary.json"]
    assert routed["deep_ppl"]["new"] != routed["deep_ppl"]["old"]  # block 2 learned from other tokens
    assert set(difference) <= {"metrics/summary.json", "metrics/yardstick.json"}
    assert len(clone.run("dvc", "metrics", "diff").splitlines()) <= 20  # one screen says who is better
    changed = [line[3:] for line in clone.run("git", "status", "--short").splitlines()]
    assert len(changed) <= 8 + 1, changed  # and params.yaml, which the experiment changed
    line = next(line for line in LINES if line.startswith("dvc exp show")).removesuffix(" --md")
    shown = clone.run(*shlex.split(line), "--csv").splitlines()
    columns = set(shown[0].split(",")) - {"rev", "typ", "parent"}  # which are csv's
    assert columns >= {"Experiment", "metrics/summary.json:ppl", "ashem.hard_example_ratio"}
    assert len(columns) <= 16 + 1, columns
    assert not any("/" in one and ":" not in one for one in columns)  # no digests of files
    assert clone.json("data/facts/compute_threshold.json")["hard_share"] == pytest.approx(0.3, abs=0.001)
    changed = json.loads(clone.run("dvc", "params", "diff", "--json"))["params.yaml"]
    assert changed.keys() == {"ashem.hard_example_ratio"}
    assert (changed["ashem.hard_example_ratio"]["old"], changed["ashem.hard_example_ratio"]["new"]) == (0.7, 0.3)
    clone.run("git", "checkout", "-q", ".")
    clone.run("dvc", "checkout", "-q")
    assert ran(clone.run("dvc", "repro")) == []


@pytest.mark.slow
def test_a_temporary_experiment_says_what_it_does_not_see(clone):
    text = clone.folder / "text"
    for number in range(60):
        (text / f"{number}.txt").write_text(f"Text {number} has some words, and here are more of them. " * 100)
    command = ("dvc", "exp", "run", "--temp", "-S", "data.source=text")
    said = clone.run(*command, fails=True)
    assert "error: data.path text: 60 of 60 files are not in git, text/" in said
    clone.run("git", "add", "text")
    assert "are not in git" not in clone.run(*command, "tokenize")
    clone.run("git", "rm", "-rqf", "--cached", "text/*.txt")
    for file in text.glob("*.txt"):
        file.unlink()
    clone.run("git", "checkout", "-q", ".")


@pytest.mark.slow
def test_a_baseline_runs_alone_and_again_only_for_its_own_keys(clone):
    target = "stages/evidence/dvc.yaml:joint@grow_copy"
    assert f"Running stage '{target}'" in clone.run("dvc", "repro", "-s", target)
    path = clone.folder / "params.yaml"
    text = path.read_text()
    for name, reran in (("dense", False), ("grow_copy", True)):
        changed = re.sub(rf"(?s)(\n    {name}:.*?      lr: )\S+", r"\g<1>1.0e-05", text, count=1)
        assert changed != text
        path.write_text(changed)
        output = clone.run("dvc", "repro", "-s", target)
        assert (f"Running stage '{target}'" in output) == reran, name
    path.write_text(text)
    assert ran(clone.run("dvc", "repro")) == []
    clone.run("dvc", "checkout")  # what other baselines never made is not missed
    assert "ppl" in clone.run(
        sys.executable, "-m", "lego.compare", "metrics/details/ashem.json", "metrics/details/grow_copy.json"
    )


def test_data_travels_through_a_remote(clone, tmp_path):
    clone.run("git", "clone", "-q", str(clone.folder), str(tmp_path / "other"))
    other = Clone(tmp_path / "other")
    for one in (clone, other):
        one.run("dvc", "remote", "add", "--local", "-d", "storage", str(tmp_path / "storage"))
    clone.run("dvc", "push", "-q", "dvc.yaml")
    other.run("dvc", "pull", "-q", "dvc.yaml")
    for folder in ("data/tokens", "data/phase2", "data/routed"):
        assert sha256(other.folder / folder) == sha256(clone.folder / folder)
    assert ran(other.run("dvc", "repro")) == []


def test_a_bad_parameter_touches_no_result_and_what_dvc_removed_comes_back(clone):
    results = ("data/phase2/model.safetensors", "data/facts/compute_threshold.json", "dvc.lock")
    before = {path: (clone.folder / path).read_bytes() for path in results}
    path = clone.folder / "params.yaml"
    right = path.read_text()
    for remedy in ("correct it", "checkout"):
        path.write_text(re.sub(r"(?m)^(  hard_example_ratio: )\S+", r"\g<1>1.5", right))
        output = clone.run("dvc", "repro", fails=True)
        reason = "error: params.yaml: ashem.hard_example_ratio must be in (0, 1), got 1.5 (mend it and run the same"
        assert reason in output
        assert "Traceback" not in output
        assert not (clone.folder / "data/facts/compute_threshold.json").exists()  # dvc removes a stage's outs first
        if remedy == "checkout":
            clone.run("git", "checkout", "params.yaml", "dvc.lock", "metrics")
            clone.run("dvc", "checkout")
        else:
            path.write_text(right)
            assert ran(clone.run("dvc", "repro")) == []  # from dvc's run cache
        assert before == {path: (clone.folder / path).read_bytes() for path in before}


def test_a_second_run_gives_the_same_bytes_and_a_leaky_one_says_so(clone, tmp_path):
    """In another folder, in this process, without cache or lock: every out."""
    shutil.copy(clone.folder / "params.yaml", tmp_path / "params.yaml")
    run_in_process(tmp_path, ORDER)
    compared = 0
    for out in sorted(set().union(*(outs(stage) for stage in ORDER))):
        assert sha256(tmp_path / out) == sha256(clone.folder / out), out
        compared += 1
    assert compared == len(recorded(clone))
    digests = {f"{s}_sha256": read_json(tmp_path / "data/tokens/corpus.json")["splits"][s]["sha256"] for s in SPLITS}
    for stage in ORDER:
        assert digests.items() <= read_json(tmp_path / f"data/timing/{stage}.json").items()

    # the historical protocol: mined, and the threshold taken, where it is scored
    params = tmp_path / "params.yaml"
    text = params.read_text().replace("hard_split: train", "hard_split: validation")
    text = text.replace("branch_layer: -1", "branch_layer: null")
    params.write_text(text.replace("phase2_context: sequence", "phase2_context: token"))
    run_in_process(tmp_path, ORDER[2:])
    assert read_json(tmp_path / "data/facts/compute_threshold.json")["split"] == "validation"
    manifest = read_json(tmp_path / "data/hard/manifest.json")
    validation_tokens = PackedBlocks(tmp_path / "data/tokens", "validation").tokens
    assert (manifest["split"], manifest["tokens"]) == ("validation", validation_tokens)
    assert manifest["hard_tokens"] == pytest.approx(0.7 * validation_tokens, abs=1)
    made = {out for stage in ORDER[2:] for out in outs(stage) if out.endswith(".json")}
    gathered = "metrics/details/stages.json"
    assert len(written := made - {gathered}) == 10
    assert load_model(tmp_path / "data/phase2").block2_context == "token"
    assert all(read_json(tmp_path / out)["leaky"] is True for out in written)
    assert read_json(tmp_path / gathered)["compute_threshold"]["leaky"] is True


def test_the_lock_check_passes_a_fresh_clone_and_names_changed_code(clone, tmp_path):
    clone.run("git", "clone", "-q", str(clone.folder), str(tmp_path / "fresh"))
    fresh = Clone(tmp_path / "fresh")
    assert not (fresh.folder / "data").exists()
    fresh.run(sys.executable, ".ci/check_lock.py")
    with (fresh.folder / "lego/model/cost.py").open("a") as file:
        file.write("# changed")
    output = fresh.run(sys.executable, ".ci/check_lock.py", fails=True)
    assert "dvc.lock: train_phase1 changed deps lego/model: modified; run dvc repro and commit" in output
    assert "tokenize" not in output
