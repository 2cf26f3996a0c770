"""pool/catalogue: the published sets are whole, agree with themselves and with the recipes that name them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leveret import cli, recipe
from leveret.pool import catalogue
from leveret.pool.catalogue import DataSet
from leveret.runs import RecipeError
from leveret.train.stages import TrainRecipe

NAMES = catalogue.names()


def published() -> dict[tuple[str, str], str]:
    """(data, images) of every stage of every published model -> one recipe that names them."""
    found: dict[tuple[str, str], str] = {}
    for name in recipe.names("models"):
        if name.partition("/")[0] == "world":
            continue
        for stage in recipe.load(name, TrainRecipe, "models").stages.values():
            if stage is not None:
                found[stage.data, stage.images or ""] = name
    return found


def test_every_set_is_read_and_says_where_from_and_under_which_licence() -> None:
    assert len(NAMES) > 30
    for name in NAMES:
        one = catalogue.load(name)
        assert one.title and (one.files or one.sources), name
        assert one.licence.images, name
        if one.data is not None:
            assert one.counts.samples is not None or one.counts.about, name
            assert not one.files or one.file_of(one.data) is not None, f"{name}: data is none of its files"


def test_what_the_published_recipes_name_is_in_the_catalogue() -> None:
    known = {(f"data/{one.data}", f"data/{one.images}") for one in map(catalogue.load, NAMES) if one.data}
    lacking = {pair: name for pair, name in published().items() if pair not in known}
    assert not lacking


@pytest.mark.parametrize("name", NAMES)
def test_what_a_set_needs_and_is_mixed_of_is_there(name: str) -> None:
    one = catalogue.load(name)
    for need in one.needs:
        assert catalogue.load(need).data is None, f"{need} is no set of images"
    for part in one.sources:
        assert catalogue.load(part.data).images == one.images, "the mixture's paths start from its own images"
    paths = [file.path for _, file, _ in catalogue.wanted(one, Path("data"))]
    assert len(paths) == len(set(paths))
    if one.counts.samples is not None and one.counts.parts:
        assert sum(one.counts.parts.values()) == one.counts.samples


def test_sizes_of_parts_add_up() -> None:
    (file,) = catalogue.load("images/bunny-laion-2m").files
    each = file.each()
    assert [part.path[-2:] for part in each] == ["aa", "ab", "ac", "ad", "ae"]
    assert all(part.name == f"pretrain/images.tar.gz.part-{part.path[-2:]}" for part in each)
    assert abs(sum(part.size or 0 for part in each) - 48.4e9) < 10


def test_the_counts_of_a_union_are_the_sum_of_its_parts() -> None:
    tune, bunny = (catalogue.load(name).counts.samples for name in ("llava/665k", "bunny/695k"))
    assert tune is not None and bunny is not None
    assert catalogue.load("bunny/llava-1.4m").counts.samples == tune + bunny
    assert catalogue.load("prismatic/llava-lrv").counts.samples == tune + 342_799
    assert catalogue.load("llava/665k-no-sharegpt").counts.samples == tune - 40_688


BAD = {
    "files: [{path: a.json}]": "give one of hub, url, by_hand",
    "files: [{path: /a.json, url: 'http://x/a'}]": "below the data root",
    "files: [{path: b/../../a.json, url: 'http://x/a'}]": "below the data root",
    "files: [{path: a.json, url: 'ftp://x/a'}]": "begins with http",
    "files: [{path: a.json, hub: nobody}]": "OWNER/NAME",
    "files: [{path: a.json, hub: a/b, about: large}]": "27.4 GB",
    "files: [{path: a.json, hub: a/b, sha256: abc}]": "sha256",
    "files: [{path: a.json, hub: a/b, parts: [x]}]": "`path` holds {}",
    "title: nothing": "neither files to fetch nor sources",
    "sources: [{data: a, count: 1, weight: 2}]": "count or weight, not both",
    "sources: [{data: a, weight: 2}]": "give `total`",
    "{sources: [{data: a}], total: 5}": "every source has a count or a weight",
    "{sources: [{data: a, count: 6}, {data: b, weight: 1}], total: 5}": "add up to 6",
    "{sources: [{data: a, where: {turns: {min: 3, max: 2}}}]}": "nothing would be left",
    "{sources: [{data: a, where: {idprefix: x}}]}": "did you mean 'id_prefix'",
    "{sources: [{data: a, wher: {}, cuont: 3}], sede: 3}": "3 faults",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_faults_of_a_row_are_told_in_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(RecipeError) as fault:
        catalogue.load(tmp_path / "m.yaml")
    assert BAD[text] in str(fault.value)


def test_the_list_tells_what_is_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llava_v1_5_mix665k.json").write_text("[]")
    (tmp_path / "alpaca_evol_instruct_70k.json").write_text("short")
    (tmp_path / "bunny_695k.json.part").write_text("part")
    (tmp_path / "llava_v1_5_stripped625k.json").write_text("[]")
    assert cli.run(["pool", "list", "--root", str(tmp_path), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["sets"]}
    assert sorted(rows) == NAMES
    said = {name: catalogue.on_disk(row) for name, row in rows.items()}
    assert said["llava/665k"] == "all" and said["bunny/laion-2m"] == "-"
    assert said["bunny/wizardlm-70k"] == "-, 1 of a wrong size" and said["bunny/695k"] == "-, 1 begun"
    assert said["llava/665k-no-sharegpt"] == "mixed" and said["prismatic/llava-lrv"] == "to mix"
    assert cli.run(["pool", "list", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES) and "665,298" in out and "to mix" in out


def test_a_row_of_ones_own_reads_like_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "files: [{path: a/b.json, url: 'http://127.0.0.1/b', bytes: 3}]\nneeds: {images/gqa: gqa}\n"
    )
    one = catalogue.load(tmp_path / "mine.yaml")
    assert isinstance(one, DataSet)
    rows = list(catalogue.wanted(one, tmp_path))
    assert [(owner.name, file.path) for owner, file, _ in rows] == [
        ("", "a/b.json"),
        ("images/gqa", "archives/gqa/images.zip"),
    ]
    assert rows[1][2] == tmp_path / "." / "gqa"
    assert len(list(catalogue.wanted(one, tmp_path, pictures=False))) == 1
