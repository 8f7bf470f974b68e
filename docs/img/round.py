"""Draw docs/img/round.svg, a round of LongSpec: `python docs/img/round.py`.

The tree is an example made up by hand. Depths, mask and accepted path come from hf_longspec's own functions.
"""

from __future__ import annotations

from html import escape
from itertools import accumulate
from pathlib import Path

import torch

from hf_longspec.modeling.tree_longspec import TokenTree, ancestor_mask, node_depths
from hf_longspec.modeling.verification_longspec import walk

PREFIX = ["for", "i", "in"]
TOKENS = ["range", "(", "[", "n", "len", "0", ")", "("]
PARENTS = [0, 0, 0, 1, 1, 1, 3, 4]
WIDTHS = [1, 2, 3, 2]
PICKS = ["(", "len", "0", ")", "(", ")", ":", "x"]  # the target's own token behind each node

INK, GREY, PALE = "#1f2933", "#52606d", "#e4e9ee"
BLUE, GREEN, ORANGE = "#9cc4f0", "#9fdcb0", "#f8c784"
SIZE = 30  # width and height of a cell


class Drawing:
    """An SVG drawing: its elements, back to front."""

    def __init__(self, width: int, height: int):
        self.width, self.height, self.parts = (
            width,
            height,
            [f'<rect width="{width}" height="{height}" fill="white"/>'],
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = INK, dash: str = ""
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" '
            f'stroke="{stroke}" stroke-dasharray="{dash}"/>'
        )

    def text(self, x: float, y: float, text: str, size: int = 14, fill: str = INK, more: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" {more}>{escape(text)}</text>')

    def token(self, x: float, y: float, token: str, fill: str, dash: str = "") -> None:
        """Draw a cell with its middle at x, y."""
        width = max(SIZE, 9 * len(token) + 10)
        self.box(x - width / 2, y - SIZE / 2, width, SIZE, fill, dash=dash)
        self.text(x, y + 5, token, more='text-anchor="middle" font-family="monospace"')

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str = GREY, width: int = 1) -> None:
        self.parts.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{stroke}" stroke-width="{width}"/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{INK}" marker-end="url(#head)"/>')

    def svg(self) -> str:
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
        )
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
        return "\n".join([opening, head, *self.parts, "</svg>\n"])


def tree() -> TokenTree:
    """Return the example as a `TokenTree`, in which each distinct token is an id."""
    ids = {token: index for index, token in enumerate(dict.fromkeys(TOKENS + PICKS))}
    tokens, parents = (torch.tensor([row]) for row in ([ids[token] for token in TOKENS], PARENTS))
    return TokenTree(tokens, parents, torch.zeros(1, len(TOKENS)), len(WIDTHS) - 1)


def accepted(guesses: TokenTree, mask: torch.Tensor) -> list[int]:
    """Return the nodes of the accepted path."""
    ids = dict(zip(TOKENS, guesses.tokens[0].tolist(), strict=True))
    picks = torch.tensor([[ids.get(token, -1) for token in PICKS]])
    path, counts, _ = walk(guesses, mask, node_depths(mask), picks)[0]
    return path[0, : counts[0]].tolist()


def places(x: float, y: float) -> list[tuple[float, float]]:
    """Return the middle of each node: a column for each level, from left to right."""
    starts, found = [0, *accumulate(WIDTHS)], []
    for level, width in enumerate(WIDTHS):
        for row in range(starts[level + 1] - starts[level]):
            found.append((x + 82 * level, y + (row - (width - 1) / 2) * 52))
    return found


def draw_tree(drawing: Drawing, x: float, y: float, path: list[int]) -> None:
    spots = places(x, y)
    for node, parent in list(enumerate(PARENTS))[1:]:
        on_path = node in path
        drawing.line(*spots[parent], *spots[node], stroke=INK if on_path else GREY, width=3 if on_path else 1)
    for node, (spot, token) in enumerate(zip(spots, TOKENS, strict=True)):
        fill = ORANGE if node == 0 else GREEN if node in path else "white"
        drawing.token(*spot, token, fill)
        drawing.text(spot[0] - 4, spot[1] - 19, str(node), size=10, fill=GREY)


def draw_grow(drawing: Drawing, x: float, y: float) -> None:
    drawing.text(x, y, "1  grow", size=18, more='font-weight="bold"')
    drawing.text(x, y + 22, "The draft, one layer, guesses level by level below the newest token:", fill=GREY)
    drawing.text(x, y + 40, "the best continuations by summed log-probability.", fill=GREY)
    for index, token in enumerate(PREFIX):
        drawing.token(x + 24 + 44 * index, y + 138, token, BLUE)
    drawing.text(x, y + 176, "prefix, cached", size=12, fill=GREY)
    draw_tree(drawing, x + 178, y + 138, [])
    drawing.text(x + 164, y + 176, "root", size=12, fill=GREY)


def draw_verify(drawing: Drawing, x: float, y: float, mask: torch.Tensor) -> None:
    drawing.text(x, y, "2  verify", size=18, more='font-weight="bold"')
    drawing.text(x, y + 22, "One forward of the target over all nodes. Each attends to the", fill=GREY)
    drawing.text(x, y + 40, "whole prefix, with no mask, and to itself and its ancestors.", fill=GREY)
    top, cell = y + 76, 20
    left, width = x + 50, 190
    tree_left = left + width + 14
    drawing.text(left, top - 8, "prefix, n keys", size=12, fill=GREY)
    drawing.text(tree_left, top - 8, "tree, T keys", size=12, fill=GREY)
    drawing.box(left, top, width, cell * len(TOKENS), BLUE)
    for row, token in enumerate(TOKENS):
        middle = top + cell * row + 15
        drawing.text(left - 6, middle, token, size=12, more='text-anchor="end" font-family="monospace"')
        for column in range(len(TOKENS)):
            fill = GREEN if mask[0, row, column] else PALE
            drawing.box(tree_left + cell * column, top + cell * row, cell, cell, fill, stroke="white")
    bottom = top + cell * len(TOKENS)
    drawing.text(left + 20, bottom + 20, "flash kernel: o₁, lse₁", size=13)
    drawing.text(tree_left + 10, bottom + 20, "T×T mask: o₂, lse₂", size=13)
    drawing.text(left, bottom + 44, "merged exactly:  o = o₁·σ(lse₁ − lse₂) + o₂·σ(lse₂ − lse₁)", size=13)


def draw_accept(drawing: Drawing, x: float, y: float, path: list[int]) -> None:
    drawing.text(x, y, "3  accept", size=18, more='font-weight="bold"')
    drawing.text(x, y + 22, "From the root on, the target's own choice at each node. Where a child", fill=GREY)
    drawing.text(x, y + 40, "carries it, go on there; else it is the last token of the round.", fill=GREY)
    draw_tree(drawing, x + 40, y + 138, path)
    end = places(x + 40, y + 138)[path[-1]]
    drawing.arrow(end[0] + 16, end[1], end[0] + 50, end[1])
    drawing.token(end[0] + 68, end[1], PICKS[path[-1]], ORANGE, dash="4 3")
    drawing.text(end[0] + 40, end[1] + 34, "no child has it", size=12, fill=GREY)
    written = [*(TOKENS[node] for node in path[1:]), PICKS[path[-1]]]
    drawing.text(x, y + 234, f"{len(written)} tokens from one forward:  {' '.join(written)}", size=13)


def draw_commit(drawing: Drawing, x: float, y: float, path: list[int]) -> None:
    drawing.text(x, y, "4  commit", size=18, more='font-weight="bold"')
    drawing.text(x, y + 22, "Keys and values of the path move next to the prefix, in every layer.", fill=GREY)
    drawing.text(x, y + 40, "The draft's window moves on; its size never changes.", fill=GREY)
    first = x + 24
    rows = ((y + 90, list(range(len(TOKENS)))), (y + 170, path))
    for height, nodes in rows:
        for index, token in enumerate(PREFIX):
            drawing.token(first + 44 * index, height, token, BLUE)
        for index, node in enumerate(nodes):
            fill = GREEN if node in path else "white"
            drawing.token(first + 140 + 48 * index, height, TOKENS[node], fill)
    for index, node in enumerate(path):
        drawing.arrow(first + 140 + 48 * node, y + 107, first + 140 + 48 * index, y + 152)
    newest = first + 140 + 48 * len(path)
    drawing.token(newest, y + 170, PICKS[path[-1]], ORANGE, dash="4 3")
    drawing.text(newest - 30, y + 205, "the next root, not cached yet", size=12, fill=GREY)


def main() -> None:
    guesses = tree()
    mask = ancestor_mask(guesses.parents, guesses.levels)
    path = accepted(guesses, mask)
    drawing = Drawing(1120, 640)
    draw_grow(drawing, 30, 40)
    draw_verify(drawing, 590, 40, mask)
    draw_accept(drawing, 30, 385, path)
    draw_commit(drawing, 590, 385, path)
    Path(__file__).with_suffix(".svg").write_text(drawing.svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
