"""The commands of the documentation: they parse, the recipes they name are there, and what no test can run says so."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from docs_pages import HISTORY, PAGES, REPO, Command, blocks, commands, found, inline, named

ALL = [command for page in PAGES if named(page) not in HISTORY for block in blocks(page) for command in commands(block)]
OURS = [command for command in ALL if command.program == "leveret"]
RUNS_ANYWHERE = {"leveret", "make", "python", "tar", "mkdir", "cd", "export", "pytest", "tensorboard"}
HUB = re.compile(r"^(?:\w[\w.]*\.from=)?(?:[A-Z][\w-]*|openai|google|me)/[\w.+-]+$")


def options(command: Command) -> set[str]:
    return {word.partition("=")[0] for word in command.words if word.startswith("-")}


def test_there_are_commands_to_look_at() -> None:
    assert len(OURS) > 150 and {"README.md", "docs/own-data.md", "docs/tutorials/million.md"} <= {c.page for c in OURS}
    assert {len(command.words) for command in OURS} - {1}


def fault_of(command: Command) -> str:
    """Why the command line would be refused as such; "" where it would not be."""
    words = [word.split("|")[0] if re.fullmatch(r"\w+(\|\w+)+", word) else word for word in command.words[1:]]
    try:
        ours, rest = found(words)
        if not hasattr(ours, "commands"):
            ours.make_context("leveret", rest)  # a usage error where an option or an argument does not fit
    except Exception as fault:
        return str(fault.format_message() if hasattr(fault, "format_message") else fault)
    return ""


def test_every_command_parses() -> None:
    faults = [f"{command}: {fault}" for command in OURS if (fault := fault_of(command))]
    assert not faults, "\n".join(faults)


def test_what_is_wrong_on_a_page_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text with `leveret nothing`.\n\n"
        "    leveret trian world -o OUT\n"
        "    leveret train world --outt OUT    # a note\n"
        "    leveret condense DATA -r world\n"
        "    leveret eval MODEL DATA -o OUT \\\n"
        "        -n many\n\n"
        "```sh\n# needs a GPU\nvllm serve OUT\n\nvllm serve OUT\n"
        "leveret chat MODEL photo.jpg --load-in 4bit  # not run\n```\n\n"
        "```python\nleveret = 1\n```\n"
    )
    told = [command for block in blocks(page) for command in commands(block)]
    assert [command.words[:2] for command in told] == [
        ("leveret", "trian"), ("leveret", "train"), ("leveret", "condense"), ("leveret", "eval"), ("vllm", "serve"),
        ("vllm", "serve"), ("leveret", "chat"),
    ]  # fmt: skip
    assert [command.line for command in told[:4]] == [3, 4, 5, 6] and told[3].words[-2:] == ("-n", "many")
    assert "no command 'trian'" in fault_of(told[0]) and "--outt" in fault_of(told[1])
    assert "--out" in fault_of(told[2]) and "-n" in fault_of(told[3]) and not fault_of(told[6])
    assert [command.marked for command in told[4:]] == [True, False, True] and not told[1].marked
    assert all(why(command) for command in told[4:])


def test_commands_in_the_text_are_there_and_so_are_their_options() -> None:
    faults, seen = [], 0
    for page in PAGES:
        if named(page) in HISTORY:
            continue
        for text in inline(page):
            if not re.match(r"leveret [a-z]", text):
                continue
            words = re.sub(r"[\[\]]", " ", text).split()[1:]
            seen += 1
            try:
                ours, rest = found([word for word in words if word != "|"])
            except AssertionError as fault:
                faults.append(f"{named(page)}: `{text}`: {fault}")
                continue
            known = {"-h", "--help", *(flag for one in ours.params for flag in (*one.opts, *one.secondary_opts))}
            strange = [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
            faults += [f"{named(page)}: `{text}`: no option {word}" for word in strange]
    assert not faults, "\n".join(faults)
    assert seen > 80


def is_placeholder(word: str) -> bool:
    return word.isupper() or word.endswith((".yaml", ".yml")) or ".yaml/" in word


def test_the_recipes_they_name_are_there_and_take_their_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leveret.condense.steps import read as condensing
    from leveret.recipe import names
    from leveret.train.run import read as training

    monkeypatch.chdir(tmp_path)
    faults, seen = [], 0
    for command in OURS:
        words = list(command.words[1:])
        verb, given = words[0], [word for word in words if re.match(r"^[a-z_][\w.]*=", word)]
        try:
            if verb == "train" and not is_placeholder(words[1]):
                if not any(one.startswith(f"{words[1]}/") for one in names("models")):  # a table: it says its rows
                    training(words[1], given)
                    seen += 1
            elif verb == "condense" and "-r" in words:
                recipe = words[words.index("-r") + 1]
                if not is_placeholder(recipe):
                    condensing(recipe, given)
                    seen += 1
            elif words[:2] == ["pool", "get"] and not is_placeholder(words[2]):
                assert words[2] in names("data"), words[2]
                seen += 1
            elif words[:2] == ["study", "run"] and not is_placeholder(words[2]):
                assert words[2] in names("studies"), words[2]
                seen += 1
        except Exception as fault:
            faults.append(f"{command}: {fault}")
    assert not faults, "\n".join(faults)
    assert seen > 25


def why(command: Command) -> str:
    """What a command needs that no test has; "" where it needs nothing."""
    words, given = command.words, options(command)
    if command.program not in RUNS_ANYWHERE:
        return f"{command.program} is not ours"
    if command.program != "leveret" or "--dry-run" in given:
        return ""
    verb = words[1:3]
    if verb == ("pool", "get") or words[1] == "push":
        return "it reaches the network"
    if {"--judge"} & given or any(word.startswith("openai:") for word in words):
        return "it asks an endpoint"
    if "--load-in" in given or "cuda" in words or any("bits: 4" in word for word in words):
        return "a GPU"
    if any(HUB.match(word) for word in words[2:]) and words[1] != "train":
        return "a model of the hub"
    if words[1] == "train" and "/" in words[2] and ".yaml" not in words[2]:
        return "a real model"
    return ""


def test_what_no_test_can_run_says_what_it_needs() -> None:
    silent = [f"{command}  ({why(command)})" for command in ALL if why(command) and not command.marked]
    assert not silent, (
        "these need more than a test has; a comment beside or above them must say so "
        "(needs a GPU, needs the network, needs NAME, not run):\n" + "\n".join(silent)
    )
    assert sum(command.marked for command in ALL) > 10


def test_python_and_yaml_blocks_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python parses, and what it imports of leveret is there; YAML and JSON are read."""
    monkeypatch.syspath_prepend(REPO / "docs" / "making")
    from names import find

    read = {"yaml": yaml.safe_load, "json": json.loads, "python": ast.parse}
    faults, seen = [], Counter[str]()
    for page in PAGES:
        for block in blocks(page):
            if block.language not in read:
                continue
            seen[block.language] += 1
            try:
                found = read[block.language](block.text)
                if block.language == "python":
                    for line in ast.walk(found):
                        if isinstance(line, ast.ImportFrom) and (line.module or "").startswith("leveret."):
                            for one in line.names:
                                find(str(line.module), one.name)
            except Exception as fault:
                faults.append(f"{block.page}:{block.line}: {fault!r}")
    assert not faults, "\n".join(faults)
    assert seen["python"] > 15 and seen["yaml"] > 15
