"""Phrases whose answer is a box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from leveret.evaluate.forms.base import Form, Item, Place
from leveret.runs import read_json

REFCOCO_SETS = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}
"""Folder of the refer repository -> name of the set, as Prismatic's index writes it."""


def box_of(bbox: Sequence[float], width: float, height: float) -> list[float]:
    """xywh in pixels -> [x0, y0, x1, y1] in 0..1, each rounded to two decimals (Prismatic's box_xywh2xyxy)."""
    x, y, w, h = bbox
    return [round(x / width, 2), round(y / height, 2), round((x + w) / width, 2), round((y + h) / height, 2)]


def _refcoco(place: Place) -> list[Item]:
    """RefCOCO: `refs(unc|umd).json` (the refer repository's list, which it pickles) and COCO's `instances.json`.

    One item per sentence, with the id `<set>-<ref_id>-<sent_id>` of Prismatic's index; a folder that is none of the
    three official sets is a set under its own name. Prismatic's index (`metadata-full.json`, one entry per sentence
    with the box already normalised) is read too.
    """
    items = []
    for path in place.files:
        if path.name.startswith("metadata"):
            items += _prismatic_index(place, path)
            continue
        instances = read_json(path.with_name("instances.json"))
        images = {image["id"]: image for image in instances["images"]}
        boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
        name = REFCOCO_SETS.get(path.parent.name, path.parent.name)
        for ref in read_json(path):
            if ref["split"] != place.split:
                continue
            picture = images[ref["image_id"]]
            gold = box_of(boxes[ref["ann_id"]], picture["width"], picture["height"])
            for sentence in ref["sentences"]:
                items.append(
                    Item(
                        question_id=f"{name}-{ref['ref_id']}-{sentence['sent_id']}",
                        # The picture's own name: a ref's file_name carries the annotation's number at its end.
                        image=place.image(picture["file_name"]),
                        prompt=place.prompt.format(sent=sentence["sent"]),
                        gold=gold,
                        template=sentence.get("template", ref.get("template", "")),
                        meta={"image_id": picture["file_name"], "group": name},
                    )
                )
    return items


def _prismatic_index(place: Place, path: Path) -> list[Item]:
    return [
        Item(
            question_id=str(entry["example_id"]),
            image=place.image(PurePosixPath(entry["img_path"]).name),
            prompt=place.prompt.format(sent=entry["ref_expression"]),
            gold=list(entry["bbox"]),
            meta={"image_id": PurePosixPath(entry["img_path"]).name, "group": entry["refer_dataset"]},
        )
        for entry in read_json(path).values()
        if entry["split"] == place.split
    ]


BOXES = {"refcoco": Form(_refcoco, identity="example_id (<set>-<ref_id>-<sent_id>)")}
