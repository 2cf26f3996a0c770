"""A tiny world in the official file forms, and an engine that answers from a table; for the tests of evaluate."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from leveret.records import Prediction

COLOURS = {"red": (200, 40, 40), "blue": (50, 70, 200), "green": (40, 150, 70), "yellow": (230, 200, 50)}
SIZE = 64


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" or path.name.startswith("coco_pope")
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if lines else json.dumps(value), encoding="utf-8")


def tiny_world(root: Path, scenes: int = 12, seed: int = 0) -> Path:
    """`scenes` pictures a split, each with two boxes of different colours, and a question of every kind on each."""
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    refs: list[Any] = []
    instances: dict[str, list[Any]] = {"images": [], "annotations": []}
    for split, base in (("test", 0), ("train", 1000)):
        pope: dict[str, list[Any]] = {"random": [], "popular": [], "adversarial": []}
        colour, shape, count, relation, word = {}, {}, [], [], []
        splits[split] = []
        for k in range(scenes):
            name = f"{split}-{k:03d}"
            one, other = rng.sample(sorted(COLOURS), 2)
            x, y = rng.randrange(2, 10), rng.randrange(2, 40)
            box = [x, y, 20, 20]
            image = Image.new("RGB", (SIZE, SIZE), (240, 240, 235))
            pen = ImageDraw.Draw(image)
            pen.rectangle([x, y, x + 20, y + 20], fill=COLOURS[one])
            pen.ellipse([40, y, 56, y + 16], fill=COLOURS[other])
            for place in (root / "images" / f"{name}.jpg", root / "eval/choice/images" / split / name / "image.jpg"):
                place.parent.mkdir(parents=True, exist_ok=True)
                image.save(place)
            for category, rows in pope.items():
                for label, thing in (("yes", one), ("no", sorted(set(COLOURS) - {one, other})[0])):
                    rows.append(
                        {
                            "question_id": len(rows) + 1,
                            "image": f"{name}.jpg",
                            "text": f"Is there a {thing} object in the image?",
                            "label": label,
                            "template": f"existence/{category}",
                        }
                    )
            gqa = {"imageId": name, "isBalanced": True, "types": {"structural": "query", "semantic": "attr"}}
            colour[f"c{k}"] = gqa | {"question": "What colour is the square?", "answer": one, "template": "colour/what"}
            shape[f"s{k}"] = gqa | {
                "question": f"What shape is the {one} object?", "answer": "square", "template": "shape/what"
            }  # fmt: skip
            count.append(
                {
                    "answer": k % 3, "data_source": "world", "image": f"images/{name}.jpg", "image_id": k,
                    "issimple": True, "question": f"How many {one} objects are there?", "question_id": base + k,
                    "template": "count/colour",
                }
            )  # fmt: skip
            relation.append(
                {
                    "image": f"{name}.jpg", "caption": f"The {one} square is left of the {other} circle.",
                    "label": k % 2, "relation": "left of", "subj": one, "obj": other, "template": "relation/left",
                }
            )  # fmt: skip
            splits[split].append(f"{split}-{k:03d}")
            problems[name] = {
                "question": "Which object is in the image?", "choices": ["a", "b", f"{one} square", "d"], "answer": 2,
                "hint": "", "image": "image.jpg", "split": split, "template": "choice/object",
            }  # fmt: skip
            number = base + k
            instances["images"].append({"id": number, "file_name": f"{name}.jpg", "height": SIZE, "width": SIZE})
            instances["annotations"].append({"id": number, "image_id": number, "bbox": box})
            refs.append(
                {
                    "ref_id": number, "ann_id": number, "image_id": number, "split": split, "template": "box/where",
                    "sentences": [{"sent": f"the {one} square", "sent_id": number}], "file_name": f"{name}.jpg",
                }
            )  # fmt: skip
            word.append(
                {
                    "image_id": name, "question": "What word is written in the image?", "question_id": k,
                    "answers": [f"W{k % 5}"] * 10, "image_width": SIZE, "image_height": SIZE, "template": "word/what",
                }
            )  # fmt: skip
        for category, rows in pope.items():
            write(root / f"eval/existence/{split}/coco_pope_{category}.json", rows)
        write(root / f"eval/colour/{split}_balanced_questions.json", colour)
        write(root / f"eval/shape/{split}_balanced_questions.json", shape)
        write(root / f"eval/count/{split}.json", count)
        write(root / f"eval/relation/{split}.jsonl", relation)
        write(root / f"eval/word/TextVQA_0.5.1_{split}.json", {"data": word})
    write(root / "eval/choice/problems.json", problems)
    write(root / "eval/choice/pid_splits.json", splits)
    write(root / "eval/box/refs(unc).json", refs)
    write(root / "eval/box/instances.json", instances)
    return root


@dataclass(frozen=True)
class FakeModel:
    fingerprint: str = "fake-1"


def sighted(request: Any) -> str:
    """Looks at the picture: names the colour at the square, and is silent where that does not help."""
    text, (image,) = request.turns[0].text, request.images
    seen, left = look(image.path)
    if "Is there" in text:
        return "Yes" if re.findall(r"a (\w+) object", text)[0] in seen else "No"
    if "What colour" in text:
        return left
    if "What shape" in text:
        return "square."
    if "How many" in text:
        return "two" if "red" in text else "1"
    if "True or false" in text:
        return "True" if "blue" in text else "maybe"
    if "A. " in text:
        return "C"
    if "Where" in text:
        return "[0.10, 0.10, 0.40, 0.40]"
    return "W1"


@cache
def look(path: str) -> tuple[set[str], str]:
    """The colours in a picture, and the leftmost one."""
    from PIL import Image

    pixels = Image.open(path)
    found = [(x, near(pixels.getpixel((x, y)))) for x in range(2, 62, 4) for y in range(2, 62, 4)]
    found = [(x, name) for x, name in found if name != "paper"]
    return {name for _, name in found}, found[0][1]


def near(pixel: tuple[int, int, int]) -> str:
    palette = {**COLOURS, "paper": (240, 240, 235)}
    return min(palette, key=lambda name: sum((a - b) ** 2 for a, b in zip(palette[name], pixel, strict=True)))


class FakeEngine:
    """Answers with `say`; remembers what it was asked; may stop after some answers as a killed process would."""

    def __init__(self, say: Callable[[Any], str] = sighted, stop_after: int | None = None) -> None:
        self.say, self.stop_after = say, stop_after
        self.asked: list[Any] = []

    def answer(
        self, requests: Sequence[Any], on_prediction: Callable[[Prediction], None] | None = None
    ) -> list[Prediction]:
        made = []
        for request in requests:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise RuntimeError("the power went")
            self.asked.append(request)
            made.append(Prediction(request.question_id, self.say(request)))
            if on_prediction is not None:
                on_prediction(made[-1])
        return made
