"""nanoVLM's layout written: config.json as its VLMConfig has it, model.safetensors; what nanovlm.py reads.

Of its three versions that one is written which the model speaks and sees as: `nanovlm_question`, one picture in ChatML,
or tiles.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from leveret.model.peers import nanovlm
from leveret.model.peers import write_parts as parts
from leveret.model.peers.nanovlm import Settings
from leveret.model.peers.write_parts import State, Written
from leveret.model.towers import Tower
from leveret.model.vlm import VLM
from leveret.records import Split, Tiling, TowerView
from leveret.runs import RecipeError

NAME = "nanoVLM"
IMAGE = "<|image|>"
_CHATS = {"nanovlm": nanovlm.TEMPLATE, "nanovlm_question": None}
_SIGNS = re.compile(r"<row_(\d+)_col_(\d+)>")
_STORED = ("embeddings.", "encoder.", "post_layernorm.")


def written(vlm: VLM) -> Written:
    """config.json, tensors, and no other file. RecipeError names what of the model the layout cannot hold."""
    split = _split(vlm)
    if vlm.chat not in _CHATS:
        raise RecipeError(f"{NAME} is spoken to as {' or '.join(_CHATS)}, and this model as {vlm.chat}")
    if vlm.tokenizer is None:
        raise RecipeError(f"{NAME} needs a tokenizer, and this model has none")
    tower, connector = _tower(vlm), vlm.recipe.connector
    if connector.kind != "pixel_shuffle" or connector.options.get("bias"):
        own = "one with a bias" if connector.kind == "pixel_shuffle" else connector.kind
        raise RecipeError(f"{NAME} has one connector, pixel_shuffle without a bias, and this model has {own}")
    config, language = parts.language_config(vlm), parts.language(vlm)
    _check_language(vlm, config, language)
    extra = _extra(vlm, split, language)
    vision, rows = tower.facts.config, len(language["model.embed_tokens.weight"])
    tied = "lm_head.weight" not in language
    said: dict[str, Any] = {
        "vit_hidden_dim": int(vision["hidden_size"]),
        "vit_inter_dim": int(vision["intermediate_size"]),
        "vit_patch_size": int(vision["patch_size"]),
        "vit_img_size": tower.facts.size,
        "vit_n_heads": int(vision["num_attention_heads"]),
        "vit_n_blocks": len(tower.blocks),
        "vit_ln_eps": float(vision["layer_norm_eps"]),
        "vit_cls_flag": False,
        "vit_model_type": str(tower.facts.source),
        "vit_dropout": 0.0,
        "lm_hidden_dim": int(config["hidden_size"]),
        "lm_inter_dim": int(config["intermediate_size"]),
        "lm_rms_eps": float(config["rms_norm_eps"]),
        "lm_re_base": _base(config),
        "lm_max_position_embeddings": int(config["max_position_embeddings"]),
        "lm_vocab_size": rows,
        "lm_n_heads": int(config["num_attention_heads"]),
        "lm_n_kv_heads": int(config["num_key_value_heads"]),
        "lm_n_blocks": int(config["num_hidden_layers"]),
        "lm_attn_scaling": 1.0,
        "lm_dropout": 0.0,
        "lm_max_length": int(config["max_position_embeddings"]),
        "lm_use_tokens": False,
        "lm_tie_weights": tied,
        "lm_model_type": vlm.recipe.language.name,
        "lm_tokenizer": vlm.recipe.language.name,
        "mp_pixel_shuffle_factor": int(connector.options["factor"]),
        "vlm_load_backbone_weights": False,
        "vlm_checkpoint_path": "checkpoints",
    }
    if extra:
        said |= {
            "lm_base_vocab_size": rows - len(extra), "extra_token_amount": len(extra), "vlm_extra_tokens": extra,
            "lm_chat_template": _CHATS[vlm.chat], "mp_image_token_length": vlm.spec.tokens,
        }  # fmt: skip
    if split is not None:
        said |= {"max_img_size": split.side, "resize_to_max_side_len": split.grow}
    Settings.model_validate(said)
    head = int(config["hidden_size"]) // int(config["num_attention_heads"])
    turns = torch.arange(0, head, 2).float() / head
    state: State = parts.seen_so(_eye_state(tower), tower.facts.family, "nanovlm", nanovlm.TOWER)
    state |= {nanovlm.LANGUAGE + theirs(name, tied): tensor for name, tensor in language.items()}
    state[nanovlm.LANGUAGE + nanovlm.FREQUENCIES] = 1.0 / _base(config) ** turns
    state |= {nanovlm.CONNECTOR + name: tensor for name, tensor in vlm.connector.state_dict().items()}
    return said, state, {}


def theirs(name: str, tied: bool) -> str:
    """A name of Llama as the decoder has it; a tied table has the output layer's, as the published files do."""
    if tied and name == nanovlm.TABLE:
        return "head.weight"
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        for old, new in nanovlm.BLOCK:
            if found[2].startswith(new):
                return f"blocks.{found[1]}.{old}{found[2].removeprefix(new)}"
    for old, new in nanovlm.WHOLE:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise RecipeError(f"{NAME}'s language model has no tensor for {name}")


# --- the tower --------------------------------------------------------------------------------------------------------


def _tower(vlm: VLM) -> Tower:
    """The one tower. RecipeError where it is not SigLIP as nanoVLM runs it."""
    towers = list(vlm.towers.values())
    tower, view = towers[0], vlm.spec.towers[0]
    assert isinstance(tower, Tower)
    facts = tower.facts
    if len(towers) > 1 or facts.family != "siglip_vision_model":
        raise RecipeError(f"{NAME} has one SigLIP tower, and this model has {_named(vlm)}")
    if facts.s2 or facts.tokens != "patch":
        taken = facts.tokens if facts.tokens != "patch" else f"those of the scales {list(facts.s2)}"
        raise RecipeError(f"{NAME} takes the patches of one scale, and this model {taken}")
    if not facts.norm:
        raise RecipeError(f"{NAME} runs the norm behind the tower's last block, and this model does not (`norm: true`)")
    if (act := facts.config["hidden_act"]) != "gelu_pytorch_tanh":
        raise RecipeError(f"{NAME}'s tower has the activation gelu_pytorch_tanh, and {facts.source} has {act}")
    if (view.mean, view.std) != nanovlm.PLAIN:
        raise RecipeError(f"{NAME} gives its tower values from 0 to 1 (`normalise: none`), and this model others")
    _check_view(view, vlm.spec.tiling is not None)
    return tower


def _check_view(view: TowerView, tiles: bool) -> None:
    due = "bicubic" if tiles else "bilinear"
    if (not tiles and view.resize != "squash") or view.resample != due:
        what = "cuts images that were scaled" if tiles else "squashes images"
        raise RecipeError(f"{NAME} {what} ({due}), and this model was taught with `{view.resize}` ({view.resample})")


def _named(vlm: VLM) -> str:
    eyes = [tower for tower in vlm.towers.values() if isinstance(tower, Tower)]
    return ", ".join(f"{tower.facts.source} ({tower.facts.family})" for tower in eyes)


def _eye_state(tower: Tower) -> dict[str, Tensor]:
    """The tower's weights that run, positions brought to the grid that it runs at."""
    idle = {name.removeprefix("model.") for name, _ in tower.unused()}
    kept = {name: x for name, x in tower.model.state_dict().items() if name.startswith(_STORED) and name not in idle}
    kept["embeddings.position_embedding.weight"] = parts.positions(tower)
    return kept


def _split(vlm: VLM) -> Split | None:
    tiling = vlm.spec.tiling
    if tiling is None:
        return None
    if isinstance(tiling, Tiling):
        raise RecipeError(f"{NAME} cuts images with `split`, and this model with `tiles` (merge {tiling.merge})")
    if not isinstance(tiling, Split):
        raise RecipeError(f"{NAME} has images as squares or tiles, and this model sees each at its own shape (NaFlex)")
    if tiling.tile != nanovlm.MARK or tiling.whole == "":
        shown = {"tile": tiling.tile, "whole": tiling.whole}
        raise RecipeError(
            f"{NAME} has tokens before tiles ({nanovlm.MARK}) and before the whole, and here they are {shown}"
        )
    return tiling


# --- the language model -----------------------------------------------------------------------------------------------


def _base(config: dict[str, Any]) -> Any:
    base = float((config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 10000.0)))
    return int(base) if base.is_integer() else base


def _check_language(vlm: VLM, config: dict[str, Any], language: State) -> None:
    """RecipeError where it is no plain Llama."""
    name = vlm.recipe.language.name
    if config["model_type"] != "llama":
        raise RecipeError(f"{NAME}'s language model is a Llama, and {name} is a {config['model_type']}")
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    rope = dict(config.get("rope_parameters") or {})
    faults = {
        f"the activation silu, and {name} has {config['hidden_act']}": config["hidden_act"] != "silu",
        f"plain rotary positions, and {name} has {rope.get('rope_type')}": rope.get("rope_type", "default")
        != "default",
        f"heads as wide as its width divided by them, and {name}'s are {config.get('head_dim')}": (
            int(config.get("head_dim") or width // heads) * heads != width
        ),
        f"no biases, and {name} has some": any(key.endswith(".bias") for key in language),
    }
    if said := [words for words, wrong in faults.items() if wrong]:
        raise RecipeError(f"{NAME}'s language model has {'; '.join(said)}")


def _extra(vlm: VLM, split: Split | None, language: State) -> dict[str, str]:
    """vlm_extra_tokens, by their ids; the image's is added behind all others where the tokenizer has none.

    RecipeError where a token before tiles is none of the tokenizer's.
    """
    if vlm.chat == "nanovlm_question":
        if split is not None:
            raise RecipeError(f"{NAME} has no tiles in the version that is spoken to as nanovlm_question")
        return {}
    known = vlm.tokenizer.get_vocab()
    if IMAGE not in known:
        vlm.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        known = vlm.tokenizer.get_vocab()
        _grow(language, known[IMAGE] + 1)
    found = {"image_token": IMAGE}
    if split is not None:
        if missing := [mark for mark in split.marks if mark not in known]:
            raise RecipeError(f"the tokenizer lacks tokens before tiles: {', '.join(missing[:4])}")
        if split.whole is not None:
            found["global_image_token"] = split.whole
        found |= {f"r{sign[1]}c{sign[2]}": text for text in known if (sign := _SIGNS.fullmatch(text))}
    return dict(sorted(found.items(), key=lambda pair: known[pair[1]]))


def _grow(language: State, rows: int) -> None:
    for name in (nanovlm.TABLE, nanovlm.HEAD):
        if name in language and (more := rows - len(language[name])) > 0:
            table = language[name]
            language[name] = torch.cat([table, table.new_zeros(more, table.shape[1])])
