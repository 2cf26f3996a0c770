"""The engine answers as the model does when every token is computed from nothing, whatever the company."""

from __future__ import annotations

import io
import random
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fakes import tiny_vlm
from leveret.generate import Engine, Request, memory
from leveret.images import load as load_image
from leveret.inputs import Item, collate, encode, prepare
from leveret.model.vlm import VLM
from leveret.records import ImageRef, Prediction, Turn
from leveret.runs import DataError

WORDS = "is there a red square and two blue circle how many left right above what colour small big yes no A B".split()


def picture(seed: int) -> ImageRef:
    """A picture of noise, as a data URI."""
    side = 16 + 8 * (seed % 4)
    noise = np.random.default_rng(seed).integers(0, 256, (side, 32, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(noise).save(held, "PNG")
    return ImageRef("data:image/png;base64," + b64encode(held.getvalue()).decode(), kind="data")


def question(rng: random.Random, most: int = 9) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def some_requests(count: int, seed: int, pictures: int = 5) -> list[Request]:
    """Every shape of conversation: no picture, one, two, the same twice; one turn or three; long and short."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        images = tuple(picture(rng.randrange(pictures)) for _ in range(rng.choice([0, 1, 1, 1, 2])))
        turns = [Turn("user", "<image>\n" * len(images) + question(rng))]
        if rng.random() < 0.3:
            turns += [Turn("assistant", question(rng, 3)), Turn("user", question(rng))]
        if rng.random() < 0.2:
            turns.insert(0, Turn("system", question(rng)))
        requests.append(Request(f"q{number}", images, tuple(turns), max_new_tokens=rng.randint(1, 12)))
    return requests


def item(vlm: VLM, request: Request) -> Item:
    images = [load_image(ref) for ref in request.images]
    sizes = [(image.height, image.width) for image in images]
    encoded = encode(request.turns, vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=True)
    return Item(encoded, pixels=[{view.name: prepare(image, view) for view in vlm.spec.towers} for image in images])


@torch.no_grad()
def from_nothing(vlm: VLM, request: Request, limit: int = 64) -> tuple[list[int], torch.Tensor]:
    """The oracle: no cache, no batch; the whole row again for every token. (tokens, logits of the first)"""
    row, tokens = item(vlm, request), []
    first = None
    while len(tokens) < (request.max_new_tokens or limit):
        logits = vlm(collate([row], 0), logits="last").logits[0]
        first = logits if first is None else first
        token = int(logits.argmax())
        if token == vlm.tokenizer.eos_token_id:
            break
        tokens.append(token)
        row.encoded.input_ids.append(token)
        row.encoded.labels.append(-100)
        row.encoded.image_mask.append(False)
    assert first is not None
    return tokens, first


def words(vlm: VLM, tokens: Sequence[int]) -> str:
    return vlm.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


@pytest.fixture(scope="module")
def vlm() -> VLM:
    model = tiny_vlm()
    # Answers of many lengths: the end token is made likely enough to be chosen now and then.
    with torch.no_grad():
        model.language.get_output_embeddings().weight[model.tokenizer.eos_token_id] *= 2
    return model


def engine(vlm: VLM, **options: Any) -> Engine:
    return Engine(vlm, **{"precision": "fp32", **options})


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_the_tokens_are_those_of_one_question_at_a_time(vlm: VLM, slots: int) -> None:
    requests = some_requests(40, seed=1)
    got = engine(vlm, slots=slots).answer(requests)
    assert [p.question_id for p in got] == [r.question_id for r in requests]
    lengths = set()
    for request, prediction in zip(requests, got, strict=True):
        tokens, _ = from_nothing(vlm, request)
        assert prediction.text == words(vlm, tokens), request
        assert prediction.meta["tokens"] == len(tokens)
        assert prediction.meta["finish"] == ("length" if len(tokens) == request.max_new_tokens else "stop")
        lengths.add(len(tokens))
    assert {p.meta["finish"] for p in got} == {"stop", "length"}
    assert len(lengths) > 4, "the test says little when all answers are equally long"


def test_the_tokens_are_those_of_transformers_own_generate(vlm: VLM) -> None:
    requests = [r for r in some_requests(24, seed=2) if len(r.images) == 1][:8]
    batch = collate([item(vlm, request) for request in requests], vlm.tokenizer.pad_token_id, side="left")
    theirs = vlm.generate(batch, max_new_tokens=10, do_sample=False)
    ours = engine(vlm).answer([Request(r.question_id, r.images, r.turns, max_new_tokens=10) for r in requests])
    for row, prediction in zip(theirs.tolist(), ours, strict=True):
        end = row.index(vlm.tokenizer.eos_token_id) if vlm.tokenizer.eos_token_id in row else len(row)
        assert prediction.text == words(vlm, row[:end])


def test_generate_of_transformers_with_every_shape_of_conversation() -> None:
    """Several images, none, many turns, padded on the left in one batch; and a stop written with plain tokens."""
    for chat in ("tiny", "plain"):
        vlm = tiny_vlm(chat=chat)
        with torch.no_grad():
            for token in (vlm.tokenizer.eos_token_id, vlm.tokenizer.encode("\n", add_special_tokens=False)[0]):
                vlm.language.get_output_embeddings().weight[token] *= 2
        asked = some_requests(30, seed=22)
        if chat == "plain":  # a format of captions: one image, no words
            asked = [Request(f"p{n}", (picture(n),), (Turn("user", "<image>"),)) for n in range(9)]
        asked = [Request(r.question_id, r.images, r.turns, max_new_tokens=12) for r in asked]
        assert chat == "plain" or {len(request.images) for request in asked} == {0, 1, 2}
        one = engine(vlm)
        batch = collate([item(vlm, request) for request in asked], vlm.tokenizer.pad_token_id, side="left")
        assert chat == "plain" or len(set(batch.attention_mask.sum(1).tolist())) > 5, "rows of many lengths"
        theirs = vlm.generate(batch, max_new_tokens=12, do_sample=False).tolist()
        cut = 0
        for row, prediction in zip(theirs, one.answer(asked), strict=True):
            ends = [place for place, token in enumerate(row) if token in one.stops.ids]
            kept = row[: ends[0]] if ends else row
            text = vlm.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            shown = one.stops.cut(text)
            cut += shown is not None
            assert prediction.text == (text if shown is None else shown).strip()
        assert chat == "tiny" or cut > 0, "no answer met the stop"


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_company_and_order_do_not_matter(vlm: VLM, seed: int, slots: int) -> None:
    requests = some_requests(12, seed)
    whole = {p.question_id: p for p in engine(vlm, slots=slots).answer(requests)}
    part = random.Random(seed).sample(requests, 7)
    assert engine(vlm, slots=64).answer(part) == [whole[r.question_id] for r in part]


def test_twice_the_same_is_the_same(vlm: VLM) -> None:
    requests = some_requests(16, seed=3)
    one = engine(vlm)
    assert one.answer(requests) == one.answer(requests) == engine(vlm).answer(requests)


def counting(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    see = VLM.see

    def count(self: VLM, pixels: Any, *sizes: Any) -> torch.Tensor:
        seen.append(len(next(iter(pixels.values()))))
        return see(self, pixels, *sizes)

    monkeypatch.setattr(VLM, "see", count)
    return seen


def test_each_image_goes_through_the_tower_once(vlm: VLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    seen = counting(vlm, monkeypatch)
    one = engine(vlm, slots=4)
    requests = [r for r in some_requests(40, seed=4, pictures=6) if r.images]
    one.answer(requests)
    one.answer(requests[::-1])
    assert sum(seen) == len({ref for r in requests for ref in r.images}) == 6
    # The same bytes under another name are the same image; the same name with other bytes is not.
    path = tmp_path / "x.png"
    load_image(picture(1)).save(path)
    ask = [Request("a", (ImageRef(str(path)),), (Turn("user", "<image>\nis there a square"),))]
    before = one.answer(ask)
    (tmp_path / "y.png").write_bytes(path.read_bytes())
    again = [Request("a", (ImageRef(str(tmp_path / "y.png")),), ask[0].turns)]
    total = sum(seen)
    assert one.answer(again) == before
    assert sum(seen) == total
    load_image(picture(77)).save(path)
    one.answer(ask)
    assert sum(seen) == total + 1


def test_the_layers_over_an_image_run_once_for_all_its_questions(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    one, positions = engine(vlm), []
    forward = one.slots._forward

    def count(first: int, starts: list[int], batch: Any, **options: Any) -> torch.Tensor:
        positions.append(int(batch.image_mask.sum()))
        return forward(first, starts, batch, **options)

    monkeypatch.setattr(one.slots, "_forward", count)
    rng = random.Random(0)
    one.answer([Request(str(n), (picture(n % 3),), (Turn("user", "<image>\n" + question(rng)),)) for n in range(18)])
    assert sum(positions) == 3 * vlm.spec.tokens


def test_small_caches_change_only_the_time(vlm: VLM) -> None:
    requests = some_requests(30, seed=5, pictures=9)
    assert engine(vlm, slots=3, cache_bytes=1).answer(requests) == engine(vlm, slots=3).answer(requests)


def test_caches_stay_within_their_bound(vlm: VLM) -> None:
    one = engine(vlm, slots=4, cache_bytes=3000)
    one.answer(some_requests(40, seed=6, pictures=30))
    assert one.eyes.shelf.bytes <= 3000
    assert one.slots.prefixes.bytes <= 3000


def test_passes_are_cut_to_a_bound(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = some_requests(20, seed=7)
    usual = engine(vlm).answer(requests)
    for most in (1, 40, 100):
        monkeypatch.setitem(memory.PASS_TOKENS, "cpu", most)
        assert engine(vlm).answer(requests) == usual


def test_predictions_are_handed_over_as_they_come(vlm: VLM) -> None:
    requests, came = some_requests(20, seed=8), []
    result = engine(vlm, slots=4).answer(requests, came.append)
    assert sorted(came, key=lambda p: int(p.question_id[1:])) == result
    assert [p.question_id for p in came] != [p.question_id for p in result], "short answers should come first"


@pytest.mark.parametrize("choices", [("A", "B", "C"), ("yes", "two", "red")])
def test_choices_are_first_token_probabilities(vlm: VLM, choices: tuple[str, ...]) -> None:
    plain = [r for r in some_requests(20, seed=9)]
    asked = [Request(r.question_id, r.images, r.turns, choices=choices) for r in plain]
    mixed = [*asked, *plain]
    got = engine(vlm, slots=5).answer(mixed)
    assert got[20:] == engine(vlm).answer(plain), "they share batches with answers that are generated"
    blank, *_ = (spelled := [vlm.tokenizer.encode(f" {choice}", add_special_tokens=False) for choice in choices])[0]
    shared = all(ids[0] == blank for ids in spelled)  # letters: this tokenizer writes a blank of its own before them
    assert shared == (choices[0] == "A")
    first = [ids[shared] for ids in spelled]
    for request, prediction in zip(asked, got, strict=False):
        row = item(vlm, request)
        row.encoded.input_ids += [blank] * shared
        row.encoded.labels += [-100] * shared
        row.encoded.image_mask += [False] * shared
        logits = vlm(collate([row], 0), logits="last").logits[0].detach()
        want = torch.softmax(logits.double(), -1)[first]
        assert prediction.choices is not None
        assert list(prediction.choices) == list(choices)
        np.testing.assert_allclose(list(prediction.choices.values()), want / want.sum(), rtol=1e-4)
        assert prediction.text == max(prediction.choices, key=prediction.choices.__getitem__)
        assert prediction.meta == {"tokens": 0, "finish": "choice"}


@pytest.mark.parametrize("choices", [("yes", "yes"), (), ("yes", " "), ("A", "B", "yes")])
def test_choices_that_cannot_be_told_apart_are_refused(vlm: VLM, choices: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="'q': choices"):
        engine(vlm).answer([Request("q", (), (Turn("user", "hm"),), choices=choices)])


def test_faults_name_the_question(vlm: VLM, tmp_path: Any) -> None:
    one = engine(vlm)
    missing = Request("lost", (ImageRef(str(tmp_path / "no.png")),), (Turn("user", "<image>\nhm"),))
    with pytest.raises(DataError, match=r"'lost': .*no\.png"):
        one.answer([missing])
    with pytest.raises(DataError, match="'unmarked': 0 <image>"):
        one.answer([Request("unmarked", (picture(0),), (Turn("user", "hm"),))])
    with pytest.raises(DataError, match=r"'long': the prompt fills .* 512"):
        one.answer([Request("long", (), (Turn("user", "red " * 600),))])
    with pytest.raises(DataError, match="'none': max_new_tokens"):
        one.answer([Request("none", (), (Turn("user", "hm"),), max_new_tokens=0)])
    head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (32).to_bytes(4, "big") * 2
    (tmp_path / "cut.png").write_bytes(head + b"\x08\x02")
    with pytest.raises(DataError, match=r"cut\.png"):
        one.answer([Request("cut", (ImageRef(str(tmp_path / "cut.png")),), (Turn("user", "<image>\nhm"),))])
    after = some_requests(5, seed=10)
    assert one.answer(after) == engine(vlm).answer(after), "a refused request leaves nothing behind"


def test_answers_end_where_the_positions_do(vlm: VLM) -> None:
    room = Request("room", (), (Turn("user", "red " * 200),), max_new_tokens=500)
    prompt = len(item(vlm, room).encoded.input_ids)
    assert prompt < 512
    (prediction,) = engine(vlm).answer([room])
    assert prediction.meta["tokens"] <= 512 - prompt


def test_no_requests_no_answers(vlm: VLM) -> None:
    assert engine(vlm).answer([]) == []


def test_bf16_answers_and_is_deterministic(vlm: VLM) -> None:
    requests = some_requests(20, seed=11)
    one = Engine(vlm, precision="bf16", slots=8).answer(requests)
    assert one == Engine(vlm, precision="bf16", slots=8).answer(requests)
    exact = engine(vlm).answer(requests)
    assert sum(a.text == b.text for a, b in zip(one, exact, strict=True)) >= 5


def test_answers_end_before_a_stop_written_with_ordinary_tokens() -> None:
    """The `plain` format ends with a newline, and nothing of it is shown, streamed or not."""
    vlm = tiny_vlm(chat="plain")
    newline = vlm.tokenizer.encode("\n", add_special_tokens=False)[0]
    with torch.no_grad():
        vlm.language.get_output_embeddings().weight[newline] *= 3
    one, ended = engine(vlm), 0
    for seed in range(12):
        request = Request("p", (picture(seed),), (Turn("user", "<image>"),), max_new_tokens=12)
        (prediction,) = one.answer([request])
        tokens, _ = from_nothing(vlm, request)
        whole = vlm.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert prediction.text == whole.split("\n")[0].strip() == "".join(one.stream(request))
        ended += "\n" in whole and prediction.meta["finish"] == "stop"
    assert ended > 2
    assert (
        len(
            {
                p.text
                for p in one.answer([Request("p", (picture(n % 3),), (Turn("user", "<image>"),)) for n in range(9)])
            }
        )
        <= 3
    )
    with pytest.raises(DataError, match="'p': chat format 'plain' writes nothing"):
        one.answer([Request("p", (), (Turn("user", "hm"),))])


def test_streams_are_the_answers(vlm: VLM) -> None:
    one = engine(vlm, slots=2)
    for request in some_requests(12, seed=12):
        assert "".join(one.stream(request)) == one.answer([request])[0].text


def test_a_closed_stream_frees_its_slot(vlm: VLM) -> None:
    one = engine(vlm, slots=1)
    for request in some_requests(5, seed=13):
        pieces = one.stream(request)
        next(pieces, None)
        pieces.close()  # type: ignore[attr-defined]
        assert one.slots.free == 1


def test_streams_and_answers_share_the_slots(vlm: VLM) -> None:
    one = engine(vlm, slots=4)
    request, others = some_requests(1, seed=14)[0], some_requests(9, seed=15)
    want, wants = one.answer([request])[0].text, one.answer(others)
    pieces = one.stream(request)
    begun = next(pieces, "")
    assert one.answer(others) == wants
    assert begun + "".join(pieces) == want


def test_sampling_follows_its_seed_and_not_the_company(vlm: VLM) -> None:
    request = Request("s", (picture(0),), (Turn("user", "<image>\nis there a square"),), max_new_tokens=12)

    def drawn(seed: int, **options: Any) -> str:
        return "".join(engine(vlm).stream(request, seed=seed, **options))

    assert drawn(1, temperature=1.0) == drawn(1, temperature=1.0)
    assert len({drawn(seed, temperature=1.5) for seed in range(6)}) > 3
    greedy = engine(vlm).answer([request])[0].text
    assert drawn(5, temperature=1.0, top_p=1e-9) == greedy, "the likeliest token always stays"
    for least in (1e-6, 1e-310, 5e-324):  # a quotient of these has no number
        assert drawn(5, temperature=least) == greedy
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            drawn(0, **wrong)


def variant(vlm: VLM, language: Any) -> VLM:
    """The same eyes with another language model of the same width and words."""
    from fakes import loud

    torch.manual_seed(5)
    vlm.language = loud(language).eval()
    return vlm


def languages() -> dict[str, Any]:
    import transformers as tf

    shape = dict(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    grouped = {**shape, "num_key_value_heads": 2}
    # "sdpa" where the family has it; Gemma 2 caps its attention scores and does not.
    return {
        "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**shape)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**grouped)),
        "granite scales its logits": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**grouped, logits_scaling=8.0)),
        "mistral has a window": lambda: tf.MistralForCausalLM(tf.MistralConfig(**grouped, sliding_window=6)),
        "phi3 has a window": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**grouped, sliding_window=6)),
        "gemma2 mixes windows": lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(**grouped, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)
        ),
        "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**shape)),
        "stablelm": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**grouped)),
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", list(languages()))
def test_other_families_answer_as_they_do_from_nothing(family: str, attention: str) -> None:
    model = languages()[family]()
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {family}")
    model.set_attn_implementation(attention)
    vlm = variant(tiny_vlm(), model)
    requests = some_requests(14, seed=16)
    got: list[Prediction] = engine(vlm, slots=4).answer(requests)
    for request, prediction in zip(requests, got, strict=True):
        tokens, _ = from_nothing(vlm, request)
        assert prediction.text == words(vlm, tokens), request
    Engine(vlm, slots=4, precision="bf16").answer(requests)
