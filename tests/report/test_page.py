"""The page loads nothing, escapes what it shows, says the same as its Markdown, and reads its pictures from itself."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from lego.report.page import Figure, Page
from lego.report.pictures import picture


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.shown = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in {"meta", "link", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown += data


@pytest.fixture
def page(tmp_path) -> Page:
    for name in ("one", "two"):
        with picture(tmp_path, name) as axes:
            axes.plot([1, 2], [3, 4])
    page = Page("A < B")
    page.heading("What & why")
    page.text("It is **better** by `1 < 2`, see [there](https://example.org/a).", lead=True)
    page.table(("model", "ppl"), [("a|b", "1.5"), ("<script>alert(1)</script>", "2")], "Some *models*")
    page.figure(Figure(tmp_path / "one.svg", 'a "line"', "rising"), tmp_path)
    page.figure(Figure(tmp_path / "two.png", "again", "rising"), tmp_path)
    page.points(["first", "second"])
    page.code("x < 1 & y")
    return page


def parsed(page: Page) -> Elements:
    elements = Elements()
    elements.feed(page.html())
    assert not elements.open
    return elements


def test_the_page_loads_nothing_from_elsewhere(page):
    for tag, attributes in parsed(page).found:
        assert tag not in {"script", "iframe", "object"}
        for key in ("src", "href", "srcset"):
            if key in attributes and tag != "a":
                assert attributes[key].startswith("data:")
    assert "@import" not in page.html()
    assert "url(" not in page.html()


def test_pictures_are_inside_and_whole(page, tmp_path):
    images = [attributes for tag, attributes in parsed(page).found if tag == "img"]
    assert [image["alt"] for image in images] == ['a "line"', "again"]
    for image, file in zip(images, ("one.svg", "two.png"), strict=True):
        assert base64.b64decode(image["src"].split(",")[1]) == (tmp_path / file).read_bytes()


def test_text_is_escaped_and_marked(page):
    elements = parsed(page)
    assert "<script>alert(1)</script>" in elements.shown
    assert ("strong", {}) in elements.found
    assert ("a", {"href": "https://example.org/a"}) in elements.found
    assert "1 < 2" in elements.shown


def test_it_can_be_read_by_keyboard_and_reader(page):
    elements = parsed(page)
    regions = [attributes for _, attributes in elements.found if attributes.get("role") == "region"]
    assert regions[0]["tabindex"] == "0"
    assert regions[0]["aria-label"] == "Some models"
    anchors = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    links = {attributes["href"] for tag, attributes in elements.found if tag == "a"}
    assert {f"#{anchor}" for anchor in anchors} <= links
    assert ("html", {"lang": "en"}) in elements.found


def test_markdown_says_the_same(page):
    text = page.markdown()
    assert text.startswith("# A < B\n")
    assert "| a\\|b | 1.5 |" in text
    assert "![again](two.png)" in text
    assert re.search(r"^- second$", text, re.M)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="2 cells"):
        Page("x").table(("a", "b"), [("1",)], "caption")


def test_pictures_have_the_same_bytes_for_the_same_numbers(page, tmp_path):
    (tmp_path / "again").mkdir()
    with picture(tmp_path / "again", "one") as axes:
        axes.plot([1, 2], [3, 4])
    for suffix in ("svg", "png"):
        assert (tmp_path / f"again/one.{suffix}").read_bytes() == (tmp_path / f"one.{suffix}").read_bytes()
