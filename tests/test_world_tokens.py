"""The tiny tokenizer: every string of a user round-trips; the world's words are one piece each."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leveret.world import tokens
from leveret.world.questions import number
from leveret.world.scenes import COLOURS, GRID, LETTERS, SHAPES


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokens.build()


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_every_string_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\n\t ", "héllo 漢字 🐇", "<0x41>", "▁ ▁", "a\x00b", "CXK", "[0.25, 0.5]", "  two  "]
)
def test_hard_strings_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_closed_words_are_one_piece_and_a_box_is_five(tokenizer: Any) -> None:
    def pieces(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    for word in (*COLOURS, *SHAPES, "Yes", "No", "True", "False", "left", "right", "above", "below"):
        assert pieces(f" {word}") == 1, word
    for letter in LETTERS:
        assert pieces(letter) == 1
    assert pieces(" CXK") == 3
    for value in range(GRID + 1):
        n = number(value)
        assert pieces(f" [{n}, {n}, {n}, {n}]") == 5


def test_it_is_the_same_every_time(tokenizer: Any) -> None:
    assert tokens.build().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
