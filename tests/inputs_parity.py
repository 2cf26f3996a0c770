"""The folders of parity data, read as their README says: tokenizers, rows, cases, images. For the tests of inputs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from leveret.inputs.formats import ChatFormat, published
from leveret.inputs.template import Said, render
from leveret.records import Turn

HERE = Path(__file__).resolve().parents[2] / "shared" / "parity"
PARITY = Path(os.environ.get("LEVERET_PARITY", HERE))
SYSTEMS = {"Bunny": "Bunny", "LLaVA": "LLaVA", "TinyLLaVA_Factory": "TinyLLaVA", "prismatic-vlms": "Prismatic"}
ROLES = {"human": "user", "gpt": "assistant"}


def folders(file: str, key: str = "") -> list[Any]:
    """Parameters of a test: folders that hold `file`, with `key` in its first case; one that skips where none does."""
    found = [path.parent for path in sorted(PARITY.glob(f"*/{file}")) if not key or key in read(path)["cases"][0]]
    if found:
        return [pytest.param(folder, id=folder.name) for folder in found]
    return [pytest.param(PARITY, marks=pytest.mark.skip(f"no */{file} in {PARITY}: set LEVERET_PARITY"), id="none")]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def system_of(folder: Path) -> str:
    return SYSTEMS[read(folder / "cases.json")["meta"]["system"]]


def parts(folder: Path) -> list[tuple[str, ChatFormat, dict[str, Any]]]:
    """(name, chat format, part) for every part of training.json that holds rows."""
    system, training = system_of(folder), read(folder / "training.json")
    found = []
    for name, part in training.items():
        if not isinstance(part, dict) or "rows" not in part:
            continue
        said = part.get("template") or part.get("prompt_builder")
        if said is None:  # Prismatic's captions: the one template there is, with the tokenizer's end token
            said = "phi_align" if training["tokenizer"]["eos_token"] == "<|endoftext|>" else "align"
        found.append((name, published(system, said), part))
    return found


def turns_of(row: dict[str, Any]) -> list[Turn]:
    return [Turn(ROLES[said["from"]], said["value"]) for said in row["conversations"]]  # type: ignore[arg-type]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in force when the rows were made: read as the original reads it, with its special tokens.

    Those that were "slow" are built from vocabulary and class; the others take tokenizer.json to the letter.
    """
    said = read(folder / "training.json")["tokenizer"]
    homes = {path.parent for name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in folder.rglob(name)}
    saved = [home for home in sorted(homes) if (home / "tokenizer.json").is_file() or said.get("slow")]
    loader, wrong = AutoTokenizer if said.get("slow") else PreTrainedTokenizerFast, []
    for source in sorted(saved, key=lambda home: ("hub" in home.parts, len(home.parts))):  # a checkpoint's own first
        if not (source / "tokenizer.json").is_file() and (source / "tokenizer.model").is_file():
            pytest.importorskip("sentencepiece", reason="tokenizer.model needs sentencepiece")
        tokenizer = loader.from_pretrained(source)
        if tokenizer.convert_tokens_to_ids([said["pad_token"]]) != [said["pad_token_id"]]:
            tokenizer.add_special_tokens({"pad_token": said["pad_token"]})
        tokenizer.pad_token, tokenizer.eos_token = said["pad_token"], said["eos_token"]
        if (tokenizer.pad_token_id, tokenizer.eos_token_id) == (said["pad_token_id"], said["eos_token_id"]):
            return tokenizer
        wrong.append(source)
    raise AssertionError(f"no tokenizer of {folder} has the special tokens of training.json: {wrong}")


def chat_of(folder: Path) -> ChatFormat:
    """The format of the cases' prompts."""
    meta = read(folder / "cases.json")["meta"]
    name = meta.get("conversation_template") or meta.get("prompt_builder") or meta["template"]
    return published(system_of(folder), name)


def cases(folder: Path) -> list[dict[str, Any]]:
    return [case for case in read(folder / "cases.json")["cases"] if "prompt" in case]


def conversation_of(prompt: str, chat: ChatFormat) -> list[Turn] | None:
    """The turns a prompt was written from, found by matching it with what the template writes; None if it is none's."""
    for answers in range(4, -1, -1):
        messages = [{"role": ("user", "assistant")[i % 2], "content": Said(f"TURN{i}")} for i in range(2 * answers + 1)]
        pattern = re.escape("".join(render(chat, messages, True, faithful=True)).rstrip())
        for place in range(len(messages)):
            pattern = pattern.replace(f"TURN{place}", "(.*?)", 1)
        if match := re.fullmatch(pattern, prompt, re.DOTALL):
            return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(match.groups())]  # type: ignore[arg-type]
    return None
