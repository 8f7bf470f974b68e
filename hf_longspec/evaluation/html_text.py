"""The text of an HTML page: what stands in its main part, a line for each block."""

from __future__ import annotations

from html.parser import HTMLParser

SILENT = ("head", "nav", "script", "style")
BLOCKS = ("blockquote", "div", "h1", "h2", "h3", "h4", "li", "p", "pre", "td", "tr", "ul")


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.silent: list[str] = []
        self.preformatted = 0
        self.main: int | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.preformatted += tag == "pre"
        if tag in SILENT:
            self.silent.append(tag)
        elif tag == "main":
            self.main = len(self.pieces)

    def handle_endtag(self, tag: str) -> None:
        self.preformatted -= tag == "pre"
        if self.silent and tag == self.silent[-1]:
            self.silent.pop()
        elif tag == "main":
            self.pieces, self.main = self.pieces[self.main :], None
            self.silent.append("main")  # no text behind the main part counts
        elif tag in BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent and not self.preformatted:
            data = data.replace("\n", " ")
            data = data.lstrip() if self.pieces[-1:] in ([], ["\n"]) else data
        if not self.silent and data:
            self.pieces.append(data)


def html_text(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = [line.rstrip() for line in "".join(parser.pieces).split("\n")]
    return "\n".join(line for line, before in zip(lines, ["", *lines], strict=False) if line or before).strip() + "\n"
