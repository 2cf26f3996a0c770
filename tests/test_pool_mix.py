"""pool/mix: exact counts, an order that hangs on the records alone, several image folders, nothing lost in silence."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from leveret import cli
from leveret.images import read_bytes
from leveret.pool import convert, open_source
from leveret.pool.catalogue import DataSet
from leveret.pool.choice import counts, shuffled
from leveret.pool.mix import mix
from leveret.runs import DataError, Interrupted, RecipeError

module = sys.modules["leveret.pool.mix"]


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def source(folder: Path, prefix: str, count: int, *, text: int = 0, **more: Any) -> Path:
    """A LLaVA list: `count` records with pictures below folder/coco, then `text` without."""
    (folder / "coco").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for n in range(count):
        Image.new("RGB", (4, 3), (n, 0, 9)).save(folder / "coco" / f"{prefix}{n}.png")
        talks = talk("<image>\nWhat?", f"{prefix} é {n}") * (1 if n % 2 else 2)
        talks = [dict(turn, value=turn["value"].replace("<image>\n", "") if at else turn["value"])
                 for at, turn in enumerate(talks)]  # fmt: skip
        kind = "even" if n % 2 == 0 else "odd"
        records.append({"id": f"{prefix}{n}", "image": f"coco/{prefix}{n}.png", "conversations": talks, "kind": kind})
    records += [{"id": f"{prefix}t{n}", "conversations": talk("Say.", f"{prefix} {n}")} for n in range(text)]
    path = folder / f"{prefix}.json"
    path.write_text(json.dumps(records, ensure_ascii=False))
    return path


def recipe(folder: Path, *parts: dict[str, Any], **more: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "mix.yaml").write_text(yaml.safe_dump({"sources": list(parts), **more}))
    return str(folder / "mix.yaml")


def ids(path: Path | str, images: Path | None = None) -> list[str]:
    read = open_source(path, images)
    return [read.sample(n).id for n in range(len(read))]


@pytest.fixture
def pools(tmp_path: Path) -> tuple[Path, Path]:
    return source(tmp_path / "one", "a", 20, text=6), source(tmp_path / "two" / "deep", "b", 12)


def test_exact_counts_weights_and_the_images_of_several_folders(pools: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pools
    name = recipe(
        tmp_path,
        {"data": str(one), "name": "texts", "where": {"modality": "text"}, "count": 4},
        {"data": str(one), "name": "pictures", "where": {"modality": "image"}, "weight": 1},
        {"data": str(two), "weight": 2},
        total=19,
        seed=5,
    )
    made = mix(name, tmp_path / "out")
    assert [row["taken"] for row in made["sources"]] == [4, 5, 10] and made["samples"] == 19
    assert [row["left_out"] for row in made["sources"]] == [20, 6, 0]
    read = open_source(tmp_path / "out")
    assert read.name == "out" and len(read) == 19
    for n in range(19):
        sample = read.sample(n)
        number = int(sample.id.strip("abt"))
        if sample.images:
            (tmp_path / "seen.png").write_bytes(read_bytes(sample.images[0]))
            with Image.open(tmp_path / "seen.png") as seen:
                assert seen.getpixel((0, 0)) == (number, 0, 9)
            assert sample.turns[1].text == f"{sample.id[0]} é {number}"
            assert sample.meta["kind"] == ("odd" if number % 2 else "even")
    kinds = Counter("t" if "t" in id else id[0] for id in ids(tmp_path / "out"))
    assert kinds == {"t": 4, "a": 5, "b": 10}
    facts = json.loads((tmp_path / "out" / "mix.json").read_text())
    assert facts["images"] == ".." and facts["samples"] == 19 and facts["duplicates"]["same_record"] == 0


def test_the_same_again_is_the_same_and_another_seed_is_another(pools: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pools
    name = recipe(tmp_path, {"data": str(one), "count": 9}, {"data": str(two), "count": 9})
    first, again, other = (
        mix(name, tmp_path / out, over) and (tmp_path / out / "mixture.jsonl").read_bytes()
        for out, over in (("x", []), ("y", []), ("z", ["seed=1"]))
    )
    assert first == again != other and len(first.splitlines()) == 18
    fewer = {id for id in ids(tmp_path / "x") if id[0] == "a"}
    mix(name, tmp_path / "w", ["sources.0.count=14"])
    assert fewer < {id for id in ids(tmp_path / "w") if id[0] == "a"}, "of 14 the 9 are a part"


def test_neither_choice_nor_order_hangs_on_the_place_in_the_file(pools: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = pools
    name = recipe(tmp_path, {"data": str(one), "count": 11})
    mix(name, tmp_path / "x")
    one.write_text(json.dumps(list(reversed(json.loads(one.read_text())))))
    mix(name, tmp_path / "y")
    assert ids(tmp_path / "x") == ids(tmp_path / "y")


def test_the_given_order_is_kept_when_asked_for(pools: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pools
    mix(recipe(tmp_path, {"data": str(two)}, {"data": str(one)}, order="given"), tmp_path / "out")
    assert ids(tmp_path / "out") == ids(two) + ids(one)
    mix(recipe(tmp_path, {"data": str(two)}, {"data": str(one)}), tmp_path / "mixed")
    assert ids(tmp_path / "mixed") != ids(two) + ids(one)
    assert sorted(ids(tmp_path / "mixed")) == sorted(ids(two) + ids(one))


FILTERS: dict[str, tuple[dict[str, Any], int]] = {
    "id prefix": ({"id_prefix": ["a1", "at"]}, 17),
    "not id prefix": ({"not_id_prefix": ["a1"]}, 15),
    "image prefix": ({"image_prefix": ["coco/a2"]}, 1),
    "not image prefix": ({"not_image_prefix": ["coco/a1"]}, 15),
    "pictures": ({"modality": "image"}, 20),
    "words": ({"modality": "text"}, 6),
    "few turns": ({"turns": {"max": 2}}, 16),
    "many turns": ({"turns": {"min": 3}}, 10),
    "a field": ({"field": {"kind": ["odd"]}}, 10),
    "all at once": ({"field": {"kind": ["odd", "even"]}, "turns": {"min": 3, "max": 4}, "id_prefix": ["a1"]}, 5),
}


@pytest.mark.parametrize("which", FILTERS)
def test_filters(which: str, pools: tuple[Path, Path], tmp_path: Path) -> None:
    where, left = FILTERS[which]
    made = mix(recipe(tmp_path, {"data": str(pools[0]), "where": where}), tmp_path / "out", dry_run=True)
    assert made["sources"][0]["fit"] == left and made["sources"][0]["left_out"] == 26 - left
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"


def test_the_same_record_twice_is_a_fault_or_dropped_or_allowed(pools: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = pools
    twice = {"data": str(one)}, {"data": str(one), "name": "again", "where": {"modality": "text"}}
    with pytest.raises(DataError, match="6 records stand in the mixture twice"):
        mix(recipe(tmp_path, *twice), tmp_path / "x")
    assert not (tmp_path / "x" / "mixture.jsonl").exists()
    kept = mix(recipe(tmp_path, *twice), tmp_path / "y", ["duplicates=keep"])
    assert kept["samples"] == 32 and kept["duplicates"]["same_record"] == kept["duplicates"]["same_id"] == 6
    assert len(kept["duplicates"]["examples"]) == 5
    dropped = mix(recipe(tmp_path, *twice), tmp_path / "z", ["duplicates=drop"])
    assert dropped["samples"] == 26 and [row["dropped"] for row in dropped["sources"]] == [0, 6]
    records = json.loads(one.read_text())
    records[1]["id"] = records[0]["id"]  # another conversation of one picture's number: LLaVA's 665K is full of them
    one.write_text(json.dumps(records))
    made = mix(recipe(tmp_path, {"data": str(one)}), tmp_path / "w")
    assert made["samples"] == 26 and made["duplicates"] | {"examples": []} == {
        "allowed": "refuse", "same_record": 0, "same_id": 1, "examples": []
    }  # fmt: skip


def test_broken_records_are_named_and_counted(pools: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pools
    records = json.loads(one.read_text())
    records[0]["conversations"] = []
    records[1]["image"] = "../../etc/passwd"
    (one.parent / "coco" / "a2.png").unlink()
    (one.parent / "coco" / "a3.png").write_bytes(b"<html>")
    one.write_text(json.dumps(records))
    parts = {"data": str(one)}, {"data": str(two)}
    made = mix(recipe(tmp_path, *parts), tmp_path / "x")
    assert made["sources"][0]["refused"] == {"no turns": 1, "image path leaves the root": 1, "image missing": 1}
    assert made["samples"] == 23 + 12 and made["refused"] == 3
    lines = [json.loads(line) for line in (tmp_path / "x" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["source"], line["index"], line["id"]) for line in lines] == [(str(one), n, f"a{n}") for n in range(3)]
    made = mix(recipe(tmp_path, *parts), tmp_path / "y", ["decode=true"])
    assert made["samples"] == 22 + 12 and made["sources"][0]["refused"]["image not an image"] == 1
    with pytest.raises(DataError, match=r"3 of its 26 records are refused, more than the limit of 10%.*no turns"):
        mix(recipe(tmp_path, *parts), tmp_path / "z", ["limit_share=0.1"])
    assert not (tmp_path / "z" / "mix.json").exists()


def test_too_few_and_all_that_cannot_be_read_are_told_at_once(pools: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pools
    name = recipe(tmp_path, {"data": str(one), "count": 99}, {"data": str(two), "count": 13}, {"data": str(two)})
    with pytest.raises(DataError) as fault:
        mix(name, tmp_path / "x")
    assert "26 of its 26 records fit, 99 shall be taken" in str(fault.value) and "12 of its 12" in str(fault.value)
    name = recipe(
        tmp_path, {"data": "nowhere.json"}, {"data": str(two)}, {"data": "llava/665k"}, {"data": "images/gqa"}
    )
    with pytest.raises(DataError) as fault:
        mix(name, tmp_path / "x", [f"root={tmp_path}"])
    said = str(fault.value)
    assert "3 sources" in said and "sources.0.data: the data nowhere.json does not exist" in said
    assert (
        f"sources.2.data: llava/665k is not at {tmp_path}" in said and f"leveret pool get llava/665k {tmp_path}" in said
    )
    assert "sources.3.data: images/gqa is a set of images" in said
    with pytest.raises(DataError, match="nothing is left of 26 records"):
        mix(recipe(tmp_path, {"data": str(one), "where": {"id_prefix": ["none"]}}), tmp_path / "x")
    with pytest.raises(RecipeError, match="2 faults"):
        mix(recipe(tmp_path, {"data": str(one)}), tmp_path / "x", ["sources.0.conut=3", "sed=1"])
    with pytest.raises(RecipeError, match=r"to fetch .leveret pool get llava/558k DIR., not a mixture"):
        mix("llava/558k", tmp_path / "x")


def test_another_mixture_or_a_stranger_is_not_written_over(pools: tuple[Path, Path], tmp_path: Path) -> None:
    name = recipe(tmp_path, {"data": str(pools[0]), "count": 5})
    mix(name, tmp_path / "x")
    before = (tmp_path / "x" / "mixture.jsonl").stat().st_mtime_ns
    assert mix(name, tmp_path / "x")["samples"] == 5
    assert (tmp_path / "x" / "mixture.jsonl").stat().st_mtime_ns == before, "made once"
    with pytest.raises(RecipeError, match=r"another mixture:\n  recipe.seed: 0 there, 3 now"):
        mix(name, tmp_path / "x", ["seed=3"])
    with pytest.raises(RecipeError, match="holds no mixture"):
        mix(name, tmp_path / "one")
    (tmp_path / "mine.json").write_text("[]")
    with pytest.raises(RecipeError, match="was not mixed here"):
        mix(name, tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "[]"


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_list_alone_is_what_published_recipes_name(ending: str, tmp_path: Path) -> None:
    images = tmp_path / "data" / "finetune" / "images"
    source(images, "a", 5, text=2).rename(tmp_path / "data" / "llava_v1_5_mix665k.json")
    out = tmp_path / "data" / f"stripped.{ending}"
    made = mix("llava/665k-no-sharegpt", out, [f"root={tmp_path / 'data'}"])
    assert made["samples"] == 5 and made["images"] == "finetune/images"
    assert sorted(ids(out, images)) == [f"a{n}" for n in range(5)]
    assert mix("llava/665k-no-sharegpt", out, [f"root={tmp_path / 'data'}"])["samples"] == 5
    assert (tmp_path / "data" / "stripped.mix.json").exists()
    record = json.loads(out.read_text())[0] if ending == "json" else json.loads(out.read_text().splitlines()[0])
    assert record["image"].startswith("coco/a")


def test_tars_hold_the_pictures_of_folders_that_share_nothing(pools: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pools
    convert(open_source(two), tmp_path / "store", shard_size=5)
    (one.parent / "coco" / "a3.png").write_bytes(b"<html>")
    name = recipe(tmp_path, {"data": str(one), "count": 15}, {"data": str(tmp_path / "store"), "count": 7})
    mix(name, tmp_path / "list", ["decode=true"])
    made = mix(name, tmp_path / "tars", form="tars")
    assert made["samples"] == 22 and made["sources"][0]["refused"] == {"image not an image": 1}
    listed, tars = open_source(tmp_path / "list"), open_source(tmp_path / "tars")
    assert ids(tmp_path / "list") == ids(tmp_path / "tars")
    for n in range(22):
        here, there = listed.sample(n), tars.sample(n)
        assert here.turns == there.turns
        assert [read_bytes(ref) for ref in here.images] == [read_bytes(ref) for ref in there.images]
    assert mix(name, tmp_path / "tars", form="tars")["shards"] == made["shards"]
    name = recipe(tmp_path, {"data": str(one), "count": 15}, {"data": str(two), "count": 7})
    mix(name, tmp_path / "lists", ["decode=true"])
    assert ids(tmp_path / "lists") == ids(tmp_path / "tars"), "chosen alike, whatever form the data has"


def test_folders_without_a_common_one_need_tars(
    pools: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "common_root", lambda sources: Path("/"))
    name = recipe(tmp_path, {"data": str(pools[0])}, {"data": str(pools[1])})
    with pytest.raises(RecipeError, match="--as tars"):
        mix(name, tmp_path / "x")
    assert mix(name, tmp_path / "t", form="tars")["samples"] == 38


def test_a_stop_leaves_nothing_behind(
    pools: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = recipe(tmp_path, {"data": str(pools[0])})
    for stops in (1, 9):
        asked = iter([False] * (stops - 1) + [True] * 99)
        monkeypatch.setattr(module, "stop_requested", lambda asked=asked: next(asked))
        with pytest.raises(Interrupted):
            mix(name, tmp_path / "x")
        assert [path.name for path in (tmp_path / "x").iterdir()] == [".lock"]
    monkeypatch.setattr(module, "stop_requested", lambda: False)
    assert mix(name, tmp_path / "x")["samples"] == 26


def test_questions_and_answers_become_conversations(tmp_path: Path) -> None:
    images = tmp_path / "finetune" / "images"
    source(images / "lrv" / "lrv-vg", "7", 1)
    (images / "lrv/lrv-vg/coco/70.png").rename(images / "lrv/lrv-vg/238.jpg")
    (tmp_path / "lrv").mkdir()
    rows = [
        {"image_id": "238", "question": " Is there a <image> teapot? ", "answer": "No. ", "task": "negative"},
        {"image_id": 238, "question": "Where?", "answer": "There."},
        {"image_id": "238", "question": "Lost"},
        {"image_id": ["x"], "question": "Odd", "answer": "x"},
    ]
    (tmp_path / "lrv" / "filter_cap1.json").write_text(json.dumps(rows))
    name = recipe(tmp_path, {"data": "prismatic/lrv"}, root=str(tmp_path), limit_share=0.6, order="given")
    made = mix(name, tmp_path / "out")
    assert made["sources"][0]["refused"] == {"record lacks a key": 1, "record's value is not text": 1}
    first, second = (open_source(tmp_path / "out").sample(n) for n in range(2))
    assert (first.id, first.turns[0].text, first.turns[1].text) == ("238", "<image>\nIs there a  teapot?", "No.")
    assert first.meta == {"task": "negative"} and second.turns[0].text == "<image>\nWhere?"
    assert Path(first.images[0].path).name == "238.jpg"
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Sing.", "output": "La."}] * 2))
    alpaca = {"data": str(tmp_path / "alpaca.json"), "mapped": {"user": "{instruction}", "assistant": "{output}"}}
    mix(recipe(tmp_path, alpaca), tmp_path / "songs")
    assert sorted(ids(tmp_path / "songs")) == ["0", "1"]


def test_the_command_tells_every_source(
    pools: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = pools
    records = json.loads(one.read_text())
    records[0]["conversations"] = []
    one.write_text(json.dumps(records))
    name = recipe(tmp_path, {"data": str(one), "name": "first"}, {"data": str(two), "count": 3})
    assert cli.run(["pool", "mix", name, "-o", str(tmp_path / "x"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "dry run" in out and "25 of 26  (0 left out by filters, 1 refused)" in out and "1 refused: no turns" in out
    assert cli.run(["pool", "mix", name, "-o", str(tmp_path / "x"), "sources.1.count=4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["samples"] == 29 and [row["name"] for row in facts["sources"]] == ["first", str(two)]
    assert cli.run(["pool", "mix", name, "-o", str(tmp_path / "x"), "sources.1.count=4"]) == 0
    out = capsys.readouterr().out
    assert "29 samples, seed 0" in out and f"its images start from {tmp_path}" in out and "quarantine.jsonl" in out
    assert cli.run(["pool", "mix", name, "-o", str(tmp_path / "x.json"), "--as", "tars"]) == 2
    assert cli.run(["pool", "mix", "nothing", "-o", str(tmp_path / "y")]) == 2
    assert cli.run(["pool", "check", str(tmp_path / "x"), "-o", str(tmp_path / "checked")]) == 0


def test_a_mixture_that_was_moved_says_what_it_lacks(pools: tuple[Path, Path], tmp_path: Path) -> None:
    mix(recipe(tmp_path, {"data": str(pools[0]), "count": 5}), tmp_path / "deep" / "er" / "x")
    (tmp_path / "deep" / "er" / "x").rename(tmp_path / "x")
    with pytest.raises(DataError, match="say where they are"):
        open_source(tmp_path / "x")
    assert len(open_source(tmp_path / "x", tmp_path / "one")) == 5


def test_the_mixture_of_the_docs_is_one_that_a_recipe_learns_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text("utf-8")
    told = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    told |= {"total": 20, "sources": [{**part, "count": 8} if "count" in part else part for part in told["sources"]]}
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "data" / "finetune" / "images"
    (images / "gqa").mkdir(parents=True)
    records = json.loads(source(images, "a", 9, text=6).read_text())
    for record in records[:9]:
        (images / record["image"]).rename(images / record["image"].replace("coco/", "gqa/"))
        record["image"] = record["image"].replace("coco/", "gqa/")
    for record in records[9:]:
        record["conversations"] *= 2
    (tmp_path / "data" / "llava_v1_5_mix665k.json").write_text(json.dumps(records))
    mine = source(tmp_path / "photos", "m", 12)
    mine.rename(tmp_path / "my.json")
    rows = [record | {"quality": "good"} for record in json.loads((tmp_path / "my.json").read_text())]
    (tmp_path / "my.json").write_text(json.dumps(rows))
    (tmp_path / "MIX.yaml").write_text(yaml.safe_dump(told))
    assert cli.run(["pool", "mix", "MIX.yaml", "-o", "mixture"]) == 0, capsys.readouterr().err
    assert [row["taken"] for row in json.loads(Path("mixture/mix.json").read_text())["sources"]] == [8, 3, 9]
    learn = ["train", "world", "stages.tune.data=mixture", "stages.align.data=mixture", "--dry-run"]
    assert cli.run([*learn, "stages.tune.steps=1", "stages.align.steps=1", "-o", "run"]) == 0, capsys.readouterr().err


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    exact=st.lists(st.integers(1, 50), max_size=4),
    more=st.integers(1, 1000),
)
def test_weights_share_out_all_of_it(weights: list[float], exact: list[int], more: int) -> None:
    parts = [{"data": "x", "weight": weight} for weight in weights] + [{"data": "x", "count": count} for count in exact]
    wanted = DataSet.model_validate({"sources": parts, "total": sum(exact) + more})
    given_out = counts(wanted)
    assert sum(count or 0 for count in given_out) == sum(exact) + more and given_out[len(weights) :] == exact
    for weight, count in zip(weights, given_out, strict=False):
        assert abs((count or 0) - more * weight / sum(weights)) < 1


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3)), max_size=60), st.integers(0, 5))
def test_a_shuffle_is_a_permutation_that_knows_no_places(rows: list[tuple[int, int]], seed: int) -> None:
    import numpy as np

    records = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    words = records[:, 0] % np.uint64(7)  # many ties
    order = shuffled(words, records, seed, "order")
    assert sorted(order.tolist()) == list(range(len(rows)))
    turned = records[::-1]
    assert records[order].tolist() == turned[shuffled(words[::-1], turned, seed, "order")].tolist()


def test_a_dry_run_refuses_the_place_that_the_mixing_refuses(
    pools: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(recipe(tmp_path, {"data": str(pools[0])}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    (tmp_path / "list.json").write_text("[]")
    assert cli.run(["pool", "mix", name, "-o", str(tmp_path / "made")]) == 0
    made = sorted(path.name for path in (tmp_path / "made").iterdir())
    cases = (("full", "holds no mixture"), ("list.json", "was not mixed here"), ("made", "is another mixture"))
    for place, why in cases:
        changed = ["seed=9"] if place == "made" else []
        for more in (["--dry-run"], []):
            assert cli.run(["pool", "mix", name, "-o", str(tmp_path / place), *changed, *more]) == 2
            assert why in capsys.readouterr().err
    tars = ["pool", "mix", name, "--as", "tars", "-o", str(tmp_path / "full")]
    below = ["pool", "mix", name, "-o", str(tmp_path / "list.json" / "x")]
    for words, why in ((tars, "is not empty and holds no run"), (below, "list.json is a file")):
        for more in (["--dry-run"], []):
            assert cli.run([*words, *more]) == 2
            assert why in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["letter.txt"]
    (tmp_path / "empty").mkdir()
    many = str(recipe(tmp_path, {"data": str(pools[0]), "count": 10**6}))
    assert cli.run(["pool", "mix", many, "-o", str(tmp_path / "empty"), "--dry-run"]) == 3
    assert (tmp_path / "empty").is_dir() and capsys.readouterr().err
    name = str(recipe(tmp_path, {"data": str(pools[0])}))
    assert cli.run(["pool", "mix", name, "-o", str(tmp_path / "made"), "--dry-run"]) == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == made
