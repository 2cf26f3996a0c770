"""What passes between stations: a few frozen dataclasses and nothing else.

    pool -> Sample -> inputs -> Batch -> model, train, generate -> Prediction -> evaluate

`ImageSpec` travels beside them: made by a model, read by inputs, saved in the model's config.json.
Nothing heavy is imported here; tensors are named in annotations only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_MARK = "<image>"
"""Marks, in a turn's text, where an image stands. As many marks as images, or the sample is refused."""

IGNORE = -100
"""Label of a position that is not supervised (the value torch's cross entropy skips)."""

Role = Literal["system", "user", "assistant"]
Resize = Literal["squash", "pad", "crop", "centre", "letterbox"]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an image's bytes are; never a decoded image.

    kind    "file": the whole file at `path`. "tar": `length` bytes at `offset` of the tar at `path`.
            "parquet": row `offset` (over all row groups) of the column `member` of the file at `path`; where the cell
            holds a list, its entry `place`. "arrow": the same of an Arrow stream.
            "data": `path` is a data URI (`data:image/png;base64,...`).
    member  the column; of a tar the member's name, for messages.
    """

    path: str
    kind: Literal["file", "tar", "parquet", "arrow", "data"] = "file"
    offset: int = 0
    length: int = -1
    member: str = ""
    place: int = -1

    @property
    def inside(self) -> str:
        """Where it lies in the file at `path`; "" where it is the file. `images.Root` reads it back."""
        if self.kind == "tar":
            return f"{self.offset}+{self.length}/{self.member}"
        if self.kind in ("parquet", "arrow"):
            return f"{self.offset}/{self.member}{f'[{self.place}]' if self.place >= 0 else ''}"
        return ""

    def __str__(self) -> str:
        if self.kind == "data":
            return f"{self.path[:24]}... (data URI)"
        return f"{self.path}#{self.inside}" if self.inside else self.path


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation. `text` may hold IMAGE_MARK."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair, conversation or text-only dialogue.

    A caption pair is a sample whose user turn holds the image mark (and perhaps a prompt) and whose
    assistant turn is the caption.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def fault(self) -> str | None:
        """The reason this sample must be refused, or None. Looks at its structure, not at image bytes."""
        if not self.turns:
            return "no turns"
        turns = self.turns[1:] if self.turns[0].role == "system" else self.turns
        expected: tuple[Role, Role] = ("user", "assistant")
        for position, turn in enumerate(turns):
            if turn.role != expected[position % 2]:
                return f"roles do not alternate: turn {position} is {turn.role!r}, expected {expected[position % 2]!r}"
            if not turn.text.replace(IMAGE_MARK, "").strip() and turn.role == "assistant":
                return f"empty turn: the assistant's turn {position} has no text"
        if not any(turn.role == "assistant" for turn in turns):
            return "no assistant turn: there is nothing to learn or compare"
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        if marks != len(self.images):
            return f"image marks do not match: {marks} {IMAGE_MARK} in the user turns, {len(self.images)} images"
        if any(IMAGE_MARK in turn.text for turn in turns if turn.role == "assistant"):
            return f"an assistant turn holds {IMAGE_MARK}"
        return None

    @property
    def caption(self) -> str:
        """The assistant's words, joined by newlines: what image-text scores compare with the image."""
        return "\n".join(turn.text.strip() for turn in self.turns if turn.role == "assistant")


@dataclass(frozen=True, slots=True)
class TowerView:
    """How one vision tower wants to see an image.

    size     side of the square input, in pixels.
    mean,std per channel, of values in 0..1.
    resize   "squash" distorts to the square; "pad" centres on a square of the mean colour (LLaVA's rule,
             int(255 * mean)); "crop" scales the short side and cuts the centre, as transformers does; "centre" is the
             same as torchvision does it (half a pixel goes to the even side); "letterbox" is Prismatic's: pads the two
             sides alike with the mean colour, half pixels dropped, then "centre".
    short    length the short side is scaled to before the centre is cut, where that is not `size` (timm's crop_pct,
             DINOv2's 256 for 224); 0 for `size`. "squash" has no use for it.
    """

    name: str
    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Resize = "squash"
    resample: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    short: int = 0


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Everything inputs must know about a model's eyes; pure data, saved in config.json.

    towers   one view per tower, in fusion order.
    tokens   positions one image fills in the language model (after fusion and connector).
    """

    towers: tuple[TowerView, ...]
    tokens: int

    def count(self, height: int, width: int) -> int:
        """Positions that an image of (height, width) pixels fills. Fixed here; tiles will depend on the size."""
        return self.tokens

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImageSpec:
        views = tuple(
            TowerView(**{**view, "mean": tuple(view["mean"]), "std": tuple(view["std"])}) for view in data["towers"]
        )
        return cls(towers=views, tokens=int(data["tokens"]))


@dataclass(slots=True)
class Batch:
    """What a model eats. B rows, T positions, N image tiles.

    input_ids      [B, T] int64; image positions hold the tokenizer's image id (any id: they are overwritten).
    labels         [B, T] int64; IGNORE where nothing is supervised. Not shifted: position t is the target of t - 1.
    attention_mask [B, T] bool; False on padding.
    position_ids   [B, T] int64; restart at 0 in every segment.
    segments       [B, T] int64; which sample of a packed row a position belongs to; -1 on padding.
    image_mask     [B, T] bool; True where an image token stands, in reading order.
    pixels         tower name -> [N, 3, H, W] float32. Empty when `features` is given or there are no images.
    tile_image     [N] int64; which image of the batch (in reading order) a tile belongs to.
    features       [N, tokens, width] tower outputs computed earlier (a cache), instead of pixels.
    ids            sample ids, for messages.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    segments: Tensor
    image_mask: Tensor
    pixels: dict[str, Tensor]
    tile_image: Tensor
    features: Tensor | None = None
    ids: tuple[str, ...] = ()

    def to(self, device: Any) -> Batch:
        """The same batch with every tensor on `device`."""
        from dataclasses import fields, replace

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: item.to(device) for key, item in value.items()}
            return value.to(device) if hasattr(value, "to") else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Prediction:
    """What generation hands to scoring; one JSON line on disk, readable by LLaVA's scripts.

    choices  probability of each allowed answer, where a task asks for probabilities.
    """

    question_id: str
    text: str
    choices: Mapping[str, float] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
