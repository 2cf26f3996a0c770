"""nanoVLM's checkpoints (huggingface/nanoVLM): a flat config.json (vit_*, lm_*, mp_*) beside model.safetensors.

    vision_encoder.*   ->  the tower: SigLIP, whose last norm runs
    MP.proj.weight     ->  the connector: pixel shuffle and one linear layer
    decoder.*          ->  the language model: a Llama, its output layer tied or not

It was written in three ways, told apart by what config.json says:

    no vlm_extra_tokens    image first, then `Question: .. Answer:` (the 222M models)
    no max_img_size        ChatML, an `<|image|>` for every token of the one picture
    max_img_size           the same, of an image that is cut into tiles, each with a token of its own before it

Pixels are values from 0 to 1. The tokenizer is the one that config.json names, with the extra tokens behind its own.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leveret.inputs.views import MOMENTS
from leveret.model.language import LanguageFacts
from leveret.model.peers.files import Folder, State, renamed, shown
from leveret.model.peers.foreign import Foreign, Hub, called, no_tokenizer, rows_of, written_as
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, SplitRecipe, VisionRecipe
from leveret.model.tower_facts import TowerFacts
from leveret.runs import DataError

TOWER, LANGUAGE, CONNECTOR = "vision_encoder.", "decoder.", "MP."
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK = (
    ("attn.out_proj.", "self_attn.o_proj."),
    ("attn.", "self_attn."),
    ("norm1.", "input_layernorm."),
    ("norm2.", "post_attention_layernorm."),
    ("mlp.", "mlp."),
)
WHOLE = (("token_embedding.", "model.embed_tokens."), ("norm.", "model.norm."), ("head.", "lm_head."))
FREQUENCIES = "rotary_embd.inv_freq"
"""A table that is computed, and saved all the same."""

TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""lm_chat_template in all versions of models/config.py, its newlines as they come out there; our format `nanovlm`."""
PLAIN = MOMENTS["none"]
SIGNS = ("vit_hidden_dim", "lm_hidden_dim", "mp_pixel_shuffle_factor")
MARK = "<row_{row}_col_{column}>"


class Settings(BaseModel):
    """config.json: VLMConfig of models/config.py, from its first version to that of October 2025.

    What has no default here decides what is computed. None: a version that did not say it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    vit_hidden_dim: int = Field(gt=0)
    vit_inter_dim: int = Field(gt=0)
    vit_patch_size: int = Field(gt=0)
    vit_img_size: int = Field(gt=0)
    vit_n_heads: int = Field(gt=0)
    vit_n_blocks: int = Field(gt=0)
    vit_ln_eps: float
    vit_cls_flag: bool
    vit_model_type: str
    vit_dropout: float = 0.0
    lm_hidden_dim: int = Field(gt=0)
    lm_inter_dim: int = Field(gt=0)
    lm_rms_eps: float
    lm_re_base: float
    lm_max_position_embeddings: int = Field(gt=0)
    lm_vocab_size: int = Field(gt=0)
    lm_n_heads: int = Field(gt=0)
    lm_n_kv_heads: int = Field(gt=0)
    lm_n_blocks: int = Field(gt=0)
    lm_attn_scaling: float
    lm_tie_weights: bool
    lm_model_type: str
    lm_tokenizer: str
    lm_use_tokens: bool = False
    lm_dropout: float = 0.0
    lm_base_vocab_size: int | None = None
    extra_token_amount: int | None = None
    lm_max_length: int | None = None
    lm_eos_token_id: int | None = None
    lm_chat_template: str | None = None
    mp_pixel_shuffle_factor: int = Field(gt=0)
    mp_image_token_length: int | None = None
    max_img_size: int | None = None
    resize_to_max_side_len: bool = False
    vlm_extra_tokens: dict[str, str] = Field(default_factory=dict)
    vlm_load_backbone_weights: bool = True
    vlm_checkpoint_path: str | None = None
    hf_repo_name: str | None = None

    @property
    def cells(self) -> int:
        """Tokens along one side of a picture, behind the connector."""
        return self.vit_img_size // self.vit_patch_size // self.mp_pixel_shuffle_factor


def recognise(folder: Folder) -> bool:
    """A config.json with the settings of a ViT, a language model and its modality projector side by side."""
    return all(name in folder.config for name in SIGNS)


def read(folder: Folder, hub: Hub, base: str | None = None, size: int | None = None) -> Foreign:
    """The model. `base` and `size` are not looked at: the folder is whole but for its tokenizer.

    DataError where it is not whole, says anything that is not known here, or holds what cannot be composed;
    EnvironmentFault where the tokenizer cannot be had.
    """
    where, said = str(folder.path / "config.json"), settings(folder)
    notes: list[str] = []
    tower, language, connector = _parts(folder, said)
    rows = rows_of(language, TABLE, folder.path)
    if rows != said.lm_vocab_size:
        raise DataError(f"{where}: lm_vocab_size is {said.lm_vocab_size}, and the token table has {rows} rows")
    source = called(said.lm_model_type, folder)
    facts = LanguageFacts(_llama(said), rows, head_bias=False, attention=None, source=source)
    eye, split = _eye(said), _split(said, where)
    recipe = ModelRecipe(
        vision=VisionRecipe(tower=eye.source, layer=-1, norm=True, resize=eye.resize, normalise="none", split=split),
        connector=ConnectorRecipe(kind="pixel_shuffle", options={"factor": said.mp_pixel_shuffle_factor}),
        language=LanguageRecipe(name=source, vocab=rows, head_bias=False),
        chat=_chat(folder, said, where),
    )
    if said.vit_dropout or said.lm_dropout:
        notes.append("it learned with dropout, of which nothing is kept: to train it on is not quite the same")
    spoken = folder.path
    if no_tokenizer(folder):
        # its words alone: the weights that lie beside them are another model's
        place = Hub(hub.place, words_only=True)
        spoken = place.get(said.lm_tokenizer, f"{folder.path}: the tokenizer (lm_tokenizer)")
    return Foreign(
        "nanoVLM", recipe, {0: tower}, connector, language, facts, spoken, notes, (eye.source,), eyes=(eye,),
        extra=tuple(dict.fromkeys(said.vlm_extra_tokens.values())),
    )  # fmt: skip


def settings(folder: Folder) -> Settings:
    """What config.json says. DataError listing all that is missing, unknown or of another type, and naming what the
    original could say and cannot be composed here."""
    where = folder.path / "config.json"
    try:
        said = Settings.model_validate(folder.config)
    except ValidationError as errors:
        kinds = {"missing": list[str](), "unknown": list[str](), "not as expected": list[str]()}
        for fault in errors.errors():
            name = ".".join(map(str, fault["loc"]))
            kind = {"missing": "missing", "extra_forbidden": "unknown"}.get(fault["type"], "not as expected")
            kinds[kind].append(name if kind != "not as expected" else f"{name} ({fault['msg']})")
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        raise DataError(f"{where}: not the settings of a nanoVLM that is known here; {told}") from None
    refused = {
        "vit_cls_flag true: the class token alone would stand for the image": said.vit_cls_flag,
        "lm_use_tokens true: its language model would not take images": said.lm_use_tokens,
        f"lm_attn_scaling {said.lm_attn_scaling}: positions are scaled as no class here does": said.lm_attn_scaling
        != 1,
        "lm_n_heads does not divide lm_hidden_dim": said.lm_hidden_dim % said.lm_n_heads,
        "lm_n_kv_heads does not divide lm_n_heads": said.lm_n_heads % said.lm_n_kv_heads,
        "vit_n_heads does not divide vit_hidden_dim": said.vit_hidden_dim % said.vit_n_heads,
        f"mp_pixel_shuffle_factor does not divide the grid of patches, {said.vit_img_size} / {said.vit_patch_size}": (
            said.vit_img_size // said.vit_patch_size
        )
        % said.mp_pixel_shuffle_factor,
        f"mp_image_token_length {said.mp_image_token_length}, but a picture gives {said.cells**2} tokens": (
            said.mp_image_token_length not in (None, said.cells**2) and bool(said.vlm_extra_tokens)
        ),
    }
    if faults := [words for words, wrong in refused.items() if wrong]:
        raise DataError(f"{where}: {'; '.join(faults)}")
    return said


# --- tensors ----------------------------------------------------------------------------------------------------------


def _parts(folder: Folder, said: Settings) -> tuple[State, State, State]:
    """Tower (under its own names), language model and connector."""
    whole = folder.state()
    frequencies = whole.pop(LANGUAGE + FREQUENCIES, None)
    if frequencies is not None and frequencies.device.type != "meta":
        _same_positions(frequencies, said, folder)
    tower, decoder, connector = (renamed(whole, (prefix, "")) for prefix in (TOWER, LANGUAGE, CONNECTOR))
    language = {_ours(name): tensor for name, tensor in decoder.items()}
    stray = [name for name in whole if not name.startswith((TOWER, LANGUAGE, CONNECTOR))]
    if left := stray + [LANGUAGE + name for name in decoder if not _ours(name)]:
        raise DataError(f"{folder.path}: {len(left)} tensors belong to no part of the model: {shown(left)}")
    if extra := [name for name in tower if _block_of(name) >= said.vit_n_blocks]:
        raise DataError(
            f"{folder.path}: {len(extra)} tensors are of blocks behind the last of vit_n_blocks {said.vit_n_blocks}: "
            f"{shown(extra)}"
        )
    if said.lm_tie_weights:
        head, table = language.pop(HEAD, None), language.get(TABLE)
        if head is not None and table is not None and head.device.type != "meta" and not head.equal(table):
            raise DataError(f"{folder.path}: lm_tie_weights is true, but decoder.head and token_embedding differ")
        if table is None and head is not None:  # safetensors keeps one name of two that share their numbers
            language[TABLE] = head
    return tower, language, connector


def _ours(name: str) -> str:
    """A name of the decoder as Llama's; "" where it is none."""
    if name.startswith("blocks."):
        _, number, rest = (*name.split(".", 2), "")[:3]
        inside = next((new + rest.removeprefix(old) for old, new in BLOCK if rest.startswith(old)), "")
        return f"model.layers.{number}.{inside}" if inside and number.isdigit() else ""
    return next((new + name.removeprefix(old) for old, new in WHOLE if name.startswith(old)), "")


def _block_of(name: str) -> int:
    """The block of the tower that a tensor is of; -1 where it is of none."""
    number = name.removeprefix("blocks.").split(".")[0]
    return int(number) if name.startswith("blocks.") and number.isdigit() else -1


def _same_positions(frequencies: Any, said: Settings, folder: Folder) -> None:
    """DataError where the saved table of positions, which is the one that runs, is not what config.json makes."""
    import torch

    wide = said.lm_hidden_dim // said.lm_n_heads
    due = 1.0 / said.lm_re_base ** (torch.arange(0, wide, 2).float() / wide)
    if frequencies.shape != due.shape or not torch.allclose(frequencies.float(), due, rtol=1e-2, atol=0):
        raise DataError(
            f"{folder.path}: decoder.{FREQUENCIES} is not what lm_re_base {said.lm_re_base:g} makes of heads of {wide}"
        )


# --- what the settings mean -------------------------------------------------------------------------------------------


def _llama(said: Settings) -> dict[str, Any]:
    """The decoder as transformers' Llama: the same formulas (models/language_model.py)."""
    return {
        "model_type": "llama",
        "hidden_size": said.lm_hidden_dim,
        "intermediate_size": said.lm_inter_dim,
        "num_hidden_layers": said.lm_n_blocks,
        "num_attention_heads": said.lm_n_heads,
        "num_key_value_heads": said.lm_n_kv_heads,
        "head_dim": said.lm_hidden_dim // said.lm_n_heads,
        "rms_norm_eps": said.lm_rms_eps,
        "rope_theta": said.lm_re_base,
        "max_position_embeddings": said.lm_max_position_embeddings,
        "hidden_act": "silu",
        "tie_word_embeddings": said.lm_tie_weights,
        # the tokenizer says how an answer ends; Llama's own defaults would be ids of another vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _eye(said: Settings) -> TowerFacts:
    """SigLIP without its head, its norm running. One picture is squashed as torchvision's Resize does it (bilinear);
    what is cut into tiles is scaled before (bicubic)."""
    mean, std = PLAIN
    config = {
        "model_type": "siglip_vision_model",
        "hidden_size": said.vit_hidden_dim,
        "intermediate_size": said.vit_inter_dim,
        "num_hidden_layers": said.vit_n_blocks,
        "num_attention_heads": said.vit_n_heads,
        "image_size": said.vit_img_size,
        "patch_size": said.vit_patch_size,
        "layer_norm_eps": said.vit_ln_eps,
        "hidden_act": "gelu_pytorch_tanh",
    }
    return TowerFacts(
        family="siglip_vision_model", config=config, depth=said.vit_n_blocks, size=said.vit_img_size, mean=mean,
        std=std, resize="squash", source=said.vit_model_type, norm=True,
        resample="bilinear" if said.max_img_size is None else "bicubic",
    )  # fmt: skip


def _split(said: Settings, where: str) -> SplitRecipe | None:
    """How an image is cut; None where it is one picture. DataError where the tokens of the tiles are not all there."""
    extra = dict(said.vlm_extra_tokens)
    if not extra:
        return None
    image, whole = extra.pop("image_token", None), extra.pop("global_image_token", None)
    if image is None:
        raise DataError(f"{where}: vlm_extra_tokens has no image_token, for which images would stand")
    if said.max_img_size is None:
        if extra or whole is not None:
            raise DataError(f"{where}: vlm_extra_tokens has tokens for tiles, and there is no max_img_size")
        return None
    if said.max_img_size % said.vit_img_size or said.max_img_size < said.vit_img_size:
        raise DataError(f"{where}: max_img_size {said.max_img_size} is no multiple of vit_img_size {said.vit_img_size}")
    most = said.max_img_size // said.vit_img_size
    due = {f"r{row}c{column}": (row, column) for row in range(1, most + 1) for column in range(1, most + 1)}
    if most == 1 and whole is not None:  # one tile is the whole image
        due = {}
    if missing := [name for name in due if name not in extra]:
        raise DataError(f"{where}: vlm_extra_tokens lacks {shown(missing)}, tiles of an image of {said.max_img_size}")
    if other := [f"{name} {text!r}" for name, text in extra.items() if text != _mark(name)]:
        raise DataError(f"{where}: vlm_extra_tokens has what is not known here: {shown(other)}")
    return SplitRecipe(side=said.max_img_size, grow=said.resize_to_max_side_len, whole=whole, tile=MARK)


def _mark(name: str) -> str | None:
    """The token that `r1c2` has in all published models; None where the name is none of a tile."""
    found = re.fullmatch(r"r(\d+)c(\d+)", name)
    return MARK.format(row=found[1], column=found[2]) if found else None


def _chat(folder: Folder, said: Settings, where: str) -> str:
    """The row of CHATS that it was taught in."""
    if (same := written_as(folder)) is not None:
        return same
    if not said.vlm_extra_tokens:
        return "nanovlm_question"
    if said.lm_chat_template is None or said.lm_chat_template.replace("\\n", "\n").strip() == TEMPLATE:
        return "nanovlm"
    raise DataError(
        f"{where}: its lm_chat_template is not nanoVLM's own, the only one that is known here; a chat_template.jinja "
        "of one of the chat formats in the folder is taken instead"
    )
