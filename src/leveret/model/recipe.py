"""The `model:` part of a recipe: which tower, connector, language model and chat format make the model.

Ids are rows of the tables in towers.py, connectors.py, language.py and inputs/chat.py; they are checked when the
model is built, so that a saved model can be read where a path it was once built from is gone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from leveret import own
from leveret.records import Resize
from leveret.runs import RecipeError

Kept = Literal["layers", "norm", "head"]
Tokens = Literal["patch", "cls_patch", "drop_first"]
Fusion = Literal["channel", "interleave"]
Moments = Literal["half", "clip", "imagenet", "none"]

_OWN = "my.py:NAME, a row in a file of your own"
_TOWER = f"A row of TOWERS, a path (a Hugging Face folder, a timm folder, or an EVA-CLIP `.pt` file), or {_OWN}."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _TowerChoices(_Strict):
    """What may be chosen of one tower."""

    layer: int | None = Field(
        default=None,
        description="Which hidden state is taken, as an index into [embeddings, block 1, ..]: -2 is the last block but "
        "one. Default: the tower's row.",
    )
    tokens: Tokens = Field(
        default="patch",
        description="patch: the image's patches alone. cls_patch: class and register tokens too. drop_first: all but "
        "the first token, whatever it is; TinyLLaVA Factory's `patch`, which loses a real patch of SigLIP.",
    )
    size: int | None = Field(
        default=None,
        gt=0,
        description="Side of the square image. Other than the published one, the position embeddings are interpolated "
        "as the published code does. With `s2` it follows from the scales. Default: the tower's row.",
    )
    s2: list[int] = Field(
        default_factory=list,
        description="S2 multi-scale: sides of the image, multiples of the smallest (Bunny: 384, 768, 1152). Features "
        "of all scales are joined on channels; the number of tokens is that of the smallest.",
    )
    patches: int | None = Field(
        default=None,
        ge=1,
        description="NaFlex towers (SigLIP2's): each image keeps its shape and is cut into at most so many patches "
        "(published: 256), each of them a token. Default: a square of `size`.",
    )
    resize: Resize | None = Field(default=None, description="How an image becomes a square. Default: the tower's row.")
    crop: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of the scaled image that is cut out of its middle (timm's crop_pct); `squash` has no use "
        "for it. Default: the tower's row or preprocessor_config.json, mostly 1; with `s2` 1.",
    )
    normalise: Moments | None = Field(
        default=None,
        description="Mean and std of the pixels, where not the tower's own (the Factory's MoF gives both its towers "
        "CLIP's). none: values from 0 to 1, as nanoVLM has them.",
    )
    norm: bool = Field(
        default=False,
        description="The norm behind the last block runs too (nanoVLM); it goes with `layer: -1`.",
    )
    activation: str | None = Field(
        default=None,
        description="transformers' name of the activation in the tower's MLPs, where weights are to be run as a system "
        "ran them (Prismatic's DINOv2 + CLIP models ran CLIP with gelu). Default: the configuration's.",
    )
    keep: list[Kept] = Field(
        default_factory=list,
        description="Published parts of the tower that the chosen layer does not need but the checkpoint shall carry.",
    )


class TowerRecipe(_TowerChoices):
    """One of several towers."""

    tower: str = Field(description=_TOWER)
    name: str | None = Field(
        default=None,
        pattern="^[a-z][a-z0-9_]*$",
        description="What its view and its weights are called. Default: its architecture's (clip, dinov2, ..).",
    )


class TilesRecipe(_Strict):
    """LLaVA-1.6's "anyres": an image is seen whole, and again in tiles of the tower's size."""

    grids: list[tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]] = Field(
        default=[(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)],
        min_length=1,
        description="Grids of tiles, (rows, columns). An image gets the one that keeps most of its pixels, of these "
        "the one that leaves least empty, of these the first. 6x6 is short for all of up to 6 rows and 6 columns "
        "(LLaVA-OneVision's). Default: LLaVA-1.6's.",
    )
    merge: Literal["unpad", "spatial", "flat"] = Field(
        default="unpad",
        description="unpad: tokens row by row over the whole grid, without those of borders, and a learned newline "
        "after every row. spatial: row by row, borders in, no newlines. flat: tile after tile.",
    )
    limit: int = Field(
        default=0,
        ge=0,
        description="Where the tiles of an image fill more tokens than so many tiles do (by over a fifth), they are "
        "scaled down to as many, bilinearly; goes with unpad. LLaVA-OneVision's anyres_max_9 is 9. 0: never.",
    )

    @field_validator("grids", mode="before")
    @classmethod
    def _all(cls, grids: Any) -> Any:
        """`6x6`: every grid up to it, by rows."""
        if isinstance(grids, str) and (found := re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", grids.strip())):
            rows, columns = map(int, found.groups())
            return [(row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)]
        return grids

    @model_validator(mode="after")
    def _limited(self) -> TilesRecipe:
        if self.limit and self.merge != "unpad":
            raise ValueError(f"limit {self.limit} given beside merge {self.merge}; only `unpad` is scaled down")
        return self


class SplitRecipe(_Strict):
    """nanoVLM's tiles: an image keeps its shape, is scaled until the tower's size divides both sides, and cut there."""

    side: int = Field(gt=0, description="Longest side of the scaled image; a multiple of the tower's size.")
    grow: bool = Field(default=False, description="Smaller images are scaled up to `side` too.")
    whole: str | None = Field(
        default="",
        description="The token before the whole image, squashed to one tile, which comes first; an image of one tile "
        "is the whole. Empty for no token; null where the whole is not shown.",
    )
    tile: str = Field(
        default="",
        description="The token before every tile, in which {row} and {column} count from 1. Empty for none.",
    )


class VisionRecipe(_TowerChoices):
    """The model's eyes: one `tower`, or several `towers` and how they are joined."""

    tower: str | None = Field(default=None, description=_TOWER)
    towers: list[TowerRecipe] = Field(
        default_factory=list,
        description="Several towers, in fusion order, instead of `tower`. What else may be chosen is then said for "
        "each of them; only `resize` may stand here and holds for those that do not say.",
    )
    fusion: Fusion = Field(
        default="channel",
        description="How several towers are joined. channel: side by side in width (Prismatic). interleave: token by "
        "token, first tower, second tower, first, .. (the Factory's MoF).",
    )

    tiles: TilesRecipe | None = Field(
        default=None,
        description="Images are seen in tiles too; `tiles: {}` is as LLaVA-1.6 does. Default: one picture an image.",
    )
    split: SplitRecipe | None = Field(
        default=None, description="Images are cut into tiles as nanoVLM does, instead of `tiles`."
    )

    @model_validator(mode="after")
    def _one_form(self) -> VisionRecipe:
        if (self.tower is None) == (not self.towers):
            given = "both" if self.towers else "neither"
            raise ValueError(f"{given} of `tower` and `towers` given; give one tower, or a list of towers")
        if self.tiles is not None and self.split is not None:
            raise ValueError("both of `tiles` and `split` given; an image is cut in one way")
        if self.towers:
            alone = TowerRecipe(tower="")
            stray = [name for name in _TowerChoices.model_fields if getattr(self, name) != getattr(alone, name)]
            if stray := [name for name in stray if name != "resize"]:
                raise ValueError(f"{', '.join(stray)} given beside `towers`; say it for each tower of the list")
        return self

    def each(self) -> list[TowerRecipe]:
        """One recipe per tower, in fusion order; a single tower's view is called "vision"."""
        if self.tower is not None:
            said = {name: getattr(self, name) for name in _TowerChoices.model_fields}
            return [TowerRecipe(tower=self.tower, name="vision", **said)]
        return [tower.model_copy(update={"resize": tower.resize or self.resize}) for tower in self.towers]

    def keeping(self, kept: Sequence[list[Kept]]) -> VisionRecipe:
        """The same with each tower's `keep`, in fusion order."""
        if self.tower is not None:
            return self.model_copy(update={"keep": kept[0]})
        towers = [tower.model_copy(update={"keep": own}) for tower, own in zip(self.towers, kept, strict=True)]
        return self.model_copy(update={"towers": towers})

    def resized(self, resize: Resize) -> VisionRecipe:
        """The same with every tower's image made square by `resize`."""
        towers = [tower.model_copy(update={"resize": None}) for tower in self.towers]
        return self.model_copy(update={"resize": resize, "towers": towers})


class ConnectorRecipe(_Strict):
    """What turns the tower's tokens into the language model's."""

    kind: str = Field(default="mlp2x_gelu", description=f"A row of CONNECTORS; mlpNx_gelu with any N; or {_OWN}.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="The row's own settings, for example {queries: 64}; docs/connectors.md has all.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="While the connector learns, this share of its input numbers is dropped: what one number says of a "
        "pair of attributes it cannot lean on, so it composes better.",
    )

    @field_validator("options", mode="before")
    @classmethod
    def _none(cls, options: Any) -> Any:
        """`options: null` takes away what a recipe further up `extends` has set."""
        return {} if options is None else options


class LanguageRecipe(_Strict):
    """The language model."""

    name: str = Field(
        description=f"A row of LANGUAGES, a Hugging Face id, the path of a Hugging Face folder, or {_OWN}."
    )
    vocab: int | None = Field(
        default=None, gt=0, description="Rows of the token tables, where not as published (Bunny: len(tokenizer))."
    )
    head_bias: bool = Field(default=True, description="False drops the bias of the output layer where there is one.")
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None, description="transformers' attention code. Default: the row's, else transformers' choice."
    )


class ModelRecipe(_Strict):
    """A whole model."""

    vision: VisionRecipe
    connector: ConnectorRecipe = Field(default_factory=ConnectorRecipe)
    language: LanguageRecipe
    chat: str = Field(description=f"A row of CHATS, or {_OWN}: the chat format the model speaks.")


def named(recipe: ModelRecipe) -> ModelRecipe:
    """The same recipe, given by a person: every row in a file of their own with the file's fingerprint (own.py), and
    those files may run. RecipeError with all that is wrong at once."""
    faults: list[str] = []

    def pin(text: str, where: str) -> str:
        try:
            return own.pin(text, where) if own.is_own(text) else text
        except RecipeError as fault:
            faults.append(str(fault))
            return text

    vision = recipe.vision
    if vision.tower is not None:
        vision = vision.model_copy(update={"tower": pin(vision.tower, "model.vision.tower")})
    each = [
        one.model_copy(update={"tower": pin(one.tower, f"model.vision.towers.{place}.tower")})
        for place, one in enumerate(vision.towers)
    ]
    connector = recipe.connector.model_copy(update={"kind": pin(recipe.connector.kind, "model.connector.kind")})
    language = recipe.language.model_copy(update={"name": pin(recipe.language.name, "model.language.name")})
    chat = pin(recipe.chat, "model.chat")
    if faults:
        raise RecipeError("\n".join(faults))
    vision = vision.model_copy(update={"towers": each})
    return recipe.model_copy(update={"vision": vision, "connector": connector, "language": language, "chat": chat})
