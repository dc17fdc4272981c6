"""YAML that users write, read so that nothing in it can take all memory: aliases may repeat, but not without end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_VALUES = 100_000  # with every alias written out; params.yaml has 200


class YamlError(ValueError):
    """Text that is not YAML, or is more than a file of parameters can be; the message names the line."""


class _Loader(yaml.SafeLoader):
    """YAML whose errors name their line, a date that does not exist among them."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (YamlError, yaml.YAMLError):
            raise
        except (ValueError, TypeError) as error:
            reason = str(error).split(";")[0].split(":")[0]
            raise YamlError(f"is not valid YAML at line {node.start_mark.line + 1} ({reason})") from None


class _OnceLoader(_Loader):
    """YAML that refuses what it otherwise lets pass: a key that is given twice, of which the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[str] = set()
        for number, key in enumerate(keys):
            if repr(key) in seen:
                line = node.value[number][0].start_mark.line + 1
                raise YamlError(f"{key} is given twice, again at line {line}; remove one")
            seen.add(repr(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, repeated_keys: bool = False) -> Any:
    """What a YAML file holds.

    Args:
        path: of the file.
        repeated_keys: whether a key may be given twice.

    Raises:
        YamlError: it is not valid, a key is given twice, or aliases repeat without end.
        OSError: it cannot be read.
    """
    try:
        loader = (_Loader if repeated_keys else _OnceLoader)(Path(path).read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise YamlError("is nested too deep; write it flat") from None
    except YamlError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        raise YamlError("is not valid YAML" + (f" at line {where.line + 1}" if where else "")) from None


def _measure(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node once every alias is written out; the same node is measured once."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # until it is known: an alias inside itself never ends
        below = 1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0)
        if isinstance(node, yaml.MappingNode):
            below += sum(_measure(key, known) + _measure(value, known) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            below += sum(_measure(value, known) for value in node.value)
        if below > MOST_VALUES:
            line = node.start_mark.line + 1
            raise YamlError(f"holds more than {MOST_VALUES:,} values at line {line}, aliases written out; shorten it")
        known[id(node)] = below
    return known[id(node)]
