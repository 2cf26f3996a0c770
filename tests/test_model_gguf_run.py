"""GGUF files run by llama.cpp itself, through llama-cpp-python: what it answers is what the model answers here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from leveret.inputs.batches import Item, collate
from leveret.inputs.chat import encode
from leveret.inputs.tiles import prepare_all
from leveret.model.peers.write import write
from leveret.model.recipe import TilesRecipe
from leveret.model.vlm import VLM
from leveret.records import IMAGE_MARK, Batch, Turn
from leveret.runs import RecipeError
from llama_runner import LlamaCpp
from test_model_gguf import FAMILIES, IDS, MODELS, File, features_of, model_of

pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python, and llama.cpp itself is asked")
pytest.importorskip("gguf", reason="pip install 'leveret[gguf]'")

QUESTION = "Is there a red square?"
TEXT = f"<|user|><__media__>\n{QUESTION}<|assistant|>"
TOKENS = 24


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    random = np.random.default_rng([width, height, seed])
    return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))


def asked(vlm: VLM, image: Image.Image) -> tuple[Batch, list[int]]:
    """The question about an image, and its ids with -1 at the image's places."""
    sizes = [(image.height, image.width)]
    row = encode([Turn("user", f"{IMAGE_MARK}\n{QUESTION}")], vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=True)
    ids = [-1 if seen else token for token, seen in zip(row.input_ids, row.image_mask, strict=True)]
    return collate([Item(row, pixels=[prepare_all(image, vlm.spec)], sizes=sizes)], 0), ids


def greedy(vlm: VLM, batch: Batch) -> list[int]:
    vlm.language.generation_config.eos_token_id = None
    return vlm.generate(batch, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0].tolist()


@torch.no_grad()
def seen_alike(vlm: VLM, cpp: LlamaCpp, image: Image.Image, scale: float = 1.0) -> None:
    """Ids, image tokens, logits and answer. GELU is a table of float16 there: tokens to 1e-3 of the largest."""
    batch, ids = asked(vlm, image)
    found, logits = cpp.see(TEXT, image)
    assert found == ids
    tokens, _ = vlm.visual(batch)
    assert tokens is not None
    expected = tokens.reshape(-1, tokens.shape[-1]).numpy()
    np.testing.assert_allclose(cpp.tokens * scale, expected, atol=1e-3 * float(np.abs(expected).max()))
    np.testing.assert_allclose(logits, vlm(batch, logits="last").logits[0].numpy(), atol=1e-2)
    assert cpp.answer(TEXT, image, TOKENS) == greedy(vlm, batch)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_text_and_pictures_are_answered_alike(name: str, tmp_path: Path) -> None:
    """24 greedy tokens of a text and of a question about a picture; logits of the text to 1e-4 where there is no GELU
    in the language model."""
    vlm = model_of(tmp_path, name)
    write(vlm, tmp_path / "out", "gguf")
    exact = "silu" in FAMILIES[vlm.language.config.model_type].acts
    scale = vlm.language.config.hidden_size**0.5 if name.startswith("gemma") else 1.0
    with LlamaCpp(tmp_path / "out", sees=True) as cpp:
        row = torch.tensor([IDS])
        expected = vlm.language(row).logits[0].numpy()
        np.testing.assert_allclose(cpp.logits(IDS), expected, atol=1e-4 if exact else 1e-2)
        vlm.language.generation_config.eos_token_id = None
        told = {"attention_mask": torch.ones_like(row), "pad_token_id": 0}
        made = vlm.language.generate(row, max_new_tokens=TOKENS, do_sample=False, **told)
        assert cpp.greedy(IDS, TOKENS) == made[0, len(IDS) :].tolist()
        seen_alike(vlm, cpp, noise(32, 32), scale)


@pytest.mark.parametrize(
    "vision", [{"layer": -1}, {"size": 64, "layer": -3}, {"keep": ["layers", "norm"]}, {"resize": "squash"}], ids=str
)
def test_every_layer_and_size_of_siglip(vision: dict[str, Any], tmp_path: Path) -> None:
    vlm = model_of(tmp_path, "qwen2", **vision)
    write(vlm, tmp_path / "out", "gguf")
    with LlamaCpp(tmp_path / "out", sees=True) as cpp:
        seen_alike(vlm, cpp, noise(64, 64) if vision.get("size") else noise(32, 32))


def test_a_single_linear_layer(tmp_path: Path) -> None:
    vlm = model_of(tmp_path, connector="linear")
    write(vlm, tmp_path / "out", "gguf")
    with LlamaCpp(tmp_path / "out", sees=True) as cpp:
        seen_alike(vlm, cpp, noise(32, 32))


@pytest.mark.parametrize("merge", ["unpad", "spatial", "flat"])
def test_tiles_are_refused(merge: Any, tmp_path: Path) -> None:
    """libmtmd cuts as LLaVA 1.6 does, and then shows the whole image behind its tiles, without newlines."""
    vlm = model_of(tmp_path, tiles=TilesRecipe(merge=merge))
    with pytest.raises(RecipeError, match=rf"one picture, and this model sees tiles \(merge {merge}\)"):
        write(vlm, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_clip_as_it_should_be_or_as_its_issue_says(tmp_path: Path) -> None:
    """Builds that are not mended shift CLIP's features (issue 25814); from what was seen the answer is ours."""
    vlm = model_of(tmp_path, tower="clip")
    write(vlm, tmp_path / "out", "gguf")
    image, file = noise(32, 32), File(tmp_path / "out/mmproj.gguf")
    batch, ids = asked(vlm, image)
    with LlamaCpp(tmp_path / "out", sees=True) as cpp:
        found, logits = cpp.see(TEXT, image)
        made = cpp.answer(TEXT, image, TOKENS)
    assert found == ids
    pixels = batch.pixels["vision"][0]
    either = [features_of(file, pixels, shifted=shifted) for shifted in (False, True)]
    worst = [float(np.abs(cpp.tokens - one.numpy()).max()) for one in either]
    assert min(worst) < 2e-2, worst
    vlm.visual = lambda batch: (either[worst.index(min(worst))][None], 1)  # type: ignore[method-assign]
    np.testing.assert_allclose(logits, vlm(batch, logits="last").logits[0].numpy(), atol=1e-2)
    assert made == greedy(vlm, batch)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_halves(dtype: torch.dtype, most: float, tmp_path: Path) -> None:
    """Logits within the rounding of the type (llama.cpp rounds what it multiplies with, too)."""
    vlm = model_of(tmp_path)
    with torch.no_grad():
        expected = vlm.language(torch.tensor([IDS])).logits[0].numpy()
    write(vlm.cast(dtype), tmp_path / "out", "gguf")
    with LlamaCpp(tmp_path / "out") as cpp:
        found = cpp.logits(IDS)
    assert np.abs(found - expected).max() < most * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_conversation_by_the_files_own_chat_template(name: str, tmp_path: Path) -> None:
    """Messages in, text out, as llama-cpp-python's users ask."""
    import leveret
    from leveret.model import checkpoint

    vlm = model_of(tmp_path, name)
    write(vlm, tmp_path / "out", "gguf")
    checkpoint.save(vlm, tmp_path / "ours")
    turns = [Turn("user", "What is it?"), Turn("assistant", "a red square"), Turn("user", QUESTION)]
    with LlamaCpp(tmp_path / "out") as cpp:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        told = cpp.llama.create_chat_completion(messages, max_tokens=TOKENS, temperature=0, repeat_penalty=1.0)
    model = leveret.load(tmp_path / "ours", "cpu", precision="fp32")
    # it leaves broken bytes out, and goes on while a character is not whole
    answer = "".join(model.chat(turns, max_new_tokens=TOKENS)).replace("\ufffd", "").strip()
    assert len(answer) > 10 and told["choices"][0]["message"]["content"].strip().startswith(answer)
