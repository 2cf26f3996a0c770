"""Recipes: what a person writes, what they are told when it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator

from leveret import recipe
from leveret.runs import RecipeError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Lora(Strict):
    rank: int = 8
    alpha: float = 16.0


class Learn(Strict):
    lr: float = Field(gt=0)
    lora: Lora | None = None


class Stage(Strict):
    learn: dict[str, Learn] = {}
    steps: int | Literal["auto"] = "auto"
    resize: Literal["squash", "pad"] = "pad"
    mix: list[Learn] = []


class Whole(Strict):
    name: str
    seed: int = 0
    tower: str = "clip"
    stages: dict[str, Stage] = {}
    free: dict[str, Any] = {}

    @field_validator("tower")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "clip":
            raise RecipeError(f"unknown tower {value!r}; did you mean 'clip'?")
        return value


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, Whole, "models", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_recipe_extends_another_and_overrides_come_last(tmp_path: Path) -> None:
    write(
        tmp_path / "base.yaml", "name: base\nseed: 1\nstages:\n  align: {steps: 10, learn: {connector: {lr: 2e-5}}}\n"
    )
    path = write(tmp_path / "mine.yaml", "extends: base.yaml\nname: mine\nstages: {align: {resize: squash}}\n")
    whole = recipe.load(path, Whole, "models", ["stages.align.steps=20", "stages.tune.mix=[{lr: 1}]", "seed=7"])
    assert whole.name == "mine" and whole.seed == 7
    assert whole.stages["align"] == Stage(learn={"connector": Learn(lr=2e-5)}, steps=20, resize="squash")
    assert whole.stages["tune"].mix == [Learn(lr=1)]
    assert recipe.load(path, Whole, "models", ["stages.tune.mix=[{lr: 1}]", "stages.tune.mix.0.lr=3"]).stages[
        "tune"
    ].mix[0] == Learn(lr=3)


def test_a_key_in_the_wrong_place_is_told_its_own_and_a_name_nearly_right_the_one_that_is_there() -> None:
    from leveret.train.stages import TrainRecipe

    for override, said in (
        ("order=random", "unknown key.*did you mean 'stages.align.order' or 'stages.tune.order'"),
        ("stages.tun.steps=3", "stages.tun.data: missing.*did you mean 'tune' and not 'tun'"),
        ("stages.tune=3", "allowed: keys and values"),
    ):
        with pytest.raises(RecipeError, match=said):
            recipe.load("world", TrainRecipe, "models", [override])


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: base\nstages:\n  align:\n    steps: many\n")
    path = write(
        tmp_path / "mine.yaml",
        "extends: base.yaml\nsed: 3\ntower: clap\nstages:\n  align:\n    resise: pad\n    resize: sqash\n"
        "    mix: [{lr: -1}, {}]\n    learn: {c: {lr: 1, lora: {rnk: 3}}}\n",
    )
    text = refusal(path, "stages.align.learn.c.lr=fast", "stages.align.mix.9.lr=1", "nonsense", "name.x=1")
    lines = text.splitlines()
    assert "12 faults" in lines[0] and len(lines) == 13

    def line(start: str) -> str:
        return next(line.strip() for line in lines if line.strip().startswith(start))

    assert line("sed:") == f"sed: unknown key (given 3); did you mean 'seed'?  [{path}:2]"
    assert "unknown tower 'clap'" in line("tower:") and f"{path}:3" in line("tower:")
    assert "'many'" in line("stages.align.steps:") and "a whole number or 'auto'" in line("stages.align.steps:")
    assert f"{tmp_path / 'base.yaml'}:4" in line("stages.align.steps:")
    assert "did you mean 'resize'" in line("stages.align.resise:") and f"{path}:6" in line("stages.align.resise:")
    assert "'squash' or 'pad'; did you mean 'squash'" in line("stages.align.resize:")
    assert "allowed: greater than 0" in line("stages.align.mix.0.lr:")
    assert "missing" in line("stages.align.mix.1.lr:")
    assert "did you mean 'rank'" in line("stages.align.learn.c.lora.rnk:")
    assert "override 'stages.align.learn.c.lr=fast'" in line("stages.align.learn.c.lr:")
    assert "last index is 1" in line("stages.align.mix.9")
    assert "key.path=value" in line("'nonsense'")
    assert "no keys below" in line("name.x")
    assert "override 'nope.x=1'" in refusal(path, "nope.x=1")


def test_yaml_surprises_are_gone(tmp_path: Path) -> None:
    text = "name: x\nfree: {a: 2e-5, b: on, c: no, d: 1.5, e: -3, f: 2024-01-02, g: true, h: ~, i: 1e3, j: 'yes'}\n"
    free = recipe.load(write(tmp_path / "a.yaml", text), Whole, "models").free
    assert free == {
        "a": 2e-5, "b": "on", "c": "no", "d": 1.5, "e": -3, "f": "2024-01-02", "g": True, "h": None, "i": 1000.0,
        "j": "yes",
    }  # fmt: skip
    assert isinstance(free["e"], int)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b\n", "'name' stands twice, first in line 1"),
        ("name: [\n", "not YAML"),
        ("- 1\n", "a mapping of keys to values"),
        ("", "name: missing"),
        ("name: a\nextends: 3\n", "the name or path of one recipe"),
        ("name: a\nextends: nothere.yaml\n", "no such recipe file"),
        ("name: a\nextends: a.yaml\n", "in a circle"),
        ("name: &n [*n]\n", "refers to itself"),
        ("name: !!python/object/apply:os.system [echo]\n", "not YAML"),
        ("name: !!int x\n", "not usable YAML"),
        ("{name: a, [1]: 2}\n", "YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_words(tmp_path: Path, text: str, said: str) -> None:
    answer = refusal(write(tmp_path / "a.yaml", text))
    assert said in answer and "a.yaml" in answer


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"name: \xff\xfe")
    assert "UTF-8" in refusal(tmp_path / "a.yaml")


def test_names_are_found_and_near_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "RECIPES", tmp_path / "recipes")
    (tmp_path / "recipes/models/bunny").mkdir(parents=True)
    write(tmp_path / "recipes/models/bunny/v1.0-3b.yaml", "name: bunny\n")
    write(tmp_path / "recipes/models/mine.yaml", "extends: bunny/v1.0-3b\nseed: 4\nx: 1\n")
    assert recipe.names("models") == ["bunny/v1.0-3b", "mine"]
    assert recipe.load("bunny/v1.0-3b", Whole, "models").name == "bunny"
    assert "did you mean 'bunny/v1.0-3b'?" in refusal("bunny/v1-3b").lower()
    assert "did you mean 'bunny/v1.0-3b'?" in refusal("bunny").lower()
    assert "the models recipes: bunny/v1.0-3b, mine" in refusal("zzz").lower()
    assert "recipes/models/mine.yaml:3" in refusal("mine")
    assert "is a folder" in refusal(str(tmp_path))


TABLE = """recipes:
  small: {seed: 1, stages: {align: {learn: {connector: {lr: 0.1}}}}}
  big:
    extends: bunny/small
    seed: 2
  named: {extends: bunny/big, name: mine}
"""


def test_a_file_may_hold_a_table_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "RECIPES", tmp_path / "recipes")
    (tmp_path / "recipes/models").mkdir(parents=True)
    write(tmp_path / "recipes/models/bunny.yaml", TABLE)
    write(tmp_path / "recipes/models/alone.yaml", "extends: bunny/big\nname: alone\n")
    assert recipe.names("models") == ["alone", "bunny/big", "bunny/named", "bunny/small"]
    big, named, alone = (recipe.load(name, Whole, "models") for name in ("bunny/big", "bunny/named", "alone"))
    assert (big.name, named.name, alone.name) == ("bunny/big", "mine", "alone")
    assert big.seed == named.seed == alone.seed == 2 and big.stages["align"].learn["connector"].lr == 0.1
    assert recipe.load("bunny/big", Whole, "models", ["stages.align.steps=3"]).stages["align"].steps == 3
    assert recipe.load("bunny/big", Whole, "models").stages["align"].steps == "auto", "an override changes no other"
    assert "did you mean 'bunny/big'" in refusal("bunny/bg").lower()
    assert "call one: bunny/small, bunny/big, bunny/named" in refusal("bunny")

    own = write(tmp_path / "own.yaml", "recipes:\n  one: {extends: bunny/big, seed: x}\n  two: 3\n  three:\n")
    told = refusal(f"{own}/one")
    assert "seed: given 'x'" in told and "own.yaml:2" in told
    assert recipe.load(f"{own}/one", Whole, "models", ["seed=3"]).name == f"{own}/one"
    for row in ("two", "three"):
        assert "a recipe is a mapping" in refusal(f"{own}/{row}") and "own.yaml" in refusal(f"{own}/{row}")
    assert f"call one: {own}/one" in refusal(own) and f"call one: {own}/two" in refusal(f"{own}/tow")
    plain = write(tmp_path / "plain.yaml", "name: x\n")
    for text, name in (("name: x\n", f"{plain}/x"), ("recipes: 3\n", plain), ("recipes: {}\nname: x\n", plain)):
        write(plain, text)
        assert "plain.yaml: a table of recipes holds names and their recipes under 'recipes'" in refusal(name)


def test_rows_that_extend_each_other_in_a_circle_are_named(tmp_path: Path) -> None:
    own = write(tmp_path / "own.yaml", "recipes:\n  a: {extends: own.yaml/b}\n  b: {extends: own.yaml/a}\n")
    assert f"in a circle: {own}/a -> {own}/b -> {own}/a" in refusal(f"{own}/a")


def test_what_an_extending_recipe_replaces_is_blamed_on_it(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: b\nstages:\n  a:\n    mix:\n      - {lr: 1}\n      - {lr: 2}\n")
    path = write(tmp_path / "mine.yaml", "extends: base.yaml\n\n\nstages: {a: {mix: [{lr: 0}]}}\n")
    assert f"{path}:4" in refusal(path)
    assert "override 'stages.a.mix=[{lr: 0}]'" in refusal(tmp_path / "base.yaml", "stages.a.mix=[{lr: 0}]")


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=12),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"\A[a-z_]{1,6}\Z"), inner, max_size=3),
    max_leaves=12,
)


def mapping(depth_values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from("abcd"), depth_values, max_size=4)


trees = mapping(scalars | mapping(scalars | mapping(scalars) | st.lists(scalars, max_size=3)))


@given(tree=trees)
def test_any_plain_data_survives_a_recipe(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("r") / "a.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "free": tree}, allow_unicode=True), encoding="utf-8")
    assert recipe.load(path, Whole, "models").free == tree


def merged(below: Any, above: Any) -> Any:
    """The rule, said once more in the plainest way."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: merged(below.get(key), above[key]) if key in above else below[key] for key in {**below, **above}}
    return above


@given(below=trees, above=trees)
def test_extends_merges_mappings_and_replaces_the_rest(
    below: dict[str, Any], above: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("r")
    write(folder / "base.yaml", yaml.safe_dump({"name": "x", "free": below}))
    path = write(folder / "mine.yaml", yaml.safe_dump({"extends": "base.yaml", "free": above}))
    assert recipe.load(path, Whole, "models").free == merged(below, above)


@given(keys=st.lists(st.from_regex(r"\A[a-z]{1,5}\Z"), min_size=1, max_size=4), value=values)
def test_an_override_sets_exactly_its_key(
    keys: list[str], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("r") / "a.yaml", "name: x\nfree: {zzzzzz: 1}\n")
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    free = recipe.load(path, Whole, "models", [f"free.{'.'.join(keys)}={text}"]).free
    assert free.pop("zzzzzz") == 1
    expected: Any = value
    for key in reversed(keys):
        expected = {key: expected}
    assert free == expected


@given(text=st.text(max_size=40))
def test_any_override_is_applied_or_refused_in_words(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("r") / "a.yaml", "name: x\n")
    try:
        recipe.load(path, Whole, "models", [text, f"free.{text}", f"free.a={text}", f"stages.0={text}"])
    except RecipeError as fault:
        assert str(fault)


def test_dump_is_plain_and_complete(tmp_path: Path) -> None:
    whole = recipe.load(write(tmp_path / "a.yaml", "name: x\nstages: {a: {learn: {c: {lr: 1}}}}\n"), Whole, "models")
    assert recipe.dump(whole)["stages"]["a"] == {
        "learn": {"c": {"lr": 1.0, "lora": None}},
        "steps": "auto",
        "resize": "pad",
        "mix": [],
    }
