"""A report as one HTML file that opens offline, in light and dark and on a phone, and the same as Markdown."""

from __future__ import annotations

import base64
import html
import platform
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from lego.base.artifacts import atomic_folder, write_text
from lego.base.harness import RECORDED_PACKAGES

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --back: #fdfdfc; --line: #d5d3cc; --soft: #6a6a64; --link: #0b5cad;
  --mark: #eef3f8; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e4de; --back: #17181a; --line: #3a3c40; --soft: #a3a29b;
  --link: #7db7f0; --mark: #22272d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 17px/1.55 system-ui, sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
a { color: var(--link); }
a:focus-visible, .scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
nav ul { columns: 2; padding-left: 1.2rem; } @media (max-width: 40rem) { nav ul { columns: 1; } }
.lead { background: var(--mark); padding: .9rem 1.1rem; border-left: 4px solid var(--link); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid var(--line); }
caption, figcaption { color: var(--soft); font-size: .9rem; text-align: left; padding: .3rem 0; }
figure { margin: 1.5rem 0; }
figure img { width: 100%; min-width: 34rem; height: auto; background: #fff; border-radius: 4px; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; } pre { overflow-x: auto; white-space: pre-wrap; }
"""

LINK = r"\[([^\]]+)\]\(([^)\s]+)\)"


@dataclass(frozen=True)
class Figure:
    """A picture with its text for those who do not see it; `file` is an SVG or PNG."""

    file: Path
    alt: str
    caption: str


@dataclass
class Page:
    """Builds a report part by part; text may hold **bold**, *emphasis*, `code` and [links](url).

    Args:
        title: of the page.
    """

    title: str
    parts: list[tuple[str, str]] = field(default_factory=list)  # HTML and Markdown of each
    headings: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.headings.append(text)
        self.parts.append((f'<h2 id="{_anchor(text)}">{html.escape(text)}</h2>', f"## {_markdown(text)}"))

    def text(self, text: str, lead: bool = False) -> None:
        """A paragraph; `lead` sets it off, for the answer."""
        kind = ' class="lead"' if lead else ""
        shown = _markdown(text)
        self.parts.append((f"<p{kind}>{_inline(text)}</p>", f"**{shown}**" if lead and "**" not in text else shown))

    def points(self, items: Sequence[str]) -> None:
        """A list."""
        listed = "".join(f"<li>{_inline(item)}</li>" for item in items)
        self.parts.append((f"<ul>{listed}</ul>", "\n".join(f"- {_markdown(item)}" for item in items)))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
        """A table whose first column names the row; on a narrow screen it scrolls by itself.

        Raises:
            ValueError: a row is not as long as the header.
        """
        if any(len(row) != len(header) for row in rows):
            raise ValueError(f"each row of {caption!r} must have {len(header)} cells")
        head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in header)
        body = "".join(_row(row) for row in rows)
        label = html.escape(re.sub(r"[*`]", "", caption), quote=True)
        shown = (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{_inline(caption)}'
            f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (header, *rows)]
        rule = "|---" + "|---:" * (len(header) - 1) + "|"
        self.parts.append((shown, "\n".join([lines[0], rule, *lines[1:], "", _markdown(caption)])))

    def figure(self, figure: Figure, relative_to: Path) -> None:
        """A picture, inside the HTML file; Markdown links to it as seen from the folder `relative_to`."""
        kind = "svg+xml" if figure.file.suffix == ".svg" else "png"
        data = base64.b64encode(figure.file.read_bytes()).decode()
        alt = html.escape(figure.alt, quote=True)
        shown = (
            f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{alt}">'
            f'<img alt="{alt}" src="data:image/{kind};base64,{data}"></div>'
            f"<figcaption>{_inline(figure.caption)}</figcaption></figure>"
        )
        link = figure.file.relative_to(relative_to).as_posix()
        alt = re.sub(r"[\[\]]", r"\\\g<0>", _markdown(figure.alt))
        self.parts.append((shown, f"![{alt}]({quote(link)})\n\n{_markdown(figure.caption)}"))

    def code(self, text: str) -> None:
        self.parts.append((f"<pre><code>{html.escape(text)}</code></pre>", _fenced(text)))

    def html(self) -> str:
        """The whole page; it loads nothing."""
        links = "".join(f'<li><a href="#{_anchor(text)}">{html.escape(text)}</a></li>' for text in self.headings)
        title = html.escape(self.title)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style></head>\n<body><main><h1>{title}</h1>\n"
            f'<nav aria-label="contents"><ul>{links}</ul></nav>\n'
            + "\n".join(shown for shown, _ in self.parts)
            + "\n</main></body></html>\n"
        )

    def markdown(self) -> str:
        return "\n\n".join([f"# {_markdown(self.title)}", *(text for _, text in self.parts)]) + "\n"

    def write(self, folder: str | Path) -> None:
        """report.html and report.md."""
        write_text(Path(folder) / "report.html", self.html())
        write_text(Path(folder) / "report.md", self.markdown())


def drawn(pictures: Path, draw: Callable[[Path], dict[str, Figure]]) -> dict[str, Figure]:
    """Figures by name, their files published together.

    Args:
        pictures: the folder that they get.
        draw: writes into the folder it is given, and returns the figures that lie there.
    """
    with atomic_folder(pictures, digests=False) as folder:
        figures = draw(folder)
    return {name: replace(figure, file=pictures / figure.file.name) for name, figure in figures.items()}


def versions() -> list[str]:
    """A line for Python and each package whose version can change numbers."""
    return [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in RECORDED_PACKAGES)]


def _row(cells: Sequence[str]) -> str:
    name, *others = (_inline(cell) for cell in cells)
    return f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _inline(text: str) -> str:
    """HTML of a line of text with **bold**, *emphasis*, `code` and [links](url)."""
    shown = html.escape(text)
    pieces = re.split(r"`([^`]+)`", shown)  # every other one is code, in which nothing is marked
    for number in range(0, len(pieces), 2):
        marked = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", pieces[number])
        marked = re.sub(r"\*([^*\s][^*]*)\*", r"<em>\1</em>", marked)
        pieces[number] = re.sub(LINK, lambda found: _link(found[1], found[2]), marked)
    return "".join(f"<code>{piece}</code>" if n % 2 else piece for n, piece in enumerate(pieces))


def _link(text: str, target: str) -> str:
    """A link of HTML that is escaped already, or its text alone if the target is not one that a page may have."""
    return f'<a href="{target}">{text}</a>' if _allowed(html.unescape(target)) else text


def _allowed(target: str) -> bool:
    """Whether a link leads to the web, into the page, or to a file beside it; never to a script or another scheme."""
    plain = "".join(letter for letter in target if unicodedata.category(letter)[0] != "C")  # browsers skip these
    if plain != target or target.startswith(("//", "/", "\\")):
        return False
    scheme = re.match(r"[^/?#]*?:", target)
    return scheme is None or target.lower().startswith(("https://", "http://"))


def _markdown(text: str) -> str:
    """A line of Markdown that shows what `_inline` shows: no HTML is in it, and no link but those that are allowed."""
    pieces = re.split(r"`([^`]+)`", " ".join(text.splitlines()))  # every other one is code, in which nothing is marked
    for number in range(0, len(pieces), 2):
        parts = re.split(f"({LINK})", pieces[number])  # plain, link, its text, its target, plain, ...
        shown = [_plain(parts[0])]
        for _, said, target, plain in zip(*(parts[n::4] for n in range(1, 5)), strict=True):
            allowed = _allowed(html.unescape(target))
            shown += [f"[{_plain(said)}]({target})" if allowed else _plain(said), _plain(plain)]
        pieces[number] = "".join(shown)
    line = "".join(f"`{piece}`" if number % 2 else piece for number, piece in enumerate(pieces))
    return re.sub(r"^(?=[#>]|[-+*] |={3,}|-{3,}|\[[^\]]*\]:)", r"\\", line)


def _plain(text: str) -> str:
    """Markdown of text that is neither code nor link: what only Markdown would take for a mark is text."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"\](?=[(\[])", r"\\]", text)  # a link with a title, a link by name
    text = re.sub(r"!(?=\[)|!$", r"\\!", text)  # a picture, which a reader would fetch
    return re.sub(r"(?<!\w)_|_(?!\w)|~(?=~)", r"\\\g<0>", text)


def _cell(text: str) -> str:
    """A cell of a Markdown table."""
    return _markdown(text).replace("\\|", "|").replace("|", "\\|")


def _fenced(text: str) -> str:
    """Text as it is, in a fence that it cannot close."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{text}\n{fence}"
