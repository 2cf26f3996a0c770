"""Facts of a tower: how its architecture is built and read, and everything that rebuilds it.

TOWER_FAMILIES says how an architecture is built and read; TowerFacts is everything that rebuilds a tower where the
table row and the folder it came from are gone. An architecture of a user's own is built by a file of theirs (own.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from leveret import own
from leveret.inputs.views import MOMENTS
from leveret.model.recipe import Tokens as TokenChoice
from leveret.records import Resize, TowerView

if TYPE_CHECKING:
    from torch import nn

Resample = Literal["bicubic", "bilinear", "nearest"]

(CLIP_MEAN, CLIP_STD), (IMAGENET_MEAN, IMAGENET_STD) = MOMENTS["clip"], MOMENTS["imagenet"]
HALF, _ = MOMENTS["half"]


@dataclass(frozen=True, slots=True)
class TowerFacts:
    """Everything that rebuilds a tower without its table row; saved in a model's config.json.

    family  a row of TOWER_FAMILIES, or a row in a user's own file.
    config  the architecture's own configuration, at its published depth.
    depth   blocks that run. The rest are not built unless "layers" is in `keep`.
    size    side of the image it is given: with S2 the largest scale.
    keep    published parts that do not run but stay in the checkpoint: "layers", "norm", "head".
    name    of its view, and of its weights among several towers.
    tokens  which tokens are taken: a choice of TowerRecipe.
    s2      sides of the scales in rising order; () for one scale.
    short   what the short side is scaled to before the centre is cut, where not `size` (TowerView.short).
    norm    whether the norm behind the last block runs.
    patches NaFlex: patches of an image at most, each image at its own shape; 0 for a square of `size`.
    """

    family: str
    config: Mapping[str, Any]
    depth: int
    size: int
    keep: tuple[str, ...] = ()
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    resize: Resize = "squash"
    source: str = ""
    name: str = "vision"
    tokens: TokenChoice = "patch"
    s2: tuple[int, ...] = ()
    resample: Resample = "bicubic"
    short: int = 0
    norm: bool = False
    patches: int = 0

    @property
    def view(self) -> TowerView:
        """How the tower wants to see an image."""
        return TowerView(self.name, self.size, self.mean, self.std, self.resize, self.resample, self.short)

    @property
    def side(self) -> int:
        """Side of what the network itself sees: with S2 a tile, else the image."""
        return self.s2[0] if self.s2 else self.size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TowerFacts:
        tuples = {key: tuple(data[key]) for key in ("keep", "mean", "std", "s2") if key in data}
        return cls(**{**data, **tuples})


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    model_class  transformers' class ("" for our own).
    blocks       where the list of transformer blocks lies; "" where the whole is one block.
    short        what a tower of it is called among several.
    norm, head   what follows the last block.
    pre          a norm between the embeddings and the first block.
    head_switch  the configuration's word that says whether the head is built.
    prefix       leading tokens (class, registers) that are no part of the image; registers come on top, as configured.
    sizes        what another size than the configuration's does: "flag" the embeddings interpolate when told, "any"
                 they do so by themselves (or have no stored positions), "fixed" it cannot be.
    resize, resample, mean, std  what the published models were trained with, for folders that do not say.
    build        (config) -> module, where no class of transformers is built: pixels [N, 3, S, S] -> `prefix` and
                 (S / patch_size)^2 tokens [N, n, hidden_size], or without leading tokens a map [N, hidden_size, g, g].
                 It runs whole: `depth` is its number of blocks.
    """

    model_class: str = ""
    blocks: str = "blocks"
    norm: str = "norm"
    short: str = "own"
    pre: str = ""
    head: str = ""
    head_switch: str = "vision_use_head"
    prefix: int = 0
    sizes: Literal["flag", "any", "fixed"] = "any"
    resize: Resize = "squash"
    resample: Resample = "bicubic"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    build: Callable[[Mapping[str, Any]], nn.Module] | None = None


_DINO = {"short": "dinov2", "prefix": 1, "resize": "crop", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
TOWER_FAMILIES: dict[str, Family] = {
    "siglip_vision_model": Family(
        "SiglipVisionModel", "encoder.layers", "post_layernorm", "siglip", head="head", sizes="flag"
    ),
    # NaFlex: at one fixed square size, or with `patches` at each image's own; positions interpolated as the class does
    "siglip2_vision_model": Family(
        "Siglip2VisionModel", "encoder.layers", "post_layernorm", "siglip2", head="head", resample="bilinear"
    ),
    "clip_vision_model": Family(
        "CLIPVisionModel", "encoder.layers", "post_layernorm", "clip", pre="pre_layrnorm", prefix=1, sizes="flag",
        resize="crop", mean=CLIP_MEAN, std=CLIP_STD,
    ),
    "dinov2": Family("Dinov2Model", "encoder.layer", "layernorm", **_DINO),  # type: ignore[arg-type]
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", "encoder.layer", "layernorm", **_DINO  # type: ignore[arg-type]
    ),
    "dinov3_vit": Family(
        "DINOv3ViTModel", "model.layer", "norm", "dinov3", prefix=1, resample="bilinear",
        mean=IMAGENET_MEAN, std=IMAGENET_STD,
    ),
    "vit": Family("ViTModel", "layers", "layernorm", "vit", prefix=1, sizes="flag", resample="bilinear"),
    "aimv2_vision_model": Family(
        "Aimv2VisionModel", "encoder.layers", "rms_norm", "aimv2", head="head", head_switch="use_head", sizes="fixed",
        resize="crop", mean=CLIP_MEAN, std=CLIP_STD,
    ),
    # torchvision's transforms: Bunny's multimodal_encoder/eva_clip, which has no preprocessor_config.json
    "eva02_clip": Family(
        "", "blocks", "norm", "eva", head="head", prefix=1, sizes="fixed", resize="centre", mean=CLIP_MEAN, std=CLIP_STD
    ),
    "tiny": Family("", "layers", "norm", "tiny", sizes="fixed"),
}  # fmt: skip


def family_of(facts: TowerFacts, where: str = "model.vision.tower") -> Family:
    """How the tower's architecture is built and read. RecipeError when a user's own file has to say so and does not,
    or nobody named it on this machine."""
    if not is_own(facts):
        return TOWER_FAMILIES[facts.family]
    from leveret.model.tower_table import TowerRow

    family = own.row(facts.family, TowerRow, where).family
    assert family is not None, "facts have this family because the row has it"
    return family


def is_own(facts: TowerFacts) -> bool:
    """Whether a user's own file builds the tower."""
    return own.is_own(facts.family)


def is_whole(facts: TowerFacts) -> bool:
    """Whether one module of ours or of the user's turns pixels into tokens, and is never cut to a depth."""
    return facts.family == "tiny" or is_own(facts)


def width(facts: TowerFacts) -> int:
    """Numbers that a token of one scale has."""
    return int(facts.config["width" if facts.family == "tiny" else "hidden_size"])


def published_depth(facts: TowerFacts) -> int:
    """Blocks that the published tower has, run or not."""
    return int(facts.config["layers" if facts.family == "tiny" else "num_hidden_layers"])


def patch(facts: TowerFacts) -> int:
    """Side of a patch, in pixels."""
    return 8 if facts.family == "tiny" else int(facts.config["patch_size"])


def grid(facts: TowerFacts) -> int:
    """Patches to a side of the square that the network sees."""
    return facts.side // patch(facts)


def prefix(facts: TowerFacts) -> int:
    """Leading tokens that are no patches: class token and registers."""
    return family_of(facts).prefix + int(facts.config.get("num_register_tokens") or 0)
