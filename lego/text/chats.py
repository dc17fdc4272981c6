"""Cells that hold a text, or a chat in one of the shapes that are in use."""

from __future__ import annotations

from collections import Counter
from typing import Any

WHO = ("role", "from", "speaker", "author")
WHAT = ("content", "value", "text")
TYPES_OF_SPEAKERS = {"human", "ai", "system", "user", "assistant", "tool"}
CALLS = ("tool_calls", "function_call")
IMAGES = ("image", "input_image", "audio", "input_audio", "video", "input_video", "file", "input_file")
NO_TEXT = (*IMAGES, "tool_use", "tool_call", "function_call")  # beginnings of `type`
MOST_NESTED = 20


class ShapeError(ValueError):
    """A chat of no known shape; the message is what it is made of."""


class NestedError(ValueError):
    """Lists within lists beyond any chat."""


def joined(value: Any, depth: int = 0) -> str:
    """A text; a chat, its turns joined by blank lines; "" where there is none.

    A turn says in one of WHO who speaks and in one of WHAT what; that may be a list of parts of which those of text
    count. A turn without content, such as one that calls a tool, and a part that is an image or a file are left out.

    Raises:
        ShapeError: it is nothing of the kind.
        NestedError: it is nested more than MOST_NESTED deep.
    """
    if depth > MOST_NESTED:
        raise NestedError
    match value:
        case None:
            return ""
        case str():
            return value
        case list():
            turns = [joined(turn, depth + 1) for turn in value]
            return "\n\n".join(turn for turn in turns if turn)
        case dict() if any(isinstance(value.get(key), list) for key in WHO):
            return joined(_turns(value), depth)
        case dict():
            return _turn(value, depth)
    raise ShapeError(type(value).__name__)


def _turns(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a chat that is kept by columns, as `datasets` keeps sequences of dicts."""
    if not all(isinstance(column, list) for column in columns.values()) or len(set(map(len, columns.values()))) > 1:
        raise ShapeError(_keys(columns))
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]


def _turn(turn: dict[str, Any], depth: int) -> str:
    kind = str(turn.get("type") or "")
    if kind.startswith(NO_TEXT):
        return ""
    held = [turn[key] for key in WHAT if turn.get(key) is not None]
    if not held and not any(key in turn for key in WHAT + CALLS):
        raise ShapeError(_keys(turn))
    try:
        content = next((text for text in (joined(one, depth + 1) for one in held) if text), "")
    except ShapeError as error:
        raise ShapeError(f"{_keys(turn)} ({error})") from None
    who = next((turn[key] for key in WHO if isinstance(turn.get(key), str)), None)
    who = who or (kind if kind in TYPES_OF_SPEAKERS else None)
    return f"{who}: {content}" if who and content else content


def _keys(turn: dict[str, Any]) -> str:
    return " ".join(", ".join(map(str, turn)).split())[:200] or "no key"


def told(shapes: Counter[str]) -> str:
    """Counts of shapes as a part of a sentence, the most frequent ones first."""
    parts = [f"{count:,} with {shape[:300]}" for shape, count in shapes.most_common(5)]
    return "; ".join(parts) + (f"; {len(shapes) - 5} other shapes" if len(shapes) > 5 else "")
