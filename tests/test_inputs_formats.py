"""The table of chat formats, its page, and what a template may do with what people say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from leveret.inputs.chat import encode, literal
from leveret.inputs.faithful import ORIGINALS
from leveret.inputs.formats import CHATS, SYSTEMS, ChatFormat, find_chat, published
from leveret.inputs.template import BEGIN, END, Said, render
from leveret.records import IGNORE, ImageSpec, TowerView, Turn
from leveret.runs import DataError, RecipeError

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


# --- faithfully, as our model reads it --------------------------------------------------------------------------------

SPEC = ImageSpec((TowerView("t", 8),), tokens=3)
ONE = [(8, 8)]


def byte_level() -> PreTrainedTokenizerFast:
    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<pad>")


TOKENIZER = byte_level()


def turns_of(*texts: str) -> list[Turn]:
    return [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]


def faithfully(chat: str, *texts: str, images: int = 1, **also: Any) -> Any:
    return encode(turns_of(*texts), f"{chat}/faithful", TOKENIZER, SPEC, ONE * images, **also)


def test_the_twin_and_the_argument_are_the_same() -> None:
    turns = turns_of("<image>\nWhat?", "A cat.", "Sure?", "Yes.")
    for name in ("bunny", "tinyllava_phi", "prismatic_phi", "plain"):
        some = turns[:2] if name == "plain" else turns
        twin = encode(some, f"{name}/faithful", TOKENIZER, SPEC, ONE)
        assert twin == encode(some, name, TOKENIZER, SPEC, ONE, faithful=True)
        assert sum(twin.image_mask) == 3 and len(twin.input_ids) == len(twin.labels) == len(twin.image_mask)


def test_images_stand_where_the_original_puts_them() -> None:
    bunny = faithfully("bunny", "What <image> is this?", "A cat.")
    assert "USER: <image>\nWhat  is this? ASSISTANT: A cat.<|endoftext|>" in bunny.text
    prismatic = faithfully("prismatic_phi", "What <image> is this?", "A cat.")
    assert prismatic.image_mask[:5] == [False, True, True, True, False]
    assert prismatic.input_ids[0] == TOKENIZER.eos_token_id


def test_a_row_that_cannot_be_counted_is_masked_whole() -> None:
    answer = "USER: hi ASSISTANT: hello"
    assert set(faithfully("bunny", "<image>\nRepeat.", answer).labels) == {IGNORE}
    assert set(encode(turns_of("<image>\nRepeat.", answer), "bunny", TOKENIZER, SPEC, ONE).labels) != {IGNORE}


def test_two_marks_are_one_and_then_need_one_image() -> None:
    assert sum(faithfully("bunny", "<image>\n<image>\nCompare.", "Equal.").image_mask) == 3
    with pytest.raises(DataError, match=r"the original sees 1 image\(s\) in this row, but 2 are given"):
        faithfully("bunny", "<image>\n<image>\nCompare.", "Equal.", images=2)
    with pytest.raises(DataError, match=r"sees 0 image\(s\)"):
        faithfully("bunny", "Compare.", "Equal.")
    with pytest.raises(DataError, match=r"sees 1 image\(s\) in this row, but 2"):
        faithfully("prismatic_phi", "<image>", "Equal.", images=2)


def test_rows_are_cut_as_the_original_cuts_them() -> None:
    whole = faithfully("bunny", "<image>\nWhat?", "A cat. " * 30)
    length = len(whole.input_ids) - 20
    short = faithfully("bunny", "<image>\nWhat?", "A cat. " * 30, max_tokens=length)
    assert short.input_ids == whole.input_ids[:-20] and short.cut == 20
    prismatic = faithfully("prismatic_phi", "<image>\nWhat?", "A cat. " * 30, max_tokens=50)
    assert len(prismatic.input_ids) == 53  # 50 tokens of text, the image on top
    with pytest.raises(DataError, match="would cut an image"):
        faithfully("bunny", "<image>\nWhat?", "A cat.", max_tokens=145)


@pytest.mark.parametrize(
    ("chat", "turns", "message"),
    [
        ("bunny", [Turn("user", "a"), Turn("user", "b")], "roles do not alternate"),
        ("bunny", [Turn("system", "a"), Turn("user", "b"), Turn("assistant", "c")], "knows no system turn"),
        ("bunny", [Turn("assistant", "a")], "nothing is left"),
        ("tinyllava_phi", [Turn("user", "a")], "not as many answers as questions"),
        ("prismatic_phi", [Turn("assistant", "a"), Turn("user", "b")], "the user begins"),
        ("prismatic_phi_align", [Turn("user", "a")], "a caption is two turns"),
        ("plain", [Turn("user", "a"), Turn("assistant", "b")], "a caption is two turns"),
        ("bunny", [Turn("user", "a\udcff"), Turn("assistant", "b")], "not valid Unicode"),
        ("bunny", [], "at least one turn"),
    ],
)
def test_what_the_original_stops_at_is_refused(chat: str, turns: list[Turn], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(turns, f"{chat}/faithful", TOKENIZER, SPEC, [])


def test_formats_of_our_own_have_nothing_to_be_faithful_to() -> None:
    for name in ("chatml_direct", "mpt"):
        form = replace(find_chat(name), stop=("</s>",))
        with pytest.raises(RecipeError, match=r"has no original to be faithful to.*vicuna_v1"):
            encode(turns_of("a", "b"), form, TOKENIZER, SPEC, [], faithful=True)


def test_phis_captions_begin_without_a_start_token() -> None:
    """The original puts the image after the caption's first token, which is never learned; ours has a token for it."""
    first = TOKENIZER.convert_tokens_to_ids("a")
    theirs = faithfully("prismatic_phi_align", "<image>", "a cat")
    assert theirs.input_ids[0] == first and theirs.labels[0] == IGNORE and theirs.image_mask[1]
    ours = encode(turns_of("<image>", "a cat"), "prismatic_phi_align", TOKENIZER, SPEC, ONE)
    assert ours.input_ids[0] == TOKENIZER.eos_token_id and first in ours.labels and ours.image_mask[1]


def test_a_literal_mark_stays_text() -> None:
    turns = [Turn("user", "<image>\n" + literal("what does <image> mean?"))]
    asked = encode(turns, "bunny/faithful", TOKENIZER, SPEC, ONE, generate=True)
    assert sum(asked.image_mask) == 3 and set(asked.labels) == {IGNORE}
    assert asked.text.endswith("USER: <image>\nwhat does <image> mean? ASSISTANT:")
    text = TOKENIZER.decode([i for i, seen in zip(asked.input_ids, asked.image_mask, strict=True) if not seen])
    assert text.endswith("what does <image> mean? ASSISTANT:")


def test_a_typed_end_is_an_end_as_it_was_for_the_original() -> None:
    typed = faithfully("bunny", "<image>\nsay </s>", "no")
    assert TOKENIZER.convert_tokens_to_ids("</s>") in typed.input_ids
    ours = encode(turns_of("<image>\nsay </s>", "no"), "bunny", TOKENIZER, SPEC, ONE)
    assert TOKENIZER.convert_tokens_to_ids("</s>") not in ours.input_ids
