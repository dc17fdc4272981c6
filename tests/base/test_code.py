"""Which files a program consists of."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lego.base import code
from lego.base.code import code_of, imported
from tests.conftest import ROOT


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A package with a module for each way of importing."""
    texts = {
        "a": "import json\nimport p.b as c\nfrom p import d\nfrom p.e import thing\ndef f():\n import p.late\n",
        "b": "",
        "d": "import p.f",
        "e": "thing = 1",
        "f": "",
        "late": "x = 1",
        "unused": "",
        "relative": "from . import a",
    }
    (tmp_path / "p").mkdir()
    (tmp_path / "p/__init__.py").write_text("")
    for name, text in texts.items():
        (tmp_path / f"p/{name}.py").write_text(text)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    for cached in (imported, code_of):
        cached.cache_clear()
    yield
    for cached in (imported, code_of):
        cached.cache_clear()


def test_every_way_of_importing_is_followed_and_nothing_else(tree):
    assert [file.stem for file in code_of("p.a")] == ["a", "b", "d", "e", "f", "late"]


def test_what_cannot_be_followed_is_refused(tree):
    with pytest.raises(ValueError, match=r"relative\.py:1: a relative import"):
        code_of("p.relative")
    with pytest.raises(ValueError, match=r"p\.nothing\.deeper is no module"):
        code_of("p.nothing.deeper")


@pytest.mark.parametrize("module", ["stages.collect_hard", "stages.cvfp.trials.gather", "stages.evidence.report"])
def test_it_holds_whatever_python_loads(module):
    script = (
        f"import sys, json, stages\nbefore = set(sys.modules)  # which decides how threads wait\nimport {module}\n"
        "new = [name for name in {*sys.modules} - before if name.split('.')[0] in ('lego', 'stages')]\n"
        "print(json.dumps([sys.modules[name].__file__ for name in new]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {file for file in json.loads(done.stdout) if not file.endswith("__init__.py")}
    assert loaded <= {str(file) for file in code_of(module)}
