"""Every published benchmark in its official files, two or three pictures each; made here, with nothing of theirs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHADES = ((200, 40, 40), (50, 70, 200), (40, 150, 70))


def picture(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, SHADES[number % 3]).save(buffer, "JPEG")
    return buffer.getvalue()


def shown(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, str):
        path.write_text(value, "utf-8")
    elif path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        path.write_text("".join(json.dumps(record) + "\n" for record in value), "utf-8")
    else:
        path.write_text(json.dumps(value), "utf-8")


def mme(root: Path) -> None:
    for place, apart in (("existence", False), ("artwork", True), ("code_reasoning", False)):
        for number in range(2):
            folder = root / "MME_Benchmark_release_version" / place
            ask = "Is there a red thing in this image? Please answer yes or no."
            text = f"{ask}\tYes\n{ask.replace('red', 'blue')}\tNo\n"
            put(folder / ("questions_answers_YN" if apart else "") / f"{number:04d}.txt", text)
            shown(folder / ("images" if apart else "") / f"{number:04d}.jpg", number)


def mmbench(root: Path, name: str = "MMBench_DEV_EN_legacy.tsv") -> None:
    head = "index question hint A B C D answer category image source l2-category comment split".split()
    lines = ["\t".join(head)]
    for number in range(2):
        options = ["a red thing", "a cat", "a boat", ""]
        for turn in range(3):
            turned = [*options[turn:3], *options[:turn], ""]
            letter = "ABC"[turned.index("a red thing")]
            image = base64.b64encode(picture(number)).decode()
            row = [str(number + turn * 1_000_000), "What is shown?", "", *turned, letter, "image_topic", image]
            lines.append("\t".join([*row, "made", "coarse_perception", "", "dev"]))
    put(root / name, "\n".join(lines) + "\n")


def mmbench_cn(root: Path) -> None:
    mmbench(root, "MMBench_DEV_CN_legacy.tsv")


def seed_bench(root: Path) -> None:
    asked = []
    for number in range(3):
        kind = "video" if number == 2 else "image"
        name, data = ("v7", "clip_7") if kind == "video" else (str(100 + number), f"{number}_0")
        record = {"answer": "A", "data_id": data, "data_type": kind, "question": "What is shown?"}
        record |= {f"choice_{letter}": f"thing {letter}" for letter in "abcd"}
        asked.append(record | {"question_id": name, "question_type_id": 10 if kind == "video" else 1})
        shown(root / ("SEED-Bench-video-image/clip_7.png" if kind == "video" else f"SEED-Bench-image/{data}"), number)
    put(root / "SEED-Bench.json", {"questions": asked, "question_type": {"Scene Understanding": 1, "Action": 10}})


def mmmu(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for subject in ("Art", "Math"):
        rows = [
            {
                "id": f"validation_{subject}_{number}",
                "question": "<image 1> What is shown?",
                "options": "['a red thing', 'a cat']" if number else "[]",
                "answer": "A" if number else "red",
                "question_type": "multiple-choice" if number else "open",
                "image_1": {"bytes": picture(number), "path": f"{subject}_{number}.jpg"},
            }
            for number in range(2)
        ]
        (root / subject).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / subject / "validation-00000-of-00001.parquet")


def cmmmu(root: Path) -> None:
    kinds = {0: "选择", 1: "判断", 2: "填空"}
    rows = []
    for number, kind in kinds.items():
        name = f"q_{number}.jpg"
        record = {"id": number, "type": kind, "question": f'<img="{name}">图中是什么?', "category": "艺术与设计"}
        record |= {f"option{place}": text if number == 0 else "" for place, text in enumerate("红绿蓝黑", 1)}
        record |= {"answer": {0: "A", 1: "对", 2: "红"}[number], "subcategory": "艺术", "img_list": [name]}
        rows.append(record)
        shown(root / "images" / name, number)
    put(root / "cmmmu-data-val-answer.jsonl", rows)


def vqav2(root: Path) -> None:
    asked = [{"image_id": k, "question": "What colour is it?", "question_id": 10 * k + 1} for k in range(2)]
    said = [
        {
            "question_id": record["question_id"],
            "image_id": record["image_id"],
            "question_type": "what colour",
            "answer_type": "other",
            "multiple_choice_answer": "red",
            "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)],
        }
        for record in asked
    ]
    put(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked, "data_subtype": "val2014"})
    put(root / "v2_mscoco_val2014_annotations.json", {"annotations": said, "data_subtype": "val2014"})
    for number in range(2):
        shown(root / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)


def gqa(root: Path) -> None:
    kind = {"isBalanced": True, "types": {"structural": "query", "semantic": "attr"}}
    asked = {f"0{k}": kind | {"question": "What colour is it?", "imageId": f"n{k}", "answer": "red"} for k in range(2)}
    put(root / "testdev_balanced_questions.json", asked)
    for number in range(2):
        shown(root / "images" / f"n{number}.jpg", number)


def textvqa(root: Path) -> None:
    asked = [
        {"image_id": f"t{k}", "question": "What does it say?", "question_id": k, "answers": ["stop"] * 10}
        for k in range(2)
    ]
    put(root / "TextVQA_0.5.1_val.json", {"data": asked})
    tokens = [{"image_id": f"t{k}", "ocr_tokens": ["stop", "go"], "ocr_info": []} for k in range(2)]
    put(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    for number in range(2):
        shown(root / "train_images" / f"t{number}.jpg", number)


def vizwiz(root: Path) -> None:
    said = [{"answer": "red", "answer_confidence": "yes"}] * 10
    asked = [
        {"image": f"VizWiz_val_{k}.jpg", "question": "What is it?", "answers": said, "answer_type": "other",
         "answerable": 1}
        for k in range(2)
    ]  # fmt: skip
    put(root / "val.json", asked)
    for number in range(2):
        shown(root / "images" / f"VizWiz_val_{number}.jpg", number)


def scienceqa(root: Path) -> None:
    common = {
        "question": "What is shown?",
        "choices": ["a red thing", "a cat"],
        "answer": 0,
        "hint": "",
        "split": "test",
    }
    put(root / "problems.json", {"1": common | {"image": "image.png"}, "2": common | {"image": None}})
    put(root / "pid_splits.json", {"test": ["1", "2"]})
    shown(root / "images/test/1/image.png", 0)


def pope(root: Path) -> None:
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": 2 * k + n + 1, "image": f"COCO_val2014_{k:012d}.jpg", "label": label,
             "text": "Is there a cat in the image?"}
            for k in range(2)
            for n, label in enumerate(("yes", "no"))
        ]  # fmt: skip
        put(root / f"coco_pope_{category}.json", rows)
    for number in range(2):
        shown(root / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)


def mm_vet(root: Path) -> None:
    asked = {
        f"v1_{k}": {"imagename": f"v1_{k}.png", "question": "What is it?", "answer": "red<OR>crimson",
                    "capability": ["rec"], "imagesource": ""}
        for k in range(2)
    }  # fmt: skip
    put(root / "mm-vet.json", asked)
    for number in range(2):
        shown(root / "images" / f"v1_{number}.png", number)


def llava_bench_w(root: Path) -> None:
    kinds = ("conv", "detail", "complex")
    asked = [{"question_id": k, "image": "001.jpg", "category": kind, "text": "What is it?"}
             for k, kind in enumerate(kinds)]  # fmt: skip
    put(root / "questions.jsonl", asked)
    put(root / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A red thing."}])
    put(
        root / "answers_gpt4.jsonl", [{"question_id": k, "text": "A red thing.", "answer_id": str(k)} for k in range(3)]
    )
    shown(root / "images/001.jpg", 0)


def refcoco(root: Path) -> None:
    images = [{"id": k, "file_name": f"COCO_train2014_{k:012d}.jpg", "width": 48, "height": 40} for k in range(2)]
    for name, split in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        refs = [
            {"ref_id": k, "ann_id": k, "image_id": k, "split": "val", "category_id": 1, "sent_ids": [k],
             "sentences": [{"sent": "the thing", "sent_id": k, "raw": "the thing", "tokens": ["the", "thing"]}],
             "file_name": f"COCO_train2014_{k:012d}_{k}.jpg"}
            for k in range(2)
        ]  # fmt: skip
        boxes = [{"id": k, "image_id": k, "bbox": [4.0, 4.0, 20.0, 20.0], "category_id": 1} for k in range(2)]
        put(root / name / "instances.json", {"images": images, "annotations": boxes})
        put(root / name / f"refs({split}).json", refs)
    for image in images:
        shown(root / "train2014" / image["file_name"], image["id"])


def ocid_ref(root: Path) -> None:
    asked = {}
    for number, take in enumerate((0, 12)):
        scene = f"ARID10/table/bottom/box/seq0{number}/rgb/result_{number}.png"
        sequence = str(Path(scene).parent.parent)
        asked[str(number)] = {
            "scene_path": scene, "sequence_path": sequence, "take_id": take, "sentence": "The ball.",
            "bbox": "[100, 100, 300, 300]", "scene_id": number, "instance_id": number, "class": "ball",
        }  # fmt: skip
        shown(root / scene, number)
    put(root / "val_expressions.json", asked)


def vsr(root: Path) -> None:
    rows = [{"image": f"{k}.jpg", "caption": "The ball is left of the box.", "label": k % 2, "relation": "left of"}
            for k in range(4)]  # fmt: skip
    put(root / "test.jsonl", rows)
    for number in range(4):
        shown(root / "images" / f"{number}.jpg", number)


def tally_qa(root: Path) -> None:
    rows = [
        {"answer": k, "data_source": "amt" if k else "imported_vqa", "image": f"VG_100K/{k}.jpg", "image_id": k,
         "issimple": not k, "question": "How many balls are there?", "question_id": 30_000_000 + k}
        for k in range(2)
    ]  # fmt: skip
    put(root / "test.json", rows)
    for number in range(2):
        shown(root / "VG_100K" / f"{number}.jpg", number)


def ai2d(root: Path) -> None:
    for number in range(2):
        name = f"{number}.png"
        asked = {
            "What does A show?": {"abcLabel": False, "answerTexts": ["root", "stem", "leaf", "flower"],
                                  "correctAnswer": 1, "questionId": f"{name}-0"}
        }  # fmt: skip
        put(root / "questions" / f"{name}.json", {"imageName": name, "questions": asked})
        shown(root / "images" / name, number)
    put(root / "ai2d_test_ids.csv", "0\n")


OFFICIAL: dict[str, Callable[[Path], None]] = {
    "mme": mme, "mmbench": mmbench, "mmbench_cn": mmbench_cn, "seed_bench": seed_bench, "mmmu": mmmu, "cmmmu": cmmmu,
    "vqav2": vqav2, "gqa": gqa, "textvqa": textvqa, "textvqa_ocr": textvqa, "vizwiz": vizwiz, "scienceqa": scienceqa,
    "pope": pope, "mm_vet": mm_vet, "llava_bench_w": llava_bench_w, "refcoco": refcoco, "ocid_ref": ocid_ref,
    "vsr": vsr, "tally_qa": tally_qa, "ai2d": ai2d,
}  # fmt: skip
"""Task -> what writes its official files, pictures included, into a folder."""
