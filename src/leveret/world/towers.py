"""The drawn world's other vision towers: one network, the same pictures, other teachers. The table, and their card.

    captions    a SigLIP loss on captions alone, as CLIP and SigLIP have it; at three sizes of the picture
    labels      which colour-shape pairs and which letters a picture holds, without a place, as ImageNet's ViTs have it
    itself      no word and no label: self-distillation, as DINO, iBOT and DINOv2 have it (world/distil.py)

`world/vision` beside them was also told what stands where (world/vision.py). All of TOWERS see the same scenes, drawn
and spoiled in the same way, equally many of them; only what teaches them differs, or the size that they see them at.
How they are taught: world/teachers.py. What their tokens hold: world/probe.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from leveret.runs import read_json, write_json
from leveret.world import cards

BATCH = 64
STEPS = 700
"""Of BATCH pictures each: the one budget of all these towers."""
PICTURES = (
    "The pictures are those of world/vision's recipe: fresh clean scenes, some with larger or smaller things, clutter "
    "behind them or nothing in them; in two fifths some things have a shape or a colour without a name; a quarter are "
    "bent, blurred and badly exposed; half go through JPEG. The eight held-out colour-shape pairs are in none, and "
    "no held-out word is."
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A tower of TOWERS.

    teacher  what teaches it: a row of teachers.TEACHERS.
    size     side of the picture in pixels; a token for 8 x 8 of them.
    about    what taught it, for the card.
    """

    teacher: str
    size: int
    about: str


_CAPTIONS = (
    "SigLIP loss on clean captions that leave attributes out at random, and nothing else: no place, no label, no box. "
    "Its text tower is not kept."
)
TOWERS: dict[str, Kind] = {
    "contrastive": Kind("captions", 64, _CAPTIONS),
    "contrastive-48": Kind("captions", 48, f"{_CAPTIONS} Sees 48 x 48 pixels: 6 x 6 tokens."),
    "contrastive-32": Kind("captions", 32, f"{_CAPTIONS} Sees 32 x 32 pixels: 4 x 4 tokens."),
    "supervised": Kind(
        "labels", 64,
        "Class labels: which of the 56 colour-shape pairs that are drawn, and which of the 12 letters, are in the "
        "picture, a yes or no each and no place. No captions.",
    ),
    "self-supervised": Kind(
        "itself", 64,
        "No captions and no labels. Two crops of each picture; the tower tells for one crop what a slow mean of itself "
        "says of the other (DINO, arXiv 2104.14294), and for the hidden cells of a crop what the mean says of them "
        "where it sees them (iBOT, arXiv 2111.07832), over prototypes that are balanced in each batch (SwAV's "
        "Sinkhorn-Knopp, as in DINOv2, arXiv 2304.07193). The mean is what is kept.",
    ),
}  # fmt: skip


def file_of(folder: Path, name: str) -> Path:
    """Where the weights of the tower `name` lie in a folder of backbones."""
    return folder / "towers" / f"{name}.safetensors"


def write_card(folder: Path, seed: int, steps: Mapping[str, int]) -> None:
    """`towers/CARD.md` and `towers/card.json` of the towers that are there, with their probes."""
    done = [name for name in TOWERS if (folder / "state" / name / "figures.json").exists()]
    beside = folder / "state" / "references.json"
    if not beside.exists():
        from leveret.world.probe import references

        write_json(beside, references(seed))
    probes = read_json(beside) | {name: read_json(folder / "state" / name / "figures.json") for name in done}
    reads = list(next(iter(probes.values())))
    cards.write_card(
        folder / "towers",
        [file_of(folder, name) for name in done],
        {
            "seed": seed,
            "steps": {name: steps[name] for name in done},
            "batch": BATCH,
            "supervision": {name: TOWERS[name].about for name in done},
            "pictures": PICTURES,
            "probe": probes,
        },
        title="The drawn world's other towers",
        about=(
            "One network (that of `world/vision`), the same scenes in the same order, trained from nothing by `leveret "
            f"world backbones -o OUT --only NAME` (seed {seed}). They exist so that what teaches a tower, and the size "
            "that it sees, can be compared; none is meant for more. `world/vision` beside them saw many times as "
            "many pictures and was told what stands where."
        ),
        taught=[
            *(f"**{name}** ({steps[name]:,} steps of {BATCH} pictures): {TOWERS[name].about}" for name in done),
            PICTURES,
        ],
        found="What their tokens hold",
        figures=[
            "What linear reads of the frozen tokens get right on 1,024 fresh pictures; they learn from 2,048 others "
            "(world/probe.py). Colour, shape, letter and box (every side told to 1/32 of the picture's, one off at "
            "most) are read at the token where the centre lies, the count of one to four things from the mean and the "
            "greatest of all tokens. A read that gets the shape of held-out pairs less often than one in eight knows "
            "their colour better than their shape: it has learned what never goes with that colour.",
            "",
            f"| | {' | '.join(reads)} |",
            f"|---|{'---|' * len(reads)}",
            *(f"| {name} | {' | '.join(f'{found[read]:.3f}' for read in reads)} |" for name, found in probes.items()),
        ],
    )
