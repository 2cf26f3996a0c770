"""Models of ours in the layouts of others: Bunny, LLaVA and Prismatic here, TinyLLaVA Factory (tinyllava_write.py),
HF LLaVA (hfllava_write.py), nanoVLM (nanovlm_write.py), GGUF (gguf_write.py); and with their own code, for
transformers (remote.py).

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

from leveret.inputs.formats import find_chat, published
from leveret.inputs.views import STRATEGIES
from leveret.model.checkpoint import fresh_folder
from leveret.model.peers import (
    gguf_write,
    hfllava_write,
    merged,
    nanovlm_write,
    prismatic,
    remote,
    tinyllava,
    tinyllava_write,
)
from leveret.model.peers import write_parts as parts
from leveret.model.peers.write_parts import Written
from leveret.model.published import of_llava, of_prismatic, write_state
from leveret.model.towers import Tower
from leveret.model.vlm import VLM
from leveret.records import Tiling
from leveret.runs import RecipeError


@dataclass(frozen=True)
class Layout:
    """A layout, by one of two ways; RecipeError where the model does not fit.

    write  (model) -> what is written, its tensors in the file `weights`.
    files  (model, folder) -> notes for the user, where it writes its own files.
    speaks (config.json) -> the chat format in which the tool asks such a model, where no template of the folder says.
    """

    about: str
    write: Callable[[VLM], Written] | None = None
    files: Callable[[VLM, Path], list[str]] | None = None
    weights: str = "model.safetensors"
    speaks: Callable[[Mapping[str, Any]], str] | None = None


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
    taught = vlm.chat.removesuffix("/faithful")
    if row.speaks is None or (told := row.speaks(config).removesuffix("/faithful")) == taught:
        return []
    return [
        f"its own code asks in the chat format {told}; it was taught in {taught}, which only chat_template.jinja says"
    ]


# --- LLaVA's own layout, and Bunny's ----------------------------------------------------------------------------------


def _merged(name: str, types: Mapping[str, str], trained: str) -> Callable[[VLM], Written]:
    """types: transformers' model types -> the layout's. trained: the setting by which the tower in it is read."""
    eyes = {"siglip_vision_model": "transformers", "clip_vision_model": "transformers"}
    if name == "Bunny":
        eyes["eva02_clip"] = "eva"

    def written(vlm: VLM) -> Written:
        config = parts.language_config(vlm)
        if config["model_type"] not in types:
            raise RecipeError(
                f"{name} has no class for the language model {vlm.recipe.language.name} ({config['model_type']}); it "
                f"has one for {', '.join(types)}"
            )
        tower = parts.eye(vlm, name, eyes, tuple(MERGES) if name == "LLaVA" else ())
        if tower.facts.s2 and name != "Bunny":
            raise RecipeError(f"{name} has no multi-scale towers, and {tower.facts.source} runs at {tower.facts.s2}")
        if tower.facts.tokens == "drop_first":
            raise RecipeError(
                f"{name} drops no patch of {tower.facts.source}, and this model was taught without the first"
            )
        resize = "pad" if vlm.spec.towers[0].resize == "pad" else "squash" if vlm.spec.tiling is not None else None
        parts.seen_alike(vlm, name, [{"resize": resize}])
        bias = "lm_head.bias" in parts.language(vlm)
        if bias and name == "Bunny":
            raise RecipeError("Bunny's language models have no bias in the output layer, and this one has")
        kind = parts.kind(vlm, name, lambda kind: parts.is_mlp(kind) or (name == "Bunny" and kind in _BUNNYS))
        parts.joined_alike(vlm, name, of_llava({"mm_projector_type": kind}))
        config |= _minicpm(config) if config["model_type"] == "granite" else {}
        config |= {
            "model_type": types[config["model_type"]],
            "mm_vision_tower": tower.facts.source,
            "mm_hidden_size": tower.width,
            "mm_projector_type": kind,
            "mm_vision_select_layer": parts.layer(tower),
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
                "image_aspect_ratio": f"anyres_max_{tiling.limit}" if tiling.limit else "anyres",
                "image_grid_pinpoints": [[width, height] for height, width in tiling.grids],
                "mm_patch_merge_type": MERGES[tiling.merge],
            }
        inside = "model." if tower.facts.family == "eva02_clip" else "vision_model."
        state = (
            parts.newline(vlm, merged.NEWLINE)
            | parts.language(vlm)
            | parts.seen(tower, eyes[tower.facts.family], merged.TOWER + inside)
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


# --- Prismatic --------------------------------------------------------------------------------------------------------


def _prismatic(vlm: VLM) -> Written:
    """Ids for everything, as its config.json says them (prismatic.md 4, 6, 7), and the tensors in one file."""
    name = "Prismatic"
    parts.check_tiles(vlm, "Prismatic")
    towers = [tower for tower in vlm.towers.values() if isinstance(tower, Tower)]
    vision, language = _vision_id(vlm, towers), _language_id(vlm)
    kinds = {"linear": "linear", "mlp2x_gelu": "gelu-mlp", "fused-gelu-mlp": "fused-gelu-mlp"}
    kind = parts.kind(vlm, name, kinds.__contains__)
    own = vlm.spec.towers[0].resize
    resize = next((theirs for theirs, ours in STRATEGIES.items() if ours == own), None)
    if resize is None:
        raise RecipeError(f"{name} prepares images by {', '.join(STRATEGIES.values())}, and this model by {own}")
    named = [view for view, _ in prismatic.BACKBONES[vision].towers]
    acts = prismatic.ACTIVATIONS if len(towers) > 1 else {}
    sees = {"layer": -2, "resize": own, "size": prismatic.BACKBONES[vision].size}
    parts.seen_alike(vlm, name, [{**sees, "activation": acts.get(view)} for view in named])
    if len(towers) > 1 and vlm.recipe.vision.fusion != "channel":
        raise RecipeError(f"{name} joins towers by channel, and this model by {vlm.recipe.vision.fusion}")
    parts.joined_alike(vlm, name, of_prismatic(kinds[kind]))
    state = parts.language(vlm, prismatic.LANGUAGE)
    if f"{prismatic.LANGUAGE}lm_head.bias" in state and not language.startswith("phi"):
        raise RecipeError(f"{name}'s {language} has no bias in the output layer, and this model has one")
    state |= write_state(kind, vlm.connector.state_dict(), prismatic.PROJECTOR)
    for tower, (view, _) in zip(towers, prismatic.BACKBONES[vision].towers, strict=True):
        inside = prismatic.ONE if len(towers) == 1 else prismatic.PREFIXES[view]
        state |= parts.seen(tower, "timm", prismatic.TOWERS + inside)
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
        taken = (tower.facts.tokens, parts.layer(tower), list(tower.facts.s2))
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
        tower = parts.eye(vlm, "llama.cpp", dict.fromkeys(gguf_write.TOWERS, ""))
        return gguf_write.write(folder, vlm, tower, parts.language_config(vlm), parts.language(vlm))
    except RecipeError as fault:
        raise RecipeError(f"{fault}. {gguf_write.INSTEAD}") from None


LAYOUTS: dict[str, Layout] = {
    "hf-llava": Layout("transformers' LLaVA, which vLLM reads too", hfllava_write.written),
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
        speaks=merged.speaks,
    ),
    "llava": Layout(
        "LLaVA 1.5, merged",
        _merged(
            "LLaVA",
            {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"},
            "unfreeze_mm_vision_tower",
        ),
    ),
    "tinyllava": Layout("TinyLLaVA Factory, tuned", tinyllava_write.written, speaks=tinyllava.speaks),
    "prismatic": Layout("Prismatic, its tensors as safetensors", _prismatic, weights=f"{prismatic.WEIGHTS}safetensors"),
    "nanovlm": Layout("nanoVLM", nanovlm_write.written),
    "gguf": Layout("two GGUF files, which llama.cpp runs", files=_gguf),
    "remote-code": Layout("transformers with trust_remote_code, without leveret", remote.written),
}  # fmt: skip
