"""A user's own pictures, from a folder to a model that answers: formats, copies, broken files, mistakes."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import leveret
from leveret import cli
from leveret.evaluate import load_items, score
from leveret.generate.model import reference
from leveret.images import ImageFault, load
from leveret.pool import open_source
from leveret.records import ImageRef
from leveret.runs import DataError, read_jsonl

DOCS = Path(__file__).resolve().parents[1] / "docs" / "own-data.md"
SMALL = ("stages.align.steps=2", "stages.tune.steps=2", "stages.align.batch=8", "stages.tune.batch=8", "ranks=1")


class Said:
    """One command's end: exit code, standard output, and what stood on standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in err, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """`run("pool", "check", ...)` is a command line in this process."""

    def call(*args: Any, code: int = 0) -> Said:
        capsys.readouterr()
        found = cli.run([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert found == code, f"{found}: {err[-2000:]}"
        return Said(found, out, err)

    return call


def drawn(seed: int, width: int = 48, height: int = 36) -> Image.Image:
    """A picture of soft colours, unlike those of other seeds."""
    cells = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def packed(image: Image.Image, form: str = "JPEG", **how: Any) -> bytes:
    held = BytesIO()
    image.save(held, form, **how)
    return held.getvalue()


def put(folder: Path, name: str, data: bytes, caption: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(caption + "\n", "utf-8")


def talk(name: str, said: str, question: str = "What is this?", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": said}]
    return {"id": name, "image": name, "conversations": turns, **more}


def write_list(path: Path, records: Sequence[Any]) -> Path:
    path.write_text(json.dumps(records), "utf-8")
    return path


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 900 million pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


BROKEN = {
    "missing.jpg": "image missing",
    "empty.jpg": "image empty",
    "cut.jpg": "image truncated",
    "page.jpg": "image not an image",
    "tiff.jpg": "image format not allowed",
    "bomb.png": "image too many pixels",
}


def spoil(folder: Path) -> None:
    """One file of each kind of `BROKEN`, with its caption; of the missing one only the caption."""
    whole = packed(drawn(0, 200, 150))
    contents = {
        "empty.jpg": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "tiff.jpg": packed(drawn(1), "TIFF"),
        "bomb.png": bomb(),
    }
    for name, data in contents.items():
        put(folder, name, data, f"a {name}")
    (folder / "missing.txt").write_text("gone")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos/` and `my.json` of 200 samples, of which six (3 %) are broken, each in its own way."""
    home = tmp_path_factory.mktemp("spoilt")
    for number in range(194):
        put(home / "photos", f"{number:03d}.jpg", packed(drawn(number)), f"picture {number}")
    spoil(home / "photos")
    names = [f"{number:03d}.jpg" for number in range(194)] + list(BROKEN)
    write_list(home / "my.json", [talk(name, f"a {name}") for name in names])
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small, whole `photos/` with `my.json`, `photos/test.json`, `photos/train.json`, and a model in `run/`."""
    home = tmp_path_factory.mktemp("home")
    names = [f"{number}.jpg" for number in range(12)]
    for number, name in enumerate(names):
        put(home / "photos", name, packed(drawn(number)), f"picture {number}")
    write_list(home / "my.json", [talk(name, "A red square.") for name in names])
    write_list(home / "photos" / "test.json", [talk(name, "Two.") for name in names[:4]])
    write_list(home / "photos" / "train.json", [talk(name, "two") for name in names[4:]])
    photos, own = str(home / "photos"), str(home / "my.json")
    data = [f"stages.align.data={photos}", f"stages.tune.data={own}", f"stages.tune.images={photos}"]
    leveret.train("world", home / "run", [*data, *SMALL])
    return home


# --- copies ---------------------------------------------------------------------------------------------------------


def _copies(photo: Image.Image, random: np.random.Generator) -> dict[str, bytes]:
    """Re-encoded, resized and cropped copies of a photo, as they go round the web."""
    scale, quality = float(random.uniform(0.5, 2)), int(random.integers(30, 91))
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    cut = [0.05 * float(random.uniform(0.5, 1)) for _ in range(4)]
    box = (
        photo.width * cut[0], photo.height * cut[1], photo.width * (1 - cut[2]), photo.height * (1 - cut[3]),
    )  # fmt: skip
    return {
        "encoded": packed(photo, quality=quality),
        "resized": packed(photo.resize(size, Image.Resampling.BICUBIC), quality=90),
        "cropped": packed(photo.crop(tuple(map(round, box))), quality=int(random.integers(60, 91))),
    }


def test_copies_among_real_photos_are_found_and_strangers_are_left_apart(
    photos: Path, tmp_path: Path, run: Any
) -> None:
    random = np.random.default_rng(7)
    files = sorted(photos.glob("*.jpg"))
    folder = tmp_path / "photos"
    for number, file in enumerate(files):
        put(folder, f"{file.stem}/original.jpg", file.read_bytes(), file.stem)
        if number % 2:
            for kind, data in _copies(Image.open(file).convert("RGB"), random).items():
                put(folder, f"{file.stem}/{kind}.jpg", data, f"{kind} {file.stem}")
    spoil(folder)
    said = run("condense", folder, "-r", "photos", "-o", tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "ledger").to_pylist()
    assert len(rows) == len(files) + 3 * (len(files) // 2) + len(BROKEN)
    groups: dict[Any, set[str]] = {}
    for row in rows:
        if row["verdict"] != "read":
            groups.setdefault(row["component"], set()).add(row["id"].partition("/")[0])
    assert len(groups) == len(files), "a copy was missed"
    assert all(len(names) == 1 for names in groups.values()), "two photos were taken for one"
    kept = [row["id"].partition("/")[0] for row in rows if row["verdict"] == "kept"]
    assert sorted(kept) == sorted(file.stem for file in files)
    refused = {row["id"]: row["reason"] for row in rows if row["verdict"] == "read"}
    assert refused.pop("missing.txt") == "caption without a photo"
    assert refused == {name: reason for name, reason in BROKEN.items() if name != "missing.jpg"}
    assert f"{len(files):,} kept" in said.out and "left out by dedup: near copy" in said.out
    report = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "image truncated" in report and "Groups by their size" in report


# --- formats --------------------------------------------------------------------------------------------------------


def _forms(photo: Image.Image) -> dict[str, tuple[bytes, tuple[int, int]]]:
    """name -> (a file of the photo, the size it must be seen in)."""
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned right by a quarter
    clear = photo.copy()
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    size = photo.size
    return {
        "plain.JPG": (packed(photo), size),
        "turned.jpg": (packed(photo.transpose(Image.Transpose.ROTATE_90), exif=turned), size),
        "opaque.png": (packed(photo, "PNG"), size),
        "clear.png": (packed(clear, "PNG"), size),
        "deep/er/web page.webp": (packed(photo, "WEBP"), size),
        "grey.jpeg": (packed(photo.convert("L")), size),
        "cmyk.jpg": (packed(photo.convert("CMYK")), size),
        "палитра.gif": (packed(photo.convert("P"), "GIF"), size),
        "map.bmp": (packed(photo, "BMP"), size),
    }


def test_every_form_of_picture_goes_through(photos: Path, tmp_path: Path, run: Any) -> None:
    names = sorted(photos.glob("*.jpg"))
    forms = _forms(Image.open(names[3]).convert("RGB"))
    folder = tmp_path / "photos"
    for name, (data, _) in forms.items():
        put(folder, name, data, f"the picture as {name}")
    for other in names[20:26]:
        put(folder, other.name, other.read_bytes(), other.stem)
    listed = write_list(tmp_path / "my.json", [talk(name, "A thing.") for name in forms])
    said = run("pool", "check", folder, "-o", tmp_path / "check", "--json")
    assert json.loads(said.out)["quarantined"] == 0 and json.loads(said.out)["total"] == len(forms) + 6
    said = run("pool", "check", listed, "--images", folder, "-o", tmp_path / "check-list")
    assert f"{len(forms)} samples: {len(forms)} good, 0 refused" in said.out
    seen = {row["image"]: row for row in pq.read_table(tmp_path / "check-list" / "index.parquet").to_pylist()}
    assert {name: (row["width"], row["height"]) for name, row in seen.items()} == {
        name: size for name, (_, size) in forms.items()
    }
    run("condense", folder, "-r", "photos", "-o", tmp_path / "out")
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "out" / "ledger").to_pylist()}
    # Grey and half transparent ones are other pictures; the rest is one picture in other clothes.
    same = {rows[name]["component"] for name in forms if name not in ("grey.jpeg", "clear.png")}
    assert len(same) == 1 and not same & {rows[other.name]["component"] for other in names[20:26]}
    run("condense", listed, "--images", folder, "-r", "world", "-o", tmp_path / "world", "steps.dedup=null",
        "steps.top.share=1")  # fmt: skip
    kept = json.loads((tmp_path / "world" / "coreset.json").read_text("utf-8"))
    assert [record["image"] for record in kept] == list(forms)
    assert all(open_source(tmp_path / "world" / "coreset.json", folder).sample(n).images for n in range(len(forms)))


def test_a_picture_given_in_memory_is_the_picture_in_its_file(tmp_path: Path) -> None:
    for name, (data, size) in _forms(drawn(5)).items():
        path = tmp_path / Path(name).name
        path.write_bytes(data)
        held, kept = reference(Image.open(path)), reference(data)
        assert held is not None and kept is not None
        assert load(held).size == load(ImageRef(str(path))).size == size
        assert load(held).tobytes() == load(kept).tobytes() == load(ImageRef(str(path))).tobytes()
    deep = Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))
    held = reference(deep)
    assert held is not None and 120 < np.asarray(load(held)).mean() < 135
    (tmp_path / "cut.jpg").write_bytes(packed(drawn(1, 200, 200))[:900])
    with pytest.raises(ImageFault, match=r"cut\.jpg: damaged"):
        reference(Image.open(tmp_path / "cut.jpg"))


# --- broken files ---------------------------------------------------------------------------------------------------


def _named(file: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in read_jsonl(file)}


def test_broken_files_stop_no_station_and_each_is_named(spoilt: Path, tmp_path: Path, run: Any) -> None:
    own, photos = spoilt / "my.json", spoilt / "photos"
    said = run("pool", "check", own, "--images", photos, "-o", tmp_path / "check")
    assert "200 samples: 194 good, 6 refused" in said.out
    assert _named(tmp_path / "check" / "quarantine.jsonl") == BROKEN
    assert all(f"1  {reason}" in said.out for reason in BROKEN.values())

    said = run("embed", own, "--images", photos, "--encoder", "pixels", "-o", tmp_path / "vectors")
    assert "200 samples: 194 embedded" in said.out
    assert _named(tmp_path / "vectors" / "quarantine.jsonl") == BROKEN
    assert all(f"1 refused: {reason}" in said.out for reason in BROKEN.values())

    for recipe in ("photos", "world"):
        facts = json.loads(
            run("condense", own, "--images", photos, "-r", recipe, "-o", tmp_path / recipe, "--json").out
        )
        assert facts["left_out"]["read"] == dict.fromkeys(BROKEN.values(), 1)
        gone = sum(count for reasons in facts["left_out"].values() for count in reasons.values())
        assert facts["kept"] + gone == facts["input"] == 200

    unnamed = {"missing.txt": "caption without a photo"}  # nothing else names the missing photo of a folder
    in_folder = {name: why for name, why in BROKEN.items() if name != "missing.jpg"} | unnamed
    for kind, data, lost in (("list", own, BROKEN), ("folder", photos, in_folder)):
        said = run(
            "train", "world", f"stages.align.data={data}", f"stages.align.images={photos}", "-o", tmp_path / kind,
            f"stages.tune.data={data}", f"stages.tune.images={photos}", *SMALL, "--stage", "align",
        )  # fmt: skip
        assert _named(tmp_path / kind / "align" / "quarantine.jsonl") == lost
        assert "194 samples; features kept" in said.err and "refused    6 more: " in said.err
        assert all(f"1 {reason}" in said.err for reason in lost.values())


def test_pictures_that_fail_while_training_are_counted_at_the_end(spoilt: Path, tmp_path: Path, run: Any) -> None:
    own, photos = spoilt / "my.json", spoilt / "photos"
    said = run(
        "train", "world", f"stages.align.data={own}", f"stages.align.images={photos}", "--stage", "align",
        f"stages.tune.data={own}", "ranks=1", "stages.align.cache_features=false", "stages.align.steps=13",
        "-o", tmp_path / "run",
    )  # fmt: skip
    # One is not there, which is seen beforehand; the others are found out when they are decoded.
    assert "refused    1 more: 1 image missing" in said.err and "align: 5 sample(s) taught nothing: " in said.err
    assert all(f"1 {reason}" in said.err for reason in BROKEN.values())
    assert _named(tmp_path / "run" / "align" / "quarantine.jsonl") == BROKEN


def test_a_caption_that_lost_its_photo_is_not_lost_in_silence(tmp_path: Path) -> None:
    put(tmp_path / "photos", "a/cat.jpg", packed(drawn(1)), "a cat")
    (tmp_path / "photos" / "a" / "dog.txt").write_text("a dog")
    source = open_source(tmp_path / "photos")
    assert len(source) == 2 and source.sample(0).caption == "a cat"
    with pytest.raises(DataError, match=r"a/dog\.txt.*caption without a photo"):
        source.sample(1)
    # Beside a table a .txt may be anything, and a folder of texts alone holds no photos.
    (tmp_path / "photos" / "captions.csv").write_text("file,caption\na/cat.jpg,cat\n")
    assert len(open_source(tmp_path / "photos")) == 1
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_text("words")
    with pytest.raises(DataError, match="holds no photos"):
        open_source(tmp_path / "texts")


@pytest.mark.parametrize("verb", ["check", "embed", "condense", "train", "dry"])
def test_a_wrong_image_folder_is_told_as_such(verb: str, home: Path, tmp_path: Path, run: Any) -> None:
    own = home / "my.json"
    teach = ["train", "world", f"stages.align.data={own}", f"stages.tune.data={own}", *SMALL, "-o", tmp_path / "o"]
    commands = {
        "check": ["pool", "check", own, "-o", tmp_path / "o"],
        "embed": ["embed", own, "--encoder", "pixels", "-o", tmp_path / "o"],
        "condense": ["condense", own, "-r", "photos", "-o", tmp_path / "o"],
        "train": teach,
        "dry": [*teach, "--dry-run"],
    }
    text = run(*commands[verb], code=3).err
    assert ("The first is" in text) == (verb in ("check", "train")), text
    assert "12 image missing" in text and f"Image paths start from {home}" in text and "--images" in text
    if verb != "dry":
        place = Path(re.search(r"Each is named in (\S+quarantine\.jsonl)", text)[1])  # type: ignore[index]
        assert len(read_jsonl(place)) == 12


# --- the whole way --------------------------------------------------------------------------------------------------


def test_the_whole_way_on_the_command_line(home: Path, tmp_path: Path, run: Any) -> None:
    photos = home / "photos"
    run("condense", photos, "-r", "world", "steps.top.share=0.5", "-o", tmp_path / "core")
    assert len(json.loads((tmp_path / "core" / "coreset.json").read_text("utf-8"))) == 6
    said = run(
        "train", "world", f"stages.align.data={tmp_path / 'core' / 'coreset.json'}", f"stages.align.images={photos}",
        f"stages.tune.data={home / 'my.json'}", f"stages.tune.images={photos}", *SMALL, "-o", tmp_path / "run",
    )  # fmt: skip
    assert f"the model is in {tmp_path / 'run' / 'model'}" in said.out and "bad 0" in said.err
    said = run("eval", tmp_path / "run", photos, "--suite", "own", "-o", tmp_path / "exam")
    assert "own" in said.out and (tmp_path / "exam" / "report.html").is_file()
    said = run("chat", tmp_path / "run", photos / "1.jpg", "-p", "What is this?")
    assert len(said.out.splitlines()) == 1
    said = run(
        "show", home / "my.json", "--images", photos, "--id", "3.jpg", "--model", tmp_path / "run", "-o", tmp_path
    )
    assert "A red square." in said.out and "Answer" in said.out and (tmp_path / "sample-3.png").is_file()


def test_the_whole_way_in_python(home: Path, tmp_path: Path) -> None:
    photos, own = home / "photos", home / "my.json"
    core = leveret.condense(photos, tmp_path / "core", "photos")
    data = [f"stages.align.data={core / 'coreset.json'}", f"stages.align.images={photos}", f"stages.tune.data={own}"]
    model = leveret.train("world", tmp_path / "run", [*data, f"stages.tune.images={photos}", *SMALL])
    assert model == tmp_path / "run" / "model"
    results = leveret.evaluate(tmp_path / "run", photos, "own", out=tmp_path / "exam", blind=False)
    assert results["tasks"]["own"]["n"] == 4 and results["tasks"]["own"]["majority"] == 1.0
    talker = leveret.load(tmp_path / "run")
    answers = [
        talker.ask(picture, "What is this?", 4)
        for picture in (photos / "1.jpg", str(photos / "1.jpg"), Image.open(photos / "1.jpg"))
    ]
    assert len(set(answers)) == 1 and isinstance(talker.ask(None, "What is this?", 4), str)


def test_own_questions_are_asked_turn_by_turn_and_judged_by_their_words(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(packed(drawn(1)))
    later = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two"}]
    first = talk("a.jpg", "The red ball.", template="what")
    first["conversations"] += later
    text = {"id": "t", "conversations": later}
    write_list(tmp_path / "test.json", [first, text])
    items = load_items("own", tmp_path)
    assert [(item.question_id, item.prompt, item.gold) for item in items] == [
        ("a.jpg", "What is this?", "The red ball."), ("a.jpg#1", "How many?", "Two"), ("t", "How many?", "Two"),
    ]  # fmt: skip
    assert [item.image is None for item in items] == [False, False, True] and items[0].template == "what"
    texts = {"a.jpg": "a Red ball", "a.jpg#1": "2.", "t": "three"}
    found = score("own", [{"question_id": name, "text": text} for name, text in texts.items()], tmp_path)
    assert found["score"] == pytest.approx(2 / 3) and found["images"] == 2
    write_list(tmp_path / "val.json", [{**first, "image": ["a.jpg", "a.jpg"]}])
    with pytest.raises(DataError, match="image marks do not match"):
        load_items("own", tmp_path, "val")


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mess(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with everything that can be given wrongly."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "run", "my.json"):
        (tmp_path / name).symlink_to(home / name)
    spoil(tmp_path / "bad")
    (tmp_path / "torn.json").write_text('[{"id": 1,')
    (tmp_path / "words.json").write_text("hello")
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "zero.json").touch()
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    (tmp_path / "photos.zip").write_bytes(b"PK")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.md").write_text("no pictures")
    (tmp_path / "mine.yaml").write_text("extends: world\nseeed: 1\n")
    (tmp_path / "torn.yaml").write_text("name: [\n")
    return tmp_path


TEACH = ("train", "world", "stages.align.data=photos", "stages.tune.data=my.json", "stages.tune.images=photos")


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        # recipes and overrides
        ([*TEACH, "stages.tune.dta=x", "-o", "o"], 2, "did you mean 'data'?"),
        ([*TEACH, "stages.align.steps=three", "-o", "o"], 2, "stages.align.steps: given 'three'"),
        ([*TEACH, "stages.align.steps", "-o", "o"], 2, "an override reads key.path=value"),
        ([*TEACH, "model.chat=tinny", "-o", "o"], 2, "tiny"),
        ([*TEACH, "--stage", "tun", "-o", "o"], 2, "tune"),
        (["train", "wrold", "-o", "o"], 2, "Did you mean 'world'?"),
        (["train", "nothing.yaml", "-o", "o"], 2, "nothing.yaml: there is no such recipe file"),
        (["train", "mine.yaml", "-o", "o"], 2, "did you mean 'seed'?"),
        (["train", "torn.yaml", "-o", "o"], 2, "torn.yaml:2: not YAML"),
        (["train", "photos", "-o", "o"], 2, "photos is a folder; a recipe is a YAML file"),
        (["condense", "photos", "-r", "photo", "-o", "o"], 2, "Did you mean 'photos'?"),
        (["condense", "photos", "-r", "photos", "steps.dedup.treshold=1", "-o", "o"], 2, "did you mean threshold?"),
        (["condense", "photos", "-r", "photos", "--encoder", "pixls", "-o", "o"], 2, "Did you mean 'pixels'?"),
        (["condense", "photos", "-r", "clip-score-top", "--encoder", "pixels", "-o", "o"], 2, "pixels' has none"),
        (["eval", "run", "photos", "--suite", "onw", "-o", "o"], 2, "Did you mean own?"),
        # data
        (["train", "world", "-o", "o"], 3, "stages.align.data=PATH"),
        (["pool", "check", "mi.json", "-o", "o"], 3, "mi.json does not exist. Did you mean my.json"),
        (["pool", "check", "gone/my.json", "-o", "o"], 3, "gone/my.json does not exist (nor does the folder"),
        (["pool", "check", "torn.json", "-o", "o"], 3, "line 1, column 11: the file ends too early"),
        (["pool", "check", "words.json", "-o", "o"], 3, "words.json is not JSON: line 1, column 1"),
        (["pool", "check", "object.json", "-o", "o"], 3, "one JSON object"),
        (["pool", "check", "none.json", "-o", "o"], 3, "none.json holds no records"),
        (["pool", "check", "zero.json", "-o", "o"], 3, "zero.json is empty"),
        (["pool", "check", "latin.json", "-o", "o"], 3, "not UTF-8"),
        (["pool", "check", "photos.zip", "-o", "o"], 3, "of no known kind (ending '.zip')"),
        (["pool", "check", "bare", "-o", "o"], 3, "bare holds no photos"),
        (["condense", "bare", "-r", "photos", "-o", "o"], 3, "bare holds no photos"),
        (["embed", "bare", "-o", "o"], 3, "bare holds no photos"),
        (["show", "bare"], 3, "bare holds no photos"),
        (["show", "my.json", "--images", "photos", "--id", "33.jpg"], 3, "did you mean '3.jpg'"),
        (["show", "photos", "--index", "99"], 3, "it holds samples 0 to 11"),
        (["pool", "check", "my.json", "--images", "pohtos", "-o", "o"], 3, "the image folder pohtos does not exist"),
        (["pool", "check", "photos", "--images", "bare", "-o", "o"], 3, "the image folder is that folder itself"),
        (["condense", "bad", "-r", "photos", "-o", "o"], 3, "6 of 6 samples are refused"),
        (["train", "world", "stages.align.data=words.json", "stages.tune.data=bare", "-o", "o"], 3, "stages.tune.data"),
        (["eval", "run", "bare", "--suite", "own", "-o", "o"], 3, "no test.json or test.jsonl in bare"),
        (["eval", "run", "nowhere", "--suite", "own", "-o", "o"], 3, "there is no folder nowhere"),
        (["eval", "run", "photos", "-o", "o"], 3, "--suite own"),
        (["eval", "bare", "photos", "--suite", "own", "-o", "o"], 3, "bare is not a model"),
        # another run's folder, or no run's
        ([*TEACH, *SMALL, "seed=5", "-o", "run"], 2, "seed: 0 there, 5 now"),
        (["condense", "photos", "-r", "photos", "-o", "run"], 2, "run holds a `train` run, not `condense`"),
        (["embed", "photos", "-o", "run"], 2, "run holds a `train` run, not `embed`"),
        (["pool", "check", "photos", "-o", "run"], 2, "run holds no check of a pool"),
        (["pool", "check", "photos", "-o", "bare"], 2, "bare holds no check of a pool"),
        (["pool", "check", "photos", "-o", "torn.json"], 2, "torn.json is a file"),
        (["eval", "run", "photos", "--suite", "own", "-o", "run"], 2, "run holds a `train` run, not `evaluate`"),
        (["condense", "photos", "-r", "photos", "-o", "bare"], 2, "bare is not empty and holds no run"),
        # a model and a picture to talk about
        (["chat", "rnu", "photos/1.jpg", "-p", "What?"], 3, "rnu is not a model: it does not exist"),
        (["chat", "photos", "photos/1.jpg", "-p", "What?"], 3, "photos is not a model"),
        (["chat", "run", "photos", "-p", "What?"], 3, "image photos: not a file"),
        (["chat", "run", "photos/1.jpg", "-p", " "], 2, "the question is empty"),
        *(
            (["chat", "run", f"bad/{name}", "-p", "What?"], 3, f"image bad/{name}: {reason.removeprefix('image ')}")
            for name, reason in BROKEN.items()
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "" if isinstance(value, str) else None,
)
def test_a_mistake_is_one_clear_line_with_its_exit_code(
    line: list[str], code: int, said: str, mess: Path, run: Any
) -> None:
    found = run(*line, code=code)
    assert found.err.count("error: ") == 1 and said in found.err and not found.out.strip()
    last = found.err[found.err.index("error: ") :]
    assert len(last.strip().splitlines()) <= 6 and len(last) < 900


def test_a_download_that_is_not_to_be_had_is_the_machines_fault(mess: Path, run: Any) -> None:
    found = run("condense", "photos", "-r", "bunny", "-o", "o", code=5)
    assert "hf download openai/clip-vit-large-patch14" in found.err and "recipe photos" in found.err


def test_other_data_under_the_same_name_is_told_in_words(mess: Path, run: Any) -> None:
    run("condense", "my.json", "--images", "photos", "-r", "photos", "-o", "o")
    found = run("condense", "photos", "-r", "photos", "-o", "o", code=2)
    assert "o was made with other data or another model" in found.err and "source: fingerprint" in found.err


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_command_of_the_page_runs_as_written(photos: Path, tmp_path: Path) -> None:
    files = sorted(photos.glob("*.jpg"))[:40]
    names = ["beach.jpg", *(file.name for file in files[1:])]
    for name, file in zip(names, files, strict=True):
        put(tmp_path / "photos", name, file.read_bytes(), file.stem.replace("_", " "))
    put(tmp_path / "photos", "copy.jpg", packed(Image.open(files[0]).convert("RGB"), quality=50), "a copy")
    write_list(tmp_path / "my.json", [talk(name, f"A {Path(name).stem}.") for name in names])
    write_list(tmp_path / "photos" / "test.json", [talk(name, f"A {Path(name).stem}.") for name in names[:9]])
    place = tmp_path / "bin"
    place.mkdir()
    (place / "leveret").write_text(f'#!/bin/sh\nexec {sys.executable} -m leveret.cli "$@"\n')
    (place / "leveret").chmod(0o755)
    environment = {**os.environ, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}

    def shell(command: list[str]) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{command[-1]}\n{done.stderr[-3000:]}"
        return done.stdout

    blocks = re.findall(r"```(sh|python)\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 13
    runners = {"sh": ["sh", "-euc"], "python": [sys.executable, "-c"]}
    said = [shell([*runners[language], block]) for language, block in blocks]
    told = "".join(said)
    assert "41 samples: 41 good" in told and "1 left out by dedup: near copy" in told
    assert "82 samples: 82 good" in told and "42 samples: 41 written, 1 refused" in told
    assert len(said[-1].splitlines()) == 2
