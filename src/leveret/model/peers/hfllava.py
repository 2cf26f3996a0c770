"""HF LLaVA: what transformers' own LLaVA class saves (llava-hf's repositories, and `convert --to hf-llava`).

    [model.]vision_tower.               ->  the tower; its own names, with `vision_model.` before them or not
    [model.]multi_modal_projector.      ->  the connector: linear_1 and linear_2
    language_model.model.  or  model.language_model.          ->  the language model
    language_model.lm_head.  or  lm_head.                     ->  its output layer
    [model.]image_newline               ->  the newline of tiles (LLaVA 1.6, `llava_next`; `llava_onevision`)

Of LLaVA-OneVision what concerns pictures; videos are not read. Its processor gives each of several images of a sample
one tile alone; here every image is cut.

Everything is in the folder: config.json says what the tower and the language model are, and no id of the hub is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from leveret.inputs.views import MOMENTS, view_of_processor
from leveret.model.language import LanguageFacts
from leveret.model.peers.files import Folder, renamed, shown
from leveret.model.peers.foreign import Foreign, Hub, called, no_tokenizer, rows_of, template_of, written_as
from leveret.model.peers.languages import language_config
from leveret.model.peers.towers import limit_of, tiles_of
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, TilesRecipe, VisionRecipe
from leveret.model.tower_facts import TOWER_FAMILIES, TowerFacts
from leveret.model.tower_table import TOWERS, backbones
from leveret.records import TowerView
from leveret.runs import DataError, RecipeError

KINDS = {"llava": "LLaVA 1.5", "llava_next": "LLaVA 1.6", "llava_onevision": "LLaVA-OneVision"}
TILED = ("llava_next", "llava_onevision")
PLAIN = {"llava_onevision": ("qwen2", "siglip_vision_model")}
"""(language model, tower) where the configuration does not say; of others llama and CLIP."""
TOWERS_HELD = ("clip_vision_model", "siglip_vision_model")
SCALED = ("gemma2", "granite", "cohere", "cohere2")
"""Language models whose logits are scaled or capped after the output layer, which transformers' LLaVA leaves out."""

_LANGUAGE = (("language_model.model.", "model."), ("model.language_model.", "model."),
             ("language_model.lm_head.", "lm_head."), ("lm_head.", "lm_head."))  # fmt: skip
WORDS = {
    "<|im_start|>": "chatml_direct",
    "[INST]": "mistral_instruct",
    "curious human": "llava_v1",
    "USER:": "vicuna_v1",
}
"""What tells the format of a chat template that we did not write; the first that is in it."""
NEWLINES = ("image_newline", "model.image_newline")
_TOWER = (("vision_tower.", ""), ("model.vision_tower.", ""))
_CONNECTOR = tuple(
    (f"{before}multi_modal_projector.linear_{place}.", f"{ours}.")
    for before in ("", "model.") for place, ours in (("1", "0"), ("2", "2"))
)  # fmt: skip


def recognise(folder: Folder) -> bool:
    """A config of transformers' own class; LLaVA's own tool uses the same model type, and names its tower beside it."""
    return folder.config.get("model_type") in KINDS and "mm_vision_tower" not in folder.config


def read(folder: Folder, hub: Hub, base: str | None = None, size: int | None = None) -> Foreign:
    """The model. `hub`, `base` and `size` are not looked at: the folder is whole.

    DataError where it is not whole, or holds what cannot be composed: another tower than CLIP or SigLIP, features of
    several layers, another activation in the projector, a language model whose logits the class leaves unscaled.
    """
    where, notes = folder.path / "config.json", list[str]()
    config = _settled(folder)
    text = config["text_config"]
    if text["model_type"] in SCALED:
        raise DataError(
            f"{where}: the language model is a {text['model_type']!r}, and transformers' class leaves out how its "
            "logits are scaled or capped: composed here it would answer otherwise"
        )
    if config["projector_hidden_act"] != "gelu":
        raise DataError(f"{where}: projector_hidden_act {config['projector_hidden_act']!r}; gelu is what is known here")
    whole = folder.state()
    newline = next((whole.pop(name) for name in NEWLINES if name in whole), None)
    language, own, connector = (renamed(whole, *pairs) for pairs in (_LANGUAGE, _TOWER, _CONNECTOR))
    known = tuple(old for old, _ in (*_LANGUAGE, *_TOWER, *_CONNECTOR))
    if left := [name for name in whole if not name.startswith(known)]:
        raise DataError(f"{folder.path}: {len(left)} tensors belong to no part of the model: {shown(left)}")
    # tables that transformers once saved, and computes
    language = {name: x for name, x in language.items() if not name.endswith("rotary_emb.inv_freq")}
    if not config["multimodal_projector_bias"]:
        weights = [(name, x) for name, x in connector.items() if name.endswith(".weight")]
        connector |= {name.replace("weight", "bias"): x.new_zeros(len(x)) for name, x in weights}
        notes.append("the projector has no biases: they are zeros here")
    rows = rows_of(language, "model.embed_tokens.weight", folder.path)
    text["tie_word_embeddings"] = bool(config["tie_word_embeddings"]) or "lm_head.weight" not in language
    source = called(folder.config.get("text_config", {}).get("_name_or_path"), folder)
    facts = LanguageFacts(text, rows, head_bias=False, attention=None, source=source)
    eye = _eye(folder, config)
    tiles = _tiles(folder, config, eye) if config["model_type"] in TILED else None
    if config["model_type"] == "llava_onevision":
        notes.append("videos are not read, and each of several images of a question is cut into tiles")
    recipe = ModelRecipe(
        vision=VisionRecipe(
            tower=eye.source, layer=config["vision_feature_layer"], tokens=eye.tokens, resize=eye.resize,
            crop=eye.size / eye.short if eye.short else None,
            normalise=_moments(eye), tiles=tiles,
        ),
        connector=ConnectorRecipe(kind="mlp2x_gelu"),
        language=LanguageRecipe(name=source, vocab=rows, head_bias=False),
        chat=_chat(folder, str(text["model_type"]), notes),
    )  # fmt: skip
    if no_tokenizer(folder):
        raise DataError(f"{folder.path}: there is no tokenizer (tokenizer.json, or tokenizer.model)")
    tool = f"HF LLaVA ({KINDS[str(config['model_type'])]})"
    return Foreign(
        tool,
        recipe,
        {0: own},
        connector,
        language,
        facts,
        folder.path,
        notes,
        (eye.source,),
        eyes=(eye,),
        newline=newline,
    )


def _settled(folder: Folder) -> dict[str, Any]:
    """config.json with transformers' own defaults in it. Only what the classes know is handed to them."""
    from transformers import AutoConfig

    said, where = folder.config, folder.path / "config.json"
    kind = str(said["model_type"])
    spoken, seen = PLAIN.get(kind, ("llama", "clip_vision_model"))
    parts: dict[str, Any] = {}
    for name in ("text_config", "vision_config"):
        if not isinstance(part := said.get(name, {}), Mapping):
            raise DataError(f"{where}: {name} is no object with the settings of a part of the model")
        if part:
            parts[name] = dict(part)
    if "text_config" in parts:
        parts["text_config"] = language_config({"model_type": spoken} | parts["text_config"], f"{where}: text_config")
    if "vision_config" in parts:
        family = str(parts["vision_config"].setdefault("model_type", seen))
        if family not in TOWERS_HELD:
            raise DataError(f"{where}: the tower is a {family!r}; known here are {' and '.join(TOWERS_HELD)}")
        known = AutoConfig.for_model(family).to_dict()
        parts["vision_config"] = {key: value for key, value in parts["vision_config"].items() if key in known}
    plain = AutoConfig.for_model(kind).to_dict()
    own = {key: said[key] for key in plain if key in said and not isinstance(plain[key], Mapping)}
    for key in ("architectures", "transformers_version", "dtype", "torch_dtype"):
        own.pop(key, None)
    try:
        return AutoConfig.for_model(**own, **parts).to_dict()
    except Exception as fault:  # transformers checks types with classes of its own
        raise DataError(f"{where}: transformers refuses these settings ({str(fault).splitlines()[0]})") from None


def _eye(folder: Folder, config: Mapping[str, Any]) -> TowerFacts:
    """The tower, as the folder describes it."""
    where, vision = folder.path / "config.json", dict(config["vision_config"])
    family = str(vision["model_type"])
    layer, blocks = config["vision_feature_layer"], int(vision["num_hidden_layers"])
    if not isinstance(layer, int):
        raise DataError(f"{where}: vision_feature_layer {layer}: features of several layers are not joined here")
    depth = blocks + 1 + layer if layer < 0 else layer
    if not 1 <= depth <= blocks:
        raise DataError(f"{where}: vision_feature_layer {layer} of a tower with {blocks} layers")
    default = config["vision_feature_select_strategy"] == "default"  # it leaves out the first token, whatever it is
    choice = {("clip_vision_model", True): "patch", ("clip_vision_model", False): "cls_patch",
              ("siglip_vision_model", True): "drop_first"}.get((family, default), "patch")  # fmt: skip
    view = _view(folder, family, int(vision["image_size"]))
    if config["model_type"] in TILED:
        view = replace(view, resize="squash")  # so the whole becomes the first tile
    for key in ("transformers_version", "dtype", "torch_dtype"):  # it is built in float32, and filled as it was saved
        vision.pop(key, None)
    return TowerFacts(
        family=family, config=vision, depth=depth, size=view.size, mean=view.mean, std=view.std, resize=view.resize,
        source=_name(vision, folder), tokens=choice, resample=view.resample, short=view.short,  # type: ignore[arg-type]
    )  # fmt: skip


def _view(folder: Folder, family: str, size: int) -> TowerView:
    """How its image processor prepares an image; without one as the family does."""
    said = _processor(folder)
    if not said:
        row = TOWER_FAMILIES[family]
        return TowerView("vision", size, row.mean, row.std, row.resize, row.resample)
    try:
        view = view_of_processor(said)
    except RecipeError as fault:
        raise DataError(f"{folder.path}: {fault}") from None
    if view.size != size:
        raise DataError(
            f"{folder.path}: its processor gives {view.size} pixels, its tower takes {size}; they must be the same"
        )
    # in LLaVA 1.6 and later `do_pad` evens out a batch
    return replace(view, resize="pad") if said.get("do_pad") and folder.config["model_type"] == "llava" else view


def _tiles(folder: Folder, config: Mapping[str, Any], eye: TowerFacts) -> TilesRecipe:
    """LLaVA 1.6's tiles, and OneVision's. transformers' classes put them together in one way, and have the grids in two
    places."""
    where, grids = folder.path / "config.json", config["image_grid_pinpoints"]
    if eye.tokens != "patch":
        raise DataError(
            f"{where}: vision_feature_select_strategy {config['vision_feature_select_strategy']!r} of a "
            f"{eye.family} leaves no square grid of patches, and tiles are put together from such"
        )
    said = _processor(folder).get("image_grid_pinpoints", grids)
    if said != grids:
        raise DataError(f"{folder.path}: the model's image_grid_pinpoints are {grids}, its processor's {said}")
    limit = limit_of(aspect := str(config.get("vision_aspect_ratio", "anyres")))
    if limit is None or (config["model_type"] == "llava_onevision") != bool(limit):
        raise DataError(f"{where}: vision_aspect_ratio {aspect!r}; known is anyres_max_N, LLaVA-OneVision's own")
    return tiles_of(grids, eye.size, "spatial_unpad", str(where), wide=False, limit=limit)


def _moments(eye: TowerFacts) -> Any:
    """What a recipe calls its mean and std; None where it has no name for them."""
    return next((name for name, found in MOMENTS.items() if found == (eye.mean, eye.std)), None)


def _processor(folder: Folder) -> dict[str, Any]:
    """What its image processor's file says: a file of its own, or within the processor's (transformers 5)."""
    found = folder.settings("preprocessor_config.json")
    found = dict(found or folder.settings("processor_config.json").get("image_processor") or {})
    if str(found.get("image_processor_type")).startswith("Siglip") and not found.get("do_center_crop"):
        found.pop("crop_size", None)  # said by some, and without meaning for this class
    return found


def _name(vision: Mapping[str, Any], folder: Folder) -> str:
    """What the tower is called in a model that is saved: the published one with these settings, else the folder."""
    for name in TOWERS:
        row = backbones()["vision"].get(name, {}).get("config", {})
        if row and all(vision.get(key) == value for key, value in row.items()):
            return name
    return f"{folder.path.resolve().name}/vision_tower"


def _chat(folder: Folder, kind: str, notes: list[str]) -> str:
    """The row of CHATS that its chat template is; one that we did not write is told by its words."""
    if (same := written_as(folder)) is not None:
        return same
    template = template_of(folder)
    found = next((chat for word, chat in WORDS.items() if word in template), None)
    if found is None and not template:
        found = {"<|im_end|>": "chatml_direct"}.get(folder.eos, {"mistral": "mistral_instruct"}.get(kind, "vicuna_v1"))
    if found is None:
        raise DataError(
            f"{folder.path}: its chat template is none that is known here (ChatML, [INST], USER: .. ASSISTANT:); a "
            "chat_template.jinja of one of these in the folder is taken instead"
        )
    said = "its chat template is written as" if template else "it has no chat template; taken is"
    notes.append(f"{said} {found}, the format of LLaVA's own tool; another can be chosen when it is trained on")
    return found
