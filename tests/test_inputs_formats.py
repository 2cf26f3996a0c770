"""The table of chat formats, its page, and what a template may do with what people say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leveret.inputs.faithful import ORIGINALS
from leveret.inputs.formats import CHATS, SYSTEMS, ChatFormat, find_chat, published
from leveret.inputs.template import BEGIN, END, Said, render
from leveret.runs import RecipeError

PAGE = Path(__file__).resolve().parents[1] / "docs/chat-formats.md"
SYSTEM_TEXT = (
    r"A chat between.*?questions\.|You are a helpful.*?(natural language|information)\."
    r"|A conversation between.*?answers\.|Answer the questions\."
)


def shown(form: ChatFormat) -> str:
    said = [
        {"role": "user", "content": Said("<image>\nWhat is this?")},
        {"role": "assistant", "content": Said("A cat.")},
    ]
    text = "".join("⟦" if p is BEGIN else "⟧" if p is END else p for p in render(form, said, False))
    return re.sub(SYSTEM_TEXT, "...", text, flags=re.DOTALL).replace("\n", "\\n").replace("|", "\\|")


def test_the_page_shows_what_every_format_writes() -> None:
    lines = re.findall(r"^\| `(\w+)` \| \w+ \| `(.*)` \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert dict(lines) == {name: shown(form) for name, form in CHATS.items() if not form.faithful}
    assert len(lines) == len(dict(lines))


def test_every_original_is_somebodys_and_every_format_knows_its_own() -> None:
    named = {form.original for form in CHATS.values()}
    assert set(ORIGINALS) <= named | {"bunny", "bunny_start"}
    assert named - set(ORIGINALS) == {"", "bunny_phi3"}
    for name, rule in ORIGINALS.items():
        assert rule.name == name


@pytest.mark.parametrize(
    ("system", "name", "ours"),
    [
        ("Bunny", "phi3", "phi3"),
        ("LLaVA", "v1", "vicuna_v1"),
        ("LLaVA", "plain", "plain"),
        ("TinyLLaVA", "phi", "tinyllava_phi"),
        ("TinyLLaVA", "llama", "tinyllava_llama"),
        ("Prismatic", "PurePromptBuilder", "prismatic_pure"),
        ("Prismatic", "llama2_chat", "prismatic_llama2_chat"),
    ],
)
def test_published_names(system: str, name: str, ours: str) -> None:
    assert published(system, name) is find_chat(ours)


def test_unknown_names_are_refused_with_what_there_is() -> None:
    with pytest.raises(RecipeError, match=", ".join(SYSTEMS)):
        published("Flamingo", "v1")
    with pytest.raises(RecipeError, match="did you mean 'prismatic_pure'"):
        published("Prismatic", "pur")


def test_what_a_turn_is_tidied_into_is_still_said() -> None:
    """Prismatic's templates strip turns; a special token typed in one must not become structure by that."""
    form = CHATS["prismatic_pure"]
    messages = [{"role": "user", "content": Said("<image>\n say </s> ")}]
    pieces = list(render(form, messages, True))
    assert [str(piece) for piece in pieces if type(piece) is Said] == ["say </s>"]
    assert "".join(pieces) == "<image>In: say </s>\nOut:"


def test_the_bracket_that_llama2_chat_lacks() -> None:
    form, messages = CHATS["prismatic_llama2_chat"], [{"role": "user", "content": Said("Hi")}]
    assert "".join(render(form, messages, True)).startswith("[INST] <<SYS>>\nYou are")
    assert "".join(render(form, messages, True, faithful=True)).startswith("[INST] <<SYS>\nYou are")


def test_a_system_turn_takes_the_place_of_the_formats_own() -> None:
    messages = [{"role": "system", "content": Said("Be brief.")}, {"role": "user", "content": Said("Hi")}]
    for name in (
        "vicuna_v1",
        "llava_llama_2",
        "mpt",
        "tinyllava_llama",
        "prismatic_vicuna_v15",
        "prismatic_llama2_chat",
    ):
        text = "".join(render(CHATS[name], messages, True))
        assert "Be brief." in text and "helpful" not in text, name


def test_every_format_with_an_original_has_a_faithful_twin() -> None:
    twins = {name.removesuffix("/faithful") for name, form in CHATS.items() if form.faithful}
    assert twins == {name for name, form in CHATS.items() if form.original and not form.faithful}
    said = [{"role": "user", "content": Said("Hi")}]
    assert "<<SYS>\n" in "".join(render(CHATS["prismatic_llama2_chat/faithful"], said, True))
