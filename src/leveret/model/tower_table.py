"""Table of towers: which there are, and what a recipe makes of one.

TOWERS names published towers and the facts their configuration does not hold (which layer, which size);
`recipes/backbones.json` holds the published configurations. `describe` turns a recipe into facts without building
anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from math import isqrt
from pathlib import Path
from typing import Any

from torch import nn

from leveret import own
from leveret.inputs.views import MOMENTS, RESAMPLE, view_of_processor
from leveret.model.hub import package_file, read_config
from leveret.model.recipe import TowerRecipe, VisionRecipe
from leveret.model.tables import unknown
from leveret.model.tower_facts import TOWER_FAMILIES, Family, TowerFacts, family_of, is_whole, patch
from leveret.model.tower_files import eva_config, is_timm, timm_config
from leveret.model.trial import shape_of
from leveret.records import Resize
from leveret.runs import RecipeError, read_json


@dataclass(frozen=True, slots=True)
class TowerRow:
    """A tower with a name: an entry of backbones.json, or a file of weights in this package.

    layer   index into [embeddings, block 1, .., block n]; -2 is the habit of LLaVA and Bunny.
    size    side of the input, where it is not the configuration's (DINOv2 interpolates its positions).
    like    the entry of backbones.json whose configuration it has, where not that of its own name.
    change  what is different in that configuration; the whole of it, where there is no such entry.
    repo    the hub's repository of its weights, for weights under a peer's names (tower_keys.py). Their positions are
            brought to the recipe's size while they are loaded.
    file    their file there; "" for the usual names. Without `repo` it is a file beside the user's own.
    resize  what Prismatic gives its timm towers, where not the family's.
    family  an architecture of the user's own, which `change` configures.
    build   the same in short, () -> module: a plain module that takes images of `size` pixels. Its width and its grid
            are found by trying it; it counts as one block, and takes no other size. What else `family` says holds.
    crop    share of the scaled image that is cut out of its middle (timm's crop_pct), where it is not all.
    """

    layer: int = -2
    size: int | None = None
    package: str = ""
    like: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)
    repo: str = ""
    file: str = ""
    resize: Resize | None = None
    family: Family | None = None
    crop: float = 1.0
    build: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        if (build := self.build) is not None:
            plain = replace(self.family or Family(), build=lambda _: build(), blocks="", sizes="fixed")
            object.__setattr__(self, "family", plain)


def _timm(
    name: str, like: str, repo: str = "", size: int | None = None, crop: float = 1.0, **change: Any
) -> tuple[str, TowerRow]:
    """One of Prismatic's towers. timm runs SigLIP with exact GELU and ImageNet's ViT with another epsilon than
    transformers does."""
    if "siglip" in name:
        change["hidden_act"] = "gelu"
    row = TowerRow(like=like, size=size, change=change, repo=f"timm/{repo or name}", resize="squash", crop=crop)
    return f"timm/{name}", row


TOWERS: dict[str, TowerRow] = {
    "world/vision": TowerRow(layer=-1, package="world/weights/vision.safetensors"),
    "google/siglip-so400m-patch14-384": TowerRow(),
    "google/siglip-so400m-patch14-224": TowerRow(),
    "google/siglip-base-patch16-224": TowerRow(),
    "google/siglip-base-patch16-256": TowerRow(),
    "google/siglip-base-patch16-384": TowerRow(),
    "google/siglip-base-patch16-512": TowerRow(),
    "google/siglip2-base-patch16-256": TowerRow(),
    "google/siglip2-base-patch16-512": TowerRow(),
    "google/siglip2-so400m-patch14-384": TowerRow(),
    "google/siglip2-base-patch16-naflex": TowerRow(size=256),
    "google/siglip2-so400m-patch16-naflex": TowerRow(size=256),
    "openai/clip-vit-large-patch14-336": TowerRow(),
    "openai/clip-vit-large-patch14": TowerRow(),
    "openai/clip-vit-base-patch16": TowerRow(),
    "openai/clip-vit-base-patch32": TowerRow(),
    "facebook/dinov2-large": TowerRow(size=224),
    "facebook/dinov2-base": TowerRow(size=224),
    "facebook/dinov2-with-registers-large": TowerRow(size=224),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": TowerRow(),
    "facebook/dinov3-vits16-pretrain-lvd1689m": TowerRow(),
    "google/vit-large-patch16-224": TowerRow(),
    "apple/aimv2-large-patch14-224": TowerRow(),
    "QuanSun/EVA02_CLIP_L_336_psz14_s6B": TowerRow(repo="QuanSun/EVA-CLIP", file="EVA02_CLIP_L_336_psz14_s6B.pt"),
    **dict([
        # the one whose crop_pct Prismatic left in place (prismatic.md 5)
        _timm("vit_base_patch16_clip_224.openai", "openai/clip-vit-base-patch16", crop=0.9),
        _timm("vit_large_patch14_clip_224.openai", "openai/clip-vit-large-patch14"),
        _timm("vit_large_patch14_clip_336.openai", "openai/clip-vit-large-patch14-336"),
        _timm("vit_base_patch16_siglip_224", "google/siglip-base-patch16-224", "ViT-B-16-SigLIP"),
        _timm("vit_base_patch16_siglip_256", "google/siglip-base-patch16-256", "ViT-B-16-SigLIP-256"),
        _timm("vit_base_patch16_siglip_384", "google/siglip-base-patch16-384", "ViT-B-16-SigLIP-384"),
        _timm("vit_so400m_patch14_siglip_224", "google/siglip-so400m-patch14-224", "ViT-SO400M-14-SigLIP"),
        _timm("vit_so400m_patch14_siglip_384", "google/siglip-so400m-patch14-384", "ViT-SO400M-14-SigLIP-384"),
        _timm("vit_large_patch14_reg4_dinov2.lvd142m", "facebook/dinov2-with-registers-large", size=224),
        _timm("vit_large_patch16_224.augreg_in21k_ft_in1k", "google/vit-large-patch16-224", layer_norm_eps=1e-6),
    ]),
    # world/vision's network, otherwise taught (world/towers.py)
    **{
        f"world/{name}": TowerRow(layer=-1, package=f"world/weights/towers/{name}.safetensors")
        for name in ("contrastive", "contrastive-48", "contrastive-32", "supervised", "self-supervised")
    },
}  # fmt: skip


@cache
def backbones() -> dict[str, Any]:
    """The published configurations that rows of the tables stand on: {"vision": {id: ..}, "language": {id: ..}}."""
    return json.loads(resources.files("leveret").joinpath("recipes/backbones.json").read_text("utf-8"))


def describe_all(recipe: VisionRecipe, where: str = "model.vision") -> tuple[TowerFacts, ...]:
    """The facts of every tower, in fusion order, each with a name of its own. RecipeError listing all faults."""
    faults: list[str] = []
    found: list[TowerFacts] = []
    for place, one in enumerate(recipe.each()):
        at = f"{where}.towers.{place}" if recipe.towers else where
        try:
            facts = describe(one, at)
            name = one.name or facts.name
            if name in dir(nn.ModuleDict):
                raise RecipeError(f"{at}.name: {name!r} is a word of torch's; choose another")
            taken = {other.name for other in found}
            if one.name in taken:
                raise RecipeError(f"{at}.name: {name!r} is another tower's; choose another, or leave it out")
            number = next(n for n in range(1, len(found) + 2) if (f"{name}_{n}" if n > 1 else name) not in taken)
            found.append(replace(facts, name=f"{name}_{number}" if number > 1 else name))
        except RecipeError as fault:
            faults.append(str(fault))
    if faults:
        raise RecipeError("\n".join(faults))
    return tuple(found)


def describe(recipe: VisionRecipe | TowerRecipe, where: str = "model.vision") -> TowerFacts:
    """The facts of the tower a recipe names, without building it. RecipeError when it is unknown or cannot give what
    is asked for; EnvironmentFault when the package's own weights are not there."""
    one = recipe.each()[0] if isinstance(recipe, VisionRecipe) else recipe
    row, facts, fixed = _named(one.tower, where)
    layer = row.layer if one.layer is None else one.layer
    blocks = facts.depth
    depth = blocks + 1 + layer if layer < 0 else layer
    whole = is_whole(facts)
    if not 1 <= depth <= blocks or (whole and depth != blocks):
        allowed = f"-1 or {blocks}" if whole else f"1 to {blocks}, or -1 to -{blocks}"
        raise RecipeError(f"{where}.layer: {layer} given, but {one.tower} has {blocks} blocks; allowed: {allowed}")
    if one.norm and (whole or depth != blocks):
        why = "it runs whole, its norm with it" if whole else f"the norm stands behind block {blocks}"
        raise RecipeError(f"{where}.norm: true given with layer {layer} of {one.tower}, but {why}")
    mean, std = MOMENTS[one.normalise] if one.normalise else (facts.mean, facts.std)
    config = dict(facts.config)
    if one.activation is not None:
        config["hidden_act"] = _activation(one.activation, config, where)
    facts = replace(
        facts, depth=depth, keep=tuple(one.keep), resize=one.resize or facts.resize, mean=mean, std=std, config=config,
        tokens=one.tokens, name=one.name or family_of(facts).short, norm=one.norm,
    )  # fmt: skip
    return _sized(facts, one, fixed, where)


def _sized(facts: TowerFacts, recipe: TowerRecipe, resampled: bool, where: str) -> TowerFacts:
    """With the recipe's size or scales. `resampled`: positions are brought to the size while weights are loaded."""
    scales = tuple(sorted(recipe.s2))
    if scales and recipe.size not in (None, scales[-1]):
        raise RecipeError(
            f"{where}.size: {recipe.size} given beside s2, whose largest scale is {scales[-1]}; leave it out"
        )
    if scales and (len(set(scales)) < len(scales) or scales[0] < 1 or any(size % scales[0] for size in scales)):
        raise RecipeError(f"{where}.s2: {list(recipe.s2)} given; allowed: different multiples of the smallest scale")
    if scales and recipe.tokens != "patch":
        raise RecipeError(
            f"{where}.tokens: {recipe.tokens} given beside s2, which needs a grid of patches; choose patch"
        )
    if recipe.patches is not None:
        return _shaped(facts, recipe, where)
    side = scales[0] if scales else recipe.size or facts.size
    published = int(facts.config.get("image_size") or facts.size)
    family = family_of(facts)
    if side != facts.size and family.sizes == "fixed" and not facts.config.get("is_native"):
        raise RecipeError(f"{where}.size: {side} given, but {facts.source} takes {facts.size} pixels and no other size")
    cells = patch(facts)
    # those with a published size that leaves a rest (SigLIP: 384 = 27 * 14 + 6) drop it, as the convolution does
    if side < cells or (facts.family == "siglip2_vision_model" and side % cells):
        raise RecipeError(
            f"{where}.size: {side} given, but {facts.source} cuts patches of {cells} pixels; give a multiple"
        )
    config = {**facts.config, "image_size": side} if resampled and side != published else facts.config
    size = scales[-1] if scales else side
    # another size keeps the share that is cut out; S2's largest scale is seen whole, as Bunny's processors are set
    short = 0 if scales else side * facts.short // facts.size
    if recipe.crop is not None:
        short = _short(size, recipe.crop)
    return replace(facts, size=size, s2=scales, config=config, short=short)


def _shaped(facts: TowerFacts, recipe: TowerRecipe, where: str) -> TowerFacts:
    """With images at their own shape. RecipeError where the tower is no NaFlex, or the recipe wants a square too."""
    assert recipe.patches is not None
    if facts.family != "siglip2_vision_model":
        able = ", ".join(name for name in TOWERS if "naflex" in name)
        raise RecipeError(
            f"{where}.patches: {recipe.patches} given, but {facts.source} sees squares; towers that see an image at "
            f"its own shape: {able}"
        )
    stray = [name for name in ("size", "s2", "resize", "crop") if getattr(recipe, name)]
    stray += ["tokens"] if recipe.tokens != "patch" else []
    if stray:
        raise RecipeError(
            f"{where}.patches: {recipe.patches} given beside {', '.join(stray)}, but images keep their shape then; "
            "leave one out"
        )
    # `size` is that of a square with as many patches: what is said of the tower's cost holds
    side = isqrt(recipe.patches) * patch(facts)
    return replace(facts, size=side, patches=recipe.patches, resize="squash", short=0)


def _activation(name: str, config: Mapping[str, Any], where: str) -> str:
    from transformers.activations import ACT2FN

    if "hidden_act" not in config:
        raise RecipeError(
            f"{where}.activation: {name!r} given, but this tower's activation is part of its architecture"
        )
    if name not in ACT2FN:
        raise RecipeError(unknown(ACT2FN, name, f"{where}.activation"))
    return name


def _named(tower: str, where: str) -> tuple[TowerRow, TowerFacts, bool]:
    """Row, published facts, and whether its positions are resampled while they are loaded."""
    if own.is_own(tower):
        return _own(tower, f"{where}.tower")
    row, path = TOWERS.get(tower), Path(tower)
    if row is not None and row.package:
        return row, _tiny_facts(tower, row), False
    if row is not None:
        entry = backbones()["vision"][row.like or tower]
        facts = _facts({**entry["config"], **row.change}, tower, row.size, entry)
        if tower.startswith("timm/"):
            facts = _by_timm(replace(facts, config={**facts.config, "image_size": facts.size}), row)
        return row, facts, tower.startswith("timm/")
    if path.suffix == ".pt" and path.is_file():
        return TowerRow(), _facts(eva_config(path), tower, None, {}), False
    if not (path / "config.json").is_file():
        also = ", the path of a Hugging Face folder, a timm folder or an EVA-CLIP .pt file, or my.py:NAME"
        raise RecipeError(unknown(TOWERS, tower, f"{where}.tower", also))
    if not is_timm(config := read_config(path)):
        return TowerRow(), _folder_facts(path, config, f"{where}.tower"), False
    rows = {name.split("/")[1].split(".")[0]: row for name, row in TOWERS.items() if name.startswith("timm/")}
    if config["architecture"] not in rows:
        raise RecipeError(unknown(rows, config["architecture"], f"{where}.tower: {path}: timm's architecture"))
    row = rows[config["architecture"]]
    entry = backbones()["vision"][row.like]
    facts = _facts(timm_config(path, config, {**entry["config"], **row.change}), tower, None, entry)
    return row, _by_timm(facts, row), True


def _by_timm(facts: TowerFacts, row: TowerRow) -> TowerFacts:
    """The image as Prismatic prepares it for timm's towers: always bicubic (prismatic.md 5)."""
    return _prepared_by(row, replace(facts, resample="bicubic"))


def _prepared_by(row: TowerRow, facts: TowerFacts) -> TowerFacts:
    """With the row's geometry."""
    return replace(facts, resize=row.resize or facts.resize, short=_short(facts.size, row.crop))


def _short(size: int, crop: float) -> int:
    """What the short side is scaled to, so that `size` is `crop` of it; 0 for `size` itself. timm rounds down."""
    return 0 if crop == 1 else int(size / crop)


def _own(tower: str, where: str) -> tuple[TowerRow, TowerFacts, bool]:
    """The same of a row in a user's own file: of an architecture of theirs, or with a configuration that stands on a
    published one or is given whole."""
    row = own.row(tower, TowerRow, where)
    entries = backbones()["vision"]
    if row.like and row.like not in entries:
        raise RecipeError(unknown(entries, row.like, f"{where}: {tower}: like"))
    entry = entries[row.like] if row.like else {}
    try:  # as it will stand in a saved model's config.json
        config = json.loads(json.dumps({**entry.get("config", {}), **row.change}))
    except TypeError as fault:
        raise RecipeError(f"{where}: {tower}: `change` must hold plain numbers, words and lists ({fault})") from None
    if row.family is None:
        config, extra = _known(config, f"{where}: {tower}"), entry
    else:
        config, extra = {**_complete(config, row, tower, where), "model_type": tower}, {}
        row = replace(row, layer=-1)
    if not 0 < row.crop <= 1:
        raise RecipeError(f"{where}: {tower}: `crop` is {row.crop}; it must be more than 0 and at most 1")
    return row, _prepared_by(row, _facts(config, tower, row.size, extra, row.family)), False


def _measured(row: TowerRow, tower: str, where: str) -> dict[str, int]:
    """The sizes of a row's plain module, by trying it. RecipeError where they are no tower's."""
    side, build, prefix = row.size, row.build, row.family.prefix if row.family else 0
    assert build is not None
    if not isinstance(side, int) or side < 1:
        raise RecipeError(f"{where}: {tower}: `build` needs `size`, the side in pixels of the images that it takes")
    shape = shape_of(tower, where, build, [1, 3, side, side])
    said = f"{where}: {tower} makes {shape} of {[1, 3, side, side]}"
    if len(shape) not in (3, 4) or shape[0] != 1:
        raise RecipeError(f"{said}; a tower makes tokens [N, n, width], or a map [N, width, g, g]")
    tokens, wide = (shape[1], shape[2]) if len(shape) == 3 else (shape[2] * shape[3], shape[1])
    grid = isqrt(max(0, tokens - prefix))
    square = grid * grid == tokens - prefix and (len(shape) == 3 or (not prefix and shape[2] == shape[3]))
    if not grid or not square or side // (side // grid or side) != grid:
        leading = f" after {prefix} that lead (Family.prefix)" if prefix else ""
        raise RecipeError(f"{said}; {tokens} tokens{leading} are no square grid over {side} x {side} pixels")
    return {"hidden_size": wide, "num_hidden_layers": 1, "patch_size": side // grid, "image_size": side}


def _known(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration of an architecture of transformers', with every default written out."""
    from transformers import AutoConfig

    known = {name for name, family in TOWER_FAMILIES.items() if family.model_class}
    if (kind := config.get("model_type", "")) == "eva02_clip":
        return dict(config)
    if kind not in known:
        said = f"`change` says model_type {kind!r}" if kind else "neither `like`, `family` nor a model_type is given"
        raise RecipeError(f"{where}: {said}; known architectures: {', '.join(sorted(known))}")
    return AutoConfig.for_model(**config).to_dict()


def _complete(config: Mapping[str, Any], row: TowerRow, tower: str, where: str) -> dict[str, Any]:
    """The configuration of an architecture of the user's own, with what can be found out about it. RecipeError where
    the row does not say what everybody must know of it."""
    if row.like or row.package or row.repo or row.family is None or row.family.build is None:
        what = "`build`" if row.build else "`family` needs its `build`, and"
        raise RecipeError(
            f"{where}: {tower}: {what} goes with `change` and `file`, not with `like`, `package` or `repo`"
        )
    full = {**config, **(_measured(row, tower, where) if row.build else {})}
    needed = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    if lacking := [name for name in needed if not isinstance(full.get(name), int) or full[name] < 1]:
        raise RecipeError(f"{where}: {tower}: `change` must say {', '.join(lacking)}, each a whole number from 1")
    return full


def _facts(
    config: Mapping[str, Any], source: str, size: int | None, extra: Mapping[str, Any], family: Family | None = None
) -> TowerFacts:
    family = family or TOWER_FAMILIES[config["model_type"]]
    # NaFlex has no size of its own: a square of as many patches as it has positions for
    naflex = int(config.get("num_patches") or 0) ** 0.5 * int(config["patch_size"])
    return TowerFacts(
        family=config["model_type"],
        config=dict(config),
        depth=int(config["num_hidden_layers"]),
        size=size or int(config.get("image_size") or naflex),
        mean=tuple(extra.get("mean") or family.mean),
        std=tuple(extra.get("std") or family.std),
        resize=family.resize,
        resample=extra.get("resample") or family.resample,
        source=source,
    )


def _folder_facts(folder: Path, config: dict[str, Any], where: str) -> TowerFacts:
    """A Hugging Face folder of a tower, or of a whole CLIP or SigLIP, whose vision part is taken."""
    if "vision_config" in config:
        config = {**config["vision_config"], "model_type": f"{config.get('model_type')}_vision_model"}
    elif config.get("model_type") == "aimv2":  # as Apple wrote it, for code of its own
        config = {"use_head": False, **config, "model_type": "aimv2_vision_model"}
    family = config.get("model_type", "")
    if family not in TOWER_FAMILIES:
        known = ", ".join(name for name, row in TOWER_FAMILIES.items() if row.model_class)
        raise RecipeError(f"{where}: {folder} holds a {family!r} model; known architectures: {known}")
    from transformers import AutoConfig

    # Published configs leave out whatever equals the class's default.
    full = AutoConfig.for_model(**config).to_dict()
    facts = _facts(full, str(folder), None, {})
    processor = folder / "preprocessor_config.json"
    return _prepared(facts, read_json(processor), where) if processor.is_file() else facts


def _prepared(facts: TowerFacts, said: Mapping[str, Any], where: str) -> TowerFacts:
    """The facts with what a preprocessor_config.json says of the image; what it leaves out is the family's."""
    number = {word: number for number, word in RESAMPLE.items()}[facts.resample]
    silent = {"image_mean": facts.mean, "image_std": facts.std, "resample": number}
    if not isinstance(said, Mapping):
        raise RecipeError(f"{where}: {facts.source}: preprocessor_config.json holds no mapping")
    sized = said.get("size") is not None
    told = {**silent, **{key: value for key, value in said.items() if value is not None}}
    if not sized:  # NaFlex says how many patches it takes, and others nothing
        told |= {"size": facts.size, "do_center_crop": False}
    try:
        view = view_of_processor(told)
    except RecipeError as fault:
        raise RecipeError(f"{where}: {facts.source}: {fault}") from None
    except (KeyError, TypeError, ValueError) as fault:
        raise RecipeError(f"{where}: {facts.source}: preprocessor_config.json cannot be read ({fault!r})") from None
    facts = replace(facts, mean=view.mean, std=view.std, resample=view.resample)
    if not sized:
        return facts
    own_size = int(facts.config.get("image_size") or facts.size)
    if TOWER_FAMILIES[facts.family].sizes == "fixed" and not facts.config.get("is_native") and view.size != own_size:
        raise RecipeError(
            f"{where}: {facts.source}: its preprocessor_config.json makes {view.size} pixels, but its config.json says "
            f"{own_size}, and it takes no other size"
        )
    return replace(facts, size=view.size, resize=view.resize, short=view.short)


def _tiny_facts(name: str, row: TowerRow) -> TowerFacts:
    from safetensors import safe_open

    with safe_open(str(package_file(row.package, name)), "pt") as file:
        config = json.loads(file.metadata()["config"])
    return TowerFacts("tiny", config, depth=int(config["layers"]), size=int(config["size"]), source=name)
