"""Documents cut into parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lego.text.corpus import Document
from lego.text.parts import SIZES, parts, pieces


@given(st.text(max_size=400), st.integers(2, 60))
def test_parts_are_the_text_and_none_is_longer(text, size):
    found = list(pieces(text, size))
    assert "".join(found) == text
    assert all(0 < len(part) <= size for part in found)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a b c\n\nd e f g h\ni j k", "a b c\n\n"),  # a paragraph before a line
        ("aaaa bbb\ncc dddd eee ff", "aaaa bbb\n"),  # a line before a word
        ("aaaa bbb ccc dddd eee", "aaaa bbb "),
        ("吾輩は猫である。名前はまだ無い。", "吾輩は猫である。"),
        ("a" * 30, "a" * 10),
    ],
)
def test_a_part_ends_where_the_text_does(text, first):
    assert next(pieces(text, 10)) == first


def test_every_part_has_a_name_and_a_split_of_its_own():
    found = list(parts([Document("a", "g", "x" * 300), Document("b", "g", "y" * 100)], SIZES[-1]))
    assert [(one.name, len(one.text)) for one in found] == [("a#0", 125), ("a#1", 125), ("a#2", 50), ("b#0", 100)]
    assert all(one.group == one.name for one in found)
