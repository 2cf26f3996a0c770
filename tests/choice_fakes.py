"""Small MME and MMBench files in the official forms, with pictures of one colour."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def png(colour: str, size: int = 8) -> bytes:
    from PIL import Image

    held = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(held, "PNG")
    return held.getvalue()


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def mme(root: Path) -> Path:
    """Two pictures of a flat subtask, one of a subtask with folders."""
    tree = root / "MME_Benchmark_release_version"
    for name in ("0001", "0002"):
        put(
            tree / f"count/{name}.txt",
            f"Is there one {name}?  Please answer yes or no.\tYes\nAre there two? {YES}\tNo\n",
        )
        (tree / f"count/{name}.png").write_bytes(png("red"))
    put(tree / "artwork/questions_answers_YN/7.txt", f"Is it old? {YES}\tNo\nIs it new? {YES}\tYes")
    (tree / "artwork/images").mkdir()
    (tree / "artwork/images/7.jpg").write_bytes(png("blue"))
    put(tree / "README.txt", "not a question")
    return root


YES = "Please answer yes or no."
HEADER = "index question hint A B C D answer category image source l2-category comment split".split()


def table(path: Path, rows: Sequence[Mapping[str, Any]], header: Sequence[str] = HEADER) -> Path:
    lines = ["\t".join(header)]
    for row in rows:
        lines.append("\t".join(str(row.get(name, "")) for name in header))
    return put(path, "\n".join(lines) + "\n")


def rotations(index: int, options: Sequence[str], right: int, image: str, **others: str) -> list[dict[str, Any]]:
    """All orders of a question, as MMBench has them."""
    rows = []
    for k in range(len(options)):
        turned = [*options[k:], *options[:k]]
        rows.append(
            {
                "index": index + k * 1_000_000,
                "question": f"Question {index}?",
                "answer": "ABCD"[turned.index(options[right])],
                "category": "ocr",
                "l2-category": "logic_reasoning",
                "split": "dev",
                "image": image if k == 0 or len(image) > 64 else str(index),
                **dict(zip("ABCD", turned, strict=False)),
                **others,
            }
        )
    return rows


RED = base64.b64encode(png("red", 40)).decode()
BLUE = base64.b64encode(png("blue", 40)).decode()


def mmbench(root: Path, name: str = "MMBench_DEV_EN_legacy.tsv") -> Path:
    rows = rotations(3, ["cat", "dog", "cow"], 1, RED) + rotations(5, ["up", "down"], 0, BLUE, hint="A hint.")
    table(root / name, rows)
    return root
