"""Vision towers: pixels [N, 3, S, S] -> features [N, tokens, width].

Three tables. TOWER_FAMILIES says how an architecture is built and read; TOWERS names published towers and the facts
their configuration does not hold (which layer, which size); `recipes/backbones.json` holds the published
configurations. A tower is built exactly as deep as the layer that is taken, without the norm and the head that
follow it, unless the recipe's `keep` asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leveret.model.hub import from_pretrained, package_file, read_config
from leveret.model.recipe import VisionRecipe
from leveret.model.tables import unknown
from leveret.model.tiny import TinyVisionTower, load_module
from leveret.records import Resize, TowerView
from leveret.runs import RecipeError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class TowerFacts:
    """Everything that rebuilds a tower without its table row; saved in a model's config.json.

    family  a row of TOWER_FAMILIES.
    config  the architecture's own configuration, at its published depth.
    depth   blocks that run. The rest are not built unless "layers" is in `keep`.
    keep    published parts that do not run but stay in the checkpoint: "layers", "norm", "head".
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TowerFacts:
        return cls(**{**data, **{key: tuple(data[key]) for key in ("keep", "mean", "std")}})


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    model_type  as transformers names it ("" for our own).
    blocks      where the list of transformer blocks lies.
    pre         a norm between the embeddings and the first block.
    norm, head  what follows the last block.
    prefix      leading tokens (class, registers) that are no part of the image and are dropped.
    resize, mean, std  what the published models were trained with, for folders that do not say.
    """

    model_class: str
    blocks: str
    norm: str
    pre: str = ""
    head: str = ""
    prefix: int = 0
    resize: Resize = "squash"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF


TOWER_FAMILIES: dict[str, Family] = {
    "siglip_vision_model": Family("SiglipVisionModel", "encoder.layers", "post_layernorm", head="head"),
    "clip_vision_model": Family(
        "CLIPVisionModel", "encoder.layers", "post_layernorm", pre="pre_layrnorm", prefix=1,
        resize="crop", mean=CLIP_MEAN, std=CLIP_STD,
    ),
    "dinov2": Family(
        "Dinov2Model", "encoder.layer", "layernorm", prefix=1, resize="crop", mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
    "tiny": Family("TinyVisionTower", "layers", "norm"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TowerRow:
    """A tower with a name: an entry of backbones.json, or a file of weights in this package.

    layer  index into [embeddings, block 1, .., block n]; -2 is the habit of LLaVA and Bunny.
    size   side of the input, where it is not the configuration's (DINOv2 interpolates its positions).
    """

    layer: int = -2
    size: int | None = None
    package: str = ""


TOWERS: dict[str, TowerRow] = {
    "world/vision": TowerRow(layer=-1, package="world/weights/vision.safetensors"),
    "google/siglip-so400m-patch14-384": TowerRow(),
    "google/siglip-so400m-patch14-224": TowerRow(),
    "google/siglip-base-patch16-224": TowerRow(),
    "google/siglip-base-patch16-256": TowerRow(),
    "google/siglip-base-patch16-384": TowerRow(),
    "google/siglip2-base-patch16-256": TowerRow(),
    "google/siglip2-so400m-patch14-384": TowerRow(),
    "openai/clip-vit-large-patch14-336": TowerRow(),
    "openai/clip-vit-large-patch14": TowerRow(),
    "openai/clip-vit-base-patch16": TowerRow(),
    "openai/clip-vit-base-patch32": TowerRow(),
    "facebook/dinov2-large": TowerRow(size=224),
}


@cache
def backbones() -> dict[str, Any]:
    """The published configurations that rows of the tables stand on: {"vision": {id: ..}, "language": {id: ..}}."""
    return json.loads(resources.files("leveret").joinpath("recipes/backbones.json").read_text("utf-8"))


class Tower(nn.Module):
    """A tower as the VLM sees it. `forward(pixels [N, 3, S, S]) -> [N, tokens, width]`.

    Parameters that cannot influence the output (kept parts) never require gradients.
    """

    def __init__(self, facts: TowerFacts, model: nn.Module) -> None:
        super().__init__()
        self.facts = facts
        self.model: Any = model
        self._family = TOWER_FAMILIES[facts.family]
        self.view = TowerView("vision", facts.size, facts.mean, facts.std, facts.resize)
        tiny = facts.family == "tiny"
        self.width = int(facts.config["width" if tiny else "hidden_size"])
        patch = 8 if tiny else int(facts.config["patch_size"])
        self.tokens = (facts.size // patch) ** 2
        for _, parameter in self.unused():
            parameter.requires_grad_(False)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks that run, first to last."""
        return list(self.model.get_submodule(self._family.blocks))[: self.facts.depth]

    @property
    def published_depth(self) -> int:
        """Blocks that the published tower has, run or not."""
        return int(self.facts.config["layers" if self.facts.family == "tiny" else "num_hidden_layers"])

    def unused(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the checkpoint carries though the output does not depend on them."""
        if self.facts.family == "tiny":
            return
        first_idle = len(self.blocks)
        for name, parameter in self.model.named_parameters():
            block = self._block_of(name)
            after = name.split(".")[0] in {self._family.norm, self._family.head}
            # DINOv2's mask token serves its pretraining only
            if after or (block is not None and block >= first_idle) or name.endswith("mask_token"):
                yield f"model.{name}", parameter

    def before(self, layer: int) -> Iterator[str]:
        """Names of the parameters that come before block `layer` (from 0): earlier blocks, and the embeddings unless
        `layer` is 0. RecipeError when that block does not run."""
        if not 0 <= layer < len(self.blocks):
            raise RecipeError(
                f"learn.vision.from_layer: {layer} given, but layers 0 to {len(self.blocks) - 1} of "
                f"{self.facts.source} run; nothing would learn"
            )
        for name, _ in self.model.named_parameters():
            block = self._block_of(name)
            after = self.facts.family == "tiny" and name.startswith(self._family.norm)
            if layer and not after and (block is None or block < layer):
                yield f"model.{name}"

    def _block_of(self, name: str) -> int | None:
        rest = name.removeprefix(self._family.blocks + ".")
        return None if rest == name else int(rest.split(".")[0])

    def train(self, mode: bool = True) -> Tower:
        """Batch norms keep their stored statistics even in training: a tower's output for an image must not depend on
        the rest of the batch, or features could not be cached and a frozen tower would still drift."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(next(self.parameters()).dtype)
        if self.facts.family == "tiny":
            return self.model(pixels)
        hidden = self.model.embeddings(pixels)  # [N, prefix + tokens, W]
        if self._family.pre:
            hidden = self.model.get_submodule(self._family.pre)(hidden)
        for block in self.blocks:
            hidden = block(hidden, None)
        return hidden[:, self._family.prefix :]


def describe(recipe: VisionRecipe, where: str = "model.vision") -> TowerFacts:
    """The facts of the tower a recipe names, without building it. RecipeError when it is unknown or cannot give the
    layer asked for; EnvironmentFault when the package's own weights are not there."""
    row = TOWERS.get(recipe.tower)
    if row is not None and row.package:
        facts = _tiny_facts(recipe.tower, row)
    elif row is not None:
        entry = backbones()["vision"][recipe.tower]
        facts = _facts(entry["config"], recipe.tower, row.size, entry)
    elif (Path(recipe.tower) / "config.json").is_file():
        row, facts = TowerRow(), _folder_facts(Path(recipe.tower), f"{where}.tower")
    else:
        raise RecipeError(unknown(TOWERS, recipe.tower, f"{where}.tower", ", or the path of a Hugging Face folder"))
    layer = row.layer if recipe.layer is None else recipe.layer
    blocks = facts.depth
    depth = blocks + 1 + layer if layer < 0 else layer
    fixed = facts.family == "tiny"
    if not 1 <= depth <= blocks or (fixed and depth != blocks):
        allowed = f"-1 or {blocks}" if fixed else f"1 to {blocks}, or -1 to -{blocks}"
        raise RecipeError(f"{where}.layer: {layer} given, but {recipe.tower} has {blocks} blocks; allowed: {allowed}")
    return replace(facts, depth=depth, keep=tuple(recipe.keep), resize=recipe.resize or facts.resize)


def _facts(config: Mapping[str, Any], source: str, size: int | None, extra: Mapping[str, Any]) -> TowerFacts:
    family = TOWER_FAMILIES[config["model_type"]]
    return TowerFacts(
        family=config["model_type"],
        config=dict(config),
        depth=int(config["num_hidden_layers"]),
        size=size or int(config["image_size"]),
        mean=tuple(extra.get("mean") or family.mean),
        std=tuple(extra.get("std") or family.std),
        resize=family.resize,
        source=source,
    )


def _folder_facts(folder: Path, where: str) -> TowerFacts:
    """A Hugging Face folder of a tower, or of a whole CLIP or SigLIP, whose vision part is taken."""
    config = read_config(folder)
    if "vision_config" in config:
        config = {"model_type": f"{config.get('model_type')}_vision_model", **config["vision_config"]}
    family = config.get("model_type", "")
    if family not in TOWER_FAMILIES:
        known = ", ".join(name for name in TOWER_FAMILIES if name != "tiny")
        raise RecipeError(f"{where}: {folder} holds a {family!r} model; known architectures: {known}")
    from transformers import AutoConfig

    # Published configs leave out whatever equals the class's default.
    full = AutoConfig.for_model(**config).to_dict()
    processor = folder / "preprocessor_config.json"
    said = json.loads(processor.read_text("utf-8")) if processor.is_file() else {}
    return _facts(full, str(folder), None, {"mean": said.get("image_mean"), "std": said.get("image_std")})


def _tiny_facts(name: str, row: TowerRow) -> TowerFacts:
    from safetensors import safe_open

    with safe_open(str(package_file(row.package, name)), "pt") as file:
        config = json.loads(file.metadata()["config"])
    return TowerFacts("tiny", config, depth=int(config["layers"]), size=int(config["size"]), source=name)


def build_tower(facts: TowerFacts) -> Tower:
    """The tower that `facts` describe, with fresh weights on the current default device."""
    if facts.family == "tiny":
        return Tower(facts, TinyVisionTower(dict(facts.config)))
    import transformers

    model = getattr(transformers, TOWER_FAMILIES[facts.family].model_class)._from_config(_config(facts))
    return Tower(facts, _strip(model, facts))


def load_tower(facts: TowerFacts) -> Tower:
    """The same with its published weights, float32. EnvironmentFault when they cannot be had."""
    row = TOWERS.get(facts.source)
    if row is not None and row.package:
        return Tower(facts, load_module(TinyVisionTower, package_file(row.package, facts.source)).requires_grad_(True))
    family = TOWER_FAMILIES[facts.family]
    model = from_pretrained(family.model_class, facts.source, "model.vision.tower", config=_config(facts))
    return Tower(facts, _strip(model, facts))


def _config(facts: TowerFacts) -> Any:
    """transformers' configuration, cut to the depth that is built."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**facts.config)
    if "layers" not in facts.keep:
        config.num_hidden_layers = facts.depth
    if TOWER_FAMILIES[facts.family].head:
        config.vision_use_head = "head" in facts.keep
    return config


def _strip(model: nn.Module, facts: TowerFacts) -> nn.Module:
    if "norm" not in facts.keep:
        delattr(model, TOWER_FAMILIES[facts.family].norm)
    return model


def whole(facts: TowerFacts) -> int:
    """Parameters of the tower as published: all layers, norm and head."""
    if facts.family == "tiny":
        return count_tower(facts)
    return count_tower(replace(facts, keep=("layers", "norm", "head")))


def count_tower(facts: TowerFacts) -> int:
    """Parameters of the tower as `facts` build it; computed without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_tower(facts).parameters())
