"""Key tables: what peers call the weights of a tower, both ways.

A table row holds their name and ours: `*` is the number of a block, `?` stands for weight and bias, `{a,b}` for several
tensors. Several theirs are joined, several ours are cut, along the first dimension (timm's qkv is our q, k, v). A third
entry says how many leading dimensions of size 1 theirs has and ours has not.

Layouts, recognised by the names alone: "transformers" (also the names before its version 5), "timm" (plain or under
open_clip's `visual.trunk.`), "openai" (open_clip's `visual.`), "eva" (QuanSun's EVA-CLIP files), "apple" (AIMv2 as
first published).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from leveret.runs import DataError

Positions = Literal["antialias", "dino"]
"""How position embeddings are brought to another grid while weights are loaded."""
Rows = tuple[tuple[str, str] | tuple[str, str, int], ...]

_CLIP_BLOCK = "encoder.layers.*"
_TIMM_VIT: Rows = (
    ("patch_embed.proj.?", "embeddings.patch_embedding.?"),
    ("pos_embed", "embeddings.position_embedding.weight", 1),
    ("blocks.*.norm1.?", f"{_CLIP_BLOCK}.layer_norm1.?"),
    ("blocks.*.attn.qkv.?", f"{_CLIP_BLOCK}.self_attn.{{q,k,v}}_proj.?"),
    ("blocks.*.attn.proj.?", f"{_CLIP_BLOCK}.self_attn.out_proj.?"),
    ("blocks.*.norm2.?", f"{_CLIP_BLOCK}.layer_norm2.?"),
    ("blocks.*.mlp.fc1.?", f"{_CLIP_BLOCK}.mlp.fc1.?"),
    ("blocks.*.mlp.fc2.?", f"{_CLIP_BLOCK}.mlp.fc2.?"),
    ("norm.?", "post_layernorm.?"),
)
_TIMM_SIGLIP: Rows = (
    *_TIMM_VIT,
    ("attn_pool.latent", "head.probe"),
    ("attn_pool.{q,kv}.weight", "head.attention.in_proj_weight"),
    ("attn_pool.{q,kv}.bias", "head.attention.in_proj_bias"),
    ("attn_pool.proj.?", "head.attention.out_proj.?"),
    ("attn_pool.norm.?", "head.layernorm.?"),
    ("attn_pool.mlp.fc1.?", "head.mlp.fc1.?"),
    ("attn_pool.mlp.fc2.?", "head.mlp.fc2.?"),
)
_NANOVLM: Rows = (
    ("patch_embedding.position_embedding", "embeddings.position_embedding.weight", 1),
    ("patch_embedding.conv.?", "embeddings.patch_embedding.?"),
    ("blocks.*.ln1.?", "encoder.layers.*.layer_norm1.?"),
    ("blocks.*.attn.qkv_proj.?", "encoder.layers.*.self_attn.{q,k,v}_proj.?"),
    ("blocks.*.attn.out_proj.?", "encoder.layers.*.self_attn.out_proj.?"),
    ("blocks.*.ln2.?", "encoder.layers.*.layer_norm2.?"),
    ("blocks.*.mlp.fc1.?", "encoder.layers.*.mlp.fc1.?"),
    ("blocks.*.mlp.fc2.?", "encoder.layers.*.mlp.fc2.?"),
    ("layer_norm.?", "post_layernorm.?"),
)
_TIMM_CLIP: Rows = (
    *_TIMM_VIT,
    ("cls_token", "embeddings.class_embedding", 2),
    ("norm_pre.?", "pre_layrnorm.?"),
)
_OPENAI_CLIP: Rows = (
    ("conv1.weight", "embeddings.patch_embedding.weight"),
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_pre.?", "pre_layrnorm.?"),
    ("transformer.resblocks.*.ln_1.?", f"{_CLIP_BLOCK}.layer_norm1.?"),
    ("transformer.resblocks.*.attn.in_proj_weight", f"{_CLIP_BLOCK}.self_attn.{{q,k,v}}_proj.weight"),
    ("transformer.resblocks.*.attn.in_proj_bias", f"{_CLIP_BLOCK}.self_attn.{{q,k,v}}_proj.bias"),
    ("transformer.resblocks.*.attn.out_proj.?", f"{_CLIP_BLOCK}.self_attn.out_proj.?"),
    ("transformer.resblocks.*.ln_2.?", f"{_CLIP_BLOCK}.layer_norm2.?"),
    ("transformer.resblocks.*.mlp.c_fc.?", f"{_CLIP_BLOCK}.mlp.fc1.?"),
    ("transformer.resblocks.*.mlp.c_proj.?", f"{_CLIP_BLOCK}.mlp.fc2.?"),
    ("ln_post.?", "post_layernorm.?"),
)
_TIMM_DINOV2: Rows = (
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.?", "embeddings.patch_embeddings.projection.?"),
    ("blocks.*.norm1.?", "encoder.layer.*.norm1.?"),
    ("blocks.*.attn.qkv.?", "encoder.layer.*.attention.{q,k,v}_proj.?"),
    ("blocks.*.attn.proj.?", "encoder.layer.*.attention.o_proj.?"),
    ("blocks.*.ls1.gamma", "encoder.layer.*.layer_scale1.lambda1"),
    ("blocks.*.norm2.?", "encoder.layer.*.norm2.?"),
    ("blocks.*.mlp.fc1.?", "encoder.layer.*.mlp.fc1.?"),
    ("blocks.*.mlp.fc2.?", "encoder.layer.*.mlp.fc2.?"),
    ("blocks.*.ls2.gamma", "encoder.layer.*.layer_scale2.lambda1"),
    ("norm.?", "layernorm.?"),
)
_TIMM_IMAGENET: Rows = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.?", "embeddings.patch_embeddings.projection.?"),
    ("blocks.*.norm1.?", "layers.*.layernorm_before.?"),
    ("blocks.*.attn.qkv.?", "layers.*.attention.{q,k,v}_proj.?"),
    ("blocks.*.attn.proj.?", "layers.*.attention.o_proj.?"),
    ("blocks.*.norm2.?", "layers.*.layernorm_after.?"),
    ("blocks.*.mlp.fc1.?", "layers.*.mlp.fc1.?"),
    ("blocks.*.mlp.fc2.?", "layers.*.mlp.fc2.?"),
    ("norm.?", "layernorm.?"),
)
_EVA: Rows = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position"),
    ("patch_embed.proj.?", "embeddings.patch.?"),
    ("blocks.*.norm1.?", "blocks.*.norm1.?"),
    ("blocks.*.attn.q_proj.weight", "blocks.*.attn.q_proj.weight"),
    ("blocks.*.attn.k_proj.weight", "blocks.*.attn.k_proj.weight"),
    ("blocks.*.attn.v_proj.weight", "blocks.*.attn.v_proj.weight"),
    ("blocks.*.attn.q_bias", "blocks.*.attn.q_proj.bias"),
    ("blocks.*.attn.v_bias", "blocks.*.attn.v_proj.bias"),
    ("blocks.*.attn.inner_attn_ln.?", "blocks.*.attn.inner_norm.?"),
    ("blocks.*.attn.proj.?", "blocks.*.attn.proj.?"),
    ("blocks.*.norm2.?", "blocks.*.norm2.?"),
    ("blocks.*.mlp.w1.?", "blocks.*.mlp.w1.?"),
    ("blocks.*.mlp.w2.?", "blocks.*.mlp.w2.?"),
    ("blocks.*.mlp.ffn_ln.?", "blocks.*.mlp.norm.?"),
    ("blocks.*.mlp.w3.?", "blocks.*.mlp.w3.?"),
    ("norm.?", "norm.?"),
    ("head.?", "head.?"),
)
_APPLE_AIMV2: Rows = (
    ("preprocessor.patchifier.proj.?", "embeddings.patch_embed.?"),
    ("preprocessor.patchifier.norm.weight", "embeddings.rms_norm.weight"),
    ("preprocessor.pos_embed", "embeddings.position_embedding.weight", 1),
    ("trunk.blocks.*.norm_1.weight", "encoder.layers.*.rms_norm1.weight"),
    ("trunk.blocks.*.attn.qkv.weight", "encoder.layers.*.attention.{q,k,v}_proj.weight"),
    ("trunk.blocks.*.attn.proj.weight", "encoder.layers.*.attention.out_proj.weight"),
    ("trunk.blocks.*.norm_2.weight", "encoder.layers.*.rms_norm2.weight"),
    ("trunk.blocks.*.mlp.fc1.weight", "encoder.layers.*.ffn.gate_proj.weight"),
    ("trunk.blocks.*.mlp.fc3.weight", "encoder.layers.*.ffn.up_proj.weight"),
    ("trunk.blocks.*.mlp.fc2.weight", "encoder.layers.*.ffn.down_proj.weight"),
    ("trunk.post_trunk_norm.weight", "rms_norm.weight"),
)
# transformers before its version 5 wrote these; what a row does not name is called the same on both sides
_HF_DINOV2: Rows = (
    ("encoder.layer.*.attention.attention.{query,key,value}.?", "encoder.layer.*.attention.{q,k,v}_proj.?"),
    ("encoder.layer.*.attention.output.dense.?", "encoder.layer.*.attention.o_proj.?"),
    ("encoder.layer.*.mlp.weights_in.?", "encoder.layer.*.mlp.{gate,up}_proj.?"),
    ("encoder.layer.*.mlp.weights_out.?", "encoder.layer.*.mlp.down_proj.?"),
)
_HF_IMAGENET: Rows = (
    ("encoder.layer.*.attention.attention.{query,key,value}.?", "layers.*.attention.{q,k,v}_proj.?"),
    ("encoder.layer.*.attention.output.dense.?", "layers.*.attention.o_proj.?"),
    ("encoder.layer.*.intermediate.dense.?", "layers.*.mlp.fc1.?"),
    ("encoder.layer.*.output.dense.?", "layers.*.mlp.fc2.?"),
    ("encoder.layer.*.layernorm_before.?", "layers.*.layernorm_before.?"),
    ("encoder.layer.*.layernorm_after.?", "layers.*.layernorm_after.?"),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a peer names the weights of one family.

    marker   the name that tells the layout; what stands before it in a file is the prefix of all its names.
    rows     the key table.
    strict   whether the table names everything; else a name that no row has is the same on both sides.
    ignored  ends of names that need not be read: computed tables, and what belongs to another part.
    """

    marker: str
    rows: Rows = ()
    strict: bool = True
    ignored: tuple[str, ...] = ()


def _hf(marker: str, rows: Rows = ()) -> Layout:
    return Layout(f"embeddings.{marker}.weight", rows, strict=False, ignored=("position_ids",))


LAYOUTS: dict[str, dict[str, Layout]] = {
    "siglip_vision_model": {
        "transformers": _hf("patch_embedding"),
        "timm": Layout("patch_embed.proj.weight", _TIMM_SIGLIP),
        "nanovlm": Layout("patch_embedding.conv.weight", _NANOVLM),
    },
    "siglip2_vision_model": {"transformers": _hf("patch_embedding")},
    "clip_vision_model": {
        "transformers": _hf("patch_embedding"),
        "openai": Layout("conv1.weight", _OPENAI_CLIP, ignored=("proj",)),
        "timm": Layout("patch_embed.proj.weight", _TIMM_CLIP, ignored=("head.weight", "head.bias")),
    },
    "dinov2": {
        "transformers": _hf("patch_embeddings.projection", _HF_DINOV2),
        "timm": Layout("patch_embed.proj.weight", _TIMM_DINOV2, ignored=("mask_token",)),
    },
    "dinov2_with_registers": {
        "transformers": _hf("patch_embeddings.projection", _HF_DINOV2),
        "timm": Layout("patch_embed.proj.weight", _TIMM_DINOV2, ignored=("mask_token",)),
    },
    "dinov3_vit": {"transformers": _hf("patch_embeddings")},
    "vit": {
        "transformers": _hf("patch_embeddings.projection", _HF_IMAGENET),
        "timm": Layout("patch_embed.proj.weight", _TIMM_IMAGENET, ignored=("head.weight", "head.bias")),
    },
    "aimv2_vision_model": {
        "transformers": _hf("patch_embed"),
        "apple": Layout("preprocessor.patchifier.proj.weight", _APPLE_AIMV2),
    },
    "eva02_clip": {"eva": Layout("patch_embed.proj.weight", _EVA, ignored=("rope.freqs_cos", "rope.freqs_sin"))},
}
"""Family of tower -> name of a layout -> the layout."""


def recognise(names: Mapping[str, object], family: str, under: str = "", where: str = "weights") -> tuple[str, str]:
    """(layout, prefix) of the names of a `family` tower among `names`; only those that begin with `under` are looked
    at. DataError when there is no such tower, or more than one."""
    found = [
        (layout, name.removesuffix(how.marker))
        for layout, how in LAYOUTS[family].items()
        for name in names
        if name.startswith(under) and (name == how.marker or name.endswith("." + how.marker))
    ]
    if len(found) == 1:
        return found[0]
    wanted = " or ".join(repr(how.marker) for how in LAYOUTS[family].values())
    if found:
        raise DataError(
            f"{where}: {len(found)} towers of one kind, under {', '.join(repr(prefix) for _, prefix in found)}"
        )
    raise DataError(
        f"{where}: no {family} tower in it: none of its {len(names)} names ends with {wanted} "
        f"(it holds {', '.join(sorted(names)[:4])}, ..)"
    )


def to_ours(state: Mapping[str, Tensor], family: str, *, under: str = "", where: str = "weights") -> dict[str, Tensor]:
    """The weights of a `family` tower in `state`, under our names (those of `Tower.model`), in their own types.

    Layout and prefix are recognised. DataError when there is no tower, and naming what no row of the table knows.
    """
    layout, prefix = recognise(state, family, under, where)
    how = LAYOUTS[family][layout]
    theirs = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    ours: dict[str, Tensor] = {}
    for their_names, our_names, lead in _expand(how.rows, _blocks(theirs)):
        if not all(name in theirs for name in their_names):
            continue
        joined = (
            torch.cat([theirs.pop(name) for name in their_names])
            if len(their_names) > 1
            else theirs.pop(their_names[0])
        )
        pieces = joined.reshape(joined.shape[lead:]) if lead else joined
        ours.update(zip(our_names, pieces.chunk(len(our_names)) if len(our_names) > 1 else [pieces], strict=True))
    rest = {
        name: tensor
        for name, tensor in theirs.items()
        if not any(f".{name}".endswith("." + end) for end in how.ignored)
    }
    if not how.strict:
        ours.update(rest)
    elif rest:
        raise DataError(
            f"{where}: {len(rest)} names that the {layout} layout does not know: {', '.join(sorted(rest)[:8])}"
        )
    if layout == "timm" and family.startswith("dinov2"):
        _mend_dinov2(ours)
    return ours


def to_theirs(state: Mapping[str, Tensor], family: str, layout: str, prefix: str = "") -> dict[str, Tensor]:
    """Our weights of a `family` tower under the names of `layout`, each with `prefix` in front; the inverse of
    `to_ours` but for position embeddings, which keep the grid they have, and DINOv2's class position, which timm's
    models with registers add to the class token."""
    how = LAYOUTS[family][layout]
    ours = dict(state)
    if layout == "timm" and family == "dinov2_with_registers":
        position = ours["embeddings.position_embeddings"]
        ours["embeddings.cls_token"] = ours["embeddings.cls_token"] + position[:, :1]
        ours["embeddings.position_embeddings"] = position[:, 1:]
    if layout == "timm":
        ours.pop("embeddings.mask_token", None)
    theirs: dict[str, Tensor] = {}
    for their_names, our_names, lead in _expand(how.rows, _blocks(ours)):
        if not all(name in ours for name in our_names):
            continue
        joined = torch.cat([ours.pop(name) for name in our_names]) if len(our_names) > 1 else ours.pop(our_names[0])
        joined = joined.reshape((1,) * lead + joined.shape)
        if len(their_names) == 1:
            theirs[their_names[0]] = joined
        elif "attn_pool" in their_names[0]:  # one part queries, two parts keys and values
            query = len(joined) // 3
            theirs.update(zip(their_names, joined.split([query, len(joined) - query]), strict=True))
        else:
            theirs.update(zip(their_names, joined.chunk(len(their_names)), strict=True))
    if how.strict and ours:
        raise DataError(f"the {layout} layout has no name for {', '.join(sorted(ours)[:8])}")
    return {prefix + name: tensor.contiguous() for name, tensor in {**theirs, **ours}.items()}


def resample(position: Tensor, shape: torch.Size, how: Positions = "antialias") -> Tensor:
    """Position embeddings [.., p + g * g, W] on another grid [.., p + G * G, W], in float32; p prefix tokens (none or
    one) stay as they are.

    antialias  bicubic with antialias: timm, while it loads.
    dino       bicubic by the scale (G + 0.1) / g: DINOv2's own code, and transformers 4.40 (so the Factory's MoF). The
               0.1 moves every sample a little; later transformers interpolate to the size instead.
    """
    have, want = position.shape[-2], shape[-2]
    if have == want:
        return position
    prefix = 0 if round(want**0.5) ** 2 == want and round(have**0.5) ** 2 == have else 1
    old, new = round((have - prefix) ** 0.5), round((want - prefix) ** 0.5)
    flat = position.reshape(have, -1)
    grid = flat[prefix:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if how == "dino":
        scale = (new + 0.1) / old
        scaled = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    else:
        scaled = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    patches = scaled.permute(0, 2, 3, 1).reshape(new * new, -1).to(position.dtype)
    return torch.cat([flat[:prefix], patches]).reshape(shape)


def _mend_dinov2(ours: dict[str, Tensor]) -> None:
    """timm's models with registers have no position for the class token (it is inside the token), and none of timm's
    has the mask token, which serves the pre-training alone: both are zeros with us."""
    token, position = ours["embeddings.cls_token"], ours["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in ours and round(position.shape[1] ** 0.5) ** 2 == position.shape[1]:
        ours["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    ours.setdefault("embeddings.mask_token", torch.zeros_like(token[0]))


def _blocks(names: Mapping[str, object]) -> int:
    """Blocks that names speak of: one more than the largest number between two dots."""
    numbers = [int(match.group(1)) for name in names for match in re.finditer(r"\.(\d+)\.", name)]
    return max(numbers, default=-1) + 1


def _expand(rows: Rows, blocks: int) -> Iterator[tuple[list[str], list[str], int]]:
    """Every row as (their names, our names, leading dimensions), for each block and for weight and bias."""
    for row in rows:
        theirs, ours, lead = row if len(row) == 3 else (*row, 0)
        numbers = [str(block) for block in range(blocks)] if "*" in theirs else [""]
        for number, kind in product(numbers, ("weight", "bias") if "?" in theirs else ("",)):
            yield _names(theirs, number, kind), _names(ours, number, kind), lead


def _names(pattern: str, number: str, kind: str) -> list[str]:
    plain = pattern.replace("*", number).replace("?", kind)
    match = re.search(r"\{(.+)\}", plain)
    return [plain] if match is None else [plain.replace(match.group(), choice) for choice in match.group(1).split(",")]
