"""Parquet with the images in it: a .parquet file, or a folder of them in the order of their names.

What the columns say is told in `leveret.pool.table`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leveret import cells
from leveret.pool.table import Plan, TableSource, understood
from leveret.pool.webdataset import shards
from leveret.runs import DataError

FILES = re.compile(r"(?i)\.parquet$")

MAX_GROUP = 2**31 - 1
"""Bytes of images in one row group, unpacked: it is read as a whole."""


class ParquetSource(TableSource):
    """Rows of parquet files. Opening reads the files' ends alone.

    A row group's images are read together (`leveret.cells`), so samples in order are fast and samples in random order
    are not.
    """

    kind = "parquet"
    group = "row group"

    def _list(self) -> list[str]:
        return shards(self.path, FILES)

    def _plan(self, path: Path) -> tuple[Plan, list[int]]:
        try:
            with cells.opened(path) as file:
                facts = file.metadata
                plan = understood(path, file.schema_arrow)
                leaves = [facts.schema.column(number).path for number in range(facts.num_columns)]
                mine = [leaf for leaf in leaves if leaf.startswith(f"{plan.images}.")]
                data, names = (next(leaf for leaf in mine if leaf.endswith(end)) for end in (".bytes", ".path"))
                lengths = []
                for number in range(facts.num_row_groups):
                    group = facts.row_group(number)
                    size = group.column(leaves.index(data)).total_uncompressed_size
                    if size > MAX_GROUP:
                        raise DataError(
                            f"{path}: row group {number} holds {size:,} bytes of images in {group.num_rows:,} rows; it "
                            f"is read as a whole, and at most {MAX_GROUP:,} are. Write it in smaller row groups "
                            "(pyarrow.parquet.write_table(..., row_group_size=100))."
                        )
                    lengths.append(group.num_rows)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions and the disk.") from None
        except cells.Unreadable:
            raise DataError(
                f"{path} is not a parquet file, or its end is missing ({os.path.getsize(path):,} bytes): fetch it "
                "again."
            ) from None
        # Of the images the leaf that is not their bytes.
        return plan._replace(read=(*plan.read[:-1], names)), lengths

    def _rows(self, path: Path, group: int, plan: Plan) -> Any:
        return cells.rows(path, group, plan.read)

    def _packed(self, path: Path, group: int, plan: Plan) -> Iterator[bytes]:
        with cells.opened(path) as file, open(path, "rb") as handle:
            facts = file.metadata.row_group(group)
            for column in map(facts.column, range(facts.num_columns)):
                leaf, size = column.path_in_schema, column.total_compressed_size
                yield f"{leaf}\0{column.num_values}\0{size}\0{column.total_uncompressed_size}\0".encode()
                if any(leaf == read or leaf.startswith(f"{read}.") for read in plan.read):
                    start = column.dictionary_page_offset or column.data_page_offset
                    handle.seek(min(start, column.data_page_offset))
                    yield handle.read(size)
