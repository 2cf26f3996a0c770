"""The drawn web: image-text pairs with the real web's diseases, at stated rates.

A pair is a pure function of (seed, split, index). Wrong captions belong to another scene, dull ones say nothing;
near-duplicates are really drawn again, re-encoded or shifted, and bring a caption (and a disease) of their own;
exact copies repeat an earlier pair to the byte.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from leveret.world.draw import jpeg, render
from leveret.world.questions import a, told
from leveret.world.scenes import Scene, Thing, between, pick, sample_scene, shuffled, stream

RATES = {"exact": 0.04, "redrawn": 0.05, "re-encoded": 0.05, "shifted": 0.05}
"""Shares of duplicates; the rest are new scenes."""
WORDS = {"wrong": 0.45, "dull": 0.15}
"""Shares of bad captions (also among near-duplicates); the rest fit their picture."""
PLAIN = 0.25
"""Share of fitting captions that name things without saying where."""

DULL = (
    "image", "photo", "a picture", "untitled", "some shapes", "a nice picture", "wallpaper", "click here", "thumbnail",
    "the picture of the day", "objects", "a photo of some objects", "see more", "no title", "stock image",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WebPair:
    """One pair before it is drawn. `source` is the index whose scene is shown (its own, or an earlier one's)."""

    index: int
    scene: Scene
    caption: str
    words: str
    copy: str
    source: int
    shift: tuple[int, int] = (0, 0)
    jitter: int = 0
    quality: int = 90

    def image(self) -> bytes:
        """The picture as JPEG bytes."""
        return jpeg(render(self.scene, shift=self.shift, jitter=self.jitter), self.quality)


def fitting(scene: Scene, rng: random.Random) -> str:
    """A caption that is true: mostly the whole scene with places, sometimes only what is there, in any order."""
    if rng.random() >= PLAIN:
        return told(scene)
    names = [a(item.name) if isinstance(item, Thing) else f"the word {item.text}" for item in scene.in_reading_order()]
    return " and ".join(shuffled(rng, names))


def web_scene(seed: int, split: str, index: int) -> Scene:
    return sample_scene(stream(seed, split, index), word=0.45)


def _caption(seed: int, split: str, index: int, scene: Scene, rng: random.Random) -> tuple[str, str]:
    r = rng.random()
    if r < WORDS["wrong"]:
        other = sample_scene(stream(seed, split + "/other", index), word=0.45)
        return fitting(other, rng), "wrong"
    if r < WORDS["wrong"] + WORDS["dull"]:
        text = pick(rng, DULL)
        return (f"{text} {between(rng, 1, 999)}" if rng.random() < 0.4 else text), "dull"
    return fitting(scene, rng), "fits"


def web_pair(seed: int, split: str, index: int) -> WebPair:
    """The pair at `index` of the web drawn from `seed` for `split`."""
    rng = stream(seed, split + "/pair", index)
    r, copy = rng.random(), "new"
    for kind, rate in RATES.items():
        if index > 0 and r < rate:
            copy = kind
            break
        r -= rate
    if copy == "new":
        scene = web_scene(seed, split, index)
        caption, words = _caption(seed, split, index, scene, rng)
        return WebPair(index, scene, caption, words, copy, index)
    earlier = web_pair(seed, split, int(rng.random() * index))
    if copy == "exact":
        return WebPair(index, earlier.scene, earlier.caption, earlier.words, copy, earlier.source,
                       earlier.shift, earlier.jitter, earlier.quality)  # fmt: skip
    caption, words = _caption(seed, split, index, earlier.scene, rng)
    shift, jitter, quality = (0, 0), 0, 90
    if copy == "redrawn":
        jitter = 1 + between(rng, 0, 98)
    elif copy == "re-encoded":
        quality = between(rng, 25, 75)
    else:
        shift = (between(rng, -2, 2), pick(rng, (-2, -1, 1, 2)))
    return WebPair(index, earlier.scene, caption, words, copy, earlier.source, shift, jitter, quality)
