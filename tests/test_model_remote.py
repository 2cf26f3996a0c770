"""Models of ours in transformers: our folders by `leveret.register`, and folders with their own code where leveret is
not installed (`convert --to remote-code`)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import leveret
from fakes import HIDDEN, loud, tiny_batch, tiny_language_folder, tiny_tokenizer, tiny_vision_folder, tiny_vlm
from leveret import images
from leveret.cli import run
from leveret.generate.engine import Engine, Request
from leveret.inputs.batches import Item, collate
from leveret.inputs.chat import CHATS, encode
from leveret.inputs.resize import prepare
from leveret.inputs.tiles import prepare_all
from leveret.model import checkpoint, peers
from leveret.model.build import build
from leveret.model.connectors import CONNECTORS, build_connector, read_settings
from leveret.model.peers import remote
from leveret.model.peers.convert import convert
from leveret.model.peers.write import write
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, TilesRecipe, TowerRecipe, VisionRecipe
from leveret.model.vlm import VLM
from leveret.records import IMAGE_MARK, Batch, ImageRef, TowerView, Turn
from leveret.runs import RecipeError
from nanovlm_fakes import Nano
from tower_fakes import CLASSES, eva_file, toy

TESTS = Path(__file__).resolve().parent
QUESTIONS = ("what colour is the circle ?", "is there a green triangle in the image ? yes or no")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with transparency, which is laid over white before anything else."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(random.integers(0, 256, (37, 61, 4), dtype=np.uint8), "RGBA").save(path)
    return path


def world() -> VLM:
    """The drawn world's parts as they are shipped; its connector has not learned."""
    return build(
        ModelRecipe(
            vision=VisionRecipe(tower="world/vision"),
            connector=ConnectorRecipe(kind="residual_2d", dropout=0.2),
            language=LanguageRecipe(name="world/language"),
            chat="tiny",
        )
    )


def phi(folder: Path) -> VLM:
    """CLIP at two scales, pixel shuffle, and a Phi whose output layer has a bias and whose tokenizer has no mark."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = loud(PhiForCausalLM(PhiConfig(vocab_size=320, max_position_embeddings=256, **sizes)))
    model.lm_head.bias.data.normal_()
    model.save_pretrained(folder / "phi")
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != IMAGE_MARK]
    tokenizer.save_pretrained(folder / "phi")
    (folder / "phi" / "tokenizer.json").write_text(json.dumps(state))
    config = json.loads((folder / "phi" / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = ["<|user|>", "<|assistant|>"]
    (folder / "phi" / "tokenizer_config.json").write_text(json.dumps(config))
    toy("clip_vision_model").save_pretrained(folder / "clip")
    return build(
        ModelRecipe(
            vision=VisionRecipe(tower=str(folder / "clip"), s2=[32, 64]),
            connector=ConnectorRecipe(kind="pixel_shuffle", options={"bias": True}),
            language=LanguageRecipe(name=str(folder / "phi")),
            chat="tiny",
        )
    )


def fused(folder: Path) -> VLM:
    """An EVA tower and a DINOv2 of other sizes, side by side in width."""
    toy("dinov2").save_pretrained(folder / "dinov2")
    towers = [
        TowerRecipe(tower=str(eva_file(folder / "eva.pt"))),
        TowerRecipe(tower=str(folder / "dinov2"), tokens="patch", size=32),
    ]
    return build(
        ModelRecipe(
            vision=VisionRecipe(towers=towers),
            connector=ConnectorRecipe(kind="resampler", options={"queries": 3, "layers": 1, "heads": 2}),
            language=LanguageRecipe(name=str(tiny_language_folder())),
            chat="tiny",
        )
    )


def tiles(folder: Path, limit: int = 0) -> VLM:
    """LLaVA 1.6's tiles, with newlines, seen by two towers side by side."""
    toy("dinov2").save_pretrained(folder / "dinov2-tiles")
    towers = [TowerRecipe(tower=str(tiny_vision_folder())), TowerRecipe(tower=str(folder / "dinov2-tiles"), size=32)]
    grids = TilesRecipe(grids=[(1, 2), (2, 1), (2, 2)], limit=limit)
    return build(
        ModelRecipe(
            vision=VisionRecipe(towers=[tower.model_copy(update={"tokens": "patch"}) for tower in towers], tiles=grids),
            connector=ConnectorRecipe(kind="mlp2x_gelu"),
            language=LanguageRecipe(name=str(tiny_language_folder())),
            chat="tiny",
        )
    )


def split(folder: Path) -> VLM:
    """nanoVLM's tiles, each with a token of its own before it."""
    nano = Nano(folder / "nano", "global")
    return peers.load(nano.folder, hub=nano.hub)


KINDS = (
    "siglip-mlp-llama", "world", "clip-s2-shuffle-phi", "eva-dino-resampler-llama", "tiles-newlines", "tiles-tokens"
)  # fmt: skip
VIEWS = [
    TowerView("a", 32),
    TowerView("b", 24, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "pad"),
    TowerView("c", 28, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "crop", "bicubic", 32),
    TowerView("d", 27, resize="centre", resample="bilinear"),
    TowerView("e", 33, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "letterbox"),
]


class Elsewhere:
    """The models as we have them, and what a process without leveret made of their folders."""

    def __init__(self, folder: Path, models: dict[str, VLM], picture: Path, seen: list[Path]) -> None:
        self.models = models
        self.folders: dict[str, Path] = {}
        for name, vlm in self.models.items():
            checkpoint.save(vlm, folder / "ours" / name)
            convert(folder / "ours" / name, folder / "theirs" / name, to="remote-code")
            self.folders[name] = folder / "theirs" / name
        gone = folder / "without" / "leveret"
        gone.mkdir(parents=True)
        (gone / "__init__.py").write_text("raise ImportError('leveret is not here')\n")
        job = {
            "models": {name: str(path) for name, path in self.folders.items()},
            "image": str(picture), "questions": QUESTIONS, "images": list(map(str, seen)),
            "views": [asdict(view) for view in VIEWS] if seen else [],
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        told = {"PYTHONPATH": str(gone.parent), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(TESTS / "remote_reader.py"), str(folder / "job.json"), str(folder / "out.npz")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **told}, cwd=folder)
        assert done.returncode == 0, done.stderr[-4000:]
        with np.load(folder / "out.npz") as arrays:
            self.found = dict(arrays)


PARITY = Path(os.environ.get("LEVERET_PARITY", TESTS.parents[1] / "shared" / "parity"))
IMAGES = sorted(path for end in ("png", "jpg") for path in PARITY.rglob(f"*.{end}")) if PARITY.is_dir() else []


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> Elsewhere:
    folder = tmp_path_factory.mktemp("elsewhere")
    made = (tiny_vlm(), world(), phi(folder), fused(folder), tiles(folder), split(folder))
    return Elsewhere(folder, dict(zip(KINDS, made, strict=True)), picture, IMAGES)


def asked(vlm: VLM, question: str, picture: Path) -> tuple[Batch, list[int]]:
    """Our own batch of one question about a picture, and its ids with the published id at the image's positions."""
    image = images.load(ImageRef(str(picture)))
    turns = (Turn("user", f"{IMAGE_MARK}\n{question}"),)
    sizes = [(image.height, image.width)]
    row = encode(turns, vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=True)
    mark = checkpoint.config_of(vlm)["image_token_id"]
    ids = [mark if seen else token for token, seen in zip(row.input_ids, row.image_mask, strict=True)]
    return collate([Item(row, pixels=[prepare_all(image, vlm.spec)], sizes=sizes)], 0), ids


@pytest.mark.parametrize("name", KINDS)
def test_a_published_model_is_the_same_without_leveret(elsewhere: Elsewhere, name: str, picture: Path) -> None:
    same(elsewhere, name, picture)


def peers_models(parity: Path) -> dict[str, VLM]:
    """One model of every family: tokenizers with a start token (SentencePiece's and bytes), fused towers, S2, others'
    chat formats."""
    models = {}
    for path in sorted(parity.glob("*/cases.json")):
        said, family = json.loads(path.read_text()), path.parent
        if not any(family.glob("checkpoint*")):
            continue
        folder = family / (said["cases"][0].get("checkpoint") or next(family.glob("checkpoint*")).name)
        base = said["cases"][0].get("base")
        base = str(family / base) if base and (family / base).exists() else base
        told = {"hub": family / "hub", "size": said["meta"].get("default_image_size"), "dtype": torch.float32}
        models[family.name] = peers.load(folder, base=base, **told)
    return models


@pytest.mark.parity
def test_peers_models_can_be_published(parity: Path, tmp_path: Path) -> None:
    for name, vlm in peers_models(parity).items():  # writing compares ids and logits, and refuses what differs
        write(vlm, tmp_path / name, "remote-code")
        back = checkpoint.load(tmp_path / name)
        more = {*back.tokenizer.get_vocab().items()} - {*vlm.tokenizer.get_vocab().items()}
        assert back.chat == vlm.chat and {token for token, _ in more} <= {IMAGE_MARK}


@pytest.mark.parity
@pytest.mark.slow
def test_peers_published_models_are_the_same_without_leveret(parity: Path, tmp_path: Path, picture: Path) -> None:
    elsewhere = Elsewhere(tmp_path, peers_models(parity), picture, [])
    for name in elsewhere.models:
        same(elsewhere, name, picture)


def same(elsewhere: Elsewhere, name: str, picture: Path) -> None:
    """What was made of a folder without leveret is what leveret makes of it."""
    vlm = elsewhere.models[name]
    found = {key.partition("/")[2]: value for key, value in elsewhere.found.items() if key.startswith(f"{name}/")}
    for number, question in enumerate(QUESTIONS):
        batch, ids = asked(vlm, question, picture)
        assert found[f"ids{number}"].tolist() == ids
        with torch.no_grad():
            logits = vlm(batch, logits="all").logits[0].numpy()
        assert np.abs(found[f"logits{number}"] - logits).max() <= 1e-5 * max(1.0, np.abs(logits).max())
        greedy = vlm.generate(batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0].tolist()
        assert found[f"greedy{number}"].tolist() == greedy
        # in a batch with another, padded
        assert np.abs(found[f"padded_logits{number}"] - logits).max() <= 1e-4 * max(1.0, np.abs(logits).max())
        assert found["padded_greedy"][number].tolist() == greedy
    batch, ids = asked(vlm, QUESTIONS[0], picture)
    sizes = [view.size for view in vlm.spec.towers]
    pixels = found["pixels"] if vlm.spec.tiling is None else found["pixels"][0]
    seen = [pixels] if len(sizes) == 1 else [pixels[:, place] for place in range(len(sizes))]
    for view, pixels in zip(vlm.spec.towers, seen, strict=True):
        assert np.array_equal(pixels[..., : view.size, : view.size], batch.pixels[view.name].numpy())
    text = encode((Turn("user", QUESTIONS[0]),), vlm.chat, vlm.tokenizer, vlm.spec, (), generate=True)
    assert found["ids_text"].tolist() == text.input_ids
    # saved there and loaded again
    assert found["again_ids"].tolist() == ids and np.array_equal(found["again_pixels"], found["pixels"])
    assert np.array_equal(found["again_logits"], found["logits0"])


@pytest.mark.parity
@pytest.mark.skipif(not IMAGES, reason=f"no parity images in {PARITY}; LEVERET_PARITY names another place")
def test_a_published_processor_makes_our_pixels_of_every_parity_image(elsewhere: Elsewhere) -> None:
    for number, view in enumerate(VIEWS):
        for path in IMAGES:
            ours = prepare(images.load(ImageRef(str(path))), view)
            assert np.array_equal(elsewhere.found[f"{number}:{path}"], ours), (view, path)


def test_a_published_folder_is_read_back(elsewhere: Elsewhere, picture: Path, tmp_path: Path) -> None:
    """By leveret too, under our names, to the bit; nothing in it tells where on this machine its parts were."""
    for name, folder in elsewhere.folders.items():
        back, vlm = checkpoint.load(folder), elsewhere.models[name]
        mine = vlm.state_dict()
        assert all(torch.equal(tensor, mine[key]) for key, tensor in back.state_dict().items())
        text = (folder / "config.json").read_text() + (folder / "README.md").read_text()
        assert str(folder.parent.parent) not in text and "leveret-fakes" not in text
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".py", ".jinja", ".md", ".safetensors"}
    answer = leveret.load(folder, precision="fp32").ask(picture, QUESTIONS[0])
    assert answer == leveret.load(folder.parents[1] / "ours" / name, precision="fp32").ask(picture, QUESTIONS[0])
    convert(folder, tmp_path / "back")
    assert checkpoint.load(tmp_path / "back").spec == vlm.spec


@pytest.mark.parametrize("kind", [*CONNECTORS, "mlp4x_gelu"])
def test_every_connector_travels_by_its_own_source(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"qformer": {"width": 24, "heads": 2, "layers": 2}, "resampler_paper": {"width": 24, "heads": 2}}
    width = 32 if kind in ("identity", "spp") else 16
    settings = read_settings(kind, options.get(kind, {})).model_dump()
    ours = loud(build_connector(kind, width, 32, 16, settings)).eval()
    vlm = tiny_vlm()
    vlm.recipe = vlm.recipe.model_copy(update={"connector": ConnectorRecipe(kind=kind, options=settings)})
    text = remote._modeling(vlm)
    named = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not any(name.startswith("leveret") for name in named)
    there: Any = ModuleType("modeling_leveret")
    monkeypatch.setitem(sys.modules, "modeling_leveret", there)
    exec(compile(text, "modeling_leveret.py", "exec"), there.__dict__)
    theirs = there.build_connector(kind, width, 32, 16, settings).eval()
    assert type(theirs).__module__ != type(ours).__module__ or type(ours).__module__.startswith("torch.")
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(2, 16, width)
    with torch.no_grad():
        assert torch.equal(theirs(features), ours(features))


TOWERS = [*CLASSES, "tiny"]
LANGUAGES = {
    "granite": ("Granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 4.0, "head_dim": 8, "tie_word_embeddings": True}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "phi3": ("Phi3", {}), "qwen2": ("Qwen2", {"tie_word_embeddings": True}), "stablelm": ("StableLm", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*TOWERS, *LANGUAGES])
def test_every_part_computes_the_same_when_loaded(kind: str, tmp_path: Path) -> None:
    """Written, then loaded from the files: towers by their configuration, language models with what they do to their
    logits, tied tables, buffers that no file holds."""
    import transformers

    from leveret.model.hf import LeveretForConditionalGeneration, LeveretModel

    tower, language, options = "world/vision", str(tiny_language_folder()), {}
    if kind in CLASSES:
        toy(kind).save_pretrained(tmp_path / "tower")
        tower, options = str(tmp_path / "tower"), {"size": 32}
    elif kind in LANGUAGES:
        name, more = LANGUAGES[kind]
        sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        config = getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=4, pad_token_id=0, **more)
        loud(getattr(transformers, f"{name}ForCausalLM")(config)).save_pretrained(tmp_path / "language")
        tiny_tokenizer().save_pretrained(tmp_path / "language")
        language = str(tmp_path / "language")
    vlm = build(
        ModelRecipe(
            vision=VisionRecipe(tower=tower, **options), language=LanguageRecipe(name=language),
            connector=ConnectorRecipe(kind="linear"), chat="tiny",
        )
    )  # fmt: skip
    write(vlm, tmp_path / "out", "remote-code")
    model = LeveretForConditionalGeneration.from_pretrained(tmp_path / "out")
    batch = tiny_batch(vlm, lengths=(vlm.spec.tokens + 8,), images=(True,))
    ids = batch.input_ids.masked_fill(batch.image_mask, model.config.image_token_id)
    with torch.no_grad():
        logits = vlm(batch, logits="all").logits
        found = model(input_ids=ids, pixel_values=batch.pixels["vision"]).logits
    assert (found - logits).abs().max() <= 1e-5 * max(1.0, float(logits.abs().max()))
    if kind == "dinov3_vit":  # transformers renames `layer_scale` of one two levels down, and then misses it
        return
    checkpoint.save(vlm, tmp_path / "ours")
    for folder in ("out", "ours"):
        _, report = LeveretModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["missing_keys"]


# --- where leveret is installed ---------------------------------------------------------------------------------------


def test_registering_loads_nothing_before_it_is_asked_for() -> None:
    code = "import sys, leveret, leveret.cli; print('transformers' in sys.modules, 'register' in leveret.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_our_folders_load_by_the_auto_classes(tmp_path: Path, picture: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    vlm = tiny_vlm(connector="residual_2d")
    folder = checkpoint.save(vlm, tmp_path / "model")
    leveret.register()
    leveret.register()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

    batch = tiny_batch(vlm, images=(True, False))
    ids = batch.input_ids.masked_fill(batch.image_mask, model.config.image_token_id)
    told = {"input_ids": ids, "pixel_values": batch.pixels["vision"], "attention_mask": batch.attention_mask.long()}
    with torch.no_grad():
        found, ours = model(**told, labels=batch.labels), vlm(batch)
        assert torch.allclose(found.loss, ours.loss_sum / ours.supervised)
        logits = vlm(batch, logits="all").logits
    assert torch.allclose(found.logits[batch.attention_mask], logits[batch.attention_mask], atol=1e-5)
    assert model(**told, logits_to_keep=1).logits.shape == (2, 1, logits.shape[-1])

    parts = [{"type": "image", "path": str(picture)}, {"type": "text", "text": QUESTIONS[0]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    turns = (Turn("user", f"{IMAGE_MARK}\n{QUESTIONS[0]}"),)
    request = Request("", (ImageRef(str(picture)),), turns, max_new_tokens=12)
    answer = Engine(vlm, precision="fp32").answer([request])[0]
    assert processor.decode(made, skip_special_tokens=True).strip() == answer.text

    model.train()(**told, labels=batch.labels).loss.backward()
    assert model.model.multi_modal_projector.straight.weight.grad.abs().sum() > 0
    again = tmp_path / "again"
    model.save_pretrained(again)
    back = checkpoint.load(again)  # a folder of ours, but for its tokenizer
    assert all(torch.equal(tensor, vlm.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_the_template_marks_what_an_assistant_said(picture: Path) -> None:
    from leveret.model.hf_inputs import processor_for

    vlm = tiny_vlm()
    processor = processor_for(vlm.spec, vlm.chat, vlm.tokenizer)
    image = {"type": "image", "image": Image.open(picture)}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": " what is it ? "}, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": "and what colour ? "},
        {"role": "assistant", "content": "red"},
    ]
    turns = (
        Turn("user", f"what is it ?{IMAGE_MARK}"), Turn("assistant", "a red circle"),
        Turn("user", "and what colour ? "), Turn("assistant", "red"),
    )  # fmt: skip
    ours = encode(turns, vlm.chat, vlm.tokenizer, vlm.spec, [(37, 61)])
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"][0] == ours.input_ids
    assert [bool(said) for said in found["assistant_masks"][0]] == [label != -100 for label in ours.labels]


@pytest.mark.parametrize("chat", [name for name, form in CHATS.items() if not form.faithful])
def test_chat_formats_are_written_or_refused(chat: str) -> None:
    """What is written gives our ids (`written` checks it); every format of our own and of others' corrected is."""
    from leveret.model.hf_inputs import processor_for

    vlm = tiny_vlm(chat=chat)
    vlm.tokenizer.add_tokens([text for text in CHATS[chat].stop if text.strip()], special_tokens=True)
    remote._same_ids(vlm, processor_for(vlm.spec, chat, vlm.tokenizer))


# --- refused ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_published_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(vlm: VLM, words: str) -> None:
        with pytest.raises(RecipeError, match=words):
            write(vlm, tmp_path / "out", "remote-code")
        assert not list(tmp_path.glob("*out*"))

    vlm = tiny_vlm()
    vlm.tokenizer = None
    refused(vlm, "needs a tokenizer")
    vlm = tiny_vlm()
    vlm.language.lm_head.register_forward_hook(lambda _, args, out: out)
    vlm.language.base_model_prefix = "transformer"
    refused(vlm, "`model` and `lm_head`")
    vlm = tiny_vlm()
    inner = vlm.language.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    vlm.language.forward = odd
    refused(vlm, "behind its output layer")

    folder = checkpoint.save(tiny_vlm(), tmp_path / "model")
    assert run(["convert", str(folder), str(tmp_path / "x"), "--to", "remote"]) == 2
    assert "did you mean remote-code?" in capsys.readouterr().err
    assert run(["convert", str(folder), str(tmp_path / "x"), "--to", "remote-code"]) == 0
    assert (tmp_path / "x" / "modeling_leveret.py").is_file()


def test_a_picture_that_is_none_is_refused(picture: Path) -> None:
    from leveret.model.hf_inputs import processor_for

    vlm = tiny_vlm()
    processor = processor_for(vlm.spec, vlm.chat, vlm.tokenizer)
    array = np.asarray(Image.open(picture).convert("RGB"))
    taken = processor.image_processor(array)["pixel_values"]
    assert np.array_equal(taken[0], prepare(Image.fromarray(array), vlm.spec.towers[0]))
    for odd in (array.astype(np.float32) / 255, array.transpose(2, 0, 1)):
        with pytest.raises(ValueError, match="uint8 array"):
            processor.image_processor(odd)
    with pytest.raises(ValueError, match="give images, text, or both"):
        processor()
    with pytest.raises(ValueError, match="would cut an image"):
        processor(images=array, text="<|user|><image>", truncation=True, max_length=3)
    with pytest.raises(ValueError, match="2 <image> in the text, but 1 image"):
        processor(images=array, text="<image><image>")


# --- images in tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiles-newlines", "tiles-limit", "tiles-tokens"])
@torch.no_grad()
def test_images_of_several_shapes_are_seen_in_tiles(kind: str, tmp_path: Path) -> None:
    """Two images in one text and one in another, of one to five pictures: our ids, pixels, logits, and refusals."""
    from leveret.model.hf import LeveretForConditionalGeneration
    from leveret.model.hf_inputs import FolderProcessor

    vlm = split(tmp_path) if kind == "tiles-tokens" else tiles(tmp_path, limit=int(kind == "tiles-limit"))
    assert vlm.tiles is not None
    write(vlm, tmp_path / "published", "remote-code")  # which compares ids and logits
    folder = checkpoint.save(vlm, tmp_path / "model")
    processor = FolderProcessor.from_pretrained(folder)
    model = LeveretForConditionalGeneration.from_pretrained(folder)
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((20, 19), (41, 90), (70, 33))
    ]
    said = [[{"type": "image", "image": picture} for picture in some] for some in (pictures[:2], pictures[2:])]
    asked = [[{"role": "user", "content": [*some, {"type": "text", "text": "How many?"}]}] for some in said]
    given = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    items = []
    for some in (pictures[:2], pictures[2:]):
        sizes = [(picture.height, picture.width) for picture in some]
        turns = [Turn("user", f"{IMAGE_MARK}\n" * len(some) + "How many?")]
        row = encode(turns, vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=True)
        items.append(Item(row, pixels=[prepare_all(picture, vlm.spec) for picture in some], sizes=sizes))
    batch = collate(items, processor.tokenizer.pad_token_id, "left")
    ids = batch.input_ids.masked_fill(batch.image_mask, processor.image_token_id)
    assert torch.equal(given["input_ids"], ids) and given["image_sizes"].tolist() == [[20, 19], [41, 90], [70, 33]]
    logits = vlm(batch, logits="all").logits
    real = batch.attention_mask
    assert torch.allclose(model(**given).logits[real], logits[real], atol=1e-5 * max(1.0, float(logits.abs().max())))
    told = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    made = model.generate(**given, **told)[:, ids.shape[1] :]
    assert torch.equal(made, vlm.generate(batch, **told))
    seen = model.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output
    assert [len(tokens) for tokens in seen] == [vlm.spec.count(*size) for size in given["image_sizes"].tolist()]

    with pytest.raises(ValueError, match="give image_sizes"):
        model(input_ids=ids, pixel_values=given["pixel_values"])
    with pytest.raises(ValueError, match="tiles, but"):
        model(**{**given, "pixel_values": given["pixel_values"][:, :1]})


def test_the_code_of_a_model_without_tiles_says_nothing_of_them(elsewhere: Elsewhere) -> None:
    for name, folder in elsewhere.folders.items():
        for file in ("modeling_leveret.py", "processing_leveret.py"):
            assert ("class Tiling:" in (folder / file).read_text()) == name.startswith("tiles"), (name, file)
            assert "pydantic" not in (folder / file).read_text()
