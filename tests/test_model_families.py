"""Every family of language models as part of a model: it learns, it answers, and a row's company changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fakes import HIDDEN, LLAMA, VOCAB, loud, packed, take, tiny_batch, tiny_recipe, tiny_tokenizer
from language_fakes import FAMILIES, WINDOW, toy_vlm
from leveret.generate import Engine, Request
from leveret.images import load as load_image
from leveret.inputs import Item, collate, encode, prepare
from leveret.model.build import build
from leveret.model.language import LANGUAGES, describe
from leveret.model.recipe import LanguageRecipe
from leveret.model.vlm import VLM
from leveret.records import ImageRef, Turn
from leveret.runs import DataError, RecipeError
from test_generate_engine import picture

_built: dict[str, VLM] = {}


@pytest.fixture(params=FAMILIES)
def vlm(request: pytest.FixtureRequest) -> VLM:
    name = FAMILIES[request.param]
    if name not in _built:
        _built[name] = toy_vlm(name)
    return _built[name].eval()


def test_every_architecture_of_the_table_is_a_family_here() -> None:
    kinds = {name: describe(LanguageRecipe(name=name)).config["model_type"] for name in LANGUAGES}
    assert {kinds[name] for name in FAMILIES.values()} == set(kinds.values())


def test_it_learns(vlm: VLM) -> None:
    batch = tiny_batch(vlm, (14, 11))
    out = vlm(batch)
    assert out.logits.shape == (6, VOCAB) and out.logits.isfinite().all()
    assert out.logits.std() > 0.05, "the weights are too quiet to show a difference"
    out.loss_sum.backward()
    silent = [name for name, p in vlm.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent
    still = [name for name, p in vlm.connector.named_parameters() if not p.grad.abs().sum()]
    assert not still, "the picture does not reach the loss"
    vlm.zero_grad(set_to_none=True)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_changes_nothing(vlm: VLM, side: str) -> None:
    lengths, images = (17, 9, 12), (True, True, True)
    batch = tiny_batch(vlm, lengths, images, side)
    together, last = vlm(batch, logits="all").logits, vlm(batch, logits="last").logits
    for row, length in enumerate(lengths):
        alone = vlm(take(batch, row, length, side), logits="all").logits[0]
        torch.testing.assert_close(together[row][batch.attention_mask[row]], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last[row], alone[-1], atol=1e-5, rtol=1e-5)
        assert torch.equal(together[row][batch.attention_mask[row]].argmax(-1), alone.argmax(-1))


@torch.no_grad()
def test_packed_samples_do_not_see_each_other(vlm: VLM) -> None:
    lengths = (14, 9, 11)
    batch = tiny_batch(vlm, lengths, (True, True, True))
    row = vlm(packed(batch, lengths, padding=2), logits="all").logits[0]
    first = 0
    for place, length in enumerate(lengths):
        alone = vlm(take(batch, place, length), logits="all").logits[0]
        torch.testing.assert_close(row[first : first + length], alone, atol=1e-5, rtol=1e-5)
        assert torch.equal(row[first : first + length].argmax(-1), alone.argmax(-1))
        first += length


def questions() -> list[tuple[ImageRef, str]]:
    asked = ("what colour ?", "how many red squares are above the blue circle in the image ?", "is there a big A ?")
    return [(picture(seed), text) for seed, text in enumerate(asked)]


def test_the_engine_answers_what_transformers_answers(vlm: VLM) -> None:
    """Ragged prompts, one picture each: in one batch of transformers' generate, one by one there, and in our slots."""
    items, requests = [], []
    for place, (ref, text) in enumerate(questions()):
        turns, image = (Turn("user", f"<image>\n{text}"),), load_image(ref)
        encoded = encode(turns, vlm.chat, vlm.tokenizer, vlm.spec, [(image.height, image.width)], generate=True)
        items.append(Item(encoded, pixels=[{view.name: prepare(image, view) for view in vlm.spec.towers}]))
        requests.append(Request(str(place), (ref,), turns, max_new_tokens=8))
    assert min(len(item.encoded.input_ids) for item in items) > WINDOW
    options = {"max_new_tokens": 8, "do_sample": False}
    together = vlm.generate(collate(items, 0, side="left"), **options).tolist()
    alone = [vlm.generate(collate([item], 0), **options)[0].tolist() for item in items]
    end = vlm.tokenizer.eos_token_id
    cut = [row[: row.index(end)] if end in row else row for row in alone]
    assert [row[: row.index(end)] if end in row else row for row in together] == cut
    for slots in (1, 3):
        answers = Engine(vlm, slots=slots, precision="fp32").answer(requests)
        assert [len(row) for row in cut] == [answer.meta["tokens"] for answer in answers]
        said = [vlm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut]
        assert [answer.text for answer in answers] == said


def test_an_answer_ends_where_the_angles_change() -> None:
    """Phi-4-mini turns all rows by other angles as soon as one passes a length; the engine goes up to there."""
    vlm = toy_vlm(FAMILIES["Phi-4-mini"])
    config = vlm.language.config
    assert config.rope_parameters["short_factor"] != config.rope_parameters["long_factor"]
    config.rope_parameters["original_max_position_embeddings"] = 40
    (ref, text), request = questions()[1], {"max_new_tokens": 64}
    turns = (Turn("user", f"<image>\n{text}"),)
    (answer,) = Engine(vlm, precision="fp32").answer([Request("q", (ref,), turns, **request)])
    prompt = len(encode(turns, vlm.chat, vlm.tokenizer, vlm.spec, [(1, 1)], generate=True).input_ids)
    assert prompt < 40 and answer.meta["tokens"] <= 40 - prompt
    config.rope_parameters["original_max_position_embeddings"] = prompt
    with pytest.raises(DataError, match=f"fills {prompt} positions and the model has {prompt}"):
        Engine(vlm, precision="fp32").answer([Request("q", (ref,), turns, **request)])


def test_minicpm_is_granite_by_other_names(tmp_path: Path) -> None:
    """A folder of MiniCPM's own kind is read without its code: each of its four scales where its own forward has it."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    scales = {
        "embedding_multiplier": 12.0, "residual_multiplier": 1.4 / 2**0.5, "logits_scaling": HIDDEN / 16,
        "attention_multiplier": 8**-0.5,
    }  # fmt: skip
    sizes = {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True}
    granite = loud(GraniteForCausalLM(GraniteConfig(**sizes, **scales)), 0.1).eval()
    granite.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    theirs = {
        **sizes, "model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16,
        "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    vlm = build(tiny_recipe().model_copy(update={"language": LanguageRecipe(name=str(tmp_path))}))
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        torch.testing.assert_close(vlm.language(ids).logits, granite(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["apple/OpenELM-450M-Instruct", "folder"])
def test_openelm_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openelm", "num_query_heads": [12, 16]}))
    with pytest.raises(RecipeError, match="its layers differ in heads and width"):
        describe(LanguageRecipe(name=str(tmp_path) if name == "folder" else name))
