"""Phrases whose answer is a box."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from leveret.evaluate.forms.base import Form, Item, Place, read_whole
from leveret.evaluate.forms.pickles import read_pickle
from leveret.runs import DataError

# --- RefCOCO --------------------------------------------------------------------------------------------------------

REFCOCO_SETS = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}
"""Folder of the refer repository -> name of the set, as Prismatic's index writes it, and in its order."""
REFCOCO_LISTS = ("refs(unc)", "refs(umd)", "refs(google)")
"""A folder may hold the same references split by several people; scores are published for the first of these."""


def exact_box(bbox: Sequence[float], width: float, height: float) -> list[float]:
    """xywh in pixels -> [x0, y0, x1, y1] in 0..1."""
    x, y, w, h = bbox
    return [x / width, y / height, (x + w) / width, (y + h) / height]


def box_of(bbox: Sequence[float], width: float, height: float) -> list[float]:
    """xywh in pixels -> [x0, y0, x1, y1] in 0..1, each rounded to two decimals (Prismatic's box_xywh2xyxy)."""
    return [round(side, 2) for side in exact_box(bbox, width, height)]


def _refcoco(place: Place) -> list[Item]:
    """RefCOCO: `refs(unc|umd|google).p` (the refer repository's pickled list; the same list as `.json` is read first)
    and beside it COCO's `instances.json`.

    One item per sentence, with the id `<set>-<ref_id>-<sent_id>` of Prismatic's index; a folder that is none of the
    three official sets is a set under its own name. Prismatic's index (`metadata-full.json`, one entry per sentence
    with the box already normalised) is read too.
    """
    if place.files[0].name.startswith("metadata"):
        return [item for path in place.files for item in _prismatic_index(place, path)]
    items = []
    for path in _lists(place.files):
        instances = read_whole(path.with_name("instances.json"))
        images = {image["id"]: image for image in instances["images"]}
        boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
        name = REFCOCO_SETS.get(path.parent.name, path.parent.name)
        for ref in read_pickle(path) if path.suffix == ".p" else read_whole(path):
            if ref["split"] != place.split:
                continue
            if ref["image_id"] not in images or ref["ann_id"] not in boxes:
                raise DataError(
                    f"{path}: reference {ref['ref_id']} is of picture {ref['image_id']} and annotation "
                    f"{ref['ann_id']}, which {path.with_name('instances.json')} does not have; they are of different "
                    "sets or versions."
                )
            picture = images[ref["image_id"]]
            bbox, size = boxes[ref["ann_id"]], (picture["width"], picture["height"])
            for sentence in ref["sentences"]:
                items.append(
                    Item(
                        question_id=f"{name}-{ref['ref_id']}-{sentence['sent_id']}",
                        # The picture's own name: a ref's file_name carries the annotation's number at its end.
                        image=place.image(picture["file_name"]),
                        prompt=place.prompt.format(sent=sentence["sent"]),
                        gold=box_of(bbox, *size),
                        template=sentence.get("template", ref.get("template", "")),
                        meta={"image_id": picture["file_name"], "group": name, "exact": exact_box(bbox, *size)},
                    )
                )
    return items


def _lists(files: Sequence[Path]) -> list[Path]:
    """One list of references a folder, the sets in their order."""
    folders: dict[Path, list[Path]] = {}
    for path in files:
        if path.suffix in (".p", ".json"):
            folders.setdefault(path.parent, []).append(path)
    sets = list(REFCOCO_SETS)

    def rank(path: Path) -> tuple[int, bool, str]:
        split_by = REFCOCO_LISTS.index(path.stem) if path.stem in REFCOCO_LISTS else len(REFCOCO_LISTS)
        return split_by, path.suffix == ".p", path.name

    order = sorted(folders, key=lambda f: (sets.index(f.name) if f.name in sets else len(sets), str(f)))
    return [min(folders[folder], key=rank) for folder in order]


def _prismatic_index(place: Place, path: Path) -> Iterator[Item]:
    for entry in read_whole(path).values():
        if entry["split"] != place.split:
            continue
        name = PurePosixPath(entry["img_path"]).name
        meta = {"image_id": name, "group": entry["refer_dataset"]}
        if "bbox_xywh" in entry:
            meta["exact"] = exact_box(entry["bbox_xywh"], entry["width"], entry["height"])
        yield Item(
            question_id=str(entry["example_id"]),
            image=place.image(name),
            prompt=place.prompt.format(sent=entry["ref_expression"]),
            gold=list(entry["bbox"]),
            meta=meta,
        )


# --- OCID-Ref -------------------------------------------------------------------------------------------------------

OCID_SIZE = (640, 480)
CLUTTER = ((9, "Minimum Clutter"), (16, "Medium Clutter"), (20, "Maximum Clutter"))
"""The last `take_id` of each part: the table fills while the pictures are taken."""


def _ocid_ref(place: Place) -> list[Item]:
    """OCID-Ref: `<split>_expressions.json`, `{id: {scene_path, take_id, sentence, bbox, ...}}`, the box a JSON string
    of x0, y0, x1, y1 in pixels of 640 x 480; or Prismatic's index `metadata-full.json`."""
    items = []
    for path in place.files:
        for name, entry in read_whole(path).items():
            if path.name.startswith("metadata"):
                if entry["split"] != place.split:
                    continue
                scene, sentence = _scene(entry["img_path"]), entry["ref_expression"]
                gold, clutter = list(entry["bbox"]), entry["clutter_split"]
            else:
                scene, sentence = entry["scene_path"], entry["sentence"]
                gold, clutter = _ocid_box(entry["bbox"], path, name), _clutter(entry["take_id"], path, name)
            items.append(
                Item(
                    question_id=str(name),
                    image=place.image(scene),
                    prompt=place.prompt.format(sent=sentence),
                    gold=gold,
                    meta={"image_id": scene, "group": clutter},
                )
            )
    return items


def _scene(path: str) -> str:
    """A picture's path in the OCID folders: Prismatic's index writes where its downloads lie before it."""
    parts = PurePosixPath(path).parts
    start = next((k for k, part in enumerate(parts) if part.startswith(("ARID", "YCB"))), 0)
    return "/".join(parts[start:])


def _ocid_box(bbox: Any, path: Path, name: str) -> list[float]:
    x0, y0, x1, y1 = json.loads(bbox) if isinstance(bbox, str) else bbox
    width, height = OCID_SIZE
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise DataError(
            f"{path}: the box {bbox} of {name} is not x0, y0, x1, y1 within {width} x {height} pixels. Scores are "
            "published for files that hold corners; one that holds x, y, width, height is of another version."
        )
    return [round(x0 / width, 2), round(y0 / height, 2), round(x1 / width, 2), round(y1 / height, 2)]


def _clutter(take: Any, path: Path, name: str) -> str:
    for last, part in CLUTTER:
        if isinstance(take, int) and 0 <= take <= last:
            return part
    raise DataError(
        f"{path}: take_id {take!r} of {name}; pictures are numbered 0 to {CLUTTER[-1][0]} as a table fills."
    )


_EXAMPLE = ("model_output",)

BOXES = {
    "refcoco": Form(_refcoco, identity="example_id (<set>-<ref_id>-<sent_id>)", texts=_EXAMPLE),
    "ocid_ref": Form(_ocid_ref, identity="example_id (the key in the official file)", texts=_EXAMPLE),
}
