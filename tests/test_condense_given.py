"""Embeddings made anywhere are taken as they are, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leveret.condense.given import is_given, open_given
from leveret.pool import open_source
from leveret.runs import DataError

X = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float16)
IDS = [f"n{i}" for i in range(50)]
SCORE = np.linspace(-1, 1, 50)


def retrieval(folder: Path, *, score: bool = True, texts: bool = False, **columns: Any) -> Path:
    """Shards 0, 2 and 10 of clip-retrieval's layout, with 20, 10 and 20 rows."""
    for kind in ("img_emb", "metadata", "text_emb"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, a, b in ((0, 0, 20), (2, 20, 30), (10, 30, 50)):
        np.save(folder / f"img_emb/img_emb_{number}.npy", X[a:b])
        if texts:
            np.save(folder / f"text_emb/text_emb_{number}.npy", -X[a:b])
        table = {"key": IDS[a:b], "caption": ["c"] * (b - a)} | ({"similarity": SCORE[a:b]} if score else {})
        table |= {name: values[a:b] for name, values in columns.items()}
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{number}.parquet", row_group_size=7)
    return folder


def everything(path: Path, step: int = 9, **how: Any) -> tuple[Any, list[bytes], Any]:
    """All vectors, ids and scores, read in pieces."""
    given = open_given(path, **how)
    rows, ids, scores = [], [], []
    for number, file in enumerate(given.files):
        for start in range(0, file.shard.n, step):
            stop = min(start + step, file.shard.n)
            names, found = given.columns(number, start, stop)
            rows.append(file.shard.read(start, stop))
            ids += names.at(np.arange(len(names)))
            scores.append(np.full(stop - start, np.nan) if found is None else found)
    return np.concatenate(rows), ids, np.concatenate(scores)


def test_clip_retrievals_layout_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    folder = retrieval(tmp_path / "e")
    x, ids, score = everything(folder)
    assert np.array_equal(x, X) and ids == [id.encode() for id in IDS] and np.array_equal(score, SCORE)
    given = open_given(folder)
    assert len(given) == 50 and given.has_scores and is_given(folder)


def test_scores_come_from_captions_vectors_where_none_are_given(tmp_path: Path) -> None:
    assert np.allclose(everything(retrieval(tmp_path / "e", score=False, texts=True))[2], -1)
    without = open_given(retrieval(tmp_path / "f", score=False))
    assert not without.has_scores and without.columns(0, 0, 3)[1] is None


def test_parquet_and_bare_files_are_taken_too(tmp_path: Path) -> None:
    column = pa.array(list(X), pa.list_(pa.float16()))
    for name, a, b in (("b", 20, 50), ("a", 0, 20)):
        path = tmp_path / f"p/{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"uid": IDS[a:b], "emb": column[a:b], "score": SCORE[a:b]}), path, row_group_size=6)
    x, ids, score = everything(tmp_path / "p")
    assert np.array_equal(x, X) and ids == [id.encode() for id in IDS] and np.array_equal(score, SCORE)
    np.save(tmp_path / "x.npy", X)
    x, ids, score = everything(tmp_path / "x.npy")
    assert np.array_equal(x, X) and ids[:2] == [b"0", b"1"] and np.isnan(score).all()
    assert all(map(is_given, (tmp_path / "p", tmp_path / "p/a.parquet", tmp_path / "x.npy")))
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "pool.parquet")
    assert not is_given(tmp_path / "pool.parquet") and not is_given(tmp_path / "nothing")


def test_photos_with_vectors_beside_them_are_photos(tmp_path: Path) -> None:
    """Somebody's features of them, or the table of a downloader, do not make them embeddings."""
    (tmp_path / "photos").mkdir()
    np.save(tmp_path / "photos" / "features.npy", X)
    pq.write_table(pa.table({"emb": pa.array(list(X), pa.list_(pa.float16()))}), tmp_path / "photos" / "a.parquet")
    assert is_given(tmp_path / "photos")
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "drawing of the vectors.png")
    assert is_given(tmp_path / "photos"), "a picture beside vectors does not make them photos"
    for name in ("one", "two"):
        Image.new("RGB", (20, 20)).save(tmp_path / "photos" / f"{name}.JPG")
        (tmp_path / "photos" / f"{name}.txt").write_text("a photo")
    assert not is_given(tmp_path / "photos") and len(open_source(tmp_path / "photos")) == 3


def test_words_and_vectors_of_some_rows_are_looked_up_in_any_order(tmp_path: Path) -> None:
    captions = [None if i == 31 else f"c{i}" for i in range(50)]
    given = open_given(retrieval(tmp_path / "e", caption=np.array(captions, object), image=np.array(IDS) + ".jpg"))
    for places in (np.arange(50), np.array([3, 4, 28, 29, 30, 31, 49]), np.array([49, 0, 7, 6, 6, 25]), np.arange(0)):
        expected = [(IDS[i], f"{IDS[i]}.jpg", captions[i] or "") for i in places.tolist()]
        assert [tuple(told) for told in given.words(places)] == expected
        if len(places):
            assert np.array_equal(given.vectors(places), X[places])
    bare = tmp_path / "bare"
    bare.mkdir()
    np.save(bare / "x.npy", X)
    assert list(open_given(bare).words(np.array([4, 2]))) == [("4", "", ""), ("2", "", "")]


def test_only_row_groups_that_hold_a_row_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array(list(X), pa.list_(pa.float16()))
    pq.write_table(pa.table({"uid": IDS, "emb": column, "text": IDS}), path, row_group_size=10)
    given, read = open_given(path), []
    whole, batches = pq.ParquetFile.read_row_groups, pq.ParquetFile.iter_batches

    def groups(file: Any, wanted: list[int], **more: Any) -> Any:
        read.append(wanted)
        return whole(file, wanted, **more)

    def blocks(file: Any, size: int, *, row_groups: list[int], **more: Any) -> Any:
        read.append(row_groups)
        return batches(file, size, row_groups=row_groups, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", groups)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", blocks)
    places = np.array([41, 12, 45, 17])
    assert np.array_equal(given.vectors(places), X[places]) and read == [[1], [4]]
    read.clear()
    assert [told.caption for told in given.words(np.sort(places))] == ["n12", "n17", "n41", "n45"] and read == [
        [1],
        [4],
    ]


def test_numbers_are_ids_as_their_digits(tmp_path: Path) -> None:
    folder = retrieval(tmp_path / "e", id=np.arange(100, 150))
    assert everything(folder)[1][:2] == [b"100", b"101"]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    def broken(name: str, spoil: Any) -> Path:
        folder = retrieval(tmp_path / name)
        spoil(folder)
        return folder

    def meta(folder: Path, n: int, **columns: Any) -> None:
        pq.write_table(pa.table({"key": IDS[:n], **columns}), folder / "metadata/metadata_2.parquet")

    for name, spoil, said in (
        ("width", lambda f: np.save(f / "img_emb/img_emb_2.npy", X[:10, :4]), "width 4, and 8 in .*img_emb_0"),
        ("kind", lambda f: np.save(f / "img_emb/img_emb_2.npy", X[:10].astype("f4")), "dtype <f4, and <f2"),
        ("short", lambda f: meta(f, 9), "metadata_2.parquet has 9 rows, and its vectors in img_emb_2.npy are 10"),
        ("lost", lambda f: (f / "metadata/metadata_2.parquet").unlink(), "3 files in img_emb and 2 in metadata"),
        ("cut", lambda f: (f / "img_emb/img_emb_2.npy").write_bytes(b"x"), "not a readable .npy file"),
        ("torn", lambda f: (f / "metadata/metadata_2.parquet").write_bytes(b"PAR1"), "not a readable parquet file"),
        ("texts", lambda f: np.save(f / "text_emb/text_emb_0.npy", X), "the shapes in text_emb differ"),
        ("none", lambda f: [file.unlink() for file in (f / "img_emb").iterdir()], "holds at least one"),
    ):
        with pytest.raises(DataError, match=said):
            open_given(broken(name, spoil))
    nameless = retrieval(tmp_path / "nameless", id=np.array([*IDS[:25], None, *IDS[26:]], object))
    with pytest.raises(DataError, match=r"metadata_2.parquet: row 5 has no id"):
        everything(nameless)
    scores = SCORE.copy()
    scores[31] = np.nan
    with pytest.raises(DataError, match=r"metadata_10.parquet: row 1 has score nan"):
        everything(retrieval(tmp_path / "nan", similarity=scores))
    with pytest.raises(DataError, match=r"no \.npy and no \.parquet"):
        open_given(tmp_path)
    np.save(tmp_path / "p.npy", X)
    (tmp_path / "q").mkdir()
    np.save(tmp_path / "q/a.npy", X)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "q/b.parquet")
    with pytest.raises(DataError, match=r"all \.npy or all \.parquet"):
        open_given(tmp_path / "q")


def test_the_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    folder = retrieval(tmp_path / "e")
    before = open_given(folder).fingerprint()
    assert open_given(folder).fingerprint() == before
    np.save(folder / "img_emb/img_emb_2.npy", X[21:31])
    assert open_given(folder).fingerprint() != before
