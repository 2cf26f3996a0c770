"""Questions whose answer is one of two words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leveret.evaluate.forms.base import Form, Item, Place, read_lines
from leveret.evaluate.forms.mme import MME
from leveret.runs import DataError

POPE_CATEGORIES = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""What LLaVA's and Bunny's question files add to the ids, which restart in each of POPE's three files."""


def _label(path: Path, given: Any, known: Mapping[Any, Any]) -> Any:
    """The right answer; DataError where a label is none of the benchmark's, which its own script would read as yes."""
    if isinstance(given, str | int) and given in known:
        return known[given]
    raise DataError(f"{path}: the label {given!r}; allowed are {' and '.join(map(repr, known))}.")


def _pope(place: Place) -> list[Item]:
    """POPE: JSON lines `question_id, image, text, label`, one file per category (RUCAIBox/POPE, commit e3e39262)."""
    items = []
    for path in place.files:
        category = path.stem.rsplit("_", 1)[-1]
        if category not in POPE_CATEGORIES:
            raise DataError(
                f"{path}: POPE has the categories {', '.join(POPE_CATEGORIES)}, the file's name ends in {category!r}."
            )
        for record in read_lines(path):
            raw = int(record["question_id"])
            items.append(
                Item(
                    question_id=str(raw + POPE_CATEGORIES[category]),
                    image=place.image(record["image"]),
                    prompt=place.prompt.format(question=record["text"]),
                    gold=_label(path, record["label"], {"yes": "yes", "no": "no"}),
                    template=record.get("template", ""),
                    meta={"image_id": record["image"], "group": category, "raw_id": str(raw)},
                )
            )
    missing = [category for category in POPE_CATEGORIES if not any(i.meta["group"] == category for i in items)]
    if missing:
        raise DataError(
            f"{place.files[0].parent}: POPE's score is over its three files; missing coco_pope_"
            f"{', coco_pope_'.join(f'{category}.json' for category in missing)}."
        )
    _check_pope(items, place.files[0].parent)
    return items


LATER_RANDOM = 3000
"""Questions in the POPE repository's later coco_pope_random.json; that of commit e3e39262 has 2,910."""


def _check_pope(items: list[Item], where: Path) -> None:
    """DataError for the later version of the official files: nearly all its random questions are others."""
    drawn = [item for item in items if item.meta["group"] == "random"]
    if len(drawn) == LATER_RANDOM and all(item.meta["image_id"].startswith("COCO_val2014") for item in drawn):
        raise DataError(
            f"{where}: coco_pope_random.json holds {LATER_RANDOM:,} questions, so these are the later files of "
            "the POPE repository. Published scores are over commit e3e39262, whose random file holds 2,910; the other "
            "two differ as well. Fetch the three files of that commit (AoiDragon/POPE, output/coco)."
        )


def _pope_keys(item: Item) -> tuple[str, ...]:
    return item.question_id, f"{item.meta['group']}/{item.meta['raw_id']}", f"raw/{item.meta['raw_id']}"


def _pope_answer_keys(answer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    category = answer.get("category")
    return ((f"{category}/{name}",) if category else ()) + (name, f"raw/{name}")


def _vsr(place: Place) -> list[Item]:
    """VSR: JSON lines `image, caption, label`; the id is the line's number from 0 (as in Prismatic's index)."""
    records = [record for path in place.files for record in read_lines(path)]
    return [
        Item(
            question_id=str(number),
            image=place.image(record["image"]),
            prompt=place.prompt.format(caption=record["caption"]),
            gold=_label(place.files[0], record["label"], {0: False, 1: True}),
            template=record.get("template", ""),
            meta={"image_id": record["image"], "relation": record.get("relation", "")},
        )
        for number, record in enumerate(records)
    ]


YES_NO = {
    "pope": Form(
        _pope,
        _pope_keys,
        _pope_answer_keys,
        "question_id (random + 10000000, popular + 20000000, as in LLaVA's question file), or category and question_id",
    ),
    "vsr": Form(_vsr, identity="example_id (the line's number from 0)"),
    **MME,
}
