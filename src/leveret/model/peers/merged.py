"""LLaVA's layout, which Bunny and the first TinyLLaVA share: everything in one causal language model's checkpoint.

    model.vision_tower.vision_tower.<the tower's own names>   ->  the tower
    model.mm_projector.                                       ->  the connector
    model.image_newline                                       ->  the newline of tiles (LLaVA 1.6)
    everything else                                           ->  the language model

Beside the whole model there are a LoRA folder (adapters, and non_lora_trainables.bin with what else learned) and the
projector alone (mm_projector.bin); both stand on a language model of the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leveret.model.language import LanguageFacts
from leveret.model.peers.files import Folder, State, merge_adapters, read_adapters, renamed
from leveret.model.peers.foreign import TEMPLATE, Foreign, Hub, called, no_tokenizer, rows_of, written_as
from leveret.model.peers.languages import language_config
from leveret.model.peers.towers import limit_of, tiles_of, tower_of
from leveret.model.published import of_llava, read_state
from leveret.model.recipe import LanguageRecipe, ModelRecipe
from leveret.model.tower_table import describe_all
from leveret.runs import DataError

TOWER, CONNECTOR, NEWLINE = "model.vision_tower.vision_tower.", "model.mm_projector.", "model.image_newline"
ADAPTED = "base_model.model."
"""What PEFT puts before every name."""


@dataclass(frozen=True)
class Dialect:
    """One of the tools that write this layout.

    begins   of `model_type`.
    chats    chat formats by model type; `chat` for the others.
    trained  the setting that says that the tower learned. Where it did not, the tool reads it from the hub.
    bias     whether the output layer keeps the bias of its base.
    """

    name: str
    begins: str
    chat: str
    chats: Mapping[str, str]
    trained: str
    bias: bool


DIALECTS = (
    Dialect(
        "Bunny", "bunny-", "bunny", {"bunny-phi3": "phi3", "bunny-minicpm": "minicpm", "bunny-llama": "llama"},
        trained="unfreeze_vision_tower", bias=False,
    ),
    Dialect(
        "TinyLLaVA (legacy)", "tiny_llava", "tinyllava_phi", {"tiny_llava_llama": "vicuna_v1"},
        trained="tune_vision_tower", bias=True,
    ),
    Dialect(
        "LLaVA", "llava", "vicuna_v1", {"llava_mistral": "mistral_instruct"},
        trained="unfreeze_mm_vision_tower", bias=True,
    ),
)  # fmt: skip
"""bunny/conversation.py and model/builder.py; TinyLLaVA's first repository; llava/model/builder.py."""


def dialect_of(folder: Folder) -> Dialect | None:
    """Who wrote it; None where nobody of these did."""
    said = str(folder.config.get("model_type", ""))
    if "mm_vision_tower" not in folder.config:
        return None
    return next((one for one in DIALECTS if said.startswith(one.begins)), None)


def recognise(folder: Folder) -> bool:
    """A config that names a tower as LLaVA does."""
    return dialect_of(folder) is not None


def read(folder: Folder, hub: Hub, base: str | None = None, size: int | None = None) -> Foreign:
    """The model. base: instead of what `_name_or_path` names, for adapters and projectors. size: of the image, instead
    of the tower's.

    DataError where the folder is not whole or is of a kind that cannot be had, EnvironmentFault where what it stands on
    is not there.
    """
    dialect, config = dialect_of(folder), folder.config
    assert dialect is not None, "`recognise` said so"
    aspect = str(config.get("image_aspect_ratio"))
    limit = limit_of(aspect)
    if aspect.startswith("anyres") and (limit is None or dialect.name != "LLaVA"):
        raise DataError(
            f"{folder.path}: image_aspect_ratio {aspect!r} of {dialect.name}: what is known of tiles is LLaVA 1.6's "
            "'anyres' and LLaVA-OneVision's 'anyres_max_9', with any number"
        )
    if limit is None and aspect not in ("None", "", "pad", "square"):
        raise DataError(f"{folder.path}: image_aspect_ratio {aspect!r}: known are pad, square, anyres and anyres_max_N")
    notes: list[str] = []
    if folder.weights():
        home, whole = folder, folder.state()
    else:
        named = base or str(config.get("_name_or_path", ""))
        if not named:
            raise DataError(
                f"{folder.path}: these are adapters, or a projector alone, and config.json names no language model "
                "that they stand on (_name_or_path); say which with --base"
            )
        home = folder.base(hub.get(named, f"{folder.path}: the base language model"), named)
        whole = home.state() | beside(folder)
        if folder.has("adapter_config.json"):
            whole = merge_adapters(whole, read_adapters(folder), folder.settings("adapter_config.json"), ADAPTED)
            notes.append("the adapters are merged into the language model")
    language = {name: x for name, x in whole.items() if not name.startswith((TOWER, CONNECTOR))}
    newline = language.pop(NEWLINE, None)
    if not dialect.bias:
        language.pop("lm_head.bias", None)
    told = language_config(config, str(folder.path / "config.json"))
    rows = rows_of(language, "model.embed_tokens.weight", folder.path)
    source = called(config.get("_name_or_path"), folder)
    facts = LanguageFacts(told, rows, head_bias="lm_head.bias" in language, attention=None, source=source)
    own = renamed(whole, (TOWER, ""))
    tower = str(config["mm_vision_tower"])
    vision, seen = tower_of(
        tower,
        own,
        hub,
        notes,
        trained=bool(config.get(dialect.trained)),
        layer=int(config.get("mm_vision_select_layer", -2)),
        tokens=str(config.get("mm_vision_select_feature", "patch")),
        resize="squash" if limit is not None else {"pad": "pad"}.get(aspect),
        s2=_scales(config),
        size=size,
    )
    if limit is not None:
        side = describe_all(vision)[0].size
        merge = str(config.get("mm_patch_merge_type") or "flat")
        pinpoints, where = config.get("image_grid_pinpoints"), str(folder.path / "config.json")
        vision = vision.model_copy(update={"tiles": tiles_of(pinpoints, side, merge, where, wide=True, limit=limit)})
    recipe = ModelRecipe(
        vision=vision,
        connector=of_llava({"mm_projector_type": "linear"} | config),
        language=LanguageRecipe(name=source, vocab=rows, head_bias=facts.head_bias),
        chat=_chat(dialect, folder),
    )
    return Foreign(
        dialect.name, recipe, seen, read_state(whole), language, facts, _spoken(folder, home), notes, (tower,),
        cut=True, newline=newline, letter=dialect.name == "Bunny",
    )  # fmt: skip


def _chat(dialect: Dialect, folder: Folder) -> str:
    """The format that the folder carries, if we wrote it; else by its model type. LLaVA 1.6 on a model that ends turns
    as ChatML does speaks that."""
    usual = "" if dialect.name == "LLaVA" else speaks(folder.config)
    if (dialect.name == "LLaVA" or folder.has(TEMPLATE)) and (same := written_as(folder, usual)) is not None:
        return same
    if dialect.name == "LLaVA" and folder.eos == "<|im_end|>":
        return "chatml_direct"
    return speaks(folder.config)


def speaks(config: Mapping[str, Any]) -> str:
    """The format in which the tool's own code asks a model with this config.json."""
    kind = str(config["model_type"])
    dialect = next(one for one in DIALECTS if kind.startswith(one.begins))
    return dialect.chats.get(kind, dialect.chat)


def _scales(config: Mapping[str, Any]) -> list[int]:
    """Bunny's S2 sizes (bunny/model/multimodal_encoder/siglip/siglip_encoder.py)."""
    if not config.get("use_s2"):
        return []
    return sorted(int(scale) for scale in str(config.get("s2_scales") or "384,768,1152").split(","))


def beside(folder: Folder) -> State:
    """What learned besides adapters: the projector, and the tower where that learned too."""
    for name in ("non_lora_trainables.bin", "mm_projector.bin"):
        if folder.has(name):
            return renamed(folder.tensors(folder.path / name), (ADAPTED, ""), ("", ""))
    raise DataError(
        f"{folder.path}: no weights of a model, and neither non_lora_trainables.bin (of a LoRA folder) nor "
        "mm_projector.bin (of a projector alone)"
    )


def _spoken(folder: Folder, home: Folder) -> Any:
    """Where the tokenizer is: with the checkpoint, else with what it stands on."""
    return home.path if no_tokenizer(folder) else folder.path
