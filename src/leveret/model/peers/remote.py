"""A model of ours with its own code: a folder that transformers loads where leveret is not installed.

    config.json               ours, with `text_config` and `auto_map`
    modeling_leveret.py       model/hf.py and what it needs: towers, fusion, this model's connector (bundle.py)
    processing_leveret.py     model/hf_inputs.py and what it needs: resize.py, reader.py
    processor files           of LeveretProcessor; `<image>` is a token
    chat_template.jinja       the chat format, for contents in text or in parts

Nothing is written that does not say the same: the classes are filled with the model's own parts and must give its
logits, and the processor must give the ids of `chat.encode`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leveret.inputs.chat import encode
from leveret.model.checkpoint import config_of, stored
from leveret.model.connectors import find_connector
from leveret.model.language import load_tokenizer
from leveret.model.peers.bundle import PACKAGE, bundle, called
from leveret.model.tower_facts import is_own
from leveret.model.towers import Tower
from leveret.model.vlm import VLM
from leveret.records import IGNORE, IMAGE_MARK, Batch, NaFlex, Turn
from leveret.runs import DataError, RecipeError

MODELING, PROCESSING = "modeling_leveret", "processing_leveret"

_HEAD = """{what}

Written by `leveret convert --to remote-code` from leveret's own source (Apache-2.0), which is not needed to run it.
Tested with transformers 5.19 and 5.23.
"""
_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

A small vision-language model made with leveret. Its code is in this folder:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
asked = [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": asked}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

| part | |
| --- | --- |
{parts}
"""


def written(vlm: VLM) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """config.json, tensors and other files of the model, for `write.write`.

    RecipeError naming the part that cannot be published so: a language model that is not `model` and `lm_head`, or does
    more to its logits than is known; a chat format that transformers' templates cannot say; a connector from elsewhere.
    """
    from leveret.model.hf import LeveretConfig
    from leveret.model.hf_inputs import processor_for

    name = "remote-code"
    if vlm.tokenizer is None:
        raise RecipeError(f"{name} needs a tokenizer, in which {IMAGE_MARK} is a token; this model has none")
    if isinstance(vlm.spec.tiling, NaFlex):
        raise RecipeError(f"{name} has images as squares, and this model sees each at its own shape (NaFlex)")
    language, head = vlm.language, vlm.language.get_output_embeddings()
    if language.base_model_prefix != "model" or head is not getattr(language, "lm_head", None):
        raise RecipeError(
            f"{name} holds language models of the parts `model` and `lm_head`, and {vlm.recipe.language.name} "
            f"({language.config.model_type}) has others"
        )
    processor = processor_for(vlm.spec, vlm.chat, _to_the_letter(vlm.tokenizer))
    _same_ids(vlm, processor)
    config = _config(vlm, processor.image_token_id)
    model = _joined(vlm, LeveretConfig(**config))
    _same_logits(vlm, model, processor.image_token_id)
    ends = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    images = {
        "image_processor_type": "LeveretImageProcessor",
        "processor_class": "LeveretProcessor",
        "auto_map": _map("AutoImageProcessor", "AutoProcessor"),
        "towers": processor.image_processor.towers,
    }
    if processor.image_processor.tiling is not None:
        images["tiling"] = processor.image_processor.tiling
    words = {
        "processor_class": "LeveretProcessor",
        "auto_map": _map("AutoProcessor"),
        "num_image_tokens": processor.num_image_tokens,
        "image_token": processor.image_token,
    }
    files = {
        "tokenizer": processor.tokenizer,
        f"{MODELING}.py": _modeling(vlm),
        f"{PROCESSING}.py": _processing(vlm),
        "chat_template.jinja": processor.chat_template,
        "generation_config.json": {key: value for key, value in ends.items() if value is not None},
        "preprocessor_config.json": images,
        "processor_config.json": words,
        "README.md": _CARD.format(parts="\n".join(f"| {part} | {said} |" for part, said in _parts(config).items())),
    }
    return config, dict(stored(model)), files


_CLASSES = {
    "AutoConfig": f"{MODELING}.LeveretConfig",
    "AutoModel": f"{MODELING}.LeveretModel",
    "AutoModelForImageTextToText": f"{MODELING}.LeveretForConditionalGeneration",
    "AutoImageProcessor": f"{PROCESSING}.LeveretImageProcessor",
    "AutoProcessor": f"{PROCESSING}.LeveretProcessor",
}


def _map(*names: str) -> dict[str, str]:
    return {name: _CLASSES[name] for name in names}


def _config(vlm: VLM, image_token_id: int) -> dict[str, Any]:
    config = config_of(vlm)
    text = {key: value for key, value in config["language"].pop("config").items() if key != "transformers_version"}
    tied = vlm.language.lm_head.weight is vlm.language.get_input_embeddings().weight
    text |= {"vocab_size": config["language"]["vocab"], "architectures": [type(vlm.language).__name__]}
    text["tie_word_embeddings"] = tied
    assert image_token_id == config["image_token_id"]
    kind = str(vlm.dtype).removeprefix("torch.")
    # where parts came from on this machine is nobody's business, what they are called is
    for place, key in _sources(config):
        place[key] = _called(place[key])
    return config | {"text_config": text, "dtype": kind, "auto_map": dict(_CLASSES)}


def _sources(config: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    vision, language = config["recipe"]["vision"], config["recipe"]["language"]
    places = [(language, "name"), (config["language"], "source"), *((facts, "source") for facts in config["vision"])]
    places += [(tower, "tower") for tower in vision.get("towers", [])]
    return places if vision.get("tower") is None else [*places, (vision, "tower")]


def _called(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source


def _parts(config: dict[str, Any]) -> dict[str, str]:
    said = {f"tower {facts['name']}": facts["source"] for facts in config["vision"]}
    recipe = config["recipe"]
    return said | {
        "connector": recipe["connector"]["kind"], "language model": recipe["language"]["name"], "chat": recipe["chat"]
    }  # fmt: skip


# --- code -------------------------------------------------------------------------------------------------------------


def _modeling(vlm: VLM) -> str:
    """The text of the model's classes. Of the connectors only this model's is in it, out of its row of the table."""
    kind = vlm.recipe.connector.kind
    for tower in vlm.towers.values():
        assert isinstance(tower, Tower)
        if is_own(tower.facts):
            raise RecipeError(
                f"remote-code writes towers of {PACKAGE} itself, and {tower.facts.family} builds this one"
            )
    build = find_connector(kind).build
    if not build.__module__.startswith(f"{PACKAGE}."):
        raise RecipeError(f"remote-code writes connectors of {PACKAGE} itself, and {kind} is from {build.__module__}")
    module, arguments, body = called(build)
    lines = [
        "def build_connector(kind: str, in_width: int, out_width: int, tokens: int, options: Any) -> nn.Module:",
        f'    """The connector of this model, {kind}: [N, tokens, in_width] to [N, m, out_width]."""',
        '    settings = type("Settings", (dict,), {"__getattr__": dict.__getitem__})(options)',
        f"    {', '.join(arguments)} = in_width, out_width, tokens, settings",
        *(f"    {line}" for line in body.splitlines()),
    ]
    head = _HEAD.format(what="A vision-language model as transformers' classes.")
    names = ("LeveretConfig", "LeveretModel", "LeveretForConditionalGeneration")
    roots = [("leveret.model.hf", name) for name in names]
    gone = _NOT_OWN if vlm.tiles is not None else _NOT_OWN | _WHOLE
    return bundle(roots, head, {(module, "build_connector"): "\n".join(lines), **gone})


_NOT_OWN = {
    ("leveret.model.tower_facts", "is_own"): "def is_own(facts: TowerFacts) -> bool:\n    return False",
    ("leveret.model.tower_facts", "family_of"): (
        "def family_of(facts: TowerFacts) -> Family:\n    return TOWER_FAMILIES[facts.family]"
    ),
    ("leveret.model.towers", "_build_own"): (
        "def _build_own(facts: TowerFacts) -> Tower:\n    raise AssertionError(facts.family)"
    ),
}
"""In a published model nothing is built by a user's own file: such a model is refused."""


_WHOLE = {
    ("leveret.model.tiles", "Tiles"): "class Tiles(nn.Module):\n    pass",
    ("leveret.inputs.tiles", "prepare_tiles"): (
        "def prepare_tiles(image: Any, view: TowerView, tiling: Any) -> Any:\n    raise AssertionError(tiling)"
    ),
    ("leveret.records", "Split"): "class Split:\n    pass",
    ("leveret.records", "read_tiling"): "def read_tiling(said: Any) -> Any:\n    return said",
}
"""A model that sees every image as one picture says nothing of tiles."""


def _processing(vlm: VLM) -> str:
    head = _HEAD.format(what="Pictures and text as a vision-language model reads them.")
    names = ("LeveretImageProcessor", "LeveretProcessor")
    gone = {} if vlm.tiles is not None else _WHOLE
    return bundle([("leveret.model.hf_inputs", name) for name in names], head, gone)


def _to_the_letter(tokenizer: Any) -> Any:
    """A copy that is its tokenizer.json alone: a class that builds its rules anew could split texts otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return load_tokenizer(folder, as_saved=True)


# --- does it say the same? --------------------------------------------------------------------------------------------


def _joined(vlm: VLM, config: Any) -> Any:
    """transformers' class with the model's own parts in it: nothing is copied."""
    from transformers.initialization import no_init_weights

    from leveret.model.hf import LeveretForConditionalGeneration

    with torch.device("meta"), no_init_weights():
        model = LeveretForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.model.vision_tower = vlm.towers
    model.model.multi_modal_projector = vlm.connector
    model.model.tiles = vlm.tiles
    model.model.language_model = vlm.language.model
    model.lm_head = vlm.language.lm_head
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if odd := sorted({*shapes.items()} ^ {*own.items()}):
        raise RecipeError(f"remote-code: transformers builds other weights from this model's config: {odd[:6]}")
    return model.eval()


def _same_logits(vlm: VLM, model: nn.Module, image_token_id: int) -> None:
    random = torch.Generator().manual_seed(0)
    views, tiling = vlm.spec.towers, vlm.spec.tiling
    height, width = views[0].size, 2 * views[0].size + 1
    rows = vlm.language.get_input_embeddings().weight.shape[0]
    count, tiles = vlm.spec.count(height, width), 1 if tiling is None else tiling.tiles(height, width)
    ids = torch.randint(0, rows, (1, count + 6), generator=random)
    ids = ids.masked_fill(ids == image_token_id, (image_token_id + 1) % rows)
    marks = torch.zeros_like(ids, dtype=torch.bool)
    marks[:, 2 : 2 + count] = True
    pixels = {view.name: torch.randn(tiles, 3, view.size, view.size, generator=random) for view in views}
    sizes = None if tiling is None else torch.tensor([[height, width]])
    batch = Batch(
        input_ids=ids.masked_fill(marks, 0), labels=torch.full_like(ids, IGNORE),
        attention_mask=torch.ones_like(marks), position_ids=torch.arange(ids.shape[1])[None],
        segments=torch.zeros_like(ids), image_mask=marks, pixels=pixels,
        tile_image=torch.zeros(tiles, dtype=torch.long), image_sizes=sizes,
    ).to(vlm.device)  # fmt: skip
    stacked = next(iter(pixels.values()))
    if len(views) > 1:
        side = max(view.size for view in views)
        stacked = torch.zeros(tiles, len(views), 3, side, side)
        for place, view in enumerate(views):
            stacked[:, place, :, : view.size, : view.size] = pixels[view.name]
    with torch.no_grad():
        ours = vlm.eval()(batch, logits="all").logits.float()
        marked = ids.masked_fill(marks, image_token_id).to(vlm.device)
        stacked = (stacked if tiling is None else stacked[None]).to(vlm.device)
        theirs = model(input_ids=marked, pixel_values=stacked, image_sizes=sizes).logits.float()
    allowed = (1e-4 if vlm.dtype == torch.float32 else 5e-2) * float(ours.abs().max())
    if not float((ours - theirs).abs().max()) <= allowed:
        kind = vlm.language.config.model_type
        raise RecipeError(
            f"remote-code does not know what {kind} does behind its output layer: its logits would differ by "
            f"{float((ours - theirs).abs().max()):.3g}"
        )


_ASKED = (
    (Turn("user", f"{IMAGE_MARK}\nWhat is this?"),),
    (Turn("user", "What is 1 + 1?"),),
    (Turn("user", f"{IMAGE_MARK}\nWhat is this?"), Turn("assistant", "A cat."), Turn("user", "Why?\n")),
)


def _same_ids(vlm: VLM, processor: Any) -> None:
    side = vlm.spec.towers[0].size
    for number, turns in enumerate(_ASKED):
        sizes = [(side + number, 2 * side)] * sum(turn.text.count(IMAGE_MARK) for turn in turns)
        try:
            found = encode(turns, vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=True)
        except (DataError, RecipeError):
            continue  # not said in this format at all
        pairs = zip(found.input_ids, found.image_mask, strict=True)
        ours = [processor.image_token_id if seen else token for token, seen in pairs]
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        if sizes:
            text = text.replace(IMAGE_MARK, processor.replace_image_token({"image_sizes": sizes}, 0))
        theirs, _ = processor._read(text, True)
        if ours != theirs:
            raise RecipeError(
                f"remote-code: the chat format {vlm.chat} is not one that a template of transformers can write; asked "
                f"{turns[-1].text!r}, it gives other token ids than the model was taught. "
                f"Formats of systems without /faithful can be written"
            )
