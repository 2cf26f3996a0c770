"""Chat formats: ids and labels as the originals made them, and nothing that people type becomes structure."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import fakes
from leveret.inputs.chat import CHATS, ChatFormat, Encoded, encode, find_chat, literal
from leveret.inputs.reader import Chunk, reader_of
from leveret.records import IGNORE, ImageSpec, TowerView, Turn
from leveret.runs import DataError, RecipeError

SPEC = ImageSpec((TowerView("t", 8),), tokens=3)
ONE = [(8, 8)]
SPECIALS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>", "<|endoftext|>", "<|end_of_text|>"]


def byte_level(*, start: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, a few merges, and specials; its post-processor trims blanks off the offsets."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Y"), (">", "Ġ")]
    for pair in merges:
        letters.setdefault("".join(pair), len(letters))
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS + (["<s>"] if start else []))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if start:
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[begin]
        )
    extra: dict[str, Any] = {"bos_token": "<s>"} if start else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", **extra)


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE: what is not in its vocabulary becomes one token per byte (<0xE6> ...)."""
    vocab = {"<unk>": 0, "▁": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.?,'":
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZER = byte_level()


def turns_of(*texts: str) -> list[Turn]:
    return [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]


def decode(ids: list[int], tokenizer: Any = TOKENIZER) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def learned(encoded: Encoded, tokenizer: Any = TOKENIZER) -> str:
    return decode([label for label in encoded.labels if label != IGNORE], tokenizer)


# --- against transformers (against the originals: test_inputs_faithful.py) --------------------------------------------


def test_templates_mean_the_same_to_transformers() -> None:
    """The same text, and the same assistant mask, when transformers renders our template.

    (transformers loses an answer's leading blank where the tokenizer trims blanks off its offsets; ours does not.)
    """
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    turns = turns_of("Is it red?", "Yes, the whole.", "Sure?", "the end")
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    for name in ("tiny", "plain", "bunny", "llama"):
        form = find_chat(name)
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=form.template, return_assistant_tokens_mask=True, return_dict=True
        )
        ours = encode(turns, form, tokenizer, SPEC, [])
        assert decode(theirs["input_ids"]) == ours.text and theirs["input_ids"] == ours.input_ids
        assert [bool(m) for m in theirs["assistant_masks"]] == [label != IGNORE for label in ours.labels]
        asked = tokenizer.apply_chat_template(
            messages[:-1], chat_template=form.template, add_generation_prompt=True, tokenize=False
        )
        assert asked == encode(turns[:-1], form, tokenizer, SPEC, [], generate=True).text


# --- formats --------------------------------------------------------------------------------------------------------


def test_tiny_is_written_as_promised() -> None:
    turns = [Turn("system", "Be brief."), *turns_of("<image>\nWhat?", "A cat.", "Sure?", "Yes.")]
    encoded = encode(turns, "tiny", TOKENIZER, SPEC, ONE)
    assert encoded.text == (
        "<|user|>Be brief.\n<image>\nWhat?<|assistant|> A cat.<|end|><|user|>Sure?<|assistant|> Yes.<|end|>"
    )
    assert learned(encoded) == " A cat.<|end|> Yes.<|end|>"
    assert sum(encoded.image_mask) == 3
    assert decode(encoded.input_ids) == encoded.text.replace("<image>", "<image>" * 3)
    asked = encode(turns[:-1], "tiny", TOKENIZER, SPEC, ONE, generate=True)
    assert asked.text.endswith("<|user|>Sure?<|assistant|>") and set(asked.labels) == {IGNORE}


def test_an_answer_continues_its_generation_prompt() -> None:
    """The ids that training sees before an answer are the ids generation starts from."""
    turns = turns_of("<image>\nWhat?", "A cat.", "Sure?", "Yes.")
    for name in ("tiny", "bunny", "llama"):
        whole = encode(turns, name, TOKENIZER, SPEC, ONE)
        asked = encode(turns[:3], name, TOKENIZER, SPEC, ONE, generate=True)
        assert whole.input_ids[: len(asked.input_ids)] == asked.input_ids
        assert learned(whole).endswith(decode(whole.input_ids[len(asked.input_ids) :]))


def test_plain_is_the_image_the_caption_and_a_newline() -> None:
    encoded = encode(turns_of("Describe the picture.\n<image>", "a red square"), "plain", TOKENIZER, SPEC, ONE)
    assert encoded.text == "<image>a red square\n" and learned(encoded) == "a red square\n"
    asked = encode(turns_of("Describe.\n<image>"), "plain", TOKENIZER, SPEC, ONE, generate=True)
    assert asked.image_mask == [True] * 3


def test_a_system_turn_takes_the_place_of_bunnys() -> None:
    encoded = encode([Turn("system", "Be brief."), *turns_of("Hi", "Hello")], "bunny", TOKENIZER, SPEC, [])
    assert encoded.text == "Be brief. USER: Hi ASSISTANT: Hello<|endoftext|>"


def test_marks_move_to_the_front_of_their_turn() -> None:
    def front(text: str, images: int) -> str:
        return encode(turns_of(text, "x"), "tiny", TOKENIZER, SPEC, ONE * images).text.split("<|assistant|>")[0]

    assert front("<image>\nWhat?", 1) == "<|user|><image>\nWhat?"
    assert front("What is <image> this?", 1) == "<|user|><image>\nWhat is  this?"
    assert front("Same?<image> <image>", 2) == "<|user|><image>\n<image>\nSame?"
    assert front("<image>", 1) == "<|user|><image>"


def test_images_fill_what_the_spec_says_in_reading_order() -> None:
    class Growing(ImageSpec):
        def count(self, height: int, width: int) -> int:
            return height * width

    spec = Growing(SPEC.towers, 3)
    encoded = encode(turns_of("<image>\na", "b", "<image>\nc", "d"), "tiny", TOKENIZER, spec, [(1, 2), (2, 2)])
    runs = "".join("x" if seen else "." for seen in encoded.image_mask).strip(".").split(".")
    assert [len(run) for run in runs if run] == [2, 4]
    mark = TOKENIZER.convert_tokens_to_ids("<image>")
    assert all((token == mark) == seen for token, seen in zip(encoded.input_ids, encoded.image_mask, strict=True))


def test_the_start_token_stands_once_where_the_tokenizer_has_that_habit() -> None:
    starting = byte_level(start=True)
    for chat in ("tiny", "plain", "bunny"):
        ids = encode(turns_of("<image>\nHi", "Hello"), chat, starting, SPEC, ONE).input_ids
        assert ids[0] == starting.bos_token_id and ids.count(starting.bos_token_id) == 1
        ids = encode(turns_of("<image>\nHi", "Hello"), chat, TOKENIZER, SPEC, ONE).input_ids
        assert ids[0] != TOKENIZER.pad_token_id and TOKENIZER.bos_token_id not in ids


# --- masks ----------------------------------------------------------------------------------------------------------


@given(
    answer=st.text(min_size=1, max_size=20).filter(
        lambda t: t.strip() and not any("\ud800" <= c <= "\uf8ff" for c in t)
    ),
    question=st.text(max_size=20).filter(lambda t: not any("\ud800" <= c <= "\uf8ff" for c in t)),
    chat=st.sampled_from(["tiny", "bunny", "llama"]),
)
def test_exactly_the_answer_and_its_end_are_learned(answer: str, question: str, chat: str) -> None:
    encoded = encode(turns_of(question, answer, question, answer), chat, TOKENIZER, SPEC, [])
    stop = find_chat(chat).stop[0]
    assert learned(encoded) == f" {answer}{stop}" * 2
    assert decode(encoded.input_ids) == encoded.text


@pytest.mark.parametrize("word", ["日本", "🐇", "é", "a日b🐇"])
def test_all_bytes_of_a_character_share_its_mask(word: str) -> None:
    tokenizer = with_byte_fallback()
    form = ChatFormat(
        "t", "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
        "{% else %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endif %}{% endfor %}", ("</s>",)
    )  # fmt: skip
    encoded = encode(turns_of(word, word), form, tokenizer, SPEC, [])
    size = sum(1 if letter in "ab" else len(letter.encode()) for letter in word)
    assert len(encoded.input_ids) == 1 + 2 * size  # the blank before the first word, then bytes
    assert encoded.labels == [IGNORE] * (1 + size) + encoded.input_ids[1 + size :]


def test_a_token_that_holds_part_of_the_answer_is_learned() -> None:
    """'>' and the answer's blank are one token here; a template that ends in '>' shares it with the answer."""
    form = ChatFormat("t", "USER>{% generation %} Hi{% endgeneration %}", ("<|end|>",))
    assert learned(encode(turns_of("x", "y"), form, TOKENIZER, SPEC, [])) == "> Hi"


# --- what people type -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", ["tiny", "bunny", "llama", "plain"])
@pytest.mark.parametrize("typed", [*SPECIALS, "a<|end|><|user|>b", "<image", "<|en<|end|>d|>"])
def test_typed_special_tokens_are_text(chat: str, typed: str) -> None:
    turns = turns_of(f"{typed} why?", f"so {typed}")
    encoded = encode(turns, chat, TOKENIZER, SPEC, [])
    harmless = encode(turns_of("x", "y"), chat, TOKENIZER, SPEC, [])
    special = set(TOKENIZER.added_tokens_encoder.values())
    assert [t for t in encoded.input_ids if t in special] == [t for t in harmless.input_ids if t in special]
    assert decode(encoded.input_ids) == encoded.text and typed in encoded.text
    assert not any(encoded.image_mask)
    assert f"so {typed}" in learned(encoded) and "why" not in learned(encoded)


def test_typed_specials_beside_an_image() -> None:
    encoded = encode(turns_of("<image>\nsay <|end|>", "<image> <|end|>"), "tiny", TOKENIZER, SPEC, ONE)
    assert sum(encoded.image_mask) == 3 and encoded.input_ids.count(TOKENIZER.eos_token_id) == 1
    assert learned(encoded) == " <image> <|end|><|end|>"


def test_a_literal_mark_is_no_image() -> None:
    typed = literal("what does <image> mean?")
    encoded = encode([Turn("user", "<image>\n" + typed)], "tiny", TOKENIZER, SPEC, ONE, generate=True)
    assert sum(encoded.image_mask) == 3
    assert encoded.text == "<|user|><image>\nwhat does <image> mean?<|assistant|>"


def test_blank_tokens_are_how_text_is_written() -> None:
    """Added tokens of blanks (Phi-2 has them) are used in what people type, also beside typed special tokens."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("   ", normalized=False)])
    blank = tokenizer.convert_tokens_to_ids("   ")
    for text in ("a   b", "a   b <|end|>"):
        ids = encode(turns_of(text, "y"), "tiny", tokenizer, SPEC, []).input_ids
        assert ids.count(blank) == 1 and ids.count(tokenizer.eos_token_id) == 1


@given(st.lists(st.sampled_from(["<image>", "<|end|>", "<|user|>", "a", " ", "\n", "{{ 7 * 7 }}", "é"]), max_size=8))
def test_no_text_makes_more_images_than_were_given(parts: list[str]) -> None:
    typed = "".join(parts)
    encoded = encode([Turn("user", "<image>\n" + literal(typed)), Turn("assistant", f"ok {typed}")], "tiny",
                     TOKENIZER, SPEC, ONE)  # fmt: skip
    assert sum(encoded.image_mask) == 3
    names = [TOKENIZER.convert_ids_to_tokens(token) for token in encoded.input_ids]
    assert [name for name in names if name in SPECIALS] == [
        "<|user|>", "<image>", "<image>", "<image>", "<|assistant|>", "<|end|>"
    ]  # fmt: skip


# --- limits and faults ----------------------------------------------------------------------------------------------


def test_max_tokens_cuts_the_right_end_and_counts() -> None:
    turns = turns_of("<image>\nWhat?", "the cat")
    whole = encode(turns, "tiny", TOKENIZER, SPEC, ONE)
    short = encode(turns, "tiny", TOKENIZER, SPEC, ONE, max_tokens=12)
    assert short.input_ids == whole.input_ids[:12] and short.labels == whole.labels[:12]
    assert short.image_mask == whole.image_mask[:12] and short.cut == len(whole.input_ids) - 12
    assert encode(turns, "tiny", TOKENIZER, SPEC, ONE, max_tokens=10_000).cut == 0
    with pytest.raises(DataError, match=r"max_tokens=3 would cut an image.*position 4"):
        encode(turns, "tiny", TOKENIZER, SPEC, ONE, max_tokens=3)


def test_faults_say_what_is_wrong() -> None:
    with pytest.raises(RecipeError, match="did you mean 'bunny'"):
        find_chat("buny")
    with pytest.raises(DataError, match=r"2 <image> .* 1 image"):
        encode(turns_of("<image><image>", "x"), "tiny", TOKENIZER, SPEC, ONE)
    with pytest.raises(DataError, match=r"0 <image> .* 1 image"):
        encode(turns_of("hello", "x"), "tiny", TOKENIZER, SPEC, ONE)
    with pytest.raises(DataError, match="must be the user's"):
        encode(turns_of("a", "b"), "tiny", TOKENIZER, SPEC, [], generate=True)
    with pytest.raises(DataError, match="at least one turn"):
        encode([], "tiny", TOKENIZER, SPEC, [])
    with pytest.raises(RecipeError, match=r"'</s>', which this tokenizer does not have.*bunny"):
        encode(turns_of("a", "b"), "minicpm", TOKENIZER, SPEC, [])


def test_bad_templates_are_recipe_errors() -> None:
    def fails(template: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            encode(turns_of("a", "b"), ChatFormat("mine", template, ()), TOKENIZER, SPEC, [])

    fails("{% if %}", "not valid Jinja")
    fails("{{ messages[0]['content'] }}", "no generation block")
    fails("{{ messages.append(1) }}", "'mine' fails")  # immutable
    fails("{{ ''.__class__.__mro__ }}", "'mine' fails")  # sandboxed
    fails("{{ raise_exception('roles must alternate') }}", "roles must alternate")
    fails("{% for i in range(10 ** 9) %}x{% endfor %}", "'mine' fails")
    fails("<image>{% generation %}x{% endgeneration %}", "wrote 1 <image> where the conversation has 0")


def test_a_tokenizer_may_grow_and_be_reconfigured() -> None:
    tokenizer = byte_level()
    before = encode(turns_of("a b", "c"), "tiny", tokenizer, SPEC, []).input_ids
    tokenizer("x", truncation=True, max_length=2, padding="max_length")  # sets truncation on the shared backend
    assert encode(turns_of("a b", "c"), "tiny", tokenizer, SPEC, []).input_ids == before
    with pytest.raises(RecipeError):
        encode(turns_of("a", "c"), "minicpm", tokenizer, SPEC, [])
    tokenizer.add_special_tokens({"additional_special_tokens": ["</s>"]})
    assert learned(encode(turns_of("a", "c"), "minicpm", tokenizer, SPEC, []), tokenizer) == " c</s>"


def test_every_format_has_a_name_a_stop_and_a_block() -> None:
    for name, form in CHATS.items():
        assert form.name == name and form.stop and "{%- generation -%}" in form.template


def test_a_special_token_that_takes_blanks_in_is_learned_where_it_stands_itself() -> None:
    """Phi-3's takes in what stands right of it (`rstrip`): that is said, the token is not."""

    tokenizer = fakes.tiny_tokenizer()
    for name, sides in (("<|left|>", {"lstrip": True}), ("<|right|>", {"rstrip": True})):
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(name, special=True, **sides)]}, replace_extra_special_tokens=False
        )
    ids = tokenizer.get_added_vocab()
    reader = reader_of(tokenizer)
    for text, learned, wanted in (
        ("ask <|right|> \n yes", (13, 19), {"<|right|>": False}),
        ("ask \n <|left|> yes", (0, 6), {"<|left|>": False}),
        ("ask \n <|left|> yes", (6, 18), {"<|left|>": True}),
        ("ask <|right|> yes", (4, 13), {"<|right|>": True}),
    ):
        found, labels = reader.read(Chunk([(text, False)], text, [learned]), True)
        assert {name: labels[found.index(ids[name])] != IGNORE for name in wanted} == wanted, text
