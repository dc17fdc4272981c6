"""stages/extend/dvc.yaml: the root's stages as the root declares them, and its own as their code reads and writes."""

from __future__ import annotations

import re

import pytest
import yaml

from lego.base.parameter_files import ParamsError
from lego.base.params import load_params
from stages.extend.settings import FILE, STAGES, load_settings, write_params
from tests.conftest import ROOT
from tests.stages.conftest import ORDER, PIPELINE, code_lines, names

FOLDER = ROOT / "stages/extend"
ENTRIES = yaml.safe_load((FOLDER / "dvc.yaml").read_text())["stages"]
OF_ROOT = ORDER[:5]  # to train_phase2
OWN = ["base", "route", "retention", "rival", "evaluate", "block", "report"]


def entry_of(name: str) -> dict:
    return ENTRIES[name].get("do", ENTRIES[name])


def here(path: str) -> str:
    """A path of the root as this folder sees it."""
    return f"../../{path}" if path.startswith(("lego/", "stages/")) else path.replace("${data", "${root.data")


@pytest.mark.parametrize("name", OF_ROOT)
def test_the_roots_stages_are_declared_as_there(name):
    root, mine = PIPELINE[name], ENTRIES[name]
    deps = [*map(here, root["deps"])]
    if name in ("tokenize", "train_phase1"):
        deps.append("data/base")  # model.init_from, which the root's may take from anywhere
    assert sorted(mine["deps"]) == sorted(deps)
    assert mine["params"] == [{"extend.yaml": [f"root.{key}" for key in root["params"]]}]
    assert (names(mine["outs"]), mine["desc"]) == (names(root["outs"]), root["desc"])
    assert mine["cmd"] == f"python here.py stages.{name}"


def test_nothing_is_cached_which_dvc_checkout_would_miss_where_it_never_ran():
    outs = [out for name in ENTRIES for out in entry_of(name)["outs"]]
    assert all(list(out.values()) == [{"cache": False}] for out in outs)


def test_there_are_these_stages_and_no_other():
    assert list(ENTRIES) == ["base", *OF_ROOT, *OWN[1:]]
    assert set(STAGES) == {name for name in ENTRIES if "do" not in ENTRIES[name]} | {"default"}


@pytest.mark.parametrize("name", OWN)
def test_deps_are_the_code_that_runs(name):
    entry = entry_of(name)
    own = {dep for dep in entry["deps"] if not dep.startswith(("data/", "metrics/"))}
    wanted = {line.removeprefix("stages/extend/") for line in code_lines(f"extend/{name}")}
    assert own == {here(line) for line in wanted} | {"here.py"}
    assert entry["cmd"].startswith(f"python here.py stages.extend.{name}")


@pytest.mark.parametrize("name", OWN)
def test_every_file_read_is_a_dep_and_every_file_written_an_out(name):
    source = (FOLDER / f"{name}.py").read_text()
    found = re.findall(r'(?<!work / )(?<!work / f)"((?:data|metrics)/[\w./{}]+)"', source)  # work: a folder of its own
    mentioned = {path.replace("{name}", "${key}") for path in found} - {"data/timing", "data/memory"}
    entry = entry_of(name)
    known = {*entry["deps"], *names(entry["outs"])}
    for path in mentioned:
        assert any(path == one or path.startswith(one + "/") or one.startswith(path) for one in known), path


def test_the_roots_stages_read_what_extend_yaml_gives_them(tmp_path):
    settings = load_settings(FILE)
    write_params(settings, tmp_path / "params.yaml")
    params = load_params(tmp_path / "params.yaml")
    assert params == settings.root
    assert params.model.init_from == "data/base"
    assert params.ashem.phase1_epochs == 0
    assert "extend.yaml" in (tmp_path / "params.yaml").read_text().splitlines()[0]


def test_the_settings_name_the_rivals_that_are_asked_for():
    assert {"lora_8", "lora_32", "full", "last_layers", "new_layers"} <= set(load_settings(FILE).rivals)


@pytest.mark.parametrize(
    ("rivals", "said"),
    [
        ([], "rivals must name at least one, got none"),
        (
            ["evaluate"],
            "rivals must have names of letters a-z, digits and _, at most 64 and none a stage's, got 'evaluate'",
        ),
        (["train_phase2"], "none a stage's, got 'train_phase2'"),
        (["x" * 65], "at most 64 and none a stage's, got 'xxxx"),
        (["../x"], "rivals must have names of letters a-z, digits and _, at most 64 and none a stage's, got '../x'"),
    ],
)
def test_rivals_have_names_that_files_can_have(rivals, said, tmp_path):
    settings = yaml.safe_load(FILE.read_text())
    settings["rivals"] = dict.fromkeys(rivals, settings["rivals"]["lora_8"])
    (tmp_path / "extend.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ParamsError, match=re.escape(said)):
        load_settings(tmp_path / "extend.yaml")


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (
            {"wide": {"model.dim": 64}},
            "blocks.wide: model.dim decides what all blocks share; change it under root instead",
        ),
        ({"wide": {"ashem": {"phase2_share": 0.5}}}, "blocks.wide: ashem.phase2_share decides what all blocks share"),
        ({"deep": {"ashem.phase3_layers": 3}}, "blocks.deep: ashem.phase3_layers is no key of extend.yaml's root"),
        ({"deep": {"ashem.branch": "half"}}, "blocks.deep: ashem.branch"),
        ({"full": {"seed": 1}}, "blocks and rivals must have different names, both have 'full'"),
        (
            {"default": {"seed": 1}},
            "blocks must have names of letters a-z, digits and _, at most 64 and none a stage's, got 'default'",
        ),
    ],
)
def test_a_block_changes_what_is_its_own(blocks, said, tmp_path):
    settings = yaml.safe_load(FILE.read_text()) | {"blocks": blocks}
    (tmp_path / "extend.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ParamsError, match=re.escape(said)):
        load_settings(tmp_path / "extend.yaml")


def test_a_blocks_parameters_are_roots_but_for_its_changes(tmp_path):
    settings = yaml.safe_load(FILE.read_text()) | {"blocks": {"one": {"seed": 3, "ashem": {"branch": "lora"}}}}
    (tmp_path / "extend.yaml").write_text(yaml.safe_dump(settings))
    found = load_settings(tmp_path / "extend.yaml")
    expected = found.root.model_dump() | {"seed": 3}
    expected["ashem"]["branch"] = "lora"
    assert found.of_block("one").model_dump() == expected
    settings["root"]["ashem"]["phase1_epochs"] = 1
    (tmp_path / "extend.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ParamsError, match="seed decides what all blocks share"):  # where phase 1 has learned from it
        load_settings(tmp_path / "extend.yaml")
