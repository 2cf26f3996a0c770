"""MM-Vet and LLaVA-Bench in the wild in little, in their official files; for the tests of judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

ASKED = {
    "v1_0": ("What is x?", "-1<AND>-5", ["ocr", "math"]),
    "v1_1": ("What is it?", "a cat<OR>a kitten", ["rec"]),
    "v1_7": ("Explain.", "because | of <AND>", ["rec", "gen", "know"]),
    "v1_12": ("Who?", "nobody", ["rec"]),
}
CATEGORIES = ("conv", "detail", "complex")


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (200, 40, 40)).save(path)


def mm_vet(root: Path) -> tuple[Path, Path]:
    """(the data folder, a file of answers whose ids are Bunny's integers, in another order)."""
    root.mkdir(parents=True, exist_ok=True)
    questions = {
        name: {"imagename": f"{name}.png", "question": q, "answer": a, "imagesource": "", "capability": caps}
        for name, (q, a, caps) in ASKED.items()
    }
    (root / "mm-vet.json").write_text(json.dumps(questions), encoding="utf-8")
    for name in ASKED:
        picture(root / "images" / f"{name}.png")
    answers = [{"question_id": int(name[3:]), "text": f"answer to {name}"} for name in reversed(ASKED)]
    return root, lines(root / "answers.jsonl", answers)


def llava_bench(root: Path) -> tuple[Path, Path]:
    """(the data folder, a file of answers in another order than the questions)."""
    root.mkdir(parents=True, exist_ok=True)
    questions = [
        {"question_id": n, "image": f"00{n // 3}.jpg", "category": CATEGORIES[n % 3], "text": f"question {n}?"}
        for n in range(6)
    ]
    captions = [
        {"id": f"00{n}", "image": f"00{n}.jpg", "caption": ["one.", "two."] if n else "one text"} for n in (1, 0)
    ]
    references = [{"question_id": n, "text": f"reference {n}", "answer_id": f"r{n}"} for n in (3, 1, 0, 2, 5, 4)]
    for name, records in (("questions", questions), ("context", captions), ("answers_gpt4", references)):
        lines(root / f"{name}.jsonl", records)
    for n in range(2):
        picture(root / "images" / f"00{n}.jpg")
    answers = [{"question_id": n, "text": f"answer {n}", "answer_id": f"a{n}"} for n in (5, 4, 3, 0, 1, 2)]
    return root, lines(root / "answers.jsonl", answers)
