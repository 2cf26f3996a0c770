"""Numpy's files, read by several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from leveret.condense.npy import Arrays, header

SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
KINDS = st.sampled_from(["<i8", "<f2", "<f4", "|b1", "|u1", ">i4", "<U5"])


@given(given=arrays.arrays(KINDS, SHAPES), by_columns=st.booleans())
def test_what_numpy_wrote_is_read(
    tmp_path_factory: pytest.TempPathFactory, given: np.ndarray, by_columns: bool
) -> None:
    path = tmp_path_factory.mktemp("npy") / "a.npz"
    np.savez(path, one=given.copy(order="F") if by_columns else given, two=np.arange(3))
    with Arrays(path) as file:
        assert file.names == ["one", "two"]
        found = file["one"]
        assert found.dtype == given.dtype and found.shape == given.shape and found.flags.writeable
        np.testing.assert_array_equal(found, given)


def test_many_threads_read_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **{f"column-{n}": np.full(1000, n) for n in range(20)})

    def read(_: int) -> bool:
        with Arrays(path) as file:
            return all((file[f"column-{n}"] == n).all() for n in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(64)))


def test_what_is_no_such_file_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", one=np.array([{}], dtype=object))
    with Arrays(tmp_path / "objects.npz") as file, pytest.raises(ValueError, match="one holds objects"):
        file["one"]
    (tmp_path / "text.npy").write_text("no numbers")
    with open(tmp_path / "text.npy", "rb") as stream, pytest.raises(ValueError, match="magic"):
        header(stream)
