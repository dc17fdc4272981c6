"""Text of tokens one by one: what each adds to the text of all before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

UNFINISHED = "\ufffd"  # what decoders write for a part of a character


def spelled(decode: Callable[[list[int]], str], before: Sequence[int], new: Sequence[int]) -> list[str]:
    """The text that each new token adds after the tokens before; joined, they are the text of all new ones.

    A token alone may lack the space between it and its neighbour, or be a part of a character: its text then comes
    with the token that completes the character, and not at all if none does before the end.

    Args:
        decode: text of token ids.
        before: ids of the prompt.
        new: ids that follow.
    """
    ids = [*before, *new]
    whole = decode(ids).rstrip(UNFINISHED)
    ends = [_agreed(decode(ids[:end]), whole) for end in range(len(before), len(ids))] + [len(whole)]
    for number in range(1, len(ends)):  # a decoder that joins words may take back what it wrote
        ends[number] = max(ends[number - 1], ends[number])
    return [whole[start:end] for start, end in pairwise(ends)]


def _agreed(part: str, whole: str) -> int:
    """How much of the text of a part stands in the text of all of it."""
    for text in (part, part.rstrip(UNFINISHED)):
        if whole.startswith(text):
            return len(text)
    pairs = zip(part, whole, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(part), len(whole)))
