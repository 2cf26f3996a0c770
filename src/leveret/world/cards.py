"""Cards of the drawn world's own weights: what taught them, what they can, their hashes; to read and as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leveret.runs import atomic_write, environment, sha256_of, write_json


def write_card(
    place: Path,
    files: Iterable[Path],
    facts: Mapping[str, Any],
    *,
    title: str,
    about: str,
    taught: Sequence[str],
    found: str,
    figures: Sequence[str],
) -> None:
    """`place/card.json`: the facts, the size and hash of each file, what made them. `place/CARD.md`: the same to read.

    files            weights, each in `place`.
    taught           items of a list: what taught each of them.
    found, figures   a heading, and the lines under it that say what they can.
    """
    hashes = {
        path.relative_to(place).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    made = {key: environment().get(key) for key in ("python", "platform", "packages")}
    write_json(place / "card.json", {**facts, "files": hashes, "environment": made})
    lines = [
        f"# {title}",
        "",
        about,
        "",
        "## What taught them",
        "",
        *(f"- {one}" for one in taught),
        "",
        f"## {found}",
        "",
        *figures,
        "",
        "## Files",
        "",
        "| file | bytes | sha256 |",
        "|---|---|---|",
        *(f"| {name} | {item['bytes']:,} | `{item['sha256']}` |" for name, item in hashes.items()),
    ]
    atomic_write(place / "CARD.md", "\n".join(lines) + "\n")
