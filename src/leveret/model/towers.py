"""Vision towers: pixels [N, 3, S, S] -> features [N, tokens, width].

What towers there are stands in tower_table.py, their architectures in tower_facts.py; this is how one is built, filled
and run. A tower is built exactly as deep as the layer that is taken, without the norm and the head that follow it,
unless the recipe's `keep` asks for them, or its `norm` for the norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leveret import own
from leveret.model import tower_keys
from leveret.model.eva import EvaVision
from leveret.model.fusion import multiscale
from leveret.model.hub import from_pretrained, package_file, read_config
from leveret.model.tiny import TinyVisionTower, load_module
from leveret.model.tower_facts import (
    TOWER_FAMILIES,
    Family,
    TowerFacts,
    family_of,
    grid,
    is_own,
    is_whole,
    prefix,
    published_depth,
    width,
)
from leveret.model.tower_files import is_timm, read_weights, weights_file
from leveret.model.tower_table import TOWERS, TowerRow, backbones, describe, describe_all
from leveret.model.trial import build_own
from leveret.runs import DataError, RecipeError

__all__ = [
    "TOWERS", "TOWER_FAMILIES", "Family", "Tower", "TowerFacts", "TowerRow", "backbones", "build_tower", "count_tower",
    "describe", "describe_all", "fill_tower", "load_tower", "whole",
]  # fmt: skip


class Tower(nn.Module):
    """A tower as the VLM sees it. `forward(pixels [N, 3, S, S]) -> [N, tokens, width]`; of images at their own shape
    `forward(pixels [N, 3, p, tokens * p], grids)`, the patches of an image side by side (inputs/tiles.py).

    Parameters that cannot influence the output (kept parts) never require gradients.
    """

    def __init__(self, facts: TowerFacts, model: nn.Module) -> None:
        super().__init__()
        self.facts = facts
        self.model: Any = model
        self._family = family_of(facts)
        self.view = facts.view
        self._whole = is_whole(facts)
        # with S2 every scale adds its own numbers to a token
        self.width = width(facts) * max(1, len(facts.s2))
        extra = {"patch": 0, "cls_patch": prefix(facts), "drop_first": prefix(facts) - 1}[facts.tokens]
        self.tokens = facts.patches or grid(facts) ** 2 + extra
        for _, parameter in self.unused():
            parameter.requires_grad_(False)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks that run, first to last."""
        if not self._family.blocks:
            return [self.model]
        return list(self.model.get_submodule(self._family.blocks))[: self.facts.depth]

    @property
    def published_depth(self) -> int:
        """Blocks that the published tower has, run or not."""
        return published_depth(self.facts)

    def unused(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the checkpoint carries though the output does not depend on them."""
        if self._whole:
            return
        first_idle = len(self.blocks)
        idle = {self._family.head} if self.facts.norm else {self._family.norm, self._family.head}
        for name, parameter in self.model.named_parameters():
            block = self._block_of(name)
            after = name.split(".")[0] in idle
            # DINO's mask token serves its pretraining only
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
            after = (self._whole or self.facts.norm) and name.startswith(self._family.norm)
            if layer and not after and (block is None or block < layer):
                yield f"model.{name}"

    def _block_of(self, name: str) -> int | None:
        rest = name.removeprefix(self._family.blocks + ".")
        return None if rest == name else int(rest.split(".")[0])

    def train(self, mode: bool = True) -> Tower:
        """Batch norms keep their stored statistics even in training, and DINOv3's rotary positions are not jittered: a
        tower's output for an image must not depend on the rest of the batch or on chance, or features could not be
        cached and a frozen tower would still drift."""
        super().train(mode)
        for name, module in self.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) or name == "model.rope_embeddings":
                module.eval()
        return self

    def forward(self, pixels: Tensor, grids: Tensor | None = None) -> Tensor:
        """grids: int64 [N, 2], (rows, columns) of patches of images at their own shape. Tokens behind an image's own
        are zero. ValueError where the tower needs them and they are not given."""
        pixels = pixels.to(next(self.parameters()).dtype)
        if self.facts.patches:
            if grids is None:
                raise ValueError(
                    f"{self.facts.source} sees images at their own shape, and is not told how large each is"
                )
            return self._see_shaped(pixels, grids)
        if self.facts.s2:
            return multiscale(self._see, pixels, self.facts.s2)
        return self._see(pixels)

    def _see_shaped(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """NaFlex: [N, 3, p, tokens * p] -> [N, tokens, W], as Siglip2VisionModel does; nobody attends to padding."""
        from transformers.masking_utils import create_bidirectional_mask

        real = torch.arange(self.tokens, device=pixels.device) < grids.prod(1, keepdim=True).to(pixels.device)
        hidden = self.model.embeddings(strip(pixels), grids)
        mask = create_bidirectional_mask(config=self.model.config, inputs_embeds=hidden, attention_mask=real)
        for block in self.blocks:
            hidden = block(hidden, mask)
        if self.facts.norm:
            hidden = self.model.get_submodule(self._family.norm)(hidden)
        return hidden * real.unsqueeze(-1)

    def _see(self, pixels: Tensor) -> Tensor:
        """One scale: [N, 3, s, s] -> [N, tokens, W]."""
        first = {"patch": prefix(self.facts), "cls_patch": 0, "drop_first": 1}[self.facts.tokens]
        if self._whole:
            return as_tokens(self.model(pixels))[:, first:]
        hidden = self._embed(pixels)  # [N, prefix + grid * grid, W]
        if self._family.pre:
            hidden = self.model.get_submodule(self._family.pre)(hidden)
        place: tuple[Any, ...] = (None,)  # no attention mask
        if self.facts.family.startswith("dinov2"):
            place = ()  # transformers 5.16 has no place for a mask there, later ones need none
        if self.facts.family == "dinov3_vit":
            place = (None, self.model.rope_embeddings(pixels))
        elif self.facts.family == "eva02_clip":
            place = (self.model.angles(pixels.device),)
        for block in self.blocks:
            hidden = block(hidden, *place)
        if self.facts.norm:
            hidden = self.model.get_submodule(self._family.norm)(hidden)
        return hidden[:, first:]

    def _embed(self, pixels: Tensor) -> Tensor:
        if self.facts.family == "siglip2_vision_model":
            patches = cut(pixels, int(self.facts.config["patch_size"]))
            shape = torch.tensor([[grid(self.facts)] * 2]).expand(len(pixels), 2)
            return self.model.embeddings(patches, shape)
        if self._family.sizes == "flag" and self.facts.side != self.facts.config["image_size"]:
            return self.model.embeddings(pixels, interpolate_pos_encoding=True)
        return self.model.embeddings(pixels)


def as_tokens(seen: Tensor) -> Tensor:
    """A convolution's map [N, W, g, g] as tokens [N, g * g, W], row by row; tokens stay as they are."""
    return seen.flatten(2).mT if seen.dim() == 4 else seen


def cut(pixels: Tensor, patch: int) -> Tensor:
    """A square as NaFlex eats it: [N, 3, S, S] -> [N, n, patch * patch * 3], patches row by row; in a patch the rows,
    in a row the columns, in a column the channels (transformers' convert_image_to_patches)."""
    count, channels, side, _ = pixels.shape
    cells = side // patch
    tiles = pixels.reshape(count, channels, cells, patch, cells, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(count, cells * cells, patch * patch * channels)


def strip(pixels: Tensor) -> Tensor:
    """Patches side by side as NaFlex eats them: [N, 3, p, n * p] -> [N, n, p * p * 3], each as `cut` has it."""
    patches = pixels.unflatten(3, (-1, pixels.shape[2]))  # [N, 3, row, patch, column]
    return patches.permute(0, 3, 2, 4, 1).flatten(2)


def build_tower(facts: TowerFacts) -> Tower:
    """The tower that `facts` describe, with fresh weights on the current default device, in torch's default type
    (float32, but where transformers loads a published model in another) whatever its configuration says."""
    if facts.family == "tiny":
        return Tower(facts, TinyVisionTower(dict(facts.config)))
    if is_own(facts):
        return _build_own(facts)
    if facts.family == "eva02_clip":
        built = facts.config["num_hidden_layers"] if "layers" in facts.keep else facts.depth
        return Tower(facts, _strip(EvaVision({**facts.config, "num_hidden_layers": built}), facts))
    import transformers

    model_class = getattr(transformers, TOWER_FAMILIES[facts.family].model_class)
    # a folder's config may say float16, which is how it was saved and not how it is to learn
    model = model_class._from_config(_config(facts), dtype=torch.get_default_dtype(), **_options(facts))
    return Tower(facts, _strip(model, facts))


def _build_own(facts: TowerFacts) -> Tower:
    """The same of an architecture of a user's own."""
    where, family = "model.vision.tower", family_of(facts)
    config = {name: value for name, value in facts.config.items() if name != "model_type"}
    due = [1, grid(facts) ** 2 + prefix(facts), width(facts)]
    assert family.build is not None, "looked at when the facts were found"
    build = family.build
    module = build_own(facts.family, where, lambda: build(dict(config)), [1, 3, facts.side, facts.side], due, as_tokens)
    if not family.blocks:
        return Tower(facts, module)
    try:
        blocks = list(module.get_submodule(family.blocks))  # type: ignore[call-overload]
    except (AttributeError, TypeError):
        blocks = []
    if len(blocks) != facts.depth:
        raise RecipeError(
            f"{where}: {facts.family}: `{family.blocks}` of its module must be a list of {facts.depth} blocks "
            f"(num_hidden_layers), it has {len(blocks)}"
        )
    return Tower(facts, module)


def _load_own(facts: TowerFacts) -> Tower:
    """The tower of a row in a user's own file: with the weights of its `file` beside that file or of its `repo`, else
    of what it is like; where there is neither it begins with random ones."""
    row = own.row(facts.source, TowerRow, "model.vision.tower")
    beside = own.source_of(facts.source)[0].parent
    if row.repo and not (beside / row.repo).exists():
        path = weights_file(facts.source, row.repo, row.file)
    elif row.repo or row.file:
        path = weights_file(str(beside / row.repo / row.file))
    elif row.like:
        tower = load_tower(replace(facts, source=row.like))
        tower.facts = facts
        return tower
    else:
        return build_tower(facts)
    state = read_weights(path)
    if row.family is None:
        return fill_tower(facts, state, where=str(path))
    tower = build_tower(facts)
    if said := _misfits(tower.model.state_dict(), state):
        raise DataError(f"{path}: not the weights of {facts.source}; {said}")
    tower.model.load_state_dict(state)
    return tower


def load_tower(facts: TowerFacts) -> Tower:
    """The same with its published weights, float32. EnvironmentFault when they cannot be had, DataError when they are
    not the tower's."""
    if own.is_own(facts.source):
        return _load_own(facts)
    row = TOWERS.get(facts.source)
    if row is not None and row.package:
        return Tower(facts, load_module(TinyVisionTower, package_file(row.package, facts.source)).requires_grad_(True))
    if _by_table(facts, row):
        repo, file = (row.repo or facts.source, row.file) if row is not None else ("", "")
        path = weights_file(facts.source, repo, file)
        return fill_tower(facts, read_weights(path), where=str(path))
    family = TOWER_FAMILIES[facts.family]
    options = {"config": _config(facts), **_options(facts)}
    model = from_pretrained(family.model_class, facts.source, "model.vision.tower", **options)
    return Tower(facts, _strip(model, facts))


def fill_tower(
    facts: TowerFacts,
    state: Mapping[str, Tensor],
    *,
    under: str = "",
    positions: tower_keys.Positions | None = None,
    where: str = "weights",
) -> Tower:
    """The tower that `facts` describe with the weights of `state`, under whatever names of tower_keys.LAYOUTS they
    stand there (only those that begin with `under`, where `state` holds several towers), in float32.

    positions  how position embeddings are brought to the grid of `facts.side` for good. Default: "antialias" for timm's
               and OpenAI's names, as Prismatic had it; for others they stay, and the class interpolates as it runs.

    Parts that `facts` do not keep are passed over. DataError naming what is missing, unexpected, or of another shape.
    """
    layout, _ = tower_keys.recognise(state, facts.family, under, where)
    given = tower_keys.to_ours(state, facts.family, under=under, where=where)
    if positions is None and layout in ("timm", "openai"):
        positions = "antialias"
    if positions is not None:
        facts = replace(facts, config={**facts.config, "image_size": facts.side})
    tower = build_tower(facts)
    due = dict(tower.model.state_dict())
    if positions is not None:
        for name in given.keys() & due.keys():
            if name.startswith("embeddings.position_embedding"):
                given[name] = tower_keys.resample(given[name], due[name].shape, positions)
    family = family_of(facts)
    after = (family.blocks + ".", family.norm + ".", (family.head or "\0") + ".")
    if said := _misfits(due, given, after):
        raise DataError(f"{where}: not the weights of this {facts.family} tower; {said}")
    tower.model.load_state_dict({name: given[name].float() for name in due})
    return tower


def _misfits(due: Mapping[str, Tensor], given: Mapping[str, Tensor], spare: tuple[str, ...] = ()) -> str:
    """What keeps the weights `given` from being those of a module, in words; names that begin with `spare` may be too
    many."""
    faults = {
        "missing": [name for name in due if name not in given],
        "unexpected": [name for name in given if name not in due and not name.startswith(spare)],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in due.items()
            if name in given and given[name].shape != tensor.shape
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {', '.join(sorted(names)[:8])}" for kind, names in faults.items() if names)


def _by_table(facts: TowerFacts, row: TowerRow | None) -> bool:
    """Whether its weights are read by the key tables: those under a peer's names, and AIMv2's, whose published folders
    transformers does not read (the names are its own, the configuration is not)."""
    if facts.family == "aimv2_vision_model":
        return True
    if row is not None:
        return bool(row.repo)
    folder = Path(facts.source)
    return folder.is_file() or ((folder / "config.json").is_file() and is_timm(read_config(folder)))


def _config(facts: TowerFacts) -> Any:
    """transformers' configuration, cut to the depth that is built."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**facts.config)
    if "layers" not in facts.keep:
        config.num_hidden_layers = facts.depth
    family = TOWER_FAMILIES[facts.family]
    if family.head:
        built = facts.config.get(family.head_switch, True) and "head" in facts.keep
        setattr(config, family.head_switch, built)
    return config


def _options(facts: TowerFacts) -> dict[str, Any]:
    # ViTModel's pooler is not in the published classifiers
    return {"add_pooling_layer": False} if facts.family == "vit" else {}


def _strip(model: nn.Module, facts: TowerFacts) -> nn.Module:
    family = TOWER_FAMILIES[facts.family]
    if not facts.norm and "norm" not in facts.keep:
        delattr(model, family.norm)
    if facts.family == "eva02_clip" and "head" not in facts.keep:
        delattr(model, family.head)
    return model


def whole(facts: TowerFacts) -> int:
    """Parameters of the tower as published: all layers, norm and head."""
    if is_whole(facts):
        return count_tower(facts)
    return count_tower(replace(facts, keep=("layers", "norm", "head")))


def count_tower(facts: TowerFacts) -> int:
    """Parameters of the tower as `facts` build it; computed without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_tower(facts).parameters())
