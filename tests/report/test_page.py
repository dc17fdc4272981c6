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


LINKS = {
    "[a](https://x.org/b_c?d=e&f=1)": True,
    "[a](http://x.org)": True,
    "[a](#part)": True,
    "[a](data/curve.csv)": True,
    "[a](../x.md#b)": True,
    "[a](javascript:alert(1))": False,
    "[a](JavaScript:x)": False,
    "[a](java&#x73;cript:x)": False,
    "[a](data:text/html;base64,PHM+)": False,
    "[a](vbscript:x)": False,
    "[a](file:///etc/passwd)": False,
    "[a](//evil.org)": False,
    "[a](mailto:a@b.c)": False,
    "[a](java\x01script:x)": False,
}


@pytest.mark.parametrize("text", LINKS)
def test_a_link_leads_to_the_web_or_into_the_page_or_beside_it(text):
    page = Page("links")
    page.text(text)
    shown = Elements()
    shown.feed(page.html())
    targets = [at["href"] for tag, at in shown.found if tag == "a"]
    assert all(re.match(r"https?://|[^:]*$|[^:]*#", target) for target in targets)
    kept = text in page.markdown()
    assert (kept, LINKS[text]) in ((True, True), (False, False))
    if LINKS[text]:
        assert targets == [re.search(r"\((.*)\)", text)[1]]
    else:
        assert "](" not in page.markdown()


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("<img src=x onerror=y>", "&lt;img src=x onerror=y>"),
        ("&lt;b&gt; & co", "&amp;lt;b&amp;gt; & co"),
        ("![p](http://tracker/x.png)", r"\![p](http://tracker/x.png)"),
        ("[a]( javascript:x)", r"[a\]( javascript:x)"),
        ('[a](javascript:x "t")', r'[a\](javascript:x "t")'),
        ("[a][b]", r"[a\][b]"),
        ("[b]: javascript:x", r"\[b]: javascript:x"),
        ("# no heading", r"\# no heading"),
        ("one\n\n# two", "one  # two"),
        ("__init__ and ~~x~~", r"\__init_\_ and \~~x\~~"),
        ("`<b>` 1 < 2, a_b, [0, 1]: *so* **be** it", "`<b>` 1 < 2, a_b, [0, 1]: *so* **be** it"),
    ],
)
def test_markdown_is_escaped_as_the_page_is(text, markdown):
    page = Page("t")
    page.text(text)
    assert page.markdown() == f"# t\n\n{markdown}\n"
    page = Page(text.splitlines()[0])
    page.heading(text)
    page.points([text])
    page.table(["name", "value"], [[text, "a | b"], ["c", r"x\|y"]], text)
    page.code("```\nclosed?")
    rows = page.markdown().split("\n")
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows if row.startswith("| "))
    assert "````\n```\nclosed?\n````" in page.markdown()
    outside = re.sub(r"`[^`\n]*`", "", page.markdown())
    assert not re.search(r"<[A-Za-z/!]|!\[p\]|^\[b\]:", outside.replace(r"\![", ""), re.M)
