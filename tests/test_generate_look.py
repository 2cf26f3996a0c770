"""Looking inside an answer: weights as transformers' own eager code gives them, honest sums, and a model left alone."""

from __future__ import annotations

import copy
import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fakes import tiny_vlm
from language_fakes import FAMILIES, toy_vlm
from leveret.generate import gaze
from leveret.generate.engine import Eyes
from leveret.generate.look import look, nearest
from leveret.generate.looked import SHARES, Look, split_words
from leveret.generate.model import Model
from leveret.generate.slots import Masks
from leveret.images import ImageFault
from leveret.inputs import encode
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Batch, Turn
from leveret.runs import DataError, EnvironmentFault
from test_generate_engine import picture, question, some_requests

ASK = (Turn("user", "<image>\nhow many red square ?"),)
SAID = "a red square and a blue circle"


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny_vlm()


@pytest.fixture(scope="module")
def model(vlm: VLM) -> Model:
    return Model(vlm, precision="fp32")


def by_transformers(vlm: VLM, answer: str) -> tuple[torch.Tensor, torch.Tensor, list[int], list[bool], int]:
    """The whole conversation through transformers with `output_attentions`: [L, H, T, T] and logits [T, V]; the ids,
    the image mask and where the answer begins."""
    whole = encode((*ASK, Turn("assistant", answer)), vlm.chat, vlm.tokenizer, vlm.spec, [(32, 32)])
    supervised = [place for place, label in enumerate(whole.labels) if label != IGNORE]
    ids = torch.tensor([whole.input_ids])
    eyes = Eyes(vlm, False, 0)
    seen = eyes.name(picture(1))
    batch = Batch(
        ids, torch.full_like(ids, IGNORE), torch.ones_like(ids, dtype=torch.bool), torch.arange(ids.shape[1])[None],
        torch.zeros_like(ids), torch.tensor([whole.image_mask]), {}, **eyes.features([seen.key]),  # type: ignore[arg-type]
    )  # fmt: skip
    twin = copy.deepcopy(vlm.language)
    twin.config._attn_implementation = "eager"
    with torch.no_grad():
        out = twin(inputs_embeds=vlm.embed(batch), attention_mask=batch.attention_mask.long(), output_attentions=True)
    return torch.stack(out.attentions)[:, 0], out.logits[0], whole.input_ids, whole.image_mask, supervised[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*FAMILIES.values()], ids=list(FAMILIES))
def test_weights_are_those_of_transformers(family: str, attention: str) -> None:
    """Every family, whichever code answers: caps, windows, mixed layers, shared keys, its own scale."""
    if (family, attention) == ("google/gemma-2-2b", "sdpa"):
        pytest.skip("transformers' sdpa has no soft cap")
    vlm = toy_vlm(family)
    vlm.language.config._attn_implementation = attention
    due, logits, ids, marks, first = by_transformers(vlm, SAID)
    found = look(Model(vlm, precision="fp32"), ASK, [picture(1)], SAID, heads=True, near=0)
    assert found.answer == SAID and found.unread == 0
    count, eye = len(found.tokens), torch.tensor(marks)
    rows = torch.arange(first - 1, first - 1 + count)
    theirs = due[:, :, rows].permute(2, 0, 1, 3)  # [A, L, H, T]
    assert found.said.heads is not None
    torch.testing.assert_close(found.said.heads, theirs[..., eye], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.said.weights, theirs.mean(2)[..., eye], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.said.shares[..., 0], theirs.mean(2)[..., eye].sum(-1), atol=1e-5, rtol=1e-4)
    chances = logits[rows].softmax(-1)
    for place, token in enumerate(found.tokens):
        assert token.probability == pytest.approx(float(chances[place, ids[first + place]]), rel=1e-3, abs=1e-6)
        assert token.top[-1][1] == token.probability or token.probability in [p for _, p in token.top]
        assert [p for _, p in token.top[:5]] == pytest.approx(
            chances[place].topk(5).values.tolist(), rel=1e-3, abs=1e-6
        )
    assert vlm.language.config._attn_implementation == attention


def test_the_question_is_read_at_its_own_rows(model: Model) -> None:
    vlm = model.vlm
    due, _, ids, marks, first = by_transformers(vlm, SAID)
    found = look(model, ASK, [picture(1)], SAID, near=0)
    last = max(place for place, mark in enumerate(marks) if mark)
    special = set(vlm.tokenizer.all_special_ids)
    behind = [place for place in range(last + 1, first) if ids[place] not in special]
    rows = behind[1:]  # the newline behind the picture is nobody's word
    theirs = due[:, :, rows].mean(1).transpose(0, 1)[..., torch.tensor(marks)]
    torch.testing.assert_close(found.asked.weights, theirs, atol=1e-5, rtol=1e-4)
    assert [word.text for word in found.asked.words] == ["how", "many", "red", "square", "?"]


def sums_to_one(found: Look) -> None:
    for read in (found.said, found.asked):
        assert torch.allclose(read.shares.sum(-1), torch.ones(read.shares.shape[:2]), atol=1e-5)
        assert torch.allclose(read.weights.sum(-1), read.shares[..., 0], atol=1e-5)
        assert not len(read.shares) or float(read.shares.min()) >= 0


@pytest.mark.parametrize("number", range(8))
def test_conversations_of_every_shape(model: Model, number: int) -> None:
    """No picture, one, two, the same twice; one turn or three: sums are honest, words cover the answer."""
    request = some_requests(8, seed=5)[number]
    found = look(model, request.turns, request.images, max_new_tokens=6)
    sums_to_one(found)
    assert found.answer == model.engine.answer([request.__class__("q", request.images, request.turns, None, 6)])[0].text
    assert [word.first for word in found.words[1:]] == [word.last for word in found.words[:-1]]
    assert not found.words or (found.words[0].first, found.words[-1].last) == (0, len(found.tokens))
    assert [canvas.image for canvas in found.canvases] == list(range(len(request.images)))
    laid = sum(found.maps(place).sum((-1, -2)) for place in range(len(found.canvases)))
    if request.images:
        assert torch.allclose(laid, found.said.of_words(found.said.shares)[..., 0], atol=1e-5)
    json.dumps(found.as_json())


def test_its_own_answer_and_the_same_one_given(model: Model) -> None:
    own = look(model, ASK, [picture(1)], max_new_tokens=5)
    assert own.answer == model.ask(picture(1), ASK[0].text, max_new_tokens=5)
    again = look(model, ASK, [picture(1)], max_new_tokens=5)
    assert torch.equal(own.said.weights, again.said.weights) and own.tokens == again.tokens
    assert own.tokens[0].probability == pytest.approx(own.tokens[0].top[0][1])
    given = look(model, ASK, [picture(1)], SAID)
    assert "".join(token.text for token in given.tokens).strip() == SAID
    assert [word.text for word in given.words] == SAID.split()


def test_the_form_of_the_json(model: Model) -> None:
    facts = json.loads(json.dumps(look(model, ASK, [picture(1)], SAID).as_json()))
    (image,) = facts["images"]
    assert image == {"grid": [2, 2], "shown": [0.0, 0.0, 1.0, 1.0], "image": 0, "part": "picture", "placed": True}
    weights = facts["weights"]
    assert len(weights) == 1 and len(weights[0]) == len(facts["words"]) and len(weights[0][0]) == facts["layers"] == 2
    assert all(len(layer) == 4 for word in weights[0] for layer in word)
    assert all(round(value, 4) == value for value in weights[0][0][0])
    assert facts["shares"]["names"] == list(SHARES) and len(facts["shares"]["values"]) == len(facts["words"])
    assert [token["token"] for token in facts["alternatives"]] == [t for word in facts["words"] for t in word["tokens"]]
    assert len(facts["nearest"][0]) == 4 and len(facts["nearest"][0][0]) == 5
    assert len(facts["asked"]["weights"][0]) == len(facts["asked"]["words"]) == 5


# --- the model is left alone ------------------------------------------------------------------------------------------


def test_nothing_is_left_behind(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after an answer, not after a fault inside; and the bits of its answers are what they were."""
    vlm, config = model.vlm, model.vlm.language.config
    before, kept = config._attn_implementation, {name: t.clone() for name, t in vlm.state_dict().items()}
    (request,) = [r for r in some_requests(6, seed=9) if len(r.images) == 1][:1]
    first = model.engine.answer([request])
    look(model, ASK, [picture(1)], SAID)

    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(gaze, "_read", broken)
    with pytest.raises(ZeroDivisionError):
        look(model, ASK, [picture(1)], SAID)
    monkeypatch.undo()
    assert config._attn_implementation == before and gaze._WATCH.get(None) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.modules())
    assert all(torch.equal(kept[name], tensor) for name, tensor in vlm.state_dict().items())
    assert model.engine.answer([request]) == first


def test_beside_answers_that_are_being_made(vlm: VLM) -> None:
    """On the engine's thread, between two pieces of somebody's stream: the stream goes on as if nothing had been."""
    one = Model(vlm, precision="fp32")
    (request,) = [r for r in some_requests(12, seed=11) if r.max_new_tokens and r.max_new_tokens > 8][:1]
    alone = "".join(Model(vlm, precision="fp32").engine.stream(request))
    stream = one.engine.stream(request)
    said = next(stream)
    look(one, ASK, [picture(1)], max_new_tokens=4)
    look(one, ASK, [picture(1)], SAID)
    assert said + "".join(stream) == alone


def test_another_threads_model_is_not_watched(vlm: VLM) -> None:
    """Two models, two threads: each is read for itself."""
    both = [Model(one, precision="fp32") for one in (vlm, tiny_vlm(seed=3))]
    alone = [look(one, ASK, [picture(1)], SAID).said.weights for one in both]
    found: list[list[torch.Tensor]] = [[], []]

    def run(number: int) -> None:
        for _ in range(5):
            found[number].append(look(both[number], ASK, [picture(1)], SAID).said.weights)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert len(found[number]) == 5 and all(torch.equal(one, alone[number]) for one in found[number])


def test_a_network_alone_and_halves(vlm: VLM) -> None:
    """Without an engine; and computed in halves, where weights are still read in float32."""
    for one in (vlm, Model(vlm, precision="bf16")):
        found = look(one, ASK, [picture(1)], SAID)
        assert found.said.weights.dtype == torch.float32
        sums_to_one(found)


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_weights_are_computed_in_pieces(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the answer: never more than PIECE weights at once (or one row), and the same numbers."""
    answer = " ".join(question(random.Random(1), 9) for _ in range(20))
    whole = look(model, ASK, [picture(1)], answer)
    sizes: list[int] = []
    read = gaze._written_out

    def measured(module: Any) -> Any:
        own = read(module)

        def run(*args: Any, **options: Any) -> Any:
            out, weights = own(*args, **options)
            if args[1].shape[2] < args[2].shape[2]:
                sizes.append(weights.numel())
            return out, weights

        return run

    monkeypatch.setattr(gaze, "_written_out", measured)
    monkeypatch.setattr(gaze, "PIECE", 3000)
    pieces = look(model, ASK, [picture(1)], answer)
    assert len(sizes) > 20 and max(sizes) <= 3000
    torch.testing.assert_close(pieces.said.weights, whole.said.weights)
    assert len(whole.tokens) > 60


def test_a_long_answer_is_cut_and_said(model: Model) -> None:
    answer = " ".join(question(random.Random(1), 9) for _ in range(20))
    whole = look(model, ASK, [picture(1)], answer)
    cut = look(model, ASK, [picture(1)], answer, most=160)
    kept = cut.said.weights.numel() + cut.asked.weights.numel()
    assert 0 < kept <= 160 and cut.unread == len(whole.tokens) - len(cut.tokens) > 0
    torch.testing.assert_close(cut.said.weights, whole.said.weights[: len(cut.tokens)])
    sums_to_one(cut)
    per_head = look(model, ASK, [picture(1)], answer, most=2000, heads=True)
    assert per_head.said.heads is not None and per_head.said.heads.numel() <= 2000


@pytest.mark.parametrize(
    ("turns", "images", "answer", "fault"),
    [
        (ASK, 1, "  ", "the answer is empty"),
        (ASK, 2, SAID, "one mark per image"),
        ((*ASK, Turn("assistant", "two")), 1, None, "nothing to answer"),
        ((*ASK, Turn("assistant", "two")), 1, SAID, "nothing to answer"),
        ((), 0, SAID, "nothing to answer"),
        (ASK, 1, "square " * 600, "positions and the model has 512"),
        ((Turn("user", "<image>\n" + "square " * 600),), 1, None, "positions and the model has 512"),
    ],
)
def test_what_cannot_be_looked_into_is_refused(
    model: Model, turns: tuple[Turn, ...], images: int, answer: str | None, fault: str
) -> None:
    with pytest.raises(DataError, match=fault):
        look(model, turns, [picture(1)] * images, answer)


def test_bad_pictures_limits_and_models(model: Model, vlm: VLM) -> None:
    with pytest.raises(ImageFault):
        look(model, ASK, [b"no picture"], SAID)
    with pytest.raises(DataError, match="at least 1"):
        look(model, ASK, [picture(1)], max_new_tokens=0)
    learning = tiny_vlm().train()
    with pytest.raises(DataError, match="in training"):
        look(learning, ASK, [picture(1)], SAID)
    flash = tiny_vlm()
    flash.language.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(EnvironmentFault, match="takes no mask"):
        look(flash, ASK, [picture(1)], SAID)
    assert Masks(vlm.language.config)  # what can answer can be looked into


def test_a_model_whose_layers_are_hidden_says_so(vlm: VLM) -> None:
    """Layers that do not ask transformers' interface would leave zeros: told, not shown."""
    with (
        pytest.raises(EnvironmentFault, match="0 of its 2 layers"),
        gaze.watched(vlm.language, torch.tensor([0]), lambda *_: None),
    ):
        pass


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a", " red", " squ", "are"], ["a", "red", "square"]),
        ([" [", "0", ".", "28", ",", " 0.5", "]"], ["[", "0.28", ",", "0.5", "]"]),
        (["It", "'s", " red", ".", "\n", "Yes"], ["It's", "red", ".", "Yes"]),
        (["a r", "ed"], ["a red"]),
        (["", "", "\u00e9t\u00e9", " ", ""], ["\u00e9t\u00e9"]),
        (["\u7ea2\u8272", "\u5706"], ["\u7ea2\u8272", "\u5706"]),
        ([" ", "\n"], [" \n"]),
        ([], []),
        (["..."], ["..."]),
    ],
)
def test_tokens_are_joined_to_words(texts: list[str], words: list[str]) -> None:
    assert [word.text for word in split_words(texts)] == words


def test_a_word_ends_where_a_turn_does() -> None:
    texts = ["I", " see", ".", "What", " is", " it", "?"]
    words = split_words(texts, [3])
    assert [word.text for word in words] == ["I", "see", ".", "What", "is", "it", "?"]
    assert [(word.first, word.last) for word in words] == [(at, at + 1) for at in range(7)]
    assert [word.text for word in split_words(texts)][1:3] == ["see.What", "is"]


@given(st.lists(st.text(max_size=5), max_size=12))
def test_every_token_is_in_one_word(texts: list[str]) -> None:
    words = split_words(texts)
    covered = [token for word in words for token in range(word.first, word.last)]
    assert covered == list(range(len(texts))) and all(word.first < word.last for word in words)
    whole, place = "".join(texts), 0
    for word in words:
        place = whole.index(word.text, place) + len(word.text)


# --- nearest words ----------------------------------------------------------------------------------------------------


def test_nearest_words_are_those_of_brute_force(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from leveret.generate import look as station

    torch.manual_seed(0)
    table = vlm.language.get_input_embeddings().weight.detach()[: len(vlm.tokenizer)]
    planted = vlm.tokenizer.convert_tokens_to_ids(["Ġred", "Ġsquare", "Ġblue"])
    visual = torch.cat([table[planted] * 3 - 2 * table.mean(0), torch.randn(40, table.shape[1])])
    found = nearest(vlm, visual, 4)
    assert [near[0].text for near in found[:3]] == ["red", "square", "blue"]
    assert all(near[0].cosine == pytest.approx(1, abs=1e-5) for near in found[:3])
    cosines = torch.nn.functional.cosine_similarity(
        (visual - table.mean(0))[:, None], (table - table.mean(0))[None], dim=-1
    )
    for row, near in zip(cosines, found, strict=True):
        assert len(near) == 4 and [one.cosine for one in near] == sorted((one.cosine for one in near), reverse=True)
        known = {round(float(value), 4) for value in row}
        assert all(round(one.cosine, 4) in known for one in near)
    special = {vlm.tokenizer.decode([token]) for token in vlm.tokenizer.all_special_ids}
    assert not special & {one.text for near in found for one in near}
    monkeypatch.setattr(station, "PIECE", 1000)
    assert [[one.text for one in near] for near in nearest(vlm, visual, 4)] == [[o.text for o in n] for n in found]


@pytest.mark.parametrize("family", [*FAMILIES.values()], ids=list(FAMILIES))
def test_a_word_lies_nearest_to_itself_however_a_family_scales_its_table(family: str) -> None:
    """Visual tokens stand beside what the language model reads, which in Gemma is not what the table holds."""
    vlm = toy_vlm(family)
    embedding = vlm.language.get_input_embeddings()
    with torch.no_grad():
        embedding.weight += 2 * torch.randn(embedding.weight.shape[1], generator=torch.Generator().manual_seed(0))
    ids = vlm.tokenizer.convert_tokens_to_ids(["\u0120red", "\u0120square", "\u0120blue"])
    found = nearest(vlm, embedding(torch.tensor(ids)).detach(), 3)
    assert [near[0].text for near in found] == ["red", "square", "blue"]
    assert all(near[0].cosine == pytest.approx(1, abs=1e-3) for near in found)


FORMATS = (
    "tiny", "vicuna_v1", "phi3", "llava_llama_2", "mistral_instruct", "chatml_direct", "tinyllava_phi",
    "tinyllava_gemma", "tinyllava_qwen2_instruct", "prismatic_phi", "prismatic_llama2_chat", "nanovlm", "minicpm",
    "bunny",
)  # fmt: skip
ENDS = ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"]


@pytest.mark.parametrize("chat", FORMATS)
def test_the_question_is_what_the_user_said_and_nothing_of_the_format(chat: str) -> None:
    vlm = tiny_vlm()
    vlm.tokenizer.add_special_tokens({"additional_special_tokens": ENDS})
    vlm.language.resize_token_embeddings(400, mean_resizing=False)
    vlm.recipe = vlm.recipe.model_copy(update={"chat": chat})
    later = (*ASK, Turn("assistant", "two ."), Turn("user", "is it red ?"))
    for turns in (ASK, later):
        found = look(Model(vlm, precision="fp32"), turns, [picture(1)], SAID, near=0)
        assert [word.text for word in found.asked.words] == turns[-1].text.replace("<image>", "").split()


def test_a_picture_that_lies_on_its_side_is_laid_upright(tmp_path: Path) -> None:
    """A telephone's portrait: its pixels are wide, its EXIF says to turn it."""
    vlm = tiny_vlm()
    vlm.spec = replace(vlm.spec, towers=(replace(vlm.spec.towers[0], resize="pad"),))
    upright = Image.effect_noise((48, 96), 60).convert("RGB")
    upright.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    one, other = (look(Model(vlm, precision="fp32"), ASK, [tmp_path / name], SAID) for name in ("a.png", "b.png"))
    assert one.canvases[0].shown == other.canvases[0].shown == (-0.5, 0.0, 1.5, 1.0)
    assert torch.equal(one.said.weights, other.said.weights)


@pytest.mark.parametrize("answer", ["blue \U0001f98a", "\u7ea2\u8272", "blue caf\xe9", "5 \u20ac"])
def test_an_answer_may_end_in_a_character_of_several_tokens(answer: str, model: Model) -> None:
    found = look(model, ASK, [picture(1)], answer, near=0)
    assert found.answer == answer and "".join(token.text for token in found.tokens).strip() == answer


def test_nothing_asked_and_nothing_said(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.generate.look._Seen._said", lambda self, tokens: [])
    found = look(model, (Turn("user", "<image>"),), [picture(1)], near=0)
    assert found.answer == "" and not found.words and not found.asked.words
    json.dumps(found.as_json())


def test_of_tokens_that_are_equally_likely_the_one_that_was_said_is_named(model: Model) -> None:
    found = look(model, ASK, [picture(1)], SAID, near=0)
    for token in found.tokens:
        text, chance = token.top[token.own]
        assert chance == token.probability and text.strip() == token.text.strip()


def test_what_was_not_read_of_a_question_is_told(model: Model) -> None:
    found = look(model, ASK, [picture(1)], SAID, most=2 * 4 * 6, near=0)
    assert len(found.asked.weights) == 3 and any("the last 3 were read" in note for note in found.notes)


def test_a_picture_in_memory_and_a_text_alone(model: Model) -> None:
    found = look(model, ASK, [Image.linear_gradient("L")], SAID)
    assert found.canvases[0].grid == (2, 2)
    text = look(model, (Turn("user", "is there a square"),), answer="yes")
    assert text.canvases == () and text.as_json()["weights"] == [] and float(text.said.shares[..., 0].max()) == 0
