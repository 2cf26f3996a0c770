"""Questions answered by words, numbers and boxes: their official files, wordings, rules, and everything odd in them."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.evaluate import TASKS, load_items, score
from leveret.evaluate.curves import auc_pr, auc_roc
from leveret.evaluate.forms import Item
from leveret.evaluate.forms.pickles import read_pickle
from leveret.evaluate.scorers import SCORERS
from leveret.evaluate.tasks import subset
from leveret.evaluate.text import first_box, lavis, m4c, vizwiz_api, vlmevalkit, vqa
from leveret.runs import DataError, RecipeError


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if lines else json.dumps(value), encoding="utf-8")
    return path


def ten(*said: str) -> list[str]:
    """Ten people's answers, the last one's repeated."""
    return [*said, *[said[-1]] * (10 - len(said))]


def vqav2(root: Path, split: str = "val2014", people: list[list[str]] | None = None) -> Path:
    """Official files of as many questions as there are lists of answers; no annotations for a test split."""
    people = people or [ten("cat"), ten("two", "2"), ten("yes")]
    questions = [{"image_id": 42, "question": f"What is {k}?", "question_id": 42000 + k} for k in range(len(people))]
    write(root / f"v2_OpenEnded_mscoco_{split}_questions.json", {"info": {"version": "2.0"}, "questions": questions})
    if not split.startswith("test"):
        notes = [
            {
                "question_id": 42000 + k, "answer_type": "other", "question_type": "what is",
                "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(said, 1)],
            }
            for k, said in enumerate(people)
        ]  # fmt: skip
        write(root / f"v2_mscoco_{split}_annotations.json", {"info": {"version": "2.0"}, "annotations": notes})
    return root


def refcoco(root: Path, name: str = "refcoco", list_name: str = "refs(unc).p", first: int = 0) -> list[dict[str, Any]]:
    refs = [
        {
            "ref_id": first + k, "ann_id": 5, "image_id": 9, "split": split, "category_id": 1,
            "file_name": "COCO_train2014_000000000009_5.jpg",
            "sentences": [{"sent": f"cup {k}", "sent_id": 10 * (first + k), "raw": "Cup", "tokens": ["cup", str(k)]}],
        }
        for k, split in enumerate(["val", "testA", "val"])
    ]  # fmt: skip
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    if list_name.endswith(".p"):
        (folder / list_name).write_bytes(pickle.dumps(refs, protocol=2))
    else:
        write(folder / list_name, refs)
    image = {"id": 9, "width": 300, "height": 200, "file_name": "COCO_train2014_000000000009.jpg"}
    write(folder / "instances.json", {"images": [image], "annotations": [{"id": 5, "bbox": [30.4, 20, 100, 50.7]}]})
    return refs


# --- official files -------------------------------------------------------------------------------------------------


def test_vqav2_questions_meet_their_annotations(tmp_path: Path) -> None:
    items = load_items("vqav2", vqav2(tmp_path))
    assert [item.question_id for item in items] == ["42000", "42001", "42002"]
    assert items[0].image is not None and items[0].image.path.endswith("/val2014/COCO_val2014_000000000042.jpg")
    assert items[1].gold == ten("two", "2") and items[1].meta["answer_type"] == "other"


def test_a_test_split_can_be_asked_and_is_not_scored(tmp_path: Path) -> None:
    items = load_items("vqav2", vqav2(tmp_path, "test2015"), "server")
    assert items[0].gold is None and items[0].prompt.startswith("What is 0?\nAnswer")
    assert items[0].image is not None and "/test2015/COCO_test2015_" in items[0].image.path
    with pytest.raises(DataError, match=r"3 of 3 questions .* no right answer in the official files"):
        score("vqav2", [{"question_id": i.question_id, "text": "x"} for i in items], tmp_path, split="server")
    dev = vqav2(tmp_path / "dev", "test-dev2015")
    assert "/test2015/COCO_test2015_" in load_items("vqav2", dev, "test-dev2015")[0].image.path  # type: ignore[union-attr]


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    root = vqav2(tmp_path)
    notes = root / "v2_mscoco_val2014_annotations.json"
    other = json.loads(notes.read_text())
    other["info"]["version"] = "1.9"
    other["annotations"][2]["question_id"] = 7
    write(notes, other)
    with pytest.raises(DataError) as fault:
        load_items("vqav2", root)
    for words in (
        "do not belong together",
        "1 questions stand in v2_OpenEnded",
        "first 42002",
        "first 7",
        "2.0 and 1.9",
    ):
        assert words in str(fault.value)
    notes.unlink()
    with pytest.raises(DataError, match=r"annotations.json: there is no such file"):
        load_items("vqav2", root)


def test_llavas_question_files_are_enough_to_ask(tmp_path: Path) -> None:
    for task, split, name, image in (
        ("vqav2", "server", "llava_vqav2_mscoco_test2015.jsonl", "COCO_test2015_000000000001.jpg"),
        ("gqa", "test", "bunny_gqa_testdev_balanced.jsonl", "n1.jpg"),
        ("vizwiz", "server", "llava_test.jsonl", "VizWiz_test_00000000.jpg"),
    ):
        line = {"question_id": 1, "image": image, "text": "What?\nAnswer.", "category": "default"}
        write(tmp_path / task / name, [line])
        (item,) = load_items(task, tmp_path / task, split)
        assert (item.prompt, item.gold, item.meta["image_id"]) == ("What?\nAnswer.", None, image), task


def test_another_version_of_textvqa_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_version": "0.5", "data": []})
    with pytest.raises(DataError, match=r"version 0\.5; scores are published for 0\.5\.1"):
        load_items("textvqa", tmp_path)


def textvqa(root: Path) -> Path:
    rows = [
        {"image_id": "a1", "question": "what is WRITTEN here?", "question_id": 3, "answers": ["stop"] * 10},
        {"image_id": "b2", "question": "who?", "question_id": 4, "answers": ["ann"] * 10},
    ]
    write(root / "TextVQA_0.5.1_val.json", {"dataset_version": "0.5.1", "data": rows})
    return root


def test_ocr_words_come_from_either_file(tmp_path: Path) -> None:
    root = textvqa(tmp_path)
    with pytest.raises(DataError, match="textvqa_ocr tells the model what an OCR program read"):
        load_items("textvqa_ocr", root)
    rosetta = root / "TextVQA_Rosetta_OCR_v0.2_val.json"
    write(rosetta, {"data": [{"image_id": "a1", "ocr_tokens": ["STOP", "4"]}, {"image_id": "b2", "ocr_tokens": []}]})
    short = "\nAnswer the question using a single word or phrase."
    wanted = [
        f"What is written here?\nReference OCR token: STOP, 4{short}", f"Who?\nReference OCR token: {short}"
    ]  # fmt: skip
    assert [item.prompt for item in load_items("textvqa_ocr", root)] == wanted
    rosetta.unlink()
    lines = [{"question_id": n, "image": f"{n}.jpg", "text": t} for n, t in zip(("a1", "b2"), wanted, strict=True)]
    write(root / "llava_textvqa_val_v051_ocr.jsonl", lines)
    assert [item.prompt for item in load_items("textvqa_ocr", root)] == wanted
    assert load_items("textvqa", root)[0].prompt == f"what is WRITTEN here?{short}"
    write(root / "llava_textvqa_val_v051_ocr.jsonl", lines[:1])
    with pytest.raises(DataError, match=r"1 of 2 questions .first 4. have no OCR words"):
        load_items("textvqa_ocr", root)
    # Answers to both are joined by picture and question, whatever stands between.
    write(root / "llava_textvqa_val_v051_ocr.jsonl", lines)
    said = [{"question_id": n, "prompt": p, "text": "stop"} for n, p in zip(("a1", "b2"), wanted, strict=True)]
    assert score("textvqa_ocr", said, root)["score"] == score("textvqa", said, root)["score"] == 0.5


def test_vizwiz_answers_name_the_question_or_the_picture(tmp_path: Path) -> None:
    rows = [
        {
            "image": f"VizWiz_val_{k}.jpg", "question": "What?", "answer_type": "other", "answerable": 1,
            "answers": [{"answer": "tea", "answer_confidence": "yes"}] * 10,
        }
        for k in range(2)
    ]  # fmt: skip
    write(tmp_path / "val.json", rows)
    by_picture = [{"image": f"VizWiz_val_{k}.jpg", "answer": "tea"} for k in (1, 0)]
    assert score("vizwiz", by_picture, tmp_path)["score"] == 1.0
    write(tmp_path / "test.json", [{"image": "VizWiz_test_0.jpg", "question": "What?"}])
    assert load_items("vizwiz", tmp_path, "server")[0].gold is None
    write(tmp_path / "val.json", [rows[0] | {"answers": []}])
    with pytest.raises(DataError, match="question 0 has an empty list of answers"):
        load_items("vizwiz", tmp_path)


def test_references_are_read_from_pickles_and_from_lists(tmp_path: Path) -> None:
    refcoco(tmp_path / "one")
    refcoco(tmp_path / "two", list_name="refs(unc).json")
    one, two = (load_items("refcoco", tmp_path / folder) for folder in ("one", "two"))
    assert [item.question_id for item in one] == ["RefCOCO-0-0", "RefCOCO-2-20"]
    assert [(i.question_id, i.prompt, i.gold, i.meta) for i in one] == [
        (i.question_id, i.prompt, i.gold, i.meta) for i in two
    ]
    assert one[0].gold == [0.1, 0.1, 0.43, 0.35] and one[0].meta["exact"][2] == pytest.approx(130.4 / 300)
    assert len(load_items("refcoco", tmp_path / "one", "testA")) == 1


def test_one_list_a_folder_and_the_sets_in_their_order(tmp_path: Path) -> None:
    for name, lists in (("refcocog", ("refs(google).p", "refs(umd).p")), ("refcoco+", ("refs(unc).p",)),
                        ("refcoco", ("refs(google).p", "refs(unc).p"))):  # fmt: skip
        for k, list_name in enumerate(lists):
            refcoco(tmp_path, name, list_name, first=100 * (k + 1) if "google" in list_name else 0)
    names = [item.question_id for item in load_items("refcoco", tmp_path)]
    assert names == [f"{part}-{k}" for part in ("RefCOCO", "RefCOCO+", "RefCOCOg") for k in ("0-0", "2-20")]


def test_references_of_another_set_are_refused(tmp_path: Path) -> None:
    refcoco(tmp_path)
    write(tmp_path / "refcoco/instances.json", {"images": [], "annotations": []})
    with pytest.raises(DataError, match=r"reference 0 is of picture 9 and annotation 5, which .* does not have"):
        load_items("refcoco", tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo hurt > hurt.txt",)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (pickle.dumps(Evil(), protocol=2), "posix.system"),
        (pickle.dumps([Path("x")], protocol=2), "pathlib"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"cbuiltins\ngetattr\n(cbuiltins\nlist\nS'append'\ntR.", "builtins.getattr"),
        (b"cnumpy.core.multiarray\nscalar\n.", "numpy.core.multiarray.scalar"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "in place 2147483647, and has 9 bytes"),
        (b"\x80\x02]X\x01\x00\x00\x00r0r\xff\xff\xff\xff.", "in place 4294967295"),
        (b"(lp99999999999\n.", "in place 99999999999"),
        (b"\x80\x02X\xff\xff\xff\x7fab.", "out of range"),
        (b"", "out of range"),
        (b"[]", "not a pickle"),
        (b"\x80\x02}q\x00(U\x01a", "not a pickle"),
    ],
)
def test_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "refs(unc).p"
    path.write_bytes(data)
    with pytest.raises(DataError, match=named) as fault:
        read_pickle(path)
    assert str(path) in str(fault.value) and "as JSON beside it" in str(fault.value)
    assert not (tmp_path / "hurt.txt").exists()


def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'ref_id'\np4\nL7L\nsa.")
    assert read_pickle(path) == [{"sent": "café", "ref_id": 7}]
    path.write_bytes(b"\x80\x02}q\x00(U\x04sentq\x01U\x03cupq\x02U\x03idsq\x03]q\x04(K\x01K\x02eu.")
    assert read_pickle(path) == {"sent": "cup", "ids": [1, 2]}
    path.write_bytes(pickle.dumps({"a": (1, 2.5, True, None, {3})}, protocol=2))
    assert read_pickle(path) == {"a": (1, 2.5, True, None, {3})}


@given(st.binary(max_size=60))
def test_any_bytes_are_a_pickle_or_a_clear_fault(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.p"
    path.write_bytes(data)
    try:
        read_pickle(path)
    except DataError as fault:
        assert "not a pickle" in str(fault)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, 5))
def test_plain_pickles_of_every_protocol_are_read(
    tmp_path_factory: pytest.TempPathFactory, value: Any, protocol: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.p"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert read_pickle(path) == value


def ocid(root: Path, **changes: Any) -> Path:
    entry = {
        "scene_path": "ARID20/floor/a.png", "take_id": 9, "sentence": "The ball.", "bbox": "[64, 48, 320, 240]"
    } | changes  # fmt: skip
    write(root / "val_expressions.json", {"70000": entry, "70001": {**entry, "take_id": 17}})
    return root


def test_ocid_ref(tmp_path: Path) -> None:
    items = load_items("ocid_ref", ocid(tmp_path))
    assert [i.meta["group"] for i in items] == ["Minimum Clutter", "Maximum Clutter"]
    assert items[0].gold == [0.1, 0.1, 0.5, 0.5]
    assert items[0].image is not None and items[0].image.path.endswith("/ARID20/floor/a.png")
    said = [
        {"example_id": 70000, "text": "[0.1, 0.1, 0.5, 0.2]"},
        {"example_id": "70001", "text": "[0.1, 0.1, 0.2, 0.2]"},
    ]
    metrics = score("ocid_ref", said, tmp_path)["metrics"]  # overlaps of a quarter, and of a sixteenth
    assert [metrics[f"accuracy__OCIDRef-{part}"] for part in ("Minimum", "Maximum", "All")] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bbox": "[320, 48, 64, 240]"}, "is not x0, y0, x1, y1"),
        ({"bbox": [0, 0, 700, 10]}, "within 640 x 480"),
        ({"take_id": 21}, "take_id 21"),
        ({"take_id": None}, "take_id None"),
    ],
)
def test_another_version_of_ocid_ref_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_items("ocid_ref", ocid(tmp_path, **changes))


def test_prismatics_index_of_ocid_ref(tmp_path: Path) -> None:
    entry = {
        "example_id": 5, "ref_expression": "The box.", "bbox": [0.1, 0.2, 0.3, 0.4], "split": "val",
        "img_path": "download/ocid-ref/ARID10/floor/b.png", "clutter_split": "Medium Clutter",
    }  # fmt: skip
    write(tmp_path / "metadata-full.json", {"5": entry, "6": entry | {"split": "test"}})
    (item,) = load_items("ocid_ref", tmp_path)
    assert item.image is not None and item.image.path == str(tmp_path / "ARID10/floor/b.png")


# --- wordings and subsets -------------------------------------------------------------------------------------------

FAMILIES = {"vqa-v2": "vqav2", "text-vqa": "textvqa_ocr", "tally-qa": "tally_qa", "ocid-ref": "ocid_ref"}


@pytest.mark.goldens
def test_prismatics_wordings(goldens: Path) -> None:
    path = goldens / "eval/prompts/prismatic.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    compared = 0
    for line in filter(None, path.read_text("utf-8").split("\n")):
        record = json.loads(line)
        row = TASKS.get(FAMILIES.get(record["dataset_family"], record["dataset_family"]))
        if row is None or "prismatic" not in row.prompts:
            continue
        asked, *rest = record["args"]
        question, _, ocr = asked.partition("\nReference OCR token: ")
        options = "\n".join(f"{chr(65 + k)}. {option}" for k, option in enumerate(rest[0] if rest else []))
        fields = {"question": question, "ocr": ocr, "sent": asked, "caption": asked, "options": options}
        # The line end before it is the one that follows the picture.
        assert "\n" + row.prompts["prismatic"].format(**fields, context="") == record["human_message"], row.id
        compared += 1
    assert compared >= 7


def test_another_wording_is_asked_for_by_name(tmp_path: Path) -> None:
    rows = [{"answer": 2, "image": "a.jpg", "question": "How many?", "question_id": 1, "issimple": True}]
    write(tmp_path / "test.json", rows)
    assert load_items("tally_qa", tmp_path)[0].prompt.startswith("How many?\nAnswer the question")
    letters = load_items("tally_qa", tmp_path, prompts="prismatic")[0].prompt
    assert letters.startswith("How many?\nA. 0\nB. 1\n") and "\nP. 15\nAnswer with the option's letter" in letters
    with pytest.raises(RecipeError, match="'tally_qa' has no prompts 'qwen'; it has its own and prismatic"):
        load_items("tally_qa", tmp_path, prompts="qwen")


@pytest.mark.goldens
def test_prismatics_slim_order(goldens: Path) -> None:
    path = goldens / "eval/prompts/prismatic_slim_order.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    order = json.loads(path.read_text("utf-8"))
    items = [Item(str(k), None, "", "") for k in range(1000)]
    assert [int(item.question_id) for item in subset(items, 20, "prismatic")] == order["first_20"]
    joined = ",".join(item.question_id for item in subset(items, 1000, "prismatic"))
    assert sha256(joined.encode()).hexdigest() == order["sha256_of_comma_joined"]


def test_slim_sets_take_as_many_of_each_part() -> None:
    items = [Item(str(k), None, "", "", meta={"group": "ab"[k % 3 == 0]}) for k in range(60)]
    slim = subset(items, 5, "prismatic")
    assert [sum(item.meta["group"] == part for item in slim) for part in "ab"] == [5, 5]
    assert [item for item in subset(items, 9, "prismatic") if item in slim] == slim
    assert len(subset(items, None, "prismatic")) == 60
    with pytest.raises(RecipeError, match="chosen by 'hash' or as 'prismatic', not 'first'"):
        subset(items, 5, "first")


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("people", "said", "official", "submission", "lavis_", "trivlm", "kit"),
    [
        (ten("yes"), "Yes", 0.0, 1.0, 1.0, 1.0, 1.0),  # all agree, so the official rule compares to the letter
        (ten("Yes"), "yes", 0.0, 0.0, 0.0, 0.0, 1.0),
        (ten("yes", "yes."), "Yes.", 1.0, 1.0, 1.0, 1.0, 1.0),
        (ten("2", "two"), "two", 1.0, 1.0, 0.3, 0.3, 1.0),  # of the people's words LAVIS maps no numbers
        (ten("a cup", "cup"), "the cup", 1.0, 1.0, 1.0, 1.0, 1.0),
        (ten("2", "2."), "2", 1.0, 1.0, 1.0, 1.0, 0.3),
        (ten("t shirt", "t-shirt"), "t-shirt", 1.0, 1.0, 1.0, 1.0, 1.0),
        (ten("cat", "dog"), "\tcat\n", 0.3, 0.3, 0.3, 0.3, 0.3),
        (ten("cat", "dog"), "", 0.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_vqav2_by_lineage(
    people: list[str], said: str, official: float, submission: float, lavis_: float, trivlm: float, kit: float
) -> None:
    wanted = {"official": official, "submission": submission, "lavis": lavis_, "trivlm": trivlm, "vlmevalkit": kit}
    item = Item("1", None, "", people)
    found = {name: SCORERS[f"vqav2_{name}"].judge(item, said).score for name in wanted}
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("normal", "text", "expected"),
    [
        (vqa, "1,000 t-shirts", "1000 tshirts"),
        (m4c, "1,000 t-shirts", "1000 t shirts"),
        (lavis, "It's red,white", "it's red white"),
        (m4c, "It's red,white", "it 's redwhite"),
        (lavis, "2.", "2"),
        (vlmevalkit, "2.", "2."),
        (vlmevalkit, "yes.", "yes"),
        (vlmevalkit, "2.5", "2.5"),
        (lavis, "dont know", "don't know"),
        (vizwiz_api, "dont know", "don`t know"),
        (vizwiz_api, "cant weve couldn'tve", "can't we've couldn`t`ve"),
        (vizwiz_api, "somebody'd `tis", "somebody'd tis"),
        (lavis, "٣,٤ a-b", "٣٤ ab"),  # Arabic digits are digits to Python 3
        (vqa, "٣,٤ a-b", "٣ ٤ b"),
        (vqa, "none ten eleven", "0 10 eleven"),
    ],
)
def test_normalisers_differ_where_their_sources_do(normal: Callable[[str], str], text: str, expected: str) -> None:
    assert normal(text) == expected


@pytest.mark.parametrize(
    ("rule", "said", "gold", "right"),
    [
        ("gqa", "Yes.", "yes", True), ("gqa", "yes!", "yes", False), ("gqa", " yes", "yes", False),
        ("gqa_prismatic", "T-Shirt!", "tshirt", True), ("gqa_prismatic", "t-shirt", "t-shirt", False),
        ("gqa_lmms_eval", "t-shirt", "t-shirt", True), ("gqa_vlmevalkit", " Yes ", "yes", True),
        ("gqa_vlmevalkit", "yes.", "yes", False),
    ],
)  # fmt: skip
def test_gqa_by_lineage(rule: str, said: str, gold: str, right: bool) -> None:
    assert SCORERS[rule].judge(Item("1", None, "", gold), said).score == right


def test_vizwiz_counts_what_cannot_be_answered() -> None:
    rows = [(0, "Unanswerable."), (0, "tea"), (1, "unanswerable"), (1, "tea")]
    items = [
        Item(str(k), None, "", ten("unanswerable", "tea"), meta={"answerable": able})
        for k, (able, _) in enumerate(rows)
    ]
    rule = SCORERS["vizwiz_api"]
    metrics = rule.summary(items, [rule.judge(item, said) for item, (_, said) in zip(items, rows, strict=True)])
    assert metrics["accuracy__VizWiz-Overall"] == 65.0 and metrics["accuracy__VizWiz-Unanswerable-F1"] == 50.0
    # Two answers are ranked first, one rightly (1/2 of recall at precision 1/2); the rest comes at precision 2/4.
    assert metrics["accuracy__VizWiz-Unanswerable-AvgPR"] == 50.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2, 3, 4]", [1, 2, 3, 4]), ("at [0.1,0.2, 0.3,0.4]. Or [0,0,1,1]", [0.1, 0.2, 0.3, 0.4]),
        ("(0, 0, 1, 1)", None), ("[1e-1, 0, 1, 1]", None), ("[[0, 0, 1, 1]]", [0, 0, 1, 1]),
        ("[-0.5, 0, 1, 1]", [-0.5, 0, 1, 1]), ("[0 0 1 1]", None), ("", None), ("[.1, 0, 1, 1]", None),
    ],
)  # fmt: skip
def test_the_first_box_anywhere(text: str, expected: list[float] | None) -> None:
    assert first_box(text) == expected


@given(st.text(alphabet="[]-0123456789., e", max_size=40))
def test_no_box_breaks_a_rule(text: str) -> None:
    item = Item("1", None, "", [0.0, 0.0, 0.5, 0.5], meta={"group": "a", "exact": [0.0, 0.0, 0.5, 0.5]})
    for name in ("refcoco", "refcoco_lmms_eval", "refcoco_lmms_eval_exact", "ocid_ref"):
        rule = SCORERS[name]
        verdict = rule.judge(item, text)
        assert verdict.score in (0.0, 1.0)
        json.dumps(rule.summary([item], [verdict]), allow_nan=False)


def test_boxes_turned_round_or_without_bounds_are_wrong() -> None:
    item = Item("1", None, "", [0.0, 0.0, 0.5, 0.5])
    rule = SCORERS["refcoco_lmms_eval"]
    for text in ("[0.5, 0.5, 0.0, 0.0]", "[0, 0, 0.5, -0.5]", f"[0, 0, {'9' * 400}, 1]", "[0.5, 0.0, 0.0, 0.5]"):
        assert rule.judge(item, text).score == 0.0
    assert rule.judge(item, "no box").detail == {"center": 1.0}  # the original reads the corner there


def test_the_exact_box_is_not_in_prismatics_index(tmp_path: Path) -> None:
    entry = {
        "example_id": -77, "ref_expression": "cup", "bbox": [0.1, 0.1, 0.4, 0.4], "split": "val",
        "img_path": "x/COCO_1.jpg", "refer_dataset": "RefCOCO",
    }  # fmt: skip
    write(tmp_path / "metadata-full.json", {"-77": entry})
    said = [{"example_id": -77, "model_output": "[0.1, 0.1, 0.4, 0.4]"}]
    assert score("refcoco", said, tmp_path)["score"] == score("refcoco", said, tmp_path, rule="lmms_eval")["score"] == 1
    with pytest.raises(DataError, match="compares with the box before rounding"):
        score("refcoco", said, tmp_path, rule="lmms_eval_exact_box")


def tally(root: Path, n: int = 8) -> Path:
    rows = [
        {"answer": k % 4, "image": "a.jpg", "question": "How many?", "question_id": k, "issimple": k % 2 == 0}
        for k in range(n)
    ]
    write(root / "test.json", rows)
    return root


def test_counts_are_the_most_probable_letter(tmp_path: Path) -> None:
    root = tally(tmp_path)
    said = [{"question_id": k, "mc_probabilities": [1 / 16] * 16} for k in range(8)]  # all equal: the first, 0
    found = score("tally_qa", said, root)
    assert found["score"] == 0.25 and found["rule"] == "prismatic_probabilities"
    assert found["metrics"]["accuracy__TallyQA-simple-Accuracy"] == 0.5
    assert found["metrics"]["accuracy__TallyQA-final-AUCROC"] == 0.5
    with pytest.raises(DataError, match="16 probabilities are wanted"):
        score("tally_qa", [said[0] | {"mc_probabilities": [0.5, 0.5]}, *said[1:]], root)
    assert score("tally_qa", said[:6], root, allow_missing=True)["missing"] == 2
    text = [{"question_id": k, "text": str(k % 4)} for k in range(8)]
    assert score("tally_qa", text, root)["rule"] == "tallyqa_official_integers"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=30))
def test_areas_by_their_definitions(rows: list[tuple[bool, int]]) -> None:
    labels, scores = [int(label) for label, _ in rows], [value / 4 for _, value in rows]
    pairs = [
        (p, n) for p, a in zip(scores, labels, strict=True) if a for n, b in zip(scores, labels, strict=True) if not b
    ]
    area = sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs) if pairs else None
    assert auc_roc(labels, scores) == (pytest.approx(area) if pairs else None)
    if any(labels):
        area, recall = 0.0, 0.0
        for least in sorted(set(scores), reverse=True):
            taken = [label for label, value in zip(labels, scores, strict=True) if value >= least]
            area += (sum(taken) / sum(labels) - recall) * sum(taken) / len(taken)
            recall = sum(taken) / sum(labels)
        assert auc_pr(labels, scores) == pytest.approx(area)


# --- odd answers ----------------------------------------------------------------------------------------------------

SAID = [
    {"question_id": 42000, "text": "cat"},
    {"question_id": 42001, "text": "2"},
    {"question_id": 42002, "text": "yes"},
]


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["answers.jsonl", "answers.json"])
def test_answers_in_any_encoding_that_says_which(tmp_path: Path, encoding: str, name: str) -> None:
    root = vqav2(tmp_path, people=[ten("café"), ten("two", "2"), ten("yes")])
    said = [SAID[0] | {"text": "café"}, *SAID[1:]]
    path = tmp_path / name
    path.write_bytes((lines(said) if name.endswith("l") else json.dumps(said, ensure_ascii=False)).encode(encoding))
    assert score("vqav2", path, root)["score"] == 1.0


def test_answers_in_latin_1_are_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(lines([SAID[0] | {"text": "café"}]).encode("latin-1"))
    with pytest.raises(
        DataError, match=r"answers.jsonl: not UTF-8 text \(byte 35\)\. Save it as UTF-8.*iconv"
    ) as fault:
        score("vqav2", path, vqav2(tmp_path))
    assert "\n" not in str(fault.value)


def test_an_official_file_in_another_encoding(tmp_path: Path) -> None:
    root = vqav2(tmp_path)
    for path in root.glob("v2_*.json"):
        path.write_bytes(path.read_text("utf-8").encode("utf-16"))
    assert len(load_items("vqav2", root)) == 3


@given(st.randoms(use_true_random=False))
def test_order_ids_as_texts_and_line_ends_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random
) -> None:
    root = tmp_path_factory.getbasetemp() / "order"
    if not root.exists():
        vqav2(root)
    said = [
        {
            rng.choice(["question_id", "questionId"]): rng.choice([str, int])(r["question_id"]),
            rng.choice(["text", "answer", "prediction"]): rng.choice(["", "\n", " \t", "\r\n"]) + r["text"] + "\n\t",
        }
        for r in SAID
    ]
    rng.shuffle(said)
    (root / "answers.jsonl").write_text(lines(said).replace("\n", rng.choice(["\n", "\r\n", "\n\n"])), newline="")
    assert score("vqav2", root / "answers.jsonl", root, rule="official_on_submission")["score"] == 1.0


def test_a_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(lines([SAID[0] | {"text": "cat\u2028\x85"}, *SAID[1:]]), encoding="utf-8")
    assert score("vqav2", path, vqav2(tmp_path))["n"] == 3


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (SAID[:2], "1 questions without an answer (first '42002')"),
        ([*SAID, SAID[1]], "1 repeated ids (first '42001')"),
        ([*SAID, {"question_id": "42001", "text": "3"}], "1 repeated ids"),
        ([*SAID, {"question_id": 9, "text": "3"}], "1 foreign ids that no question has (first '9')"),
        ([*SAID[:2], {"question_id": 42002}], "needs an id (question_id,"),
        ([*SAID[:2], {"question_id": 42002, "text": None}], "text is None"),
        ([*SAID[:2], {"text": "yes"}], "it has text"),
        ([*SAID[:2], {}], "it has no field"),
    ],
)
def test_answers_that_do_not_fit_are_named(tmp_path: Path, records: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(DataError) as fault:
        score("vqav2", write(tmp_path / "answers.jsonl", records), vqav2(tmp_path))
    assert words in str(fault.value) and "answers.jsonl" in str(fault.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "answer 1: a table of fields is expected, not '1'"),
        (
            '{"question_id": 1}',
            "one JSON list of answers is expected, or one answer a line; it is one table of something else",
        ),
        ("[{]", "not JSON: .* at line 1, column 3"),
        ("7", "one JSON list of answers is expected, .* it is a number"),
    ],
)
def test_files_that_are_no_answers(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "answers.json").write_text(text)
    with pytest.raises(DataError, match=words):
        score("vqav2", tmp_path / "answers.json", vqav2(tmp_path))


def test_a_torn_last_line_is_an_answer_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(lines(SAID)[:-9])
    with pytest.raises(DataError, match="1 questions without an answer"):
        score("vqav2", path, vqav2(tmp_path))
    path.write_text(lines(SAID).replace('"cat"', '"cat', 1))
    with pytest.raises(DataError, match="line 1 is not JSON"):
        score("vqav2", path, tmp_path)


def test_prismatics_results_are_a_table_by_id(tmp_path: Path) -> None:
    table = {str(r["question_id"]): {"question_id": r["question_id"], "model_output": r["text"]} for r in SAID}
    assert score("vqav2", write(tmp_path / "results.json", table), vqav2(tmp_path))["score"] == 1.0


def test_an_empty_answer_is_wrong_and_unreadable(tmp_path: Path) -> None:
    found = score("vqav2", [r | {"text": ""} for r in SAID], vqav2(tmp_path))
    assert (found["score"], found["unparsable"], found["missing"]) == (0.0, 3, 0)


# --- the goldens' own files -------------------------------------------------------------------------------------------


@pytest.mark.goldens
@pytest.mark.parametrize(
    ("folder", "task", "name"),
    [
        ("vqav2", "vqav2", "bunny_vqav2.jsonl"),
        ("gqa", "gqa", "bunny_gqa_testdev_balanced.jsonl"),
        ("vizwiz", "vizwiz", "bunny_val.jsonl"),
        ("textvqa", "textvqa_ocr", "bunny_textvqa_val_v051_ocr.jsonl"),
    ],
)
def test_questions_are_put_as_in_bunnys_files(goldens: Path, folder: str, task: str, name: str) -> None:
    path = goldens / "eval" / folder / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    theirs = [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n") if line]
    assert [item.prompt for item in load_items(task, path.parent)] == theirs


@pytest.mark.goldens
@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_pickles_hold_what_the_refer_loader_finds(goldens: Path, name: str) -> None:
    root = goldens / "eval/refcoco"
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    (path,) = (root / name).glob("refs(*).p")
    refs = read_pickle(path)
    assert refs == json.loads(path.with_suffix(".json").read_text("utf-8"))
    wanted = json.loads((root / "expected.json").read_text("utf-8"))["scores"]["refer_loader_check"]["metrics"][name]
    found = {
        "sents": sum(len(ref["sentences"]) for ref in refs),
        "refs": len(refs),
        "val": sum(ref["split"] == "val" for ref in refs),
    }
    assert found == {key: wanted[key] for key in found}
