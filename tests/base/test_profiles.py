"""Profiles of the sibling systems: checked with their parameters, and printed as options of dvc exp run."""

from __future__ import annotations

import dataclasses

import pytest

from lego.cvfp import sections as cvfp
from lego.satipatthana import sections as satipatthana
from tests.conftest import ROOT


@pytest.fixture(params=[cvfp, satipatthana], ids=["cvfp", "satipatthana"])
def sibling(request, monkeypatch):
    monkeypatch.chdir(ROOT)
    return request.param.SIBLING


def test_main_checks_parameters_and_every_profile(sibling, tmp_path, capsys):
    assert sibling.main() == 0
    assert capsys.readouterr().out == sibling.load().model_dump_json(indent=2) + "\n"
    odd = tmp_path / "profiles.yaml"
    odd.write_text("odd: {seed: -1}\n")
    assert dataclasses.replace(sibling, named=odd).main() == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"{odd}: odd: seed must be at least 0\n")


def test_a_profile_is_printed_as_options_or_refused_in_one_line(sibling, tmp_path, capsys):
    odd = tmp_path / "profiles.yaml"
    odd.write_text("one: {seed: 3}\nodd: {seed: -1}\n")
    sibling = dataclasses.replace(sibling, named=odd)
    assert sibling.print_options(["one"]) == 0
    assert capsys.readouterr().out == f"-S {sibling.params}:seed=3\n"
    for arguments in ([], ["nothing"], ["one", "odd"]):
        assert sibling.print_options(arguments) == 1
        assert capsys.readouterr().err == "error: give one of the profiles sound, one, odd\n"
    assert sibling.print_options(["odd"]) == 1
    assert capsys.readouterr().err == f"error: {odd}: odd: seed must be at least 0\n"
