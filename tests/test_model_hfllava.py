"""HF LLaVA: toy models of transformers' own class, saved by it, read by us, computing the same."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fakes import HIDDEN, LLAMA, SIGLIP, loud, tiny_tokenizer
from leveret.cli import explain, run
from leveret.inputs.chat import encode
from leveret.inputs.formats import CHATS
from leveret.inputs.resize import prepare
from leveret.model import checkpoint, peers
from leveret.model.peers.write import write
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Batch, Turn
from leveret.runs import DataError

CLIP_LIKE = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def tokenizer_of(chat: str) -> Any:
    """The toy tokenizer with the format's end token and `<image>`."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHATS[chat].stop, "<image>"]})
    tokenizer.chat_template = CHATS[chat].template
    return tokenizer


def theirs(
    place: Path, tower: str = "clip", original: bool = True, chat: str = "vicuna_v1", **more: Any
) -> tuple[Any, Path]:
    """(transformers' own toy LLaVA, the folder that it saved). original: under the names before transformers 5."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    tokenizer = tokenizer_of(chat)
    rows = len(tokenizer) + 5
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**SIGLIP)
    said = {"vision_feature_select_strategy": "default" if tower == "clip" else "full"} | more
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**(LLAMA | {"vocab_size": rows})),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), **said,
    )  # fmt: skip
    model = loud(LlavaForConditionalGeneration(config)).eval()
    folder = place / "theirs"
    model.save_pretrained(folder, save_original_format=original)
    tokenizer.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    return model, folder


def row_of(vlm: VLM, pixels: torch.Tensor, images: int = 1) -> tuple[Batch, torch.Tensor]:
    """(a row with images in it, the ids that transformers wants: `<image>` where ours are marked)."""
    token = vlm.tokenizer.convert_tokens_to_ids("<image>")
    ids = [7] + ([token] * vlm.spec.tokens + [9, 11]) * images + [8]
    row = torch.tensor([ids])
    marks = row == token
    batch = Batch(
        input_ids=row, labels=torch.full_like(row, IGNORE), attention_mask=torch.ones_like(marks),
        position_ids=torch.arange(len(ids))[None], segments=torch.zeros_like(row), image_mask=marks,
        pixels={"vision": pixels}, tile_image=torch.arange(images),
    )  # fmt: skip
    return batch, row


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_it_computes_what_transformers_computes(tower: str, original: bool, tmp_path: Path) -> None:
    model, folder = theirs(tmp_path, tower, original)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("language_model.model.embed_tokens.weight" in names) == original  # both spellings are met
    vlm = peers.load(folder)
    batch, ids = row_of(vlm, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), images=2)
    expected = model(input_ids=ids, pixel_values=batch.pixels["vision"])
    torch.testing.assert_close(vlm(batch, logits="all").logits, expected.logits, atol=1e-5, rtol=0)
    features = model.get_image_features(batch.pixels["vision"]).pooler_output
    ours = vlm.connector(vlm.see(batch.pixels))
    torch.testing.assert_close(ours.flatten(0, 1), torch.cat(tuple(features)), atol=1e-5, rtol=0)
    for one in (model, vlm.language):
        one.generation_config.eos_token_id = None
    found = vlm.generate(batch, do_sample=False, max_new_tokens=8, pad_token_id=0)
    said = model.generate(input_ids=ids, pixel_values=batch.pixels["vision"], do_sample=False, max_new_tokens=8,
                          pad_token_id=0)  # fmt: skip
    assert found[0].tolist() == said[0, ids.shape[1] :].tolist()


def test_halves_stay_halves_and_floats_stay_floats(tmp_path: Path) -> None:
    """Whatever type the config names: weights keep the one in which they were saved."""
    from safetensors.torch import load_file

    model, folder = theirs(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config["vision_config"]["dtype"] = config["text_config"]["dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    kernel = "embeddings.patch_embedding.weight"
    stored = next(x for key, x in load_file(folder / "model.safetensors").items() if key.endswith(kernel))
    vlm = peers.load(folder)
    assert vlm.dtype == torch.float32 and torch.equal(vlm.get_parameter(f"towers.vision.model.{kernel}"), stored)
    model.half().save_pretrained(folder)
    assert {x.dtype for x in peers.load(folder).parameters()} == {torch.float16}


def test_its_processor_is_ours(tmp_path: Path) -> None:
    """Size, cut and moments are read off the folder, wherever transformers wrote them."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    _, folder = theirs(tmp_path)
    image = Image.effect_noise((50, 41), 80).convert("RGB")
    expected = CLIPImageProcessorPil.from_pretrained(folder)(image, return_tensors="np")["pixel_values"][0]
    (view,) = peers.load(folder).spec.towers
    assert view.resize == "crop"
    torch.testing.assert_close(prepare(image, view), expected, atol=1e-6, rtol=0)
    said = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": said | {"do_pad": True}}))
    (view,) = peers.load(folder).spec.towers
    assert view.resize == "pad" and view.mean == pytest.approx(CLIP_LIKE["image_mean"])


def test_convert_reads_it_and_its_own_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, to hf-llava, and back: the same logits."""
    _, folder = theirs(tmp_path)
    assert run(["convert", str(folder), str(tmp_path / "ours"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "HF LLaVA (LLaVA 1.5)" and said["chat"] == "vicuna_v1" and not said["notes"]
    ours = checkpoint.load(tmp_path / "ours")
    assert str(tmp_path) not in (tmp_path / "ours/config.json").read_text()
    write(ours, tmp_path / "again", "hf-llava")
    back = peers.load(tmp_path / "again")
    batch, _ = row_of(ours, torch.randn(1, 3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(
            back(batch, logits="all").logits, ours(batch, logits="all").logits, atol=1e-5, rtol=0
        )
    assert back.chat == ours.chat and back.spec == ours.spec
    encoded = encode(
        [Turn("user", "<image>\nhow many?")], back.chat, back.tokenizer, back.spec, [(9, 9)], generate=True
    )
    assert sum(encoded.image_mask) == back.spec.tokens


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("resize", ["squash", "pad", "crop"])
def test_the_export_says_how_images_are_prepared(tower: str, resize: Any, tmp_path: Path) -> None:
    """What transformers' processor makes of an exported folder is what we make, and it is read back."""
    from transformers import AutoImageProcessor

    _, folder = theirs(tmp_path, tower)
    vlm = peers.load(folder)
    (view,) = vlm.spec.towers
    vlm.spec = replace(vlm.spec, towers=(replace(view, resize=resize),))
    write(vlm, tmp_path / "out", "hf-llava")
    image = Image.effect_noise((50, 41), 80).convert("RGB")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(prepare(image, vlm.spec.towers[0]), expected, atol=1e-6)
    assert peers.load(tmp_path / "out").spec == vlm.spec


def test_a_cut_that_siglips_processor_does_not_make_is_passed_over(tmp_path: Path) -> None:
    _, folder = theirs(tmp_path, "siglip")
    side = {"height": 32, "width": 32}
    said = {"image_processor_type": "SiglipImageProcessor", "size": side, "crop_size": side, **CLIP_LIKE}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    assert peers.load(folder).spec.towers[0].resize == "squash"


TEMPLATES = {
    "{% for m in messages %}USER: {{ m['content'] }} ASSISTANT:{% endfor %}": "vicuna_v1",
    "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}": "mistral_instruct",
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}": "chatml_direct",
    "A chat between a curious human and .. {% for m in messages %}USER: {{ m['content'] }}{% endfor %}": "llava_v1",
    "": "vicuna_v1",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json"])
def test_the_chat_format_is_told_by_the_template(template: str, place: str, tmp_path: Path) -> None:
    _, folder = theirs(tmp_path)
    (folder / "chat_template.jinja").unlink()
    if template:
        text = template if place.endswith("jinja") else json.dumps({"chat_template": template})
        (folder / place).write_text(text)
    found = peers.read(folder)
    assert found.recipe.chat == TEMPLATES[template] and "chat template" in found.notes[0]


def test_what_transformers_leaves_open_is_taken_from_it(tmp_path: Path) -> None:
    """Published configs are sparse: what they do not say is what transformers' class says. Tied tables are one."""
    model, folder = theirs(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for key in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "image_seq_length",
                "tie_word_embeddings", "multimodal_projector_bias"):  # fmt: skip
        config.pop(key, None)
    config["text_config"]["model_type"] = "llama"
    config["auto_map"] = {"AutoModel": "evil.Model"}  # never looked at
    (folder / "config.json").write_text(json.dumps(config))
    vlm = peers.load(folder)
    batch, ids = row_of(vlm, torch.randn(1, 3, 32, 32))
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=batch.pixels["vision"]).logits
        torch.testing.assert_close(vlm(batch, logits="all").logits, expected, atol=1e-5, rtol=0)
    assert vlm.connector.state_dict()["0.weight"].shape == (HIDDEN, 16)


def test_a_tied_head_and_a_projector_without_biases(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, folder = theirs(tmp_path, multimodal_projector_bias=False)
    weights = load_file(folder / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    vlm = peers.load(folder)
    assert vlm.language.get_output_embeddings().weight is vlm.language.get_input_embeddings().weight
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    batch, ids = row_of(vlm, torch.randn(1, 3, 32, 32))
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=batch.pixels["vision"]).logits
        torch.testing.assert_close(vlm(batch, logits="all").logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_feature_layer": [-2, -1]}, "several layers"),
        ({"vision_feature_layer": 9}, "3 layers"),
        ({"projector_hidden_act": "relu"}, "gelu is what is known"),
        ({"vision_config": {"model_type": "pixtral"}}, "'pixtral'"),
        ({"vision_config": 3}, "no object"),
        ({"text_config": {"model_type": "gemma2"}}, "leaves out"),
        ({"text_config": {"model_type": "nobody"}}, "no language model that is known"),
        ({"image_token_index": "x"}, "refuses these settings"),
        ("template", "its chat template is none"),
        ("tokenizer", "there is no tokenizer"),
        ("stray", "belong to no part of the model: model.other.weight"),
        ("missing", "missing: connector.2.bias"),
        ("head", "no model.embed_tokens.weight"),
        ("size", "they must be the same"),
        ("odd size", "is no square"),
    ],
)
def test_what_cannot_be_composed_is_refused_in_one_line(change: Any, said: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, folder = theirs(tmp_path)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    if isinstance(change, dict):
        (folder / "config.json").write_text(json.dumps(config | change))
    if change == "template":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    if change == "tokenizer":
        (folder / "tokenizer.json").unlink()
    if change == "stray":
        weights["model.other.weight"] = torch.zeros(1)
    if change == "missing":
        del weights["multi_modal_projector.linear_2.bias"]
    if change == "head":
        del weights["language_model.model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if change in ("size", "odd size"):
        sides = {"height": 30, "width": 30 if change == "size" else 32}
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": sides, **CLIP_LIKE}))
    with pytest.raises(DataError, match=said) as caught:
        peers.load(folder)
    told = explain(caught.value)
    assert told is not None and told[0] == 3 and str(caught.value).count("\n") <= 1
