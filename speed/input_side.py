"""Pictures a second that training decodes for itself, beside what Pillow alone can do with as many threads.

640 x 480 JPEGs of quality 90, brought to 384 x 384; in turn, medians. Pillow's limit is opening, decoding to RGB and
`resize` to the square, nothing else; leveret also checks the file, turns it upright, normalises to float32 and lays a
batch, as a stage does where features of a frozen tower are not kept.

    python speed/input_side.py [--threads 2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from leveret.inputs.batches import Item, collate
from leveret.inputs.reader import Encoded
from leveret.records import IGNORE, ImageRef, ImageSpec, TowerView
from leveret.train.data import pixels_of

SIDE, COUNT, BATCH = 384, 128, 16


def write(folder: Path) -> list[Path]:
    """Pictures with the detail of photographs: noise at several scales."""
    noise, paths = np.random.default_rng(0), []
    for number in range(COUNT):
        whole = np.zeros((480, 640, 3))
        for cell in (4, 16, 64, 160):
            some = noise.integers(0, 255, (480 // cell, 640 // cell, 3), dtype=np.uint8)
            whole += np.asarray(Image.fromarray(some).resize((640, 480), Image.Resampling.BICUBIC), float) / 4
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(whole.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def limit(path: Path) -> None:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    spec = ImageSpec((TowerView("tower", SIDE),), 729)
    text = Encoded([7] * 800, [IGNORE] * 790 + [7] * 10, [True] * 729 + [False] * 71, "")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(given.threads) as pool:
        paths = write(Path(name))
        print(f"{sum(path.stat().st_size for path in paths) / COUNT / 1024:.0f} kB a picture, {given.threads} threads")

        def pillow() -> None:
            list(pool.map(limit, paths))

        def ours() -> None:
            seen = pool.map(lambda path: pixels_of(ImageRef(str(path)), spec), paths)
            items = [Item(text, str(number), [pixels]) for number, pixels in enumerate(seen)]
            for at in range(0, COUNT, BATCH):
                collate(items[at : at + BATCH], 0)

        rates: dict[str, list[float]] = {"Pillow alone": [], "leveret, batches ready": []}
        for _ in range(given.rounds):
            for work, found in zip((pillow, ours), rates.values(), strict=True):
                began = time.perf_counter()
                work()
                found.append(COUNT / (time.perf_counter() - began))
    base = statistics.median(rates["Pillow alone"])
    for label, found in rates.items():
        middle = statistics.median(found)
        print(f"  {label:24} {middle:6.0f} pictures/s  {middle / base:.2f} of Pillow's limit")


if __name__ == "__main__":
    main()
