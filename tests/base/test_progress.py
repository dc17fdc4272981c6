"""Progress in plain lines, and shares with their base."""

from __future__ import annotations

from lego.base.progress import share, track


def test_progress_prints_plain_lines_at_intervals(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("lego.base.progress.time.monotonic", lambda: float(next(clock)))
    assert list(track(range(9), 9, "mining", "batch")) == list(range(9))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # every third step of 4 s passes 10 s
    assert lines[0] == "mining: 3/9 batch (33 %), 0.25batch/s, 00:24 left"
    assert list(track(iter(["a", "bc", "def"]), None, "reading", "token", size=len)) == ["a", "bc", "def"]
    assert capsys.readouterr().err.splitlines() == ["reading: 6 token, 0.50token/s"]


def test_shares_show_their_base():
    assert share(41_984, 80_256) == "52.3 % (41,984/80,256 tokens)"
