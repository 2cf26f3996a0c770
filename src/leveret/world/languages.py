"""The drawn world's other language models: a smaller one, before and after it read conversations. Table and card.

They exist so that two things can be compared: language models of two sizes (`world/language` is twice as large, and
read more), and a language model that only read running text with the same one after it read conversations, which is
how instruction-tuned ones come to be. How they are taught: world/language.py; what they read: world/reading.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leveret.runs import read_json
from leveret.world import cards


@dataclass(frozen=True, slots=True)
class Kind:
    """A language model of LANGUAGES.

    steps    of the optimiser, 16 rows each.
    about    what taught it, for the card.
    options  of `language.train_language`.
    after    the row that it goes on from, which is taught before it.
    """

    steps: int
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    after: str = ""


_SMALL = {"width": 96, "layers": 3}
LANGUAGES: dict[str, Kind] = {
    "language-small-base": Kind(
        3200,
        "Next tokens of running text about told scenes, which are told as `world/language` has them told (as compounds "
        "or in words). The text states what `world/language` is asked, drawn with the same random numbers: no "
        "question, no mark of a conversation, no request, no refusal (world/plain.py). The words of a fact weigh as "
        "much as those of an answer there. Text between two end tokens.",
        {**_SMALL, "plain": True},
    ),
    "language-small": Kind(
        1200,
        "`language-small-base`, which then read conversations as the last part of one longer reading: those that "
        "`world/language` reads, requests that are refused among them.",
        _SMALL,
        after="language-small-base",
    ),
}


def folder_of(folder: Path, name: str) -> Path:
    """Where the language model `name` lies in a folder of backbones."""
    return folder / "languages" / name


def files_of(folder: Path, name: str) -> list[Path]:
    """Its files there: configuration, weights, tokenizer."""
    return sorted(path for path in folder_of(folder, name).iterdir() if path.is_file())


def write_card(folder: Path, seed: int, steps: Mapping[str, int]) -> None:
    """`languages/CARD.md` and `languages/card.json` of those that are there."""
    done = [name for name in LANGUAGES if (folder / "state" / name / "figures.json").exists()]
    figures = {name: read_json(folder / "state" / name / "figures.json") for name in done}
    cards.write_card(
        folder / "languages",
        [path for name in done for path in files_of(folder, name)],
        {
            "seed": seed,
            "steps": {name: steps[name] for name in done},
            "supervision": {name: LANGUAGES[name].about for name in done},
            "figures": figures,
        },
        title="The drawn world's other language models",
        about=(
            f"Trained from nothing by `leveret world backbones -o OUT --only NAME` (seed {seed}): Llamas of width 96 "
            "and 3 layers, 0.4 million weights, bfloat16. What holds of `world/language` holds of them: the eight "
            "held-out pairs are read of, no held-out word is, and `colour` and `word` are never asked nor stated."
        ),
        taught=[f"**{name}** ({steps[name]:,} steps of 16 rows): {LANGUAGES[name].about}" for name in done],
        found="What they can, on fresh scenes",
        figures=[
            "Share of answers (of a base model: ends of statements) whose every token is the most likely one. `asked` "
            "and `unread`: in a conversation's form, which the base model never saw, or in words that none did.",
            "",
            *(
                f"- **{name}** ({group}): {', '.join(f'{key} {value:.3f}' for key, value in values.items())}"
                for name, found in figures.items()
                for group, values in found.items()
            ),
        ],
    )
