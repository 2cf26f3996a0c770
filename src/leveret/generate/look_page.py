"""A page to look inside an answer by: the picture under the attention of a chosen word and layer, what else it might
have said, which words each visual token is near to.

The words, bars and tables stand in the page as they are; the heat is drawn by the page's own script (`look.js`) from
numbers that stand in it too, 16 bits each. Nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from leveret import pages
from leveret.generate.looked import SHARES, Look, Read

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SIDE = 640
"""Longer side of a picture as it stands in the page."""
BARS = 3
"""Alternatives under a word."""
TITLE = 120
"""Letters of the answer in the page's title, at most."""
ROWS = 400
"""Rows of a table, at most; what is over stands in `--json`."""

HOW = """
An answer's word is read where the model chose it: at the position before it. A question's word is read at its own
position: what it gathers from the picture there, later words find in the text. So an answer may be right although its
own word hardly looks at the thing: the question's word has looked.

Attention says where a layer reads from, not what it does with what it reads. Much of it falls on the first position or
on some patch where nothing is: heads with nothing to look for look there. Visual tokens know more than their own patch,
as the tower has let all patches look at each other. A bright cell is a hint; covering the place up and asking again is
a test.
"""


@cache
def script() -> str:
    """What the page runs."""
    return (Path(__file__).parent / "look.js").read_text("utf-8")


def page(look: Look, pictures: Sequence[Image], *, question: str, model: str) -> str:
    """The whole document. pictures: the images of the conversation, upright, in reading order."""
    notes = "\n\n".join([HOW, *look.notes])
    if look.unread:
        notes += f"\n\nThe last {look.unread:,} tokens of the answer were not read, so that memory stays bounded."
    sections = [
        pages.Section(
            "Where it looked",
            _viewer(look, pictures),
            lead="Choose a word and a layer. Point at a cell, or move over the coloured picture with the arrow keys.",
        ),
        pages.Section("Where the attention went", _shares(look), lead=_LEAD),
        pages.Section("What else it might have said", _alternatives(look)),
        *([pages.Section("Nearest words", _nearest(look))] if look.nearest else []),
        pages.Section("How to read this", notes),
    ]
    answer = look.answer if len(look.answer) <= TITLE else f"{look.answer[:TITLE].rstrip()} ..."
    return pages.page(f"Looking inside: {answer}", sections, subtitle=f"{question} ({model})", script=script())


_LEAD = (
    "Shares of all attention, mean over layers and heads; a row adds up to 1. First is the very first position, text "
    "the rest of the prompt, answer what has been said so far."
)


# --- the viewer -------------------------------------------------------------------------------------------------------


def _viewer(look: Look, pictures: Sequence[Image]) -> Markup:
    stages = [
        Markup('<figure class="stage" data-canvas="{}">{}<figcaption>{}</figcaption></figure>').format(
            place,
            pages.thumbnail(pictures[canvas.image], f"Picture {canvas.image + 1}", SIDE),
            _caption(look, place, len(pictures)),
        )
        for place, canvas in enumerate(look.canvases)
    ]
    if not stages:
        stages = [Markup("<p>There is no picture in this conversation.</p>")]
    lines = [
        Markup(
            '<div class="line" role="group" aria-label="The question"><span class="who">asked</span>{}</div>'
        ).format(Markup("").join(_button("asked", place, word.text) for place, word in enumerate(look.asked.words))),
        Markup('<div class="line" role="group" aria-label="The answer"><span class="who">said</span>{}</div>').format(
            Markup("").join(_said(look, place) for place in range(len(look.words)))
        ),
    ]
    return Markup(
        '<div class="look" data-look="{}">{}<div class="controls"></div><div class="stages">{}</div>'
        '<p class="told" role="status"></p></div>'
    ).format(json.dumps(_data(look), separators=(",", ":")), Markup("").join(lines), Markup("").join(stages))


def _caption(look: Look, place: int, pictures: int) -> str:
    canvas = look.canvases[place]
    rows, columns = canvas.grid
    which = f"Picture {canvas.image + 1}, " if pictures > 1 else ""
    part = {"picture": "", "whole": "the whole, ", "tiles": "its tiles, "}[canvas.part]
    if not canvas.placed:
        return f"{which}{part}nobody knows where its tokens lie"
    said = f"{which}{part}{rows} x {columns} cells"
    return said[0].upper() + said[1:]


def _button(kind: str, place: int, text: str) -> Markup:
    return Markup('<button type="button" class="word" data-kind="{}" data-word="{}">{}</button>').format(
        kind, place, text
    )


def _said(look: Look, place: int) -> Markup:
    """A word of the answer, and under it how likely its first token with ink and the likeliest others were."""
    word = look.words[place]
    tokens = look.tokens[word.first : word.last]
    token = next((token for token in tokens if token.text.strip()), tokens[0])
    likeliest = list(token.top[:BARS])
    if token.own >= BARS:  # the token itself is always shown
        likeliest[-1] = token.top[token.own]
    bar = Markup('<rect class="track" width="100%" height="8" rx="2"/><rect class="bar" width="{}" height="8" rx="2"/>')
    rows = [
        Markup('<li><span>{}</span><svg height="8" aria-hidden="true">{}</svg><small>{}</small></li>').format(
            text.strip() or repr(text), bar.format(f"{100 * chance:.2f}%"), _percent(chance)
        )
        for text, chance in likeliest
    ]
    return Markup('<div class="said">{}<ol>{}</ol></div>').format(
        _button("said", place, word.text), Markup("").join(rows)
    )


def _percent(chance: float) -> str:
    return "100 %" if chance > 0.9995 else f"{100 * chance:.1f} %"


def _data(look: Look) -> dict[str, Any]:
    """What the script draws from."""
    canvases = []
    for place, canvas in enumerate(look.canvases):
        said, asked = look.maps(place), look.maps(place, asked=True)
        top = max([float(values.max()) for values in (said, asked) if values.numel()] + [1e-12])
        near = [
            None if token is None or not look.nearest
            else [[one.text, round(one.cosine, 3), round(one.usual, 3)] for one in look.nearest[token]]
            for token in canvas.stands()
        ]  # fmt: skip
        canvases.append(
            {
                "grid": canvas.grid, "shown": [round(side, 6) for side in canvas.shown], "image": canvas.image,
                "top": top, "said": _packed(said, top), "asked": _packed(asked, top), "near": near,
            }
        )  # fmt: skip
    return {
        "layers": look.layers,
        "canvases": canvases,
        "words": {kind: [word.text for word in read.words] for kind, read in _reads(look)},
        "image": {kind: _rounded(read.of_words(read.shares)[..., 0]) for kind, read in _reads(look)},
    }


def _reads(look: Look) -> list[tuple[str, Read]]:
    return [("said", look.said), ("asked", look.asked)]


def _packed(values: Tensor, top: float) -> str:
    """Numbers from 0 to `top` in 16 bits each, base64."""
    whole = (values.double() / top * 65535).round().clamp(0, 65535)
    return base64.b64encode(whole.flatten().numpy().astype("<u2").tobytes()).decode()


def _rounded(values: Tensor) -> list[Any]:
    return values.double().mul(1e5).round().div(1e5).tolist()


# --- tables -----------------------------------------------------------------------------------------------------------


def _shares(look: Look) -> list[Markup]:
    tables = []
    for title, read in (("The answer's words", look.said), ("The question's words", look.asked)):
        means = read.of_words(read.shares).mean(1).tolist() if read.words else []
        rows = [
            [word.text, *(f"{share:.3f}" for share in mean)]
            for word, mean in list(zip(read.words, means, strict=True))[:ROWS]
        ]
        if rows:
            tables.append(pages.table(rows, ["word", *SHARES], caption=title + _cut(len(rows), len(read.words))))
    layers = look.said.shares.mean(0).tolist() if len(look.tokens) else []
    rows = [[f"layer {place + 1}", *(f"{share:.3f}" for share in mean)] for place, mean in enumerate(layers)]
    if rows:
        tables.append(pages.table(rows, ["layer", *SHARES], caption="The answer's words, by layer"))
    return tables


def _alternatives(look: Look) -> Markup:
    rows = [
        [
            token.text.strip() or repr(token.text),
            f"{token.probability:.4f}",
            ", ".join(f"{text.strip() or repr(text)} {chance:.4f}" for text, chance in token.top),
        ]
        for token in look.tokens[:ROWS]
    ]
    return pages.table(rows, ["token", "probability", "the likeliest"], caption=_cut(len(rows), len(look.tokens)))


def _cut(shown: int, all: int) -> str:
    """What a caption says where a table does not hold everything."""
    return f" (the first {shown:,} of {all:,}; --json has all)" if shown < all else ""


def _nearest(look: Look) -> list[Markup | str]:
    rows: list[list[str]] = []
    standing = 0
    for place, canvas in enumerate(look.canvases):
        for cell, token in enumerate(canvas.stands()):
            if token is None:
                continue
            standing += 1
            if len(rows) >= ROWS:
                continue
            row, column = divmod(cell, canvas.grid[1])
            near = ", ".join(f"{one.text} {one.cosine:.2f}" for one in look.nearest[token])
            where = f"row {row + 1}, column {column + 1}"
            rows.append([f"{_caption(look, place, 2)}: {where}" if len(look.canvases) > 1 else where, near])
    told = (
        "The words of the language model's table that each visual token lies nearest to, by cosine. The mean word is "
        "taken off both sides: all words share it, so it tells none from another. Large models need not keep visual "
        "tokens near words; where nothing fits, that says little."
    )
    if not rows:
        return [told, "No token stands in a cell by itself here: they lie in several, or nowhere."]
    inner = pages.table(rows, ["cell", "nearest words"])
    cells = f"{len(rows):,} cells{_cut(len(rows), standing)}"
    return [told, Markup("<details><summary>{}</summary>{}</details>").format(cells, inner)]
