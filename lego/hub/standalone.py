"""The code of a routed model in one file that lies in its folder, for those who have transformers and not this package.

It is put together from this package's own sources whenever a model is saved, so the two cannot differ.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

STANDALONE = "modeling_lego.py"
AUTO_MAP = {
    "AutoConfig": "modeling_lego.LegoConfig",
    "AutoModel": "modeling_lego.LegoModel",
    "AutoModelForCausalLM": "modeling_lego.LegoForCausalLM",
}
PARTS: dict[str, tuple[str, ...]] = {  # what is taken of a source, in order; nothing named = all of it
    "hub/standalone.py": ("STANDALONE", "AUTO_MAP"),
    "model/stack.py": ("BLOCK2_CONTEXTS",),
    "model/losses.py": ("max_probability",),
    "model/exit_criteria.py": (
        *("max_prob", "margin", "entropy", "LOGIT_CRITERIA", "STATE_CRITERIA", "CRITERIA", "StateCriterion"),
        "features",
    ),
    "model/gate.py": ("SURE", "Gate"),
    "hub/configuration.py": (),
    "hub/llama_layers.py": (),
    "hub/backbone.py": (),
    "hub/calibration.py": (),
    "base/digests.py": ("of_tensors",),
    "hub/block_files.py": (),
    "hub/blocks.py": (),
    "hub/modeling.py": (),
}
FITTED, ON_FILES = ("StateCriterion", "Gate"), ("save", "load", "of")  # their methods that need the rest of the package
HEADER = '''"""A language model with an exit, for transformers: this file is all the code that it needs.

AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) runs it. Written by lego.hub.standalone when the
model was saved; change it there.
"""

from __future__ import annotations

'''
FOOTER = '''

def standalone_code() -> str:
    """This file: saved models take it along."""
    return Path(__file__).read_text(encoding="utf-8")
'''


@cache
def standalone_code() -> str:
    """Source of one module with LegoConfig, LegoModel and LegoForCausalLM that imports nothing of this package."""
    imports, code, was_wide = dict[str, tuple[str, str]](), "", False
    for file, wanted in PARTS.items():
        source = (Path(__file__).resolve().parents[1] / file).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports |= {} if file == "hub/standalone.py" else _imports(node)
            elif (names := _names(node)) and (not wanted or names & set(wanted)):
                wide = isinstance(node, ast.ClassDef | ast.FunctionDef)
                code += ("\n\n" if wide or was_wide else "") + _text(source.splitlines(), node) + "\n"
                was_wide = wide
    code += FOOTER
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    by_module = dict[str, list[str]]()
    for bound in sorted(used & imports.keys()):
        module, name = imports[bound]
        by_module.setdefault(module, []).append(name)
    lines = [f"import {name}\n" for name in by_module.pop("", [])]
    lines += [f"from {module} import {', '.join(names)}\n" for module, names in sorted(by_module.items())]
    return HEADER + "".join(lines) + "\n" + code


def _imports(node: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str]]:
    """What names stand for: a module, empty for modules themselves, and a name in it; none of this package's."""
    module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    if module.split(".")[0] in ("lego", "__future__"):
        return {}
    return {alias.asname or alias.name: (module, ast.unparse(alias)) for alias in node.names}


def _names(node: ast.stmt) -> set[str]:
    """What a statement at a module's top defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _text(lines: list[str], node: ast.stmt) -> str:
    """A definition's lines, its decorators' too, without methods that work on files."""
    left_out = set[int]()
    if isinstance(node, ast.ClassDef) and node.name in FITTED:
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name in ON_FILES:
                left_out |= set(range(_first(method) - 1, (method.end_lineno or 0) + 1))  # and the blank line before
    span = range(_first(node), (node.end_lineno or 0) + 1)
    return "\n".join(lines[number - 1] for number in span if number not in left_out)


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
