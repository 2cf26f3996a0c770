"""A tokenizer as llama.cpp reads it: pieces, types, scores or merges, how text is split first, special tokens.

llama.cpp runs no regular expression of a file: it has a name for each rule that it knows. The names stand in
`src/llama-vocab.cpp`; here a rule is recognised by what tokenizer.json says, not by whose tokenizer it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leveret.inputs.formats import ChatFormat
from leveret.inputs.reader import reader_of
from leveret.runs import RecipeError

# gguf.TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # what SentencePiece writes for a blank

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBER"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN, _LLAMA = _WORDS.replace("NUMBER", ""), _WORDS.replace("NUMBER", "{1,3}")
_RULES: dict[tuple[str, ...], tuple[str, str]] = {
    ("gpt2",): ("gpt-2", ""),
    ("digits", "gpt2"): ("smollm", ""),
    (_QWEN, "bytes"): ("qwen2", ""),
    (_LLAMA, "bytes"): ("smaug-bpe", "llama-bpe"),
}
"""How text is split -> llama.cpp's name for it, where merges decide and where whole words go before them ("": none)."""


@dataclass(frozen=True)
class Vocabulary:
    """keys: name of a method of gguf's writer (without `add_`) -> value. notes: what is not the same there."""

    keys: dict[str, Any]
    notes: list[str]


def vocabulary(tokenizer: Any, form: ChatFormat, rows: int, end: int | None = None) -> Vocabulary:
    """The tokenizer with special tokens and chat template.

    rows  of the language model's token table: pieces beyond are left out, missing ones filled up.
    end   the language model's own end token, where the tokenizer has none.

    RecipeError where llama.cpp has no name for the way it splits.
    """
    if tokenizer is None:
        raise RecipeError("llama.cpp needs a tokenizer in the file, and this model has none")
    start = reader_of(tokenizer).start  # also where it is known that there is a tokenizer.json
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise RecipeError(f"llama.cpp: a tokenizer of the kind {model['type']} is not written here, only BPE is")
    words = _pieces(state) if model.get("byte_fallback") else _bytes(state)
    tokens, types = _tokens(state, rows, bool(model.get("byte_fallback")), tokenizer.unk_token)
    keys: dict[str, Any] = dict(words.keys) | {"token_list": tokens, "token_types": types}
    if model.get("byte_fallback"):
        keys["token_scores"] = _scores(model, tokens)
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "sep", "pad")}
    if special["eos"] is None:
        special["eos"] = end
    keys |= {f"{name}_token_id": token for name, token in special.items() if token is not None and token < rows}
    known = {token["content"]: token["id"] for token in state["added_tokens"]}
    for stop in form.stop:
        if (token := known.get(stop)) is not None and token != special["eos"]:
            keys["eot_token_id"] = token
    keys |= {"add_bos_token": bool(start), "add_eos_token": False, "chat_template": chat_template(form)}
    return Vocabulary(keys, words.notes)


# llama-server hands a turn's images over as texts like <__media_k3J__>, where they stood between the texts.
_IMAGES = """\
{%- set seen = namespace(mark='', turns=[]) -%}
{%- for message in messages -%}
    {%- set words = message['content'] -%}
    {%- if message['role'] == 'user' and '<__media' in words -%}
        {%- set seen.mark = '<__media' + words.split('<__media')[1].split('__>')[0] + '__>' -%}
        {%- set count = (words.split(seen.mark) | length) - 1 -%}
        {%- set words = '<image>\n' * count + words.replace(seen.mark, '').replace('<image>', 'image') -%}
    {%- endif -%}
    {%- set seen.turns = seen.turns + [{'role': message['role'], 'content': words}] -%}
{%- endfor -%}
{%- set messages = seen.turns -%}
{%- set written -%}
TEMPLATE
{%- endset -%}
{{- written.replace('<image>', seen.mark) if seen.mark else written -}}
"""


def chat_template(form: ChatFormat) -> str:
    """The format's template for llama.cpp: a turn's images come first, each with a newline behind it, as the model was
    taught; in place of what llama.cpp's Jinja has not (`count`, generation blocks) stands what it has."""
    body = form.template.strip().replace("message['content'].count('<image>')", _COUNT)
    body = re.sub(r"(\{%-?) generation (-?%\})", r"\1 if true \2", body)
    body = re.sub(r"(\{%-?) endgeneration (-?%\})", r"\1 endif \2", body)
    return _IMAGES.replace("TEMPLATE", body)


_COUNT = "((message['content'].split('<image>') | length) - 1)"


def _bytes(state: Mapping[str, Any]) -> Vocabulary:
    """Byte-level BPE, llama.cpp's "gpt2"."""
    signs: list[str] = []
    if (state["normalizer"] or {}).get("type", "NFC") != "NFC":  # llama.cpp leaves text as it comes
        signs.append(f"normalised by {state['normalizer']['type']}")
    first = state["pre_tokenizer"] or {}
    for step in first.get("pretokenizers", [first]):
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            signs.append("gpt2" if step.get("use_regex", True) else "bytes")
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            signs.append("digits")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            signs.append(str(step["pattern"].get("Regex")))
        else:
            signs.append(f"{step.get('type')}?")
    model = state["model"]
    name = _RULES.get(tuple(signs), ("", ""))[1 if model.get("ignore_merges") else 0]
    if not name:
        raise RecipeError(
            f"llama.cpp has no name for how this tokenizer splits text ({', '.join(signs)}); known here are those of "
            "GPT-2, SmolLM, Qwen2, Llama 3 and SentencePiece"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocabulary({"tokenizer_model": "gpt2", "tokenizer_pre": name, "token_merges": merges}, [])


def _pieces(state: Mapping[str, Any]) -> Vocabulary:
    """SentencePiece's BPE with bytes for what it does not know, llama.cpp's "llama"."""
    normal, first = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    steps = normal.get("normalizers", [normal] if normal else [])
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    metaspace = first.get("type") == "Metaspace" and first.get("replacement") == SPACE and not first.get("split")
    before = first.get("prepend_scheme", "always") if metaspace else ""
    if metaspace and not steps:
        prefix = before != "never"
    elif steps == [{"type": "Prepend", "prepend": SPACE}, blank] and not first:
        prefix = True
    elif steps == [blank] and (not first or first == _SPLIT):
        prefix = False
    else:
        raise RecipeError(
            "llama.cpp has no name for how this tokenizer splits text (byte fallback, but not SentencePiece's way of "
            "writing blanks)"
        )
    if missing := [n for n in range(256) if f"<0x{n:02X}>" not in state["model"]["vocab"]]:
        raise RecipeError(f"llama.cpp needs a token for every byte, and this tokenizer has none for {missing[0]}")
    notes = []
    if metaspace and prefix:
        where = "the first text alone, and only" if before == "first" else "a text only"
        notes.append(
            f"this tokenizer puts a blank before {where} where none stands already; llama.cpp puts one before every "
            "text that follows a special token: ids may differ there"
        )
    return Vocabulary({"tokenizer_model": "llama", "tokenizer_pre": "default", "add_space_prefix": prefix}, notes)


_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _tokens(state: Mapping[str, Any], rows: int, pieces: bool, unknown: str | None) -> tuple[list[str], list[int]]:
    """Texts and types of ids 0 to `rows`."""
    tokens, types = [f"[PAD{n}]" for n in range(rows)], [UNUSED] * rows
    for text, place in state["model"]["vocab"].items():
        if place < rows:
            byte = pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            tokens[place], types[place] = text, BYTE if byte else UNKNOWN if text == unknown and pieces else NORMAL
    for token in state["added_tokens"]:
        place, text = token["id"], token["content"]
        if place < rows:
            tokens[place] = text
            if types[place] != UNKNOWN:
                types[place] = CONTROL if token["special"] else USER_DEFINED
    return tokens, types


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """The earlier a merge makes a piece, the higher its score: the order in which SentencePiece joins, which is all
    that llama.cpp reads off the scores."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(model["merges"]):
        rank.setdefault(pair.replace(" ", "") if isinstance(pair, str) else "".join(pair), place)
    never = len(rank) + len(model["merges"])
    return [-float(rank.get(text, never)) for text in tokens]
