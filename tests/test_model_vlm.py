"""The model's one forward pass: against transformers' own LLaVA, against itself, and against mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import (
    LLAMA,
    SIDE,
    SIGLIP,
    VOCAB,
    loud,
    packed,
    take,
    tiny_batch,
    tiny_language_folder,
    tiny_recipe,
    tiny_tokenizer,
    tiny_vlm,
)
from leveret.model.build import build
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe
from leveret.model.vlm import VLM
from leveret.records import IGNORE

IMAGE_ID = 4


def llava(vision: str, folder: Path) -> tuple[object, VLM]:
    """transformers' LLaVA with random weights, and our model with the same ones, read from folders."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    torch.manual_seed(1)
    seen = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}[vision](**SIGLIP)
    config = LlavaConfig(
        vision_config=seen, text_config=LlamaConfig(**LLAMA), image_token_id=IMAGE_ID, vision_feature_layer=-2,
        vision_feature_select_strategy="full" if vision == "siglip" else "default",
    )  # fmt: skip
    theirs = loud(LlavaForConditionalGeneration(config)).eval()
    theirs.model.vision_tower.save_pretrained(folder / "vision")
    language = LlamaForCausalLM(theirs.model.language_model.config)
    language.model.load_state_dict(theirs.model.language_model.state_dict())
    language.lm_head.load_state_dict(theirs.lm_head.state_dict())
    language.save_pretrained(folder / "language")
    tiny_tokenizer().save_pretrained(folder / "language")
    ours = build(
        ModelRecipe(
            vision=VisionRecipe(tower=str(folder / "vision")),
            language=LanguageRecipe(name=str(folder / "language")),
            chat="tiny",
        )
    )
    projector = theirs.model.multi_modal_projector.state_dict()
    ours.connector.load_state_dict(
        {f"{i}.{kind}": projector[f"linear_{n}.{kind}"] for n, i in ((1, 0), (2, 2)) for kind in ("weight", "bias")}
    )
    return theirs, ours


@pytest.mark.parametrize("vision", ["siglip", "clip"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_transformers_llava(vision: str, side: str, tmp_path: Path) -> None:
    theirs, ours = llava(vision, tmp_path)
    batch = tiny_batch(ours, (14, 10), (True, True), side)
    ids = batch.input_ids.masked_fill(batch.image_mask, IMAGE_ID)
    with torch.no_grad():
        expected = theirs(  # type: ignore[operator]
            input_ids=ids, pixel_values=batch.pixels["vision"], attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
        ).logits  # fmt: skip
        got = ours(batch, logits="all").logits
    real = batch.attention_mask
    assert expected[real].std() > 0.5, "the weights are too quiet to show a difference"
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


def test_supervised_rows_give_the_loss_of_all_rows() -> None:
    vlm = tiny_vlm()
    batch = tiny_batch(vlm)
    every, few = vlm(batch, logits="all"), vlm(batch, logits="supervised")
    shifted = every.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(
        shifted, batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert few.supervised == every.supervised == int((batch.labels[:, 1:] != IGNORE).sum())
    assert few.logits.shape == (few.supervised, VOCAB)
    torch.testing.assert_close(few.loss_sum, expected)
    torch.testing.assert_close(every.loss_sum, expected)
    few.loss_sum.backward()
    gradients = [p.grad.clone() for p in vlm.parameters() if p.grad is not None]
    vlm.zero_grad()
    vlm(batch, logits="all").loss_sum.backward()
    again = [p.grad for p in vlm.parameters() if p.grad is not None]
    assert len(gradients) == len(again) == len(list(vlm.parameters())), "every parameter learns"
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side: str) -> None:
    vlm = tiny_vlm()
    lengths = (15, 9)
    batch = tiny_batch(vlm, lengths, (True, True), side)
    together = vlm(batch, logits="all").logits
    last = vlm(batch, logits="last").logits
    for row, length in enumerate(lengths):
        alone = vlm(take(batch, row, length, side), logits="all").logits[0]
        torch.testing.assert_close(together[row][batch.attention_mask[row]], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(last[row], alone[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(8, 14), min_size=2, max_size=3).map(tuple), padding=st.integers(0, 3))
def test_packed_samples_do_not_see_each_other(attention: str, lengths: tuple[int, ...], padding: int) -> None:
    vlm = _packing_vlm(attention)
    batch = tiny_batch(vlm, lengths, (True,) * len(lengths))
    # a label on a sample's first token: across the border it must not be learned from the sample before
    batch.labels[:, 0] = batch.input_ids[:, 0]
    row = packed(batch, lengths, padding)
    one, many = vlm(row), vlm(batch)
    assert one.supervised == many.supervised == 3 * len(lengths)
    torch.testing.assert_close(one.loss_sum, many.loss_sum, atol=3e-5, rtol=0)  # of some ten tokens
    torch.testing.assert_close(one.logits, many.logits, atol=1e-5, rtol=0)


_built: dict[str, VLM] = {}


def _packing_vlm(attention: str) -> VLM:
    if attention not in _built:
        recipe = tiny_recipe()
        language = recipe.language.model_copy(update={"attention": attention})
        _built[attention] = build(recipe.model_copy(update={"language": language}))
        assert _built[attention].language.config._attn_implementation == attention
    return _built[attention]


def test_text_only_batches_never_touch_the_tower() -> None:
    vlm = tiny_vlm()
    batch = tiny_batch(vlm, (9, 7), (False, False))
    vlm.towers["vision"].forward = lambda pixels: pytest.fail("the tower ran")  # type: ignore[method-assign]
    vlm.connector.forward = lambda features: pytest.fail("the connector ran")  # type: ignore[method-assign]
    plain = vlm.language(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    real = batch.attention_mask
    torch.testing.assert_close(vlm(batch, logits="all").logits[real], plain[real])


def test_ids_at_image_positions_do_not_matter() -> None:
    vlm = tiny_vlm()
    batch = tiny_batch(vlm)
    other = replace(batch, input_ids=batch.input_ids.masked_fill(batch.image_mask, 7))
    assert torch.equal(vlm(batch).logits, vlm(other).logits)


def test_features_stand_for_pixels() -> None:
    vlm = tiny_vlm()
    batch = tiny_batch(vlm)
    cached = replace(batch, pixels={}, features=vlm.see(batch.pixels))
    assert torch.equal(vlm(batch).logits, vlm(cached).logits)


def test_images_land_in_reading_order() -> None:
    vlm = tiny_vlm()
    batch = tiny_batch(vlm, (12, 12), (True, True))
    visual = vlm.connector(vlm.see(batch.pixels))
    embedded = vlm.embed(batch)
    for row in range(2):
        assert torch.equal(embedded[row, 1 : 1 + vlm.spec.tokens], visual[row])


def test_a_mismatch_names_both_counts_and_the_samples() -> None:
    vlm = tiny_vlm()
    batch = tiny_batch(vlm)
    fewer = replace(batch, pixels={"vision": batch.pixels["vision"][:1]})
    with pytest.raises(ValueError, match=r"marks 8 positions, but 1 image\(s\) give 4 tokens.*row0, row1"):
        vlm(fewer)
    with pytest.raises(ValueError, match="marks 8 positions, but 0 image"):
        vlm(replace(batch, pixels={}))
    text = tiny_batch(vlm, (9, 7), (False, False))
    with pytest.raises(ValueError, match="marks 0 positions, but 2 image"):
        vlm(replace(text, pixels=batch.pixels))
    with pytest.raises(ValueError, match=r"no pixels for \['vision'\]"):
        vlm(replace(batch, pixels={"left": batch.pixels["vision"]}))


def test_nothing_supervised_is_a_zero_loss() -> None:
    vlm = tiny_vlm()
    batch = tiny_batch(vlm)
    out = vlm(replace(batch, labels=torch.full_like(batch.labels, IGNORE)))
    out.loss_sum.backward()
    assert out.supervised == 0 and out.loss_sum.item() == 0.0 and out.logits.shape == (0, VOCAB)


def test_ragged_prompts_are_answered_as_each_alone() -> None:
    """Greedy ids of a left-padded batch, with and without images, are those of every row by itself."""
    vlm = tiny_vlm()
    vlm.language.generation_config.eos_token_id = None
    lengths, images = (21, 7, 13, 9), (True, False, True, True)
    batch = tiny_batch(vlm, lengths, images, "left")
    together = vlm.generate(batch, max_new_tokens=12, do_sample=False, pad_token_id=0)
    seen = 0
    for row, (length, image) in enumerate(zip(lengths, images, strict=True)):
        alone = take(replace(batch, pixels={}), row, length, "left")
        if image:
            alone = replace(alone, pixels={name: value[seen : seen + 1] for name, value in batch.pixels.items()})
        alone = replace(alone, tile_image=torch.zeros(int(image), dtype=torch.long))
        seen += image
        assert (
            vlm.generate(alone, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
            == together[row].tolist()
        )
    assert len({tuple(row) for row in together.tolist()}) == len(lengths), "the rows say different things"


def test_generate_continues_with_the_likeliest_token() -> None:
    vlm = tiny_vlm()
    batch = tiny_batch(vlm, (12, 9), (True, True), "left")
    ids = vlm.generate(batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(ids[:, 0], vlm(batch, logits="last").logits.argmax(-1))


FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 6}),
    "stablelm": ("StableLmConfig", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_language_models(family: str, tmp_path: Path) -> None:
    """Supervised-only logits are the full model's, soft caps and scales included; packing and padding hold; and a saved
    model comes back with the same bits."""
    import transformers

    from leveret.model.checkpoint import load, save

    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**LLAMA, **extra})
    loud(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    recipe = tiny_recipe().model_copy(update={"language": LanguageRecipe(name=str(tmp_path / "lm"))})
    vlm = build(recipe)
    batch = tiny_batch(vlm, (13, 10))
    with torch.no_grad():
        full = vlm.language(
            inputs_embeds=vlm.embed(batch), attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
        few, every, last = (vlm(batch, logits=which).logits for which in ("supervised", "all", "last"))  # type: ignore[arg-type]
        one = vlm(packed(batch, (13, 10), 2))
    wanted = torch.zeros_like(batch.image_mask)
    wanted[:, :-1] = batch.labels[:, 1:] != IGNORE
    torch.testing.assert_close(every, full)
    torch.testing.assert_close(few, full[wanted])
    torch.testing.assert_close(last, torch.stack([full[0, 12], full[1, 9]]))
    torch.testing.assert_close(one.logits, full[wanted], atol=1e-4, rtol=1e-4)
    if family == "gemma2":
        assert few.abs().max() <= 2.0
    save(vlm, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model")(batch).logits, few)


def test_connector_of_the_drawn_world_knows_places() -> None:
    """Two equal patches at two places are told apart by their row and column."""
    vlm = tiny_vlm(connector="residual_2d")
    same = torch.ones(1, vlm.spec.tokens, 16)
    out = vlm.connector(same)[0]
    row, column = vlm.connector.row.weight, vlm.connector.column.weight  # type: ignore[union-attr]
    torch.testing.assert_close(out[3] - out[0], row[1] + column[1] - row[0] - column[0])
    torch.testing.assert_close(out[1] - out[0], column[1] - column[0])


def test_the_connectors_input_is_dropped_only_while_it_learns() -> None:
    """What is dropped follows torch's seed; an answer, and a stage that leaves the connector as it is, drop nothing."""
    vlm = tiny_vlm()
    batch = tiny_batch(vlm, (80, 72))
    whole = vlm.embed(batch)
    vlm.recipe = vlm.recipe.model_copy(update={"connector": ConnectorRecipe(dropout=0.5)})
    assert torch.equal(vlm.eval().embed(batch), whole)
    vlm.train()
    torch.manual_seed(1)
    one, two = vlm.embed(batch), vlm.embed(batch)
    torch.manual_seed(1)
    assert torch.equal(vlm.embed(batch), one) and not torch.equal(one, two) and not torch.equal(one, whole)
    vlm.connector.eval()
    assert torch.equal(vlm.embed(batch), whole)


def test_a_recipe_decides_the_connector() -> None:
    recipe = tiny_recipe().model_copy(update={"connector": ConnectorRecipe(kind="linear")})
    assert isinstance(build(recipe).connector, torch.nn.Linear)
    assert Path(tiny_language_folder()).is_dir() and SIDE == 32
