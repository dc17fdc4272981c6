"""No file that is read runs code: every call that could says that it must not."""

from __future__ import annotations

import ast

from tests.conftest import ROOT

READERS = {"from_pretrained", "load_dataset", "get_config_dict", "from_config", "pipeline"}


def test_every_reader_of_others_files_refuses_their_code():
    seen = 0
    for folder in ("lego", "stages", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in READERS:
                    continue
                told = {one.arg: ast.unparse(one.value) for one in node.keywords}
                if ast.unparse(node.func).startswith(("super()", "LegoConfig.")):
                    continue  # transformers' own work for our class, whose code is here
                from_room = told.get(None) == "told"  # the keywords of lego.base.given.where_from, which hold it
                assert from_room or told.get("trust_remote_code") == "False", f"{file}:{node.lineno}"
                seen += 1
    assert seen >= 6
