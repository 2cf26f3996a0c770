"""nanoVLM: its folders read by us, and the same computed as a plain re-computation of it (nanovlm_fakes) does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hub_fakes import WORDS, Hub
from leveret.cli import run
from leveret.inputs.batches import Item, collate
from leveret.inputs.chat import encode, find_chat
from leveret.inputs.tiles import prepare_all
from leveret.model import checkpoint, peers
from leveret.model.peers.write import write
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Turn
from leveret.runs import DataError
from nanovlm_fakes import FORMS, OWNER, Nano

WIDE, TALL, SMALL = (90, 41), (30, 77), (20, 19)


def noise(width: int, height: int) -> Image.Image:
    gen = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(gen.integers(0, 256, (height, width, 3), dtype=np.uint8))


def turn(question: str, images: int) -> Turn:
    return Turn("user", "<image>\n" * images + question)


def row_of(vlm: VLM, turns: list[Turn], images: list[Image.Image], generate: bool = True) -> Any:
    sizes = [(image.height, image.width) for image in images]
    encoded = encode(turns, vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=generate)
    return Item(encoded, pixels=[prepare_all(image, vlm.spec) for image in images], sizes=sizes)


def marked(item: Item, token: int) -> list[int]:
    return [token if seen else id for id, seen in zip(item.encoded.input_ids, item.encoded.image_mask, strict=True)]


CASES = [(form, size) for form in FORMS for size in (WIDE, TALL, SMALL)]


@pytest.mark.parametrize(("form", "size"), CASES)
@torch.no_grad()
def test_pixels_ids_logits_and_answers_are_its_own(form: str, size: tuple[int, int], tmp_path: Path) -> None:
    nano, image, question = Nano(tmp_path, form), noise(*size), "What is in the picture?"
    vlm = peers.load(nano.folder, hub=nano.hub)
    pictures, grid = nano.pictures(image)
    item = row_of(vlm, [turn(question, 1)], [image])
    batch = collate([item], 0, "left")
    # to the last bit, but for the whole image, which Pillow and torch scale in another order
    torch.testing.assert_close(batch.pixels["vision"], pictures, atol=1e-6, rtol=0)
    assert torch.equal(batch.pixels["vision"][-1], pictures[-1])
    seen = vlm.connector(vlm.see(batch.pixels))
    torch.testing.assert_close(seen, nano.see(pictures), atol=3e-5, rtol=0)

    ids = nano.ids([("user", question)], [grid])
    if nano.extra:
        token = nano.tokenizer.convert_tokens_to_ids("<|image|>")
        assert token == 320 and marked(item, token) == ids
    else:
        assert item.encoded.image_mask == [True] * 16 + [False] * len(ids) and item.encoded.input_ids[16:] == ids
    expected = nano.logits(ids, [pictures])
    assert expected.std() > 1  # the toy's weights are large enough to tell
    torch.testing.assert_close(vlm(batch, logits="all").logits[0], expected, atol=3e-5, rtol=0)
    vlm.language.generation_config.eos_token_id = None
    said = vlm.generate(batch, do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert said[0].tolist() == nano.greedy(ids, [pictures], 12)


@pytest.mark.parametrize("form", ["chat", "tiles", "global"])
@torch.no_grad()
def test_several_images_stand_in_front_each_with_its_number(form: str, tmp_path: Path) -> None:
    """As it was taught; what is learned is the answers, with the newline behind them."""
    nano, images = Nano(tmp_path, form), [noise(*WIDE), noise(*SMALL)]
    vlm = peers.load(nano.folder, hub=nano.hub)
    seen = [nano.pictures(image) for image in images]
    grids = [grid for _, grid in seen]
    said = [("user", "Are they alike?"), ("assistant", "no, 2 things"), ("user", " And now? "), ("assistant", "yes")]
    turns = [Turn(role, text) for role, text in said]  # type: ignore[arg-type]
    turns[0] = turn(said[0][1], 2)
    item = row_of(vlm, turns, images, generate=False)
    ids = nano.ids(said, grids, generate=False)
    if form == "chat":  # that version had no numbers yet
        two = nano.extra["image_token"] * 16
        ids = list(nano.tokenizer(nano.config["lm_chat_template"] and _numbered(nano, two, said)).input_ids)
    assert marked(item, 320) == ids
    learned = nano.tokenizer.decode([label for label in item.encoded.labels if label != IGNORE])
    assert learned == "no, 2 things<|im_end|>\nyes<|im_end|>\n"
    got = vlm(collate([item], 0), logits="all").logits[0]
    torch.testing.assert_close(got, nano.logits(ids, [pictures for pictures, _ in seen]), atol=3e-5, rtol=0)


def _numbered(nano: Nano, one: str, said: list[tuple[str, str]]) -> str:
    first = f"<image: 0>{one}<image: 1>{one}"
    texts = [first + said[0][1], *(text for _, text in said[1:])]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for (role, _), text in zip(said, texts, strict=True))


def test_one_question_after_another_in_the_first_version(tmp_path: Path) -> None:
    nano = Nano(tmp_path, "question")
    vlm = peers.load(nano.folder, hub=nano.hub)
    item = row_of(vlm, [turn("What?", 1), Turn("assistant", "red")], [noise(*WIDE)], generate=False)
    assert item.encoded.input_ids[16:] == nano.ids([("user", "What?"), ("assistant", "red")], [])
    learned = [label for label in item.encoded.labels if label != IGNORE]
    assert vlm.tokenizer.decode(learned) == "red<|endoftext|>"


@torch.no_grad()
def test_the_engine_answers_in_company_as_it_does_alone(tmp_path: Path) -> None:
    from leveret.generate.engine import Engine, Request
    from leveret.generate.model import reference

    nano = Nano(tmp_path, "global")
    vlm = peers.load(nano.folder, hub=nano.hub)
    rows = [
        ("What is it?", [noise(*WIDE)]),
        ("How many?", [noise(*WIDE)]),
        ("And these?", [noise(*TALL), noise(*SMALL)]),
        ("Nothing?", []),
    ]
    requests, expected = [], []
    for number, (question, images) in enumerate(rows):
        refs = tuple(filter(None, map(reference, images)))
        requests.append(Request(str(number), refs, (turn(question, len(images)),), max_new_tokens=7))
        seen = [nano.pictures(image) for image in images]
        ids = nano.ids([("user", question)], [grid for _, grid in seen])
        tokens = nano.greedy(ids, [pictures for pictures, _ in seen], 7)
        tokens = tokens[: next((place for place, token in enumerate(tokens) if token in (0, 2)), 7)]
        expected.append(nano.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    for budget in (0, 2**20):
        engine = Engine(vlm, precision="fp32", slots=3, cache_bytes=budget)
        assert [said.text for said in engine.answer(requests)] == expected
        assert [said.text for said in engine.answer(requests)] == expected


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_converted_folder_is_whole(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """convert -> a folder of ours, which needs no hub, and gives the same bits."""
    nano, image = Nano(tmp_path, form), noise(*WIDE)
    assert run(["convert", str(nano.folder), str(tmp_path / "ours"), "--hub", str(nano.hub), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "nanoVLM" and told["image_tokens"] == 16
    assert told["chat"] == ("nanovlm" if nano.extra else "nanovlm_question")
    assert told["parameters"] == sum(
        tensor.numel() for name, tensor in nano.weights.items() if not name.endswith("inv_freq")
    )
    ours = checkpoint.load(tmp_path / "ours")
    read = peers.load(nano.folder, hub=nano.hub)
    assert ours.spec == read.spec and ours.recipe == read.recipe
    batch = collate([row_of(ours, [turn("What?", 1)], [image])], 0)
    assert torch.equal(ours(batch, logits="all").logits, read(batch, logits="all").logits)
    assert not [name for tower in ours.towers.values() for name, _ in tower.unused()]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_what_is_written_is_what_was_read(form: str, tmp_path: Path) -> None:
    """Its folder -> ours -> its folder: the same tensors and settings, and what is read of it computes the same."""
    nano = Nano(tmp_path, form)
    vlm = peers.load(nano.folder, hub=nano.hub)
    write(vlm, tmp_path / "theirs", "nanovlm")
    made, published = load_file(tmp_path / "theirs/model.safetensors"), load_file(nano.folder / "model.safetensors")
    assert made.keys() == published.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(made[name], tensor, atol=0, rtol=0)
    said = json.loads((tmp_path / "theirs/config.json").read_text())
    free = {"lm_tokenizer", "lm_max_length", "lm_eos_token_id", "hf_repo_name", "vlm_load_backbone_weights"}
    for name, value in nano.config.items():
        assert name in free or said[name] == value, name
    assert said.keys() - nano.config.keys() <= {"resize_to_max_side_len"}
    again = peers.load(tmp_path / "theirs")
    assert again.spec == vlm.spec and again.chat == vlm.chat
    assert again.tokenizer.get_vocab() == vlm.tokenizer.get_vocab()
    batch = collate([row_of(vlm, [turn("What is it?", 1)], [noise(*WIDE)])], 0)
    assert torch.equal(again(batch, logits="all").logits, vlm(batch, logits="all").logits)


def composed(vision: dict[str, Any], connector: dict[str, Any], language: dict[str, Any], chat: str) -> VLM:
    """A model of ours of tiny parts, each as recipes say it."""
    from fakes import tiny_language_folder, tiny_vision_folder
    from leveret.model.build import build
    from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe

    seen = {"tower": str(tiny_vision_folder()), "layer": -1, "norm": True, "normalise": "none", "resize": "squash"}
    return build(
        ModelRecipe(
            vision=VisionRecipe(**(seen | vision)),
            connector=ConnectorRecipe(**({"kind": "pixel_shuffle"} | connector)),
            language=LanguageRecipe(**({"name": str(tiny_language_folder())} | language)),
            chat=chat,
        )
    )


def ready(vlm: VLM, resample: str = "bilinear") -> VLM:
    """The same with the filter that nanoVLM scales with, and the ends of its formats."""
    from dataclasses import replace

    vlm.spec = replace(vlm.spec, towers=(replace(vlm.spec.towers[0], resample=resample),))  # type: ignore[arg-type]
    vlm.tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], special_tokens=True)
    return vlm


@pytest.mark.parametrize("chat", ["nanovlm", "nanovlm_question"])
@torch.no_grad()
def test_a_model_of_ours_in_its_layout(chat: str, tmp_path: Path) -> None:
    """Composed here, written, read: the same logits; a token for the image where the tokenizer has none."""
    vlm = ready(composed({}, {}, {"vocab": 323}, chat))
    batch = collate([row_of(vlm, [turn("What is it?", 1)], [noise(*SMALL)])], 0)
    expected = vlm(batch, logits="all").logits
    write(vlm, tmp_path / "theirs", "nanovlm")
    again = peers.load(tmp_path / "theirs")
    assert again.chat == chat and again.spec.towers[0] == vlm.spec.towers[0]
    theirs = collate([row_of(again, [turn("What is it?", 1)], [noise(*SMALL)])], 0)
    assert torch.equal(theirs.image_mask, batch.image_mask) and torch.equal(
        theirs.pixels["vision"], batch.pixels["vision"]
    )
    found = again(theirs, logits="all").logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # what a plain re-computation makes of the file
    state = load_file(tmp_path / "theirs/model.safetensors")
    said = json.loads((tmp_path / "theirs/config.json").read_text())
    assert ("vlm_extra_tokens" in said) == (chat == "nanovlm")
    other = Nano(tmp_path / "nano", "chat" if chat == "nanovlm" else "question")
    other.config, other.weights = other.config | said, state
    torch.testing.assert_close(
        other.see(batch.pixels["vision"]), vlm.connector(vlm.see(batch.pixels)), atol=3e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("vision", "connector", "chat", "said"),
    [
        ({}, {}, "tiny", "spoken to as nanovlm or nanovlm_question, and this model as tiny"),
        ({"norm": False}, {}, "nanovlm", "runs the norm behind the tower's last block"),
        ({"normalise": None}, {}, "nanovlm", "values from 0 to 1"),
        ({"resize": "pad"}, {}, "nanovlm", r"squashes images \(bilinear\), and this model was taught with `pad`"),
        ({"s2": [32, 64]}, {}, "nanovlm", r"patches of one scale.*\[32, 64\]"),
        ({"tokens": "drop_first"}, {"kind": "linear"}, "nanovlm", "patches of one scale, and this model drop_first"),
        ({"split": {"side": 64}}, {}, "nanovlm", "has tokens before tiles"),
        ({"tiles": {}, "norm": False}, {}, "nanovlm", r"`split`, and this model with `tiles` \(merge unpad\)"),
        ({}, {"kind": "mlp2x_gelu"}, "nanovlm", "one connector, pixel_shuffle without a bias, and .* mlp2x_gelu"),
        ({}, {"options": {"bias": True}}, "nanovlm", "one with a bias"),
        ({"tower": "world/vision", "norm": False}, {}, "nanovlm", "one SigLIP tower, and this model has world/vision"),
    ],
)  # fmt: skip
def test_what_its_layout_cannot_hold_is_named(
    vision: dict[str, Any], connector: dict[str, Any], chat: str, said: str, tmp_path: Path
) -> None:
    from leveret.runs import RecipeError

    with pytest.raises(RecipeError, match=said):
        write(ready(composed(vision, connector, {}, chat)), tmp_path / "x", "nanovlm")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "the activation silu"), ({"attention_bias": True}, "no biases"),
        ({"head_dim": 16}, "heads as wide"), ({"model_type": "qwen2"}, "is a Llama, and .* is a qwen2"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "plain rotary positions"),
    ],
)  # fmt: skip
def test_a_language_model_that_it_has_not_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    import transformers

    from fakes import LLAMA, tiny_tokenizer
    from leveret.runs import RecipeError

    kind = {"qwen2": "Qwen2"}.get(change.get("model_type", ""), "Llama")
    config = getattr(transformers, f"{kind}Config")(**LLAMA | change)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "language")
    tiny_tokenizer().save_pretrained(tmp_path / "language")
    vlm = ready(composed({}, {}, {"name": str(tmp_path / "language")}, "nanovlm"))
    with pytest.raises(RecipeError, match=said):
        write(vlm, tmp_path / "x", "nanovlm")


def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    nano = Nano(tmp_path, "chat", lm_tie_weights=False)
    vlm = peers.load(nano.folder, hub=nano.hub)
    assert torch.equal(vlm.language.get_output_embeddings().weight, nano.weights["decoder.head.weight"])
    pictures, _ = nano.pictures(noise(*WIDE))
    item = row_of(vlm, [turn("What?", 1)], [noise(*WIDE)])
    with torch.no_grad():
        got = vlm(collate([item], 0), logits="all").logits[0]
    torch.testing.assert_close(got, nano.logits(marked(item, 320), [pictures]), atol=3e-5, rtol=0)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("question", {"vit_cls_flag": True}, "vit_cls_flag true"),
        ("question", {"lm_use_tokens": True}, "lm_use_tokens true"),
        ("question", {"lm_attn_scaling": 0.5}, "lm_attn_scaling 0.5"),
        ("question", {"lm_n_heads": 5}, "lm_n_heads does not divide lm_hidden_dim"),
        ("question", {"mp_pixel_shuffle_factor": 3}, "does not divide the grid of patches"),
        ("question", {"vit_architecture": "dinov3", "a": 1}, "2 unknown: vit_architecture, a"),
        ("question", {"lm_n_blocks": "two"}, r"not as expected: lm_n_blocks \(Input should be a valid integer"),
        ("question", {"vit_n_blocks": None, "lm_rms_eps": None}, "2 missing: vit_n_blocks, lm_rms_eps"),
        ("question", {"lm_vocab_size": 321}, "lm_vocab_size is 321, and the token table has 320 rows"),
        ("question", {"lm_re_base": 100000}, "inv_freq is not what lm_re_base 100000 makes"),
        ("question", {"vit_n_blocks": 2}, "12 tensors are of blocks behind the last of vit_n_blocks 2"),
        ("question", {"lm_n_blocks": 1}, "unexpected: language.model.layers.1"),
        ("question", {"lm_n_blocks": 3}, "missing: language.model.layers.2"),
        ("question", {"vit_n_blocks": 4}, "missing: encoder.layers.3"),
        ("question", {"lm_tie_weights": False}, "there is no model.embed_tokens.weight"),
        ("chat", {"mp_image_token_length": 64}, "mp_image_token_length 64, but a picture gives 16 tokens"),
        ("chat", {"lm_chat_template": "{{ messages }}"}, "lm_chat_template is not nanoVLM's own"),
        ("chat", {"vlm_extra_tokens": {"mask": "<m>"}}, "has no image_token"),
        ("global", {"max_img_size": None}, "there is no max_img_size"),
        ("global", {"max_img_size": 100}, "no multiple of vit_img_size"),
        ("global", {"max_img_size": 32 * 9}, "lacks r1c9, "),
        ("one", {"max_img_size": 64}, "lacks r1c1, r1c2, r2c1, r2c2"),
        ("chat", {"vlm_extra_tokens": {"image_token": "<|image|>", "mask": "<m>"}, "max_img_size": 32},
         "lacks r1c1"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(form: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    nano = Nano(tmp_path, form)
    config = {key: value for key, value in (nano.config | change).items() if value is not None}
    (nano.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=said):
        peers.load(nano.folder, hub=nano.hub)


def test_a_tokenizer_in_the_folder_goes_first_and_a_chat_template_may_be_spelled_otherwise(tmp_path: Path) -> None:
    nano = Nano(tmp_path, "global")
    nano.tokenizer.save_pretrained(nano.folder)
    config = nano.config | {"lm_chat_template": nano.config["lm_chat_template"].replace("\n", "\\n") + "\n"}
    (nano.folder / "config.json").write_text(json.dumps(config))
    vlm = peers.load(nano.folder)
    assert vlm.chat == "nanovlm" and vlm.tokenizer.get_vocab() == nano.tokenizer.get_vocab()


def test_a_format_of_ours_in_the_folder_is_taken(tmp_path: Path) -> None:
    nano = Nano(tmp_path, "chat", lm_chat_template="{{ messages }}")
    (nano.folder / "chat_template.jinja").write_text(find_chat("nanovlm").template)
    assert peers.load(nano.folder, hub=nano.hub).chat == "nanovlm"


def test_other_tokens_are_named(tmp_path: Path) -> None:
    nano = Nano(tmp_path, "one")
    config = nano.config | {"vlm_extra_tokens": nano.extra | {"mask": "<m>", "r1c1": "<tile>"}}
    (nano.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="not known here: mask '<m>', r1c1 '<tile>'"):
        peers.load(nano.folder, hub=nano.hub)


@pytest.mark.parametrize(
    ("lost", "added", "said"),
    [
        ("vision_encoder.blocks.1.ln1.weight", "", "1 missing: encoder.layers.1.layer_norm1.weight"),
        ("vision_encoder.layer_norm.bias", "", "1 missing: post_layernorm.bias"),
        ("MP.proj.weight", "", "missing: connector.proj.weight"),
        ("decoder.blocks.0.norm2.weight", "", "missing: language.model.layers.0.post_attention_layernorm.weight"),
        ("decoder.head.weight", "", "there is no model.embed_tokens.weight"),
        ("", "decoder.blocks.0.attn.gate.weight", "unexpected: language.model.layers.0.self_attn.gate.weight"),
        ("", "decoder.blocks.0.router.weight", "belong to no part of the model: decoder.blocks.0.router.weight"),
        ("", "vision_encoder.cls_token", "layout does not know: cls_token"),
        ("", "MP.norm.weight", "unexpected: connector.norm.weight"),
        ("", "right_tower.weight", "1 tensors belong to no part of the model: right_tower.weight"),
    ],
)  # fmt: skip
def test_every_tensor_has_its_place(lost: str, added: str, said: str, tmp_path: Path) -> None:
    nano = Nano(tmp_path, "question")
    state = load_file(nano.folder / "model.safetensors")
    state.pop(lost, None)
    save_file(state | ({added: torch.zeros(2)} if added else {}), nano.folder / "model.safetensors")
    with pytest.raises(DataError, match=said):
        peers.load(nano.folder, hub=nano.hub)


def test_two_names_of_a_tied_table_must_agree(tmp_path: Path) -> None:
    nano = Nano(tmp_path, "question")
    state = load_file(nano.folder / "model.safetensors")
    table = "decoder.token_embedding.weight"
    save_file(state | {table: state["decoder.head.weight"].clone()}, nano.folder / "model.safetensors")
    peers.load(nano.folder, hub=nano.hub)
    save_file(state | {table: state["decoder.head.weight"] + 1}, nano.folder / "model.safetensors")
    with pytest.raises(DataError, match=r"lm_tie_weights is true, but decoder\.head and token_embedding differ"):
        peers.load(nano.folder, hub=nano.hub)


def test_without_its_tokenizer_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nano = Nano(tmp_path, "chat")
    assert run(["convert", str(nano.folder), str(tmp_path / "ours"), "--hub", str(tmp_path)]) == 5
    assert "the tokenizer (lm_tokenizer) is needed from 'HuggingFaceTB/toy-tokenizer'" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["question", "chat"])
@torch.no_grad()
def test_it_is_published_with_its_own_code(form: str, tmp_path: Path) -> None:
    """`remote-code` holds what sees one picture: it checks its own ids and logits, and is read back."""
    nano = Nano(tmp_path, form)
    vlm = peers.load(nano.folder, hub=nano.hub)
    write(vlm, tmp_path / "published", "remote-code")
    from leveret.model.source import load

    again = load(tmp_path / "published")
    batch = collate([row_of(vlm, [turn("What?", 1)], [noise(*WIDE)])], 0)
    torch.testing.assert_close(again(batch, logits="all").logits, vlm(batch, logits="all").logits, atol=1e-5, rtol=0)


def test_every_part_of_it_can_learn(tmp_path: Path) -> None:
    """The tower's last norm and the tokens before tiles too."""
    nano = Nano(tmp_path, "global")
    vlm = peers.load(nano.folder, hub=nano.hub).train()
    item = row_of(vlm, [turn("What?", 1), Turn("assistant", "red")], [noise(*WIDE)], generate=False)
    vlm(collate([item], 0)).loss_sum.backward()
    assert not [name for name, value in vlm.named_parameters() if value.grad is None or not value.grad.any()]
    table = vlm.language.get_input_embeddings().weight.grad
    for text in ("<|global_image|>", "<row_2_col_3>"):
        assert table[vlm.tokenizer.convert_tokens_to_ids(text)].any()


@pytest.mark.slow
def test_an_id_of_the_hub_is_talked_to_and_of_its_tokenizer_no_weights_are_fetched(tmp_path: Path) -> None:
    """The cache serves it again without a connection; what a sketch says of it needs no weights."""
    nano = Nano(tmp_path, "global")
    shutil.copytree(nano.folder, nano.hub / "me/nano")
    save_file({"x": torch.zeros(1)}, nano.hub / OWNER / "model.safetensors")
    (nano.hub / OWNER / "config.json").write_text('{"model_type": "llama"}')
    noise(*WIDE).save(tmp_path / "p.png")
    asked = ("chat", "me/nano", str(tmp_path / "p.png"), "-p", "What is it?")
    pictures, grid = nano.pictures(noise(*WIDE))
    tokens = nano.greedy(nano.ids([("user", "What is it?")], [grid]), [pictures], WORDS)
    assert not {0, 2} & set(tokens)
    with Hub(nano.hub) as hub:
        with hub.seat() as online:
            told = online("doctor", "me/nano", "--json")
            assert told.code == 0 and json.loads(told.out)["model"]["image_tokens"] == 16, told.err
            first = online(*asked)
            assert first.code == 0, first.err
            assert first.out.strip() == nano.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        with hub.seat(HF_HUB_OFFLINE="1") as offline:
            again = offline(*asked)
            assert (again.code, again.out) == (0, first.out), again.err
        assert not [path for _, path in hub.asked if path.startswith(f"/{OWNER}/resolve") and "safetensors" in path]
