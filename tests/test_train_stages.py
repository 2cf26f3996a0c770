"""Recipes and schedules: faults are told at once and by name; rates are pure functions with the shapes they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import train_fakes
from leveret.recipe import load
from leveret.runs import DataError, RecipeError
from leveret.train import train
from leveret.train.optim import SCHEDULES, rate
from leveret.train.plan import plan
from leveret.train.stages import TrainRecipe

SHARES = st.floats(0, 0.5)


def test_a_stage_or_a_part_that_learns_is_taken_away_by_null() -> None:
    usual = load("nano", TrainRecipe, "models")
    fewer = load("nano", TrainRecipe, "models", ["stages.align=null", "stages.tune.learn.vision=null"])
    assert set(usual.stages["tune"].learn) - set(fewer.stages["tune"].learn) == {"vision"}
    assert list(fewer.stages) == ["tune"]
    with pytest.raises(RecipeError, match=r"stages\.tune\.learn"):
        load("nano", TrainRecipe, "models", [f"stages.tune.learn.{part}=null" for part in usual.stages["tune"].learn])


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 400), SHARES, SHARES)
def test_a_rate_rises_once_and_then_never_rises_again(name: str, total: int, warmup: float, decay: float) -> None:
    rates = [rate(name, step, total, warmup, decay) for step in range(total)]
    peak = rates.index(max(rates))
    assert all(0 < value <= 1 + 1e-12 for value in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(rates[peak:], rates[peak + 1 :], strict=False))


def test_schedules_have_their_shapes() -> None:
    assert [rate("linear", step, 4, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [rate("constant", step, 4, 0.5) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert rate("cosine", 5, 10, 0.0) == pytest.approx(0.5)
    assert [rate("wsd", step, 10, 0.1, 0.5) for step in range(10)] == pytest.approx(
        [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    )


def test_all_faults_of_a_stage_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        train_fakes.recipe(
            tmp_path, steps=3, epochs=1, batch=4, micro_batch=8, schedule="wsd", warmup=0.6, decay=0.6,
            learn={"connector": {"lr": 1e-3, "from_layer": 1, "lora": {"bits": 8, "quant": "fp4"}}},
        )  # fmt: skip
    for words in (
        "exactly one of steps and epochs",
        "micro_batch 8",
        "warmup 0.6",
        "connector.lora.bits",
        "connector.lora.quant",
        "connector.from_layer",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", ["model", "a/b", "..", ""])
def test_a_stage_cannot_be_called_like_something_else_in_the_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="stage"):
        train_fakes.recipe(tmp_path, stages={name: {}})


def test_parts_that_would_get_no_gradient_are_refused_before_the_first_step(tmp_path: Path) -> None:
    data = train_fakes.toy_set(tmp_path / "data")
    stages = {
        "one": {"learn": {"vision": {"lr": 1e-3, "from_layer": 9}}},
        "two": {"learn": {"language": {"lr": 1e-3, "lora": {"targets": ["q_prij"]}}}},
    }
    recipe = train_fakes.recipe(data, stages=stages)
    for attempt in (lambda: train(recipe, tmp_path / "run"), lambda: plan(recipe, ["one", "two"])):
        with pytest.raises(RecipeError) as caught:
            attempt()
        assert "stages.one.learn.vision" in str(caught.value)
        assert "q_prij" in str(caught.value) and "q_proj" in str(caught.value)


def test_missing_data_of_all_stages_is_told_at_once(tmp_path: Path) -> None:
    recipe = train_fakes.recipe(tmp_path, stages={"one": {"data": "nowhere.json"}, "two": {"data": "nor-here.json"}})
    with pytest.raises(DataError, match=r"(?s)nowhere\.json.*nor-here\.json"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_stage_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tine.*tune"):
        train(train_fakes.recipe(tmp_path), tmp_path / "run", stages=["tine"])


def test_a_dry_run_composes_bunny_without_weights_or_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("bunny/v1.0-3b", out, dry_run=True)
    told = capsys.readouterr().out
    assert "3,182,254,624 parameters" in told and "188,743,680" in told and "729 per image" in told
    assert "memory" in told and not out.exists()
    align, _ = plan(load("bunny/v1.0-3b", TrainRecipe, "models"), ["align", "tune"])
    assert all(value.is_meta for value in align.vlm.parameters())
    assert align.memory.optimiser == 8 * 9_507_840


def test_a_dry_run_tells_programs_what_it_tells_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from leveret.cli import run

    assert run(["train", "bunny/v1.0-3b", "--dry-run", "--json", "-o", str(tmp_path / "run")]) == 0
    told = json.loads(capsys.readouterr().out)
    align = told["stages"]["align"]
    assert sum(part["parameters"] for part in align["parts"]) == 3_182_254_624
    assert [part["part"] for part in align["parts"]] == ["vision", "connector", "language"]
    assert align["memory"]["total"] == sum(value for key, value in align["memory"].items() if key != "total")
    assert "frozen counted in bf16" in align["notes"]["memory"] and not (tmp_path / "run").exists()


def test_a_dry_run_measures_data_that_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = train_fakes.toy_set(tmp_path / "data")
    train(train_fakes.recipe(data, epochs=2, steps=None), tmp_path / "run", dry_run=True)
    told = capsys.readouterr().out
    assert "24 samples" in told and "6 steps" in told
    train(train_fakes.recipe(data, steps=1), tmp_path / "run")
    began = "the backbones as they come, a connector that knows nothing"
    assert began in told and began in capsys.readouterr().err, "a run says it as its dry run does"


def test_steps_and_epochs_take_each_others_place() -> None:
    """A recipe has one of them; whoever asks for the other means it."""
    from leveret.train.run import read

    tune = read("world", ["stages.tune.epochs=3"]).stages["tune"]
    assert (tune.steps, tune.epochs) == (None, 3)
    tune = read("nano", ["stages.tune.steps=20"]).stages["tune"]
    assert (tune.steps, tune.epochs) == (20, None)
    tune = read("world", ["stages.tune.steps=20", "stages.tune.epochs=null"]).stages["tune"]
    assert (tune.steps, tune.epochs) == (20, None)
    for both in (["stages.tune.steps=20", "stages.tune.epochs=3"], ["stages.tune.epochs=3", "stages.tune.steps=20"]):
        with pytest.raises(RecipeError, match="exactly one of steps and epochs"):
            read("world", both)


@pytest.mark.parametrize(
    "change",
    [
        {"stages": {"tune": {"epochs": float("inf"), "steps": None}}},
        {"seed": 2**63},
        {"stages": {"tune": {"clip": float("inf")}}},
    ],
)
def test_numbers_that_are_none_are_refused(change: dict[str, Any]) -> None:
    whole = train_fakes.recipe(Path("toy.json")).model_dump(mode="json")
    whole["stages"]["tune"] |= change.pop("stages", {}).get("tune", {})
    with pytest.raises(ValueError, match=r"finite number|less than"):
        TrainRecipe.model_validate(whole | change)
