"""The tiny tokenizer: every string of a user round-trips; the world's words are one piece each."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import world_tokenizer
from leveret.world import tokens
from leveret.world.questions import number
from leveret.world.scenes import COLOURS, GRID, LETTERS, SHAPES


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return world_tokenizer()


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


def test_what_is_built_here_is_what_was_built_for_the_shipped_model(tokenizer: Any) -> None:
    """Then the others may take the shipped one: building takes seconds."""
    built, shipped = (json.loads(one.backend_tokenizer.to_str()) for one in (tokens.build(), tokenizer))
    assert all(built[part] == shipped[part] for part in ("model", "pre_tokenizer", "decoder", "added_tokens"))
