"""Tokens become text in pieces that never cut a character, and chosen tokens follow the probabilities asked for."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fakes import tiny_tokenizer
from leveret.generate.cache import Shelf
from leveret.generate.sampling import Sampling
from leveret.inputs.text import BROKEN, Detokenizer, Stops, decode


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    reader = Detokenizer(tokenizer)
    return [*(reader.push(token) for token in ids), reader.finish()]


@given(st.text(max_size=40))
@example("a picture: <image>!")
def test_pieces_of_a_text_join_to_it_and_hold_whole_characters(tokenizer: Any, text: str) -> None:
    got = pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    spelled = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))  # special tokens have no words
    assert "".join(got) == spelled.sub("", text)
    if BROKEN not in text:
        assert not any(BROKEN in piece for piece in got)


@given(st.lists(st.integers(0, 319), max_size=30))
def test_pieces_of_any_tokens_join_to_their_decoding(tokenizer: Any, ids: list[int]) -> None:
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)


def test_a_piece_comes_as_soon_as_its_character_is_whole(tokenizer: Any) -> None:
    ids = tokenizer.encode("\N{GRINNING FACE}!", add_special_tokens=False)
    assert pieces(tokenizer, ids) == [*[""] * (len(ids) - 2), "\N{GRINNING FACE}", "!", ""]


def test_stops_are_tokens_where_the_tokenizer_has_them_and_text_elsewhere(tokenizer: Any) -> None:
    stops = Stops.of(("<|end|>", "###", "\n"), tokenizer, [7, 8])
    assert stops.ids == {tokenizer.convert_tokens_to_ids("<|end|>"), 7, 8}
    assert stops.strings == ("###", "\n")
    assert stops.cut("yes ### no\n") == "yes "
    assert stops.cut("yes ## no") is None
    assert [stops.held(text) for text in ("yes", "yes #", "yes ##", "# yes", "")] == [0, 1, 2, 0, 0]


def test_sampling_draws_by_probability_within_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = Sampling(1.0, 1.0, seed=0).picker()
    assert draw is not None
    shares = torch.bincount(torch.tensor([draw(logits) for _ in range(4000)]), minlength=4) / 4000
    assert torch.allclose(shares, logits.exp(), atol=0.03)
    # 0.5 + 0.3 is the first sum that reaches 0.7: two tokens stay, in their old proportion.
    draw = Sampling(1.0, 0.7, seed=0).picker()
    assert draw is not None
    shares = torch.bincount(torch.tensor([draw(logits) for _ in range(4000)]), minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert Sampling(0.0).picker() is None


def test_a_shelf_forgets_the_least_recently_used() -> None:
    shelf = Shelf(limit=3 * 40)
    for key in "abc":
        shelf.put(key, torch.zeros(10))
    assert shelf.get("a") is not None
    shelf.put("d", torch.zeros(10))
    assert [key for key in "abcd" if shelf.get(key) is not None] == ["a", "c", "d"]
    shelf.put("d", torch.zeros(20))
    assert shelf.bytes <= shelf.limit and shelf.get("d") is not None
    held = len(shelf)
    shelf.put("e", torch.zeros(1000))
    assert shelf.get("e") is None and len(shelf) == held, "what no shelf can hold throws nothing else away"


@cache
def of_bytes() -> Any:
    """A tokenizer of Llama's kind: what it has no word for is spelled in tokens of one byte."""
    vocab = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>"])}
    vocab |= {f"<0x{value:02X}>": 3 + value for value in range(256)}
    for word in ("\u2581", "a", "\u2581a", "b", "\u2581the"):
        vocab.setdefault(word, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def spelled(data: bytes) -> list[int]:
    return [3 + value for value in data]


@given(
    st.lists(
        st.sampled_from([259, 260, 261, 262, 263]).map(lambda token: [token])
        | st.sampled_from("\u4f60\u00e9\U0001f600\n").map(lambda letter: spelled(letter.encode()))
        | st.binary(min_size=1, max_size=2).map(spelled),
        max_size=8,
    )
)
@example([spelled("\u4f60".encode()), spelled(b"\xe5")])
@example([[260], spelled("\u4f60\u597d\u5417".encode()), spelled("\U0001f600".encode()[:2])])
def test_bytes_that_are_no_character_cost_no_other(parts: list[list[int]]) -> None:
    ids = [token for part in parts for token in part]
    text = decode(of_bytes(), ids)
    assert "".join(pieces(of_bytes(), ids)) == text and BROKEN not in text
    raw = b"".join(
        bytes([token - 3]) if token < 259 else {259: b" ", 260: b"a", 261: b" a", 262: b"b", 263: b" the"}[token]
        for token in ids
    )
    assert text == raw.decode("utf-8", "ignore").removeprefix(" ")


@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.999999, 1.0])
def test_a_few_are_looked_at_first_and_the_draw_is_the_same(monkeypatch: pytest.MonkeyPatch, top_p: float) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3
    drawn = []
    for few in (16, 300, 10**6):
        monkeypatch.setattr("leveret.generate.sampling.FEW", few)
        draw = Sampling(1.0, top_p, seed=5).picker()
        assert draw is not None
        drawn.append([draw(logits) for _ in range(200)])
    assert drawn[0] == drawn[1] == drawn[2] and (top_p < 0.1 or len(set(drawn[0])) > 20)
