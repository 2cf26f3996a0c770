"""Yes/no and choice benchmarks without the published data: small files in the official forms, and odd input."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from choice_fakes import BLUE, HEADER, RED, mmbench, mme, put, rotations, table
from leveret.evaluate import TASKS, load_items, score
from leveret.evaluate.scorers.mme import lmms_word, mme_word
from leveret.evaluate.submissions.choice import SUBMISSIONS
from leveret.evaluate.submissions.sheet import xlsx
from leveret.images import load
from leveret.runs import DataError


def right_answers(task: str, root: Path, **where: str) -> list[dict[str, Any]]:
    return [{"question_id": i.question_id, "text": str(i.gold)} for i in load_items(task, root, **where)]


# --- MME -------------------------------------------------------------------------------------------------------------


def llava(subtask: str, picture: str, prompt: str, text: str) -> dict[str, str]:
    return {"question_id": f"{subtask}/{picture}", "prompt": f"{prompt}{TASKS['mme'].prompt[10:]}", "text": text}


def mme_answers() -> list[dict[str, str]]:
    found = []
    for name in ("0001", "0002"):
        found += [
            llava("count", f"{name}.png", f"Is there one {name}?", "Yes"),
            llava("count", f"{name}.png", "Are there two?", "No"),
        ]
    found.append(llava("artwork", "images/7.jpg", "Is it old?", "no\tnot at all\nreally"))
    return [*found, llava("artwork", "images/7.jpg", "Is it new?", "Yes")]


def test_mme_reads_both_layouts_and_pairs_by_picture(tmp_path: Path) -> None:
    root = mme(tmp_path)
    items = load_items("mme", root)
    assert len(items) == 6 and {i.question_id for i in items} >= {"count/0001#1", "artwork/7#2"}
    assert items[0].prompt == "Is it old?\nAnswer the question using a single word or phrase."
    assert all(item.image is not None and load(item.image).size == (8, 8) for item in items)
    answers = mme_answers()[::-1]
    found = score("mme", answers, root)
    assert found["score"] == 1.0 and found["metrics"]["Perception"]["total"] == 400.0 and found["images"] == 3
    answers[0]["text"] = "No"  # one of the two wrong: half of the answers, no picture
    assert score("mme", answers, root)["metrics"]["Perception"]["subtasks"] == {"count": 200.0, "artwork": 50.0}


def test_mme_names_what_is_wrong_with_answers(tmp_path: Path) -> None:
    root, answers = mme(tmp_path), mme_answers()
    with pytest.raises(DataError, match=r"1 repeated ids.*1 questions without an answer.*prompt"):
        score("mme", [answers[0], *answers[:-1]], root)
    with pytest.raises(DataError, match="1 foreign ids"):
        score("mme", [*answers, llava("count", "0001.png", "Is there a third?", "Yes")], root)
    missing = score("mme", answers[:-1], root, allow_missing=True)
    assert missing["missing"] == 1 and missing["metrics"]["Perception"]["subtasks"]["artwork"] == 50.0


def test_mme_reads_its_tools_folder_whatever_stands_in_answers(tmp_path: Path) -> None:
    root = mme(tmp_path)
    for item in load_items("mme", root):
        name, gold = f"{item.meta['image_id'].split('/')[1]}.jpg", item.gold.capitalize()
        with (tmp_path / f"{item.meta['group']}.txt").open("a", encoding="utf-8") as file:
            file.write(f"{name}\t{item.meta['question']}\t{gold}\t{gold},\tas I\nsee.\n")
    (tmp_path / "out").mkdir()
    for path in tmp_path.glob("*.txt"):
        path.rename(tmp_path / "out" / path.name)
    assert score("mme", tmp_path / "out", root)["score"] == 1.0
    put(tmp_path / "bad/count.txt", "Yes\n")
    with pytest.raises(DataError, match="first line"):
        score("mme", tmp_path / "bad", root)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no answers"):
        score("mme", tmp_path / "none", root)


@pytest.mark.parametrize("text", ["Is it?\tYes\nIs it not?\tYes\n", "Is it?\tYes\n", "Is it? Yes\nIs it not? No\n"])
def test_mme_refuses_what_is_no_pair(tmp_path: Path, text: str) -> None:
    put(tmp_path / "MME_Benchmark_release_version/color/1.txt", text)
    with pytest.raises(DataError, match="two lines a picture"):
        load_items("mme", tmp_path)


@pytest.mark.parametrize(
    ("text", "word", "lmms"),
    [
        ("Yes", "yes", "yes"), ("Not sure", "no", "no"), ("know", "no", "no"), ("Nope", "no", "no"),
        ("Yeah", None, None), ("The answer is yes", None, None), ("", None, None), ("y", None, "yes"),
        (" yes", "yes", "yes"), ("  yes", None, "yes"), ("   no", None, "no"), ("N.", None, "no"),
        ("...yes", None, "yes"),
    ],
)  # fmt: skip
def test_mme_words(text: str, word: str | None, lmms: str | None) -> None:
    assert mme_word(text) == word and lmms_word(text) == lmms


# --- POPE's versions -------------------------------------------------------------------------------------------------


def test_pope_of_another_commit_is_refused_by_name(tmp_path: Path) -> None:
    row = {"image": "COCO_val2014_000000000001.jpg", "text": "Is there a cat?", "label": "yes"}
    for category, n in (("adversarial", 2), ("popular", 2), ("random", 3000)):
        text = "".join(json.dumps({"question_id": k + 1, **row}) + "\n" for k in range(n))
        put(tmp_path / f"coco_pope_{category}.json", text)
    with pytest.raises(DataError, match=r"e3e39262.*2,910"):
        load_items("pope", tmp_path)


# --- MMBench ---------------------------------------------------------------------------------------------------------


def test_mmbench_pictures_stay_in_the_table(tmp_path: Path) -> None:
    legacy = load_items("mmbench", mmbench(tmp_path / "legacy"))
    rows = rotations(3, ["cat", "dog", "cow"], 1, RED)
    rows += rotations(5, ["up", "down"], 0, BLUE, hint="A hint.")
    for row in rows:
        row["image"] = row["image"] if row["index"] < 1_000_000 else row["index"] % 1_000_000
    table(tmp_path / "kit/MMBench_DEV_EN.tsv", rows)
    kit = load_items("mmbench", tmp_path / "kit")
    for one, other in zip(legacy, kit, strict=True):
        assert (one.prompt, one.image, one.gold) == (other.prompt, other.image, other.gold)
        assert one.image is not None and load(one.image).getpixel((0, 0)) == (
            (255, 0, 0) if one.meta["whole"] == "3" else (0, 0, 255)
        )
    assert legacy[0].image is not None and legacy[1].image is not None
    assert legacy[0].image.path is legacy[1].image.path  # held once
    assert legacy[3].prompt.startswith("A hint.\nQuestion 5?\nA. up\nB. down\nAnswer")


def test_mmbench_is_right_only_in_every_order(tmp_path: Path) -> None:
    root = mmbench(tmp_path)
    answers = right_answers("mmbench", root)
    assert score("mmbench", answers, root)["score"] == 1.0
    answers[1]["text"] = "none of them"
    found = score("mmbench", answers, root)
    assert found["score"] == 0.5 and found["n"] == 5 and found["images"] == 2 and found["unparsable"] == 1
    assert found["metrics"]["LR"] == 0.5 and found["metrics"]["questions"] == 2
    vanilla = score("mmbench", answers, root, rule="vlmevalkit_vanilla_exact_matching")
    assert vanilla["metrics"] == {"all_rows": 0.8, "first_rotation": 1.0}
    assert score("mmbench", answers[:-1], root, allow_missing=True)["score"] == 0.0


def test_mmbench_rounds_name_rotations(tmp_path: Path) -> None:
    root = mmbench(tmp_path)
    answers: list[dict[str, Any]] = []
    for record in right_answers("mmbench", root):
        turn, index = divmod(int(record["question_id"]), 1_000_000)
        answers.append({"question_id": index, "round_id": turn, "text": record["text"]})
    assert score("mmbench", answers, root)["score"] == 1.0
    by_index = [{"index": r["question_id"], "prediction": r["text"]} for r in right_answers("mmbench", root)]
    assert score("mmbench", by_index, root)["score"] == 1.0


def test_mmbench_options_stop_at_the_first_that_is_missing(tmp_path: Path) -> None:
    rows = [{"index": 1, "question": "Q?", "A": "nan", "B": "x", "image": RED, "answer": "B"},
            {"index": 2, "question": "Q?", "A": "x", "B": "None", "C": "z", "image": RED, "answer": "A"},
            {"index": 4, "question": "Q?", "A": "x", "B": "NONE", "image": RED, "answer": "A"}]  # fmt: skip
    table(tmp_path / "MMBench_DEV_EN.tsv", rows)
    items = load_items("mmbench", tmp_path)
    assert [item.prompt.split("\nAnswer")[0] for item in items] == ["Q?", "Q?\nA. x", "Q?\nA. x"]
    # What pandas reads as missing is none to VLMEvalKit either; other spellings are options to it.
    assert [list(item.meta["texts"]) for item in items] == [["B"], ["A", "C"], ["A", "B"]]


def test_mmbench_names_what_is_wrong_with_a_table(tmp_path: Path) -> None:
    table(tmp_path / "a/MMBench_DEV_EN.tsv", [{"index": 1, "question": "Q?", "A": "x", "image": "9"}])
    with pytest.raises(DataError, match="picture of row '9'"):
        load_items("mmbench", tmp_path / "a")
    table(tmp_path / "b/MMBench_DEV_EN.tsv", [{"index": 1, "split": "test", "image": RED}])
    with pytest.raises(DataError, match="split 'test', asked for is 'dev'"):
        load_items("mmbench", tmp_path / "b")
    table(tmp_path / "c/MMBench_DEV_EN.tsv", [{"index": "one", "image": RED}])
    with pytest.raises(DataError, match="no whole number"):
        load_items("mmbench", tmp_path / "c")
    table(tmp_path / "d/MMBench_DEV_EN.tsv", [], header=["index", "question"])
    with pytest.raises(DataError, match="missing: A, B, image"):
        load_items("mmbench", tmp_path / "d")
    put(tmp_path / "e/MMBench_DEV_EN.tsv", "\t".join(HEADER) + "\n1\tcut off")
    with pytest.raises(DataError, match="2 columns"):
        load_items("mmbench", tmp_path / "e")
    table(tmp_path / "f/MMBench_DEV_EN_V11.tsv", rotations(1, ["a", "b"], 0, RED))
    with pytest.raises(DataError, match="splits v11"):
        load_items("mmbench", tmp_path / "f")
    assert len(load_items("mmbench", tmp_path / "f", "v11")) == 2


def test_mmbench_test_split_has_no_score_but_a_file(tmp_path: Path) -> None:
    rows = [row | {"split": "test", "answer": ""} for row in rotations(3, ["1", "<2>"], 1, RED)]
    table(tmp_path / "MMBench_TEST_EN.tsv", rows)
    items = load_items("mmbench", tmp_path, "server")
    texts = {item.question_id: "it\tis\nA & B_x000D_\x00\r" for item in items}
    with pytest.raises(DataError, match="not public"):
        score(
            "mmbench", [{"question_id": name, "text": text} for name, text in texts.items()], tmp_path, split="server"
        )
    name, write = SUBMISSIONS["mmbench"]
    write(items, texts, tmp_path / name)
    rows_there = sheet_rows((tmp_path / name).read_bytes())
    assert rows_there[0] == {
        "A": "index",
        "B": "question",
        "C": "A",
        "D": "B",
        "E": "C",
        "F": "D",
        "G": "prediction",
        "H": "answer",
        "I": "split",
    }
    assert (
        rows_there[1]["G"] == "it\tis\nA & B_x005F_x000D__x000D_"
        and rows_there[1]["D"] == "<2>"
        and "H" not in rows_there[1]
    )
    with pytest.raises(DataError, match="1 of 2 questions have no answer"):
        write(items, {items[0].question_id: "A"}, tmp_path / name)


def sheet_rows(data: bytes) -> list[dict[str, str]]:
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(io.BytesIO(data)) as book:
        assert book.testzip() is None
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
    return [
        {c.attrib["r"].rstrip("0123456789"): "".join(c.itertext()) for c in row.iter(f"{space}c")}
        for row in sheet.iter(f"{space}row")
    ]


@given(st.lists(st.lists(st.text(max_size=20), min_size=1, max_size=30), max_size=4))
def test_any_text_makes_a_sheet_that_parses(rows: list[list[str]]) -> None:
    found = sheet_rows(xlsx(rows))
    assert len(found) == len(rows) and xlsx(rows) == xlsx(rows)


# --- SEED-Bench and AI2D ---------------------------------------------------------------------------------------------


def seed_bench(root: Path) -> Path:
    base = {"question": "What?", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": 4, "answer": "B"}
    questions = [
        base | {"question_id": "1", "data_type": "image", "data_id": "p1", "question_type_id": 1},
        base | {"question_id": "v2", "data_type": "video", "data_id": "x/9.webm", "question_type_id": 10},
    ]
    put(root / "SEED-Bench.json", json.dumps({"questions": questions, "question_type": {"Scene": 1, "Action": 10}}))
    return root


def test_seed_bench_asks_about_one_frame_of_a_video(tmp_path: Path) -> None:
    root = seed_bench(tmp_path)
    images = [item.image.path for item in load_items("seed_bench", root) if item.image]
    assert [Path(path).relative_to(root).as_posix() for path in images] == [
        "SEED-Bench-image/p1", "SEED-Bench-video-image/10_v2.png",
    ]  # fmt: skip
    put(root / "SEED-Bench-video-image/9.webm.png", "")
    assert [i.image.path[-10:] for i in load_items("seed_bench", root, "video") if i.image] == ["9.webm.png"]
    answers = [{"question_id": 1, "text": "B"}, {"question_id": "v2", "text": "b) b"}]
    found = {rule: score("seed_bench", answers, root, rule=rule)["metrics"] for rule in TASKS["seed_bench"].rules}
    assert found["official"] == {"Scene": 100.0, "Action": 0.0, "Total": 50.0, "image": 100.0, "video": 0.0}
    assert found["lmms_eval"]["seed_all"] == 100.0 and found["internvl"]["Video"] == 0.0
    assert score("seed_bench", answers[:1], root, split="image")["n"] == 1


@pytest.mark.parametrize("rule", list(TASKS["seed_bench"].rules))
def test_silence_is_wrong_and_counted(tmp_path: Path, rule: str) -> None:
    root = seed_bench(tmp_path)
    found = score("seed_bench", [{"question_id": "1", "text": ""}, {"question_id": "v2", "text": " "}], root, rule=rule)
    assert found["score"] == 0.0 and found["unparsable"] == 2


def ai2d(root: Path) -> Path:
    for n in (4, 10):
        questions = {
            f"Which {k}?": {"answerTexts": list("abcd"), "correctAnswer": k, "questionId": f"{n}.png-{k}"}
            for k in range(2)
        }
        put(root / f"questions/{n}.png.json", json.dumps({"imageName": f"{n}.png", "questions": questions}))
    put(root / "ai2d_test_ids.csv", "10\n")
    return root


def test_ai2d_parts(tmp_path: Path) -> None:
    root = ai2d(tmp_path)
    assert [len(load_items("ai2d", root, split)) for split in ("test", "val", "test-only")] == [4, 2, 2]
    items = load_items("ai2d", root)
    texts = [{"questionId": i.question_id, "text": "(A)" if i.gold == 0 else "b: b"} for i in items]
    found = score("ai2d", texts, root)
    assert found["rule"] == "lmms_eval" and found["metrics"] == {"all": 0.5, "test": 0.5, "val": 0.5}
    shares = [{"questionId": i.question_id, "mc_probabilities": [0.4, 0.4, 0.1, 0.1]} for i in items]
    found = score("ai2d", shares, root)
    assert found["rule"] == "prismatic_probabilities" and found["score"] == 0.5  # equal ones are the first
    assert found["metrics"]["accuracy__AI2D-final-AUCROC"] == 0.5
    for bad in ([0.5, 0.5], "A", [1, 2, 3, None], [0.1, 0.2, 0.3, float("nan")]):
        with pytest.raises(DataError, match="4 probabilities are wanted"):
            score("ai2d", [{"questionId": i.question_id, "mc_probabilities": bad} for i in items], root)
    (root / "ai2d_test_ids.csv").unlink()
    with pytest.raises(DataError, match=r"ai2d_test_ids\.csv is not there"):
        load_items("ai2d", root)
