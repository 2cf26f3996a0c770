"""Models of ours in the layouts of others: HF LLaVA (transformers, vLLM), Bunny, LLaVA, TinyLLaVA Factory, Prismatic,
GGUF (gguf_write.py); and with their own code, for transformers (remote.py).

Where a layout cannot hold a composition the part that does not fit is named, and nothing is written. Weights are
safetensors alone, or GGUF. A folder is written beside its place and renamed into it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leveret.inputs.formats import find_chat, published
from leveret.inputs.views import STRATEGIES
from leveret.model import tower_keys
from leveret.model.checkpoint import fresh_folder, stored
from leveret.model.peers import gguf_write, merged, prismatic, remote, tinyllava
from leveret.model.peers.hfllava import SCALED
from leveret.model.published import times, write_state
from leveret.model.towers import Tower
from leveret.model.vlm import VLM
from leveret.records import Tiling
from leveret.runs import RecipeError

State = dict[str, Tensor]
Written = tuple[dict[str, Any], State, dict[str, Any]]
"""(config.json, tensors, other files by name: JSON or text; under "tokenizer" another tokenizer than the model's)."""


@dataclass(frozen=True)
class Layout:
    """A layout, by one of two ways; RecipeError where the model does not fit.

    write  (model) -> what is written, its tensors in the file `weights`.
    files  (model, folder) -> notes for the user, where it writes its own files.
    """

    about: str
    write: Callable[[VLM], Written] | None = None
    files: Callable[[VLM, Path], list[str]] | None = None
    weights: str = "model.safetensors"


def write(vlm: VLM, out: str | Path, layout: str) -> list[str]:
    """Writes the model as a folder of `layout` (a row of LAYOUTS), with its tokenizer and chat template. Returns notes
    for the user: where what reads the layout will not do as this model was taught.

    RecipeError names the part that the layout cannot hold.
    """
    from safetensors.torch import save_file

    out, row = Path(out), LAYOUTS[layout]
    if row.files is not None:
        with fresh_folder(out) as fresh:
            return row.files(vlm, fresh)
    assert row.write is not None
    config, state, more = row.write(vlm)
    with fresh_folder(out) as fresh:
        if (tokenizer := more.pop("tokenizer", vlm.tokenizer)) is not None:
            tokenizer.save_pretrained(fresh)
        (fresh / "chat_template.jinja").write_text(find_chat(vlm.chat).template, "utf-8")
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
        (fresh / row.weights).parent.mkdir(exist_ok=True)
        save_file(tensors, fresh / row.weights, {"format": "pt"})
        for name, content in {"config.json": config, **more}.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (fresh / name).write_text(text, "utf-8")
    return []


# --- the parts --------------------------------------------------------------------------------------------------------


def _eye(vlm: VLM, layout: str, families: Mapping[str, str], tiles: Sequence[str] = ()) -> Tower:
    """The model's one tower. families: those that the layout knows -> a layout of tower_keys. tiles: the ways in which
    it puts tiles together."""
    _check_tiles(vlm, layout, tiles)
    towers = list(vlm.towers.values())
    if len(towers) > 1:
        names = ", ".join(str(tower.facts.source) for tower in towers if isinstance(tower, Tower))
        raise RecipeError(f"{layout} holds one tower, and this model has {len(towers)}: {names}")
    tower = towers[0]
    assert isinstance(tower, Tower)
    if tower.facts.family not in families:
        raise RecipeError(
            f"{layout} has no name for the tower {tower.facts.source} ({tower.facts.family}); it knows "
            f"{', '.join(families)}"
        )
    return tower


def _check_tiles(vlm: VLM, layout: str, tiles: Sequence[str] = ()) -> None:
    """RecipeError where the model sees tiles, and the layout does not put them together in that way."""
    tiling = vlm.spec.tiling
    merge = tiling.merge if isinstance(tiling, Tiling) else "split, each with a token before it"
    if tiling is not None and merge not in tiles:
        known = f"puts tiles together as {', '.join(tiles)}" if tiles else "sees every image as one picture"
        raise RecipeError(f"{layout} {known}, and this model sees tiles (merge {merge})")
    for tower in vlm.towers.values():
        if isinstance(tower, Tower) and tower.facts.norm:
            raise RecipeError(f"{layout} runs no norm behind the tower's last block, as {tower.facts.source} does here")


def _newline(vlm: VLM, name: str) -> State:
    """The newline of tiles under its name in the layout; nothing where the model has none."""
    return {name: vlm.tiles.newline} if vlm.tiles is not None and vlm.tiles.newline is not None else {}


def _seen(tower: Tower, layout: str, prefix: str) -> State:
    return tower_keys.to_theirs(tower.model.state_dict(), tower.facts.family, layout, prefix)


def _language(vlm: VLM, prefix: str = "") -> State:
    """The language model's tensors, a tied one once."""
    own = [(name, tensor) for name, tensor in stored(vlm) if name.startswith("language.")]
    return {prefix + name.removeprefix("language."): tensor for name, tensor in own}


def _language_config(vlm: VLM) -> dict[str, Any]:
    config: dict[str, Any] = vlm.language.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    rows = vlm.language.get_input_embeddings().weight.shape[0]
    kind = str(next(vlm.language.parameters()).dtype).removeprefix("torch.")
    return config | {"vocab_size": rows, "dtype": kind, "architectures": [type(vlm.language).__name__]}


def _layer(tower: Tower) -> int:
    """The layer that is taken, counted from the end of the published tower."""
    return tower.facts.depth - tower.published_depth - 1


def _kind(vlm: VLM, layout: str, known: Callable[[str], bool]) -> str:
    kind = vlm.recipe.connector.kind
    if not known(kind):
        raise RecipeError(f"{layout} has no name for the connector {kind}")
    return kind


def _is_mlp(kind: str) -> bool:
    return kind in ("linear", "identity") or (kind.startswith("mlp") and kind.endswith("x_gelu"))


# --- LLaVA's own layout, and Bunny's ----------------------------------------------------------------------------------


def _merged(name: str, types: Mapping[str, str], trained: str) -> Callable[[VLM], Written]:
    """types: transformers' model types -> the layout's. trained: the setting by which the tower in it is read."""
    eyes = {"siglip_vision_model": "transformers", "clip_vision_model": "transformers"}
    if name == "Bunny":
        eyes["eva02_clip"] = "eva"

    def written(vlm: VLM) -> Written:
        config = _language_config(vlm)
        if config["model_type"] not in types:
            raise RecipeError(
                f"{name} has no class for the language model {vlm.recipe.language.name} ({config['model_type']}); it "
                f"has one for {', '.join(types)}"
            )
        tower = _eye(vlm, name, eyes, tuple(MERGES) if name == "LLaVA" else ())
        if tower.facts.s2 and name != "Bunny":
            raise RecipeError(f"{name} has no multi-scale towers, and {tower.facts.source} runs at {tower.facts.s2}")
        if tower.facts.tokens == "drop_first":
            raise RecipeError(
                f"{name} drops no patch of {tower.facts.source}, and this model was taught without the first"
            )
        bias = "lm_head.bias" in _language(vlm)
        if bias and name == "Bunny":
            raise RecipeError("Bunny's language models have no bias in the output layer, and this one has")
        kind = _kind(vlm, name, lambda kind: _is_mlp(kind) or (name == "Bunny" and kind in _BUNNYS))
        config |= _minicpm(config) if config["model_type"] == "granite" else {}
        config |= {
            "model_type": types[config["model_type"]],
            "mm_vision_tower": tower.facts.source,
            "mm_hidden_size": tower.width,
            "mm_projector_type": kind,
            "mm_vision_select_layer": _layer(tower),
            "mm_vision_select_feature": tower.facts.tokens,
            "image_aspect_ratio": "pad" if vlm.spec.towers[0].resize == "pad" else "square",
            "tokenizer_padding_side": "right",
            "use_mm_proj": True,
            "use_s2": bool(tower.facts.s2),
            trained: True,
        }
        if tower.facts.s2:
            config["s2_scales"] = ",".join(map(str, tower.facts.s2))
        if isinstance(tiling := vlm.spec.tiling, Tiling):
            config |= {
                "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": [[width, height] for height, width in tiling.grids],
                "mm_patch_merge_type": MERGES[tiling.merge],
            }
        inside = "model." if tower.facts.family == "eva02_clip" else "vision_model."
        state = (
            _newline(vlm, merged.NEWLINE)
            | _language(vlm)
            | _seen(tower, eyes[tower.facts.family], merged.TOWER + inside)
        )
        return config, state | write_state(kind, vlm.connector.state_dict(), merged.CONNECTOR), {}

    return written


MERGES = {"unpad": "spatial_unpad", "spatial": "spatial", "flat": "flat"}
"""What LLaVA calls the ways of putting tiles together."""
_BUNNYS = ("ldp", "minigpt", "vanilla", "spp", "spp_v1", "spp_v2", "spp_v3")


def _minicpm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Granite's multipliers as MiniCPM's scales: the inverse of `languages._minicpm`."""
    return {
        "scale_emb": config["embedding_multiplier"],
        "scale_depth": config["residual_multiplier"] * math.sqrt(config["num_hidden_layers"]),
        "dim_model_base": config["hidden_size"] / config["logits_scaling"],
    }


# --- TinyLLaVA Factory ------------------------------------------------------------------------------------------------


def _factory(vlm: VLM) -> Written:
    name = "TinyLLaVA Factory"
    text = _language_config(vlm)
    eyes = {"siglip_vision_model": "transformers", "clip_vision_model": "transformers", "dinov2": "transformers"}
    tower = _eye(vlm, name, eyes)
    if tower.facts.s2:
        raise RecipeError(f"{name} has no multi-scale towers, and {tower.facts.source} runs at {tower.facts.s2}")
    # Its `patch` drops the first token whatever it is: of CLIP the class token, of SigLIP a patch.
    said = {"drop_first": "patch", "cls_patch": "cls_patch"}
    if tower.facts.tokens == "patch" and tower.facts.family != "siglip_vision_model":
        said["patch"] = "patch"
    elif tower.facts.tokens == "patch":
        said["patch"] = "cls_patch"  # keeps all that there are
    kind = _kind(vlm, name, lambda kind: _is_mlp(kind) or kind in ("resampler", "qformer"))
    options = vlm.recipe.connector.options
    inside = "" if tower.facts.family == "dinov2" else "vision_model."
    config = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": kind,
        "llm_model_name_or_path": vlm.recipe.language.name,
        "tokenizer_name_or_path": vlm.recipe.language.name,
        "vision_model_name_or_path": tower.facts.source,
        "vision_model_name_or_path2": "",
        "hidden_size": text["hidden_size"],
        "vision_hidden_size": tower.width,
        "vocab_size": text["vocab_size"],
        "image_aspect_ratio": "pad" if vlm.spec.towers[0].resize == "pad" else "square",
        "image_token_index": -200,
        "ignore_index": -100,
        "vision_feature_layer": _layer(tower),
        "vision_feature_select_strategy": said[tower.facts.tokens],
        "num_queries": options.get("queries", 128),
        "num_resampler_layers": options.get("layers", 3),
        "tokenizer_padding_side": "right",
        "text_config": text,
        "vision_config": dict(tower.facts.config) | {"model_name_or_path": tower.facts.source},
    }
    state = _language(vlm, tinyllava.LANGUAGE) | _seen(tower, eyes[tower.facts.family], tinyllava.TOWER + inside)
    connector: Mapping[str, Tensor] = vlm.connector.state_dict()
    if (scale := tinyllava.image_scale(text)) != 1:
        connector = times(kind, connector, 1 / scale)
    return config, state | write_state(kind, connector, tinyllava.CONNECTOR), {}


# --- HF LLaVA ---------------------------------------------------------------------------------------------------------

IMAGE = "<image>"
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""Filters by PIL's numbers."""


def _hf_llava(vlm: VLM) -> Written:
    """The spelling that vLLM reads too: `vision_tower.vision_model.*`, `language_model.model.*`, and `architectures` in
    text_config but not in vision_config (ecosystem: llama.cpp would route by it)."""
    name, tiling = "HF LLaVA", vlm.spec.tiling if isinstance(vlm.spec.tiling, Tiling) else None
    eyes = {"siglip_vision_model": "transformers", "clip_vision_model": "transformers"}
    tower = _eye(vlm, name, eyes, ("unpad",))
    facts, text = tower.facts, _language_config(vlm)
    if facts.s2:
        raise RecipeError(f"{name} has no multi-scale towers, and {facts.source} runs at {facts.s2}")
    if facts.tokens == "drop_first" and facts.family == "siglip_vision_model":
        raise RecipeError(f"{name} cannot leave out a patch, and this model was taught without the first of SigLIP's")
    if (kind := vlm.recipe.connector.kind) != "mlp2x_gelu":
        raise RecipeError(f"{name} has one connector, mlp2x_gelu, and this model has {kind}")
    language = _language(vlm)
    if "lm_head.bias" in language:
        if language.pop("lm_head.bias").abs().max() > 0:
            raise RecipeError(f"{name} has no bias in the output layer, and {vlm.recipe.language.name} has one")
    if text["model_type"] in SCALED:
        raise RecipeError(
            f"{name} leaves out how {text['model_type']} scales or caps its logits, so answers would differ"
        )
    text["tie_word_embeddings"] = "lm_head.weight" not in language
    token = _image_token(vlm, text, language)
    default = facts.family == "clip_vision_model" and facts.tokens != "cls_patch"
    vision = {key: value for key, value in facts.config.items() if key not in ("architectures", "transformers_version")}
    built = len(list(tower.model.get_submodule("encoder.layers")))
    vision |= {"num_hidden_layers": built, "image_size": facts.size}
    if facts.family == "siglip_vision_model":
        vision["vision_use_head"] = "head" in facts.keep
    rest = {key: x for key, x in tower.model.state_dict().items()}
    if not any(key.startswith("post_layernorm.") for key in rest):  # never run, but the class has it
        width = int(vision["hidden_size"])
        rest |= {"post_layernorm.weight": torch.ones(width), "post_layernorm.bias": torch.zeros(width)}
    kind_of = next(iter(language.values())).dtype
    state = {f"language_model.{key}": x for key, x in language.items()} | _newline(vlm, "image_newline")
    state |= {f"vision_tower.vision_model.{key}": x.to(kind_of) for key, x in rest.items() if "position_ids" not in key}
    for at, place in (("0", "1"), ("2", "2")):
        for what in ("weight", "bias"):
            state[f"multi_modal_projector.linear_{place}.{what}"] = vlm.connector.state_dict()[f"{at}.{what}"]
    config = {
        "architectures": [f"Llava{'' if tiling is None else 'Next'}ForConditionalGeneration"],
        "model_type": "llava" if tiling is None else "llava_next",
        "image_token_index": token,
        "image_seq_length": vlm.spec.tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": facts.depth - built - 1,
        "vision_feature_select_strategy": "default" if default else "full",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": str(kind_of).removeprefix("torch."),
        "text_config": text,
        "vision_config": vision,
    }
    view = vlm.spec.towers[0]
    side = {"height": view.size, "width": view.size}
    if tiling is None and view.resize not in ("squash", "pad", "crop"):
        raise RecipeError(f"{name} has no processor that prepares images by {view.resize}, as this model's are")
    cuts = view.resize == "crop"
    images: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor" if cuts else "SiglipImageProcessor",
        "size": {"shortest_edge": view.size} if cuts else side,
        "crop_size": side,
        "do_center_crop": cuts,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
        "resample": RESAMPLE[view.resample],
    }
    processor = {
        "processor_class": "LlavaProcessor" if tiling is None else "LlavaNextProcessor",
        "patch_size": int(facts.config["patch_size"]),
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "num_additional_image_tokens": 1 if default else 0,
        "image_token": IMAGE,
    }
    if view.resize == "pad":  # the colour that LLaVA pads with is the mean, here and there
        images |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if tiling is not None:
        config["image_grid_pinpoints"] = grids = [list(grid) for grid in tiling.grids]
        images |= {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": grids, "do_pad": True}
        images |= {"size": {"shortest_edge": view.size}, "do_center_crop": True}
    return config, state, {"preprocessor_config.json": images, "processor_config.json": processor}


def _image_token(vlm: VLM, text: dict[str, Any], language: State) -> int:
    """The id of `<image>`, which the class writes the image over: the tokenizer's, or a new one behind all others."""
    if vlm.tokenizer is None:
        raise RecipeError("HF LLaVA needs a tokenizer, in which <image> is a token; this model has none")
    if IMAGE not in vlm.tokenizer.get_vocab():
        vlm.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    token = int(vlm.tokenizer.convert_tokens_to_ids(IMAGE))
    if token >= text["vocab_size"]:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in language:
                more = language[name].new_zeros(token + 1 - text["vocab_size"], language[name].shape[1])
                language[name] = torch.cat([language[name], more])
        text["vocab_size"] = token + 1
    return token


# --- Prismatic --------------------------------------------------------------------------------------------------------


def _prismatic(vlm: VLM) -> Written:
    """Ids for everything, as its config.json says them (prismatic.md 4, 6, 7), and the tensors in one file."""
    name = "Prismatic"
    _check_tiles(vlm, "Prismatic")
    towers = [tower for tower in vlm.towers.values() if isinstance(tower, Tower)]
    vision, language = _vision_id(vlm, towers), _language_id(vlm)
    kinds = {"linear": "linear", "mlp2x_gelu": "gelu-mlp", "fused-gelu-mlp": "fused-gelu-mlp"}
    kind = _kind(vlm, name, kinds.__contains__)
    own = vlm.spec.towers[0].resize
    resize = next((theirs for theirs, ours in STRATEGIES.items() if ours == own), None)
    if resize is None:
        raise RecipeError(f"{name} prepares images by {', '.join(STRATEGIES.values())}, and this model by {own}")
    state = _language(vlm, prismatic.LANGUAGE)
    if f"{prismatic.LANGUAGE}lm_head.bias" in state and not language.startswith("phi"):
        raise RecipeError(f"{name}'s {language} has no bias in the output layer, and this model has one")
    state |= write_state(kind, vlm.connector.state_dict(), prismatic.PROJECTOR)
    for tower, (view, _) in zip(towers, prismatic.BACKBONES[vision].towers, strict=True):
        inside = prismatic.ONE if len(towers) == 1 else prismatic.PREFIXES[view]
        state |= _seen(tower, "timm", prismatic.TOWERS + inside)
    model = {
        "model_id": f"{vision}+{language}",
        "arch_specifier": f"no-align+{kinds[kind]}",
        "vision_backbone_id": vision,
        "llm_backbone_id": language,
        "image_resize_strategy": resize,
        "llm_max_length": int(vlm.language.config.max_position_embeddings),
    }
    return {"model": model, "run_id": f"{vision}+{language}", "stage": "finetune"}, state, {}


def _vision_id(vlm: VLM, towers: Sequence[Tower]) -> str:
    """The vision_backbone_id of the model's towers, which says how large images are and that the layer before the last
    is taken."""
    asked = tuple(str(tower.facts.source).removeprefix("timm/") for tower in towers)
    size = vlm.spec.towers[0].size
    same = {id: row for id, row in prismatic.BACKBONES.items() if tuple(timm for _, timm in row.towers) == asked}
    if not same:
        raise RecipeError(
            f"Prismatic has no vision backbone {' + '.join(asked)}; it has "
            + ", ".join(" + ".join(timm for _, timm in row.towers) for row in prismatic.BACKBONES.values())
        )
    if not (found := [id for id, row in same.items() if row.size == size]):
        sizes = ", ".join(f"{id} at {row.size} pixels" for id, row in same.items())
        raise RecipeError(f"Prismatic has {sizes}, and this model sees {size}")
    for tower in towers:
        taken = (tower.facts.tokens, _layer(tower), list(tower.facts.s2))
        if taken != ("patch", -2, []):
            scales = f" at the scales {taken[2]}" if taken[2] else ""
            raise RecipeError(
                f"Prismatic takes the patches of layer -2, and this model takes {taken[0]} of layer {taken[1]}{scales} "
                f"of {tower.facts.source}"
            )
    return found[0]


def _language_id(vlm: VLM) -> str:
    """The llm_backbone_id, which says how the model is spoken to as well."""
    asked = (vlm.recipe.language.name, vlm.chat.removesuffix("/faithful"))
    pairs = {
        id: (hub, published("Prismatic", builder).name.removesuffix("/faithful"))
        for id, (hub, builder) in prismatic.LANGUAGES.items()
    }
    if (found := next((id for id, pair in pairs.items() if pair == asked), None)) is None:
        raise RecipeError(
            f"Prismatic has no language model {asked[0]} that is spoken to as {asked[1]}; it has "
            + ", ".join(f"{hub} ({chat})" for hub, chat in pairs.values())
        )
    return found


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _gguf(vlm: VLM, folder: Path) -> list[str]:
    try:
        tower = _eye(vlm, "llama.cpp", dict.fromkeys(gguf_write.TOWERS, ""))
        return gguf_write.write(folder, vlm, tower, _language_config(vlm), _language(vlm))
    except RecipeError as fault:
        raise RecipeError(f"{fault}. {gguf_write.INSTEAD}") from None


LAYOUTS: dict[str, Layout] = {
    "hf-llava": Layout("transformers' LLaVA, which vLLM reads too", _hf_llava),
    "bunny": Layout(
        "Bunny, merged",
        _merged(
            "Bunny",
            {
                "phi": "bunny-phi", "phi3": "bunny-phi3", "stablelm": "bunny-stablelm", "qwen2": "bunny-qwen2",
                "llama": "bunny-llama", "granite": "bunny-minicpm",
            },
            "unfreeze_vision_tower",
        ),
    ),
    "llava": Layout(
        "LLaVA 1.5, merged",
        _merged(
            "LLaVA",
            {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"},
            "unfreeze_mm_vision_tower",
        ),
    ),
    "tinyllava": Layout("TinyLLaVA Factory, tuned", _factory),
    "prismatic": Layout("Prismatic, its tensors as safetensors", _prismatic, weights=f"{prismatic.WEIGHTS}safetensors"),
    "gguf": Layout("two GGUF files, which llama.cpp runs", files=_gguf),
    "remote-code": Layout("transformers with trust_remote_code, without leveret", remote.written),
}  # fmt: skip
