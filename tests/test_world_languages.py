"""The smaller language models and what they read; the world's fields and the suite that studies of them use."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import world_tokenizer
from leveret.evaluate.tasks import SUITES, asked, load_items
from leveret.model.language import describe, load_language, load_tokenizer
from leveret.model.recipe import LanguageRecipe
from leveret.runs import RecipeError, read_json, sha256_of
from leveret.world import language
from leveret.world.backbones import wanted
from leveret.world.examination import MORE, ask
from leveret.world.languages import LANGUAGES, files_of
from leveret.world.plain import PLAIN, stated
from leveret.world.questions import EXAM, READER, REFUSAL, TEXT_FORMS, TUNE_WEIGHTS, conversation, text_only
from leveret.world.reading import FULL, PHASES, WEIGHTS, Writer, phase_at
from leveret.world.scenes import COLOURS, SHAPES, sample_scene, stream
from leveret.world.write import WorldSize, draw, same_world

TINY = {"seed": 0, "log": lambda *_, **__: None, "width": 32, "layers": 1}


# --- what they read --------------------------------------------------------------------------------------------------


def test_running_text_states_the_very_facts_that_conversations_ask_for() -> None:
    """Scene by scene and turn by turn, the same kinds about the same things; a fact where there is an answer."""
    seen = set()
    for index in range(150):
        about = {}
        for register in (READER, PLAIN):
            rng = stream(0, "facts", index)
            scene = sample_scene(rng, word=0.45, novel_pairs=None)
            about[register.option] = conversation(scene, rng, 10, WEIGHTS, register, describe=0.3)
        for question, told in zip(*about.values(), strict=True):
            assert question.kind == told.kind and question.meta.keys() == told.meta.keys()
            pair = stated(told)
            assert pair is not None and "?" not in "".join(pair) and "\n" not in pair[0]
            if question.kind == "choice":
                assert pair[1] == question.meta["choices"][question.meta["index"]]
            elif question.kind not in ("existence", "relation", "tell", "names"):
                assert pair[1] == question.answer
            seen.add(question.kind)
    assert seen >= set(WEIGHTS) | {"tell"}


def test_running_text_holds_nothing_of_a_conversation_and_nothing_withheld() -> None:
    """No mark of a turn, no question, no refusal; none of the examination's own words for what is held out."""
    writer = Writer(world_tokenizer(), plain=True)
    for step in (0, 3000, 7000, 11000):
        for index in range(40):
            row = writer.training_row(stream(0, f"plain-{step}", index), step)
            if not row["ids"]:
                continue
            assert not {writer.user, writer.assistant} & set(row["ids"])
            assert row["ids"][0] == row["ids"][-1] == writer.end and len(row["ids"]) == len(row["weights"])
            text = writer.tokenizer.decode(row["ids"])
            assert "?" not in text and REFUSAL not in text and "True" not in text
    assert set(PLAIN.phrases) == set(READER.phrases), "what READER has no words for has none here"
    for kind in ("colour", "word", "count", "count/all", "relation"):
        assert not set(EXAM.phrases[kind].values()) & set(PLAIN.phrases.get(kind, {}).values())


def test_hints_of_running_text_stand_at_the_words_that_name_the_things() -> None:
    writer = Writer(world_tokenizer(), plain=True)
    seen = 0
    for index in range(150):
        row = writer.training_row(stream(0, "hints", index), 8000)
        for at, numbers in row["hinted"]:
            assert writer.tokenizer.decode([row["ids"][at]]).strip() in SHAPES and len(numbers) == 4
            seen += 1
    assert seen > 20


def test_a_text_only_question_as_a_statement() -> None:
    rng = stream(0, "statements", 0)
    forms = {form: stated(text_only(rng, PLAIN, form=form)) for form in TEXT_FORMS}
    assert forms.pop("refuse") is None
    assert all((pair and pair[0][0].isupper()) or pair[0][0].isdigit() for pair in forms.values() if pair)
    one, two = forms["sum"][0].removesuffix(" is").split(" plus ")  # type: ignore[index]
    assert int(one) + int(two) == int(forms["sum"][1])  # type: ignore[index]


def test_a_shorter_reading_comes_to_each_phase_as_much_earlier() -> None:
    for steps in (FULL, FULL // 2, 300):
        starts = [next(s for s in range(steps) if phase_at(s, steps) is phase) for phase in PHASES]
        assert starts == [-(-phase.start * steps // FULL) for phase in PHASES]


# --- teaching them ---------------------------------------------------------------------------------------------------


def test_a_reading_that_is_stopped_and_one_that_goes_on_end_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running text, then conversations from its last state; stopped in both, or in none."""
    monkeypatch.setattr(language, "examine", lambda *_, **__: {"shape": 0.0})
    monkeypatch.setattr(language, "pretrain", partial(language.pretrain, save_every=1))
    tokenizer = world_tokenizer()

    def read(out: Path, stops: tuple[int | None, ...]) -> dict[str, bytes]:
        teach = partial(language.train_language, out, tokenizer=tokenizer, steps=2, **TINY)
        for stop in stops:
            teach(folder=out / "a", place="languages/base", plain=True, stop_after=stop)
        for stop in stops:
            teach(folder=out / "b", place="languages/after", after=out / "a", stop_after=stop)
        names = ("languages/base", "languages/after")
        return {name: (out / name / "model.safetensors").read_bytes() for name in names}

    whole, stopped = read(tmp_path / "whole", (None,)), read(tmp_path / "stopped", (1, None))
    assert whole == stopped and whole["languages/base"] != whole["languages/after"]


def test_a_model_that_goes_on_begins_where_the_other_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leveret.train import state
    from leveret.world.pretrain import begin_from

    monkeypatch.setattr(language, "examine", lambda *_, **__: {"shape": 0.0})
    tokenizer = world_tokenizer()
    language.train_language(tmp_path, tmp_path / "a", tokenizer, steps=2, **TINY)
    net = language.build_language(832, 1, 0, width=32, layers=1)
    scenes = language.ToldScene(32, 0.05)
    assert begin_from(tmp_path / "a", {"model": net, "scenes": scenes}) == 2
    tensors, _ = state.load(state.latest(tmp_path / "a") or tmp_path)
    assert torch.equal(tensors["weights/scenes.sides"], scenes.sides)


def test_backbones_by_name_bring_what_they_go_on_from() -> None:
    assert wanted(["language-small"]) == ("language-small-base", "language-small")
    assert wanted(["world/language-small-base"]) == ("language-small-base",)
    assert {"vision", "scorer", "language", "language-small"} <= set(wanted([]))
    with pytest.raises(RecipeError, match=r"no such backbone.*Did you mean language-small\?"):
        wanted(["language-smal"])


# --- those that are shipped ------------------------------------------------------------------------------------------

SHIPPED = Path(str(files("leveret") / "world" / "weights"))


def test_what_is_shipped_is_what_the_card_says() -> None:
    card = read_json(SHIPPED / "languages" / "card.json")
    assert card["steps"] == {name: kind.steps for name, kind in LANGUAGES.items()}
    assert card["supervision"] == {name: kind.about for name, kind in LANGUAGES.items()}
    there = {path for name in LANGUAGES for path in files_of(SHIPPED, name)}
    assert {SHIPPED / "languages" / name for name in card["files"]} == there
    for name, facts in card["files"].items():
        assert sha256_of(SHIPPED / "languages" / name) == facts["sha256"], name
    assert sum(path.stat().st_size for path in there) < 2_000_000
    assert all(path.suffix in (".json", ".safetensors") for path in there)


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_shipped_one_loads_by_name_and_speaks_the_same_tokens(name: str) -> None:
    recipe = LanguageRecipe(name=f"world/{name}")
    facts, large = describe(recipe), describe(LanguageRecipe(name="world/language"))
    model = load_language(facts)
    assert sum(weight.numel() for weight in model.parameters()) == 398_496
    assert facts.vocab == large.vocab and facts.attention == "eager"
    text = "<|user|>Is there a red ring in the image?<|assistant|> Yes<|end|>"
    assert load_tokenizer(recipe.name)(text).input_ids == load_tokenizer("world/language")(text).input_ids


def test_the_base_model_ends_statements_and_the_instructed_one_answers() -> None:
    """What each was taught on told scenes, in its own form; the base was never asked anything."""
    card = read_json(SHIPPED / "languages" / "card.json")["figures"]
    base, after = card["language-small-base"]["told as compounds"], card["language-small"]["told as compounds"]
    assert base["shape"] > 0.9 and base["shape, asked"] < 0.1
    assert after["shape"] > 0.8 and after["choice"] > 0.9 and "shape, asked" not in after


# --- the world's fields ----------------------------------------------------------------------------------------------

SMALL = WorldSize(web=4, tune=24, test=6, harder=6, captions=0, text_share=1.0)


def turns(root: Path, prefix: str) -> list[tuple[str, str]]:
    """(question, answer) of the tuning data, text-only or about pictures."""
    found = []
    for record in json.loads((root / "tune.json").read_text()):
        if record["id"].startswith(prefix):
            said = [turn["value"] for turn in record["conversations"]]
            found += list(zip(said[::2], said[1::2], strict=True))
    return found


def test_refusals_and_how_often_kinds_are_asked_change_what_they_say_and_nothing_else(tmp_path: Path) -> None:
    usual, none, all_, less = (draw(tmp_path / name, size=size, workers=1) for name, size in {
        "usual": SMALL,
        "none": replace(SMALL, refusals=0.0),
        "all": replace(SMALL, refusals=1.0),
        "less": replace(SMALL, asked={"word": 0, "count": 0}),
    }.items())  # fmt: skip
    refused = {root.name: [a for _, a in turns(root, "text-")].count(REFUSAL) for root in (usual, none, all_)}
    assert refused["none"] == 0 < refused["usual"] < refused["all"] == 24 * 10
    assert turns(usual, "tune-") == turns(none, "tune-"), "what is asked about pictures stays"
    asked_for = [question for question, _ in turns(less, "tune-")]
    assert not any("How many" in question and "objects" in question for question in asked_for)
    assert not any("word is written" in question for question in asked_for)
    assert any("word is written" in question for question, _ in turns(usual, "tune-"))
    for root in (none, less):
        for file in sorted(path for path in usual.rglob("*") if path.is_file()):
            name = file.relative_to(usual)
            if name.as_posix() not in ("tune.json", "world.json"):
                assert file.read_bytes() == (root / name).read_bytes(), name


def test_a_kind_asked_more_seldom_and_captions_that_are_short(tmp_path: Path) -> None:
    size = replace(SMALL, web=80, tune=40, plain=0.0)
    usual, other = (draw(tmp_path / name, size=size, workers=1) for name, size in {
        "usual": size, "other": replace(size, asked={"count": 0.1}, plain=1.0),
    }.items())  # fmt: skip
    counted = [sum("How many" in question for question, _ in turns(root, "tune-")) for root in (usual, other)]
    assert 0 < counted[1] < counted[0] / 3
    words = []
    for root in (usual, other):
        truth = [json.loads(line) for line in (root / "web_truth.jsonl").read_text().splitlines()]
        told = [record["conversations"][1]["value"] for record in json.loads((root / "web.json").read_text())]
        words.append([caption for caption, row in zip(told, truth, strict=True) if row["words"] != "dull"])
    assert len(words[0]) == len(words[1]), "the same pairs are wrong, dull and copied"
    assert sum(map(len, words[1])) < 0.8 * sum(map(len, words[0]))


def test_a_world_that_says_nothing_of_the_new_fields_is_the_same_as_before(tmp_path: Path) -> None:
    plain = same_world(tmp_path, 0, WorldSize())
    assert not {"refusals", "asked", "plain", "oblong"} & plain.keys()
    assert same_world(tmp_path, 0, WorldSize(refusals=0.2, asked={"word": 1})) == plain
    told = same_world(tmp_path, 0, WorldSize(refusals=0.5, asked={"word": 0}))
    assert told["refusals"] == 0.5 and told["asked"] == {"word": 0.0}


def test_a_folder_of_another_share_of_refusals_is_refused(tmp_path: Path) -> None:
    root = draw(tmp_path / "w", size=replace(SMALL, web=2, tune=4, asked={"word": 0}), workers=1)
    assert draw(root, size=replace(SMALL, web=2, tune=4, asked={"word": 0.0}), workers=1) == root
    with pytest.raises(RecipeError, match=r"holds another world: .*asked \{'word': 0.0\} \(wanted \{\}\)"):
        draw(root, size=replace(SMALL, web=2, tune=4), workers=1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"refusals": 1.5}, "refusals=1.5: a share of the text-only questions"),
        ({"refusals": "some"}, "refusals='some': a share"),
        ({"plain": -1}, "plain=-1: a share of the captions"),
        ({"asked": "word"}, "asked='word': kind of question -> how often"),
        ({"asked": {"wrod": 0}}, r"asked: wrod: tuning asks .*did you mean word\?"),
        ({"asked": {3: 0}}, r"asked=\{3: 0\}: kind of question"),
        ({"asked": {"box": -0.5}}, "asked: box: -0.5; a share"),
        ({"asked": {"box": "seldom"}}, "asked: box: 'seldom'; a share"),
        ({"asked": dict.fromkeys(TUNE_WEIGHTS, 0)}, "nothing is left to ask"),
    ],
)
def test_what_no_world_can_ask(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        WorldSize(**fields)


# --- the suite -------------------------------------------------------------------------------------------------------


def test_the_suite_of_studies_asks_the_eight_kinds_and_what_is_asked_apart(tmp_path: Path) -> None:
    assert set(SUITES["world"]) < set(SUITES["world-study"]) <= set(SUITES["world"]) | set(MORE)
    root = draw(tmp_path / "w", size=replace(SMALL, web=2, tune=4), workers=1)
    for row, split in asked("world-study"):
        items = load_items(row, root, split)
        assert len(items) >= 6 and all(item.gold is not None for item in items), row.id
    assert all(item.question.answer == REFUSAL for item in ask(0, "test", "refusal", 5))
    assert not any(item.question.answer == REFUSAL for item in ask(0, "test", "text", 20))
    assert any(c in item.question.answer for item in ask(0, "test", "caption", 5) for c in COLOURS)


def test_world_json_tells_the_fields_that_are_not_usual(tmp_path: Path) -> None:
    root = draw(tmp_path / "w", size=replace(SMALL, web=2, tune=4, refusals=0.0), workers=1)
    there = read_json(root / "world.json")
    assert there["refusals"] == 0.0 and "asked" not in there
