"""The files that servers take: tasks of yes and no, and of letters."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from leveret.evaluate.forms.base import Item
from leveret.evaluate.forms.mmbench import NOTHING
from leveret.evaluate.letters import mmmu_letter
from leveret.evaluate.scorers import draws
from leveret.evaluate.submissions.sheet import xlsx
from leveret.runs import DataError, atomic_write

Write = Callable[[Sequence[Item], Mapping[str, str], Path], None]
"""(a split's questions in the official order, question_id -> the model's text, where) -> the file is written."""

PREDICTION = 6
"""Where convert_mmbench_for_submission.py puts the answers among the columns."""


def _all_answered(items: Sequence[Item], texts: Mapping[str, str]) -> None:
    missing = [item.question_id for item in items if item.question_id not in texts]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(items)} questions have no answer (first {missing[0]!r}). Servers refuse files "
            "that lack some: answer all of the split first."
        )


def _lines(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    atomic_write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def mmbench(items: Sequence[Item], texts: Mapping[str, str], path: Path) -> None:
    """MMBench's xlsx: a row for every rotation, the table's own columns less hint, category and picture, and
    `prediction`. The site extracts the letters itself and wants this raw file, not one line a question."""
    _all_answered(items, texts)
    columns = list(items[0].meta["cells"])
    header = [*columns[:PREDICTION], "prediction", *columns[PREDICTION:]]
    rows: list[list[str | int | None]] = [list(header)]
    for item in items:
        cells = {name: None if cell in NOTHING else cell for name, cell in item.meta["cells"].items()}
        cells |= {"index": item.meta["index"], "prediction": texts[item.question_id]}
        rows.append([cells.get(name) for name in header])
    atomic_write(path, xlsx(rows))


def seed_bench(items: Sequence[Item], texts: Mapping[str, str], path: Path) -> None:
    """SEED-Bench's JSON lines `{question_id, prediction}`, in the order of the official file."""
    _all_answered(items, texts)
    _lines(path, [{"question_id": i.question_id, "prediction": texts[i.question_id]} for i in items])


def mmmu(items: Sequence[Item], texts: Mapping[str, str], path: Path) -> None:
    """MMMU's `{id: answer}` (EvalAI 2179): the letter that the official parser reads, an open answer as it was said.

    Where the parser reads none it draws one at random; here a hash of the question's id decides, as in the score."""
    _all_answered(items, texts)
    answers = {}
    for item in items:
        said = texts[item.question_id]
        if item.meta["choice"]:
            options = item.meta["texts"]
            said = mmmu_letter(said, options) or draws.by_id(item, list(options)) or said
        answers[item.question_id] = said
    atomic_write(path, json.dumps(answers, ensure_ascii=False, indent=4))


def cmmmu(items: Sequence[Item], texts: Mapping[str, str], path: Path) -> None:
    """CMMMU's JSON lines `{id, type, response}` (EvalAI 2217)."""
    _all_answered(items, texts)
    _lines(
        path,
        [
            {
                "id": int(item.question_id) if item.question_id.isdecimal() else item.question_id,
                "type": item.meta["type"],
                "response": texts[item.question_id],
            }
            for item in items
        ],
    )


def mme(items: Sequence[Item], texts: Mapping[str, str], path: Path) -> None:
    """The folder that MME's calculation.py reads: `<subtask>.txt`, lines `file, question, right answer, answer` with
    tabs between, both questions of a picture one after the other.

    Its tool pairs lines by position and stops at any line too many, so line breaks and tabs in answers become blanks.
    """
    _all_answered(items, texts)
    lines: dict[str, list[str]] = defaultdict(list)
    for item in items:
        said = texts[item.question_id]
        for mark in "\r\n\t":
            said = said.replace(mark, " ")
        name = Path(item.image.path).name if item.image else item.meta["image_id"]
        gold = item.gold.capitalize()
        lines[item.meta["group"]].append(f"{name}\t{item.meta['question']}\t{gold}\t{said.strip()}\n")
    path.mkdir(parents=True, exist_ok=True)
    for subtask, found in lines.items():
        atomic_write(path / f"{subtask}.txt", "".join(found))


SUBMISSIONS: dict[str, tuple[str, Write]] = {
    "mme": ("mme", mme),
    "mmbench": ("mmbench.xlsx", mmbench),
    "mmbench_cn": ("mmbench_cn.xlsx", mmbench),
    "seed_bench": ("seed_bench.jsonl", seed_bench),
    "mmmu": ("mmmu.json", mmmu),
    "cmmmu": ("cmmmu.jsonl", cmmmu),
}
"""Task -> the name of its file (a folder, for MME), and what writes it."""
