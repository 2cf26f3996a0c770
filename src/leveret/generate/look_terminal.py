"""Looking inside an answer from the command line: `leveret look MODEL IMAGE QUESTION`, a page or a summary.

In a terminal with colours a word's attention is drawn in half blocks, two cells of the map a character; without colours
in ten signs from blank to `@`, so that it can be piped.
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.generate.looked import SHARES, Look
from leveret.runs import RecipeError, atomic_write

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

SIGNS = " .:-=+*#%@"
COLUMNS = 16
"""Cells of a small map across, at most."""
WORDS = 24
"""Words that are drawn, at most."""


def run(
    model: str | Path,
    image: str | Path,
    question: str,
    *,
    answer: str | None = None,
    out: str | Path | None = None,
    layer: int | None = None,
    max_new_tokens: int = 64,
    json: bool = False,
) -> dict[str, Any]:
    """Look inside the answer to a question about a picture, and return what was seen as plain data.

    answer  another than the model's own. out: a page is written there; without it a summary is printed.
    layer   of the summary's maps, from 1; None for the mean of all.

    Raises RecipeError when the layer is none of the model's or the question is empty, else what `look` and
    `generate.load` raise.
    """
    if out is not None and Path(out).is_dir():
        raise RecipeError(f"-o {out}: this is a folder; name the page in it, such as {Path(out) / 'look.html'}")
    if out is not None and Path(out).exists() and Path(image).exists() and Path(out).samefile(image):
        raise RecipeError(f"-o {out}: this is the picture that is asked about; name another file for the page")
    from leveret.generate.look import look
    from leveret.generate.model import load, opening
    from leveret.images import load as load_image

    loaded = load(model)
    refs, turns = opening(image, question)
    layers = int(loaded.vlm.language.config.get_text_config().num_hidden_layers)
    if layer is not None and not 1 <= layer <= layers:
        raise RecipeError(f"--layer {layer}: the language model has layers 1 to {layers}")
    found = look(loaded, turns, refs, answer, max_new_tokens=max_new_tokens)
    facts = {"model": str(model), "image": str(image), "question": question, **found.as_json()}
    if out is not None:
        from leveret.generate.look_page import page

        text = page(found, [load_image(ref) for ref in refs], question=question, model=str(model))
        atomic_write(out, text)
        facts["page"] = str(out)
    if json:
        print(jsonlib.dumps(facts))
    elif out is not None:
        print(f"{found.answer}\nthe page is {out}")
    else:
        summary(found, layer)
    return facts


def summary(look: Look, layer: int | None = None) -> None:
    """A small map for every word, and where the attention went."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    named = "mean of all layers" if layer is None else f"layer {layer} of {look.layers}"
    console.print(Text.assemble(_plain(look.answer), (f"   ({named})", "dim")))
    for title, read, asked in (("The question's words", look.asked, True), ("The answer's words", look.said, False)):
        words = [place for place, word in enumerate(read.words) if any(letter.isalnum() for letter in word.text)]
        words = words or list(range(len(read.words)))  # signs alone: then these
        drawn = words[:WORDS]
        if not drawn:
            continue
        console.print()
        console.rule(Text(title, style="bold"), align="left")
        for number, canvas in enumerate(look.canvases):
            if len(look.canvases) > 1:
                console.print(Text(f"picture {canvas.image + 1}, {canvas.part}", style="dim"))
            maps = _layered(look.maps(number, asked), layer)
            blocks = [
                Text(_plain(read.words[place].text)[:COLUMNS] + "\n", style="bold").append_text(
                    heat(maps[place], colour=console.color_system is not None)
                )
                for place in drawn
            ]
            console.print(Columns(blocks, padding=(0, 2)))
        table = Table(box=None, pad_edge=False)
        for name in ("word", *SHARES):
            table.add_column(name, justify="left" if name == "word" else "right")
        for place in drawn:
            shares = _layered(read.of_words(read.shares), layer)[place].tolist()
            table.add_row(Text(_plain(read.words[place].text)), *(f"{share:.3f}" for share in shares))
        console.print(table)
        if len(words) > len(drawn):
            more = f"the first {len(drawn)} of {len(words):,} words that were read; --json has all"
            console.print(Text(more, style="dim"))
    console.print()
    for token in look.tokens[: 4 * WORDS]:
        others = ", ".join(f"{_named(text)} {chance:.3f}" for text, chance in token.top[:4])
        said = _named(token.text or token.top[token.own][0])
        console.print(Text.assemble((f"{said:<12}", "bold"), f" {token.probability:.3f}   likeliest: {others}"))
    for note in look.notes:
        console.print(Text(note, style="dim"))
    if look.unread:
        console.print(Text(f"the last {look.unread} tokens were not read, so that memory stays bounded", style="dim"))


def _layered(values: Tensor, layer: int | None) -> Tensor:
    return values.mean(1) if layer is None else values[:, layer - 1]


def _plain(text: str) -> str:
    """Without control characters: a model must not steer the reader's terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _named(token: str) -> str:
    return _plain(token.strip()) or repr(token)


def heat(values: Tensor, colour: bool) -> Text:
    """A map [rows, columns], its greatest value brightest: in half blocks, or in signs two to a cell."""
    from rich.text import Text
    from torch.nn.functional import adaptive_avg_pool2d

    rows, columns = values.shape
    shrink = max(1.0, columns / COLUMNS, rows / COLUMNS)
    small = adaptive_avg_pool2d(values[None].float(), (max(1, round(rows / shrink)), max(1, round(columns / shrink))))[
        0
    ]
    shares = (small / small.max().clamp(min=1e-12)).tolist()
    text = Text()
    if not colour:
        for row in shares:
            text.append("".join(SIGNS[min(9, int(10 * share))] * 2 for share in row) + "\n")
        return text
    for top in range(0, len(shares), 2):
        under = shares[top + 1] if top + 1 < len(shares) else None
        for place, share in enumerate(shares[top]):
            style = f"rgb({_glow(share)})" + (f" on rgb({_glow(under[place])})" if under else "")
            text.append("\u2580", style=style)  # a character is twice as high as wide
        text.append("\n")
    return text


def _glow(share: float) -> str:
    """From near black over red to yellow."""
    red, green = min(255, int(30 + 450 * share)), max(20, min(255, int(510 * share - 255)))
    return f"{red},{green},40"
