"""Two metrics files side by side: every key, changes by hand, and one sentence for what cannot be compared."""

from __future__ import annotations

import json

from lego.evaluation.compare import main


def write(folder, name, values):
    (folder / name).write_text(json.dumps(values))
    return str(folder / name)


def test_changes_are_of_the_second_file_against_the_first(tmp_path, capsys):
    left = write(tmp_path, "a.json", {"ppl": 80.0, "n": 5, "leaky": False, "threshold": None, "zero": 0.0})
    right = write(tmp_path, "b.json", {"ppl": 76.0, "n": 6, "leaky": True, "threshold": 0.5, "zero": 1.0, "only": 1.5})
    assert main([left, right]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["metric"] == ["a", "b", "change", "change", "%"]
    assert lines["ppl"] == ["80.0000", "76.0000", "-4", "-5.00"]
    assert lines["n"] == ["5", "6", "+1", "+20.00"]
    assert lines["leaky"] == ["False", "True", "-", "-"]
    assert lines["threshold"] == ["-", "0.5000", "-", "-"]
    assert lines["zero"] == ["0.0000", "1.0000", "+1", "-"]
    assert lines["only"] == ["-", "1.5000", "-", "-"]


def test_as_json(tmp_path, capsys):
    left, right = write(tmp_path, "a.json", {"ppl": 80.0}), write(tmp_path, "b.json", {"ppl": 76.0})
    assert main([left, right, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"metric": "ppl", "left": 80.0, "right": 76.0, "change": -4.0, "change_share": -0.05}
    ]


def test_files_of_one_name_are_told_apart(tmp_path, capsys):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    main([write(tmp_path / "x", "m.json", {"a": 1}), write(tmp_path / "y", "m.json", {"a": 2})])
    assert str(tmp_path / "x/m.json") in capsys.readouterr().out


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    flat = write(tmp_path, "a.json", {"ppl": 1.0})
    assert main([flat, str(tmp_path / "absent.json")]) == 1
    assert "absent.json" in capsys.readouterr().err
    assert main([flat, write(tmp_path, "criteria.json", {"test": {"max_prob": {"ppl": 1.0}}})]) == 1
    assert "is not flat" in capsys.readouterr().err
