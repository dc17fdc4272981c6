"""What comes from outside: YAML that would fill the memory, patterns that never end, and what a terminal would obey."""

from __future__ import annotations

import os
import re
import time

import pytest

from lego.base.outside import RATIO, ROOM, allowed, encodable, other_separator, printable, special
from lego.base.parameter_files import ParamsError
from lego.base.params import load_params, main
from lego.base.patterns import LinePattern, SlowPatternError, compiled
from lego.base.profiles import read_profiles
from lego.base.yaml_files import YamlError, read_yaml
from tests.conftest import ROOT

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LAUGHS, r"params\.yaml: holds more than 100,000 values at line \d, aliases written out; shorten it"),
        (MERGED, r"params\.yaml: holds more than 100,000 values at line \d"),
        ("a: &a [*a]\n", r"params\.yaml: holds more than 100,000 values at line 1"),
        (f"a: &a {'x' * 200_000}\nb: [{', '.join(['*a'] * 60)}]\n", r"params\.yaml: holds more than 100,000 values"),
        ("a: " + "[" * 5000 + "]" * 5000, r"params\.yaml: is nested too deep; write it flat"),
        (
            f"seed: 0\ndata: {'9' * 5000}\n",
            r"params\.yaml: is not valid YAML at line 2 \(Exceeds the limit \(4300 dig",
        ),
        ("seed: 2026-13-45\n", r"params\.yaml: is not valid YAML at line 1 \(month must be in 1\.\.12"),
        ("? [a]\n: 1\n", r"params\.yaml: is not valid YAML"),
    ],
    ids=["laughs", "merges", "itself", "long text", "deep", "huge number", "no such date", "list as key"],
)
def test_yaml_that_cannot_be_parameters_is_one_sentence_and_soon(tmp_path, text, sentence):
    (tmp_path / "params.yaml").write_text(text)
    before = time.process_time()
    with pytest.raises(ParamsError, match=sentence) as caught:
        load_params(tmp_path / "params.yaml")
    assert time.process_time() - before < 5
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    with pytest.raises(ParamsError, match=r"cannot be read|must hold"):
        read_profiles(tmp_path / "params.yaml")


def test_aliases_that_repeat_a_little_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2026-01-02}\nb: *a\nc: {<<: *a, x: 2}\n")
    assert read_yaml(tmp_path / "a.yaml", repeated_keys=True)["c"]["x"] == 2
    (tmp_path / "a.yaml").write_text("a: 1\na: 2\n")
    assert read_yaml(tmp_path / "a.yaml", repeated_keys=True) == {"a": 2}
    with pytest.raises(YamlError, match="a is given twice, again at line 2; remove one"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("  path: 2026-01-02", "data.path must be text, got 2026-01-02; put it in quotes"),
        ("  column: 3", "data.column must be text, got 3; put it in quotes"),
        (f"  vocab_size: 0x{'f' * 6000}", "data.vocab_size must be at most 16,777,216, got a number beyond all use"),
        (f"  column: [{'x, ' * 900}x]", "'x', 'x', 'x',..."),
    ],
)
def test_a_wrong_value_is_shown_as_it_was_written_and_not_at_any_length(tmp_path, line, sentence):
    text = (ROOT / "params.yaml").read_text()
    key = line.split(":")[0]
    (tmp_path / "params.yaml").write_text(re.sub(rf"(?m)^{key}: .*$", line, text))
    with pytest.raises(ParamsError) as caught:
        load_params(tmp_path / "params.yaml")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("([", "unterminated character set"),
        ("a{99999999999999999999}", "too"),
        ("((((a{1000}){1000}){1000}){1000})", "its repetitions are too many; write"),
        ("(" + "(" * 9 + "a" + "){9}" * 9 + ")", "its repetitions are too many; write"),
        ("a{1000000}", "its repetitions are too many; write"),
        ("(" * 5000 + ")" * 5000, "its parentheses are nested too deep"),
    ],
)
def test_a_pattern_that_cannot_be_compiled_is_named_at_once(pattern, reason):
    before = time.process_time()
    with pytest.raises(ValueError, match=reason):
        compiled(pattern)
    assert time.process_time() - before < 2


def test_usual_patterns_are_taken():
    for pattern in (r" = [^=]", r"\d{4}-\d{2}-\d{2} \d{2}:\d{2}", r"[]{9999}]", r"\{99999999\}", ".{0,80}x.{0,80}", ""):
        assert compiled(pattern)


def test_lines_match_without_their_ends_unless_the_pattern_spells_one():
    assert [LinePattern("= . =$").matches(line) for line in ("= 1 =", "= 1 =\n", "= 1 =\r\n", "= 1 = \n")] == [
        True,
        True,
        True,
        False,
    ]
    assert [LinePattern("^$").matches(line) for line in ("\n", "\r\n", "", "a\n")] == [True, True, True, False]
    assert [LinePattern(r"a\r?\n").matches(line) for line in ("a\n", "a\r\n", "a")] == [True, True, False]
    assert LinePattern(r"\w+:\Z").matches("naïve:\r\n")


@pytest.mark.parametrize("lines", [["a" * 60 + "!"], ["a" * 24 + "!"] * 3000], ids=["one line", "many lines"])
def test_a_pattern_that_tries_all_ways_is_stopped(lines, monkeypatch):
    monkeypatch.setattr("lego.base.patterns.SECONDS", 0.5)
    slow, before = LinePattern("(a|aa)+$"), time.process_time()
    with pytest.raises(SlowPatternError):
        for line in lines:
            slow.matches(line)
    assert time.process_time() - before < 5


def test_what_a_terminal_would_obey_is_spelled_out():
    assert printable("a\x1b[31m\r\tb\n\x00\x9b\x7fé☕日") == "a\\x1b[31m\\x0d\tb\n\\x00\\x9b\\x7fé☕日"
    assert encodable("é☕", "latin-1") == "é\\u2615"
    assert encodable("é☕", "ascii") == "\\xe9\\u2615"
    assert encodable("é\udc80", None) == "é\\udc80"


def test_a_key_of_control_characters_is_spelled_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "params.yaml").write_text('"\\e[31mred": 1\n')
    monkeypatch.chdir(tmp_path)
    assert main() == 1
    assert "params.yaml: \\x1b[31mred is not a known key" in capsys.readouterr().err


def test_what_is_no_file_is_told_apart(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    found = [special(path) for path in (tmp_path / "pipe", tmp_path / "file", tmp_path)]
    assert found == ["a pipe", None, None]
    assert [other_separator(one) for one in ("a;b", "a\tb", "a|b", "a,b;c", "a")] == [
        "semicolons",
        "tabs",
        "bars",
        None,
        None,
    ]
    both = "id;title, long;text"
    assert [other_separator(both), other_separator(both, ["text"])] == [None, "semicolons"]
    assert [other_separator("a,b;c\r\n", ["b;c"]), other_separator("text", ["text"])] == [None, None]
    assert [other_separator('"a;b"', ["a;b"]), other_separator("a;" * 200_000, ["b"])] == [None, "semicolons"]
    assert (allowed(1), allowed(2**30)) == (ROOM, RATIO * 2**30)
