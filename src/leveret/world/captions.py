"""The drawn web: image-text pairs with the real web's diseases, at stated rates.

A pair is a pure function of (seed, split, index). Wrong captions belong to another scene, dull ones say nothing;
near-duplicates are really drawn again, re-encoded or shifted, and bring a caption (and a disease) of their own;
exact copies repeat an earlier pair to the byte.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from leveret.world.draw import jpeg, render
from leveret.world.questions import a, told
from leveret.world.scenes import USUAL, Frames, Scene, Thing, between, pick, sample_scene, shuffled, stream


@dataclass(frozen=True, slots=True)
class Diseases:
    """What ails a web, as shares.

    wrong, dull  captions of another scene, and captions that say nothing (also among copies); the rest fit.
    copies       kind of duplicate -> share of pairs; the rest show new scenes.
    tail         how much copies crowd on few scenes: the copied pair's position is u ** tail of the way back, for a
                 uniform u. 1: all alike; 4: a third of all copies show one scene in eighty.
    """

    wrong: float
    dull: float
    copies: Mapping[str, float]
    tail: float


def _copies(exact: float, redrawn: float, encoded: float, shifted: float) -> dict[str, float]:
    return {"exact": exact, "redrawn": redrawn, "re-encoded": encoded, "shifted": shifted}


STRENGTHS = {
    "mild": Diseases(0.25, 0.10, _copies(0.02, 0.03, 0.03, 0.02), 1.0),
    "usual": Diseases(0.45, 0.15, _copies(0.05, 0.05, 0.05, 0.05), 3.0),
    "severe": Diseases(0.60, 0.20, _copies(0.10, 0.20, 0.20, 0.10), 6.0),
}
"""The drawn webs. `usual` is the quickstart's, and what the scorer learned from (another draw of it)."""
PLAIN = 0.25
"""Share of captions of a scene, its own or another's, that name things without saying where."""

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


def fitting(scene: Scene, rng: random.Random, plain: float = PLAIN) -> str:
    """A caption that is true: the whole scene with places, or, a share `plain` of them, only what is there, in any
    order."""
    if rng.random() >= plain:
        return told(scene)
    names = [a(item.name) if isinstance(item, Thing) else f"the word {item.text}" for item in scene.in_reading_order()]
    return " and ".join(shuffled(rng, names))


def web_scene(seed: int, split: str, index: int, frames: Frames = USUAL) -> Scene:
    return sample_scene(stream(seed, split, index), word=0.45, frames=frames)


def _caption(
    ill: Diseases, seed: int, split: str, index: int, scene: Scene, rng: random.Random, frames: Frames, plain: float
) -> tuple[str, str]:
    r = rng.random()
    if r < ill.wrong:
        other = web_scene(seed, split + "/other", index, frames)
        return fitting(other, rng, plain), "wrong"
    if r < ill.wrong + ill.dull:
        text = pick(rng, DULL)
        return (f"{text} {between(rng, 1, 999)}" if rng.random() < 0.4 else text), "dull"
    return fitting(scene, rng, plain), "fits"


def web_pair(
    seed: int,
    split: str,
    index: int,
    ill: Diseases = STRENGTHS["usual"],
    frames: Frames = USUAL,
    *,
    plain: float = PLAIN,
) -> WebPair:
    """The pair at `index` of the web drawn from `seed` for `split`. plain: share of its captions that only name things;
    it changes nothing else."""
    rng = stream(seed, split + "/pair", index)
    r, copy = rng.random(), "new"
    for kind, rate in ill.copies.items():
        if index > 0 and r < rate:
            copy = kind
            break
        r -= rate
    if copy == "new":
        scene = web_scene(seed, split, index, frames)
        caption, words = _caption(ill, seed, split, index, scene, rng, frames, plain)
        return WebPair(index, scene, caption, words, copy, index)
    earlier = web_pair(seed, split, int(rng.random() ** ill.tail * index), ill, frames, plain=plain)
    if copy == "exact":
        return replace(earlier, index=index, copy=copy)
    caption, words = _caption(ill, seed, split, index, earlier.scene, rng, frames, plain)
    shift, jitter, quality = (0, 0), 0, 90
    if copy == "redrawn":
        jitter = 1 + between(rng, 0, 98)
    elif copy == "re-encoded":
        quality = between(rng, 25, 75)
    else:
        shift = (between(rng, -2, 2), pick(rng, (-2, -1, 1, 2)))
    return WebPair(index, earlier.scene, caption, words, copy, earlier.source, shift, jitter, quality)
