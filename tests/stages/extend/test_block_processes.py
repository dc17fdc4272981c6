"""The processes in which a block's stages run: how they end, and what is said then."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lego.base.harness import StageError
from stages.extend import block
from stages.extend.settings import FILE
from tests.conftest import ROOT


def test_a_stage_that_fails_is_named(tmp_path, capfd):
    shutil.copy(FILE, tmp_path)
    with pytest.raises(StageError, match=r"block second_pass: stages\.nowhere failed, and says why above"):
        block.run("stages.nowhere", tmp_path, "second_pass")
    assert "nowhere" in capfd.readouterr().err


@pytest.mark.slow
def test_a_block_that_is_stopped_stops_its_stage(tmp_path):
    (tmp_path / "slow.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    code = f"from stages.extend import block, here\nhere.__file__ = {str(tmp_path / 'slow.py')!r}\n"
    code += f"block.run('stages.tokenize', {str(tmp_path)!r}, 'second_pass')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as outer:
        inner = int(outer.stdout.readline())
        outer.terminate()
        assert outer.wait(timeout=30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{inner}").exists()


def test_a_stage_that_memory_ended_is_named(monkeypatch, tmp_path):
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(block.here, "__file__", str(tmp_path / "killed.py"))
    with pytest.raises(StageError, match=r"tokenize was ended by signal 9; if memory ran out, lower train\.batch_size"):
        block.run("stages.tokenize", tmp_path, "second_pass")
